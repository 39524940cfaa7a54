"""Alembic migrations of the catalog. `radloop.catalog.database` runs them, and only when the schema is not at head."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration without an ini file; `connection` is used as it is, within its transaction."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    settings.attributes["connection"] = connection
    return settings


def upgrade(connection: Connection) -> None:
    """Bring the schema to head within the caller's transaction: all of it, or nothing."""
    command.upgrade(config(connection), "head")

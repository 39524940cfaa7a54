"""The catalog's tests run on both databases that it can be in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from radloop.catalog.store import Catalog
from radloop.testing.postgresql import PostgreSQL


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, home: Path) -> str:
    """Return the URL of a catalog that is not there yet."""
    if request.param == "sqlite":
        return f"sqlite:///{home}/catalog.db"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.with_password(server.database())


@pytest.fixture(scope="session")
def migrated(postgresql: PostgreSQL) -> str:
    """Return the name of a database with an empty catalog: a copy of it takes a tenth of the migrations' time."""
    url = postgresql.database()
    Catalog(postgresql.with_password(url)).close()
    return url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog(request: pytest.FixtureRequest, home: Path) -> Iterator[Catalog]:
    """Return an empty catalog."""
    where = f"sqlite:///{home}/catalog.db"
    if request.param == "postgresql":
        server: PostgreSQL = request.getfixturevalue("postgresql")
        where = server.with_password(server.database(request.getfixturevalue("migrated")))
    with Catalog(where) as made:
        yield made

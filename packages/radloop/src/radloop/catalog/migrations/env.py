"""Alembic runs this file. It uses the connection it is given, inside that connection's transaction."""

from __future__ import annotations

from alembic import context

from radloop.catalog.schema import metadata

# transactional_ddl: SQLite's DDL is transactional once sqlite3 no longer commits by itself (see database._set_pragmas).
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()

"""One module a schema version; `radloop.catalog.database.SCHEMA_VERSIONS` lists them."""

from __future__ import annotations

"""What was fetched from which PACS, so that the next run asks for what is new. Every UID is a pseudonym.

Only a shortcut: whether an instance is here is what `instances` and `quarantine` say (`Fetched.have`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

import msgspec
from sqlalchemy import Table, delete, insert, select

from radloop.catalog import schema
from radloop.catalog.database import Database, as_struct
from radloop.catalog.instances import chunks

_studies, _queries = schema.pacs_studies, schema.pacs_queries


class FetchedStudy(msgspec.Struct, frozen=True, kw_only=True):
    """A study of a PACS at its last fetch. `listed`: instances the PACS had; `missing`: of these, not here since."""

    study_uid: str
    listed: int
    missing: int


class Fetched(Database):
    """What `Catalog` knows of fetches."""

    def fetched(self, source: str) -> dict[str, FetchedStudy]:
        """The studies fetched from a PACS, by study."""
        query = select(_studies).where(_studies.c.source == source)
        with self._read() as connection:
            rows = connection.execute(query).mappings()
            return {row["study_uid"]: as_struct(row, FetchedStudy) for row in rows}

    def set_fetched(self, source: str, study: FetchedStudy) -> None:
        """Keep how a study's fetch ended."""
        key = (_studies.c.source == source, _studies.c.study_uid == study.study_uid)
        with self._write() as connection:
            connection.execute(delete(_studies).where(*key))
            values = {"source": source, **msgspec.to_builtins(study), "at": schema.now()}
            connection.execute(insert(_studies).values(**values))

    def looked(self, source: str, query: str) -> tuple[date | None, date] | None:
        """Which study dates a query (its digest) has been asked for, all it found being here: (from, None: all; through)."""
        where = (_queries.c.source == source, _queries.c.query == query)
        with self._read() as connection:
            row = connection.execute(select(_queries.c.since, _queries.c.through).where(*where)).first()
        if row is None:
            return None
        return date.fromisoformat(row.since) if row.since else None, date.fromisoformat(row.through)

    def set_looked(self, source: str, query: str, since: date | None, through: date) -> None:
        """Keep it."""
        key = (_queries.c.source == source, _queries.c.query == query)
        with self._write() as connection:
            connection.execute(delete(_queries).where(*key))
            dates = {"since": since.isoformat() if since else "", "through": through.isoformat()}
            connection.execute(insert(_queries).values(source=source, query=query, **dates))

    def have(self, sop_uids: Iterable[str]) -> set[str]:
        """Of these instances, those that have come: in use, or in quarantine, whatever was decided there."""
        return self._of(sop_uids, schema.instances, schema.quarantine)

    def in_use(self, sop_uids: Iterable[str]) -> set[str]:
        """Of these instances, those that the landing zone has accepted."""
        return self._of(sop_uids, schema.instances)

    def _of(self, sop_uids: Iterable[str], *tables: Table) -> set[str]:
        found: set[str] = set()
        with self._read() as connection:
            for some in chunks(sop_uids):
                for table in tables:
                    query = select(table.c.sop_uid).where(table.c.sop_uid.in_(some))
                    found |= {str(uid) for uid in connection.execute(query).scalars()}
        return found

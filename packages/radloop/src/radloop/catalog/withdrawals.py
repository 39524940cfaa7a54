"""Instances that a rejection note named. Every UID is a pseudonym."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import insert, select

from radloop.catalog import ledger, schema
from radloop.catalog.instances import Instances, chunks
from radloop.catalog.lineage import flag_affected
from radloop.catalog.schema import Reason, Refused, Status

WITHDRAWN = "withdrawn"
"""The flag of dataset versions and models that used a withdrawn instance."""

_table, _known = schema.withdrawn, schema.instances
_UNUSED = (Status.QUARANTINED, Status.SUPERSEDED)


class Withdrawals(Instances):
    """What `Catalog` knows of rejection notes."""

    def withdraw(self, sop_uids: Sequence[str], *, note: str, why: str, actor: str) -> list[str]:
        """Remember that these are not to be used, whether they are here or not yet; those that are named for the first time.

        Args:
            note: the note's own pseudonymous SOPInstanceUID.
            why: its title, in words.
        """
        with self._write() as connection:
            named: set[str] = set()
            for some in chunks(sop_uids):
                named |= set(connection.execute(select(_table.c.sop_uid).where(_table.c.sop_uid.in_(some))).scalars())
            new = [uid for uid in dict.fromkeys(sop_uids) if uid not in named]
            if new:
                at = schema.now()
                rows = [{"sop_uid": uid, "note": note, "why": why, "at": at} for uid in new]
                connection.execute(insert(_table), rows)
                ledger.append(
                    connection, ledger.Kind.WITHDRAWAL, note, {"why": why, "instances": len(new)}, actor=actor
                )
            return new

    def refuse_withdrawn(self, *, stage: str) -> list[Refused]:
        """Quarantine what is here of all that was withdrawn, and flag the dataset versions and models that used it."""
        query = (
            select(_known.c.sop_uid, _known.c.revision, _table.c.why)
            .join(_table, _table.c.sop_uid == _known.c.sop_uid)
            .where(_known.c.status.not_in(_UNUSED))
            .order_by(_known.c.sop_uid)
        )
        with self._read() as connection:
            found = connection.execute(query).all()
        refused = self.refuse(
            [
                Refused(sop_uid=uid, revision=revision, reason=Reason.WITHDRAWN, detail=why)
                for uid, revision, why in found
            ],
            stage=stage,
        )
        with self._write() as connection:
            for one in refused:
                flag_affected(connection, WITHDRAWN, one.sop_uid)
        return refused

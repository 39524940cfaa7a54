"""The ledger: what happened, who did it, never changed and never removed (the database itself refuses).

A row's `key` makes it idempotent: a stage that is killed after its append and run again appends nothing. The columns
`prev_hash` and `hash` wait for the hash chain; a row already holds all that a hash needs, in a fixed order.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, insert, select

from radloop.catalog import schema
from radloop.catalog.database import Database, as_struct
from radloop.catalog.schema import LedgerRow


class Kind(StrEnum):
    """What a ledger row is about."""

    INGEST = "ingest"
    DEIDENTIFICATION = "deidentification"
    DATASET = "dataset"
    TRAINING = "training"
    GATE = "gate"
    APPROVAL = "approval"
    RELEASE = "release"
    ROLLBACK = "rollback"
    ALERT = "alert"
    DRIFT = "drift"
    LABEL_REQUEST = "label_request"
    LABELS = "labels"
    QUARANTINE = "quarantine"
    REVISION = "revision"
    AUDIT = "audit"


class Ledger:
    """Append and read. `Catalog.ledger` is one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, kind: str, subject: str, payload: dict[str, Any], *, actor: str, key: str | None = None) -> bool:
        """Append one row; False, and nothing appended, when a row with this `key` is there already.

        Args:
            kind: a `Kind`.
            subject: what it is about: a digest, a run id, a pseudonym.
            payload: JSON-able facts. Never a name, an original identifier or any other PHI.
            actor: the person, stage or component that did it.
            key: makes the append idempotent.

        Raises:
            ValueError: `kind` is no `Kind`.
        """
        with self._database._write() as connection:
            return append(connection, kind, subject, payload, actor=actor, key=key) is not None

    def rows(self, kind: str | None = None, subject: str | None = None) -> list[LedgerRow]:
        """The rows in the order in which they were appended."""
        query = select(schema.ledger).order_by(schema.ledger.c.seq)
        if kind is not None:
            query = query.where(schema.ledger.c.kind == Kind(kind))
        if subject is not None:
            query = query.where(schema.ledger.c.subject == subject)
        with self._database._read() as connection:
            return [as_struct(row, LedgerRow) for row in connection.execute(query).mappings()]


def append(
    connection: Connection, kind: str, subject: str, payload: dict[str, Any], *, actor: str, key: str | None = None
) -> int | None:
    """Append within the caller's write transaction: the new row's `seq`, or None when its `key` is there already."""
    if key is not None and connection.execute(select(schema.ledger.c.seq).where(schema.ledger.c.key == key)).first():
        return None
    row = {
        "kind": Kind(kind),
        "subject": subject,
        "payload": payload,
        "actor": actor,
        "key": key,
        "at": schema.now(),
    }
    inserted = connection.execute(insert(schema.ledger).values(row)).inserted_primary_key
    return int(inserted[0]) if inserted else None

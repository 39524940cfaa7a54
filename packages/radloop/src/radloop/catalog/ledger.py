"""The ledger: what happened, who did it, never changed and never removed (the database itself refuses).

A row's `key` makes it idempotent: a stage that is killed after its append and run again appends nothing. Each row's `hash` is
made of the row and of the hash of the row before it: who changes, removes or inserts one afterwards, with the database's own
tools, breaks the chain there (`Ledger.verify`). Rows cut off at the end leave a shorter chain that is whole: keep the latest
number and hash elsewhere (audit sink, backup), and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import Connection, insert, select, update

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
    PATIENTS = "patients"
    RESULT = "result"
    WITHDRAWAL = "withdrawal"
    AUDIT = "audit"


GENESIS = "0" * 64
"""What the first row's `prev_hash` is."""

_FIRM = ("seq", "key", "at", "kind", "subject", "actor", "payload")


class Broken(msgspec.Struct, frozen=True):
    """Where the chain breaks: the number of the first row that is not as it was appended, and what is wrong with it."""

    seq: int
    what: str


class Verified(msgspec.Struct, frozen=True):
    """What `Ledger.verify` found: how many rows, the last one's number and hash, the first break or None."""

    rows: int
    seq: int
    hash: str
    broken: Broken | None


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

    def since(self, seq: int, limit: int) -> list[LedgerRow]:
        """The rows after a number, at most so many."""
        table = schema.ledger
        query = select(table).where(table.c.seq > seq).order_by(table.c.seq).limit(limit)
        with self._database._read() as connection:
            return [as_struct(row, LedgerRow) for row in connection.execute(query).mappings()]

    def head(self) -> tuple[int, str]:
        """Number and hash of the latest row; (0, GENESIS) of an empty ledger."""
        with self._database._read() as connection:
            return _head(connection)

    def verify(self) -> Verified:
        """Recompute the chain from the first row to the last. Reads the whole ledger; a million rows take half a minute."""
        before, rows, last = GENESIS, 0, 0
        with self._database._read() as connection:
            found = connection.execute(select(schema.ledger).order_by(schema.ledger.c.seq)).mappings()
            for row in found:
                broken = _broken(dict(row), before)
                if broken is not None:
                    return Verified(rows, last, before, Broken(row["seq"], broken))
                before, last, rows = row["hash"], row["seq"], rows + 1
        return Verified(rows, last, before, None)

    def sent(self, sink: str) -> int:
        """The number of the last row that an audit sink was told; 0, none."""
        table = schema.audit_sinks
        with self._database._read() as connection:
            return int(connection.execute(select(table.c.seq).where(table.c.sink == sink)).scalar() or 0)

    def set_sent(self, sink: str, seq: int) -> None:
        """An audit sink has been told all rows up to this one. It never goes back."""
        table = schema.audit_sinks
        with self._database._write() as connection:
            where = (table.c.sink == sink, table.c.seq < seq)
            if connection.execute(update(table).where(*where).values(seq=seq, at=schema.now())).rowcount:
                return
            if connection.execute(select(table.c.seq).where(table.c.sink == sink)).first() is None:
                connection.execute(insert(table).values(sink=sink, seq=seq, at=schema.now()))


def hash_of(row: Mapping[str, Any], before: str) -> str:
    """SHA-256 of the hash of the row before (64 hex digits) and the row: JSON, keys sorted, no white space, ASCII."""
    firm = {name: row[name] for name in _FIRM}
    text = json.dumps(firm, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()


def _broken(row: dict[str, Any], before: str) -> str | None:
    if row["prev_hash"] != before:
        return "it does not follow the row before it: rows were removed or inserted here"
    return "it was changed after it was appended" if row["hash"] != hash_of(row, before) else None


def _head(connection: Connection) -> tuple[int, str]:
    query = select(schema.ledger.c.seq, schema.ledger.c.hash).order_by(schema.ledger.c.seq.desc()).limit(1)
    row = connection.execute(query).first()
    return (row.seq, row.hash or GENESIS) if row is not None else (0, GENESIS)


def append(
    connection: Connection, kind: str, subject: str, payload: dict[str, Any], *, actor: str, key: str | None = None
) -> int | None:
    """Append within the caller's write transaction: the new row's `seq`, or None when its `key` is there already."""
    if key is not None and connection.execute(select(schema.ledger.c.seq).where(schema.ledger.c.key == key)).first():
        return None
    seq, before = _head(connection)
    row = {
        "seq": seq + 1,
        "kind": str(Kind(kind)),
        "subject": subject,
        "payload": json.loads(json.dumps(payload)),  # as it will be read: the hash is made of that
        "actor": actor,
        "key": key,
        "at": schema.now(),
    }
    connection.execute(insert(schema.ledger).values(**row, prev_hash=before, hash=hash_of(row, before)))
    return seq + 1

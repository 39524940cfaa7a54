"""What a listener asks of the catalog for every instance, to SQLite without SQLAlchemy: a tenth of the time.

Same tables, same transactions as `radloop.catalog.instances`, whose methods use this where the catalog is SQLite. Commits are
`synchronous = NORMAL`: a power cut may take the last ones. Any later commit of another connection (FULL) makes them durable,
and whoever records here must be able to record again (`radloop.dicom.landing` says how).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from radloop.catalog import schema
from radloop.catalog.schema import InstanceRow, QuarantineState, Recorded, Status

BUSY_TIMEOUT_S = 30.0
# Names of our own tables and columns, no values.
# ruff: noqa: S608
_COLUMNS = (*InstanceRow.__struct_fields__, "revision", "received_at", "status", "tags")
_INSERT = (
    f"INSERT INTO {schema.instances.name} ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
    " ON CONFLICT DO NOTHING"
)
_BY_SOURCE = f"SELECT sop_uid FROM {schema.instances.name} WHERE source_sha256 = ?1 AND key_id = ?2"
_FILE_KEY = f"INSERT OR IGNORE INTO {schema.instance_files.name} (file_key, sop_uid) VALUES (?, ?)"
_SEEN = (
    f"SELECT EXISTS ({_BY_SOURCE}) OR EXISTS (SELECT 1 FROM {schema.quarantine.name}"
    f" WHERE source_sha256 = ?1 AND state = '{QuarantineState.HELD}' AND revision IS NULL)"
)


class Direct:
    """One connection, shared by this process's threads; a forked child opens its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0

    def close(self) -> None:
        """Close the connection; the object opens another when it is used."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def unseen(self, source_sha256: str, key_id: str) -> bool:
        """Whether these bytes are neither an instance nor held in quarantine."""
        with self._lock:
            return not self._open().execute(_SEEN, (source_sha256, key_id)).fetchone()[0]

    def record_new(self, rows: Sequence[InstanceRow]) -> list[Recorded | None]:
        """Record in one transaction: NEW, SAME, or None where the SOPInstanceUID is known with other bytes."""
        with self._lock:
            database = self._open()
            database.execute("BEGIN IMMEDIATE")
            try:
                verdicts = [_record(database, row) for row in rows]
                database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                raise
            return verdicts

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._pid != os.getpid():
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}")
            self._connection, self._pid = connection, os.getpid()
        return self._connection


def _record(database: sqlite3.Connection, row: InstanceRow) -> Recorded | None:
    values = (*msgspec.structs.astuple(row), 1, schema.now(), Status.RECEIVED.value, "{}")
    if database.execute(_INSERT, values).rowcount:
        if row.file_key is not None:
            database.execute(_FILE_KEY, (row.file_key, row.sop_uid))
        return Recorded.NEW
    same = database.execute(_BY_SOURCE, (row.source_sha256, row.key_id)).fetchone()
    if same is None:
        return None
    if row.file_key is not None:
        database.execute(_FILE_KEY, (row.file_key, same[0]))
    return Recorded.SAME

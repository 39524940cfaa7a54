"""A copy of an SQLite database while others write to it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from radloop.catalog.database import BUSY_TIMEOUT_MS, storage_errors
from radloop.errors import DataError


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, between two commits of anybody, into one file (0600), checked and durable.

    Writers are not held up (the source is in WAL mode). `target` must not exist.

    Raises:
        DataError: the source is damaged.
        StorageFull: no space left.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with (
        storage_errors("backup"),
        closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_MS / 1000)) as reading,
        closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing)  # all pages in one step: a snapshot
        writing.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
        found = writing.execute("PRAGMA quick_check").fetchone()[0]
    if found != "ok":
        raise DataError(
            f"{source.name} is damaged", got="SQLite's own check fails", next_step="restore it from an earlier backup"
        )
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

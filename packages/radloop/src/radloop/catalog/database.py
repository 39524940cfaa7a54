"""The catalog's engine: how it connects, how a transaction begins, how its schema is brought to head.

Every write is one transaction that takes the write lock before it reads (SQLite: BEGIN IMMEDIATE; PostgreSQL: one
advisory lock), so what it decides still holds when it commits. A kill at any moment leaves all of it or none of it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy import URL, Connection, Engine, RowMapping, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from radloop.errors import EngineError, SettingsError

T = TypeVar("T")

SCHEMA_VERSIONS = ("0001", "0002", "0003")
"""Every schema version this code knows, oldest first; the last is what it works with."""

BUSY_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_S = 10
_ADVISORY_LOCK = 0x7261646C  # "radl"
_EXPECTED = "postgresql+psycopg2://USER@HOST/DATABASE, or sqlite:///PATH/catalog.db"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageFull(EngineError):
    """There is no room to keep what arrived. What was stored before is untouched; nothing is half written."""


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn "no space left" of the file system or of SQLite into `StorageFull`; all else passes as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _full(where) from error
    except (OperationalError, sqlite3.OperationalError) as error:
        cause = str(error.orig if isinstance(error, OperationalError) else error)
        if not any(said in cause for said in ("is full", "disk I/O", "No space left")):
            raise
        raise _full(where) from error


def _full(where: str) -> StorageFull:
    return StorageFull(
        f"no space left to write the {where}",
        expected="room on the file system that holds radloop's home",
        got="nothing was half written, nothing stored was lost, and what came last was not accepted",
        next_step="free some space, then send or run the same again",
    )


def create_private(path: Path) -> None:
    """Make an empty file of mode 0600 for a database, where there is none.

    One that is there is never opened: closing any handle of a file drops all of this process's POSIX locks on it, those of SQLite
    connections that are open elsewhere in the process too. Another process would then take itself for the last one, and remove
    the log that these connections go on writing to: commits that were acknowledged would be gone.
    """
    if not path.exists():
        with suppress(FileExistsError):  # another process was quicker
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


class Database:
    """One catalog database. Threads share it; a forked child is given connections of its own.

    Args:
        url: an SQLAlchemy URL, `sqlite:////home/catalog.db` or `postgresql+psycopg2://...`.

    Raises:
        SettingsError: the schema is newer than this code; the URL is none, or of a database that radloop does not work with.
        EngineError: the server cannot be reached, or does not let us in.
    """

    def __init__(self, url: str) -> None:
        self._url = _understood(url)
        self._sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = self._create_engine()
        self._pid = os.getpid()
        self._fork_lock = threading.Lock()
        try:
            self._bring_to_head()
        except BaseException:
            self._engine.dispose()
            raise

    @property
    def place(self) -> str:
        """Where the catalog is, for people: never with a password."""
        if self._sqlite:
            return f"SQLite, {Path(str(self._url.database)).name}"
        return f"PostgreSQL, {_server(self._url)}"

    @property
    def in_the_clear(self) -> bool:
        """Whether another machine holds it and nothing asks for TLS."""
        if self._sqlite or self._url.host in (None, "localhost", "127.0.0.1", "::1"):
            return False
        return self._url.query.get("sslmode") not in ("require", "verify-ca", "verify-full")

    def close(self) -> None:
        """Give all connections back. The object can be used again; it opens new ones."""
        self._engine.dispose()

    def _create_engine(self) -> Engine:
        if not self._sqlite:
            return _create_postgresql(self._url)
        if self._url.database in (None, "", ":memory:"):
            raise SettingsError(
                "the catalog needs a file",
                expected="sqlite:///PATH/catalog.db",
                got=str(self._url),
                next_step="give the path of a file; a catalog in memory would be lost with the process",
            )
        path = Path(str(self._url.database))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_private(path)
        engine = create_engine(self._url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000, "check_same_thread": False})
        event.listen(engine, "connect", _set_pragmas)
        event.listen(engine, "begin", _begin)
        return engine

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        """One transaction that sees one moment of the catalog, on either database."""
        with _reached(self._url), self._connection() as connection:
            if not self._sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction that holds the write lock from its start. Raises `StorageFull` when the disk is full."""
        with _reached(self._url), storage_errors("catalog"), self._connection() as connection:
            connection = connection.execution_options(radloop_write=True)
            with connection.begin():
                if not self._sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _ADVISORY_LOCK})
                yield connection

    def _connection(self) -> Connection:
        if self._pid != os.getpid():
            with self._fork_lock:
                if self._pid != os.getpid():
                    self._engine.dispose(close=False)  # the parent's connections: never touch them
                    self._pid = os.getpid()
        return self._engine.connect()

    def _bring_to_head(self) -> None:
        """Run the migrations that are missing, and none (nor Alembic's import, 0.8 s) when there are none."""
        if self._schema_version() == SCHEMA_VERSIONS[-1]:
            return
        with self._write() as connection:
            if _version(connection) == SCHEMA_VERSIONS[-1]:  # another process was quicker
                return
            from radloop.catalog import migrations

            migrations.upgrade(connection)

    def _schema_version(self) -> str | None:
        with self._read() as connection:
            version = _version(connection)
        if version is not None and version not in SCHEMA_VERSIONS:
            raise SettingsError(
                "the catalog was written by a newer radloop",
                expected=f"schema version {SCHEMA_VERSIONS[-1]} or older",
                got=f"schema version {version}",
                next_step="upgrade radloop on this machine; an older one would not keep what the newer one recorded",
            )
        return version


def _understood(url: str) -> URL:
    try:
        made = make_url(url)
    except ArgumentError:  # its message may repeat a password
        raise SettingsError("the catalog's URL cannot be read", expected=_EXPECTED) from None
    if made.get_backend_name() not in ("sqlite", "postgresql"):
        raise SettingsError("the catalog cannot be in this database", expected=_EXPECTED, got=made.get_backend_name())
    # SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3.
    return made.set(drivername="postgresql+psycopg2") if made.drivername == "postgresql" else made


def _create_postgresql(url: URL) -> Engine:
    defaults = {"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "radloop"}
    try:
        return create_engine(
            url, pool_pre_ping=True, connect_args={k: v for k, v in defaults.items() if k not in url.query}
        )
    except ImportError:
        raise SettingsError(
            f"there is no driver for {url.drivername}", next_step='pip install "radloop[postgresql]"'
        ) from None


def _server(url: URL) -> str:
    return f"{url.host or 'a local socket'}:{url.port or 5432}, database {url.database}, user {url.username}"


@contextmanager
def _reached(url: URL) -> Iterator[None]:
    """Say which server it was that is not there, was lost, or refuses us; no password is ever in it."""
    try:
        yield
    except OperationalError as error:
        lost = error.connection_invalidated or not error.statement
        if url.get_backend_name() == "sqlite" or not lost:
            raise
        raise EngineError(
            "the catalog's PostgreSQL cannot be reached",
            expected=_server(url),
            got=" ".join(str(error.orig).split())[:300],
            next_step="check `catalog` and `catalog_password` in radloop.toml, and that the server runs; then do the same again",
        ) from error


def as_struct(row: RowMapping, kind: type[T]) -> T:
    """A row as the struct of the same field names; columns the struct has not are left out."""
    # A key may be SQLAlchemy's quoted_name, a subclass that msgspec refuses.
    return msgspec.convert({str(name): value for name, value in row.items()}, kind)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def _set_pragmas(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # sqlite3 must not begin or commit by itself; _begin does
    cursor = dbapi_connection.cursor()
    # synchronous FULL: in WAL mode NORMAL loses the last commits on power failure, and C-STORE has answered Success.
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("radloop_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

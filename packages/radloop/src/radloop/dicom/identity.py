"""The crosswalk: what each pseudonym stands for. Encrypted, apart from the catalog, every read in the ledger.

It serves retries, results back to the PACS and withdrawal. Values are Fernet tokens (AES-128-CBC, HMAC-SHA256) under a
key derived from the crosswalk key, which rotates; the pseudonyms, which are the lookup keys, do not depend on it.
"""

from __future__ import annotations

import base64
import json  # not msgspec: a path that is no UTF-8 must come through
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import msgspec
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from radloop.catalog.database import BUSY_TIMEOUT_MS, create_private, storage_errors
from radloop.catalog.ledger import Kind, Ledger
from radloop.errors import DataError, SettingsError

MIN_KEY_BYTES = 32
_REMEMBERED = 4096
_CHECK = b"radloop crosswalk"


class Identity(StrEnum):
    """What a pseudonym stands for, and which values the crosswalk keeps for it."""

    PATIENT = "patient"
    """PatientID, IssuerOfPatientID, site."""
    ACCESSION = "accession"
    """AccessionNumber."""
    STUDY = "study"
    """StudyInstanceUID."""
    SERIES = "series"
    """SeriesInstanceUID."""
    INSTANCE = "instance"
    """SOPInstanceUID."""
    SOURCE = "source"
    """Keyed by the digest of the bytes as received: site, sender, path. What recovery and a retry need."""


class Entry(msgspec.Struct, frozen=True):
    """One identity: `pseudonym` (or digest) -> `values`, original and identifying."""

    kind: Identity
    pseudonym: str
    values: dict[str, str]

    def __repr__(self) -> str:
        return f"Entry({self.kind!r}, {self.pseudonym!r})"  # an entry in a log must not say who


Row = tuple[str, str, bytes]
"""Kind, pseudonym, encrypted values: an entry as it is kept."""

_OF_MANY = frozenset({Identity.PATIENT, Identity.ACCESSION, Identity.STUDY, Identity.SERIES})
_UIDS = frozenset({Identity.STUDY, Identity.SERIES, Identity.INSTANCE})


class Crosswalk:
    """An encrypted SQLite file (0600) in a folder of its own (0700). Safe for several threads and processes.

    Args:
        path: `home/identity/crosswalk.db`; made when missing.
        keys: secret keys of at least 32 bytes, the newest first. It encrypts; all decrypt, so a rotation that was
            interrupted is readable with both.
        ledger: where every read is recorded.

    Raises:
        SettingsError: a key is too short, or none of them opens this crosswalk.
    """

    def __init__(self, path: Path, keys: bytes | Sequence[bytes], ledger: Ledger) -> None:
        self._path = Path(path)
        self._ciphers = [_cipher(key) for key in ([keys] if isinstance(keys, bytes) else keys)]
        if not self._ciphers:
            raise SettingsError("the crosswalk needs a key", next_step="`radloop init` makes one")
        self._ledger = ledger
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._durable = True
        self._right_key: bytes | None = None
        # Entries that are surely kept: a study's instances share all but one. Newest last, by kind and pseudonym.
        self._remembered: dict[tuple[str, str], str] = {}
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_private(self._path)
        try:
            with storage_errors("crosswalk"), self._lock:
                self._check_key()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def new_key() -> bytes:
        """A new random key, 64 hex digits."""
        return os.urandom(32).hex().encode()

    def close(self) -> None:
        """Close the file; the object opens it again when it is used."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def put_many(self, entries: Iterable[Entry]) -> int:
        """Keep what pseudonyms stand for, in one durable commit; how many were new. What is there already stays.

        Raises:
            StorageFull: the disk is full; nothing was kept.
            DataError: two UIDs have one pseudonym; nothing was kept.
        """
        unique = {(entry.kind.value, entry.pseudonym): entry for entry in reversed(list(entries))}
        with storage_errors("crosswalk"), self._lock:
            database = self._open()
            query = "SELECT 1 FROM identity WHERE kind = ? AND pseudonym = ?"
            known = {key for key in unique if database.execute(query, key).fetchone()}
            for key in known:
                self._check_same(unique[key])
            return self.put_rows(self.encrypted([entry for key, entry in unique.items() if key not in known]))

    def encrypted(self, entries: Iterable[Entry]) -> list[Row]:
        """Entries made ready for `put_rows`; those that were put lately are left out. Raises DataError as `put_many`."""
        cipher, made = self._ciphers[0], []
        for entry in entries:
            key = (entry.kind.value, entry.pseudonym)
            if key not in self._remembered:
                made.append((*key, cipher.encrypt(json.dumps(entry.values).encode())))
            elif entry.kind in _UIDS and self._remembered[key] not in ("", _uid(entry.values)):
                raise _collision(entry.kind)
        return made

    def _check_same(self, entry: Entry) -> None:
        """Raise DataError when the pseudonym of a UID stands for another one already."""
        key = (entry.kind.value, entry.pseudonym)
        if entry.kind not in _UIDS:
            return
        if not self._remembered.get(key):
            query = "SELECT value FROM identity WHERE kind = ? AND pseudonym = ?"
            (value,) = self._open().execute(query, key).fetchone()
            self._remember(*key, _uid(_decrypted(MultiFernet(self._ciphers), value)))
        if self._remembered.get(key, _uid(entry.values)) != _uid(entry.values):
            raise _collision(entry.kind)

    def _remember(self, kind: str, pseudonym: str, uid: str) -> None:
        self._remembered[kind, pseudonym] = uid
        while len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def put_rows(self, rows: Sequence[Row], *, durable: bool = True) -> int:
        """Keep encrypted entries in one commit; how many were new. What is there already stays.

        Args:
            durable: False leaves it to the system when the commit reaches the disk: a power cut may take it (the file
                stays sound), so the caller must be able to put it again.

        Raises:
            StorageFull: the disk is full; nothing was kept.
        """
        if not rows:
            return 0
        with storage_errors("crosswalk"), self._lock:
            database = self._open()
            if durable is not self._durable:
                database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            with _transaction(database):
                self._refuse_wrong_key(self._ciphers)  # rotated by another process: nothing more under the old key
                before = database.total_changes
                # OR IGNORE: another process may have put the same since.
                database.executemany("INSERT OR IGNORE INTO identity (kind, pseudonym, value) VALUES (?, ?, ?)", rows)
                new = database.total_changes - before
                if new < len(rows):
                    self._check_kept(database, rows)
            for kind, pseudonym, value in rows:
                if kind in _OF_MANY:
                    said = _uid(_decrypted(MultiFernet(self._ciphers), value)) if kind in _UIDS else ""
                    self._remember(kind, pseudonym, said)
            return new

    def _check_kept(self, database: sqlite3.Connection, rows: Sequence[Row]) -> None:
        """Some were there already: whether they stand for the same UIDs."""
        cipher = MultiFernet(self._ciphers)
        for kind, pseudonym, value in rows:
            if kind in _UIDS:
                query = "SELECT value FROM identity WHERE kind = ? AND pseudonym = ?"
                (kept,) = database.execute(query, (kind, pseudonym)).fetchone()
                if _uid(_decrypted(cipher, kept)) != _uid(_decrypted(cipher, value)):
                    raise _collision(Identity(kind))

    def missing(self, kind: Identity, pseudonyms: Iterable[str]) -> set[str]:
        """Those of these pseudonyms that the crosswalk does not know. Nothing is decrypted."""
        wanted = sorted(set(pseudonyms))
        with self._lock:
            database = self._open()
            query = "SELECT 1 FROM identity WHERE kind = ? AND pseudonym = ?"
            return {one for one in wanted if database.execute(query, (kind.value, one)).fetchone() is None}

    def get(self, kind: Identity, pseudonym: str, *, who: str, why: str) -> dict[str, str] | None:
        """What one pseudonym stands for; None when the crosswalk does not know it. Recorded in the ledger first."""
        return self.get_many(kind, [pseudonym], who=who, why=why).get(pseudonym)

    def get_many(self, kind: Identity, pseudonyms: Iterable[str], *, who: str, why: str) -> dict[str, dict[str, str]]:
        """Pseudonym -> values, of those that are known.

        The ledger gets one `audit` row a call, before anything is returned: who, why and which pseudonyms, no value.
        """
        wanted = sorted(set(pseudonyms))
        payload = {"action": "read", "kind": kind, "why": why, "pseudonyms": wanted}
        self._ledger.append(Kind.AUDIT, "crosswalk", payload, actor=who)
        found = {}
        cipher = MultiFernet(self._ciphers)
        with self._lock:
            for pseudonym in wanted:
                query = "SELECT value FROM identity WHERE kind = ? AND pseudonym = ?"
                row = self._open().execute(query, (kind.value, pseudonym)).fetchone()
                if row is not None:
                    found[pseudonym] = _decrypted(cipher, row[0])
        return found

    def count(self) -> int:
        """How many identities are kept."""
        with self._lock:
            return int(self._open().execute("SELECT count(*) FROM identity").fetchone()[0])

    def rotate(self, new_key: bytes, *, by: str) -> int:
        """Encrypt everything anew under `new_key`, in one transaction; how many values.

        Order that survives a kill at any moment: write the new key in front of the old one in the key file, rotate,
        then take the old one out. Until then open the crosswalk with both.
        """
        with storage_errors("crosswalk"), self._lock:
            ciphers = [_cipher(new_key), *self._ciphers]
            cipher = MultiFernet(ciphers)
            database = self._open()
            database.execute("PRAGMA synchronous = FULL")
            self._durable = True
            with _transaction(database):
                rows = database.execute("SELECT kind, pseudonym, value FROM identity").fetchall()
                database.executemany(
                    "UPDATE identity SET value = ? WHERE kind = ? AND pseudonym = ?",
                    ((cipher.rotate(value), kind, pseudonym) for kind, pseudonym, value in rows),
                )
                database.execute("UPDATE key_check SET value = ?", (ciphers[0].encrypt(_CHECK),))
            # What the old key can open must not linger in free pages or in the log.
            database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._ciphers, self._right_key = [ciphers[0]], None
        self._ledger.append(Kind.AUDIT, "crosswalk", {"action": "rotate", "values": len(rows)}, actor=by)
        return len(rows)

    def _open(self) -> sqlite3.Connection:
        """This process's connection; a forked child never touches its parent's."""
        if self._connection is None or self._pid != os.getpid():
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False
            )
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                connection.execute(f"PRAGMA {pragma}")
            self._connection, self._pid, self._durable = connection, os.getpid(), True
        return self._connection

    def _check_key(self) -> None:
        database = self._open()
        with _transaction(database):
            database.execute(
                "CREATE TABLE IF NOT EXISTS identity "
                "(kind TEXT, pseudonym TEXT, value BLOB NOT NULL, PRIMARY KEY (kind, pseudonym)) WITHOUT ROWID"
            )
            database.execute("CREATE TABLE IF NOT EXISTS key_check (value BLOB NOT NULL)")
            if database.execute("SELECT 1 FROM key_check").fetchone() is None:
                database.execute("INSERT INTO key_check VALUES (?)", (self._ciphers[0].encrypt(_CHECK),))
            self._refuse_wrong_key(self._ciphers)

    def _refuse_wrong_key(self, ciphers: Sequence[Fernet]) -> None:
        (value,) = self._open().execute("SELECT value FROM key_check").fetchone()
        if value == self._right_key:
            return
        try:
            MultiFernet(ciphers).decrypt(value)
            self._right_key = value
        except InvalidToken:
            raise SettingsError(
                "the crosswalk key does not open this crosswalk",
                expected="the key it was last encrypted with",
                got="another key",
                next_step="put the right crosswalk.key beside radloop.toml; after a rotation, restart what still runs",
            ) from None


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _uid(values: dict[str, str]) -> str:
    """The UID of a study, a series or an instance, as its pseudonym is made from it."""
    return next(iter(values.values())).strip(" \t\r\n\0")


def _collision(kind: Identity) -> DataError:
    """122 bits make this improbable beyond measure; should it happen, two patients' images must not become one."""
    return DataError(
        f"two UIDs of one kind ({kind}) have the same pseudonym",
        expected="a pseudonym for each",
        got="one for both; nothing of the second was kept",
        next_step="keep a copy of the crosswalk and report this: it cannot be mended under the same project key",
    )


def _decrypted(cipher: MultiFernet, value: bytes) -> dict[str, str]:
    try:
        values: dict[str, str] = json.loads(cipher.decrypt(value))
        return values
    except InvalidToken:
        raise SettingsError(
            "a value in the crosswalk is damaged, or was encrypted with another key",
            next_step="restore identity/crosswalk.db from a backup",
        ) from None


def _cipher(key: bytes) -> Fernet:
    if len(key) < MIN_KEY_BYTES:
        raise SettingsError(
            "the crosswalk key is too short",
            expected=f"at least {MIN_KEY_BYTES} random bytes",
            got=f"{len(key)} bytes",
            next_step="`radloop init` makes a key",
        )
    derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"radloop crosswalk 1").derive(key)
    return Fernet(base64.urlsafe_b64encode(derived))

"""Instances as they arrive, are archived, revised and refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, RowMapping, Select, and_, func, insert, or_, select, update

from radloop.catalog import ledger, schema
from radloop.catalog.database import Database, as_struct, storage_errors
from radloop.catalog.direct import Direct
from radloop.catalog.lineage import flag_affected
from radloop.catalog.schema import (
    Archived,
    Instance,
    InstanceRow,
    Quarantined,
    QuarantineState,
    Reason,
    Recorded,
    Refused,
    Status,
)
from radloop.errors import DataError

T = TypeVar("T")
CHUNK = 500  # values in one IN list; SQLite of 2020 allows 999

_table = schema.instances
_held = schema.quarantine

SamePixels = Callable[[InstanceRow, Instance], bool]
"""Whether the decoded pixels of what arrived are those of what is stored. Called outside any transaction."""


class Instances(Database):
    """What `Catalog` knows of instances and of quarantine."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._direct = Direct(str(self._url.database)) if self._sqlite else None

    def close(self) -> None:
        """Give all connections back. The object can be used again; it opens new ones."""
        super().close()
        if self._direct is not None:
            self._direct.close()

    def unseen(self, source_sha256: str, key_id: str) -> bool:
        """Whether these bytes are neither a known instance nor held in quarantine."""
        if self._direct is not None:
            return self._direct.unseen(source_sha256, key_id)
        return not (self.known_sources([source_sha256], key_id) or self.held_sources([source_sha256]))

    def record_new(self, rows: Sequence[InstanceRow]) -> list[Recorded | None]:
        """Record what is new, quickly, in one transaction: NEW, SAME, or None where `record_many` has to compare pixels.

        Visible to every reader when this returns. On SQLite a power cut (not a kill) may take the last of these commits: the
        caller must be able to record again from what it has made durable itself.

        Raises:
            StorageFull: the disk is full; nothing was recorded.
        """
        if self._direct is None:
            with self._write() as connection:
                return _record_unseen(connection, rows)
        with storage_errors("catalog"):
            return self._direct.record_new(rows)

    def record(self, row: InstanceRow, same_pixels: SamePixels) -> Recorded:
        """Record one instance as received; see `record_many`."""
        return self.record_many([row], same_pixels)[0]

    def record_many(self, rows: Sequence[InstanceRow], same_pixels: SamePixels) -> list[Recorded]:
        """Record instances as received, in one transaction but for those that must be compared with what is stored.

        SAME: these bytes are known; nothing happens. NEW: the SOPInstanceUID is unknown. REVISION: it is known, with
        other bytes and the same decoded pixels: a new revision, the older one superseded; the instance moves with its
        patient, and dataset versions and models that used it under another patient are flagged. CONFLICT: other
        pixels; nothing is recorded, the stored instance stays, and the caller quarantines what arrived.

        Safe to repeat after a kill at any moment: what had been committed is SAME.
        """
        with self._write() as connection:
            verdicts = _record_unseen(connection, rows)
        return [
            self._record_compared(row, same_pixels) if verdict is None else verdict
            for row, verdict in zip(rows, verdicts, strict=True)
        ]

    def _record_compared(self, row: InstanceRow, same_pixels: SamePixels) -> Recorded:
        """Compare outside of any transaction, decide inside one; again when another writer came between."""
        stored = self.current(row.sop_uid)
        while stored is not None and self.known(row.source_sha256, row.key_id) is None:
            same = same_pixels(row, stored)
            with self._write() as connection:
                latest = _current(connection, row.sop_uid)
                if latest is not None and latest.source_sha256 == stored.source_sha256:
                    if same:
                        _revise(connection, row, latest, actor=row.sender)
                    return Recorded.REVISION if same else Recorded.CONFLICT
            stored = latest
        if row.file_key is not None:
            self.add_file_keys([(row.file_key, row.sop_uid)])
        return Recorded.SAME

    def replace(self, row: InstanceRow, *, by: str) -> Recorded:
        """Record `row` as the latest revision although its pixels differ: a person (`by`) decided a conflict.

        Dataset versions and models that used the instance are flagged `pixels_replaced`.
        """
        with self._write() as connection:
            current = _current(connection, row.sop_uid)
            if _known_sources(connection, [row.source_sha256], row.key_id):
                return Recorded.SAME
            if current is None:
                _insert(connection, [row], 1)
                return Recorded.NEW
            _revise(connection, row, current, actor=by)
            flag_affected(connection, "pixels_replaced", row.sop_uid)
            return Recorded.REVISION

    def known(self, source_sha256: str, key_id: str) -> Instance | None:
        """The revision that came in these bytes, whatever its status."""
        return self.known_sources([source_sha256], key_id).get(source_sha256)

    def known_sources(self, source_sha256s: Iterable[str], key_id: str) -> dict[str, Instance]:
        """As `known`, for many: digest -> revision."""
        with self._read() as connection:
            return _known_sources(connection, source_sha256s, key_id)

    def digests(self, source_sha256s: Iterable[str], key_id: str) -> dict[str, str]:
        """Those of these digests that are known -> the SOP instance UID: as `known_sources`, for a whole landing folder."""
        found: dict[str, str] = {}
        with self._read() as connection:
            for some in chunks(source_sha256s):
                query = select(_table.c.source_sha256, _table.c.sop_uid)
                where = (_table.c.source_sha256.in_(some), _table.c.key_id == key_id)
                found |= {row[0]: row[1] for row in connection.execute(query.where(*where))}
        return found

    def current(self, sop_uid: str) -> Instance | None:
        """The latest revision of an instance, whatever its status."""
        with self._read() as connection:
            return _current(connection, sop_uid)

    def revisions(self, sop_uid: str) -> list[Instance]:
        """All revisions of an instance, oldest first."""
        return self._instances(select(_table).where(_table.c.sop_uid == sop_uid).order_by(_table.c.revision))

    def pending(self, status: str = Status.RECEIVED, *, deid_digest: str | None = None) -> list[Instance]:
        """Current revisions with this status, sorted by SOP instance UID: what a stage has still to do.

        Args:
            status: `received` serves de-identification.
            deid_digest: also those archived by another de-identification than this one.
        """
        wanted = _table.c.status == Status(status)
        if deid_digest is not None:
            other = _table.c.deid_digest.is_distinct_from(deid_digest)
            wanted = or_(wanted, and_(_table.c.status == Status.ARCHIVED, other))
        return _by_uid(self._instances(select(_table).where(wanted)))

    def archived(self, sop_uids: Iterable[str] | None = None) -> list[Instance]:
        """De-identified instances in use, sorted by SOP instance UID; all of them, or those named."""
        query = select(_table).where(_table.c.status == Status.ARCHIVED)
        if sop_uids is None:
            return _by_uid(self._instances(query))
        found = [row for some in chunks(sop_uids) for row in self._instances(query.where(_table.c.sop_uid.in_(some)))]
        return _by_uid(found)

    def mark_archived(self, rows: Iterable[Archived]) -> int:
        """Record de-identified twins; one transaction. How many rows changed: superseded and refused ones do not."""
        changed = 0
        with self._write() as connection:
            for row in rows:
                values = {**msgspec.to_builtins(row), "status": Status.ARCHIVED}
                if row.pixel_sha256 is None:
                    del values["pixel_sha256"]
                where = (
                    _table.c.sop_uid == values.pop("sop_uid"),
                    _table.c.revision == values.pop("revision"),
                    _table.c.status.in_((Status.RECEIVED, Status.ARCHIVED)),
                )
                changed += connection.execute(update(_table).where(*where).values(**values)).rowcount
        return changed

    def set_pixel_digests(self, rows: Iterable[tuple[str, int, str]]) -> None:
        """Record (SOP instance UID, revision, digest of the decoded pixels), as the quality stage computes them."""
        with self._write() as connection:
            for sop_uid, revision, digest in rows:
                where = (_table.c.sop_uid == sop_uid, _table.c.revision == revision)
                connection.execute(update(_table).where(*where).values(pixel_sha256=digest))

    def add_file_keys(self, keys: Iterable[tuple[str, str]]) -> None:
        """Record that an instance lies under a path: (file key, SOP instance UID); known pairs do nothing."""
        with self._write() as connection:
            _add_file_keys(connection, keys)

    def counts(self) -> dict[str, dict[str, int]]:
        """Site -> status -> how many revisions."""
        query = select(_table.c.site, _table.c.status, func.count()).group_by(_table.c.site, _table.c.status)
        out: dict[str, dict[str, int]] = {}
        with self._read() as connection:
            for site, status, number in connection.execute(query.order_by(_table.c.site, _table.c.status)):
                out.setdefault(site, {})[status] = number
        return out

    def arrived(self) -> dict[str, str]:
        """When the last instance came, by study, of all that await de-identification. Times as in `received_at`."""
        query = select(_table.c.study_uid, func.max(_table.c.received_at)).where(_table.c.status == Status.RECEIVED)
        with self._read() as connection:
            return {row[0]: row[1] for row in connection.execute(query.group_by(_table.c.study_uid))}

    def seal_ingest(self, *, actor: str) -> dict[str, Any] | None:
        """Close the ingest batch: one ledger row for all that arrived since the last; its payload, or None.

        Derived from the tables in one transaction, so that a kill neither loses nor doubles a batch.
        """
        with self._write() as connection:
            open_rows = select(_table).where(_table.c.batch.is_(None))
            open_held = select(_held).where(_held.c.batch.is_(None), _held.c.revision.is_(None))
            new = [instance(row) for row in connection.execute(open_rows).mappings()]
            refused = connection.execute(open_held).mappings().all()
            if not new and not refused:
                return None
            payload = _batch_payload(new, refused)
            digests = sorted([row.source_sha256 for row in new] + [row["source_sha256"] for row in refused])
            subject = hashlib.sha256("\n".join(digests).encode()).hexdigest()
            seq = ledger.append(connection, ledger.Kind.INGEST, subject, payload, actor=actor)
            connection.execute(update(_table).where(_table.c.batch.is_(None)).values(batch=seq))
            held = (_held.c.batch.is_(None), _held.c.revision.is_(None))
            connection.execute(update(_held).where(*held).values(batch=seq))
            return payload

    # Quarantine

    def quarantine(
        self,
        *,
        stage: str,
        reason: Reason,
        detail: str,
        source_sha256: str,
        sop_uid: str | None = None,
        site: str | None = None,
    ) -> int:
        """Record that bytes which are no instance in use are held in quarantine; returns the row's id.

        Idempotent: the same bytes, stage and reason make one held row. `detail` holds no value of an attribute.
        """
        with self._write() as connection:
            values = {"sop_uid": sop_uid, "site": site, "detail": detail}
            return _hold(connection, source_sha256, stage, reason, values)

    def refuse(self, refused: Iterable[Refused], *, stage: str) -> list[Refused]:
        """Quarantine instances that a stage refuses, in one transaction; those that were, in the order given.

        Not refused again: what a person has released from quarantine for the same reason, and superseded revisions.
        """
        done = []
        with self._write() as connection:
            for item in refused:
                where = and_(_table.c.sop_uid == item.sop_uid, _table.c.revision == item.revision)
                row = connection.execute(select(_table).where(where)).mappings().first()
                if row is None:
                    raise DataError("a stage refused an instance that the catalog does not know", got=item.sop_uid)
                if row["status"] == Status.SUPERSEDED or _released(connection, row["source_sha256"], item.reason):
                    continue
                values = {
                    "sop_uid": item.sop_uid,
                    "revision": item.revision,
                    "site": row["site"],
                    "detail": item.detail,
                }
                _hold(connection, row["source_sha256"], stage, item.reason, values)
                connection.execute(update(_table).where(where).values(status=Status.QUARANTINED))
                done.append(item)
        return done

    def quarantined(
        self,
        *,
        state: str | None = QuarantineState.HELD,
        reason: Reason | None = None,
        sop_uid: str | None = None,
        source_sha256: str | None = None,
    ) -> list[Quarantined]:
        """Rows of the quarantine, oldest first; `state=None` gives those of every state."""
        query = select(_held).order_by(_held.c.id)
        given = {"state": state, "reason": reason, "sop_uid": sop_uid, "source_sha256": source_sha256}
        for name, value in given.items():
            if value is not None:
                query = query.where(_held.c[name] == value)
        with self._read() as connection:
            return [as_struct(row, Quarantined) for row in connection.execute(query).mappings()]

    def held_counts(self) -> dict[str, int]:
        """Reason -> how many entries are held for it."""
        query = select(_held.c.reason, func.count()).where(_held.c.state == QuarantineState.HELD)
        with self._read() as connection:
            found = connection.execute(query.group_by(_held.c.reason))
            return {str(reason): int(number) for reason, number in sorted(tuple(row) for row in found)}

    def held_sources(self, source_sha256s: Iterable[str]) -> dict[str, Quarantined]:
        """Digest -> the held entry, of bytes that never became an instance in use."""
        found: dict[str, Quarantined] = {}
        with self._read() as connection:
            for some in chunks(source_sha256s):
                where = (_held.c.source_sha256.in_(some), _held.c.state == QuarantineState.HELD)
                rows = connection.execute(select(_held).where(*where, _held.c.revision.is_(None))).mappings()
                found |= {row["source_sha256"]: as_struct(row, Quarantined) for row in rows}
        return found

    def quarantine_row(self, quarantine_id: int) -> Quarantined:
        """One row. Raises `DataError` when there is none."""
        with self._read() as connection:
            row = connection.execute(select(_held).where(_held.c.id == quarantine_id)).mappings().first()
        if row is None:
            raise DataError(
                f"quarantine holds no entry {quarantine_id}", next_step="`radloop quarantine list` shows what it holds"
            )
        return as_struct(row, Quarantined)

    def settle(self, quarantine_id: int, state: QuarantineState, *, by: str, outcome: str = "") -> None:
        """A person (`by`) retried, released or purged a held entry: its state, and a ledger row.

        Released, an instance that a stage had refused is in use again, and that stage does not refuse it again for
        the same reason. Retried, it is `received` again, and every stage looks at it anew.
        """
        row = self.quarantine_row(quarantine_id)
        with self._write() as connection:
            where = (_held.c.id == quarantine_id, _held.c.state == QuarantineState.HELD)
            if not connection.execute(update(_held).where(*where).values(state=state, by=by)).rowcount:
                return  # somebody settled it already
            if state != QuarantineState.PURGED and row.revision is not None:
                _restore(connection, row, keep_archived=state == QuarantineState.RELEASED)
            payload = {"id": row.id, "reason": row.reason, "stage": row.stage, "state": state, "outcome": outcome}
            ledger.append(connection, ledger.Kind.QUARANTINE, row.sop_uid or row.source_sha256, payload, actor=by)

    def _instances(self, query: Select[Any]) -> list[Instance]:
        with self._read() as connection:
            return [instance(row) for row in connection.execute(query).mappings()]


def instance(row: RowMapping) -> Instance:
    """A row of `instances` as its struct."""
    return as_struct(row, Instance)


def _by_uid(rows: list[Instance]) -> list[Instance]:
    """Sorted here, not by the database, whose order of characters depends on its locale."""
    return sorted(rows, key=lambda row: row.sop_uid)


def chunks(values: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """`values` in lists of at most `size`, short enough for one statement."""
    listed = list(values)
    return (listed[start : start + size] for start in range(0, len(listed), size))


def _record_unseen(connection: Connection, rows: Sequence[InstanceRow]) -> list[Recorded | None]:
    """Record what is new and pass over what is known; None where the stored pixels must be compared first."""
    known: dict[tuple[str, str], str] = {}
    for key_id in {row.key_id for row in rows}:
        found = _known_sources(connection, [row.source_sha256 for row in rows if row.key_id == key_id], key_id)
        known |= {(sha256, key_id): stored.sop_uid for sha256, stored in found.items()}
    taken: set[str] = set()
    for some in chunks({row.sop_uid for row in rows}):
        taken |= set(connection.execute(select(_table.c.sop_uid).where(_table.c.sop_uid.in_(some))).scalars())
    verdicts: list[Recorded | None] = []
    new = []
    for row in rows:
        if (row.source_sha256, row.key_id) in known:
            verdicts.append(Recorded.SAME)
        elif row.sop_uid in taken:
            verdicts.append(None)
        else:
            verdicts.append(Recorded.NEW)
            new.append(row)
            known[row.source_sha256, row.key_id] = row.sop_uid
            taken.add(row.sop_uid)
    if new:
        _insert(connection, new, 1)
    same = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict is Recorded.SAME]
    keys = [(row.file_key, known[row.source_sha256, row.key_id]) for row in same if row.file_key is not None]
    _add_file_keys(connection, keys)
    return verdicts


def _known_sources(connection: Connection, source_sha256s: Iterable[str], key_id: str) -> dict[str, Instance]:
    found: dict[str, Instance] = {}
    for some in chunks(source_sha256s):
        query = select(_table).where(_table.c.source_sha256.in_(some), _table.c.key_id == key_id)
        found |= {row["source_sha256"]: instance(row) for row in connection.execute(query).mappings()}
    return found


def _current(connection: Connection, sop_uid: str) -> Instance | None:
    query = select(_table).where(_table.c.sop_uid == sop_uid).order_by(_table.c.revision.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    return instance(row) if row is not None else None


def _insert(connection: Connection, rows: Sequence[InstanceRow], revision: int) -> None:
    more = {"revision": revision, "received_at": schema.now(), "status": Status.RECEIVED, "tags": {}}
    connection.execute(insert(_table), [{**msgspec.to_builtins(row), **more} for row in rows])
    _add_file_keys(connection, [(row.file_key, row.sop_uid) for row in rows if row.file_key is not None])


def _revise(connection: Connection, row: InstanceRow, current: Instance, *, actor: str) -> None:
    revision = current.revision + 1
    older = (_table.c.sop_uid == row.sop_uid, _table.c.revision <= current.revision)
    connection.execute(update(_table).where(*older).values(status=Status.SUPERSEDED))
    held = (_held.c.sop_uid == row.sop_uid, _held.c.revision.is_not(None), _held.c.state == QuarantineState.HELD)
    connection.execute(update(_held).where(*held).values(state=QuarantineState.RETRIED, by=actor))
    _insert(connection, [row], revision)
    moved = row.patient != current.patient
    if moved:
        flag_affected(connection, "patient_changed", row.sop_uid)
    payload = {"revision": revision, "site": row.site, "patient_changed": moved}
    ledger.append(connection, ledger.Kind.REVISION, row.sop_uid, payload, actor=actor)


def _add_file_keys(connection: Connection, keys: Iterable[tuple[str, str]]) -> None:
    files, wanted = schema.instance_files, set(keys)
    known: set[tuple[str, str]] = set()
    for some in chunks({file_key for file_key, _ in wanted}):
        found = connection.execute(select(files.c.file_key, files.c.sop_uid).where(files.c.file_key.in_(some)))
        known |= {(row.file_key, row.sop_uid) for row in found}
    new = [{"file_key": file_key, "sop_uid": sop_uid} for file_key, sop_uid in sorted(wanted - known)]
    if new:
        connection.execute(insert(files), new)


def _hold(connection: Connection, sha256: str, stage: str, reason: Reason, values: dict[str, Any]) -> int:
    where = (
        _held.c.source_sha256 == sha256,
        _held.c.stage == stage,
        _held.c.reason == Reason(reason),
        _held.c.state == QuarantineState.HELD,
    )
    present = connection.execute(select(_held.c.id).where(*where)).scalar()
    if present is not None:
        return int(present)
    row = {"source_sha256": sha256, "stage": stage, "reason": Reason(reason), "state": QuarantineState.HELD}
    inserted = connection.execute(insert(_held).values(**row, **values, created_at=schema.now())).inserted_primary_key
    assert inserted is not None
    return int(inserted[0])


def _released(connection: Connection, sha256: str, reason: Reason) -> bool:
    where = (_held.c.source_sha256 == sha256, _held.c.reason == reason, _held.c.state == QuarantineState.RELEASED)
    return connection.execute(select(_held.c.id).where(*where)).first() is not None


def _restore(connection: Connection, row: Quarantined, *, keep_archived: bool) -> None:
    """Put an instance back in use, unless it is held for another reason as well."""
    others = (_held.c.source_sha256 == row.source_sha256, _held.c.state == QuarantineState.HELD)
    if connection.execute(select(_held.c.id).where(*others)).first() is not None:
        return
    where = and_(
        _table.c.sop_uid == row.sop_uid, _table.c.revision == row.revision, _table.c.status == Status.QUARANTINED
    )
    path = connection.execute(select(_table.c.archive_path).where(where)).scalar()
    status = Status.ARCHIVED if path is not None and keep_archived else Status.RECEIVED
    connection.execute(update(_table).where(where).values(status=status))


def _batch_payload(new: list[Instance], refused: Sequence[RowMapping]) -> dict[str, Any]:
    return {
        "instances": sum(row.revision == 1 for row in new),
        "revisions": sum(row.revision > 1 for row in new),
        "patients": len({row.patient for row in new}),
        "studies": len({row.study_uid for row in new}),
        "sites": dict(sorted(Counter(row.site for row in new).items())),
        "quarantined": dict(sorted(Counter(row["reason"] for row in refused).items())),
    }

"""Dataset versions, models, label requests: from a model back to its instances, and forth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, func, insert, or_, select, update

from radloop.catalog import ledger, schema
from radloop.catalog.database import Database, as_struct
from radloop.catalog.schema import Affected, Dataset, LabelRequest, Member, Model, Trace
from radloop.errors import DataError

CROSSING = "linked_patients_cross"
"""Flag of a dataset version in which one person stands in several parts."""

ELSEWHERE = "elsewhere"
"""A model's `info["trained"]`, where radloop did not train it."""

T = TypeVar("T")
_CHUNK = 500


class Lineage(Database):
    """What `Catalog` knows of datasets, models and label requests."""

    def add_dataset(
        self,
        digest: str,
        *,
        path: str,
        members: Iterable[Member],
        parent: str | None = None,
        counts: Mapping[str, Any] | None = None,
        actor: str,
    ) -> int:
        """Record a dataset version and its members, with a ledger row; its number. A second time: nothing.

        Members whose patient has changed since the version was built flag it at once (`patient_changed`).
        """
        table = schema.datasets
        with self._write() as connection:
            number = connection.execute(select(table.c.number).where(table.c.digest == digest)).scalar()
            if number is not None:
                return int(number)
            rows = [{"digest": digest, **msgspec.to_builtins(member)} for member in members]
            number = (connection.execute(select(func.max(table.c.number))).scalar() or 0) + 1
            values = {"path": path, "parent": parent, "counts": dict(counts or {}), "flags": {}}
            connection.execute(insert(table).values(digest=digest, number=number, created_at=schema.now(), **values))
            if rows:
                connection.execute(insert(schema.dataset_members), rows)
            _flag_moved_meanwhile(connection, digest)
            _flag_linked_meanwhile(connection, digest)
            payload = {"number": number, "parent": parent, "counts": dict(counts or {}), "members": len(rows)}
            ledger.append(connection, ledger.Kind.DATASET, digest, payload, actor=actor, key=f"dataset:{digest}")
            return int(number)

    def datasets(self) -> list[Dataset]:
        """All dataset versions in the order of their numbers."""
        with self._read() as connection:
            rows = connection.execute(select(schema.datasets).order_by(schema.datasets.c.number)).mappings()
            return [as_struct(row, Dataset) for row in rows]

    def dataset(self, ref: str) -> Dataset:
        """The version with this digest, beginning of a digest (6 characters or more), or number.

        Raises:
            DataError: none, or more than one.
        """
        found = [d for d in self.datasets() if str(d.number) == ref or d.digest == ref]
        if not found and len(ref) >= 6:
            found = [d for d in self.datasets() if d.digest.startswith(ref)]
        return _the_one(found, "dataset version", ref, "`radloop dataset list` shows all of them")

    def members(self, digest: str) -> list[Member]:
        """The instances of a dataset version, sorted by SOP instance UID."""
        table = schema.dataset_members
        query = select(table.c.sop_uid, table.c.revision, table.c.patient, table.c.part)
        with self._read() as connection:
            rows = connection.execute(query.where(table.c.digest == digest)).mappings()
            # Sorted here, not by the database, whose order of characters depends on its locale.
            return sorted((as_struct(row, Member) for row in rows), key=lambda member: member.sop_uid)

    def add_model(
        self,
        digest: str,
        *,
        dataset_digest: str,
        preprocessing_digest: str,
        version: str | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record a model and the dataset version it was trained on; True when it is new.

        A second time: `version` and `info` are updated where given. It inherits its dataset's flags.

        Raises:
            DataError: the dataset version is unknown, or the model is known with another one.
        """
        table = schema.models
        with self._write() as connection:
            present = connection.execute(select(table).where(table.c.digest == digest)).mappings().first()
            if present is not None:
                if present["dataset_digest"] != dataset_digest:
                    raise DataError(
                        "a model cannot change the dataset version it was trained on",
                        expected=present["dataset_digest"],
                        got=dataset_digest,
                    )
                changed = {"version": version, "info": dict(info) if info is not None else None}
                changed = {name: value for name, value in changed.items() if value is not None}
                if changed:
                    connection.execute(update(table).where(table.c.digest == digest).values(**changed))
                return False
            where = schema.datasets.c.digest == dataset_digest
            dataset = connection.execute(select(schema.datasets.c.flags).where(where)).first()
            if dataset is None:
                raise DataError("a model of an unknown dataset version", got=dataset_digest)
            values = {
                "digest": digest,
                "dataset_digest": dataset_digest,
                "preprocessing_digest": preprocessing_digest,
                "version": version,
                "created_at": schema.now(),
                "info": dict(info or {}),
                "flags": dataset.flags,
            }
            connection.execute(insert(table).values(**values))
            return True

    def models(self) -> list[Model]:
        """All models, oldest first."""
        query = select(schema.models).order_by(schema.models.c.created_at, schema.models.c.digest)
        with self._read() as connection:
            return [as_struct(row, Model) for row in connection.execute(query).mappings()]

    def model(self, ref: str) -> Model:
        """The model with this digest, beginning of a digest (6 characters or more), or registered version.

        Raises:
            DataError: none, or more than one.
        """
        found = [m for m in self.models() if ref in (m.digest, m.version)]
        if not found and len(ref) >= 6:
            found = [m for m in self.models() if m.digest.startswith(ref)]
        return _the_one(found, "model", ref, "`radloop status` shows the models there are")

    def trace(self, model_digest: str) -> Trace:
        """From a model to its dataset version and the instances in it."""
        model = self.model(model_digest)
        return Trace(
            model=model, dataset=self.dataset(model.dataset_digest), members=self.members(model.dataset_digest)
        )

    def affected_by(self, sop_uids: Iterable[str]) -> Affected:
        """Which dataset versions hold any of these instances, and which models were trained on them."""
        with self._read() as connection:
            return _affected(connection, sop_uids)

    def open_label_request(self, request_id: str, *, sop_uids: Iterable[str], why: str, actor: str) -> bool:
        """Open a request for labels, with a ledger row; False when it is there already."""
        table = schema.label_requests
        wanted = sorted(set(sop_uids))
        with self._write() as connection:
            if connection.execute(select(table.c.id).where(table.c.id == request_id)).first() is not None:
                return False
            values = {"opened_at": schema.now(), "status": "open", "sop_uids": wanted, "why": why}
            connection.execute(insert(table).values(id=request_id, **values))
            payload = {"why": why, "instances": len(wanted)}
            key = f"label_request:{request_id}"
            ledger.append(connection, ledger.Kind.LABEL_REQUEST, request_id, payload, actor=actor, key=key)
            return True

    def close_label_request(self, request_id: str, *, actor: str) -> bool:
        """Close a request, with a ledger row; False when it is not open."""
        table = schema.label_requests
        with self._write() as connection:
            where = (table.c.id == request_id, table.c.status == "open")
            if not connection.execute(update(table).where(*where).values(status="closed")).rowcount:
                return False
            payload = {"status": "closed"}
            key = f"label_request_closed:{request_id}"
            ledger.append(connection, ledger.Kind.LABEL_REQUEST, request_id, payload, actor=actor, key=key)
            return True

    def label_requests(self, status: str | None = None) -> list[LabelRequest]:
        """Requests for labels, oldest first; of one status (`open`, `closed`) or all."""
        table = schema.label_requests
        query = select(table).order_by(table.c.opened_at, table.c.id)
        if status is not None:
            query = query.where(table.c.status == status)
        with self._read() as connection:
            return [as_struct(row, LabelRequest) for row in connection.execute(query).mappings()]


def flag_affected(connection: Connection, flag: str, sop_uid: str) -> None:
    """Flag every dataset version that holds an instance, and every model trained on one."""
    affected = _affected(connection, [sop_uid])
    for digest in affected.datasets:
        _flag(connection, schema.datasets, digest, flag, {sop_uid})
    for digest in affected.models:
        _flag(connection, schema.models, digest, flag, {sop_uid})


def flag_dataset(connection: Connection, digest: str, flag: str, sop_uids: Iterable[str]) -> list[str]:
    """Flag one dataset version and every model trained on it; the models' digests."""
    _flag(connection, schema.datasets, digest, flag, set(sop_uids))
    model = schema.models
    query = select(model.c.digest).where(model.c.dataset_digest == digest).order_by(model.c.digest)
    models = list(connection.execute(query).scalars())
    for trained in models:
        _flag(connection, model, trained, flag, set(sop_uids))
    return models


def _flag(connection: Connection, table: Any, digest: str, flag: str, sop_uids: set[str]) -> None:
    flags = dict(connection.execute(select(table.c.flags).where(table.c.digest == digest)).scalar_one())
    flags[flag] = sorted({*flags.get(flag, []), *sop_uids})
    connection.execute(update(table).where(table.c.digest == digest).values(flags=flags))


def _flag_moved_meanwhile(connection: Connection, digest: str) -> None:
    """A revision may have moved an instance to another patient while the version was being built."""
    member, instance = schema.dataset_members, schema.instances
    other = schema.instances.alias()
    latest = select(func.max(other.c.revision)).where(other.c.sop_uid == member.c.sop_uid).scalar_subquery()
    joined = (instance.c.sop_uid == member.c.sop_uid) & (instance.c.revision == latest)
    query = select(member.c.sop_uid).select_from(member).join(instance, joined)
    query = query.where(member.c.digest == digest, instance.c.patient != member.c.patient)
    moved = set(connection.execute(query).scalars())
    if moved:
        _flag(connection, schema.datasets, digest, "patient_changed", moved)


def _flag_linked_meanwhile(connection: Connection, digest: str) -> None:
    """Patients may have been found to be one person while the version was being built, or the user's own split parts them."""
    groups = persons(connection)
    if not groups:
        return
    member = schema.dataset_members
    found: dict[str, dict[str, str]] = {}
    query = select(member.c.sop_uid, member.c.patient, member.c.part).where(member.c.digest == digest)
    for row in connection.execute(query):
        if row.patient in groups:
            found.setdefault(min(groups[row.patient]), {})[row.sop_uid] = row.part
    crossing = {uid for uids in found.values() if len(set(uids.values())) > 1 for uid in uids}
    if crossing:
        _flag(connection, schema.datasets, digest, CROSSING, crossing)


def learnt_from(model: Model, members: Iterable[Member]) -> list[Member]:
    """Those of its dataset's members that shaped a model: the train and validation parts.

    Of a model that was trained elsewhere the validation part alone: it set calibration and threshold.
    """
    parts = ("validation",) if model.info.get("trained") == ELSEWHERE else ("train", "validation")
    return [member for member in members if member.part in parts]


def persons(connection: Connection) -> dict[str, set[str]]:
    """Patient -> all that are the same person, itself among them; only of those that are linked."""
    links = schema.patient_links
    groups: dict[str, set[str]] = {}
    for row in connection.execute(select(links.c.patient_a, links.c.patient_b)):
        both = groups.get(row.patient_a, {row.patient_a}) | groups.get(row.patient_b, {row.patient_b})
        for member in both:
            groups[member] = both
    return groups


def _affected(connection: Connection, sop_uids: Iterable[str]) -> Affected:
    wanted, member, model = sorted(set(sop_uids)), schema.dataset_members, schema.models
    datasets: set[str] = set()
    for start in range(0, len(wanted), _CHUNK):
        query = select(member.c.digest).where(member.c.sop_uid.in_(wanted[start : start + _CHUNK])).distinct()
        datasets |= set(connection.execute(query).scalars())
    if not datasets:
        return Affected(datasets=[], models=[])
    clauses = or_(*(model.c.dataset_digest == digest for digest in sorted(datasets)))
    models = connection.execute(select(model.c.digest).where(clauses).order_by(model.c.digest)).scalars()
    return Affected(datasets=sorted(datasets), models=list(models))


def _the_one(found: list[T], noun: str, ref: str, next_step: str) -> T:
    if len(found) != 1:
        raise DataError(f"{'no' if not found else 'more than one'} {noun} is called {ref!r}", next_step=next_step)
    return found[0]

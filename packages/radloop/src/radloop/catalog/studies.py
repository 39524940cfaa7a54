"""Studies as a whole: which are complete and may be used, and what comes of a late instance.

An instance belongs to the pipeline once its study was released (`Studies.release`): instances with an `id` up to the study's
`through`. What comes later is new again, waits until the study is complete again, and then makes a new revision of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, insert, select, update

from radloop.catalog import ledger, schema
from radloop.catalog.database import as_struct
from radloop.catalog.instances import Instances, instance
from radloop.catalog.lineage import flag_dataset
from radloop.catalog.schema import Instance, Status, StudyState

LATE = "study_incomplete"
"""Flag of a dataset version that was made before late instances of its studies came."""

_table, _studies = schema.instances, schema.studies


def complete(studies: Iterable[StudyState], quiet_s: float, at: datetime | None = None) -> list[StudyState]:
    """Those of which nothing has come for `quiet_s` seconds, or all that a PACS said it holds."""
    before = (at or datetime.now(UTC)) - timedelta(seconds=quiet_s)
    return [
        study
        for study in studies
        if datetime.fromisoformat(study.last_at) <= before
        or (study.expected is not None and study.present >= study.expected)
    ]


def seconds_left(studies: Iterable[StudyState], quiet_s: float, at: datetime | None = None) -> float:
    """Seconds until the last of these studies is complete, if nothing more comes of them; 0 without studies."""
    last = max((datetime.fromisoformat(study.last_at) for study in studies), default=None)
    if last is None:
        return 0.0
    return max(0.0, (last + timedelta(seconds=quiet_s) - (at or datetime.now(UTC))).total_seconds())


class Studies(Instances):
    """What `Catalog` knows of studies."""

    def unreleased(self, *, senders: Collection[str] | None = None) -> list[StudyState]:
        """Studies with instances that have come since their last release, the one that came first first.

        Args:
            senders: only those of which everything new came from one of these.
        """
        with self._read() as connection:
            found = [as_struct(row, StudyState) for row in connection.execute(_unreleased()).mappings()]
            if senders is not None:
                others = set(connection.execute(_from_others(senders)).scalars())
                found = [study for study in found if study.study_uid not in others]
        return sorted(found, key=lambda study: (study.last_at, study.study_uid))

    def expect(self, counts: Mapping[str, int]) -> None:
        """Keep how many instances of a study (pseudonym) a PACS says it holds (NumberOfStudyRelatedInstances)."""
        with self._write() as connection:
            for study_uid, expected in sorted(counts.items()):
                where = _studies.c.study_uid == study_uid
                if not connection.execute(update(_studies).where(where).values(expected=expected)).rowcount:
                    values = {"study_uid": study_uid, "revision": 0, "through": 0, "expected": expected}
                    connection.execute(insert(_studies).values(**values))

    def release(self, study_uids: Iterable[str], *, actor: str) -> dict[str, int]:
        """Give complete studies to the pipeline, in one transaction: study -> its revision, of those that had something new.

        A study that had been released before gets a new revision and a ledger row. Where an instance has come that it did
        not have, the dataset versions that used it, and the models trained on them, are flagged `study_incomplete`.
        """
        done: dict[str, int] = {}
        with self._write() as connection:
            for study_uid in sorted(set(study_uids)):
                revision = _release(connection, study_uid, actor)
                if revision is not None:
                    done[study_uid] = revision
        return done

    def release_from(self, *senders: str, actor: str) -> dict[str, int]:
        """`release` all studies of which everything new came from these senders: a folder that was read is complete."""
        return self.release([study.study_uid for study in self.unreleased(senders=senders)], actor=actor)

    def release_instance(self, sop_uid: str, *, actor: str) -> None:
        """`release` the study of an instance, if it has something new: a person decided that it is to be used."""
        with self._write() as connection:
            query = select(_table.c.study_uid).where(_table.c.sop_uid == sop_uid).order_by(_table.c.revision.desc())
            study_uid = connection.execute(query.limit(1)).scalar()
            if study_uid is not None:
                _release(connection, study_uid, actor)

    def ready(self) -> list[Instance]:
        """Instances that await de-identification and whose study was released, sorted by SOP instance UID."""
        query = select(_table).join(_studies, _studies.c.study_uid == _table.c.study_uid)
        query = query.where(_table.c.status == Status.RECEIVED, _table.c.id <= _studies.c.through)
        with self._read() as connection:
            found = [instance(row) for row in connection.execute(query).mappings()]
        return sorted(found, key=lambda row: row.sop_uid)

    def received_since(self, since: str) -> list[StudyState]:
        """Studies of which something has come since a moment (UTC, ISO 8601), whether released or not, oldest first."""
        usable = _table.c.status.in_((Status.RECEIVED, Status.ARCHIVED))
        query = _with_studies(
            select(
                _table.c.study_uid,
                func.coalesce(func.max(_studies.c.revision), 0).label("revision"),
                func.count().label("new"),
                func.count(_table.c.sop_uid.distinct()).label("present"),
                func.max(_table.c.received_at).label("last_at"),
                func.max(_studies.c.expected).label("expected"),
                func.max(_table.c.id).label("through"),
            )
        )
        query = query.where(usable).group_by(_table.c.study_uid).having(func.max(_table.c.received_at) >= since)
        with self._read() as connection:
            found = [as_struct(row, StudyState) for row in connection.execute(query).mappings()]
        return sorted(found, key=lambda study: (study.last_at, study.study_uid))

    def of_study(self, study_uid: str) -> list[Instance]:
        """The latest revisions of a study's instances that are in use, sorted by SOP instance UID."""
        usable = _table.c.status.in_((Status.RECEIVED, Status.ARCHIVED))
        query = select(_table).where(_table.c.study_uid == study_uid, usable).order_by(_table.c.sop_uid)
        with self._read() as connection:
            return [instance(row) for row in connection.execute(query).mappings()]

    def study_revisions(self) -> dict[str, int]:
        """Study -> revision, of those with late instances: released more than once."""
        query = select(_studies.c.study_uid, _studies.c.revision).where(_studies.c.revision > 1)
        with self._read() as connection:
            return {row.study_uid: row.revision for row in connection.execute(query.order_by(_studies.c.study_uid))}


def _new() -> ColumnElement[bool]:
    return (_table.c.status == Status.RECEIVED) & (_table.c.id > func.coalesce(_studies.c.through, 0))


def _with_studies(query: Select[Any]) -> Select[Any]:
    return query.select_from(_table).outerjoin(_studies, _studies.c.study_uid == _table.c.study_uid)


def _unreleased() -> Select[Any]:
    other = _table.alias()
    present = select(func.count(other.c.sop_uid.distinct())).where(other.c.study_uid == _table.c.study_uid)
    query = select(
        _table.c.study_uid,
        func.coalesce(func.max(_studies.c.revision), 0).label("revision"),
        func.count().label("new"),
        present.correlate(_table).scalar_subquery().label("present"),
        func.max(_table.c.received_at).label("last_at"),
        func.max(_studies.c.expected).label("expected"),
    )
    return _with_studies(query).where(_new()).group_by(_table.c.study_uid)


def _from_others(senders: Collection[str]) -> Select[Any]:
    query = select(_table.c.study_uid).where(_new(), _table.c.sender.not_in(sorted(senders)))
    return _with_studies(query).distinct()


def _release(connection: Connection, study_uid: str, actor: str) -> int | None:
    before = connection.execute(select(_studies).where(_studies.c.study_uid == study_uid)).mappings().first()
    through = before["through"] if before is not None else 0
    mine = _table.c.study_uid == study_uid
    query = select(_table.c.id, _table.c.sop_uid, _table.c.revision).where(mine, _table.c.id > through)
    new = connection.execute(query).all()
    if not new:
        return None
    revision = (before["revision"] if before is not None else 0) + 1
    values = {"revision": revision, "through": max(row.id for row in new), "released_at": schema.now()}
    if before is None:
        connection.execute(insert(_studies).values(study_uid=study_uid, **values))
    else:
        connection.execute(update(_studies).where(_studies.c.study_uid == study_uid).values(**values))
    if revision > 1:
        late = sorted({row.sop_uid for row in new if row.revision == 1})
        payload = {"study_revision": revision, "late": len(late), "revised": len(new) - len(late)}
        ledger.append(connection, ledger.Kind.REVISION, study_uid, payload, actor=actor)
        _flag_older(connection, study_uid, late)
    return revision


def _flag_older(connection: Connection, study_uid: str, late: list[str]) -> None:
    if not late:
        return
    member, known = schema.dataset_members, select(_table.c.sop_uid).where(_table.c.study_uid == study_uid)
    used = select(member.c.digest).where(member.c.sop_uid.in_(known)).distinct()
    for digest in sorted(connection.execute(used).scalars()):
        flag_dataset(connection, digest, LATE, late)

"""Patients (pseudonyms): each one's part of the split, and which of them are one person.

A part is decided once and kept. Only a link moves a patient: persons that were learnt from can never be test patients again, so
the part of all who are linked becomes train if one of them was in train, else validation if one was there, else test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec
from sqlalchemy import Connection, delete, insert, select, update

from radloop.catalog import ledger, schema
from radloop.catalog.database import Database, as_struct
from radloop.catalog.lineage import CROSSING as CROSSING
from radloop.catalog.lineage import flag_dataset, persons
from radloop.catalog.schema import PatientLink

_CHUNK = 500
_LEARNT_FIRST = ("train", "validation", "test")
_table, _links = schema.patients, schema.patient_links


class Linked(msgspec.Struct, frozen=True, kw_only=True):
    """What came of linking: pairs that are new, patients whose part changed, dataset versions and models flagged."""

    new: int
    known: int
    moved: dict[str, tuple[str, str]]
    datasets: list[str]
    models: list[str]


class Patients(Database):
    """What `Catalog` knows of patients."""

    def assign_parts(self, parts: Mapping[str, str], *, key_id: str) -> dict[str, str]:
        """Give each patient (a pseudonym) a part, for ever: the part of one who has one already does not change.

        One who is linked to a patient with a part gets that part.

        Returns:
            patient -> the part that holds, which may be another than the one asked for.
        """
        wanted = sorted(parts)
        with self._write() as connection:
            groups = persons(connection)
            everybody = {*wanted, *(member for one in wanted for member in groups.get(one, ()))}
            held = _held(connection, everybody)
            given: dict[str, str] = {}
            for one in wanted:
                if one not in held:
                    theirs = [held[m] for m in groups.get(one, ()) if m in held]
                    theirs += [given[m] for m in groups.get(one, ()) if m in given]
                    given[one] = _learnt_first(theirs) if theirs else parts[one]
            new = [
                {"patient": one, "key_id": key_id, "part": part, "decided_at": schema.now()}
                for one, part in given.items()
            ]
            if new:
                connection.execute(insert(_table), new)
        return {one: held.get(one) or given[one] for one in wanted}

    def assign_part(self, patient: str, part: str, *, key_id: str) -> str:
        """As `assign_parts`, for one patient."""
        return self.assign_parts({patient: part}, key_id=key_id)[patient]

    def parts(self) -> dict[str, str]:
        """Patient -> part, of all who have one."""
        with self._read() as connection:
            return dict(sorted((row.patient, row.part) for row in connection.execute(select(_table))))

    def links(self) -> list[PatientLink]:
        """All links, oldest first."""
        query = select(_links).order_by(_links.c.linked_at, _links.c.patient_a, _links.c.patient_b)
        with self._read() as connection:
            return [as_struct(row, PatientLink) for row in connection.execute(query).mappings()]

    def persons(self) -> dict[str, str]:
        """Patient -> the pseudonym that stands for the person (the first of the linked ones), of those that are linked."""
        with self._read() as connection:
            return {patient: min(group) for patient, group in sorted(persons(connection).items())}

    def known_patients(self, patients: Iterable[str]) -> set[str]:
        """Those of these patients of whom an instance has come."""
        found: set[str] = set()
        wanted = sorted(set(patients))
        with self._read() as connection:
            for start in range(0, len(wanted), _CHUNK):
                query = select(schema.instances.c.patient).distinct()
                some = schema.instances.c.patient.in_(wanted[start : start + _CHUNK])
                found |= set(connection.execute(query.where(some)).scalars())
        return found

    def link(self, pairs: Iterable[tuple[str, str, str]], *, by: str) -> Linked:
        """Record that pairs of patients are one person each: (patient, patient, reason), in one transaction.

        Linked patients get one part from now on. Dataset versions in which they stand in several parts, and the models trained
        on them, are flagged. One ledger row a new pair.
        """
        new, known = 0, 0
        touched: set[str] = set()
        with self._write() as connection:
            for one, other, reason in pairs:
                a, b = sorted((one, other))
                where = (_links.c.patient_a == a, _links.c.patient_b == b)
                if a == b or connection.execute(select(_links.c.by).where(*where)).first() is not None:
                    known += 1
                    continue
                values = {"reason": reason, "by": by, "linked_at": schema.now()}
                connection.execute(insert(_links).values(patient_a=a, patient_b=b, **values))
                payload = {"action": "link", "with": b, "reason": reason}
                ledger.append(connection, ledger.Kind.PATIENTS, a, payload, actor=by)
                touched |= {a, b}
                new += 1
            groups = persons(connection)
            moved = _unite_parts(connection, groups, touched, by)
            datasets, models = _flag_crossing(connection, groups, touched)
        return Linked(new=new, known=known, moved=moved, datasets=datasets, models=models)

    def unlink(self, one: str, other: str, *, by: str, reason: str) -> bool:
        """Take a link back; False when there is none. Parts stay as they are: models may have learnt from both meanwhile."""
        a, b = sorted((one, other))
        with self._write() as connection:
            gone = delete(_links).where(_links.c.patient_a == a, _links.c.patient_b == b)
            if not connection.execute(gone).rowcount:
                return False
            payload = {"action": "unlink", "with": b, "reason": reason}
            ledger.append(connection, ledger.Kind.PATIENTS, a, payload, actor=by)
            return True


def _held(connection: Connection, patients: Collection[str]) -> dict[str, str]:
    held: dict[str, str] = {}
    wanted = sorted(patients)
    for start in range(0, len(wanted), _CHUNK):
        some = _table.c.patient.in_(wanted[start : start + _CHUNK])
        held |= {row.patient: row.part for row in connection.execute(select(_table).where(some))}
    return held


def _learnt_first(parts: Collection[str]) -> str:
    known = [part for part in _LEARNT_FIRST if part in parts]
    return known[0] if known else min(parts)


def _unite_parts(
    connection: Connection, groups: Mapping[str, set[str]], touched: set[str], by: str
) -> dict[str, tuple[str, str]]:
    """Give all who are linked one part; who moved: patient -> (from, to)."""
    moved: dict[str, tuple[str, str]] = {}
    for group in {frozenset(groups[one]) for one in touched}:
        held = _held(connection, group)
        if len(set(held.values())) < 2:
            continue
        part = _learnt_first(held.values())
        for patient, before in sorted(held.items()):
            if before != part:
                connection.execute(update(_table).where(_table.c.patient == patient).values(part=part))
                payload = {"action": "moved", "from": before, "to": part, "why": "linked"}
                ledger.append(connection, ledger.Kind.PATIENTS, patient, payload, actor=by)
                moved[patient] = (before, part)
    return moved


def _flag_crossing(
    connection: Connection, groups: Mapping[str, set[str]], touched: set[str]
) -> tuple[list[str], list[str]]:
    member = schema.dataset_members
    datasets: set[str] = set()
    models: set[str] = set()
    for group in {frozenset(groups[one]) for one in touched}:
        found: dict[str, dict[str, str]] = {}
        wanted = sorted(group)
        for start in range(0, len(wanted), _CHUNK):
            query = select(member.c.digest, member.c.sop_uid, member.c.part)
            some = member.c.patient.in_(wanted[start : start + _CHUNK])
            for row in connection.execute(query.where(some)):
                found.setdefault(row.digest, {})[row.sop_uid] = row.part
        for digest, uids in sorted(found.items()):
            if len(set(uids.values())) > 1:
                models |= set(flag_dataset(connection, digest, CROSSING, uids))
                datasets.add(digest)
    return sorted(datasets), sorted(models)

"""Labels: imported by pseudonymous key, corrected by a later row, joined to instances before or after they come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, and_, func, insert, select

from radloop.catalog import ledger, schema
from radloop.catalog.database import Database, as_struct
from radloop.catalog.schema import KeyKind, Label, LabelImport, LabelRow, Resolved, Status
from radloop.errors import DataError

_table = schema.labels
_LISTED = 10  # contradictions named in one error


class Labels(Database):
    """What `Catalog` knows of labels."""

    def import_labels(self, task: str, rows: Iterable[LabelRow], *, source: str, actor: str) -> LabelImport:
        """Import one file of labels in one transaction; the same file again changes nothing.

        A value that differs from the one in force is a correction: a new row, and the latest wins. Keys that match no
        instance are kept, for the images may come later, and counted.

        Args:
            task: what is labelled, as in `radloop.toml`.
            rows: keys are pseudonyms.
            source: where the labels come from, without PHI.
            actor: who imported them.

        Raises:
            DataError: one key has two values in `rows`; nothing is imported.
        """
        rows = list(rows)
        wanted = _one_value_each(rows)
        counts = {"new": 0, "corrected": 0, "unchanged": 0}
        with self._write() as connection:
            held = {(label.key_kind, label.key): label for label in _in_force(connection, task)}
            at, fresh = schema.now(), []
            for (kind, key), value in sorted(wanted.items()):
                before = held.get((kind, key))
                if before is not None and before.value == value:
                    counts["unchanged"] += 1
                    continue
                counts["corrected" if before is not None else "new"] += 1
                revision = before.row_revision + 1 if before is not None else 1
                row = {"task": task, "key_kind": kind, "key": key, "value": value}
                fresh.append({**row, "source": source, "row_revision": revision, "imported_at": at})
            unmatched = len(wanted) - sum(_count_matched(connection, kind, wanted) for kind in KeyKind)
            if fresh:
                connection.execute(insert(_table), fresh)
                payload = {**counts, "unmatched": unmatched, "source": source}
                ledger.append(connection, ledger.Kind.LABELS, task, payload, actor=actor)
        return LabelImport(rows=len(rows), unmatched=unmatched, **counts)

    def labels(self, task: str) -> list[Label]:
        """The value in force for each key of a task, sorted by kind and key."""
        with self._read() as connection:
            return _in_force(connection, task)

    def label_history(self, task: str, key_kind: KeyKind, key: str) -> list[Label]:
        """Every value a key has had, oldest first."""
        where = (_table.c.task == task, _table.c.key_kind == key_kind, _table.c.key == key)
        with self._read() as connection:
            rows = connection.execute(select(_table).where(*where).order_by(_table.c.row_revision)).mappings()
            return [as_struct(row, Label) for row in rows]

    def unmatched_labels(self, task: str) -> list[Label]:
        """Labels in force whose keys belong to no instance received so far."""
        with self._read() as connection:
            found = _in_force(connection, task)
            wanted = {(label.key_kind, label.key): label.value for label in found}
            matched = {(kind, key) for kind in KeyKind for key in _matched(connection, kind, wanted)}
        return [label for label in found if (label.key_kind, label.key) not in matched]

    def resolve_labels(self, task: str) -> Resolved:
        """Join labels to current instances that are not quarantined: instance over file over study over accession.

        An instance whose file labels say different things (it lies under several paths), or whose labelled path has
        held several instances, is contradicting and gets no value, not even that of a weaker kind of key.
        """
        with self._read() as connection:
            values: dict[KeyKind, dict[str, str]] = {kind: {} for kind in KeyKind}
            for label in _in_force(connection, task):
                values[label.key_kind][label.key] = label.value
            instances = _instances_in_use(connection)
            paths = _paths(connection, {sop_uid for sop_uid, _, _ in instances})
        per_path: dict[str, set[str]] = defaultdict(set)
        for sop_uid, keys in paths.items():
            for key in keys:
                per_path[key].add(sop_uid)
        out: dict[str, tuple[str, KeyKind]] = {}
        contradicting = []
        for sop_uid, study_uid, accession_key in instances:
            if sop_uid in values[KeyKind.INSTANCE]:
                out[sop_uid] = (values[KeyKind.INSTANCE][sop_uid], KeyKind.INSTANCE)
                continue
            keys = [key for key in paths.get(sop_uid, ()) if key in values[KeyKind.FILE]]
            said = {values[KeyKind.FILE][key] for key in keys}
            if len(said) > 1 or any(len(per_path[key]) > 1 for key in keys):
                contradicting.append(sop_uid)
            elif said:
                out[sop_uid] = (said.pop(), KeyKind.FILE)
            elif study_uid in values[KeyKind.STUDY]:
                out[sop_uid] = (values[KeyKind.STUDY][study_uid], KeyKind.STUDY)
            elif accession_key in values[KeyKind.ACCESSION]:
                out[sop_uid] = (values[KeyKind.ACCESSION][accession_key], KeyKind.ACCESSION)
        return Resolved(values=out, contradicting=contradicting)


def _one_value_each(rows: Sequence[LabelRow]) -> dict[tuple[KeyKind, str], str]:
    values: dict[tuple[KeyKind, str], dict[str, list[int | None]]] = {}
    for row in rows:
        values.setdefault((row.key_kind, row.key), {}).setdefault(row.value, []).append(row.row)
    wrong = {key: said for key, said in values.items() if len(said) > 1}
    if not wrong:
        return {key: next(iter(said)) for key, said in values.items()}
    named = []
    for (kind, key), said in list(wrong.items())[:_LISTED]:
        lines = sorted(row for seen in said.values() for row in seen if row is not None)
        named.append(f"{kind} {key}" + (f" (rows {', '.join(map(str, lines))})" if lines else ""))
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    raise DataError(
        f"{len(wrong)} label {'keys have' if len(wrong) > 1 else 'key has'} more than one value in one file",
        expected="one value for each key",
        got="; ".join(named) + more,
        next_step="correct the rows, or key the labels more finely (by instance or by file); nothing was imported",
    )


def _in_force(connection: Connection, task: str) -> list[Label]:
    same = (_table.c.task, _table.c.key_kind, _table.c.key)
    latest = select(*same, func.max(_table.c.row_revision).label("latest")).where(_table.c.task == task)
    newest = latest.group_by(*same).subquery()
    joined = and_(*(column == newest.c[column.name] for column in same), _table.c.row_revision == newest.c.latest)
    rows = connection.execute(select(_table).join(newest, joined)).mappings()
    # Sorted here, not by the database, whose order of characters depends on its locale.
    return sorted((as_struct(row, Label) for row in rows), key=lambda label: (label.key_kind, label.key))


def _count_matched(connection: Connection, kind: KeyKind, wanted: dict[tuple[KeyKind, str], str]) -> int:
    return len(_matched(connection, kind, wanted))


def _matched(connection: Connection, kind: KeyKind, wanted: dict[tuple[KeyKind, str], str]) -> set[str]:
    """Those of the wanted keys of one kind that an instance bears."""
    keys = {key for key_kind, key in wanted if key_kind == kind}
    if not keys:
        return set()
    column = {
        KeyKind.INSTANCE: schema.instances.c.sop_uid,
        KeyKind.FILE: schema.instance_files.c.file_key,
        KeyKind.STUDY: schema.instances.c.study_uid,
        KeyKind.ACCESSION: schema.instances.c.accession_key,
    }[kind]
    return keys & set(connection.execute(select(column).distinct()).scalars())


def _instances_in_use(connection: Connection) -> list[tuple[str, str, str | None]]:
    table = schema.instances
    query = select(table.c.sop_uid, table.c.study_uid, table.c.accession_key)
    query = query.where(table.c.status.in_((Status.RECEIVED, Status.ARCHIVED)))
    return sorted((tuple(row) for row in connection.execute(query)), key=lambda row: row[0])


def _paths(connection: Connection, sop_uids: set[str]) -> dict[str, list[str]]:
    table, out = schema.instance_files, defaultdict(list)
    for row in connection.execute(select(table).order_by(table.c.sop_uid, table.c.file_key)):
        if row.sop_uid in sop_uids:
            out[row.sop_uid].append(row.file_key)
    return dict(out)

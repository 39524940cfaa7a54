"""A dataset version: one row an instance, with its label and part, named by a digest of its content.

The digest is taken over canonical values, not over the Parquet file, so it does not change with pyarrow's version.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from radloop.datasets.split import PARTS
from radloop.errors import ArtifactError, DataError

DERIVED = "f_"
"""Columns computed from pixels. They are left out of the digest, which covers their source: a last bit may differ
between numpy versions."""

_LEVELS = (("instance", "file"), ("study", "accession"))
_KEYS = {"instance": "sop_uid", "file": "file_key", "study": "study_uid", "accession": "accession_key"}


def build(
    instances: pa.Table,
    labels: Sequence[Mapping[str, Any]],
    parts: Mapping[str, str],
    *,
    classes: Mapping[str, int],
    parts_by: Literal["patient", "sop_uid"] = "patient",
) -> pa.Table:
    """Join instances, labels and parts; rows sorted by sop_uid.

    A label keyed by instance or file is more specific than one keyed by study or accession, and wins. Of one key the
    highest row_revision counts.

    Args:
        instances: the instance table of `datasets.quality`.
        labels: rows of the catalog's labels of one task: key_kind, key, value, source, row_revision.
        parts: patient to part, or sop_uid to part for a split that the user gave.
        classes: label value to 0 (negative) or 1 (positive).
        parts_by: what the keys of `parts` are.

    Returns:
        `instances` with columns label (int8, null where unlabelled), label_source and part.

    Raises:
        DataError: two values for one key or one instance at the same level, values outside `classes`, more than one
            key id, an instance twice, or an instance without part. Label values are never shown: a wrongly chosen
            column may hold names.
    """
    table = instances.select([c for c in instances.column_names if c not in ("label", "label_source", "part")])
    table = table.sort_by("sop_uid")
    _check_instances(table)
    values = _labels(table, labels, classes)
    where = [parts.get(key) for key in _strings(table, parts_by)]
    lost = sum(p not in PARTS for p in where)
    if lost:
        raise DataError(
            "instances have no part",
            expected=f"one of {', '.join(PARTS)} for each of {len(where)} instances",
            got=f"{lost} without",
            next_step="complete the split column, or leave it out: radloop then splits by patient",
        )
    table = table.append_column("label", pa.array([v and v[0] for v in values], pa.int8()))
    table = table.append_column("label_source", pa.array([v and v[1] for v in values], pa.string()))
    return table.append_column("part", pa.array(where, pa.string()))


def _check_instances(table: pa.Table) -> None:
    if len(set(table["sop_uid"].to_pylist())) != len(table):
        raise DataError("an instance comes twice", expected="one row a sop_uid", got=f"{len(table)} rows")
    keys = set(table["key_id"].to_pylist()) if "key_id" in table.column_names else set()
    if len(keys) > 1:
        raise DataError(
            "the dataset mixes pseudonyms of several project keys",
            expected="one key id",
            got=", ".join(sorted(str(k) for k in keys)),
            next_step="one patient may stand there under two pseudonyms: make a new archive under one key",
        )


def _strings(table: pa.Table, column: str) -> list[str]:
    """A column's values; null becomes "", which is no key."""
    return [str(value or "") for value in table[column].to_pylist()]


def _labels(
    table: pa.Table, labels: Sequence[Mapping[str, Any]], classes: Mapping[str, int]
) -> list[tuple[int, str] | None]:
    """(label, source) for each row of the table, None where there is none."""
    current = _current(labels, classes)
    found: list[tuple[int, str] | None] = [None] * len(table)
    for level in _LEVELS:
        columns = [(current[kind], _strings(table, _KEYS[kind])) for kind in level if _KEYS[kind] in table.column_names]
        clashes = 0
        for i in range(len(table)):
            here = [by_key[keys[i]] for by_key, keys in columns if keys[i] in by_key]
            clashes += len({label for label, _ in here}) > 1
            if here and found[i] is None:
                found[i] = here[0]
        if clashes:
            raise DataError(
                f"the labels keyed by {' and by '.join(level)} contradict each other",
                expected="one label an instance",
                got=f"two for {clashes} of {len(table)} instances",
                next_step="correct the label files and import them again: radloop labels import FILE",
            )
    return found


def _current(
    labels: Sequence[Mapping[str, Any]], classes: Mapping[str, int]
) -> defaultdict[str, dict[str, tuple[int, str]]]:
    """key_kind -> key -> (label, source), of the latest revision of each key."""
    latest: dict[tuple[str, str], int] = {}
    for row in labels:
        place = (str(row["key_kind"]), str(row["key"]))
        latest[place] = max(latest.get(place, row["row_revision"]), row["row_revision"])
    current: defaultdict[str, dict[str, tuple[int, str]]] = defaultdict(dict)
    unknown, clashing = Counter[str](), set[tuple[str, str]]()
    for row in labels:
        place, value = (str(row["key_kind"]), str(row["key"])), str(row["value"])
        if row["row_revision"] != latest[place]:
            continue
        if value not in classes:
            unknown[value] += 1
            continue
        label = (classes[value], str(row["source"]))
        if current[place[0]].setdefault(place[1], label)[0] != label[0]:
            clashing.add(place)
    if unknown:
        raise DataError(
            "labels hold values that no class names",
            expected=" or ".join(sorted(classes)),
            got=f"{len(unknown)} other values in {sum(unknown.values())} rows",
            next_step="name every value under [labels] classes in radloop.toml, or choose the right column",
        )
    if clashing:
        raise DataError(
            "two different labels for one key",
            expected="one value a key",
            got=f"{len(clashing)} keys with two ({', '.join(sorted({kind for kind, _ in clashing}))})",
            next_step="key the labels more finely (SOPInstanceUID or file), or correct them and import them again",
        )
    return current


def digest(table: pa.Table) -> str:
    """SHA-256 (hex) of a manifest's values.

    Covers column names and values, rows by sop_uid; not the order of columns, nulls' types, string encodings or
    `f_` columns. Not a number becomes null.
    """
    names = sorted(c for c in table.column_names if not c.startswith(DERIVED))
    rows = table.select(names).sort_by("sop_uid")
    seen = hashlib.sha256(msgspec.json.encode(names))
    for batch in rows.to_batches(max_chunksize=4096):
        columns = [batch.column(i).to_pylist() for i in range(len(names))]
        for row in zip(*columns, strict=True):
            seen.update(msgspec.json.encode([_canonical(v) for v in row]) + b"\n")
    return seen.hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value + 0.0
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    return value


def write(table: pa.Table, path: Path) -> str:
    """Write a manifest as Parquet, whole or not at all; returns its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table.sort_by("sop_uid").replace_schema_metadata(None), temporary)
    temporary.replace(path)
    return digest(table)


def read(path: Path, *, expected_digest: str | None = None) -> pa.Table:
    """Read a manifest. Raises ArtifactError if it is not there, no Parquet, or not of the digest expected."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError("a manifest cannot be read", expected=path.name, got=type(error).__name__) from None
    if expected_digest is not None and (got := digest(table)) != expected_digest:
        raise ArtifactError("a manifest changed after it was published", expected=expected_digest, got=got)
    return table


def counts(table: pa.Table) -> dict[str, int]:
    """Instances, patients, labelled, positive, and instances of each part."""
    labels = table["label"].to_pylist()
    by_part = Counter(table["part"].to_pylist())
    return {
        "instances": len(table),
        "patients": len(pc.unique(table["patient"])),
        "labelled": sum(v is not None for v in labels),
        "positive": sum(v == 1 for v in labels),
        **{p: by_part[p] for p in PARTS},
    }


def diff(a: pa.Table, b: pa.Table) -> dict[str, Any]:
    """What changed from version `a` to version `b`.

    Returns:
        `added`, `removed`, `revised` (other file), `relabelled` and `moved` (other part or patient), each
        `{"count", "by_site", "by_label", "sop_uids"}`: sites and labels are those of `b`, of `a` for `removed`.
        `moved` should be empty: parts are sticky.
    """
    before, after = _by_uid(a), _by_uid(b)
    both = sorted(before.keys() & after.keys())

    def changed(*columns: str) -> list[str]:
        return [uid for uid in both if any(before[uid].get(c) != after[uid].get(c) for c in columns)]

    return {
        "added": _summary(sorted(after.keys() - before.keys()), after),
        "removed": _summary(sorted(before.keys() - after.keys()), before),
        "revised": _summary(changed("file_sha256"), after),
        "relabelled": _summary(changed("label"), after),
        "moved": _summary(changed("part", "patient"), after),
    }


def _by_uid(table: pa.Table) -> dict[str, dict[str, Any]]:
    wanted = [c for c in ("sop_uid", "patient", "site", "label", "part", "file_sha256") if c in table.column_names]
    return {row["sop_uid"]: row for row in table.select(wanted).to_pylist()}


def _summary(uids: list[str], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    def count(column: str) -> dict[str, int]:
        values = Counter("none" if (v := rows[uid].get(column)) is None else str(v) for uid in uids)
        return dict(sorted(values.items()))

    return {"count": len(uids), "by_site": count("site"), "by_label": count("label"), "sop_uids": uids}

"""A dataset version: what its digest covers, which label an instance gets, what changed between two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.datasets import manifest
from radloop.errors import ArtifactError, DataError

CLASSES = {"yes": 1, "no": 0}


def instances(n: int = 4, **columns: list[Any]) -> pa.Table:
    """`n` instances of `n` patients at two sites, two instances a study."""
    base: dict[str, list[Any]] = {
        "sop_uid": [f"2.25.{i}" for i in range(n)],
        "study_uid": [f"2.25.9{i // 2}" for i in range(n)],
        "accession_key": [f"A{i // 2}" for i in range(n)],
        "file_key": [f"F{i}" for i in range(n)],
        "patient": [f"P{i}" for i in range(n)],
        "key_id": ["0a0b0c0d"] * n,
        "site": ["A" if i % 2 else "B" for i in range(n)],
        "file_sha256": [f"{i:064x}" for i in range(n)],
        "age_years": [float(i) for i in range(n)],
        "f_mean": [0.1 * i for i in range(n)],
    }
    return pa.table(base | columns)


def label(kind: str, key: str, value: str, revision: int = 1) -> dict[str, Any]:
    """A row of the catalog's labels."""
    return {"key_kind": kind, "key": key, "value": value, "source": "labels.csv", "row_revision": revision}


def built(labels: list[dict[str, Any]], table: pa.Table | None = None) -> pa.Table:
    """A manifest, everybody in train."""
    table = instances() if table is None else table
    return manifest.build(table, labels, dict.fromkeys(table["patient"].to_pylist(), "train"), classes=CLASSES)


def test_labels_join_by_every_kind_of_key() -> None:
    """Labels come keyed by accession, study, instance or file; a kind that does not join leaves a study unlabelled."""
    table = built([
        label("accession", "A0", "yes"), label("study", "2.25.91", "no"),
        label("instance", "2.25.1", "no"), label("file", "F3", "yes"),
    ])  # fmt: skip
    assert table["label"].to_pylist() == [1, 0, 0, 1]
    assert table["label"].type == pa.int8()


def test_an_unlabelled_instance_stays_with_null() -> None:
    """Unlabelled images wait for their labels; dropping them would lose them for the next version."""
    assert built([label("instance", "2.25.1", "no")])["label"].to_pylist() == [None, 0, None, None]


def test_the_latest_revision_of_a_label_counts() -> None:
    """A corrected label must replace the wrong one, not contradict it."""
    table = built([label("instance", "2.25.0", "yes", 1), label("instance", "2.25.0", "no", 2)])
    assert table["label"][0].as_py() == 0


def test_two_labels_for_one_key_are_refused() -> None:
    """Training on whichever came first would be a coin toss."""
    with pytest.raises(DataError, match="1 keys with two"):
        built([label("study", "2.25.90", "yes"), label("study", "2.25.90", "no")])


def test_study_and_accession_that_contradict_are_refused() -> None:
    """Two label files of the same study that disagree need a person."""
    with pytest.raises(DataError, match="two for 2 of 4 instances"):
        built([label("study", "2.25.90", "yes"), label("accession", "A0", "no")])


def test_unknown_values_are_counted_not_shown() -> None:
    """The wrong column may hold names: they must not end in an error's text."""
    with pytest.raises(DataError, match="1 other values in 1 rows") as refused:
        built([label("study", "2.25.90", "DOE^JANE")])
    assert "DOE" not in str(refused.value)


def test_two_project_keys_are_refused() -> None:
    """Under two keys one patient is two pseudonyms, which may fall into train and test."""
    with pytest.raises(DataError, match="several project keys"):
        built([], instances(key_id=["a", "a", "a", "b"]))


def test_an_instance_without_part_is_refused() -> None:
    """It would silently be in no part."""
    with pytest.raises(DataError, match="3 without"):
        manifest.build(instances(), [], {"P0": "train"}, classes=CLASSES)


def test_a_given_split_is_by_instance() -> None:
    """A user's split may cross patients; the leakage gate can only say so if the manifest keeps it as given."""
    parts = {"2.25.0": "train", "2.25.1": "test", "2.25.2": "test", "2.25.3": "validation"}
    table = manifest.build(instances(), [], parts, classes=CLASSES, parts_by="sop_uid")
    assert table["part"].to_pylist() == ["train", "test", "test", "validation"]


@given(st.randoms(use_true_random=False))
def test_the_digest_is_of_content_only(shuffle: random.Random) -> None:
    """Another order of rows or columns, or another pyarrow, must not look like another dataset."""
    table = built([label("instance", "2.25.1", "no")])
    rows, columns = list(range(len(table))), list(table.column_names)
    shuffle.shuffle(rows)
    shuffle.shuffle(columns)
    other = table.take(pa.array(rows)).select(columns).replace_schema_metadata({"when": "now"})
    other = other.set_column(columns.index("site"), "site", other["site"].cast(pa.large_string()))
    other = other.set_column(columns.index("f_mean"), "f_mean", pa.array([0.0] * 4))
    assert manifest.digest(other) == manifest.digest(table)


@pytest.mark.parametrize("column", ["label", "part", "patient", "site", "file_sha256", "age_years"])
def test_the_digest_covers_every_value(column: str) -> None:
    """Two datasets that differ in one label would otherwise pass for the same."""
    table = built([label("instance", "2.25.1", "no")])
    values = table[column].to_pylist()
    values[1] = {"label": 1, "age_years": 77.0}.get(column, "test")
    other = table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))
    assert manifest.digest(other) != manifest.digest(table)


def test_the_digest_is_this_one() -> None:
    """If it changed with a release, every stored dataset would look tampered with."""
    table = built([label("instance", "2.25.1", "no")])
    assert manifest.digest(table) == "cada655f3654bb57ffb86ec892587137beb5f67178a4dfc7308476af50ad45e0"


def test_written_read_and_tampered(tmp_path: Path) -> None:
    """A manifest changed behind radloop's back must be noticed before it trains a model."""
    path = tmp_path / "m.parquet"
    table = built([label("instance", "2.25.1", "no")])
    digest = manifest.write(table, path)
    assert manifest.digest(manifest.read(path, expected_digest=digest)) == digest
    first = path.read_bytes()
    manifest.write(table, path)
    assert path.read_bytes() == first
    pq.write_table(table.slice(1), path)
    with pytest.raises(ArtifactError, match="changed after it was published"):
        manifest.read(path, expected_digest=digest)
    path.write_bytes(first[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        manifest.read(path)


def test_diff_says_what_changed() -> None:
    """Nobody can approve a new version without seeing what is new in it."""
    a = built([label("instance", "2.25.0", "yes"), label("instance", "2.25.1", "no")])
    later = instances(5, file_sha256=["f" * 64, *[f"{i:064x}" for i in range(1, 5)]]).slice(0, 5)
    b = built([label("instance", "2.25.0", "yes"), label("instance", "2.25.1", "yes")], later.filter(
        pa.array([True, True, True, False, True])
    ))  # fmt: skip
    found = manifest.diff(a, b)
    assert {name: part["count"] for name, part in found.items()} == {
        "added": 1, "removed": 1, "revised": 1, "relabelled": 1, "moved": 0,
    }  # fmt: skip
    assert found["added"]["sop_uids"] == ["2.25.4"]
    assert found["added"]["by_site"] == {"B": 1}
    assert found["relabelled"]["by_label"] == {"1": 1}
    same = manifest.diff(a, a)
    assert all(part["count"] == 0 for part in same.values())
    back = manifest.diff(b, a)
    assert back["added"]["sop_uids"] == found["removed"]["sop_uids"]


def test_counts() -> None:
    """The report's figures come from here."""
    found = manifest.counts(built([label("instance", "2.25.0", "yes"), label("instance", "2.25.1", "no")]))
    assert found == {
        "instances": 4, "patients": 4, "labelled": 2, "positive": 1, "train": 4, "validation": 0, "test": 0,
    }  # fmt: skip

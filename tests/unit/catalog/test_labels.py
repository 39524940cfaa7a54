from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radloop.catalog.schema import InstanceRow, KeyKind, LabelRow, Reason, Refused
from radloop.catalog.store import Catalog
from radloop.errors import DataError


def _receive(
    catalog: Catalog, sop: str, *, study: str = "S1", accession: str | None = None, file: str | None = None
) -> None:
    row = InstanceRow(
        sop_uid=sop,
        study_uid=study,
        series_uid="R",
        patient="P",
        key_id="k",
        site="A",
        sender="T",
        sop_class_uid="1.2",
        transfer_syntax_uid="1.2",
        source_sha256=f"sha-{sop}",
        source_bytes=1,
        accession_key=accession,
        file_key=file,
    )
    catalog.record(row, lambda _row, _stored: True)


def _label(kind: str, key: str, value: str, row: int | None = None) -> LabelRow:
    return LabelRow(key_kind=KeyKind(kind), key=key, value=value, row=row)


def _import(catalog: Catalog, *labels: LabelRow) -> object:
    return catalog.import_labels("pneumonia", labels, source="test", actor="ada")


def test_the_same_file_twice_changes_nothing(catalog: Catalog) -> None:
    """If this failed, a daily import would fill the catalog and the ledger with corrections that are none."""
    first = catalog.import_labels(
        "t", [_label("study", "S1", "1"), _label("study", "S2", "0")], source="f", actor="ada"
    )
    again = catalog.import_labels(
        "t", [_label("study", "S2", "0"), _label("study", "S1", "1")], source="f", actor="ada"
    )
    assert (first.new, first.unchanged, first.unmatched) == (2, 0, 2)
    assert (again.new, again.corrected, again.unchanged) == (0, 0, 2)
    assert len(catalog.ledger.rows("labels")) == 1
    assert len(catalog.label_history("t", KeyKind.STUDY, "S1")) == 1


def test_a_corrected_label_wins_and_the_older_one_is_kept(catalog: Catalog) -> None:
    """If this failed, a radiologist's correction would be lost, or the proof of what had been there before."""
    _import(catalog, _label("study", "S1", "1"), _label("study", "S2", "0"))
    corrected = catalog.import_labels("pneumonia", [_label("study", "S1", "0")], source="second", actor="bob")
    assert (corrected.corrected, corrected.new) == (1, 0)
    assert {label.key: label.value for label in catalog.labels("pneumonia")} == {"S1": "0", "S2": "0"}
    history = catalog.label_history("pneumonia", KeyKind.STUDY, "S1")
    assert [(label.value, label.source, label.row_revision) for label in history] == [
        ("1", "test", 1),
        ("0", "second", 2),
    ]


def test_two_values_for_one_key_are_refused_by_number_and_nothing_is_imported(catalog: Catalog) -> None:
    """If this failed, the order of rows in a file would decide what a patient is said to have."""
    rows = [_label("study", "S1", "1", 2), _label("study", "S2", "1", 3), _label("study", "S1", "0", 9)]
    with pytest.raises(DataError, match=r"1 label key has more than one value.*\n.*\n.*study S1 \(rows 2, 9\)"):
        catalog.import_labels("t", rows, source="f", actor="ada")
    assert catalog.labels("t") == []
    many = [_label("file", f"F{n:02d}", value, n) for n in range(14) for value in ("0", "1")]
    with pytest.raises(DataError, match=r"(?s)14 label keys have.*and 4 more"):
        catalog.import_labels("t", many, source="f", actor="ada")


def test_the_same_value_twice_in_one_file_is_no_contradiction(catalog: Catalog) -> None:
    """If this failed, a file with one row an image and a label a study could not be imported."""
    done = catalog.import_labels("t", [_label("study", "S1", "1"), _label("study", "S1", "1")], source="f", actor="a")
    assert (done.rows, done.new) == (2, 1)


def test_tasks_do_not_touch_each_other(catalog: Catalog) -> None:
    """If this failed, a label for one question would answer another."""
    catalog.import_labels("a", [_label("study", "S1", "1")], source="f", actor="x")
    catalog.import_labels("b", [_label("study", "S1", "0")], source="f", actor="x")
    _receive(catalog, "I1")
    assert catalog.resolve_labels("a").values == {"I1": ("1", KeyKind.STUDY)}
    assert catalog.resolve_labels("b").values == {"I1": ("0", KeyKind.STUDY)}


def test_labels_join_before_and_after_their_images(catalog: Catalog) -> None:
    """If this failed, labels that came before the images would be lost."""
    early = catalog.import_labels("t", [_label("accession", "A1", "1")], source="f", actor="x")
    assert early.unmatched == 1
    assert [label.key for label in catalog.unmatched_labels("t")] == ["A1"]
    _receive(catalog, "I1", accession="A1")
    assert catalog.unmatched_labels("t") == []
    assert catalog.resolve_labels("t").values == {"I1": ("1", KeyKind.ACCESSION)}
    late = catalog.import_labels("t", [_label("instance", "I1", "0")], source="f", actor="x")
    assert late.unmatched == 0
    assert catalog.resolve_labels("t").values == {"I1": ("0", KeyKind.INSTANCE)}


@given(saids=st.lists(st.dictionaries(st.sampled_from(list(KeyKind)), st.sampled_from(["0", "1"])), max_size=20))
@settings(max_examples=5)
def test_the_finer_key_wins(tmp_path_factory: pytest.TempPathFactory, saids: list[dict[KeyKind, str]]) -> None:
    """If this failed, a label of a whole study would overrule what was said of one image."""
    keys = {KeyKind.INSTANCE: "I1", KeyKind.FILE: "F1", KeyKind.STUDY: "S1", KeyKind.ACCESSION: "A1"}
    with Catalog(f"sqlite:///{tmp_path_factory.mktemp('c')}/catalog.db") as catalog:
        _receive(catalog, "I1", study="S1", accession="A1", file="F1")
        for number, said in enumerate(saids):
            labels = [LabelRow(key_kind=kind, key=keys[kind], value=value) for kind, value in said.items()]
            catalog.import_labels(f"task {number}", labels, source="f", actor="x")
            order = [KeyKind.INSTANCE, KeyKind.FILE, KeyKind.STUDY, KeyKind.ACCESSION]
            expected = next(((said[kind], kind) for kind in order if kind in said), None)
            assert catalog.resolve_labels(f"task {number}").values == ({"I1": expected} if expected else {})


def test_one_instance_under_two_paths_with_two_labels_contradicts(catalog: Catalog) -> None:
    """If this failed, the last of two copies of one slice would decide its label; two real CT slices are copied so."""
    _receive(catalog, "I1", file="F1")
    catalog.add_file_keys([("F2", "I1")])
    _import(catalog, _label("file", "F1", "1"), _label("file", "F2", "0"), _label("study", "S1", "1"))
    resolved = catalog.resolve_labels("pneumonia")
    assert (resolved.values, resolved.contradicting) == ({}, ["I1"])
    _import(catalog, _label("file", "F2", "1"))
    assert catalog.resolve_labels("pneumonia").values == {"I1": ("1", KeyKind.FILE)}
    _import(catalog, _label("file", "F2", "0"), _label("instance", "I1", "0"))
    assert catalog.resolve_labels("pneumonia").values == {"I1": ("0", KeyKind.INSTANCE)}


def test_a_path_that_held_two_instances_labels_neither(catalog: Catalog) -> None:
    """If this failed, a label meant for the file of today would be given to the file of yesterday as well."""
    _receive(catalog, "I1", file="F1")
    _receive(catalog, "I2", file="F1")
    _import(catalog, _label("file", "F1", "1"))
    resolved = catalog.resolve_labels("pneumonia")
    assert (resolved.values, resolved.contradicting) == ({}, ["I1", "I2"])


def test_quarantined_instances_get_no_label(catalog: Catalog) -> None:
    """If this failed, a refused image would enter the training set by its label."""
    _receive(catalog, "I1")
    _receive(catalog, "I2")
    _import(catalog, _label("study", "S1", "1"))
    catalog.refuse([Refused(sop_uid="I1", revision=1, reason=Reason.EMPTY_IMAGE)], stage="quality")
    assert set(catalog.resolve_labels("pneumonia").values) == {"I2"}

"""Who is in which part, for ever, and whether anybody is in two."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.datasets import split
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DataError, GateError, SettingsError

FRACTIONS = (0.7, 0.15, 0.15)
unit = st.floats(min_value=0, max_value=1, exclude_max=True)


def table(rows: list[tuple[str, str, str]]) -> pa.Table:
    """A manifest of (patient, part, pixel_sha256)."""
    return pa.Table.from_pylist([{"patient": p, "part": q, "pixel_sha256": x} for p, q, x in rows])


def test_shares_are_kept(project_key: bytes) -> None:
    """A keyed hash that is not uniform would starve the test part."""
    fraction = Pseudonymiser(project_key).fraction
    found = list(split.parts([f"P{i}" for i in range(4000)], fraction, FRACTIONS).values())
    for name, share in zip(split.PARTS, FRACTIONS, strict=True):
        assert abs(found.count(name) / 4000 - share) < 0.03


@given(unit, st.floats(min_value=0.05, max_value=0.5))
def test_more_training_never_moves_a_training_patient_into_test(fraction: float, test_share: float) -> None:
    """Changing the shares must not put a patient into test that a released model has learnt from."""
    before = split.part(fraction, (1 - test_share, 0, test_share))
    after = split.part(fraction, (1 - test_share / 2, 0, test_share / 2))
    assert not (before == "train" and after == "test")


@given(st.lists(st.text(min_size=1), min_size=1), st.randoms())
def test_a_decided_part_stays(patients: list[str], random: object) -> None:
    """Champion and challenger would meet different test patients if a later version could move one."""
    first = split.parts(patients, lambda p: (hash(p) % 1000) / 1000, FRACTIONS)
    again = split.parts([*patients, "new"], lambda p: 0.0, (0, 0, 1.0), decided=first)
    assert {p: again[p] for p in patients} == first
    assert again["new"] == first.get("new", "test")


@pytest.mark.parametrize("fractions", [(0.7, 0.3), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_shares_that_are_none_are_refused(fractions: tuple[float, ...]) -> None:
    """A typo in radloop.toml would otherwise silently leave no test part."""
    with pytest.raises(SettingsError, match="sum to 1"):
        split.part(0.5, fractions)


def test_a_users_column_is_understood() -> None:
    """Public data sets spell the parts in many ways; an unread alias would lose the split."""
    assert split.given({"a": "Train", "b": " VALID ", "c": "holdout"}) == {"a": "train", "b": "validation", "c": "test"}


def test_a_wrong_column_is_refused_without_showing_it() -> None:
    """The wrong column may be the one with the names: it must not end in a log."""
    with pytest.raises(DataError, match="1 other values in 2 of 3 rows") as refused:
        split.given({"a": "DOE^JOHN", "b": "DOE^JOHN", "c": "train"})
    assert "DOE" not in str(refused.value)


def test_crossing_patients_are_counted_not_named() -> None:
    """A leaking split must be refused with figures a person can act on, and without saying who."""
    leak = split.leakage(table([("P1", "train", "x"), ("P1", "test", "y"), ("P2", "train", "z"), ("P3", "test", "w")]))
    assert (leak.crossing_patients, leak.patients, leak.crossing["train+test"]) == (1, 3, 1)
    assert leak.parts == {"train": 2, "validation": 0, "test": 2}
    with pytest.raises(GateError, match="1 of 3 patients") as refused:
        split.refuse(leak)
    assert "P1" not in str(refused.value)


def test_the_same_pixels_in_two_parts_leak() -> None:
    """One person under two ids is in train and test unless the pixels are looked at."""
    leak = split.leakage(table([("P1", "train", "same"), ("P2", "test", "same")]))
    assert leak.crossing_pixels == 1
    assert not leak.clean


def test_a_champion_that_learnt_from_a_test_patient_leaks() -> None:
    """A champion that knows the test patients looks better than it is, and no challenger would ever replace it."""
    leak = split.leakage(table([("P1", "train", "x"), ("P2", "test", "y")]), models={"champion": {"P2", "P9"}})
    assert leak.trained_on_test == {"champion": 1}
    with pytest.raises(GateError, match="1 of 1 test patients were learnt from by champion"):
        split.refuse(leak)


@given(st.lists(st.tuples(st.sampled_from("ABCDEFGH"), st.sampled_from(split.PARTS), st.uuids().map(str))))
def test_a_split_by_patient_never_leaks(rows: list[tuple[str, str, str]]) -> None:
    """The gate must not refuse what radloop itself split."""
    first: dict[str, str] = {}
    clean = [(p, first.setdefault(p, q), x) for p, q, x in rows]
    if clean:
        assert split.leakage(table(clean)).clean


@pytest.mark.data
def test_the_split_that_ships_with_nih_is_refused(test_data: Path) -> None:
    """A real published split leaks; whoever takes it as it is would publish a figure that is too good."""
    with (test_data / "cxr_nih1000_64/manifest.csv").open() as f:
        rows = list(csv.DictReader(f))
    parts = split.given({row["file"]: row["split"] for row in rows})
    leak = split.leakage(table([(row["patient"], parts[row["file"]], row["file"]) for row in rows]))
    with pytest.raises(GateError, match="30 of 264 patients"):
        split.refuse(leak)


def test_linked_patients_count_as_one() -> None:
    """If this failed, a person with two numbers would be learnt from under one and tested under the other."""
    rows = [("A", "train", "p1"), ("B", "test", "p2"), ("C", "test", "p3")]
    assert split.leakage(table(rows)).clean
    found = split.leakage(table(rows), persons={"A": "A", "B": "A"}, models={"the champion": {"D"}})
    assert (found.patients, found.crossing_patients) == (2, 1)
    found = split.leakage(table(rows), persons={"C": "C", "D": "C"}, models={"the champion": {"D"}})
    assert found.trained_on_test == {"the champion": 1}

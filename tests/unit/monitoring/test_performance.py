"""Performance on labels that arrived, and which labels to ask for next."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from radloop.errors import DataError
from radloop.learning.statistics import Interval
from radloop.monitoring import labelling, performance
from radloop.monitoring.performance import Reference

Row = dict[str, Any]


def cases(
    patients: int, seed: int, *, site: str = "A", signal: float = 2.0, images: int = 1
) -> tuple[list[Row], dict[str, int]]:
    """Predictions whose logit moves by `signal` with the label, and the labels."""
    rng = np.random.default_rng([seed, *site.encode()])
    found, labels = [], {}
    for number in range(patients):
        label = number % 2
        for image in range(images):
            uid = f"2.25.{seed}.{site}.{number}.{image}"
            logit = float(rng.normal() + signal * (label - 0.5))
            found.append(
                {
                    "sop_uid": uid,
                    "study_uid": f"2.25.{number}",
                    "patient": f"P{site}{number}",
                    "site": site,
                    "probability": 1 / (1 + np.exp(-logit)),
                }
            )
            labels[uid] = label
    return found, labels


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """An interval that is too narrow passes a gate that it should not."""
    from scipy.stats import norm

    truth, inside = norm.cdf(1.5 / np.sqrt(2)), 0
    for seed in range(100):
        predictions, labels = cases(80, seed, signal=1.5)
        found = performance.assess(predictions, labels, threshold=0.5, resamples=300, seed=seed).scopes[0].auc
        assert found is not None
        inside += found.lower <= truth <= found.upper
    assert 88 <= inside <= 100


def test_patients_are_resampled_not_images() -> None:
    """Ten copies of each patient are no tenfold evidence."""
    predictions, labels = cases(40, 1, signal=1.0)
    copies = [{**row, "sop_uid": f"{row['sop_uid']}.{k}"} for row in predictions for k in range(10)]
    more = {f"{uid}.{k}": value for uid, value in labels.items() for k in range(10)}
    one = performance.assess(predictions, labels, threshold=0.5).scopes[0]
    ten = performance.assess(copies, more, threshold=0.5).scopes[0]
    assert one.auc is not None
    assert ten.auc is not None
    assert ten.auc.value == pytest.approx(one.auc.value)
    assert ten.auc.upper - ten.auc.lower == pytest.approx(one.auc.upper - one.auc.lower, rel=0.25)


def test_counts_and_sites() -> None:
    """Unlabelled images must be counted, or a figure on a tenth of them looks like all."""
    a, labels_a = cases(40, 1)
    b, labels_b = cases(30, 1, site="B")
    few = dict(list(labels_b.items())[:6])
    found = performance.assess(a + b, labels_a | few | {"2.25.unknown": 1}, threshold=0.5)
    assert [s.scope for s in found.scopes] == ["*", "A", "B"]
    assert (found.scopes[0].labelled, found.scopes[0].unlabelled) == (46, 24)
    assert found.scopes[1].auc is not None
    assert found.scopes[2].auc is None  # 3 patients of each class
    assert found.scopes[2].labelled == 6


def test_a_perfect_score_has_no_perfect_interval() -> None:
    """Twelve patients without an error do not prove that there is none."""
    predictions, labels = cases(24, 3, signal=60.0)
    found = performance.assess(predictions, labels, threshold=0.5).scopes[0]
    assert found.auc is not None
    assert found.auc.value == 1.0
    assert found.auc.lower < 0.9
    assert found.sensitivity is not None
    assert found.sensitivity.lower < 0.8


def test_verdicts() -> None:
    """Kept, degraded and not known are three things; a change of label definition is none of them."""
    reference = Reference(Interval(0.95, 0.92, 0.97), 0.5, ["A"], "pneumonia")
    good, labels = cases(400, 1, signal=3.0)
    bad, bad_labels = cases(200, 2, signal=0.3)
    few, few_labels = cases(8, 3)
    kept = performance.assess(good, labels, threshold=0.5, reference=reference, label_definition="pneumonia")
    degraded = performance.assess(bad, bad_labels, threshold=0.5, reference=reference)
    assert kept.verdict == performance.KEPT
    assert degraded.verdict == performance.DEGRADED
    assert performance.assess(few, few_labels, threshold=0.5).verdict == performance.INSUFFICIENT
    assert performance.assess(good, labels, threshold=0.5).verdict == performance.UNDETERMINED
    other = performance.assess(bad, bad_labels, threshold=0.5, reference=reference, label_definition="any finding")
    assert other.verdict == performance.NOT_COMPARABLE
    assert "change of population" in other.summary
    assert any("any finding" in change for change in other.population_changes)


def test_the_reference_is_read_from_an_evaluation() -> None:
    """Compared with figures of another part, performance would seem to fall or hold for no reason."""
    sample = runpy.run_path(str(Path(__file__).with_name("sample_report.py")))
    found = performance.reference_of(sample["evaluation"](0.9), label_definition="nodule")
    assert found.auc.value == 0.9
    assert found.prevalence == pytest.approx(88 / 214)
    assert (found.sites, found.label_definition) == (["A", "B"], "nodule")


def test_change_of_population_is_said() -> None:
    """A new site, another prevalence or a picked sample explain a figure; without them it is misread."""
    reference = Reference(Interval(0.95, 0.92, 0.97), 0.1, ["A"])
    predictions, labels = cases(120, 1, site="Z")
    surest = sorted(predictions, key=lambda row: -row["probability"])[:60]
    found = performance.assess(
        predictions, {r["sop_uid"]: labels[r["sop_uid"]] for r in surest}, threshold=0.5, reference=reference
    )
    text = " ".join(found.population_changes)
    assert "site Z" in text
    assert "10% were at evaluation" in text
    assert "no random sample" in text
    whole = performance.assess(predictions, labels, threshold=0.5)
    assert whole.population_changes == []


def test_bad_labels_and_rows_are_refused() -> None:
    """A label of 2 would be counted as a negative by a comparison with 1."""
    predictions, labels = cases(4, 1)
    with pytest.raises(DataError, match="neither 0 nor 1"):
        performance.assess(predictions, {**labels, "x": 2}, threshold=0.5)
    with pytest.raises(DataError, match="no probability"):
        performance.assess([{**predictions[0], "probability": None}], labels, threshold=0.5)
    assert performance.assess([], {}, threshold=0.5).verdict == performance.INSUFFICIENT


def test_a_request_is_bounded_balanced_and_one_per_patient() -> None:
    """Labelling time is the dearest thing in the loop; ten images of one patient waste nine."""
    predictions, _ = cases(60, 1, images=3)
    asked = labelling.choose(predictions, limit=20, threshold=0.5)
    assert len(asked.wanted) == 20
    assert len({one.patient for one in asked.wanted}) == 20
    unsure = [one for one in asked.wanted if one.why == labelling.UNCERTAIN]
    assert len(unsure) == 14
    assert abs(sum(one.probability >= 0.5 for one in unsure) - 7) <= 1
    rest = [one for one in asked.wanted if one.why == labelling.RANDOM]
    assert np.mean([abs(o.probability - 0.5) for o in unsure]) < np.mean([abs(o.probability - 0.5) for o in rest])


def test_drifted_sites_come_first_and_others_fill_up() -> None:
    """The new site's labels are what retraining waits for."""
    a, _ = cases(40, 1)
    b, _ = cases(10, 1, site="B")
    asked = labelling.choose(a + b, limit=15, threshold=0.5, drifted_sites=["B"])
    assert [one.site for one in asked.wanted[:10]] == ["B"] * 10
    assert asked.sites == {"A": 5, "B": 10}


def test_what_was_asked_or_labelled_is_not_asked_again_and_the_id_is_stable() -> None:
    """The same request opened every night would bury the readers."""
    predictions, _ = cases(30, 1, images=2)
    one = labelling.choose(predictions, limit=10, threshold=0.5)
    same = labelling.choose(predictions[::-1], limit=10, threshold=0.5)
    assert msgspec.json.encode(one) == msgspec.json.encode(same)
    later = labelling.choose(predictions, limit=10, threshold=0.5, exclude=one.sop_uids())
    assert not {w.patient for w in one.wanted} & {w.patient for w in later.wanted}
    assert later.id != one.id
    assert len(labelling.choose(predictions, limit=1000, threshold=0.5).wanted) == 30
    with pytest.raises(DataError, match="cannot be filled"):
        labelling.choose(predictions, limit=0, threshold=0.5)

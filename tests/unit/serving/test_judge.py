"""The judge: what it calls safe is safe at the stated margins, what it calls harm is harm, and else it says neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from radloop.errors import ServingError
from radloop.serving.judge import Figure, JudgeVerdict, Margins, judge
from radloop.serving.predictions import Pair

CHAMPION, CHALLENGER = "a" * 64, "b" * 64


def row(patient: str | None, image: int, **changes: Any) -> Any:
    made: dict[str, Any] = {"patient": patient, "sop_uid": f"2.25.{patient}.{image}", "status": "ok"}
    return made | {"probability": 0.2, "decision": 0, "latency_ms": 5.0} | changes


def pairs(n: int, seed: int = 0, *, shift: float = 0.0, images: int = 2, **challenger: Any) -> list[Pair]:
    """`n` patients with a score of their own; the challenger's is off by `shift` plus a little noise."""
    rng = np.random.default_rng(seed)
    made = []
    for patient in range(n):
        base = rng.uniform(0.05, 0.95)
        for number in range(images):
            one = float(np.clip(base + rng.normal(0, 0.02), 0, 1))
            two = float(np.clip(base + shift + rng.normal(0, 0.02), 0, 1))
            first = row(f"P{patient}", number, probability=one, decision=int(one >= 0.5))
            second = row(f"P{patient}", number, probability=two, decision=int(two >= 0.5), **challenger)
            made.append(Pair(first, second))
    return made


def figure(verdict: JudgeVerdict, name: str) -> Figure:
    return next(one for one in verdict.figures if one.name == name)


def test_a_model_like_the_champion_is_operationally_safe() -> None:
    """Else no release would ever go through."""
    verdict = judge(pairs(60))
    assert (verdict.verdict, verdict.reasons) == ("operationally_safe", [])
    assert (verdict.n_requests, verdict.n_patients, verdict.n_labelled_patients) == (120, 60, 0)


def test_few_patients_decide_nothing() -> None:
    """Thirty images of three patients are three observations; calling that safe would be a lie."""
    verdict = judge(pairs(3, images=30))
    assert verdict.verdict == "undetermined"
    assert "patients: 3 of 30" in verdict.reasons
    assert judge([]).verdict == "undetermined"


def test_a_challenger_that_fails_is_harm_even_early() -> None:
    """A model that answers nobody is rolled back at once, not after thirty patients."""
    broken = [Pair(pair.champion, None) for pair in pairs(6)]
    verdict = judge(broken)
    assert (verdict.verdict, verdict.reasons[0]) == ("harm", "error_rate")


def test_refusals_count_as_errors_but_not_the_champions_own() -> None:
    """A file that the champion refuses too says nothing about the challenger."""
    good = pairs(40)
    both = [Pair(row(f"P{n}", 9, status="TRUNCATED"), row(f"P{n}", 9, status="TRUNCATED")) for n in range(40)]
    assert judge(good + both) == judge(good)
    own = [Pair(row(f"P{n}", 9), row(f"P{n}", 9, status="UNEXPECTED_MODALITY")) for n in range(40)]
    assert judge(good + own).verdict == "harm"


def test_the_error_bound_is_clopper_pearson() -> None:
    """The figure in the ledger must be the one that a statistician gets: 2 of 50 patients, exact, one-sided 95 %."""
    some = pairs(50, images=1)
    some[:2] = [Pair(pair.champion, None) for pair in some[:2]]
    found = figure(judge(some), "error_rate")
    assert found.figure == pytest.approx(0.04)
    assert found.high == pytest.approx(stats.beta.ppf(0.95, 3, 48))
    assert found.low == pytest.approx(stats.beta.ppf(0.05, 2, 49))


def test_the_unit_is_the_patient() -> None:
    """One patient with a hundred images must not outvote the others."""
    agreeing = [Pair(row(f"P{n}", 0), row(f"P{n}", 0)) for n in range(1, 50)]
    disagreeing = [Pair(row("P0", n, decision=0), row("P0", n, decision=1)) for n in range(200)]
    assert figure(judge(agreeing + disagreeing), "decision_agreement").figure == pytest.approx(49 / 50)


def test_opposite_decisions_are_harm() -> None:
    """A challenger with its classes swapped answers quickly and without errors."""
    swapped = []
    for pair in pairs(60):
        opposite = {"probability": 1 - pair.champion["probability"], "decision": 1 - pair.champion["decision"]}  # type: ignore[operator]
        swapped.append(Pair(pair.champion, pair.champion | opposite))  # type: ignore[operator]
    verdict = judge(swapped)
    assert verdict.verdict == "harm"
    assert "decision_agreement" in verdict.reasons


def test_slowness_counts_where_somebody_waits() -> None:
    """Twice 5 ms is nothing; twice a second and a half is a reading room that waits."""
    assert judge(pairs(60, latency_ms=50.0)).verdict == "operationally_safe"
    slow = judge(pairs(60, latency_ms=3000.0))
    assert (slow.verdict, slow.reasons) == ("harm", ["latency_p95_ratio"])


def test_another_distribution_is_looked_at_not_condemned() -> None:
    """Scores that moved are a reason for a person to look; a better model moves them too."""
    sharper = []
    for pair in pairs(200, images=1):
        p = pair.champion["probability"]
        sharper.append(Pair(pair.champion, pair.champion | {"probability": 0.02 if p < 0.5 else 0.98}))  # type: ignore[operator]
    verdict = judge(sharper, Margins(mean_absolute_difference=0.5))
    assert (verdict.verdict, verdict.reasons) == ("undetermined", ["ks_distance"])


def labelled(n: int, champion_noise: float, challenger_noise: float) -> tuple[list[Pair], dict[str, int]]:
    rng = np.random.default_rng(3)
    made, labels = [], {}
    for patient in range(n):
        truth = patient % 2
        scores = [
            float(1 / (1 + np.exp(-(2 * truth - 1 + rng.normal(0, s))))) for s in (champion_noise, challenger_noise)
        ]
        one, two = (row(f"P{patient}", 0, probability=p, decision=int(p >= 0.5)) for p in scores)
        labels[one["sop_uid"]] = truth
        made.append(Pair(one, two))
    return made, labels


def test_labels_that_show_a_worse_model_are_harm() -> None:
    """What shadow is for: the challenger is fast, never fails, and is wrong more often."""
    lax = Margins(agreement=0.0, mean_absolute_difference=1.0, ks_distance=1.0)
    made, labels = labelled(200, 0.3, 4.0)
    assert judge(made, lax).verdict == "operationally_safe"
    verdict = judge(made, lax, labels=labels)
    assert (verdict.verdict, verdict.reasons, verdict.n_labelled_patients) == ("harm", ["auc_difference"], 200)
    made, labels = labelled(200, 1.0, 0.9)
    assert judge(made, lax, labels=labels).verdict == "operationally_safe"


def test_the_auc_is_sklearns() -> None:
    """The difference in the report must be the one that everybody else computes."""
    from sklearn.metrics import roc_auc_score

    made, labels = labelled(80, 1.0, 2.0)
    truth = list(labels.values())
    first = roc_auc_score(truth, [p.champion["probability"] for p in made])
    second = roc_auc_score(truth, [p.challenger["probability"] for p in made])  # type: ignore[index]
    assert figure(judge(made, labels=labels), "auc_difference").figure == pytest.approx(second - first)


def test_labels_of_one_class_add_nothing() -> None:
    """An AUC over one class is no number; it must not become a verdict."""
    made, labels = labelled(60, 1.0, 1.0)
    verdict = judge(made, labels=dict.fromkeys(labels, 1))
    assert "auc_difference" not in [one.name for one in verdict.figures]
    assert verdict.n_labelled_patients == 60


def test_tensors_without_a_patient_are_no_evidence() -> None:
    """A load test must not promote a model."""
    nobody = [Pair(row(None, n), row(None, n)) for n in range(500)]
    assert judge(nobody).verdict == "undetermined"


def test_the_same_pairs_give_the_same_verdict_in_any_order() -> None:
    """A verdict that changes when it is asked again is no evidence."""
    made = pairs(40)
    assert judge(made) == judge(list(made)) == judge(made[::-1])


def test_false_harm_is_rare() -> None:
    """Two equal models, 20 looks at new patients: a judge that rolls back good models is switched off by its users."""
    verdicts = [judge(pairs(40, seed=seed, images=1)).verdict for seed in range(20)]
    assert "harm" not in verdicts


@pytest.mark.parametrize("wrong", [{"minimum_patients": 1}, {"error_rate": 5.0}, {"confidence": 0.3}])
def test_margins_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    """error_rate = 5 was meant as 5 % and would let everything through."""
    with pytest.raises(ServingError, match="margins"):
        Margins(**wrong)

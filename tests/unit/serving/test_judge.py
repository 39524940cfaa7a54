"""The judge: what it calls safe is safe at the stated margins, what it calls harm is harm, and else it says neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from radloop.errors import ServingError
from radloop.serving.judge import Figure, JudgeVerdict, Margins, judge
from radloop.serving.predictions import Pair

CHAMPION, CHALLENGER = "a" * 64, "b" * 64


def row(patient: str | None, image: int, **changes: Any) -> Any:
    number = image if patient is None else int(patient[1:]) * 1000 + image
    made: dict[str, Any] = {"patient": patient, "sop_uid": f"2.25.{patient}.{image}", "status": "ok"}
    made |= {"at": f"2026-01-01T00:00:00.{number:06d}", "prediction_id": f"{patient}.{image}"}
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
    assert "patients: 3 of 40" in verdict.reasons
    assert judge([]).verdict == "undetermined"


def test_a_challenger_that_fails_is_harm_even_early() -> None:
    """A model that answers nobody is rolled back at once, not after forty patients."""
    broken = [Pair(pair.champion, None) for pair in pairs(8)]
    verdict = judge(broken)
    assert (verdict.verdict, verdict.reasons[0]) == ("harm", "error_rate")


def test_refusals_count_as_errors_but_not_the_champions_own() -> None:
    """A file that the champion refuses too says nothing about the challenger."""
    good = pairs(40)
    both = [Pair(row(f"P{n}", 9, status="TRUNCATED"), row(f"P{n}", 9, status="TRUNCATED")) for n in range(40)]
    assert judge(good + both) == judge(good)
    own = [Pair(row(f"P{n}", 9), row(f"P{n}", 9, status="UNEXPECTED_MODALITY")) for n in range(100, 140)]
    assert judge(good + own).verdict == "harm"


def test_the_share_is_bounded_by_the_mixture_of_the_paper() -> None:
    """The figure in the ledger must be the one that a statistician gets: where the Bayes factor of 2 in 50 reaches 20."""
    from scipy.special import betaln

    some = pairs(50, images=1)
    some[:2] = [Pair(pair.champion, None) for pair in some[:2]]
    found = figure(judge(some), "error_rate")
    assert found.figure == pytest.approx(0.04)
    evidence = betaln(0.5 + 2, 4.5 + 48) - betaln(0.5, 4.5) - (2 * np.log(found.high) + 48 * np.log1p(-found.high))
    assert np.exp(evidence) == pytest.approx(20, rel=1e-3)


def test_the_unit_is_the_patient() -> None:
    """One patient with a hundred images must not outvote the others."""
    agreeing = [Pair(row(f"P{n}", 0), row(f"P{n}", 0)) for n in range(1, 50)]
    disagreeing = [Pair(row("P0", n, decision=0), row("P0", n, decision=1)) for n in range(200)]
    assert figure(judge(agreeing + disagreeing), "disagreement").figure == pytest.approx(1 / 50)


def test_opposite_decisions_are_harm() -> None:
    """A challenger with its classes swapped answers quickly and without errors."""
    swapped = []
    for pair in pairs(60):
        opposite = {"probability": 1 - pair.champion["probability"], "decision": 1 - pair.champion["decision"]}  # type: ignore[operator]
        swapped.append(Pair(pair.champion, pair.champion | opposite))  # type: ignore[operator]
    verdict = judge(swapped)
    assert verdict.verdict == "harm"
    assert "disagreement" in verdict.reasons


def test_slowness_counts_where_somebody_waits() -> None:
    """Twice 5 ms is nothing; twice a second and a half is a reading room that waits."""
    assert judge(pairs(60, latency_ms=50.0)).verdict == "operationally_safe"
    slow = judge(pairs(60, latency_ms=3000.0))
    assert (slow.verdict, slow.reasons) == ("harm", ["slow"])


def test_scores_that_moved_are_looked_at_not_condemned() -> None:
    """A better model moves scores, too: a person looks, nothing is rolled back."""
    moved = []
    for pair in pairs(300, images=1):
        p = pair.champion["probability"]
        moved.append(Pair(pair.champion, pair.champion | {"probability": min(p + 0.4, 1.0)}))  # type: ignore[operator]
    verdict = judge(moved, Margins(mean_absolute_difference=0.6))
    assert (verdict.verdict, verdict.reasons) == ("undetermined", ["score_shift"])


def test_a_step_is_judged_by_its_own_requests() -> None:
    """A challenger that fails once it gives answers must not be carried by how well it shadowed."""
    good = pairs(200, images=1)
    late = [Pair(p.champion | {"at": "2026-02-01"}, None) for p in good[:30]]  # type: ignore[operator]
    verdict = judge(good + late, since="2026-01-15")
    assert (verdict.verdict, verdict.reasons[0]) == ("harm", "error_rate")
    assert judge(good, since="2026-01-15").reasons == ["patients: 0 of 40"]


def labelled(n: int, champion_wrong: float, challenger_wrong: float) -> tuple[list[Pair], dict[str, int]]:
    """Every second patient has the finding; each model is wrong at its own rate."""
    rng = np.random.default_rng(3)
    made, labels = [], {}
    for patient in range(n):
        truth = patient % 2
        decided = [truth ^ int(rng.random() < wrong) for wrong in (champion_wrong, challenger_wrong)]
        one, two = (row(f"P{patient}", 0, probability=0.2 + 0.6 * d, decision=d) for d in decided)
        labels[one["sop_uid"]] = truth
        made.append(Pair(one, two))
    return made, labels


def test_labels_that_show_a_worse_model_are_harm() -> None:
    """What shadow is for: the challenger is fast, never fails, and is wrong more often."""
    lax = Margins(agreement=0.0, mean_absolute_difference=1.0, score_shift=1.0)
    made, labels = labelled(300, 0.05, 0.4)
    assert judge(made, lax).verdict == "operationally_safe"
    verdict = judge(made, lax, labels=labels)
    assert (verdict.verdict, verdict.n_labelled_patients) == ("harm", 300)
    assert set(verdict.reasons) == {"sensitivity_difference", "specificity_difference"}


def test_only_enough_labels_prove_more_than_safety() -> None:
    """Twenty labels are no clinical evidence; three thousand of a model as good are."""
    lax = Margins(agreement=0.5)
    made, labels = labelled(3000, 0.05, 0.05)
    few = dict(list(labels.items())[:20])
    verdict = judge(made, lax, labels=few)
    assert (verdict.verdict, verdict.n_labelled_patients) == ("operationally_safe", 20)
    assert "sensitivity_difference" in verdict.reasons
    assert judge(made, lax, labels=labels).verdict == "non_inferior"


def test_labels_of_one_class_prove_nothing_of_the_other() -> None:
    """A model that calls everything positive has every positive right."""
    made, labels = labelled(3000, 0.05, 0.05)
    verdict = judge(made, Margins(agreement=0.5), labels={uid: one for uid, one in labels.items() if one})
    assert verdict.verdict == "operationally_safe"
    assert "specificity_difference" not in [one.name for one in verdict.figures]


def test_tensors_without_a_patient_are_no_evidence() -> None:
    """A load test must not promote a model."""
    nobody = [Pair(row(None, n), row(None, n)) for n in range(500)]
    assert judge(nobody).verdict == "undetermined"


def test_the_same_pairs_give_the_same_verdict_in_any_order() -> None:
    """A verdict that changes when it is asked again is no evidence."""
    made = pairs(40)
    assert judge(made) == judge(list(made)) == judge(made[::-1])


def looked_at_ever(n: int, runs: int, wanted: str, **rates: float) -> int:
    """Of `runs` releases that are looked at after every patient from the tenth on, how many ever get this verdict."""
    found = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        failed = rng.random(n) < rates.get("errors", 0.0)
        opposite = rng.random(n) < rates.get("disagreeing", 0.05)
        made: list[Pair] = []
        for patient in range(n):
            one = row(f"P{patient}", 0)
            two = row(f"P{patient}", 0, decision=int(opposite[patient]), probability=0.2 + 0.4 * opposite[patient])
            made.append(Pair(one, None if failed[patient] else two))
            if patient >= 9 and patient % 10 == 0 and judge(made).verdict == wanted:
                found += 1
                break
    return found


def test_false_harm_is_rare_however_often_one_looks() -> None:
    """A judge that rolls back good models is switched off by its users; at 5 %, more than 3 in 15 has a chance of 0.005."""
    assert looked_at_ever(120, 15, "harm", errors=0.05, disagreeing=0.2) <= 3


def test_false_safety_is_rare_however_often_one_looks() -> None:
    """A model whose errors stand at the margin must not slip through at a lucky moment."""
    assert looked_at_ever(120, 15, "operationally_safe", errors=0.10) <= 3


def test_a_harmful_model_is_found_soon() -> None:
    """Patients are asked meanwhile."""
    assert looked_at_ever(60, 10, "harm", errors=0.5) == 10


@pytest.mark.parametrize("wrong", [{"minimum_patients": 1}, {"error_rate": 5.0}, {"confidence": 0.3}])
def test_margins_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    """error_rate = 5 was meant as 5 % and would let everything through."""
    with pytest.raises(ServingError, match="margins"):
        Margins(**wrong)

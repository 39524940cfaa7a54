"""Drift: false alarms stay near alpha, a shift is found, and how often a patient was imaged does not matter."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radloop.errors import DataError
from radloop.monitoring import drift

Row = dict[str, Any]


def rows(
    patients: int,
    seed: int,
    *,
    site: str = "A",
    shift: float = 0.0,
    images: int = 1,
    maker: Sequence[str] = ("GE", "Philips"),
    part: str | None = None,
) -> list[Row]:
    """Rows as the prediction log has them; the patients of one (site, seed) are its own."""
    rng = np.random.default_rng([seed, *site.encode()])
    found: list[Row] = []
    for number in range(patients):
        person = {"sex": str(rng.choice(["F", "M"])), "manufacturer": str(rng.choice(list(maker)))}
        for image in range(images):
            found.append(
                {
                    "patient": f"P{site}-{seed}-{number}",
                    "sop_uid": f"2.25.{site}.{seed}.{number}.{image}",
                    "site": site,
                    "probability": float(rng.beta(2, 2)),
                    "part": part,
                    "tags": {**person, "age_years": float(rng.normal(60, 10))},
                    "features": {f"f_{k}": float(rng.normal() + shift) for k in range(6)},
                }
            )
    return found


ANY = drift.Thresholds(alpha=0.05, smallest_effect=0.0, share_to_raise=1e-9, share_to_clear=0.0)


def test_the_same_population_raises_a_false_alarm_no_more_often_than_alpha() -> None:
    """Otherwise the physicist is called for nothing until nobody reads the alert."""
    alarms, small = 0, []
    for seed in range(150):
        report = drift.compare(
            drift.population(rows(60, seed)), drift.population(rows(40, 1000 + seed)), thresholds=ANY
        )
        alarms += report.verdict == drift.DRIFTED
        small += [f.p < 0.05 for s in report.scopes if s.decides for f in s.features if f.test.startswith("Kol")]
    # Binomial bounds: P(more than 16 of 150 at 5 %) is below 0.002; 1,200 uncorrected tests.
    assert alarms <= 16
    assert 0.02 <= np.mean(small) <= 0.07


def test_the_defaults_stay_silent_where_nothing_changed() -> None:
    """The thresholds that ship must not alarm on chance."""
    alarms = sum(
        drift.compare(drift.population(rows(100, s)), drift.population(rows(40, 500 + s))).verdict == drift.DRIFTED
        for s in range(40)
    )
    assert alarms <= 1


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_of_one_site_is_found_there_and_only_there(seed: int) -> None:
    """A new scanner at one site must not hide behind the others, nor accuse them."""
    reference = drift.population(rows(120, seed) + rows(120, seed, site="B"))
    window = drift.population(rows(40, 90 + seed) + rows(40, 90 + seed, site="B", shift=1.2))
    report = drift.compare(reference, window)
    verdicts = {scope.scope: scope.verdict for scope in report.scopes if scope.decides}
    assert verdicts == {"A": drift.STABLE, "B": drift.DRIFTED}
    assert report.verdict == drift.DRIFTED
    assert report.drifted_sites() == ["B"]
    worst = next(s for s in report.scopes if s.scope == "B").features[0]
    assert worst.drifted
    assert worst.feature.startswith("f_")
    assert 0.3 < worst.effect <= 1
    assert worst.psi > 0.25
    assert worst.p <= worst.p_adjusted < 0.01


def test_a_new_manufacturer_is_found_by_the_table_tests() -> None:
    """A category the model never saw has no expected count: an ordinary chi-square test would be invalid."""
    reference = drift.population(rows(200, 1, maker=("GE", "Philips", "Siemens")))
    report = drift.compare(reference, drift.population(rows(25, 2, maker=("Fuji",))))
    found = {f.feature: f for s in report.scopes if s.decides for f in s.features}
    assert found["manufacturer"].drifted
    assert found["manufacturer"].test == "chi-square, Monte Carlo"
    assert found["manufacturer"].effect == pytest.approx(1.0)
    assert found["sex"].test == "Fisher"
    assert not found["sex"].drifted


def test_monte_carlo_p_agrees_with_chi_square_where_both_are_valid() -> None:
    """If the drawn tables had other margins, small samples would be judged by a wrong p-value."""
    from scipy import stats

    table = np.array([[30, 25, 20], [18, 25, 30]])
    expected = stats.chi2_contingency(table).pvalue
    tables = stats.random_table(table.sum(1), table.sum(0)).rvs(9_999, random_state=np.random.default_rng(1))
    assert (tables.sum(axis=2) == table.sum(axis=1)).all()
    assert drift._table_test(table) == ("chi-square", pytest.approx(expected))
    small = np.array([[60, 50, 4], [5, 7, 4]])  # expected counts below 5
    name, p = drift._table_test(small)
    assert name == "chi-square, Monte Carlo"
    assert p == pytest.approx(float(stats.fisher_exact(small[:, [0, 2]])[1]), abs=0.02)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 20), shift=st.sampled_from([0.0, 0.7]), copies=st.integers(1, 4), data=st.randoms())
def test_order_and_repetition_of_images_change_nothing(
    seed: int, shift: float, copies: int, data: random.Random
) -> None:
    """A study sent twice by the PACS, or a log read in another order, must not make or hide a drift."""
    before, now = rows(40, seed, images=2), rows(25, 300 + seed, images=2, shift=shift)
    shuffled = [dict(row) for row in now for _ in range(data.randint(1, copies))]
    data.shuffle(shuffled)
    other = before[::-1]
    one = drift.compare(drift.population(before), drift.population(now))
    two = drift.compare(drift.population(other), drift.population(shuffled))
    assert msgspec.json.encode(one) == msgspec.json.encode(two)


def test_the_unit_is_the_patient() -> None:
    """Thirty shifted images of one patient are one shifted patient, or a chatty portable scanner is a drift."""
    reference = drift.population(rows(60, 1))
    others = rows(25, 2)
    many = rows(1, 3, images=300, shift=4.0)
    report = drift.compare(reference, drift.population(others + many))
    assert report.window_patients == 26
    assert report.window_images == 325
    assert report.verdict == drift.STABLE


def test_another_mix_of_unchanged_sites_is_no_drift() -> None:
    """After retraining on both sites, a week with one site only must not open the alarm again."""
    reference = drift.population(rows(100, 1) + rows(100, 1, site="B", shift=2.0))
    report = drift.compare(reference, drift.population(rows(40, 5, site="B", shift=2.0)))
    assert report.verdict == drift.STABLE
    assert report.scopes[0].compared_with == "its own reference"


def test_a_site_never_seen_is_compared_with_the_whole_reference_and_named() -> None:
    """A hospital that joins is the commonest drift of all; the report must say that it is new."""
    report = drift.compare(drift.population(rows(80, 1)), drift.population(rows(30, 2, site="Z", shift=1.5)))
    assert report.unseen_sites == ["Z"]
    assert report.scopes[0].compared_with == "the whole reference"
    assert report.verdict == drift.DRIFTED


def test_few_patients_are_insufficient_evidence_and_never_clear_an_alarm() -> None:
    """Silence is no evidence that a scanner was mended."""
    reference = drift.population(rows(80, 1))
    raised = drift.compare(reference, drift.population(rows(40, 2, shift=1.5)))
    assert raised.state == {"A": drift.DRIFTED}
    few = drift.compare(reference, drift.population(rows(5, 3)), state=raised.state)
    assert few.verdict == drift.INSUFFICIENT
    assert few.state["A"] == drift.DRIFTED
    assert "stays up" in few.summary
    cleared = drift.compare(reference, drift.population(rows(40, 4)), state=few.state)
    assert (cleared.verdict, cleared.state) == (drift.STABLE, {"A": drift.STABLE})


def test_small_sites_are_judged_together_while_none_has_enough() -> None:
    """Ten hospitals of fifteen patients each would otherwise never be watched."""
    reference = drift.population(rows(60, 1) + rows(60, 1, site="B"))
    window = drift.population(rows(15, 2, shift=1.5) + rows(15, 2, site="B", shift=1.5))
    report = drift.compare(reference, window)
    assert report.verdict == drift.DRIFTED
    assert [s.scope for s in report.scopes if s.decides] == [drift.POOLED]


def test_hysteresis_keeps_the_verdict_between_the_two_thresholds() -> None:
    """A share that hovers around one threshold would send an alert every night."""
    reference, window = drift.population(rows(150, 1)), rows(60, 2)
    for row in window:
        row["features"]["f_0"] += 2.0  # one feature of ten
    limits = drift.Thresholds(share_to_raise=0.15, share_to_clear=0.05)
    fresh = drift.compare(reference, drift.population(window), thresholds=limits)
    kept = drift.compare(reference, drift.population(window), thresholds=limits, state={"A": drift.DRIFTED})
    assert 0.05 < (fresh.scopes[0].share_drifted or 0) < 0.15
    assert (fresh.verdict, kept.verdict) == (drift.STABLE, drift.DRIFTED)


def test_the_models_own_output_raises_by_itself() -> None:
    """When the probabilities move and no image statistic does, the cause is one we do not measure."""
    window = rows(60, 2)
    for row in window:
        row["probability"] = min(1.0, row["probability"] + 0.4)
    report = drift.compare(drift.population(rows(100, 1)), drift.population(window))
    assert report.verdict == drift.DRIFTED
    assert report.scopes[0].features[0].feature == "probability"


def test_probabilities_of_training_images_are_left_out() -> None:
    """A network is surer of the images it learnt from: that is no drift of the hospital."""
    trained = rows(80, 1, part="train")
    for row in trained:
        row["probability"] = 0.999
    reference = drift.population(trained + rows(80, 2, part="validation"))
    assert int(np.isnan(reference.numeric["probability"]).sum()) == 80
    assert drift.compare(reference, drift.population(rows(60, 3))).verdict == drift.STABLE


def test_a_tag_that_vanishes_is_a_drift() -> None:
    """A gateway that starts to strip PatientAge changes what subgroup figures mean."""
    window = rows(40, 2)
    for row in window:
        row["tags"]["age_years"] = None
    report = drift.compare(drift.population(rows(80, 1)), drift.population(window))
    assert {f.feature for f in report.scopes[0].features if f.drifted} == {"age_years present"}


def test_a_column_that_only_the_reference_has_is_not_compared() -> None:
    """The prediction log keeps fewer tags than a manifest: what it does not record has not vanished."""
    before = rows(80, 1)
    for row in before:
        row["tags"]["model_name"] = "X1"
    report = drift.compare(drift.population(before), drift.population(rows(40, 2)))
    assert report.verdict == drift.STABLE
    assert "model_name" not in {f.feature for f in report.scopes[0].features}


def test_identifiers_are_never_features() -> None:
    """A date, a UID or a name in the reference would carry PHI into state, report and e-mail."""
    made = drift.population([{**rows(1, 1)[0], "study_date": "20200101", "study_uid": "2.25.1", "PatientName": "X"}])
    assert set(made.numeric) | set(made.categorical) <= {
        "probability", "age_years", "sex", "manufacturer", *(f"f_{k}" for k in range(6)),
    }  # fmt: skip


def test_empty_windows_and_rows_without_patient() -> None:
    """A quiet night is no error; a row that cannot be counted is."""
    report = drift.compare(drift.population(rows(30, 1)), drift.population([]))
    assert report.verdict == drift.INSUFFICIENT
    with pytest.raises(DataError, match="no patient"):
        drift.population([{"sop_uid": "1", "site": "A"}])
    with pytest.raises(DataError, match="contradict"):
        drift.Thresholds(share_to_raise=0.1, share_to_clear=0.2)


def test_a_report_survives_json_and_its_figures_are_finite() -> None:
    """State is kept as JSON between two nights; NaN would make it unreadable."""
    report = drift.compare(
        drift.population(rows(40, 1)), drift.population([*rows(30, 2), {**rows(1, 9)[0], "probability": math.nan}])
    )
    raw = msgspec.json.encode(report)
    assert b"NaN" not in raw
    assert b':null,"psi"' not in raw
    assert msgspec.json.decode(raw, type=drift.DriftReport) == report

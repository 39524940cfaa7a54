"""Figures and intervals against scikit-learn, SciPy and published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from radloop.learning import decision, statistics
from radloop.learning.statistics import Interval, Resamples


@given(st.data())
def test_the_weighted_auc_is_that_of_scikit_learn(data: st.DataObject) -> None:
    """Every interval and every gate stands on this number; ties and weights are where home-made AUCs go wrong."""
    n = data.draw(st.integers(2, 30))
    scores = np.array(data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)), dtype=float)
    labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), dtype=np.int8)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=float)
    assume(weights[labels == 1].sum() > 0 and weights[labels == 0].sum() > 0)
    got = statistics.auc(scores, labels, weights[np.newaxis])[0]
    assert got == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))


def test_a_resample_without_both_classes_is_no_number() -> None:
    """A zero there would pull the lower bound down, a one would push it up."""
    got = statistics.auc(np.array([0.1, 0.9]), np.array([0, 1], np.int8), np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert np.isnan(got[0])
    assert got[1] == 1


def test_resamples_draw_whole_patients() -> None:
    """Images of one patient drawn one by one would make intervals too narrow."""
    patients = ["a", "b", "a", "c", "b", "a"]
    weights = np.concatenate(list(Resamples(patients, 200, seed=0).weights()))
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert set(weights[:, [0, 1, 3]].sum(1)) == {3.0}
    assert weights[:, 0].var() > 0.5


def noisy(patients: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores of overlapping classes."""
    random = np.random.default_rng(seed)
    labels = (np.arange(patients) % 2).astype(np.int8)
    return random.normal(labels * 1.2, 1), labels, [f"P{i}" for i in range(patients)]


def test_copies_of_images_add_no_evidence() -> None:
    """Five identical views of each patient must not narrow the interval: they are no new patients."""
    scores, labels, names = noisy(80, 0)
    one = statistics.area_of(scores, labels, names, resamples=500, seed=3)
    five = statistics.area_of(np.tile(scores, 5), np.tile(labels, 5), names * 5, resamples=500, seed=3)
    assert five.value == pytest.approx(one.value)
    assert (five.lower, five.upper) == pytest.approx((one.lower, one.upper))
    alone = statistics.area_of(
        np.tile(scores, 5), np.tile(labels, 5), [str(i) for i in range(400)], resamples=500, seed=3
    )
    assert alone.upper - alone.lower < 0.6 * (one.upper - one.lower)


def test_intervals_cover_the_truth() -> None:
    """A 95 % interval that holds the truth 80 % of the time would let bad models through the gate."""
    from scipy.stats import norm

    truth = norm.cdf(1.2 / np.sqrt(2))
    found = [statistics.area_of(*noisy(120, seed), resamples=200, seed=seed) for seed in range(100)]
    covered = sum(interval.lower <= truth <= interval.upper for interval in found)
    assert 88 <= covered <= 100


def test_perfect_separation_is_not_certainty() -> None:
    """On ten patients of each class an AUC of 1 proves little; a bootstrap alone would say [1, 1]."""
    labels = np.repeat([0, 1], 10).astype(np.int8)
    interval = statistics.area_of(labels * 1.0, labels, [str(i) for i in range(20)], resamples=100, seed=0)
    assert interval.method == "newcombe"
    assert interval.upper == 1
    assert 0.75 < interval.lower < 0.92
    sure = statistics.proportion(Interval(1.0, 1.0, 1.0), 10)
    assert sure.method == "wilson"
    assert sure.lower == pytest.approx(0.7225, abs=1e-4)  # Wilson 1927 for 10 of 10


@given(st.floats(0.0, 1.0), st.integers(1, 500), st.integers(1, 500))
def test_newcombe_holds_the_value_and_is_mirrored(value: float, positive: int, negative: int) -> None:
    """An interval that missed its own value, or favoured one class, would be wrong whatever the data."""
    lower, upper = statistics.newcombe(value, positive, negative)
    assert 0 <= lower <= value <= upper <= 1
    mirrored = statistics.newcombe(1 - value, negative, positive)
    assert (1 - upper, 1 - lower) == pytest.approx(mirrored, abs=1e-6)


@given(hnp.arrays(float, st.integers(20, 200), elements=st.floats(0, 1)))
def test_calibration_error_is_zero_for_the_mean_and_bounded(probabilities: np.ndarray) -> None:
    """The calibration gate compares this with a bound of 0.1: it must live on the scale of a probability."""
    labels = (np.arange(len(probabilities)) % 2).astype(np.int8)
    bins, ones = statistics.calibration_bins(probabilities), np.ones((1, len(probabilities)))
    assert 0 <= statistics.calibration_error(probabilities, labels, bins, ones)[0] <= 1
    flat = np.full(len(labels), labels.mean())
    assert statistics.calibration_error(flat, labels, statistics.calibration_bins(flat), ones)[0] < 1e-12


def test_calibration_error_sees_overconfidence() -> None:
    """A model that says 0.99 and is right in half of the cases must not pass."""
    labels = (np.arange(100) % 2).astype(np.int8)
    sure = np.where(np.arange(100) < 50, 0.99, 0.01)
    error = statistics.calibration_error(sure, labels, statistics.calibration_bins(sure), np.ones((1, 100)))
    assert error[0] == pytest.approx(0.49)


@given(hnp.arrays(float, 7, elements=st.floats(-1e6, 1e6)))
def test_probabilities_are_probabilities(logits: np.ndarray) -> None:
    """An overflow at a huge logit would be a warning, a NaN, and a wrong decision."""
    rule = decision.Decision(slope=2.0, intercept=-1.0, threshold=0.5, prevalence=0.1)
    probabilities = rule.probability(np.sort(logits))
    assert np.all((probabilities >= 0) & (probabilities <= 1))
    assert np.all(np.diff(probabilities) >= 0)
    np.testing.assert_array_equal(rule.decide(probabilities), (probabilities >= 0.5).astype(int))


def test_the_threshold_lies_between_the_classes() -> None:
    """A threshold on the last positive itself would miss the next patient who is a hair less clear."""
    logits = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    rule = decision.fit(logits, np.array([0, 0, 0, 1, 1, 1], np.int8), prevalence=0.1)
    low, high = rule.probability(np.array([-1.0, 1.0]))
    assert rule.threshold == pytest.approx((low + high) / 2)
    assert np.isfinite(rule.slope)


def test_the_sensitivity_rule_reaches_its_target() -> None:
    """Whoever declares a sensitivity of 0.95 must get it on validation, with the best specificity left."""
    scores, labels, _ = noisy(400, 1)
    rule = decision.fit(scores, labels, prevalence=0.1, rule="sensitivity", target_sensitivity=0.95)
    called = rule.decide(rule.probability(scores))
    sensitivity = called[labels == 1].mean()
    assert 0.95 <= sensitivity < 0.96

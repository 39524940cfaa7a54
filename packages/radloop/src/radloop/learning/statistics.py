"""Figures with 95 % intervals that resample patients.

Images of one patient are not independent, so whole patients are drawn with replacement (the cluster bootstrap: Efron &
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8; for ROC curves Rutter, Acad Radiol 7:413, 2000) and
intervals are percentiles. A resample is a weight for each image, so all resamples are computed at once.

Where every resample gives the same value (perfect separation in a small test part) the bootstrap interval would be a
point, which claims far too much. Then the interval is Wilson's for a proportion and Newcombe's for an AUC (method 5 of
Newcombe, Stat Med 25:559, 2006), with the number of patients as sample size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.95
_Z = 1.959963984540054  # scipy.stats.norm.ppf(0.975)
_CHUNK_CELLS = 2_000_000


class Interval(msgspec.Struct, frozen=True):
    """A figure and its 95 % interval. `method` is bootstrap, wilson or newcombe."""

    value: float
    lower: float
    upper: float
    method: str = "bootstrap"


class Resamples:
    """Bootstrap weights over patients.

    Args:
        patients: the patient of each image, `(n,)`.
        count: resamples.
        seed: the same seed gives the same resamples.
    """

    def __init__(self, patients: Sequence[str], count: int, seed: int) -> None:
        names, self._codes = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
        self.patients, self.images, self.count, self._seed = len(names), len(self._codes), count, seed

    def weights(self) -> Iterator[Floats]:
        """How often each image is drawn, in chunks `(resamples, images)`."""
        random = np.random.default_rng(self._seed)
        chunk = max(1, _CHUNK_CELLS // max(self.images, 1))
        for start in range(0, self.count, chunk):
            size = min(chunk, self.count - start)
            drawn = random.integers(self.patients, size=(size, self.patients))
            flat = (drawn + np.arange(size)[:, np.newaxis] * self.patients).ravel()
            times = np.bincount(flat, minlength=size * self.patients).reshape(size, self.patients)
            yield times[:, self._codes].astype(np.float64)

    def apply(self, statistic: Callable[[Floats], Floats]) -> Floats:
        """`statistic` of every resample: it maps weights `(b, n)` to `(b,)` or `(b, k)`."""
        return np.concatenate([statistic(weights) for weights in self.weights()])


def auc(scores: Floats, labels: NDArray[np.int8], weights: Floats) -> Floats:
    """Weighted area under the ROC curve, ties counted half, for each row of weights `(b, n)`.

    A row without both classes gives not a number.
    """
    order = np.argsort(scores, kind="stable")
    ranked, positive = scores[order], labels[order] == 1
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    weights = weights[:, order]
    up = np.add.reduceat(np.where(positive, weights, 0.0), starts, axis=1)
    down = np.add.reduceat(np.where(positive, 0.0, weights), starts, axis=1)
    below = np.cumsum(down, axis=1) - down
    pairs = up.sum(1) * down.sum(1)
    won = (up * (below + 0.5 * down)).sum(1)
    area: Floats = np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    return area


def rate(hits: NDArray[np.bool_], among: NDArray[np.bool_], weights: Floats) -> Floats:
    """Weighted share of `among` that are `hits`, such as sensitivity; not a number where there are none."""
    total = weights @ among.astype(np.float64)
    found = weights @ (hits & among).astype(np.float64)
    share: Floats = np.divide(found, total, out=np.full(len(weights), np.nan), where=total > 0)
    return share


def calibration_bins(probabilities: Floats) -> NDArray[np.intp]:
    """A bin for each image: at most 10 bins of about equally many images, at least 20 in each.

    Equal numbers rather than equal widths (Nguyen & O'Connor, EMNLP 2015): few images in a bin would look like
    miscalibration.
    """
    count = int(np.clip(len(probabilities) // 20, 1, 10))
    edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, count + 1)[1:-1]))
    return np.searchsorted(edges, probabilities, side="right")


def calibration_error(
    probabilities: Floats, labels: NDArray[np.int8], bins: NDArray[np.intp], weights: Floats
) -> Floats:
    """Expected calibration error (Naeini et al., AAAI 2015) for each row of weights."""
    member = np.eye(int(bins.max()) + 1)[bins]
    gap = weights @ (member * (probabilities - labels)[:, np.newaxis])
    error: Floats = np.abs(gap).sum(1) / weights.sum(1)
    return error


def percentiles(value: float, draws: Floats) -> Interval:
    """The percentile interval of a figure between -1 and 1; draws without both classes (no number) are left out."""
    usable = draws[np.isfinite(draws)]
    if not len(usable):
        return Interval(value, -1.0, 1.0)
    lower, upper = np.quantile(usable, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, min(float(lower), value), max(float(upper), value))


def flat(interval: Interval) -> bool:
    """Whether the bootstrap gave a point, which is no interval."""
    return interval.upper - interval.lower < 1e-9


def proportion(interval: Interval, patients: int) -> Interval:
    """The interval itself, or Wilson's over patients where it is flat at 0 or 1."""
    if not flat(interval) or patients == 0:
        return interval
    from scipy.stats import binomtest

    wilson = binomtest(round(interval.value * patients), patients).proportion_ci(LEVEL, method="wilson")
    lower, upper = float(wilson.low), float(wilson.high)
    return Interval(interval.value, min(lower, interval.value), max(upper, interval.value), "wilson")


def area(interval: Interval, positive: int, negative: int) -> Interval:
    """The interval itself, or Newcombe's over patients of each class where it is flat."""
    if not flat(interval) or not positive or not negative:
        return interval
    return Interval(interval.value, *newcombe(interval.value, positive, negative), "newcombe")


def newcombe(value: float, positive: int, negative: int) -> tuple[float, float]:
    """Newcombe's method 5: the areas from which the one seen is 1.96 standard errors away."""
    from scipy.optimize import brentq

    half = (positive + negative) / 2 - 1

    def variance(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return theta * (1 - theta) * spread / (positive * negative)

    def excess(theta: float) -> float:
        return float(abs(theta - value) - _Z * np.sqrt(variance(theta)))

    # excess is below 0 just beside the value and not below 0 at the ends, 0 and 1: one root on each side.
    lower = brentq(excess, 0.0, value - 1e-9) if value > 1e-6 else 0.0
    upper = brentq(excess, value + 1e-9, 1.0) if value < 1 - 1e-6 else 1.0
    return float(lower), float(upper)


def area_of(
    scores: Floats, labels: NDArray[np.int8], patients: Sequence[str], *, resamples: int, seed: int
) -> Interval:
    """AUC with its interval; both classes must be there."""
    from sklearn.metrics import roc_auc_score

    draws = Resamples(patients, resamples, seed).apply(lambda w: auc(scores, labels, w))
    interval = percentiles(float(roc_auc_score(labels, scores)), draws)
    return area(interval, *class_patients(labels, patients)[::-1])


def class_patients(labels: NDArray[np.int8], patients: Sequence[str]) -> tuple[int, int]:
    """Patients with at least one negative, and with at least one positive image."""
    names = np.asarray(patients, dtype=str)
    return len(set(names[labels == 0])), len(set(names[labels == 1]))


def curve(probabilities: Floats, labels: NDArray[np.int8], bins: NDArray[np.intp]) -> list[tuple[float, float, int]]:
    """The reliability diagram: mean probability, share positive and images of each bin."""
    return [
        (float(probabilities[bins == b].mean()), float(labels[bins == b].mean()), int((bins == b).sum()))
        for b in np.unique(bins)
    ]

"""Is the challenger safe to go on with? One look at the pairs of answers collected so far.

The unit is the patient: a patient with thirty images is one observation, and intervals resample patients
(`scipy.stats.bootstrap`, percentile; Efron & Tibshirani 1993) or are exact for a share of patients (Clopper & Pearson
1934). Bounds are one-sided at `Margins.confidence`.

**This judge looks once a step, at a fixed number of patients.** Looking again and again until the verdict pleases would
raise its error rates beyond the stated ones: call it once a step, when the step's patients are together. It is not
anytime-valid.

Without labels the best verdict is "operationally safe": nothing here says that the challenger's answers are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.errors import ServingError
from radloop.serving.predictions import OK, Pair

Verdict = Literal["operationally_safe", "harm", "undetermined"]
Floats = NDArray[np.float64]
_RESAMPLES = 1999
_RESAMPLES_ONE_BY_ONE = 499  # for statistics that scipy cannot compute for all resamples at once
_SEED = 20260101  # a verdict on the same pairs is the same verdict


class Margins(msgspec.Struct, frozen=True):
    """What is still acceptable, and from how many patients on anything is said.

    error_rate: share of patients with a request that the challenger did not answer although the champion did.
    latency_p95_ratio: challenger's over champion's 95th percentile of the patients' median latencies; latencies below
        latency_floor_ms count as that, because nobody waits for them.
    agreement: least share of a patient's requests with the same decision, mean over patients.
    mean_absolute_difference: of the two probabilities, mean over patients.
    ks_distance: largest distance between the two cumulative distributions of the patients' mean probability.
    auc_difference: how much lower the challenger's area under the ROC curve may be (paired), if there are labels.
    """

    minimum_patients: int = 30
    confidence: float = 0.95
    error_rate: float = 0.10
    latency_p95_ratio: float = 2.0
    latency_floor_ms: float = 100.0
    agreement: float = 0.70
    mean_absolute_difference: float = 0.25
    ks_distance: float = 0.40
    auc_difference: float = 0.05

    def __post_init__(self) -> None:
        """Raises ServingError on margins that mean nothing."""
        shares = (self.error_rate, self.agreement, self.mean_absolute_difference, self.ks_distance, self.auc_difference)
        sane = self.minimum_patients >= 2 and 0.5 < self.confidence < 1 and self.latency_p95_ratio > 0
        if not sane or self.latency_floor_ms < 0 or not all(0 <= share <= 1 for share in shares):
            got = msgspec.to_builtins(self)
            raise ServingError("margins that mean nothing", expected="shares from 0 to 1", got=got)


class Figure(msgspec.Struct, frozen=True):
    """One comparison: the figure, its one-sided bounds, the margin, and what follows.

    `ok`: the whole interval is on the good side of the margin. `harm`: the whole interval is on the bad side.
    Neither: the patients so far do not tell.
    """

    name: str
    figure: float
    low: float
    high: float
    bound: float
    ok: bool
    harm: bool


class JudgeVerdict(msgspec.Struct, frozen=True):
    """`reasons` are the names of the figures that kept the verdict from "operationally_safe"."""

    verdict: Verdict
    figures: list[Figure]
    n_requests: int
    n_patients: int
    n_labelled_patients: int
    reasons: list[str]


def judge(
    pairs: Iterable[Pair], margins: Margins | None = None, *, labels: Mapping[str, int] | None = None
) -> JudgeVerdict:
    """Compare challenger and champion on requests that both were asked.

    Args:
        pairs: from `predictions.pairs`. Those without a patient (tensors) or that the champion refused are left out.
        margins: what is acceptable.
        labels: 0 or 1 by pseudonymous `sop_uid`; adds the AUC comparison where both classes have at least 2 patients.

    Returns:
        "harm" if any figure is beyond its margin for certain; "undetermined" below `minimum_patients` or while any
        figure is uncertain; else "operationally_safe".
    """
    limits = margins or Margins()
    patients = _by_patient(pairs)
    n_requests = sum(len(rows) for rows in patients.values())
    figures, labelled = [], 0
    if patients:
        figures.append(_error_rate(patients, limits))
    both = {patient: kept for patient, rows in patients.items() if (kept := [p for p in rows if _answered(p)])}
    if len(both) >= limits.minimum_patients:
        figures += [compare(both, limits) for compare in (_latency, _agreement, _difference, _distance)]
        if labels:
            auc, labelled = _auc_difference(both, labels, limits)
            figures += auc
    harm = [figure.name for figure in figures if figure.harm]
    unsure = [figure.name for figure in figures if not figure.ok and not figure.harm]
    if len(both) < limits.minimum_patients:
        unsure.append(f"patients: {len(both)} of {limits.minimum_patients}")
    verdict: Verdict = "harm" if harm else "undetermined" if unsure else "operationally_safe"
    return JudgeVerdict(verdict, figures, n_requests, len(patients), labelled, harm + unsure)


def _by_patient(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    patients: dict[str, list[Pair]] = {}
    for pair in pairs:
        patient = pair.champion["patient"]
        if patient is not None and pair.champion["status"] == OK:
            patients.setdefault(patient, []).append(pair)
    return dict(sorted(patients.items()))


def _answered(pair: Pair) -> bool:
    return pair.challenger is not None and pair.challenger["status"] == OK


def _error_rate(patients: dict[str, list[Pair]], limits: Margins) -> Figure:
    from scipy import stats

    failed = sum(any(not _answered(pair) for pair in rows) for rows in patients.values())
    # Each side at `confidence`: a two-sided Clopper-Pearson interval at 2 * confidence - 1.
    interval = stats.binomtest(failed, len(patients)).proportion_ci(2 * limits.confidence - 1, method="exact")
    share = failed / len(patients)
    return _below("error_rate", share, float(interval.low), float(interval.high), limits.error_rate)


def _latency(patients: dict[str, list[Pair]], limits: Margins) -> Figure:
    floor = limits.latency_floor_ms
    champion = np.array([np.median([p.champion["latency_ms"] for p in rows]) for rows in patients.values()])
    challenger = np.array([np.median([_theirs(p)["latency_ms"] for p in rows]) for rows in patients.values()])

    def ratio(first: Floats, second: Floats, axis: int = -1) -> Any:
        return np.percentile(second, 95, axis=axis) / np.percentile(first, 95, axis=axis)

    both = (np.maximum(champion, floor), np.maximum(challenger, floor))
    low, high = _interval(both, ratio, limits, paired=True)
    return _below("latency_p95_ratio", float(ratio(*both)), low, high, limits.latency_p95_ratio)


def _agreement(patients: dict[str, list[Pair]], limits: Margins) -> Figure:
    shares = np.array(
        [np.mean([p.champion["decision"] == _theirs(p)["decision"] for p in rows]) for rows in patients.values()]
    )
    low, high = _interval((shares,), np.mean, limits)
    return _above("decision_agreement", float(shares.mean()), low, high, limits.agreement)


def _difference(patients: dict[str, list[Pair]], limits: Margins) -> Figure:
    means = np.array([np.mean([abs(a - b) for a, b in map(_probabilities, rows)]) for rows in patients.values()])
    low, high = _interval((means,), np.mean, limits)
    bound = limits.mean_absolute_difference
    return _below("mean_absolute_difference", float(means.mean()), low, high, bound)


def _distance(patients: dict[str, list[Pair]], limits: Margins) -> Figure:
    """The KS statistic as an effect size: its p-value would need independent samples; these are the same patients."""
    from scipy import stats

    scores = np.array([np.mean([_probabilities(p) for p in rows], axis=0) for rows in patients.values()])
    champion, challenger = scores[:, 0], scores[:, 1]
    distance = float(stats.ks_2samp(champion, challenger).statistic)

    def resampled(first: Floats, second: Floats) -> float:
        return float(stats.ks_2samp(first, second, method="asymp").statistic)

    low, high = _interval((champion, challenger), resampled, limits, paired=True, vectorized=False)
    # Another distribution of scores is a reason to look, not a proof of harm: a better model moves scores too.
    return Figure("ks_distance", distance, low, high, limits.ks_distance, ok=high <= limits.ks_distance, harm=False)


def _auc_difference(
    patients: dict[str, list[Pair]], labels: Mapping[str, int], limits: Margins
) -> tuple[list[Figure], int]:
    """Challenger's minus champion's AUC over labelled images.

    Patients are resampled within those that have a positive image and those that have none, so that no resample has one
    class only.
    """
    labelled = [
        [(labels[str(p.champion["sop_uid"])], *_probabilities(p)) for p in rows if p.champion["sop_uid"] in labels]
        for rows in patients.values()
    ]
    groups = [np.array(rows, np.float64) for rows in labelled if rows]
    positive = [group for group in groups if group[:, 0].any()]
    negative = [group for group in groups if not group[:, 0].any()]
    if min(len(positive), len(negative)) < 2:
        return [], len(groups)

    def difference(with_finding: NDArray[np.intp], without: NDArray[np.intp]) -> float:
        images = np.concatenate([positive[i] for i in with_finding] + [negative[i] for i in without])
        return _auc(images[:, 0], images[:, 2]) - _auc(images[:, 0], images[:, 1])

    everyone = (np.arange(len(positive)), np.arange(len(negative)))
    low, high = _interval(everyone, difference, limits, vectorized=False)
    return [_above("auc_difference", difference(*everyone), low, high, -limits.auc_difference)], len(groups)


def _auc(truth: Floats, score: Floats) -> float:
    """Area under the ROC curve as the Mann-Whitney statistic (Hanley & McNeil 1982)."""
    from scipy import stats

    positive, negative = score[truth == 1], score[truth == 0]
    wins = float(stats.mannwhitneyu(positive, negative, method="asymptotic").statistic)
    return wins / (len(positive) * len(negative))


def _interval(
    data: Sequence[NDArray[Any]],
    statistic: Callable[..., Any],
    limits: Margins,
    *,
    paired: bool = False,
    vectorized: bool = True,
) -> tuple[float, float]:
    from scipy import stats

    result = stats.bootstrap(
        tuple(data),
        statistic,
        n_resamples=_RESAMPLES if vectorized else _RESAMPLES_ONE_BY_ONE,
        paired=paired,
        vectorized=vectorized,
        confidence_level=2 * limits.confidence - 1,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _below(name: str, figure: float, low: float, high: float, bound: float) -> Figure:
    return Figure(name, figure, low, high, bound, ok=high <= bound, harm=low > bound)


def _above(name: str, figure: float, low: float, high: float, bound: float) -> Figure:
    return Figure(name, figure, low, high, bound, ok=low >= bound, harm=high < bound)


def _theirs(pair: Pair) -> Any:
    """The challenger's row of an answered pair."""
    return pair.challenger


def _probabilities(pair: Pair) -> tuple[float, float]:
    return float(pair.champion["probability"] or 0.0), float(_theirs(pair)["probability"] or 0.0)

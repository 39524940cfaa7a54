"""Is the challenger safe to go on with? Asked as often as one likes, while traffic flows.

The unit is the patient: one with thirty images is one observation, the first image that both models were asked about (in a
step, for errors and delay; in the release, for the answers), in the order of asking. Each figure is a mean of bounded
observations and comes with a confidence sequence: an interval that holds at all times at once, so that looking after every
patient, and stopping whenever one likes, keeps the stated error rates. Shares by the beta-binomial mixture (Howard, Ramdas,
McAuliffe & Sekhon, Annals of Statistics 49, 2021), other means by hedged betting (Waudby-Smith & Ramdas, JRSS B 86, 2024,
theorem 3), both from `ville`, the one package of these that has a wheel; tests hold its error rates against simulation.

- "harm": an interval is wholly beyond its margin. All figures together err with probability 1 - `confidence` (Bonferroni).
- "operationally_safe": every interval is wholly within its margin. A figure that is truly beyond its margin passes with
  probability at most 1 - `confidence` (intersection-union). Without labels nothing here says that the answers are right.
- "non_inferior": that, and adjudicated labels show sensitivity and specificity within `accuracy_difference` of the champion's.
- "undetermined": the patients so far do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from radloop.errors import ServingError
from radloop.serving.predictions import OK, Pair

Verdict = Literal["non_inferior", "operationally_safe", "harm", "undetermined"]
_GRID = 2000
_RARE = (0.5, 4.5)
"""Prior of a share that should be small (mean 0.1): it makes the interval narrow there; it is valid whatever the share is."""


class Margins(msgspec.Struct, frozen=True):
    """What is still acceptable, and from how many patients on a step may end.

    minimum_patients: answered by both models in a step, before it may be called safe.
    confidence: of every statement; see above.
    error_rate: share of patients whose request the challenger did not answer although the champion did.
    slow: share of patients who waited for the challenger longer than latency_ratio times what they waited for the champion;
        waits below latency_floor_ms are none.
    agreement: least share of patients with the same decision.
    mean_absolute_difference: of the two probabilities, mean over patients.
    score_shift: mean of the challenger's minus the champion's probability, to either side. Beyond it is a reason to look, not
        harm: a better model moves scores too.
    accuracy_difference: how much lower the challenger's sensitivity, and its specificity, may be, where there are labels.
    """

    minimum_patients: int = 40
    confidence: float = 0.95
    error_rate: float = 0.10
    slow: float = 0.10
    latency_ratio: float = 2.0
    latency_floor_ms: float = 100.0
    agreement: float = 0.70
    mean_absolute_difference: float = 0.25
    score_shift: float = 0.25
    accuracy_difference: float = 0.05

    def __post_init__(self) -> None:
        """Raises ServingError on margins that mean nothing."""
        shares = (self.error_rate, self.slow, self.agreement, self.mean_absolute_difference, self.score_shift)
        sane = self.minimum_patients >= 2 and 0.5 < self.confidence < 1 and self.latency_ratio > 0
        within = all(0 <= share <= 1 for share in (*shares, self.accuracy_difference))
        if not sane or self.latency_floor_ms < 0 or not within:
            got = msgspec.to_builtins(self)
            raise ServingError("margins that mean nothing", expected="shares from 0 to 1", got=got)


class Figure(msgspec.Struct, frozen=True):
    """One comparison: the mean over patients, its confidence sequence's interval now, the margin, and what follows.

    `ok`: the whole interval is on the good side of the margin. `harm`: the whole, wider, interval that all figures together
    may be judged by is on the bad side. Neither: the patients so far do not tell.
    """

    name: str
    figure: float
    low: float
    high: float
    bound: float
    ok: bool
    harm: bool


class JudgeVerdict(msgspec.Struct, frozen=True):
    """`reasons` are the names of the figures that kept the verdict from being better."""

    verdict: Verdict
    figures: list[Figure]
    n_requests: int
    n_patients: int
    n_labelled_patients: int
    reasons: list[str]


def judge(
    pairs: Iterable[Pair],
    margins: Margins | None = None,
    *,
    labels: Mapping[str, int] | None = None,
    since: str = "",
) -> JudgeVerdict:
    """Compare challenger and champion on requests that both were asked.

    Args:
        pairs: of the whole release, from `predictions.pairs`, in any order. Those without a patient (tensors) or that the
            champion refused are left out.
        margins: what is acceptable.
        labels: 0 or 1 by pseudonymous `sop_uid`, adjudicated.
        since: when the step began (UTC, ISO 8601).

    Returns:
        "harm" if any figure is beyond its margin for certain; "undetermined" below `minimum_patients` in the step or while
        any figure is uncertain; else what the figures prove.
    """
    limits = margins or Margins()
    asked = sorted(
        (pair for pair in pairs if pair.champion["patient"] is not None and pair.champion["status"] == OK),
        key=lambda pair: (pair.champion["at"], pair.champion["prediction_id"]),
    )
    step = _first_of_each(pair for pair in asked if pair.champion["at"] >= since)
    both = _first_of_each(pair for pair in asked if _answered(pair))
    truth = labels or {}
    labelled = _first_of_each(pair for pair in asked if _answered(pair) and pair.champion["sop_uid"] in truth)
    streams = _streams(step, both, labelled, truth, limits)
    shared = (1 - limits.confidence) / max(len(streams), 1)
    figures = [stream(1 - limits.confidence, shared) for stream in streams]
    n_step = sum(map(_answered, step))
    return _verdict(figures, limits, n_step, len(asked), len({p.champion["patient"] for p in asked}), len(labelled))


def _verdict(
    figures: list[Figure], limits: Margins, n_step: int, n_requests: int, n_patients: int, n_labelled: int
) -> JudgeVerdict:
    harm = [figure.name for figure in figures if figure.harm]
    accuracy = [figure for figure in figures if figure.name in _ACCURACY]
    unsure = [figure.name for figure in figures if not figure.ok and not figure.harm and figure not in accuracy]
    if n_step < limits.minimum_patients:
        unsure.append(f"patients: {n_step} of {limits.minimum_patients}")
    proven = len(accuracy) == len(_ACCURACY) and all(figure.ok for figure in accuracy)
    verdict: Verdict = (
        "harm" if harm else "undetermined" if unsure else "non_inferior" if proven else "operationally_safe"
    )
    doubts = [figure.name for figure in accuracy if not figure.ok and not figure.harm]
    return JudgeVerdict(verdict, figures, n_requests, n_patients, n_labelled, harm + unsure + doubts)


_ACCURACY = ("sensitivity_difference", "specificity_difference")
_Stream = Callable[[float, float], Figure]


def _streams(
    step: Sequence[Pair], both: Sequence[Pair], labelled: Sequence[Pair], truth: Mapping[str, int], limits: Margins
) -> list[_Stream]:
    """Each figure as a function of the two error rates: of one statement, and of this one's share of all."""
    answered = [pair for pair in step if _answered(pair)]
    scores = [_probabilities(pair) for pair in both]
    made = [
        _share("error_rate", [not _answered(pair) for pair in step], limits.error_rate),
        _share("slow", [_is_slow(pair, limits) for pair in answered], limits.slow),
        _share("disagreement", [_disagree(pair) for pair in both], 1 - limits.agreement),
        _mean("mean_absolute_difference", [abs(b - a) for a, b in scores], (0, 1), limits.mean_absolute_difference),
        _mean("score_shift", [b - a for a, b in scores], (-1, 1), limits.score_shift, both_sides=True),
    ]
    for name, kind in zip(_ACCURACY, (1, 0), strict=True):
        # Lost accuracy, so that more is worse, as with all figures here.
        mine = [pair for pair in labelled if truth[str(pair.champion["sop_uid"])] == kind]
        lost = [_is_right(pair.champion, kind) - _is_right(_theirs(pair), kind) for pair in mine]
        if lost:
            made.append(_mean(name, lost, (-1, 1), limits.accuracy_difference))
    return [stream for stream in made if stream is not None]


def _share(name: str, observed: Sequence[bool], bound: float) -> _Stream | None:
    from ville import BernoulliCS  # type: ignore[import-untyped]

    if not observed:
        return None
    stream = np.array(observed, np.float64)

    def at(alpha: float, shared: float) -> Figure:
        low, high = BernoulliCS(alpha, _RARE).fit(stream).interval()
        sure, _ = BernoulliCS(shared, _RARE).fit(stream).interval()
        return Figure(name, float(stream.mean()), low, high, bound, ok=high <= bound, harm=sure > bound)

    return at


def _mean(
    name: str, observed: Sequence[float], bounds: tuple[float, float], bound: float, *, both_sides: bool = False
) -> _Stream | None:
    from ville import BettingCS

    if not observed:
        return None
    stream = np.array(observed, np.float64)

    def at(alpha: float, shared: float) -> Figure:
        low, high = BettingCS(bounds, alpha, grid=_GRID).fit(stream).interval()
        sure, _ = BettingCS(bounds, shared, grid=_GRID).fit(stream).interval()
        ok = high <= bound and (low >= -bound or not both_sides)
        return Figure(name, float(stream.mean()), low, high, bound, ok=ok, harm=sure > bound and not both_sides)

    return at


def _first_of_each(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of each patient, in order."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(str(pair.champion["patient"]), pair)
    return list(first.values())


def _answered(pair: Pair) -> bool:
    return pair.challenger is not None and pair.challenger["status"] == OK


def _is_slow(pair: Pair, limits: Margins) -> bool:
    waited = max(pair.champion["latency_ms"], limits.latency_floor_ms)
    return float(_theirs(pair)["latency_ms"]) > limits.latency_ratio * waited


def _disagree(pair: Pair) -> bool:
    return bool(pair.champion["decision"] != _theirs(pair)["decision"])


def _is_right(row: Any, truth: int) -> int:
    return int(row["decision"] == truth)


def _theirs(pair: Pair) -> Any:
    """The challenger's row of an answered pair."""
    return pair.challenger


def _probabilities(pair: Pair) -> tuple[float, float]:
    return float(pair.champion["probability"] or 0.0), float(_theirs(pair)["probability"] or 0.0)

"""How well does the model do on the labels that have arrived?

Predictions of the log are joined with labels by pseudonymous SOP UID. Each image is a case, the patient is what is
resampled: the intervals are those of `learning.statistics`, by which the gates judged the model before.

Labels that arrive are seldom a random sample, and a new site is another population: both are said beside the figures,
and a label of another definition is never compared with the training's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radloop.errors import DataError
from radloop.learning import statistics
from radloop.learning.statistics import Interval

Floats = npt.NDArray[np.float64]

KEPT = "kept"
DEGRADED = "degraded"
UNDETERMINED = "undetermined"
NOT_COMPARABLE = "not comparable"
INSUFFICIENT = "insufficient evidence"
POOLED = "*"


class Reference(msgspec.Struct, frozen=True):
    """What the model reached when it was evaluated, and on whom."""

    auc: Interval
    prevalence: float
    sites: list[str]
    label_definition: str = ""


def reference_of(evaluation: Mapping[str, Any], *, label_definition: str = "") -> Reference:
    """The reference in an evaluation.json: AUC and prevalence of the test part, and the sites that were in it."""
    area, test = evaluation["metrics"]["auc"], evaluation["parts"]["test"]
    return Reference(
        auc=msgspec.convert(area, Interval),
        prevalence=test["positive"] / max(1, test["images"]),
        sites=sorted(row["value"] for row in evaluation["subgroups"] if row["factor"] == "site"),
        label_definition=label_definition,
    )


class ScopePerformance(msgspec.Struct, frozen=True):
    """One site, or all pooled (scope "*"). Figures are None where the evidence is insufficient."""

    scope: str
    images: int
    patients: int
    labelled: int
    unlabelled: int
    positive_patients: int
    negative_patients: int
    prevalence: float | None  # of the labelled images
    auc: Interval | None
    sensitivity: Interval | None
    specificity: Interval | None


class Performance(msgspec.Struct, frozen=True):
    """Performance in production, pooled first, then by site."""

    verdict: str
    summary: str
    threshold: float
    scopes: list[ScopePerformance]
    population_changes: list[str]
    reference: Reference | None


class _Cases(msgspec.Struct, frozen=True, eq=False):
    """One entry per image; label -1 where none has arrived."""

    patients: npt.NDArray[np.str_]
    sites: npt.NDArray[np.str_]
    probability: Floats
    label: npt.NDArray[np.int8]


def assess(
    predictions: Iterable[Mapping[str, Any]],
    labels: Mapping[str, int],
    *,
    threshold: float,
    reference: Reference | None = None,
    label_definition: str = "",
    minimum_patients: int = 10,
    margin: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> Performance:
    """Join predictions of one model with labels and measure.

    Args:
        predictions: rows with `sop_uid`, `patient`, `site`, `probability`; of an image predicted twice the last counts.
        labels: pseudonymous SOP UID -> 0 or 1; those of images never predicted are ignored.
        threshold: the model's frozen decision threshold on `probability`.
        reference: the champion's own evaluation.
        label_definition: what these labels mean; another one than the reference's makes the figures not comparable.
        minimum_patients: of each class; below it a scope has insufficient evidence and shows no figure.
        margin: the loss of AUC that is tolerated before the lower bound fails to show that performance was kept.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: a label that is not 0 or 1, or a prediction without one of its four columns.
    """
    cases = _join(predictions, labels)
    names = [POOLED, *sorted(set(cases.sites.tolist()))]
    scopes = [_measure(name, cases, threshold, minimum_patients, resamples, seed) for name in names]
    changes = _changes(cases, scopes, reference, label_definition)
    verdict, summary = _verdict(scopes[0], reference, label_definition, margin, minimum_patients)
    return Performance(verdict, summary, threshold, scopes, changes, reference)


def _join(predictions: Iterable[Mapping[str, Any]], labels: Mapping[str, int]) -> _Cases:
    wrong = sorted({repr(value) for value in labels.values() if value not in (0, 1)})
    if wrong:
        raise DataError("a label that is neither 0 nor 1", expected="0 or 1", got=f"{len(wrong)} other values")
    latest: dict[str, Mapping[str, Any]] = {}
    for row in predictions:
        missing = [key for key in ("sop_uid", "patient", "probability") if row.get(key) is None]
        if missing:
            raise DataError(
                "a prediction cannot be judged", expected="sop_uid, patient, site, probability", got=f"no {missing[0]}"
            )
        latest[str(row["sop_uid"])] = row
    ordered = [latest[uid] for uid in sorted(latest)]
    return _Cases(
        patients=np.array([str(row["patient"]) for row in ordered], dtype=str),
        sites=np.array([str(row.get("site") or "(absent)") for row in ordered], dtype=str),
        probability=np.array([row["probability"] for row in ordered], dtype=np.float64),
        label=np.array([labels.get(uid, -1) for uid in sorted(latest)], dtype=np.int8),
    )


def _measure(scope: str, cases: _Cases, threshold: float, minimum: int, resamples: int, seed: int) -> ScopePerformance:
    inside = np.ones(len(cases.sites), dtype=bool) if scope == POOLED else cases.sites == scope
    known = inside & (cases.label >= 0)
    people, label, score = cases.patients[known], cases.label[known], cases.probability[known]
    well, ill = statistics.class_patients(label, people.tolist())
    figures: list[Interval] | list[None] = [None, None, None]
    if min(ill, well) >= max(1, minimum):
        figures = _figures(people, label, score, threshold, resamples, seed)
    return ScopePerformance(
        scope=scope,
        images=int(inside.sum()),
        patients=len(set(cases.patients[inside].tolist())),
        labelled=int(known.sum()),
        unlabelled=int(inside.sum() - known.sum()),
        positive_patients=ill,
        negative_patients=well,
        prevalence=float(np.mean(label == 1)) if len(label) else None,
        auc=figures[0],
        sensitivity=figures[1],
        specificity=figures[2],
    )


def _figures(
    people: npt.NDArray[np.str_],
    label: npt.NDArray[np.int8],
    score: Floats,
    threshold: float,
    resamples: int,
    seed: int,
) -> list[Interval]:
    """AUC, sensitivity and specificity, each with its interval."""
    called, ill = score >= threshold, label == 1

    def three(weights: Floats) -> Floats:
        hits = statistics.rate(called, ill, weights), statistics.rate(~called, ~ill, weights)
        return np.column_stack([statistics.auc(score, label, weights), *hits])

    exact = three(np.ones((1, len(label))))[0]
    drawn = statistics.Resamples(people.tolist(), resamples, seed).apply(three)
    negative, positive = statistics.class_patients(label, people.tolist())
    area, sensitivity, specificity = (statistics.percentiles(float(exact[i]), drawn[:, i]) for i in range(3))
    return [
        statistics.area(area, positive, negative),
        statistics.proportion(sensitivity, positive),
        statistics.proportion(specificity, negative),
    ]


def _changes(
    cases: _Cases, scopes: list[ScopePerformance], reference: Reference | None, label_definition: str
) -> list[str]:
    """What makes these cases another population than the one the model was evaluated on, in words."""
    found: list[str] = []
    pooled = scopes[0]
    if reference is not None:
        new = sorted(set(cases.sites.tolist()) - set(reference.sites))
        found += [f"site {site} is not among the sites of the evaluation" for site in new]
        if _other_definition(reference, label_definition):
            found.append(
                f"the labels mean {label_definition!r}, the model was evaluated against {reference.label_definition!r}"
            )
        if pooled.prevalence is not None and abs(pooled.prevalence - reference.prevalence) >= 0.1:
            found.append(
                f"{pooled.prevalence:.0%} of the labelled images are positive, "
                f"{reference.prevalence:.0%} were at evaluation"
            )
    selected = _selection(cases)
    return [*found, selected] if selected else found


def _selection(cases: _Cases) -> str | None:
    """Whether the labelled patients are unlike the unlabelled: then the figures hold for the labelled only."""
    from scipy import stats

    known = cases.label >= 0
    sides = [_by_patient(cases.patients[mask], cases.probability[mask]) for mask in (known, ~known)]
    if min(len(side) for side in sides) < 10:
        return None
    result = stats.ks_2samp(sides[0], sides[1], method="asymp")
    if result.pvalue >= 0.01:
        return None
    return (
        "the labelled images are no random sample of what was predicted "
        f"(their probabilities differ, KS distance {result.statistic:.2f}): the figures hold for the labelled only"
    )


def _by_patient(people: npt.NDArray[np.str_], values: Floats) -> Floats:
    names, person = np.unique(people, return_inverse=True)
    return np.asarray(np.bincount(person, weights=values, minlength=len(names)) / np.maximum(np.bincount(person), 1))


def _verdict(
    pooled: ScopePerformance, reference: Reference | None, label_definition: str, margin: float, minimum: int
) -> tuple[str, str]:
    if pooled.auc is None:
        return INSUFFICIENT, (
            f"insufficient evidence: labels of {pooled.positive_patients} patients with and {pooled.negative_patients} "
            f"without the finding, {minimum} of each needed"
        )
    said = f"AUC {pooled.auc.value:.3f} ({pooled.auc.lower:.3f} to {pooled.auc.upper:.3f})"
    if reference is None:
        return UNDETERMINED, f"{said}, with no evaluation to compare it with"
    if _other_definition(reference, label_definition):
        return (
            NOT_COMPARABLE,
            f"{said} against labels of another definition: a change of population, not a performance of the task",
        )
    was = f"at evaluation {reference.auc.value:.3f} ({reference.auc.lower:.3f} to {reference.auc.upper:.3f})"
    if pooled.auc.upper < reference.auc.lower:
        return DEGRADED, f"{said}, below the whole interval {was}"
    if pooled.auc.lower >= reference.auc.value - margin:
        return KEPT, f"{said}, {was}: within the margin of {margin:g}"
    return UNDETERMINED, f"{said}, {was}: neither kept within {margin:g} nor clearly lower"


def _other_definition(reference: Reference, label_definition: str) -> bool:
    return bool(label_definition and reference.label_definition and label_definition != reference.label_definition)

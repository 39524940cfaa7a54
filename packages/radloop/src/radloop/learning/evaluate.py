"""Evaluation on patients the model never met: figures with intervals, subgroups, shortcuts, the champion beside it.

Calibration and threshold are fitted on the validation part and frozen before the test part is looked at. The image is
the unit of analysis, the patient the unit of resampling. Nothing written here holds a time, a host or a path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from radloop.datasets import split
from radloop.datasets.tensors import TensorSet
from radloop.errors import ArtifactError
from radloop.imaging.transforms import Preprocessing
from radloop.learning import decision, network, shortcut, statistics
from radloop.learning.decision import Decision
from radloop.learning.runtimes import origin
from radloop.learning.shortcut import Shortcut
from radloop.learning.statistics import Floats, Interval, Resamples
from radloop.learning.train import Part, labelled

if TYPE_CHECKING:
    from radloop.learning.package import Packaged

_AGES = ((18, "0-17"), (40, "18-39"), (60, "40-59"), (80, "60-79"))


class EvaluateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to evaluate.

    Attributes:
        threshold: the rule, "youden" or "sensitivity".
        target_sensitivity: what rule "sensitivity" reaches on validation.
        prevalence: the declared prevalence of the finding where the model will be used, for PPV and NPV.
        resamples: bootstrap resamples of patients.
        minimum_patients: patients of each class below which a subgroup is insufficient evidence.
        examples: example images with saliency.
        seed: of the resamples and the audit's folds.
        threads: CPU threads for the network; None: all. The last bits of a logit depend on their number.
    """

    threshold: Literal["youden", "sensitivity"] = "youden"
    target_sensitivity: float = 0.95
    prevalence: float = 0.1
    resamples: int = 2000
    minimum_patients: int = 10
    examples: int = 8
    seed: int = 0
    threads: int | None = 1


class Subgroup(msgspec.Struct, frozen=True, kw_only=True):
    """One value of one factor on the test part. `auc` is None where there is insufficient evidence."""

    factor: str
    value: str
    patients: int
    positive: int
    negative: int
    auc: Interval | None
    note: str = ""


class Gap(msgspec.Struct, frozen=True):
    """The largest difference in AUC between two subgroups of one factor that both have evidence."""

    factor: str
    low: str
    high: str
    difference: float


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Challenger minus champion on the same patients, paired. `new` sites are those the champion never learnt from."""

    site: str
    new: bool
    patients: int
    champion: Interval | None
    challenger: Interval | None
    difference: Interval | None
    note: str = ""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Champion and challenger on test patients that neither learnt from. `reason` says why there is none."""

    champion: str
    overall: Compared | None
    sites: list[Compared] = []
    excluded_patients: int = 0
    reason: str = ""


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One image of `examples/`: the test image and, beside it, where the logit came from."""

    file: str
    outcome: Literal["TP", "FP", "FN", "TN"]
    sop_uid: str
    label: int
    probability: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the gates, the report and the model card need; `evaluation.json`.

    Attributes:
        parts: for each part images, patients, positive images (labelled ones only).
        metrics: on the test part: auc, sensitivity, specificity, brier, ece, ppv, npv.
        validation_auc: without interval; it chose the epoch.
        roc: points (false positive rate, true positive rate).
        reliability: (mean probability, share positive, images) of each calibration bin.
        gaps: one a factor that has two subgroups with evidence, largest first.
        trained_elsewhere: on whose patients is not known.
    """

    task: str
    parts: dict[str, dict[str, int]]
    decision: Decision
    metrics: dict[str, Interval]
    validation_auc: float
    roc: list[tuple[float, float]]
    reliability: list[tuple[float, float, int]]
    subgroups: list[Subgroup]
    gaps: list[Gap]
    shortcut: Shortcut
    leakage: split.Leakage
    comparison: Comparison | None = None
    examples: list[Example] = []
    trained_elsewhere: bool = False


@dataclass(frozen=True)
class Champion:
    """The model in service: its package, and the patients and sites that it learnt from (train and validation)."""

    name: str
    package: Path
    patients: Collection[str]
    sites: Collection[str] = field(default_factory=frozenset)


def evaluate(
    model: Path,
    tensors: TensorSet,
    table: pa.Table,
    preprocessing: Preprocessing,
    config: EvaluateConfig,
    out: Path,
    *,
    task: str,
    champion: Champion | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a model folder on the test part of a manifest.

    Writes under `out`: `evaluation.json`, `decision.json`, `predictions.parquet` (validation and test: sop_uid,
    patient, part, label, logit, probability) and `examples/*.png`.

    Raises:
        DataError: validation or test holds one class only.
        ArtifactError: model or tensors do not fit the manifest.
    """
    steps = _Steps(6, progress)
    net = network.open_model(model)
    validation, test = labelled(table, "validation"), labelled(table, "test")
    with network.deterministic(config.seed, config.threads):
        learnt = network.logits(net, tensors, preprocessing, validation.sop_uids)
        rule = decision.fit(
            learnt,
            validation.labels,
            prevalence=config.prevalence,
            rule=config.threshold,
            target_sensitivity=config.target_sensitivity,
        )
        steps.done()
        logits = network.logits(net, tensors, preprocessing, test.sop_uids)
    steps.done()
    out.mkdir(parents=True, exist_ok=True)
    _write_predictions(out, rule, [("validation", validation, learnt), ("test", test, logits)])
    probabilities = rule.probability(logits)
    groups = _subgroups(table, test, logits, config)
    steps.done()
    audited = shortcut.audit(table, resamples=config.resamples, seed=config.seed, minimum=config.minimum_patients)
    steps.done()
    comparison = None if champion is None else _compare(champion, tensors, table, preprocessing, test, logits, config)
    steps.done()
    others = {champion.name: champion.patients} if champion else {}
    evaluation = Evaluation(
        task=task,
        parts={name: _part_counts(table, name) for name in split.PARTS},
        decision=rule,
        metrics=_metrics(rule, logits, test, config),
        validation_auc=_auc(validation.labels, learnt),
        roc=_roc(test.labels, logits),
        reliability=statistics.curve(probabilities, test.labels, statistics.calibration_bins(probabilities)),
        subgroups=groups,
        gaps=_gaps(groups),
        shortcut=audited,
        leakage=split.leakage(table, models=others),
        comparison=comparison,
        examples=_examples(net, tensors, preprocessing, test, rule, probabilities, config, out / "examples"),
        trained_elsewhere=origin(model) is not None,
    )
    (out / "decision.json").write_bytes(msgspec.json.encode(rule, order="deterministic"))
    text = msgspec.json.format(msgspec.json.encode(evaluation, order="deterministic"), indent=1)
    (out / "evaluation.json").write_bytes(text + b"\n")
    steps.done()
    return evaluation


def read(folder: Path) -> Evaluation:
    """The evaluation that `evaluate` wrote. Raises ArtifactError if it cannot be read."""
    try:
        return msgspec.json.decode((folder / "evaluation.json").read_bytes(), type=Evaluation)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError("an evaluation cannot be read", expected="evaluation.json", got=str(error)) from None


class _Steps:
    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._at, self._total, self._progress = 0, total, progress

    def done(self) -> None:
        self._at += 1
        if self._progress is not None:
            self._progress(self._at, self._total)


def _part_counts(table: pa.Table, name: str) -> dict[str, int]:
    rows = table.filter((pc.field("part") == name) & pc.field("label").is_valid())
    return {
        "images": len(rows),
        "patients": len(set(rows["patient"].to_pylist())),
        "positive": sum(label == 1 for label in rows["label"].to_pylist()),
    }


def _auc(labels: Any, scores: Floats) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def _roc(labels: Any, scores: Floats) -> list[tuple[float, float]]:
    from sklearn.metrics import roc_curve

    false_rate, true_rate, _ = roc_curve(labels, scores)
    return [(round(float(x), 6), round(float(y), 6)) for x, y in zip(false_rate, true_rate, strict=True)]


def _metrics(rule: Decision, logits: Floats, test: Part, config: EvaluateConfig) -> dict[str, Interval]:
    """The test part's figures; one set of resamples gives every interval."""
    probabilities, labels = rule.probability(logits), test.labels
    called, positive = rule.decide(probabilities) == 1, labels == 1
    bins, squares = statistics.calibration_bins(probabilities), (probabilities - labels) ** 2

    def figures(weights: Floats) -> Floats:
        sensitivity = statistics.rate(called, positive, weights)
        specificity = statistics.rate(~called, ~positive, weights)
        return np.column_stack(
            [
                statistics.auc(logits, labels, weights),
                sensitivity,
                specificity,
                weights @ squares / weights.sum(1),
                statistics.calibration_error(probabilities, labels, bins, weights),
                ppv(sensitivity, specificity, rule.prevalence),
                npv(sensitivity, specificity, rule.prevalence),
            ]
        )

    names = ("auc", "sensitivity", "specificity", "brier", "ece", "ppv", "npv")
    values = figures(np.ones((1, len(labels))))[0]
    draws = Resamples(test.patients, config.resamples, config.seed).apply(figures)
    found = {name: statistics.percentiles(float(values[i]), draws[:, i]) for i, name in enumerate(names)}
    negatives, positives = statistics.class_patients(labels, test.patients)
    found["auc"] = statistics.area(found["auc"], positives, negatives)
    found["sensitivity"] = statistics.proportion(found["sensitivity"], positives)
    found["specificity"] = statistics.proportion(found["specificity"], negatives)
    for name, value in (("ppv", ppv), ("npv", npv)):
        if not np.isfinite(found[name].value) or statistics.flat(found[name]):
            found[name] = _predictive(value, found["sensitivity"], found["specificity"], rule.prevalence)
    return found


def ppv(sensitivity: Any, specificity: Any, prevalence: float) -> Any:
    """Positive predictive value at a prevalence, by Bayes; 0 where nothing is called positive."""
    true, false = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    total = np.asarray(true + false)
    return np.divide(true, total, out=np.zeros_like(total), where=total > 0)


def npv(sensitivity: Any, specificity: Any, prevalence: float) -> Any:
    """Negative predictive value at a prevalence, by Bayes; 0 where nothing is called negative."""
    true, false = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    total = np.asarray(true + false)
    return np.divide(true, total, out=np.zeros_like(total), where=total > 0)


def _predictive(
    value: Callable[[Any, Any, float], Any], sensitivity: Interval, specificity: Interval, prevalence: float
) -> Interval:
    """Both bounds of sensitivity and specificity at once: wider than needed, never narrower."""
    at = [
        float(value(a, b, prevalence))
        for a, b in (
            (sensitivity.value, specificity.value),
            (sensitivity.lower, specificity.lower),
            (sensitivity.upper, specificity.upper),
        )
    ]
    return Interval(at[0], min(at), max(at), "wilson")


def age_band(years: float | None) -> str:
    """The age band of a subgroup table: 0-17, 18-39, 40-59, 60-79, 80+ years, or unknown."""
    if years is None or not years >= 0:
        return "unknown"
    return next((name for limit, name in _AGES if years < limit), "80+")


def factors(table: pa.Table, sop_uids: list[str]) -> dict[str, list[str]]:
    """Site, sex and age band of instances, in the order asked; a column that is not there gives "unknown"."""
    wanted = [c for c in ("sop_uid", "site", "sex", "age_years") if c in table.column_names]
    rows = {row["sop_uid"]: row for row in table.select(wanted).to_pylist()}
    chosen = [rows[uid] for uid in sop_uids]
    return {
        "site": [str(row.get("site") or "unknown") for row in chosen],
        "sex": [str(row.get("sex") or "unknown") for row in chosen],
        "age": [age_band(row.get("age_years")) for row in chosen],
    }


def _subgroups(table: pa.Table, test: Part, logits: Floats, config: EvaluateConfig) -> list[Subgroup]:
    groups, patients = [], np.asarray(test.patients)
    for factor, values in factors(table, test.sop_uids).items():
        column = np.asarray(values)
        for value in sorted(set(values)):
            here = column == value
            names = patients[here].tolist()
            negative, positive = statistics.class_patients(test.labels[here], names)
            enough = min(negative, positive) >= max(config.minimum_patients, 1)
            auc = None
            if enough:
                auc = statistics.area_of(
                    logits[here], test.labels[here], names, resamples=config.resamples, seed=config.seed
                )
            groups.append(
                Subgroup(
                    factor=factor,
                    value=value,
                    patients=len(set(names)),
                    positive=positive,
                    negative=negative,
                    auc=auc,
                    note="" if enough else "insufficient evidence",
                )
            )
    return groups


def _gaps(groups: list[Subgroup]) -> list[Gap]:
    gaps = []
    for factor in sorted({g.factor for g in groups}):
        found = sorted((g.auc.value, g.value) for g in groups if g.factor == factor and g.auc is not None)
        if len(found) > 1:
            gaps.append(Gap(factor, found[0][1], found[-1][1], found[-1][0] - found[0][0]))
    return sorted(gaps, key=lambda g: (-g.difference, g.factor))


def _compare(
    champion: Champion,
    tensors: TensorSet,
    table: pa.Table,
    preprocessing: Preprocessing,
    test: Part,
    logits: Floats,
    config: EvaluateConfig,
) -> Comparison:
    """Challenger and champion on the same test patients; none of them taught either."""
    from radloop.learning.package import Packaged

    fresh = np.array([p not in champion.patients for p in test.patients])
    excluded = len(set(test.patients) - {p for p, ok in zip(test.patients, fresh, strict=True) if ok})
    try:
        packaged = Packaged(champion.package)
        if packaged.preprocessing != preprocessing:
            raise ArtifactError("its preprocessing has other parameters than these tensors")
    except ArtifactError as error:
        return Comparison(champion=champion.name, overall=None, reason=f"the champion cannot be run here: {error.what}")
    if not fresh.any():
        return Comparison(
            champion=champion.name, overall=None, excluded_patients=excluded, reason="no test patient is new to both"
        )
    other = np.zeros(len(logits))
    other[fresh] = _champion_logits(packaged, tensors, [u for u, ok in zip(test.sop_uids, fresh, strict=True) if ok])
    sites = np.asarray(factors(table, test.sop_uids)["site"])

    def compared(name: str, chosen: Any) -> Compared:
        return _compared(name, name not in champion.sites, chosen, test, logits, other, config)

    return Comparison(
        champion=champion.name,
        overall=compared("all", fresh),
        sites=[compared(site, fresh & (sites == site)) for site in sorted(set(sites[fresh].tolist()))],
        excluded_patients=excluded,
    )


def _champion_logits(packaged: Packaged, tensors: TensorSet, sop_uids: list[str]) -> Floats:
    parts = [
        packaged.logits(packaged.preprocessing.windowed(tensors.gather(sop_uids[i : i + 128])))
        for i in range(0, len(sop_uids), 128)
    ]
    return np.concatenate(parts)


def _compared(
    site: str, new: bool, chosen: Any, test: Part, ours: Floats, theirs: Floats, config: EvaluateConfig
) -> Compared:
    patients, labels = np.asarray(test.patients)[chosen].tolist(), test.labels[chosen]
    negative, positive = statistics.class_patients(labels, patients)
    if min(negative, positive) < max(config.minimum_patients, 1):
        return Compared(
            site=site,
            new=new,
            patients=len(set(patients)),
            champion=None,
            challenger=None,
            difference=None,
            note="insufficient evidence",
        )
    a, b = ours[chosen], theirs[chosen]

    def both(weights: Floats) -> Floats:
        return np.column_stack([statistics.auc(a, labels, weights), statistics.auc(b, labels, weights)])

    draws = Resamples(patients, config.resamples, config.seed).apply(both)
    mine, his = (_auc(labels, scores) for scores in (a, b))
    return Compared(
        site=site,
        new=new,
        patients=len(set(patients)),
        challenger=statistics.area(statistics.percentiles(mine, draws[:, 0]), positive, negative),
        champion=statistics.area(statistics.percentiles(his, draws[:, 1]), positive, negative),
        difference=statistics.percentiles(mine - his, draws[:, 0] - draws[:, 1]),
    )


def _write_predictions(out: Path, rule: Decision, parts: list[tuple[str, Part, Floats]]) -> None:
    table = pa.concat_tables(
        [
            pa.table(
                {
                    "sop_uid": pa.array(part.sop_uids, pa.string()),
                    "patient": pa.array(part.patients, pa.string()),
                    "part": pa.array([name] * len(part.sop_uids), pa.string()),
                    "label": pa.array(part.labels.tolist(), pa.int8()),
                    "logit": pa.array(logits.tolist(), pa.float64()),
                    "probability": pa.array(rule.probability(logits).tolist(), pa.float64()),
                }
            )
            for name, part, logits in parts
        ]
    )
    pq.write_table(table.sort_by("sop_uid"), out / "predictions.parquet")


def _examples(
    net: Any,
    tensors: TensorSet,
    preprocessing: Preprocessing,
    test: Part,
    rule: Decision,
    probabilities: Floats,
    config: EvaluateConfig,
    folder: Path,
) -> list[Example]:
    """The surest image of each outcome in turn, each patient once."""
    from radloop.learning import saliency

    called = rule.decide(probabilities)
    names = {(1, 1): "TP", (0, 1): "FP", (1, 0): "FN", (0, 0): "TN"}
    outcome = [names[int(label), int(call)] for label, call in zip(test.labels, called, strict=True)]
    surest = np.argsort(-np.abs(probabilities - rule.threshold), kind="stable").tolist()
    queues = {name: [i for i in surest if outcome[i] == name] for name in ("TP", "FP", "FN", "TN")}
    chosen: list[int] = []
    seen: set[str] = set()
    while len(chosen) < config.examples and any(queues.values()):
        for queue in queues.values():
            while queue and test.patients[queue[0]] in seen:
                queue.pop(0)
            if queue and len(chosen) < config.examples:
                chosen.append(queue.pop(0))
                seen.add(test.patients[chosen[-1]])
    if not chosen:
        return []
    images = preprocessing.windowed(tensors.gather([test.sop_uids[i] for i in chosen]))
    files = saliency.write(net, images, [f"{n:02d}-{outcome[i]}.png" for n, i in enumerate(chosen)], folder)
    return [
        Example(
            file=f"examples/{file}",
            outcome=outcome[i],  # type: ignore[arg-type]
            sop_uid=test.sop_uids[i],
            label=int(test.labels[i]),
            probability=float(probabilities[i]),
        )
        for file, i in zip(files, chosen, strict=True)
    ]

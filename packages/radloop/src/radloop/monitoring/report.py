"""The report: one self-contained HTML page on the whole loop, for the physicist and the radiologist who sign off.

No script, no request to anywhere (a Content-Security-Policy in the page forbids both), images as data: URIs. Whatever
enters is escaped. A part whose data is absent says "not run yet" and names the command.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from radloop.errors import DataError
from radloop.monitoring import views

if TYPE_CHECKING:
    from jinja2 import Environment


class Project(TypedDict, total=False):
    """What this is about. Times are ISO 8601 in UTC."""

    name: str
    task: str
    intended_use: str
    version: str  # radloop's own
    engine: str
    generated_at: str


class Status(TypedDict, total=False):
    """The summary; without it the verdict follows from the newest model's gates."""

    verdict: str
    headline: str
    next_command: str


class Lost(TypedDict):
    """What did not go on from one step, and why."""

    reason: str
    count: int


class FlowStep(TypedDict, total=False):
    """One step on the way from received to predicted."""

    name: str
    count: int
    lost: list[Lost]


class Flow(TypedDict, total=False):
    """Instances by step; `ends` are the parts of the last one (train, validation, test, predicted...)."""

    steps: list[FlowStep]
    ends: list[FlowStep]


class QuarantineRow(TypedDict, total=False):
    """Instances or files held for one reason. `meaning` in words, without any value of an attribute."""

    reason: str
    stage: str
    count: int
    meaning: str


class DatasetVersion(TypedDict, total=False):
    """One row of the catalog's datasets; `counts` as of `datasets.manifest.counts`."""

    number: int
    digest: str
    created_at: str
    counts: dict[str, int]
    flags: dict[str, Any]


class DatasetDiff(TypedDict, total=False):
    """`changes` as of `datasets.manifest.diff`; its sop_uids are not shown."""

    before: int
    after: int
    changes: dict[str, Any]


class Validation(TypedDict, total=False):
    """TFDV's findings on the newest dataset version."""

    summary: dict[str, Any]  # summary.json of the stage validate
    anomalies: list[dict[str, Any]]  # anomalies.json
    statistics: dict[str, Any]  # statistics.json
    comparisons: dict[str, Any]  # drift.json: this version against the one before


class Split(TypedDict, total=False):
    """`parts`: part -> {patients, images, positive}; `leakage` is `datasets.split.Leakage`."""

    parts: dict[str, dict[str, int]]
    leakage: Any


class Example(TypedDict, total=False):
    """One test image beside its saliency map, as one picture: PNG or JPEG bytes, or the path of such a file.

    `outcome` is TP, FP, FN or TN.
    """

    image: bytes | str | Path
    outcome: str
    probability: float
    caption: str


class ModelVersion(TypedDict, total=False):
    """One trained model, oldest first.

    `evaluation` is `learning.evaluate.Evaluation` or evaluation.json, `gates` a list of `learning.gates.Gate`, `alias`
    champion, challenger, previous or empty, `dataset` a version number. Example images: either `folder`, where the
    evaluation lies, or `examples`.
    """

    version: str
    digest: str
    dataset: int
    alias: str
    evaluation: Any
    folder: str | Path
    examples: list[Example]
    gates: Any


class RolloutStep(TypedDict, total=False):
    """One step: smoke test, shadow, canary, promotion. `judge` is `serving.judge.JudgeVerdict`, where it was asked."""

    name: str
    percent: float
    at: str
    judge: Any
    verdict: str
    figures: dict[str, Any]  # other facts, by name
    detail: str


class Rollout(TypedDict, total=False):
    """One release, from approval to promotion or roll-back."""

    champion: str
    challenger: str
    verdict: str
    approved_by: str
    steps: list[RolloutStep]


class Drift(TypedDict, total=False):
    """`monitoring.drift.DriftReport`s: when drift was found, and after the new model took over."""

    before: Any
    after: Any


class AlertRow(TypedDict, total=False):
    """One alert as it was sent, or is still to be."""

    at: str
    kind: str
    subject: str
    id: str
    state: str


class LabelRequestRow(TypedDict, total=False):
    """One labelling request. `sites`: site -> images asked for; `arrived`: how many labels came."""

    id: str
    opened_at: str
    status: str
    count: int
    arrived: int
    sites: dict[str, int]
    why: str


class TraceData(TypedDict, total=False):
    """One prediction, back to the instances that trained its model; `count` is how many those are in all.

    Of a model that was trained elsewhere, those that set its calibration and threshold.
    """

    prediction: dict[str, Any]
    model: dict[str, Any]
    run: dict[str, Any]
    dataset: dict[str, Any]
    instances: list[str]
    count: int
    trained_elsewhere: bool


class Timing(TypedDict, total=False):
    """How long one stage took."""

    name: str
    seconds: float
    cached: bool


class ReportData(TypedDict, total=False):
    """Everything the page can show. All keys are optional; msgspec Structs, numpy scalars and Paths are welcome."""

    project: Project
    status: Status
    flow: Flow
    quarantine: list[QuarantineRow]
    datasets: list[DatasetVersion]
    dataset_diffs: list[DatasetDiff]
    validation: Validation
    split: Split
    models: list[ModelVersion]
    examples: list[Example]
    rollouts: list[Rollout]
    drift: Drift
    performance: Any  # monitoring.performance.Performance
    alerts: list[AlertRow]
    label_requests: list[LabelRequestRow]
    trace: TraceData
    ledger: list[Any]  # catalog.schema.LedgerRow
    timing: list[Timing]


def render(data: ReportData) -> str:
    """The page.

    Raises:
        DataError: an image that is no PNG or JPEG, or a file of it that cannot be read.
    """
    plain = _tidy(msgspec.to_builtins(data, builtin_types=(bytes,), enc_hook=_plain))
    context = views.page(plain)
    context["examples"] = [
        {**example, "image": _data_uri(example["image"])} for example in context["examples"] if example.get("image")
    ]
    return _environment().get_template("report.html.j2").render(context)


def write(data: ReportData, path: Path) -> Path:
    """Render to a file, which appears whole; returns its path."""
    text = render(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    made = Environment(
        loader=PackageLoader("radloop.monitoring"),
        autoescape=True,
        undefined=ChainableUndefined,  # a field the data lacks is an empty cell, not a lost report
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        n=_count,
        f=_figure,
        pct=_percent,
        ci=_interval,
        short=_short,
        when=_when,
        secs=_seconds,
        words=_words,
        label=_label,
    )
    made.globals.update(tone=views.tone)
    return made


def _data_uri(image: bytes | str) -> str:
    if isinstance(image, str):
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise DataError(
                "an example image cannot be read",
                expected="a PNG or JPEG file",
                got=type(error).__name__,
                next_step="run the evaluation again: radloop run develop",
            ) from error
    kinds = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
    kind = next((name for magic, name in kinds.items() if image.startswith(magic)), None)
    if kind is None:
        raise DataError("an example image of an unknown form", expected="PNG or JPEG", got=f"{len(image)} other bytes")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _plain(value: Any) -> Any:
    """What msgspec does not know: paths and numpy's own types."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def _tidy(value: Any) -> Any:
    """Fields that hold nothing, or no number, are left out: absent is then one thing for the template."""
    if isinstance(value, dict):
        kept = {key: _tidy(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if not (one is None or (isinstance(one, float) and _absent(one)))}
    if isinstance(value, list | tuple):
        return [_tidy(one) for one in value]
    return value


def _absent(value: Any) -> bool:
    return not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)


def _count(value: Any) -> str:
    return "–" if _absent(value) else f"{value:,.0f}"


def _figure(value: Any, digits: int = 3) -> str:
    if _absent(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: Any) -> str:
    return "–" if _absent(value) else f"{100 * value:.3g} %"


def _interval(figure: Any, digits: int = 3) -> str:
    """`{"value", "lower", "upper"}` (or low and high, as the judge says) in words."""
    if not isinstance(figure, Mapping) or _absent(figure.get("value")):
        return "–"
    lower, upper = figure.get("lower", figure.get("low")), figure.get("upper", figure.get("high"))
    if _absent(lower) or _absent(upper):
        return f"{_figure(figure['value'], digits)} (no interval)"
    low, high = _figure(lower, digits), _figure(upper, digits)
    return f"{_figure(figure['value'], digits)} ({low} to {high})"


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "–"


def _when(at: Any) -> str:
    """An ISO 8601 time to the minute; anything else as it is."""
    text = str(at) if at else "–"
    return f"{text[:10]} {text[11:16]}" if len(text) >= 16 and text[10] == "T" else text


def _seconds(value: Any) -> str:
    if _absent(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s"


def _label(name: Any) -> str:
    """An identifier of ours as a reader's word."""
    known = {
        "auc": "AUC",
        "non_inferiority": "Non-inferiority",
        "l_infty": "L-infinity",
        "jensen_shannon_divergence": "Jensen-Shannon",
        "slow": "Share that waited longer",
        "sensitivity_difference": "Sensitivity lost",
        "specificity_difference": "Specificity lost",
    }
    text = str(name) if name else "–"
    return known.get(text, text.replace("_", " ").capitalize())


def _words(value: Any) -> str:
    """A value in words: figures to three digits, lists joined, names without underscores."""
    if isinstance(value, Mapping) and "value" in value:
        return _interval(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(_words(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _figure(value)
    return "–" if value is None else str(value)

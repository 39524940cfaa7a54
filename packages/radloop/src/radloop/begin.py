"""How a pipeline begins: which one a name means, what it starts from, and whether it is due.

`radloop run` asks this on the local engine; on others the first task of a run (`radloop engine open`) and the sensors do
(`radloop engine due`), so that all engines start from the same artifacts for the same reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from radloop.artifact import open_artifact
from radloop.errors import DataError, DefinitionError
from radloop.loop import PARTS, PIPELINES
from radloop.pipeline import Pipeline
from radloop.pipeline.records import RunResult, read_run
from radloop.stage.lock import holder
from radloop.stages.project import open_catalog, open_tracking, settings_of

if TYPE_CHECKING:
    from radloop.settings import Settings

_DEVELOP = ("develop", "train")
_REGISTER = ("develop", "evaluate")
_WATCH = ("watch", "retrain")


class Due(msgspec.Struct, frozen=True):
    """Whether a pipeline should run now, and why (not)."""

    due: bool
    why: str


def pipeline_of(name: str, settings: Settings) -> Pipeline:
    """The loop's pipeline of a name, or a part of one. Raises DefinitionError naming those there are."""
    known = {**PIPELINES, **PARTS}
    if name not in known:
        raise DefinitionError(f"there is no pipeline {name!r}", expected=", ".join(known), got=name)
    return known[name](settings)


def inputs_of(home: Path, name: str) -> dict[str, Path | None]:
    """The artifacts a pipeline starts from: outputs of the latest run before it, and what belongs to the champion.

    Raises:
        DataError: the pipeline before it has not succeeded yet.
    """
    champion = champion_places(home)
    if name == "prepare":
        return {"baseline": champion.get("validation")}
    if name in _DEVELOP:
        done = _latest(home, ("prepare",), "publish.dataset").outputs
        _refuse_crossing(home, Path(done["publish.dataset"]))
        return {
            "dataset": Path(done["publish.dataset"]),
            "tensors": Path(done["preprocess.tensors"]),
            "validation": Path(done["validate.validation"]),
            "champion": champion.get("package"),
            "champion_dataset": champion.get("dataset"),
        }
    if name == "evaluate":  # what the model was trained on, whatever was published since
        trained = _latest(home, ("train",), "train.model")
        return {
            **{name: Path(path) for name, path in trained.inputs.items()},
            "model": Path(trained.outputs["train.model"]),
        }
    if name == "release":
        done = _latest(home, _REGISTER, "register.registered").outputs
        return {"package": Path(done["package.package"]), "registered": Path(done["register.registered"])}
    if not champion:
        raise DataError(
            "there is nothing to watch", expected="a champion in production", next_step="radloop run release"
        )
    return {part: champion[part] for part in ("dataset", "evaluation", "package")}


def _refuse_crossing(home: Path, dataset: Path) -> None:
    """The leakage gate looked at what was known when the version was made; patients may have been linked since."""
    from radloop.catalog.lineage import CROSSING

    told = open_artifact(home / dataset).json("dataset.json")
    digest = told.get("manifest") if isinstance(told, dict) else None
    with open_catalog(home) as catalog:
        flagged = [version for version in catalog.datasets() if version.digest == digest and CROSSING in version.flags]
    if flagged:
        raise DataError(
            f"in dataset version {flagged[0].number} one person stands in several parts: patients were linked",
            expected="each person in one part",
            got=f"{len(flagged[0].flags[CROSSING])} images of persons in several",
            next_step="radloop run prepare makes a version in which each has one part; a split of your own must be corrected",
        )


def champion_places(home: Path) -> dict[str, Path]:
    """Where the champion's dataset, tensors, validation, model, evaluation and package lie; empty without a champion."""
    from radloop.serving.desired import desired

    now = desired(home)
    if now is None or now.models.champion is None:
        return {}
    with open_catalog(home) as catalog:
        info = catalog.model(now.models.champion.model_digest).info
    names = ("dataset", "tensors", "validation", "model", "evaluation", "package")
    return {name: home / info[name] for name in names}


def due(home: Path, name: str) -> Due:
    """Whether a pipeline of the loop has something new to do. One that failed or was stopped is due when something changed."""
    ask: dict[str, Callable[[Path], Due]] = {
        "prepare": _prepare_due,
        "develop": lambda home: _train_due(home, "develop"),
        "train": lambda home: _train_due(home, "train"),
        "evaluate": _evaluate_due,
        "release": _release_due,
        "watch": _watch_due,
        "retrain": _watch_due,
    }
    if name not in ask:
        raise DefinitionError(f"there is no pipeline {name!r}", expected=", ".join(ask), got=name)
    return ask[name](home)


def _prepare_due(home: Path) -> Due:
    """Complete studies that await de-identification, or labels or a reviewed schema that came since the last run."""
    from radloop.catalog.studies import complete

    last = _last(home, ("prepare",))
    with open_catalog(home) as catalog:
        arrived, had = catalog.unreleased(), bool(catalog.counts())
        ready = {row.study_uid for row in catalog.ready()}
        labelled = [row.at for row in catalog.ledger.rows(kind="labels")]
    ready |= {study.study_uid for study in complete(arrived, settings_of(home).ingest.quiet_s)}
    if ready:
        return Due(True, f"{len(ready)} complete studies have arrived")
    if arrived:
        return Due(False, f"{len(arrived)} studies are still arriving")
    if not had:
        return Due(False, "nothing has been received")
    if last is None or (last.status == "running" and not holder(home, "prepare")):
        return Due(True, "images are there and no run has ended")
    since = _began(last)
    if labelled and datetime.fromisoformat(max(labelled)) > since:
        return Due(True, "labels have arrived")
    schema = home / "schema.pbtxt"
    if schema.exists() and datetime.fromtimestamp(schema.stat().st_mtime, UTC) > since:
        return Due(True, "the reviewed schema has changed")
    return Due(False, "nothing new has arrived")


def _train_due(home: Path, name: str) -> Due:
    """A dataset version that no training has seen, while there is no model yet or watch has asked for one."""
    prepared, trained = _last(home, ("prepare",)), _last(home, _DEVELOP)
    if prepared is None or "publish.dataset" not in prepared.outputs:
        return Due(False, "there is no new dataset version")
    digest = prepared.output("publish.dataset").digest
    if trained is not None and open_artifact(Path(trained.inputs["dataset"])).digest == digest:
        return Due(
            False, f"dataset version {digest[:12]} has been trained on ({name} {trained.run_id}: {trained.status})"
        )
    with open_catalog(home) as catalog:
        if not catalog.models():
            return Due(True, "there is no model yet")
    asked = _last(home, _WATCH)
    told = _decision(asked)
    if told.get("retrain") and asked and (trained is None or _began(asked) > _began(trained)):
        return Due(True, str(told["why"]))
    return Due(False, f"watch asks for no training: {told.get('why', 'it has not run')}")


def _evaluate_due(home: Path) -> Due:
    trained, evaluated = _last(home, ("train",)), _last(home, ("evaluate",))
    if trained is None or "train.model" not in trained.outputs:
        return Due(False, "there is no trained model")
    if evaluated is not None and evaluated.inputs["model"] == trained.outputs["train.model"]:
        return Due(False, f"the model has been evaluated ({evaluated.run_id}: {evaluated.status})")
    return Due(True, f"the model of {trained.run_id} has not been evaluated")


def _release_due(home: Path) -> Due:
    """MLflow's alias `challenger` names a version that no release has been tried for."""
    registered = _last(home, _REGISTER)
    if registered is None or "register.registered" not in registered.outputs:
        return Due(False, "there is no registered model")
    told = registered.output("register.registered").json("registered.json")
    assert isinstance(told, dict)
    version, released = str(told["version"]), _last(home, ("release",))
    if released is not None and released.inputs["registered"] == registered.outputs["register.registered"]:
        return Due(False, f"version {version} has been tried ({released.run_id}: {released.status})")
    tracking, task = open_tracking(home), settings_of(home).task.name  # asked last: importing MLflow takes seconds
    challenger = tracking.alias(task, "challenger")
    if str(challenger) != version:
        return Due(False, f"the latest run registered version {version}, and the alias 'challenger' names {challenger}")
    return Due(True, f"version {version} has the alias 'challenger'")


def _watch_due(home: Path) -> Due:
    if not champion_places(home):
        return Due(False, "there is no champion")
    return Due(True, "a champion is in production")


def _decision(run: RunResult | None) -> dict[str, Any]:
    if run is None or "decide.decision" not in run.outputs:
        return {}
    told = run.output("decide.decision").json("decision.json")
    assert isinstance(told, dict)
    return told


def _runs(home: Path, pipelines: tuple[str, ...]) -> list[RunResult]:
    """Runs of these pipelines, latest first; records that cannot be read are left out."""
    found = []
    for record in sorted((home / "runs").glob("[0-9]*/run.json"), reverse=True):
        try:
            run = read_run(record)
        except (OSError, msgspec.MsgspecError):
            continue
        if run.pipeline in pipelines:
            found.append(run)
    return found


def _last(home: Path, pipelines: tuple[str, ...]) -> RunResult | None:
    return next(iter(_runs(home, pipelines)), None)


def _latest(home: Path, pipelines: tuple[str, ...], wanted: str) -> RunResult:
    """The newest run of these pipelines. Raises DataError if it did not come so far: an older one would be stale."""
    run = _last(home, pipelines)
    if run is None:
        raise DataError(f"{pipelines[0]} has not run yet", next_step=f"radloop run {pipelines[0]}")
    if wanted not in run.outputs:
        raise DataError(
            f"the latest run of {run.pipeline} did not come so far",
            expected=f"status succeeded, with {wanted}",
            got=f"{run.status}: {run.message}",
            next_step=f"radloop run {run.pipeline}",
        )
    return run


def _began(run: RunResult) -> datetime:
    return datetime.strptime(run.run_id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)

"""What stands in an MLflow run: the one module of this engine that imports MLflow, and that only when it is asked to.

The import takes 4 s of processor time (MLflow 3.17).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from radloop.artifact import each, open_artifact
from radloop.engines.mlflow_project.project import is_number
from radloop.errors import EngineError, SettingsError
from radloop.pipeline.records import Record, RunResult
from radloop.stage.protocol import Request, Result

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

# Members whose figures become metrics.
FIGURES = ("evaluation.json", "performance.json", "drift.json", "verdict.json")
# What names an item in a list of figures.
_NAMING = ("gate", "scope", "factor", "feature", "name", "value")
_MOST_METRICS = 300


def mlflow_here() -> Any:
    """MLflow, quiet about itself. Raises SettingsError where it is not installed."""
    # A hospital's machine tells nobody what it runs; a dead server fails in seconds, not in five minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        with _quiet():
            import mlflow.projects
    except ImportError as error:
        raise SettingsError(
            "MLflow is not installed here",
            expected="the package mlflow in this environment",
            got=str(error),
            next_step="pip install 'radloop[train]'",
        ) from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # MLflow 3.17 on itself: its type hints, its store under SQLAlchemy 2.1.
        warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
        warnings.filterwarnings("ignore", ".*``noload`` loader strategy is deprecated")
        yield


@contextlib.contextmanager
def _reaching(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        with _quiet():
            yield
    except (MlflowException, OSError) as error:
        raise EngineError(
            "MLflow cannot be reached",
            expected=f"a store or server at {_without_password(uri)}",
            got=_without_password(str(error).splitlines()[0][:300]),
            next_step="start it, or set MLFLOW_TRACKING_URI; what has been made stays and is not made again",
        ) from None


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def tags_of(project: Path, entry_point: str) -> dict[str, str]:
    """Tags that `mlflow run` gives a project's run."""
    return {
        "mlflow.source.name": str(project),
        "mlflow.source.type": "PROJECT",
        "mlflow.project.entryPoint": entry_point,
        "mlflow.project.backend": "local",
        "mlflow.project.env": "local",
    }


class Runs:
    """Runs of one experiment in one MLflow store. Every method raises EngineError where that cannot be reached."""

    def __init__(self, uri: str, experiment_id: str, client: MlflowClient) -> None:
        self.uri, self.experiment_id, self._client = uri, experiment_id, client

    @classmethod
    def of(cls, home: Path, uri: str, experiment: str) -> Runs:
        """Those of an experiment by name, made if it is not there; without a URI in the project's own store."""
        mlflow, location = mlflow_here(), None
        if not uri:
            folder = home / "mlflow"
            folder.mkdir(parents=True, exist_ok=True)
            uri, location = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        with _reaching(uri):
            client = mlflow.MlflowClient(uri, uri)
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment, location)
        return cls(uri, str(number), client)

    @classmethod
    def here(cls) -> Runs:
        """Those that `mlflow run` has told this process of."""
        uri = os.environ["MLFLOW_TRACKING_URI"]
        mlflow = mlflow_here()
        with _reaching(uri):
            return cls(uri, os.environ["MLFLOW_EXPERIMENT_ID"], mlflow.MlflowClient(uri, uri))

    def create(self, name: str, parameters: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """Begin a run; its id."""
        from mlflow.entities import Param

        with _reaching(self.uri):
            created = self._client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
            run = str(created.info.run_id)
            self._client.log_batch(run, params=[Param(key, value) for key, value in parameters.items()])
        return run

    def execute(self, run: str, project: Path, entry: str, given: Mapping[str, str], env: Mapping[str, str]) -> None:
        """Run an entry point in a process of its own, as this run; its failure stands in the run."""
        mlflow = mlflow_here()
        from mlflow.exceptions import ExecutionException

        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(self.uri)
        try:
            with _reaching(self.uri), _environ(**env), contextlib.suppress(ExecutionException):
                mlflow.projects.run(
                    str(project),
                    entry,
                    parameters=dict(given),
                    experiment_id=self.experiment_id,
                    run_id=run,
                    env_manager="local",
                )
        finally:
            mlflow.set_tracking_uri(before)

    def end(self, run: str, status: str) -> None:
        """End a run: FINISHED or FAILED."""
        with _reaching(self.uri):
            self._client.set_terminated(run, status)

    def log_stage(self, run: str, home: Path, request: Request, result: Result) -> None:
        """Say in a run what a stage was given and what it left."""
        tags = {
            "radloop.status": result.status,
            "radloop.stage": request.stage,
            "radloop.node": request.node,
            "radloop.pipeline": request.pipeline,
            "radloop.run": request.run_id,
            "radloop.cached": str(result.cached).lower(),
            "radloop.message": result.message,
            "radloop.error": result.error,
        }
        datasets = []
        for name, digest, place in _given(home, request):
            tags[f"radloop.input.{name}"] = digest
            datasets.append(_dataset(name, digest, place, {}, "input"))
        for name, made in result.outputs.items():
            tags[f"radloop.output.{name}"] = made.digest
            tags[f"radloop.place.{name}"] = place = f"{result.place}/{name}"
            datasets.append(_dataset(name, made.digest, place, made.counts, "output"))
        self._log(run, tags, {"seconds": result.seconds, **_figures(home, result)}, datasets)

    def log_pipeline(self, run: str, record: Record, result: RunResult) -> None:
        """Say in a run how a pipeline ended."""
        tags = {
            "radloop.status": result.status,
            "radloop.pipeline": result.pipeline,
            "radloop.run": result.run_id,
            "radloop.message": result.message,
        }
        datasets = []
        for name, place in record.inputs.items():
            digest = open_artifact(record.home / place).digest
            tags[f"radloop.input.{name}"] = digest
            datasets.append(_dataset(name, digest, place, {}, "input"))
        self._log(run, tags, {"seconds": result.seconds}, datasets)

    def _log(self, run: str, tags: dict[str, str], metrics: Mapping[str, float], datasets: list[DatasetInput]) -> None:
        from mlflow.entities import Metric, RunTag

        if tags["radloop.status"] != "succeeded":  # the text that MLflow's page shows above all else
            tags["mlflow.note.content"] = f"**{tags['radloop.status']}**: {tags['radloop.message']}"
        now = int(time.time() * 1000)
        with _reaching(self.uri):
            self._client.log_batch(
                run,
                [Metric(name, float(figure), now, 0) for name, figure in metrics.items()],
                tags=[RunTag(name, text[:5000]) for name, text in tags.items() if text],
            )
            if datasets:
                self._client.log_inputs(run, datasets)


def _given(home: Path, request: Request) -> Iterator[tuple[str, str, str]]:
    """Name, digest and place of what a request reads."""
    gates = {f"gate.{number}": path for number, path in enumerate(request.gates)}
    for name, path in {**request.inputs, **gates}.items():
        if path is not None:
            found = each([home / one for one in path]) if isinstance(path, list) else open_artifact(home / path)
            yield name, found.digest, path if isinstance(path, str) else ", ".join(path)


def _dataset(name: str, digest: str, place: str, counts: Mapping[str, int], context: str) -> DatasetInput:
    """An artifact as MLflow's dataset. MLflow keeps 36 characters of a digest, a tag all."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = msgspec.json.encode({"uri": place[:4000]}).decode(), msgspec.json.encode(dict(counts)).decode()
    dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context), InputTag("radloop.digest", digest)])


def _figures(home: Path, result: Result) -> dict[str, float]:
    """Counts, and the numbers in an evaluation, a performance, a drift report or a verdict, by dotted name."""
    found: dict[str, float] = {}
    for name, made in result.outputs.items():
        found.update({f"{name}.{count}": float(number) for count, number in made.counts.items()})
        for member in FIGURES:
            if member in made.members:
                _collect(msgspec.json.decode((home / result.place / name / member).read_bytes()), name, found)
    return dict(list(found.items())[:_MOST_METRICS])


def _collect(value: Any, name: str, found: dict[str, float]) -> None:
    if is_number(value) and math.isfinite(value):
        found[re.sub(r"[^\w./ -]", "_", name.replace("*", "all"), flags=re.ASCII)[:250]] = float(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}", found)
    elif isinstance(value, list):
        for item in (item for item in value if isinstance(item, dict)):
            named = [item[key] for key in _NAMING if isinstance(item.get(key), str)]
            _collect(item, ".".join([name, *named]), found)


@contextlib.contextmanager
def _environ(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

"""MLflow Projects: a folder whose entry points are the stages, and the pipelines as runs with a child run a stage.

    mlflow run DIR -e preprocess -P checked=... --env-manager local      one stage, of artifacts named by hand
    mlflow run DIR -e prepare --env-manager local                        a pipeline: nested child runs, in order

An entry point's command is this package (`__main__.py`). It runs the stage as every engine does (`radloop stage`), its outputs go
to the project's artifacts/ as always, and the MLflow run says what went in and out: digests (datasets and tags), figures
(metrics), places and status (tags). MLflow knows FINISHED and FAILED: a stage that a gate stopped, or that waits for a person,
ends as FAILED with the tag `radloop.status` (stopped, waiting) and the gate's own words as the run's description; `mlflow run`
exits 1.

Importing MLflow takes seconds: a stage's own process does so after the stage has ended, and not at all as part of a pipeline,
where the one process that starts the child runs also fills them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from radloop.engines.mlflow_project.chain import EVENTS, Chain, watched
from radloop.engines.mlflow_project.project import NAME, export
from radloop.engines.mlflow_project.runs import Runs, tags_of
from radloop.errors import EngineError, RadloopError
from radloop.pipeline import Pipeline
from radloop.pipeline.records import Record, RunResult
from radloop.pipeline.run import Launcher
from radloop.stage.execute import Emit

__all__ = ["NAME", "export", "run"]

# MLflow keeps its tracking URI in a global, and hands a child run's environment on by os.environ.
_globals = threading.Lock()


def run(
    pipeline: Pipeline,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    environments: Mapping[str, str] | None = None,
    emit: Emit = lambda event: None,
    tracking_uri: str = "",
    experiment: str = "radloop",
) -> RunResult:
    """Run a pipeline as an MLflow project: what its chained entry point does, in this process.

    Args:
        pipeline: what to run.
        home: the project's home directory.
        inputs: artifact directory of each pipeline input.
        environments: interpreter by environment name, as `[environments]` in radloop.toml.
        emit: receives every event.
        tracking_uri: where the runs go; the project's own store (SQLite in mlflow/), if left out.
        experiment: the MLflow experiment, made if it is not there.

    Raises:
        SettingsError: MLflow, or an environment that a stage needs, is not installed.
        EngineError: MLflow cannot be reached; then nothing has been run or written.
        RunLocked: another run of this pipeline is under way.
    """
    home = home.resolve()
    launcher = Launcher(environments or {})
    for node in pipeline.nodes:
        launcher.python(node.environment)
    runs = Runs.of(home, tracking_uri, experiment)
    record = Record.open(pipeline, home, inputs, engine=NAME)
    project = record.folder / NAME
    try:
        points = export([pipeline], project, home=home, environments=environments)
        parent = runs.create(pipeline.name, {"project": str(home), **record.inputs}, tags_of(project, points[-1]))
    except RadloopError:
        shutil.rmtree(record.folder)
        raise
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        with _globals, watched(emit) as events:
            env = {EVENTS: events, "PATH": path}
            ended = Chain(record, project, runs, parent, environments or {}, env).run()
    except BaseException:  # Ctrl-C, most often
        with contextlib.suppress(EngineError):
            runs.end(parent, "KILLED")
        raise
    runs.end(parent, "FINISHED" if ended.status == "succeeded" else "FAILED")
    return ended

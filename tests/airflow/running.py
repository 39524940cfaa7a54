"""Run a pipeline as a DAG in this process: Airflow's own `dag.test()`, on a real metadata database, with real tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from radloop.pipeline import Pipeline
from radloop.pipeline.records import RunResult, read_run
from radloop.stage.protocol import Event

_number = itertools.count(1)


def write_dag(folder: Path, pipeline: Pipeline, dag_id: str, **options: Any) -> Path:
    """Write what `radloop export airflow` writes: the spec and a DAG file of three lines."""
    for old in [*folder.glob("*.py"), *folder.glob("*.json")]:
        old.unlink()
    (folder / f"{dag_id}.json").write_bytes(pipeline.to_json())
    said = ", ".join(f"{name}={value!r}" for name, value in {"dag_id": dag_id, **options}.items())
    file = folder / f"{dag_id}.py"
    file.write_text(f"from radloop_airflow.dags import dag_from_spec\n\ndag = dag_from_spec('{dag_id}.json', {said})\n")
    return file


def load_dag(file: Path, dag_id: str) -> Any:
    """The DAG as Airflow's own loader reads it. Raises AssertionError with the file's error."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(file))
    assert not bag.import_errors, "\n".join(bag.import_errors.values())
    return bag.dags[dag_id]


def run_dag(airflow: Path, pipeline: Pipeline, **options: Any) -> tuple[Any, dict[str, str]]:
    """Run a pipeline's DAG; the DAG run, and the state of each task (`task[0]` of a mapped one)."""
    dag_id = f"suite_{next(_number)}"
    file = write_dag(airflow / "dags", pipeline, dag_id, **options)
    dag_run = load_dag(file, dag_id).test()
    return dag_run, states_of(dag_run)


def states_of(dag_run: Any) -> dict[str, str]:
    """The state of each task."""
    tasks = dag_run.get_task_instances()
    return {t.task_id if t.map_index < 0 else f"{t.task_id}[{t.map_index}]": str(t.state) for t in tasks}


def engine(airflow: Path, core: str, **options: Any) -> Callable[..., RunResult]:
    """The engine as the conformance suite calls it."""

    def run(
        pipeline: Pipeline,
        *,
        home: Path,
        inputs: Mapping[str, Path | None] | None = None,
        emit: Callable[[Event], None] = lambda event: None,
    ) -> RunResult:
        assert not inputs
        before = set(home.glob("runs/*/run.json"))
        dag_run, states = run_dag(
            airflow, pipeline, project=str(home), core=core, ask=False, retry_delay_s=0, **options
        )
        (record,) = set(home.glob("runs/*/run.json")) - before
        for line in (record.parent / "events.jsonl").read_bytes().splitlines():
            emit(msgspec.json.decode(line, type=Event))
        result = read_run(record)
        # A DAG run is green if and only if the run succeeded.
        assert (str(dag_run.state) == "success") == (result.status == "succeeded"), states
        return result

    return run

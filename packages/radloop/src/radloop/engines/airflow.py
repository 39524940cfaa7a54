"""The `airflow` engine, this side of it: DAG files of three lines and the specs beside them.

What reads them is the package radloop-airflow, in Airflow's own environment; here nothing of Airflow is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from radloop.pipeline import Pipeline
from radloop.stage.launch import write_whole

# How each pipeline of the loop begins: the assets and sensors that lead from one to the next (docs/engines.md draws them).
_BEGINS: dict[str, dict[str, Any]] = {
    "prepare": {"dag_id": "ingest-and-prepare", "begin": "when due", "schedule": "@continuous"},
    "train": {"begin": "if due", "on": ["dataset", "decision"]},
    "evaluate": {"begin": "if due", "on": ["model"]},
    "release": {"begin": "when due", "schedule": "@continuous"},
    "watch": {"begin": "if due", "on": ["champion"], "schedule": "@hourly"},
    "retrain": {"begin": "if due", "on": ["labels"], "schedule": "@daily"},
}
LOOP = tuple(_BEGINS)
"""The pipelines of which the loop is made on Airflow, each a DAG."""

_FILE = '''"""{name}: a DAG of the radloop project {project!r}, written by `radloop export airflow`. Its stages: {name}.json."""
from radloop_airflow.dags import dag_from_spec

dag = dag_from_spec({arguments})
'''


def export(
    pipelines: Iterable[Pipeline],
    folder: Path,
    *,
    project: Path,
    core: str,
    notify: Mapping[str, Sequence[str]] | None = None,
) -> list[Path]:
    """Write NAME.json and NAME.py of each pipeline.

    Args:
        pipelines: which; those of `LOOP` begin as the loop needs it, others by hand.
        folder: Airflow's DAG folder, or one in it. Files of other names in it are left alone.
        project: the project's folder, as the workers see it.
        core: interpreter of the core environment, as the workers see it.
        notify: mail addresses told of a run that did not succeed, by pipeline.

    Returns:
        The DAG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for pipeline in pipelines:
        given: dict[str, Any] = {"project": str(project), "core": core, **_BEGINS.get(pipeline.name, {})}
        if told := (notify or {}).get(pipeline.name):
            given["notify"] = list(told)
        arguments = ", ".join([repr(f"{pipeline.name}.json"), *(f"{name}={value!r}" for name, value in given.items())])
        write_whole(folder / f"{pipeline.name}.json", pipeline.to_json())
        file = folder / f"{pipeline.name}.py"
        text = _FILE.format(name=pipeline.name, project=project.name, arguments=arguments)
        write_whole(file, text.encode())
        written.append(file)
    return written

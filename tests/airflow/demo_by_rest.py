"""The small demo with Airflow in the place of `radloop run`: each pipeline is a DAG, started and awaited through the REST API.

Runs in the core environment, as the demo does: python demo_by_rest.py FOLDER AIRFLOW_HOME PORT CORE_PYTHON
"""

from __future__ import annotations

import sys
from pathlib import Path

from rest import Airflow, wait_until

from radloop.begin import pipeline_of
from radloop.cli.demo import Demo
from radloop.pipeline.records import RunResult, read_run
from radloop.settings import Settings
from radloop.stage.launch import write_whole

_ENDED_S = 600
_DAG = """from radloop_airflow.dags import dag_from_spec

dag = dag_from_spec("{name}.json", dag_id="{dag_id}", project="{project}", core="{core}", ask=False)
"""


class Engine:
    """Runs a pipeline as a DAG of a running Airflow; one that waits for a person fails, as the demo gives the approvals."""

    def __init__(self, airflow: Airflow, core: str) -> None:
        self.airflow, self.core = airflow, core

    def __call__(self, project: Path, settings: Settings, name: str) -> RunResult:
        dag_id = f"demo_{name}"
        folder = self.airflow.home / "dags" / dag_id
        if not folder.exists():
            folder.mkdir()
            write_whole(folder / f"{name}.json", pipeline_of(name, settings).to_json())
            text = _DAG.format(name=name, dag_id=dag_id, project=project, core=self.core)
            write_whole(folder / f"{name}.py", text.encode())
        self.airflow.wait_for_dag(dag_id)
        before = set((project / "runs").glob("[0-9]*"))
        run = self.airflow.trigger(dag_id)
        wait_until(
            lambda: self.airflow.state(dag_id, run) in ("success", "failed"),
            _ENDED_S,
            lambda: str(self.airflow.states(dag_id, run)),
        )
        left = sorted(set((project / "runs").glob("[0-9]*")) - before)
        assert left, self.airflow.log(dag_id, run, "open")
        return read_run(left[-1] / "run.json")


if __name__ == "__main__":
    engine = Engine(Airflow(Path(sys.argv[2]), int(sys.argv[3])), sys.argv[4])
    told = Demo(Path(sys.argv[1]), "small", True, run=engine).run(fresh=True)
    sys.exit(told["exit"])

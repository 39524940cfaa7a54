"""Seconds a task of Airflow's `dag.test()`: empty Python tasks in a row, and radloop's stages. Run by engines.py.

A chain of five against one of ten, so that what a DAG run costs whatever its tasks is taken out. In the Airflow environment, on a
metadata database of its own; the first DAG of each kind warms up and is not counted.

    .venvs/airflow/bin/python benchmarks/peer_airflow.py CORE_PYTHON ROUNDS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(tempfile.mkdtemp(prefix="radloop-bench-"))
os.environ.update(
    AIRFLOW_HOME=str(HERE),
    AIRFLOW__CORE__DAGS_FOLDER=str(HERE / "dags"),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HERE / 'airflow.db'}",
)
CORE, ROUNDS = sys.argv[1], int(sys.argv[2])
SHORT, LONG = 5, 10
PLAIN = """
from airflow.sdk import dag, task

@dag(dag_id="{name}", schedule=None)
def chain():
    @task
    def empty(after: int) -> int:
        return after

    last = 0
    for _ in range({stages}):
        last = empty(last)

chain()
"""
OURS = """
from radloop_airflow.dags import dag_from_spec

dag = dag_from_spec("{name}.json", dag_id="{name}", project="{home}", core="{core}", ask=False)
"""


def chain(stages: int):
    """The pipeline that engines.py runs on the other engines."""
    from radloop.pipeline import Builder
    from radloop.testing import suite_stages as s

    b = Builder(f"bench{stages}")
    last = b.add(s.numbers).made
    for number in range(stages - 1):
        last = b.add(s.total, name=f"total{number}", given=last).summed
    return b.build()


def seconds(kind: str, stages: int, number: int) -> float:
    """How long one DAG run takes."""
    from airflow.dag_processing.dagbag import DagBag

    name = f"{kind}_{stages}_{number}"
    (HERE / "dags").mkdir(exist_ok=True)
    if kind == "ours":
        home = HERE / name
        home.mkdir()
        (HERE / "dags" / f"{name}.json").write_bytes(chain(stages).to_json())
        text = OURS.format(name=name, home=home, core=CORE)
    else:
        text = PLAIN.format(name=name, stages=stages)
    file = HERE / "dags" / f"{name}.py"
    file.write_text(text)
    bag = DagBag(str(file))
    assert not bag.import_errors, bag.import_errors
    began = time.perf_counter()
    run = bag.dags[name].test()
    took = time.perf_counter() - began
    assert str(run.state) == "success"
    return took


migrate = [str(Path(sys.executable).parent / "airflow"), "db", "migrate"]
subprocess.run(migrate, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
found: dict[str, list[float]] = {"plain airflow (dag.test)": [], "radloop on airflow (dag.test)": []}
for number in range(ROUNDS + 1):
    for name, kind in zip(found, ("plain", "ours"), strict=True):
        took = (seconds(kind, LONG, number) - seconds(kind, SHORT, number)) / (LONG - SHORT)
        if number:
            found[name].append(took)
print()
print(json.dumps(found))

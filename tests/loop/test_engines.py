"""The small demo on another engine than `local`: what was made, measured and decided must be the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from radloop.pipeline.records import RunResult, read_run
from radloop.stage.execute import read_verdict

pytestmark = pytest.mark.slow

ON_KUBEFLOW = """
import sys
from functools import partial
from pathlib import Path
from radloop.cli.demo import Demo
from radloop.cli.run import Engine, run_one
told = Demo(Path(sys.argv[1]), "small", True, run=partial(run_one, engine=Engine.KUBEFLOW)).run(fresh=True)
sys.exit(told["exit"])
"""


class Made(NamedTuple):
    """What a demo left, in the order of its runs that came to their end."""

    datasets: list[str]
    models: list[str]
    metrics: list[Any]
    verdicts: list[tuple[str, dict[str, str]]]


def made(project: Path) -> Made:
    """Read a demo's runs."""
    records = sorted((project / "runs").glob("[0-9]*/run.json"))
    runs = [run for run in map(read_run, records) if run.status == "succeeded"]
    return Made(
        [run.output("publish.dataset").digest for run in runs if run.pipeline == "prepare"],
        [run.output("train.model").digest for run in runs if run.pipeline == "develop"],
        [metrics(run) for run in runs if run.pipeline == "develop"],
        [(run.pipeline, verdicts(run)) for run in runs],
    )


def metrics(run: RunResult) -> Any:
    told = run.output("evaluate.evaluation").json("evaluation.json")
    assert isinstance(told, dict)
    return told


def verdicts(run: RunResult) -> dict[str, str]:
    """What each gate said; its words may differ where they tell of traffic."""
    return {name: read_verdict(run.output(name))[0] for name in run.outputs if name.endswith(".verdict")}


@pytest.mark.timeout(1500)
@pytest.mark.services
def test_demo_on_kubeflow_makes_what_local_makes(demo: Any, tmp_path: Path) -> None:
    """Whoever moves from the laptop to Kubeflow must find the same dataset version, figures and decisions there."""
    project = tmp_path / "on-kubeflow"
    done = subprocess.run(
        [sys.executable, "-c", ON_KUBEFLOW, project], capture_output=True, text=True, check=False, timeout=1450
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    engines = {read_run(record).engine for record in (project / "runs").glob("[0-9]*/run.json")}
    assert engines == {"kubeflow"}
    here, there = made(demo.project), made(project)
    assert len(here.datasets) == 2
    assert there.datasets == here.datasets
    assert there.models == here.models
    assert there.metrics == here.metrics
    assert there.verdicts == here.verdicts

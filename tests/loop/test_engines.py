"""The small demo on another engine than `local`: what was made, measured and decided must be the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from radloop.pipeline.records import read_run
from radloop.testing.loops import IDENTIFIED, identifiers, leaks, made

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
    here = made(demo.project)
    assert len(here.datasets) == 2
    assert made(project) == here
    secrets = identifiers(project / "hospital")
    assert leaks(secrets, project, IDENTIFIED) == []
    said = (done.stdout.encode() + done.stderr.encode()).lower()
    assert not [secret for secret in secrets if secret in said]

"""The examples on public data, run as their README says: their endings are what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.data, pytest.mark.timeout(600)]


def run(script: str, data: Path, project: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(EXAMPLES / script), str(data), str(project)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)


def test_a_split_that_leaks_is_refused(test_data: Path, tmp_path: Path) -> None:
    """The split these images were shipped with would flatter any model; how many patients cross is said, and not who."""
    done = run("nih/leak.sh", test_data, tmp_path / "nih")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "30 of 264 patients are in more than one part" in done.stdout
    assert not re.search(r"P[0-9a-f]{32}", done.stdout + done.stderr)


def test_real_ct_stops_at_the_gate_with_a_report(test_data: Path, tmp_path: Path) -> None:
    """Fifty slices prove nothing: the loop must say so, keep the evidence, and register no model."""
    project = tmp_path / "ct"
    done = run("ct_contrast/run.sh", test_data, project)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the auc gate refused" in done.stdout
    page = (project / "reports" / "report.html").read_text()
    assert "at least 0.8 is asked" in page
    assert not (project / "mlflow").exists()

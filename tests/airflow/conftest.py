"""What the Airflow tests share. They run in the Airflow environment (`make test-airflow`), so they have a conftest of their own.

AIRFLOW_HOME must be set before Airflow is imported, so it is set here, for the whole session.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = str(ROOT / ".venvs" / "core" / "bin" / "python")
HERE = Path(tempfile.mkdtemp(prefix="radloop-airflow-"))
atexit.register(shutil.rmtree, HERE, ignore_errors=True)

os.environ.update(
    AIRFLOW_HOME=str(HERE),
    AIRFLOW__CORE__DAGS_FOLDER=str(HERE / "dags"),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HERE / 'airflow.db'}",
    AIRFLOW__LOGGING__BASE_LOG_FOLDER=str(HERE / "logs"),
)
for name in [name for name in os.environ if name.startswith("RADLOOP_") and name != "RADLOOP_REQUIRE"]:
    del os.environ[name]
(HERE / "dags").mkdir()


@pytest.fixture(scope="session")
def core() -> str:
    """Return the Python of radloop's core environment."""
    if not Path(CORE).exists():
        pytest.fail("the core environment is not there; `make test-airflow` makes it", pytrace=False)
    return CORE


@pytest.fixture(scope="session")
def metadata() -> Path:
    """Return the home of an Airflow whose metadata database is there."""
    command = [str(Path(sys.executable).parent / "airflow"), "db", "migrate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return HERE


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return an empty home of a project."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder

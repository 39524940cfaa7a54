"""What every test may ask for: real data, real services, a free port, a key, a home of its own."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from radloop.testing.postgresql import PostgreSQL

ROOT = Path(__file__).resolve().parents[1]
# These run in the Airflow environment, with settings of their own: `make test-airflow`.
collect_ignore = ["airflow"]

settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to `make torture`."""
    if os.environ.get("RADLOOP_TORTURE"):
        return
    long = [item for item in items if item.get_closest_marker("torture")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def _absent(kind: str, what: str) -> None:
    """Skip, or fail where RADLOOP_REQUIRE (a comma-separated list of `data`, `services`) says that it must be there."""
    if kind in os.environ.get("RADLOOP_REQUIRE", "").replace(" ", "").split(","):
        pytest.fail(f"{what} (RADLOOP_REQUIRE asks for {kind})", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real images with licences, which do not ship with us: RADLOOP_TEST_DATA, ../shared/data by default."""
    named = os.environ.get("RADLOOP_TEST_DATA", "../shared/data")
    folder = (ROOT / named).resolve()
    if not folder.is_dir():
        _absent("data", f"no real images: RADLOOP_TEST_DATA is {named}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def require_service() -> Callable[..., str]:
    """Return a function that finds the program behind a service, or skips: `require_service("Envoy", "envoy")`."""

    def find(name: str, *binaries: str) -> str:
        here = os.pathsep.join((str(ROOT / ".venvs/core/bin"), os.environ.get("PATH", "")))
        for binary in binaries:
            if found := shutil.which(binary, path=here):
                return found
        _absent(
            "services", f"{name} is not installed (looked for: {', '.join(binaries)}); `make test-deps` installs it"
        )
        raise AssertionError

    return find


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Return a real PostgreSQL that asks for a password; `postgresql.database()` makes an empty database in it."""
    from radloop.testing.postgresql import PostgreSQL, binaries

    if binaries() is None:
        _absent("services", "PostgreSQL is not installed; `make test-deps` installs it")
    with PostgreSQL() as server:
        yield server


@pytest.fixture
def free_port() -> int:
    """Return a port that nothing listened on a moment ago. Where a server can bind to port 0 itself, let it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def project_key() -> bytes:
    """32 bytes, the same in every run, so that pseudonyms in tests are stable."""
    return bytes(range(32))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return an empty home of a project, 0700 as radloop makes it."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="session")
def tfdv_python() -> Path:
    """Return the interpreter of the environment that holds TFDV."""
    python = Path(os.environ.get("RADLOOP_TFDV_PYTHON", ROOT / ".venvs/tfdv/bin/python"))
    if not python.exists():
        _absent("services", "the TFDV environment is not there; `make setup` makes it")
    return python


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a developer's own radloop settings out of the tests."""
    keep = {"RADLOOP_REQUIRE", "RADLOOP_TEST_DATA", "RADLOOP_TORTURE", "RADLOOP_TFDV_PYTHON"}
    for name in [name for name in os.environ if name.startswith("RADLOOP_") and name not in keep]:
        monkeypatch.delenv(name)

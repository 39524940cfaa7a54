"""`python -m radloop_airflow.standalone`: a project's whole loop on Airflow, on this machine; what `make airflow` starts.

The parts of `airflow standalone` (scheduler with LocalExecutor, DAG processor, triggerer, API server; SQLite) without its log
servers, which listen on every address; beside them `radloop serve` and, where radloop.toml names senders, `radloop listen`.
All bind to loopback, each has a process group of its own, and they end together, with this process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import getpass
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import httpx

from radloop.errors import EngineError, RadloopError
from radloop.settings import Settings, load
from radloop_airflow.core import Core

_HOST = "127.0.0.1"
_READY_S = 300.0
_GRACE_S = 20.0
_PARTS = {
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
    "api-server": ["api-server", "--workers", "1"],
}
log = logging.getLogger("radloop.airflow")


def main() -> int:
    """Start everything, say where it is, and wait for Ctrl-C or for a part to end; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m radloop_airflow.standalone", description=__doc__)
    parser.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="the radloop project")
    parser.add_argument("--core", default="", metavar="PYTHON", help="radloop's core environment ([environments] core)")
    parser.add_argument("--port", type=int, default=8081, help="where Airflow answers, on loopback")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with running(given.project.resolve(), core=given.core, port=given.port) as parts:
            while True:
                ended(parts)
                time.sleep(1)
    except KeyboardInterrupt:
        return 0
    except RadloopError as error:
        log.error("%s", error)
        return 1


@contextlib.contextmanager
def running(project: Path, *, core: str = "", port: int = 8081) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run a project's loop on Airflow; the processes by name. AIRFLOW_HOME is `airflow/` in the project.

    Raises:
        SettingsError: no project, or no core environment.
        EngineError: the DAGs cannot be written, or a part does not start; says what it said last.
    """
    asked, settings, home = Core(str(project), core), load(project), project / "airflow"
    python = asked.environments()["core"]
    home.mkdir(mode=0o700, exist_ok=True)
    asked.ask("export", "airflow", str(home / "dags"), "--core", python, "--json")
    env = environment(home, settings, port)
    _airflow(["db", "migrate"], env)
    with contextlib.ExitStack() as stack:
        parts = {}
        for name, arguments in _PARTS.items():
            parts[name] = stack.enter_context(_part(name, [*_airflow_command(), *arguments], env, home))
        for name in ("listen", "serve") if settings.listen.senders else ("serve",):
            command = asked.command(name, "--ready-file", str(project / "serving" / f"{name}.ready"))
            parts[name] = stack.enter_context(_part(name, command, dict(os.environ), home))
        _wait_healthy(parts, port)
        log.info("Airflow: http://%s:%s, user %s, password in %s", _HOST, port, _user(), _passwords(home))
        log.info("DAGs: %s; logs: %s", home / "dags", home / "logs")
        yield parts


def environment(home: Path, settings: Settings, port: int) -> dict[str, str]:
    """The environment variables that make Airflow a small one, of this project; those set already win."""
    name = _user()
    return {
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{name}:admin",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://{_HOST}:{port}/execution/",
        # SQLite has one lock for all who write; sqlite3 gives up after 5 s, and Airflow then answers 500.
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout=60",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "AIRFLOW__API__HOST": _HOST,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://{_HOST}:{port}",
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        # A worker keeps its slot so long after its task; and who answers an approval before that finds the task failed
        # ("the task instance's state attribute is running": the scheduler of Airflow 3.3 hears of the two in the wrong order).
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        **_mail(settings),
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def _mail(settings: Settings) -> dict[str, str]:
    """The connection `smtp_default` of Airflow's mail notifier, from [alerts] in radloop.toml."""
    where = settings.alerts
    if not where.smtp_host:
        return {}
    extra = {
        "from_email": where.sender,
        "disable_ssl": str(where.tls != "tls").lower(),
        "disable_tls": str(where.tls != "starttls").lower(),
    }
    return {"AIRFLOW_CONN_SMTP_DEFAULT": f"smtp://{quote(where.smtp_host)}:{where.smtp_port}/?{urlencode(extra)}"}


def _user() -> str:
    """Who answers in Airflow, and so stands in radloop's ledger: the system's user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "admin"


def _passwords(home: Path) -> Path:
    return home / "simple_auth_manager_passwords.json.generated"


def _airflow_command() -> list[str]:
    return [sys.executable, "-m", "airflow"]


def _airflow(arguments: list[str], env: dict[str, str]) -> None:
    done = subprocess.run([*_airflow_command(), *arguments], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"airflow {' '.join(arguments)} failed", got="\n".join(done.stderr.splitlines()[-20:]))


@contextlib.contextmanager
def _part(name: str, command: list[str], env: dict[str, str], home: Path) -> Iterator[subprocess.Popen[bytes]]:
    (home / "logs").mkdir(exist_ok=True)
    with (home / "logs" / f"{name}.log").open("ab") as out:
        part = subprocess.Popen(
            command, env=env, cwd=home, stdout=out, stderr=out, start_new_session=True, preexec_fn=_die_with_parent
        )
    try:
        yield part
    finally:
        _end(part)


def _end(part: subprocess.Popen[bytes]) -> None:
    """End a part and all it has started: SIGTERM to itself, that it may end its own children, then SIGKILL to its group."""
    with contextlib.suppress(ProcessLookupError):
        part.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        part.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(part.pid, signal.SIGKILL)
    part.wait()


def _die_with_parent() -> None:
    """Runs in the child: end it when this process is gone, also by SIGKILL."""
    os.umask(0o077)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def ended(parts: dict[str, subprocess.Popen[bytes]]) -> None:
    """Raise EngineError if a part has ended: half of an Airflow is worse than none."""
    for name, part in parts.items():
        if (code := part.poll()) is not None:
            raise EngineError(f"{name} ended with {code}", next_step=f"see airflow/logs/{name}.log in the project")


def _wait_healthy(parts: dict[str, subprocess.Popen[bytes]], port: int) -> None:
    until, said = time.monotonic() + _READY_S, "no answer"
    while time.monotonic() < until:
        ended(parts)
        with contextlib.suppress(httpx.HTTPError):
            told = httpx.get(f"http://{_HOST}:{port}/api/v2/monitor/health", timeout=5).json()
            said = ", ".join(f"{name} {state.get('status')}" for name, state in told.items())
            if all(state.get("status") == "healthy" for state in told.values()):
                return
        time.sleep(0.5)
    raise EngineError("Airflow did not become healthy", expected=f"within {_READY_S:g} s", got=said)


if __name__ == "__main__":
    sys.exit(main())

"""Take docs/images/airflow-*.png: a finished run, what was asked of a person, and the DAGs, seen in Airflow's own page.

`.venvs/core/bin/python scripts/pictures_airflow.py PROJECT [PORT]`: a project whose loop has run on Airflow (`make airflow`, or
`make test-airflow ARGS="-k modality --basetemp FOLDER"`). Its Airflow is started, or with PORT one that runs already is used.
Needs Chromium (`make test-deps`).
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SHOWN = "ingest-and-prepare"


@contextmanager
def server(project: Path) -> Iterator[int]:
    """The project's Airflow on a free port of this machine, while the pictures are taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [ROOT / ".venvs/airflow/bin/python", "-m", "radloop_airflow.standalone", "--project", project]
    process = subprocess.Popen([*command, "--core", sys.executable, "--port", str(port)])
    try:
        until = time.monotonic() + 300
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("Airflow did not start")
            time.sleep(1)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def healthy(port: int) -> bool:
    """Whether all parts of an Airflow answer."""
    try:
        told = httpx.get(f"http://127.0.0.1:{port}/api/v2/monitor/health", timeout=5).json()
    except httpx.HTTPError:
        return False
    return all(part["status"] == "healthy" for part in told.values())


class Api:
    """What the script asks Airflow."""

    def __init__(self, home: Path, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        passwords = json.loads((home / "simple_auth_manager_passwords.json.generated").read_text())
        ((self.user, self.password),) = passwords.items()
        asked = {"username": self.user, "password": self.password}
        token = httpx.post(f"{self.base}/auth/token", json=asked, timeout=60).json()["access_token"]
        self._client = httpx.Client(base_url=self.base, headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def get(self, path: str) -> Any:
        """A resource."""
        return self._client.get(f"/api/v2/{path}").raise_for_status().json()

    def finished(self, dag: str) -> str:
        """The latest run of a DAG that succeeded and did something."""
        runs = self.get(f"dags/{dag}/dagRuns?limit=100&order_by=-start_date&state=success")["dag_runs"]
        for run in runs:
            tasks = self.get(f"dags/{dag}/dagRuns/{run['dag_run_id']}/taskInstances?limit=100")["task_instances"]
            if all(task["state"] == "success" for task in tasks):
                return str(run["dag_run_id"])
        raise SystemExit(f"no run of {dag} has succeeded")


def look(api: Api) -> None:
    """Take the pictures: the graph of a run, an approval as it was asked and given, the DAGs."""
    IMAGES.mkdir(exist_ok=True)
    (asked, *_) = api.get("dags/~/dagRuns/~/hitlDetails?limit=1")["hitl_details"]
    task = asked["task_instance"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 800})
        page.goto(f"{api.base}/auth/login/")
        page.locator("input[name=username]").fill(api.user)
        page.locator("input[name=password]").fill(api.password)
        page.locator("button[type=submit]").click()
        page.wait_for_url(f"{api.base}/")
        run = f"{api.base}/dags/{task['dag_id']}/runs/{task['dag_run_id']}"
        visit(page, f"{run}/tasks/{task['task_id']}/required_actions", "What is approved", "airflow-approval.png")
        page.evaluate("localStorage.setItem('default_dag_view', JSON.stringify('graph'))")
        visit(page, f"{api.base}/dags/{SHOWN}/runs/{api.finished(SHOWN)}", "RadloopCloseOperator", "airflow-run.png")
        visit(page, f"{api.base}/dags", SHOWN, "airflow-dags.png")
        browser.close()


def visit(page: Page, address: str, wanted: str, name: str) -> None:
    """Open a page, wait until it shows what is wanted, and keep what it shows."""
    page.goto(address)
    page.get_by_text(wanted).first.wait_for(timeout=60_000)
    page.wait_for_timeout(4_000)
    page.screenshot(path=IMAGES / name)
    print(f"docs/images/{name}: {(IMAGES / name).stat().st_size // 1000} kB")


def main() -> None:
    """Start the project's Airflow, or find it, and take the pictures."""
    project = Path(sys.argv[1]).resolve()
    if len(sys.argv) > 2:
        look(Api(project / "airflow", int(sys.argv[2])))
        return
    with server(project) as port:
        look(Api(project / "airflow", port))


if __name__ == "__main__":
    main()

"""Take docs/images/mlflow-*.png: prepare and develop run by `mlflow run` on drawn phantoms, seen in MLflow's own page.

`.venvs/core/bin/python scripts/pictures_mlflow.py [FOLDER]`: FOLDER keeps the project, and a project that is there is not run
again. Needs the environments that `make setup` makes, and Chromium (`make test-deps`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from radloop.cli.init import make_project
from radloop.pipeline.records import read_run
from radloop.testing.hospital import make_hospital

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
BIN = Path(sys.executable).parent
SETTINGS = """
[task]
name = "opacity"
[[ingest.folders]]
path = "hospital/images"
site = "site-a"
[train]
epochs = 8
batch_size = 12
[evaluate]
minimum_patients = 3
resamples = 200
[gates]
auc_lower = 0.5
ece = 0.5
subgroup_gap = 0.5
[split]
train = 0.5
validation = 0.2
test = 0.3
[environments]
tfdv = "{tfdv}"
"""


def make(home: Path) -> None:
    """Draw a site's images and labels, and make a project of them."""
    make_project(home)
    make_hospital(home / "hospital", patients=60, images=90, site="A", seed=3, broken=False, conspicuity=1.5)
    (home / "radloop.toml").write_text(SETTINGS.format(tfdv=ROOT / ".venvs/tfdv/bin/python"))
    keyed = ["--key", "accession", "--key-column", "AccessionNumber", "--value-column", "label", "--site", "site-a"]
    subprocess.run(
        [BIN / "radloop", "labels", "import", home / "hospital/labels.csv", *keyed, "--project", home], check=True
    )


def run(home: Path, uri: str) -> None:
    """Export the project and run two of its pipelines as a user does."""
    subprocess.run([BIN / "radloop", "export", "mlflow-project", home / "exported", "--project", home], check=True)
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for pipeline in ("prepare", "develop", "develop"):
        options = ["-e", pipeline, "--env-manager", "local", "--experiment-name", "radloop", "--run-name", pipeline]
        done = subprocess.run([BIN / "mlflow", "run", home / "exported", *options], env=env, check=False)
        if done.returncode:  # so few patients leave a gate undetermined: develop waits for a person, then goes on
            ended = read_run(max((home / "runs").glob("*/run.json")))
            why = ["--why", "drawn phantoms, for a picture"]
            verdict = ended.output("evaluate.verdict").digest
            subprocess.run([BIN / "radloop", "approve", verdict, *why, "--project", home], check=True)


@contextmanager
def server(uri: str) -> Iterator[str]:
    """MLflow's server on a free port of this machine, while the pictures are taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen([*command, "--workers", "1"], env=env, start_new_session=True)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)  # noqa: S310 - our own server
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def look(address: str, uri: str) -> None:
    """Take the pictures: the runs of both pipelines; parameters, metrics and digests of one; one that waits for a person."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    number = client.get_experiment_by_name("radloop").experiment_id
    found = client.search_runs([number])
    runs = {one.data.tags["mlflow.project.entryPoint"]: one.info.run_id for one in found}
    waiting = next(one.info.run_id for one in found if one.data.tags["radloop.status"] == "waiting")
    experiment = f"{address}/#/experiments/{number}"
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 800})
        visit(page, f"{experiment}/runs?workflowType=machine_learning", "matching runs")
        for button in page.locator("[data-component-id*=runnamecellrenderer]").all()[:2]:
            button.click()  # the newest two runs' stages
        keep(page, IMAGES / "mlflow-runs.png")
        visit(page, f"{experiment}/runs/{runs['evaluate']}?workflowType=machine_learning", "About this run")
        page.get_by_placeholder("Search metrics").fill("evaluation.metrics")
        keep(page, IMAGES / "mlflow-run.png")
        visit(page, f"{experiment}/runs/{waiting}?workflowType=machine_learning", "About this run")
        keep(page, IMAGES / "mlflow-waiting.png")
        browser.close()


def visit(page: Page, address: str, wanted: str) -> None:
    """Open a page of MLflow, wait until it shows what is wanted, and close what hides a third of it."""
    page.goto(address)
    page.get_by_text(wanted).first.wait_for(timeout=120_000)
    for close in page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").all():
        close.click()
    page.wait_for_timeout(2_000)


def keep(page: Page, path: Path) -> None:
    """Keep what the page shows now."""
    page.wait_for_timeout(3_000)
    page.screenshot(path=path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


def main() -> None:
    """Make a project, run it, and take the pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(sys.argv[1] if len(sys.argv) > 1 else scratch).resolve() / "chest-xray"
        uri = f"sqlite:///{home / 'mlflow/mlflow.db'}"
        if not home.exists():
            make(home)
            (home / "mlflow").mkdir(exist_ok=True)
            run(home, uri)
        with server(uri) as address:
            look(address, uri)


if __name__ == "__main__":
    main()

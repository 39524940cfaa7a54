"""The whole loop on real sockets, servers and stages: what `make run` promises a stranger."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from radloop.catalog.store import Catalog
from radloop.pipeline.records import Record, read_run
from radloop.serving import predictions
from radloop.serving.desired import desired
from radloop.stage.launch import launch
from radloop.testing.loops import IDENTIFIED, identifiers, leaks, made

pytestmark = [pytest.mark.slow, pytest.mark.services, pytest.mark.timeout(900)]

ON_KUBEFLOW = """
import sys
from functools import partial
from pathlib import Path
from radloop.cli.demo import Demo
from radloop.cli.run import Engine, run_one
told = Demo(Path(sys.argv[1]), "small", True, run=partial(run_one, engine=Engine.KUBEFLOW)).run(fresh=True)
sys.exit(told["exit"])
"""


@pytest.fixture
def catalog(demo: Any) -> Iterator[Catalog]:
    with Catalog(f"sqlite:///{demo.project / 'catalog.db'}") as opened:
        yield opened


def test_the_loop_closes(demo: Any, catalog: Catalog) -> None:
    """Two dataset versions, two models, and the second one serves: a loop that stops half-way is no loop."""
    assert demo.told["status"] == "succeeded"
    first, second = catalog.datasets()
    assert second.parent == first.digest
    assert second.counts["instances"] > first.counts["instances"]
    champion = desired(demo.project)
    assert champion is not None
    assert champion.models.champion is not None
    served = catalog.model(champion.models.champion.model_digest)
    assert served.dataset_digest == second.digest
    assert champion.models.previous is not None
    assert catalog.model(champion.models.previous.model_digest).dataset_digest == first.digest


def test_nothing_that_was_sent_is_lost(demo: Any, catalog: Catalog) -> None:
    """Every data set that a modality sent lies in landing or in quarantine, and has a row that says what became of it."""
    rows = {row.source_sha256 for row in catalog.quarantined(state=None)}
    rows |= {r.source_sha256 for status in ("archived", "superseded", "quarantined") for r in catalog.pending(status)}
    kept = [p for folder in ("landing", "quarantine") for p in (demo.project / folder).glob("??/*.*") if p.stem in rows]
    arrived = {_data_set(path) for path in kept}
    lost = []
    for site in "AB":
        told = msgspec.json.decode((demo.project / "hospital" / f"{site}.json").read_bytes())
        for name in told["sent"]:
            file = demo.project / "hospital" / name
            if file.read_bytes()[128:132] == b"DICM" and _data_set(file) not in arrived:
                lost.append(name)
    assert lost == []
    assert {"TRUNCATED", "NO_PATIENT_ID", "UID_CONFLICT"} <= {str(row.reason) for row in catalog.quarantined()}


def _data_set(path: Path) -> bytes:
    """A file without its File Meta Information, which C-STORE does not carry."""
    data = path.read_bytes()
    return data[144 + int.from_bytes(data[140:144], "little") :]


def test_ledger_tells_the_story(demo: Any, catalog: Catalog) -> None:
    """Whoever audits the champion finds each step once, and that no person gave the demo's approvals."""
    rows = catalog.ledger.rows()
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in {row.kind for row in rows}}
    assert len(kinds["dataset"]) == len(kinds["training"]) == 2
    assert {"ingest", "deidentification", "gate", "approval", "release", "alert", "label_request", "labels"} <= set(
        kinds
    )
    assert all(row.actor == "demo" and "no person looked" in row.payload["why"] for row in kinds["approval"])
    steps = [row.payload["step"] for row in kinds["release"]]
    assert steps.count("promoted") == 2
    assert steps.index("shadow") < steps.index("canary 25 %") < steps.index("canary 100 %")
    assert len({row.key for row in rows if row.key}) == sum(row.key is not None for row in rows)


def test_drift_was_found_and_mailed(demo: Any, catalog: Catalog) -> None:
    """A second scanner that nobody hears of is how models fail quietly."""
    drifts = catalog.ledger.rows(kind="drift")
    assert drifts[0].payload["verdict"] == "drifted"
    assert "site-b" in drifts[0].payload["summary"]
    assert any("drift" in subject for subject in demo.told["mails"])  # type: ignore[attr-defined]
    assert catalog.label_requests()[0].status == "closed"


def test_a_prediction_traces_back_to_its_instances(demo: Any, catalog: Catalog, radloop: Any) -> None:
    """'What did the model that said this learn from' must have an answer with names of files in it."""
    rows = [r for r in predictions.read(demo.project / "predictions", status="ok") if r["served"] and r["sop_uid"]]
    told = radloop("trace", rows[-1]["prediction_id"], "--instances", "--json", "--project", str(demo.project))
    traced = msgspec.json.decode(told.stdout)
    members = catalog.members(catalog.model(rows[-1]["model_digest"]).dataset_digest)
    text = told.stdout
    assert all(member.sop_uid in text for member in members if member.part == "train")
    assert traced


@pytest.mark.parametrize(
    ("pipeline", "due", "why"),
    [
        ("develop", False, "has been trained on"),
        ("train", False, "has been trained on"),
        ("release", False, "version 2 has been tried"),
        ("watch", True, "a champion is in production"),
    ],
)
def test_what_is_done_is_not_due_again(demo: Any, radloop: Any, pipeline: str, due: bool, why: str) -> None:
    """A sensor that asks every half minute would train and release the same model all night."""
    told = msgspec.json.decode(radloop("engine", "due", pipeline, "--project", str(demo.project)).stdout)
    assert told["due"] is due
    assert why in told["why"]


def test_a_dead_mlflow_is_said_in_the_stages_own_words(demo: Any, tmp_path: Path, free_port: int) -> None:
    """A registry that is away must not look like a broken model, and nothing half-registered may stay."""
    runs = [read_run(record) for record in sorted((demo.project / "runs").glob("[0-9]*/run.json"))]
    record = Record.load(demo.project, [run.run_id for run in runs if run.pipeline == "develop"][-1])
    node = record.pipeline.node("register")
    anew = msgspec.structs.replace(node, params={"config": {**node.params["config"], "patience": 25}})
    request = msgspec.structs.replace(record.request(anew), pipeline="", run_id="")
    settings = demo.project / "radloop.toml"
    text = settings.read_text()
    settings.write_text(f'{text}\n[mlflow]\nuri = "http://127.0.0.1:{free_port}"\n')
    try:
        result = launch(request, tmp_path, lambda event: None, python=sys.executable)
    finally:
        settings.write_text(text)
    assert (result.status, result.error) == ("failed", "EngineError")
    assert "MLflow cannot be reached" in result.message
    assert str(free_port) in result.message
    assert not list((demo.project / "artifacts").glob(".*"))


def test_requests_were_all_answered(demo: Any) -> None:
    """A release that drops requests is an outage."""
    said = re.search(r"(\d+) requests were answered meanwhile, (\d+) failed", demo.stderr)
    assert said is not None
    assert int(said[1]) > 0
    assert int(said[2]) == 0


def test_no_phi_leaves_the_three_folders(demo: Any) -> None:
    """One name in a log, a metric or a Parquet file is a breach that must be reported."""
    secrets = identifiers(demo.project / "hospital")
    assert leaks(secrets, demo.project, IDENTIFIED) == []
    said = (demo.stderr.encode()).lower()
    assert not [secret for secret in secrets if secret in said]


def test_report_opens_in_a_browser(demo: Any) -> None:
    """The page is what a radiologist signs: it must open whole, alone, and show that the loop closed."""
    if not Path("/usr/bin/chromium").exists():
        assert "services" not in os.environ.get("RADLOOP_REQUIRE", ""), "no Chromium (make test-deps)"
        pytest.skip("no Chromium (make test-deps)")
    from playwright.sync_api import sync_playwright

    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    said: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        page.goto((demo.project / "reports" / "report.html").as_uri())
        text = page.inner_text("body")
        broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        browser.close()
    assert said == []
    assert broken == 0
    assert "not run yet" not in text.lower()
    for words in (
        "Not a medical device",
        "Quarantine",
        "ROC",
        "Subgroups",
        "canary 100 %",
        "Drifted",
        "Trace of one prediction",
    ):
        assert words.lower() in text.lower(), words


@pytest.mark.timeout(1500)
def test_kubeflow_makes_what_local_makes(demo: Any, tmp_path: Path) -> None:
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


def test_second_run_says_that_it_is_complete(demo: Any, radloop: Any) -> None:
    """`make run` twice must neither begin again nor pretend to have worked."""
    again = radloop("demo", str(demo.project), "--size", "small", "--yes")
    assert "This demo is complete" in again.stderr


def test_killed_demo_goes_on(tmp_path: Path) -> None:
    """Ctrl-C or a dead battery in the first minute must not cost that minute, nor leave servers behind."""
    project = tmp_path / "killed"
    command = [sys.executable, "-m", "radloop.cli", "demo", str(project), "--size", "small", "--yes"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 240
    while time.monotonic() < until and len(_done(project)) < 3:
        time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = len(_done(project))
    assert done >= 3
    until = time.monotonic() + 60
    while (left := _processes(project)) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []
    again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    first = again.stderr.readline()
    again.terminate()
    again.communicate()
    assert f"Going on after step {done} of" in first


def _done(project: Path) -> list[object]:
    try:
        return msgspec.json.decode((project / "demo.json").read_bytes())["done"]  # type: ignore[no-any-return]
    except (FileNotFoundError, msgspec.DecodeError):
        return []


def _processes(project: Path) -> list[str]:
    """Command lines of processes that name this project."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if str(project).encode() in line:
            found.append(line.replace(b"\0", b" ").decode())
    return found

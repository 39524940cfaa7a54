"""A real Airflow with scheduler, triggerer and API, as `make airflow` starts it, driven by its REST API alone."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rest import Airflow, wait_until
from running import write_dag

from conftest import CORE, ROOT
from radloop.cli import demo
from radloop.cli.init import make_project
from radloop.pipeline import Builder, Pipeline
from radloop.stage.protocol import Approval
from radloop.stages.project import open_catalog
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import SECRET, only, ran, small
from radloop.testing.loops import IDENTIFIED, identifiers, leaks, made
from radloop.testing.modality import send

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QUICK = {"AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2", "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "10"}


def radloop(project: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """A command of the core environment."""
    command = [CORE, "-m", "radloop.cli", *arguments, "--project", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in codes, done.stderr[-2000:]
    return done.stdout


@contextlib.contextmanager
def started(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ended as Ctrl-C ends it."""
    with log.open("ab") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small demo's drawn hospital."""
    folder = tmp_path_factory.mktemp("hospital")
    code = (
        "import sys; from pathlib import Path; from radloop.testing.hospital import demo_hospitals\n"
        "demo_hospitals(Path(sys.argv[1]), 'small', workers=2)"
    )
    subprocess.run([CORE, "-c", code, str(folder)], check=True)
    return folder


def make(folder: Path, quiet_s: float = 20.0) -> Path:
    """A project with the small demo's settings and keys; in the quiet period all is sent, also by a busy machine."""
    make_project(folder)
    for name in ("radloop.key", "crosswalk.key"):
        (folder / name).write_text(hashlib.sha256(f"radloop demo {name}".encode()).hexdigest() + "\n")
    tfdv = ROOT / ".venvs" / "tfdv" / "bin" / "python"
    head = f"""
[task]
name = "opacity"
[listen]
port = 0
[listen.senders]
{demo.SENDERS["A"]} = "site-a"
[ingest]
quiet_s = {quiet_s}
[serve]
port = 0
[environments]
tfdv = "{tfdv}"
"""
    (folder / "radloop.toml").write_text(head + demo._SMALL)
    return folder


def labels(project: Path, hospital: Path) -> None:
    """A reading room's export, before the images."""
    (file,) = (hospital / "A").glob("*.csv")
    given = ("--key", "accession", "--key-column", "AccessionNumber", "--value-column", "label", "--site", "site-a")
    radloop(project, "labels", "import", str(file), *given)


def send_all(project: Path, hospital: Path) -> None:
    """Site A's modalities, by C-STORE."""
    port = json.loads((project / "serving" / "listen.ready").read_text())["port"]
    files = sorted(path for path in (hospital / "A").rglob("*.dcm"))
    send(files, "127.0.0.1", port, calling_ae=demo.SENDERS["A"], called_ae="RADLOOP")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("airflow") / "opacity")


@pytest.fixture(scope="module")
def airflow(project: Path) -> Iterator[Airflow]:
    """What `make airflow` starts, for the demo's project."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    env |= {**QUICK, "RADLOOP_SUITE_SECRET": SECRET}
    port = free_port()
    command = [sys.executable, "-m", "radloop_airflow.standalone", "--project", str(project), "--core", CORE]
    log = project / "standalone.log"
    with started([*command, "--port", str(port)], env, log) as process:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "Airflow: http://" in log.read_text()

        wait_until(ready, 300, log.read_text)
        with contextlib.closing(Airflow(project / "airflow", port)) as api:
            yield api
    wait_until(lambda: not of(str(project)), 15, lambda: f"processes were left behind: {of(str(project))}")


def of(words: str) -> str:
    """Processes whose command line holds these words."""
    return subprocess.run(["pgrep", "-af", words], capture_output=True, text=True, check=False).stdout


def small_dag(airflow: Airflow, project: Path, pipeline: Pipeline, dag_id: str, **options: Any) -> str:
    """Put a DAG of its own into the running Airflow, and start it; the run's id."""
    folder = airflow.home / "dags" / dag_id
    folder.mkdir()
    write_dag(folder, pipeline, dag_id, project=str(project), core=CORE, **options)
    airflow.wait_for_dag(dag_id)
    return airflow.trigger(dag_id)


def asked_for(airflow: Airflow, dag_id: str, run: str) -> dict[str, Any]:
    """The one question that a run puts."""
    wait_until(lambda: bool(airflow.asked(dag_id, run)), 180, lambda: str(airflow.states(dag_id, run)))
    (one,) = airflow.asked(dag_id, run)
    return one


def finished(airflow: Airflow, dag_id: str, run: str, seconds: float = 180) -> str:
    wait_until(
        lambda: airflow.state(dag_id, run) in ("success", "failed"),
        seconds,
        lambda: str(airflow.states(dag_id, run)),
    )
    return airflow.state(dag_id, run)


def approvals_in(project: Path) -> list[tuple[str, str, str]]:
    """Actor, role and reason of the ledger's approvals."""
    with open_catalog(project) as catalog:
        rows = catalog.ledger.rows(kind="approval")
    return [(row.actor, str(row.payload["role"]), str(row.payload["why"])) for row in rows]


def test_a_person_approves_in_airflow(airflow: Airflow, tmp_path: Path) -> None:
    """The approval must be that of the person who gave it, with their reason, in radloop's own ledger; nothing runs twice."""
    home = make(tmp_path / "approved")
    run = small_dag(airflow, home, small(ask=True), "approved")
    one = asked_for(airflow, "approved", run)
    assert one["subject"] == "suite report: approve as clinical?"
    assert "total 4.5, bound 100" in one["body"]
    airflow.answer(one, "Approve", "read the figures")
    assert finished(airflow, "approved", run) == "success"
    assert approvals_in(home) == [(airflow.user, "clinical", "read the figures")]
    assert (ran(home, "total"), ran(home, "report")) == (1, 1)


def test_a_person_rejects_in_airflow(airflow: Airflow, tmp_path: Path) -> None:
    """What a person refused must not run, and it must stand there who refused."""
    home = make(tmp_path / "rejected")
    b = Builder("suite")
    b.add(s.report, given=b.add(s.numbers).made, approval=Approval(of="given", role="physics"))
    run = small_dag(airflow, home, b.build(), "rejected")
    one = asked_for(airflow, "rejected", run)
    assert one["subject"] == "suite report: approve as physics?"
    airflow.answer(one, "Reject", "the wrong scanner")
    assert finished(airflow, "rejected", run) == "failed"
    assert f"rejected by {airflow.user}: the wrong scanner" in airflow.log("rejected", run, "report")
    assert approvals_in(home) == []
    assert ran(home, "report") == 0
    assert airflow.states("rejected", run)["close"] == "failed"


def test_only_who_holds_the_role_may_answer(airflow: Airflow, tmp_path: Path) -> None:
    """An engineer who may operate Airflow is not thereby a physicist who may release."""
    import httpx

    home = make(tmp_path / "roles")
    run = small_dag(airflow, home, small(ask=True), "roles", approvers={"clinical": ["dr.ito"]})
    one = asked_for(airflow, "roles", run)
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        airflow.answer(one, "Approve", "I may not")
    assert approvals_in(home) == []


def test_a_busy_database_is_waited_for(airflow: Airflow, tmp_path: Path) -> None:
    """A DAG that is parsed, or a backup, holds SQLite's only lock: who starts a run meanwhile must wait, not get an error."""
    home = make(tmp_path / "busy")
    assert finished(airflow, "busy", small_dag(airflow, home, only(s.numbers), "busy")) == "success"
    with contextlib.closing(sqlite3.connect(airflow.home / "airflow.db", timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(airflow.trigger, "busy")
            time.sleep(10)  # sqlite3 itself gives up after five seconds
            other.execute("ROLLBACK")
        assert finished(airflow, "busy", run.result()) == "success"


def test_an_approval_on_the_command_line_goes_on_by_clearing(airflow: Airflow, tmp_path: Path) -> None:
    """Where nobody answers in Airflow, the run must go on where it stood and not from its beginning."""
    home = make(tmp_path / "cleared")
    run = small_dag(airflow, home, small(ask=True), "cleared", ask=False)
    assert finished(airflow, "cleared", run) == "failed"
    assert "next: radloop approve" in airflow.log("cleared", run, "report")
    (waits,) = json.loads(radloop(home, "status", "--json"))["waiting"]
    radloop(home, "approve", waits["digest"], "--why", "read the figures")
    airflow.clear("cleared", run, "report")
    assert finished(airflow, "cleared", run) == "success"
    assert (ran(home, "total"), ran(home, "report")) == (1, 1)


def test_a_secret_is_nowhere_in_a_running_airflow(airflow: Airflow, tmp_path: Path) -> None:
    """Specs, rendered fields, XCom and logs are read by many, and backed up."""
    home = make(tmp_path / "whisper")
    run = small_dag(airflow, home, only(s.whisper), "whisper")
    assert finished(airflow, "whisper", run) == "success"
    assert f"the secret has {len(SECRET)} characters" in airflow.log("whisper", run, "whisper")
    files = [path for path in airflow.home.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_task_that_is_ended_ends_its_stage(airflow: Airflow, tmp_path: Path) -> None:
    """A stage that goes on after somebody marked its task failed would publish what nobody waits for."""
    home = make(tmp_path / "ended")
    run = small_dag(airflow, home, only(s.linger, seconds=120), "ended")

    stage = f"stage.*{home}"
    wait_until(lambda: bool(of(stage)), 120, lambda: str(airflow.states("ended", run)))
    airflow.end("ended", run, "linger")
    wait_until(lambda: not of(stage), 100, lambda: "the stage goes on")


def test_dags_alone_bring_a_model_from_modality_to_promotion(
    airflow: Airflow, project: Path, hospital: Path, tmp_path: Path
) -> None:
    """The loop on Airflow must make what the loop on a laptop makes: the same dataset, the same figures, the same gates."""
    labels(project, hospital)
    send_all(project, hospital)
    answered: list[str] = []

    def released() -> bool:
        for one in airflow.asked():
            if one["task_instance"]["dag_id"] in ("evaluate", "release"):
                answered.append(one["task_instance"]["task_id"])
                card = "# Model card: opacity" in one["body"]  # who releases must see what: figures, subgroups, gates
                assert card == (answered[-1] == "canary"), one["body"]
                airflow.answer(one, "Approve", "read the card")
        return any(state == "success" for _, state in airflow.runs("release"))

    def stand() -> str:
        dags = ("ingest-and-prepare", "train", "evaluate", "release")
        return "\n".join(f"{dag} {run}: {airflow.states(dag, run)}" for dag in dags for run, _ in airflow.runs(dag))

    reference = make(tmp_path / "opacity", quiet_s=0.0)  # it is looked at after all has been sent
    with ThreadPoolExecutor() as beside:
        local = beside.submit(with_local, reference, hospital)
        wait_until(released, 900, stand)
        local.result()
    assert answered == ["package", "canary"]  # subgroups of few patients are undetermined; a release needs a person
    assert json.loads((project / "serving" / "desired.json").read_text())["models"]["champion"]["version"] == "1"

    ours, theirs = facts(project), facts(reference)
    assert ours == theirs


def with_local(project: Path, hospital: Path) -> None:
    """The same on the local engine."""
    labels(project, hospital)
    command = [CORE, "-m", "radloop.cli"]
    (project / "serving").mkdir(exist_ok=True)
    options = ["--project", str(project), "--ready-file"]
    with (
        started([*command, "listen", *options, str(project / "serving/listen.ready")], dict(os.environ), project / "l"),
        started([*command, "serve", *options, str(project / "serving/serve.ready")], dict(os.environ), project / "s"),
    ):
        wait_until((project / "serving" / "listen.ready").exists, 60)
        send_all(project, hospital)
        for pipeline in ("prepare", "develop", "release"):
            while json.loads(radloop(project, "run", pipeline, "--json", codes=(0, 4)))[-1]["status"] == "waiting":
                waits = [
                    one for one in json.loads(radloop(project, "status", "--json"))["waiting"] if not one["approved"]
                ]
                radloop(project, "approve", waits[0]["digest"], "--why", "read the card")


def facts(project: Path) -> dict[str, Any]:
    """What the loop made, whatever the engine and however its pipelines were cut."""
    digests: dict[str, str] = {}
    verdicts: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for record in sorted((project / "runs").glob("[0-9]*/run.json")):
        run = json.loads(record.read_text())
        for name, result in run["results"].items():
            for output, description in result["outputs"].items():
                place = project / result["place"] / output
                if description["kind"] == "verdict":
                    verdicts[f"{name}.{output}"] = json.loads((place / "verdict.json").read_text())
                if description["kind"] in ("dataset", "tensors", "split", "model", "evaluation"):
                    digests[f"{name}.{output}"] = description["digest"]
                if description["kind"] == "evaluation":
                    measured = json.loads((place / "evaluation.json").read_text())
    assert {"publish.dataset", "train.model", "evaluate.evaluation"} <= set(digests)
    return {"digests": digests, "verdicts": verdicts, "evaluation": measured}


def test_demo_on_airflow_makes_what_local_makes(airflow: Airflow, tmp_path: Path) -> None:
    """Both rounds, drift and challenger included: who moves from the laptop to Airflow finds the same versions and decisions."""
    here, there = tmp_path / "here", tmp_path / "there"
    script = Path(__file__).parent / "demo_by_rest.py"
    commands = (
        [CORE, "-m", "radloop.cli", "demo", str(here), "--size", "small", "--yes"],
        [CORE, str(script), str(there), str(airflow.home), str(airflow.port), CORE],
    )
    with ThreadPoolExecutor() as side_by_side:
        for done in side_by_side.map(
            functools.partial(subprocess.run, capture_output=True, text=True, check=False), commands
        ):
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert {json.loads(record.read_text())["engine"] for record in there.glob("runs/*/run.json")} == {"airflow"}
    local = made(here)
    assert len(local.datasets) == 2
    assert made(there) == local
    secrets = identifiers(there / "hospital")
    assert leaks(secrets, there, IDENTIFIED) == []
    assert leaks(secrets, airflow.home) == []  # task logs, XCom and rendered fields in its database

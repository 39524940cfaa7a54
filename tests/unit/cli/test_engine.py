"""What an orchestrator calls around the stages: a sensor's question, the first task, the last one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radloop.cli.intake import landing_at
from radloop.engines import local
from radloop.pipeline import Builder, Pipeline
from radloop.pipeline.records import Record
from radloop.pipeline.run import Launcher, run_node
from radloop.stage.lock import hold
from radloop.testing import suite_stages as s
from radloop.testing.clinic import mail_sink
from radloop.testing.engine_suite import small

from .conftest import Ran, configure

Run = Callable[..., Ran]


def opened(inside: Run, tmp_path: Path, pipeline: Pipeline, *more: str) -> Ran:
    spec = tmp_path / "spec.json"
    spec.write_bytes(pipeline.to_json())
    return inside("engine", "open", pipeline.name, "--spec", str(spec), "--engine", "test", *more)


def work(project: Path, run_id: str) -> list[str]:
    """Run the stages as workers of an orchestrator would: each finds the run anew in its files. Their statuses."""
    told = []
    for node in Record.load(project, run_id).pipeline.nodes:
        record = Record.load(project, run_id)
        if all(record.succeeded(need) for need in node.needs()):
            told.append(run_node(record, node, None, Launcher({}), lambda event: None).status)
    return told


def test_a_run_between_open_and_close_is_that_of_local(inside: Run, project: Path, tmp_path: Path) -> None:
    """Airflow's workers share nothing but files; what they leave must be what `radloop run` leaves."""
    run_id = opened(inside, tmp_path, small()).json["run_id"]
    assert inside("status", "--json").json["runs"][0]["status"] == "running"
    assert work(project, run_id) == ["succeeded"] * 4
    closed = inside("engine", "close", run_id)
    assert (closed.code, closed.json["status"], closed.json["engine"]) == (0, "succeeded", "test")
    theirs = local.run(small(), home=tmp_path / "local")
    told = Record.load(project, run_id).close()
    assert {o: told.output(o).digest for o in told.outputs} == {o: theirs.output(o).digest for o in theirs.outputs}


def test_close_says_stopped_and_mails_it_once(inside: Run, project: Path, tmp_path: Path) -> None:
    """A nightly run that a gate stopped must be heard of in the morning."""
    with mail_sink(lambda line: None) as sink:
        configure(
            project,
            f'[alerts]\nsmtp_host = "127.0.0.1"\nsmtp_port = {sink.port}\nrecipients = ["physicist@hospital.invalid"]\n',
        )
        run_id = opened(inside, tmp_path, small(at_most=1.0)).json["run_id"]
        assert work(project, run_id) == ["succeeded", "succeeded", "succeeded", "stopped"]
        closed = inside("engine", "close", run_id, "--alert")
        inside("engine", "close", run_id, "--alert")
    assert closed.code == 3
    assert "total 4.5, bound 1" in closed.json["message"]
    assert [m["subject"] for m in sink.messages] == ["[radloop] project: suite stopped"]
    rows = inside("ledger", "--kind", "alert", "--json").json
    assert [row["payload"]["figures"]["why"] for row in rows] == ["total 4.5, bound 1"]


def test_an_alert_names_an_errors_class_and_not_its_text(inside: Run, project: Path, tmp_path: Path) -> None:
    """A foreign library's error may repeat a patient's name; a mail must not carry it out."""
    b = Builder("suite")
    b.add(s.flaky)
    run_id = opened(inside, tmp_path, b.build()).json["run_id"]
    assert work(project, run_id) == ["failed"]
    assert inside("engine", "close", run_id, "--alert").code == 1
    rows = inside("ledger", "--kind", "alert", "--json").json
    assert rows[0]["payload"]["figures"]["why"] == "OSError"
    assert "share went away" not in str(rows)


def test_a_dead_mail_server_does_not_hide_how_the_run_ended(
    inside: Run, project: Path, tmp_path: Path, free_port: int
) -> None:
    """The orchestrator must see the run's own end, and the reader why no mail came."""
    configure(
        project, f'[alerts]\nsmtp_host = "127.0.0.1"\nsmtp_port = {free_port}\nrecipients = ["a@hospital.invalid"]\n'
    )
    run_id = opened(inside, tmp_path, small(at_most=1.0)).json["run_id"]
    work(project, run_id)
    closed = inside("engine", "close", run_id, "--alert")
    assert closed.code == 3
    assert "an alert could not be sent" in closed.err


def test_a_run_without_all_its_stages_has_failed(inside: Run, tmp_path: Path) -> None:
    """An orchestrator that skipped a stage must not be told that all is well."""
    closed = inside("engine", "close", opened(inside, tmp_path, small()).json["run_id"])
    assert (closed.code, closed.json["message"]) == (1, "numbers was never run")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (b"{", "pipeline.json cannot be read"),
        (small().to_json().replace(b'"spec_version": 1', b'"spec_version": 9'), "got: spec_version 9"),
        (small().to_json().replace(b'"suite"', b'"other"'), "holds another pipeline"),
    ],
)
def test_a_bad_spec_is_refused_before_anything_runs(
    inside: Run, project: Path, tmp_path: Path, spec: bytes, match: str
) -> None:
    """A newer or torn spec read as well as can be would lose a gate without a word."""
    (tmp_path / "spec.json").write_bytes(spec)
    ran = inside("engine", "open", "suite", "--spec", str(tmp_path / "spec.json"))
    assert ran.code == 1
    assert match in ran.err
    assert not (project / "runs").exists()


def test_open_refuses_while_another_run_works(inside: Run, project: Path, tmp_path: Path) -> None:
    """Two runs at once would publish two dataset versions from half of the images each."""
    with hold(project, "suite", "the-first"):
        ran = opened(inside, tmp_path, small())
    assert ran.code == 1
    assert "run the-first, process" in ran.err


def test_a_stage_of_another_run_is_refused(inside: Run, project: Path, tmp_path: Path) -> None:
    """The same between two orchestrators: each stage looks, not only the first task."""
    run_id = opened(inside, tmp_path, small()).json["run_id"]
    with hold(project, "suite", "the-first"):
        record = Record.load(project, run_id)
        result = run_node(record, record.pipeline.nodes[0], None, Launcher({}), lambda event: None)
    assert (result.status, result.error) == ("failed", "RunLocked")
    assert "the-first" in result.message


def test_stages_of_one_run_share_it(inside: Run, project: Path, tmp_path: Path) -> None:
    """Two branches of a DAG run at the same time."""
    run_id = opened(inside, tmp_path, small()).json["run_id"]
    script = (
        "import sys, time; from pathlib import Path; from radloop.stage.lock import hold\n"
        "with hold(Path(sys.argv[1]), 'suite', sys.argv[2]):\n    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(project), run_id], stdout=subprocess.PIPE) as sibling:
        try:
            assert sibling.stdout is not None
            assert sibling.stdout.readline() == b"held\n"
            assert work(project, run_id)[0] == "succeeded"
        finally:
            sibling.kill()


def test_unknown_run_and_inputs(inside: Run, project: Path, tmp_path: Path) -> None:
    """A typo must name what was expected."""
    assert "there is no record of the run 'nothing'" in inside("engine", "close", "nothing").err
    assert "expected: --input NAME=DIR" in opened(inside, tmp_path, small(), "--input", "x").err
    assert "has no input 'x'" in opened(inside, tmp_path, small(), "--input", f"x={tmp_path}").err
    assert "prepare has not run yet" in inside("engine", "open", "develop").err
    assert "there is no pipeline 'nothing'" in inside("engine", "due", "nothing").err


def test_prepare_is_due_when_studies_are_complete(inside: Run, project: Path, dicom_folder: Path) -> None:
    """A dataset made of half a study misses the other half; one never made leaves the model as it was."""

    def due() -> dict[str, Any]:
        told: dict[str, Any] = inside("engine", "due", "prepare").json
        return told

    assert due() == {"due": False, "why": "nothing has been received"}
    with landing_at(project) as landing:
        for path in sorted(dicom_folder.rglob("*.dcm"))[:2]:
            landing.receive(path, site="site-a", sender="CT1")
    assert due() == {"due": False, "why": "2 studies are still arriving"}
    # A folder is complete once it is read; what a modality is still sending is not.
    assert inside("ingest", str(dicom_folder), "--site", "site-a").code == 0
    assert due() == {"due": True, "why": "1 complete studies have arrived"}
    configure(project, "[ingest]\nquiet_s = 0.0\n")
    assert due() == {"due": True, "why": "3 complete studies have arrived"}


@pytest.mark.parametrize("name", ["train", "evaluate", "release", "watch", "retrain"])
def test_what_comes_later_is_not_due_in_a_new_project(inside: Run, name: str) -> None:
    """A sensor that fires on nothing starts a DAG that fails."""
    assert inside("engine", "due", name).json["due"] is False

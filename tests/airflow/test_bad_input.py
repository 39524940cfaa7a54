"""What goes wrong must say so in Airflow's own log, and leave nothing half-done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from running import load_dag, run_dag, write_dag

from radloop.cli.init import make_project
from radloop.pipeline import Builder, Node, Pipeline
from radloop.settings import Alerts, Settings
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import SECRET, only, ran, small
from radloop_airflow.standalone import environment

HOLD = (
    "import sys; from pathlib import Path; from radloop.stage.lock import hold\n"
    "with hold(Path(sys.argv[1]), 'suite', 'first-run'):\n    print('held', flush=True); sys.stdin.read()\n"
)


def parse(airflow: Path, pipeline: Pipeline, spec: bytes | None = None, **options: Any) -> Any:
    """Have Airflow read a DAG file, with the spec's bytes replaced."""
    file = write_dag(airflow / "dags", pipeline, "parsed", **{"project": "/srv/project", **options})
    if spec is not None:
        (airflow / "dags" / "parsed.json").write_bytes(spec)
    return load_dag(file, "parsed")


def renamed(pipeline: Pipeline, **changes: Any) -> Pipeline:
    """The pipeline with its last node changed."""
    *nodes, last = pipeline.nodes
    return msgspec.structs.replace(pipeline, nodes=(*nodes, msgspec.structs.replace(last, **changes)))


def test_wrong_core_environment_is_named(metadata: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """'No such file or directory' in a worker's log tells nobody which setting is wrong."""
    dag_run, states = run_dag(metadata, small(), project=str(home), core="/nowhere/python")
    said = "".join(capfd.readouterr())
    assert str(dag_run.state) == "failed"
    assert states == {"open": "failed", "close": "failed"} | dict.fromkeys(
        ("numbers", "total", "limit", "report"), "upstream_failed"
    )
    assert "radloop's core environment is not there" in said
    assert "got: /nowhere/python" in said
    assert "the run was never opened: see the log of the task 'open'" in said
    assert not (home / "runs").exists()


def test_a_second_run_is_refused_by_name(
    metadata: Path, core: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs of one pipeline would publish two dataset versions from half of the images each."""
    command = [sys.executable, "-c", HOLD, str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        dag_run, states = run_dag(metadata, small(), project=str(home), core=core)
        holder.kill()
    assert (str(dag_run.state), states["open"]) == ("failed", "failed")
    assert f"run first-run, process {holder.pid}" in "".join(capfd.readouterr())
    assert not list((home / "runs").glob("[0-9]*"))


def test_a_gate_is_not_tried_again(metadata: Path, core: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Trying a gate again costs hours and changes nothing; its own words must stand in the log."""
    dag_run, states = run_dag(metadata, renamed(small(at_most=1.0), retries=2), project=str(home), core=core)
    tries = {task.task_id: task.try_number for task in dag_run.get_task_instances()}
    assert (str(dag_run.state), states["limit"], states["report"], tries["report"]) == (
        *("failed", "success", "failed"),
        1,
    )
    assert "AirflowFailException: total 4.5, bound 1" in "".join(capfd.readouterr())
    assert ran(home, "report") == 0


def test_a_last_verdict_fails_its_own_task(metadata: Path, core: str, home: Path) -> None:
    """A red gate that only the last task shows would be looked for in the wrong place."""
    b = Builder("suite")
    b.add(s.limit, given=b.add(s.numbers, count=1).made, at_most=-1.0)
    dag_run, states = run_dag(metadata, b.build(), project=str(home), core=core)
    assert str(dag_run.state) == "failed"
    assert states == {"open": "success", "numbers": "success", "limit": "failed", "close": "failed"}


def test_a_secret_is_nowhere_in_airflow(
    metadata: Path, core: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Airflow keeps logs and XCom for years, and shows them to many."""
    monkeypatch.setenv("RADLOOP_SUITE_SECRET", SECRET)
    dag_run, _ = run_dag(metadata, only(s.whisper), project=str(home), core=core)
    assert str(dag_run.state) == "success"
    assert f"the secret has {len(SECRET)} characters" in (said := "".join(capfd.readouterr()))
    assert SECRET not in said
    kept = [p for p in metadata.rglob("*") if p.is_file()]
    assert any(p.suffix == ".db" for p in kept)
    assert [p for p in kept if SECRET.encode() in p.read_bytes()] == []


def test_what_is_not_due_is_skipped(metadata: Path, core: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each asset starts a DAG; one that has nothing to do must neither work nor look like a failure."""
    home.rmdir()
    make_project(home)
    b = Builder("watch")
    b.add(s.numbers)
    dag_run, states = run_dag(metadata, b.build(), project=str(home), core=core, begin="if due")
    assert str(dag_run.state) == "success"
    assert states == {"due": "success"} | dict.fromkeys(("open", "numbers", "close"), "skipped")
    assert "watch is not due: there is no champion" in "".join(capfd.readouterr())


def test_an_unreadable_spec_is_an_import_error(metadata: Path) -> None:
    """A broken spec must show where Airflow shows broken DAGs, not at night when it runs."""
    with pytest.raises(AssertionError, match=r"pipeline.json cannot be read"):
        parse(metadata, small(), b'{"name": "suite", "spec_version": 1, "nodes"')
    with pytest.raises(AssertionError, match=r"expected: spec_version up to 1\s+got: spec_version 2"):
        parse(metadata, small(), small().to_json().replace(b'"spec_version": 1', b'"spec_version": 2'))
    with pytest.raises(AssertionError, match=r"is wired to what does not come before it"):
        parse(metadata, small(), small().to_json().replace(b"numbers.made", b"numbers.lost"))
    file = write_dag(metadata / "dags", small(), "parsed", project="/srv/project")
    (metadata / "dags" / "parsed.json").unlink()
    with pytest.raises(AssertionError, match="a file that `radloop export airflow` wrote, beside the DAG file"):
        load_dag(file, "parsed")


def mapped_twice() -> Pipeline:
    b = Builder("suite")
    items = b.add(s.listing, names=["a"])
    b.add(s.piece, of=items.items, over=items.items)
    pipeline = b.build()
    piece: Node = pipeline.nodes[1]
    assert piece.map is not None
    over = msgspec.structs.replace(piece.map, over="piece.made")
    again = msgspec.structs.replace(piece, name="again", map=over)
    return msgspec.structs.replace(pipeline, nodes=(*pipeline.nodes, again))


@pytest.mark.parametrize(
    "pipeline, feature",
    [
        (renamed(small(), name="close"), "'close': it has no stage of this name: it is that of a task of its own"),
        (renamed(small(), name="größe"), "it has no task id but of ASCII letters"),
        (mapped_twice(), "'again': it has no mapping over what a mapped stage leaves"),
    ],
)
def test_what_airflow_cannot_do_is_refused_when_read(metadata: Path, pipeline: Pipeline, feature: str) -> None:
    """Refused at parse time, with the stage's name, it costs nobody a night."""
    with pytest.raises(AssertionError, match=f"the engine 'airflow' cannot run stage .*{feature}"):
        parse(metadata, pipeline)


def test_the_provider_is_known(metadata: Path) -> None:
    """`airflow providers list` is where an administrator looks for what is installed."""
    from airflow.providers_manager import ProvidersManager

    info = ProvidersManager().providers["radloop-airflow"]
    assert info.version == "0.1.0"
    assert info.data["operators"][0]["python-modules"] == ["radloop_airflow.operators"]


def test_a_run_that_did_not_succeed_is_mailed(
    metadata: Path, core: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks at a page at night; whom radloop.toml names must hear of it, over the connection made from it."""
    code = (
        "import sys; from radloop.testing.clinic import mail_sink\n"
        "with mail_sink(lambda line: print(line, flush=True)) as sink:\n"
        "    print(sink.port, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([core, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sink:
        assert sink.stdout is not None
        assert sink.stdin is not None
        where = Alerts(smtp_host="127.0.0.1", smtp_port=int(sink.stdout.readline()), sender="radloop@hospital.invalid")
        env = environment(home, Settings(alerts=where), 1)
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", env["AIRFLOW_CONN_SMTP_DEFAULT"])
        told = ["physicist@hospital.invalid"]
        dag_run, _ = run_dag(metadata, small(at_most=1.0), project=str(home), core=core, notify=told)
        assert str(dag_run.state) == "failed"
        sink.stdin.close()
        mails = sink.stdout.read().splitlines()
    assert mails == [f"mail to physicist@hospital.invalid: radloop: {dag_run.dag_id} did not succeed"]

"""The conformance suite on MLflow Projects, and what `mlflow run` makes of an exported project."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radloop.artifact import open_artifact
from radloop.cli.init import make_project
from radloop.engines import local, mlflow_project
from radloop.engines.mlflow_project.chain import Chain
from radloop.engines.mlflow_project.runs import Runs
from radloop.errors import DefinitionError, EngineError, UnsupportedByEngine
from radloop.loop import PARTS, PIPELINES, prepare
from radloop.pipeline import Builder, Pipeline
from radloop.pipeline.records import Record, RunResult, read_run
from radloop.settings import Settings, load
from radloop.stage import Secret, stage
from radloop.stage.lock import holder
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import SECRET, EngineSuite, only, ran, small
from radloop.testing.hospital import make_hospital

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), str(ROOT / ".venvs/uv/bin"), os.environ["PATH"]])
UGLY = "µm 'x' \"y\" {z} $HOME `id` \\ \x85\u2028 肺 ☢"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store as MLflow makes it, which takes it seconds: copied, not made anew for each test."""
    home = tmp_path_factory.mktemp("store")
    Runs.of(home, f"sqlite:///{home / 'mlflow.db'}", "Default")
    return home / "mlflow.db"


@pytest.fixture
def with_store(empty_store: Path) -> Callable[[Path], Path]:
    """Return a function that gives a home its own MLflow store."""

    def give(home: Path) -> Path:
        if not (home / "mlflow/mlflow.db").exists():
            (home / "mlflow").mkdir(parents=True, exist_ok=True)
            shutil.copy(empty_store, home / "mlflow/mlflow.db")
        return home

    return give


@pytest.fixture
def engine(with_store: Callable[[Path], Path]) -> Callable[..., RunResult]:
    def run(pipeline: Pipeline, *, home: Path, **options: Any) -> RunResult:
        return mlflow_project.run(pipeline, home=with_store(home), **options)

    return run


@pytest.fixture
def home(tmp_path: Path, with_store: Callable[[Path], Path]) -> Path:
    return with_store(tmp_path / "home")


class TestMlflowProject(EngineSuite):
    name = "mlflow-project"

    @pytest.fixture
    def engine(self, engine: Callable[..., RunResult]) -> Callable[..., RunResult]:
        return engine


def runs_of(home: Path) -> Runs:
    return Runs.of(home, "", "radloop")


def found(home: Path) -> dict[str, Any]:
    """The newest run of each entry point in a project's store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow/mlflow.db'}")
    everywhere = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(everywhere, order_by=["attributes.start_time ASC"])
    return {run.data.tags["mlflow.project.entryPoint"]: run for run in runs}


def by_hand(project: Path, home: Path, entry: str, **given: str) -> Any:
    """Run an entry point as `mlflow run` does, without its six seconds of import."""
    runs = runs_of(home)
    run = runs.create(entry, {}, {"mlflow.project.entryPoint": entry})
    runs.execute(run, project, entry, given, {"PATH": PATH})
    return found(home)[entry]


def mlflow_run(*arguments: str | Path, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`mlflow run` as a user types it, against the project's store."""
    store = f"sqlite:///{home / 'mlflow/mlflow.db'}"
    return subprocess.run(
        [Path(sys.executable).with_name("mlflow"), "run", *arguments],
        env={**os.environ, "PATH": PATH, "MLFLOW_TRACKING_URI": store, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> tuple[Path, Path, RunResult]:
    """A project with phantoms that have been preprocessed, exported; and that run."""
    home = tmp_path_factory.mktemp("clinic") / "project"
    make_project(home)
    make_hospital(home / "hospital", patients=3, images=4, site="A", seed=3, broken=False)
    folders = '[task]\nname = "opacity"\n[[ingest.folders]]\npath = "hospital/images"\nsite = "site-a"\n'
    (home / "radloop.toml").write_text(folders)
    (home / "mlflow").mkdir()
    shutil.copy(empty_store, home / "mlflow/mlflow.db")
    ended = local.run(prepare(load(home)).upto("preprocess"), home=home)
    assert ended.status == "succeeded", ended.message
    exported = home.parent / "exported"
    command = [sys.executable, "-m", "radloop.cli", "export", "mlflow-project", exported, "--project", home]
    subprocess.run([*command, "--extras", "pixels"], check=True)
    return home, exported, ended


@pytest.mark.slow
def test_one_stage_by_hand(clinic: tuple[Path, Path, RunResult]) -> None:
    """Who tries another window on the same images wants one stage, and to find in MLflow what went in and came out."""
    home, exported, ended = clinic
    checked = ended.outputs["quality.checked"]
    asked = ["-P", f"checked={checked}", "-P", 'preprocessing={"size": 64}', "--env-manager", "local"]
    done = mlflow_run(exported, "-e", "preprocess", *asked, home=home)
    assert done.returncode == 0, done.stderr
    run = found(home)["preprocess"]
    assert run.info.status == "FINISHED"
    logged = {
        name: shlex.split(text)[0] for name, text in run.data.params.items()
    }  # MLflow logs them as the shell reads them
    assert logged == {"project": str(home), "checked": checked, "preprocessing": '{"size": 64}', "workers": "1"}
    place = home / run.data.tags["radloop.place.tensors"]
    made = open_artifact(place, verify=True)
    assert f"tensors: {place}" in done.stdout
    assert made.json("preprocessing.json")["parameters"]["size"] == 64
    assert run.data.tags["radloop.output.tensors"] == made.digest != ended.output("preprocess.tensors").digest
    assert run.data.metrics["tensors.images"] == made.counts["images"] == 4
    datasets = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert datasets["checked"].dataset.digest == ended.output("quality.checked").digest[:36]
    whole = {tag.key: tag.value for tag in datasets["tensors"].tags}
    assert whole == {"mlflow.data.context": "output", "radloop.digest": made.digest}


@pytest.mark.slow
def test_in_an_environment_of_its_own(
    clinic: tuple[Path, Path, RunResult], tmp_path: Path, require_service: Callable[..., str]
) -> None:
    """Years later, the exported folder must make the same tensors with the radloop that it carries, and no checkout."""
    uv = require_service("uv", "uv", str(ROOT / ".venvs/uv/bin/uv"))
    home, exported, ended = clinic
    asked = ["-P", f"checked={ended.outputs['quality.checked']}", "--env-manager", "uv"]
    path = os.pathsep.join([str(Path(uv).parent), PATH])
    done = mlflow_run(exported, "-e", "preprocess", *asked, home=home, MLFLOW_ENV_ROOT=str(tmp_path), PATH=path)
    assert done.returncode == 0, done.stderr
    (wheel,) = exported.glob("radloop-*.whl")
    assert wheel.name in done.stderr
    tags = found(home)["preprocess"].data.tags
    assert tags["radloop.cached"] == "false"
    assert tags["radloop.output.tensors"] == ended.output("preprocess.tensors").digest


@pytest.mark.slow
def test_chained_entry_point(home: Path, tmp_path: Path) -> None:
    """`mlflow run DIR -e PIPELINE` is the whole pipeline: nested runs, and the record that every engine leaves."""
    project = tmp_path / "exported"
    assert mlflow_project.export([small()], project, home=home)[-1] == "suite"
    done = mlflow_run(project, "-e", "suite", "--env-manager", "local", home=home)
    assert done.returncode == 0, done.stderr
    runs = found(home)
    assert set(runs) == {"suite", "numbers", "total", "limit", "report"}
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs.values()}
    assert parents == {None, runs["suite"].info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["limit"].data.metrics["verdict.gates.total.figure"] == 4.5
    assert runs["numbers"].data.params["scale"] == "1.5"
    record = read_run(home / "runs" / runs["suite"].data.tags["radloop.run"] / "run.json")
    assert (record.engine, record.status) == ("mlflow-project", "succeeded")
    theirs = local.run(small(), home=tmp_path / "local")
    assert {o: record.output(o).digest for o in record.outputs} == {o: theirs.output(o).digest for o in theirs.outputs}


def test_a_chained_run_names_what_does_not_succeed(engine: Any, home: Path) -> None:
    """On MLflow's page a run that a gate stopped must not look like one that went through."""
    assert engine(small(at_most=1.0), home=home).status == "stopped"
    runs = found(home)
    assert {name: run.info.status for name, run in runs.items()} == {
        "suite": "FAILED",
        "report": "FAILED",
        **dict.fromkeys(("numbers", "total", "limit"), "FINISHED"),
    }
    for name in ("suite", "report"):
        assert runs[name].data.tags["radloop.status"] == "stopped"
        assert "total 4.5, bound 1" in runs[name].data.tags["mlflow.note.content"]


@pytest.mark.parametrize(("told", "status"), [("stop", "stopped"), ("wait", "waiting")])
def test_gates_hold_a_stage_by_hand(engine: Any, home: Path, tmp_path: Path, told: str, status: str) -> None:
    """A gate that one stage alone could walk past would be none."""
    pipeline = small(at_most=1.0, ask=told == "wait")
    before = engine(pipeline, home=home)
    given = {"given": before.outputs["total.summed"], "gate_limit_verdict": before.outputs["limit.verdict"]}
    mlflow_project.export([pipeline], project := tmp_path / "exported", home=home)
    run = by_hand(project, home, "report", **given)
    assert (run.info.status, run.data.tags["radloop.status"]) == ("FAILED", status)
    assert "total 4.5, bound 1" in run.data.tags["mlflow.note.content"]
    assert ran(home, "report") == 0


def test_parameters_survive_the_shell(home: Path, tmp_path: Path) -> None:
    """MLflow puts a project's parameters into a shell command: a quote must not end it, nor a brace, nor a line."""
    pipeline = only(s.numbers, unit=UGLY)
    mlflow_project.export([pipeline], project := tmp_path / "exported", home=home)
    given = {"count": "2", "scale": "0.1", "negative": "true", "weights": "[0.5, 1e-9]", "mode": "odd"}
    run = by_hand(project, home, "numbers", **given)
    assert run.info.status == "FINISHED", run.data.tags
    made = open_artifact(home / run.data.tags["radloop.place.made"]).json("numbers.json")
    assert made == {"values": [0.0, -0.1], "weights": [0.5, 1e-9], "unit": UGLY, "mode": "odd"}


def test_the_whole_loop_is_a_valid_project(tmp_path: Path) -> None:
    """MLflow must find every stage and every pipeline, and be able to make its command."""
    from mlflow.projects.utils import load_project

    pipelines = [build(Settings()) for build in {**PIPELINES, **PARTS}.values()]
    points = mlflow_project.export(pipelines, tmp_path / "exported", home=tmp_path, environments={"tfdv": "/t/python"})
    project = load_project(str(tmp_path / "exported"))
    stages = {node.name for pipeline in pipelines for node in pipeline.nodes}
    chained = {"prepare", "develop", "release", "watch", "retrain", "train-pipeline", "evaluate-pipeline"}
    assert set(points) == stages | chained
    for name in points:
        point = project.get_entry_point(name)
        assert {parameter.type for parameter in point.parameters.values()} <= {"string", "float", "path"}
        given = {n: str(tmp_path) for n, p in point.parameters.items() if p.default is None}
        words = shlex.split(point.compute_command(given, str(tmp_path)))
        assert words[:3] == ["python", "-m", "radloop.engines.mlflow_project"]
        assert (tmp_path / "exported" / words[4]).is_file()
    assert project.get_entry_point("validate").parameters["python_tfdv"].default == "/t/python"
    assert project.get_entry_point("publish").parameters["gate_validate_verdict"].default is None


def test_secret_references_are_no_parameters(engine: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed as a parameter is logged: nobody may be led to type a key."""
    monkeypatch.setenv("RADLOOP_SUITE_SECRET", SECRET)
    result = engine(only(s.whisper), home=home)
    assert result.status == "succeeded"
    assert set(found(home)["whisper"].data.params) == {"project"}
    project = home / "runs" / result.run_id / "mlflow-project"
    command = [sys.executable, "-m", "radloop.engines.mlflow_project", "stage", "suite.json", "whisper"]
    refused = subprocess.run(
        [*command, "--project", home, "--key", SECRET],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "got: --key" in refused.stderr
    assert SECRET not in refused.stderr


def test_dead_server_before_the_run(tmp_path: Path, free_port: int) -> None:
    """MLflow's client tries for five minutes; a user must hear of it at once, with nothing begun."""
    began = time.monotonic()
    with pytest.raises(EngineError, match=rf"MLflow cannot be reached\n.*http://127.0.0.1:{free_port}"):
        mlflow_project.run(small(), home=tmp_path, tracking_uri=f"http://127.0.0.1:{free_port}")
    assert time.monotonic() - began < 150
    assert list(tmp_path.iterdir()) == []


def test_server_that_dies_during_a_stage(home: Path, tmp_path: Path, free_port: int) -> None:
    """What a night's stage has made must not be lost because the run could not be logged."""
    mlflow_project.export([small()], project := tmp_path / "exported", home=home)
    env = {"MLFLOW_RUN_ID": "0" * 32, "MLFLOW_EXPERIMENT_ID": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "radloop.engines.mlflow_project", "stage", "suite.json", "numbers", "--project", home],
        cwd=project,
        env={**os.environ, **env, "MLFLOW_TRACKING_URI": f"http://someone:{SECRET}@127.0.0.1:{free_port}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "MLflow cannot be reached" in done.stderr
    assert SECRET not in done.stderr + done.stdout
    (made,) = (home / "artifacts").glob("*/made")
    assert f"made: {made}" in done.stdout
    assert open_artifact(made, verify=True).counts == {"numbers": 3}


def test_entry_point_that_leaves_nothing(home: Path, tmp_path: Path) -> None:
    """A child run whose process never came so far as its stage must fail the pipeline, not be passed over."""
    record = Record.open(small(), home, engine=mlflow_project.NAME)
    mlflow_project.export([record.pipeline], record.folder / "p", home=home)
    (tmp_path / "bash").symlink_to(str(shutil.which("bash")))  # and no Python
    runs = runs_of(home)
    parent = runs.create("suite", {}, {"mlflow.project.entryPoint": "suite"})
    result = Chain(record, record.folder / "p", runs, parent, {}, {"PATH": str(tmp_path)}).run()
    assert result.status == "failed"
    assert "ended without a result" in result.message
    assert found(home)["numbers"].info.status == "FAILED"


def test_not_installed(tfdv_python: Path, tmp_path: Path) -> None:
    """In an environment without MLflow a user must learn what to type."""
    code = (
        "import sys; from pathlib import Path; from radloop.engines import mlflow_project\n"
        "from radloop.pipeline import read_pipeline\n"
        "mlflow_project.run(read_pipeline(sys.stdin.buffer.read()), home=Path(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [tfdv_python, "-c", code, tmp_path], input=small().to_json(), capture_output=True, check=False
    )
    assert "SettingsError: MLflow is not installed here" in done.stderr.decode()
    assert "pip install 'radloop[train]'" in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_interrupt_ends_the_stage_and_the_runs(home: Path) -> None:
    """Ctrl-C must give the terminal back, end the stage behind MLflow's own processes, and not leave runs 'running'."""
    code = (
        "import sys; from pathlib import Path; from radloop.engines import mlflow_project\n"
        "from radloop.pipeline import read_pipeline\n"
        "pipeline = read_pipeline(sys.stdin.buffer.read())\n"
        "mlflow_project.run(pipeline, home=Path(sys.argv[1]), emit=lambda event: print(event, flush=True))\n"
    )
    command = [sys.executable, "-c", code, home]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(only(s.linger, seconds=120).to_json())
            process.stdin.close()
            assert b"started" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.wait(100)
        finally:
            process.kill()
    ended = {name: run.info.status for name, run in found(home).items()}
    assert ended == {"suite": "KILLED", "linger": "FAILED"}  # the latter is MLflow's own word for it
    until = time.monotonic() + 60
    while holder(home, "suite") and time.monotonic() < until:
        time.sleep(0.1)
    assert holder(home, "suite") == ""  # no process of the stage is left
    (record,) = (home / "runs").glob("*/run.json")
    assert read_run(record).status == "failed"


@stage
def clash(made: s.Out[s.Numbers], *, project: str = "x") -> None:
    """Have a parameter of a name that is taken."""


@stage
def keyed(made: s.Out[s.Numbers], *, key: Secret = "env:A", count: int = 1) -> None:
    """Have one that a person may set."""


def test_what_an_mlproject_cannot_hold(tmp_path: Path) -> None:
    """Two things under one name would give a stage what was meant for another."""
    with pytest.raises(
        UnsupportedByEngine, match="stage 'clash': it has no room for a second parameter named 'project'"
    ):
        mlflow_project.export([only(clash)], tmp_path, home=tmp_path)
    one, other = Builder("one"), Builder("other")
    one.add(keyed, name="same")
    other.add(s.numbers, name="same")
    with pytest.raises(UnsupportedByEngine, match="room for two stages of one name"):
        mlflow_project.export([one.build(), other.build()], tmp_path, home=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_extra(tmp_path: Path) -> None:
    """A typo would install an environment without what the stages need, and say so only on the first run."""
    from radloop.learning.wheel import requirements

    assert any(line.startswith("mlflow-skinny==") for line in requirements(["pixels"]))
    assert not any(line.startswith("torch") for line in requirements(["pixels"]))
    with pytest.raises(DefinitionError, match=r"no extra 'pixel'\n.*pixels"):
        requirements(["pixel"])

"""The conformance suite on Kubeflow Pipelines (kfp.local), what only it has, and its compiled YAML against golden files.

After a change of the loop or of the compiler: `RADLOOP_GOLDEN=write make test ARGS="tests/engines/test_kubeflow.py -k golden"`,
and read the difference.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from radloop.artifact import Verdict, open_artifact
from radloop.cli.init import make_project
from radloop.engines import kubeflow, local
from radloop.engines.kubeflow import compiler
from radloop.errors import EngineError, RunLocked, SettingsError, UnsupportedByEngine
from radloop.loop import PIPELINES
from radloop.pipeline import Builder, Node, Pipeline
from radloop.pipeline.records import RunResult, read_run
from radloop.settings import Deidentify, Settings
from radloop.stage import In, Out, Secret, stage
from radloop.stage.launch import read_request
from radloop.stage.lock import hold
from radloop.testing import suite_stages as s
from radloop.testing.clinic import mail_sink
from radloop.testing.engine_suite import EngineSuite, only, ran, small

GOLDEN = Path(__file__).parent / "golden" / "kubeflow"
WRITE = os.environ.get("RADLOOP_GOLDEN") == "write"
# A user's own script: kfp.local, the exported YAML, and nothing of radloop.
RUN_YAML = """
import sys, warnings
warnings.simplefilter("ignore")
from kfp import components, local
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[3], raise_on_error=False)
components.load_component_from_file(sys.argv[1])(project=sys.argv[2])
"""
COMPOSED = """
import sys, warnings
warnings.simplefilter("ignore")
from kfp import components, dsl, local
folder, project, other, root = sys.argv[1:]
numbers = components.load_component_from_file(f"{folder}/numbers.yaml")
total = components.load_component_from_file(f"{folder}/total.yaml")
limit = components.load_component_from_file(f"{folder}/limit.yaml")

@dsl.pipeline
def mine(project: str) -> str:
    made = numbers(count=5, unit="µm", weights=[0.5], project=project)
    summed = total(given=made.outputs["made"], project=other)  # which holds nothing: it reads what KFP passed
    return limit(given=summed.outputs["summed"], at_most=3.0, project=project).outputs["Output"]

local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root)
print("VERDICT", mine(project=project).output)
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as its user does: kfp.local patches its process, so never in this one."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


class TestKubeflow(EngineSuite):
    name = "kubeflow"

    @pytest.fixture
    def engine(self) -> Callable[..., RunResult]:
        return kubeflow.run


@stage
def guarded(made: Out[s.Numbers], *, key: Secret = "env:RADLOOP_SUITE_SECRET", other: Secret = "file:x.key") -> None:
    """Never run; what it asks for is compiled."""


@stage(resources={"cpu": "2", "memory": "4Gi", "gpu": "1"}, timeout_s=60, retries=3)
def hungry(made: Out[s.Numbers]) -> None:
    """Never run; what it asks for is compiled."""


@stage(resources={"tape": "1"})
def odd(made: Out[s.Numbers]) -> None:
    """Never run; no cluster has tapes."""


@stage
def clash(made: Out[s.Numbers], *, project: str = "") -> None:
    """Never run; a component needs the name itself."""


@stage
def torn(given: In[s.Numbers], one: Out[Verdict], other: Out[Verdict]) -> None:
    """Never run; two verdicts."""


def exported(pipeline: Pipeline, folder: Path, **cluster: str) -> dict[str, Any]:
    """A pipeline's compiled YAML: the spec, and under `platforms` what Kubernetes is told."""
    kubeflow.export([pipeline], folder, kubeflow.Cluster(**cluster))
    spec, platform = yaml.safe_load_all((folder / f"{pipeline.name}.yaml").read_text())
    return {**spec, **platform}


def conditions(spec: dict[str, Any], dag: str = "comp-exit-handler-1") -> dict[str, Any]:
    """Tasks by name; below a condition those within it."""
    found: dict[str, Any] = {}
    for name, task in spec["components"][dag]["dag"]["tasks"].items():
        inner = task["componentRef"]["name"]
        found[task["taskInfo"]["name"]] = conditions(spec, inner) if "dag" in spec["components"][inner] else name
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_golden(name: str, tmp_path: Path) -> None:
    """What a hospital uploads to its cluster must not change unseen, least of all a gate's condition."""
    pipeline = PIPELINES[name](Settings(deidentify=Deidentify(key="env:RADLOOP_KEY")))
    kubeflow.export([pipeline], tmp_path, kubeflow.Cluster())
    compiled = re.sub(r"^sdkVersion: .*\n", "", (tmp_path / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    golden = GOLDEN / f"{name}.yaml"
    if WRITE:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(compiled)
    assert golden.stat().st_size < 100_000
    assert compiled == golden.read_text(), (
        'RADLOOP_GOLDEN=write make test ARGS="tests/engines/test_kubeflow.py -k golden"'
    )


def test_gates_become_nested_conditions(tmp_path: Path) -> None:
    """A stage compiled outside its gate's condition runs a model that was refused."""
    b = Builder("gated")
    made = b.add(s.numbers).made
    first = b.add(s.limit, name="first", given=made)
    behind = b.add(s.total, name="behind", given=made, gates=[first.verdict])
    second = b.add(s.limit, name="second", given=behind.summed)
    b.add(s.report, name="deep", given=behind.summed, gates=[second.verdict])
    b.add(s.report, name="beside", given=made)
    spec = exported(b.build(), tmp_path)
    deep = {"unless-second-stops": {"deep": "report-2"}}
    inside = {"behind": "total", "second": "limit-2", **deep}
    assert conditions(spec) == {
        **{"open-gated": "open-gated", "numbers": "numbers", "first": "limit", "beside": "report"},
        "unless-first-stops": inside,
    }
    assert str(spec).count("!= 'stop'") == 2


def test_what_kfp_cannot_do_is_said_when_compiled(tmp_path: Path) -> None:
    """At night, on the cluster, is too late to learn that a pipeline cannot run there."""
    b = Builder("apart")
    made = b.add(s.numbers).made
    gates = [b.add(s.limit, name=name, given=made).verdict for name in ("one", "two")]
    parts = [b.add(s.total, name=f"behind-{i}", given=made, gates=[gate]) for i, gate in enumerate(gates)]
    b.add(s.report, given=parts[0].summed, gates=[b.add(s.limit, name="last", given=parts[1].summed).verdict])
    cases = [(b.build(), "report", "gates that do not nest")]
    b = Builder("collected")
    gate = b.add(s.limit, given=b.add(s.numbers).made)
    items = b.add(s.listing, names=["a"]).items
    b.add(s.gather, pieces=b.add(s.piece, of=items, over=items).made, gates=[gate.verdict])
    cases.append((b.build(), "gather", "collection that is used behind a gate"))
    b = Builder("torn")
    b.add(torn, given=b.add(s.numbers).made)
    cases.append((b.build(), "torn", "condition on more than one verdict"))
    cases += [(only(odd), "odd", "resource 'tape'"), (only(clash), "clash", "argument 'project'")]
    cases.append((only(s.numbers, unit="{{$.pipeline_job_uuid}}"), "numbers", "parameter with '{{"))
    for pipeline, name, feature in cases:
        with pytest.raises(UnsupportedByEngine, match=re.escape(f"cannot run stage {name!r}: it has no {feature}")):
            kubeflow.run(pipeline, home=tmp_path)
        with pytest.raises(UnsupportedByEngine):
            kubeflow.export([small(), pipeline], tmp_path / "yaml", kubeflow.Cluster())
    assert list(tmp_path.iterdir()) == []


def test_secrets_resources_and_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret's value in an uploaded pipeline is read by all who may see the cluster; a task without limits kills others."""
    monkeypatch.setenv("RADLOOP_SUITE_SECRET", "correct-horse")
    b = Builder("guarded")
    b.add(guarded)
    b.add(hungry)
    spec = exported(b.build(), tmp_path, secret="keys", claim="disk", image="registry.example/core:1")
    assert not [f for f in tmp_path.rglob("*.yaml") if "correct-horse" in f.read_text()]
    told = spec["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert all(one["pvcMount"][0]["constant"] == "disk" for one in told.values())
    (secret,) = told["exec-guarded"]["secretAsEnv"]
    assert (secret["secretName"], secret["keyToEnv"]) == (
        "keys",
        [{"envVar": "RADLOOP_SUITE_SECRET", "secretKey": "RADLOOP_SUITE_SECRET"}],
    )
    assert told["exec-hungry"]["activeDeadlineSeconds"] == "660"
    container = spec["deploymentSpec"]["executors"]["exec-hungry"]["container"]
    asked = container["resources"]
    assert container["image"] == "registry.example/core:1"
    assert (asked["resourceCpuLimit"], asked["resourceMemoryRequest"]) == ("2", "4Gi")
    assert asked["accelerator"]["resourceType"] == "nvidia.com/gpu"
    task = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]["hungry"]
    assert (task["retryPolicy"]["maxRetryCount"], task["cachingOptions"]) == (3, {})


def test_text_arrives_as_it_was(tmp_path: Path) -> None:
    """An intended use with quotes and line breaks goes through Python source, YAML, a shell and JSON."""
    text = 'a "b" \'c\' \\n\n\t$(exit) `x` {{y}} %s """ # ☢'
    result = kubeflow.run(only(s.numbers, unit=text), home=tmp_path)
    content = result.output("numbers.made").json("numbers.json")
    assert isinstance(content, dict)
    assert content["unit"] == text


def test_components_are_composed_by_hand(tmp_path: Path) -> None:
    """A component that works in our own pipelines only is no component."""
    kubeflow.export([small()], tmp_path / "yaml", kubeflow.Cluster())
    done = python(COMPOSED, tmp_path / "yaml" / "components", tmp_path / "one", tmp_path / "other", tmp_path / "kfp")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "VERDICT stop" in done.stdout
    (summed,) = (tmp_path / "kfp").rglob("summed")
    b = Builder("same")
    b.add(s.total, given=b.add(s.numbers, count=5, unit="µm", weights=[0.5]).made)
    same = local.run(b.build(), home=tmp_path / "local").output("total.summed")
    assert open_artifact(summed, s.Numbers, verify=True).digest == same.digest
    assert f"'digest': '{same.digest}'" in done.stdout
    assert "'total': 15.0" in done.stdout  # the gate's figure among its metrics


def test_stages_read_in_the_project(tmp_path: Path) -> None:
    """A path of KFP's in the lineage points to nothing tomorrow: the next run would not find the champion's dataset."""
    result = kubeflow.run(small(), home=tmp_path)
    asked = read_request(tmp_path / "runs" / result.run_id / "total" / "request.json")
    assert asked.inputs == {"given": str(Path(result.outputs["numbers.made"]).relative_to(tmp_path))}


def test_exported_pipeline_opens_its_run_and_its_exit_handler_tells(tmp_path: Path) -> None:
    """On a cluster nobody watches: a failed stage must end the run's record and mail who is to know."""
    project = tmp_path / "project"
    make_project(project)
    exported(only(s.refuse), tmp_path)
    with mail_sink(lambda line: None) as mail:
        (project / "radloop.toml").write_text(
            '[task]\nname = "suite"\n[alerts]\nsmtp_host = "127.0.0.1"\n'
            f'smtp_port = {mail.port}\nrecipients = ["physicist@hospital.invalid"]\n'
        )
        done = python(RUN_YAML, tmp_path / "suite.yaml", project, tmp_path / "kfp")
    (record,) = (project / "runs").glob("[0-9]*/run.json")
    run = read_run(record)
    assert (run.engine, run.status) == ("kubeflow", "failed"), done.stdout[-3000:]
    assert "expected: one value a key" in run.message
    assert "expected: one value a key" in done.stdout  # in the task's own log, too
    assert [("failed" in one["subject"], "suite" in one["subject"]) for one in mail.messages] == [(True, True)]
    (page,) = (tmp_path / "kfp").rglob("report")
    assert page.read_text().startswith("<!doctype html>")
    assert list((project / "runs" / ".kubeflow").iterdir()) == []


def test_newer_spec_is_refused_with_its_version(tmp_path: Path) -> None:
    """An image older than the exported pipeline must say so, and run nothing."""
    make_project(tmp_path / "project")
    exported(small(), tmp_path)
    file = tmp_path / "suite.yaml"
    newer = file.read_text().replace('"spec_version":1', '"spec_version":99')
    assert newer != file.read_text()
    file.write_text(newer)
    done = python(RUN_YAML, file, tmp_path / "project", tmp_path / "kfp")
    assert "got: spec_version 99" in done.stdout
    assert ran(tmp_path / "project", "total") == 0
    assert not (tmp_path / "project" / "artifacts").exists()


def test_two_runs_at_once(tmp_path: Path) -> None:
    """Two runs of one pipeline would publish two dataset versions from half of the images each."""
    with hold(tmp_path, "suite", "first-run"), pytest.raises(RunLocked, match="run first-run"):
        kubeflow.run(small(), home=tmp_path)


def test_nothing_to_fan_out_over(tmp_path: Path) -> None:
    """KFP cannot collect nothing: the user must hear that, not a KeyError of its own."""
    b = Builder("suite")
    items = b.add(s.listing, names=[]).items
    b.add(s.gather, pieces=b.add(s.piece, of=items, over=items).made)
    with pytest.raises(EngineError, match="there is nothing to run over"):
        kubeflow.run(b.build(), home=tmp_path)


def test_kill_ends_the_stages_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """A stage that lives on after its engine was shot would hold the pipeline, and write behind the next run's back."""
    script = (
        "import sys; from pathlib import Path; from radloop.engines import kubeflow\n"
        "from radloop.testing import suite_stages as s; from radloop.testing.engine_suite import only\n"
        "kubeflow.run(only(s.linger, seconds=120), home=Path(sys.argv[1]), emit=lambda e: print(e.event, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "started\n"
        engine.send_signal(signal.SIGKILL)
    until = time.monotonic() + 100
    while alive(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(tmp_path) == []
    assert kubeflow.run(small(), home=tmp_path).status == "succeeded"
    assert list((tmp_path / "artifacts").glob(".*")) == []


def alive(home: Path) -> list[str]:
    """Command lines of processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in command and process.name != str(os.getpid()):
            found.append(command[:200])
    return found


def test_without_kfp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not installed it must learn what to type, before anything has run."""
    monkeypatch.setitem(sys.modules, "kfp", None)  # as if it were not there
    with pytest.raises(SettingsError, match=re.escape("pip install 'radloop[kubeflow]'")):
        kubeflow.run(small(), home=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_environment_that_is_not_there(tmp_path: Path) -> None:
    """Without TFDV a user must learn what to type, before anything has run."""
    (node,) = only(s.numbers).nodes
    pipeline = Pipeline(name="suite", nodes=(Node(name="numbers", stage=node.stage, environment="tfdv"),))
    with pytest.raises(SettingsError, match="radloop setup"):
        kubeflow.run(pipeline, home=tmp_path)
    assert compiler.Cluster(image_tfdv="t:1").image_of("tfdv") == "t:1"

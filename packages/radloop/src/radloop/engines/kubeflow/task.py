"""What runs inside a Kubeflow task: each component's body is one call of a function here. Needs no kfp.

A component's inputs and outputs are KFP artifacts whose path is a radloop artifact directory, passed by KFP (a link on one
machine, a copy through its object store on a cluster). The run's record, the cache, the catalog and the locks are in the
project folder, which every task sees; where that still holds what was passed, a stage reads it there, for lineage names places
in the project.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from radloop.artifact import Description, Verdict, open_artifact
from radloop.errors import ArtifactError, EngineError
from radloop.pipeline import Node
from radloop.pipeline.records import Record
from radloop.stage import Stage, load
from radloop.stage.execute import read_verdict
from radloop.stage.launch import launch, write_whole
from radloop.stage.protocol import Event, Request, Result

GATE = "gate"
_ABSENT = "absent"
_FIGURES = 100


class Passed(Protocol):
    """What KFP hands a component for an artifact."""

    path: str
    metadata: dict[str, Any]


def python_variable(environment: str) -> str:
    """The variable that names the Python of an environment in a task's image; the image's own without it."""
    return f"RADLOOP_PYTHON_{environment.upper().replace('-', '_')}"


def run_stage(ref: str, environment: str, timeout_s: float | None, given: Mapping[str, Any]) -> str:
    """Run one stage on the artifacts that KFP brought, and hand its outputs to KFP.

    Args:
        ref: the stage, `module:function`.
        environment: the environment whose Python runs it.
        timeout_s: seconds after which it is ended.
        given: the component's arguments: `project`, `run_id`, `node`, `index`, and the stage's own.

    Returns the verdict of a gate (pass, wait, stop), else nothing. A stage that does not succeed ends the task with its own
    words and exit code 1; KFP may then try again.
    """
    stage, home = load(ref), Path(given["project"]).resolve()
    record = Record.load(home, given["run_id"]) if given["run_id"] else None
    node = record.pipeline.node(given["node"]) if record else None
    index = given["index"] if given["index"] >= 0 else None
    with _folder(record, node, index) as folder:
        request = _request(stage, home, given, record, node, index)
        request = msgspec.structs.replace(request, attempt=_attempt(folder))
        emit = record.emitter(_say) if record else _say
        if request.attempt > 1:
            message = f"try {request.attempt - 1} failed; again"
            emit(Event(event="log", node=request.node, at=time.time(), message=message))
        python = os.environ.get(python_variable(environment))
        if python == sys.executable:
            python = None  # a fork of this task's process, which is what KFP started for this stage alone
        result = launch(request, folder, emit, python=python, timeout_s=timeout_s)
        if record and node:
            record.keep(node, index, request, result)
    if result.status != "succeeded":
        raise SystemExit(f"{result.node}: {result.status}\n{result.message}")
    return _hand_over(result, home, {name: given[name] for name in stage.outputs})


@contextmanager
def _folder(record: Record | None, node: Node | None, index: int | None) -> Iterator[Path]:
    """Where the stage's request and result are kept; for a component outside a radloop run, a folder that goes away."""
    if record and node:
        yield record.folder_of(node, index)
    else:
        with tempfile.TemporaryDirectory(prefix="radloop-") as scratch:
            yield Path(scratch)


def _request(
    stage: Stage, home: Path, given: Mapping[str, Any], record: Record | None, node: Node | None, index: int | None
) -> Request:
    params = {name: given[name] for name in stage.params if given[name] is not None}
    gates = [given[name] for name in sorted(given) if name.split("_")[0] == GATE and name not in stage.inputs]
    return Request(
        stage=stage.ref,
        node=given["node"],
        pipeline=record.pipeline.name if record else "",
        run_id=given["run_id"],
        params=_exact(params, record.request(node, index).params) if record and node else params,
        inputs={name: _places(given[name], home) for name in stage.inputs},
        gates=tuple(str(_place(gate, home)) for gate in gates if gate is not None),
        approval=node.approval if node else None,
        home=str(home),
    )


def _exact(given: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """What KFP brought, with the numbers of the spec: KFP carries every number in a list or struct as a double."""
    return spec | {name: value for name, value in given.items() if name not in spec or value != spec[name]}


def _places(passed: Passed | list[Passed] | None, home: Path) -> str | list[str] | None:
    """Where a stage reads what was passed; a list for an `Each`; None where an optional artifact is absent."""
    if isinstance(passed, list):
        return [str(_place(one, home)) for one in passed]
    return None if passed is None else _place(passed, home)


def _place(passed: Passed, home: Path) -> str | None:
    """The directory in the project if the same artifact is still there, else the one that KFP made."""
    path = Path(passed.path).resolve()
    if (path / _ABSENT).exists():
        return None
    place = passed.metadata.get("place", "")
    with contextlib.suppress(ArtifactError):
        if place and open_artifact(home / place).digest == open_artifact(path).digest:
            return str(place)
    return str(path)


def _attempt(folder: Path) -> int:
    """1, or one more than the last try of this run that failed."""
    try:
        result = msgspec.json.decode((folder / "result.json").read_bytes(), type=Result)
        tried = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request).attempt
    except (OSError, msgspec.MsgspecError):
        return 1
    return tried + 1 if result.status == "failed" else 1


def _say(event: Event) -> None:
    """Show an event in the task's log."""
    if event.event == "progress" and event.done != event.total:
        return
    told = f"{event.done}/{event.total}" if event.event == "progress" else event.status or event.event
    words = f": {event.message}" if event.message else ""
    sys.stdout.write(f"{event.node} {told}{words}\n")
    sys.stdout.flush()


def _hand_over(result: Result, home: Path, outputs: Mapping[str, Passed]) -> str:
    said = ""
    for name, passed in outputs.items():
        source = home / result.place / name
        _link(source, Path(passed.path))
        made = result.outputs[name]
        _tell(passed, made, f"{result.place}/{name}")
        passed.metadata.update(_figures(source, made))
        if made.kind == Verdict.name:
            said, passed.metadata["message"] = read_verdict(open_artifact(source))
            passed.metadata["verdict"] = said
    return said


def _tell(passed: Passed, made: Description, place: str) -> None:
    """What KFP shows of an artifact, and hands to whoever reads it."""
    passed.metadata.update({**made.counts, "digest": made.digest, "kind": made.kind, "place": place})


def _link(source: Path, target: Path) -> None:
    """Make `target` a copy of an artifact: hard links where both are on one file system, for artifacts never change."""

    def place(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=place)


def _figures(folder: Path, made: Description) -> dict[str, float]:
    """Numbers of an artifact's `KIND.json` by dotted name, and of a verdict the figure of each gate, for KFP to show."""
    try:
        told = json.loads((folder / f"{made.kind}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if made.kind == Verdict.name and isinstance(told, dict):
        told = {gate["gate"]: gate["figure"] for gate in told.get("gates", ()) if {"gate", "figure"} <= set(gate)}
    return dict(list(_numbers(told, ""))[:_FIGURES])


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def open_run(spec: str, project: str, job: str, run_id: str, outputs: Mapping[str, Passed]) -> str:
    """Begin a run of a pipeline, or take up the one that `run_id` names, and hand its inputs to KFP; the run's id.

    Args:
        spec: pipeline.json.
        project: the project folder.
        job: KFP's id of its own run, by which the exit handler finds ours.
        run_id: a run that is open already; empty to begin one.
        outputs: where KFP wants each of the pipeline's inputs.

    Raises:
        EngineError: `radloop engine open` refused; its own words stand in the task's log.
    """
    home = Path(project).resolve()
    if not run_id:
        run_id = _begin(spec, home)
        _runs(home, job).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_runs(home, job), run_id.encode())
    record = Record.load(home, run_id)
    for name, passed in outputs.items():
        if (place := record.inputs.get(name)) is None:  # not an empty folder, which an object store forgets
            Path(passed.path).mkdir(parents=True, exist_ok=True)
            (Path(passed.path) / _ABSENT).touch()
            continue
        _link(home / place, Path(passed.path))
        _tell(passed, open_artifact(home / place).description, place)
    return run_id


def _begin(spec: str, home: Path) -> str:
    name = msgspec.json.decode(spec, type=dict[str, Any])["name"]
    with tempfile.TemporaryDirectory(prefix="radloop-") as scratch:
        file = Path(scratch, "pipeline.json")
        file.write_text(spec)
        options = ("--spec", str(file), "--engine", "kubeflow", "--project", str(home))
        told = _radloop("engine", "open", name, *options)
    return str(told["run_id"])


def _runs(home: Path, job: str) -> Path:
    """The file that says which of our runs belongs to one of KFP's."""
    return home / "runs" / ".kubeflow" / job


def _radloop(*arguments: str) -> dict[str, Any]:
    """Run a command of radloop that prints JSON. Exit codes other than 1 say how a run ended, not that the command failed."""
    command = [sys.executable, "-m", "radloop.cli", *arguments, "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False
    )  # what it says goes to the task's log
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        told = {"error": {"what": done.stdout[-500:]}}
    if "error" in told:
        raise EngineError(f"radloop {' '.join(arguments[:2])} ended with {done.returncode}", got=told["error"]["what"])
    return told


def list_items(listing: Passed, run_id: str) -> list[dict[str, Any]]:
    """What a mapped stage runs once for each of: place, item, and the run, which kfp.local brings into a loop in no other way.

    Raises:
        EngineError: there is nothing to fan out over; KFP has no empty collection.
    """
    found = msgspec.convert(open_artifact(Path(listing.path)).json("items.json"), list[str])
    if not found:
        raise EngineError("there is nothing to run over", expected="one item at least", got="an empty items.json")
    return [{"place": number, "item": item, "run": run_id} for number, item in enumerate(found)]


def close_run(project: str, job: str, state: str, report: Passed) -> None:
    """The exit handler: end the run however its tasks ended; tell the recipients of [alerts] if it did not succeed.

    `report` receives the report of the loop, one page.
    """
    home = Path(project).resolve()
    try:
        run_id = _runs(home, job).read_text()
    except OSError:
        raise EngineError(
            "the run never began", expected="a run opened by the first task", got=state, next_step="see that task's log"
        ) from None
    _runs(home, job).unlink()
    told = _radloop("engine", "close", run_id, "--project", str(home), "--alert")
    sys.stdout.write(f"{told['pipeline']} {told['status']}: {told.get('message', '')}\n")
    page = _radloop("report", "--project", str(home))["report"]
    shutil.copyfile(page, report.path)

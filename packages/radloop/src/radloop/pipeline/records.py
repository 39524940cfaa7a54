"""A run's record: files under `runs/ID/`, which every engine leaves alike and anyone can read.

    runs/ID/run.json                        the run: pipeline, engine, inputs, status, what each stage's status was
    runs/ID/pipeline.json                   what was run
    runs/ID/events.jsonl                    started, log and closed lines of all stages (engines without a log of their own)
    runs/ID/STAGE/{request,result}.json     what each stage was asked and how it ended; of a mapped one STAGE/0000/...

Paths in it are relative to the project's home, so that it says the same wherever the project is mounted. An orchestrator's
workers share nothing but these files: `Record.load` finds what the stages before have left.
"""

from __future__ import annotations

import os
import pwd
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from radloop.artifact import Artifact, Verdict, open_artifact
from radloop.errors import ArtifactError, DefinitionError, RunLocked
from radloop.pipeline import Node, Pipeline, read_pipeline
from radloop.stage.execute import Emit, read_verdict
from radloop.stage.launch import write_whole
from radloop.stage.lock import holder
from radloop.stage.protocol import Event, Request, Result, Status, encode

_WORST: tuple[Status, ...] = ("failed", "stopped", "waiting")
RunStatus: TypeAlias = Literal[Status, "running", "interrupted"]


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a pipeline ended.

    Attributes:
        status: failed, stopped by a gate, waiting for a person, or succeeded. Of a record that is read: running, or
            interrupted, which is a run that ended by no choice of its own.
        results: by stage, `stage[0]`, `stage[1]` ... for a mapped one; a stage that was never reached is absent.
        inputs: artifact directory by pipeline input.
        outputs: committed artifact directory by `stage.output` (`stage[0].output`).
        message: why it did not succeed.
        by: who began it: the operating system's user and, where it names one, the orchestrator's. Of a model: who trained it.
    """

    run_id: str
    pipeline: str
    status: RunStatus
    engine: str = "local"
    results: dict[str, Result] = {}
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    message: str = ""
    seconds: float = 0.0
    by: tuple[str, ...] = ()

    def output(self, source: str) -> Artifact[Any]:
        """Open an output by `stage.output`."""
        if source not in self.outputs:
            raise ArtifactError(
                f"run {self.run_id} has no output {source!r}", expected=", ".join(self.outputs) or "none", got=source
            )
        return open_artifact(Path(self.outputs[source]))


def read_run(record: Path) -> RunResult:
    """Read a `run.json`; its paths made absolute. Raises OSError, msgspec.MsgspecError."""
    run, home = msgspec.json.decode(record.read_bytes(), type=RunResult), record.resolve().parents[2]
    return msgspec.structs.replace(
        run,
        inputs={name: str(home / path) for name, path in run.inputs.items()},
        outputs={name: str(home / path) for name, path in run.outputs.items()},
    )


class Record:
    """The record of one run, while it goes on.

    Attributes:
        folder: `runs/ID`.
        results: how each stage ended so far; a mapped one's runs as `stage[0]`, `stage[1]` ...
        by: who began it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        home: Path,
        run_id: str,
        engine: str,
        inputs: Mapping[str, str],
        by: tuple[str, ...] = (),
    ) -> None:
        self.pipeline, self.home, self.run_id, self.engine, self.by = pipeline, home, run_id, engine, by
        self.folder = home / "runs" / run_id
        self.inputs = dict(inputs)
        self.results: dict[str, Result] = {}
        self._began = time.time()

    @classmethod
    def open(
        cls,
        pipeline: Pipeline,
        home: Path,
        inputs: Mapping[str, Path | None] | None = None,
        *,
        engine: str = "local",
        by: str = "",
    ) -> Record:
        """Begin a run.

        Args:
            pipeline: what is to be run.
            home: the project's home directory.
            inputs: artifact directory of each pipeline input; optional ones may be absent.
            engine: what runs it.
            by: whom the engine knows to have begun it, besides the operating system's user.

        Raises:
            RunLocked: another run works on this pipeline; names it.
            DefinitionError: a pipeline input is missing, unknown or of another kind.
        """
        home = home.resolve()
        if other := holder(home, pipeline.name):
            raise RunLocked(
                f"pipeline {pipeline.name!r} is already running",
                got=other,
                next_step="wait for it to end (radloop status), or end that process",
            )
        bound = _bind(pipeline, {name: path for name, path in (inputs or {}).items() if path is not None})
        run_id = _new_id()
        given = {name: _relative(path, home) for name, path in bound.items()}
        record = cls(pipeline, home, run_id, engine, given, tuple(dict.fromkeys(filter(None, (account(), by)))))
        record.folder.mkdir(parents=True)
        write_whole(record.folder / "pipeline.json", pipeline.to_json())
        record._write("running", "")
        return record

    @classmethod
    def load(cls, home: Path, run_id: str) -> Record:
        """Find a run that another process has begun, and what its stages have left. Raises DefinitionError if there is none."""
        home = home.resolve()
        folder = home / "runs" / run_id
        try:
            run = msgspec.json.decode((folder / "run.json").read_bytes(), type=dict[str, Any])
            pipeline = read_pipeline((folder / "pipeline.json").read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            raise DefinitionError(
                f"there is no record of the run {run_id!r}", expected=str(folder / "run.json"), got=str(error)
            ) from None
        record = cls(pipeline, home, run_id, run["engine"], run["inputs"], tuple(run.get("by", ())))
        record._began = (folder / "pipeline.json").stat().st_mtime
        for node in pipeline.nodes:
            places = sorted((folder / node.name).glob("[0-9]*")) if node.map else [folder / node.name]
            for index, place in enumerate(places):
                try:
                    result = msgspec.json.decode((place / "result.json").read_bytes(), type=Result)
                except (OSError, msgspec.MsgspecError):
                    continue
                record.results[f"{node.name}[{index}]" if node.map else node.name] = result
        return record

    def items(self, node: Node) -> list[str]:
        """What a mapped node runs once for each of."""
        assert node.map is not None
        found = open_artifact(self.home / str(self._path(node.map.over))).json("items.json")
        return msgspec.convert(found, list[str])

    def folder_of(self, node: Node, index: int | None = None) -> Path:
        """Where a node's request and result are kept; of the run for one item, if it is mapped."""
        return self.folder / node.name / f"{index:04d}" if index is not None else self.folder / node.name

    def request(self, node: Node, index: int | None = None, *, attempt: int = 1) -> Request:
        """What a node is asked: its parameters, and where the stages before it have left what it reads.

        Raises:
            DefinitionError: one of them has not succeeded in this run.
        """
        params = node.params
        if node.map is not None and index is not None:
            params = {**params, node.map.param: self.items(node)[index]}
        return Request(
            stage=node.stage,
            node=node.name,
            pipeline=self.pipeline.name,
            run_id=self.run_id,
            params=params,
            inputs={name: self._path(source) for name, source in node.inputs.items()},
            gates=tuple(str(self._path(gate)) for gate in node.gates),
            approval=node.approval,
            home=str(self.home),
            attempt=attempt,
        )

    def keep(self, node: Node, index: int | None, request: Request, result: Result) -> None:
        """Write a node's request and result down."""
        folder = self.folder_of(node, index)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "request.json", encode(request))
        write_whole(folder / "result.json", encode(result))
        self.results[node.name if index is None else f"{node.name}[{index}]"] = result

    def emitter(self, watch: Emit) -> Emit:
        """What passes events on to whoever watches, and keeps them in events.jsonl; of progress only that all is done."""

        def emit(event: Event) -> None:
            if event.event != "progress" or event.done == event.total:
                with (self.folder / "events.jsonl").open("ab", buffering=0) as f:  # one write a line: workers share it
                    f.write(encode(event) + b"\n")
            watch(event)

        return emit

    def close(self) -> RunResult:
        """End the run: what its stages left, and the worst of their statuses, in run.json."""
        return self._write(*self._outcome())

    def succeeded(self, name: str) -> bool:
        """Whether a stage has; of a mapped one, all its runs."""
        node = self.pipeline.node(name)
        names = [f"{name}[{i}]" for i in range(len(self.items(node)))] if node.map else [name]
        return all(n in self.results and self.results[n].status == "succeeded" for n in names)

    def _path(self, source: str) -> str | list[str] | None:
        """Where an artifact lies, by its source in the pipeline; a list of places of a mapped node's."""
        if source.startswith("input:"):
            return self.inputs.get(source.removeprefix("input:"))
        name, _, output = source.partition(".")
        node = self.pipeline.node(name)
        names = [f"{name}[{i}]" for i in range(len(self.items(node)))] if node.map else [name]
        found = [self.results.get(n) for n in names]
        if not all(result is not None and result.status == "succeeded" for result in found):
            raise DefinitionError(
                f"stage {name!r} has not succeeded in run {self.run_id}",
                expected=f"its output {output!r}",
                got=", ".join(result.status if result else "no result" for result in found),
                next_step="run it first; an engine runs stages in the order of the pipeline",
            )
        places = [f"{result.place}/{output}" for result in found if result]
        return places if node.map else places[0]

    def _outcome(self) -> tuple[Status, str]:
        for status in _WORST:
            for name, result in self.results.items():
                if result.status == status:
                    return status, f"{name}: {result.message}"
            if status == "stopped" and (told := self._last_word()):
                return "stopped", told
        missing = [n.name for n in self.pipeline.nodes if not self._reached(n)]
        return ("failed", f"{missing[0]} was never run") if missing else ("succeeded", "")

    def _reached(self, node: Node) -> bool:
        return bool(node.map) or node.name in self.results

    def _last_word(self) -> str:
        """What a verdict said that stops the run, whether or not a stage stands behind it."""
        for node in self.pipeline.nodes:
            for output, kind in node.outputs.items():
                result = self.results.get(node.name)
                if kind == Verdict.name and result and result.place:
                    verdict, message = read_verdict(open_artifact(self.home / result.place / output))
                    if verdict == "stop":
                        return f"{node.name}: {message}"
        return ""

    def _write(self, status: RunStatus, message: str) -> RunResult:
        run = RunResult(
            run_id=self.run_id,
            pipeline=self.pipeline.name,
            engine=self.engine,
            status=status,
            results=self.results,
            inputs=self.inputs,
            outputs={
                f"{name}.{output}": f"{result.place}/{output}"
                for name, result in self.results.items()
                if result.status == "succeeded"
                for output in result.outputs
            },
            message=message,
            seconds=round(time.time() - self._began, 6),
            by=self.by,
        )
        write_whole(self.folder / "run.json", encode(run))
        return read_run(self.folder / "run.json")


def account() -> str:
    """The operating system's user, by what the system says and not by what a variable does; its number, where it has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _bind(pipeline: Pipeline, inputs: dict[str, Path]) -> dict[str, Path]:
    known = {given.name for given in pipeline.inputs}
    if unknown := sorted(set(inputs) - known):
        raise DefinitionError(
            f"pipeline {pipeline.name} has no input {unknown[0]!r}", expected=", ".join(sorted(known)) or "none"
        )
    for given in pipeline.inputs:
        if given.name not in inputs and not given.optional:
            raise DefinitionError(
                f"pipeline {pipeline.name} needs the input {given.name!r}", expected=f"a {given.kind} artifact"
            )
        if given.name in inputs and (kind := open_artifact(inputs[given.name]).description.kind) != given.kind:
            raise DefinitionError(
                f"input {given.name!r} of {pipeline.name} is of another kind", expected=given.kind, got=kind
            )
    return inputs


def _new_id() -> str:
    """Ids sort as runs began: the newest run is looked for by its id, and two may begin within one second."""
    now_us = time.time_ns() // 1000
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now_us // 10**6))}-{now_us % 10**6:05x}{secrets.token_hex(1)}"


def _relative(path: Path, home: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(home) if path.is_relative_to(home) else path)

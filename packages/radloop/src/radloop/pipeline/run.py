"""Walk a pipeline on this machine: order, gates, cache, records and the lock. How one stage runs is the engine's.

    runs/ID/run.json                        the run: pipeline, status, what each stage's status was
    runs/ID/events.jsonl                    started, log and closed lines of all stages
    runs/ID/STAGE/{request,result}.json     what each stage was asked and how it ended
    artifacts/KEY/{OUTPUT/,result.json}     a stage's outputs under its cache key, made visible by one rename

A run that is killed is resumed by starting the pipeline again: what was committed is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import msgspec

from radloop.artifact import Artifact, Each, Output, Verdict, commit, open_artifact
from radloop.errors import ArtifactError, DefinitionError, RunLocked
from radloop.pipeline import Node, Pipeline
from radloop.pipeline.keys import key
from radloop.stage.execute import Emit, read_verdict
from radloop.stage.launch import end_all, write_whole
from radloop.stage.protocol import Event, Request, Result, Status, encode

_WORST: tuple[Status, ...] = ("failed", "stopped", "waiting", "succeeded")


class Executor(Protocol):
    """How an engine runs one stage."""

    def external(self, node: Node) -> bool:
        """Whether the stage runs in a process of its own, and so beside others."""

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        """Run it; `folder` is the stage's record."""


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a pipeline ended.

    Attributes:
        status: failed, stopped by a gate, waiting for a person, or succeeded.
        results: by stage; a stage that was never reached is absent.
        outputs: committed artifact directory by `stage.output`.
        message: why it did not succeed.
    """

    run_id: str
    pipeline: str
    status: Status
    results: dict[str, Result]
    outputs: dict[str, str]
    message: str = ""
    seconds: float = 0.0

    def output(self, source: str) -> Artifact[Any]:
        """Open an output by `stage.output`."""
        if source not in self.outputs:
            raise ArtifactError(
                f"run {self.run_id} has no output {source!r}", expected=", ".join(self.outputs) or "none", got=source
            )
        return open_artifact(Path(self.outputs[source]))


def walk(
    pipeline: Pipeline,
    execute: Executor,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    emit: Emit = lambda event: None,
    environment_digests: Mapping[str, str] | None = None,
) -> RunResult:
    """Run a pipeline's stages in order, those in other processes beside the rest.

    Args:
        pipeline: what to run.
        execute: how the engine runs one stage.
        home: the project's home directory; runs/ and artifacts/ are made in it.
        inputs: artifact directory of each pipeline input; optional ones may be absent.
        emit: receives every event.
        environment_digests: digest of the lock of each environment, part of its stages' keys.

    Raises:
        RunLocked: another run of this pipeline is under way; names it.
        DefinitionError: a pipeline input is missing or unknown.
    """
    run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)
    home = home.resolve()
    with _locked(home, pipeline.name, run_id):
        _sweep(home / "artifacts")
        return _Walk(pipeline, execute, home, run_id, emit, dict(environment_digests or {})).run(dict(inputs or {}))


class _Walk:
    def __init__(
        self,
        pipeline: Pipeline,
        execute: Executor,
        home: Path,
        run_id: str,
        emit: Emit,
        environment_digests: dict[str, str],
    ) -> None:
        self.pipeline, self.execute, self.home, self.run_id = pipeline, execute, home, run_id
        self.environment_digests = environment_digests
        self.artifacts, self.folder = home / "artifacts", home / "runs" / run_id
        self.folder.mkdir(parents=True)
        self.artifacts.mkdir(exist_ok=True)
        self._watch, self._lock = emit, threading.Lock()
        self.results: dict[str, Result] = {}
        self.paths: dict[str, Path | None] = {}
        self.made: dict[tuple[str, str | None], Path] = {}

    def run(self, inputs: dict[str, Path | None]) -> RunResult:
        began = time.perf_counter()
        self._bind(inputs)
        self._record("running", began)
        with (self.folder / "events.jsonl").open("ab", buffering=0) as self._events:
            self._walk()
        status, message = self._outcome()
        return self._record(status, began, message)

    def _bind(self, inputs: dict[str, Path | None]) -> None:
        for given in self.pipeline.inputs:
            path = inputs.pop(given.name, None)
            if path is None and not given.optional:
                raise DefinitionError(
                    f"pipeline {self.pipeline.name} needs the input {given.name!r}", expected=f"a {given.kind} artifact"
                )
            if path is not None and (kind := open_artifact(path).description.kind) != given.kind:
                raise DefinitionError(
                    f"input {given.name!r} of {self.pipeline.name} is of another kind", expected=given.kind, got=kind
                )
            self.paths[f"input:{given.name}"] = path
        if inputs:
            known = ", ".join(i.name for i in self.pipeline.inputs) or "none"
            raise DefinitionError(f"pipeline {self.pipeline.name} has no input {sorted(inputs)[0]!r}", expected=known)

    def _walk(self) -> None:
        pending = list(self.pipeline.nodes)
        running: dict[Future[Result], Node] = {}
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            try:
                self._run_ready(pool, pending, running)
            except BaseException:
                # Before the pool waits for its threads; again and again, for one may be about to start its process.
                while any(not (future.cancel() or future.done()) for future in running):
                    end_all()
                    wait(running, timeout=0.1)
                raise

    def _run_ready(self, pool: ThreadPoolExecutor, pending: list[Node], running: dict[Future[Result], Node]) -> None:
        """Start what can run, one stage in this process at a time, until nothing is left that can."""
        while True:
            ready = [n for n in pending if all(self._succeeded(need) for need in n.needs())]
            for node in [n for n in ready if self.execute.external(n)]:
                pending.remove(node)
                running[pool.submit(self._node, node)] = node
            here = next((n for n in ready if not self.execute.external(n)), None)
            if here is not None:
                pending.remove(here)
                self.results[here.name] = self._node(here)
            elif running:
                wait(running, return_when=FIRST_COMPLETED)
            else:
                return
            for future in [f for f in running if f.done()]:
                self.results[running.pop(future).name] = future.result()

    def _succeeded(self, name: str) -> bool:
        return name in self.results and self.results[name].status == "succeeded"

    def _node(self, node: Node) -> Result:
        result = self._mapped(node) if node.map else self._single(node, self.folder / node.name, None)
        if result.status == "succeeded":
            self.paths.update({f"{node.name}.{name}": self.made[node.name, None] / name for name in node.outputs})
        return result

    def _single(self, node: Node, record: Path, item: str | None) -> Result:
        """Run a node once (for one item, if it is mapped), or find what an earlier run committed under its key."""
        record.mkdir(parents=True)
        sources = {name: self.paths[source] for name, source in node.inputs.items()}
        gates = [str(self.paths[gate]) for gate in node.gates]
        digests = {name: open_artifact(path).digest if path else None for name, path in sources.items()}
        # With the verdicts in the key, what ran once under them needs not ask again.
        digests |= {
            f"gate {source}": open_artifact(Path(gate)).digest for source, gate in zip(node.gates, gates, strict=True)
        }
        lock = self.environment_digests.get(node.environment, "")
        final = self.artifacts / key(node, digests, lock, item)
        request = Request(
            stage=node.stage,
            node=node.name,
            run_id=self.run_id,
            params={**node.params, node.map.param: item} if node.map else node.params,
            inputs={name: str(path) if path else None for name, path in sources.items()},
            gates=tuple(gates),
            approval=node.approval,
            home=str(self.home),
        )
        if node.cache and (result := _cached(final)) is not None:
            self._emit(Event(event="closed", node=node.name, at=time.time(), status="succeeded", message="unchanged"))
        else:
            result, final = self._try(node, request, record, final)
        write_whole(record / "request.json", encode(request))
        write_whole(record / "result.json", encode(result))
        self.made[node.name, item] = final
        return result

    def _try(self, node: Node, request: Request, record: Path, final: Path) -> tuple[Result, Path]:
        scratch = self.artifacts / f".{final.name}.{os.getpid()}"
        for attempt in range(1, node.retries + 2):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            outputs = {name: str(scratch / name) for name in node.outputs}
            asked = msgspec.structs.replace(request, outputs=outputs, attempt=attempt)
            result = self.execute(node, asked, record, self._emit)
            if result.status != "failed":
                break
            shutil.rmtree(scratch, ignore_errors=True)
            if attempt <= node.retries:
                self._emit(Event(event="log", node=node.name, at=time.time(), message=f"try {attempt} failed; again"))
        if result.status == "succeeded":
            final = self._publish(node, result, scratch, final)
        shutil.rmtree(scratch, ignore_errors=True)
        return result, final

    def _publish(self, node: Node, result: Result, scratch: Path, final: Path) -> Path:
        """Make a stage's outputs visible at once. One that always runs is filed under what it made."""
        if not node.cache:
            made = encode({"stage": node.stage, "outputs": {n: d.digest for n, d in result.outputs.items()}})
            final = self.artifacts / hashlib.sha256(made).hexdigest()
        (scratch / "result.json").write_bytes(encode(result))
        if _cached(final) is None:
            shutil.rmtree(final, ignore_errors=True)
            os.rename(scratch, final)
        return final

    def _mapped(self, node: Node) -> Result:
        """Run a node for each item and collect the outputs."""
        assert node.map is not None
        over = self.paths[node.map.over]
        assert over is not None
        items = msgspec.json.decode((over / "items.json").read_bytes(), type=list[str])
        results = []
        for index, item in enumerate(items):
            results.append(result := self._single(node, self.folder / node.name / f"{index:04d}", item))
            if result.status != "succeeded":
                return result
        final = self.artifacts / hashlib.sha256(encode([self.made[node.name, i].name for i in items])).hexdigest()
        scratch = self.artifacts / f".{final.name}.{os.getpid()}"
        outputs = {}
        for name in node.outputs:
            folder = scratch / name
            folder.mkdir(parents=True)
            for index, item in enumerate(items):
                shutil.copytree(self.made[node.name, item] / name, folder / f"{index:04d}", copy_function=os.link)
            out: Output[Each[Any]] = Output(folder)
            out.write_json("items.json", [f"{index:04d}" for index in range(len(items))])
            collected = commit(folder, scratch / f"{name}.done", Each, {"items": len(items)})
            os.rename(scratch / f"{name}.done", folder)
            outputs[name] = collected.description
        cached = all(r.cached for r in results) and bool(results)
        seconds = sum(r.seconds for r in results)
        result = Result(status="succeeded", node=node.name, outputs=outputs, seconds=seconds, cached=cached)
        self.made[node.name, None] = self._publish(msgspec.structs.replace(node, cache=True), result, scratch, final)
        shutil.rmtree(scratch, ignore_errors=True)
        write_whole(self.folder / node.name / "result.json", encode(result))
        return result

    def _emit(self, event: Event) -> None:
        with self._lock:
            if event.event != "progress":
                self._events.write(encode(event) + b"\n")
            self._watch(event)

    def _outcome(self) -> tuple[Status, str]:
        for status in _WORST[:-1]:
            for name, result in self.results.items():
                if result.status == status:
                    return status, f"{name}: {result.message}"
            if status == "stopped":
                for source, path in self.paths.items():
                    if path and open_artifact(path).description.kind == Verdict.name and ":" not in source:
                        verdict, message = read_verdict(open_artifact(path))
                        if verdict == "stop":
                            return "stopped", f"{source.split('.')[0]}: {message}"
        return "succeeded", ""

    def _record(self, status: Status | str, began: float, message: str = "") -> RunResult:
        run = RunResult(
            run_id=self.run_id,
            pipeline=self.pipeline.name,
            status=status,  # type: ignore[arg-type]  # "running" is only ever on disk
            results=self.results,
            outputs={s: str(p) for s, p in self.paths.items() if p and not s.startswith("input:")},
            message=message,
            seconds=round(time.perf_counter() - began, 6),
        )
        write_whole(self.folder / "run.json", encode(run))
        return run


def _cached(final: Path) -> Result | None:
    try:
        result = msgspec.json.decode((final / "result.json").read_bytes(), type=Result)
    except (OSError, msgspec.MsgspecError):
        return None
    return msgspec.structs.replace(result, cached=True, seconds=0.0)


@contextlib.contextmanager
def _locked(home: Path, pipeline: str, run_id: str) -> Iterator[None]:
    """Hold the pipeline's lock; the kernel drops it with the process, however that ends."""
    runs = home / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f".{pipeline}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "just starting"
            raise RunLocked(
                f"pipeline {pipeline!r} is already running",
                got=holder,
                next_step="wait for it to end (radloop status), or end that process",
            ) from None
        lock.truncate(0)
        lock.write(f"run {run_id}, process {os.getpid()}\n")
        lock.flush()
        yield
        lock.truncate(0)


def _sweep(artifacts: Path) -> None:
    """Remove what runs that were killed left half-written."""
    for scratch in artifacts.glob(".*"):
        pid = scratch.name.rpartition(".")[2]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            shutil.rmtree(scratch, ignore_errors=True)

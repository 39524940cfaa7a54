"""Run a pipeline's stages: one by itself, as an orchestrator's worker does, or all of them in order on this machine.

A run that is killed is resumed by starting the pipeline again: what was committed is not made again.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from radloop.errors import RunLocked, SettingsError
from radloop.pipeline import Node, Pipeline
from radloop.pipeline.records import Record, RunResult
from radloop.stage.execute import Emit
from radloop.stage.launch import end_all, launch
from radloop.stage.lock import hold
from radloop.stage.protocol import Event, Request, Result
from radloop.stage.store import sweep


class Executor(Protocol):
    """How an engine runs one stage."""

    name: str

    def external(self, node: Node) -> bool:
        """Whether the stage runs in a process of its own, and so beside others."""

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        """Run it; `folder` is the stage's record."""

    def end(self) -> None:
        """End what runs now, for Ctrl-C; called again until all have ended."""


class Launcher:
    """Runs each stage by `radloop stage` under the Python of its environment; approvals are read there."""

    name = "subprocess"

    def __init__(self, environments: Mapping[str, str], core: str = sys.executable) -> None:
        self.environments = {"core": core, **environments}

    def external(self, node: Node) -> bool:
        """Always."""
        return True

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        """Run it. Raises SettingsError where its environment is not there."""
        return launch(request, folder, emit, python=self.python(node.environment), timeout_s=node.timeout_s)

    def end(self) -> None:
        """End the stages' processes."""
        end_all()

    def python(self, environment: str) -> str:
        """The interpreter of a named environment. Raises SettingsError naming what sets it up."""
        python = self.environments.get(environment)
        if python is None or not Path(python).exists():
            raise SettingsError(
                f"the environment {environment!r} is not there",
                expected=f"[environments] {environment} = a Python interpreter that exists",
                got=python or "no such setting",
                next_step="radloop setup",
            )
        return python


def run_node(
    record: Record, node: Node, index: int | None, execute: Executor, emit: Emit, *, attempt: int = 1, attempts: int = 1
) -> Result:
    """Run one stage of a run, and leave its request and result in the record.

    Args:
        record: the run, with what the stages before have left.
        node: which stage.
        index: which item, of a mapped one.
        execute: how.
        emit: receives its events.
        attempt: the number of the first try.
        attempts: how many tries, where nobody else tries again.
    """
    folder = record.folder_of(node, index)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(attempt, attempt + attempts):
        request = record.request(node, index, attempt=number)
        result = execute(node, request, folder, emit)
        if result.status != "failed":
            break
        if number < attempt + attempts - 1:
            emit(Event(event="log", node=node.name, at=time.time(), message=f"try {number} failed; again"))
    record.keep(node, index, request, result)
    return result


def walk(
    pipeline: Pipeline,
    execute: Executor,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    emit: Emit = lambda event: None,
) -> RunResult:
    """Run a pipeline's stages in order, those in other processes beside the rest.

    Args:
        pipeline: what to run.
        execute: how the engine runs one stage.
        home: the project's home directory; runs/ and artifacts/ are made in it.
        inputs: artifact directory of each pipeline input; optional ones may be absent.
        emit: receives every event.

    Raises:
        RunLocked: another run of this pipeline is under way; names it.
        DefinitionError: a pipeline input is missing or unknown.
    """
    record = Record.open(pipeline, home, inputs, engine=execute.name)
    try:
        with hold(record.home, pipeline.name, record.run_id):
            sweep(record.home)
            return _Walk(record, execute, emit).run()
    except RunLocked:
        shutil.rmtree(record.folder)
        raise


class _Walk:
    def __init__(self, record: Record, execute: Executor, emit: Emit) -> None:
        self.record, self.execute, self._lock = record, execute, threading.Lock()
        self._keep = record.emitter(emit)
        self.ended: set[str] = set()

    def run(self) -> RunResult:
        pending = list(self.record.pipeline.nodes)
        running: dict[Future[bool], Node] = {}
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            try:
                self._run_ready(pool, pending, running)
            except BaseException:
                # Before the pool waits for its threads; again and again, for one may be about to start its process.
                while any(not (future.cancel() or future.done()) for future in running):
                    self.execute.end()
                    wait(running, timeout=0.1)
                raise
        return self.record.close()

    def _run_ready(self, pool: ThreadPoolExecutor, pending: list[Node], running: dict[Future[bool], Node]) -> None:
        """Start what can run, one stage in this process at a time, until nothing is left that can."""
        while True:
            ready = [n for n in pending if n.needs() <= self.ended]
            for node in [n for n in ready if self.execute.external(n)]:
                pending.remove(node)
                running[pool.submit(self._node, node)] = node
            here = next((n for n in ready if not self.execute.external(n)), None)
            if here is not None:
                pending.remove(here)
                self._end(here, self._node(here))
            elif running:
                wait(running, return_when=FIRST_COMPLETED)
            else:
                return
            for future in [f for f in running if f.done()]:
                self._end(running.pop(future), future.result())

    def _end(self, node: Node, succeeded: bool) -> None:
        if succeeded:
            self.ended.add(node.name)

    def _node(self, node: Node) -> bool:
        """Run a node, a mapped one once for each of its items; whether all succeeded."""
        indices = range(len(self.record.items(node))) if node.map else (None,)
        tries = node.retries + 1
        return all(
            run_node(self.record, node, index, self.execute, self._emit, attempts=tries).status == "succeeded"
            for index in indices
        )

    def _emit(self, event: Event) -> None:
        with self._lock:
            self._keep(event)

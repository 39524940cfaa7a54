"""The `kubeflow` engine: Kubeflow Pipelines 2.17. It compiles pipelines and components for a cluster, and runs them here.

task.py          what runs inside a task
components.py    a component for each stage, its Python generated
compiler.py      gates as conditions, mapped stages as loops, secrets as references, the exit handler
__main__.py      the process that kfp.local runs in
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from radloop.engines.kubeflow.compiler import Cluster, export, nest
from radloop.errors import EngineError, RunLocked, SettingsError
from radloop.pipeline import Pipeline
from radloop.pipeline.records import Record, RunResult
from radloop.pipeline.run import Launcher
from radloop.stage.execute import Emit
from radloop.stage.launch import end_group
from radloop.stage.lock import hold
from radloop.stage.protocol import Event
from radloop.stage.store import sweep

__all__ = ["Cluster", "check", "export", "run"]

_LOOK_EVERY_S = 0.05
_TAIL_LINES = 30
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def check() -> None:
    """Raises SettingsError, naming what installs it, where kfp is not there."""
    if importlib.util.find_spec("kfp") is None or importlib.util.find_spec("kfp.kubernetes") is None:
        raise SettingsError(
            "the engine 'kubeflow' needs kfp, which is not installed here",
            expected="kfp 2.17 and kfp-kubernetes in the environment that runs radloop",
            next_step="pip install 'radloop[kubeflow]'",
        )


def run(
    pipeline: Pipeline,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    environments: Mapping[str, str] | None = None,
    emit: Emit = lambda event: None,
) -> RunResult:
    """Compile a pipeline and run it on this machine, each stage as a task of kfp.local's SubprocessRunner.

    KFP's own log is kept in `runs/ID/kfp.log`.

    Raises:
        SettingsError: kfp or an environment is not there.
        UnsupportedByEngine: KFP cannot do what the pipeline asks.
        RunLocked, DefinitionError: as `Record.open`.
        EngineError: kfp itself failed.
    """
    check()
    nest(pipeline)
    launcher = Launcher(environments or {})
    pythons = {node.environment: launcher.python(node.environment) for node in pipeline.nodes}
    record = Record.open(pipeline, home, inputs, engine="kubeflow")
    try:
        with hold(record.home, pipeline.name, record.run_id):
            sweep(record.home)
            with _followed(record, emit):
                code = _helper.run(record, pythons)
            sweep(record.home)
            shutil.rmtree(record.folder / "kfp", ignore_errors=True)  # links to what is in artifacts/
    except RunLocked:
        shutil.rmtree(record.folder)
        raise
    ended = Record.load(record.home, record.run_id).close()
    if ended.status == "failed" and (code or "never run" in ended.message):
        raise EngineError(
            f"Kubeflow Pipelines failed ({ended.message})",
            got=_why(record),
            next_step=f"see {record.folder / 'kfp.log'}",
        )
    return ended


class _Helper:
    """The process that kfp.local runs in, one run at a time; started for the first run, and there until this process ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self, record: Record, pythons: Mapping[str, str]) -> int:
        """Have a run's pipeline run by kfp.local; 0 unless kfp itself failed. Raises EngineError if the process was killed."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            # Secrets travel by this pipe, never by a file or an argument.
            here = {"cwd": str(Path.cwd()), "env": dict(os.environ)}
            asked = {"home": str(record.home), "run_id": record.run_id, "pythons": dict(pythons), **here}
            try:
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:
                self.end()
                raise
            if not answer:
                self.end()
                raise EngineError("the process that runs kfp was killed", next_step=f"see {record.folder / 'kfp.log'}")
            return int(answer)

    def end(self) -> None:
        """End it, and what it runs."""
        if self._process is not None:
            end_group(self._process)
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "radloop.engines.kubeflow"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
            atexit.register(self.end)
        return self._process


_helper = _Helper()


@contextlib.contextmanager
def _followed(record: Record, emit: Emit) -> Iterator[None]:
    """Pass events on as the tasks write them into the run's record."""
    ended = threading.Event()

    def follow() -> None:
        rest, at = b"", 0
        while True:
            last = ended.is_set()
            with contextlib.suppress(FileNotFoundError), (record.folder / "events.jsonl").open("rb") as f:
                f.seek(at)
                read = f.read()
                at += len(read)
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    emit(msgspec.json.decode(line, type=Event))
            if last:
                return
            ended.wait(_LOOK_EVERY_S)

    thread = threading.Thread(target=follow, name="kubeflow-events")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _why(record: Record) -> str:
    """What the last task that raised said, out of KFP's log; else the log's end."""
    log = _COLOUR.sub("", (record.folder / "kfp.log").read_text(errors="replace"))
    _, raised, block = log.rpartition("Traceback (most recent call last):\n")
    if not raised:
        return "\n".join(log.strip().splitlines()[-_TAIL_LINES:])
    lines = textwrap.dedent(block.partition("\n\n")[0]).splitlines()
    return "\n".join(itertools.dropwhile(lambda line: line.startswith(" "), lines)).strip()

"""The `kubeflow` engine: Kubeflow Pipelines 2.17. It compiles pipelines and components for a cluster, and runs them here.

task.py          what runs inside a task
components.py    a component for each stage, its Python generated
compiler.py      gates as conditions, mapped stages as loops, secrets as references, the exit handler
__main__.py      the process that kfp.local runs in
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
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
                code = _kfp(record, pythons)
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


def _kfp(record: Record, pythons: dict[str, str]) -> int:
    """Run kfp.local in a process of its own, and of its own group, that ends with this one; its exit code."""
    command = [sys.executable, "-m", "radloop.engines.kubeflow", str(record.home), record.run_id, json.dumps(pythons)]
    with (record.folder / "kfp.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:
            end_group(process)
            raise


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

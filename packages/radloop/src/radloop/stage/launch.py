"""Run a stage in a process of its own: `radloop stage NAME --request R --result S`, and both ends of its event stream."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec

from radloop.errors import DefinitionError
from radloop.stage.execute import Approved, Emit, execute
from radloop.stage.forked import Forked
from radloop.stage.protocol import EXIT, SPEC_VERSION, STATUS, Event, Request, Result, encode
from radloop.stage.store import sweep

_TAIL_LINES = 30
Process = subprocess.Popen[bytes] | Forked
_live: set[Process] = set()


def serve_request(request_file: Path, result_file: Path, approved: Approved) -> int:
    """The inner end: run the request, write the result whole, stream events on stdout, return the exit code.

    Whatever the stage or a native library prints goes to stderr, so that the event stream holds events only.
    """
    die_with_parent()
    stream = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        with contextlib.suppress(BrokenPipeError):  # the watcher is gone; the result file still tells
            stream.write(encode(event) + b"\n")

    result = execute(read_request(request_file), emit, approved)
    sys.stdout.flush()
    result_file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(result_file, encode(result))
    return EXIT[result.status]


def read_request(path: Path) -> Request:
    """Decode a request. Raises DefinitionError for unreadable JSON or a newer version, naming both versions."""
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=dict[str, object]).get("spec_version", SPEC_VERSION)
        if not isinstance(version, int) or version > SPEC_VERSION:
            raise DefinitionError(
                "the request is of a version this radloop does not know",
                expected=f"spec_version {SPEC_VERSION}",
                got=f"spec_version {version}",
                next_step="upgrade radloop in this environment",
            )
        return msgspec.json.decode(data, type=Request)
    except (OSError, msgspec.MsgspecError) as error:
        raise DefinitionError("the request cannot be read", expected="a stage request", got=str(error)) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def launch(
    request: Request,
    folder: Path,
    emit: Emit,
    *,
    python: str | None,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Result:
    """The outer end: run a request under another Python and return its result.

    Args:
        request: the stage to run.
        folder: where request.json, result.json and stderr.log are kept.
        emit: receives the stage's events as they come.
        python: interpreter of the environment that holds radloop and the stage's needs; None for a fork of this process,
            which must have no other thread: it saves the start of a Python.
        timeout_s: seconds after which the process group is ended.
        env: variables added to this process's environment; the way secrets travel.

    A process that ends without its closing event, or whose result cannot be read, has failed, even on exit 0; then
    result.json says so.
    """
    began = time.perf_counter()
    try:
        result = _launch(request, folder, emit, python=python, timeout_s=timeout_s, env=env)
    except OSError as error:  # a full disk, most often
        result = _failed(request, f"the stage's record cannot be written: {error}", began)
    if result.status == "failed":
        sweep(Path(request.home))
        with contextlib.suppress(OSError):
            write_whole(folder / "result.json", encode(result))
    return result


def _launch(
    request: Request,
    folder: Path,
    emit: Emit,
    *,
    python: str | None,
    timeout_s: float | None,
    env: Mapping[str, str] | None,
) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    request_file, result_file = folder / "request.json", folder / "result.json"
    write_whole(request_file, encode(request))
    result_file.unlink(missing_ok=True)
    command = ["stage", request.stage, "--request", str(request_file), "--result", str(result_file)]
    began = time.perf_counter()
    with (folder / "stderr.log").open("wb") as errors:
        try:
            process = _start(python, command, errors, env or {})
        except OSError as error:
            return _failed(request, f"{python or 'a fork'} cannot be started: {error}", began)
        _live.add(process)
        try:
            closed = _follow(process, emit, timeout_s)
        finally:
            _live.discard(process)
    if closed is None:
        return _failed(request, _why(process, folder, timeout_s, began), began)
    try:
        result = msgspec.json.decode(result_file.read_bytes(), type=Result)
    except (OSError, msgspec.MsgspecError) as error:
        return _failed(request, f"the stage closed but left no readable result: {error}", began)
    if result.status != STATUS.get(process.wait(), "failed") or result.status != closed.status:
        told = f"exit {process.returncode}, event {closed.status}, result {result.status}"
        return _failed(request, f"the stage's exit, closing event and result disagree: {told}", began)
    return result


def _start(python: str | None, command: list[str], errors: IO[bytes], env: Mapping[str, str]) -> Process:
    if python is None:
        return Forked(command, errors, env)
    return subprocess.Popen(
        [python, "-m", "radloop.cli", *command],
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        env={**os.environ, **env},
    )


def _follow(process: Process, emit: Emit, timeout_s: float | None) -> Event | None:
    """Pass events on until the process ends; the closing event, or None."""
    timer = threading.Timer(timeout_s, end_group, [process]) if timeout_s else None
    if timer:
        timer.start()
    closed: Event | None = None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            try:
                event = msgspec.json.decode(line, type=Event)
            except msgspec.MsgspecError:  # not ours: shown, never taken for an event
                event = Event(event="log", message=line.decode(errors="replace").rstrip()[:500])
            if event.event == "closed":
                closed = event
            emit(event)
        process.wait()
    except BaseException:
        end_group(process)
        raise
    finally:
        if timer:
            timer.cancel()
        process.stdout.close()
    return closed


def end_group(process: Process, grace_s: float = 3.0) -> None:
    """End a process and what it started: SIGTERM, then SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None and sign is signal.SIGTERM:
            continue
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            return
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            continue


def end_all() -> None:
    """End every stage process this process has started and not yet seen end; for Ctrl-C."""
    for process in list(_live):
        end_group(process)


def die_with_parent() -> None:
    """Ask Linux to end this process when the engine that started it is gone, however it went."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _why(process: Process, folder: Path, timeout_s: float | None, began: float) -> str:
    if timeout_s and time.perf_counter() - began >= timeout_s:
        return f"the stage was ended after its limit of {timeout_s:g} s"
    code = process.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited {code} without its closing event"
    with (folder / "stderr.log").open(errors="replace") as f:
        tail = "".join(deque(f, _TAIL_LINES)).strip()
    return f"the stage's process {how}" + (f"; the end of its stderr:\n{tail}" if tail else "")


def _failed(request: Request, message: str, began: float) -> Result:
    seconds = round(time.perf_counter() - began, 6)
    return Result(status="failed", node=request.node, message=message, error="EngineError", seconds=seconds)

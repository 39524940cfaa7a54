"""One run of a pipeline at a time: `runs/.PIPELINE.lock`, held by every process that works for the run.

Stages of one run share it, on whatever engine; those of another run are refused with the name of the first. The kernel
drops a process's share when it ends, however it ends. Between two stages of a run that an orchestrator schedules nobody holds
it: what is refused is working at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from radloop.errors import RunLocked

_SHARE_S = 2.0


@contextlib.contextmanager
def hold(home: Path, pipeline: str, run_id: str) -> Iterator[None]:
    """Hold a pipeline for a run.

    Raises:
        RunLocked: another run works on it; names that run, its process and host.
    """
    runs = home / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f".{pipeline}.lock").open("a+") as lock:
        if _take(lock, fcntl.LOCK_EX):
            lock.truncate(0)
            lock.write(f"run {run_id}, process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        until = time.monotonic() + _SHARE_S
        while not (shared := _take(lock, fcntl.LOCK_SH)) and time.monotonic() < until:
            time.sleep(0.01)  # its first holder is just writing its name
        holder = _read(lock)
        if not shared or f"run {run_id}," not in holder:
            raise RunLocked(
                f"pipeline {pipeline!r} is already running",
                got=holder or "a run that is just starting",
                next_step="wait for it to end (radloop status), or end that process",
            )
        yield


def holder(home: Path, pipeline: str) -> str:
    """What the lock says of the run that works on a pipeline now; empty if none does."""
    try:
        with (home / "runs" / f".{pipeline}.lock").open("r+") as lock:
            return "" if _take(lock, fcntl.LOCK_EX) else _read(lock)
    except OSError:
        return ""


def _take(lock: IO[str], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip()

"""Servers in the foreground: they say where they listen, and end cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from radloop.settings import secret


@contextmanager
def ending_with(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGINT and SIGTERM instead of dying; a second signal, if that hangs, ends the process."""
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, before[number])
        stop()

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, handle)
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextmanager
def announced(path: Path | None, host: str, port: int, more: Mapping[str, int] | None = None) -> Iterator[None]:
    """Keep a file `{"host", "port", "pid"}`, and more ports if there are, where a script waits for it, from now until the server
    ends; whole or not there.
    """
    if path is None:
        yield
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(msgspec.json.encode({"host": host, "port": port, "pid": os.getpid(), **(more or {})}) + b"\n")
    os.replace(scratch, path)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


@contextmanager
def secret_file(reference: str, project: Path) -> Iterator[Path]:
    """A file of mode 0600 that holds a secret, for a child process that takes a path, for as long as this one runs.

    For a `file:` reference it is that file. The value of an `env:` reference stands in memory (/dev/shm) where there is such
    a place: a key kept out of the file system must not be left there by us.
    """
    value = secret(reference, project)
    if reference.startswith("file:"):
        yield project / reference.removeprefix("file:")
        return
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it, 0700
    with tempfile.TemporaryDirectory(prefix="radloop-", dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder, "secret")
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(value)
        yield path

"""The artifact store of a project: what stages made, under the keys of what they were made from.

    artifacts/KEY/{OUTPUT/,result.json}     a stage's outputs, made visible by one rename
    artifacts/.KEY.XXXX                     one being written; locked by its writer, swept away when that has died

The lock is the kernel's (flock on the directory), so a writer in another container, or on another host of a file system
that knows locks, is not taken for dead because its process id means nothing here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from radloop.stage.protocol import Result, encode

_FOLDER, _RESULT = "artifacts", "result.json"


def find(home: Path, key: str) -> Result | None:
    """The result that stands under a key; None where there is none, or half of one."""
    try:
        return msgspec.json.decode((home / _FOLDER / key / _RESULT).read_bytes(), type=Result)
    except (OSError, msgspec.MsgspecError):
        return None


@contextlib.contextmanager
def writing(home: Path, key: str) -> Iterator[Path]:
    """A locked directory to write a stage's outputs into. What was not published from it is removed at the end."""
    store = home / _FOLDER
    store.mkdir(parents=True, exist_ok=True)
    while True:
        folder = store / f".{key}.{secrets.token_hex(4)}"
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():  # a sweeper may have found it before it was locked
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def publish(home: Path, folder: Path, key: str, result: Result) -> Result:
    """Make a written directory visible under its key by one rename; the result, with its place.

    Where another process was quicker, what it made stays: equal keys have equal contents.
    """
    result = msgspec.structs.replace(result, place=f"{_FOLDER}/{key}")
    (folder / _RESULT).write_bytes(encode(result))
    final = home / _FOLDER / key
    while True:
        try:
            os.rename(folder, final)
            return result
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (known := find(home, key)) is not None:
            return known
        with contextlib.suppress(FileNotFoundError):  # half of one, from when the power went
            os.rename(final, broken := final.with_name(f".{key}.broken{secrets.token_hex(4)}"))
            shutil.rmtree(broken, ignore_errors=True)


def key_of_made(stage: str, result: Result) -> str:
    """The key of what a stage made that looks at the world: the digests of its outputs, for its inputs do not tell."""
    made = {"stage": stage, "outputs": {name: made.digest for name, made in result.outputs.items()}}
    return hashlib.sha256(encode(made)).hexdigest()


def sweep(home: Path) -> None:
    """Remove what killed stages left half-written."""
    for folder in (home / _FOLDER).glob(".*"):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer lives
        finally:
            os.close(handle)

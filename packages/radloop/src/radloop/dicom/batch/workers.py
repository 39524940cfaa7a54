"""One file after the other, in this process or in several."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec

from radloop.dicom.batch.journal import Entry, Tally
from radloop.dicom.burned_in import Mode, Pixels
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.deidentify.face_cleaner import FaceCleaner
from radloop.dicom.profile import chosen
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError, EngineError

AHEAD = 4
"""Chunks a worker that may be under way: bounds the memory, whatever the number of files."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file is full."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How to clean. Two runs with equal recipes and sources have equal outputs, byte for byte."""

    key: bytes
    profile: str = "research"
    options: tuple[str, ...] = ()
    pixels: Mode = "clean"
    pixel_rules: tuple[dict[str, Any], ...] = ()
    site: str = "local"
    face_cleaner: FaceCleaner | None = None

    def __repr__(self) -> str:
        return f"Recipe({self.profile!r}, {self.options!r}, {self.pixels!r}, {self.site!r})"

    def deidentifier(self) -> Deidentifier:
        """What cleans by it. Raises SettingsError: a key, profile, option or rule that is none; no text recognition."""
        who = Pseudonymiser(self.key)
        pixels = Pixels(self.pixels, self.pixel_rules, draw=who.fraction)
        profile = chosen(self.profile, self.options)
        return Deidentifier(who, profile=profile, pixels=pixels, face_cleaner=self.face_cleaner)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One file to clean into `work`, unless what an earlier run made of it is still at `known_at`.

    `faceless`: the pixels that a face cleaner left of it; `refused`: reason and what was wrong, where it left none.
    """

    number: int
    source: str
    path: str
    work: str
    known: Entry | None = None
    known_at: str = ""
    faceless: str = ""
    refused: tuple[str, str] | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it: cleaned, kept (an earlier run's is there), refused, full (no space left).

    `pixels`: what `CleanedFile` says was decided about text in them; empty if nobody looked.
    """

    outcome: str
    file: str = ""
    sha256: str = ""
    tally: Tally = ()
    pixels: str = ""
    reason: str = ""
    what: str = ""


def results(
    chunks: Iterable[list[Task]], recipe: Recipe, deidentifier: Deidentifier, workers: int
) -> Iterator[tuple[list[Task], list[Done]]]:
    """Every chunk with its results, in order.

    Raises:
        EngineError: a worker died.
    """
    if workers <= 1:
        for tasks in chunks:
            yield tasks, clean_all(tasks, deidentifier, recipe.site)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (recipe,))
    under_way: deque[tuple[list[Task], Future[list[Done]]]] = deque()
    try:
        for tasks in chunks:
            under_way.append((tasks, pool.submit(_work, tasks)))
            if len(under_way) >= workers * AHEAD:
                yield _finished(under_way)
        while under_way:
            yield _finished(under_way)
    except BrokenProcessPool:
        raise EngineError(
            "a worker process died",
            expected=f"{workers} workers",
            got="one ended, perhaps for want of memory",
            next_step="the same command goes on where this one ended; with fewer --workers it takes less memory",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(under_way: deque[tuple[list[Task], Future[list[Done]]]]) -> tuple[list[Task], list[Done]]:
    tasks, future = under_way.popleft()
    return tasks, future.result()


_mine: list[tuple[Deidentifier, str]] = []


def _begin(recipe: Recipe) -> None:
    """In a worker: end with the parent, even one that is killed."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()
    _mine.append((recipe.deidentifier(), recipe.site))


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(tasks: list[Task]) -> list[Done]:
    return clean_all(tasks, *_mine[0])


def clean_all(tasks: list[Task], deidentifier: Deidentifier, site: str) -> list[Done]:
    """Each of the tasks. No file's fault is another's."""
    return [_one(task, deidentifier, site) for task in tasks]


def _one(task: Task, deidentifier: Deidentifier, site: str) -> Done:
    known = task.known
    if task.refused is not None:
        return Done(outcome="refused", reason=task.refused[0], what=task.refused[1])
    if known is not None and known.outcome == "refused":
        return Done(outcome="refused", reason=known.reason, what=known.what)
    if known is not None and digest(task.known_at) == known.sha256:
        return Done(outcome="kept", file=known.file, sha256=known.sha256, pixels=known.pixels)
    source = Path(task.path)
    tally: Counter[tuple[str, str]] = Counter()
    try:
        source.open("rb").close()
    except OSError as error:
        return Done(outcome="refused", reason="UNREADABLE", what=error.strerror or "the file cannot be read")
    try:
        faceless = Path(task.faceless) if task.faceless else None
        cleaned = deidentifier.clean_file(source, Path(task.work), site=site, tally=tally, faceless=faceless)
    except DicomError as error:
        return Done(outcome="refused", reason=error.reason, what=error.what)
    except OSError as error:
        if error.errno in FULL:
            return Done(outcome="full")
        if error.errno == errno.EIO:
            return Done(outcome="refused", reason="UNREADABLE", what="the file cannot be read")
        raise
    except Exception as error:  # noqa: BLE001 - one file that nobody foresaw must not cost a night's run; it is counted
        return Done(outcome="refused", reason="FAILED", what=f"{type(error).__name__} while it was cleaned")
    return Done(
        outcome="cleaned",
        file=f"{cleaned.patient}/{cleaned.study_uid}/{cleaned.series_uid}/{cleaned.sop_uid}.dcm",
        sha256=cleaned.file_sha256,
        pixels=cleaned.pixels,
        tally=tuple(sorted((path, action, count) for (path, action), count in tally.items())),
    )


def digest(path: str) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""

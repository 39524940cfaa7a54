"""A folder of DICOM files, de-identified into a folder of pseudonyms: `PATIENT/STUDY/SERIES/INSTANCE.dcm`.

A file appears at its place by one rename, what was refused is never copied, and a run that was killed goes on where it
was (`.radloop/journal.jsonl` in the target, see `journal`).
"""

from __future__ import annotations

import fcntl
import hmac
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import msgspec

from radloop.catalog.reason import Reason
from radloop.dicom.batch.faces import Faces
from radloop.dicom.batch.journal import Entry, Journal
from radloop.dicom.batch.workers import FULL, Done, Recipe, Task, digest, results
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.folder import list_files
from radloop.errors import DataError, DicomError, EngineError

__all__ = ["Files", "Recipe", "Summary", "clean_folder", "files_of"]

STATE = ".radloop"
NOT_LOOKED_AT = "copied, not looked at"
AGAIN = ("UNREADABLE", Reason.RECOGNIZABLE_FACE)
"""Refusals that are not remembered: what is wrong may be mended without changing the file."""
CHUNK = 16
"""Files that a worker takes at once."""
Progress = Callable[[int, int], None]


class Summary(msgspec.Struct, kw_only=True):
    """What became of a folder. Holds no name, no path and no original identifier."""

    files: int = 0
    skipped: int = 0
    """DICOMDIR: an index of the original file names, of no use for the output."""
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    """cleaned: now; kept: cleaned by an earlier run, and still there; same: a copy of one of these; refused."""
    reasons: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    """(reason, what was wrong)"""
    attributes: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    """(path without item numbers, action) of all that is in the output."""
    pixels: Counter[str] = msgspec.field(default_factory=Counter)
    """What was decided about text in the pixels."""
    refused: list[tuple[int, str]] = msgspec.field(default_factory=list)
    """(place in the sorted list of files, from 1; reason)"""
    patients: set[str] = msgspec.field(default_factory=set)
    studies: set[str] = msgspec.field(default_factory=set)
    series: set[str] = msgspec.field(default_factory=set)


class Files(msgspec.Struct, frozen=True):
    """What is to be cleaned: where it is, and sorted paths relative to `root`."""

    source: Path
    root: Path
    paths: list[str]


def files_of(source: Path) -> Files:
    """A file, or all files below a folder.

    Hidden files and folders are passed over, as `list_files` does.

    Raises:
        DataError: nothing is there.
    """
    if source.is_file():
        return Files(source, source.parent, [source.name])
    if not source.is_dir():
        raise DataError("there is no such file or folder", expected="DICOM files to de-identify")
    paths = sorted(list_files(source))
    if not paths:
        raise DataError("the folder is empty", expected="DICOM files to de-identify", got="no file")
    return Files(source, source, paths)


def clean_folder(
    files: Files, target: Path | None, recipe: Recipe, *, workers: int = 1, progress: Progress | None = None
) -> Summary:
    """Clean files into a folder.

    Args:
        files: identified files, as `files_of` finds them; any names, any depth.
        target: a new or empty folder outside their own, or one that an earlier run with the same recipe made; None: look
            only, and write nothing that stays.
        workers: processes; 1 works in this one.
        progress: called with (done, all).

    Raises:
        SettingsError: the recipe.
        DataError: a target that is none.
        EngineError: no space left, another run in the same target, a worker that died. The same call goes on.
    """
    root, paths = files.root, files.paths
    deidentifier = recipe.deidentifier()
    with _place(files.source, target) as (state, work):
        run = _Run(recipe, root, target, work)
        try:
            with Journal(None if target is None else state / "journal.jsonl", _digest(recipe, deidentifier)) as journal:
                run.journal = journal
                run.faces = Faces(deidentifier, recipe.site, [root / path for path in paths], target and work)
                for chunk, done in results(run.tasks(paths), recipe, deidentifier, workers):
                    for task, result in zip(chunk, done, strict=True):
                        run.take(task, result)
                    journal.flush()
                    if progress is not None:
                        progress(chunk[-1].number, len(paths))
                return run.ended(len(paths))
        except OSError as error:
            raise (run.full() if error.errno in FULL else error) from None


def _digest(recipe: Recipe, deidentifier: Deidentifier) -> str:
    """Changes with all that the output depends on but the sources: key, profile, options, site, this room's code and tables."""
    told = f"{deidentifier.pseudonymiser.key_id} {deidentifier.digest} {recipe.site}"
    digest = sha256(told.encode())
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.suffix in (".py", ".csv", ".txt", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _place(source: Path, target: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where the state and the unfinished files of a run are; locked against a second run.

    Raises:
        DataError: a target that is none. EngineError: another run is there.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="radloop-") as scratch:
            yield Path(scratch), Path(scratch)
        return
    inside, outside = target.resolve(), source.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise DataError(
            "the output must lie outside the input, and the input outside the output",
            expected="two folders, neither in the other",
            next_step="choose another folder for the output",
        )
    state = target / STATE
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not state.is_dir())):
        raise DataError(
            "the output is neither new nor empty, and radloop deidentify did not make it",
            expected="a new or empty folder, or one of an earlier run",
            next_step="choose another folder for the output",
        )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EngineError("another run is writing there", next_step="wait until it has ended") from None
        work = state / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield state, work
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _Run:
    """Hands out tasks and puts what comes back in its place, in the order of the files."""

    def __init__(self, recipe: Recipe, root: Path, target: Path | None, work: Path) -> None:
        self.recipe, self.root, self.target, self.work = recipe, root, target, work
        self.journal: Journal
        self.faces: Faces
        self.summary = Summary()
        self.placed: dict[str, str] = {}
        self.patterns: Counter[str] = Counter()
        self.folders: set[Path] = set()

    def tasks(self, paths: Sequence[str]) -> Iterator[list[Task]]:
        chunk: list[Task] = []
        for number, path in enumerate(paths, 1):
            if path.rpartition("/")[2].upper() == "DICOMDIR":
                self.summary.skipped += 1
                continue
            full = self.root / path
            faceless = self.faces.of(full, self._settle)
            source, known, at = self._known(full)
            refused = (faceless.reason, faceless.what) if isinstance(faceless, DicomError) else None
            task = Task(
                number=number,
                source=source,
                path=str(full),
                work=str(self.work / str(number) / "i.dcm"),  # a file's name may not look like a PatientID
                known=known,
                known_at=at,
                faceless=str(faceless) if isinstance(faceless, Path) else "",
                refused=refused,
            )
            chunk.append(task)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _known(self, full: Path) -> tuple[str, Entry | None, str]:
        """A file as it is now; what an earlier run made of it, and where that should be."""
        source = self._source(full)
        known = self.journal.entries.get(source)
        return source, known, str(self.target / known.file) if known is not None and self.target is not None else ""

    def _settle(self, series: Sequence[Path]) -> bool:
        """Whether all is there that is made of a series; if not, what is there goes."""
        known = [self._known(path)[1:] for path in series]
        if all(entry and (entry.outcome == "refused" or digest(at) == entry.sha256) for entry, at in known):
            return True
        for entry, at in known:
            if entry is not None and entry.file:
                Path(at).unlink(missing_ok=True)
        return False

    def _source(self, full: Path) -> str:
        """A file as it is now, by a keyed hash; ctime is in it, which no change leaves as it was."""
        path = full.relative_to(self.root).as_posix()
        try:
            now = full.stat()
        except OSError:
            return ""
        told = f"radloop-batch\0{path}\0{now.st_size}\0{now.st_mtime_ns}\0{now.st_ctime_ns}"
        return hmac.digest(self.recipe.key, told.encode("utf-8", "surrogateescape"), "sha256").hex()[:32]

    def take(self, task: Task, done: Done) -> None:
        """Put one result in its place, note it, count it.

        Raises:
            EngineError: no space is left.
        """
        if done.outcome == "full":
            raise self.full()
        if task.faceless:
            self.faces.taken(Path(task.faceless))
        outcome, reason, what = done.outcome, done.reason, done.what
        if done.file:
            before = self.placed.setdefault(done.file, "")
            if not before:
                self.placed[done.file] = done.sha256
            elif before == done.sha256:
                outcome = "same"
            else:
                outcome, reason, what = "refused", "UID_CONFLICT", "another file has the same SOPInstanceUID"
        if done.outcome == "cleaned":
            self._put(task.work, done.file if outcome == "cleaned" else None)
        self._count(task, done, outcome, reason, what)

    def _put(self, work: str, file: str | None) -> None:
        """Make a cleaned file visible at its place; without a place, or in a dry run, remove it."""
        if file is None or self.target is None:
            Path(work).unlink()
        else:
            place = self.target / file
            if place.parent not in self.folders:
                place.parent.mkdir(parents=True, exist_ok=True)
                self.folders.add(place.parent)
            os.replace(work, place)
        Path(work).parent.rmdir()

    def _count(self, task: Task, done: Done, outcome: str, reason: str, what: str) -> None:
        summary = self.summary
        summary.outcomes[outcome] += 1
        if outcome == "refused":
            summary.reasons[reason, what] += 1
            summary.refused.append((task.number, reason))
            if reason not in AGAIN:
                self.journal.note(Entry(source=task.source, outcome=outcome, reason=reason, what=what))
            return
        name = task.known.tally if done.outcome == "kept" and task.known else self.journal.pattern(done.tally)
        if outcome != "same":
            self.patterns[name] += 1
            summary.pixels[done.pixels or NOT_LOOKED_AT] += 1
            patient, study, series, _ = done.file.split("/")
            summary.patients.add(patient)
            summary.studies.add(study)
            summary.series.add(series)
        said = "same" if outcome == "same" else "cleaned"
        self.journal.note(
            Entry(source=task.source, outcome=said, file=done.file, sha256=done.sha256, tally=name, pixels=done.pixels)
        )

    def ended(self, files: int) -> Summary:
        """The summary, complete."""
        self.summary.files = files
        for name, times in self.patterns.items():
            for path, action, count in self.journal.patterns[name]:
                self.summary.attributes[path, action] += count * times
        return self.summary

    def full(self) -> EngineError:
        """No space left."""
        return EngineError(
            "no space is left where the output goes",
            got=f"{self.summary.outcomes.total()} files are done",
            next_step="make room and run the same command again: it goes on where this one ended",
        )

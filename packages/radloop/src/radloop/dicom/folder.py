"""A folder of DICOM files as input."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from radloop.errors import DataError

if TYPE_CHECKING:
    from radloop.dicom.landing import Arrival, Landing, Outcome

BATCH_FILES = 256
BATCH_BYTES = 64 << 20

SiteOf = str | Mapping[str, str] | Callable[[str], str]
"""The site code of a file: one for all; by leading path, the longest that fits; or a function of the relative path."""


class FolderReport(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one folder import: by outcome (`new`, `same`, ...) and by reason of quarantine."""

    files: int
    outcomes: dict[str, int]
    reasons: dict[str, int]


def receive_folder(
    landing: Landing,
    folder: Path,
    *,
    site: SiteOf,
    sender: str = "folder",
    progress: Callable[[int, int], None] | None = None,
) -> FolderReport:
    """Receive every file below a folder, in sorted order; again, or after a kill, what was received is `same`.

    The path relative to `folder` is the file's key for labels. Hidden files are passed over; all else is received or
    kept in quarantine. Ends with one ingest row in the ledger if anything was new.

    Raises:
        DataError: no folder, an empty one, an unreadable file, or a file whose site is not configured.
        StorageFull: no space left; what was received before stays.
    """
    paths = sorted(list_files(folder))
    if not paths:
        raise DataError(
            "the input folder is empty",
            expected="DICOM files",
            got="no file",
            next_step="check `folder` in radloop.toml",
        )
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    done = 0
    for batch in _batches(folder, paths, site, sender):
        for outcome in landing.receive_many(batch):
            _count(outcome, outcomes, reasons)
        done += len(batch)
        if progress is not None:
            progress(done, len(paths))
    landing.complete(sender)
    landing.seal(actor=sender)
    return FolderReport(
        files=len(paths), outcomes=dict(sorted(outcomes.items())), reasons=dict(sorted(reasons.items()))
    )


def list_files(folder: Path) -> Iterator[str]:
    """Relative posix paths of all files below a folder that are not hidden."""
    if not folder.is_dir():
        raise DataError(
            "the input folder is not there", expected="a folder", next_step="check `folder` in radloop.toml"
        )
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield (Path(where) / name).relative_to(folder).as_posix()


def _batches(folder: Path, paths: list[str], site_of: SiteOf, sender: str) -> Iterator[list[Arrival]]:
    from radloop.dicom.landing import Arrival

    batch: list[Arrival] = []
    size = 0
    for number, path in enumerate(paths, 1):
        try:
            data = (folder / path).read_bytes()
        except OSError as error:
            # The path may say who the patient is; its place in the order does not.
            raise DataError(
                "a file of the input folder cannot be read", got=f"file {number} of {len(paths)}: {error.strerror}"
            ) from None
        batch.append(Arrival(data=data, site=site_for(path, site_of), sender=sender, relative_path=path))
        size += len(data)
        if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def site_for(path: str, site_of: SiteOf) -> str:
    """The site code of one relative path. Raises `DataError` when none is configured for it."""
    if isinstance(site_of, str):
        return site_of
    if callable(site_of):
        return site_of(path)
    fitting = [prefix for prefix in site_of if prefix in ("", ".") or path.startswith(prefix.rstrip("/") + "/")]
    if not fitting:
        raise DataError(
            "a file of the input folder belongs to no configured site",
            expected=f"a path below one of: {', '.join(sorted(site_of))}",
            next_step="name the site of every sub-folder, or one for all, in radloop.toml",
        )
    return site_of[max(fitting, key=len)]


def _count(outcome: Outcome, outcomes: Counter[str], reasons: Counter[str]) -> None:
    outcomes[str(outcome.kind)] += 1
    if outcome.reason is not None:
        reasons[str(outcome.reason)] += 1

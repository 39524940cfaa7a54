"""Which instances go through the face cleaner, and with which others: a series is cleaned whole."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from radloop.catalog.reason import Reason
from radloop.errors import DicomError

if TYPE_CHECKING:
    from radloop.catalog.schema import Instance
    from radloop.catalog.store import Catalog
    from radloop.dicom.deidentify import Deidentifier
    from radloop.dicom.deidentify.faces import Faceless

WORK = "landing/.faces"
"""In the project: holds identified pixels while a series is cleaned."""


def landed(home: Path, row: Instance) -> Path:
    """Where an instance lies as it came."""
    return home / "landing" / row.source_sha256[:2] / f"{row.source_sha256}.dcm"


def apart(
    catalog: Catalog, home: Path, todo: Sequence[Instance], wanted: Collection[tuple[str, int]]
) -> tuple[list[Instance], list[list[Instance]]]:
    """What is cleaned by itself, and series that go through the face cleaner, with their instances that were cleaned before."""
    from radloop.dicom.deidentify.faces import series_with_faces

    new = {row.sop_uid for row in todo}
    series = {row.series_uid for row in todo}
    before = [
        row
        for row in catalog.archived()
        if row.series_uid in series and row.sop_uid not in new and (row.sop_uid, row.revision) in wanted
    ]
    rows = {landed(home, row): row for row in sorted([*todo, *before], key=lambda row: row.sop_uid)}
    whole = [[rows[path] for path in paths] for paths in series_with_faces(list(rows))]
    whole = [some for some in whole if any(row.sop_uid in new for row in some)]
    elsewhere = {row.sop_uid for some in whole for row in some}
    return [row for row in todo if row.sop_uid not in elsewhere], whole


def without(
    catalog: Catalog, cleaner: Deidentifier, home: Path, whole: Sequence[Sequence[Instance]]
) -> Iterator[tuple[Sequence[Instance], Faceless]]:
    """Each series with its pixels without a face, which lie there until the next is asked for."""
    from radloop.dicom.deidentify.faces import clean_series

    work = home / WORK
    if work.exists():  # of a run that was killed
        shutil.rmtree(work)
    if not whole:
        return
    held = {row.sop_uid for row in catalog.quarantined(reason=Reason.RECOGNIZABLE_FACE)}
    torn = {row.series_uid for row in catalog.pending("quarantined") if row.sop_uid in held}
    try:
        for number, rows in enumerate(whole):
            sites = {landed(home, row): row.site for row in rows}
            if rows[0].series_uid in torn:
                yield rows, dict.fromkeys(sites, _torn())
                continue
            folder = work / f"{number}"
            yield rows, clean_series(cleaner, sites, folder)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _torn() -> DicomError:
    return DicomError(
        "other images of the series are in quarantine, and a face is removed from a whole series: retry them together",
        reason=Reason.RECOGNIZABLE_FACE,
    )

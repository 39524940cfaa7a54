"""Series of heads in a folder: each goes through the face cleaner once, whole, when the first of its files is due."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from radloop.catalog.reason import Reason
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.deidentify.faces import Faceless, clean_series, series_with_faces
from radloop.errors import DicomError


class Faces:
    """The series of a folder that may show a face.

    Args:
        deidentifier, site: as for the files.
        paths: all files, in their order; headers are read where there is a face cleaner.
        work: a new folder in it holds pixels until their file is done; None: a dry run, in which no command is started.
    """

    def __init__(self, deidentifier: Deidentifier, site: str, paths: Sequence[Path], work: Path | None) -> None:
        self._deidentifier, self._site, self._work = deidentifier, site, work
        self._series: dict[Path, list[Path]] = {}
        self._done: Faceless = {}
        self._left: dict[Path, int] = {}
        if deidentifier.face_cleaner is not None:
            deidentifier.face_cleaner.executable()
            for series in series_with_faces(paths):
                self._series |= dict.fromkeys(series, series)

    def of(self, path: Path, settle: Callable[[Sequence[Path]], bool]) -> Path | DicomError | None:
        """A file's pixels without a face, or why there are none; None: it needs none.

        Args:
            settle: called once for a series; whether its outputs are all there already. If one is missing, the others are to
                go: a series is cleaned whole.
        """
        series = self._series.get(path)
        if series is None:
            return None
        if self._work is None:
            return DicomError("no face cleaner is started in a dry run", reason=Reason.RECOGNIZABLE_FACE)
        if path not in self._done:
            if settle(series):
                for each in series:
                    del self._series[each]
                return None
            folder = self._work / f"faces{len(self._left)}"
            self._done |= clean_series(self._deidentifier, dict.fromkeys(series, self._site), folder)
            self._left[folder] = sum(isinstance(self._done[each], Path) for each in series)
        return self._done[path]

    def taken(self, pixels: Path) -> None:
        """A file is done; with the last of its series the pixels go."""
        self._left[pixels.parent] -= 1
        if not self._left[pixels.parent]:
            shutil.rmtree(pixels.parent)

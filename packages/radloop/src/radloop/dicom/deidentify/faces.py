"""Faces: series of heads go through the hospital's own cleaner, of whose output only pixels are taken (PS3.15 E.3.2, 113102).

A face is removed from a volume, not from a slice: the cleaner gets a whole series. It gets it with clean headers, because what
it never had it cannot write into its log or its cache. Of what it leaves, each instance is held against the original, and
its stored values are kept as a plain array: nothing else of its files goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from radloop.catalog.reason import Reason
from radloop.dicom.deidentify.check import shows_face, volume
from radloop.dicom.deidentify.face_cleaner import Failed
from radloop.dicom.deidentify.values import refuse
from radloop.dicom.index import Index
from radloop.errors import DicomError
from radloop.imaging.frames import stored_frames

if TYPE_CHECKING:
    from radloop.dicom.deidentify import Deidentifier

Faceless = dict[Path, Path | DicomError]
"""What became of each file of a series: its pixels as an array `(frames, rows, columns, samples)` in a .npy file, or why not."""

_SERIES = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
_HEADER = Index([*_SERIES, "Modality", "BodyPartExamined", "RecognizableVisualFeatures", "Rows"])
_ALIKE = str.split(
    """SOPClassUID Rows Columns SamplesPerPixel BitsAllocated BitsStored PixelRepresentation PhotometricInterpretation
    ImageOrientationPatient ImagePositionPatient PixelSpacing RescaleSlope RescaleIntercept"""
)
_GROUPS = str.split(
    """SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PlaneOrientationSequence PlanePositionSequence
    PixelMeasuresSequence PixelValueTransformationSequence"""
)
_ROUNDED = {"ImagePositionPatient": 1e-3, "ImageOrientationPatient": 1e-4}
"""How far values may be off after a way through other formats, in mm and cosines; others by a ten-thousandth of themselves."""


def series_with_faces(paths: Sequence[Path]) -> list[list[Path]]:
    """The images of each series that may show a face, in the order given; files that cannot be read are in none."""
    series: dict[tuple[str, ...], list[Path]] = {}
    faces: set[tuple[str, ...]] = set()
    for path in paths:
        try:
            header = _HEADER.read(path)
        except (DicomError, OSError):
            continue  # whoever cleans it says what it is
        key, face = tuple(header[keyword] for keyword in _SERIES), shows_face(header.__getitem__)
        if header["Rows"] and (face or volume(header.__getitem__)):
            series.setdefault(key, []).append(path)
            if face:
                faces.add(key)
    return [some for key, some in series.items() if key in faces]


def clean_series(deidentifier: Deidentifier, sites: Mapping[Path, str], folder: Path) -> Faceless:
    """Give a series to the face cleaner.

    Args:
        deidentifier: with a face cleaner.
        sites: the files of the series, all of them, in their order, and the site code of each.
        folder: made anew, for this user alone to read. When this returns it holds the arrays, and nothing else.

    Raises:
        SettingsError: the face cleaner cannot be started. OSError: the disk is full.
    """
    assert deidentifier.face_cleaner is not None
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, mode=0o700)
    given_at, left_at, scratch = (folder / name for name in ("input", "output", "scratch"))
    for place in (given_at, left_at, scratch):
        place.mkdir()
    done: Faceless = {}
    copies: dict[Path, Path] = {}
    try:
        given = _give(deidentifier, sites, given_at, done, copies)
        if given:
            deidentifier.face_cleaner.run(given_at, left_at, scratch)
            done |= _taken(deidentifier, given, left_at)
    except Failed as why:
        done |= {path: DicomError(f"{why}", reason=Reason.RECOGNIZABLE_FACE) for path in given.values()}
    finally:
        for place in (given_at, left_at, scratch):
            if place.exists():
                shutil.rmtree(place)
    return done | {path: done[first] for path, first in copies.items()}


def _give(
    deidentifier: Deidentifier, sites: Mapping[Path, str], folder: Path, done: Faceless, copies: dict[Path, Path]
) -> dict[str, Path]:
    """Write what the cleaner gets; of which file each SOPInstanceUID there is. What is refused goes into `done`."""
    given: dict[str, Path] = {}
    for number, (path, site) in enumerate(sites.items(), 1):
        try:
            out = deidentifier.for_face_cleaner(deidentifier.opened(path), site=site)
            first = given.setdefault(str(out.SOPInstanceUID), path)
            if first == path:
                out.save_as(folder / f"{number:05}.dcm", enforce_file_format=True)
            elif first.read_bytes() == path.read_bytes():
                copies[path] = first
            else:
                refuse(Reason.UID_CONFLICT, "another file has the same SOPInstanceUID", "one file an instance")
        except DicomError as error:
            done[path] = error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - one file that nobody foresaw; the message may quote a value
            done[path] = DicomError(f"{type(error).__name__} before the face cleaner", reason=Reason.UNSUPPORTED_OBJECT)
    return {uid: path for uid, path in given.items() if path not in done}


def _taken(deidentifier: Deidentifier, given: Mapping[str, Path], left: Path) -> Faceless:
    """The pixels that the cleaner left, beside its folder. Raises Failed."""
    made = _found(left)
    if unknown := made.keys() - given.keys():
        raise Failed(f"the face cleaner left {len(unknown)} instances that it was not given")
    if missing := given.keys() - made.keys():
        raise Failed(f"the face cleaner left {len(made)} of {len(given)} instances: {len(missing)} are missing")
    done: Faceless = {}
    changed = False
    for number, (uid, path) in enumerate(given.items(), 1):
        frames, differ = _pixels(deidentifier.opened(path), made[uid])
        changed |= differ
        done[path] = kept = left.with_name(f"{number:05}.npy")
        np.save(kept, frames, allow_pickle=False)
    if not changed:
        raise Failed("the face cleaner changed no pixel of the series")
    return done


def _found(folder: Path) -> dict[str, Path]:
    """The DICOM files below a folder by their SOPInstanceUID; what is none (a log, a picture) is passed over."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            uid = str(pydicom.dcmread(path, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID)
        except InvalidDicomError:
            continue
        except Exception as error:  # noqa: BLE001 - pydicom raises many kinds on garbage; their texts may quote it
            raise Failed(f"the face cleaner left a file that cannot be read ({type(error).__name__})") from None
        if found.setdefault(uid, path) != path:
            raise Failed("the face cleaner left an instance twice")
    return found


def _pixels(original: Dataset, file: Path) -> tuple[NDArray[Any], bool]:
    """The stored values that the cleaner left of one instance, and whether they differ from the original's."""
    try:
        made = pydicom.dcmread(file)
        nothing = ("", None)
        for (keyword, value), (name, its_value) in zip_longest(_alike(original), _alike(made), fillvalue=nothing):
            if keyword != name or not _same(keyword, value, its_value):
                raise Failed(f"the face cleaner changed {keyword or name}")
        (before, colour), (after, its_colour) = stored_frames(original), stored_frames(made)
    except (Failed, OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise Failed(f"the face cleaner left an image that cannot be read ({type(error).__name__})") from None
    if (before.shape, before.dtype, colour) != (after.shape, after.dtype, its_colour):
        raise Failed("the face cleaner changed the number of frames or the kind of pixels")
    return after, not np.array_equal(before, after)


def _alike(ds: Dataset) -> Iterator[tuple[str, Any]]:
    """What must be the same before and after: form and place of every frame, and what a stored value means."""
    for keyword in _ALIKE:
        if keyword in ds:
            yield keyword, ds[keyword].value
    for keyword in _GROUPS:
        for item in ds[keyword].value if keyword in ds else ():
            yield from _alike(item)


def _same(keyword: str, before: Any, after: Any) -> bool:
    try:
        a, b = (np.atleast_1d(np.array(value, dtype=float)) for value in (before, after))
    except (TypeError, ValueError):
        return bool(before == after)
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=_ROUNDED.get(keyword, 0), equal_nan=True)

"""From the images of a series to a volume in patient coordinates, through a geometry gate.

A volume is made only of slices that lie on one regular grid, as their own attributes say; anything else is refused with a
reason (`Refusal`). Nothing is resampled, interpolated or guessed.

    volume = load(folder.glob("*.dcm"))
    hu = volume.rescaled()          # (slices, rows, columns), float32
    volume.affine @ (s, r, c, 1)    # the centre of that voxel, LPS mm
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from radloop.errors import DicomError, VolumeError
from radloop.imaging import pixels
from radloop.imaging.volume import gate
from radloop.imaging.volume.gate import TILT_DEG, TOLERANCE_MM, Grid
from radloop.imaging.volume.orientation import (
    Affine,
    lps_to_ras,
    ras_to_lps,
    reversed_indices,
    write_nifti,
)
from radloop.imaging.volume.planes import Plane, planes_of
from radloop.imaging.volume.refusal import Refusal

__all__ = [
    "TILT_DEG",
    "TOLERANCE_MM",
    "Affine",
    "Part",
    "Refusal",
    "Volume",
    "load",
    "lps_to_ras",
    "ras_to_lps",
    "split_series",
    "write_nifti",
]

Source = Dataset | str | os.PathLike[str]
"""A DICOM file, or a data set with `file_meta` and its pixel data."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Slices on a regular grid.

    Attributes:
        array: `(slices, rows, columns)` stored values as they are in the files; `(slices, rows, columns, 3)` for RGB.
            Slices are ordered along the normal, row direction x column direction.
        affine: 4 x 4 float64, from `(slice, row, column, 1)` to LPS mm, voxel centres (PS3.3 C.7.6.2.1.1). Its
            determinant is negative, for the index order is the reverse of the right-handed (column, row, slice).
        slope, intercept: `(slices,)` float64; a value is `stored * slope + intercept`, each slice by its own.
        rescale_type: unit of the values as RescaleType says (`HU`), `unstated`, or `none` without a rescale.
        modality: of the images.
        frame_of_reference_uid, series_uid: of all of them; empty if the images have none.
        sources: (SOPInstanceUID, frame from 0) of each slice.
        tilt_deg: angle between the normal and the line of the slices; above `TILT_DEG` only if asked for.
    """

    array: NDArray[Any]
    affine: Affine
    slope: NDArray[np.float64]
    intercept: NDArray[np.float64]
    rescale_type: str
    modality: str
    frame_of_reference_uid: str
    series_uid: str
    sources: tuple[tuple[str, int], ...]
    tilt_deg: float

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distances between centres: of slices, of rows, of columns."""
        slices, rows, columns = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slices), float(rows), float(columns)

    def rescaled(self) -> NDArray[np.float32]:
        """The values in their unit (HU for CT): slope and intercept applied, `(slices, rows, columns)`."""
        out = np.empty(self.array.shape, dtype=np.float32)
        for plane, stored, slope, intercept in zip(out, self.array, self.slope, self.intercept, strict=True):
            plane[...] = stored * slope + intercept
        return out

    def nifti(self) -> tuple[NDArray[Any], Affine]:
        """The stored values as `(columns, rows, slices)`, and the affine from those indices to RAS mm, as NIfTI has it."""
        return np.swapaxes(self.array, 0, 2), reversed_indices(lps_to_ras(self.affine))


@dataclass(frozen=True, eq=False)
class Part:
    """A volume that could be loaded from a series, or images that make none.

    Attributes:
        told_by: what tells it from other parts at the same place (`{"EchoTime": "4.6"}`); `order` if only the images'
            numbers did.
        sources: (place in what was given, frame) of its images.
        refusal: why it is no volume; None if it is one.
    """

    told_by: dict[str, str]
    sources: tuple[tuple[int, int], ...]
    refusal: VolumeError | None
    _given: Sequence[Source]
    _grid: Grid | None

    def load(self) -> Volume:
        """Read the pixels.

        Raises:
            VolumeError: the refusal, or UNREADABLE.
        """
        if self._grid is None:
            assert self.refusal is not None
            raise self.refusal
        return _volume(self._grid, self._given)


def load(sources: Iterable[Source], *, tolerance_mm: float = TOLERANCE_MM, keep_tilt: bool = False) -> Volume:
    """The one volume that all given images make up.

    Args:
        sources: every image of it, once, in any order; files or data sets; single-frame or enhanced multi-frame.
        tolerance_mm: how far the place of any voxel by its own attributes may be from the grid; never more than a tenth of
            the distance between slices.
        keep_tilt: give a sheared affine for tilted slices instead of refusing them.

    Raises:
        VolumeError: they do not; `refusal` is why.
    """
    given = list(sources)
    planes = [plane for i, source in enumerate(given) for plane in _planes(source, i, len(given))]
    if not planes:
        raise VolumeError("no images were given", refusal=Refusal.SINGLE_SLICE, expected="at least 2 slices", got=0)
    return _volume(gate.grid(planes, tolerance_mm=tolerance_mm, keep_tilt=keep_tilt), given)


def split_series(
    sources: Iterable[Source], *, tolerance_mm: float = TOLERANCE_MM, keep_tilt: bool = False
) -> list[Part]:
    """Every volume in a series or a folder: by series, frame of reference, matrix, orientation, stack, and what else tells
    images at one place apart (time, echo, b-value, magnitude and phase). Every image given is in one part.

    No pixel is read. The arguments are those of `load`.
    """
    given = list(sources)
    parts: list[Part] = []
    places: dict[tuple[object, ...], list[list[Plane]]] = {}
    for i, source in enumerate(given):
        try:
            planes = _planes(source, i, len(given))
        except VolumeError as error:
            parts.append(Part({}, ((i, 0),), error, given, None))
            continue
        for plane in planes:
            groups = places.setdefault(gate.place_of(plane), [])
            fitting = next((group for group in groups if gate.parallel(group[0], plane, tolerance_mm)), None)
            if fitting is None:
                groups.append([plane])
            else:
                fitting.append(plane)
    for group in (group for groups in places.values() for group in groups):
        for told_by, planes in gate.volumes(group):
            images = tuple((plane.source, plane.frame) for plane in planes)
            try:
                found = gate.grid(planes, tolerance_mm=tolerance_mm, keep_tilt=keep_tilt)
                parts.append(Part(told_by, images, None, given, found))
            except VolumeError as error:
                parts.append(Part(told_by, images, error, given, None))
    return parts


def _planes(source: Source, number: int, of: int) -> list[Plane]:
    ds = source if isinstance(source, Dataset) else _read(source, number, of, pixels_too=False)
    try:
        return planes_of(ds, number)
    except VolumeError:
        raise
    except Exception as error:  # noqa: BLE001 - a value read late may raise whatever pydicom does; its text may quote it
        raise _unreadable(number, of, error) from None


def _read(source: Source, number: int, of: int, *, pixels_too: bool) -> Dataset:
    if isinstance(source, Dataset):
        return source
    try:
        return pydicom.dcmread(Path(source), stop_before_pixels=not pixels_too)
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds on garbage; their texts and the path may name someone
        raise _unreadable(number, of, error) from None


def _unreadable(number: int, of: int, error: Exception) -> VolumeError:
    return VolumeError(
        "a file cannot be read as DICOM",
        refusal=Refusal.UNREADABLE,
        expected="a DICOM file",
        got=f"file {number + 1} of {of}: {type(error).__name__}",
    )


def _volume(found: Grid, given: Sequence[Source]) -> Volume:
    planes = found.planes
    first = planes[0]
    _check_colour(first)
    array: NDArray[Any] | None = None
    by_source: dict[int, list[int]] = {}
    for index, plane in enumerate(planes):
        by_source.setdefault(plane.source, []).append(index)
    for source, indices in by_source.items():
        stored = _stored(_read(given[source], source, len(given), pixels_too=True), first)
        if array is None:
            array = np.empty((len(planes), *stored.shape[1:]), dtype=stored.dtype)
        if stored.shape[1:] != array.shape[1:] or stored.dtype != array.dtype:
            _refuse_pixels(f"{stored.shape[1:]} of {stored.dtype}", f"{array.shape[1:]} of {array.dtype}")
        for index in indices:
            array[index] = stored[planes[index].frame]
    assert array is not None
    return Volume(
        array=array,
        affine=found.affine,
        slope=np.array([plane.slope for plane in planes]),
        intercept=np.array([plane.intercept for plane in planes]),
        rescale_type=first.rescale,
        modality=first.modality,
        frame_of_reference_uid=first.frame_of_reference_uid,
        series_uid=first.series_uid,
        sources=tuple((plane.sop_uid, plane.frame) for plane in planes),
        tilt_deg=found.tilt_deg,
    )


def _check_colour(plane: Plane) -> None:
    samples, _, _, photometric = plane.pixels
    grey = samples == 1 and photometric in ("MONOCHROME1", "MONOCHROME2")
    rgb = samples == 3 and photometric in ("RGB", "YBR_RCT", "YBR_ICT")  # JPEG 2000 codecs give RGB for those
    if not (grey or rgb):
        raise VolumeError(
            "colour that is not RGB",
            refusal=Refusal.COLOUR,
            expected="MONOCHROME1, MONOCHROME2, RGB, YBR_RCT or YBR_ICT",
            got=f"{samples} samples",
        )


def _stored(ds: Dataset, first: Plane) -> NDArray[Any]:
    """`(frames, rows, columns[, 3])` of one object; bits above BitsStored cleared or sign-extended."""
    try:
        frames = pixels.stored(ds)
    except DicomError as error:
        raise VolumeError(error.what, refusal=Refusal.UNREADABLE, expected=error.expected, got=error.got) from None
    samples = first.pixels[0]
    if frames.ndim == (2 if samples == 1 else 3):
        frames = frames[None]
    if frames.shape[1:3] != first.shape or frames.dtype.kind not in "ui":
        _refuse_pixels(f"{frames.shape[1:3]} of {frames.dtype}", f"{first.shape} of integers")
    return frames.astype(frames.dtype.newbyteorder("<"), copy=False)


def _refuse_pixels(got: str, expected: str) -> None:
    raise VolumeError(
        "the pixel data is not what the header says", refusal=Refusal.UNREADABLE, expected=expected, got=got
    )

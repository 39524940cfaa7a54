"""What a data set says about where its frames lie: one `Plane` a frame, from single-frame and enhanced objects."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Never

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from radloop.errors import VolumeError
from radloop.imaging.pixels import MAX_SIDE
from radloop.imaging.volume.refusal import Refusal

Vector = NDArray[np.float64]

_NO_VOLUMES = {
    "SEG": "a segmentation",
    "SM": "a slide",
    "RTDOSE": "a dose grid",
    "SR": "a report",
    "PR": "a presentation",
}
_COMPONENTS = {
    **{"M": "MAGNITUDE", "P": "PHASE", "R": "REAL", "I": "IMAGINARY"},
    **{name: name for name in ("MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "MIXED")},
}
_SPATIAL_DIMENSIONS = frozenset({0x00209056, 0x00209057, 0x00200032, 0x00200037, 0x00209228, 0x00201041})
"""StackID, InStackPositionNumber, ImagePositionPatient, ImageOrientationPatient, ConcatenationFrameOffset, SliceLocation."""
_KINDS = (
    "EchoTime",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "InversionTime",
    "TriggerTime",
    "FrameReferenceTime",
    "AcquisitionNumber",
)
"""What may tell volumes apart that lie in the same place, in a single-frame object."""


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """One frame: where it lies, how its values are scaled, what kind of image it is.

    `row_direction` points along a row (to the next column) and `column_direction` down a column (to the next row), unit
    vectors in LPS; `position` is the centre of the first voxel, LPS mm; `spacing_mm` is (between rows, between columns).
    """

    source: int
    frame: int
    sop_uid: str
    series_uid: str
    frame_of_reference_uid: str
    modality: str
    number: tuple[int, int]
    shape: tuple[int, int]
    pixels: tuple[int, int, int, str]
    position: Vector
    row_direction: Vector
    column_direction: Vector
    spacing_mm: tuple[float, float]
    slope: float
    intercept: float
    rescale: str
    """RescaleType, `unstated`, or `none` where the object has no rescale."""
    kind: dict[str, str] = field(default_factory=dict)

    @property
    def normal(self) -> Vector:
        """Row direction x column direction, LPS: slices are ordered along it."""
        return np.cross(self.row_direction, self.column_direction)


def planes_of(ds: Dataset, source: int) -> list[Plane]:
    """Every frame of one data set (pixels need not be read).

    Raises:
        VolumeError: the object is no image of a volume, or does not say where it lies.
    """
    _check_kind(ds)
    frames = _integer(ds, "NumberOfFrames", 1)
    per_frame = ds.get("PerFrameFunctionalGroupsSequence")
    if per_frame is None:
        if frames != 1:
            _refuse(
                Refusal.NO_GEOMETRY, "the frames have no positions of their own", "functional groups (PS3.3 C.7.6.16)"
            )
        return [_plane(ds, source, 0, [ds], [ds], _single_kind(ds))]
    if len(per_frame) != frames:
        _refuse(Refusal.NO_GEOMETRY, "frames and functional groups differ in number", frames, len(per_frame))
    shared = list(ds.get("SharedFunctionalGroupsSequence") or [])[:1]
    pointers = [int(item.get("DimensionIndexPointer") or 0) for item in ds.get("DimensionIndexSequence") or []]
    planes = []
    for number, group in enumerate(per_frame):
        groups = [group, *shared]
        planes.append(_plane(ds, source, number, groups, [*_inner(groups, "PixelValueTransformationSequence"), ds], {}))
        planes[-1].kind.update(_enhanced_kind(groups, pointers))
    return planes


def _check_kind(ds: Dataset) -> None:
    modality = str(ds.get("Modality") or "")
    image_type = _image_type(ds)
    if modality in _NO_VOLUMES:
        _refuse(Refusal.NOT_AN_IMAGE, f"{_NO_VOLUMES[modality]} is no image volume", "an image", modality)
    if {"LOCALIZER", "SCOUT"} & set(image_type):
        _refuse(Refusal.LOCALIZER, "ImageType says LOCALIZER: a planning image", "an image that was taken for itself")
    if "MOSAIC" in image_type:
        next_step = (
            "export the series as enhanced MR or without mosaic, or convert it with dcm2niix before de-identification"
        )
        raise VolumeError(
            "ImageType says MOSAIC: many slices in one plane (Siemens), whose places are in private attributes only",
            refusal=Refusal.MOSAIC,
            expected="one slice a frame",
            next_step=next_step,
        )
    if ds.get("ModalityLUTSequence"):
        _refuse(Refusal.MODALITY_LUT, "values are scaled by a Modality LUT", "RescaleSlope and RescaleIntercept")
    rows, columns = _integer(ds, "Rows", 0), _integer(ds, "Columns", 0)
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
        _refuse(Refusal.NOT_AN_IMAGE, "impossible Rows or Columns", f"1 to {MAX_SIDE}", f"{rows} x {columns}")


def _plane(
    ds: Dataset, source: int, frame: int, groups: list[Dataset], scales: list[Dataset], kind: dict[str, str]
) -> Plane:
    """From the data set and the items that hold this frame's geometry: itself, or its functional groups."""
    single = groups[0] is ds
    orientation = _numbers(
        groups if single else _inner(groups, "PlaneOrientationSequence"), "ImageOrientationPatient", 6
    )
    position = _numbers(groups if single else _inner(groups, "PlanePositionSequence"), "ImagePositionPatient", 3)
    spacing = _numbers(groups if single else _inner(groups, "PixelMeasuresSequence"), "PixelSpacing", 2)
    if min(spacing) <= 0:
        _refuse(Refusal.NO_GEOMETRY, "PixelSpacing is not positive", "two lengths in mm")
    across, down = _orthonormal(orientation)
    slope, intercept, rescale = _rescale(ds, scales)
    return Plane(
        source=source,
        frame=frame,
        sop_uid=str(ds.get("SOPInstanceUID") or ""),
        series_uid=str(ds.get("SeriesInstanceUID") or ""),
        frame_of_reference_uid=str(ds.get("FrameOfReferenceUID") or ""),
        modality=str(ds.get("Modality") or ""),
        number=(_integer(ds, "InstanceNumber", 0), frame),
        shape=(_integer(ds, "Rows", 0), _integer(ds, "Columns", 0)),
        pixels=(
            _integer(ds, "SamplesPerPixel", 1),
            _integer(ds, "BitsAllocated", 0),
            _integer(ds, "PixelRepresentation", 0),
            str(ds.get("PhotometricInterpretation") or ""),
        ),
        position=position,
        row_direction=across,
        column_direction=down,
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        slope=slope,
        intercept=intercept,
        rescale=rescale,
        kind=kind,
    )


def _orthonormal(orientation: Vector) -> tuple[Vector, Vector]:
    """Row and column direction, made exactly orthonormal (attributes are rounded). Raises if they are far from it."""
    across, down = orientation[:3], orientation[3:]
    lengths = float(np.linalg.norm(across)), float(np.linalg.norm(down))
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(across @ down))) > 1e-3:
        got = f"lengths {lengths[0]:.4f} and {lengths[1]:.4f}, dot product {float(across @ down):.4f}"
        _refuse(
            Refusal.NOT_ORTHONORMAL, "ImageOrientationPatient is no pair of directions", "lengths 1, product 0", got
        )
    across = across / lengths[0]
    down = down - (down @ across) * across
    return across, down / float(np.linalg.norm(down))


def _rescale(ds: Dataset, scales: list[Dataset]) -> tuple[float, float, str]:
    """Slope, intercept, unit of the first item that has a slope."""
    for item in scales:
        if item.get("RescaleSlope") in (None, "") and item.get("RescaleIntercept") in (None, ""):
            continue
        slope, intercept = (float(_numbers([item], keyword, 1)[0]) for keyword in ("RescaleSlope", "RescaleIntercept"))
        if slope == 0:
            _refuse(Refusal.RESCALE, "RescaleSlope is 0", "a scale that keeps the values apart")
        return slope, intercept, str(item.get("RescaleType") or ("HU" if ds.get("Modality") == "CT" else "unstated"))
    if ds.get("Modality") == "CT":
        _refuse(
            Refusal.RESCALE, "a CT without RescaleSlope: its values are not in HU", "RescaleSlope, RescaleIntercept"
        )
    return 1.0, 0.0, "none"


def _single_kind(ds: Dataset) -> dict[str, str]:
    found = {keyword: _plain(ds.get(keyword)) for keyword in _KINDS if ds.get(keyword) not in (None, "")}
    found["ImageType"] = "/".join(_image_type(ds))
    for word in _image_type(ds)[2:]:
        if word in _COMPONENTS:
            return found | {"ComplexImageComponent": _COMPONENTS[word]}
    return found


def _enhanced_kind(groups: list[Dataset], pointers: list[int]) -> dict[str, str]:
    """Of a frame: its stack, its dimension indices other than spatial ones (PS3.3 C.7.6.17), and the usual attributes."""
    found: dict[str, str] = {}
    content = _inner(groups, "FrameContentSequence")[:1]
    for item in content:
        indices = item.get("DimensionIndexValues")
        values = [indices] if isinstance(indices, int) else list(indices or [])
        for pointer, value in zip(pointers, values, strict=False):
            if pointer not in _SPATIAL_DIMENSIONS:
                name = f"dimension {pointer >> 16:04X},{pointer & 0xFFFF:04X}"
                found[name] = str(value)
    wanted = {
        "FrameContentSequence": ("StackID", "TemporalPositionIndex"),
        "MREchoSequence": ("EffectiveEchoTime",),
        "MRDiffusionSequence": ("DiffusionBValue",),
        "MRImageFrameTypeSequence": ("ComplexImageComponent", "FrameType"),
        "CTImageFrameTypeSequence": ("FrameType",),
        "PETFrameTypeSequence": ("FrameType",),
    }
    for sequence, keywords in wanted.items():
        for item in _inner(groups, sequence)[:1]:
            found.update({k: _plain(item.get(k)) for k in keywords if item.get(k) not in (None, "")})
    for item in _inner(_inner(groups, "MRDiffusionSequence"), "DiffusionGradientDirectionSequence")[:1]:
        found["DiffusionGradientOrientation"] = _plain(item.get("DiffusionGradientOrientation"))
    return found


def _inner(groups: list[Dataset], sequence: str) -> list[Dataset]:
    """The one item of a functional group, from the frame's groups or the shared ones, whichever has it."""
    return [item for group in groups for item in list(group.get(sequence) or [])[:1]]


def _numbers(items: list[Dataset], keyword: str, count: int) -> Vector:
    """The first item's finite numbers. Raises VolumeError: absent, of another number, or no numbers."""
    for item in items:
        try:
            value = item.get(keyword)
            if value in (None, ""):
                continue
            numbers = np.atleast_1d(np.array(value, dtype=np.float64))
        except (TypeError, ValueError, OverflowError):  # pydicom's too, for bytes that are no decimal string
            continue
        if numbers.shape == (count,) and all(math.isfinite(n) for n in numbers):
            return numbers
    reason = Refusal.RESCALE if keyword.startswith("Rescale") else Refusal.NO_GEOMETRY
    return _refuse(reason, f"{keyword} is missing or no number", f"{count} number{'s' * (count > 1)}")


def _integer(ds: Dataset, keyword: str, default: int) -> int:
    try:
        value = ds.get(keyword)
        return default if value in (None, "") else int(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def _image_type(ds: Dataset) -> list[str]:
    value = ds.get("ImageType") or []
    return [str(word).upper() for word in ([value] if isinstance(value, str) else value)]


def _plain(value: Any) -> str:
    many = hasattr(value, "__iter__") and not isinstance(value, str)
    return "/".join(str(v) for v in value) if many else str(value)


def _refuse(refusal: Refusal, what: str, expected: object = None, got: object = None) -> Never:
    raise VolumeError(what, refusal=refusal, expected=expected, got=got)

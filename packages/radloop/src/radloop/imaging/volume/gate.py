"""The geometry gate: planes become a regular grid, or are refused with the reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from radloop.errors import VolumeError
from radloop.imaging.volume.orientation import Affine
from radloop.imaging.volume.planes import Plane, Vector
from radloop.imaging.volume.refusal import Refusal

TOLERANCE_MM = 0.05
"""How far any voxel's place by its own attributes may be from the grid: rounding of attributes stays below it. Never more
than a tenth of the distance between slices."""
SAME_MM = 0.005
"""Positions that close along the normal are one position, told with rounding."""
TILT_DEG = 0.1
"""Angle between the slices' normal and the line on which they lie, from which the grid is a sheared one."""


@dataclass(frozen=True)
class Grid:
    """Planes in order along their normal, and the affine from `(slice, row, column)` to LPS mm."""

    planes: tuple[Plane, ...]
    affine: Affine
    tilt_deg: float


def grid(planes: list[Plane], *, tolerance_mm: float = TOLERANCE_MM, keep_tilt: bool = False) -> Grid:
    """The regular grid that all planes lie on.

    Raises:
        VolumeError: there is none; `refusal` says why, the message what was expected and what came, in mm and degrees.
    """
    _check_same(planes, tolerance_mm)
    if len(planes) == 1:
        _refuse(Refusal.SINGLE_SLICE, "one slice is no volume", "at least 2 slices", 1)
    first = planes[0]
    along = [float(plane.position @ first.normal) for plane in planes]
    order = sorted(range(len(planes)), key=along.__getitem__)
    ordered = tuple(planes[i] for i in order)
    _check_steps(ordered, np.array([along[i] for i in order]), tolerance_mm)
    origin, step = _line(ordered)
    gap = float(step @ first.normal)
    _check_line(ordered, origin, step, min(tolerance_mm, gap / 10))
    tilt = float(np.degrees(np.arccos(np.clip(gap / np.linalg.norm(step), -1, 1))))
    if tilt > TILT_DEG and not keep_tilt:
        raise VolumeError(
            "the slices are tilted against the line on which they lie (a gantry tilt)",
            refusal=Refusal.GANTRY_TILT,
            expected=f"at most {TILT_DEG} degrees",
            got=f"{tilt:.2f} degrees",
            next_step="load with keep_tilt=True: the affine is then sheared, and exact",
        )
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = first.column_direction * first.spacing_mm[0]
    affine[:3, 2] = first.row_direction * first.spacing_mm[1]
    affine[:3, 3] = origin
    return Grid(planes=ordered, affine=affine, tilt_deg=tilt)


def place_of(plane: Plane) -> tuple[object, ...]:
    """What is equal in all planes of one grid."""
    return plane.series_uid, plane.frame_of_reference_uid, plane.shape, plane.pixels


def parallel(a: Plane, b: Plane, tolerance_mm: float = TOLERANCE_MM) -> bool:
    """Whether both have one orientation and one spacing."""
    return _turned_mm(a, b) <= tolerance_mm and _stretched_mm(a, b) <= tolerance_mm


def _check_same(planes: list[Plane], tolerance_mm: float) -> None:
    first = planes[0]
    for refusal, what, values in (
        (Refusal.MIXED_SERIES, "SeriesInstanceUIDs", {p.series_uid for p in planes}),
        (Refusal.MIXED_FRAME_OF_REFERENCE, "FrameOfReferenceUIDs", {p.frame_of_reference_uid for p in planes}),
    ):
        if len(values) > 1:
            _refuse(refusal, f"the images have several {what}", 1, len(values))
    for plane in planes:
        if plane.shape != first.shape:
            _refuse(Refusal.MIXED_MATRIX, "Rows and Columns differ", _times(first.shape), _times(plane.shape))
        if plane.pixels != first.pixels:
            _refuse(Refusal.MIXED_MATRIX, "the pixels' types differ", _type(first), _type(plane))
        if plane.rescale != first.rescale:
            _refuse(Refusal.RESCALE, "the slices are of different units (RescaleType)", "one unit", "several")
    stretched, turned = (max(f(first, plane) for plane in planes) for f in (_stretched_mm, _turned_mm))
    if stretched > tolerance_mm:
        _refuse(Refusal.MIXED_SPACING, "PixelSpacing differs", _at_most(tolerance_mm), f"{stretched:.3f} mm")
    if turned > tolerance_mm:
        _refuse(Refusal.MIXED_ORIENTATION, "orientations differ", _at_most(tolerance_mm), f"{turned:.3f} mm")


def _at_most(tolerance_mm: float) -> str:
    return f"at most {tolerance_mm:g} mm apart at the image's edge"


def _turned_mm(a: Plane, b: Plane) -> float:
    """How far b's orientation moves the corner that is farthest from the position."""
    rows, columns = a.shape
    across = float(np.linalg.norm(b.row_direction - a.row_direction)) * columns * a.spacing_mm[1]
    down = float(np.linalg.norm(b.column_direction - a.column_direction)) * rows * a.spacing_mm[0]
    return across + down


def _stretched_mm(a: Plane, b: Plane) -> float:
    return max(abs(b.spacing_mm[i] - a.spacing_mm[i]) * a.shape[i] for i in (0, 1))


def _check_steps(planes: tuple[Plane, ...], along: Vector, tolerance_mm: float) -> None:
    """Each position once, at equal distances along the normal."""
    steps = np.diff(along)
    regular = float(np.median(steps))
    if (count := int(np.sum(steps <= SAME_MM))) > 0:
        _refuse_duplicates(planes, count)
    _check_kinds(planes)
    smallest = float(np.min(steps))
    worst = int(np.argmax(np.abs(steps - regular)))
    off = float(np.max(np.abs(along - np.linspace(along[0], along[-1], len(along)))))
    if off <= min(tolerance_mm, regular / 10):
        return
    times = steps / smallest
    if np.max(times) > 1.5 and np.all(np.abs(times - np.round(times)) < 0.1):
        missing = int(np.sum(np.round(times)) - len(steps))
        first = int(np.argmax(times)) + 1
        got = (
            f"{missing} missing, first after slice {first} of {len(planes)} ({float(np.max(steps)):.3f} mm to the next)"
        )
        _refuse(Refusal.MISSING_SLICES, "slices are missing", f"{smallest:.3f} mm between slices", got)
    got = f"{float(steps[worst]):.3f} mm after slice {worst + 1} of {len(planes)}; {off:.3f} mm off the grid"
    expected = f"{regular:.3f} mm between slices, at most {min(tolerance_mm, regular / 10):.3f} mm off the grid"
    _refuse(Refusal.IRREGULAR_SPACING, "slices are not at equal distances", expected, got)


def _refuse_duplicates(planes: tuple[Plane, ...], count: int) -> None:
    uids = Counter((plane.sop_uid, plane.frame) for plane in planes)
    again = sum(n - 1 for (uid, _), n in uids.items() if uid)
    if again:
        _refuse(Refusal.DUPLICATE_POSITIONS, "an instance was given more than once", "each once", f"{again} again")
    differing = sorted(telling(planes))
    if differing:
        raise VolumeError(
            "several images lie at one position",
            refusal=Refusal.SEVERAL_VOLUMES,
            expected="one image a position",
            got=f"images that differ in {', '.join(differing)}",
            next_step="split_series makes a volume of each",
        )
    _refuse(Refusal.DUPLICATE_POSITIONS, "several images lie at one position", "one", f"{count} too many")


def _check_kinds(planes: tuple[Plane, ...]) -> None:
    for name in ("ComplexImageComponent", "EchoTime", "EffectiveEchoTime", "StackID"):
        if len({plane.kind.get(name) for plane in planes}) > 1:
            _refuse(Refusal.MIXED_KIND, f"slices of one stack differ in {name}", "the same in all", "several")


def positions(planes: tuple[Plane, ...] | list[Plane]) -> list[list[Plane]]:
    """The planes by where they lie along the first one's normal, in this order; those of one place, by number."""
    normal = planes[0].normal
    ordered = sorted(planes, key=lambda plane: float(plane.position @ normal))
    along = np.array([float(plane.position @ normal) for plane in ordered])
    found: list[list[Plane]] = [[ordered[0]]]
    for plane, step in zip(ordered[1:], np.diff(along), strict=True):
        if step <= SAME_MM:
            found[-1].append(plane)
        else:
            found.append([plane])
    return [sorted(group, key=lambda plane: plane.number) for group in found]


def telling(planes: tuple[Plane, ...] | list[Plane]) -> list[str]:
    """Names of what tells volumes apart: attributes that take the same values, more than one, at each position."""
    at = positions(planes)
    names = sorted({name for plane in planes for name in plane.kind})
    found = []
    for name in names:
        values = [Counter(plane.kind.get(name, "") for plane in group) for group in at]
        if len(values[0]) > 1 and all(value == values[0] for value in values):
            found.append(name)
    return found


def volumes(planes: list[Plane]) -> list[tuple[dict[str, str], list[Plane]]]:
    """Planes of one matrix and orientation as stacks with one plane a position, each with what tells it from the others.

    By the attributes of `telling`, then, where they leave several at each position and every image has a number, by the
    order of the numbers: the n-th at each position belongs to the n-th volume. One stack if nothing tells them apart.
    """
    by_stack: dict[str, list[Plane]] = defaultdict(list)
    for plane in planes:
        by_stack[plane.kind.get("StackID", "")].append(plane)
    found = []
    for name, stack in by_stack.items():
        said = {"StackID": name} if len(by_stack) > 1 else {}
        found += [(said | told, part) for told, part in _apart(stack)]
    return found


def _apart(planes: list[Plane]) -> list[tuple[dict[str, str], list[Plane]]]:
    if max(len(group) for group in positions(planes)) == 1:
        return [({}, planes)]
    names = telling(planes)
    parts: dict[tuple[str, ...], list[Plane]] = defaultdict(list)
    for plane in planes:
        parts[tuple(plane.kind.get(name, "") for name in names)].append(plane)
    found: list[tuple[dict[str, str], list[Plane]]] = []
    for values, part in parts.items():
        told = dict(zip(names, values, strict=True))
        at = positions(part)
        several = {len(group) for group in at}
        numbers = [plane.number for plane in part]
        if several == {1} or len(several) > 1 or len(set(numbers)) < len(numbers):
            found.append((told, part))
            continue
        found += [({**told, "order": str(n + 1)}, [group[n] for group in at]) for n in range(several.pop())]
    return found


def _line(planes: tuple[Plane, ...]) -> tuple[Vector, Vector]:
    """First position and step of the line through all positions, by least squares."""
    places = np.array([plane.position for plane in planes])
    index = np.arange(len(planes)) - (len(planes) - 1) / 2
    step = index @ places / float(index @ index)
    return places.mean(axis=0) + index[0] * step, step


def _check_line(planes: tuple[Plane, ...], origin: Vector, step: Vector, tolerance_mm: float) -> None:
    places = np.array([plane.position for plane in planes])
    off = np.linalg.norm(places - (origin + np.arange(len(planes))[:, None] * step), axis=1)
    worst = int(np.argmax(off))
    if off[worst] > tolerance_mm:
        got = f"slice {worst + 1} of {len(planes)} is {float(off[worst]):.3f} mm off the line"
        _refuse(Refusal.IRREGULAR_POSITIONS, "slices do not lie on a line", f"at most {tolerance_mm:.3f} mm off", got)


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _type(plane: Plane) -> str:
    samples, bits, signed, photometric = plane.pixels
    return f"{samples} x {bits} bits {'signed' if signed else 'unsigned'} {photometric}"


def _refuse(refusal: Refusal, what: str, expected: object, got: object) -> None:
    raise VolumeError(what, refusal=refusal, expected=expected, got=got)

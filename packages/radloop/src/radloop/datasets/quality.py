"""Every archived image looked at: readable, as declared, sane, and not there twice.

Each row of the instance table either passes, and gains its pixel digest and the columns `f_*`
(`imaging.pixels.features`), or is refused with one reason. Nothing is dropped: both together are the input.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pydicom
from pydicom.errors import InvalidDicomError

from radloop.catalog.reason import Reason
from radloop.errors import ArtifactError, DataError, DicomError
from radloop.imaging import pixels

MIN_SIDE = 32
"""Pixels. Below it nothing that a radiologist reads can be seen."""
MAX_ASPECT = 6.0
"""Longer to shorter side; a whole-leg or whole-spine radiograph has 2 to 4."""
MAX_WHITE = 0.5
"""Largest share of pixels at the brightest value."""
MAX_BLACK = 0.95
"""Largest share of pixels at the darkest value: a collimated hand leaves more background than one thinks."""
ORTHONORMAL = 1e-3
"""How far the direction cosines' lengths and product may be off (PS3.3 C.7.6.2.1.1): headers carry 6 decimals."""

_POOL_FROM = 256  # images; below it a worker's start (it imports pydicom and pyarrow) costs more than it saves


class Refused(NamedTuple):
    """One instance that may not enter a dataset."""

    sop_uid: str
    reason: Reason
    detail: str
    """What was wrong, with no value that could identify a patient."""


class _Looked(NamedTuple):
    """What was found in one file: a digest if it decoded, features if it is fine, else a reason."""

    pixel_sha256: str | None = None
    features: dict[str, float] | None = None
    reason: Reason | None = None
    detail: str = ""


def check(
    rows: Sequence[Mapping[str, Any]],
    archive: Path,
    *,
    expected_modalities: Collection[str] = (),
    expected_sop_classes: Collection[str] = (),
    released: Mapping[str, Collection[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> tuple[pa.Table, list[Refused]]:
    """Check de-identified instances.

    Of equal pixels within one patient the smallest sop_uid is kept (DUPLICATE_PIXELS for the others); equal pixels in
    several patients refuse all of them (DUPLICATE_PIXELS_ACROSS_PATIENTS), since whose they are is in doubt.

    Args:
        rows: the instance table: at least `sop_uid`, `patient`, `path` (relative to `archive`); `file_sha256` is
            compared where given.
        archive: the de-identified archive.
        expected_modalities: Modality must be one of them; empty accepts all.
        expected_sop_classes: SOPClassUID must be one of them; empty accepts all.
        released: sop_uid -> reasons that a person has overruled for it.
        progress: called with (done, total).
        workers: processes; 1 works in this one.

    Returns:
        The passed rows with `pixel_sha256` and `f_*`, and the refused ones; each sorted by sop_uid.

    Raises:
        DataError: a sop_uid comes twice.
        ArtifactError: a file is missing or was changed since it was archived.
    """
    ordered = sorted(rows, key=lambda row: str(row["sop_uid"]))
    twice = len(ordered) - len({row["sop_uid"] for row in ordered})
    if twice:
        raise DataError("an instance comes twice", expected="one row a sop_uid", got=f"{twice} more")
    overruled = released or {}
    look = partial(_look, archive, frozenset(expected_modalities), frozenset(expected_sop_classes), overruled)
    looked: list[_Looked] = []
    for one in _mapped(look, ordered, workers):
        looked.append(one)
        if progress is not None:
            progress(len(looked), len(ordered))
    looked = _without_duplicates(ordered, looked, overruled)
    passed = [
        {**row, "pixel_sha256": one.pixel_sha256, **{f"f_{name}": value for name, value in one.features.items()}}
        for row, one in zip(ordered, looked, strict=True)
        if one.features is not None
    ]
    refused = [
        Refused(str(row["sop_uid"]), one.reason, one.detail)
        for row, one in zip(ordered, looked, strict=True)
        if one.reason is not None
    ]
    return _table(passed, ordered), refused


def _mapped(
    look: Callable[[Mapping[str, Any]], _Looked], rows: Sequence[Mapping[str, Any]], workers: int
) -> Iterable[_Looked]:
    """`look` over rows, in order. Spawned workers, never forked: a fork of a process with threads can hang."""
    if workers <= 1 or len(rows) < _POOL_FROM:
        yield from map(look, rows)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(look, [dict(row) for row in rows], chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _table(passed: list[dict[str, Any]], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The passed rows as a table, with all columns of the input even where nothing passed."""
    names = dict.fromkeys(name for row in rows for name in row if not name.startswith("f_"))
    columns: dict[str, Any] = {"sop_uid": pa.array([row["sop_uid"] for row in passed], pa.string())}
    columns |= {name: pa.array([row.get(name) for row in passed]) for name in names if name != "sop_uid"}
    columns["pixel_sha256"] = pa.array([row["pixel_sha256"] for row in passed], pa.string())
    for name in pixels.FEATURES:
        columns[f"f_{name}"] = pa.array([row[f"f_{name}"] for row in passed], pa.float64())
    return pa.table(columns)


def _without_duplicates(
    rows: Sequence[Mapping[str, Any]], looked: list[_Looked], overruled: Mapping[str, Collection[str]]
) -> list[_Looked]:
    """Refuse what is there twice. An instance refused for itself keeps its reason, and still casts doubt on others."""
    same: defaultdict[str, list[int]] = defaultdict(list)
    for i, one in enumerate(looked):
        if one.pixel_sha256 is not None and one.reason is not Reason.EMPTY_IMAGE:
            same[one.pixel_sha256].append(i)
    for group in same.values():
        across = len({rows[i]["patient"] for i in group}) > 1
        fine = [i for i in group if looked[i].reason is None]  # in the order of sop_uid
        for i in fine if across else fine[1:]:
            reason = Reason.DUPLICATE_PIXELS_ACROSS_PATIENTS if across else Reason.DUPLICATE_PIXELS
            if reason in overruled.get(str(rows[i]["sop_uid"]), ()):
                continue
            detail = (
                f"the same pixels stand in {len(group)} instances of {'several patients' if across else 'one patient'}"
            )
            looked[i] = _Looked(looked[i].pixel_sha256, None, reason, detail)
    return looked


@contextmanager
def _unless(overruled: Collection[str]) -> Iterator[None]:
    """A check whose refusal a person may have overruled."""
    try:
        yield
    except DicomError as error:
        if error.reason not in overruled:
            raise


def _look(
    archive: Path,
    modalities: frozenset[str],
    sop_classes: frozenset[str],
    released: Mapping[str, Collection[str]],
    row: Mapping[str, Any],
) -> _Looked:
    """Look at one file. Runs in a worker."""
    data, overruled = _read(archive, row), released.get(str(row["sop_uid"]), ())
    try:
        ds = pydicom.dcmread(io.BytesIO(data))
        with _unless(overruled):
            _check_declared(ds, modalities, sop_classes)
        array = pixels.decode(ds)
    except InvalidDicomError:
        return _Looked(reason=Reason.NOT_DICOM, detail="no DICOM preamble and meta header")
    except DicomError as error:
        return _Looked(reason=Reason(error.reason), detail=_detail(error))
    except Exception as error:  # noqa: BLE001 - a parser may raise anything on a file that ends too soon
        return _Looked(reason=Reason.TRUNCATED, detail=f"the data set cannot be read: {type(error).__name__}")
    digest = pixels.digest(array)
    try:
        with _unless(overruled):
            _check_geometry(ds, array)
        with _unless(overruled):
            _check_window(ds)
        features = pixels.features(array, str(ds.PhotometricInterpretation), int(ds.BitsStored))
        with _unless(overruled):
            _check_content(array, str(ds.PhotometricInterpretation))
    except DicomError as error:
        return _Looked(digest, None, Reason(error.reason), _detail(error))
    return _Looked(digest, features)


def _read(archive: Path, row: Mapping[str, Any]) -> bytes:
    try:
        data = (archive / str(row["path"])).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(
            "an instance's file is not in the archive",
            expected="every row's path under archive/",
            got=Path(str(row["path"])).name,
            next_step="run the prepare pipeline again; if that does not help, restore archive/ from its backup",
        ) from None
    stated = row.get("file_sha256")
    if stated and hashlib.sha256(data).hexdigest() != stated:
        raise ArtifactError(
            "an archived file is not the one that was de-identified",
            expected=f"SHA-256 {stated}",
            got=f"another, in {Path(str(row['path'])).name}",
            next_step="restore archive/ from its backup: nobody may write there but the de-identifier",
        )
    return data


def _detail(error: DicomError) -> str:
    """One line; expected and got of radloop's own errors name kinds and numbers, never text of a header."""
    parts = [error.what] + [f"{name} {value}" for name in ("expected", "got") if (value := getattr(error, name))]
    return "; ".join(parts)


def _check_declared(ds: pydicom.Dataset, modalities: frozenset[str], sop_classes: frozenset[str]) -> None:
    sop_class, modality = str(ds.get("SOPClassUID") or ""), str(ds.get("Modality") or "")
    if sop_classes and sop_class not in sop_classes:
        wanted, name = ", ".join(sorted(sop_classes)), pydicom.uid.UID(sop_class).name
        got = "an unknown one" if name == sop_class else name
        raise DicomError("another SOP class", reason=Reason.UNEXPECTED_SOP_CLASS, expected=wanted, got=got)
    if modalities and modality not in modalities:
        got = modality if modality.isalnum() and len(modality) <= 6 else "no code"
        raise DicomError(
            "another modality", reason=Reason.UNEXPECTED_MODALITY, expected=", ".join(sorted(modalities)), got=got
        )


def _numbers(ds: pydicom.Dataset, keyword: str, reason: Reason) -> list[float] | None:
    """All values of an attribute as finite numbers, None if it is absent or empty."""
    try:
        value = ds.get(keyword)
        if value is None or value == "":
            return None
        numbers = [float(v) for v in (value if isinstance(value, Sequence | pydicom.multival.MultiValue) else [value])]
    except (TypeError, ValueError, OverflowError):
        raise DicomError(f"{keyword} holds no numbers", reason=reason, expected="numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise DicomError(f"{keyword} is not finite", reason=reason, expected="finite numbers", got=numbers)
    return numbers or None


def _check_geometry(ds: pydicom.Dataset, array: pixels.Pixels) -> None:
    """Matrix, spacing in mm (PS3.3 10.7.1, C.8.7.10) and direction cosines (PS3.3 C.7.6.2.1.1)."""
    bad = Reason.BAD_GEOMETRY
    short, long = sorted(array.shape)
    shape = f"{array.shape[0]} x {array.shape[1]}"
    if short < MIN_SIDE:
        raise DicomError("the image is too small", reason=bad, expected=f"{MIN_SIDE} pixels a side", got=shape)
    if long > MAX_ASPECT * short:
        raise DicomError("the image is a stripe", reason=bad, expected=f"sides within 1:{MAX_ASPECT:g}", got=shape)
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = _numbers(ds, keyword, bad)
        if spacing is not None and (len(spacing) != 2 or min(spacing) <= 0):
            raise DicomError(f"{keyword} is impossible", reason=bad, expected="two positive mm", got=spacing)
    cosines = _numbers(ds, "ImageOrientationPatient", bad)
    if cosines is not None and not _orthonormal(cosines):
        raise DicomError(
            "ImageOrientationPatient is no orientation",
            reason=bad,
            expected="two orthogonal directions of length 1",
            got=cosines,
        )


def _orthonormal(cosines: list[float]) -> bool:
    if len(cosines) != 6:
        return False
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    off = (row @ row - 1, column @ column - 1, row @ column)
    return bool(np.max(np.abs(off)) <= 2 * ORTHONORMAL)


def _check_window(ds: pydicom.Dataset) -> None:
    """WindowWidth is at least 1, above 0 under LINEAR_EXACT and SIGMOID (PS3.3 C.11.2.1.2); RescaleSlope is not 0."""
    bad = Reason.BAD_WINDOW
    width, centre = _numbers(ds, "WindowWidth", bad), _numbers(ds, "WindowCenter", bad)
    if (width is None) != (centre is None) or (width and centre and len(width) != len(centre)):
        raise DicomError("centres and widths of the window do not pair", reason=bad, expected="a centre for each width")
    if width is not None:
        linear = str(ds.get("VOILUTFunction") or "LINEAR") == "LINEAR"
        if min(width) < 1 and (linear or min(width) <= 0):
            expected = "at least 1" if linear else "above 0"
            raise DicomError("WindowWidth is impossible", reason=bad, expected=expected, got=min(width))
    slope = _numbers(ds, "RescaleSlope", bad)
    if slope is not None and (len(slope) != 1 or slope[0] == 0):
        raise DicomError("RescaleSlope is impossible", reason=bad, expected="one number, not 0", got=slope)


def _check_content(array: pixels.Pixels, photometric: str) -> None:
    """Refuse a constant, nearly empty or blown-out image."""
    low, high = array.min(), array.max()
    if low == high:
        raise DicomError("every pixel has the same value", reason=Reason.EMPTY_IMAGE)
    dark, bright = (high, low) if photometric == "MONOCHROME1" else (low, high)
    black, white = (np.count_nonzero(array == value) / array.size for value in (dark, bright))
    if black > MAX_BLACK:
        got = f"{black:.1%} at the darkest value"
        raise DicomError("the image is all but empty", reason=Reason.EMPTY_IMAGE, expected=f"{MAX_BLACK:.0%}", got=got)
    if white > MAX_WHITE:
        got = f"{white:.1%} at the brightest value"
        raise DicomError("the image is blown out", reason=Reason.SATURATED_IMAGE, expected=f"{MAX_WHITE:.0%}", got=got)

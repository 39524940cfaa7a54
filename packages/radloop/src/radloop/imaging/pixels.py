"""From a DICOM data set to its stored pixel values, their digest and their cheap statistics.

Arrays are `(rows, columns)` in the stored integer type, row 0 at the top as displayed (PS3.3 C.7.6.3).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RLELossless

from radloop.errors import DicomError
from radloop.imaging import sandbox

Pixels = NDArray[np.integer[Any]]

MAX_SIDE = 16384
"""Longest side in pixels that is taken for an image: bounds what a forged header can make a decoder allocate."""

FEATURES = (
    "mean",
    "std",
    "p01",
    "p50",
    "p99",
    "entropy",
    "edge_energy",
    "noise_sigma",
    "saturated_fraction",
)


def decode(ds: Dataset) -> Pixels:
    """The stored pixel values of a single-frame, single-sample image.

    Bits above BitsStored are no pixel values and are cleared or sign-extended (PS3.5 8.1.1), so that one image has one
    digest under every lossless transfer syntax. No modality or VOI transformation is applied.

    Args:
        ds: a data set with `file_meta` (the transfer syntax says how to decode).

    Returns:
        `(rows, columns)`, little-endian (u)int8, 16 or 32.

    Raises:
        DicomError: reason NO_PIXELS, UNSUPPORTED_OBJECT (float pixels), MULTI_FRAME, MULTI_CHANNEL, BAD_GEOMETRY or
            PIXELS_UNDECODABLE. Messages carry no attribute value that could identify a patient.
    """
    _check_decodable(ds)
    array = stored(ds)
    if array.ndim != 2 or array.dtype.kind not in "ui":
        raise DicomError(
            "the pixel data is no plane of integers",
            reason="PIXELS_UNDECODABLE",
            expected="(rows, columns) of integers",
            got=f"{array.shape} of {array.dtype}",
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def stored(ds: Dataset) -> NDArray[Any]:
    """The stored values of any pixel data: `([frames,] rows, columns[, samples])`, colour as encoded.

    Native and RLE data are read here, whatever needs a codec in a child process (`sandbox`), which may crash. Nobody
    in radloop calls a codec in another way.

    Raises:
        DicomError: reason PIXELS_UNDECODABLE.
    """
    try:
        syntax = ds.file_meta.TransferSyntaxUID
        if syntax.is_compressed and syntax != RLELossless:
            return sandbox.decode(ds)
        return pixel_array(ds, raw=True)
    except sandbox.Undecodable as error:
        got = str(error)
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they like on broken data
        got = f"{type(error).__name__} from the decoder"
    raise DicomError(
        "the pixel data cannot be decoded",
        reason="PIXELS_UNDECODABLE",
        expected="pixel data as Rows, Columns, BitsAllocated and the transfer syntax promise",
        got=got,
    )


def _check_decodable(ds: Dataset) -> None:
    """Raise the precise reason before a decoder is asked."""
    if "PixelData" not in ds:
        floating = "FloatPixelData" in ds or "DoubleFloatPixelData" in ds
        raise DicomError(
            "the object has no integer pixel data",
            reason="UNSUPPORTED_OBJECT" if floating else "NO_PIXELS",
            expected="PixelData",
            got="floating-point pixel data" if floating else "none",
        )
    if not ds.PixelData:
        raise DicomError("PixelData is empty", reason="NO_PIXELS", expected="pixels", got="0 bytes")
    frames = _integer(ds, "NumberOfFrames", 1)
    if frames != 1:
        raise DicomError("more than one frame", reason="MULTI_FRAME", expected="1 frame", got=f"{frames} frames")
    samples = _integer(ds, "SamplesPerPixel", 1)
    photometric = str(ds.get("PhotometricInterpretation") or "")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DicomError(
            "not a grey-scale image",
            reason="MULTI_CHANNEL",
            expected="SamplesPerPixel 1 and PhotometricInterpretation MONOCHROME1 or MONOCHROME2",
            got=f"SamplesPerPixel {samples}",
        )
    rows, columns = _integer(ds, "Rows", 0), _integer(ds, "Columns", 0)
    if not (0 < rows <= MAX_SIDE and 0 < columns <= MAX_SIDE):
        raise DicomError(
            "impossible Rows or Columns", reason="BAD_GEOMETRY", expected=f"1 to {MAX_SIDE}", got=f"{rows} x {columns}"
        )


def _integer(ds: Dataset, keyword: str, default: int) -> int:
    """The attribute as an integer; `default` if absent or empty, -1 if it is no number."""
    try:
        value = ds.get(keyword)
        return default if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError):  # from pydicom too, when the bytes are not what the VR says
        return -1


def digest(array: Pixels) -> str:
    """SHA-256 (hex) over shape, type and bytes: equal for equal pixels, whatever header or transfer syntax they had."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    state = hashlib.sha256(f"{little.shape}{little.dtype.str}".encode())
    state.update(little.data)
    return state.hexdigest()


def features(array: Pixels, photometric: str = "MONOCHROME2", bits_stored: int | None = None) -> dict[str, float]:
    """Intensity statistics for quality and drift, comparable between bit depths; MONOCHROME1 is inverted first.

    Args:
        array: `(rows, columns)` stored values, at least 3 x 3.
        photometric: PhotometricInterpretation.
        bits_stored: BitsStored; the array's own width if None.

    Returns:
        `FEATURES`, each rounded to 6 decimals. mean, std, p01, p50 and p99 are fractions of full scale (0 darkest, 1
        brightest value that BitsStored can hold). entropy is that of the 256-bin histogram over full scale, bits / 8.
        edge_energy (mean absolute difference of neighbours) and noise_sigma (Immerkaer, Comput. Vis. Image Underst.
        64, 1996) are in units of p99 - p01, hence free of gain. saturated_fraction is the share of pixels at the
        image's smallest or largest value, whichever is more: a detector clips below its container's maximum.
    """
    levels, top = _levels(array, bits_stored)
    if photometric == "MONOCHROME1":
        levels = top - levels
    counts = np.bincount(levels.ravel(), minlength=top + 1)
    n = levels.size
    used = np.flatnonzero(counts)
    weight = counts[used]
    mean = float(used @ weight) / n
    variance = max(float((used * used) @ weight) / n - mean * mean, 0.0)
    p01, p50, p99 = _percentiles(used, weight, (0.01, 0.50, 0.99))
    bins = np.bincount(used * 256 // (top + 1), weights=weight, minlength=256)
    share = bins[bins > 0] / n
    contrast = max(p99 - p01, 1)
    values = {
        "mean": mean / top,
        "std": math.sqrt(variance) / top,
        "p01": p01 / top,
        "p50": p50 / top,
        "p99": p99 / top,
        "entropy": abs(float(-(share * np.log2(share)).sum())) / 8,
        "edge_energy": _edge_energy(levels) / contrast,
        "noise_sigma": _noise_sigma(levels) / contrast,
        "saturated_fraction": max(int(weight[0]), int(weight[-1])) / n,
    }
    return {name: round(value, 6) for name, value in values.items()}


def _levels(array: Pixels, bits_stored: int | None) -> tuple[NDArray[np.int32], int]:
    """Stored values shifted to `0 .. top` (at most 16 bits: deeper images lose their lowest bits), and `top`."""
    bits = array.dtype.itemsize * 8 if bits_stored is None else min(bits_stored, array.dtype.itemsize * 8)
    drop = max(bits - 16, 0)
    top = (1 << (bits - drop)) - 1
    if drop:
        offset = 1 << (bits - 1) if array.dtype.kind == "i" else 0
        wide = (array.astype(np.int64) + offset) >> drop
    else:
        wide = array.astype(np.int32)
        if array.dtype.kind == "i":
            wide += 1 << (bits - 1)
    return np.clip(wide, 0, top, out=wide).astype(np.int32, copy=False), top


def _percentiles(used: NDArray[np.intp], weight: NDArray[np.intp], at: tuple[float, ...]) -> list[int]:
    """Nearest-rank percentiles of a histogram: no interpolation, hence exact."""
    cumulative = np.cumsum(weight)
    ranks = [max(math.ceil(fraction * int(cumulative[-1])), 1) for fraction in at]
    return [int(used[i]) for i in np.searchsorted(cumulative, ranks)]


def _edge_energy(levels: NDArray[np.int32]) -> float:
    """Mean absolute difference between horizontal and vertical neighbours."""
    across, down = np.diff(levels, axis=1), np.diff(levels, axis=0)
    total = int(np.abs(across, out=across).sum(dtype=np.int64)) + int(np.abs(down, out=down).sum(dtype=np.int64))
    return float(total / max(across.size + down.size, 1))


def _noise_sigma(levels: NDArray[np.int32]) -> float:
    """Immerkaer's estimate: the mask [[1,-2,1],[-2,4,-2],[1,-2,1]] as two second differences, one an axis."""
    rows, columns = levels.shape
    if rows < 3 or columns < 3:
        return 0.0
    second = levels[:, :-2] - 2 * levels[:, 1:-1] + levels[:, 2:]
    second = second[:-2] - 2 * second[1:-1] + second[2:]
    total = int(np.abs(second, out=second).sum(dtype=np.int64))
    return float(math.sqrt(math.pi / 2) * total / (6 * (rows - 2) * (columns - 2)))

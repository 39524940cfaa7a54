"""One function from a DICOM image to what the network sees, used by training and by the predictor alike.

Both halves are exact: the resize is integer arithmetic and the windowing is element-wise IEEE arithmetic between order
statistics, so training and serving agree bit for bit, on any machine and in any batch size.
"""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from radloop.errors import DicomError, SettingsError
from radloop.imaging import pixels, sandbox
from radloop.imaging.pixels import MAX_SIDE, Pixels


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode, orient grey values (bright = dense), centre-pad to a square, average down, window.

    Args:
        size: side of the output in pixels.
        window: "percentile" spans each image's own grey values, for radiographs, whose scale is arbitrary;
            "hu" is a fixed window in Hounsfield units, for CT.
        p_low, p_high: percentiles (0 to 100, nearest rank) that become 0 and 1 under "percentile".
        low_hu, high_hu: Hounsfield units that become 0 and 1 under "hu".
    """

    size: int = 96
    window: Literal["percentile", "hu"] = "percentile"
    p_low: float = 1.0
    p_high: float = 99.0
    low_hu: int = -160
    high_hu: int = 240

    def __post_init__(self) -> None:
        """Raises SettingsError on values that cannot work."""
        if not 8 <= self.size <= 2048:
            raise SettingsError("preprocessing.size is out of range", expected="8 to 2048 pixels", got=self.size)
        if not 0 <= self.p_low < self.p_high <= 100:
            got = f"{self.p_low}, {self.p_high}"
            raise SettingsError("the percentiles are no range", expected="0 <= p_low < p_high <= 100", got=got)
        if not -32768 <= self.low_hu < self.high_hu <= 32767:
            got = f"{self.low_hu}, {self.high_hu}"
            raise SettingsError("the HU window is no range", expected="-32768 <= low_hu < high_hu <= 32767", got=got)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the parameters and of the source of this module, `pixels` and `sandbox`."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic") + _source()).hexdigest()

    def native(
        self,
        source: Dataset | Pixels,
        photometric: str = "MONOCHROME2",
        *,
        slope: float | None = None,
        intercept: float | None = None,
        padding: tuple[int, int] | None = None,
    ) -> Pixels:
        """Decoded, bright = dense, padding made dark, centre-padded to a square, area-averaged to `(size, size)`.

        Args:
            source: a data set, whose attributes then stand for all other arguments, or stored values `(rows, columns)`.
            photometric: PhotometricInterpretation; MONOCHROME1 is mirrored within the image's own range of values.
            slope, intercept: RescaleSlope and RescaleIntercept (PS3.3 C.11.1). "hu" applies them; "percentile" needs
                only the slope's sign.
            padding: PixelPaddingValue and PixelPaddingRangeLimit as stored, inclusive (PS3.3 C.7.5.1.1.2).

        Returns:
            `(size, size)` in the stored integer type, or int16 Hounsfield units under "hu". The square's new borders
            and the padding take the darkest value of the valid pixels.

        Raises:
            DicomError: as `pixels.decode`; MULTI_FRAME if the array is no plane; BAD_GEOMETRY if it is empty or larger
                than 16384; BAD_WINDOW if "hu" is asked of an image without rescale attributes.
        """
        if isinstance(source, Dataset):
            photometric, slope, intercept, padding = _grey_scale(source)
            source = pixels.decode(source)
        _check_plane(source)
        outside = None if padding is None else _outside(source, padding)
        if self.window == "hu":
            return self._resized(_hounsfield(source, slope, intercept), outside, mirror=False)
        # A negative slope turns the grey scale round once more.
        mirror = (photometric == "MONOCHROME1") != (slope is not None and slope < 0)
        return self._resized(source, outside, mirror=mirror)

    def windowed(self, native: Pixels) -> NDArray[np.float32]:
        """What the network sees, 0 (dark) to 1 (bright).

        Args:
            native: `(size, size)` or a batch `(n, size, size)` from `native`.

        Returns:
            float32 `(1, size, size)`, or `(n, 1, size, size)`. An image of one value becomes 0.
        """
        if native.ndim not in (2, 3):
            raise SettingsError("no image", expected="(size, size) or (n, size, size)", got=native.shape)
        values = native.astype(np.float32)
        low, high = self._bounds(native)
        span = (high - low).astype(np.float32)
        scale = np.divide(np.float32(1), span, out=np.zeros_like(span), where=span > 0)
        values -= low
        values *= scale
        np.clip(values, 0, 1, out=values)
        return values[..., np.newaxis, :, :]

    def from_dataset(self, ds: Dataset) -> NDArray[np.float32]:
        """`windowed(native(ds))`: float32 `(1, size, size)`. Raises as `native`."""
        return self.windowed(self.native(ds))

    def _bounds(self, native: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The values that become 0 and 1, float32, shaped to broadcast against `native`."""
        if self.window == "hu":
            return np.array([self.low_hu], np.float32), np.array([self.high_hu], np.float32)
        flat = native.reshape(*native.shape[:-2], native.shape[-2] * native.shape[-1])
        last = flat.shape[-1] - 1
        low, high = round(last * self.p_low / 100), round(last * self.p_high / 100)
        ranked = np.partition(flat, (low, high), axis=-1)[..., (low, high), np.newaxis].astype(np.float32)
        return ranked[..., 0, :, np.newaxis], ranked[..., 1, :, np.newaxis]

    def _resized(self, array: Pixels, outside: NDArray[np.bool_] | None, *, mirror: bool) -> Pixels:
        """Area averaging in exact integers.

        With side S the weights are whole numbers that sum to S * S, so each output is a quotient of two integers,
        rounded half up. In float64 every partial sum stays below 2**53 and is exact in whatever order BLAS takes it.
        """
        valid = array if outside is None or outside.all() else array[~outside]
        low, high = int(valid.min()), int(valid.max())
        rows, columns = array.shape
        side = max(rows, columns)
        exact = np.float64 if (high - low) * side * side < 2**53 else np.int64
        raised = array.astype(exact)
        if mirror:
            np.subtract(high, raised, out=raised)
        else:
            raised -= low
        if outside is not None and valid is not array:
            raised[outside] = 0
        down, across = _weights(rows, side, self.size).astype(exact), _weights(columns, side, self.size).astype(exact)
        total = (down @ raised @ across.T).astype(np.int64)
        area = side * side
        averaged: Pixels = ((2 * total + area) // (2 * area) + low).astype(array.dtype)
        return averaged


@functools.lru_cache(maxsize=32)
def _weights(length: int, side: int, size: int) -> NDArray[np.float64]:
    """How much of each output pixel each input pixel covers: `(size, length)`, in units of 1 / size input pixel.

    `length` pixels stand centred on a line of `side`, which is cut into `size` equal parts: whole numbers, all of them.
    """
    start = (np.arange(length) + (side - length) // 2) * size
    cut = np.arange(size)[:, np.newaxis] * side
    overlap = np.minimum(start + size, cut + side) - np.maximum(start, cut)
    weights: NDArray[np.float64] = np.clip(overlap, 0, None).astype(np.float64)
    return weights


def _check_plane(array: Pixels) -> None:
    if array.ndim != 2:
        raise DicomError("not one plane", reason="MULTI_FRAME", expected="(rows, columns)", got=f"{array.ndim} axes")
    if not 0 < min(array.shape) <= max(array.shape) <= MAX_SIDE:
        shape = f"{array.shape[0]} x {array.shape[1]}"
        raise DicomError("impossible size", reason="BAD_GEOMETRY", expected=f"1 to {MAX_SIDE} a side", got=shape)


def _grey_scale(ds: Dataset) -> tuple[str, float | None, float | None, tuple[int, int] | None]:
    """PhotometricInterpretation, RescaleSlope, RescaleIntercept and the padding range of a data set."""
    slope, intercept = _number(ds, "RescaleSlope"), _number(ds, "RescaleIntercept")
    value = _number(ds, "PixelPaddingValue")
    if value is None:
        return str(ds.get("PhotometricInterpretation") or ""), slope, intercept, None
    limit = _number(ds, "PixelPaddingRangeLimit")
    padding = (int(value), int(value if limit is None else limit))
    return str(ds.get("PhotometricInterpretation") or ""), slope, intercept, padding


def _number(ds: Dataset, keyword: str) -> float | None:
    try:
        value: Any = ds.get(keyword)
        if value is None or value == "":
            return None
        if isinstance(value, bytes):  # PixelPaddingValue read without a PixelRepresentation to tell US from SS
            return float(int.from_bytes(value[:2], "little"))
        number = float(value)
        if math.isfinite(number):
            return number
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DicomError(f"{keyword} is no number", reason="BAD_WINDOW", expected="one number") from None


def _outside(array: Pixels, padding: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Mask of padding pixels, None if there are none. Values are taken modulo the type: US 63536 is SS -2000."""
    ends = np.array(padding, dtype=np.int64).astype(array.dtype)
    mask = (array >= ends.min()) & (array <= ends.max())
    return mask if mask.any() else None


def _hounsfield(array: Pixels, slope: float | None, intercept: float | None) -> Pixels:
    """Stored values to int16 Hounsfield units, rounded half to even, clipped to the type."""
    if slope is None or intercept is None or slope == 0:
        raise DicomError(
            "the image has no Hounsfield scale",
            reason="BAD_WINDOW",
            expected="RescaleSlope (not 0) and RescaleIntercept",
            got=f"slope {slope}, intercept {intercept}",
            next_step='set window = "percentile" for modalities other than CT',
        )
    return np.clip(np.rint(array * np.float64(slope) + intercept), -32768, 32767).astype(np.int16)


@functools.cache
def _source() -> bytes:
    """Digests of the modules that make the pixels; line ends do not count."""
    files = (Path(sandbox.__file__), Path(pixels.__file__), Path(__file__))
    return b"".join(hashlib.sha256(f.read_bytes().replace(b"\r\n", b"\n")).digest() for f in files)

"""All frames of any image, as stored and as a person would see them.

Arrays are `(frames, rows, columns, samples)`, row 0 at the top as displayed (PS3.3 C.7.6.3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut, convert_color_space
from pydicom.uid import UID, RLELossless

from radloop.errors import DicomError
from radloop.imaging import sandbox

_SAMPLED = 1 << 21
"""At most so many pixels are sorted for a window."""


def stored_frames(ds: Dataset) -> tuple[NDArray[Any], str]:
    """Stored values `(frames, rows, columns, samples)`, colour as the decoder gives it, and PhotometricInterpretation then.

    Native and RLE data are read here, whatever needs a codec in a child process (`sandbox`), which may crash.

    Raises:
        DicomError: NO_PIXELS, PIXELS_UNDECODABLE.
    """
    if "PixelData" not in ds or not ds.PixelData:
        raise DicomError("the object has no integer pixel data", reason="NO_PIXELS", expected="PixelData", got="none")
    try:
        syntax = UID(ds.file_meta.TransferSyntaxUID)
        if syntax.is_compressed and syntax != RLELossless:
            array, photometric = sandbox.decode_colour(ds)
        else:
            array, photometric = sandbox.decoded(ds)
    except sandbox.Undecodable as error:
        got = str(error)
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they like on broken data
        got = f"{type(error).__name__} from the decoder"
    else:
        samples = int(ds.get("SamplesPerPixel") or 1)
        return array.reshape(-1, int(ds.Rows), int(ds.Columns), samples), photometric
    raise DicomError(
        "the pixel data cannot be decoded",
        reason="PIXELS_UNDECODABLE",
        expected="pixel data as Rows, Columns, BitsAllocated and the transfer syntax promise",
        got=got,
    )


def displayed(frames: NDArray[Any], photometric: str, ds: Dataset) -> NDArray[np.uint8]:
    """8 bits as on a screen: `(frames, rows, columns, 1)`, MONOCHROME1 inverted, or RGB `(frames, rows, columns, 3)`.

    Grey values are windowed from the 0.5th to the 99.5th percentile of all frames, PixelPaddingValue left out: one window,
    so that pixels that do not change between frames do not change here.
    """
    if frames.shape[3] == 3:
        rgb = convert_color_space(frames, photometric, "RGB") if photometric.startswith("YBR_FULL") else frames
        return _eight_bits(rgb, int(ds.get("BitsStored") or 8))
    if photometric == "PALETTE COLOR":
        looked_up = apply_color_lut(frames[..., 0], ds)
        bits = int(ds.RedPaletteColorLookupTableDescriptor[2])
        return _eight_bits(looked_up[..., :3], bits)
    if frames.shape[3] != 1:
        raise DicomError(
            "neither grey nor colour",
            reason="PIXELS_UNDECODABLE",
            expected="1 or 3 samples a pixel",
            got=f"{frames.shape[3]}",
        )
    low, high = _window(frames, ds)
    scale = 255 / max(high - low, 1)
    grey = np.empty(frames.shape, dtype=np.uint8)
    for index, frame in enumerate(frames):  # one frame's floats at a time
        grey[index] = np.clip((frame.astype(np.float32) - low) * scale, 0, 255)
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _eight_bits(rgb: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rgb >> max(bits - 8, 0) if rgb.dtype != np.uint8 else rgb).astype(np.uint8, copy=False)


def _window(frames: NDArray[Any], ds: Dataset) -> tuple[float, float]:
    values = frames.reshape(-1)
    values = values[:: max(values.size // _SAMPLED, 1)]
    padding = ds.get("PixelPaddingValue")
    if isinstance(padding, int) and (kept := values[values != padding]).size:
        values = kept
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    return float(low), float(high)

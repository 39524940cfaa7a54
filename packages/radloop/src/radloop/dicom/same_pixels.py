"""Whether two files that claim one SOPInstanceUID hold the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom

_DESCRIBING = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "BitsAllocated",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "PlanarConfiguration",
)
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def same_pixels(a: Path, b: Path) -> bool:
    """Whether the decoded pixels of two DICOM files are equal; two objects without pixels are.

    The encoded bytes are compared first; only when they differ are both decoded. What cannot be decoded is not the
    same: better a conflict that a person looks at than one picture in the place of another.
    """
    try:
        first, second = (pydicom.dcmread(path, force=True) for path in (a, b))
        with_pixels = [any(keyword in dataset for keyword in _PIXELS) for dataset in (first, second)]
        if not all(with_pixels):
            return not any(with_pixels)
        return _encoded(first) == _encoded(second) or _decoded_equal(first, second)
    except Exception:  # noqa: BLE001 - decoders raise whatever they like
        return False


def _encoded(dataset: pydicom.Dataset) -> tuple[Any, ...]:
    syntax = dataset.file_meta.get("TransferSyntaxUID") or dataset.original_encoding
    values = tuple(dataset.get_item(keyword).value for keyword in _PIXELS if keyword in dataset)
    return (syntax, *(dataset.get(keyword) for keyword in _DESCRIBING), values)


def _decoded_equal(first: pydicom.Dataset, second: pydicom.Dataset) -> bool:
    import numpy as np

    from radloop.imaging import pixels

    a, b = pixels.stored(first), pixels.stored(second)
    return a.shape == b.shape and bool(np.array_equal(a, b))

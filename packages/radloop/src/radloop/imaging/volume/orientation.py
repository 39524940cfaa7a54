"""Between DICOM's patient coordinates and those of NIfTI.

DICOM's are LPS: x grows to the patient's left, y to posterior, z to the head (PS3.3 C.7.6.2.1.1). NIfTI's are RAS: x grows
to the right, y to anterior, z to the head. Both are in mm and right-handed.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Affine = NDArray[np.float64]
"""4 x 4, from voxel indices to mm."""

_FLIP = np.diag((-1.0, -1.0, 1.0, 1.0))
_REVERSE = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
_NIFTI_TYPES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768}


def lps_to_ras(affine: Affine) -> Affine:
    """The same voxels in RAS mm. Its own inverse: `lps_to_ras(lps_to_ras(a))` is `a`."""
    return np.asarray(_FLIP @ affine, dtype=np.float64)


def ras_to_lps(affine: Affine) -> Affine:
    """The same voxels in LPS mm."""
    return lps_to_ras(affine)


def reversed_indices(affine: Affine) -> Affine:
    """The affine for the transposed array: `(slice, row, column)` becomes `(column, row, slice)`, and back."""
    return np.asarray(affine @ _REVERSE, dtype=np.float64)


def write_nifti(path: Path, array: NDArray[Any], affine: Affine) -> None:
    """One NIfTI-1 file (.nii, or .nii.gz), whole or not there.

    Args:
        path: whose name ends in .nii or .nii.gz.
        array: `(columns, rows, slices)`, of an integer or floating type.
        affine: from those indices to RAS mm; written as sform (code 1, scanner anatomical).

    Raises:
        ValueError: an array that NIfTI-1 has no type for, or that is not three-dimensional.
    """
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    code = _NIFTI_TYPES.get(little.dtype.str[1:])
    if code is None or little.ndim != 3:
        raise ValueError(f"NIfTI-1 cannot hold {little.ndim} dimensions of {little.dtype}")
    head = np.zeros(1, dtype=_HEADER)
    head["sizeof_hdr"], head["vox_offset"], head["scl_slope"], head["magic"] = 348, 352, 1, b"n+1\0"
    head["dim"][0, :4], head["dim"][0, 4:] = (3, *little.shape), 1
    head["datatype"], head["bitpix"] = code, little.dtype.itemsize * 8
    head["pixdim"][0, :4] = (1, *np.linalg.norm(affine[:3, :3], axis=0))
    head["xyzt_units"], head["sform_code"], head["srow"] = 2, 1, affine[:3]
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as raw:
            data = head.tobytes() + b"\0\0\0\0" + little.tobytes(order="F")
            raw.write(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


_HEADER = np.dtype(
    {
        "names": [
            *("sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset"),
            *("scl_slope", "xyzt_units", "sform_code", "srow", "magic"),
        ],
        "formats": ["<i4", "(8,)<i2", "<i2", "<i2", "(8,)<f4", "<f4", "<f4", "u1", "<i2", "(3,4)<f4", "S4"],
        "offsets": [0, 40, 70, 72, 76, 108, 112, 123, 254, 280, 344],
        "itemsize": 348,
    }
)
"""The fields of a NIfTI-1 header that are not zero, at their offsets in bytes."""

"""Frames encoded without loss, in the transfer syntaxes for which an encoder is there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.encoders.base import get_encoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless, RLELossless

LOSSLESS: dict[str, UID] = {
    "1.2.840.10008.1.2.5": RLELossless,
    "1.2.840.10008.1.2.4.80": JPEGLSLossless,
    "1.2.840.10008.1.2.4.81": JPEGLSLossless,
    "1.2.840.10008.1.2.4.90": JPEG2000Lossless,
    "1.2.840.10008.1.2.4.91": JPEG2000Lossless,
}
"""Whose reversible codestreams a transfer syntax may hold (PS3.5 A.4.2 to A.4.4): near-lossless JPEG-LS and JPEG 2000 may
be lossy, and need not be."""
_PLUGINS = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}  # GDCM's RLE can abort


def encode(frame: NDArray[Any], ds: Dataset, photometric: str) -> bytes:
    """One frame in a reversible codestream of the instance's own transfer syntax.

    Args:
        frame: `(rows, columns, samples)` stored values.
        ds: its Image Pixel attributes and transfer syntax, one of `LOSSLESS`.
        photometric: PhotometricInterpretation that the codestream shall have.

    Raises:
        Exception: whatever the encoder does not like; the caller has another way.
    """
    plane = np.ascontiguousarray(frame if frame.shape[2] > 1 else frame[..., 0])
    options = as_pixel_options(ds) | {"photometric_interpretation": photometric, "number_of_frames": 1}
    if frame.shape[2] > 1:
        options["planar_configuration"] = 0
    syntax = LOSSLESS[str(ds.file_meta.TransferSyntaxUID)]
    options["transfer_syntax_uid"] = syntax
    return bytes(get_encoder(syntax).encode(plane, encoding_plugin=_PLUGINS[syntax], **options))

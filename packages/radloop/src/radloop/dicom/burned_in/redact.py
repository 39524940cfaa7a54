"""Pixels replaced, all else kept: rectangles emptied, bit for bit around them where the image is stored plainly, value for value
where it is compressed; or all frames by others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels.utils import pack_bits
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from radloop.dicom.burned_in.ocr import Box
from radloop.errors import DicomError
from radloop.imaging.encode import LOSSLESS, encode
from radloop.imaging.frames import stored_frames

_LOSSY = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 81))
_COUNTED = (
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
_BOT_LIMIT = 2**32 - 1


def emptied(ds: Dataset, frames: NDArray[Any], photometric: str, boxes: Sequence[Box]) -> Dataset:
    """A copy whose PixelData is empty inside the boxes, in every frame.

    Filled with PixelPaddingValue where there is one, which says that there is no image; else with what is shown black: a
    plain hole invents no anatomy, and nobody takes it for any. Native pixels outside keep all their bits; frames of a
    syntax with an encoder here are encoded again if they change, else their fragments are copied; any other syntax becomes
    Explicit VR Little Endian. Lossy images stay marked as lossy. Attributes that count pixel values are removed.

    Args:
        ds: the instance; not changed.
        frames, photometric: of it, as `stored_frames` gives them.

    Raises:
        DicomError: PIXELS_UNDECODABLE, the written pixels do not read as they were meant.
    """
    value = background(ds, frames, photometric)
    wanted = frames.copy()
    for box in boxes:
        wanted[:, box.y0 : box.y1, box.x0 : box.x1, :] = value

    def in_place(out: Dataset) -> bool:
        return _in_place(out, ds, wanted, boxes, value)

    return _written(ds, wanted, photometric, in_place)


def replaced(ds: Dataset, wanted: NDArray[Any]) -> Dataset:
    """The instance with other pixels: itself if they are the same, else a copy, written as `emptied` does but for native
    pixels, which become Explicit VR Little Endian.

    Args:
        ds: the instance; not changed.
        wanted: stored values as `stored_frames` gives them of `ds`: same shape, type and colour space.

    Raises:
        DicomError: PIXELS_UNDECODABLE, its own pixels cannot be decoded, are of another form, or the written ones do not
            read as they were meant.
    """
    frames, photometric = stored_frames(ds)
    if frames.shape != wanted.shape or frames.dtype != wanted.dtype:
        raise _not_written()
    return ds if np.array_equal(frames, wanted) else _written(ds, wanted, photometric)


def _written(
    ds: Dataset, wanted: NDArray[Any], photometric: str, first: Callable[[Dataset], bool] = lambda _: False
) -> Dataset:
    out = _copy(ds)
    for keyword in _COUNTED:
        if keyword in out:
            delattr(out, keyword)
    syntax = str(ds.file_meta.TransferSyntaxUID)
    if syntax in _LOSSY and not out.get("LossyImageCompression"):
        out.LossyImageCompression = "01"
    for way in (first, partial(_encoded, ds, wanted), partial(_plain, ds, wanted, photometric)):
        if way(out) and _reads_as(out, wanted):
            return out
        out.PixelData, out.file_meta = ds.PixelData, copy.deepcopy(ds.file_meta)
    raise _not_written()


def _not_written() -> DicomError:
    return DicomError(
        "the image cannot be written with its cleaned pixels",
        reason="PIXELS_UNDECODABLE",
        expected="pixels that read as they were written",
    )


def background(ds: Dataset, frames: NDArray[Any], photometric: str) -> NDArray[Any]:
    """The stored value of nothing `(samples,)`: PixelPaddingValue, or the darkest that occurs."""
    if photometric.startswith("YBR_FULL"):
        return np.array([0, 128, 128], dtype=frames.dtype)
    if frames.shape[3] > 1:
        return np.zeros(frames.shape[3], dtype=frames.dtype)
    padding = ds.get("PixelPaddingValue")
    if isinstance(padding, int) and np.iinfo(frames.dtype).min <= padding <= np.iinfo(frames.dtype).max:
        return np.array([padding], dtype=frames.dtype)
    if photometric == "PALETTE COLOR":
        return np.array([_darkest(ds, frames)], dtype=frames.dtype)
    return np.array([frames.max() if photometric == "MONOCHROME1" else frames.min()], dtype=frames.dtype)


def _darkest(ds: Dataset, frames: NDArray[Any]) -> int:
    from pydicom.pixels.processing import apply_color_lut

    used = np.unique(frames)
    return int(used[apply_color_lut(used[np.newaxis], ds)[0, :, :3].astype(np.int64).sum(axis=1).argmin()])


def _in_place(out: Dataset, ds: Dataset, wanted: NDArray[Any], boxes: Sequence[Box], value: NDArray[Any]) -> bool:
    """Native little-endian samples of whole bytes: only words inside the boxes change, unused bits of theirs included."""
    bits = int(ds.BitsAllocated)
    native = ds.file_meta.TransferSyntaxUID in (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
    if not native or bits not in (8, 16, 32) or "422" in str(ds.get("PhotometricInterpretation")):
        return False
    count, rows, columns, samples = wanted.shape
    raw = bytearray(ds.PixelData)
    words = np.frombuffer(raw, dtype=f"<u{bits // 8}", count=wanted.size)
    planar = samples > 1 and ds.get("PlanarConfiguration") == 1
    view = words.reshape((count, samples, rows, columns) if planar else wanted.shape)
    view = np.moveaxis(view, 1, 3) if planar else view
    shift = int(ds.get("HighBit", int(ds.BitsStored) - 1)) + 1 - int(ds.BitsStored)
    word = ((value.astype(np.int64) << max(shift, 0)) & ((1 << bits) - 1)).astype(view.dtype)
    for box in boxes:
        view[:, box.y0 : box.y1, box.x0 : box.x1, :] = word
    out.PixelData = bytes(raw)
    out["PixelData"].VR = ds["PixelData"].VR
    return True


def _encoded(ds: Dataset, wanted: NDArray[Any], out: Dataset) -> bool:
    """Frame by frame in the same transfer syntax, without loss."""
    syntax = ds.file_meta.TransferSyntaxUID
    if str(syntax) not in LOSSLESS:
        return False
    named = str(ds.PhotometricInterpretation)
    if named == "YBR_ICT":  # an irreversible transform: no frame can stay
        out.PhotometricInterpretation = named = "YBR_RCT"
        out.file_meta.TransferSyntaxUID = LOSSLESS[str(syntax)]
        before = None
    else:
        before = stored_frames(ds)[0]
    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    old = generate_frames(ds.PixelData, number_of_frames=len(wanted), extended_offsets=offsets)
    try:
        new = [
            stream if before is not None and np.array_equal(before[index], frame) else encode(frame, out, named)
            for index, (stream, frame) in enumerate(zip(old, wanted, strict=True))
        ]
    except Exception:  # noqa: BLE001 - encoders raise what they like; there is another way
        out.PhotometricInterpretation = ds.PhotometricInterpretation
        return False
    if sum(len(stream) + 9 for stream in new) > _BOT_LIMIT:
        out.PixelData, out.ExtendedOffsetTable, out.ExtendedOffsetTableLengths = encapsulate_extended(new)
    else:
        out.PixelData = encapsulate(new)
    out["PixelData"].is_undefined_length = True
    out["PixelData"].VR = "OB"
    if wanted.shape[3] > 1:
        out.PlanarConfiguration = 0
    return True


def _plain(ds: Dataset, wanted: NDArray[Any], photometric: str, out: Dataset) -> bool:
    """Decoded, as Explicit VR Little Endian."""
    one_bit = int(ds.BitsAllocated) == 1
    bits = 1 if one_bit else wanted.dtype.itemsize * 8
    little = wanted.astype(wanted.dtype.newbyteorder("<"), copy=False)
    data = bytes(pack_bits(little)) if one_bit else little.tobytes()
    out.file_meta.TransferSyntaxUID = UID(ExplicitVRLittleEndian)
    out.PhotometricInterpretation = "YBR_FULL" if photometric == "YBR_FULL_422" else photometric  # as decoded: 4:4:4
    out.BitsAllocated = bits
    out.BitsStored = min(int(ds.BitsStored), bits)
    out.HighBit = out.BitsStored - 1
    if wanted.shape[3] > 1:
        out.PlanarConfiguration = 0
    out.PixelData = data + b"\0" * (len(data) % 2)
    out["PixelData"].VR = "OB" if bits <= 8 else "OW"
    out["PixelData"].is_undefined_length = False
    return True


def _reads_as(out: Dataset, wanted: NDArray[Any]) -> bool:
    try:
        return bool(np.array_equal(stored_frames(out)[0], wanted))
    except DicomError:
        return False


def _copy(ds: Dataset) -> Dataset:
    """A data set of its own with the same elements, still raw where they were; those that change are copies."""
    out = Dataset(
        {
            tag: element if isinstance(element, RawDataElement) else copy.copy(element)
            for tag, element in ds._dict.items()
        }
    )
    implicit, little = ds.original_encoding
    out.set_original_encoding(bool(implicit), bool(little), ds._character_set)
    out.file_meta = copy.deepcopy(ds.file_meta)
    return out

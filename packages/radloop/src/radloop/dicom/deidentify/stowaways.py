"""What travels in the pixel data element without being pixels: comments in codestreams, bits above BitsStored.

No pixel is decoded, and no stored value of a pixel changes. What cannot be taken out safely (comments in the headers of
tile-parts, boxes before a JPEG 2000 codestream, bytes behind the last pixel) stays, and the PHI gate reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames

from radloop.dicom.deidentify.values import number_of

_NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"})
_RLE = "1.2.840.10008.1.2.5"
_JPEG2000 = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 92, 93, 201, 202, 203))
_JPEG = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (*range(50, 67), 70, 80, 81))
# Who wrote the codestream: in nearly every JPEG 2000 file, and nobody's name.
_ENCODER = re.compile(
    rb"(Kakadu-?[\w.]*|Created by OpenJPEG version [\d.]+|Creator: JasPer Version [\d.]+|OpenJPH Ver [\d.]+\.?|LEADTOOLS[\w .]*"
    rb"|CREATOR: gd-jpeg v[\d.]+ \(using IJG JPEG v\d+\), (default )?quality( = \d+)?)[\s\0]*"
)


@dataclass(frozen=True)
class Bits:
    """How native pixels are stored: BitsAllocated, BitsStored, PixelRepresentation, PixelPaddingValue if there is one."""

    allocated: int
    stored: int
    signed: bool
    padding: int | None = None

    @property
    def have_room(self) -> bool:
        """Whether there are bits above the stored ones, in pixels that are read as whole numbers here."""
        return self.allocated in (8, 16, 32) and 0 < self.stored < self.allocated


def bits_of(ds: Dataset) -> Bits | None:
    """From the header; None if it does not tell, or stores pixels otherwise than from the lowest bit up."""
    numbers = [number_of(ds, 0x0028, element) for element in (0x0100, 0x0101, 0x0102, 0x0103)]
    allocated, stored, high, signed = numbers
    if allocated is None or stored is None or high != stored - 1:
        return None
    return Bits(allocated, stored, signed == 1, number_of(ds, 0x0028, 0x0120))


def remove(ds: Dataset) -> bool:
    """Take out of PixelData what is no pixel, in place; whether there was any.

    Args:
        ds: with PixelData as read, little endian, and a `file_meta` that names the transfer syntax.
    """
    element = ds.get_item("PixelData", keep_deferred=True)
    value = None if element is None else element.value
    if not isinstance(value, bytes):
        return False
    syntax = str(ds.file_meta.get("TransferSyntaxUID", ""))
    if syntax in _NATIVE:
        bits = bits_of(ds)
        cleaned = None if bits is None else cleared(value, bits)
    else:
        cleaned = uncommented(value, syntax, number_of(ds, 0x0028, 0x0008) or 1)
        for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            if cleaned is not None and keyword in ds:
                del ds[keyword]  # offsets of the old fragments; the new ones have a basic offset table
    if cleaned is None:
        return False
    ds["PixelData"].value = cleaned
    return True


def cleared(value: bytes, bits: Bits) -> bytes | None:
    """Native little-endian pixels with zeros, or their sign, above BitsStored; None if it is so already.

    A pixel that equals PixelPaddingValue is left as it is: some scanners mark the outside of the field by a value beyond
    BitsStored.
    """
    if not bits.have_room or len(value) % (bits.allocated // 8):
        return None
    pixels = np.frombuffer(value, f"<u{bits.allocated // 8}")
    top, half = (1 << bits.stored) - 1, 1 << (bits.stored - 1)
    if pixels.size == 0 or pixels.max() <= top:
        return None
    odd = pixels > top
    if bits.signed:
        whole = pixels.view(f"<i{bits.allocated // 8}")
        odd &= (whole < -half) | (whole >= half)
    if bits.padding is not None:
        odd &= pixels != bits.padding & ((1 << bits.allocated) - 1)
    if not odd.any():
        return None
    low = pixels & pixels.dtype.type(top)
    if bits.signed:
        sign = ((1 << bits.allocated) - 1) ^ top
        low = np.where(low & half, low | pixels.dtype.type(sign), low)
    return bytes(np.where(odd, low, pixels).astype(pixels.dtype).tobytes())


def uncommented(value: bytes, syntax: str, frames: int) -> bytes | None:
    """Encapsulated pixels without comments and application segments; None if there are none to take out."""
    take = _taker(syntax)
    if take is None:
        return None
    try:
        before = list(generate_frames(value, number_of_frames=frames))
    except Exception:  # noqa: BLE001 - not what PS3.5 section A.4 describes: nothing is repaired here
        return None
    after = [take(frame) for frame in before]
    if after == before:
        return None
    return bytes(encapsulate(after, has_bot=True))


def _taker(syntax: str) -> Callable[[bytes], bytes] | None:
    if syntax in _JPEG:
        return _jpeg
    if syntax in _JPEG2000:
        return _jpeg2000
    return _rle if syntax == _RLE else None


def _jpeg(frame: bytes) -> bytes:
    """A JPEG or JPEG-LS frame without COM and APPn, but for those that decoding needs, and without what follows EOI."""
    end = frame.rfind(b"\xff\xd9")
    tail = frame[end + 2 :] if end >= 0 else b""
    kept, rest = bytearray(frame[:2]), 2
    for marker, start, stop in _segments(frame):
        payload = frame[start + 4 : stop]
        drop = (marker == 0xFE and not _ENCODER.fullmatch(payload)) or (
            0xE0 <= marker <= 0xEF and not _decodes(marker, payload)
        )
        if not drop:
            kept += frame[start:stop]
        rest = stop
    if len(tail) > 1:
        return bytes(kept) + frame[rest : end + 2]
    return bytes(kept) + frame[rest:]


def _segments(frame: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker segments before the first scan: second byte of the marker, where it begins and ends (T.81 B.1.1)."""
    position = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while position + 4 <= len(frame) and frame[position] == 0xFF and frame[position + 1] != 0xDA:
        stop = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if stop > len(frame):
            return
        yield frame[position + 1], position, stop
        position = stop


def _decodes(marker: int, payload: bytes) -> bool:
    """Application segments that change how samples are read: JFIF, Adobe's colour transform, HP's for JPEG-LS."""
    if marker == 0xE0:
        return payload[:5] == b"JFIF\0" and len(payload) == 14
    if marker == 0xEE:
        return payload[:5] == b"Adobe" and len(payload) == 12
    return marker == 0xE8 and payload[:4] == b"mrfx" and len(payload) == 5


def _jpeg2000(frame: bytes) -> bytes:
    """A JPEG 2000 codestream without comments in its main header (T.800 A.3)."""
    if frame[:4] != b"\xff\x4f\xff\x51":
        return frame
    kept, position = bytearray(frame[:2]), 2
    while position + 4 <= len(frame) and frame[position] == 0xFF and frame[position + 1] not in (0x90, 0xD9):
        stop = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if frame[position + 1] != 0x64 or _ENCODER.fullmatch(frame[position + 6 : stop]):
            kept += frame[position:stop]
        position = stop
    rest = frame[position:]
    return bytes(kept) + rest + (b"\0" if (len(kept) + len(rest)) % 2 else b"")


def _rle(frame: bytes) -> bytes:
    """An RLE frame with zeros in the unused offsets of its header (PS3.5 section G.5)."""
    used = 4 + 4 * int.from_bytes(frame[:4], "little")
    if len(frame) < 64 or used > 64 or not any(frame[used:64]):
        return frame
    return frame[:used] + bytes(64 - used) + frame[64:]

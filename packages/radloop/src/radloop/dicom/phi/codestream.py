"""Texts in the pixel data element: comments of compressed frames, and what follows the last pixel.

Only marker segments and headers are read; no pixel is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments

from radloop.dicom.phi.words import decodings

_NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"})
_RLE = "1.2.840.10008.1.2.5"
_JPEG2000 = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 92, 93, 201, 202, 203))
_JPEG2000_COMMENT = re.compile(rb"\xff\x64")
_JPEG_SEGMENT = re.compile(rb"\xff[\xe0-\xef\xfe]")


def codestream_texts(ds: Dataset) -> Iterator[str]:
    """Comments and application segments of compressed frames, and what follows the last native frame, as text.

    Args:
        ds: with PixelData as it was read, and a `file_meta` that names the transfer syntax.
    """
    if "PixelData" not in ds:
        return
    value = ds.get_item("PixelData", keep_deferred=True).value
    if isinstance(value, bytes):
        frames = _number(ds, "NumberOfFrames") or 1
        yield from pixel_texts(value, str(ds.file_meta.TransferSyntaxUID), _native_bytes(ds), frames)


def pixel_texts(value: bytes, transfer_syntax: str, native_bytes: int, frames: int = 1) -> Iterator[str]:
    """As `codestream_texts`, from the value alone.

    In the entropy-coded data of JPEG (ITU-T T.81 B.1.1.5) and JPEG-LS a byte FF is never followed by E0-EF or FE, so
    these markers are found without parsing; JPEG 2000 comments (FF64, T.800 A.9.2) stand in the main header and in
    tile-part headers, which begin with FF90 and end with FF93: no data holds these.

    Args:
        value: of PixelData, encapsulated where the transfer syntax compresses.
        transfer_syntax: its UID.
        native_bytes: how many bytes uncompressed frames take; 0 where the header does not tell.
        frames: their number.
    """
    if transfer_syntax in _NATIVE:
        tail = value[native_bytes:]
        yield from decodings(tail) if len(tail) > 1 else ()
        return
    try:
        fragments = list(generate_fragments(value))
    except Exception:  # noqa: BLE001 - not fragments as PS3.5 section A.4 has them: read as one
        fragments = [value]
    if frames == 1 and len(fragments) > 2:  # an offset table and one frame in pieces: a comment may lie across two
        fragments = [fragments[0], b"".join(fragments[1:])]
    reader = _rle_texts if transfer_syntax == _RLE else _jpeg2000_texts if transfer_syntax in _JPEG2000 else _jpeg_texts
    for fragment in fragments:
        for segment in reader(fragment):
            yield from decodings(segment)


def _jpeg_texts(fragment: bytes) -> Iterator[bytes]:
    yield from _payloads(fragment, _JPEG_SEGMENT)
    yield from _trailer(fragment)


def _jpeg2000_texts(fragment: bytes) -> Iterator[bytes]:
    start = max(fragment.find(b"\xff\x4f\xff\x51"), 0)  # SOC, SIZ; before them, in a JP2 file, are boxes
    if start:
        yield fragment[:start]
    begin = start
    while begin >= 0:
        end = fragment.find(b"\xff\x93", begin)
        header = fragment[begin : end + 1 or None]
        yield from _payloads(header, _JPEG2000_COMMENT)
        begin = fragment.find(b"\xff\x90", end) if end >= 0 else -1
    yield from _trailer(fragment)


def _rle_texts(fragment: bytes) -> Iterator[bytes]:
    """What stands in the unused offsets of the RLE header, which are to be zero (PS3.5 section G.5)."""
    used = 4 + 4 * int.from_bytes(fragment[:4], "little")
    unused = fragment[used:64] if len(fragment) >= 64 else b""
    if any(unused):
        yield unused


def _trailer(fragment: bytes) -> Iterator[bytes]:
    """What follows the end marker (EOI, EOC: FFD9) but for a padding byte."""
    end = fragment.rfind(b"\xff\xd9")
    if 0 <= end < len(fragment) - 3:
        yield fragment[end + 2 :]


def _payloads(data: bytes, marker: re.Pattern[bytes]) -> Iterator[bytes]:
    """Payloads of marker segments: marker, two bytes of length that count themselves, payload.

    What looks like a segment within another one's payload is read with that: in data that is no codestream every second
    byte may look like one.
    """
    end = 0
    for match in marker.finditer(data):
        start = match.start()
        if start >= end:
            end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
            yield data[start + 4 : end]


def _native_bytes(ds: Dataset) -> int:
    numbers = [_number(ds, k) for k in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
    if None in numbers:
        return 0
    rows, columns, samples, bits = (int(n or 0) for n in numbers)
    bits_all = rows * columns * samples * bits * (_number(ds, "NumberOfFrames") or 1)
    if "422" in str(ds.get("PhotometricInterpretation", "")):
        bits_all = bits_all * 2 // 3
    return (bits_all + 7) // 8


def _number(ds: Dataset, keyword: str) -> int | None:
    try:
        return int(ds.get(keyword))
    except Exception:  # noqa: BLE001 - unreadable is as good as absent here
        return None

"""What hides in and beside pixels: burned-in text, comments in codestreams, overlays, unused bits, trailers."""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pack_bits, pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from radloop.testing.burned import burn, stencil
from radloop.testing.phi.answers import CODESTREAM, TRAILER, UNUSED_BITS, Action, Box, Requirement
from radloop.testing.phi.planting import Planting, as_date

MARGIN_PX = 12
"""How far beyond a text's box a cleaner may paint: a recognised box is never exact."""


def latin(p: Planting) -> str:
    """The patient's name as a console's font can draw it."""
    family, given = p.who.patient_name.split("=")[0].split("^")[:2]
    text = f"{given} {family}"
    return text.upper() if text.isascii() else f"PATIENT {p.who.patient_id}"


def burn_in(p: Planting, pixels: NDArray[Any]) -> tuple[Box, ...]:
    """Draw what a console writes over an image, on every frame; the boxes of what identifies.

    Args:
        p: whose.
        pixels: `(frames, rows, columns)` or `(..., 3)`, changed in place.
    """
    born, top = as_date(p.who.birth_date), (1 << p.kind.bits) - 1
    lines = [latin(p), f"ID {p.who.patient_id}", f"{born:%d.%m.%Y}", f"{p.visit.day:%Y-%m-%d} 10:15"]
    lines = lines if p.kind.rgb else lines[: 1 + int(p.rng.integers(2))]
    size, boxes = max(14, pixels.shape[2] // 16), []
    value: Any = (top,) * 3 if p.kind.rgb else top
    for frame in range(len(pixels)):
        for number, line in enumerate(lines):
            before = pixels[frame].copy()
            drawn = burn(pixels[frame], line, at=(4, 4 + number * (size + 6)), size_px=size, value=value)
            left, upper, width, height = drawn.box
            changed = pixels[frame] != before
            ink = (changed.any(axis=-1) if changed.ndim == 3 else changed)[upper : upper + height, left : left + width]
            packed = base64.b64encode(zlib.compress(np.packbits(ink).tobytes())).decode("ascii")
            boxes.append(Box(frame, left, upper, left + width, upper + height, packed))
    return tuple(boxes)


def mark_side(p: Planting, pixels: NDArray[Any]) -> None:
    """A lead letter, which belongs to the image and stays."""
    rows, columns = pixels.shape[1:3]
    for frame in pixels:
        burn(frame, "R", at=(columns - 40, rows - 44), size_px=28, value=0.8 * ((1 << p.kind.bits) - 1))


def write(p: Planting, pixels: NDArray[Any], syntax: str, comment: str) -> None:
    """Encode the pixels, with a comment in the codestream where it has a place for one (JPEG, JPEG 2000)."""
    ds = p.ds
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    if syntax == JPEGBaseline8Bit:
        pixels = (pixels >> max(p.kind.bits - 8, 0)).astype(np.uint8)
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit = 7
        ds.LossyImageCompression, ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = (
            "01",
            "10",
            "ISO_10918_1",
        )
        ds.PixelData = encapsulate([_file(frame, "JPEG", comment, quality=90, subsampling=0) for frame in pixels])
        if p.kind.rgb:
            ds.PhotometricInterpretation = "YBR_FULL"
    elif syntax == JPEG2000Lossless:
        ds.PixelData = encapsulate(
            [_file(frame, "JPEG2000", comment, no_jp2=True, irreversible=False) for frame in pixels]
        )
        if p.kind.rgb:
            ds.PhotometricInterpretation = "YBR_RCT"
    elif p.kind.bits == 1:
        ds.PixelData = pack_bits(pixels.ravel(), pad=True)
    else:
        ds.PixelData = pixels.tobytes() + (b"\0" if pixels.nbytes % 2 else b"")
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else UID(syntax)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated == 16 and syntax == ds.file_meta.TransferSyntaxUID else "OB"
    if syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    if comment and syntax in (JPEGBaseline8Bit, JPEG2000Lossless):
        p.require(Action.TEXT_REMOVED, CODESTREAM, p.who.patient_id)


def _file(frame: NDArray[Any], kind: str, comment: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(frame)
    if comment:
        how["comment"] = comment
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def hide_in_unused_bits(p: Planting, pixels: NDArray[Any]) -> None:
    """Write the patient's number into the bits above BitsStored, half a byte a pixel, as an overlay of old would stand."""
    nibbles = [n for byte in p.who.patient_id.encode("ascii") for n in (byte >> 4, byte & 15)]
    flat = pixels.reshape(-1)
    flat[: len(nibbles)] |= np.array(nibbles, dtype=pixels.dtype) << 12
    p.require(Action.TEXT_REMOVED, UNUSED_BITS, p.who.patient_id)


def unused_bits(ds: Dataset) -> bytes:
    """The upper half bytes of 16-bit pixels of which 12 are stored, joined two by two; empty for any other image."""
    if ds.get("BitsStored") != 12 or ds.get("BitsAllocated") != 16 or ds.file_meta.TransferSyntaxUID.is_compressed:
        return b""
    upper = (np.frombuffer(ds.PixelData, "<u2") >> 12).astype(np.uint8)
    upper = upper[: len(upper) // 2 * 2]
    return bytes(upper[0::2] << 4 | upper[1::2])


def overlay(p: Planting) -> None:
    """An overlay plane that spells the patient's number, with a label and a description."""
    ds, drawn = p.ds, stencil(p.who.patient_id, size_px=16) > 0.5
    plane = np.zeros((ds.Rows, ds.Columns), dtype=np.uint8)
    plane[4 : 4 + drawn.shape[0], 4 : 4 + drawn.shape[1]] = drawn[: ds.Rows - 4, : ds.Columns - 4]
    for element, vr, value in (
        (0x0010, "US", ds.Rows), (0x0011, "US", ds.Columns), (0x0040, "CS", "G"), (0x0050, "SS", [1, 1]),
        (0x0100, "US", 1), (0x0102, "US", 0), (0x0022, "LO", f"label of {p.who.spoken_name}"[:64]),
        (0x1500, "LO", p.who.patient_id), (0x3000, "OW", pack_bits(plane.ravel(), pad=True)),
        (0x4000, "LT", p.comment()[0]),
    ):  # fmt: skip
        ds.add_new(0x60000000 | element, vr, value)
    p.require(Action.TEXT_REMOVED, "(6000,0022)", p.who.spoken_name)
    p.require(Action.TEXT_REMOVED, "(6000,1500)", p.who.patient_id)
    p.require(Action.PIXELS_HIDDEN, "(6000,3000)")


def trail(p: Planting) -> None:
    """Leave the patient's number in the padding behind the data set."""
    p.ds.add_new(0xFFFCFFFC, "OB", f"{p.who.patient_id} {p.who.birth_date}".encode("ascii").ljust(32, b"\0"))
    p.require(Action.TEXT_REMOVED, TRAILER, p.who.patient_id)


def decoded(ds: Dataset) -> NDArray[Any]:
    """Stored pixels `(frames, rows, columns)` or `(..., samples)`, without what stands in unused bits."""
    pixels = pixel_array(ds, raw=True)
    frames = int(ds.get("NumberOfFrames") or 1)
    pixels = pixels if frames > 1 else pixels[np.newaxis]
    mask = (1 << int(ds.BitsStored)) - 1
    return pixels & mask if ds.PixelRepresentation == 0 else pixels


def digest(pixels: NDArray[Any], boxes: Iterable[Box]) -> str:
    """Of all pixels that are not within `MARGIN_PX` of a box: SHA-256 in hexadecimal."""
    rest = np.array(pixels)
    for box in boxes:
        top, left = max(box.top - MARGIN_PX, 0), max(box.left - MARGIN_PX, 0)
        rest[box.frame, top : box.bottom + MARGIN_PX, left : box.right + MARGIN_PX] = 0
    return hashlib.sha256(f"{rest.shape}".encode() + rest.astype("<i4").tobytes()).hexdigest()


def is_hidden(box: Box, before: float, pixels: NDArray[Any]) -> bool:
    """Whether letters no longer stand out: their contrast to the box's ground fell below a tenth of what it was."""
    return contrast(box, pixels) < 0.1 * before


def contrast(box: Box, pixels: NDArray[Any]) -> float:
    """Mean difference between ink and ground within a box, in stored values."""
    height, width = box.bottom - box.top, box.right - box.left
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(box.ink)), np.uint8), count=height * width)
    ink = bits.reshape(height, width).astype(bool)
    patch = pixels[box.frame, box.top : box.bottom, box.left : box.right].astype(np.float64)
    patch = patch.mean(axis=-1) if patch.ndim == 3 else patch
    if patch.shape != ink.shape or not ink.any() or ink.all():
        return 0.0
    return float(abs(patch[ink].mean() - patch[~ink].mean()))


def require_pixels(p: Planting, boxes: tuple[Box, ...]) -> None:
    """What is required of the pixels as they are encoded now."""
    pixels = decoded(p.ds)
    for box in boxes:
        value = f"{contrast(box, pixels):.3f}"
        p.required.append(Requirement(Action.PIXELS_HIDDEN, "PixelData", value, (box,)))
    p.required.append(Requirement(Action.PIXELS_RETAINED, "PixelData", digest(pixels, boxes), boxes))

"""Text burned into pixels, as film digitisers, ultrasound consoles and screenshots do it, with the boxes where it stands.

The recognition in `radloop.dicom.burned_in` is measured against it, and knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Burned:
    """Where a text stands: `box` is (x, y, width, height) in pixels, x across, y down."""

    text: str
    box: tuple[int, int, int, int]


def stencil(
    text: str, *, size_px: int, angle: int = 0, smooth: bool = True, font: str | None = None
) -> NDArray[np.float32]:
    """The text's coverage `(rows, columns)`, 0 to 1.

    Args:
        text: Latin letters and digits with Pillow's own font; others need `font`.
        size_px: the em in pixels: capitals are about 0.7 of it.
        angle: 0, 90, 180 or 270 degrees, counter-clockwise.
        smooth: False: pixels are on or off, as in a console's bitmap font.
        font: a TrueType file, where Pillow's own is not wanted.
    """
    face = ImageFont.truetype(font, size_px) if font else ImageFont.load_default(size_px)
    left, top, right, bottom = (round(v) for v in face.getbbox(text))
    image = Image.new("L", (right - left + 2, bottom - top + 2), 0)
    draw = ImageDraw.Draw(image)
    draw.fontmode = "L" if smooth else "1"
    draw.text((1 - left, 1 - top), text, fill=255, font=face)
    return np.rot90(np.asarray(image, dtype=np.float32) / 255, angle // 90)


def burn(
    pixels: NDArray[Any],
    text: str,
    *,
    at: tuple[int, int],
    size_px: int,
    value: float | tuple[float, ...],
    angle: int = 0,
    smooth: bool = True,
    plate: float | None = None,
    font: str | None = None,
) -> Burned:
    """Write a text into one plane or one frame, in place; what would leave the image is moved inside.

    Args:
        pixels: `(rows, columns)` or `(rows, columns, samples)`, any integer type.
        text, size_px, angle, smooth, font: as `stencil`.
        at: (x, y) of the text's upper left corner.
        value: the stored value of the letters; one a sample for colour.
        plate: the stored value of a filled box behind the letters, or None.
    """
    ink = stencil(text, size_px=size_px, angle=angle, smooth=smooth, font=font)
    rows, columns = pixels.shape[:2]
    ink = ink[:rows, :columns]
    height, width = ink.shape
    x, y = max(min(at[0], columns - width), 0), max(min(at[1], rows - height), 0)
    where = pixels[y : y + height, x : x + width]
    if plate is not None:
        where[...] = plate
    mask = ink[..., np.newaxis] if pixels.ndim == 3 else ink
    where[...] = np.rint(where * (1 - mask) + np.asarray(value, dtype=np.float32) * mask).astype(pixels.dtype)
    return Burned(text, (x, y, width, height))

"""Text burned into pixels: how much is found, what is taken for text that is none, and what looking costs.

    .venvs/core/bin/python benchmarks/burned_in.py [--images 24]

Text in Pillow's own font and, where they are installed, DejaVu Sans and Sans Mono is burned over phantom radiographs and real
images (RADLOOP_TEST_DATA), one text an image, in each size; 5 of 10 texts upright, the others turned by 90 or 270 degrees; every
second one without smoothing. `easy`: white or black where the picture is not. `faint`: 25 to 60 grey levels of 255 from the
median of what is behind. "gone" counts texts of which at most 2 % of the ink is left. Times are CPU, one thread.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image

from radloop.dicom.burned_in import MARGIN
from radloop.dicom.burned_in.ocr import Reader
from radloop.imaging.frames import displayed, stored_frames
from radloop.testing import phantoms
from radloop.testing.burned import burn, stencil

View = NDArray[np.uint8]
SIZES_PX = (10, 12, 14, 18, 24, 32, 40)
TEXTS = (
    "HARROWGATE MILLICENT", "Okonkwo-Bright, Tobias", "DOB 14.03.1961", "H00042-7781", "03/02/2017 05:24PM",
    "Marlstone Infirmary", "M 61Y", "Quillfeather^Imogen", "ID:120907058", "Dr. Strong",
)  # fmt: skip
CYRILLIC_AND_GREEK = ("Преображенский", "Голенищева Аграфена", "Παπαδημητρίου", "Клиника Здравница")
FONTS = [
    path
    for name in ("DejaVuSans", "DejaVuSansMono")
    if (path := f"/usr/share/fonts/truetype/dejavu/{name}.ttf") and Path(path).exists()
]


def phantom(seed: int, site: str, rows: int | None = None, columns: int | None = None) -> View:
    scanner = phantoms.SCANNERS[site]
    if rows and columns:
        scanner = replace(scanner, rows=rows, columns=columns)
    rng = np.random.default_rng(seed)
    plane = phantoms.radiograph(
        phantoms.anatomy(rng, sex="MF"[seed % 2], age_years=60), scanner, rng, finding=bool(seed % 2)
    )
    grey = plane / ((1 << scanner.bits_stored) - 1)
    return (255 * (1 - grey if scanner.photometric == "MONOCHROME1" else grey)).astype(np.uint8)


def shown(path: Path) -> View:
    ds = pydicom.dcmread(path)
    frames, photometric = stored_frames(ds)
    return displayed(frames, photometric, ds)[0, :, :, 0]


def sets(count: int) -> Iterator[tuple[str, list[View]]]:
    yield "phantom CR 256 x 288", [phantom(seed, "A") for seed in range(count)]
    yield "phantom DX 320 x 320", [phantom(seed, "B") for seed in range(count)]
    data = Path(os.environ.get("RADLOOP_TEST_DATA", "../shared/data"))
    if data.is_dir():
        files = sorted((data / "cxr_kermany224").rglob("*.jpeg"))
        chosen = random.Random(1).sample(files, min(2 * count, len(files)))
        yield "chest, children, 224 x 224", [np.asarray(Image.open(file).convert("L")) for file in chosen]
        slices = sorted((data / "ct_contrast_tcga").rglob("*.dcm"))
        yield "chest CT 512 x 512", [shown(file) for file in slices[: count // 2]]
    yield "phantom DX 2000 x 1600", [phantom(seed, "B", 2000, 1600) for seed in range(max(count // 4, 4))]


def value_for(rng: random.Random, behind: View, faint: bool) -> float:
    middle = float(np.median(behind))
    if not faint:
        return 255.0 if middle < 128 else 0.0
    away = rng.uniform(25, 60) * rng.choice((-1, 1))
    return middle + (away if 0 <= middle + away <= 255 else -away)


def left_over(
    reader: Reader, view: View, rng: random.Random, size_px: int, faint: bool, texts: tuple[str, ...]
) -> float:
    """The share of a burned text's ink that stands outside all boxes found."""
    text, angle = rng.choice(texts), rng.choice((0, 0, 90, 270))
    font = rng.choice(FONTS) if texts is CYRILLIC_AND_GREEK else rng.choice([None, *FONTS])
    smooth = rng.random() < 0.5
    ink = stencil(text, size_px=size_px, angle=angle, smooth=smooth, font=font)
    rows, columns = view.shape
    x, y = (rng.randrange(max(side - length, 1)) for side, length in ((columns, ink.shape[1]), (rows, ink.shape[0])))
    behind = view[y : y + ink.shape[0], x : x + ink.shape[1]]
    written = view.copy()
    value = value_for(rng, behind, faint)
    burn(written, text, at=(x, y), size_px=size_px, value=value, angle=angle, smooth=smooth, font=font)
    visible = np.abs(written.astype(int) - view) >= (12 if faint else 30)
    covered = np.zeros(view.shape, dtype=bool)
    for found in reader.texts(written[:, :, np.newaxis]):
        box = found.wider(*MARGIN, view.shape)
        covered[box.y0 : box.y1, box.x0 : box.x1] = True
    return float((visible & ~covered).sum() / max(visible.sum(), 1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=24)
    count = parser.parse_args().images
    reader, rng = Reader(), random.Random(7)
    reader.texts(np.zeros((64, 64, 1), np.uint8))
    for name, views in sets(count):
        began = time.process_time()
        boxes = [reader.texts(view[:, :, np.newaxis]) for view in views]
        spent = (time.process_time() - began) / len(views)
        touched = sum(bool(found) for found in boxes)
        area = np.mean(
            [
                sum((b.x1 - b.x0) * (b.y1 - b.y0) for b in found) / view.size
                for found, view in zip(boxes, views, strict=True)
            ]
        )
        print(
            f"\n{name}: {1000 * spent:.0f} ms an image; as they are: boxes in {touched} of {len(views)}, {area:.2%} of the area"
        )
        scripts = [("easy", False, TEXTS), ("faint", True, TEXTS)]
        if FONTS:
            scripts.append(("Cyrillic, Greek", False, CYRILLIC_AND_GREEK))
        for kind, faint, texts in scripts:
            cells = []
            for size_px in SIZES_PX:
                left = [left_over(reader, view, rng, size_px, faint, texts) for view in views]
                cells.append(f"{size_px} px {np.mean(np.array(left) <= 0.02):.0%}/{np.mean(np.array(left) < 0.5):.0%}")
            print(f"  {kind:16} gone/found: {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()

"""Text in pixels: where it stands, and whether it is a marker that stays.

Two networks of RapidOCR (PP-OCR, Apache-2.0; both in its wheel, nothing is fetched): one finds text of any size, direction and
polarity, the other reads what was found. What is read is compared with `MARKERS` and forgotten: it is identifying.
"""

from __future__ import annotations

import logging
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radloop.errors import SettingsError

View = NDArray[np.uint8]
"""`(rows, columns, 1)` grey or `(rows, columns, 3)` RGB."""
Quad = NDArray[np.float64]
"""Four corners `(4, 2)`, x and y in pixels."""

MARKERS = frozenset(
    str.split(
        """L R LT RT LEFT RIGHT AP PA A P H F LAT LATERAL LL RL OBL LPO RPO LAO RAO CC MLO ML LM RCC LCC RMLO LMLO XCCL
    ERECT UPRIGHT SUPINE PRONE SITTING STANDING SEMI DECUB INSP EXP PORTABLE MOBILE"""
    )
)
"""What a radiographer places beside the patient; a text of these words only stays."""

TILE, OVERLAP = 640, 128
"""Pixels a side of what the detector sees at once. It weighs the whole: one small text in 1280 x 1280 pixels of noise is found
in a quarter of all cases, in 640 x 640 in all."""
_SMALLEST = 8
"""A side of fewer pixels holds no text."""
_PAD = 64
_FOUND, _INK = 0.5, 0.3  # the detector's thresholds of a box and of a pixel
_SURE, _CLEAR = 0.6, 0.8
"""A reading below the first is no marker, and two letters are no text; what is large is text from the second on."""
_LARGE = 0.25
_LARGE_PX = (64, 128)
"""Of the image's shorter side, and within these pixels: what is higher is likelier a rib cage than a text."""
_LONG = 3
"""A finding so many times as long as it is high is text even if it cannot be read: a script that the reader does not know."""
_SPARSE = (12, 0.2)  # pixels, share: an extreme value that holds fewer or more is no text


@dataclass(frozen=True)
class Box:
    """An upright rectangle in pixels: columns x0 to x1, rows y0 to y1, ends excluded."""

    x0: int
    y0: int
    x1: int
    y1: int

    def meets(self, other: Box) -> bool:
        """Whether the two share a pixel."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def wider(self, across: float, along: float, shape: tuple[int, int]) -> Box:
        """With margins of so many times the height of the text (the shorter side), at least two pixels, inside `(rows, columns)`.

        Args:
            across: above and below the line. along: before and after it, where letters may have been missed.
            shape: of the image.
        """
        width, height = self.x1 - self.x0, self.y1 - self.y0
        short = min(width, height)
        narrow, wide = max(round(across * short), 2), max(round(along * short), 2)
        x = wide if width > height else narrow
        y = wide if height > width else narrow
        rows, columns = shape
        return Box(max(self.x0 - x, 0), max(self.y0 - y, 0), min(self.x1 + x, columns), min(self.y1 + y, rows))


def installed() -> bool:
    """Whether the extra `ocr` is there."""
    return util.find_spec("rapidocr") is not None


def check_installed() -> None:
    """Raise SettingsError where the extra `ocr` is not there."""
    if not installed():
        raise SettingsError(
            "text in pixels cannot be looked for: RapidOCR is not installed",
            expected='the extra "ocr"',
            got="none",
            next_step='pip install "radloop[ocr]", or write pixels = "off" under [deidentify] if the images hold no text',
        )


class Reader:
    """Both networks, loaded once a process when first asked. Safe for threads: each call computes on its own thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: Any = None

    def texts(self, view: View) -> list[Box]:
        """Where identifying text may stand: upright boxes, markers left out. Empty for what is too small to hold any."""
        if min(view.shape[:2]) < _SMALLEST:
            return []
        self._load()
        quads = [quad for layer, scale in _looks(view) for quad in self._found(layer, scale)]
        judged = [self._judged(view, group) for group in _groups(quads)]
        boxes = [box for said, box in judged if said == "text"]
        shape = (view.shape[0], view.shape[1])
        near = [box.wider(1.0, 1.0, shape) for box in boxes]  # a letter beside a text is part of it
        return boxes + [box for said, box in judged if said == "" and any(box.meets(other) for other in near)]

    def _load(self) -> None:
        with self._lock:
            if self._engine is None:
                self._engine = _engine()

    def _found(self, layer: View, scale: float) -> Iterator[Quad]:
        """Boxes of one layer, in the view's pixels."""
        import cv2

        if scale != 1:
            way = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
            layer = np.atleast_3d(cv2.resize(layer, None, fx=scale, fy=scale, interpolation=way))
        for tile, x, y in _tiles(_padded(layer)):
            boxes = self._engine.text_det(_bgr(tile)).boxes
            for quad in () if boxes is None else boxes:
                yield (np.asarray(quad, dtype=np.float64) + np.array([x, y])) / scale

    def _judged(self, view: View, group: list[Quad]) -> tuple[str, Box]:
        """What a group of overlapping findings is (see `_said`), and the box of those that make it that."""
        said = [self._said(view, quad) for quad in group]
        verdict = next((word for word in ("text", "marker", "large") if word in said), "")
        corners = np.concatenate([quad for quad, word in zip(group, said, strict=True) if word == verdict])
        low, high = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0)) + 1
        rows, columns = view.shape[:2]
        return verdict, Box(
            max(int(low[0]), 0), max(int(low[1]), 0), min(int(high[0]), columns), min(int(high[1]), rows)
        )

    def _said(self, view: View, quad: Quad) -> str:
        """`text` for what reads as text or may be text, `marker`, `large` for what is too large for a text, or nothing."""
        from rapidocr.utils.process_img import get_rotate_crop_image

        crop = get_rotate_crop_image(_bgr(view), quad.astype(np.float32))
        short, long = sorted(crop.shape[:2])
        if short < 2:
            return ""
        large = short > min(max(_LARGE * min(view.shape[:2]), _LARGE_PX[0]), _LARGE_PX[1])
        readings: list[tuple[str, float]] = []
        for way in (crop, np.ascontiguousarray(crop[::-1, ::-1])):  # it may stand on its head
            readings.append(self._read(way))
            if readings[-1][1] >= _CLEAR and (is_marker(readings[-1][0]) or letters(readings[-1][0]) > 2):
                break
        text, score = max(readings, key=lambda reading: reading[1])
        if score >= _SURE and is_marker(text):
            return "marker"
        if large:
            return "text" if any(letters(t) > 2 and s >= _CLEAR for t, s in readings) else "large"
        if long > _LONG * short or any(letters(t) > (1 if s >= _SURE else 2) for t, s in readings):
            return "text"
        return ""

    def _read(self, crop: View) -> tuple[str, float]:
        from rapidocr.ch_ppocr_rec import TextRecInput

        answer = self._engine.text_rec(TextRecInput(img=[crop], return_word_box=False))
        return answer.txts[0], float(answer.scores[0])


def _engine() -> Any:
    check_installed()
    import cv2
    import rapidocr

    cv2.setNumThreads(1)
    models = Path(rapidocr.__file__).parent / "models"
    engine: Any = rapidocr.RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            # Named, so that a missing one is an error and not a download.
            "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),
            "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
            "Det.limit_side_len": 32,
            "Det.thresh": _INK,
            "Det.box_thresh": _FOUND,
        }
    )
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    engine._load_det_model()
    engine._load_rec_model()
    return engine


def letters(text: str) -> int:
    """How many letters and digits of any script."""
    return sum(unicodedata.category(c)[0] in "LN" for c in unicodedata.normalize("NFKC", text))


def is_marker(text: str) -> bool:
    """Whether a text consists of `MARKERS` only."""
    plain = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", text).upper())
    words = plain.split()
    return bool(words) and len(words) <= 4 and all(word in MARKERS for word in words)


def _looks(view: View) -> Iterator[tuple[View, float]]:
    """Layers and scales to look at; benchmarks/burned_in.py measures what each of them adds.

    The size of letters decides what the detector sees: it finds those of 8 to 100 pixels, smaller ones when enlarged, larger
    ones when reduced. Text in the largest or smallest value is looked at apart from the picture, where that value is rare:
    against a background nearly as bright it is found by nothing else.
    """
    longest = max(view.shape[:2])
    yield view, 1.5 if longest <= 1024 else 1.0
    if longest > 768:
        yield view, 0.5
    if longest > 1536:
        yield view, 0.25
    if view.shape[2] == 1:
        extremes = np.full_like(view, 128)
        for value in (0, 255):
            mask = view == value
            if _SPARSE[0] <= np.count_nonzero(mask) <= _SPARSE[1] * mask.size:
                extremes[mask] = value
        if extremes.min() < extremes.max():
            yield extremes, 1.0


def _padded(layer: View) -> View:
    """At least `_PAD` pixels a side: the detector rounds sides to multiples of 32."""
    rows, columns = layer.shape[:2]
    more = (max(_PAD - rows, 0), max(_PAD - columns, 0))
    return np.pad(layer, ((0, more[0]), (0, more[1]), (0, 0)), mode="edge") if any(more) else layer


def _tiles(layer: View) -> Iterator[tuple[View, int, int]]:
    """Overlapping parts of equal size, at most `TILE` pixels a side, with their x and y."""
    (ys, height), (xs, width) = _cuts(layer.shape[0]), _cuts(layer.shape[1])
    for y in ys:
        for x in xs:
            yield layer[y : y + height, x : x + width], x, y


def _cuts(length: int) -> tuple[list[int], int]:
    """Where the parts of a side begin, and how long they are."""
    count = max(-(-(length - OVERLAP) // (TILE - OVERLAP)), 1)
    size = -(-(length + (count - 1) * OVERLAP) // count)
    return [min(index * (size - OVERLAP), length - size) for index in range(count)], size


def _bgr(view: View) -> View:
    """As the networks were trained: three channels, blue first."""
    return np.ascontiguousarray(np.repeat(view, 3, axis=2) if view.shape[2] == 1 else view[..., ::-1])


def _groups(quads: list[Quad]) -> list[list[Quad]]:
    """Findings that overlap by more than a third of the smaller one are one text, seen at several scales."""
    groups: list[list[Quad]] = []
    for quad in sorted(quads, key=lambda q: -_area(*_ends(q))):
        for group in groups:
            if _overlap(group[0], quad) > 1 / 3:
                group.append(quad)
                break
        else:
            groups.append([quad])
    return groups


def _ends(quad: Quad) -> tuple[Any, Any]:
    return quad.min(axis=0), quad.max(axis=0)


def _area(low: Any, high: Any) -> float:
    return float(np.prod(np.maximum(high - low, 0)))


def _overlap(a: Quad, b: Quad) -> float:
    (low_a, high_a), (low_b, high_b) = _ends(a), _ends(b)
    shared = _area(np.maximum(low_a, low_b), np.minimum(high_a, high_b))
    return shared / max(min(_area(low_a, high_a), _area(low_b, high_b)), 1.0)

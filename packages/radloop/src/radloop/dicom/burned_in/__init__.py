"""Identity in the pixels: which images are looked at, what is found, and how it is removed (DICOM PS3.15 option 113101)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from radloop.catalog.reason import Reason
from radloop.dicom import spans
from radloop.dicom.burned_in.ocr import Box, Reader, View, check_installed
from radloop.dicom.burned_in.redact import emptied
from radloop.dicom.burned_in.rules import Attributes, Rule, Rules, declares_text, sampled
from radloop.dicom.layout import Picker
from radloop.errors import DicomError, SettingsError
from radloop.imaging.frames import displayed, stored_frames

__all__ = ["Decision", "Mode", "Pixels", "Rules"]

Mode = Literal["clean", "refuse", "off"]
MARGIN, _SECOND_MARGIN = (0.3, 0.3), (0.6, 2.0)
"""In heights of the text, across and along it: what is emptied around a box, and around one that was not enough."""
_AROUND = 48
"""Pixels beside what changed between two frames that are looked at with it."""
_HEADER = str.split(
    """SOPClassUID ImageType Modality ConversionType Manufacturer ManufacturerModelName SeriesDescription
    SoftwareVersions Rows Columns BurnedInAnnotation SeriesInstanceUID InstanceNumber"""
)
_ROWS, _DECLARED, _INSTANCE = (_HEADER.index(k) for k in ("Rows", "BurnedInAnnotation", "SeriesInstanceUID"))
_MOST = 4096
_READER = Reader()


class Decision(msgspec.Struct, frozen=True):
    """What is done with an image's pixels.

    Attributes:
        look: whether they are decoded and looked at.
        blank: whether regions of them may be emptied unseen; `regions` says which, if the Dataset is there.
        rule, why: the row of the table that says so.
        declared: the header says that there is text.
    """

    look: bool
    rule: str
    why: str
    blank: bool = False
    regions: tuple[Box, ...] = ()
    declared: bool = False

    @property
    def reads_pixels(self) -> bool:
        """Whether the pixels are decoded."""
        return self.look or self.blank


class Pixels:
    """Finds and removes text in pixels. Safe for threads.

    Args:
        mode: `clean` removes what is found; `refuse` refuses the image; `off` looks at nothing, and still refuses what the
            header declares.
        rules: the project's own rows, in the form of rules.toml.
        draw: the sample: uniform in [0, 1) by a keyed hash of a UID, as `Pseudonymiser.fraction`.

    Raises:
        SettingsError: no such mode, a row that is none, or text recognition is not installed.
    """

    def __init__(
        self,
        mode: Mode = "clean",
        rules: Sequence[Mapping[str, Any]] = (),
        *,
        draw: Callable[[str], float] = lambda uid: 0.0,
    ) -> None:
        if mode not in get_args(Mode):
            expected = ", ".join(get_args(Mode))
            raise SettingsError("[deidentify] pixels: no such mode", expected=expected, got=repr(mode))
        if mode != "off":
            check_installed()
        self.mode, self._rules, self._draw = mode, Rules(rules), draw
        self.digest: str = _digest(mode, self._rules)
        self._alike: dict[tuple[bytes | None, ...], Rule] = {}
        self._picker = Picker([tag_for_keyword(keyword) or 0 for keyword in _HEADER], whole=False)

    def decide(self, ds: Attributes) -> Decision:
        """From the header alone: no pixel is read. An object without Rows has no image and passes.

        Raises:
            DicomError: BURNED_IN_DECLARED, a rule says that nothing but text is there, or nobody may look.
        """
        if ds.get("Rows") is None:
            return Decision(False, "no-pixels", "no image")
        return self._decide(ds, self._rules.first(ds))

    def _decide(self, ds: Attributes, rule: Rule) -> Decision:
        declared = declares_text(ds)
        if rule.action == "refuse" or (declared and self.mode == "off"):
            raise DicomError(
                "the header says that text is burned into the image"
                if declared
                else f"refused by the rule {rule.name}",
                reason=Reason.BURNED_IN_DECLARED,
                expected="an image that is more than its text" if rule.action == "refuse" else "BurnedInAnnotation NO",
                next_step='a rule of your own under [[deidentify.pixel_rules]], or [deidentify] pixels = "clean"',
            )
        look = rule.action == "ocr" or (rule.action == "sample" and sampled(ds, rule.every, self._draw))
        if self.mode == "off":
            return Decision(False, rule.name, rule.why)
        regions = tuple(rule.regions(ds)) if isinstance(ds, Dataset) else ()
        return Decision(look, rule.name, rule.why, bool(rule.blank or rule.banner), regions, declared)

    def decide_bytes(self, data: bytes, *, implicit: bool) -> Decision:
        """`decide` on the first bytes of a file, for those who do not want a Dataset; without `regions`.

        Raises:
            NotPlain, NeedMore: as `spans.scan`. DicomError: as `decide`.
        """
        places = self._picker.pick(data, spans.meta_end(data), len(data), implicit=implicit)
        raw = [None if place is None else bytes(data[place[0] : place[1]]) for place in places]
        if raw[_ROWS] is None:
            return self.decide({})
        # The rules know nothing of one image in a series, only the sample does.
        alike = tuple(raw[:_INSTANCE])
        rule = self._alike.get(alike)
        which = slice(None) if rule is None else slice(_DECLARED, None)
        header = {k: _value(k, value) for k, value in zip(_HEADER[which], raw[which], strict=True) if value is not None}
        if rule is None:
            if len(self._alike) >= _MOST:
                self._alike.clear()
            rule = self._alike[alike] = self._rules.first(header)
        return self._decide(header, rule)

    def cleaned(self, ds: Dataset) -> Dataset | None:
        """Look at every frame; None if nothing was found, else a copy without the text (see `redact.emptied`).

        What was cleaned is looked at again: what is still found is emptied with a wider margin, once.

        Raises:
            DicomError: BURNED_IN_TEXT, text was found and may or can not be removed; BURNED_IN_DECLARED, the header
                declares text and none was found: a person must look; PIXELS_UNDECODABLE, NO_PIXELS.
        """
        decision = self.decide(ds)
        frames, photometric = stored_frames(ds)
        shown = displayed(frames, photometric, ds)
        for box in decision.regions:
            shown[:, box.y0 : box.y1, box.x0 : box.x1] = 0
        seen = found(shown) if decision.look else []
        boxes = [*decision.regions, *(box.wider(*MARGIN, _shape(shown)) for box in seen)]
        if not boxes:
            if decision.declared and decision.look:
                raise DicomError(
                    "BurnedInAnnotation declares text in the pixels, and none was found",
                    reason=Reason.BURNED_IN_DECLARED,
                    expected="text that can be removed",
                    next_step="look at the image; a rule of your own can blank a region or let it pass",
                )
            return None
        if self.mode == "refuse":
            raise _text_left("text is burned into the image", 'pixels = "clean" removes it')
        return self._without(ds, frames, photometric, boxes, look=decision.look)

    def _without(self, ds: Dataset, frames: NDArray[Any], photometric: str, boxes: list[Box], *, look: bool) -> Dataset:
        for margin in (_SECOND_MARGIN, None):
            out = emptied(ds, frames, photometric, boxes)
            after, named = stored_frames(out)
            left = found(displayed(after, named, out)) if look else []
            if not left:
                return out
            if margin is None:
                break
            shape = (frames.shape[1], frames.shape[2])
            boxes = [*boxes, *(box.wider(*margin, shape) for box in left)]
        raise _text_left("text is still found in the pixels after cleaning", "look at the image")


def found(shown: View) -> list[Box]:
    """Text in any of some frames `(frames, rows, columns, 1 or 3)`, 8 bits, windowed alike.

    The first frame is looked at as a whole, each other one where it differs from the frame before and a little around.
    """
    boxes = _READER.texts(shown[0])
    for before, frame in itertools.pairwise(shown):
        changed = (frame != before).any(axis=2)
        for part, x, y in _part(frame, changed):
            boxes += [Box(b.x0 + x, b.y0 + y, b.x1 + x, b.y1 + y) for b in _READER.texts(part)]
    return boxes


def _part(frame: View, changed: Any) -> Iterator[tuple[View, int, int]]:
    """The frame around what changed, with its x and y; nothing if nothing did."""
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    if rows.size:
        y, x = max(int(rows[0]) - _AROUND, 0), max(int(columns[0]) - _AROUND, 0)
        yield frame[y : int(rows[-1]) + _AROUND, x : int(columns[-1]) + _AROUND], x, y


def _digest(mode: Mode, rules: Rules) -> str:
    """Changes when another outcome is possible: by mode, rules, or the networks' version."""
    version = "" if mode == "off" else metadata.version("rapidocr")
    return hashlib.sha256(f"{mode} {version}".encode() + msgspec.json.encode(rules.rows)).hexdigest()


def _shape(shown: View) -> tuple[int, int]:
    return shown.shape[1], shown.shape[2]


def _text_left(what: str, next_step: str) -> DicomError:
    return DicomError(what, reason=Reason.BURNED_IN_TEXT, expected="no text but markers", next_step=next_step)


def _value(keyword: str, raw: bytes) -> Any:
    if keyword in ("Rows", "Columns"):
        return int.from_bytes(raw, "little")
    words = [word.strip() for word in raw.decode("latin-1").rstrip("\0 ").split("\\")]
    if keyword == "InstanceNumber":
        return int(words[0]) if words[0].lstrip("+-").isdigit() else None
    return words

"""The answer key: what is required of a de-identification, one action on one attribute of one instance at a time.

The actions are those of the MIDI-B challenge (Medical Image De-Identification Benchmark, MICCAI 2024; first described by
Rutherford et al., Scientific Data 8, 183 (2021), table 8).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import msgspec


class Action(StrEnum):
    """A kind of requirement."""

    TAG_RETAINED = "tag_retained"
    """The attribute is there, empty or not."""
    TEXT_NOTNULL = "text_notnull"
    """The attribute is there with a value."""
    TEXT_RETAINED = "text_retained"
    """The attribute still holds this text."""
    TEXT_REMOVED = "text_removed"
    """The attribute, if it is there, holds neither the text nor a word of it."""
    DATE_SHIFTED = "date_shifted"
    """The date is gone; where dates are moved (113107), one moved as all others of the patient stands in its place."""
    UID_CHANGED = "uid_changed"
    UID_CONSISTENT = "uid_consistent"
    """The UID became what it became everywhere, and nothing else became the same."""
    PATID_CONSISTENT = "patid_consistent"
    PIXELS_HIDDEN = "pixels_hidden"
    """The text in this box cannot be told from its background any more."""
    PIXELS_RETAINED = "pixels_retained"
    """Every pixel outside the boxes is what it was."""


class Box(msgspec.Struct, frozen=True):
    """Burned-in text: where (frame, left, top, right, bottom; pixels, right and bottom excluded), and which pixels are ink.

    `ink` is base64 of the zlib-compressed bits of the box, row by row.
    """

    frame: int
    left: int
    top: int
    right: int
    bottom: int
    ink: str


class Requirement(msgspec.Struct, frozen=True):
    """One action.

    Attributes:
        action: what has to be so.
        path: attribute by keywords, such as `RequestAttributesSequence[0].RequestedProcedureID`; a private one as
            `(0019,0C SIEMENS MR HEADER)`; or a place that is no attribute: one of `PLACES`.
        value: the text, date or UID that the original held; for pixels a digest.
        boxes: of burned-in text.
        needs: the requirement holds where one of these options applies (PS3.16 CID 7050); empty: always.
        unless: it does not hold where one of these does.
    """

    action: Action
    path: str
    value: str = ""
    boxes: tuple[Box, ...] = ()
    needs: frozenset[str] = frozenset()
    unless: frozenset[str] = frozenset()

    def holds(self, options: frozenset[str]) -> bool:
        """Whether it is required of who applies these options."""
        return (not self.needs or bool(self.needs & options)) and not self.unless & options


FILE_NAME, PREAMBLE, META, CODESTREAM, UNUSED_BITS, TRAILER = (
    "(file name)", "(preamble)", "(file meta information)", "(codestream)", "(unused bits)", "(trailer)",
)  # fmt: skip
PLACES = frozenset({FILE_NAME, PREAMBLE, META, CODESTREAM, UNUSED_BITS, TRAILER})


class Answer(msgspec.Struct, frozen=True):
    """What is required for one instance.

    Attributes:
        file: its path relative to the set's folder; sop_uid, patient_id, modality: of the original.
        requirements: all of them, for any choice of options.
    """

    file: str
    sop_uid: str
    patient_id: str
    modality: str
    requirements: tuple[Requirement, ...]


def write_key(answers: Iterable[Answer], path: Path) -> None:
    """Write an answer key as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(list(answers)), indent=1))


def read_key(path: Path) -> list[Answer]:
    """Read what `write_key` wrote.

    Raises:
        msgspec.ValidationError: it is no answer key.
    """
    return msgspec.json.decode(path.read_bytes(), type=list[Answer])

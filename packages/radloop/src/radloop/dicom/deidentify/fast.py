"""The fast path: the header of a plain file rewritten in its bytes, the pixels copied as they are.

It knows no rule of its own. What the slow path (`items`, `check`, the stamp) does to one element depends on that element's
bytes and on little else, so each kind of element is cleaned by the slow path once, and what came out is put in place
wherever the same bytes come again: in a series that is nearly always. For values that differ in every instance (UIDs, dates,
numbers as text) the slow path's own functions are called on the value alone. Elements whose cleaning depends on one another
(`_TOGETHER`) are cleaned together. Whatever does not fit, in form or in meaning, is left to the slow path; the bytes are
the same on both ways, which tests/unit/dicom/test_fast.py holds against each other.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pydicom
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import BaseTag
from pydicom.uid import UID

from radloop.dicom import spans
from radloop.dicom.deidentify.check import TRANSFER_SYNTAXES
from radloop.dicom.deidentify.descriptors import own_words
from radloop.dicom.deidentify.items import MAX_DEPTH, Items, kept_bytes, kept_string
from radloop.dicom.deidentify.meta import PREFIX, meta_bytes
from radloop.dicom.deidentify.stowaways import Bits, bits_of
from radloop.dicom.deidentify.values import texts_of, vr_of
from radloop.dicom.layout import Layouts, Passed, Picker
from radloop.dicom.profile import Action, Profile
from radloop.dicom.profile_tables import storage_classes
from radloop.dicom.spans import PIXEL_DATA, NotPlain, Span
from radloop.dicom.tags import describe
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError

Tally = Counter[tuple[str, str]]
Key = bytes | tuple[tuple[str, ...], bytes]
"""An element's bytes; within a sequence, with the keywords of the sequences around it."""
Clean = Callable[[Dataset, str, Tally | None], Dataset]


def _tags(keywords: str) -> tuple[int, ...]:
    return tuple(tag_for_keyword(keyword) or 0 for keyword in keywords.split())


# What `check` and the stamp read or write, and what they ask to be there.
_TOGETHER = frozenset(
    _tags(
        """SpecificCharacterSet ImageType SOPClassUID Modality BurnedInAnnotation BodyPartExamined RecognizableVisualFeatures
        PatientName PatientID IssuerOfPatientID PatientBirthDate PatientAge PatientIdentityRemoved
        DeidentificationMethod DeidentificationMethodCodeSequence LongitudinalTemporalInformationModified"""
    )
)
_IDENTIFIERS = frozenset(_tags("OtherPatientIDs AccessionNumber StudyID"))
_CHARSET, _SOP_CLASS, _SOP, _STUDY, _SERIES = _tags(
    "SpecificCharacterSet SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID"
)
_NAME, _PATIENT, _ISSUER, _BIRTH, _AGE, _STUDY_DATE = _tags(
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientAge StudyDate"
)
_NEEDED = (_SOP, _STUDY, _SERIES)
# A coded entry's parts at the top level are judged by each other.
_CODES = frozenset(_tags("CodeValue LongCodeValue URNCodeValue CodeMeaning CodingSchemeDesignator"))
_DESCRIBED = _tags(
    """Modality Manufacturer ManufacturerModelName ViewPosition BodyPartExamined ImageLaterality Laterality PatientSex
    PatientAge Rows Columns BitsAllocated BitsStored PhotometricInterpretation NumberOfFrames SamplesPerPixel
    LossyImageCompression LossyImageCompressionRatio  PixelSpacing ImagerPixelSpacing ConversionType HighBit
    PixelRepresentation PixelPaddingValue"""
)
_NUMBERED = "Rows Columns SamplesPerPixel BitsAllocated NumberOfFrames"
_IMPLICIT = "1.2.840.10008.1.2"
_SYNTAXES = TRANSFER_SYNTAXES - {"1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"}
_NUMBERS = dict(zip(_NUMBERED.split(), _tags(_NUMBERED), strict=True))
_LARGE = 1 << 13
"""Bytes; longer elements that are no sequences are not kept in memory."""
_MOST = 1 << 26
"""Bytes kept in memory, about."""
_PLAIN_UID = re.compile(rb"[0-9.]+")
_PLAIN_TEXT = re.compile(rb"[ -\[\]-~]*")
_WORDS = frozenset({"LO", "SH", "ST", "LT"})
_APART = frozenset({Action.SHIFT.name, Action.CLEAN.name})
"""Actions whose outcome depends on the patient or on the instance's names."""
_PLAIN_AGE = re.compile(rb"[0-9]{3}[YMWD]")
_TEXTS = frozenset(str.split("AE AS CS DA DT LO LT PN SH ST TM UC UI UR UT"))
"""VRs of which pydicom reads any text."""


@dataclass(slots=True)
class Head:
    """A cleaned header, ready to be written before the pixels."""

    header: bytes
    """All bytes of the output up to the value of PixelData."""
    pixels: tuple[int, int]
    """Where the value of PixelData begins and ends in the source."""
    elements: dict[int, bytes]
    """The output's elements by tag, PixelData not among them."""
    syntax: str
    implicit: bool
    tags: dict[str, Any]
    """`radloop.dicom.tags.describe` of the output."""
    bits: Bits | None
    """How native pixels are stored, if the header tells."""

    def number(self, keyword: str) -> int:
        """An attribute of VR US, or NumberOfFrames, of the output; 0 if it is not there or no such number."""
        element = self.elements.get(_NUMBERS[keyword], b"")
        if keyword == "NumberOfFrames":
            text = element[8:].strip(b" ")
            return int(text) if text.isdigit() else 0
        return int.from_bytes(element[8:], "little") if len(element) == 10 else 0

    def text(self, tag: int) -> str:
        """A UID or PatientID of the output."""
        return self.elements[tag][8:].rstrip(b" \0").decode("ascii")


@dataclass(slots=True)
class _Group:
    """What the cleaning of an element depends on besides its bytes and its patient, and what came out so far."""

    iod: str
    charset: bytes
    syntax: str
    implicit: bool
    pieces: dict[Key, bytes] = field(default_factory=dict)
    """From an element's bytes to those of the cleaned one, empty if it is removed."""
    blanks: dict[tuple[int, str, Action, str], bytes] = field(default_factory=dict)
    """What is written where a value is emptied or replaced, whatever it was."""
    tallies: dict[Key, Tally] = field(default_factory=dict)
    """Of sequences."""
    refused: set[Key] = field(default_factory=set)
    """Elements that only the slow path can clean."""


@dataclass(slots=True)
class _Patient:
    """A pseudonym, by how many days its dates move, and what moves them."""

    pseudonym: bytes
    shift_days: int
    items: Items


@dataclass(slots=True)
class _Names:
    """The names and identifiers of an instance, as a data set and as the words that `descriptors.cleaned` takes out."""

    root: Dataset
    words: frozenset[str]


_NOBODY = _Names(Dataset(), frozenset())


@dataclass(slots=True)
class _Context:
    """A patient in a group, whose names are kept out of texts, and what came out of elements that depend on either."""

    group: _Group
    patient: _Patient
    names: _Names
    pieces: dict[Key, bytes] = field(default_factory=dict)
    tallies: dict[Key, Tally] = field(default_factory=dict)


@dataclass(slots=True)
class _Together:
    """The elements of `_TOGETHER` after cleaning, for a patient without a name; and their tally."""

    elements: dict[int, bytes]
    tally: Tally
    group: _Group


class Fast:
    """Cleans headers of plain files for one `Deidentifier`. Safe for several threads.

    Args:
        profile, pseudonymiser: the Deidentifier's.
        clean: its slow path, from a data set to a clean one.
    """

    def __init__(self, profile: Profile, pseudonymiser: Pseudonymiser, clean: Clean) -> None:
        self._profile, self._pseudonymiser, self._clean = profile, pseudonymiser, clean
        self._pick_meta = Picker([0x00020002, 0x00020010], whole=True).pick
        self._layouts: dict[str, Layouts] = {}
        self._together: dict[tuple[Any, ...], _Together] = {}
        self._groups: dict[tuple[str, bytes, str], _Group] = {}
        self._patients: dict[tuple[Any, ...], _Patient] = {}
        self._names: dict[tuple[bytes, ...], _Names] = {}
        self._contexts: dict[tuple[int, int, frozenset[str]], _Context] = {}
        self._described: dict[tuple[Any, ...], tuple[dict[str, Any], Bits | None]] = {}
        self._actions: dict[tuple[str, int, str, str], Action] = {}
        self._tallies: dict[int, tuple[Passed, Tally]] = {}
        self._kept = 0

    def head(self, data: bytes, size: int, site: str, tally: Tally | None) -> Head | None:
        """The cleaned header of a file; None if the slow path is to have it.

        Args:
            data: the file's first bytes, or all; size: the file's.
            site: as in `Deidentifier.clean`; tally: counts what was done.

        Raises:
            NeedMore: `data` does not hold the whole header.
        """
        try:
            return self._head(data, size, site, tally)
        except (NotPlain, DicomError, RecursionError):
            return None

    def _head(self, data: bytes, size: int, site: str, tally: Tally | None) -> Head:
        start = spans.meta_end(data)
        if not start:
            raise NotPlain
        sop_class, syntax = (
            "" if place is None else data[place[0] : place[1]].rstrip(b"\0 ").decode("latin-1")
            for place in self._pick_meta(data, 132, start, implicit=False)
        )
        if syntax not in _SYNTAXES:
            raise NotPlain
        implicit = syntax == _IMPLICIT
        found, passed = self._layout(sop_class).find(data, start, size, implicit=implicit)
        if not found or found[-1][0] != PIXEL_DATA:
            raise NotPlain
        _, vr, begin, value, end = found.pop()
        if (end - value) % 2 or not (implicit or vr in ("OB", "OW")):
            raise NotPlain
        apart = {span[0]: data[span[2] : span[4]] for span in found if span[0] in _TOGETHER}
        if apart.get(_SOP_CLASS, b"")[8:].rstrip(b"\0 ") != sop_class.encode("latin-1"):
            raise NotPlain
        patient = self._patient(apart, site, syntax)
        together = self._together_of(apart, found, data, syntax)
        names = self._names_of(data, found, apart, syntax) if profile_cleans(self._profile) else _NOBODY
        context = self._context(together.group, patient, names)
        elements = self._cleaned(data, found, together, context)
        if tally is not None:
            self._count(tally, data, found, passed, context, elements)
            tally.update(together.tally)
        meta = meta_bytes(elements[_SOP_CLASS][8:], elements[_SOP][8:], syntax)
        header = b"".join([PREFIX, meta, *[elements[tag] for tag in sorted(elements)], data[begin:value]])
        tags, bits = self._tags(elements, syntax)
        return Head(header, (value, end), elements, syntax, implicit, tags, bits)

    # ---- which elements there are

    def _layout(self, sop_class: str) -> Layouts:
        layouts = self._layouts.get(sop_class)
        if layouts is None:
            iod = storage_classes().get(sop_class, ("", ""))[0]
            if not iod:
                raise NotPlain
            layouts = self._layouts[sop_class] = Layouts(lambda tag, vr: self._wanted(iod, tag, vr))
        return layouts

    def _wanted(self, iod: str, tag: int, vr: str) -> bool:
        """Whether an element is more than removed; raises NotPlain for what only the slow path knows."""
        if tag in _TOGETHER or tag in _NEEDED or tag == PIXEL_DATA:
            return True
        if tag in _CODES or tag in (0x7FE00008, 0x7FE00009) or tag >> 24 == 0x60:
            raise NotPlain
        wanted = self._done(iod, tag, vr, "") is not Action.REMOVE
        if profile_cleans(self._profile) and (vr in ("PN", "SQ") or tag in _IDENTIFIERS) and tag < PIXEL_DATA:
            return True  # its names are kept out of texts
        if wanted and tag > PIXEL_DATA:
            raise NotPlain
        return wanted

    def _done(self, iod: str, tag: int, vr: str, parent: str) -> Action:
        """What is done to an element; raises NotPlain for what only the slow path knows."""
        if tag >> 16 & 1:
            if self._profile.keeps_private:
                raise NotPlain
            return Action.REMOVE
        action = self._action(iod, tag, vr, parent)
        if vr == "UN" and action is not Action.REMOVE:
            raise NotPlain
        return action

    def _action(self, iod: str, tag: int, vr: str, parent: str) -> Action:
        known = self._actions.get((iod, tag, vr, parent))
        if known is None:
            self._make_room()
            element = RawDataElement(BaseTag(tag), vr, 0, b"", 0, False, True)
            known = self._actions[iod, tag, vr, parent] = self._profile.action(tag, vr_of(element), iod, parent)
        return known

    # ---- who it is, and what was done

    def _patient(self, apart: dict[int, bytes], site: str, syntax: str) -> _Patient:
        key = (apart.get(_PATIENT), apart.get(_ISSUER), apart.get(_CHARSET), site, syntax == _IMPLICIT)
        known = self._patients.get(key)
        if known is None:
            charset = apart.get(_CHARSET, b"")[8:]
            texts = [apart.get(tag, b"")[8:] for tag in (_PATIENT, _ISSUER)]
            if (charset and not spans.holds_ascii(charset)) or not all(_PLAIN_TEXT.fullmatch(text) for text in texts):
                raise NotPlain
            who, issuer = (text.decode("ascii").strip(" ") for text in texts)
            pseudonym = self._pseudonymiser.patient(who, issuer or site)
            shift = self._pseudonymiser.day_shift(pseudonym)
            self._make_room()
            items = self._items(Dataset(), "", shift, syntax, None)
            known = self._patients[key] = _Patient(_even(pseudonym.encode("ascii"), b" "), shift, items)
        return known

    def _together_of(self, apart: dict[int, bytes], found: list[Span], data: bytes, syntax: str) -> _Together:
        """What does not differ between patients: names stand for any name, dates for any date."""
        implicit = syntax == _IMPLICIT
        same = dict(apart)
        ages = self._profile.keeps_patient and not _PLAIN_AGE.fullmatch(same.get(_AGE, b"")[8:])
        for tag, vr, text in ((_NAME, "PN", b"X "), (_PATIENT, "LO", b"X1"), (_BIRTH, "DA", b"19000102")):
            held = same.get(tag, b"")[8:]
            if held.strip(b" ") and _PLAIN_TEXT.fullmatch(held) and not (tag == _BIRTH and ages):
                same[tag] = _element(tag, vr, text, implicit)
        if ages:
            same |= {span[0]: data[span[2] : span[4]] for span in found if span[0] == _STUDY_DATE}
        key = (syntax, *same.items())
        known = self._together.get(key)
        if known is None:
            self._make_room()
            known = self._together[key] = self._clean_together(same, syntax)
        return known

    def _clean_together(self, same: dict[int, bytes], syntax: str) -> _Together:
        """Clean a data set that has only these elements, and what must be there, by the slow path."""
        implicit = syntax == _IMPLICIT
        there = {tag: _element(tag, "UI", b"1.2\0", implicit) for tag in _NEEDED}
        there[PIXEL_DATA] = _tag(PIXEL_DATA) + (b"" if implicit else b"OW\0\0") + b"\x02\0\0\0\0\0"
        tally: Tally = Counter()
        elements = _split(self._clean(_dataset(same | there, syntax), "", tally), implicit)
        if _CHARSET in elements:
            raise NotPlain  # pydicom writes all text anew where one is not ASCII
        for tag in (*there, _STUDY_DATE):
            elements.pop(tag, None)
            _forget(tally, keyword_for_tag(tag))
        sop_class = same[_SOP_CLASS][8:].rstrip(b"\0 ").decode("latin-1")
        key = (storage_classes()[sop_class][0], same.get(_CHARSET, b""), syntax)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(*key, implicit)
        return _Together(elements, tally, group)

    def _items(self, root: Dataset, iod: str, shift_days: int, syntax: str, tally: Tally | None) -> Items:
        return Items(
            self._profile, self._pseudonymiser, root, iod=iod, shift_days=shift_days, syntax=UID(syntax), tally=tally
        )

    def _context(self, group: _Group, patient: _Patient, names: _Names) -> _Context:
        key = (id(group), id(patient), names.words)
        known = self._contexts.get(key)
        if known is None or known.group is not group or known.patient is not patient:
            self._make_room()
            known = self._contexts[key] = _Context(group, patient, names)
        return known

    def _names_of(self, data: bytes, found: list[Span], apart: dict[int, bytes], syntax: str) -> _Names:
        """The person names at any level, and the identifiers at the top."""
        implicit = syntax == _IMPLICIT
        chunks = [apart[tag] for tag in (_CHARSET, _NAME, _PATIENT, _ISSUER) if tag in apart]
        for tag, vr, start, value, end in found:
            if tag in _IDENTIFIERS or (vr == "PN" and tag != _NAME):
                chunks.append(data[start:end])
            elif vr == "SQ":
                names: list[bytes] = []
                _find_names(data, value, end, implicit, names, 0)
                if names:
                    chunks.append(data[start:end])
        key = tuple(chunks)
        known = self._names.get(key)
        if known is None:
            self._make_room(sum(map(len, chunks)))
            root = _dataset({_number(chunk): chunk for chunk in chunks}, syntax)
            known = self._names[key] = _Names(root, own_words(root))
        return known

    def _count(
        self,
        tally: Tally,
        data: bytes,
        found: list[Span],
        passed: Passed,
        context: _Context,
        elements: dict[int, bytes],
    ) -> None:
        iod, known = context.group.iod, self._tallies.get(id(passed))
        if known is None or known[0] is not passed:
            if len(self._tallies) >= 1024:
                self._tallies.clear()
            known = self._tallies[id(passed)] = passed, self._usual(iod, found, passed)
        counts = known[1].copy()
        for tag, vr, start, _, end in found:
            if tag in _TOGETHER:
                continue
            if tag not in elements:
                name = _name(tag)
                counts.pop((name, self._done(iod, tag, vr, "").name), None)
                counts[name, Action.REMOVE.name] = 1
            elif vr == "SQ" and self._done(iod, tag, vr, "") is Action.RECURSE:
                chunk = data[start:end]
                counts.update(context.tallies.get(chunk) or context.group.tallies[chunk])
        tally.update(counts)

    def _usual(self, iod: str, found: list[Span], passed: Passed) -> Tally:
        """What is counted of the elements of a layout if all that are kept can be, sequences' items left out."""
        names = [_name(tag) for tag, _ in passed if not BaseTag(tag).is_private_creator]
        usual = Counter({(name, Action.REMOVE.name): 1 for name in names})
        for tag, vr, _, _, _ in found:
            action = Action.REMOVE if tag in _TOGETHER else self._done(iod, tag, vr, "")
            if tag not in _TOGETHER and action is not Action.RECURSE:
                usual[_name(tag), action.name] = 1
        usual["PixelData", Action.KEEP.name] = 1
        return usual

    # ---- what becomes of an element

    def _cleaned(self, data: bytes, found: list[Span], together: _Together, context: _Context) -> dict[int, bytes]:
        group, pseudonym = context.group, context.patient.pseudonym
        shared, own, elements = group.pieces, context.pieces, dict(together.elements)
        elements[_NAME] = _element(_NAME, "PN", pseudonym, group.implicit)
        elements[_PATIENT] = _element(_PATIENT, "LO", pseudonym, group.implicit)
        for tag, vr, start, value, end in found:
            if tag in _TOGETHER:
                continue
            chunk = data[start:end]
            piece = shared.get(chunk)
            if piece is None:
                piece = own.get(chunk)
                if piece is None:
                    piece = self._piece(context, tag, vr, chunk, value - start, ())
            if piece:
                elements[tag] = piece
        if not all(tag in elements for tag in _NEEDED):
            raise NotPlain
        return elements

    def _piece(
        self, context: _Context, tag: int, vr: str, chunk: bytes, header: int, parents: tuple[str, ...]
    ) -> bytes:
        """One cleaned element, empty if it is removed; `parents`: keywords of the sequences that it stands in."""
        group, key = context.group, (parents, chunk) if parents else chunk
        if key in group.refused:
            raise NotPlain
        action = self._done(group.iod, tag, vr, parents[-1] if parents else "")
        if action is Action.REMOVE:
            piece, moved = b"", False
        elif action is Action.RECURSE:
            piece, tally = self._sequence(context, tag, chunk, header, parents)
            moved = not _APART.isdisjoint(name for _, name in tally)
            (context if moved else group).tallies[key] = tally
        else:
            moved, value = action.name in _APART, chunk[header:]
            found = self._from_value(context, tag, vr, action, chunk, value, parents)
            if found is None and tag in _NEEDED and not parents:
                raise NotPlain
            piece = found if found is not None else self._through_pydicom(context, tag, chunk, parents)[0]
        if (len(chunk) <= _LARGE and tag != _SOP) or action is Action.RECURSE:
            self._make_room(len(chunk))
            (context if moved else group).pieces[key] = piece
        return piece

    def _from_value(
        self,
        context: _Context,
        tag: int,
        vr: str,
        action: Action,
        chunk: bytes,
        value: bytes,
        parents: tuple[str, ...],
    ) -> bytes | None:
        """The cleaned element where its value is plain and cleaned on its own; None where it is not."""
        group, implicit = context.group, context.group.implicit
        if not value or len(value) % 2:
            return None
        if action in (Action.KEEP, Action.KEEP_STRING):
            element = RawDataElement(BaseTag(tag), None if implicit else vr, len(value), value, 0, implicit, True)
            return chunk if (kept_bytes if action is Action.KEEP else kept_string)(element) is not None else b""
        if action is Action.MAP_UID and vr == "UI":
            uid = value.rstrip(b"\0 ")
            if _PLAIN_UID.fullmatch(uid) is None:
                return None
            new = self._pseudonymiser.uid(uid.decode("ascii")).encode("ascii")
            return _element(tag, vr, _even(new, b"\0"), implicit)
        if vr not in _TEXTS or not _PLAIN_TEXT.fullmatch(value) or not value.strip(b" "):
            return None
        if action is Action.SHIFT:
            moved = context.patient.items.shifted(value.decode("ascii").strip(" "), vr).encode("ascii")
            return _element(tag, vr, _even(moved, b" "), implicit)
        if action is Action.KEEP_TEXT and vr in _WORDS:
            return _element(tag, vr, _even(value.strip(b" "), b" "), implicit)
        if action in (Action.EMPTY, Action.DUMMY):
            blank = (tag, vr, action, parents[-1] if parents else "")
            known = group.blanks.get(blank)
            if known is None:
                known = group.blanks[blank] = self._through_pydicom(context, tag, chunk, parents)[0]
            return known
        return None

    def _sequence(
        self, context: _Context, tag: int, chunk: bytes, header: int, parents: tuple[str, ...]
    ) -> tuple[bytes, Tally]:
        """A sequence with its items cleaned, and what was done in them."""
        implicit, inner = context.group.implicit, (*parents, keyword_for_tag(tag))
        if len(inner) > MAX_DEPTH:
            raise NotPlain
        bounds = spans.items(chunk, header, len(chunk), implicit=implicit)
        items = [spans.scan(chunk, begin, end, implicit=implicit) for begin, end in bounds]
        if any(element[0] in _CODES or element[0] == _CHARSET for item in items for element in item):
            return self._through_pydicom(context, tag, chunk, parents)
        tally: Tally = Counter({(".".join(inner), Action.RECURSE.name): 1})
        written = b"".join([self._item(context, chunk, item, inner, tally) for item in items])
        vr = b"" if implicit else b"SQ\0\0"
        return _tag(tag) + vr + len(written).to_bytes(4, "little") + written, tally

    def _item(
        self, context: _Context, chunk: bytes, elements: list[Span], parents: tuple[str, ...], tally: Tally
    ) -> bytes:
        group, written = context.group, []
        for tag, vr, start, value, end in elements:
            action = self._done(group.iod, tag, vr, parents[-1])
            one, piece = chunk[start:end], b""
            key = (parents, one)
            if action is not Action.REMOVE:
                held = group.pieces.get(key)
                if held is None:
                    held = context.pieces.get(key)
                piece = held if held is not None else self._piece(context, tag, vr, one, value - start, parents)
                written.append(piece)
            if action is Action.RECURSE and piece:
                tally.update(context.tallies.get(key) or group.tallies[key])
            elif piece or not BaseTag(tag).is_private_creator:
                tally[".".join((*parents, _name(tag))), (action if piece else Action.REMOVE).name] += 1
        content = b"".join(written)
        return b"\xfe\xff\x00\xe0" + len(content).to_bytes(4, "little") + content

    def _through_pydicom(
        self, context: _Context, tag: int, chunk: bytes, parents: tuple[str, ...]
    ) -> tuple[bytes, Tally]:
        """The element cleaned by the slow path, in a data set of its own, and what was done."""
        group, tally = context.group, Counter[tuple[str, str]]()
        alone = {_CHARSET: group.charset} if group.charset else {}
        ds = _dataset(alone | {tag: chunk}, group.syntax)
        items = self._items(context.names.root, group.iod, context.patient.shift_days, group.syntax, tally)
        items.path = list(parents)
        out = items.clean(ds, parents[-1] if parents else "")
        if any(not text.isascii() for text in texts_of(out)):
            group.refused.add((parents, chunk) if parents else chunk)
            raise NotPlain  # pydicom writes all text anew where one is not ASCII
        _forget(tally, ".".join((*parents, "SpecificCharacterSet")))
        return _split(out, group.implicit).get(tag, b""), tally

    def _tags(self, elements: dict[int, bytes], syntax: str) -> tuple[dict[str, Any], Bits | None]:
        key = (syntax, *[elements.get(tag) for tag in _DESCRIBED])
        known = self._described.get(key)
        if known is None:
            self._make_room()
            ds = _dataset({tag: elements[tag] for tag in _DESCRIBED if tag in elements}, syntax)
            known = self._described[key] = describe(ds), bits_of(ds)
        day = elements.get(_STUDY_DATE, b"")[8:].decode("latin-1").split("\\")[0].strip(" \0")
        return known[0] | {"study_date": day or None}, known[1]

    def _make_room(self, size: int = 1000) -> None:
        """Forget everything when much is kept: what is needed comes again."""
        self._kept += 2 * size + 200
        if self._kept > _MOST:
            self._kept = 0
            kept: tuple[dict[Any, Any], ...] = (
                self._together, self._groups, self._patients, self._names, self._contexts, self._described, self._actions
            )  # fmt: skip
            for each in kept:
                each.clear()


def _dataset(elements: dict[int, bytes], syntax: str) -> Dataset:
    """What pydicom reads from these elements."""
    body = b"".join([elements[tag] for tag in sorted(elements)])
    return pydicom.dcmread(io.BytesIO(PREFIX + meta_bytes(b"1.2\0", b"1.2\0", syntax) + body))


def _split(out: Dataset, implicit: bool) -> dict[int, bytes]:
    """The elements of a data set as they are written."""
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, True
    write_dataset(buffer, out)
    data = buffer.getvalue()
    return {tag: data[start:end] for tag, _, start, _, end in spans.scan(data, 0, len(data), implicit=implicit)}


def profile_cleans(profile: Profile) -> bool:
    """Whether some text may be cleaned by a vocabulary, which takes the instance's own names out."""
    return bool(profile.options)


def _find_names(data: bytes, start: int, end: int, implicit: bool, names: list[bytes], depth: int) -> None:
    """The person names in a sequence's items."""
    if depth > MAX_DEPTH:
        raise NotPlain
    for begin, finish in spans.items(data, start, end, implicit=implicit):
        for _, vr, first, value, following in spans.scan(data, begin, finish, implicit=implicit):
            if vr == "PN":
                names.append(data[first:following])
            elif vr == "SQ":
                _find_names(data, value, following, implicit, names, depth + 1)


def _name(tag: int) -> str:
    """As the tally names an attribute."""
    return keyword_for_tag(tag) or str(BaseTag(tag))


def _number(chunk: bytes) -> int:
    return int.from_bytes(chunk[:2], "little") << 16 | int.from_bytes(chunk[2:4], "little")


def _forget(tally: Tally, name: str) -> None:
    for action in Action:
        tally.pop((name, action.name), None)


def _even(value: bytes, padding: bytes) -> bytes:
    return value + padding * (len(value) % 2)


def _tag(tag: int) -> bytes:
    return (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")


def _element(tag: int, vr: str, value: bytes, implicit: bool) -> bytes:
    """An element of a VR whose explicit length has two bytes."""
    if implicit:
        return _tag(tag) + len(value).to_bytes(4, "little") + value
    return _tag(tag) + vr.encode("ascii") + len(value).to_bytes(2, "little") + value

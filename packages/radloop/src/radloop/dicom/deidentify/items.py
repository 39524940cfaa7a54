"""The slow, safe path: a data set rebuilt element by element through pydicom."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from typing import Any

from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from radloop.dicom.deidentify.content import guard
from radloop.dicom.deidentify.descriptors import cleaned, own_words
from radloop.dicom.deidentify.private import as_vr, safe_elements
from radloop.dicom.deidentify.values import capped, plain, text_of, values_of, vr_of, with_values
from radloop.dicom.profile import PUBLIC_SCHEMES, TEXT_VRS, Action, Profile
from radloop.dicom.spans import NotPlain
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError

_CODED = re.compile(r"[A-Za-z0-9 _.,+/&()*#:;<>=%'-]{0,64}")
STRINGS = {
    "CS": re.compile(r"[A-Za-z0-9 _.+/&()*-]{0,16}"),
    "DS": re.compile(r" *[+-]?[0-9.]*([eE][+-]?[0-9]+)? *"),
    "IS": re.compile(r" *[+-]?[0-9]{0,12} *"),
    "DA": re.compile(r"([0-9]{8}|[0-9]{4}\.[0-9]{2}\.[0-9]{2})?"),
    "DT": re.compile(r"([0-9]{4}([0-9]{2}){0,5}(\.[0-9]{1,6})?([+-][0-9]{4})?)?"),
    "TM": re.compile(r"[0-9.: ]{0,16}"),
    "UI": re.compile(r"[0-9.]{0,64} ?"),
    "SH": re.compile(r"([+-][0-9]{4} *)?"),  # TimezoneOffsetFromUTC, the one SH that is kept as a string
}
_DATE = re.compile(r"(\d{4})[.-]?(\d{2})?[.-]?(\d{2})?")
_DATETIME = re.compile(r"(\d{4})(\d{2})?(\d{2})?(\d{0,6}(\.\d{1,6})?([+-]\d{4})?)")
DUMMIES: dict[str, str | bytes | int | float] = {
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
    "AS": "000Y",
    "UR": "removed:",
    "IS": "0",
    "DS": "0",
    "OB": b"\0\0",
    "OW": b"\0\0",
    "UN": b"\0\0",
    "US": 0,
}
NUMBER_BYTES = {"US": 2, "SS": 2, "UL": 4, "SL": 4, "FL": 4, "AT": 4, "FD": 8, "UV": 8, "SV": 8}
DUMMY_TEXT = "REMOVED"
LOCAL_CODE = {"CodeValue": DUMMY_TEXT, "CodingSchemeDesignator": "99RADLOOP", "CodeMeaning": DUMMY_TEXT}
_CODE_KEYWORDS = ("CodeValue", "LongCodeValue", "URNCodeValue", "CodeMeaning", "CodingSchemeDesignator")
MAX_DEPTH = 64


class Items:
    """Cleans one instance's items, outermost first. Holds what is the same for all of them.

    Args:
        root: the whole data set, whose names are kept out of cleaned descriptors; None raises NotPlain at the first one.
        shift_days: by how many days the patient's dates move; syntax: the transfer syntax of source and output.
        tally: counts what was done by (keyword path without item numbers, `Action` name), if given.
    """

    def __init__(
        self,
        profile: Profile,
        pseudonymiser: Pseudonymiser,
        root: Dataset | None,
        *,
        iod: str,
        shift_days: int,
        syntax: UID,
        tally: Counter[tuple[str, str]] | None = None,
    ) -> None:
        self.profile, self.pseudonymiser, self.iod, self.tally = profile, pseudonymiser, iod, tally
        self.shift, self.syntax = timedelta(days=shift_days), syntax
        self.path: list[str] = []
        self.root = root
        self._secret: frozenset[str] | None = None
        self.kept_codes = frozenset({"InstitutionCodeSequence"} if "institution" in profile.columns else ())
        self.handlers: dict[Action, Callable[[DataElement, str], DataElement | None]] = {
            Action.EMPTY: lambda e, vr: DataElement(e.tag, vr, Sequence() if vr == "SQ" else None),
            Action.DUMMY: lambda e, vr: DataElement(e.tag, vr, _dummy(vr)),
            Action.CLEAN: self._cleaned,
            Action.KEEP_TEXT: lambda e, vr: with_values(e, vr, plain(values_of(e))),
            Action.MAP_UID: lambda e, vr: with_values(e, vr, [v and self.pseudonymiser.uid(v) for v in values_of(e)]),
            Action.SHIFT: lambda e, vr: with_values(e, vr, [self.shifted(v, vr) for v in values_of(e)]),
            Action.AGE: lambda e, vr: with_values(e, vr, [a for v in values_of(e) if (a := capped(v))]),
            Action.RECURSE: self._recurse,
        }

    def clean(self, source: Dataset, parent: str) -> Dataset:
        """A cleaned copy of a data set or sequence item; `parent` is the keyword of the enclosing sequence."""
        out = Dataset()
        # Raw elements may be written as they are only if they were read in this transfer syntax.
        encoding = (self.syntax.is_implicit_VR, self.syntax.is_little_endian)
        native = source.original_encoding == encoding
        if native:
            out.set_original_encoding(*encoding, out._character_set)
        public = True if parent in self.kept_codes else is_public_code(source)
        for tag in list(source.keys()):
            if tag.is_private:
                continue
            action = self._action(source, tag, parent, public)
            new = None if action is Action.REMOVE else self._element(source, tag, action, native)
            self._count(tag, Action.REMOVE if new is None else action)
            if new is not None:
                out[tag] = new
        self._keep_private(source, out)
        if public is False:
            for keyword, value in LOCAL_CODE.items():
                setattr(out, keyword, value)
        if "structured" in self.profile.columns:
            guard(source, out, self.profile)
        return out

    def _action(self, source: Dataset, tag: Any, parent: str, public: bool | None) -> Action:
        element = source.get_item(tag, keep_deferred=True)
        action = self.profile.action(int(tag), vr_of(element), self.iod, parent)
        if action is Action.CODE:
            return Action.KEEP_TEXT if public else Action.REMOVE
        return action

    def _count(self, tag: Any, action: Action) -> None:
        if self.tally is not None:
            place = ".".join([*self.path, keyword_for_tag(tag) or str(tag)])
            self.tally[place, action.name] += 1

    def _element(self, source: Dataset, tag: Any, action: Action, native: bool) -> DataElement | RawDataElement | None:
        element = source.get_item(tag, keep_deferred=True)
        try:
            if element.VR == "UN" or element.value is None or (element.is_raw and not native):
                element = source[tag]  # now of the VR that the dictionary says
                if element.VR == "UN":
                    return None
            if action is Action.KEEP:
                return kept_bytes(element)
            if action is Action.KEEP_STRING:
                return kept_string(element)
            return self.handlers[action](source[tag], source[tag].VR)
        except (DicomError, NotPlain, RecursionError):
            raise
        except Exception:  # noqa: BLE001 - bytes that are not what the VR says: unreadable, so not kept
            return None

    def _cleaned(self, element: DataElement, vr: str) -> DataElement | None:
        """The words of a vocabulary; where none is left, what the Basic profile does."""
        if self.root is None:
            raise NotPlain
        if self._secret is None:
            self._secret = own_words(self.root)
        texts = [cleaned(value, self._secret) for value in values_of(element)]
        if any(texts):
            return with_values(element, vr, texts)
        basic = self.profile.basic(int(element.tag), vr, self.iod, self.path[-1] if self.path else "")
        return self.handlers[basic](element, vr) if basic in self.handlers else None

    def _keep_private(self, source: Dataset, out: Dataset) -> None:
        """Elements of PS3.15 Table E.3.10-1, each with the element that reserves its block, where they stood."""
        safe = {tag: rest for tag, *rest in safe_elements(source)} if self.profile.keeps_private else {}
        for tag in [t for t in list(source.keys()) if t.is_private and not t.is_private_creator]:
            creator, vr = safe.get(tag, ("", ""))
            new = self._private(source, tag, vr) if vr else None
            self._count(tag, Action.REMOVE if new is None else Action.KEEP)
            if new is not None:
                out[tag] = new
                block = Tag(tag.group, tag.element >> 8)
                out[block] = DataElement(block, "LO", creator)

    def _private(self, source: Dataset, tag: BaseTag, vr: str) -> DataElement | RawDataElement | None:
        try:
            element = as_vr(source, tag, vr)
            if vr == "SQ":
                return self._recurse(element, vr)
            if vr == "UI" and not self.profile.keeps_uids:
                return self.handlers[Action.MAP_UID](element, vr)
            if vr in TEXT_VRS:
                return with_values(element, vr, plain(values_of(element)))
            return kept_string(element) if vr in STRINGS else element
        except (DicomError, NotPlain, RecursionError):
            raise
        except Exception:  # noqa: BLE001 - bytes that are not what the list says: not kept
            return None

    def _recurse(self, element: DataElement, vr: str) -> DataElement:
        if len(self.path) >= MAX_DEPTH:
            raise RecursionError
        keyword = keyword_for_tag(element.tag) or str(element.tag)
        self.path.append(keyword)
        items = [self.clean(item, keyword) for item in element.value]
        self.path.pop()
        return DataElement(element.tag, "SQ", Sequence(items))

    def shifted(self, text: str, vr: str) -> str:
        """A DA or DT moved by whole days, at the precision it had; empty if it is no date."""
        match = (_DATE if vr == "DA" else _DATETIME).fullmatch(text.strip())
        if match is None:
            return ""
        try:
            day = date(int(match[1]), int(match[2] or 1), int(match[3] or 1)) + self.shift
        except (ValueError, OverflowError):
            return ""
        digits = f"{day:%Y%m%d}" if day.year > 999 else ""
        precision = 8 if match[3] else 6 if match[2] else 4
        time_of_day = match[4] if vr == "DT" and match[3] and digits else ""
        return digits[:precision] + time_of_day


def _dummy(vr: str) -> Any:
    """A value that identifies nobody; of a code sequence one item with a code that means nothing."""
    if vr != "SQ":
        return DUMMIES.get(vr, DUMMY_TEXT)
    item = Dataset()
    for keyword, value in LOCAL_CODE.items():
        setattr(item, keyword, value)
    return Sequence([item])


def kept_bytes(element: DataElement | RawDataElement) -> DataElement | RawDataElement | None:
    """The element as it is; numbers go if their bytes are not whole ones, or more than the attribute has values.

    A forged length makes an element's value of all that follows it, names and private elements among them.
    """
    size = NUMBER_BYTES.get(vr_of(element), 0)
    if not isinstance(element, RawDataElement):
        return None if size and _most_values(int(element.tag)) < element.VM else copy.copy(element)
    length = len(element.value or b"")
    return None if size and (length % size or length > size * _most_values(int(element.tag))) else element


@cache
def _most_values(tag: int) -> float:
    """How many values an attribute may have (PS3.6)."""
    most = DicomDictionary.get(tag, ("", "1-n"))[1].split("-")[-1]
    return int(most) if most.isdigit() else math.inf


def kept_string(element: DataElement | RawDataElement) -> DataElement | RawDataElement | None:
    """The element if each value is what its VR allows: a name in a code string or a number goes."""
    pattern = STRINGS[vr_of(element)]
    if isinstance(element, RawDataElement):
        values = (element.value or b"").decode("ascii", "replace").rstrip(" \0").split("\\")
    else:
        values = values_of(element)
    if not all(pattern.fullmatch(value.strip(" \0")) for value in values):
        return None
    return element if isinstance(element, RawDataElement) else copy.copy(element)


def is_public_code(item: Dataset) -> bool | None:
    """Whether a coded entry (PS3.3 section 8.8) is of a public scheme; None if the item is no coded entry."""
    if not any(keyword in item for keyword in _CODE_KEYWORDS):
        return None
    value = text_of(item, "CodeValue") or text_of(item, "LongCodeValue")
    scheme, version = text_of(item, "CodingSchemeDesignator"), text_of(item, "CodingSchemeVersion")
    return scheme in PUBLIC_SCHEMES and all(_CODED.fullmatch(part) for part in (value, version)) and bool(value)

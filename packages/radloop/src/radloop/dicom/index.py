"""Chosen attributes of many files, as fast as their headers can be read: for lists, searches and audits.

Only the first kilobytes of a file are read, and no value but the chosen ones is looked at. What is not plain goes through
pydicom, with the same result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import Struct, error
from typing import Any

import pydicom
from pydicom._dicom_dict import DicomDictionary
from pydicom.charset import convert_encodings
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.values import convert_value

from radloop.catalog.reason import Reason
from radloop.dicom import spans
from radloop.dicom.layout import Picker, Place
from radloop.errors import DataError, DicomError

_FIRST = 1 << 14
_CHARSET = 0x00080005
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
_BINARY = frozenset({"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN", "AT"})
_DECODED = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})


class Index:
    """Reads chosen top-level attributes as text. Safe for several threads.

    Args:
        keywords: of attributes with text or numbers (of one VR) for values, none of them in group 0002 or after the pixels.

    Raises:
        DataError: a keyword is none of these.
    """

    def __init__(self, keywords: Sequence[str]) -> None:
        tags = [tag_for_keyword(keyword) or 0 for keyword in keywords]
        for keyword, tag in zip(keywords, tags, strict=True):
            vr = DicomDictionary.get(tag, ("UN",))[0]
            if vr in _BINARY or " or " in vr or not 0x00020000 < tag < 0x7FE00000 or tag >> 16 == 2:
                raise DataError("this attribute cannot be indexed", expected="text or numbers", got=keyword)
        self._keywords, self._tags = list(keywords), tags
        self._texts: list[Callable[[bytes], str]] = [_text_of(DicomDictionary[tag][0]) for tag in tags]
        self._pick = Picker([_CHARSET, *(tag for tag in tags if tag != _CHARSET)], whole=False).pick
        order = {tag: slot for slot, tag in enumerate([_CHARSET, *(tag for tag in tags if tag != _CHARSET)])}
        self._slots = [order[tag] for tag in tags]
        self._pick_syntax = Picker([0x00020010], whole=True).pick

    def read(self, path: Path | str) -> dict[str, str]:
        """The attributes by keyword: values joined by backslashes, without padding; empty where absent.

        Values that their VR does not allow are given as they are, or as empty text if they cannot be read at all.

        Raises:
            DicomError: NOT_DICOM. OSError: the file cannot be read.
        """
        handle = os.open(path, os.O_RDONLY)
        try:
            size, wanted = os.fstat(handle).st_size, _FIRST
            while True:
                try:
                    return self._plain(os.pread(handle, wanted, 0), size)
                except spans.NeedMore:
                    wanted *= 8
                except spans.NotPlain:
                    break
        finally:
            os.close(handle)
        return self._read(path)

    def _plain(self, data: bytes, size: int) -> dict[str, str]:
        start = spans.meta_end(data)
        if not start:
            raise spans.NotPlain
        place = self._pick_syntax(data, 132, start, implicit=False)[0]
        syntax = b"" if place is None else data[place[0] : place[1]].rstrip(b"\0 ")
        if not syntax or syntax in _ODD or b".1.2.4.95" in syntax or b".1.2.4.205" in syntax:
            raise spans.NotPlain
        implicit = syntax == _IMPLICIT
        places = self._pick(data, start, size, implicit=implicit)
        encodings = (
            None if places[0] is None or spans.holds_ascii(data[slice(*places[0])]) else _encodings(data, places[0])
        )
        found: dict[str, str] = {}
        for keyword, slot, text, tag in zip(self._keywords, self._slots, self._texts, self._tags, strict=True):
            place = places[slot]
            if place is None:
                found[keyword] = ""
                continue
            value = data[place[0] : place[1]]
            if len(value) < place[1] - place[0]:
                raise spans.NeedMore if len(data) < size else spans.NotPlain
            try:
                if encodings is None or text is not _decoded:
                    found[keyword] = text(value)
                    continue
            except (UnicodeDecodeError, error):
                pass
            if encodings is None:
                encodings = _encodings(data, places[0])
            found[keyword] = _converted(tag, DicomDictionary[tag][0], value, encodings)
        return found

    def _read(self, path: Path | str) -> dict[str, str]:
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(self._tags), force=True)
            found = {}
            for keyword, tag in zip(self._keywords, self._tags, strict=True):
                element: Any = dataset.get_item(BaseTag(tag))
                raw = isinstance(element, RawDataElement)
                if raw:
                    vr = element.VR if element.VR not in (None, "UN") else DicomDictionary[tag][0]
                    encodings = list(dataset.original_character_set or ["iso8859"])
                    little = bool(dataset.original_encoding[1])
                    found[keyword] = _converted(tag, vr, element.value or b"", encodings, little=little)
                else:
                    found[keyword] = "" if element is None else _joined(element.value)
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            got = type(error).__name__
            raise DicomError("cannot be read as DICOM", reason=Reason.NOT_DICOM, got=got) from None
        if not dataset.preamble and not any(found.values()):
            raise DicomError("cannot be read as DICOM", reason=Reason.NOT_DICOM, expected="a preamble and DICM")
        return found


_IMPLICIT = str(ImplicitVRLittleEndian).encode()
_ODD = frozenset({str(ExplicitVRBigEndian).encode(), str(DeflatedExplicitVRLittleEndian).encode()})


def _text_of(vr: str) -> Callable[[bytes], str]:
    """How a value of a VR becomes text, where it is plain."""
    if vr in _NUMBERS:
        return _numbers(Struct("<" + _NUMBERS[vr]))
    return _decoded if vr in _DECODED else _plain_text


def _numbers(one: Struct) -> Callable[[bytes], str]:
    single, size = one.unpack, one.size

    def text(value: bytes) -> str:
        if len(value) == size:
            return str(single(value)[0])
        return "\\".join([str(number) for (number,) in one.iter_unpack(value)])

    return text


def _plain_text(value: bytes) -> str:
    text = value.decode("ascii").strip("\0 ")
    return "\\".join([part.strip("\0 ") for part in text.split("\\")]) if "\\" in text else text


def _decoded(value: bytes) -> str:
    if b"\x1b" in value:  # to another character set
        raise UnicodeDecodeError("ascii", value, 0, 1, "not plain")
    return _plain_text(value)


def _encodings(data: bytes, place: Place | None) -> list[str]:
    value = b"" if place is None else data[place[0] : place[1]]
    text = value.decode("latin-1").rstrip("\0 ")
    try:
        return list(convert_encodings(text.split("\\") if "\\" in text else text))
    except (LookupError, ValueError):
        raise spans.NotPlain from None


def _converted(tag: int, vr: str, value: bytes, encodings: list[str], *, little: bool = True) -> str:
    raw = RawDataElement(BaseTag(tag), vr, len(value), value, 0, False, little)
    try:
        return _joined(convert_value(vr, raw, encodings))
    except Exception:  # noqa: BLE001 - not what the VR says: as the bytes are, if they are text
        return value.decode("latin-1").strip("\0 ") if value.isascii() else ""


def _joined(value: Any) -> str:
    if value is None:
        return ""
    many = isinstance(value, (list, MultiValue))
    return "\\".join(str(part).strip("\0 ") for part in value) if many else str(value).strip("\0 ")

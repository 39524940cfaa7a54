"""The elements of a data set as the PHI gate sees them, and their values as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from radloop.dicom.layout import Layouts
from radloop.dicom.phi.words import Charset, text_values
from radloop.dicom.profile import NUMBER_VRS, TEXT_VRS
from radloop.dicom.spans import PIXEL_DATA, Buffer, NotPlain, Span, items, scan

_LAST = PIXEL_DATA - 3
Seen = tuple[str, int, str, bytes | tuple[str, ...], Charset]
"""One element that is no sequence: path of its item (empty, or `KeywordSequence[0].`), tag, VR, value, character set.
The value as its bytes stand in the file, or as texts where somebody has decoded it."""


_MAX_KNOWN, _MOST_KNOWN = 1 << 13, 1 << 11  # bytes of a sequence, sequences


def seen(ds: Dataset, path: str = "", charset: Charset = ()) -> Iterator[Seen]:
    """Every element of a data set and of its sequences' items, as the gate sees it.

    A value that pydicom has not decoded is passed on as its bytes. A private sequence is itself one, too.
    """
    charset = _charset(ds, charset)
    for tag in list(ds.keys()):
        element = ds.get_item(tag, keep_deferred=True)
        vr = _vr(element.VR, int(tag))
        items = _items(ds, tag) if vr == "SQ" else None
        if items is None:
            yield path, int(tag), "UN" if vr == "SQ" else vr, _value(ds, element), charset
            continue
        if tag.is_private:
            yield path, int(tag), vr, (), charset
        here = path + (keyword(int(tag)) or tag_text(int(tag)))
        for number, item in enumerate(items):
            yield from seen(item, f"{here}[{number}].", charset)


class Reader:
    """Reads elements from the bytes of plain data sets. Safe for several threads.

    What one scanner writes is laid out alike, and its sequences hold the same: both are remembered.

    Args:
        dull: by tag and VR, whether an element is left out; None: none is.
    """

    def __init__(self, dull: Mapping[tuple[int, str], bool] | None = None) -> None:
        self._dull = dull
        self._layouts = Layouts(self._wanted, last=PIXEL_DATA - 3)
        self._sequences: dict[tuple[bytes, str, Charset, bool], list[Seen]] = {}

    def _wanted(self, tag: int, written: str) -> bool:
        return self._dull is None or not self._dull[tag, _vr(written, tag)]

    def read(self, data: Buffer, start: int, end: int, *, implicit: bool = False) -> list[Seen]:
        """As `seen`; what stands from PixelData on is left out.

        Args:
            data: the file's bytes, or its first bytes up to PixelData; start, end: of the data set, as for `spans.scan`.
            implicit: of the transfer syntax.

        Raises:
            NotPlain, NeedMore: as `spans.scan`.
        """
        return self._seen(data, self._layouts.find(data, start, end, implicit=implicit)[0], "", (), implicit)

    def _seen(self, data: Buffer, elements: list[Span], path: str, charset: Charset, implicit: bool) -> list[Seen]:
        found: list[Seen] = []
        for tag, written, _, value, following in elements:
            vr = written if len(written) == 2 and written != "UN" else _vr(written, tag)
            held = data[value:following]
            if held.__class__ is not bytes:
                held = bytes(held)
            if vr == "SQ":
                if written == "UN":
                    raise NotPlain  # a sequence in disguise; pydicom knows how to read it
                if tag >> 16 & 1:
                    found.append((path, tag, vr, (), charset))
                found += self._sequence(held, path + (keyword(tag) or tag_text(tag)), charset, implicit)
                continue
            if tag == 0x00080005:
                charset = _split_charset(held)
            found.append((path, tag, vr, held, charset))
        return found

    def _sequence(self, value: bytes, path: str, charset: Charset, implicit: bool) -> list[Seen]:
        key = (value, path, charset, implicit)
        found = self._sequences.get(key)
        if found is None:
            found = []
            for number, (first, last) in enumerate(items(value, 0, len(value), implicit=implicit)):
                elements = [e for e in scan(value, first, last, implicit=implicit) if self._wanted(e[0], e[1])]
                found += self._seen(value, elements, f"{path}[{number}].", charset, implicit)
            if len(value) <= _MAX_KNOWN:
                if len(self._sequences) >= _MOST_KNOWN:
                    self._sequences.clear()
                self._sequences[key] = found
        return found


def layouts_of(dull: Mapping[tuple[int, str], bool]) -> Layouts:
    """What finds the elements that are not dull in the files of one scanner, for `seen_in`."""
    return Layouts(lambda tag, vr: not dull[tag, vr if len(vr) == 2 and vr != "UN" else _vr(vr, tag)], last=_LAST)


def _charset(ds: Dataset, inherited: Charset) -> Charset:
    if 0x00080005 not in ds:
        return inherited
    value = ds.get_item(0x00080005).value
    if isinstance(value, bytes):
        return _split_charset(value)
    return tuple(str(v).strip(" \0") for v in ([value] if isinstance(value, str) else value or ()))


@lru_cache(maxsize=256)
def _split_charset(value: bytes) -> Charset:
    return tuple(part.strip(" \0") for part in value.decode("latin-1").split("\\"))


def _items(ds: Dataset, tag: Any) -> Sequence | None:
    """None of what is not the sequence that it says it is; pydicom reads that as text, or not at all."""
    try:
        value = ds[tag].value
    except Exception:  # noqa: BLE001 - pydicom raises many kinds
        return None
    return value if isinstance(value, Sequence) else None


def _value(ds: Dataset, element: Any) -> bytes | tuple[str, ...]:
    value = element.value
    if isinstance(value, bytes):
        return value
    if value is None and element.is_raw:  # read only now
        try:
            value = ds[element.tag].value
        except Exception:  # noqa: BLE001 - pydicom raises many kinds on bytes that are not what the VR says
            return ()
    if value is None or isinstance(value, bytes):
        return value or ()
    many = not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "components")
    return tuple(str(v).strip(" \0") for v in value) if many else (str(value).strip(" \0"),)


def strings(vr: str, value: bytes | tuple[str, ...], charset: Charset) -> tuple[str, ...]:
    """The values of an element as texts; PersonName with all its component groups."""
    if isinstance(value, tuple) or not value:
        return value or ()
    if vr in TEXT_VRS:
        return text_values(value, vr, charset)
    if vr in NUMBER_VRS:
        return (str(int.from_bytes(value, "little")),)
    return tuple(v.strip(" \0") for v in value.decode("latin-1").split("\\"))


def first_date(value: bytes | tuple[str, ...]) -> str:
    """The first value of a DA as YYYYMMDD, if it is a date at all."""
    text = value[:10].decode("latin-1") if isinstance(value, bytes) else value[0] if value else ""
    return text.replace(".", "")[:8]


def date_part(value: bytes | tuple[str, ...]) -> bytes | tuple[str, ...]:
    """The date part of a DA or DT, which a series shares where the times differ."""
    if isinstance(value, bytes) and b"\\" not in value and value[:8].isdigit():
        return value[:8]
    return value


def keyword(tag: int) -> str:
    """A tag's keyword; empty if the standard has none."""
    entry = DicomDictionary.get(tag)
    return "" if entry is None else entry[4]


def tag_text(tag: int) -> str:
    """A tag as `(0029,1010)`."""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _vr(vr: str | None, tag: int) -> str:
    if vr is None or vr == "UN":
        vr = DicomDictionary.get(tag, ("UN",))[0]
    return vr.split(" or ")[-1] if len(vr) > 2 else vr

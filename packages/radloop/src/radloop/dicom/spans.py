"""Where the elements of a data set stand in its bytes, without parsing a value (DICOM PS3.5 section 7).

For the plain case, which nearly all files are: explicit or implicit VR little endian, tags in ascending order, VRs of the
standard, lengths that fit. Whatever is otherwise raises `NotPlain`; the caller then reads the file through pydicom. Nothing
is guessed or repaired here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct, error

from pydicom._dicom_dict import DicomDictionary
from pydicom.charset import python_encoding

Span = tuple[int, str, int, int, int]
"""Tag; VR (in implicit VR what the dictionary says, such as `US or SS`, and `UN` if it has none); where the element, its
value and the next element begin."""

MAX_DEPTH = 64
UNDEFINED = 0xFFFFFFFF
PIXEL_DATA = 0x7FE00010

_SHORT, _LONG, _SEQUENCE = range(3)
_SHORT_VRS = frozenset(str.split("AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US"))
_LONG_VRS = frozenset(str.split("OB OD OF OL OV OW SV UC UN UR UT UV"))
_MOST_KNOWN = 1 << 16

_PREFIX_LENGTH = Struct("<6sH").unpack_from  # explicit VR: tag and VR, length
_TAG_LENGTH = Struct("<4sI").unpack_from  # implicit VR and items: tag, length
_LONG_LENGTH = Struct("<HI").unpack_from  # two reserved bytes, length
_ITEM, _ITEM_END, _SEQUENCE_END = (bytes.fromhex(tag) for tag in ("feff00e0", "feff0de0", "feffdde0"))

Buffer = bytes | bytearray | memoryview
# From a prefix (tag, in explicit VR with the VR) to tag, VR and how its length is written. Facts of the standard, learned as
# they are met, so that the loop below asks one dictionary.
_explicit_prefixes: dict[bytes, tuple[int, str, int]] = {}
_implicit_prefixes: dict[bytes, tuple[int, str, int]] = {}


class NotPlain(Exception):
    """Not a plain little-endian data set; pydicom may still read it."""


class NeedMore(Exception):
    """The elements reach beyond the bytes at hand."""


def meta_end(data: Buffer) -> int:
    """Where the data set of a Part 10 file begins, by the group length of its meta information; 0 if that is not plain."""
    if bytes(data[128:140]) != b"DICM\x02\0\0\0UL\x04\0" or len(data) < 148:
        return 0
    end = 144 + int.from_bytes(data[140:144], "little")
    return end if end < len(data) and bytes(data[end : end + 2]) != b"\x02\0" else 0


def scan(data: Buffer, start: int, end: int, *, implicit: bool = False, last: int = 0xFFFFFFFF) -> list[Span]:
    """The elements of the data set that fills `data[start:end]`, in ascending order of tags.

    Args:
        data: the file's bytes, or its first bytes: values may reach beyond them, headers of elements may not.
        start, end: of the data set; end may lie beyond `data`.
        last: tag after which nothing is looked at.

    Raises:
        NotPlain: not a plain data set, or its elements do not end at `end`.
        NeedMore: `data` ends before the last element's header.
    """
    try:
        if implicit and bytes(data[start + 4 : start + 6]).isalpha() and bytes(data[start + 4 : start + 6]).isupper():
            raise NotPlain  # pydicom would take it for explicit VR
        return (_implicit if implicit else _explicit)(data, start, end, last)
    except error:
        raise (NotPlain if len(data) >= end else NeedMore) from None


def _explicit(data: Buffer, position: int, end: int, final: int) -> list[Span]:
    spans: list[Span] = []
    add, known, last = spans.append, _explicit_prefixes.get, -1
    while position < end:
        prefix, length = _PREFIX_LENGTH(data, position)
        tag, vr, kind = known(prefix) or _learn_explicit(prefix)
        if tag <= last:
            raise NotPlain
        if tag > final:
            return spans
        last = tag
        if kind == _SHORT:
            value = position + 8
            following = value + length
        else:
            reserved, length = _LONG_LENGTH(data, position + 6)
            value = position + 12
            if reserved:
                raise NotPlain
            following = value + length if length != UNDEFINED else _past(data, tag, kind, value, end, _explicit_item)
        add((tag, vr, position, value, following))
        position = following
    if position != end:
        raise NotPlain
    return spans


def _implicit(data: Buffer, position: int, end: int, final: int) -> list[Span]:
    spans: list[Span] = []
    add, known, last = spans.append, _implicit_prefixes.get, -1
    while position < end:
        prefix, length = _TAG_LENGTH(data, position)
        tag, vr, kind = known(prefix) or _learn_implicit(prefix)
        if tag <= last:
            raise NotPlain
        if tag > final:
            return spans
        last = tag
        value = position + 8
        following = value + length if length != UNDEFINED else _past(data, tag, kind, value, end, _implicit_item)
        add((tag, vr, position, value, following))
        position = following
    if position != end:
        raise NotPlain
    return spans


def _learn_explicit(prefix: bytes) -> tuple[int, str, int]:
    vr = prefix[4:].decode("latin-1")
    if vr not in _SHORT_VRS and vr not in _LONG_VRS and vr != "SQ":
        raise NotPlain
    return _learn(_explicit_prefixes, prefix, vr, _SHORT if vr in _SHORT_VRS else _LONG if vr != "SQ" else _SEQUENCE)


def _learn_implicit(prefix: bytes) -> tuple[int, str, int]:
    vr = DicomDictionary.get(_tag(prefix), ("UN",))[0]
    return _learn(_implicit_prefixes, prefix, vr, _SEQUENCE if vr == "SQ" else _LONG)


def _learn(known: dict[bytes, tuple[int, str, int]], prefix: bytes, vr: str, kind: int) -> tuple[int, str, int]:
    tag = _tag(prefix)
    if tag >> 16 in (0xFFFE, 0xFFFF) or tag >> 16 < 2:  # items, and what belongs in no data set
        raise NotPlain
    if len(known) >= _MOST_KNOWN:
        known.clear()  # forged tags shall not fill the memory
    known[prefix] = found = (tag, vr, kind)
    return found


def _tag(prefix: bytes) -> int:
    return int.from_bytes(prefix[:2], "little") << 16 | int.from_bytes(prefix[2:4], "little")


@lru_cache(maxsize=256)
def holds_ascii(charset: bytes) -> bool:
    """Whether ASCII bytes without an escape sequence are ASCII text under this SpecificCharacterSet (0008,0005).

    False for JIS X 0201, where a tilde is an overline, and for terms that PS3.3 section C.12.1.1.2 does not define.
    """
    terms = charset.decode("latin-1").rstrip(" \0").split("\\")
    return all(term in python_encoding and "13" not in term for term in terms)


# ---- sequences and fragments


def items(data: Buffer, start: int, end: int, *, implicit: bool = False) -> list[tuple[int, int]]:
    """Where the items of the sequence value `data[start:end]` begin and end, their tags and delimiters excluded.

    Raises:
        NotPlain: not a plain sequence of items.
    """
    found: list[tuple[int, int]] = []
    one = _implicit_item if implicit else _explicit_item
    position = start
    try:
        while position < end:
            tag, length = _TAG_LENGTH(data, position)
            if tag == _SEQUENCE_END and length == 0 and position + 8 == end:
                return found
            if tag != _ITEM:
                raise NotPlain
            first = position + 8
            if length == UNDEFINED:
                position = one(data, first, end, 1)
                found.append((first, position - 8))
            else:
                position = first + length
                found.append((first, position))
    except error:
        raise NotPlain from None
    if position != end:
        raise NotPlain
    return found


def fragments(data: Buffer, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
    """Encapsulated pixel data (PS3.5 section A.4): where its items, the offset table first, begin and end; then the end.

    Raises:
        NotPlain: anything but items of known length and a delimiter.
    """
    found: list[tuple[int, int]] = []
    position = start
    try:
        while True:
            tag, length = _TAG_LENGTH(data, position)
            if tag == _SEQUENCE_END and length == 0:
                return found, position + 8
            if tag != _ITEM or length == UNDEFINED or position + 8 + length > end:
                raise NotPlain
            found.append((position + 8, position + 8 + length))
            position += 8 + length
    except error:
        if len(data) < end:
            raise NeedMore from None
        raise NotPlain from None


Item = Callable[[Buffer, int, int, int], int]


def past(data: Buffer, tag: int, start: int, end: int, *, implicit: bool) -> int:
    """The end of a value of undefined length that begins at `start`, at the top level.

    Raises:
        NotPlain, NeedMore: as `scan`. `struct.error`: `data` ends within it.
    """
    return _past(data, tag, _SEQUENCE, start, end, _implicit_item if implicit else _explicit_item)


def _past(data: Buffer, tag: int, kind: int, position: int, end: int, item: Item, depth: int = 1) -> int:
    """The end of a value of undefined length: pixel data at the top level, or a sequence."""
    if tag == PIXEL_DATA and depth == 1:
        return fragments(data, position, end)[1]
    if kind != _SEQUENCE and not (tag >> 16 & 1 and item is _implicit_item):  # a private one may be a sequence
        raise NotPlain
    if depth > MAX_DEPTH:
        raise NotPlain
    while True:
        prefix, length = _TAG_LENGTH(data, position)
        position += 8
        if prefix == _SEQUENCE_END and length == 0:
            return position
        if prefix != _ITEM:
            raise NotPlain
        position = item(data, position, end, depth) if length == UNDEFINED else position + length
        if position > end:
            raise NotPlain


def _explicit_item(data: Buffer, position: int, end: int, depth: int) -> int:
    """Walk an item of undefined length, past its delimiter."""
    while True:
        prefix, length = _PREFIX_LENGTH(data, position)
        if prefix[:4] == _ITEM_END:
            if length or prefix[4:] != b"\0\0":
                raise NotPlain
            return position + 8
        tag, _, kind = _explicit_prefixes.get(prefix) or _learn_explicit(prefix)
        if kind == _SHORT:
            position += 8 + length
        else:
            reserved, length = _LONG_LENGTH(data, position + 6)
            position += 12
            if reserved:
                raise NotPlain
            if length != UNDEFINED:
                position += length
            else:
                position = _past(data, tag, kind, position, end, _explicit_item, depth + 1)
        if position > end:
            raise NotPlain


def _implicit_item(data: Buffer, position: int, end: int, depth: int) -> int:
    """Walk an item of undefined length, past its delimiter."""
    while True:
        prefix, length = _TAG_LENGTH(data, position)
        position += 8
        if prefix == _ITEM_END:
            if length:
                raise NotPlain
            return position
        tag, _, kind = _implicit_prefixes.get(prefix) or _learn_implicit(prefix)
        if length != UNDEFINED:
            position += length
        else:
            position = _past(data, tag, kind, position, end, _implicit_item, depth + 1)
        if position > end:
            raise NotPlain

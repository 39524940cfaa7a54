"""What must be known of an instance when it arrives: who it is, and whether it is whole.

Two readers look at the bytes. pydicom decides what the attributes say, as it will in every later stage. A walk over the
element lengths (PS3.5 section 7) decides whether the file was cut, which pydicom passes over in silence. A plain file
that is in order needs neither: `_plain` reads it from its bytes, with the same result, and leaves all doubt to the two.
"""

from __future__ import annotations

import re
import struct
import zlib
from functools import lru_cache
from io import BytesIO
from typing import Any

import msgspec
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.values import convert_value

from radloop.catalog.reason import Reason
from radloop.dicom import spans
from radloop.dicom.layout import Picker
from radloop.errors import DicomError

_KEYWORDS = [
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "IssuerOfPatientID",
    "AccessionNumber",
    "Modality",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "BitsAllocated",
    "PhotometricInterpretation",
]
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_NUMBERS = frozenset({"Rows", "Columns", "SamplesPerPixel", "BitsAllocated"})
_DEFLATED, _MOST_INFLATED = b"1.2.840.10008.1.2.1.99", 512 << 20
_LONGEST_META, _PIECE = 1 << 20, 1 << 16
_DICOMDIR = "1.2.840.10008.1.3.10"
_VIDEO_FROM = "1.2.840.10008.1.2.4.10"  # MPEG2, MPEG-4 AVC, HEVC: one stream for all frames
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_PIXEL_TAGS = {0x7FE00008: 32, 0x7FE00009: 64, 0x7FE00010: 0}  # float, double float, integer: bits a sample
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """An instance's identity as received, identifying; never logged, never kept in the clear."""

    sop_class_uid: str
    sop_uid: str
    study_uid: str
    series_uid: str
    patient_id: str
    issuer: str
    accession: str
    modality: str | None
    transfer_syntax_uid: str

    def __repr__(self) -> str:
        return f"Header({self.sop_class_uid!r})"


class _Cut(Exception):
    """The bytes end before what they announce."""


class _Strange(Exception):
    """Not encoded as the standard says; pydicom may still read it, so nothing is concluded."""


class _Pixels(msgspec.Struct):
    tag: int
    bytes: int
    fragments: int | None  # None: native


def read_header(data: bytes | bytearray | memoryview) -> Header:
    """Read the identity of one instance and check that it is whole. The pixel data are not decoded.

    Raises:
        DicomError: NOT_DICOM, TRUNCATED, UNKNOWN_TRANSFER_SYNTAX, MISSING_UID, UNSUPPORTED_OBJECT (a DICOMDIR) or
            NO_PIXELS. Messages hold no value of an attribute.
    """
    return _plain(data) or _read(bytes(data))


def check_inflated(data: bytes | bytearray | memoryview) -> None:
    """A deflated data set follows the File Meta Information (PS3.5 A.5): measure it before anything holds it whole.

    Raises:
        DicomError: UNSUPPORTED_OBJECT, it swells beyond 512 MiB.
    """
    if _DEFLATED not in bytes(data[:2048]):
        return
    try:
        start = _walk_meta(bytes(data[:_LONGEST_META]))
    except (_Cut, _Strange):
        if len(data) > _LONGEST_META:
            raise _refuse(Reason.UNSUPPORTED_OBJECT, "the file meta information is too long") from None
        return
    inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        for at in range(start, len(data), _PIECE):
            rest = bytes(data[at : at + _PIECE])
            while rest and not inflate.eof:
                total += len(inflate.decompress(rest, 1 << 20))
                rest = inflate.unconsumed_tail
                if total > _MOST_INFLATED:
                    detail = f"the deflated data set is larger than {_MOST_INFLATED >> 20} MiB"
                    raise _refuse(Reason.UNSUPPORTED_OBJECT, detail)
    except zlib.error:
        return  # whoever reads it will say so


def _read(data: bytes) -> Header:
    preamble = data[128:132] == b"DICM"
    if not preamble and not _looks_like_a_dataset(data):
        raise _refuse(Reason.NOT_DICOM, "no DICM prefix, and does not begin with a DICOM element")
    check_inflated(data)
    try:
        dataset = pydicom.dcmread(BytesIO(data), stop_before_pixels=True, specific_tags=_KEYWORDS, force=True)
        meta_class = str(dataset.file_meta.get("MediaStorageSOPClassUID", "") or "")
        syntax = str(dataset.file_meta.get("TransferSyntaxUID", "") or "")
        values = {keyword: _value(dataset, keyword) for keyword in _KEYWORDS}
    except zlib.error:
        raise _refuse(Reason.TRUNCATED, "the deflated data set ends early") from None
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds on broken input
        if preamble and _is_cut(data):
            raise _refuse(Reason.TRUNCATED, "the file ends within its header") from None
        raise _refuse(Reason.NOT_DICOM, f"cannot be read as DICOM ({type(error).__name__})") from None
    if meta_class == _DICOMDIR:
        raise _refuse(Reason.UNSUPPORTED_OBJECT, "a DICOMDIR is an index, no instance")
    if syntax and not _known_syntax(syntax):
        raise _refuse(Reason.UNKNOWN_TRANSFER_SYNTAX, "the transfer syntax is not in PS3.6")
    implicit, little = dataset.original_encoding
    if not syntax:
        syntax = "1.2.840.10008.1.2" + ("" if implicit else ".1" if little else ".2")
    if not preamble and not all(_is_uid(values[keyword]) for keyword in ("SOPClassUID", "SOPInstanceUID")):
        raise _refuse(Reason.NOT_DICOM, "no DICM prefix, and no SOPClassUID and SOPInstanceUID")
    pixels = _walk_file(data, syntax, values)
    for keyword in _IDENTITY:
        if not _is_uid(values[keyword]):
            raise _refuse(Reason.MISSING_UID, f"{keyword} is missing or is no UID")
    if pixels is None and _is_image(values):
        raise _refuse(Reason.NO_PIXELS, "an image without pixel data")
    return _header(syntax, values)


def _header(syntax: str, values: dict[str, str]) -> Header:
    return Header(
        sop_class_uid=values["SOPClassUID"],
        sop_uid=values["SOPInstanceUID"],
        study_uid=values["StudyInstanceUID"],
        series_uid=values["SeriesInstanceUID"],
        patient_id=values["PatientID"],
        issuer=values["IssuerOfPatientID"].strip(),
        accession=values["AccessionNumber"].strip(),
        modality=values["Modality"].strip()[:16] or None,
        transfer_syntax_uid=syntax,
    )


# ---- plain files, from their bytes

_META = ("MediaStorageSOPClassUID", "TransferSyntaxUID")
_pick_meta = Picker([int(Tag(keyword)) for keyword in _META], whole=True).pick
_pick = Picker([*(int(Tag(keyword)) for keyword in _KEYWORDS), *_PIXEL_TAGS], whole=True).pick
_PLAIN = re.compile(rb"[ -~]*\0?")
_COUNT = re.compile(rb" *[0-9]+ *")


def _plain(data: bytes | bytearray | memoryview) -> Header | None:
    """The header of a plain little-endian file in which nothing is wrong; None for any other."""
    start = spans.meta_end(data)
    try:
        if not start:
            return None
        meta = [_uid(data, place) for place in _pick_meta(data, 132, start, implicit=False)]
        syntax = meta[1]
        if meta[0] == _DICOMDIR or not _plain_syntax(syntax):
            return None
        places = _pick(data, start, len(data), implicit=syntax == ImplicitVRLittleEndian)
    except (spans.NotPlain, spans.NeedMore):
        return None
    charset, *rest = places[: len(_KEYWORDS)]
    if charset is not None and not spans.holds_ascii(bytes(data[slice(*charset)])):
        return None
    values = {"SpecificCharacterSet": ""}
    for keyword, place in zip(_KEYWORDS[1:], rest, strict=True):
        value = "" if place is None else _plain_value(keyword, bytes(data[place[0] : place[1]]))
        if value is None:
            return None
        values[keyword] = value
    return _checked(data, syntax, values, places[len(_KEYWORDS) :])


def _checked(
    data: bytes | bytearray | memoryview, syntax: str, values: dict[str, str], found: list[tuple[int, int] | None]
) -> Header | None:
    """The header if the instance has its UIDs and, where it is an image, its pixels."""
    if not all(_is_uid(values[keyword]) for keyword in _IDENTITY):
        return None
    here = [(tag, place) for tag, place in zip(_PIXEL_TAGS, found, strict=True) if place is not None]
    if len(here) > 1 or (not here and _is_image(values)):
        return None
    try:
        for tag, (begin, end) in here:
            count, size = None, end - begin
            if bytes(data[begin - 4 : begin]) == b"\xff\xff\xff\xff":
                parts, _ = spans.fragments(data, begin, end)
                count, size = max(len(parts) - 1, 0), sum(last - first for first, last in parts)
            _check_pixel_bytes(_Pixels(tag, size, count), syntax, values)
    except (_Cut, spans.NotPlain):
        return None
    return _header(syntax, values)


def _uid(data: bytes | bytearray | memoryview, place: tuple[int, int] | None) -> str:
    return "" if place is None else bytes(data[place[0] : place[1]]).rstrip(b"\0 ").decode("latin-1")


def _plain_value(keyword: str, value: bytes) -> str | None:
    """An attribute as `_value` gives it; None where that is not obvious from the bytes."""
    if keyword in _NUMBERS:
        return str(int.from_bytes(value, "little")) if len(value) == 2 else None if value else ""
    if _PLAIN.fullmatch(value) is None or (keyword == "NumberOfFrames" and value and not _COUNT.fullmatch(value)):
        return None
    text = value.decode("ascii").rstrip("\0 ")
    return "\\".join(part.rstrip("\0 ") for part in text.split("\\")) if "\\" in text else text


@lru_cache(maxsize=256)
def _plain_syntax(syntax: str) -> bool:
    """Whether a data set in this transfer syntax is little endian and not deflated as a whole."""
    odd = (ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
    return _known_syntax(syntax) and syntax not in odd and "Deflate" not in UID(syntax).name


def _refuse(reason: Reason, detail: str) -> DicomError:
    return DicomError(detail, reason=reason)


def _looks_like_a_dataset(data: bytes) -> bool:
    """A data set without a preamble begins with group 0002 or 0008, little or big endian."""
    return len(data) >= 8 and data[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")


def _known_syntax(syntax: str) -> bool:
    try:
        return UID(syntax).type == "Transfer Syntax"
    except ValueError:
        return False


def _is_uid(value: str) -> bool:
    return len(value) <= 64 and _UID.fullmatch(value) is not None


def _is_image(values: dict[str, str]) -> bool:
    return bool(values["Rows"]) or _is_image_class(values["SOPClassUID"])


@lru_cache(maxsize=1024)
def _is_image_class(uid: str) -> bool:
    return "Image Storage" in UID(uid).name


def _value(dataset: pydicom.Dataset, keyword: str) -> str:
    """An attribute's value as text, empty when absent; several values joined as DICOM does, by a backslash.

    Converted without pydicom's validation, whose warnings quote values, that is, PHI.
    """
    tag = Tag(keyword)
    if tag not in dataset:
        return ""
    element: Any = dataset.get_item(tag)
    if isinstance(element, RawDataElement):
        if element.value is None:
            return ""
        vr = element.VR if element.VR not in (None, "UN") else dictionary_VR(tag)
        value = convert_value(vr, element, dataset.original_character_set)
    else:
        value = element.value
    if isinstance(value, (list, MultiValue)):
        return "\\".join(str(part) for part in value)
    return "" if value is None else str(value)


def _is_cut(data: bytes) -> bool:
    try:
        _walk_meta(data)
    except _Cut:
        return True
    except _Strange:
        return False
    return False


def _walk_file(data: bytes, syntax: str, values: dict[str, str]) -> _Pixels | None:
    """Check all lengths of a file; what was found of pixel data, or None.

    Raises:
        DicomError: TRUNCATED.
    """
    try:
        start = _walk_meta(data)
        if syntax == DeflatedExplicitVRLittleEndian:
            data, start = zlib.decompress(data[start:], -zlib.MAX_WBITS), 0
        little = syntax != ExplicitVRBigEndian
        implicit = _is_implicit(data, start, assumed=syntax == ImplicitVRLittleEndian)
        walk = _Walk(data, implicit=implicit, little=little)
        walk.elements(start, len(data))
        if walk.pixels is not None:
            _check_pixel_bytes(walk.pixels, syntax, values)
        return walk.pixels
    except (_Cut, zlib.error):
        raise _refuse(Reason.TRUNCATED, "the file ends before what its lengths announce") from None
    except _Strange:
        return _Pixels(0x7FE00010, 0, None) if b"\xe0\x7f" in data or b"\x7f\xe0" in data else None


def check_whole(data: bytes, ds: pydicom.Dataset) -> None:
    """Check that a file ends where its lengths say.

    Args:
        data: the file's bytes; ds: what pydicom read from them.

    Raises:
        DicomError: TRUNCATED.
    """
    syntax = str(ds.file_meta.get("TransferSyntaxUID", "") or "")
    values = {}
    for keyword in _KEYWORDS:
        try:
            values[keyword] = _value(ds, keyword)
        except Exception:  # noqa: BLE001 - unreadable, so it promises nothing
            values[keyword] = ""
    _walk_file(data, syntax, values)


def _walk_meta(data: bytes) -> int:
    """Where the data set begins: after the elements of group 0002, whatever their group length says."""
    position = 132 if data[128:132] == b"DICM" else 0
    walk = _Walk(data, implicit=False, little=True)
    while data[position : position + 2] == b"\x02\x00":
        _, position, length = walk.header(position, len(data))
        position = walk.skip(position, length, len(data))
    return position


def _is_implicit(data: bytes, start: int, *, assumed: bool) -> bool:
    """As pydicom does: what the first element looks like counts for more than the transfer syntax."""
    vr = data[start + 4 : start + 6]
    return assumed if len(vr) < 2 else not (vr.isalpha() and vr.isupper())


class _Walk:
    """One pass over element headers, values skipped."""

    def __init__(self, data: bytes, *, implicit: bool, little: bool) -> None:
        self._data, self._implicit = data, implicit
        order = "<" if little else ">"
        self._tag, self._short, self._long = (struct.Struct(order + form) for form in ("HH", "H", "L"))
        self.pixels: _Pixels | None = None

    def header(self, position: int, end: int, *, implicit: bool | None = None) -> tuple[int, int, int]:
        """Tag, where the value begins, its length."""
        data = self._data
        if position + 8 > end:
            raise _Cut
        group, element = self._tag.unpack_from(data, position)
        tag = group << 16 | element
        if group == 0xFFFE or (self._implicit if implicit is None else implicit):
            return tag, position + 8, self._long.unpack_from(data, position + 4)[0]
        vr = data[position + 4 : position + 6]
        if not (vr.isalpha() and vr.isupper()):
            raise _Strange
        if vr not in _LONG_VRS:
            return tag, position + 8, self._short.unpack_from(data, position + 6)[0]
        if position + 12 > end:
            raise _Cut
        return tag, position + 12, self._long.unpack_from(data, position + 8)[0]

    def skip(self, position: int, length: int, end: int) -> int:
        if length == _UNDEFINED:
            raise _Strange
        if position + length > end:
            raise _Cut
        return position + length

    def elements(self, position: int, end: int, *, implicit: bool | None = None, depth: int = 0) -> int:
        """Walk to `end`, or, within an item of undefined length (`depth` > 0), past its delimiter."""
        while position < end or depth:
            if depth == 0 and not any(self._data[position : position + 8]):
                raise _Strange  # padded with zeros
            tag, position, length = self.header(position, end, implicit=implicit)
            if tag == _ITEM_END and depth:
                return position
            if tag >> 16 == 0xFFFE:
                raise _Strange
            if length != _UNDEFINED:
                following = self.skip(position, length, end)
                if depth == 0 and tag in _PIXEL_TAGS:
                    self.pixels = _Pixels(tag, length, None)
                position = following
            elif depth == 0 and tag == 0x7FE00010:
                position = self._fragments(position, end)
            else:
                # PS3.5 section 6.2.2: a value of VR UN and undefined length is a sequence in implicit VR.
                unknown = not self._implicit and self._data[position - 8 : position - 6] == b"UN"
                position = self._items(position, end, implicit=True if unknown else implicit, depth=depth + 1)
        return position

    def _items(self, position: int, end: int, *, implicit: bool | None, depth: int) -> int:
        if depth > 64:
            raise _Strange
        while True:
            tag, position, length = self.header(position, end)
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM:
                raise _Strange
            if length == _UNDEFINED:
                position = self.elements(position, end, implicit=implicit, depth=depth)
            else:
                position = self.skip(position, length, end)

    def _fragments(self, position: int, end: int) -> int:
        """Encapsulated pixel data, PS3.5 section A.4: an offset table, fragments, a delimiter."""
        items, total = 0, 0
        while True:
            tag, position, length = self.header(position, end)
            if tag == _SEQUENCE_END:
                self.pixels = _Pixels(0x7FE00010, total, max(items - 1, 0))
                return position
            if tag != _ITEM:
                raise _Strange
            position = self.skip(position, length, end)
            items, total = items + 1, total + length


def _check_pixel_bytes(pixels: _Pixels, syntax: str, values: dict[str, str]) -> None:
    """Raise `_Cut` when there are fewer bytes, or fewer fragments than frames, than the attributes announce."""
    frames = _number(values["NumberOfFrames"]) or 1
    if pixels.fragments is not None:
        if pixels.fragments < (1 if syntax.startswith(_VIDEO_FROM) else frames):
            raise _Cut
        return
    bits = _PIXEL_TAGS[pixels.tag] or _number(values["BitsAllocated"])
    samples: float = _number(values["SamplesPerPixel"]) or 1
    if values["PhotometricInterpretation"].strip() == "YBR_FULL_422":
        samples = 2  # PS3.3 section C.7.6.3.1.2: two luminance samples share one pair of colour samples
    expected = _number(values["Rows"]) * _number(values["Columns"]) * samples * frames * bits
    if pixels.bytes * 8 < expected:
        raise _Cut


def _number(value: str) -> int:
    try:
        return int(float(value))
    except ValueError:
        return 0

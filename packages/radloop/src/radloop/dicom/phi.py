"""The PHI gate: does anything that identified the original still stand in the output?

The gate does not know how the cleaner works. It reads both data sets as any reader would, each item in its own
character set, takes what identifies out of the original, and looks for it in every text, every byte string, the file
name and the comment segments of the compressed pixels of the output.

What it looks for, after folding case, accents and punctuation away:
- words of person names (PN, every component group), and the whole name in either order;
- identifiers (the LO, SH, UC, UT, ST, LT, UR attributes of Table E.1-1 that are no descriptions): the whole value;
- comments (LT, ST, UT descriptions): the whole value;
- dates, in the ways people write them; instance-identifying UIDs;
- whatever an attribute held that Table E.1-1 does not let stand: in the same attribute only.
Words under 4 characters (a Han, Kana or Hangul character counts double) and code strings are compared as whole values
of the same attribute only, or "Li" and "CT" would be found everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import lru_cache
from typing import Any

from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments
from pydicom.tag import BaseTag

from radloop.dicom.profile import TEXT_VRS, is_identifying_uid, table
from radloop.dicom.uids import STANDARD_ROOT, is_placeholder

_MIN_WORD = 4
_MIN_RUN = 6
_WORD = re.compile(r"[^\W_]+")
_RUNS = re.compile(r"[^\W\d_]+|\d+")
_CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}")
_PSEUDONYM = re.compile(r"[PAF][0-9a-f]{32}")
_TRANSLITERATED = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae", "œ": "oe"})

# A patient called Philips, scanned on a Philips: within a device's maker and model these words say nothing.
_MAKERS = frozenset(
    str.split("""
    agfa bruker canon carestream fuji fujifilm ge healthcare hitachi hologic hyperfine imaging kodak konica medical
    minolta mindray neusoft philips samsung shimadzu siemens systems toshiba united varian healthineers elekta
    """)
)
_MAKER_ATTRIBUTES = frozenset(
    {"Manufacturer", "ManufacturerModelName", "DetectorManufacturerName", "SecondaryCaptureDeviceManufacturer"}
)
# What de-identifiers write in place of a value; finding it again says nothing.
_BLANKS = frozenset({"removed", "00000000", "000000", "19000101", "19000101000000", "none", "na", "0", "no", "yes"})
_OWN_METHOD = re.compile(r"radloop [a-z]+|key [0-9a-f]{8}")


@dataclass
class _Needles:
    """What identified the original, folded."""

    words: set[str] = field(default_factory=set)
    phrases: set[tuple[str, ...]] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)
    """Values without their punctuation, long enough to be looked for inside other text."""
    whole: dict[str, set[str]] = field(default_factory=dict)
    """Folded whole values, by attribute keyword."""
    uids: set[str] = field(default_factory=set)
    dates: dict[str, set[str]] = field(default_factory=dict)
    """Date part (YYYYMMDD) of DA and DT, by attribute keyword."""


def find_leaks(original: Dataset, output: Dataset, *, file_name: str, kept_keywords: Set[str]) -> list[str]:
    """Where the output still identifies: tag paths such as `RequestAttributesSequence[0].CodeMeaning`, never values.

    Args:
        original: the identified instance.
        output: the de-identified one, as read back from its bytes.
        file_name: of the output; a hit is reported as `file name`.
        kept_keywords: attributes that an option lets stand, as they are or with dates shifted.
    """
    needles = _needles(original, kept_keywords)
    day_shift = _day_shift(original, output)
    leaks = [path for path, tag, vr, ds in _walk(output) if _leaks(tag, vr, ds, path, needles, day_shift)]
    if _in_text(file_name, needles):
        leaks.append("file name")
    if any(_in_text(text, needles) for text in codestream_texts(output)):
        leaks.append("PixelData")
    return leaks


# ---- what identifies the original


def _needles(original: Dataset, kept: Set[str]) -> _Needles:
    needles, rows = _Needles(), table()
    for _, tag, vr, ds in _walk(original):
        keyword, row = _keyword(tag), rows.get(int(tag))
        removed = row is not None and keyword not in kept and vr != "SQ"
        if not removed and vr not in ("DA", "DT", "PN", "UI"):
            continue
        values = _strings(ds, tag)
        if vr == "UI":
            if is_identifying_uid(int(tag)):
                needles.uids.update(v for v in values if v and not v.startswith(STANDARD_ROOT))
            continue
        if vr in ("DA", "DT"):
            _add_dates(needles, keyword, values)
        elif vr == "PN":
            _add_names(needles, values)
        elif vr in TEXT_VRS and row is not None and ("descriptors" not in row.options or vr in ("LT", "ST", "UT")):
            for value in values:
                _add_phrase(needles, value)
        if removed:
            folded = {f for v in values if (f := fold(v)) not in _BLANKS and not is_placeholder(f)}
            needles.whole.setdefault(keyword, set()).update(folded)
    for uid in needles.uids:
        needles.runs.update({"".join(_WORD.findall(uid))} if len(uid) > 16 else ())
    needles.words -= _BLANKS
    needles.runs -= _BLANKS
    return needles


def _add_names(needles: _Needles, values: list[str]) -> None:
    for value in values:
        for group in value.split("="):
            spellings = {fold(group)}
            if not group.isascii():
                spellings.add(fold(group.casefold().translate(_TRANSLITERATED)))
            for spelling in spellings:
                words = tuple(w for w in _WORD.findall(spelling) if not is_placeholder(w))
                needles.words.update(w for w in words if _weight(w) >= _MIN_WORD)
                for phrase in {words, words[:2], words[1::-1]}:
                    _add_words(needles, phrase)


def _add_phrase(needles: _Needles, value: str) -> None:
    if is_placeholder(value):
        return
    words = tuple(_WORD.findall(fold(value)))
    if len(words) == 1 and _weight(words[0]) >= _MIN_WORD:
        needles.words.add(words[0])
    _add_words(needles, words)


def _add_words(needles: _Needles, words: tuple[str, ...]) -> None:
    """A value of several words: looked for as these words in a row, and if long enough as one run of characters."""
    run = "".join(words)
    if len(words) > 1 and _weight(run) >= _MIN_WORD:
        needles.phrases.add(words)
        # As a substring a short name would be found inside other words, so: long, or with digits among letters.
        if _weight(run) >= (_MIN_RUN if any(c.isdigit() for c in run) else _MIN_RUN + 2):
            needles.runs.add(run)
    elif len(words) == 1 and _weight(run) >= _MIN_RUN and any(c.isdigit() for c in run):
        needles.runs.add(run)


def _add_dates(needles: _Needles, keyword: str, values: list[str]) -> None:
    for value in values:
        digits = value.replace(".", "").replace("-", "")[:8]
        if len(digits) == 8 and digits.isdigit() and digits not in _BLANKS:
            needles.dates.setdefault(keyword, set()).add(digits)
            needles.words.update(_date_words(digits))
            needles.phrases.update(_date_phrases(digits))


@lru_cache(maxsize=512)
def _date_words(digits: str) -> frozenset[str]:
    year, month, day = digits[:4], digits[4:6], digits[6:]
    return frozenset({digits, day + month + year, month + day + year})


@lru_cache(maxsize=512)
def _date_phrases(digits: str) -> frozenset[tuple[str, ...]]:
    """`2004-01-19`, `19.01.2004`, `1/19/2004`, `19 Jan 2004`, `January 19, 2004` after folding."""
    year, month, day = digits[:4], digits[4:6], digits[6:]
    try:
        when = date(int(year), int(month), int(day))
    except ValueError:
        return frozenset()
    names = {month, month.lstrip("0"), f"{_MONTHS[when.month - 1]}", _MONTHS[when.month - 1][:3]}
    days = {day, day.lstrip("0")}
    orders = ((year, m, d) for m in names for d in days)
    return frozenset(p for y, m, d in orders for p in ((y, m, d), (d, m, y), (m, d, y)))


_MONTHS = str.split("january february march april may june july august september october november december")


# ---- where to look in the output


def _leaks(tag: BaseTag, vr: str, ds: Dataset, path: str, needles: _Needles, day_shift: timedelta | None) -> bool:
    if tag.is_private or tag.group & 0xFF00 in (0x5000, 0x6000):
        return True  # nothing of the kind may be there at all
    keyword = _keyword(tag)
    if vr in ("DA", "DT"):
        return any(_same_date(v[:8], keyword, needles, day_shift) for v in _strings(ds, tag))
    if vr == "UI":
        return any(v in needles.uids for v in _strings(ds, tag))
    if keyword in needles.whole and any(fold(v) in needles.whole[keyword] for v in _strings(ds, tag)):
        return True
    if vr in TEXT_VRS:
        return _in_attribute(keyword, ds, tag, needles)
    if vr == "CS":  # a value outside the repertoire of code strings (PS3.5 table 6.2-1) is text
        return any(not _CODE_STRING.fullmatch(v) and _in_text(v, needles) for v in _strings(ds, tag))
    if vr in ("UN", "OB") and keyword != "PixelData":
        value = ds[tag].value
        return isinstance(value, bytes) and any(_in_text(text, needles) for text in _decodings(value))
    return False


def _in_attribute(keyword: str, ds: Dataset, tag: BaseTag, needles: _Needles) -> bool:
    for value in _strings(ds, tag):
        if keyword == "DeidentificationMethod" and _OWN_METHOD.fullmatch(value):
            continue
        ignored = _MAKERS if keyword in _MAKER_ATTRIBUTES else frozenset()
        if _in_text(value, needles, ignored) and not (keyword == "CodeMeaning" and _is_standard_meaning(ds)):
            return True
    return False


def _in_text(text: str, needles: _Needles, ignored: Set[str] = frozenset()) -> bool:
    words = [w for w in _WORD.findall(fold(text)) if w not in ignored]
    if not words:
        return False
    if not needles.words.isdisjoint(words):
        return True
    if _PSEUDONYM.fullmatch(text) or (all(w.isdigit() for w in words) and len("".join(words)) > 24):
        return False  # a keyed hash: its digits are random, only the whole of it could be somebody
    parts = {r for w in words for r in _RUNS.findall(w) if len(r) >= _MIN_RUN or not r.isdigit()}
    if not needles.words.isdisjoint(parts):
        return True
    if len(words) > 1 and not needles.phrases.isdisjoint(_rows(words, needles)):
        return True
    run = "".join(words)
    return any(r in run and _whole_number(r, run) for r in needles.runs if len(r) <= len(run))


def _rows(words: list[str], needles: _Needles) -> Iterator[tuple[str, ...]]:
    """Every row of neighbouring words as long as some phrase."""
    for length in {len(p) for p in needles.phrases}:
        for start in range(len(words) - length + 1):
            yield tuple(words[start : start + length])


def _whole_number(needle: str, run: str) -> bool:
    """Whether a needle that begins or ends with a digit is not merely part of a longer number of the text."""
    if not needle.isdigit():
        return True
    return re.search(rf"(?<!\d){needle}(?!\d)", run) is not None


def _same_date(value: str, keyword: str, needles: _Needles, day_shift: timedelta | None) -> bool:
    """Whether an output date is one of the original's own.

    Shifted dates stand by an option, so a date is compared with those of the same attribute, and with every birth
    date. A shifted date may by chance equal another original one: it is excused if undoing the shift that this
    instance's dates share gives an original date of that attribute.
    """
    own = needles.dates.get(keyword, set())
    if value not in own | needles.dates.get("PatientBirthDate", set()):
        return False
    if not day_shift:
        return True
    try:
        before = date(int(value[:4]), int(value[4:6]), int(value[6:8])) - day_shift
    except (ValueError, OverflowError):
        return True
    return f"{before:%Y%m%d}" not in own


def _day_shift(original: Dataset, output: Dataset) -> timedelta | None:
    """By how much the dates of an instance moved, read off the first DA that both hold; None if none does."""
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate"):
        try:
            before, after = (_strings(ds, ds[keyword].tag)[0].replace(".", "") for ds in (original, output))
            first, second = (date(int(v[:4]), int(v[4:6]), int(v[6:8])) for v in (before, after))
            return second - first
        except (KeyError, IndexError, ValueError, NotImplementedError):  # the last: a VR that DICOM does not know
            continue
    return None


def _is_standard_meaning(item: Dataset) -> bool:
    """Whether CodeMeaning is word for word what PS3.16 says the code means; imported late, it takes 0.5 s."""
    from pydicom.sr._concepts_dict import concepts

    scheme, value = str(item.get("CodingSchemeDesignator", "")), str(item.get("CodeValue", ""))
    meaning = fold(str(item.get("CodeMeaning", "")))
    known: Any = concepts.get(scheme, {})
    return any(fold(entry[value][0]) == meaning for entry in known.values() if value in entry)


# ---- texts in the pixel data element

_JPEG_SEGMENT = re.compile(rb"\xff[\xe0-\xef\xfe]")


def codestream_texts(ds: Dataset) -> Iterator[str]:
    """Comments and application segments of compressed frames, and what follows the last native frame, as text.

    In the entropy-coded data of JPEG (ITU-T T.81 B.1.1.5) and JPEG-LS a byte FF is never followed by E0-EF or FE, so
    these markers are found without parsing; JPEG 2000 comments (FF64, T.800 A.9.2) stand before the first tile's data.
    """
    if "PixelData" not in ds:
        return
    value = ds.get_item("PixelData").value
    syntax = ds.file_meta.TransferSyntaxUID
    if not isinstance(value, bytes):
        return
    if not syntax.is_compressed or syntax == "1.2.840.10008.1.2.1.99":
        tail = value[_native_bytes(ds) :]
        yield from _decodings(tail) if len(tail) > 1 else ()
        return
    if syntax == "1.2.840.10008.1.2.5":
        return  # RLE has no place for text
    jpeg2000 = str(syntax).split(".")[-1] in ("90", "91", "92", "93", "201", "202", "203")
    for fragment in generate_fragments(value):
        for segment in _jpeg2000_texts(fragment) if jpeg2000 else _jpeg_texts(fragment):
            yield from _decodings(segment)


def _jpeg_texts(fragment: bytes) -> Iterator[bytes]:
    for match in _JPEG_SEGMENT.finditer(fragment):
        yield _segment(fragment, match.start())
    yield from _trailer(fragment)


def _jpeg2000_texts(fragment: bytes) -> Iterator[bytes]:
    start = max(fragment.find(b"\xff\x4f\xff\x51"), 0)  # SOC, SIZ; before them, in a JP2 file, are boxes
    if start:
        yield fragment[:start]
    header = fragment[start : fragment.find(b"\xff\x93", start) + 1 or None]
    for match in re.finditer(rb"\xff\x64", header):
        yield _segment(header, match.start())
    yield from _trailer(fragment)


def _trailer(fragment: bytes) -> Iterator[bytes]:
    """What follows the end marker (EOI, EOC: FFD9) but for a padding byte."""
    end = fragment.rfind(b"\xff\xd9")
    if 0 <= end < len(fragment) - 3:
        yield fragment[end + 2 :]


def _segment(data: bytes, start: int) -> bytes:
    """The payload of a marker segment: marker, two bytes of length that count themselves, payload."""
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return data[start + 4 : start + 2 + length]


def _native_bytes(ds: Dataset) -> int:
    numbers = [ds.get(k) for k in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
    try:
        rows, columns, samples, bits = (int(n) for n in numbers)
        bits_all = rows * columns * samples * bits * int(ds.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        return 0
    if "422" in str(ds.get("PhotometricInterpretation", "")):
        bits_all = bits_all * 2 // 3
    return (bits_all + 7) // 8


# ---- reading


def fold(text: str) -> str:
    """Text as it is compared: compatibility forms unified, case and combining marks dropped, white space single."""
    if text.isascii():
        return " ".join(text.casefold().split())
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in decomposed if not unicodedata.combining(c)).split())


def _weight(word: str) -> int:
    """Length in characters; Han and Kana count double, Hangul is two or three jamo after folding."""
    wide = 0 if word.isascii() else sum(0x3040 <= ord(c) <= 0x30FF or 0x3400 <= ord(c) <= 0x9FFF for c in word)
    return len(word) + wide


def _decodings(value: bytes) -> Iterator[str]:
    """Bytes without a declared character set, as the readers of a file might see them."""
    yield value.decode("latin-1").replace("\0", " ")
    for codec in ("utf-8", "utf-16-le", "utf-16-be", "euc_jp", "euc_kr", "gb18030", "iso8859_5", "iso8859_7"):
        if not value.isascii() or codec.startswith("utf-16"):
            yield value.decode(codec, "ignore")


def _walk(ds: Dataset, path: str = "") -> Iterator[tuple[str, BaseTag, str, Dataset]]:
    """Every element of a data set and of its sequences: path, tag, VR, and the item that holds it."""
    for tag in list(ds.keys()):
        vr = _vr(ds, tag)
        here = path + (_keyword(tag) or str(tag))
        if vr != "SQ":
            yield here, tag, vr, ds
            continue
        try:
            items: Any = ds[tag].value or []
        except Exception:  # noqa: BLE001 - not the sequence it says it is
            items = []
        if tag.is_private:
            yield here, tag, vr, ds
        for number, item in enumerate(items):
            yield from _walk(item, f"{here}[{number}].")


def _keyword(tag: BaseTag) -> str:
    entry = DicomDictionary.get(int(tag))
    return "" if entry is None else entry[4]


def _vr(ds: Dataset, tag: BaseTag) -> str:
    vr = ds.get_item(tag, keep_deferred=True).VR
    if vr is None or vr == "UN":
        vr = DicomDictionary.get(int(tag), ("UN",))[0]
    return vr.split(" or ")[-1]


def _strings(ds: Dataset, tag: BaseTag) -> list[str]:
    """An element's values as text, PersonName with all its component groups; empty if the bytes are unreadable."""
    try:
        value = ds[tag].value
    except Exception:  # noqa: BLE001 - pydicom raises many kinds on bytes that are not what the VR says
        return []
    if value is None or isinstance(value, bytes):
        return []
    many = not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "components")
    return [str(v).strip(" \0") for v in value] if many else [str(value).strip(" \0")]

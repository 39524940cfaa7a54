"""Text as the PHI gate compares it: decoded as any reader might, folded, cut into words; and dates as people write them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import date
from functools import lru_cache

from pydicom.charset import convert_encodings, decode_bytes

Charset = tuple[str, ...]
"""Values of SpecificCharacterSet (0008,0005) that hold for an item; empty for the default repertoire."""

WORD = re.compile(r"[^\W_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_DELIMITERS = {0x0D, 0x0A, 0x09, 0x0C}  # after which ISO 2022 falls back to its first set (PS3.5 section 6.1.2.5.3)
_UNSTRUCTURED = frozenset({"LT", "ST", "UT", "UR"})  # a backslash is no delimiter there
_ESCAPES = re.compile(rb"\x1b[$(),-.]")

# Letters that Unicode does not take apart into a base and a mark, and hiragana as katakana.
_FOLDED = str.maketrans(
    {"ł": "l", "đ": "d", "ð": "d", "þ": "th", "ø": "o", "æ": "ae", "œ": "oe", "ı": "i", "ħ": "h", "ŧ": "t", "ŋ": "n"}
    | {chr(c): chr(c + 0x60) for c in range(0x3041, 0x3097)}
)
_TRANSLITERATED = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa", "æ": "ae", "œ": "oe"})

# What a reader may take undeclared bytes for: Unicode, the code pages of PCs, and the sets of PS3.3 C.12.1.1.2.
_CODECS = str.split("""
    utf-8 utf-16-le utf-16-be shift_jis euc_jp euc_kr gb18030 big5 cp1250 cp1251 koi8_r iso8859_2 iso8859_3 iso8859_4
    iso8859_5 iso8859_6 iso8859_7 iso8859_8 iso8859_9 iso8859_13 iso8859_15 tis_620
    """)

_MONTHS = (
    "january february march april may june july august september october november december",
    "januar februar märz april mai juni juli august september oktober november dezember",
    "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "januari februari maart april mei juni juli augustus september oktober november december",
)


def fold(text: str) -> str:
    """Text as it is compared: compatibility forms unified, case and marks dropped, kana one, white space single."""
    if text.isascii():
        return " ".join(text.casefold().split())
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in decomposed if not unicodedata.combining(c)).translate(_FOLDED).split())


def spellings(text: str) -> set[str]:
    """A name folded, and as a console without its letters writes it: Mueller for Müller, Soeren for Søren."""
    if text.isascii():
        return {fold(text)}
    return {fold(text), fold(unicodedata.normalize("NFC", text).casefold().translate(_TRANSLITERATED))}


def split_camel(text: str) -> str:
    """`JohnSmithCT` as `John Smith CT`; the same text if there is nothing to split."""
    return _CAMEL.sub(" ", text)


def weight(word: str) -> int:
    """Length in characters; Han and Kana count double, Hangul is two or three jamo after folding."""
    wide = 0 if word.isascii() else sum(0x3040 <= ord(c) <= 0x30FF or 0x3400 <= ord(c) <= 0x9FFF for c in word)
    return len(word) + wide


def decodings(value: bytes) -> Iterator[str]:
    """Bytes without a declared character set, as the readers of a file might see them."""
    yield value.decode("latin-1").replace("\0", " ")
    if b"\0" in value:  # UTF-16 of Latin letters, at whatever offset it begins
        yield value.replace(b"\0", b"").decode("latin-1")
    if _ESCAPES.search(value):
        yield value.decode("iso2022_jp_2", "ignore")
        yield value.decode("iso2022_kr", "ignore")
        yield _ESCAPES.sub(b"", value.replace(b"\x1b$)C", b"")).decode("euc_kr", "ignore")
    for codec in _CODECS:
        if codec.startswith("utf-16"):
            yield value.decode(codec, "ignore")
            yield value[1:].decode(codec, "ignore")
        elif not value.isascii():
            yield value.decode(codec, "ignore")


def is_plain(value: bytes) -> bool:
    """Whether every reader sees the same characters in a text value, whatever it takes the character set to be."""
    return value.isascii() and b"\x1b" not in value


def text_values(value: bytes, vr: str, charset: Charset) -> tuple[str, ...]:
    """The values of an element of a text VR; where the bytes are not what the character set says, all readings.

    Args:
        value: as it stands in the file; vr: its VR; charset: that of its item.
    """
    return (_known_values if len(value) <= _MAX_KNOWN else _text_values)(value, vr, charset)


def _text_values(value: bytes, vr: str, charset: Charset) -> tuple[str, ...]:
    if is_plain(value):
        text = value.decode("ascii")
    else:
        try:
            text = decode_bytes(value, _encodings(charset), _DELIMITERS)
        except Exception:  # noqa: BLE001 - an unknown set, or bytes outside it, which pydicom warns about
            return tuple(decodings(value))
    parts = [text] if vr in _UNSTRUCTURED else text.split("\\")
    return tuple(part.strip(" \0") for part in parts)


_MAX_KNOWN = 1 << 12
_known_values = lru_cache(maxsize=8192)(_text_values)


@lru_cache(maxsize=256)
def _encodings(charset: Charset) -> list[str]:
    return convert_encodings(list(charset) or "ISO_IR 6")


@lru_cache(maxsize=512)
def date_words(digits: str) -> frozenset[str]:
    """A date (YYYYMMDD) written without separators."""
    year, month, day = digits[:4], digits[4:6], digits[6:]
    return frozenset({digits, day + month + year, month + day + year})


@lru_cache(maxsize=512)
def date_phrases(digits: str) -> frozenset[tuple[str, ...]]:
    """`2004-01-19`, `19.01.2004`, `1/19/2004`, `19 Jan 2004`, `January 19, 2004`, `19. März 2004` after folding."""
    year, month, day = digits[:4], digits[4:6], digits[6:]
    try:
        when = date(int(year), int(month), int(day))
    except ValueError:
        return frozenset()
    full = {fold(names.split()[when.month - 1]) for names in _MONTHS}
    names = {month, month.lstrip("0")} | full | {name[:3] for name in full}
    days = {day, day.lstrip("0")}
    orders = ((year, m, d) for m in names for d in days)
    return frozenset(p for y, m, d in orders for p in ((y, m, d), (d, m, y), (m, d, y)))


_SHORT_DATE = re.compile(r"(?<![\d/-])(\d{1,2})([/-])(\d{1,2})\2(\d{2})(?![\d/-])")


def short_dates(text: str) -> Iterator[str]:
    """Dates with a year of two digits, `3/4/51` or `04-03-51`, as both YYMMDD that they may be."""
    for first, _, second, year in _SHORT_DATE.findall(text):
        yield f"{year}{int(first):02d}{int(second):02d}"
        yield f"{year}{int(second):02d}{int(first):02d}"

"""What identified an instance, folded and cut into what is looked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property, lru_cache
from typing import Any

from radloop.dicom.phi.elements import Seen, date_part, first_date, keyword, strings
from radloop.dicom.phi.words import (
    WORD,
    Charset,
    date_phrases,
    date_words,
    fold,
    short_dates,
    spellings,
    split_camel,
    weight,
)
from radloop.dicom.profile import BULK_VRS, TEXT_VRS, is_identifying_uid, table
from radloop.dicom.uids import STANDARD_ROOT, is_placeholder

MIN_WORD = 4
MIN_RUN = 6
_MIN_LETTERS = MIN_RUN + 2
LONG_NUMBER = re.compile(r"\d{9}")
CHARACTER_SET = 0x00080005
SHIFT_DATES = (0x00080020, 0x00080021, 0x00080022, 0x00080023, 0x00080012)
"""Study, series, acquisition, content and instance creation date."""
_RUNS = re.compile(r"[^\W\d_]+|\d+")
_LONG = 8
"""Words of a phrase; longer ones, whole comments, are looked for as one string, or a forged one would take hours."""
_DATE_MARKS = frozenset("年月日년월일")
_PSEUDONYM = re.compile(r"[PAF][0-9a-f]{32}")
# What de-identifiers write in place of a value; finding it again says nothing.
_BLANKS = frozenset({"removed", "00000000", "000000", "19000101", "19000101000000", "none", "na", "0", "no", "yes"})


class Verdict(Enum):
    """On an element of the output."""

    CLEAN = auto()
    LEAK = auto()
    LONG = auto()
    """Clean, but it holds a number long enough for a UID, and these differ from instance to instance."""


@dataclass
class Needles:
    """What identified the original, folded; shared by all instances that hold the same values."""

    words: set[str] = field(default_factory=set)
    phrases: set[tuple[str, ...]] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)
    """Values without their punctuation, long enough to be looked for inside other text."""
    whole: dict[int, set[str]] = field(default_factory=dict)
    """Folded whole values, by tag."""
    dates: dict[int, set[str]] = field(default_factory=dict)
    """Date part (YYYYMMDD) of DA and DT, by tag."""
    short_dates: set[str] = field(default_factory=set)
    lengths: frozenset[int] = frozenset()
    """Of the phrases up to `_LONG` words, in words."""
    long: tuple[str, ...] = ()
    """Longer phrases, with a space before and after each word."""
    verdicts: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)
    """On output elements seen before, by tag, VR, value and character set."""

    def close(self) -> None:
        """Nothing is added any more."""
        self.words -= _BLANKS
        self.runs -= _BLANKS
        self.lengths = frozenset(n for n in map(len, self.phrases) if n <= _LONG)
        self.long = tuple(f" {' '.join(phrase)} " for phrase in self.phrases if len(phrase) > _LONG)


class _Kind(Enum):
    """What an element of the original is to the gate."""

    NOTHING = auto()
    UID = auto()
    NEEDLE = auto()
    DATE = auto()
    WHOLE = auto()
    """A number or code that Table E.1-1 removes: compared with the same attribute."""


class _Kinds(dict[tuple[int, str], _Kind]):
    """By tag and VR, for one set of attributes that options let stand."""

    def __init__(self, kept: frozenset[str]) -> None:
        super().__init__()
        self.kept = kept

    def __missing__(self, key: tuple[int, str]) -> _Kind:
        tag, vr = key
        kind = self[key] = self._kind(tag, vr)
        return kind

    def removed(self, tag: int) -> bool:
        return tag in table() and keyword(tag) not in self.kept

    def _kind(self, tag: int, vr: str) -> _Kind:
        if vr in ("DA", "DT"):
            return _Kind.DATE
        if vr == "UI":
            return _Kind.UID if is_identifying_uid(tag) else _Kind.NOTHING
        if vr == "PN" or (self.removed(tag) and vr in TEXT_VRS):
            return _Kind.NEEDLE
        return _Kind.WHOLE if self.removed(tag) and vr not in BULK_VRS | {"UN"} else _Kind.NOTHING


_kinds = lru_cache(maxsize=16)(_Kinds)


class DullBefore(dict[tuple[int, str], bool]):
    """By tag and VR, whether an element of an original tells the gate nothing, whatever options let stand."""

    def __missing__(self, key: tuple[int, str]) -> bool:
        tag, vr = key
        dull = vr != "SQ" and tag != CHARACTER_SET and _kinds(frozenset())[key] is _Kind.NOTHING
        self[key] = dull
        return dull


class Original:
    """One identified instance: shared needles, and what is its own."""

    def __init__(self, elements: Iterable[Seen], kept: frozenset[str]) -> None:
        self.uids: set[str] = set()
        self.whole: dict[int, list[Seen]] = {}
        self.first_dates: dict[int, str] = {}
        kinds, key = _kinds(kept), []
        for element in elements:
            path, tag, vr, value, charset = element
            kind = kinds[tag, vr]
            if kind is _Kind.NOTHING or not value:
                continue
            if kind is _Kind.NEEDLE:
                key.append((tag, vr, value, charset))
            elif kind is _Kind.DATE:
                key.append((tag, vr, date_part(value), ()))
                if not path and tag in SHIFT_DATES:
                    self.first_dates[tag] = first_date(value)
            elif kind is _Kind.UID:
                self.uids.update(v for v in strings(vr, value, charset) if v and not v.startswith(STANDARD_ROOT))
            else:
                self.whole.setdefault(tag, []).append(element)
        self.needles = _needles(kept, tuple(key))

    def found_in(self, text: str, ignored: Set[str] = frozenset()) -> bool:
        """Whether a text of the output holds any of it."""
        return in_text(text, self.needles, ignored) or self.uid_in(text)

    def uid_in(self, text: str) -> bool:
        """Whether a UID stands inside a text, with or without its dots."""
        run = "".join(WORD.findall(text))
        if not LONG_NUMBER.search(run) or _is_random(text, run):
            return False
        return any(r in run and _whole_number(r, run) for r in self._uid_runs)

    @cached_property
    def _uid_runs(self) -> list[str]:
        return ["".join(WORD.findall(uid)) for uid in self.uids if len(uid) > 16]

    def had(self, tag: int, values: Iterable[str]) -> bool:
        """Whether a code or number that had to go stood in the same attribute."""
        own = {f for e in self.whole[tag] for v in strings(e[2], e[3], e[4]) if not _says_nothing(f := fold(v))}
        return any(fold(v) in own for v in values)


@lru_cache(maxsize=64)
def _needles(kept: frozenset[str], key: tuple[tuple[int, str, Any, Charset], ...]) -> Needles:
    """The needles of all instances whose names, texts and dates are these."""
    needles = Needles()
    for tag, vr, value, charset in key:
        if vr in ("DA", "DT"):
            _add_dates(needles, tag, strings(vr, value, charset))
            continue
        values, row = strings(vr, value, charset), table().get(tag)
        if vr == "PN":
            _add_names(needles, values)
        elif row is not None and ("descriptors" not in row.options or vr in ("LT", "ST", "UT")):
            for text in values:
                _add_phrase(needles, text)
        if _kinds(kept).removed(tag):
            needles.whole.setdefault(tag, set()).update(f for v in values if not _says_nothing(f := fold(v)))
    needles.close()
    return needles


def _says_nothing(folded: str) -> bool:
    return folded in _BLANKS or is_placeholder(folded)


def _add_names(needles: Needles, values: Iterable[str]) -> None:
    for value in values:
        for group in value.split("="):
            for spelling in spellings(group):
                words = tuple(w for w in WORD.findall(spelling) if not is_placeholder(w))
                needles.words.update(w for w in words if weight(w) >= MIN_WORD)
                needles.runs.update(w for w in words if weight(w) >= _MIN_LETTERS)
                for phrase in {words, words[:2], words[1::-1]}:
                    _add_words(needles, phrase)


def _add_phrase(needles: Needles, value: str) -> None:
    if is_placeholder(value):
        return
    words = tuple(WORD.findall(fold(value)))
    if len(words) == 1 and weight(words[0]) >= MIN_WORD:
        needles.words.add(words[0])
    _add_words(needles, words)


def _add_words(needles: Needles, words: tuple[str, ...]) -> None:
    """A value of several words: looked for as these words in a row, and if long enough as one run of characters."""
    run = "".join(words)
    if len(words) > 1 and weight(run) >= MIN_WORD:
        needles.phrases.add(words)
        # As a substring a short name would be found inside other words, so: long, or with digits among letters.
        if weight(run) >= (MIN_RUN if any(c.isdigit() for c in run) else _MIN_LETTERS):
            needles.runs.add(run)
    elif len(words) == 1 and weight(run) >= MIN_RUN and any(c.isdigit() for c in run):
        needles.runs.add(run)


def _add_dates(needles: Needles, tag: int, values: Iterable[str]) -> None:
    for value in values:
        digits = value.replace(".", "").replace("-", "")[:8]
        if len(digits) == 8 and digits.isdigit() and digits not in _BLANKS:
            needles.dates.setdefault(tag, set()).add(digits)
            needles.words.update(date_words(digits))
            needles.phrases.update(date_phrases(digits))
            needles.short_dates.add(digits[2:])


# ---- looking for it in a text


def in_text(text: str, needles: Needles, ignored: Set[str] = frozenset()) -> bool:
    """Whether a text holds any of the needles; `ignored` words say nothing in it."""
    words = [w for w in WORD.findall(fold(text)) if w not in ignored]
    if not words:
        return False
    if not needles.words.isdisjoint(words):
        return True
    run = "".join(words)
    if _is_random(text, run):
        return False
    pieces = [r for w in words for r in _RUNS.findall(w)]
    if any(p in needles.words and (len(p) >= MIN_RUN or not p.isdigit()) for p in pieces):
        return True
    if not needles.words.isdisjoint(WORD.findall(fold(split_camel(text)))) and not ignored:
        return True
    if any(in_a_row(row, needles) for row in (words, pieces, [p for p in pieces if p not in _DATE_MARKS])):
        return True
    if not needles.short_dates.isdisjoint(short_dates(text)):
        return True
    return any(r in run and _whole_number(r, run) for r in needles.runs if len(r) <= len(run))


def in_a_row(words: list[str], needles: Needles) -> bool:
    """Whether some phrase stands as neighbouring words."""
    rows = (tuple(words[i : i + n]) for n in needles.lengths for i in range(len(words) - n + 1))
    if len(words) > 1 and not needles.phrases.isdisjoint(rows):
        return True
    if not needles.long or len(words) <= _LONG:
        return False
    text = f" {' '.join(words)} "
    return any(phrase in text for phrase in needles.long)


def _is_random(text: str, run: str) -> bool:
    """Whether a text is a keyed hash: its digits are random, only the whole of it could be somebody."""
    return _PSEUDONYM.fullmatch(text) is not None or (len(run) > 24 and run.isdigit())


def _whole_number(needle: str, run: str) -> bool:
    """Whether a needle that begins or ends with a digit is not merely part of a longer number of the text."""
    if not needle.isdigit():
        return True
    return re.search(rf"(?<!\d){needle}(?!\d)", run) is not None

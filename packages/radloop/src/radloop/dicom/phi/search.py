"""Where the output of a de-identification is searched, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from datetime import date, timedelta
from enum import Enum, auto
from functools import lru_cache
from typing import Any

from pydicom._dicom_dict import DicomDictionary

from radloop.dicom.phi.elements import Seen, first_date, strings
from radloop.dicom.phi.needles import (
    CHARACTER_SET,
    LONG_NUMBER,
    MIN_WORD,
    SHIFT_DATES,
    Needles,
    Original,
    Verdict,
    in_a_row,
    in_text,
)
from radloop.dicom.phi.words import WORD, decodings, fold, is_plain
from radloop.dicom.profile import TEXT_VRS, table
from radloop.dicom.profile_tables import vocabulary
from radloop.dicom.uids import STANDARD_ROOT

FULL_DATES, RETAIN_UIDS, SAFE_PRIVATE, GRAPHICS = "113106", "113110", "113111", "113103"

_CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}")
_PRINTABLE = re.compile(rb"[\x20-\x7e]{6,}")
_MIN_NUMBER = 7
_MAX_BULK = 1 << 20
_MAX_KNOWN = 4096
_MAX_VERDICTS = 2_000

# A patient called Philips, scanned on a Philips: within a device's maker and model these words say nothing.
_MAKERS = frozenset(
    str.split("""
    agfa bruker canon carestream fuji fujifilm ge healthcare hitachi hologic hyperfine imaging kodak konica medical
    minolta mindray neusoft philips samsung shimadzu siemens systems toshiba united varian healthineers elekta
    """)
)
_MAKER_TAGS = frozenset({0x00080070, 0x00081090, 0x0018702A, 0x00181016})  # maker, model; of detector, capture device
_OWN_METHOD = re.compile(r"radloop [a-z]+|key [0-9a-f]{8}")
_BIRTH_DATE = 0x00100030
_CODE_MEANING = 0x00080104
_METHOD = 0x00120063
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})


class _Look(Enum):
    """How an element of the output is read."""

    NOTHING = auto()
    FOREIGN = auto()
    """Private attributes, curves, overlays: nothing of the kind may be there, unless an option says so."""
    DATE = auto()
    UID = auto()
    TEXT = auto()
    CODE = auto()
    NUMBER = auto()
    BYTES = auto()
    TABLE = auto()


_BY_VR = {"DA": _Look.DATE, "DT": _Look.DATE, "UI": _Look.UID, "CS": _Look.CODE, "IS": _Look.NUMBER} | {
    "DS": _Look.NUMBER, "UN": _Look.BYTES, "OB": _Look.BYTES, "OW": _Look.TABLE, "OL": _Look.TABLE, "OV": _Look.TABLE,
    **dict.fromkeys(TEXT_VRS, _Look.TEXT),
}  # fmt: skip


class _Looks(dict[tuple[int, str], _Look]):
    def __missing__(self, key: tuple[int, str]) -> _Look:
        tag, vr = key
        group = tag >> 16
        foreign = group & 1 or group & 0xFF00 in (0x5000, 0x6000)
        look = _Look.FOREIGN if foreign else _Look.NOTHING if tag in _PIXELS else _BY_VR.get(vr, _Look.NOTHING)
        self[key] = look
        return look


_LOOKS = _Looks()


class DullAfter(dict[tuple[int, str], bool]):
    """By tag and VR, whether the gate does not read an element of an output."""

    def __missing__(self, key: tuple[int, str]) -> bool:
        tag, vr = key
        dull = vr != "SQ" and tag != CHARACTER_SET and _LOOKS[key] is _Look.NOTHING and tag not in table()
        self[key] = dull
        return dull


class Search:
    """One output, searched for one original."""

    def __init__(self, before: Original, after: list[Seen], options: Set[str]) -> None:
        self.before, self.after, self.options = before, after, options
        self.needles = before.needles
        self.shift = _day_shift(before.first_dates, after)

    def leaks(self) -> Iterator[tuple[str, int]]:
        """Path of the item and tag of each element that identifies."""
        whole, verdicts = self.before.whole, self.needles.verdicts
        if len(verdicts) > _MAX_VERDICTS:
            verdicts.clear()
        for element in self.after:
            path, tag, vr, value, charset = element
            look = _LOOKS[tag, vr]
            ordinary = look is not _Look.FOREIGN and tag not in whole
            if ordinary and (look is _Look.NOTHING or verdicts.get((tag, vr, value, charset)) is Verdict.CLEAN):
                continue
            if not value and look is not _Look.FOREIGN:
                continue
            same = tag in whole and look is not _Look.TEXT and self.before.had(tag, strings(vr, value, charset))
            if same or (look is not _Look.NOTHING and self._leaks(look, element)):
                yield path, tag

    def _leaks(self, look: _Look, element: Seen) -> bool:
        _, tag, vr, value, charset = element
        if look is _Look.FOREIGN:
            if (SAFE_PRIVATE if tag >> 16 & 1 else GRAPHICS) not in self.options:
                return True
            look = _BY_VR.get(vr, _Look.NOTHING)
        if look is _Look.DATE:
            return any(self._same_date(v[:8], tag) for v in strings(vr, value, charset))
        if look is _Look.UID:
            return any(map(self._same_uid, strings(vr, value, charset)))
        known = (tag, vr, value, charset)
        verdict = self.needles.verdicts.get(known)
        if verdict is None:
            verdict = self._read(look, element)
            if len(value) <= _MAX_KNOWN:
                self.needles.verdicts[known] = verdict
        if verdict is Verdict.LONG:
            return any(self.before.uid_in(text) for text in _readings(look, element))
        return verdict is Verdict.LEAK and not (tag == _CODE_MEANING and self._is_standard_meaning(element))

    def _read(self, look: _Look, element: Seen) -> Verdict:
        tag = element[1]
        texts = _readings(look, element)
        if look is _Look.TEXT and tag in self.needles.whole:
            own = self.needles.whole[tag]
            if any(fold(text) in own for text in texts):
                return Verdict.LEAK
        if tag == _METHOD:
            texts = [text for text in texts if not _OWN_METHOD.fullmatch(text)]
        if look is _Look.NUMBER:
            leak = any(len(t) >= _MIN_NUMBER and t in self.needles.words for t in texts)
        elif look is _Look.CODE:
            leak = any(_in_code(text, self.needles) for text in texts)
        else:
            ignored = _MAKERS if tag in _MAKER_TAGS else frozenset()
            leak = any(in_text(text, self.needles, ignored) for text in texts)
        if leak:
            return Verdict.LEAK
        long = any(LONG_NUMBER.search("".join(WORD.findall(text))) for text in texts)
        return Verdict.LONG if long else Verdict.CLEAN

    def _same_date(self, value: str, tag: int) -> bool:
        """Whether an output date is one of the original's own.

        Shifted dates stand by an option, so a date is compared with those of the same attribute, and with every birth
        date. A shifted date may by chance equal another original one: it is excused if undoing the shift that this
        instance's dates share gives an original date of that attribute.
        """
        own: Set[str] = self.needles.dates.get(tag, frozenset())
        births: Set[str] = self.needles.dates.get(_BIRTH_DATE, frozenset())
        if FULL_DATES in self.options and tag != _BIRTH_DATE:
            own, births = frozenset(), births - own
        if value not in own and value not in births:
            return False
        if not self.shift:
            return True
        try:
            before = date(int(value[:4]), int(value[4:6]), int(value[6:8])) - self.shift
        except (ValueError, OverflowError):
            return True
        return f"{before:%Y%m%d}" not in own

    def _same_uid(self, uid: str) -> bool:
        """Whether a UID is one of the original's, or one that holds a number of the patient as a component."""
        if uid in self.before.uids and RETAIN_UIDS not in self.options:
            return True
        if uid.startswith(("2.25.", STANDARD_ROOT)) or RETAIN_UIDS in self.options:
            return False
        return any(len(part) >= _MIN_NUMBER and part in self.needles.words for part in uid.split("."))

    def _is_standard_meaning(self, meaning: Seen) -> bool:
        """Whether CodeMeaning is word for word what PS3.16 says the code means."""
        item = {e[1]: next(iter(strings(*e[2:])), "") for e in self.after if e[0] == meaning[0]}
        value, scheme = item.get(0x00080100, ""), item.get(0x00080102, "")
        folded = fold(item.get(_CODE_MEANING, ""))
        return any(fold(entry[value][0]) == folded for entry in _concepts(scheme) if value in entry)


def _concepts(scheme: str) -> list[Any]:
    """PS3.16's codes of a scheme, by context group; imported late, it takes 0.5 s."""
    from pydicom.sr._concepts_dict import concepts

    return list(concepts.get(scheme, {}).values())


@lru_cache(maxsize=1)
def _standard_words() -> frozenset[str]:
    """Words of the standard's own: of its attributes' names and of what its codes mean; and terms of imaging."""
    names = [entry[2] for entry in DicomDictionary.values()]
    names += [e[value][0] for scheme in ("DCM", "SCT") for e in _concepts(scheme) for value in e]
    return frozenset(word for name in [*names, *vocabulary()] for word in WORD.findall(fold(name)))


def _in_code(text: str, needles: Needles) -> bool:
    """A code string. One outside the repertoire (PS3.5 table 6.2-1) is text; in one inside it, terms of the standard
    are no names.
    """
    if not _CODE_STRING.fullmatch(text):
        return in_text(text, needles)
    words = WORD.findall(text.casefold())
    found = [w for w in words if len(w) > MIN_WORD and w in needles.words]
    if found and any(w.isdigit() or w not in _standard_words() for w in found):
        return True
    run = "".join(words)
    return in_a_row(words, needles) or any(r in run for r in needles.runs if r not in words and not r.isdigit())


def _day_shift(before: dict[int, str], after: list[Seen]) -> timedelta | None:
    """By how much the dates of an instance moved, read off the first DA that both hold; None if none does."""
    now = {e[1]: first_date(e[3]) for e in after if e[1] in before and not e[0]}
    for tag in SHIFT_DATES:
        if tag in now:
            try:
                first, second = (date(int(v[:4]), int(v[4:6]), int(v[6:8])) for v in (before[tag], now[tag]))
            except ValueError:
                continue
            return second - first
    return None


def _readings(look: _Look, element: Seen) -> list[str]:
    """An output element as texts, in every way that a reader might see them."""
    _, _, vr, value, charset = element
    if isinstance(value, tuple):
        return list(value)
    if look is _Look.TABLE:
        return [m.decode("ascii") for m in _PRINTABLE.findall(value[:_MAX_BULK])]
    if look is _Look.BYTES:
        return list(decodings(value))
    texts = strings(vr, value, charset)
    return list(texts) if is_plain(value) else [*texts, *decodings(value)]

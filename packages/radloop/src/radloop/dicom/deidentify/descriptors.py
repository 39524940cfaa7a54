"""Text that an option lets stand if it is clean: words of a vocabulary stay, all others go (PS3.15 E.3.5).

A list of names would know only the names that somebody thought of; a vocabulary lets through what is known to be safe. The
words of the instance's own person names and identifiers go even if the vocabulary has them ("Hand", "White").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Set
from functools import lru_cache
from itertools import pairwise

from pydicom.dataset import Dataset

from radloop.dicom.deidentify.values import values_of, vr_of
from radloop.dicom.profile_tables import vocabulary

_TOKEN = re.compile(r"[^\s_,;:|\\^()\[\]{}<>\"'=]+")
_PART = re.compile(r"[^/+\-]+|[/+\-]")
_NUMBER = re.compile(r"\d{1,4}([.,]\d{1,3})?")
_UNITS = frozenset(
    str.split(
        "mm cm um µm nm s sec ms min hz khz mhz t kv kvp ma mas mgy gy cgy msv ml cc mg g mbq mci deg hu % ppm bpm"
    )
)
_FOLDED_UNITS = frozenset(unicodedata.normalize("NFKD", unit) for unit in _UNITS)
_MEASURE = re.compile(r"(\d{1,4}(?:[.,]\d{1,3})?)([a-zμ%]+)")
# Weightings, dimensions, b values, vertebrae and discs, reconstruction kernels, ordinals, factors.
_SHAPES = re.compile(
    r"t[12]\*?w?|[234]d|b\d{1,4}|[ctls]\d{1,2}|[bhijq][rfvz]?\d{2}[a-z]?|fc\d{2}|[1-4](st|nd|rd|th)|\d{1,2}x|x\d{1,2}|\d"
)
_IDENTIFIERS = ("PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "IssuerOfPatientID")


def cleaned(text: str, secret: Set[str] = frozenset()) -> str:
    """The words of a text that may stand, in their order, single-spaced; empty if none may.

    Args:
        secret: folded words that go in any case, as `own_words` finds them.
    """
    tokens = [token.strip(".!?") or token for token in _TOKEN.findall(text)]
    kept = [_kept(token, following, secret) for token, following in pairwise([*tokens, ""])]
    return " ".join(word for word in kept if word)


def _kept(token: str, following: str, secret: Set[str]) -> str:
    if fold(token) in secret:
        return ""
    if _stands(token, following):
        return token
    parts = _PART.findall(token)  # "head/neck", "post-contrast", "+C"
    if len(parts) < 2:
        return ""
    words = [part for part in parts if part not in "/+-"]
    if words and all(fold(word) not in secret and _stands(word, "") for word in words):
        return token
    if "-" in parts:  # a double name goes whole: of Smith-White no White stays
        return ""
    return " ".join(word for word in words if fold(word) not in secret and _stands(word, ""))


def _stands(token: str, following: str) -> bool:
    """Whether a word may stay. `torax` stands for `tórax`, but not `Lạt`, a city, for `lat`."""
    word = fold(token)
    if unicodedata.normalize("NFC", token.casefold()) in _words() or _SHAPES.fullmatch(word):
        return True
    measure = _MEASURE.fullmatch(word)
    if measure is not None:
        return measure[2] in _FOLDED_UNITS
    return _NUMBER.fullmatch(word) is not None and fold(following) in _FOLDED_UNITS


@lru_cache(maxsize=1)
def _words() -> frozenset[str]:
    listed = {unicodedata.normalize("NFC", word.casefold()) for word in vocabulary()}
    return frozenset(listed | {fold(word) for word in listed})


def own_words(ds: Dataset) -> frozenset[str]:
    """Folded words of every person name of a data set and its items, and of its identifiers at the top level."""
    words: set[str] = set()
    for value in _names(ds):
        words.update(re.findall(r"[^\W_]+", fold(value)))
    for keyword in _IDENTIFIERS:
        if keyword in ds:
            try:
                for value in values_of(ds[keyword]):
                    words.update(re.findall(r"[^\W_]+", fold(value)))
            except Exception:  # noqa: BLE001, S112 - unreadable: nothing of it can be written either
                continue
    return frozenset(word for word in words if len(word) > 1)


def _names(ds: Dataset) -> Iterator[str]:
    for tag in list(ds.keys()):
        try:
            if vr_of(ds.get_item(tag, keep_deferred=True)) not in ("PN", "SQ"):
                continue  # left as it was read: what is kept is kept byte for byte
            element = ds[tag]
            if element.VR == "PN":
                yield from values_of(element)
            elif element.VR == "SQ":
                for item in element.value:
                    yield from _names(item)
        except Exception:  # noqa: BLE001, S112 - unreadable: nothing of it can be written either
            continue


def fold(text: str) -> str:
    """Without case and accents, as words are compared here."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in decomposed if not unicodedata.combining(c))

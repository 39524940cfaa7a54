"""The PHI gate: does anything that identified the original still stand in the output?

The gate does not know how the cleaner works. It reads both data sets as any reader would, each item in its own
character set, takes what identifies out of the original, and looks for it in every text, every byte string, the file
meta information, the preamble, the file name and the comment segments of the compressed pixels of the output.

What it looks for, after folding case, accents and punctuation away:
- words of person names (PN, every component group), and the whole name in either order;
- identifiers (the LO, SH, UC, UT, ST, LT, UR attributes of Table E.1-1 that are no descriptions): the whole value;
- comments (LT, ST, UT descriptions): the whole value;
- dates, in the ways people write them; instance-identifying UIDs;
- whatever an attribute held that Table E.1-1 does not let stand: in the same attribute only.
Words under 4 characters (a Han, Kana or Hangul character counts double) are compared as whole values of the same
attribute only, or "Li" and "CT" would be found everywhere. So are single words in code strings, where the patient
Mr Head is one of the terms that the standard defines.

What one instance is searched for is nearly what the next of its study is searched for, and what it is searched in is
nearly the same too: needles are kept by the values they were made of, and verdicts by needles and value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

from pydicom.dataset import Dataset

from radloop.dicom.phi.codestream import codestream_texts, pixel_texts
from radloop.dicom.phi.elements import Reader, Seen, keyword, seen, tag_text
from radloop.dicom.phi.needles import DullBefore, Original
from radloop.dicom.phi.search import DullAfter, Search
from radloop.dicom.phi.words import decodings, fold
from radloop.dicom.spans import Buffer, NotPlain, meta_end

__all__ = [
    "Seen", "codestream_texts", "find_leaks", "find_leaks_among", "find_leaks_in_files", "fold", "pixel_texts", "seen",
]  # fmt: skip

_META = 144  # where file meta information begins: preamble, DICM, group length (PS3.10 section 7.1)
_before, _after = Reader(DullBefore()), Reader(DullAfter())


def find_leaks(
    original: Dataset, output: Dataset, *, file_name: str, kept_keywords: Set[str], options: Set[str] = frozenset()
) -> list[str]:
    """Where the output still identifies: tag paths such as `RequestAttributesSequence[0].CodeMeaning`, never values.

    Args:
        original: the identified instance.
        output: the de-identified one, as read back from its bytes.
        file_name: of the output; a hit is reported as `file name`.
        kept_keywords: attributes that an option lets stand, as they are or with dates shifted.
        options: code values (PS3.16 CID 7050) of the profile's options: `113106` full dates, `113110` UIDs, `113111`
            safe private and `113103` clean graphics let stand what is a leak without them. Texts are read regardless.
    """
    meta = getattr(output, "file_meta", None)
    elements = [*seen(output), *(seen(meta) if meta is not None else ())]
    preamble = getattr(output, "preamble", None)
    texts = {"PixelData": codestream_texts(output), "preamble": _stray(preamble) if preamble else ()}
    return find_leaks_among(
        seen(original), elements, file_name=file_name, kept_keywords=kept_keywords, options=options, texts=texts
    )


def find_leaks_among(
    original: Iterable[Seen],
    output: Iterable[Seen],
    *,
    file_name: str,
    kept_keywords: Set[str],
    options: Set[str] = frozenset(),
    texts: Mapping[str, Iterable[str]] | None = None,
) -> list[str]:
    """`find_leaks` on elements that somebody has read already: every one of each data set, sequences as their items'.

    Args:
        original, output: as `seen` and `Reader.read` give them; the output's with its file meta information (a data set of
            its own, always explicit VR little endian); pixel data need not be among them.
        file_name, kept_keywords, options: as in `find_leaks`.
        texts: further texts by the name they are reported under, such as those of `pixel_texts`.
    """
    kept = kept_keywords if isinstance(kept_keywords, frozenset) else frozenset(kept_keywords)
    before, after = Original(original, kept), list(output)
    search = Search(before, after, options)
    leaks = [path + (keyword(tag) or tag_text(tag)) for path, tag in search.leaks()]
    for name, found in (("file name", (file_name,)), *(texts or {}).items()):
        if any(before.found_in(text) for text in found):
            leaks.append(name)
    return leaks


def find_leaks_in_files(
    original: Buffer,
    output: Buffer,
    *,
    implicit: bool,
    file_name: str,
    kept_keywords: Set[str],
    options: Set[str] = frozenset(),
    texts: Mapping[str, Iterable[str]] | None = None,
) -> list[str]:
    """`find_leaks` on the bytes of two Part 10 files, or on their first bytes up to PixelData, without pydicom.

    Args:
        original, output: both plain little endian, with their preamble and file meta information.
        implicit: their transfer syntax has implicit VR.
        file_name, kept_keywords, options, texts: as in `find_leaks_among`.

    Raises:
        NotPlain, NeedMore: as `spans.scan`; `find_leaks` reads such files.
    """
    start, begin = meta_end(original), meta_end(output)
    if not start or not begin:
        raise NotPlain
    before = _before.read(original, start, len(original), implicit=implicit)
    after = _after.read(output, begin, len(output), implicit=implicit) + _after.read(output, _META, begin)
    preamble = bytes(output[:128])
    more = dict(texts or {}) | ({"preamble": _stray(preamble)} if any(preamble) else {})
    return find_leaks_among(
        before, after, file_name=file_name, kept_keywords=kept_keywords, options=options, texts=more
    )


def _stray(preamble: bytes) -> Iterator[str]:
    """What a preamble that is not zero says."""
    return decodings(preamble) if any(preamble) else iter(())

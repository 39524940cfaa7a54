"""Searching studies, the same for both adapters: one search a value, lists that were cut, keys that were ignored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from fnmatch import translate
from pathlib import Path
from re import DOTALL, IGNORECASE
from re import compile as pattern
from typing import TYPE_CHECKING

import msgspec

from radloop.dicom.pacs.pace import again
from radloop.errors import PacsError, SettingsError

if TYPE_CHECKING:
    from radloop.dicom.pacs import Pacs, Query, StudyFound

Answer = Mapping[str, tuple[str, ...]]
"""One answer: keyword -> values as text; a keyword that the PACS left out or empty is not in it."""

STUDY_KEYS = (
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyDescription", "ModalitiesInStudy", "AccessionNumber"),
    *("PatientID", "PatientName", "NumberOfStudyRelatedInstances"),
)
"""What is asked for of a study (PS3.4 section C.6.2.1.2)."""

_EARLIEST = date(1900, 1, 1)
_DAY_S = 24 * 3600
_SHORTEST_S = 60


def read_query(
    *,
    modalities: Iterable[str] = (),
    begin: str = "",
    end: str = "",
    description: str = "",
    accessions: str = "",
    patient_ids: str = "",
    study_uids: str = "",
) -> Query:
    """A query as people write it.

    Args:
        begin, end: `2026-01-31`, or days before today: `30d`.
        accessions, patient_ids, study_uids: a file with one value a line, or values with commas between them.

    Raises:
        SettingsError: a date or a file that cannot be read.
    """
    from radloop.dicom.pacs import Query

    return Query(
        modalities=tuple(dict.fromkeys(one.strip().upper() for one in modalities if one.strip())),
        begin=_day(begin),
        end=_day(end),
        description=description,
        accessions=_listed(accessions),
        patient_ids=_listed(patient_ids),
        study_uids=_listed(study_uids),
    )


def _day(text: str) -> date | None:
    if not text:
        return None
    try:
        if text.endswith("d") and text[:-1].isdecimal():
            return date.today() - timedelta(days=int(text[:-1]))  # noqa: DTZ011 - StudyDate is local time
        return date.fromisoformat(text)
    except (ValueError, OverflowError):
        raise SettingsError(
            "a date cannot be read", expected="2026-01-31, or 30d: days before today", got=text
        ) from None


def _listed(text: str) -> tuple[str, ...]:
    """Values; they are not repeated in an error, since they may be identifiers."""
    if not text:
        return ()
    path = Path(text)
    try:
        is_file = path.is_file()
    except OSError:  # a long list is no name of a file
        is_file = False
    if not is_file and "/" in text and "," not in text:
        raise SettingsError("a list of identifiers is no file", expected="a file with one value a line")
    try:
        values = path.read_text("utf-8-sig").splitlines() if is_file else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError("a list of identifiers cannot be read", got=type(error).__name__) from None
    found = tuple(dict.fromkeys(value.strip() for value in values if value.strip()))
    if not found:
        raise SettingsError("a list of identifiers is empty", expected="one value a line")  # not: everything
    return found


def studies(pacs: Pacs, query: Query) -> Iterator[StudyFound]:
    """The studies that fit, each once.

    Raises:
        PacsError: the PACS cuts its list even of a single minute's studies.
    """
    seen = set()
    for keys in searches(query):
        for answer in _all(pacs, keys):
            found = study_of(answer)
            if found.study_uid in seen:
                continue
            if query.modalities and not found.modalities:
                named = {one.modality for one in again(lambda uid=found.study_uid: pacs.series(uid), pacs.patience)}  # type: ignore[misc]
                found = msgspec.structs.replace(found, modalities=tuple(sorted(named - {""})))
            if fits(found, query):
                seen.add(found.study_uid)
                yield found


def searches(query: Query) -> Iterator[dict[str, str]]:
    """The keys of each search. One value at a time: lists of values are defined for UIDs only (PS3.4 C.2.2.2.2)."""
    common: dict[str, str] = {}
    if query.begin or query.end:
        common["StudyDate"] = f"{_da(query.begin)}-{_da(query.end)}"
    for keyword, values in (
        ("StudyInstanceUID", query.study_uids),
        ("AccessionNumber", query.accessions),
        ("PatientID", query.patient_ids),
        ("ModalitiesInStudy", query.modalities),
    ):
        if values:
            # The most selective key alone; the others, and what a PACS ignores, are compared here.
            yield from ({**common, keyword: value} for value in dict.fromkeys(values))
            return
    yield common


def fits(found: StudyFound, query: Query) -> bool:
    """Whether an answer is what was asked for: a PACS may ignore any key but the required ones (PS3.4 C.2.2.1.3)."""
    dated = found.study_date
    return (
        (not query.study_uids or found.study_uid in query.study_uids)
        and (not query.accessions or found.accession in query.accessions)
        and (not query.patient_ids or found.patient_id in query.patient_ids)
        and (not query.modalities or bool({*query.modalities} & {*found.modalities}))
        and (query.begin is None or dated >= _da(query.begin))
        and (query.end is None or (bool(dated) and dated <= _da(query.end)))
        and (not query.description or _like(found.description, query.description))
    )


def _like(text: str, wildcard: str) -> bool:
    # Brackets mean themselves in DICOM (PS3.4 C.2.2.2.4), not a set of characters.
    return pattern(translate(wildcard.replace("[", "[[]")), IGNORECASE | DOTALL).fullmatch(text) is not None


def study_of(answer: Answer) -> StudyFound:
    """An answer as a study. Raises PacsError when it has no StudyInstanceUID."""
    from radloop.dicom.pacs import StudyFound

    def text(keyword: str) -> str:
        return "\\".join(answer.get(keyword, ()))

    if not text("StudyInstanceUID"):
        raise PacsError("the PACS described a study without its StudyInstanceUID")
    return StudyFound(
        study_uid=text("StudyInstanceUID"),
        study_date=text("StudyDate").replace(".", ""),
        study_time=text("StudyTime"),
        description=text("StudyDescription"),
        modalities=tuple(answer.get("ModalitiesInStudy", ())),
        accession=text("AccessionNumber"),
        patient_id=text("PatientID"),
        patient_name=text("PatientName"),
        instances=number(answer, "NumberOfStudyRelatedInstances"),
    )


def number(answer: Answer, keyword: str) -> int | None:
    """A count that the PACS gave; None where it gave none, or none that can be one."""
    try:
        return int(answer.get(keyword, ("",))[0]) or None
    except ValueError:
        return None


def _all(pacs: Pacs, keys: dict[str, str]) -> Iterator[Answer]:
    """All answers of one search: a list that was cut is asked for again in halves of its dates, then of its day."""
    answers, whole = again(lambda: pacs.search(keys), pacs.patience)
    yield from answers  # of a cut list too: studies without a date are in no half
    if whole and not (pacs.cut_at and len(answers) >= pacs.cut_at):
        return
    for narrower in _halves(keys, pacs.name):
        yield from _all(pacs, narrower)


def _halves(keys: dict[str, str], name: str) -> tuple[dict[str, str], dict[str, str]]:
    begin, end = _days(keys.get("StudyDate", ""))
    if begin < end:
        middle = begin + (end - begin) // 2
        first, second = f"{_da(begin)}-{_da(middle)}", f"{_da(middle + timedelta(days=1))}-{_da(end)}"
        return {**keys, "StudyDate": first}, {**keys, "StudyDate": second}
    start, stop = _seconds(keys.get("StudyTime", ""))
    if stop - start <= _SHORTEST_S:
        raise PacsError(
            f"{name} lists only some of the studies that fit, even of one minute",
            expected="fewer studies, or a PACS that lists them all",
            next_step="narrow the query (modality, description), or ask for the PACS's limit to be raised",
        )
    middle_s = start + (stop - start) // 2
    first, second = f"{_tm(start)}-{_tm(middle_s - 1)}", f"{_tm(middle_s)}-{_tm(stop - 1)}"
    day = {**keys, "StudyDate": _da(begin)}
    return {**day, "StudyTime": first}, {**day, "StudyTime": second}


def _days(span: str) -> tuple[date, date]:
    begin, dash, end = span.partition("-")
    first = _date(begin) if begin else _EARLIEST
    if not dash and begin:
        return first, first
    # A study of tomorrow: clocks differ, and so do time zones.
    return first, _date(end) if end else max(date.today() + timedelta(days=1), first)  # noqa: DTZ011


def _date(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:8]))


def _seconds(span: str) -> tuple[int, int]:
    if not span:
        return 0, _DAY_S
    begin, _, end = span.partition("-")
    of = [int(t[:2]) * 3600 + int(t[2:4]) * 60 + int(t[4:6]) for t in (begin, end)]
    return of[0], of[1] + 1


def _da(day: date | None) -> str:
    return day.strftime("%Y%m%d") if day else ""


def _tm(second: int) -> str:
    return f"{second // 3600:02}{second // 60 % 60:02}{second % 60:02}"

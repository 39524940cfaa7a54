"""What stands in an element: its VR, its values as text, ages. Small helpers of the rooms beside."""

from __future__ import annotations

import re
from datetime import date
from typing import NoReturn

from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from radloop.catalog.reason import Reason
from radloop.dicom.profile import TEXT_VRS
from radloop.errors import DicomError

_ESCAPE = re.compile(r"\x1b[$()-]{1,2}[@-Z]")


def refuse(reason: Reason, what: str, expected: str, got: str | None = None) -> NoReturn:
    """Raise DicomError."""
    raise DicomError(what, reason=reason, expected=expected, got=got)


def vr_of(element: DataElement | RawDataElement) -> str:
    """The element's VR; the dictionary's where the file does not say (implicit VR, UN)."""
    vr = element.VR
    if vr is None or vr == "UN":
        vr = DicomDictionary.get(int(element.tag), ("UN",))[0]
    return vr.split(" or ")[-1]  # "US or SS": either will do here


def values_of(element: DataElement) -> list[str]:
    """An element's values as text; PersonName in all its component groups."""
    value = element.value
    if value is None or value == "":
        return []
    many = not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "components")
    return [str(v).strip(" \0") for v in value] if many else [str(value).strip(" \0")]


def text_of(ds: Dataset, keyword: str) -> str:
    """An attribute as text, values joined by backslashes; empty if absent or unreadable."""
    try:
        return "\\".join(values_of(ds[keyword])) if keyword in ds else ""
    except Exception:  # noqa: BLE001 - unreadable is as good as absent here
        return ""


def items_of(ds: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none if it is absent, unreadable, or not the sequence that it says it is."""
    try:
        return [item for item in ds[keyword].value if isinstance(item, Dataset)] if keyword in ds else []
    except Exception:  # noqa: BLE001 - unreadable is as good as absent here
        return []


def number_of(ds: Dataset, group: int, element: int) -> int | None:
    """An attribute as a number; None if absent or unreadable."""
    try:
        return int(ds[group, element].value)
    except Exception:  # noqa: BLE001 - unreadable is as good as absent here
        return None


def with_values(element: DataElement, vr: str, values: list[str]) -> DataElement:
    """The element with other values."""
    return DataElement(element.tag, vr, values[0] if len(values) == 1 else values or None)


def plain(values: list[str]) -> list[str]:
    """Text without control characters, which no kept attribute needs, and ISO 2022 escapes that pydicom leaves (IR 58)."""
    return ["".join(c for c in _ESCAPE.sub("", value) if c.isprintable()) for value in values]


def texts_of(ds: Dataset) -> list[str]:
    """Every text of a cleaned data set. Cleaning decoded them all, so raw elements are none of them."""
    found: list[str] = []
    for tag in list(ds.keys()):
        element = ds.get_item(tag, keep_deferred=True)
        if element.is_raw:
            continue
        if element.VR == "SQ":
            found += [text for item in element.value for text in texts_of(item)]
        elif element.VR in TEXT_VRS:
            found += values_of(element)
    return found


def capped(age: str) -> str | None:
    """An AS value with ages over 89 as 090Y; None if it is no AS value (PS3.5 table 6.2-1)."""
    match = re.fullmatch(r"(\d{3})([YMWD])", age.strip())
    if match is None:
        return None
    years = int(match[1]) / {"Y": 1, "M": 12, "W": 52.1775, "D": 365.25}[match[2]]
    return "090Y" if years >= 90 else match[0]


def age_of(birth: str, study: str) -> str | None:
    """PatientAge on the study date, in the unit used at that age: years from 2, months from 1, else days."""
    try:
        born, seen = (date(int(t[:4]), int(t[4:6]), int(t[6:8])) for t in (birth, study) if len(t) == 8)
    except ValueError:
        return None
    months = (seen.year - born.year) * 12 + seen.month - born.month - (seen.day < born.day)
    if not 0 <= months < 130 * 12:
        return None
    if months >= 24:
        return capped(f"{months // 12:03d}Y")
    return f"{months:03d}M" if months else f"{(seen - born).days:03d}D"

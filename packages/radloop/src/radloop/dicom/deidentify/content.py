"""Content items of reports whose concept says that the value is about the patient (PS3.15 E.3.4, PS3.16 TID 1007).

The rules for attributes cannot see it: to them a birth date in a report is a date, an age a number.
"""

from __future__ import annotations

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from radloop.dicom.deidentify.values import text_of
from radloop.dicom.profile import Profile

# Concept names by scheme and code: dates of birth, and what retain-patient-characteristics (113108) lets stand.
_BIRTH = frozenset({("DCM", "121031"), ("SCT", "184099003"), ("SCT", "3950001"), ("LN", "21112-8")})
_AGE = frozenset({("DCM", "121033"), ("SCT", "397669002"), ("SCT", "424144002"), ("LN", "30525-0"), ("LN", "29553-5")})
_CHARACTERISTICS = _AGE | frozenset(
    {("DCM", code) for code in ("121032", "121034", "128774")}  # sex, species, body surface area formula
    | {
        ("SCT", code)
        for code in ("50373000", "27113001", "60621009", "301898006", "263495000", "364699009", "77386006")
    }
    | {
        ("SRT", code)
        for code in ("F-01860", "F-01861", "F-01862", "F-01863", "F-008EC", "F-008EC", "G-A166", "F-01810")
    }
    | {
        ("LN", code)
        for code in (
            "3137-7",
            "8302-2",
            "8301-4",
            "3141-9",
            "29463-7",
            "3142-7",
            "3140-1",
            "39156-5",
            "46098-0",
            "21840-4",
        )
    }
)
_MAX_AGE_YEARS = 89
_YEARS = frozenset({"a", "year"})


def guard(source: Dataset, out: Dataset, profile: Profile) -> None:
    """Blank the value of a content item about the patient, unless an option keeps it; its place in the tree stays."""
    if "ConceptNameCodeSequence" not in source:
        return
    concept = _concept(source)
    if concept in _BIRTH:
        for keyword in ("Date", "DateTime", "TextValue"):
            if keyword in out:
                setattr(out, keyword, {"Date": "19000101", "DateTime": "19000101000000"}.get(keyword, "REMOVED"))
    elif concept in _CHARACTERISTICS and not profile.keeps_patient:
        _blank(out)
    elif concept in _AGE:
        _cap(out)


def _concept(item: Dataset) -> tuple[str, str]:
    try:
        code = item["ConceptNameCodeSequence"].value[0]
        return text_of(code, "CodingSchemeDesignator"), text_of(code, "CodeValue")
    except Exception:  # noqa: BLE001 - no code
        return "", ""


def _blank(out: Dataset) -> None:
    if "MeasuredValueSequence" in out:
        out.MeasuredValueSequence = Sequence()
    if "NumericValue" in out:
        out.NumericValue = "0"
    if "TextValue" in out:
        out.TextValue = "REMOVED"
    if "ConceptCodeSequence" in out:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "REMOVED", "99RADLOOP", "REMOVED"
        out.ConceptCodeSequence = Sequence([item])


def _cap(out: Dataset) -> None:
    """An age over 89 years as 90 (45 CFR 164.514(b)(2))."""
    for item in out.get("MeasuredValueSequence") or []:
        units = item.get("MeasurementUnitsCodeSequence") or [Dataset()]
        try:
            if text_of(units[0], "CodeValue") in _YEARS and float(item.NumericValue) > _MAX_AGE_YEARS:
                item.NumericValue = "90"
                for keyword in ("FloatingPointValue", "RationalNumeratorValue", "RationalDenominatorValue"):
                    item.pop(keyword, None)
        except Exception:  # noqa: BLE001 - no number to read is no age to keep
            item.NumericValue = "0"

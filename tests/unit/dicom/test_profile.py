from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import tag_for_keyword

from radloop.dicom import profile
from radloop.dicom.profile import (
    BASIC,
    OPTIONS,
    RESEARCH,
    Action,
    attribute_type,
    chosen,
    named,
    resolve,
    storage_classes,
    table,
)
from radloop.dicom.profile_tables import safe_private
from radloop.errors import SettingsError

COLUMNS = {
    "rtnUIDsOpt": "uids",
    "rtnDevIdOpt": "device",
    "rtnInstIdOpt": "institution",
    "rtnPatCharsOpt": "patient",
    "rtnLongFullDatesOpt": "full_dates",
    "rtnLongModifDatesOpt": "modified_dates",
    "cleanDescOpt": "descriptors",
    "cleanStructContOpt": "structured",
    "cleanGraphOpt": "graphics",
    "rtnSafePrivOpt": "private",
}
CT = "ct-image"
ROOT = Path(__file__).parents[3]


def action(keyword: str, vr: str, which: profile.Profile = RESEARCH, iod: str = CT, parent: str = "") -> Action:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return which.action(tag, vr, iod, parent)


# Rows that editions after 2024e added; no row was changed or withdrawn. Kept apart because the published JSON is 2024e's.
SINCE_2024E = frozenset(
    str.split("""
    AcquisitionContextDescription AnnotationDateTime ChannelDerivationDescription ChannelLabel DisplayURI
    DoseCalculationModelName EffectiveStartDateTime EffectiveStopDateTime EthnicGroupCodeSequence EthnicGroups
    GenderIdentityCodeSequence GenderIdentityComment GenderIdentitySequence HistologicalDiagnosesCodeSequence
    MontageChannelLabel MontageName MultiplexGroupLabel NameToUse NameToUseComment PersonNamesToUseSequence
    PrimaryDiagnosisCodeSequence PrincipalDiagnosisCodeSequence PronounCodeSequence PronounComment
    SecondaryDiagnosesCodeSequence SegmentDefinitionDateTime SexParametersForClinicalUseCategoryCodeSequence
    SexParametersForClinicalUseCategoryComment SexParametersForClinicalUseCategoryReference
    SexParametersForClinicalUseCategorySequence TableTopPositionAlignmentUID ThirdPersonPronounsSequence
    UnformattedTextValue WaveformAnnotationSequence
    """)
)


@pytest.mark.data
def test_table_is_the_standards_table(test_data: Path) -> None:
    """A row lost or mistyped in our data file is an attribute that leaks. Ours is 2026d, the published one 2024e."""
    published = json.loads((test_data / "specs/confidentiality_profile_attributes.json").read_text())
    plain = {int(x["id"], 16): x for x in published if len(x["id"]) == 8 and "x" not in x["id"]}
    newer = {tag: row for tag, row in table().items() if tag not in plain}
    assert {row.keyword for row in newer.values()} == SINCE_2024E
    assert set(plain) <= set(table())
    for tag, row in table().items():
        if tag in plain:
            assert row.basic == plain[tag]["basicProfile"], row.keyword
            ours = {column: plain[tag][k] for k, column in COLUMNS.items() if k in plain[tag]}
            assert dict(row.options) == ours, row.keyword
    assert len(published) - len(plain) == 4  # curves, overlay comments and data, private: removed by rule


def test_types_and_iods_are_what_the_script_writes() -> None:
    """A wrong Type empties an attribute that an IOD demands, or removes it: the output is no valid DICOM.

    Derived again from the module tables of PS3.3 that highdicom carries: the strictest Type over an IOD's modules.
    """
    spec = importlib.util.spec_from_file_location("dicom_tables", ROOT / "scripts/dicom_tables.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert {uid: (iod, kind) for uid, iod, kind in script.iods()} == storage_classes()
    rows = script.types()
    for keyword, parent, usual, exceptions in rows:
        others = {iod: group[0] for group in filter(None, exceptions.split(";")) for iod in group[2:].split()}
        assert attribute_type("no such iod", keyword, parent) == usual
        assert all(attribute_type(iod, keyword, parent) == kind for iod, kind in others.items())
    assert len(rows) > 1500
    assert attribute_type("rt-plan", "RTPlanLabel") is None  # its action is D, whatever the Type
    assert attribute_type("enhanced-sr", "TextValue", "ContentSequence") == "1"


def test_samples_of_the_table() -> None:
    """Facts typed from PS3.15 by hand, so that the table is tested where the published JSON is absent."""
    rows = {row.keyword: row for row in table().values()}
    assert len(rows) == 651
    assert rows["PatientName"].basic == "Z"
    assert rows["PatientID"].basic == "Z/D"
    assert rows["OtherPatientIDs"].basic == "X"
    assert rows["SOPInstanceUID"].basic == "U"
    assert rows["ReferencedImageSequence"].basic == "X/Z/U*"
    assert dict(rows["StudyDate"].options) == {"full_dates": "K", "modified_dates": "C"}
    assert dict(rows["PatientAge"].options) == {"patient": "K"}
    assert dict(rows["StationName"].options) == {"device": "K"}


def test_every_listed_keyword_exists() -> None:
    """A misspelt keyword in a keep list would silently remove an attribute that imaging needs."""
    lists = profile.KEPT_TEXT | profile.CODE_TEXT | profile.KEPT_BULK | profile.CLASS_UIDS
    lists = lists | profile.REMOVED | profile.GRAPHICS | profile.CONTENT | profile.CONTENT_TEXT | profile.WAVEFORM_BULK
    assert [k for k in sorted(lists) if tag_for_keyword(k) is None] == []


def test_no_kept_text_is_in_the_table() -> None:
    """The keep list must not overrule PS3.15."""
    keywords = {row.keyword for row in table().values()}
    assert not keywords & (profile.KEPT_TEXT | profile.CODE_TEXT | profile.KEPT_BULK | profile.CLASS_UIDS)


@pytest.mark.parametrize(
    ("compound", "kind", "expected"),
    [
        ("Z/D", "1", "D"), ("Z/D", "2", "Z"), ("Z/D", "3", "Z"), ("X/Z", "2", "Z"), ("X/Z", "3", "X"),
        ("X/D", "1", "D"), ("X/D", "3", "X"), ("X/Z/D", "1", "D"), ("X/Z/D", "2", "Z"), ("X/Z/D", "3", "X"),
        ("X/Z/U*", "1", "U"), ("X/Z/U*", "3", "X"), ("X/Z/U*", "2", "U"), ("X/Z/U*", None, "U"),
        ("X/Z", None, "Z"), ("X", None, "X"),
        ("Z", "1", "D"), ("Z", "2", "Z"), ("Z", None, "Z"), ("D", "3", "D"),
    ],
)  # fmt: skip
def test_compound_actions_keep_the_iod_valid(compound: str, kind: str | None, expected: str) -> None:
    """PS3.15 E.1.1: the attribute's Type decides, else a required attribute is missing and viewers refuse the image."""
    assert resolve(compound, kind) == expected


def test_types_differ_by_iod_and_by_place() -> None:
    """AcquisitionDateTime is optional in CT and required in enhanced CT; InstitutionName differs inside sequences."""
    assert attribute_type("ct-image", "AcquisitionDateTime") == "3"
    assert attribute_type("enhanced-ct-image", "AcquisitionDateTime") == "1"
    assert attribute_type("ct-image", "ContrastBolusAgent") == "2"
    assert attribute_type("ct-image", "DeviceSerialNumber") == "3"
    assert attribute_type("enhanced-mr-image", "DeviceSerialNumber") == "1"
    assert action("DeviceSerialNumber", "LO") is Action.REMOVE
    assert action("DeviceSerialNumber", "LO", iod="enhanced-mr-image") is Action.DUMMY


@pytest.mark.parametrize(
    ("keyword", "vr", "basic", "research"),
    [
        ("StudyDate", "DA", Action.EMPTY, Action.SHIFT),
        ("SeriesDate", "DA", Action.REMOVE, Action.SHIFT),
        ("StudyTime", "TM", Action.EMPTY, Action.KEEP_STRING),
        ("AcquisitionDateTime", "DT", Action.REMOVE, Action.SHIFT),
        ("PatientBirthDate", "DA", Action.EMPTY, Action.EMPTY),
        ("PatientSex", "CS", Action.EMPTY, Action.KEEP_STRING),
        ("PatientAge", "AS", Action.REMOVE, Action.AGE),
        ("EthnicGroup", "SH", Action.REMOVE, Action.CLEAN),
        ("Allergies", "LO", Action.REMOVE, Action.CLEAN),
        ("InstitutionName", "LO", Action.REMOVE, Action.REMOVE),
        ("AccessionNumber", "SH", Action.EMPTY, Action.EMPTY),
        ("Manufacturer", "LO", Action.KEEP_TEXT, Action.KEEP_TEXT),
        ("SOPInstanceUID", "UI", Action.MAP_UID, Action.MAP_UID),
        ("SOPClassUID", "UI", Action.KEEP_STRING, Action.KEEP_STRING),
        ("VolumeFrameOfReferenceUID", "UI", Action.MAP_UID, Action.MAP_UID),
        ("Rows", "US", Action.KEEP, Action.KEEP),
        ("Rows", "LO", Action.REMOVE, Action.REMOVE),
        ("PixelData", "OW", Action.KEEP, Action.KEEP),
        ("EncapsulatedDocument", "OB", Action.DUMMY, Action.DUMMY),
        ("WaveformData", "OW", Action.REMOVE, Action.REMOVE),
        ("IconImageSequence", "SQ", Action.REMOVE, Action.REMOVE),
        ("OriginalAttributesSequence", "SQ", Action.REMOVE, Action.REMOVE),
        ("SharedFunctionalGroupsSequence", "SQ", Action.RECURSE, Action.RECURSE),
        ("PatientInsurancePlanCodeSequence", "SQ", Action.REMOVE, Action.REMOVE),
        ("ReferringPhysicianName", "PN", Action.EMPTY, Action.EMPTY),
        ("OtherStudyNumbers", "IS", Action.REMOVE, Action.REMOVE),
    ],
)
def test_actions(keyword: str, vr: str, basic: Action, research: Action) -> None:
    """What each profile promises for the attributes that matter most."""
    assert action(keyword, vr, BASIC) is basic
    assert action(keyword, vr, RESEARCH) is research


@pytest.mark.parametrize("tag", [0x00091001, 0x60003000, 0x50003000, 0x00100000, 0x00080006 + 0x7000, 0x7FE10010])
def test_what_no_dictionary_knows_goes(tag: int) -> None:
    """Private, repeating and unknown attributes can hold anything."""
    assert RESEARCH.action(tag, "LO", CT) is Action.REMOVE


def test_an_unknown_profile_is_refused() -> None:
    """A typo must not fall back to something milder."""
    with pytest.raises(SettingsError, match="unknown de-identification profile"):
        named("reserach")


ALL = chosen("basic", [option for option in OPTIONS if option != "retain-modified-dates"])


@pytest.mark.parametrize(
    ("option", "keyword", "vr", "expected"),
    [
        ("113103", "GraphicAnnotationSequence", "SQ", Action.RECURSE),
        ("113103", "UnformattedTextValue", "ST", Action.CLEAN),
        ("113104", "ContentSequence", "SQ", Action.RECURSE),
        ("113104", "AcquisitionContextSequence", "SQ", Action.RECURSE),
        ("113104", "TextValue", "UT", Action.CLEAN),
        ("113105", "StudyDescription", "LO", Action.CLEAN),
        ("113105", "ReasonForVisitCodeSequence", "SQ", Action.RECURSE),
        ("113105", "PatientName", "PN", Action.EMPTY),
        ("113106", "StudyDate", "DA", Action.KEEP_STRING),
        ("113106", "AcquisitionDateTime", "DT", Action.KEEP_STRING),
        ("113106", "TimezoneOffsetFromUTC", "SH", Action.KEEP_STRING),
        ("113106", "PatientBirthDate", "DA", Action.EMPTY),
        ("113107", "StudyDate", "DA", Action.SHIFT),
        ("113108", "PatientAge", "AS", Action.AGE),
        ("113108", "PatientSex", "CS", Action.KEEP_STRING),
        ("113109", "StationName", "SH", Action.KEEP_TEXT),
        ("113109", "DeviceUID", "UI", Action.KEEP_STRING),
        ("113109", "StationAETitle", "AE", Action.CLEAN),
        ("113109", "UDISequence", "SQ", Action.RECURSE),
        ("113109", "DateOfLastCalibration", "DA", Action.KEEP_STRING),
        ("113110", "SOPInstanceUID", "UI", Action.KEEP_STRING),
        ("113110", "VolumeFrameOfReferenceUID", "UI", Action.KEEP_STRING),
        ("113110", "ReferencedImageSequence", "SQ", Action.RECURSE),
        ("113112", "InstitutionName", "LO", Action.KEEP_TEXT),
        ("113112", "InstitutionCodeSequence", "SQ", Action.RECURSE),
    ],
)
def test_each_option_does_what_its_column_says(option: str, keyword: str, vr: str, expected: Action) -> None:
    """An option that keeps less than it says ruins research; one that keeps more ruins trust."""
    assert action(keyword, vr, chosen("basic", [option])) is expected


def test_options_by_name_or_code_and_their_codes() -> None:
    """What was applied must be listed, in words that other software knows (PS3.16 CID 7050)."""
    assert [o.code for o in OPTIONS.values()] == [str(code) for code in range(113101, 113113)]
    both = chosen("research", ["113105", "clean-graphics", "clean-descriptors"])
    assert [code for code, _ in both.codes] == ["113100", "113103", "113105", "113107", "113108"]
    assert chosen("basic") == BASIC and chosen("research", ["113108"]) == RESEARCH
    assert (BASIC.temporal, RESEARCH.temporal, ALL.temporal) == ("REMOVED", "MODIFIED", "UNMODIFIED")


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("basic", ["113106", "113107"], "dates cannot stay and be moved"),
        ("research", ["retain-full-dates"], "dates cannot stay and be moved"),
        ("basic", ["clean-descriptor"], "unknown de-identification option"),
        ("basic", ["113100"], "unknown de-identification option"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: list[str], match: str) -> None:
    """A typo must not silently choose less; two date options contradict each other (PS3.15 E.3.6)."""
    with pytest.raises(SettingsError, match=match):
        chosen(name, options)


def test_without_options_nothing_of_theirs_stays() -> None:
    """Every K and C of the table, under Basic alone: removed, emptied, replaced or mapped."""
    for tag, row in table().items():
        vr = DicomDictionary.get(tag, ("UN",))[0].split(" or ")[-1]
        if row.options and vr != "SQ":
            assert BASIC.action(tag, vr, CT) in (Action.REMOVE, Action.EMPTY, Action.DUMMY, Action.MAP_UID), row.keyword


def test_samples_of_the_safe_private_elements() -> None:
    """Facts typed from PS3.15 Table E.3.10-1 by hand: an element too many is a leak, one too few loses b values."""
    safe = safe_private()
    assert safe["SIEMENS MR HEADER", 0x0019, 0x0C] == "IS"
    assert safe["GEMS_PARM_01", 0x0043, 0x39] == "IS"
    assert safe["Philips Imaging DD 001", 0x2001, 0x03] == "FL"
    assert safe["Philips PET Private Group", 0x7053, 0x00] == "DS"
    assert safe["HOLOGIC, Inc.", 0x7E01, 0x01] == "LO"
    assert ("SIEMENS CSA HEADER", 0x0029, 0x10) not in safe
    assert len(safe) == 479

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from pydicom.datadict import tag_for_keyword

from radloop.dicom import profile
from radloop.dicom.profile import BASIC, RESEARCH, Action, attribute_type, image_iods, named, resolve, table
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


def action(keyword: str, vr: str, which: profile.Profile = RESEARCH, iod: str = CT, parent: str = "") -> Action:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return which.action(tag, vr, iod, parent)


@pytest.mark.data
def test_table_is_the_standards_table(test_data: Path) -> None:
    """A row lost or mistyped in our data file is an attribute that leaks."""
    published = json.loads((test_data / "specs/confidentiality_profile_attributes.json").read_text())
    plain = {int(x["id"], 16): x for x in published if len(x["id"]) == 8 and "x" not in x["id"]}
    assert set(table()) == set(plain)
    for tag, row in table().items():
        assert row.basic == plain[tag]["basicProfile"], row.keyword
        assert dict(row.options) == {ours: plain[tag][k] for k, ours in COLUMNS.items() if k in plain[tag]}, row.keyword
    assert len(published) - len(plain) == 4  # curves, overlay comments and data, private: removed by rule


def test_types_are_those_of_the_modules() -> None:
    """A wrong Type empties an attribute that an IOD demands, or removes it: the output is no valid DICOM.

    Derived again from the module tables of PS3.3 that highdicom carries: the strictest Type over an IOD's modules.
    """
    folder = resources.files("highdicom") / "_standard"
    modules_of, attributes_of, iod_of = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("iod_module_map", "module_attribute_map", "sop_class_iod_map")
    )
    assert {uid: iod for uid, iod in image_iods().items() if uid in iod_of}.items() <= iod_of.items()
    assert len(set(image_iods()) - set(iod_of)) == 4  # retired ultrasound, nuclear medicine, angiography
    checked = 0
    for iod in set(image_iods().values()):
        strictest: dict[tuple[str, str], str] = {}
        for module in modules_of[iod]:
            for a in attributes_of[module["key"]]:
                place = (a["keyword"], a["path"][-1] if a["path"] else "")
                strictest[place] = min(strictest.get(place, "3"), a["type"] or "3")
        for (keyword, parent), kind in strictest.items():
            tag = tag_for_keyword(keyword)
            if tag in table() and "/" in table()[tag].basic:
                assert attribute_type(iod, keyword, parent) == kind[0], (iod, keyword, parent)
                checked += 1
    assert checked > 2000


def test_samples_of_the_table() -> None:
    """Facts typed from PS3.15 by hand, so that the table is tested where the published JSON is absent."""
    rows = {row.keyword: row for row in table().values()}
    assert len(rows) == 617
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
    lists = profile.KEPT_TEXT | profile.CODE_TEXT | profile.KEPT_BULK | profile.CLASS_UIDS | profile.REMOVED_SEQUENCES
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
        ("X/Z/U*", "1", "U"), ("X/Z/U*", "3", "X"), ("X/Z/U*", None, "U"), ("X/Z", None, "Z"), ("X", None, "X"),
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
        ("EthnicGroup", "SH", Action.REMOVE, Action.REMOVE),
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

"""What each option of PS3.15 section E.3 keeps and cleans, in whole instances and through the gate."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom._dicom_dict import DicomDictionary
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from radloop.catalog.reason import Reason
from radloop.dicom.burned_in import Pixels
from radloop.dicom.deidentify import Deidentifier, read
from radloop.dicom.deidentify.descriptors import cleaned
from radloop.dicom.profile import CODE_TEXT, KEPT_TEXT, OPTIONS, TEXT_VRS, chosen
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError, PhiError, SettingsError
from radloop.settings import Deidentify, Settings
from radloop.stages.project import check, loop_profile

NAMES = Pseudonymiser(bytes(range(32)))


def cleaner(*options: str, profile: str = "basic") -> Deidentifier:
    return Deidentifier(NAMES, profile=chosen(profile, options))


def image() -> Dataset:
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.remove_private_tags()
    ds.PatientName, ds.PatientID, ds.StudyDate = "Hand^Mina", "HG-448812", "20040119"
    ds.BodyPartExamined = "CHEST"
    return ds


def through(ds: Dataset, which: Deidentifier, folder: Path) -> Dataset:
    """Cleaned, through the gate, and read again."""
    source, target = folder / "in.dcm", folder / "out.dcm"
    dcmwrite(source, ds, enforce_file_format=True)
    which.clean_file(source, target, site="A")
    return pydicom.dcmread(target)


def listed(ds: Dataset) -> list[str]:
    return [str(item.CodeValue) for item in ds.DeidentificationMethodCodeSequence]


# ---- descriptors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CT THORAX/ABDOMEN mit KM", "CT THORAX/ABDOMEN mit KM"),
        ("t1_mprage_sag_p2_iso 1.0mm", "t1 mprage sag iso 1.0mm"),
        ("CHEST PA AND LAT, Mueller Anna *12.03.1950", "CHEST PA AND LAT"),
        ("MRI brain w/o contrast for Mr. Smith, MRN 00482211", "MRI brain w/o contrast for Mr"),  # MR is a modality
        ("Thorax 5.0 B30f +C", "Thorax B30f +C"),
        ("slice 5 mm, TE 90 ms, 1.5 T, 120 kV", "slice 5 mm 90 ms 1.5 T 120 kV"),
        ("Knie rechts 2 Ebenen", "Knie rechts 2 Ebenen"),
        ("follow-up 2019-05-04 post-op Dr. Jones", "follow-up post-op Dr"),
        ("Schädel seitlich", "Schädel seitlich"),
        ("+49 40 1234567, room 312", ""),
        ("", ""),
        ("T2*-weighted FLAIR", "T2*-weighted FLAIR"),
        ("head/Meier", "head"),
    ],
)
def test_words_of_the_vocabulary_stay(text: str, expected: str) -> None:
    """A series description without its anatomy is useless; one with a name is a leak."""
    assert cleaned(text) == expected
    assert cleaned(expected) == expected


@given(st.text(max_size=80))
@example("5 xx mm")
def test_cleaning_a_text_twice_changes_nothing(text: str) -> None:
    """Idempotent: a second project's cleaning must not differ."""
    once = cleaned(text)
    assert cleaned(once) == once
    assert len(once) <= len(text)


def test_descriptors_are_cleaned_and_the_patients_own_name_goes(tmp_path: Path) -> None:
    """A patient called Hand: "hand" is a body part for everybody else."""
    ds = image()
    ds.StudyDescription = "CT Hand links, Frau Mina Hand, 19.01.2004"
    ds.SeriesDescription, ds.ProtocolName = "Dr Quist", "Thorax 3 mm Quist"
    ds.PatientComments, ds.DerivationDescription = "likes tea", "average of 3 slices"
    out = through(ds, cleaner("113105"), tmp_path)
    assert out.StudyDescription == "CT links"
    assert "SeriesDescription" not in out or out.SeriesDescription == "Dr"
    assert out.ProtocolName == "Thorax 3 mm"
    assert "PatientComments" not in out
    assert out.DerivationDescription == "average of 3 slices"
    assert listed(out) == ["113100", "113105"]


# ---- dates, UIDs, device, institution


def test_full_dates(tmp_path: Path) -> None:
    """Dates stay to the day and are said to; the birth date does not."""
    ds = image()
    ds.PatientBirthDate, ds.AcquisitionDateTime = "19500101", "20040119072730.5"
    out = through(ds, cleaner("retain-full-dates"), tmp_path)
    assert (out.StudyDate, out.AcquisitionDateTime) == ("20040119", "20040119072730.5")
    assert (out.LongitudinalTemporalInformationModified, out.PatientBirthDate) == ("UNMODIFIED", "")
    ds.StudyDate, ds.StudyTime = "last week!", "noon, Mina"
    out = cleaner("retain-full-dates").clean(ds, site="A")
    assert not out.get("StudyDate") and not out.get("StudyTime")


@pytest.mark.parametrize(
    ("before", "options", "after"),
    [("MODIFIED", ["113106"], "MODIFIED"), ("REMOVED", ["113107"], "REMOVED"), ("UNMODIFIED", ["113107"], "MODIFIED")],
)
def test_what_was_done_to_dates_before_is_not_denied(before: str, options: list[str], after: str) -> None:
    """Dates that another project moved do not become true by being kept."""
    ds = image()
    ds.LongitudinalTemporalInformationModified = before
    assert cleaner(*options).clean(ds, site="A").LongitudinalTemporalInformationModified == after


def test_uids_stay(tmp_path: Path) -> None:
    """For those who must join the output to what they have; the patient is still a pseudonym."""
    ds = image()
    out = through(ds, cleaner("retain-uids"), tmp_path)
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert out[keyword].value == ds[keyword].value
    assert out.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert out.PatientID == NAMES.patient("HG-448812", "A")
    assert listed(out) == ["113100", "113110"]


def test_device_and_institution(tmp_path: Path) -> None:
    """Each of the two without the other: a multi-site study may name its scanners and not its hospitals."""
    ds = image()
    ds.StationName, ds.DeviceSerialNumber, ds.StationAETitle = "CTROOM9", "SN-4711", "KLINIKUM_CT1"
    ds.InstitutionName, ds.InstitutionAddress = "Klinikum Nordstadt", "Hafenweg 3"
    ds.InstitutionCodeSequence = Sequence([Dataset()])
    ds.InstitutionCodeSequence[0].CodeValue = "KN1"
    ds.InstitutionCodeSequence[0].CodingSchemeDesignator = "99LOCAL"
    ds.InstitutionCodeSequence[0].CodeMeaning = "Klinikum Nordstadt"
    device = cleaner("113109").clean(ds, site="A")
    assert (device.StationName, device.DeviceSerialNumber) == ("CTROOM9", "SN-4711")
    assert device.StationAETitle == "CT1" if "StationAETitle" in device else True
    assert not {"InstitutionName", "InstitutionAddress"} & {e.keyword for e in device}
    assert "Nordstadt" not in str(device)
    place = cleaner("113112").clean(ds, site="A")
    assert (place.InstitutionName, place.InstitutionAddress) == ("Klinikum Nordstadt", "Hafenweg 3")
    assert place.InstitutionCodeSequence[0].CodeMeaning == "Klinikum Nordstadt"
    assert "StationName" not in place
    out = through(ds, cleaner("113109", "113112", profile="research"), tmp_path)
    assert listed(out) == ["113100", "113107", "113108", "113109", "113112"]


def test_characteristics_in_words_are_cleaned() -> None:
    """Ethnic group and allergies are free text: the words that say them stay, a sentence about the patient does not."""
    ds = image()
    ds.EthnicGroup, ds.Allergies, ds.SpecialNeeds = "African American", "Penicillin, says her son Ole", "Ole drives her"
    out = cleaner(profile="research").clean(ds, site="A")
    assert (out.EthnicGroup, out.Allergies) == ("African American", "Penicillin")
    assert "SpecialNeeds" not in out


# ---- private elements


def private(syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """Safe and other elements of four creators, at the top and in an item, in blocks of their own."""
    ds = image()
    ds.file_meta.TransferSyntaxUID = syntax
    block = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0C, "IS", "1000")
    block.add_new(0x0E, "FD", [0.6, 0.8, 0.0])
    block.add_new(0x08, "CS", "HAND MINA")
    other = ds.private_block(0x0019, "ACME 1", create=True)
    other.add_new(0x0C, "LO", "Mina Hand")
    stack = ds.private_block(0x2001, "Philips Imaging DD 001", create=True)
    item = Dataset()
    item.PatientName = "Hand^Mina"
    inner = item.private_block(0x2001, "Philips Imaging DD 001", create=True)
    inner.add_new(0x2D, "SS", 36)
    inner.add_new(0xC8, "LO", "Mina Hand")
    stack.add_new(0x5F, "SQ", [item])
    stack.add_new(0xFF, "OW", b"Mina Hand ")
    return ds


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_safe_private_elements_stay_with_their_creator(syntax: str, tmp_path: Path) -> None:
    """b values of diffusion MR stand in private elements only; an element without its creator means nothing."""
    ds = private(syntax)
    out = through(ds, cleaner("retain-safe-private", profile="research"), tmp_path)
    assert [(e.tag.group, e.tag.element) for e in out if e.tag.is_private] == [
        (0x0019, 0x0010), (0x0019, 0x100C), (0x0019, 0x100E), (0x2001, 0x0010), (0x2001, 0x105F),
    ]  # fmt: skip
    assert out.private_block(0x0019, "SIEMENS MR HEADER")[0x0C].value == 1000
    assert list(out.private_block(0x0019, "SIEMENS MR HEADER")[0x0E].value) == [0.6, 0.8, 0.0]
    item = out.private_block(0x2001, "Philips Imaging DD 001")[0x5F].value[0]
    assert item.private_block(0x2001, "Philips Imaging DD 001")[0x2D].value == 36
    assert "Mina" not in str(out)
    assert "113111" in listed(out)
    assert not [e for e in cleaner(profile="research").clean(ds, site="A") if e.tag.is_private]


def test_a_block_keeps_its_number() -> None:
    """Other elements name a private block by its number."""
    ds = image()
    for number in range(3):
        ds.private_block(0x0019, f"ACME {number}", create=True).add_new(1, "LO", "x")
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "1000")
    out = cleaner("113111").clean(ds, site="A")
    assert [(e.tag.group, e.tag.element) for e in out if e.tag.is_private] == [(0x0019, 0x0013), (0x0019, 0x130C)]


def test_a_name_in_a_safe_private_element_is_stopped(tmp_path: Path) -> None:
    """The list says that makers put no identity there; the gate looks all the same."""
    ds = image()
    ds.PatientName = "Harrowgate^Mina"
    ds.private_block(0x0019, "GEMS_ACQU_01", create=True).add_new(0x9E, "LO", "Harrowgate Mina")
    with pytest.raises(PhiError):
        through(ds, cleaner("113111"), tmp_path)


@pytest.mark.parametrize(("vr", "value"), [("LO", "1000"), ("OB", b"1000"), ("UN", b"Mina"), ("IS", "Mina Hand")])
def test_an_element_in_another_vr_than_the_lists_goes(vr: str, value: object) -> None:
    """A creator that means something else by this element, or text where a number should be."""
    ds = image()
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, vr, b"" if vr == "IS" else value)
    if vr == "IS":
        ds[0x0019, 0x100C]._value = value  # as a careless sender writes it
    out = cleaner("113111").clean(ds, site="A")
    assert not [e for e in out if e.tag.is_private]


# ---- pixels


def test_the_option_for_pixels_cannot_be_chosen_and_not_done() -> None:
    """113101 in the settings and nobody looking at pixels: who chose it would believe that somebody does."""
    with pytest.raises(SettingsError, match="clean-pixel-data"):
        Deidentifier(NAMES, profile=chosen("basic", ["113101"]), pixels=Pixels("off"))


# ---- faces


def test_heads_are_refused_where_faces_must_not_show() -> None:
    """A head CT renders into a face. Without the option it passes, as documented; with it, nothing passes by chance."""
    faces = cleaner("clean-visual-features")
    ds = image()
    assert "113102" in listed(faces.clean(ds, site="A"))
    for part in ("HEAD", "BRAIN", "Skull", "HEADNECK", ""):
        ds.BodyPartExamined = part
        with pytest.raises(DicomError) as caught:
            faces.clean(ds, site="A")
        assert caught.value.reason == Reason.RECOGNIZABLE_FACE
        cleaner().clean(ds, site="A")
    ds.Modality, ds.BodyPartExamined = "DX", "SKULL"
    faces.clean(ds, site="A")


# ---- everything at once

_TAGS = sorted(tag for tag, entry in DicomDictionary.items() if entry[0] in TEXT_VRS and entry[4] and tag >> 16 > 8)
_SEQUENCES = sorted(tag for tag, entry in DicomDictionary.items() if entry[0] == "SQ" and entry[4])
_KEEPS = {"LO", "SH", "ST", "LT", "UT", "UC", "PN", "AE", "UR"}
RETAIN = [
    name for name in OPTIONS if name not in ("retain-modified-dates", "clean-visual-features", "clean-pixel-data")
]


@st.composite
def nested(draw: st.DrawFn, depth: int = 0) -> Dataset:
    """A data set of random text attributes, each with a secret word, and sequences of the same."""
    ds = Dataset()
    for tag in draw(st.lists(st.sampled_from(_TAGS), min_size=1, max_size=5)):
        vr = DicomDictionary[tag][0]
        if vr in _KEEPS:
            secret = "zq" + draw(st.text("bcdfgjkpvwx", min_size=6, max_size=9))
            ds[tag] = DataElement(tag, vr, secret.upper() if vr == "AE" else secret)
    for tag in draw(st.lists(st.sampled_from(_SEQUENCES), max_size=3)) if depth < 4 else ():
        ds[tag] = DataElement(tag, "SQ", Sequence([draw(nested(depth + 1)) for _ in range(draw(st.integers(0, 2)))]))
    return ds


def secrets(ds: Dataset, kept: frozenset[str], *, standing: bool) -> set[str]:
    """The secret words of attributes that some rule keeps (`standing`), or of all others."""
    found: set[str] = set()
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                found |= secrets(item, kept, standing=standing)
        elif element.VR in _KEEPS and (element.keyword in kept) is standing and "zq" in str(element.value).lower():
            found.add(str(element.value))
    return found


@pytest.mark.parametrize("options", [[], ["113105", "113104", "113103"], RETAIN], ids=["basic", "cleaned", "retain"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(nested())
@pytest.mark.filterwarnings("ignore")
def test_no_text_gets_through_nested_items(options: list[str], ds: Dataset) -> None:
    """Whatever attribute, however deep: text that no rule keeps is not in the output's bytes."""
    base = image()
    base.update(ds)
    for keyword in ("PatientID", "SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
        base[keyword] = image()[keyword]
    which = cleaner(*options)
    kept = (
        KEPT_TEXT
        | CODE_TEXT
        | frozenset(
            keyword
            for keyword in (element[4] for element in DicomDictionary.values())
            if keyword in which.kept_keywords and "113109" in {code for code, _ in which.profile.codes}
        )
    )
    buffer = io.BytesIO()
    out = which.clean(base, site="A")
    dcmwrite(buffer, out, enforce_file_format=True)
    data = buffer.getvalue()
    gone = secrets(base, kept, standing=False) - secrets(base, kept, standing=True)
    assert [secret for secret in gone if secret.encode() in data] == []
    again = Deidentifier(Pseudonymiser(b"another key, 32 bytes or longer!"), profile=which.profile)
    assert list(again.clean(read(data), site="A").keys()) == list(read(data).keys())


# ---- in a project


def test_the_loop_refuses_what_its_archive_cannot_hold() -> None:
    """Archive and catalog are keyed by pseudonymous UIDs: with original ones a re-sent image would overwrite another's."""
    assert loop_profile("research", ["113105"]).options[0] == "clean-descriptors"
    with pytest.raises(SettingsError, match="cannot keep original UIDs"):
        loop_profile("basic", ["retain-uids"])
    with pytest.raises(SettingsError, match="unknown de-identification option"):
        check(Settings(deidentify=Deidentify(options=("clean-everything",))))

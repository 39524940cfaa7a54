"""De-identification by attribute, through every nested sequence, of synthetic and of real instances."""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file, get_testdata_files
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from radloop.catalog.reason import Reason
from radloop.dicom.deidentify import TRANSFER_SYNTAXES, Deidentifier, read
from radloop.dicom.phi import find_leaks
from radloop.dicom.profile import chosen, storage_classes
from radloop.dicom.uids import Pseudonymiser, is_placeholder
from radloop.errors import DicomError, PhiError, RadloopError
from radloop.testing.phi import SCRIPTS, Identity, identity, plant

KEY = b"0123456789abcdef0123456789abcdef"
NAMES = Pseudonymiser(KEY)
RESEARCH = Deidentifier(NAMES)
BASIC = Deidentifier(NAMES, profile="basic")
BOTH = pytest.mark.parametrize("cleaner", [RESEARCH, BASIC], ids=["research", "basic"])


def image(seed: int = 3, *, planted: bool = True) -> tuple[Dataset, Identity]:
    """A CT image with an identity wherever hospitals leave one."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    who = identity(seed)
    if planted:
        plant(ds, who, random.Random(seed))
    return ds, who


def data_of(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def elements(ds: Dataset) -> Iterator[pydicom.DataElement]:
    for element in ds:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item)


def refused(ds: Dataset, reason: Reason, match: str, cleaner: Deidentifier = RESEARCH) -> None:
    with pytest.raises(DicomError, match=match) as caught:
        cleaner.clean(ds, site="A")
    assert caught.value.reason == reason


# ---- nothing identifying is left


def test_the_identities_cover_every_script() -> None:
    """A test that draws only ASCII names would prove nothing about the others."""
    assert {identity(seed).charsets for seed in range(40)} == {script.charsets for script in SCRIPTS.values()}


@BOTH
@pytest.mark.parametrize("seed", range(40))
def test_no_secret_is_in_the_bytes(cleaner: Deidentifier, seed: int, tmp_path: Path) -> None:
    """The plainest reading: not one identifying string stands in the file, in any encoding a hospital writes."""
    ds, who = image(seed)
    source, target = tmp_path / "in.dcm", tmp_path / "out.dcm"
    source.write_bytes(data_of(ds))
    cleaner.clean_file(source, target, site="A")
    header = target.read_bytes().replace(bytes(ds.PixelData), b"").lower()
    original = source.read_bytes().lower()
    found_before = 0
    for secret in who.secrets:
        codecs = ("utf-8", "latin-1", "euc_kr", "gb18030", "iso8859_5", "iso8859_7", "iso2022_jp")
        spellings = {secret.encode(codec, "ignore").lower() for codec in codecs}
        for raw in (s for s in spellings if len(s) > 3):
            found_before += raw in original
            assert raw not in header, secret
    assert found_before > 5


@BOTH
def test_private_curves_overlays_icons_and_history_are_gone(cleaner: Deidentifier) -> None:
    """Each of these carries names or pictures of text, and no viewer misses them."""
    ds, _ = image()
    ds.add_new(0x60003000, "OW", b"\1\1")
    ds.add_new(0x60000010, "US", 4)
    ds.add_new(0x60000102, "US", 0)
    ds.add_new(0x50003000, "OW", b"\1\1")
    icon = Dataset()
    icon.Rows = icon.Columns = 2
    icon.PixelData = b"\0\0\0\0"
    ds.IconImageSequence = Sequence([icon])
    out = cleaner.clean(ds, site="A")
    for element in elements(out):
        assert not element.tag.is_private
        assert element.tag.group & 0xFF00 not in (0x5000, 0x6000)
        assert element.tag.element != 0
        assert element.keyword not in ("IconImageSequence", "OriginalAttributesSequence", "ModifiedAttributesSequence")
    assert (0xFFFC, 0xFFFC) not in out


def test_unknown_and_free_text_attributes_are_gone() -> None:
    """What Table E.1-1 does not name is the implementation's duty; text is where names hide."""
    ds, _ = image(planted=False)
    ds.add_new(0x00181F01, "LO", "no dictionary knows this")
    ds.add_new(0x00189998, "UN", b"nor this")
    ds.WindowCenterWidthExplanation = "as Dr Who likes it"
    ds.ContentQualification = "Anna Müller"  # a code string that is none
    ds.add_new("KVP", "DS", "120")
    ds["KVP"]._value = "kv of Anna"
    out = read(data_of(RESEARCH.clean(ds, site="A")))
    for absent in (0x00181F01, 0x00189998, "WindowCenterWidthExplanation", "ContentQualification", "KVP"):
        assert absent not in out
    assert out.Manufacturer == "GE MEDICAL SYSTEMS"
    assert out.ManufacturerModelName == "RHAPSODE"
    assert out.ConvolutionKernel == "STANDARD"
    assert out.SliceThickness == 5


def test_local_codes_are_replaced_and_public_ones_kept() -> None:
    """A hospital's own code and its meaning are free text; SNOMED's are what a model may be grouped by."""
    ds, _ = image(planted=False)

    def code(value: str, scheme: str, meaning: str) -> Dataset:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
        return item

    ds.ProcedureCodeSequence = Sequence([code("DRWHO1", "99LOCAL", "Thorax for Dr Who")])
    ds.AnatomicRegionSequence = Sequence([code("51185008", "SCT", "Thorax")])
    ds.ViewCodeSequence = Sequence([code("for Dr Who, room 7!\\?", "SCT", "Thorax")])
    out = RESEARCH.clean(ds, site="A")
    assert out.AnatomicRegionSequence[0].CodeMeaning == "Thorax"
    assert out.AnatomicRegionSequence[0].CodeValue == "51185008"
    for sequence in (out.ProcedureCodeSequence, out.ViewCodeSequence):
        assert [e.value for e in sequence[0]] == ["REMOVED", "99RADLOOP", "REMOVED"]


def test_at_any_depth() -> None:
    """Nesting has no limit in DICOM; a cleaner that stops at three levels leaks at four."""
    ds, who = image()
    item = Dataset()
    item.PatientName, item.TextValue, item.StudyDate = who.patient_name, who.comment, "20040119"
    item.ReferencedSOPInstanceUID = "1.2.3"
    for _ in range(20):
        outer = Dataset()
        outer.ContentItemModifierSequence = Sequence([item])
        item = outer
    ds.SharedFunctionalGroupsSequence = Sequence([item])
    out = read(data_of(RESEARCH.clean(ds, site="A")))
    (inner,) = out.SharedFunctionalGroupsSequence
    for _ in range(20):
        (inner,) = inner.ContentItemModifierSequence
    assert inner.PatientName == ""
    assert inner.TextValue == "REMOVED"  # Type 1C there
    assert inner.ReferencedSOPInstanceUID == NAMES.uid("1.2.3")
    assert inner.StudyDate == out.StudyDate
    for _ in range(80):
        outer = Dataset()
        outer.ContentItemModifierSequence = Sequence([item])
        item = outer
    ds.SharedFunctionalGroupsSequence = Sequence([item])
    refused(ds, Reason.UNSUPPORTED_OBJECT, "nested too deep")


# ---- what stays, and what is written


@BOTH
def test_identity_and_uids_are_the_pseudonymisers(cleaner: Deidentifier) -> None:
    """Labels, splits and withdrawal find an instance by exactly these pseudonyms."""
    ds, who = image(5)
    ds.ReferencedImageSequence = Sequence([Dataset()])
    reference = ds.ReferencedImageSequence[0]
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = ds.SOPClassUID, "1.2.3.4"
    ds.FrameOfReferenceUID = "1.2.840.10008.1.4.1.1"  # Talairach: well known
    out = cleaner.clean(ds, site="A")
    patient = NAMES.patient(who.patient_id, who.issuer or "A")
    assert (out.PatientID, out.PatientName) == (patient, patient)
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        assert out[keyword].value == NAMES.uid(ds[keyword].value)
    assert out.SOPClassUID == ds.SOPClassUID
    assert out.FrameOfReferenceUID == ds.FrameOfReferenceUID
    assert "IssuerOfPatientID" not in out
    assert out.PatientBirthDate == ""


def test_site_stands_for_the_issuer_and_for_nothing_else() -> None:
    """Patient 1 of two sites are two people; the site's code itself lives in the catalog."""
    ds, _ = image(planted=False)
    ds.PatientID = "1"
    ds.pop("IssuerOfPatientID", None)
    first, second = (RESEARCH.clean(ds, site=site) for site in ("NORTHSITE", "SOUTHSITE"))
    assert first.PatientID != second.PatientID
    assert b"NORTHSITE" not in data_of(first)
    ds.IssuerOfPatientID = "MPI"
    assert RESEARCH.clean(ds, site="NORTHSITE").PatientID == RESEARCH.clean(ds, site="SOUTHSITE").PatientID


def test_research_shifts_dates_together_and_keeps_times() -> None:
    """Intervals between studies are what longitudinal research needs; a second shift would give the first away."""
    ds, _ = image()
    ds.StudyDate, ds.SeriesDate, ds.StudyTime = "20040301", "20040302", "072730.5"
    ds.AcquisitionDateTime, ds.ContentDate = "20040302112936.25+0100", "2004.03.01"
    ds.TimezoneOffsetFromUTC = "+0100"
    out = RESEARCH.clean(ds, site="A")
    moved = NAMES.day_shift(out.PatientID)
    day = np.datetime64("2004-03-01") + moved
    assert out.StudyDate == str(day).replace("-", "")
    assert out.ContentDate == out.StudyDate
    assert out.SeriesDate == str(day + 1).replace("-", "")
    assert out.AcquisitionDateTime == out.SeriesDate + "112936.25+0100"
    assert (out.StudyTime, out.TimezoneOffsetFromUTC) == ("072730.5", "+0100")
    assert out.LongitudinalTemporalInformationModified == "MODIFIED"


@pytest.mark.parametrize("bad", ["00000000", "99999999", "20041341", "yesterday", "20040101-20040102"])
def test_a_date_that_is_none_is_emptied(bad: str) -> None:
    """What cannot be shifted must not stand as it is."""
    ds, _ = image(planted=False)
    ds.SeriesDate = bad
    assert not RESEARCH.clean(ds, site="A").SeriesDate


def test_basic_leaves_no_date_sex_age_or_time() -> None:
    """`basic` promises Table E.1-1 without options."""
    out = BASIC.clean(image()[0], site="A")
    left = {e.keyword for e in elements(out) if e.VR in ("DA", "DT", "TM", "AS") and e.value}
    assert left == set()
    assert not out.PatientSex
    assert "PatientWeight" not in out
    assert out.LongitudinalTemporalInformationModified == "REMOVED"


@pytest.mark.parametrize(
    ("age", "birth", "expected"),
    [
        ("057Y", "19500101", "057Y"), ("089Y", "", "089Y"), ("090Y", "", "090Y"), ("097Y", "", "090Y"),
        ("999M", "", "999M"), ("", "19470120", "056Y"), ("", "19470119", "057Y"), ("", "19100101", "090Y"),
        ("", "20030601", "007M"), ("", "20040110", "009D"), ("57 years", "19500119", "054Y"),
        ("", "", None), ("", "20050101", None), ("", "17000101", None), ("", "1950", None),
    ],
)  # fmt: skip
def test_age(age: str, birth: str, expected: str | None) -> None:
    """Over 89 identifies (45 CFR 164.514); the birth date goes, so an age that is not written is derived first."""
    ds, _ = image(planted=False)
    ds.StudyDate, ds.PatientAge, ds.PatientBirthDate = "20040119", age, birth
    assert (RESEARCH.clean(ds, site="A").get("PatientAge") or None) == expected


@BOTH
def test_it_says_what_was_done(cleaner: Deidentifier) -> None:
    """Who receives the file must know which profile was applied, and what was applied before."""
    ds, _ = image()
    earlier = Dataset()
    earlier.CodeValue, earlier.CodingSchemeDesignator, earlier.CodeMeaning = "113105", "DCM", "Clean Descriptors Option"
    ds.DeidentificationMethodCodeSequence = Sequence([earlier])
    ds.DeidentificationMethod = "by hand, Dr Who"
    out = cleaner.clean(ds, site="A")
    codes = [str(item.CodeValue) for item in out.DeidentificationMethodCodeSequence]
    options = ["113107", "113108"] if cleaner is RESEARCH else []
    assert codes == ["113105", "113100", *options]
    assert out.PatientIdentityRemoved == "YES"
    assert list(out.DeidentificationMethod) == [f"radloop {cleaner.profile.name}", f"key {NAMES.key_id}"]


def test_group_2_preamble_and_character_set_are_written_anew() -> None:
    """AE titles stand in group 2, anything in the preamble; a wrong character set garbles what is kept."""
    ds, _ = image(planted=False)
    ds.preamble = b"Anna Mueller".ljust(128, b"\0")
    ds.file_meta.SourceApplicationEntityTitle = "DRWHO"
    ds.file_meta.add_new(0x00020102, "OB", b"private")
    ds.SpecificCharacterSet, ds.Manufacturer = "ISO_IR 144", "Рентген"
    out = read(data_of(RESEARCH.clean(read(data_of(ds)), site="A")))
    assert out.preamble == b"\0" * 128
    assert {e.keyword for e in out.file_meta} == {
        "FileMetaInformationGroupLength", "FileMetaInformationVersion", "MediaStorageSOPClassUID",
        "MediaStorageSOPInstanceUID", "TransferSyntaxUID", "ImplementationClassUID", "ImplementationVersionName",
    }  # fmt: skip
    assert out.file_meta.ImplementationClassUID.startswith("2.25.")
    assert out.file_meta.MediaStorageSOPInstanceUID == out.SOPInstanceUID
    assert (out.SpecificCharacterSet, out.Manufacturer) == ("ISO_IR 192", "Рентген")
    ds.Manufacturer = "Roentgen"
    assert "SpecificCharacterSet" not in RESEARCH.clean(ds, site="A")


def test_types_demanded_by_the_iod_stay() -> None:
    """An enhanced image without AcquisitionDateTime or serial number is refused by viewers and PACS."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    ds.AcquisitionDateTime, ds.DeviceSerialNumber, ds.ContrastBolusAgent = "20040119072730", "SN1", "ISOVUE"
    out = BASIC.clean(ds, site="A")
    assert (out.AcquisitionDateTime, out.DeviceSerialNumber) == ("19000101000000", "REMOVED")
    plain = BASIC.clean(image(planted=False)[0], site="A")
    assert "DeviceSerialNumber" not in plain
    assert plain.ContrastBolusAgent in ("", None)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_transfer_syntaxes_read_back_the_same(syntax: UID, tmp_path: Path) -> None:
    """Numbers kept as raw bytes must keep their byte order, in items too."""
    ds, _ = image()
    pixels = ds.pixel_array
    shared = Dataset()
    shared.PixelSpacing, shared.Rows = [0.5, 0.25], 513
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    source, target = tmp_path / "in.dcm", tmp_path / "out.dcm"
    list(elements(ds))  # decode all, so that they are written in the new byte order
    ds.remove_private_tags()
    ds.file_meta.TransferSyntaxUID = syntax
    if not syntax.is_little_endian:
        ds.PixelData = pixels.byteswap().tobytes()
    source.write_bytes(data_of(ds))
    RESEARCH.clean_file(source, target, site="A")
    out = pydicom.dcmread(target)
    assert out.file_meta.TransferSyntaxUID == syntax
    assert (out.Rows, out.BitsStored, out.PixelRepresentation) == (128, 16, 1)
    assert out.SharedFunctionalGroupsSequence[0].Rows == 513
    assert out.SharedFunctionalGroupsSequence[0].PixelSpacing == [0.5, 0.25]
    np.testing.assert_array_equal(out.pixel_array, pixels)


def test_a_data_set_built_in_memory() -> None:
    """The predictor and the importer hand over data sets that were never a file."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.1", "1.2.2", "1.2.3"
    ds.PatientID, ds.PatientName, ds.Modality = "7", "Harrowgate^M", "OT"
    ds.Rows = ds.Columns = 2
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 16, 16, 15, 0
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.SmallestImagePixelValue = 3  # US or SS: resolved by PixelRepresentation when written
    ds.PixelData = b"\1\2\3\4\5\6\7\10"
    out = read(data_of(RESEARCH.clean(ds, site="A")))
    assert (out.SmallestImagePixelValue, out.PixelData) == (3, ds.PixelData)


def test_the_input_is_not_changed() -> None:
    """The landing zone's copy is what corrections, results and withdrawal rest on."""
    ds = read(data_of(image()[0]))
    before = data_of(ds)
    RESEARCH.clean(ds, site="A")
    assert data_of(ds) == before


# ---- what is refused


def test_refusals() -> None:
    """What cannot be made safe must not be passed on as if it were."""
    ds, _ = image()
    ds.BurnedInAnnotation = "YES"
    refused(ds, Reason.BURNED_IN_DECLARED, "BurnedInAnnotation")
    ds, _ = image()
    ds.ImageType = ["DERIVED", "PRIMARY", "LABEL", "NONE"]
    refused(ds, Reason.BURNED_IN_DECLARED, "label")
    for sop_class, match in (
        ("1.2.840.10008.5.1.4.1.1.104.1", "does not de-identify such objects"),  # encapsulated PDF
        ("1.2.840.10008.5.1.4.1.1.66", "does not de-identify such objects"),  # raw data
        ("1.2.840.10008.5.1.4.1.1.77.1.4.1", "does not de-identify such objects"),  # video
        ("1.2.840.10008.5.1.4.1.1.9.4.1", "a voice"),
        ("1.2.840.10008.5.1.4.1.1.88.11", "without its content"),
        ("1.2.840.113619.4.26", "does not de-identify such objects"),
        ("1.2.3", "does not de-identify such objects"),
    ):
        ds, _ = image()
        ds.SOPClassUID = sop_class
        refused(ds, Reason.UNSUPPORTED_OBJECT, match)
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID"):
        ds, _ = image()
        ds[keyword].value = ""
        refused(ds, Reason.MISSING_UID, keyword)
    ds, _ = image()
    ds.PatientID = "Unknown"
    refused(ds, Reason.NO_PATIENT_ID, "cannot be told")
    for syntax in ("1.2.840.113619.5.2", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.94"):
        ds, _ = image()
        ds.file_meta.TransferSyntaxUID = syntax
        refused(ds, Reason.UNKNOWN_TRANSFER_SYNTAX, "transfer syntax")


def test_an_overlay_hidden_in_the_pixels_is_refused() -> None:
    """Old scanners draw the patient's name into the unused high bits: removing group 60xx does not remove it."""
    ds, _ = image()
    ds.add_new(0x60020100, "US", 16)
    ds.add_new(0x60020102, "US", 12)
    refused(ds, Reason.UNSUPPORTED_OBJECT, "overlay hides")


@BOTH
def test_own_output_is_refused_and_anothers_is_cleaned_again(cleaner: Deidentifier) -> None:
    """Sent back in, an archived instance would become a second patient; one from another project is only data."""
    out = read(data_of(cleaner.clean(image()[0], site="A")))
    refused(out, Reason.UNSUPPORTED_OBJECT, "already de-identified", cleaner)
    other = Deidentifier(Pseudonymiser(b"another key, 32 bytes or longer!"), profile=cleaner.profile.name)
    twice = other.clean(out, site="A")
    assert twice.PatientID != out.PatientID
    assert [str(i.CodeValue) for i in twice.DeidentificationMethodCodeSequence][:2] != []


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["research", "basic"]))
def test_cleaning_again_under_another_key_changes_identifiers_only(seed: int, profile: str) -> None:
    """Idempotent: what one cleaning kept, a second keeps; only pseudonyms and shifted dates move on."""
    first = Deidentifier(NAMES, profile=profile).clean(image(seed)[0], site="A")
    second = Deidentifier(Pseudonymiser(b"another key, 32 bytes or longer!"), profile=profile).clean(first, site="A")
    ignored = {"PatientID", "PatientName", "DeidentificationMethod", "DeidentificationMethodCodeSequence"}
    assert list(first.keys()) == list(second.keys())
    for tag in first.keys():  # noqa: SIM118 - a Dataset iterates over elements
        if first[tag].VR not in ("UI", "DA", "DT", "SQ") and first[tag].keyword not in ignored:
            assert first[tag].value == second[tag].value, first[tag].keyword


# ---- files


def test_clean_file_says_what_it_wrote_and_repeats_itself(tmp_path: Path) -> None:
    """A killed run is run again: the same bytes, or digests and caches would never agree."""
    ds, _ = image()
    source, target = tmp_path / "in.dcm", tmp_path / "study" / "series" / "out.dcm"
    source.write_bytes(data_of(ds))
    first = RESEARCH.clean_file(source, target, site="A")
    data = target.read_bytes()
    assert RESEARCH.clean_file(source, target, site="A") == first
    assert target.read_bytes() == data
    assert first.file_sha256 == hashlib.sha256(data).hexdigest()
    assert first.file_bytes == len(data)
    assert first.sop_uid == NAMES.uid(ds.SOPInstanceUID)
    assert first.patient.startswith("P")
    assert (first.tags["rows"], first.tags["manufacturer"]) == (128, "GE MEDICAL SYSTEMS")
    assert [p.name for p in target.parent.iterdir()] == ["out.dcm"]
    assert pydicom.dcmread(target).PixelData == ds.PixelData


def test_a_leak_stops_the_file_and_the_message_holds_no_value(tmp_path: Path) -> None:
    """The cleaner keeps Manufacturer; a name typed there is the gate's to find, before a byte reaches the archive."""
    ds, who = image(11)
    ds.Manufacturer = f"{who.spoken_name} owns this"
    source, target = tmp_path / "in.dcm", tmp_path / "archive" / "out.dcm"
    source.write_bytes(data_of(ds))
    with pytest.raises(PhiError, match="Manufacturer") as caught:
        RESEARCH.clean_file(source, target, site="A")
    assert caught.value.reason == Reason.PHI_FOUND
    assert not [secret for secret in who.secrets if secret in str(caught.value)]
    assert not target.parent.exists()


def test_a_disk_error_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A partial file under its final name would be taken for whole."""
    source, target = tmp_path / "in.dcm", tmp_path / "out.dcm"
    source.write_bytes(data_of(image()[0]))
    target.mkdir()  # a rename onto a folder fails after the temporary file was written
    with pytest.raises(OSError):
        RESEARCH.clean_file(source, target, site="A")
    assert {p.name for p in tmp_path.iterdir()} == {"in.dcm", "out.dcm"}


def test_what_is_no_dicom() -> None:
    """A folder of real files holds thumbs.db and half copies."""
    for data, reason in ((b"", Reason.NOT_DICOM), (b"GIF89a" * 99, Reason.NOT_DICOM)):
        with pytest.raises(DicomError) as caught:
            read(data)
        assert caught.value.reason == reason


@settings(max_examples=120)
@given(st.integers(0, 2**32))
@example(168)  # a date whose VR is no VR
@example(188)  # a sequence that pydicom reads as text
@pytest.mark.filterwarnings("ignore")  # pydicom grumbles about each kind of garbage in its own way
def test_garbage_is_cleaned_or_refused_but_never_crashes(seed: int) -> None:
    """One broken file must not stop the night's batch, nor slip an unread attribute through."""
    draw = random.Random(seed)
    ds, who = image(seed % 50)
    data = bytearray(data_of(ds))
    for _ in range(draw.randrange(1, 30)):
        data[draw.randrange(132, len(data) - 32768)] = draw.randrange(256)
    try:
        original = read(bytes(data))
        out = RESEARCH.clean(original, site="A")
        assert who.patient_name.split("^")[0] not in str(out.get("PatientName"))
        find_leaks(original, out, file_name="x", kept_keywords=RESEARCH.kept_keywords)
    except RadloopError as error:
        assert not [secret for secret in who.secrets if secret in str(error)]


# ---- every real file at hand


EVERYTHING = Deidentifier(NAMES, profile=chosen("research", ["113103", "113104", "113105"]))


def outcomes_of(file: Path, target: Path) -> dict[str, str]:
    """What each profile makes of a file: `cleaned`, with an empty leak list, or the reason it is refused."""
    outcomes: dict[str, str] = {}
    for name, cleaner in (("research", RESEARCH), ("basic", BASIC), ("cleaning", EVERYTHING)):
        try:
            cleaner.clean_file(file, target, site="A")
            outcomes[name] = "cleaned"
        except DicomError as error:
            outcomes[name] = str(Reason(error.reason))
    return outcomes


def allowed(file: Path) -> set[str]:
    """What may become of a file by what an ordinary reader says of it; the gate's refusal is always in its right."""
    try:
        ds = pydicom.dcmread(file)
        patient, ids = str(ds.get("PatientID") or ""), [ds.get(k) for k in ("SOPClassUID", "StudyInstanceUID")]
        declared = str(ds.get("BurnedInAnnotation") or "NO")
    except Exception:
        return {"NOT_DICOM", "TRUNCATED"}
    if not all(ids):
        return {"MISSING_UID", "UNKNOWN_TRANSFER_SYNTAX"}
    if str(ds.file_meta.get("TransferSyntaxUID")) not in TRANSFER_SYNTAXES:
        return {"UNKNOWN_TRANSFER_SYNTAX"}
    kind = storage_classes().get(str(ds.SOPClassUID), ("", ""))[1]
    if not kind or declared.upper() != "NO":
        return {"UNSUPPORTED_OBJECT", "BURNED_IN_DECLARED"}
    if is_placeholder(patient):
        return {"NO_PATIENT_ID"} | ({"UNSUPPORTED_OBJECT"} if kind == "structured" else set())
    if kind == "structured":
        return {"cleaned", "UNSUPPORTED_OBJECT", "PHI_FOUND"}
    return {"cleaned", "PHI_FOUND"} | ({"TRUNCATED"} if "truncated" in file.name else set())


def check_all(files: list[Path], target: Path) -> Counter[str]:
    counted: Counter[str] = Counter()
    for file in files:
        outcomes = outcomes_of(file, target)
        assert set(outcomes.values()) <= allowed(file), (file.name, outcomes)
        assert outcomes["cleaning"] != "UNSUPPORTED_OBJECT" or "UNSUPPORTED_OBJECT" in allowed(file)
        counted.update(outcomes.values())
    return counted


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # what pydicom finds odd in odd files
def test_pydicoms_own_files(tmp_path: Path) -> None:
    """Two hundred odd files of odd vendors: none may crash the cleaner, most must come through."""
    files = [Path(f) for f in sorted(get_testdata_files("*.dcm"))]
    counted = check_all(files, tmp_path / "out.dcm")
    assert counted["cleaned"] > 1.8 * len(files)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_real_files(test_data: Path, tmp_path: Path) -> None:
    """CT, MR, enhanced, segmentations, slides, reports of many makers: as EXPECTED_DICOM.csv says, or better."""
    with (test_data / "EXPECTED_DICOM.csv").open(encoding="utf-8", newline="") as file:
        rows = {f"{row['name']}/{row['file']}": row for row in csv.DictReader(file)}
    files = [
        f for f in sorted(test_data.rglob("*")) if f.suffix == ".dcm" or f.relative_to(test_data).as_posix() in rows
    ]
    counted = check_all(files, tmp_path / "out.dcm")
    assert sum(counted.values()) == 3 * len(files)
    assert counted["cleaned"] > 1.4 * len(files)
    readable = sum(row["dicm"] == "1" and row["read"] == "ok" for row in rows.values())
    assert len(files) >= readable > 250
    assert counted["NOT_DICOM"] <= 3 * (len(files) - readable)

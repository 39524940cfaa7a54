"""The PHI gate against what must be found and what must not."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.phi import codestream_texts, find_leaks, fold
from radloop.dicom.uids import Pseudonymiser
from radloop.testing.phi import Identity, identity, plant

CLEANER = Deidentifier(Pseudonymiser(b"0123456789abcdef0123456789abcdef"))
KEPT = CLEANER.kept_keywords
TEXT = ("LO", "LT", "SH", "ST", "UC", "UT", "PN", "AE", "UR")


def patient(seed: int = 3) -> tuple[Dataset, Identity]:
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    ds.remove_private_tags()
    who = identity(seed)
    plant(ds, who, random.Random(seed))
    return reread(ds), who


def reread(ds: Dataset) -> Dataset:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


def leaks(original: Dataset, output: Dataset, file_name: str = "2.25.1.dcm") -> list[str]:
    return find_leaks(original, output, file_name=file_name, kept_keywords=KEPT)


def text_elements(ds: Dataset, path: str = "") -> Iterator[tuple[str, Dataset, str]]:
    for element in list(ds):
        if element.VR == "SQ":
            for number, item in enumerate(element.value):
                yield from text_elements(item, f"{path}{element.keyword}[{number}].")
        elif element.VR in TEXT:
            yield path + element.keyword, ds, element.keyword


def identifying_values(who: Identity) -> list[str]:
    return [
        who.patient_name, who.spoken_name, who.patient_id, who.other_id, who.address, who.phone, who.email,
        who.institution, who.referring, who.mother, who.birth_name, who.comment, who.device_serial,
        f"{who.birth_date[6:]}.{who.birth_date[4:6]}.{who.birth_date[:4]}", who.patient_id.lower().replace("-", " "),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_every_identifying_value_is_found_in_every_text_attribute(seed: int) -> None:
    """One attribute or one script that the gate cannot read is a way out for every patient of that hospital."""
    original, who = patient(seed)
    clean = reread(CLEANER.clean(original, site="A"))
    assert leaks(original, clean) == []
    places = [(path, keyword) for path, _, keyword in text_elements(clean)]
    assert len(places) > 8
    for path, _ in places:
        output = CLEANER.clean(original, site="A")
        output.SpecificCharacterSet = "ISO_IR 192"
        item, keyword = next((i, k) for p, i, k in text_elements(output) if p == path)
        for value in identifying_values(who):
            item[keyword].value = value
            assert path in leaks(original, output), (path, value)
        assert path in leaks(original, reread(output)), path


@pytest.mark.parametrize("seed", range(6))
def test_found_in_file_name_unknown_bytes_private_and_nested(seed: int) -> None:
    """Names leave by the side doors: the path of a file, an UN element, a sequence in a sequence."""
    original, who = patient(seed)
    family = who.patient_name.split("^")[0].split("=")[-1]
    output = CLEANER.clean(original, site="A")
    assert leaks(original, output, f"{family}_chest.dcm") == ["file name"]
    assert leaks(original, output, f"{who.patient_id}.dcm") == ["file name"]

    output = CLEANER.clean(original, site="A")
    output.add_new(0x00189999, "UN", f"seen: {family}".encode())
    assert len(leaks(original, output)) == 1
    output = CLEANER.clean(original, site="A")
    output.add_new(0x00111001, "LO", "anything at all")
    assert len(leaks(original, output)) == 1

    inner, middle = Dataset(), Dataset()
    inner.SpecificCharacterSet = "ISO_IR 192"
    inner.TextValue = f"from {who.spoken_name}."
    middle.ContentItemModifierSequence = Sequence([inner])
    output = CLEANER.clean(original, site="A")
    output.AcquisitionContextSequence = Sequence([Dataset(), middle])
    assert leaks(original, reread(output)) == ["AcquisitionContextSequence[1].ContentItemModifierSequence[0].TextValue"]


def test_reports_paths_and_never_values() -> None:
    """What the gate says goes into the quarantine table, the log and the report."""
    original, who = patient(1)
    output = CLEANER.clean(original, site="A")
    output.Manufacturer = who.patient_name.split("=")[0]
    output.add_new(0x00189999, "UN", who.patient_id.encode())
    found = " ".join(leaks(original, output))
    assert found
    assert not [secret for secret in who.secrets if fold(secret) in fold(found)]


@pytest.mark.parametrize(
    "spelling",
    ["MUELLER-STROESSNER", "muller strossner", "Jürgen Müller-Strößner", "Strößner", "strößner, jürgen", "JUERGEN_2"],
)
def test_other_spellings_of_a_name(spelling: str) -> None:
    """A console without umlauts writes Mueller; case and order are nobody's rule."""
    original, _ = patient()
    original.SpecificCharacterSet = "ISO_IR 192"
    original.PatientName = "Müller-Strößner^Jürgen"
    output = CLEANER.clean(original, site="A")
    output.ConvolutionKernel = spelling
    assert leaks(original, reread(output)) == ["ConvolutionKernel"]


def test_short_names_only_as_a_whole() -> None:
    """`Li` must not be found in every `Li`, and `Li^Wei` must be."""
    original, _ = patient()
    original.PatientName = "Li^Wei"
    output = CLEANER.clean(original, site="A")
    output.ConvolutionKernel = "Li 40"
    assert leaks(original, output) == []
    output.ConvolutionKernel = "for WEI LI 40"
    assert leaks(original, output) == ["ConvolutionKernel"]


@pytest.mark.parametrize("maker", ["Philips Medical Systems", "SIEMENS", "GE MEDICAL SYSTEMS", "Philips Healthcare"])
def test_a_patient_called_like_a_maker_is_no_leak(maker: str) -> None:
    """Else every Mr Philips examined on a Philips lands in quarantine."""
    original, _ = patient()
    original.PatientName, original.Manufacturer = "Philips^Medical Siemens", maker
    output = reread(CLEANER.clean(original, site="A"))
    assert output.Manufacturer == maker
    assert leaks(original, output) == []
    output.ConvolutionKernel = "Philips"
    assert leaks(original, output) == ["ConvolutionKernel"]


def test_a_code_meaning_from_the_standard_is_no_leak() -> None:
    """A patient called Chest must not stop every chest radiograph; a name put in its place must be found."""
    original, _ = patient()
    original.PatientName = "Chest^Anna"
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "43799004", "SCT", "Chest"
    region.CodeMeaning = "Thorax" if "Thorax" in _meanings("43799004") else _meanings("43799004")[0]
    original.PatientName = f"{region.CodeMeaning}^Anna"
    original.AnatomicRegionSequence = Sequence([region])
    output = CLEANER.clean(original, site="A")
    assert output.AnatomicRegionSequence[0].CodeMeaning == region.CodeMeaning
    assert leaks(original, output) == []
    output.AnatomicRegionSequence[0].CodeMeaning = f"{region.CodeMeaning} of Anna"
    assert leaks(original, output) == ["AnatomicRegionSequence[0].CodeMeaning"]


def _meanings(code: str) -> list[str]:
    from pydicom.sr._concepts_dict import concepts

    return [entry[code][0] for entry in concepts["SCT"].values() if code in entry]


def test_dates_left_or_put_back_are_found() -> None:
    """An unshifted date beside a shifted one gives the shift away, and with it all dates of the patient."""
    original, _ = patient()
    original.StudyDate, original.SeriesDate, original.PatientBirthDate = "20240310", "20240309", "19501224"
    clean = CLEANER.clean(original, site="A")
    assert leaks(original, clean) == []
    for keyword, value in [("StudyDate", "20240310"), ("SeriesDate", "20240309"), ("SeriesDate", "19501224")]:
        output = CLEANER.clean(original, site="A")
        output[keyword].value = value
        assert keyword in leaks(original, output)
    output = CLEANER.clean(original, site="A")
    output.PatientBirthDate = "19501224"
    assert leaks(original, output) == ["PatientBirthDate"]
    for text in ("10.03.2024", "Mar 10, 2024", "20240310", "v2 2024-03-10", "3/10/2024"):
        output = CLEANER.clean(original, site="A")
        output.SoftwareVersions = text
        assert leaks(original, output) == ["SoftwareVersions"], text


def test_a_date_that_shifts_onto_another_by_chance_is_no_leak() -> None:
    """Two acquisitions as many days apart as the shift are ordinary data, and a child's birth date may lie there too."""
    original, _ = patient()
    days = -CLEANER.pseudonymiser.day_shift(
        CLEANER.pseudonymiser.patient(str(original.PatientID), str(original.get("IssuerOfPatientID", "")) or "A")
    )
    from datetime import date, timedelta

    earlier = f"{date(2024, 3, 10) - timedelta(days=days):%Y%m%d}"
    original.StudyDate = "20240310"
    original.AcquisitionDate = ["20240310", earlier]
    original.PatientBirthDate = earlier
    output = reread(CLEANER.clean(original, site="A"))
    assert output.StudyDate == earlier
    assert output.AcquisitionDate[0] == earlier
    assert leaks(original, output) == []


def test_an_original_uid_is_found() -> None:
    """One reference left unmapped joins the archive to the PACS."""
    original, _ = patient()
    output = CLEANER.clean(original, site="A")
    output.FrameOfReferenceUID = original.FrameOfReferenceUID
    assert leaks(original, output) == ["FrameOfReferenceUID"]
    output = CLEANER.clean(original, site="A")
    output.SoftwareVersions = f"from {original.StudyInstanceUID}"
    assert leaks(original, output) == ["SoftwareVersions"]


def jpeg_with(segment: bytes) -> bytes:
    length = (len(segment) + 2).to_bytes(2, "big")
    return b"\xff\xd8\xff\xfe" + length + segment + b"\xff\xda\x00\x02" + b"\x11\xff\x00\x22" * 50 + b"\xff\xd9"


def j2k_with(segment: bytes) -> bytes:
    length = (len(segment) + 4).to_bytes(2, "big")
    size = b"\xff\x51\x00\x04\x00\x00"
    return b"\xff\x4f" + size + b"\xff\x64" + length + b"\x00\x01" + segment + b"\xff\x93" + b"\x11" * 99 + b"\xff\xd9"


@pytest.mark.parametrize(("syntax", "frame"), [(JPEGBaseline8Bit, jpeg_with), (JPEG2000Lossless, j2k_with)])
def test_comments_in_the_codestream_are_read(syntax: str, frame: object) -> None:
    """Some modalities write the patient's name into the JPEG comment; no header cleaner sees it."""
    original, who = patient(2)
    original.file_meta.TransferSyntaxUID = syntax
    for text, found in ((f"name={who.spoken_name}", ["PixelData"]), ("encoder 1.0", [])):
        original.PixelData = encapsulate([frame(text.encode("utf-8"))])  # type: ignore[operator]
        original["PixelData"].VR = "OB"
        output = reread(CLEANER.clean(original, site="A"))
        assert any(text in t for t in codestream_texts(output))
        assert leaks(original, output) == found


def test_text_after_the_last_pixel_is_read() -> None:
    """A trailer behind the frame survives every header cleaner too."""
    original, who = patient(4)
    original.PixelData = bytes(64 * 64 * 2) + who.patient_id.encode() + b"  "
    assert leaks(original, reread(CLEANER.clean(original, site="A"))) == ["PixelData"]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1000, 99998))
def test_random_numbers_in_pseudonyms_are_no_leak(seed: int, number: int) -> None:
    """A short numeric PatientID occurs by chance in 39-digit UIDs: false alarms would empty the archive."""
    original = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    original.PatientID, original.AccessionNumber = str(number), str(seed)
    output = CLEANER.clean(original, site="A")
    assert leaks(original, output, f"{output.SOPInstanceUID}.dcm") == []

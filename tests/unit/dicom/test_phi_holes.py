"""Ways past the PHI gate that somebody thought of: each was one, or nearly."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from radloop.dicom.phi import Seen, find_leaks, find_leaks_among, find_leaks_in_files, fold, seen
from radloop.dicom.phi.elements import Reader, strings
from radloop.dicom.spans import meta_end

KEPT = frozenset({"StudyDate", "SeriesDate", "AcquisitionDate", "StudyTime", "PatientSex"})


def pair(**identity: object) -> tuple[Dataset, Dataset]:
    """An instance with these attributes, and one that holds nothing of them."""
    original = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    original.remove_private_tags()
    del original[0x00431029:]
    output = Dataset()
    output.SOPClassUID, output.SOPInstanceUID = original.SOPClassUID, "2.25.1"
    output.PatientID = "P" + "0" * 32
    for keyword, value in identity.items():
        setattr(original, keyword, value)
    output.file_meta = pydicom.dataset.FileMetaDataset()
    output.file_meta.TransferSyntaxUID = original.file_meta.TransferSyntaxUID
    return original, output


def leaks(original: Dataset, output: Dataset, **more: frozenset[str]) -> list[str]:
    return find_leaks(original, output, file_name="2.25.1.dcm", kept_keywords=KEPT, **more)


def reread(ds: Dataset) -> Dataset:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Featherstone^Ambrose", "scanFeatherstoneCT"),
        ("Smith^John", "JohnSmithCT"),
        ("Wałęsa^Łucja", "Walesa"),
        ("Đorđević^Ana", "dordevic"),
        ("Yamashiro^Haruto=山城^陽翔=やましろ^はると", "ヤマシロ"),
        ("ﾔﾏｼﾛ^ﾊﾙﾄ", "やましろ"),
        ("Müller^Jürgen", "mueller"),
        ("Søndergård^Åse", "Soendergaard"),
    ],
)
def test_other_ways_to_write_a_name(name: str, written: str) -> None:
    """A console joins words, drops strokes and writes the other kana: it is still the same patient."""
    original, output = pair(SpecificCharacterSet="ISO_IR 192", PatientName=name)
    output.SpecificCharacterSet = "ISO_IR 192"
    output.SoftwareVersions = written
    assert leaks(original, reread(output)) == ["SoftwareVersions"]


@pytest.mark.parametrize("codec", ["iso2022_jp", "shift_jis", "euc_jp", "utf-8", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("shift", [b"", b"\x07"])
def test_a_japanese_name_in_undeclared_bytes(codec: str, shift: bytes) -> None:
    """ISO 2022 writes Kanji in seven bits, so that bytes of plain ASCII may hold a name."""
    original, output = pair(SpecificCharacterSet="ISO_IR 192", PatientName="Yamashiro^Haruto=山城^陽翔")
    output.add_new(0x00189999, "UN", shift + "撮影 山城 陽翔".encode(codec))
    assert leaks(original, output) == ["(0018,9999)"]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("Преображенский^Филипп", "cp1251"),
        ("Преображенский^Филипп", "koi8_r"),
        ("Παπαδημητρίου^Καλλιόπη", "iso8859_7"),
        ("Grzegżółka^Łucja", "iso8859_2"),
        ("ירושלמי^אביגיל", "iso8859_8"),
        ("남궁^서연", "iso2022_kr"),
        ("欧阳^小东", "big5"),
    ],
)
def test_a_name_in_undeclared_bytes_of_other_scripts(name: str, codec: str) -> None:
    """A vendor's blob has no character set: it is read in every one that a hospital may have used."""
    if codec == "big5":
        name = "歐陽^曉東"
    original, output = pair(SpecificCharacterSet="ISO_IR 192", PatientName=name)
    output.add_new(0x00189999, "UN", name.replace("^", " ").encode(codec))
    assert leaks(original, output) == ["(0018,9999)"]


def test_utf16_at_an_odd_offset() -> None:
    """Windows programs leave UTF-16 in structures whose fields begin anywhere."""
    original, output = pair(PatientName="Featherstone^Ambrose")
    output.add_new(0x00189999, "UN", b"\x01" + "Ambrose".encode("utf-16-le") + b"\0")
    assert leaks(original, output) == ["(0018,9999)"]


@pytest.mark.parametrize("value", ["FEATHERSTONE", "AMBROSE", "HK 774411", "774411 HK", "19510304"])
def test_a_name_or_number_in_a_code_string(value: str) -> None:
    """Capitals and digits are all a code string allows, and all a name or number needs."""
    original, output = pair(PatientName="Featherstone^Ambrose", PatientID="774411", PatientBirthDate="19510304")
    output.BodyPartExamined = value
    assert leaks(original, output) == ["BodyPartExamined"]


@pytest.mark.parametrize(
    "name", ["Head^Anna", "Chest^Emma", "Brain^Dennis", "Axial^Abdomen", "Hand^Foot", "HEADNECK^01"]
)
def test_terms_of_the_standard_in_code_strings_are_no_names(name: str) -> None:
    """Else Mr Brain's brain lands in quarantine."""
    original, output = pair(PatientName=name)
    output.BodyPartExamined = name.split("^")[0].upper()
    output.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert leaks(original, output) == []


def test_an_identifier_as_a_number_or_part_of_a_uid() -> None:
    """Some modalities take the series number or their UIDs from the patient's number."""
    original, output = pair(PatientID="48213377")
    output.SeriesNumber = "48213377"
    output.IrradiationEventUID = "1.2.826.0.1.48213377.5"
    output.Exposure = "482"
    assert leaks(original, output) == ["SeriesNumber", "IrradiationEventUID"]


@pytest.mark.parametrize(
    "text",
    ["2024-03-10T12:00", "20240310T120000", "2024年3月10日", "10. März 2024", "10 mars 2024", "3/10/24", "10/3/24",
     "10-03-24", "Mar-10-2024", "10-MAR-2024"],
)  # fmt: skip
def test_dates_as_people_and_programs_write_them(text: str) -> None:
    """One true date beside a shifted one gives away all dates of the patient."""
    original, output = pair(StudyDate="20240310")
    output.SpecificCharacterSet = "ISO_IR 192"
    output.SoftwareVersions = text
    assert leaks(original, reread(output)) == ["SoftwareVersions"]


@pytest.mark.parametrize("text", ["3.10.24", "VB17A", "1.2.3/10", "syngo 2024 R3"])
def test_versions_are_no_dates(text: str) -> None:
    """Software is numbered like dates; a scanner's every image would land in quarantine."""
    original, output = pair(StudyDate="20240310")
    output.SoftwareVersions = text
    assert leaks(original, output) == []


def test_file_meta_information_and_preamble_are_read() -> None:
    """What sent a file and what its preamble says are no elements of the data set, and every archive keeps them."""
    original, output = pair(PatientName="Featherstone^Ambrose")
    output.file_meta.SourceApplicationEntityTitle = "FEATHERSTONE"
    output.file_meta.MediaStorageSOPInstanceUID = original.SOPInstanceUID
    output.preamble = b"AMBROSE".ljust(128, b"\0")
    assert sorted(leaks(original, output)) == ["MediaStorageSOPInstanceUID", "SourceApplicationEntityTitle", "preamble"]


def test_bytes_that_are_not_of_the_declared_character_set() -> None:
    """A header rewritten as UTF-8 around bytes of Latin-1 shows the name to every reader that guesses."""
    original, output = pair(SpecificCharacterSet="ISO_IR 192", PatientName="Strößner^Jürgen")
    output.SpecificCharacterSet = "ISO_IR 192"
    data = bytearray(written(output))
    place = bytes.fromhex("18001012") + b"SH"
    element = place + struct.pack("<H", 8) + "Strößner".encode("latin-1")
    later = data.find(b"\x10\x00\x20\x00LO")
    data += element
    assert later > 0
    assert leaks(original, pydicom.dcmread(io.BytesIO(data))) == ["ConvolutionKernel"]


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def test_text_in_a_lookup_table() -> None:
    """A table of numbers holds bytes, and bytes hold names."""
    original, output = pair(PatientName="Featherstone^Ambrose")
    output.add_new(0x00281201, "OW", b"\0\1\2\3" * 9 + b"AMBROSE FEATHERSTONE" + b"\7\0" * 9)
    assert leaks(original, output) == ["RedPaletteColorLookupTableData"]


@pytest.mark.parametrize("kind", ["split", "tile-part", "rle"])
def test_hiding_places_in_codestreams(kind: str) -> None:
    """A comment across two fragments, in a later tile-part's header, or in the unused offsets of RLE."""
    original, output = pair(PatientName="Featherstone^Ambrose")
    said = b"for Ambrose Featherstone"
    output.file_meta.TransferSyntaxUID = {"split": JPEGBaseline8Bit, "tile-part": JPEG2000Lossless, "rle": RLELossless}[
        kind
    ]
    for text, found in ((said, ["PixelData"]), (b"encoder version 1.0 by us", [])):
        if kind == "split":
            frame = (
                b"\xff\xd8\xff\xfe"
                + struct.pack(">H", len(text) + 2)
                + text
                + b"\xff\xda\0\2"
                + b"\x11" * 40
                + b"\xff\xd9"
            )
            output.PixelData = encapsulate([frame], fragments_per_frame=4)
        elif kind == "tile-part":
            comment = b"\xff\x64" + struct.pack(">H", len(text) + 4) + b"\0\1" + text
            start = b"\xff\x4f\xff\x51\0\4\0\0\xff\x90\0\x0a" + bytes(8) + b"\xff\x93" + b"\x11" * 40
            output.PixelData = encapsulate(
                [start + b"\xff\x90\0\x0a" + bytes(8) + comment + b"\xff\x93" + b"\x11" * 9 + b"\xff\xd9"]
            )
        else:
            header = struct.pack("<II", 1, 64) + (text if found else b"")
            output.PixelData = encapsulate([header.ljust(64, b"\0") + b"\x01\x22\x33"])
        output["PixelData"].VR = "OB"
        assert leaks(original, output) == found


def test_options_let_stand_what_they_retain_and_no_name_with_it() -> None:
    """A safe private element is kept for its number; a name in it is a leak all the same."""
    original, output = pair(PatientName="Featherstone^Ambrose", StudyDate="20240310")
    output.StudyDate, output.SOPInstanceUID = "20240310", original.SOPInstanceUID
    output.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "1000")
    output.add_new(0x60003000, "OW", bytes(32))
    assert set(leaks(original, output)) == {"StudyDate", "SOPInstanceUID", "(0019,0010)", "(0019,100C)", "(6000,3000)"}
    every = frozenset({"113106", "113110", "113111", "113103"})
    assert leaks(original, output, options=every) == []
    output.private_block(0x0019, "SIEMENS MR HEADER").add_new(0x0D, "LO", "for Ambrose")
    output.PatientBirthDate = original.PatientBirthDate = "19510304"
    assert leaks(original, output, options=every) == ["(0019,100D)", "PatientBirthDate"]
    assert "(0019,100C)" in leaks(original, output)


def test_verdicts_of_one_patient_are_not_those_of_another() -> None:
    """The gate remembers what it has read; what is clean for one patient may name the next."""
    _, output = pair()
    output.ConvolutionKernel = "Ambrose 40"
    for name, found in [("Smith^John", []), ("Featherstone^Ambrose", ["ConvolutionKernel"])] * 2:
        assert leaks(pair(PatientName=name)[0], output) == found


def texts(elements: Iterable[Seen]) -> list[tuple[object, ...]]:
    return [(*e[:3], *filter(None, strings(*e[2:]))) for e in elements]


def test_elements_from_bytes_are_those_of_pydicom() -> None:
    """The fast path reads headers by itself; what it does not see, the gate does not read."""
    read, reader = 0, Reader()
    for name in ("CT_small.dcm", "MR_small.dcm", "MR_small_implicit.dcm", "test-SR.dcm", "rtplan.dcm", "reportsi.dcm"):
        data = Path(get_testdata_file(name)).read_bytes()
        ds = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        start = meta_end(data)
        for _ in range(4):  # the reader learns
            found = reader.read(data, start, len(data), implicit=ds.is_implicit_VR)
            assert texts(found) == texts(seen(ds))
        read += len(found)
    assert read > 400
    assert fold("Ł") == "l"
    assert find_leaks_among([], [], file_name="2.25.1.dcm", kept_keywords=KEPT) == []


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_implicit.dcm"])
def test_the_gate_on_bytes_says_what_the_gate_on_data_sets_says(name: str) -> None:
    """Two ways through the gate with two opinions are one way out."""
    original = pydicom.dcmread(get_testdata_file(name))
    original.PatientName, original.StudyDate, original.PatientWeight = "Featherstone^Ambrose", "20240310", "71.5"
    item = Dataset()
    item.TextValue = "of 2024-03-10, Ambrose"
    output = Dataset()
    output.SOPClassUID, output.SOPInstanceUID, output.StudyDate = original.SOPClassUID, "2.25.1", "20200101"
    output.file_meta = pydicom.dataset.FileMetaDataset()
    output.file_meta.TransferSyntaxUID = original.file_meta.TransferSyntaxUID
    found = []
    for change in (
        {}, {"ConvolutionKernel": "Ambrose"}, {"FrameOfReferenceUID": original.FrameOfReferenceUID},
        {"AcquisitionContextSequence": Sequence([item])}, {"StudyDate": "20240310"}, {"BodyPartExamined": "AMBROSE"},
        {"PatientSex": original.PatientSex, "PatientWeight": original.PatientWeight}, {"PixelSpacing": [1, 2]},
    ):  # fmt: skip
        for keyword, value in change.items():
            setattr(output, keyword, value)
        before, after = written(original), written(output)
        said = leaks(pydicom.dcmread(io.BytesIO(before)), pydicom.dcmread(io.BytesIO(after)))
        implicit = original.is_implicit_VR
        fast = find_leaks_in_files(before, after, implicit=implicit, file_name="2.25.1.dcm", kept_keywords=KEPT)
        assert sorted(fast) == sorted(said)
        found += said
    assert len(set(found)) == 6
    assert (
        find_leaks_in_files(
            before, b"AMBROSE" + after[7:], implicit=implicit, file_name="2.25.1.dcm", kept_keywords=KEPT
        )[-1]
        == "preamble"
    )


def test_a_name_in_an_item_with_its_own_character_set() -> None:
    """Archives merge items of other hospitals, each in the character set that it was written in."""
    original, output = pair(SpecificCharacterSet="ISO_IR 192", PatientName="Преображенский^Филипп")
    item = Dataset()
    item.SpecificCharacterSet = "ISO_IR 144"
    item.TextValue = "Филипп"
    output.AcquisitionContextSequence = Sequence([item])
    assert leaks(original, reread(output)) == ["AcquisitionContextSequence[0].TextValue"]

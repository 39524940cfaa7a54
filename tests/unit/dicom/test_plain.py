"""Headers read from bytes: what the fast readers say of a file is what pydicom says, or they say nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import ImplicitVRLittleEndian

from radloop.dicom import header, spans
from radloop.dicom.header import read_header
from radloop.dicom.index import Index
from radloop.dicom.layout import Picker
from radloop.errors import DataError, DicomError
from radloop.testing.mutants import mutant

PYDICOM = Path(pydicom.data.__file__).parent / "test_files"
KEYWORDS = str.split(
    """SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID StudyDate StudyTime AccessionNumber Modality Manufacturer
    ReferringPhysicianName StudyDescription PatientName PatientID PatientBirthDate PatientSex PatientAge SliceThickness
    StudyInstanceUID SeriesInstanceUID SeriesNumber InstanceNumber ImagePositionPatient SliceLocation Rows Columns
    PixelSpacing BitsStored RescaleSlope"""
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def files(request: pytest.FixtureRequest) -> list[Path]:
    """Every DICOM file at hand: pydicom's own, and the real ones where they are."""
    found = sorted(PYDICOM.glob("*.dcm"))
    with contextlib.suppress(pytest.skip.Exception):
        found += sorted(request.getfixturevalue("test_data").rglob("*.dcm"))
    return found


def said(read: object, *what: object) -> object:
    try:
        return read(*what)  # type: ignore[operator]
    except DicomError as error:
        return error.reason, error.what


def _implicit(data: bytes, start: int) -> bool:
    if not start:
        raise spans.NotPlain
    return header._uid(data, header._pick_meta(data, 132, start, implicit=False)[1]) == ImplicitVRLittleEndian


@pytest.mark.filterwarnings("ignore")
def test_the_fast_reader_says_what_pydicom_says_of_every_file(files: list[Path]) -> None:
    """Two readers that disagree would file an instance under one identity and de-identify another."""
    fast = 0
    for path in files:
        data = path.read_bytes()
        plain = header._plain(data)
        fast += plain is not None
        if plain is not None:
            assert plain == said(header._read, data), path
        else:
            assert said(read_header, data) == said(header._read, data), path
    assert fast > len(files) / 2


@pytest.mark.filterwarnings("ignore")
def test_the_fast_reader_says_what_pydicom_says_of_broken_files(files: list[Path]) -> None:
    """A cut or forged file that the fast reader takes for a whole one would be acknowledged and lost."""
    small = [data for path in files if len(data := path.read_bytes()) < 40_000]
    accepted = 0
    for seed in range(1500):
        data = mutant(small[seed % len(small)], seed)
        plain = header._plain(data)
        if plain is not None:
            accepted += 1
            assert plain == said(header._read, data), seed
    assert accepted > 100


@pytest.mark.filterwarnings("ignore")
def test_an_index_says_what_pydicom_says_of_every_file(files: list[Path]) -> None:
    """A list of studies that shows another patient's name than the file holds misleads whoever reads it."""
    index, fast = Index(KEYWORDS), 0
    for path in files:
        slow = said(index._read, path)
        found = said(index.read, path)
        assert found == slow, path
        with contextlib.suppress(spans.NotPlain, spans.NeedMore):
            fast += index._plain(path.read_bytes(), path.stat().st_size) == slow
    assert fast > len(files) / 2


@pytest.mark.filterwarnings("ignore")
def test_an_index_says_what_pydicom_says_of_broken_files(files: list[Path], tmp_path: Path) -> None:
    """What is broken must not be listed as something else."""
    index, path = Index(KEYWORDS), tmp_path / "broken.dcm"
    small = [data for file in files if len(data := file.read_bytes()) < 40_000]
    accepted = 0
    for seed in range(600):
        path.write_bytes(data := mutant(small[seed % len(small)], seed))
        try:
            found = index._plain(data, len(data))
            # The index looks no further than its last attribute: a file broken beyond it is no worse for it.
            spans.scan(data, start := spans.meta_end(data), len(data), implicit=_implicit(data, start))
        except (spans.NotPlain, spans.NeedMore):
            continue
        accepted += 1
        slow = said(index._read, path)
        assert found == slow or not isinstance(slow, dict), seed
    assert accepted > 100


def test_attributes_that_are_no_text_are_refused() -> None:
    """Pixels read as text would fill the memory."""
    for keyword in (
        "PixelData",
        "RequestAttributesSequence",
        "TransferSyntaxUID",
        "PixelPaddingValue",
        "NoSuchKeyword",
    ):
        with pytest.raises(DataError, match="cannot be indexed"):
            Index([keyword])


@pytest.mark.filterwarnings("ignore")
def test_a_learned_layout_finds_what_a_scan_finds(files: list[Path]) -> None:
    """One picker meets all files in turn, so that each layout is tried on every other kind of file."""
    tags = [0x00080016, 0x00080018, 0x00100020, 0x00280010, spans.PIXEL_DATA]
    picker, compared = Picker(tags, whole=True), 0
    for path in files * 3:
        data = path.read_bytes()
        start = spans.meta_end(data)
        try:
            implicit = _implicit(data, start)
            found = {
                tag: (value, end) for tag, _, _, value, end in spans.scan(data, start, len(data), implicit=implicit)
            }
            places = picker.pick(data, start, len(data), implicit=implicit)
        except spans.NotPlain:
            continue
        assert places == [found.get(tag) for tag in tags], path
        compared += 1
    assert compared > len(files)


@given(st.data())
def test_spans_cover_the_data_set_and_items_their_sequence(drawn: st.DataObject) -> None:
    """An element that no span covers would neither be cleaned nor removed."""
    path = drawn.draw(st.sampled_from(sorted([*PYDICOM.glob("*small*.dcm"), *PYDICOM.glob("*seq*.dcm")])))
    data = path.read_bytes()
    start = spans.meta_end(data)
    dataset = pydicom.dcmread(path)
    implicit, little = dataset.original_encoding
    if not start or not little or dataset.file_meta.TransferSyntaxUID.is_deflated:
        return
    try:
        found = spans.scan(data, start, len(data), implicit=bool(implicit))
    except spans.NotPlain:
        return
    assert [span[0] for span in found] == sorted(dataset.keys())
    edges = [start, *(span[4] for span in found)]
    assert [span[2] for span in found] == edges[:-1]
    assert edges[-1] == len(data)
    for tag, vr, _, value, end in found:
        if vr == "SQ":
            undefined = data[value - 4 : value] == b"\xff\xff\xff\xff"
            items = spans.items(data, value, end, implicit=bool(implicit))
            assert len(items) == len(dataset[tag].value), (path, undefined)

"""De-identification in bytes: whatever the fast path writes, the slow one would have written, byte for byte."""

from __future__ import annotations

import errno
import io
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit

from radloop.dicom import deidentify, spans
from radloop.dicom.deidentify import Deidentifier, fast, read
from radloop.dicom.deidentify.rewrite import rewrite
from radloop.dicom.profile import chosen
from radloop.dicom.tags import describe
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError
from radloop.testing.mutants import mutant
from radloop.testing.phi import identity, plant

PYDICOM = Path(pydicom.data.__file__).parent / "test_files"
NAMES = Pseudonymiser(b"0123456789abcdef0123456789abcdef")
PROFILES = {
    "basic": chosen("basic"),
    "research": chosen("research"),
    "much": chosen("basic", ["113106", "113108", "113109", "113110", "113112"]),
    "clean": chosen("research", ["113103", "113104", "113105", "113111"]),
}
Compared = tuple[bytes, object, Counter[tuple[str, str]]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def cleaner(profile: str = "research") -> Deidentifier:
    return Deidentifier(NAMES, profile=PROFILES[profile])


def quick(owner: Deidentifier, data: bytes) -> Compared | None:
    """The whole output as the fast path makes it."""
    tally: Counter[tuple[str, str]] = Counter()
    try:
        head = owner._fast.head(data, len(data), "A", tally)
    except spans.NeedMore:
        return None
    return None if head is None else (head.header + data[slice(*head.pixels)], head.tags, +tally)


def slow(owner: Deidentifier, data: bytes) -> Compared | DicomError:
    """The same by pydicom."""
    tally: Counter[tuple[str, str]] = Counter()
    try:
        out = owner._clean(read(data), "A", tally)
        return deidentify._written(out), describe(out), +tally
    except DicomError as error:
        return error


def same(owner: Deidentifier, data: bytes, what: object) -> bool:
    """Hold the two against each other; whether the fast path took it."""
    found = quick(owner, data)
    if found is None:
        return False
    expected = slow(owner, data)
    assert not isinstance(expected, DicomError), (what, expected.reason)
    assert found[0] == expected[0], what
    assert found[1:] == expected[1:], what
    return True


def bytes_of(ds: Dataset, syntax: UID | None = None) -> bytes:
    if syntax is not None:
        ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(request: pytest.FixtureRequest) -> list[Path]:
    """Every DICOM file at hand: pydicom's own, and the real ones where they are."""
    found = sorted(PYDICOM.glob("*.dcm"))
    try:
        found += sorted(request.getfixturevalue("test_data").rglob("*.dcm"))
    except pytest.skip.Exception:
        return found
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("profile", PROFILES)
def test_every_file_comes_out_the_same_on_both_ways(files: list[Path], profile: str) -> None:
    """A difference would be an identity left, or an image changed, on the way that nearly all files go."""
    owner = cleaner(profile)
    taken = sum(same(owner, path.read_bytes(), path) for path in files)
    assert taken > len(files) / (6 if profile == "clean" else 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("profile", ["basic", "research"])
def test_broken_files_come_out_the_same_on_both_ways(files: list[Path], profile: str) -> None:
    """What the fast path takes for a plain file must be one."""
    owner = cleaner(profile)
    small = [data for path in files if len(data := path.read_bytes()) < 40_000]
    taken = sum(same(owner, mutant(small[seed % len(small)], seed), seed) for seed in range(1000))
    assert taken > 50


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
def test_planted_identities_come_out_the_same_on_both_ways(profile: str, syntax: UID) -> None:
    """Names in every character set, nested, private, in codes: what is cleaned by value on one way is so on the other."""
    owner, taken = cleaner(profile), 0
    for seed in range(40):
        ds = pydicom.dcmread(PYDICOM / "CT_small.dcm")
        plant(ds, identity(seed), random.Random(seed))
        taken += same(owner, bytes_of(ds, syntax), seed)
    assert (
        taken > 5 or profile != "basic"
    )  # a vocabulary cleans EthnicGroup in the others, which is left to the slow path


# ---- data sets that nobody made yet

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"), max_size=14)
UIDS = st.from_regex(r"[1-2]\.[0-9]{1,20}(\.[1-9][0-9]{0,9}){1,3}", fullmatch=True)
DATES = st.dates().map(lambda day: f"{day:%Y%m%d}") | st.sampled_from(["", "2004.01.19", "200401", "unknown", "2004"])
VALUES: dict[str, st.SearchStrategy[object]] = {
    "PatientName": TEXT,
    "PatientID": st.just("4711") | TEXT,
    "IssuerOfPatientID": TEXT,
    "PatientBirthDate": DATES,
    "PatientAge": st.sampled_from(["", "057Y", "099Y", "3", "008M"]),
    "PatientSex": st.sampled_from(["M", "", "Anna"]),
    "EthnicGroup": TEXT,
    "StudyDate": DATES,
    "AcquisitionDateTime": st.sampled_from(["20040119123059.123456", "2004", "x", "20040119+0100"]),
    "ContentTime": st.sampled_from(["123059", "12:30:59", "noon", ""]),
    "Manufacturer": TEXT,
    "ProtocolName": TEXT,
    "StudyDescription": TEXT,
    "KVP": st.sampled_from(["120", "1e2", "", "kv of Anna", "100\\120"]),
    "InstanceNumber": st.sampled_from(["1", " 7 ", "seven"]),
    "FrameOfReferenceUID": UIDS | st.just("1.2.840.10008.1.4.1.1"),
    "BodyPartExamined": st.sampled_from(["CHEST", "Anna Müller's"]),
    "RescaleSlope": st.sampled_from(["1", "0.5"]),
    "LossyImageCompression": st.sampled_from(["00", "01"]),
    "DeidentificationMethod": TEXT,
    "InstitutionName": TEXT,
    "DeviceSerialNumber": TEXT,
    "WindowCenter": st.sampled_from([["40", "50"], "40"]),
}
ITEM = st.fixed_dictionaries(
    {}, optional={k: VALUES[k] for k in ("StudyDate", "ContentTime", "Manufacturer", "PatientName", "KVP")} | {
        "ReferencedSOPInstanceUID": UIDS, "ReferencedSOPClassUID": st.just("1.2.840.10008.5.1.4.1.1.2"),
        "CodeValue": st.sampled_from(["51185008", "DRWHO"]), "CodingSchemeDesignator": st.sampled_from(["SCT", "99X"]),
        "CodeMeaning": st.sampled_from(["Thorax", "Schädel", "Dr Who"]),
    }
)  # fmt: skip
NESTED = st.recursive(
    st.lists(ITEM, max_size=2),
    lambda inner: st.lists(st.tuples(ITEM, st.dictionaries(st.sampled_from(
        ["SourceImageSequence", "ReferencedStudySequence", "AnatomicRegionSequence", "RequestAttributesSequence"]
    ), inner, max_size=2)), max_size=2),
    max_leaves=4,
)  # fmt: skip


def fill(ds: Dataset, values: dict[str, object]) -> None:
    for keyword, value in values.items():
        ds.add_new(
            keyword, pydicom.datadict.dictionary_VR(keyword), "1" if keyword in ("KVP", "InstanceNumber") else value
        )
        if keyword in ("KVP", "InstanceNumber"):
            ds[keyword]._value = value


def sequence(drawn: list[object]) -> Sequence:
    items = []
    for each in drawn:
        item = Dataset()
        values, inner = each if isinstance(each, tuple) else (each, {})
        fill(item, values)
        for keyword, more in inner.items():
            setattr(item, keyword, sequence(more))
        item.is_undefined_length_sequence_item = len(items) % 2 == 1
        items.append(item)
    return Sequence(items)


@given(
    values=st.fixed_dictionaries({}, optional=VALUES),
    nested=st.dictionaries(st.sampled_from(
        ["SourceImageSequence", "ProcedureCodeSequence", "ReferencedStudySequence", "PerformedProtocolCodeSequence"]
    ), NESTED, max_size=3),
    private=st.booleans(),
    undefined=st.booleans(),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian]),
    profile=st.sampled_from(sorted(PROFILES)),
)  # fmt: skip
@settings(max_examples=300)
def test_made_up_data_sets_come_out_the_same_on_both_ways(
    values: dict[str, object],
    nested: dict[str, list[object]],
    private: bool,
    undefined: bool,
    syntax: UID,
    profile: str,
) -> None:
    """What a scanner of tomorrow writes is cleaned as if pydicom had read it."""
    ds = pydicom.dcmread(PYDICOM / "CT_small.dcm")
    if not private:
        ds.remove_private_tags()
    fill(ds, {"PatientID": "4711"} | values)
    for keyword, drawn in nested.items():
        setattr(ds, keyword, sequence(drawn))
        ds[keyword].is_undefined_length = undefined
    try:
        data = bytes_of(ds, syntax)
    except Exception:
        return
    same(SHARED[profile], data, data[:0])


SHARED = {name: cleaner(name) for name in PROFILES}


# ---- what is remembered


@pytest.mark.filterwarnings("ignore")
def test_what_is_remembered_of_one_patient_is_not_given_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two patients on one scanner differ in a few bytes; dates move by as many days as the patient's own."""
    owner = cleaner()
    ds = pydicom.dcmread(PYDICOM / "CT_small.dcm")
    del ds.PatientAge
    for number in range(30):
        ds.PatientID, ds.PatientName = f"P{number % 7}", f"Name^{number % 5}"
        ds.PatientBirthDate = f"19{40 + number % 9}0101"
        ds.SourceImageSequence = sequence([{"StudyDate": "20040119", "ReferencedSOPInstanceUID": f"1.2.{number % 4}"}])
        assert same(owner, bytes_of(ds), number)
    monkeypatch.setattr(fast, "_MOST", 1)
    for number in range(10):
        ds.PatientID = f"Q{number % 3}"
        assert same(owner, bytes_of(ds), number)


@pytest.mark.filterwarnings("ignore")
def test_threads_share_what_is_remembered() -> None:
    """The listener's threads clean through one Deidentifier: what one writes must not be another's patient."""
    owner, data = cleaner(), {}
    for number in range(24):
        ds = pydicom.dcmread(PYDICOM / "CT_small.dcm")
        ds.PatientID, ds.StudyDate = f"P{number}", f"200401{1 + number:02d}"
        data[number] = bytes_of(ds)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda number: quick(owner, data[number % 24]), range(240)))
    for number, out in enumerate(outs):
        assert out is not None
        assert out[0] == slow(cleaner(), data[number % 24])[0]  # type: ignore[index]


# ---- pixels


def ct(tmp_path: Path, change: object = None) -> Path:
    ds = pydicom.dcmread(PYDICOM / "CT_small.dcm")
    ds.remove_private_tags()
    if callable(change):
        change(ds)
    path = tmp_path / "in.dcm"
    path.write_bytes(bytes_of(ds))
    return path


def written(tmp_path: Path, source: Path, owner: Deidentifier | None = None) -> tuple[bool, bytes]:
    """Whether the fast path took it; what `clean_file` wrote in any case."""
    owner, target = owner or cleaner(), tmp_path / "out" / "out.dcm"
    taken = rewrite(owner._fast, source, target, site="A", tally=None, gate=None, digest=False)
    by_rewrite = target.read_bytes() if taken else b""
    file = owner.clean_file(source, target, site="A")
    out = target.read_bytes()
    assert not taken or by_rewrite == out
    assert len(out) == file.file_bytes
    assert [path.name for path in target.parent.iterdir()] == ["out.dcm"]
    return taken is not None, out


def stored_in(bits: int, value: int, *, signed: bool = False) -> object:
    def change(ds: Dataset) -> None:
        cells = np.full(ds.Rows * ds.Columns, value, "<u2")
        cells[:-1] &= (1 << bits) - 1
        ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = cells.tobytes(), bits, bits - 1, int(signed)
        ds.pop("PixelPaddingValue", None)

    return change


@pytest.mark.parametrize(
    ("bits", "value", "signed", "plain"),
    [(12, 0x0FFF, False, True), (12, 0x8001, False, False), (12, 0xF801, True, True), (12, 0x8001, True, False),
     (16, 0xFFFF, False, True)],
)  # fmt: skip
def test_bits_that_no_pixel_uses_are_looked_at(
    tmp_path: Path, bits: int, value: int, signed: bool, plain: bool
) -> None:
    """Old scanners draw the patient's name into the unused high bits; the last pixel alone has them here."""
    source = ct(tmp_path, stored_in(bits, value, signed=signed))
    taken, out = written(tmp_path, source)
    assert taken is plain
    last = int.from_bytes(out[-2:], "little")
    assert last == (value if plain else last & 0x0FFF | (0xF000 if signed and last & 0x0800 else 0))


def test_a_comment_in_a_codestream_goes_the_slow_way(tmp_path: Path) -> None:
    """Frame grabbers write the patient's name into the JPEG comment; the pixels stay as they are."""
    jpeg = pydicom.dcmread(PYDICOM / "SC_rgb_small_odd_jpeg.dcm")
    frame = next(pydicom.encaps.generate_frames(jpeg.PixelData, number_of_frames=1))
    comment = b"\xff\xfe\x00\x0eAnna Mueller"
    for held, plain in ((frame, True), (frame[:2] + comment + frame[2:], False)):
        jpeg.PixelData = encapsulate([held])
        assert jpeg.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
        source = tmp_path / "in.dcm"
        source.write_bytes(bytes_of(jpeg))
        taken, out = written(tmp_path, source)
        assert taken is plain
        assert b"Anna" not in out


@pytest.mark.parametrize("extra", [b"\0" * 4, b"Anna Mueller"])
def test_bytes_after_the_last_pixel_go_the_slow_way(tmp_path: Path, extra: bytes) -> None:
    """A value longer than its pixels holds something else."""
    taken = None
    source = ct(tmp_path, lambda ds: setattr(ds, "PixelData", ds.PixelData + extra))
    target = tmp_path / "out.dcm"
    taken = rewrite(cleaner()._fast, source, target, site="A", tally=None, gate=None, digest=False)
    assert taken is None
    assert not target.exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_copy_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Between two file systems, and on old kernels, copy_file_range fails; the pixels must arrive all the same."""
    source = ct(tmp_path, stored_in(16, 0xFFFF))
    expected = written(tmp_path, source)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", fail)
    assert written(tmp_path, source) == expected == (True, expected[1])


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file under the right name would be trained on."""
    source = ct(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space left"):
        rewrite(cleaner()._fast, source, tmp_path / "out" / "out.dcm", site="A", tally=None, gate=None, digest=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_gate_reads_before_anything_is_written(tmp_path: Path) -> None:
    """A name that the cleaner missed must never lie in the archive, not for a moment."""
    source, owner = ct(tmp_path, lambda ds: setattr(ds, "SequenceName", "Mueller")), cleaner()
    ds = pydicom.dcmread(source)
    ds.PatientName = "Mueller^Anna"
    source.write_bytes(bytes_of(ds))
    assert rewrite(owner._fast, source, tmp_path / "a.dcm", site="A", tally=None, gate=None, digest=False)
    with pytest.raises(DicomError, match="SequenceName"):
        owner.clean_file(source, tmp_path / "b.dcm", site="A")
    assert not (tmp_path / "b.dcm").exists()

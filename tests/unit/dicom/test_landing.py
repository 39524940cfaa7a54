from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from radloop.catalog.database import StorageFull
from radloop.catalog.schema import QuarantineState, Reason, Refused, Status
from radloop.catalog.store import Catalog
from radloop.dicom.header import read_header
from radloop.dicom.identity import Crosswalk, Identity
from radloop.dicom.landed import identity
from radloop.dicom.landing import Arrival, Landing, Outcome
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DataError, DicomError

KEY = bytes(range(32))


def open_landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


@pytest.fixture
def landing(home: Path) -> Landing:
    return open_landing(home)


def dataset(number: int = 1, **changes: Any) -> Dataset:
    """A small CR image with a nested sequence. `changes`: keyword -> value, None takes the attribute out."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.SOPInstanceUID = f"1.2.3.{number}"
    ds.StudyInstanceUID = "1.2.3.100"
    ds.SeriesInstanceUID = "1.2.3.200"
    ds.PatientID = f"MRN{number:04d}"
    ds.PatientName = "Zwölf^Boxkämpfer"
    ds.AccessionNumber = f"ACC{number}"
    ds.Modality = "CR"
    step = Dataset()
    step.ScheduledProcedureStepDescription = "thorax"
    ds.RequestAttributesSequence = Sequence([step])
    ds.Rows, ds.Columns = 8, 6
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(number).integers(0, 4096, (8, 6), dtype=np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def encoded(ds: Dataset, syntax: str = ExplicitVRLittleEndian, *, meta: bool = True) -> bytes:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", "1.2.840.10008.5.1.4.1.1.1")
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2.3")
    buffer = BytesIO()
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, dtype="<u2").astype(">u2").tobytes()
    if not meta:
        del ds.file_meta
        ds.save_as(buffer, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    elif syntax in (RLELossless, JPEGLSLossless):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(buffer, enforce_file_format=True)
    else:
        ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def image(number: int = 1, syntax: str = ExplicitVRLittleEndian, *, meta: bool = True, **changes: Any) -> bytes:
    return encoded(dataset(number, **changes), syntax, meta=meta)


def receive(landing: Landing, data: bytes, *, site: str = "A", path: str | None = None) -> Outcome:
    return landing.receive(data, site=site, sender="TEST", relative_path=path)


def catalog_of(landing: Landing) -> Catalog:
    return landing._catalog


def files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def sha(data: bytes) -> str:
    """What a file of these bytes is named by."""
    return identity(data)


# What is accepted


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
    ],
)
def test_an_instance_lands_whole_registered_and_pseudonymous(landing: Landing, syntax: str) -> None:
    """If this failed, an acknowledged instance would be missing, or its patient's name be in the catalog."""
    data = image(7, syntax)
    outcome = receive(landing, data, path="sub/a.dcm")
    assert (outcome.kind, outcome.reason, outcome.sha256) == ("new", None, sha(data))
    path = landing.landed(outcome.sha256)
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == landing.landing.stat().st_mode & 0o777 == 0o700
    [row] = catalog_of(landing).pending()
    pseudonym = Pseudonymiser(KEY)
    assert (row.sop_uid, row.study_uid) == (pseudonym.uid("1.2.3.7"), pseudonym.uid("1.2.3.100"))
    assert (row.patient, row.accession_key) == (pseudonym.patient("MRN0007", "A"), pseudonym.accession("ACC7", "A"))
    assert (row.file_key, row.key_id) == (pseudonym.file("sub/a.dcm"), pseudonym.key_id)
    assert (row.site, row.sender, row.modality, row.transfer_syntax_uid) == ("A", "TEST", "CR", syntax)
    assert (row.source_bytes, row.revision, row.status) == (len(data), 1, Status.RECEIVED)


def test_the_crosswalk_holds_what_the_catalog_must_not(landing: Landing, home: Path) -> None:
    """If this failed, results could not go back to the PACS, or identifiers would lie in the open."""
    outcome = receive(landing, image(7), path="MRN0007/a.dcm")
    row = catalog_of(landing).pending()[0]
    crosswalk = landing._crosswalk

    def original(kind: Identity, pseudonym: str) -> dict[str, str] | None:
        return crosswalk.get(kind, pseudonym, who="test", why="test")

    assert original(Identity.PATIENT, row.patient) == {"PatientID": "MRN0007", "IssuerOfPatientID": "", "site": "A"}
    assert original(Identity.INSTANCE, row.sop_uid) == {"SOPInstanceUID": "1.2.3.7"}
    assert original(Identity.STUDY, row.study_uid) == {"StudyInstanceUID": "1.2.3.100"}
    assert original(Identity.SERIES, row.series_uid) == {"SeriesInstanceUID": "1.2.3.200"}
    assert original(Identity.ACCESSION, row.accession_key or "") == {"AccessionNumber": "ACC7"}
    assert original(Identity.SOURCE, outcome.sha256) == {"site": "A", "sender": "TEST", "path": "MRN0007/a.dcm"}
    in_the_open = b"".join(p.read_bytes() for p in home.rglob("*") if p.is_file() and p.suffix != ".dcm")
    assert b"MRN0007" not in in_the_open
    assert b"1.2.3.100" not in in_the_open


def test_the_issuer_counts_for_more_than_the_site(landing: Landing) -> None:
    """If this failed, one patient of a regional registry would be two, one in training and one in test."""
    receive(landing, image(1, IssuerOfPatientID="REGION", PatientID="77"), site="A")
    receive(landing, image(2, IssuerOfPatientID="REGION", PatientID="77"), site="B")
    receive(landing, image(3, PatientID="77"), site="A")
    receive(landing, image(4, PatientID="77"), site="B")
    patients = {row.sop_uid: row.patient for row in catalog_of(landing).pending()}
    one, two, three, four = (patients[Pseudonymiser(KEY).uid(f"1.2.3.{n}")] for n in (1, 2, 3, 4))
    assert one == two
    assert len({one, three, four}) == 3


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_data_set_without_preamble_is_accepted(landing: Landing, syntax: str) -> None:
    """If this failed, the files that old modalities write would be lost as no DICOM."""
    assert receive(landing, image(1, syntax, meta=False)).kind == "new"
    assert catalog_of(landing).pending()[0].transfer_syntax_uid == syntax


def test_an_object_without_pixels_that_is_no_image_is_accepted(landing: Landing) -> None:
    """If this failed, structured reports that belong to a study would be refused at the door."""
    ds = dataset(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR", Rows=None, PixelData=None)
    assert receive(landing, encoded(ds)).kind == "new"


@pytest.mark.parametrize("folder", ["dicom_objects", "dicom_vendor_series", "ct_contrast_tcga", "deid_data"])
@pytest.mark.data
def test_real_files_of_many_makers_are_not_refused(test_data: Path, folder: str) -> None:
    """If this failed, the walk over lengths would quarantine what real scanners send."""
    seen = 0
    for path in sorted((test_data / folder).rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if data[128:132] != b"DICM":
            continue
        read_header(data)
        seen += 1
    assert seen > 3


# What is refused


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", Reason.NOT_DICOM),
        (lambda: b"hello, I am a text file and no image at all" * 20, Reason.NOT_DICOM),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(500), Reason.NOT_DICOM),
        (lambda: bytes(400), Reason.NOT_DICOM),
        (lambda: b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100", Reason.NOT_DICOM),
        (lambda: image(PatientID=None), Reason.NO_PATIENT_ID),
        (lambda: image(PatientID=""), Reason.NO_PATIENT_ID),
        (lambda: image(PatientID="Unknown"), Reason.NO_PATIENT_ID),
        (lambda: image(SOPInstanceUID=None), Reason.MISSING_UID),
        (lambda: image(StudyInstanceUID=""), Reason.MISSING_UID),
        (lambda: image(SeriesInstanceUID=None), Reason.MISSING_UID),
        (lambda: image(PixelData=None), Reason.NO_PIXELS),
        (lambda: image().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.7\0"), Reason.UNKNOWN_TRANSFER_SYNTAX),
        (lambda: image().replace(b"1.2.840.10008.1.2.1\0", b"1.2.276.0.7.9.12.34\0"), Reason.UNKNOWN_TRANSFER_SYNTAX),
        (lambda: image(Rows=9), Reason.TRUNCATED),
        (lambda: image(NumberOfFrames=2), Reason.TRUNCATED),
    ],
)
def test_what_cannot_be_used_is_kept_with_its_reason(
    landing: Landing, make: Callable[[], bytes], reason: Reason
) -> None:
    """If this failed, bad input would stop the listener, or vanish without anybody knowing why."""
    data = make()
    outcome = receive(landing, data)
    assert (outcome.kind, outcome.reason) == ("quarantined", reason)
    assert landing.quarantined(outcome.sha256).read_bytes() == data
    assert files(landing.landing) == []
    [row] = catalog_of(landing).quarantined()
    assert (row.reason, row.stage, row.site, row.source_sha256) == (reason, "landing", "A", sha(data))
    assert receive(landing, data) == outcome
    assert len(catalog_of(landing).quarantined()) == 1


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_a_file_cut_anywhere_is_not_accepted(syntax: str) -> None:
    """If this failed, half an image, read as a whole one, would be trained on."""
    data = image(3, syntax)
    read_header(data)
    cut_at = [*range(0, len(data) - 1, 7), len(data) - 1, len(data) - 2]
    accepted = []
    for length in cut_at:
        try:
            read_header(data[:length])
        except DicomError:
            continue
        accepted.append(length)
    assert accepted == []


def test_a_file_cut_in_its_pixels_is_called_truncated() -> None:
    """If this failed, the person who looks at the quarantine would search for the wrong fault."""
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless):
        data = image(3, syntax)
        with pytest.raises(DicomError) as caught:
            read_header(data[: len(data) - 20])
        assert caught.value.reason == Reason.TRUNCATED, syntax


def test_a_multi_frame_file_that_lacks_frames_is_truncated() -> None:
    """If this failed, a cine loop cut between two fragments would pass as whole."""
    ds = dataset(1, NumberOfFrames=3)
    ds.PixelData = np.arange(3 * 8 * 6, dtype=np.uint16).tobytes()
    data = encoded(ds, RLELossless)
    read_header(data)
    position = data.rindex(b"\xfe\xff\x00\xe0")  # the last fragment
    (length,) = struct.unpack_from("<L", data, position + 4)
    with pytest.raises(DicomError) as caught:
        read_header(data[:position] + data[position + 8 + length :])
    assert caught.value.reason == Reason.TRUNCATED


def test_a_deflated_file_that_swells_without_end_is_refused_before_it_does() -> None:
    """One file of 4 MB that becomes 4 GB ends the listener, and with it everybody's sending."""
    small = image(syntax=DeflatedExplicitVRLittleEndian)
    start = small.index(b"1.2.840.10008.1.2.1.99")
    meta_length = struct.unpack_from("<L", small, 140)[0]
    assert start < 144 + meta_length
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = bytes(1 << 24)
    body = b"".join(bomb.compress(zeros) for _ in range(40)) + bomb.flush()
    limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DicomError, match="larger than 512 MiB") as caught:
        read_header(small[: 144 + meta_length] + body)
    assert caught.value.reason == Reason.UNSUPPORTED_OBJECT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limits < 200 << 10


def test_a_dicomdir_is_kept_apart(landing: Landing) -> None:
    """If this failed, the index of a CD would be taken for an image, or stop its import."""
    data = Path(pydicom.data.get_testdata_file("DICOMDIR")).read_bytes()
    assert receive(landing, data).reason is Reason.UNSUPPORTED_OBJECT


def test_no_refusal_quotes_the_file(landing: Landing) -> None:
    """If this failed, the list of the quarantine would name patients."""
    for changes in ({"SOPInstanceUID": None}, {"PixelData": None}, {"Rows": 99}, {"StudyInstanceUID": ""}):
        receive(landing, image(PatientID="CANARY", PatientName="CANARY", **changes))
    held = catalog_of(landing).quarantined()
    assert len(held) == 4
    assert "CANARY" not in repr(held)
    arrival = Arrival(data=image(PatientID="CANARY"), site="A", sender="T", relative_path="CANARY/1")
    assert "CANARY" not in repr(arrival) + repr(read_header(arrival.data))


# The same instance again


def test_the_same_bytes_again_are_the_same(landing: Landing) -> None:
    """If this failed, a study pushed twice would count twice."""
    first = receive(landing, image(1))
    assert receive(landing, image(1)) == Outcome("same", first.sop_uid, None, first.sha256)  # type: ignore[arg-type]
    assert len(files(landing.landing)) == 1


@pytest.mark.parametrize(
    ("changes", "syntax"),
    [
        ({"PatientName": "Corrected^Name"}, ExplicitVRLittleEndian),
        ({}, ImplicitVRLittleEndian),
        ({}, RLELossless),
        ({}, JPEGLSLossless),
        ({}, ExplicitVRBigEndian),
    ],
)
def test_the_same_pixels_in_another_form_are_a_revision(landing: Landing, changes: dict[str, Any], syntax: str) -> None:
    """If this failed, a PACS that coerces or recompresses would be in conflict with itself, for every instance."""
    receive(landing, image(1))
    assert receive(landing, image(1, syntax, **changes)).kind == "revision"
    [row] = catalog_of(landing).pending()
    assert (row.revision, row.transfer_syntax_uid) == (2, syntax)
    assert len(files(landing.landing)) == 2


def test_other_pixels_under_a_known_uid_are_a_conflict_and_the_stored_one_stays(landing: Landing) -> None:
    """If this failed, one patient's picture could silently take the place of another's."""
    stored = receive(landing, image(1))
    other = image(1, PixelData=bytes(96))
    outcome = receive(landing, other)
    assert (outcome.kind, outcome.reason) == ("conflict", Reason.UID_CONFLICT)
    assert [row.source_sha256 for row in catalog_of(landing).pending()] == [stored.sha256]
    assert files(landing.landing) == [stored.sha256]
    assert files(landing.quarantine) == [outcome.sha256]
    assert receive(landing, other) == outcome


def test_one_changed_pixel_is_a_conflict_even_when_recompressed(landing: Landing) -> None:
    """If this failed, a subtle alteration would pass as a change of header."""
    receive(landing, image(1))
    ds = dataset(1)
    pixels = np.frombuffer(ds.PixelData, dtype=np.uint16).copy()
    pixels[17] ^= 1
    ds.PixelData = pixels.tobytes()
    assert receive(landing, encoded(ds, RLELossless)).kind == "conflict"


def test_pixels_that_cannot_be_decoded_are_never_the_same(landing: Landing) -> None:
    """If this failed, garbage could replace a good image."""
    receive(landing, image(1))
    data = bytearray(image(1, JPEGLSLossless))
    start = data.index(b"\xff\xd8\xff")
    data[start : start + 40] = bytes(40)
    assert receive(landing, bytes(data)).kind == "conflict"


def test_a_revision_is_compared_with_the_archive_when_landing_was_emptied(landing: Landing, home: Path) -> None:
    """If this failed, every correction that comes after the retention period would be a conflict."""
    from radloop.catalog.schema import Archived

    first = receive(landing, image(1))
    row = catalog_of(landing).pending()[0]
    path = home / "archive" / "s" / "r" / "i.dcm"
    path.parent.mkdir(parents=True)
    path.write_bytes(image(1, PatientID="P0", PatientName=None))
    done = Archived(
        sop_uid=row.sop_uid, revision=1, archive_path="s/r/i.dcm", file_sha256=sha(path.read_bytes()), deid_digest="d"
    )
    catalog_of(landing).mark_archived([done])
    landing.landed(first.sha256).unlink()
    assert receive(landing, image(1)).kind == "same"
    assert receive(landing, image(1, PatientName="New^Name")).kind == "revision"
    assert receive(landing, image(1, PixelData=bytes(96))).kind == "conflict"


def test_a_received_instance_whose_file_was_lost_is_healed_by_sending_it_again(landing: Landing) -> None:
    """If this failed, the same study sent again would be called known although its bytes are gone."""
    first = receive(landing, image(1))
    landing.landed(first.sha256).unlink()
    assert receive(landing, image(1)).kind == "same"
    assert landing.landed(first.sha256).read_bytes() == image(1)


def test_a_batch_is_as_good_as_one_by_one(landing: Landing, tmp_path: Path) -> None:
    """If this failed, the fast way of a folder import would give other results than the listener."""
    arrivals = [
        Arrival(data=data, site="A", sender="T")
        for data in (
            image(1),
            image(2),
            image(1),
            b"junk" * 99,
            image(2, PixelData=bytes(96)),
            b"junk" * 99,
            image(1, RLELossless),
        )
    ]
    together = landing.receive_many(arrivals)
    other = tmp_path / "other"
    single = open_landing(other)
    apart = [single.receive_many([arrival])[0] for arrival in arrivals]
    kinds = ["new", "new", "same", "quarantined", "conflict", "quarantined", "revision"]
    assert [outcome.kind for outcome in apart] == kinds
    assert together == apart
    assert files(landing.landing) == files(single.landing)
    assert files(landing.quarantine) == files(single.quarantine)
    assert landing.receive_many([]) == []


# Killed at any moment


def _killed_after(home: Path, events: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that kills itself at the n-th file operation; False when it came to its end."""
    child = os.fork()
    if child == 0:
        left = [events]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            touches = event in ("open", "os.rename", "os.remove", "os.mkdir") and str(home) in str(arguments[:1])
            if touches:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_killed_between_any_two_file_operations_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    """If this failed, a power cut at the wrong moment would lose an instance, or leave one that nobody knows of."""
    template = tmp_path / "template"
    open_landing(template).receive(image(1), site="A", sender="T")
    arrivals = [
        Arrival(data=data, site="B", sender="KILLED", relative_path=path)
        for data, path in ((image(2), "two"), (image(1, PixelData=bytes(96)), "clash"), (b"junk" * 99, "junk"))
    ]
    killed = 0
    for moment in range(200):
        home = tmp_path / str(moment)
        shutil.copytree(template, home)
        if not _killed_after(home, moment, lambda home=home: open_landing(home).receive_many(arrivals)):
            break
        killed += 1
        landing = open_landing(home)
        catalog = catalog_of(landing)
        landing.recover()
        on_disk = {*files(landing.landing)}
        assert on_disk == {row.source_sha256 for row in catalog.pending()}, moment
        assert {*files(landing.quarantine)} == {row.source_sha256 for row in catalog.quarantined()}, moment
        assert {row.site for row in catalog.pending() if row.revision == 1} <= {"A", "B"}
        landing.receive_many(arrivals)
        assert len(catalog.pending()) == 2, moment
        two = catalog.current(Pseudonymiser(KEY).uid("1.2.3.2"))
        assert two is not None
        assert (two.site, two.sender, two.file_key) == ("B", "KILLED", Pseudonymiser(KEY).file("two")), moment
        assert sorted(row.reason for row in catalog.quarantined()) == [Reason.NOT_DICOM, Reason.UID_CONFLICT], moment
        assert len(files(landing.landing)) == len(files(landing.quarantine)) == 2, moment
        assert landing.recover().registered == 0
        shutil.rmtree(home)
    assert killed > 20


def _in_child(work: Callable[[Callable[[str], object]], None]) -> tuple[int, int]:
    """Run `work(tell)` in a child process; its id, and where what it tells can be read, a line each."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(lambda line: os.write(writing, line.encode() + b"\n"))
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def _lines(reading: int) -> list[str]:
    with os.fdopen(reading) as stream:
        return [line[:-1] for line in stream if line.endswith("\n")]


def test_killed_at_random_what_was_acknowledged_is_there_once(tmp_path: Path) -> None:
    """If this failed, a killed listener would have answered Success for what is gone."""
    home = tmp_path / "home"
    sent = [image(number) for number in range(80)]
    seeded = random.Random(20261123)
    acknowledged: set[str] = set()

    def work(tell: Callable[[str], object]) -> None:
        landing = open_landing(home)
        landing.recover()
        for data in sent:
            tell(receive(landing, data).sha256)

    for last in (False, False, False, False, True):
        child, reading = _in_child(work)
        if not last:
            time.sleep(seeded.uniform(0.1, 0.5))
            os.kill(child, signal.SIGKILL)
        acknowledged |= set(_lines(reading))
        os.waitpid(child, 0)
        landing = open_landing(home)
        known = [row.source_sha256 for row in catalog_of(landing).pending()]
        assert len(known) == len(set(known))
        assert acknowledged <= set(known)
        for digest in known:
            assert sha(landing.landed(digest).read_bytes()) == digest
    assert len(known) == 80
    assert not list(home.glob("landing/*/.*.tmp"))


def test_recovery_leaves_what_it_does_not_know(landing: Landing) -> None:
    """If this failed, a file copied into landing by hand would get a site that nobody gave it."""
    stray = image(5)
    path = landing.landed(sha(stray))
    path.parent.mkdir(parents=True)
    path.write_bytes(stray)
    recovered = landing.recover()
    assert (recovered.registered, recovered.unknown) == (0, 1)
    assert catalog_of(landing).pending() == []


# A full disk


def _receive_until_full(home: Path, sent: list[bytes], *, largest_file: int | None = None) -> tuple[int, str]:
    """In a process of its own: how many were received, and the first line of the error that ended it."""

    def work(tell: Callable[[str], object]) -> None:
        landing = open_landing(home)
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        for number, data in enumerate(sent):
            try:
                receive(landing, data)
            except StorageFull as error:
                tell(f"{number} {error.what}")
                return

    child, reading = _in_child(work)
    lines = _lines(reading)
    os.waitpid(child, 0)
    assert lines, "the disk was never full"
    count, _, message = lines[0].partition(" ")
    return int(count), message


def _check_after_full(home: Path, stored: int) -> None:
    landing = open_landing(home)
    pending = catalog_of(landing).pending()
    assert len(pending) == stored
    for row in pending:
        assert sha(landing.landed(row.source_sha256).read_bytes()) == row.source_sha256
    assert not list(home.glob("landing/*/.*.tmp"))
    catalog_of(landing).close()
    landing._crosswalk.close()


def test_a_file_too_large_for_the_disk_is_not_half_written(tmp_path: Path) -> None:
    """If this failed, half an image would lie in landing as if it were whole."""
    home = tmp_path / "home"
    big = dataset(2, Rows=1024, Columns=1024)
    big.PixelData = bytes(1024 * 1024 * 2)
    stored, message = _receive_until_full(home, [image(1), encoded(big)], largest_file=1 << 20)
    assert (stored, message) == (1, "no space left to write the landing")
    _check_after_full(home, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 3 MB, where this user may mount one."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", str(where)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small file system; the file size limit above tests the same code")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_loses_nothing_that_was_stored(small_disk: Path) -> None:
    """If this failed, a full disk would damage the catalog or the instances of yesterday."""
    home = small_disk / "home"
    sent = []
    for number in range(40):
        big = dataset(number, Rows=256, Columns=256)
        big.PixelData = np.random.default_rng(number).integers(0, 4096, 65536, dtype=np.uint16).tobytes()
        sent.append(encoded(big))
    stored, message = _receive_until_full(home, sent)
    assert 3 <= stored < 40
    assert message.startswith("no space left to write the ")
    _check_after_full(home, stored)
    landing = open_landing(home)
    for path in list(landing.landing.glob("??/*.dcm"))[:2]:
        path.unlink()  # room again
    assert receive(landing, sent[-1]).kind == "new"
    catalog_of(landing).close()
    landing._crosswalk.close()


def test_every_disk_full_error_is_told_as_such(landing: Landing, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a quota that is used up would look like a bug."""
    for code in (errno.ENOSPC, errno.EDQUOT):

        def full(_handle: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(StorageFull, match="free some space"):
                receive(landing, image(9))
        assert files(landing.landing) == []
        assert catalog_of(landing).pending() == []


# Decisions of a person


def _held(landing: Landing, data: bytes) -> int:
    receive(landing, data, path="a/b")
    return catalog_of(landing).quarantined()[-1].id


def test_a_retry_looks_again_and_leaves_what_is_still_wrong(landing: Landing, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, what an update of radloop can now read would stay outside for ever."""
    from radloop.dicom import landing as module

    def too_strict(_data: bytes) -> object:
        raise DicomError("a fault of this version", reason=Reason.TRUNCATED)

    with monkeypatch.context() as patched:
        patched.setattr(module, "read_header", too_strict)
        held = _held(landing, image(1))
        again = landing.retry(held, by="ada")
        assert (again.kind, again.reason) == ("quarantined", Reason.TRUNCATED)
        assert [row.state for row in catalog_of(landing).quarantined(state=None)] == [QuarantineState.HELD]
    assert receive(landing, image(1)).kind == "quarantined"  # the same bytes are not looked at again by themselves
    outcome = landing.retry(held, by="ada")
    assert outcome.kind == "new"
    assert files(landing.quarantine) == []
    [row] = catalog_of(landing).pending()
    assert (row.site, row.sender, row.file_key) == ("A", "TEST", Pseudonymiser(KEY).file("a/b"))
    [settled] = catalog_of(landing).quarantined(state=None)
    assert (settled.state, settled.by) == (QuarantineState.RETRIED, "ada")
    [ledger_row] = catalog_of(landing).ledger.rows("quarantine")
    assert (ledger_row.actor, ledger_row.payload["outcome"]) == ("ada", "new")
    with pytest.raises(DataError, match="is settled"):
        landing.retry(held, by="ada")
    with pytest.raises(DataError, match="holds no entry 99"):
        landing.retry(99, by="ada")


def test_a_released_conflict_replaces_the_stored_instance_and_flags_what_used_it(landing: Landing) -> None:
    """If this failed, a person could not say which of two pictures is the right one."""
    from radloop.catalog.schema import Member

    stored = receive(landing, image(1))
    patient = catalog_of(landing).pending()[0].patient
    member = Member(sop_uid=stored.sop_uid or "", revision=1, patient=patient, part="test")
    catalog_of(landing).add_dataset("d" * 64, path="d", members=[member], actor="t")
    other = image(1, PixelData=bytes(96))
    outcome = landing.release(_held(landing, other), by="ada")
    assert outcome.kind == "revision"
    [row] = catalog_of(landing).pending()
    assert (row.revision, row.source_sha256) == (2, sha(other))
    assert landing.landed(sha(other)).read_bytes() == other
    assert files(landing.quarantine) == []
    assert catalog_of(landing).dataset("1").flags == {"pixels_replaced": [stored.sop_uid]}
    assert receive(landing, other).kind == "same"


def test_what_has_no_patient_cannot_be_released(landing: Landing) -> None:
    """If this failed, images of nobody in particular would be one patient in the split."""
    held = _held(landing, image(1, PatientID=""))
    with pytest.raises(DataError, match="NO_PATIENT_ID cannot be released"):
        landing.release(held, by="ada")
    assert [row.id for row in catalog_of(landing).quarantined()] == [held]


def test_a_stages_refusal_can_be_released_retried_or_purged(landing: Landing) -> None:
    """If this failed, `radloop quarantine` would work for one kind of entry only."""
    outcomes = [receive(landing, image(number)) for number in (1, 2, 3)]
    refused = [Refused(sop_uid=o.sop_uid or "", revision=1, reason=Reason.SATURATED_IMAGE) for o in outcomes]
    catalog_of(landing).refuse(refused, stage="quality")
    first, second, third = (row.id for row in catalog_of(landing).quarantined())
    landing.release(first, by="ada")
    landing.retry(second, by="ada")
    landing.purge(third, by="ada")
    assert {row.sop_uid for row in catalog_of(landing).pending()} == {outcomes[0].sop_uid, outcomes[1].sop_uid}
    assert not landing.landed(outcomes[2].sha256).exists()
    states = [row.state for row in catalog_of(landing).quarantined(state=None)]
    assert states == [QuarantineState.RELEASED, QuarantineState.RETRIED, QuarantineState.PURGED]
    assert [row.payload["state"] for row in catalog_of(landing).ledger.rows("quarantine")] == states


def test_purged_bytes_are_gone_and_the_row_says_who_did_it(landing: Landing, home: Path) -> None:
    """If this failed, what must be deleted would stay, or its deletion be deniable."""
    held = _held(landing, image(1, PatientID="", PatientName="CANARY"))
    landing.purge(held, by="ada")
    assert files(landing.quarantine) == []
    [row] = catalog_of(landing).quarantined(state=None)
    assert (row.state, row.by) == (QuarantineState.PURGED, "ada")
    assert not any(b"CANARY" in path.read_bytes() for path in home.rglob("*") if path.is_file())
    with pytest.raises(DataError, match="purged by ada"):
        landing.purge(held, by="bob")


# A folder


def test_a_folder_is_received_once_and_again_is_the_same(landing: Landing, tmp_path: Path) -> None:
    """If this failed, a nightly import of one folder would double it, or a killed one could not go on."""
    folder = tmp_path / "in"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / "a.dcm").write_bytes(image(1))
    (folder / "b" / "deep" / "2").write_bytes(image(2))
    (folder / "b" / "copy").write_bytes(image(2))
    (folder / "notes.txt").write_bytes(b"this is no image " * 30)
    (folder / ".DS_Store").write_bytes(b"hidden")
    seen: list[tuple[int, int]] = []
    report = landing.receive_folder(folder, site="A", progress=lambda done, total: seen.append((done, total)))
    assert (report.files, report.outcomes) == (4, {"new": 2, "quarantined": 1, "same": 1})
    assert report.reasons == {"NOT_DICOM": 1}
    assert seen[-1] == (4, 4)
    again = landing.receive_folder(folder, site="A")
    assert again.outcomes == {"quarantined": 1, "same": 3}
    assert len(catalog_of(landing).ledger.rows("ingest")) == 1
    pseudonym = Pseudonymiser(KEY)
    from radloop.catalog import schema

    with catalog_of(landing)._read() as connection:
        pairs = {tuple(row) for row in connection.execute(schema.instance_files.select())}
    assert pairs == {
        (pseudonym.file("a.dcm"), pseudonym.uid("1.2.3.1")),
        (pseudonym.file("b/deep/2"), pseudonym.uid("1.2.3.2")),
        (pseudonym.file("b/copy"), pseudonym.uid("1.2.3.2")),
    }


def test_sub_folders_may_be_sites(landing: Landing, tmp_path: Path) -> None:
    """If this failed, two hospitals' images would be one site in every subgroup table."""
    for name, number in (("north/x", 1), ("north/sub/y", 2), ("south/z", 3)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(image(number))
    landing.receive_folder(tmp_path / "in", site={"north": "N", "north/sub": "NS", "south": "S"})
    assert sorted(row.site for row in catalog_of(landing).pending()) == ["N", "NS", "S"]
    with pytest.raises(DataError, match="belongs to no configured site"):
        landing.receive_folder(tmp_path / "in", site={"north": "N", "sout": "S"})
    landing.receive_folder(tmp_path / "in", site=lambda path: path.split("/")[0])


def test_a_file_name_that_is_no_utf_8_is_no_obstacle(landing: Landing, tmp_path: Path) -> None:
    """If this failed, one file from an old Windows share would stop the import of all."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"M\xfcller")).write_bytes(image(1))
    assert landing.receive_folder(tmp_path / "in", site="A").outcomes == {"new": 1}
    source = landing._crosswalk.get(Identity.SOURCE, sha(image(1)), who="t", why="t")
    assert os.fsencode((source or {})["path"]) == b"M\xfcller"


@pytest.mark.parametrize("accession", ["", "   ", "\0"])
def test_a_blank_accession_number_is_none(landing: Landing, accession: str) -> None:
    """If this failed, unrelated studies would share a label, or an instance be lost for a field that it may leave out."""
    assert receive(landing, image(1, AccessionNumber=accession)).kind == "new"
    assert catalog_of(landing).pending()[0].accession_key is None


def test_an_empty_or_missing_folder_is_an_error(landing: Landing, tmp_path: Path) -> None:
    """If this failed, a mistyped path would end in a run that trains on nothing new and says all is well."""
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match="the input folder is empty"):
        landing.receive_folder(tmp_path / "empty", site="A")
    with pytest.raises(DataError, match="is not there"):
        landing.receive_folder(tmp_path / "nowhere", site="A")


def test_an_unreadable_file_is_named_by_number_only(landing: Landing, tmp_path: Path) -> None:
    """If this failed, the error would carry a file name, and file names carry patients' names."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_bytes(image(1))
    (folder / "CANARY^NAME").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="file 1 of 2: No such file") as caught:
        landing.receive_folder(folder, site="A")
    assert "CANARY" not in str(caught.value)

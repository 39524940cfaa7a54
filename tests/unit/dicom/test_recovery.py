"""After a power cut: what was acknowledged is made again from the files, what was torn goes."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from radloop.catalog.schema import Reason, Recorded
from radloop.catalog.store import Catalog
from radloop.dicom import landed
from radloop.dicom.identity import Crosswalk, Identity
from radloop.dicom.landing import Landing, Mismatch, Received
from radloop.dicom.uids import Pseudonymiser

KEY = bytes(range(32))
CR = "1.2.840.10008.5.1.4.1.1.1"


def open_landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


@pytest.fixture
def landing(home: Path) -> Landing:
    return open_landing(home)


def data_set(number: int = 1, *, implicit: bool = False, **changes: Any) -> bytes:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CR, f"1.2.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.AccessionNumber = "1.2.4.1", "1.2.5.1", "ACC"
    ds.PatientID, ds.PatientName, ds.Modality = "MRN1", "CANARY^NAME", "CR"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 8, 6, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(number).integers(0, 4096, (8, 6), dtype=np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, implicit
    write_dataset(buffer, ds)
    return bytes(buffer.getvalue())


def received(landing: Landing, number: int = 1, *, sop_uid: str = "", site: str = "north", **changes: Any) -> Received:
    """An instance as the listener hands it over."""
    uid, body = sop_uid or f"1.2.3.{number}", data_set(number, **changes)
    head = bytearray(
        landed.header(
            sop_class_uid=CR, sop_uid=uid, transfer_syntax_uid=ExplicitVRLittleEndian, sender="CT_A", site=site
        )
    )
    digest = landed.begin(ExplicitVRLittleEndian)
    digest.update(body)
    sha256 = digest.hexdigest()
    head[landed.seal_at(bytes(head))] = landing.stamp(sha256, site, "CT_A")
    return Received(data=bytes(head) + body, site=site, sender="CT_A", sha256=sha256, sop_class_uid=CR, sop_uid=uid)


def lose_power(landing: Landing, *, catalog: bool = True, crosswalk: bool = True) -> Landing:
    """The databases as they were after the first instance: what came later was never flushed. Files stay."""
    home = landing.home
    landing._catalog.close()
    landing._crosswalk.close()
    for wanted, path in ((catalog, home / "catalog.db"), (crosswalk, home / "identity" / "crosswalk.db")):
        if wanted:
            for old in home.parent.glob(f"{path.name}*.kept"):
                shutil.copy2(old, path.parent / old.name.removesuffix(".kept"))
    return open_landing(home)


@pytest.fixture
def flushed(landing: Landing, home: Path) -> Landing:
    """Return a landing with one instance, whose databases are kept as what a power cut goes back to."""
    assert landing.receive_one(received(landing, 1)).kind == "new"
    for path in (home / "catalog.db", home / "identity" / "crosswalk.db"):
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        shutil.copy2(path, home.parent / f"{path.name}.kept")
        (home.parent / f"{path.name}-wal.kept").write_bytes(b"")
    return landing


def test_identity_is_that_of_syntax_and_data_set(landing: Landing) -> None:
    """If this failed, the same instance by another route would be a revision each time."""
    arrival = received(landing)
    assert landed.identity(arrival.data) == arrival.sha256
    other = bytearray(arrival.data)
    other[:128] = b"x" * 128
    assert landed.identity(other) == arrival.sha256
    assert landed.identity(bytes(arrival.data).replace(b"CT_A", b"CT_B")) == arrival.sha256
    implicit = bytes(arrival.data).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0")
    assert landed.identity(implicit) != arrival.sha256
    assert landed.identity(bytes(arrival.data) + b"\0") != arrival.sha256
    assert landed.identity(data_set(1)) == hashlib.sha256(data_set(1)).hexdigest()


@given(
    sender=st.text(
        st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\"), min_size=1, max_size=16
    ),
    site=st.text(st.characters(min_codepoint=48, max_codepoint=122, categories=("L", "N")), min_size=1, max_size=60),
    syntax=st.sampled_from([ExplicitVRLittleEndian, "1.2.840.10008.1.2.4.90", "1.2.3", "1.2.34"]),
)
def test_a_header_says_whence_its_file_came_and_pydicom_reads_it(sender: str, site: str, syntax: str) -> None:
    """If this failed, an instance could not be registered again after a power cut, or its file not be opened at all."""
    seal = Pseudonymiser(KEY).seal
    head = bytearray(
        landed.header(sop_class_uid=CR, sop_uid="1.2.3", transfer_syntax_uid=syntax, sender=sender, site=site)
    )
    where = landed.seal_at(bytes(head))
    assert bytes(head[where]) == bytes(32)
    body = data_set(1)
    digest = landed.begin(syntax)
    digest.update(body)
    sha256 = digest.hexdigest()
    head[where] = seal(sha256, site, sender)
    data = bytes(head) + body
    assert landed.identity(data) == sha256
    told = landed.came(data, sha256, seal)
    assert told == landed.Came(site=site, sender=sender, sop_class_uid=CR, sop_uid="1.2.3")
    assert landed.came(data, sha256, Pseudonymiser(KEY[::-1]).seal) is None
    assert landed.came(data, "0" * 64, seal) is None
    meta = pydicom.dcmread(BytesIO(data), stop_before_pixels=True, force=True).file_meta
    assert meta.TransferSyntaxUID == syntax
    assert meta.PrivateInformationCreatorUID == landed.IMPLEMENTATION_CLASS_UID


@given(st.binary(max_size=300), st.integers(0, 400), st.binary(max_size=6))
def test_identity_and_origin_of_any_bytes_are_told_without_an_error(tail: bytes, cut: int, patch: bytes) -> None:
    """If this failed, a broken file would stop the recovery of all others."""
    head = landed.header(sop_class_uid=CR, sop_uid="1.2.3", transfer_syntax_uid="1.2", sender="A", site="s")
    data = bytearray(head + tail)
    data[132 + cut % 200 : 132 + cut % 200 + len(patch)] = patch
    for some in (bytes(data), bytes(data[:cut]), tail):
        assert len(landed.identity(some)) == 64
        assert landed.came(some, landed.identity(some), Pseudonymiser(KEY).seal) is None


@pytest.mark.parametrize(("catalog", "crosswalk"), [(True, True), (True, False), (False, True)])
def test_a_power_cut_may_take_the_databases_last_commits(flushed: Landing, catalog: bool, crosswalk: bool) -> None:
    """If this failed, an instance that the modality has deleted would be in no catalog, or nobody know whose it is."""
    assert flushed.receive_one(received(flushed, 2)).kind == "new"
    assert flushed.receive_one(received(flushed, 3, PatientID="MRN2", IssuerOfPatientID="REGION")).kind == "new"
    before = {row.sop_uid: (row.patient, row.site, row.sender) for row in flushed._catalog.pending()}
    landing = lose_power(flushed, catalog=catalog, crosswalk=crosswalk)
    assert len(landing._catalog.pending()) == (1 if catalog else 3)
    assert landing.recover().registered == 2
    assert {row.sop_uid: (row.patient, row.site, row.sender) for row in landing._catalog.pending()} == before
    for uid, (patient, _, _) in before.items():
        assert landing._crosswalk.get(Identity.INSTANCE, uid, who="t", why="t") is not None
        assert landing._crosswalk.get(Identity.PATIENT, patient, who="t", why="t") is not None
    assert landing.recover().registered == 0
    assert landing.receive_one(received(landing, 2)).kind == "same"


def test_after_a_power_cut_the_later_revision_wins_again(flushed: Landing) -> None:
    """If this failed, a correction that the PACS sent would be undone by a power cut."""
    first = flushed.receive_one(received(flushed, 2))
    for name in ("A", "B", "C"):
        assert flushed.receive_one(received(flushed, 2, PatientName=f"Corrected^{name}")).kind == "revision"
    last = flushed._catalog.current(first.sop_uid or "")
    assert last is not None
    landing = lose_power(flushed)
    for moment, path in enumerate(sorted(landing.landing.glob("??/*.dcm"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(moment * 10**9, moment * 10**9))
    assert landing.recover().registered == 4
    again = landing._catalog.current(first.sop_uid or "")
    assert again is not None
    assert (again.revision, again.source_sha256) == (4, last.source_sha256)


@pytest.mark.parametrize("tear", ["zeros", "short", "empty", "head"])
def test_a_file_that_a_power_cut_tore_goes(flushed: Landing, tear: str) -> None:
    """If this failed, half an image would be registered, or lie in landing for ever."""
    outcome = flushed.receive_one(received(flushed, 2))
    landing = lose_power(flushed)
    path = landing.landed(outcome.sha256)
    data = path.read_bytes()
    torn = {
        "zeros": data[:600] + bytes(len(data) - 600),
        "short": data[:-9],
        "empty": b"",
        "head": bytes(512) + data[512:],
    }
    path.write_bytes(torn[tear])
    recovered = landing.recover()
    assert (recovered.removed, recovered.registered, recovered.unknown) == (1, 0, 0)
    assert not path.exists()
    assert landing.receive_one(received(landing, 2)).kind == "new"


def test_a_file_that_is_torn_is_written_anew_when_it_comes_again(flushed: Landing) -> None:
    """If this failed, a torn file would be acknowledged because its name was there."""
    arrival = received(flushed, 2)
    path = flushed.landed(arrival.sha256)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(arrival.data)[:-20])
    assert flushed.receive_one(arrival).kind == "new"
    assert path.read_bytes() == arrival.data
    path.write_bytes(b"")
    assert (
        flushed.receive(arrival.data, site="north", sender="folder").kind == "same"
    )  # known; whole when it was recorded


def test_what_was_refused_or_not_as_announced_is_not_left_in_landing(flushed: Landing) -> None:
    """If this failed, each start would find the same files again and wonder."""
    with pytest.raises(Mismatch, match="another SOP instance"):
        flushed.receive_one(received(flushed, 2, sop_uid="1.2.3.9"))
    refused = received(flushed, 3, PatientID="")
    assert flushed.receive_one(refused).reason is Reason.NO_PATIENT_ID
    # As a power cut or a kill between file and catalog would leave them.
    wrong = received(flushed, 2, sop_uid="1.2.3.9")
    for arrival in (wrong, received(flushed, 4, PatientID="")):
        path = flushed.landed(arrival.sha256)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(arrival.data)
    recovered = flushed.recover()
    assert (recovered.registered, recovered.removed) == (1, 1)
    assert len(list(flushed.landing.glob("??/*.dcm"))) == 1
    assert len(flushed._catalog.quarantined()) == 2
    assert flushed.recover().registered == 0


def test_a_file_with_a_forged_origin_is_not_believed(flushed: Landing) -> None:
    """If this failed, whoever can write into landing could give images the site he likes."""
    forged = received(flushed, 5)
    data = bytes(forged.data).replace(b"north", b"south")
    path = flushed.landed(forged.sha256)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert flushed.recover().unknown == 1
    assert path.exists()


# The catalog's quick way


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Catalog, Catalog]]:
    """Return two catalogs: one that is asked the quick way, one through SQLAlchemy."""
    quick, plain = (Catalog(f"sqlite:///{tmp_path}/{name}.db") for name in ("quick", "plain"))
    plain._direct = None
    yield quick, plain
    quick.close()
    plain.close()


def test_the_quick_way_into_the_catalog_and_sqlalchemys_agree(landing: Landing, both: tuple[Catalog, Catalog]) -> None:
    """If this failed, the listener and a folder import would not see the same catalog."""
    from radloop.catalog.schema import InstanceRow

    def row(number: int, sha: str, file_key: str | None = None) -> InstanceRow:
        return InstanceRow(
            sop_uid=f"2.25.{number}",
            study_uid="2.25.7",
            series_uid="2.25.8",
            patient="P1",
            key_id="k",
            site="north",
            sender="CT_A",
            sop_class_uid=CR,
            transfer_syntax_uid=str(ImplicitVRLittleEndian),
            source_sha256=sha,
            source_bytes=9,
            accession_key="A1" if number % 2 else None,
            file_key=file_key,
            modality="CR",
        )

    batches = [
        [row(1, "a", "f1"), row(2, "b"), row(1, "a", "f2"), row(1, "c")],
        [row(2, "b", "f1"), row(3, "d"), row(3, "e", "f3"), row(4, "a")],
        [],
    ]
    seen = []
    for catalog in both:
        verdicts = [catalog.record_new(batch) for batch in batches]
        assert verdicts[0] == [Recorded.NEW, Recorded.NEW, Recorded.SAME, None]
        assert verdicts[1] == [Recorded.SAME, Recorded.NEW, None, Recorded.SAME]
        asked = [catalog.unseen(sha, "k") for sha in "abcde"]
        catalog.quarantine(stage="landing", reason=Reason.NOT_DICOM, detail="x", source_sha256="q")
        assert not catalog.unseen("q", "k")
        assert catalog.unseen("a", "another key")
        with catalog._read() as connection:
            tables = [
                sorted(map(repr, connection.exec_driver_sql(f"SELECT {columns} FROM {table}").fetchall()))
                for table, columns in (
                    ("instance_files", "*"),
                    (
                        "instances",
                        "id, sop_uid, revision, patient, accession_key, file_key, source_sha256, status, tags, batch",
                    ),
                )
            ]
        seen.append((verdicts, asked, tables, [str(instance) for instance in catalog.digests("abz", "k").items()]))
    assert seen[0] == seen[1]

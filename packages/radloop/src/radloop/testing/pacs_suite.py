"""The conformance suite of `radloop.dicom.pacs.Pacs`: a PACS that radloop finds and fetches from passes it.

A new adapter, or a PACS never tried before, is one class:

    class TestMyPacs(PacsSuite):
        @pytest.fixture(scope="class")
        @classmethod
        def peer(cls, tmp_path_factory):
            with MyPeer(tmp_path_factory.mktemp("my")) as running:
                yield running

Instances are random images. Every file that comes is compared with what was given to the PACS: its data set, byte for byte.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landed import Buffer
from radloop.dicom.landing import Landing
from radloop.dicom.pacs import InstanceFound, Pacs, PacsError, PacsUnavailable, Patience, Query
from radloop.dicom.pacs.fetch import Report, Target, fetch, fetch_new
from radloop.dicom.uids import Pseudonymiser

KEY = bytes(range(32))
SITE, NAME = "site-a", "main"
QUICK = Patience(tries=2, first_s=0.1, longest_s=0.5)
ROOT = "1.2.826.0.1.3680043.9.9999"
_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "DX": DigitalXRayImageStorageForPresentation}
_BOUND_S = 30.0


class Peer(Protocol):
    """A PACS of the suite: started, stopped, given instances; and adapters that talk to it."""

    def pacs(self, **changes: Any) -> Pacs:
        """An adapter, of the name `main`."""

    def stranger(self) -> Pacs:
        """One whom the PACS must refuse: a wrong AE title, a wrong password."""

    def toml(self) -> str:
        """The section [pacs.main] of a project."""

    def store(self, files: Sequence[Path]) -> None:
        """Give it instances."""

    def kill(self) -> None:
        """End it as a power failure would."""

    def start(self) -> None:
        """Start it again, where it was, with what it had."""


class Archive:
    """What the suite gave to the PACS: files by SOPInstanceUID."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.peer, self.folder = peer, folder
        self.files: dict[str, Path] = {}

    def add(self, study: str, count: int, *, series: int = 1, first: int = 1, **how: Any) -> list[str]:
        """Store instances; their SOPInstanceUIDs. `study` is a number; see `instance` for the rest."""
        made = {}
        for number in range(first, first + count):
            for one in range(1, series + 1):
                ds = instance(study, one, number, **how)
                path = self.folder / f"{ds.SOPInstanceUID}.dcm"
                ds.save_as(path, enforce_file_format=True)
                made[str(ds.SOPInstanceUID)] = path
        self.peer.store(list(made.values()))
        self.files |= made
        return list(made)

    def check(self, received: Sequence[Buffer], wanted: Sequence[str]) -> None:
        """Each wanted instance came once, as it was stored."""
        found = [dcmread(BytesIO(data)) for data in received]
        assert sorted(str(ds.SOPInstanceUID) for ds in found) == sorted(wanted)
        for ds in found:
            stored = dcmread(self.files[str(ds.SOPInstanceUID)])
            assert ds.file_meta.TransferSyntaxUID == stored.file_meta.TransferSyntaxUID
            assert ds.PixelData == stored.PixelData
            assert ds == stored


def instance(
    study: str,
    series: int,
    number: int,
    *,
    modality: str = "CT",
    day: str = "20260105",
    description: str = "CT Thorax nativ",
    patient: str = "MRN-A",
    name: str = "Muster^Max",
    charset: str = "ISO_IR 100",
    side: int = 64,
    compressed: bool = False,
    sop_class: str = "",
) -> Dataset:
    """A random image; UIDs are made of its numbers."""
    ds = Dataset()
    ds.SpecificCharacterSet = charset
    ds.SOPClassUID = sop_class or _CLASSES[modality]
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.{study}", f"{ROOT}.{study}.{series}"
    ds.SOPInstanceUID = f"{ROOT}.{study}.{series}.{number}"
    ds.PatientID, ds.PatientName, ds.AccessionNumber = patient, name, f"ACC{study}"
    ds.StudyDate, ds.StudyTime, ds.StudyDescription, ds.Modality = day, "101112", description, modality
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = study, series, number
    ds.Rows = ds.Columns = side
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    rng = np.random.default_rng([int(study), series, number])
    ds.PixelData = rng.integers(0, 4096, (side, side), np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    if compressed:
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    return ds


def open_target(home: Path, *, per_s: float = 0.0, hours: str = "") -> Target:
    """A landing zone with its catalog, as a project has one."""
    home.mkdir(mode=0o700, exist_ok=True)
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    pseudonymiser = Pseudonymiser(KEY)
    landing = Landing(home, catalog, pseudonymiser, Crosswalk(home / "identity/crosswalk.db", KEY, catalog.ledger))
    landing.recover()
    return Target(landing, catalog, pseudonymiser, SITE, per_s=per_s, hours=hours)


def landed(target: Target) -> list[bytes]:
    """The bytes of every instance that awaits de-identification."""
    return [target.landing.landed(row.source_sha256).read_bytes() for row in target.catalog.pending()]


class PacsSuite:
    """Subclass it with a fixture `peer` (scope class); a class attribute says what a PACS cannot do."""

    compresses = True
    """Whether it keeps and sends JPEG 2000."""

    @pytest.fixture(scope="class")
    @classmethod
    def peer(cls) -> Iterator[Peer]:
        """The PACS."""
        raise NotImplementedError("a conformance suite needs a PACS")

    @pytest.fixture(scope="class")
    @classmethod
    def archive(cls, peer: Peer, tmp_path_factory: pytest.TempPathFactory) -> Archive:
        """Three studies that are there from the start: 101, 102, 103."""
        archive = Archive(peer, tmp_path_factory.mktemp("given"))
        archive.add("101", 4, series=2, name="Müller^Jörg")
        archive.add("102", 1, modality="DX", day="20260210", description="Röntgen Füße", patient="MRN-B",
                    name="Yamada^Tarou=山田^太郎", charset="ISO_IR 192")  # fmt: skip
        archive.add("103", 3, modality="MR", day="20260315", description="MR Kopf", patient="MRN-C")
        return archive

    @pytest.fixture
    def pacs(self, peer: Peer, archive: Archive) -> Iterator[Pacs]:
        """An adapter."""
        with peer.pacs(patience=QUICK) as found:
            yield found

    @pytest.fixture
    def target(self, tmp_path: Path) -> Target:
        """An empty landing zone."""
        return open_target(tmp_path / "home")

    # Whether it is there

    def test_echo(self, pacs: Pacs) -> None:
        """Whoever sets up a PACS asks this first."""
        pacs.echo()
        pacs.echo()

    def test_a_stranger_is_refused_and_told_why(self, peer: Peer, archive: Archive) -> None:
        """A wrong AE title or password must not look like an empty PACS, nor be tried for minutes."""
        begun = time.monotonic()
        with peer.stranger() as stranger:
            with pytest.raises(PacsError, match="next: ") as told:
                list(stranger.find(Query()))
            assert not isinstance(told.value, PacsUnavailable)
        assert time.monotonic() - begun < _BOUND_S

    def test_a_dead_pacs_is_an_error_within_bounds(self, peer: Peer, archive: Archive) -> None:
        """A night without the PACS must end in a message, not in a run that hangs until the morning."""
        with peer.pacs(patience=QUICK) as pacs:
            peer.kill()
            try:
                begun = time.monotonic()
                with pytest.raises(PacsUnavailable, match="main"):
                    pacs.echo()
                with pytest.raises(PacsUnavailable, match="main"):
                    list(pacs.find(Query()))
                assert time.monotonic() - begun < _BOUND_S
            finally:
                peer.start()
            pacs.echo()

    # Finding

    @pytest.mark.parametrize(
        ("query", "studies"),
        [
            (Query(modalities=("CT",)), "101"),
            (Query(modalities=("MR", "DX")), "102 103"),
            (Query(begin=date(2026, 2, 10)), "102 103"),
            (Query(begin=date(2026, 1, 6), end=date(2026, 2, 10)), "102"),
            (Query(end=date(2026, 1, 5)), "101"),
            (Query(description="*thorax*"), "101"),
            (Query(description="?r kopf"), "103"),
            (Query(description="*füße"), "102"),
            (Query(accessions=("ACC103", "ACC101", "ACC-none")), "101 103"),
            (Query(patient_ids=("MRN-B",)), "102"),
            (Query(patient_ids=("MRN-A", "MRN-C"), begin=date(2026, 3, 1)), "103"),
            (Query(study_uids=(f"{ROOT}.103", f"{ROOT}.102")), "102 103"),
            (Query(modalities=("CT",), accessions=("ACC101", "ACC102")), "101"),
            (Query(modalities=("US",)), ""),
            (Query(accessions=("ACC-none",)), ""),
            (Query(begin=date(2030, 1, 1)), ""),
        ],
    )
    def test_find(self, pacs: Pacs, query: Query, studies: str) -> None:
        """A study too many is a patient who never agreed; a study too few is a gap nobody sees."""
        query = msgspec.structs.replace(query, begin=query.begin or date(2026, 1, 1))  # the other tests' are older
        found = list(pacs.find(query))
        assert sorted(study.study_uid for study in found) == [f"{ROOT}.{number}" for number in studies.split()]

    def test_what_is_found_of_a_study(self, pacs: Pacs) -> None:
        """The list a person chooses from: names in their own script, dates, modalities."""
        (ct,) = pacs.find(Query(accessions=("ACC101",)))
        assert (ct.study_date, ct.accession, ct.patient_id) == ("20260105", "ACC101", "MRN-A")
        assert ct.patient_name == "Müller^Jörg"
        assert ct.description == "CT Thorax nativ"
        (dx,) = pacs.find(Query(accessions=("ACC102",)))
        assert "Yamada^Tarou" in dx.patient_name
        assert dx.description == "Röntgen Füße"
        assert ct.instances in (8, None)
        assert "ller" not in repr(ct)
        assert "ACC" not in repr(Query(accessions=("ACC101",)))

    def test_a_cut_list_is_made_whole(self, peer: Peer, archive: Archive) -> None:
        """Many PACS cut a long list: the studies behind the cut would never be trained on."""
        for number in range(40):
            archive.add(f"{200 + number}", 1, day=f"2024{1 + number // 20:02}{1 + number % 5:02}", side=8)
        with peer.pacs(patience=QUICK, cut_at=15) as pacs:
            found = [study.study_uid for study in pacs.find(Query(begin=date(2024, 1, 1), end=date(2024, 12, 31)))]
        assert sorted(found) == [f"{ROOT}.{200 + number}" for number in range(40)]

    def test_series_instances_count(self, pacs: Pacs) -> None:
        """What is compared with what came: a wrong count hides a gap."""
        study = f"{ROOT}.101"
        assert sorted(one.series_uid for one in pacs.series(study)) == [f"{study}.1", f"{study}.2"]
        assert len(pacs.instances(study)) == 8
        assert {one.sop_uid for one in pacs.instances(study, f"{study}.2")} == {f"{study}.2.{n}" for n in range(1, 5)}
        assert {one.series_uid for one in pacs.instances(study, f"{study}.2")} == {f"{study}.2"}
        assert pacs.count(study) == 8
        assert pacs.count(f"{ROOT}.999") is None

    def test_many_searches_in_a_row(self, pacs: Pacs) -> None:
        """One answer lost in thousands is a study lost."""
        wanted = ("ACC101", "ACC102", "ACC103")
        for _ in range(40):
            assert len(list(pacs.find(Query(accessions=wanted)))) == 3

    # Retrieving

    def test_retrieve_study_series_instances(self, pacs: Pacs, archive: Archive) -> None:
        """What comes is what the PACS keeps, to the byte."""
        study = f"{ROOT}.101"
        for series, instances, wanted in (
            (None, None, [uid for uid in archive.files if uid.startswith(f"{study}.")]),
            (f"{study}.2", None, [uid for uid in archive.files if uid.startswith(f"{study}.2.")]),
            (None, [InstanceFound(sop_uid=f"{study}.{s}.3", series_uid=f"{study}.{s}") for s in (1, 2)],
             [f"{study}.1.3", f"{study}.2.3"]),
        ):  # fmt: skip
            came: list[Buffer] = []
            done = pacs.fetch(study, came.append, series_uid=series, instances=instances)
            assert (done.received, done.failed) == (len(wanted), 0)
            archive.check(came, wanted)

    def test_a_sink_that_fails_ends_it(self, pacs: Pacs, archive: Archive) -> None:
        """A full disk must stop the transfer and be told, not be taken for a failure of the PACS."""

        def full(_: Buffer) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            pacs.fetch(f"{ROOT}.101", full)

    def test_send(self, pacs: Pacs, archive: Archive, tmp_path: Path) -> None:
        """Results go back to where radiologists look."""
        ds = instance("104", 1, 1, day="20250104", sop_class=SecondaryCaptureImageStorage)
        ds.save_as(tmp_path / "result.dcm", enforce_file_format=True)
        (sent,) = pacs.send([tmp_path / "result.dcm"])
        assert sent.stored, sent
        archive.files[str(ds.SOPInstanceUID)] = tmp_path / "result.dcm"
        came: list[Buffer] = []
        pacs.fetch(str(ds.StudyInstanceUID), came.append)
        archive.check(came, [str(ds.SOPInstanceUID)])

    # Fetching into the landing zone

    def test_fetched_is_durable_and_catalogued(self, pacs: Pacs, archive: Archive, target: Target) -> None:
        """The loop sees a fetched study as it sees one that was sent; its completeness is known at once."""
        report = fetch(pacs, Query(accessions=("ACC101", "ACC102")), target, actor="test")
        assert (report.found, report.fetched, report.received, report.missing) == (2, 2, 9, 0)
        assert report.outcomes == {"new": 9}
        archive.check(
            landed(target), [uid for uid in archive.files if uid.startswith((f"{ROOT}.101.", f"{ROOT}.102."))]
        )
        rows = target.catalog.pending()
        assert {(row.site, row.sender) for row in rows} == {(SITE, NAME)}
        assert {state.expected for state in target.catalog.unreleased()} == {8, 1}
        audits = [row for row in target.catalog.ledger.rows("audit") if row.payload["action"] == "pacs fetch"]
        assert [row.actor for row in audits] == ["test"]
        assert "ACC101" not in str(audits)

    def test_compressed_stays_compressed(self, pacs: Pacs, archive: Archive, target: Target) -> None:
        """A PACS that decompresses on the way costs five times the network, and hides that an image was lossy."""
        if not self.compresses:
            pytest.skip("this PACS keeps no JPEG 2000")
        archive.add("105", 2, day="20250105")
        archive.add("105", 2, first=3, day="20250105", compressed=True)
        report = fetch(pacs, Query(accessions=("ACC105",)), target, actor="test")
        assert report.received == 4, report
        assert report.missing == 0
        archive.check(landed(target), [uid for uid in archive.files if uid.startswith(f"{ROOT}.105.")])

    def test_again_fetches_nothing_and_growth_only_what_is_new(
        self, pacs: Pacs, archive: Archive, target: Target
    ) -> None:
        """A nightly run must not load a clinical PACS with what it gave already, nor miss what came since."""
        query = Query(accessions=("ACC106",))
        archive.add("106", 3, series=2, day="20250106")
        assert fetch(pacs, query, target, actor="test").received == 6
        again = fetch(pacs, query, target, actor="test")
        assert (again.received, again.unchanged, again.fetched) == (0, 1, 0)
        archive.add("106", 2, first=4, day="20250106")
        grown = fetch(pacs, query, target, actor="test")
        assert (grown.received, grown.fetched, grown.outcomes) == (2, 1, {"new": 2})
        archive.check(landed(target), [uid for uid in archive.files if uid.startswith(f"{ROOT}.106.")])

    def test_what_was_sent_before_is_not_fetched(self, pacs: Pacs, archive: Archive, target: Target) -> None:
        """Modalities send to radloop and to the PACS: nothing crosses the network twice."""
        uids = archive.add("107", 4, day="20250107")
        for uid in uids[:3]:
            target.landing.receive(archive.files[uid], site=SITE, sender="CT1")
        report = fetch(pacs, Query(accessions=("ACC107",)), target, actor="test")
        assert report.received == 1
        assert len(target.catalog.pending()) == 4

    def test_quarantined_is_not_fetched_again(self, pacs: Pacs, archive: Archive, target: Target) -> None:
        """A study of a patient without an identifier is refused once, not every night."""
        archive.add("108", 2, day="20250108", patient="UNKNOWN")
        first = fetch(pacs, Query(study_uids=(f"{ROOT}.108",)), target, actor="test")
        assert first.reasons == {"NO_PATIENT_ID": 2}
        assert fetch(pacs, Query(study_uids=(f"{ROOT}.108",)), target, actor="test").received == 0

    def test_limit_leaves_the_rest_for_later(self, pacs: Pacs, archive: Archive, target: Target) -> None:
        """A first try fetches a few; the next goes on after them."""
        query = Query(begin=date(2026, 1, 1))
        first = fetch(pacs, query, target, actor="test", limit=2)
        assert (first.fetched, first.left) == (2, 1)
        assert not first.whole
        second = fetch(pacs, query, target, actor="test", limit=2)
        assert (second.fetched, second.unchanged, second.left) == (1, 2, 0)

    def test_new_since_the_last_run(self, pacs: Pacs, archive: Archive, target: Target) -> None:
        """After a run that left nothing open, older dates need not be listed again."""
        query = Query(begin=date(2026, 1, 1), modalities=("CT", "MR", "DX"))
        first = fetch_new(pacs, query, target, overlap_days=7, actor="test")
        assert first.fetched == 3
        assert fetch_new(pacs, query, target, overlap_days=7, actor="test").found == 0
        wider = msgspec.structs.replace(query, begin=date(2025, 12, 1))
        assert fetch_new(pacs, wider, target, overlap_days=7, actor="test").unchanged == 3

    def test_outside_its_hours_nothing_is_fetched(self, pacs: Pacs, archive: Archive, tmp_path: Path) -> None:
        """By day the PACS belongs to the radiologists."""
        now = time.localtime().tm_hour
        closed = open_target(tmp_path / "closed", hours=f"{(now + 2) % 24:02}:00-{(now + 3) % 24:02}:00")
        report = fetch(pacs, Query(accessions=("ACC101",)), closed, actor="test")
        assert (report.left, report.received, report.closed) == (1, 0, True)

    def test_not_faster_than_allowed(self, pacs: Pacs, archive: Archive, tmp_path: Path) -> None:
        """A limit that does not hold stops a hospital's reading room."""
        slow = open_target(tmp_path / "slow", per_s=10)
        begun = time.monotonic()
        assert fetch(pacs, Query(accessions=("ACC101", "ACC103")), slow, actor="test").received == 11
        assert 1.0 <= time.monotonic() - begun < _BOUND_S

    def test_a_pacs_that_dies_on_the_way(self, peer: Peer, archive: Archive, target: Target) -> None:
        """Half a study must stay, and the other half come the next time: nothing lost, nothing twice."""
        # Larger than what the network holds, and paced: else a short answer is here before the PACS dies.
        uids = archive.add("109", 150, day="20250109", side=384)
        query = Query(accessions=("ACC109",))
        target = msgspec.structs.replace(target, per_s=150.0)
        died = threading.Event()

        def kill_after_some(done: int, total: int) -> None:
            if done >= 64 and not died.is_set():
                died.set()
                peer.kill()

        try:
            with peer.pacs(patience=QUICK) as pacs, pytest.raises(PacsUnavailable, match="main"):
                fetch(pacs, query, target, actor="test", progress=kill_after_some)
        finally:
            peer.start()
        had = len(target.catalog.pending())
        assert 64 <= had < 150
        with peer.pacs(patience=QUICK) as pacs:
            report = fetch(pacs, query, target, actor="test")
        assert (report.received, report.outcomes) == (150 - had, {"new": 150 - had})
        archive.check(landed(target), uids)

    def test_a_pacs_that_comes_back(self, peer: Peer, archive: Archive, target: Target) -> None:
        """A PACS that restarts at night costs some tries, not the night."""
        uids = archive.add("110", 150, day="20250110", side=384)
        target = msgspec.structs.replace(target, per_s=150.0)
        restarted = threading.Event()

        def restart_after_some(done: int, total: int) -> None:
            if done >= 64 and not restarted.is_set():
                restarted.set()
                peer.kill()
                peer.start()

        with peer.pacs(patience=Patience(tries=9, first_s=0.2)) as pacs:
            report = fetch(pacs, Query(accessions=("ACC110",)), target, actor="test", progress=restart_after_some)
        assert restarted.is_set()
        assert report.missing == 0
        archive.check(landed(target), uids)

    def test_killed_on_the_way(self, peer: Peer, archive: Archive, tmp_path: Path) -> None:
        """SIGKILL, a power cut, an upgrade: the same command again goes on, and doubles nothing."""
        from radloop.stages.project import open_catalog, open_landing

        uids = archive.add("111", 120, day="20250111", side=16)
        project = tmp_path / "project"
        subprocess.run([sys.executable, "-m", "radloop.cli", "init", str(project)], check=True, capture_output=True)
        (project / "radloop.toml").write_text(f'{peer.toml()}site = "{SITE}"\nmax_instances_per_s = 60\n')
        (project / "pacs.password").touch(0o600)
        (project / "pacs.password").write_text(getattr(peer, "password", "none"))
        command = [sys.executable, "-m", "radloop.cli", "pacs", "fetch", NAME, "--accessions", "ACC111", "--json"]
        with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 2 * _BOUND_S
            with open_catalog(project) as catalog:
                while not catalog.pending() and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                process.wait()
                had = len(catalog.pending())
        assert 0 < had < 120
        done = subprocess.run(
            command, cwd=project, capture_output=True, check=False, timeout=4 * _BOUND_S, env=os.environ
        )
        assert done.returncode == 0, done.stderr
        report = msgspec.json.decode(done.stdout, type=Report)
        assert report.outcomes == {"new": 120 - had}
        assert b"ACC111" not in done.stdout + done.stderr
        with open_catalog(project) as catalog:
            rows = catalog.pending()
            assert Counter(row.revision for row in rows) == {1: 120}
            landing = open_landing(project, catalog)
            archive.check([landing.landed(row.source_sha256).read_bytes() for row in rows], uids)

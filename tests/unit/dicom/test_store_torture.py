"""Killed, aborted, all at once: what was acknowledged is there, once, and the counts are exact."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from radloop.catalog.store import Catalog
from radloop.dicom import landed
from radloop.dicom.identity import Crosswalk, Identity
from radloop.dicom.landing import Landing
from radloop.dicom.listener import Listener
from radloop.dicom.uids import Pseudonymiser
from radloop.testing.sender import Aborted, Sender

KEY = bytes(range(32))
CR = "1.2.840.10008.5.1.4.1.1.1"
SITES = {"CT_A": "north", "CR_B": "south"}
CONTEXTS = [(CR, str(ExplicitVRLittleEndian))]
SIDE = 64


def open_landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


class Instances:
    """As many different instances as are asked for; safe for several threads."""

    def __init__(self, seed: int) -> None:
        self._noise = np.random.default_rng(seed).integers(0, 4096, SIDE * SIDE * 2, dtype=np.uint16)
        self._numbers = count()

    def next(self) -> tuple[str, bytes]:
        """SOPInstanceUID and data set of the next one."""
        number = next(self._numbers)
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CR, f"1.2.3.{number}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.4.{number // 50}", f"1.2.5.{number // 50}"
        ds.PatientID, ds.Modality = f"MRN{number // 100}", "CR"
        ds.Rows = ds.Columns = SIDE
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = self._noise[number % 4096 : number % 4096 + SIDE * SIDE].tobytes()
        ds["PixelData"].VR = "OW"
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_dataset(buffer, ds)
        return f"1.2.3.{number}", bytes(buffer.getvalue())


def digest(data: bytes) -> str:
    sha256 = landed.begin(str(ExplicitVRLittleEndian))
    sha256.update(data)
    return sha256.hexdigest()


def pieces(data: bytes) -> Iterator[bytes]:
    return (data[start : start + 3000] for start in range(0, len(data), 3000))


def check(home: Path, acknowledged: dict[str, str], *, all_of: int | None = None) -> int:
    """Everything acknowledged (SOPInstanceUID -> identity) is in the catalog, once, its file whole, its names known."""
    landing = open_landing(home)
    landing.recover()
    rows = landing._catalog.pending()
    by_uid = {row.sop_uid: row for row in rows}
    assert len(by_uid) == len(rows)
    assert {row.revision for row in rows} <= {1}
    names = landing._crosswalk.get_many(Identity.INSTANCE, by_uid, who="test", why="test")
    originals = {values["SOPInstanceUID"]: by_uid[uid] for uid, values in names.items()}
    assert len(originals) == len(rows)
    for uid, sha256 in acknowledged.items():
        assert originals[uid].source_sha256 == sha256
    files = {path.stem: path for path in landing.landing.glob("??/*.dcm")}
    assert set(files) == {row.source_sha256 for row in rows}
    for sha256, path in files.items():
        assert landed.identity(path.read_bytes()) == sha256
    assert not list(landing.landing.glob("??/.*"))
    assert landing._catalog.quarantined() == []
    landing._catalog.close()
    landing._crosswalk.close()
    return len(rows)


def serve(home: Path) -> tuple[int, int]:
    """A listener in a process of its own: its id and port."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            landing = open_landing(home)
            landing.recover()
            port = Listener(landing, ae_title="RADLOOP", sites=SITES).start()
            os.write(writing, b"%d\n" % port)
            threading.Event().wait()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return child, int(stream.readline())


def send_until_cut(port: int, instances: Instances, acknowledged: dict[str, str]) -> None:
    try:
        with Sender(port, CONTEXTS, timeout_s=20) as peer:
            while True:
                uid, data = instances.next()
                if peer.store(CR, uid, pieces(data)) == 0:
                    acknowledged[uid] = digest(data)
    except (OSError, Aborted):
        return


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.torture)])
def test_killed_under_load_every_acknowledged_instance_is_there_once(home: Path, kills: int) -> None:
    """If this failed, images that a modality has deleted, trusting Success, would be gone for good, or count twice."""
    seeded, instances = random.Random(1511), Instances(1511)
    acknowledged: dict[str, str] = {}
    for number in range(kills):
        child, port = serve(home)
        threads = [threading.Thread(target=send_until_cut, args=(port, instances, acknowledged)) for _ in range(4)]
        try:
            for thread in threads:
                thread.start()
            time.sleep(seeded.uniform(0.02, 0.6))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for thread in threads:
            thread.join(timeout=60)
        if number % 10 == 0 or number == kills - 1:
            check(home, acknowledged)
    assert len(acknowledged) > 4 * kills


class Told:
    """What the senders know: acknowledged, sent to the end without waiting, associations released and aborted."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, str] = {}
        self.sent: dict[str, str] = {}
        self.released = self.aborted = 0
        self.errors: list[BaseException] = []


def send_and_abort(port: int, seed: int, instances: Instances, told: Told, until: float) -> None:
    seeded = random.Random(seed)
    try:
        while time.monotonic() < until:
            peer = Sender(port, CONTEXTS, calling=seeded.choice(list(SITES)), timeout_s=60)
            for _ in range(seeded.randint(0, 12)):
                uid, data = instances.next()
                assert peer.store(CR, uid, pieces(data)) == 0
                told.acknowledged[uid] = told.sent[uid] = digest(data)
            if seeded.random() < 0.4:
                peer.release()
                peer.socket.close()
                told.released += 1
                continue
            _cut(peer, seeded, instances, told)
            told.aborted += 1
    except BaseException as error:  # the test looks at it
        told.errors.append(error)


def _cut(peer: Sender, seeded: random.Random, instances: Instances, told: Told) -> None:
    """End an association somewhere in an instance: after the command, in the data, or before the answer."""
    uid, data = instances.next()
    where = seeded.choice(["idle", "command", "data", "answer"])
    if where != "idle":
        peer.announce(CR, uid)
    if where == "data":
        peer.fragment(data[: seeded.randint(1, len(data) - 1)], 1, 0)
    if where == "answer":
        told.sent[uid] = digest(data)
        peer.fragment(data, 1, 2)
    peer.abort() if seeded.random() < 0.5 else peer.socket.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [15, pytest.param(300, marks=pytest.mark.torture)])
def test_eight_associations_with_random_aborts_are_counted_exactly(home: Path, seconds: int) -> None:
    """If this failed, an abort would lose another modality's image, or leave an association open for ever."""
    told, instances = [Told() for _ in range(8)], Instances(8)
    with Listener(open_landing(home), ae_title="RADLOOP", sites=SITES) as listener:
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=send_and_abort, args=(listener.port, seed, instances, mine, until))
            for seed, mine in enumerate(told)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _settle(listener)
        status = listener.status()
    assert [error for mine in told for error in mine.errors] == []
    acknowledged: dict[str, Any] = {}
    sent: dict[str, Any] = {}
    for mine in told:
        acknowledged |= mine.acknowledged
        sent |= mine.sent
    assert status.aborted == sum(mine.aborted for mine in told)
    assert status.rejected == {}
    stored = check(home, acknowledged)
    assert status.counts["new"] == status.counts["received"] == status.instances == stored
    assert len(acknowledged) <= stored <= len(sent)
    assert (status.counts["failed"], status.counts["same"], status.counts["quarantined"]) == (0, 0, 0)
    assert sum(status.store_s) == stored
    assert min(len(acknowledged), status.aborted) > 2 * seconds


def _settle(listener: Listener) -> None:
    deadline = time.monotonic() + 90
    while listener.status().associations or listener._ae.active_associations:
        assert time.monotonic() < deadline
        time.sleep(0.05)

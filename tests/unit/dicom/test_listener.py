from __future__ import annotations

import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless
from pynetdicom import AE, evt
from pynetdicom.association import Association

from radloop.catalog.reason import Reason
from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.listener import CANNOT_UNDERSTAND, OUT_OF_RESOURCES, Listener
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import EngineError, SettingsError

KEY = bytes(range(32))
CR = "1.2.840.10008.5.1.4.1.1.1"
PRIVATE = "1.2.276.0.7230010.3.1.0.1"
VERIFICATION = "1.2.840.10008.1.1"
SITES = {"CT_A": "north", "CR_B": "south"}


def open_landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


@pytest.fixture
def landing(home: Path) -> Landing:
    return open_landing(home)


@pytest.fixture
def listener(landing: Landing) -> Iterator[Listener]:
    with Listener(landing, ae_title="RADLOOP", sites=SITES) as running:
        yield running


def image(
    number: int, sop_class: str = CR, *, size: int = 16, syntax: str = ExplicitVRLittleEndian, **changes: Any
) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = f"1.2.3.{number}"
    ds.StudyInstanceUID = f"1.2.4.{number // 4}"
    ds.SeriesInstanceUID = f"1.2.5.{number // 2}"
    ds.PatientID = f"MRN{number // 4}"
    ds.PatientName = "CANARY^NAME"
    ds.Modality = "CR"
    ds.Rows = ds.Columns = size
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(number).integers(0, 4096, (size, size), dtype=np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    if syntax == JPEGLSLossless:
        ds.compress(JPEGLSLossless, generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = UID(syntax)
    return ds


_OPENED: list[socket.socket] = []
_ASSOCIATED: list[Association] = []


@pytest.fixture(autouse=True)
def _leave_nothing_open() -> Iterator[None]:
    """pynetdicom leaves the requestor's socket open when its peer dies."""
    yield
    while _ASSOCIATED:
        threading.Event.set(_ASSOCIATED.pop()._reactor_checkpoint)
    while _OPENED:
        _OPENED.pop().close()


def _hold_reactor(association: Association) -> None:
    """Keep the requestor's own reactor from taking the answer that `send_c_store` waits for.

    pynetdicom pauses it for each message, but may believe it paused when it is not (3.0.4: `_is_paused` is set before
    the wait): one answer in some thousand is then lost ("Received unexpected C-STORE service message"), and the
    association aborted 30 s later, although the listener has answered.
    """
    association._reactor_checkpoint.clear()
    time.sleep(0.05)
    association._reactor_checkpoint.set = lambda: None  # type: ignore[method-assign]
    _ASSOCIATED.append(association)


def _no_delay(event: evt.Event) -> None:
    connection = event.assoc.dul.socket.socket
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _OPENED.append(connection)


def associate(
    port: int,
    contexts: Sequence[tuple[str, str]] = ((CR, ExplicitVRLittleEndian),),
    *,
    calling: str = "CT_A",
    called: str = "RADLOOP",
    hold: bool = True,
) -> Association:
    ae = AE(ae_title=calling)
    for abstract, transfer in contexts:
        ae.add_requested_context(abstract, transfer)
    association = ae.associate("127.0.0.1", port, ae_title=called, evt_handlers=[(evt.EVT_CONN_OPEN, _no_delay)])
    if association.is_established and hold:
        _hold_reactor(association)
    return association


def store(port: int, *datasets: Dataset, calling: str = "CT_A") -> list[int]:
    contexts = sorted({(str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID)) for ds in datasets})
    association = associate(port, contexts, calling=calling)
    assert association.is_established
    statuses = [int(association.send_c_store(ds).Status) for ds in datasets]
    association.release()
    return statuses


def test_success_means_that_the_instance_is_on_disk_and_in_the_catalog(listener: Listener, landing: Landing) -> None:
    """If this failed, the modality would delete what radloop has not got."""
    assert store(listener.port, image(1), image(2)) == [0, 0]
    rows = landing._catalog.pending()
    assert {row.sop_uid for row in rows} == {Pseudonymiser(KEY).uid(f"1.2.3.{number}") for number in (1, 2)}
    assert {(row.site, row.sender) for row in rows} == {("north", "CT_A")}
    for row in rows:
        assert landing.landed(row.source_sha256).stat().st_size == row.source_bytes
    assert listener.counts["received"] == listener.counts["new"] == 2


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless])
def test_the_bytes_are_kept_as_the_peer_encoded_them(listener: Listener, landing: Landing, syntax: str) -> None:
    """If this failed, compressed images would be changed on the way in, and a lossy one be lossy twice."""
    ds = image(1, syntax=syntax)
    sent = BytesIO()
    ds.save_as(sent, enforce_file_format=True)
    assert store(listener.port, ds) == [0]
    [row] = landing._catalog.pending()
    assert row.transfer_syntax_uid == syntax
    start = b"\x08\x00\x16\x00"  # SOPClassUID, the first element
    received = landing.landed(row.source_sha256).read_bytes()
    assert received[received.index(start) :] == sent.getvalue()[sent.getvalue().index(start) :]


def test_private_and_future_storage_classes_are_accepted(listener: Listener, landing: Landing) -> None:
    """If this failed, a vendor's private objects would make whole studies fail to send."""
    assert store(listener.port, image(1, PRIVATE), image(2)) == [0, 0]
    assert {row.sop_class_uid for row in landing._catalog.pending()} == {PRIVATE, CR}


def test_unknown_peers_are_rejected_with_the_standards_code(listener: Listener) -> None:
    """If this failed, anybody on the network could put images into the training set."""
    association = associate(listener.port, calling="STRANGER")
    assert association.is_rejected
    primitive = association.acceptor.primitive
    assert (primitive.result, primitive.result_source, primitive.diagnostic) == (1, 1, 3)  # calling AE not recognised
    association = associate(listener.port, called="OTHER")
    assert association.is_rejected
    assert association.acceptor.primitive.diagnostic == 7  # called AE not recognised
    assert listener.counts["rejected"] == 2


def test_the_called_title_may_be_left_open(landing: Landing) -> None:
    """If this failed, a modality that cannot set the called title could not send at all."""
    with Listener(landing, ae_title="RADLOOP", sites=SITES, require_called_ae=False) as listener:
        association = associate(listener.port, called="ANYTHING")
        assert association.is_established
        association.release()


def test_it_answers_echo(listener: Listener) -> None:
    """If this failed, the PACS administrator's first test would fail."""
    association = associate(listener.port, [(VERIFICATION, ImplicitVRLittleEndian)])
    assert association.send_c_echo().Status == 0x0000
    association.release()


def test_counts_say_what_became_of_everything(listener: Listener, landing: Landing) -> None:
    """If this failed, nobody would see that a modality sends rubbish."""
    sent = [
        image(1),
        image(1),
        image(1, PatientName="Corrected^Name"),
        image(1, PixelData=bytes(512)),
        image(2, PatientID=""),
    ]
    assert store(listener.port, *sent, calling="CR_B") == [0] * 5
    assert listener.counts == {
        "received": 5,
        "new": 1,
        "same": 1,
        "revision": 1,
        "conflict": 1,
        "quarantined": 1,
        "failed": 0,
        "rejected": 0,
    }
    assert {row.reason for row in landing._catalog.quarantined()} == {Reason.UID_CONFLICT, Reason.NO_PATIENT_ID}


def test_a_full_disk_is_told_to_the_peer_and_it_may_send_again(listener: Listener, landing: Landing) -> None:
    """If this failed, the modality would believe that images were stored when the disk was full."""
    ignore, before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    big = image(1, size=1024)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        assert store(listener.port, big, image(2)) == [OUT_OF_RESOURCES, 0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignore)
    assert len(landing._catalog.pending()) == 1
    assert store(listener.port, big) == [0]
    assert len(landing._catalog.pending()) == 2
    assert listener.counts["failed"] == 1


def test_what_cannot_be_kept_is_a_failure_and_no_name_is_logged(
    listener: Listener, landing: Landing, caplog: pytest.LogCaptureFixture
) -> None:
    """If this failed, an image that was lost would have been acknowledged, or the log would name the patient."""
    with landing._catalog._write() as connection:
        connection.exec_driver_sql("ALTER TABLE instances RENAME TO gone")
    assert store(listener.port, image(1)) == [CANNOT_UNDERSTAND]
    with landing._catalog._write() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO instances")
    assert store(listener.port, image(1)) == [0]
    assert "could not be kept: OperationalError" in caplog.text
    assert "CANARY" not in caplog.text
    assert "MRN" not in caplog.text


def test_several_associations_at_once(listener: Listener, landing: Landing) -> None:
    """If this failed, two modalities sending together would get failures, or instances would be lost between them."""
    statuses: list[int] = []

    def send(first: int) -> None:
        statuses.extend(store(listener.port, *(image(n) for n in range(first, first + 12))))

    threads = [threading.Thread(target=send, args=(8 * n,)) for n in range(4)]  # ranges overlap: some are sent twice
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 48
    assert len(landing._catalog.pending()) == 36
    assert (listener.counts["new"], listener.counts["same"]) == (36, 12)


def test_both_ends_do_without_nagle(listener: Listener) -> None:
    """If this failed, every C-STORE would wait 40 ms for an acknowledgement: a CT of 500 slices 20 s longer."""
    association = associate(listener.port)
    [accepted] = listener._ae.active_associations
    assert accepted.dul.socket is not None
    assert accepted.dul.socket.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0  # type: ignore[union-attr]
    association.release()


def test_a_port_that_is_taken_is_told(landing: Landing, listener: Listener) -> None:
    """If this failed, a second `radloop listen` would end in a stack trace."""
    with pytest.raises(EngineError, match=r"cannot listen on 127\.0\.0\.1"):
        Listener(landing, ae_title="RADLOOP", sites=SITES, port=listener.port).start()


def test_a_listener_without_senders_is_refused(landing: Landing) -> None:
    """If this failed, an empty list of senders would mean that all are welcome."""
    with pytest.raises(SettingsError, match="knows no sender"):
        Listener(landing, ae_title="RADLOOP", sites={})


def test_a_stopped_listener_lets_the_association_end_and_takes_no_more(landing: Landing) -> None:
    """If this failed, a restart would cut a study in two."""
    listener = Listener(landing, ae_title="RADLOOP", sites=SITES)
    port = listener.start()
    association = associate(port)
    stopping = threading.Thread(target=listener.stop)
    stopping.start()
    assert association.send_c_store(image(1)).Status == 0
    association.release()
    stopping.join(timeout=60)
    assert not stopping.is_alive()
    listener.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def _serve(home: Path, port_to: int) -> None:
    landing = open_landing(home)
    landing.recover()
    os.write(port_to, b"%d\n" % Listener(landing, ae_title="RADLOOP", sites=SITES).start())
    signal.pause()


def _start_server(home: Path) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _serve(home, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return child, int(stream.readline())


def _send_until_cut(port: int, numbers: Sequence[int], done: set[int], timeout_s: float) -> None:
    """Send over one association; `done` gets what was acknowledged with Success before it was cut."""
    association = associate(port, hold=timeout_s > 10)  # one that will be cut must see it
    association.dimse_timeout = timeout_s
    for number in numbers:
        if not association.is_established:
            return
        try:
            status = association.send_c_store(image(number))
        except (RuntimeError, ValueError):
            return
        if getattr(status, "Status", None) == 0x0000:
            done.add(number)
    association.release()


def _send_in_threads(port: int, *, kill: int | None, after_s: float, timeout_s: float) -> set[int]:
    """Send 48 instances over three associations, and kill the process `kill` on the way."""
    done: set[int] = set()
    threads = [
        threading.Thread(target=_send_until_cut, args=(port, range(start, 48, 3), done, timeout_s))
        for start in range(3)
    ]
    for thread in threads:
        thread.start()
    if kill is not None:
        time.sleep(after_s)
        os.kill(kill, signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=100)
    return done


def test_a_listener_killed_under_load_has_every_acknowledged_instance_once(home: Path) -> None:
    """If this failed, images that a modality has deleted, trusting Success, would be gone for good."""
    seeded = random.Random(42)
    acknowledged: set[int] = set()
    for last in (False, False, False, True):
        child, port = _start_server(home)
        try:
            moment = seeded.uniform(0.1, 0.5)
            kill, timeout_s = (None, 60) if last else (child, 2)
            acknowledged |= _send_in_threads(port, kill=kill, after_s=moment, timeout_s=timeout_s)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        landing = open_landing(home)
        rows = landing._catalog.pending()
        held = {row.sop_uid for row in rows}
        assert len(rows) == len(held)
        assert {Pseudonymiser(KEY).uid(f"1.2.3.{number}") for number in acknowledged} <= held
        assert all(row.revision == 1 for row in rows)
        for row in rows:
            assert landing.landed(row.source_sha256).stat().st_size == row.source_bytes
        landing._catalog.close()
    assert acknowledged == set(range(48))

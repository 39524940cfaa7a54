"""The C-STORE provider against real senders (dcmtk, pynetdicom), and against what no honest sender would send."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE

from radloop.catalog.reason import Reason
from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk, Identity
from radloop.dicom.landed import came, identity
from radloop.dicom.landing import Landing
from radloop.dicom.listener import CANNOT_UNDERSTAND, NOT_AS_ANNOUNCED, OUT_OF_RESOURCES, Listener
from radloop.dicom.listener.incoming import HELD_BYTES
from radloop.dicom.uids import Pseudonymiser
from radloop.testing.sender import ABORT, Aborted, Refused, Sender, command

KEY = bytes(range(32))
CR = "1.2.840.10008.5.1.4.1.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
MULTI = "1.2.840.10008.5.1.4.1.1.7.2"  # Multi-frame Grayscale Byte Secondary Capture
SITES = {"CT_A": "north", "CR_B": "south", "STORESCU": "north", "DCMSEND": "north"}
TREE = dict[str, Any]


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


def image(number: int, sop_class: str = CR, **changes: Any) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, f"1.2.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.4.1", "1.2.5.1"
    ds.PatientID, ds.PatientName, ds.Modality = "MRN1", "CANARY^NAME", "CR"
    ds.Rows = ds.Columns = 16
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(number).integers(0, 4096, (16, 16), dtype=np.uint16).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def encoded(ds: Dataset, *, implicit: bool = False) -> bytes:
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, implicit
    write_dataset(buffer, ds)
    return bytes(buffer.getvalue())


def cut(data: bytes, size: int = 100) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def rows(landing: Landing) -> list[Any]:
    return landing._catalog.pending()


def _dcmtk(require_service: Callable[..., str], program: str) -> str:
    """dcmtk's own: pynetdicom puts a storescu of its own into an environment's bin."""
    return str(Path(require_service("dcmtk", "dcmsend")).with_name(program))


def send(program: str, port: int, files: Sequence[Path], *options: str) -> None:
    """Run a sender of dcmtk."""
    done = subprocess.run(
        [program, *options, "-aec", "RADLOOP", "127.0.0.1", str(port), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TCP_NODELAY": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def saved(ds: Dataset, path: Path) -> Path:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


# Real senders


@pytest.mark.services
@pytest.mark.parametrize("options", [(), ("-xi",), ("-xe",), ("-xd",)], ids=lambda o: o[0] if o else "any")
def test_storescu_in_every_uncompressed_syntax(
    listener: Listener, landing: Landing, tmp_path: Path, require_service: Callable[..., str], options: tuple[str, ...]
) -> None:
    """If this failed, modalities that prefer another encoding could not send, or their images would be changed."""
    program = _dcmtk(require_service, "storescu")
    send(program, listener.port, [saved(image(number), tmp_path / f"{number}.dcm") for number in range(3)], *options)
    found = rows(landing)
    assert len(found) == 3
    expected = {"-xi": ImplicitVRLittleEndian, "-xd": DeflatedExplicitVRLittleEndian}
    for row in found:
        assert row.transfer_syntax_uid == expected.get(options[0] if options else "", ExplicitVRLittleEndian)
        path = landing.landed(row.source_sha256)
        assert identity(path.read_bytes()) == row.source_sha256
        stored = pydicom.dcmread(path)
        number = int(str(stored.SOPInstanceUID).rsplit(".", 1)[1])
        assert np.array_equal(stored.pixel_array, image_pixels(number))
        assert stored.file_meta.SourceApplicationEntityTitle == "STORESCU"
        assert stored.file_meta.MediaStorageSOPInstanceUID == stored.SOPInstanceUID


def image_pixels(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 4096, (16, 16), dtype=np.uint16)


@pytest.mark.services
def test_dcmsend_with_compressed_files_and_many_classes(
    listener: Listener, landing: Landing, require_service: Callable[..., str]
) -> None:
    """If this failed, compressed images, reports and plans of a study would be decoded, or not come in at all."""
    program = _dcmtk(require_service, "dcmsend")
    syntaxes = "JPEG2000 SC_rgb_jpeg_dcmtk MR_small_RLE MR_small_jpeg_ls_lossless image_dfl CT_small"
    names = [f"{name}.dcm" for name in (*syntaxes.split(), "rtplan", "test-SR", "waveform_ecg")]
    paths = [Path(str(get_testdata_file(name))) for name in names]
    send(program, listener.port, paths, "-dn")
    assert (listener.counts["received"], listener.counts["failed"]) == (len(names), 0)
    kept = {_key(ds): ds for ds in map(pydicom.dcmread, [*landing.home.glob("*/??/*.*")])}
    for ds in map(pydicom.dcmread, paths):  # some have one SOPInstanceUID in several syntaxes
        there = kept[_key(ds)]
        assert there.get("PixelData") == ds.get("PixelData")
        assert there.get("WaveformSequence") == ds.get("WaveformSequence")


def _key(ds: Dataset) -> tuple[str, str]:
    syntax = str(ds.file_meta.TransferSyntaxUID)
    return str(ds.SOPInstanceUID), "plain" if syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian) else syntax


@pytest.mark.parametrize("name", ["MR_small_bigendian", "image_dfl", "JPEG2000", "rtplan"])
def test_the_data_set_is_kept_byte_for_byte(listener: Listener, landing: Landing, name: str) -> None:
    """If this failed, what radloop keeps would not be what the modality sent."""
    path = Path(str(get_testdata_file(f"{name}.dcm")))
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    content = path.read_bytes()
    start = 144 + int(ds.file_meta.FileMetaInformationGroupLength)
    with Sender(listener.port, [(str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID))]) as peer:
        assert peer.store(str(ds.SOPClassUID), str(ds.SOPInstanceUID), cut(content[start:], 5000)) == 0
    [kept] = landing.home.glob("*/??/*.*")
    assert kept.read_bytes().endswith(content[start:])
    assert kept.stem == identity(content)


@pytest.mark.services
def test_the_same_instance_by_c_store_from_two_senders_and_from_a_folder_is_the_same(
    listener: Listener, landing: Landing, tmp_path: Path, require_service: Callable[..., str]
) -> None:
    """If this failed, a study that comes from the modality and again from the PACS would be revised each time."""
    program = _dcmtk(require_service, "storescu")
    path = saved(image(1), tmp_path / "in" / "a.dcm")
    send(program, listener.port, [path])
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)], calling="CR_B") as peer:
        raw = path.read_bytes()
        start = raw.index(b"\x08\x00\x16\x00")
        assert peer.store(CR, "1.2.3.1", cut(raw[start:])) == 0
    assert landing.receive_folder(path.parent, site="north").outcomes == {"same": 1}
    assert (listener.counts["new"], listener.counts["same"]) == (1, 1)
    assert len(list(landing.landing.glob("??/*.dcm"))) == 1


def test_a_transfer_syntax_that_nobody_knows_is_accepted_and_kept(listener: Listener, landing: Landing) -> None:
    """If this failed, a vendor's private encoding would be lost without anybody having seen it."""
    with Sender(listener.port, [("1.2.276.0.7230010.3.1.0.1", "1.2.276.0.7230010.9.9")]) as peer:
        assert peer.store("1.2.276.0.7230010.3.1.0.1", "1.2.3.1", [encoded(image(1, "1.2.276.0.7230010.3.1.0.1"))]) == 0
    [held] = landing._catalog.quarantined()
    assert held.reason is Reason.UNKNOWN_TRANSFER_SYNTAX
    assert pydicom.dcmread(landing.quarantined(held.source_sha256), force=True).file_meta.TransferSyntaxUID == (
        "1.2.276.0.7230010.9.9"
    )
    assert rows(landing) == []
    assert not list(landing.landing.glob("??/*.dcm"))


# Statuses


def test_another_class_or_instance_than_announced_is_a900_and_not_kept(listener: Listener, landing: Landing) -> None:
    """If this failed, the sender would believe that one instance was stored when it was another."""
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian), (CT, ExplicitVRLittleEndian)]) as peer:
        data = encoded(image(1))
        assert peer.store(CT, "1.2.3.1", cut(data), context_id=3) == NOT_AS_ANNOUNCED
        assert peer.store(CR, "1.2.3.9", cut(data)) == NOT_AS_ANNOUNCED
        assert rows(landing) == []
        assert landing._catalog.quarantined() == []
        assert peer.store(CR, "1.2.3.1", cut(data)) == 0
    assert len(rows(landing)) == 1
    assert len(list(landing.landing.glob("??/*.dcm"))) == 1
    assert landing.recover().registered == 0
    error = listener.status().last_error
    assert error is not None
    assert (error.calling_ae, "SOP instance" in error.what) == ("CT_A", True)


def test_what_cannot_be_used_is_success_and_in_quarantine(listener: Listener, landing: Landing) -> None:
    """If this failed, a modality would send a broken image again for ever, or nobody would know that it was lost."""
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer:
        assert peer.store(CR, "1.2.3.1", cut(encoded(image(1, SOPInstanceUID=None)))) == 0
        assert peer.store(CR, "1.2.3.2", cut(encoded(image(2)))[:-1]) == 0
        assert peer.store(CR, "1.2.3.3", [b"no dicom at all, not even nearly " * 9]) == 0
        assert peer.store(CR, "1.2.3.4", cut(encoded(image(4, PatientID="")))) == 0
        again = peer.store(CR, "1.2.3.4", cut(encoded(image(4, PatientID=""))))
    assert again == 0
    held = landing._catalog.quarantined()
    assert [row.reason for row in held] == [
        Reason.MISSING_UID,
        Reason.TRUNCATED,
        Reason.NOT_DICOM,
        Reason.NO_PATIENT_ID,
    ]
    assert all(landing.quarantined(row.source_sha256).exists() for row in held)
    assert not list(landing.landing.glob("??/*.dcm"))
    assert landing.retry(held[3].id, by="ada").reason is Reason.NO_PATIENT_ID


def test_a_command_that_names_no_instance_is_c000(listener: Listener, landing: Landing) -> None:
    """If this failed, a broken sender would end the association of a whole study, or get Success for nothing."""
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer:
        assert peer.store(CR, "", cut(encoded(image(1)))) == CANNOT_UNDERSTAND
        assert peer.store(CR, "../../etc/passwd", cut(encoded(image(1)))) == CANNOT_UNDERSTAND
        assert peer.store(CR, "1.2.3.1", [], data_set=False) == CANNOT_UNDERSTAND
        assert peer.store(CR, "1.2.3.1", cut(encoded(image(1)))) == 0
    assert len(rows(landing)) == 1


# What no honest sender would send


@pytest.mark.parametrize(
    "lie",
    [
        struct.pack(">BBIIBB", 4, 0, 50, 400, 1, 3) + bytes(44),  # a fragment longer than its PDU
        struct.pack(">BBIIBB", 4, 0, 6, 1, 1, 3),  # a fragment without its own head
        struct.pack(">BBI", 4, 0, 3) + bytes(3),  # a PDU without a fragment's head
        struct.pack(">BBIIBB", 4, 0, 10, 6, 9, 3) + bytes(4),  # an unknown context
        struct.pack(">BBIIBB", 4, 0, 10, 6, 1, 2) + bytes(4),  # a data set without a command
        struct.pack(">BBIIBB", 4, 0, 10, 6, 1, 3) + b"\xff" * 4,  # a command that is none
        struct.pack(">BBI", 9, 0, 4) + bytes(4),  # no PDU of the standard
        struct.pack(">BBI", 1, 0, 0x7FFFFFFF) + bytes(4),  # two gigabytes are announced
        struct.pack(">BBI", 1, 0, 4) + bytes(4),  # an A-ASSOCIATE-RQ within the association, and broken
    ],
)
def test_a_lie_aborts_the_association_and_the_listener_lives(listener: Listener, landing: Landing, lie: bytes) -> None:
    """If this failed, one broken modality would stop the intake of a hospital."""
    peer = Sender(listener.port, [(CR, ExplicitVRLittleEndian)], timeout_s=10)
    peer.socket.sendall(lie)
    kind, body = peer.pdu()
    assert (kind, body[2]) == (7, 2)  # A-ABORT by the service provider
    peer.socket.close()
    _still_alive(listener, landing)


def test_a_command_without_its_data_set_aborts(listener: Listener, landing: Landing) -> None:
    """If this failed, two instances could be mixed into one."""
    peer = Sender(listener.port, [(CR, ExplicitVRLittleEndian)], timeout_s=10)
    peer.announce(CR, "1.2.3.1")
    peer.fragment(encoded(image(1))[:100], 1, 0)
    peer.announce(CR, "1.2.3.2")
    with pytest.raises(Aborted):
        peer.answer()
    peer.socket.close()
    assert rows(landing) == []
    _still_alive(listener, landing)


@pytest.mark.parametrize("how", ["close", "abort"])
def test_an_association_cut_in_an_instance_keeps_nothing_of_it(listener: Listener, landing: Landing, how: str) -> None:
    """If this failed, half an image would come in as a whole one."""
    peer = Sender(listener.port, [(CR, ExplicitVRLittleEndian)])
    assert peer.store(CR, "1.2.3.1", cut(encoded(image(1)))) == 0
    peer.announce(CR, "1.2.3.2")
    peer.fragment(encoded(image(2))[:300], 1, 0)
    peer.abort() if how == "abort" else peer.socket.close()
    _until(lambda: listener.status().aborted == 1)
    assert len(rows(landing)) == 1
    assert landing._catalog.quarantined() == []
    assert listener.status().associations == []


@pytest.mark.parametrize("bytes_sent", [b"", b"\x01\0\0", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_connection_that_never_associates_is_closed(landing: Landing, bytes_sent: bytes) -> None:
    """If this failed, port scanners would use up all associations."""
    with Listener(landing, ae_title="RADLOOP", sites=SITES, idle_s=1.0) as listener:
        listener._ae.acse_timeout = 1.0
        stranger = socket.create_connection(("127.0.0.1", listener.port), timeout=30)
        stranger.sendall(bytes_sent)
        with contextlib.suppress(ConnectionResetError):  # closed with bytes unread: that is a reset
            while stranger.recv(100):
                pass
        stranger.close()
        _still_alive(listener, landing)


def test_connections_that_ask_for_nothing_do_not_count(landing: Landing) -> None:
    """If this failed, a port scanner could keep the modalities out."""
    with Listener(landing, ae_title="RADLOOP", sites=SITES, max_associations=2) as listener:
        silent = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(10)]
        time.sleep(0.3)
        _still_alive(listener, landing)
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("within", [False, True], ids=["between", "within a message"])
def test_an_idle_association_is_aborted(landing: Landing, within: bool) -> None:
    """If this failed, modalities that were switched off would hold their associations until none is left."""
    with Listener(landing, ae_title="RADLOOP", sites=SITES, idle_s=1.0) as listener:
        peer = Sender(listener.port, [(CR, ExplicitVRLittleEndian)], timeout_s=20)
        assert peer.store(CR, "1.2.3.1", cut(encoded(image(1)))) == 0
        if within:
            peer.announce(CR, "1.2.3.2")
            peer.fragment(b"\x08\0", 1, 0)
        began = time.monotonic()
        try:
            assert peer.pdu()[0] == 7
        except Aborted:
            assert within
        assert time.monotonic() - began > 0.5
        peer.socket.close()
        _until(lambda: listener.status().associations == [])


def _still_alive(listener: Listener, landing: Landing) -> None:
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer:
        assert peer.store(CR, "1.2.3.77", cut(encoded(image(77)))) == 0
    assert Pseudonymiser(KEY).uid("1.2.3.77") in {row.sop_uid for row in rows(landing)}


def _until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Limits


def test_too_many_associations_are_rejected_as_transient(landing: Landing) -> None:
    """If this failed, the sender would not try again later, or the listener run out of memory."""
    with Listener(landing, ae_title="RADLOOP", sites=SITES, max_associations=2) as listener:
        contexts = [(CR, ExplicitVRLittleEndian)]
        with Sender(listener.port, contexts), Sender(listener.port, contexts, calling="CR_B"):
            with pytest.raises(Refused) as caught:
                Sender(listener.port, contexts)
            assert caught.value.args == (2, 3, 2)  # transient, presentation related, local limit exceeded
            assert sorted(open_.calling_ae for open_ in listener.status().associations) == ["CR_B", "CT_A"]
        for _ in range(5):  # who has released leaves room at once
            with Sender(listener.port, contexts), Sender(listener.port, contexts):
                pass
        with pytest.raises(Refused) as caught:
            Sender(listener.port, contexts, calling="NOBODY")
        assert caught.value.args == (1, 1, 3)
        with pytest.raises(Refused):
            Sender(listener.port, contexts, called="OTHER")
        assert listener.status().rejected == {"limit": 1, "calling AE": 1, "called AE": 1}
        assert listener.counts["rejected"] == 3


def test_the_status_says_what_came_and_no_name(listener: Listener) -> None:
    """If this failed, the screen would show nothing, or a patient."""
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer:
        data = encoded(image(1))
        for number in (1, 2):
            assert peer.store(CR, f"1.2.3.{number}", cut(encoded(image(number)))) == 0
        status = listener.status()
        [there] = status.associations
        assert (there.calling_ae, there.instances, there.bytes) == ("CT_A", 2, 2 * len(data))
        assert (status.instances, status.bytes, status.counts["new"]) == (2, 2 * len(data), 2)
        assert sum(status.store_s) == 2
        assert 0 < status.store_s_sum < 60
        assert "CANARY" not in repr(status)
        assert "MRN1" not in repr(status)
    _until(lambda: listener.status().associations == [])
    assert listener.status().aborted == 0


def test_a_tiny_maximum_length_of_the_peer_is_respected(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, an old modality would not understand the answer."""
    from radloop.dicom.listener.messages import read_command, store_response

    told = read_command(command(CR, "1.2.3.1", 7))
    answer = store_response(told, 5, 0xA700, "no space left", 20)
    parts, position = b"", 0
    while position < len(answer):
        kind, _, length, item, context, control = struct.unpack_from(">BBIIBB", answer, position)
        assert (kind, context, item + 4, length <= 20) == (4, 5, length, True)
        parts += answer[position + 12 : position + 6 + length]
        position += 6 + length
        assert control == (3 if position == len(answer) else 1)
    assert b"no space left" in parts
    assert struct.pack("<HHI", 0, 0x0900, 2) + b"\x00\xa7" in parts


# Large objects


def _frames(count: int, side: int) -> Iterator[bytes]:
    """A multi-frame object of `count` megapixel frames, a piece at a time."""
    head = image(1, MULTI, NumberOfFrames=count, PixelData=None, Modality="OT")
    head.Rows = head.Columns = side
    head.BitsAllocated = head.BitsStored = 8
    head.HighBit = 7
    yield encoded(head)
    yield struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, count * side * side)
    frame = bytes(range(256)) * (side * side // 256)
    for _ in range(count):
        for start in range(0, len(frame), 1 << 17):
            yield frame[start : start + (1 << 17)]


def _in_child(home: Path) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            port = Listener(open_landing(home), ae_title="RADLOOP", sites=SITES).start()
            os.write(writing, b"%d\n" % port)
            threading.Event().wait()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return child, int(stream.readline())


def _memory_mb(child: int, what: str) -> float:
    told = Path(f"/proc/{child}/status").read_text()
    return int(next(line for line in told.splitlines() if line.startswith(what)).split()[1]) / 1024


@pytest.mark.slow
def test_an_object_of_600_mb_is_not_held_in_memory(home: Path) -> None:
    """If this failed, one large cine loop would end the listener, and all that other modalities were sending."""
    child, port = _in_child(home)
    try:
        with Sender(port, [(MULTI, ExplicitVRLittleEndian), (CR, ExplicitVRLittleEndian)], timeout_s=300) as peer:
            assert peer.store(CR, "1.2.3.9", [encoded(image(9))], context_id=3) == 0
            before = _memory_mb(child, "VmRSS")
            assert peer.store(MULTI, "1.2.3.1", _frames(600, 1024)) == 0
        assert _memory_mb(child, "VmHWM") - before < 100
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    landing = open_landing(home)
    [large] = [row for row in rows(landing) if row.sop_class_uid == MULTI]
    assert large.source_bytes > 600 << 20
    assert landing.landed(large.source_sha256).stat().st_size == large.source_bytes
    assert landing.recover() == type(landing.recover())(registered=0, removed=0, unknown=0)
    assert len([path for path in landing.landing.rglob("*") if path.is_file()]) == 1 + 2  # lock, two files


def test_an_object_larger_than_what_is_held_lands_whole(listener: Listener, landing: Landing) -> None:
    """If this failed, mammograms and tomosyntheses would be damaged, or left behind as nameless files."""
    parts = list(_frames(12, 1024))
    data = b"".join(parts)
    assert len(data) > HELD_BYTES
    with Sender(listener.port, [(MULTI, ExplicitVRLittleEndian)]) as peer:
        assert peer.store(MULTI, "1.2.3.1", parts) == 0
        assert peer.store(MULTI, "1.2.3.1", parts) == 0
    [row] = rows(landing)
    content = landing.landed(row.source_sha256).read_bytes()
    assert content.endswith(data)
    assert identity(content) == row.source_sha256
    told = came(content, row.source_sha256, landing.stamp)
    assert told is not None
    assert (told.site, told.sender) == ("north", "CT_A")
    assert (listener.counts["new"], listener.counts["same"]) == (1, 1)


def test_a_disk_that_is_full_within_a_large_object_is_a700(home: Path) -> None:
    """If this failed, the association would break, or the modality believe that the large object was stored."""
    import resource
    import signal

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            listener = Listener(open_landing(home), ae_title="RADLOOP", sites=SITES)
            port = listener.start()
            resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, resource.RLIM_INFINITY))
            os.write(writing, b"%d\n" % port)
            threading.Event().wait()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with os.fdopen(reading) as stream:
            port = int(stream.readline())
        with Sender(port, [(MULTI, ExplicitVRLittleEndian), (CR, ExplicitVRLittleEndian)]) as peer:
            assert peer.store(MULTI, "1.2.3.1", _frames(16, 1024)) == OUT_OF_RESOURCES
            assert peer.store(CR, "1.2.3.2", [encoded(image(2))], context_id=3) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    landing = open_landing(home)
    assert [row.sop_class_uid for row in rows(landing)] == [CR]
    assert len(list(landing.landing.glob("??/*"))) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 6 MB, where this user may mount one."""
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m,mode=0700", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system; the file size limit above tests the same code")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_is_a700_and_there_is_room_again(small_disk: Path) -> None:
    """If this failed, a full disk would lose what was acknowledged, or the listener need a restart."""
    landing = open_landing(small_disk / "home")
    statuses = []
    with (
        Listener(landing, ae_title="RADLOOP", sites=SITES) as listener,
        Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer,
    ):
        for number in range(60):
            big = image(number, Rows=256, Columns=256, PixelData=np.full(1 << 16, number, np.uint16).tobytes())
            statuses.append(peer.store(CR, f"1.2.3.{number}", cut(encoded(big), 1 << 14)))
        assert set(statuses) == {0, OUT_OF_RESOURCES}
        stored = {f"1.2.3.{number}" for number, status in enumerate(statuses) if status == 0}
        kept = {row.sop_uid: row for row in rows(landing)}
        assert {Pseudonymiser(KEY).uid(uid) for uid in stored} <= set(kept)
        for row in kept.values():
            assert identity(landing.landed(row.source_sha256).read_bytes()) == row.source_sha256
        error = listener.status().last_error
        assert error is not None
        assert error.what == "no space left"
        for path in sorted(landing.landing.glob("??/*.dcm"))[:6]:
            path.unlink()  # room again
        assert peer.store(CR, "1.2.3.99", cut(encoded(image(99)))) == 0
    landing._catalog.close()
    landing._crosswalk.close()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ca.pem, and key and certificate of `server` and `client`."""
    folder = tmp_path_factory.mktemp("tls")
    root_key, root = _certificate("radloop test", None, None)
    (folder / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    for name in ("server", "client"):
        key, certificate = _certificate(name, root_key, root)
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return folder


def _certificate(name: str, issuer_key: Any, issuer: Any) -> tuple[Any, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: Sequence[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer is not None else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return key, builder.sign(issuer_key or key, hashes.SHA256())


@pytest.fixture
def secure(landing: Landing, certificates: Path) -> Iterator[Listener]:
    """Return a listener that speaks mutual TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with Listener(landing, ae_title="RADLOOP", sites=SITES, tls=context) as running:
        yield running


def _client(certificates: Path, *, known: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if known:
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    return context


def test_mutual_tls(secure: Listener, landing: Landing, certificates: Path) -> None:
    """If this failed, images would cross the hospital's network in the open, or anybody could send."""
    with Sender(secure.port, [(CR, ExplicitVRLittleEndian)], tls=_client(certificates)) as peer:
        large = image(1, Rows=1024, Columns=1024, PixelData=bytes(2 << 20))
        assert peer.store(CR, "1.2.3.1", cut(encoded(large), 1 << 17)) == 0
    ae = AE(ae_title="CT_A")
    ae.add_requested_context(CR, ExplicitVRLittleEndian)
    ae.add_requested_context("1.2.840.10008.1.1")
    client = _client(certificates)
    association = ae.associate("127.0.0.1", secure.port, ae_title="RADLOOP", tls_args=(client, "localhost"))
    assert association.is_established
    assert association.send_c_echo().Status == 0
    association.release()
    assert len(rows(landing)) == 1
    with pytest.raises((Aborted, OSError)):
        Sender(secure.port, [(CR, ExplicitVRLittleEndian)], tls=_client(certificates, known=False))
    with pytest.raises((Aborted, OSError)):
        Sender(secure.port, [(CR, ExplicitVRLittleEndian)], timeout_s=10)
    _until(lambda: secure.status().rejected.get("TLS", 0) == 2)


def test_a_caller_that_does_not_shake_hands_holds_up_nobody(secure: Listener, certificates: Path) -> None:
    """If this failed, one silent connection would stop the intake."""
    silent = [socket.create_connection(("127.0.0.1", secure.port)) for _ in range(3)]
    with Sender(secure.port, [(CR, ExplicitVRLittleEndian)], tls=_client(certificates)) as peer:
        assert peer.store(CR, "1.2.3.1", cut(encoded(image(1)))) == 0
    assert "TLS" not in secure.status().rejected  # none of them had been given up by then
    for connection in silent:
        connection.close()


@pytest.mark.services
def test_storescu_with_tls(
    secure: Listener, landing: Landing, certificates: Path, tmp_path: Path, require_service: Callable[..., str]
) -> None:
    """If this failed, the field's own tools could not speak to the listener."""
    program = _dcmtk(require_service, "storescu")
    tls = (
        "+tls",
        str(certificates / "client.key"),
        str(certificates / "client.pem"),
        "+cf",
        str(certificates / "ca.pem"),
    )
    send(program, secure.port, [saved(image(1), tmp_path / "a.dcm")], *tls)
    assert len(rows(landing)) == 1


# Beside pynetdicom


def test_echo_between_instances_is_answered_at_once(listener: Listener) -> None:
    """If this failed, what pynetdicom does beneath would wait for the next look of another thread, or for ever."""
    ae = AE(ae_title="CT_A")
    ae.add_requested_context(CR, ExplicitVRLittleEndian)
    ae.add_requested_context("1.2.840.10008.1.1")
    association = ae.associate("127.0.0.1", listener.port, ae_title="RADLOOP")
    seconds = []
    for number in range(5):
        ds = image(number)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        assert association.send_c_store(ds).Status == 0
        began = time.monotonic()
        assert association.send_c_echo().Status == 0
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.5  # the machine may be busy at one of them, not at all
    association.release()
    assert association.is_released


def test_fragments_of_any_size_and_several_in_one_pdu(listener: Listener, landing: Landing) -> None:
    """If this failed, senders with another taste in fragments would lose images."""
    data = encoded(image(1))
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer:
        assert peer.store(CR, "1.2.3.1", cut(data, 1)) == 0  # a byte each
        items = b""
        for control, part in ((3, command(CR, "1.2.3.2", 2)), (0, encoded(image(2))[:40]), (2, encoded(image(2))[40:])):
            items += struct.pack(">IBB", len(part) + 2, 1, control) + part
        peer.socket.sendall(struct.pack(">BBI", 4, 0, len(items)) + items)  # all of it in one PDU
        assert peer.answer() == 0
        announced = command(CR, "1.2.3.3", 3)
        peer.fragment(announced[:30], 1, 1)
        peer.fragment(announced[30:], 1, 3)
        peer.fragment(encoded(image(3)), 1, 0)
        peer.fragment(b"", 1, 2)  # an empty last fragment
        assert peer.answer() == 0
    assert len(rows(landing)) == 3
    for row in rows(landing):
        assert identity(landing.landed(row.source_sha256).read_bytes()) == row.source_sha256


def test_a_stop_aborts_even_a_peer_that_stopped_in_the_middle(landing: Landing) -> None:
    """If this failed, `radloop listen` could not be stopped while a modality hangs."""
    listener = Listener(landing, ae_title="RADLOOP", sites=SITES)
    port = listener.start()
    peer = Sender(port, [(CR, ExplicitVRLittleEndian)], timeout_s=20)
    peer.announce(CR, "1.2.3.1")
    peer.fragment(b"\x08\0", 1, 0)
    began = time.monotonic()
    listener.stop(grace_s=0.5)
    assert time.monotonic() - began < 5
    with pytest.raises(Aborted):
        peer.answer()
    peer.socket.close()


def test_an_idle_association_costs_next_to_nothing(listener: Listener) -> None:
    """If this failed, twenty open associations would take a processor from those that send."""
    peers = [Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) for _ in range(8)]
    time.sleep(1.5)
    spent = []
    for _ in range(3):  # what an earlier test has left behind may still be at work in one of them
        before = time.process_time()
        time.sleep(1.0)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.2, spent
    for peer in peers:
        peer.socket.sendall(ABORT)
        peer.socket.close()


def test_nothing_identified_is_outside_landing_and_the_crosswalk(
    listener: Listener, landing: Landing, home: Path
) -> None:
    """If this failed, the quick way in would have left a name in the catalog."""
    with Sender(listener.port, [(CR, ExplicitVRLittleEndian)]) as peer:
        assert peer.store(CR, "1.2.3.1", cut(encoded(image(1, PatientID="MRN0815")))) == 0
    [row] = rows(landing)
    there = landing._crosswalk.get(Identity.PATIENT, row.patient, who="test", why="test")
    assert there == {"PatientID": "MRN0815", "IssuerOfPatientID": "", "site": "north"}
    assert landing._crosswalk.get(Identity.INSTANCE, row.sop_uid, who="test", why="test") == {
        "SOPInstanceUID": "1.2.3.1"
    }
    open_ = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file() and path.suffix != ".dcm")
    assert b"MRN0815" not in open_
    assert b"CANARY" not in open_
    assert BytesIO(open_).read(1) != b""

"""The simulated modality against a real storage SCP on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from pynetdicom import AE, evt

from radloop.errors import EngineError
from radloop.testing.modality import NOT_SENDABLE, send

DX = DigitalXRayImageStorageForPresentation


class Peer:
    """A storage SCP that keeps what it gets, byte for byte."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.callers: set[str] = set()
        self.status = 0x0000
        ae = AE(ae_title="STORE")
        ae.require_calling_aet = ["XRAY"]
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless):
            ae.add_supported_context(DX, syntax)
        self.server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])
        self.port = int(self.server.server_address[1])

    def _store(self, event: evt.Event) -> int:
        self.callers.add(event.assoc.requestor.ae_title)
        self.received.append((str(event.context.transfer_syntax), event.request.DataSet.getvalue()))
        return self.status


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.server.shutdown()
    peer.server.server_close()


def written(path: Path, syntax: str) -> Path:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(ExplicitVRLittleEndian if syntax == RLELossless else syntax)
    ds.SOPClassUID, ds.SOPInstanceUID = DX, f"2.25.{abs(hash(path.name))}"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = DX, ds.SOPInstanceUID
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 60, 60, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(0).integers(0, 4096, (60, 60)).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def body(path: Path) -> bytes:
    """The data set as it lies in the file, after preamble and group 0002."""
    length = read_file_meta_info(path).FileMetaInformationGroupLength
    return path.read_bytes()[132 + 12 + length :]


def test_files_arrive_as_they_are_stored(tmp_path: Path, peer: Peer) -> None:
    """Bytes re-encoded on the way would hide from the tests what real modalities send."""
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless]
    files = [written(tmp_path / f"{i}.dcm", syntax) for i, syntax in enumerate(syntaxes)]
    seen: list[tuple[int, int]] = []
    counts = send(
        files,
        "127.0.0.1",
        peer.port,
        calling_ae="XRAY",
        called_ae="STORE",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert counts == {"0000": 3}
    assert peer.received == [(str(s), body(f)) for s, f in zip(syntaxes, files, strict=True)]
    assert peer.callers == {"XRAY"}
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_broken_files_are_sent_as_far_as_they_can_be(tmp_path: Path, peer: Peer) -> None:
    """What a listener does with half an instance can only be tested if somebody sends one."""
    whole = written(tmp_path / "1.dcm", ExplicitVRLittleEndian)
    cut = tmp_path / "2.dcm"
    cut.write_bytes(whole.read_bytes()[:3000])
    text = tmp_path / "3.dcm"
    text.write_text("not an image")
    empty = tmp_path / "4.dcm"
    empty.touch()
    counts = send([cut, text, empty, whole], "127.0.0.1", peer.port, calling_ae="XRAY", called_ae="STORE")
    assert counts == {"0000": 2, NOT_SENDABLE: 2}
    assert [data for _, data in peer.received] == [body(cut), body(whole)]


def test_the_peers_status_is_counted(tmp_path: Path, peer: Peer) -> None:
    """A demo that ignores refusals would count instances that nobody holds."""
    peer.status = 0xA700
    counts = send(
        [written(tmp_path / "1.dcm", ExplicitVRLittleEndian)],
        "127.0.0.1",
        peer.port,
        calling_ae="XRAY",
        called_ae="STORE",
    )
    assert counts == {"A700": 1}


# pynetdicom 3.0 leaves the socket of a refused connection to the garbage collector (transport.py, connect).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_peer_or_a_peer_that_does_not_know_us_is_an_error(tmp_path: Path, peer: Peer, free_port: int) -> None:
    """Silence here would be an empty dataset three stages later."""
    files = [written(tmp_path / "1.dcm", ExplicitVRLittleEndian)]
    with pytest.raises(EngineError, match="accepts no association"):
        send(files, "127.0.0.1", free_port, calling_ae="XRAY", called_ae="STORE")
    with pytest.raises(EngineError, match="got: rejected"):
        send(files, "127.0.0.1", peer.port, calling_ae="STRANGER", called_ae="STORE")
    assert peer.received == []


def test_a_hundred_files_take_seconds(tmp_path: Path, peer: Peer) -> None:
    """With Nagle's algorithm on one of the two sides it is 10 files a second; without, hundreds."""
    files = [written(tmp_path / "1.dcm", ExplicitVRLittleEndian)] * 100
    took = []
    for _ in range(3):
        start = time.perf_counter()
        assert send(files, "127.0.0.1", peer.port, calling_ae="XRAY", called_ae="STORE") == {"0000": 100}
        took.append(time.perf_counter() - start)
    assert min(took) < 5

"""Instances by HTTP POST: the real server on loopback, httpx and raw sockets as clients."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from radloop.catalog.database import StorageFull
from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landed import identity
from radloop.dicom.landing import Landing
from radloop.dicom.stow import Sender, Stow
from radloop.dicom.stow.parts import SPOOL_BYTES, Malformed, Part, Parts
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import EngineError, SettingsError

KEY = bytes(range(32))
CR = "1.2.840.10008.5.1.4.1.1.1"
SENDERS = {"nifi": Sender(b"secret-of-nifi", "north"), "ris": Sender(b"secret-of-ris", "south")}
AUTH = {"Authorization": "Bearer secret-of-nifi"}
TYPE = 'multipart/related; type="application/dicom"; boundary={}'


def open_landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


@pytest.fixture
def landing(home: Path) -> Landing:
    return open_landing(home)


@pytest.fixture
def stow(landing: Landing) -> Iterator[Stow]:
    with Stow(landing, senders=SENDERS) as running:
        yield running


def dicom(number: int, *, size: int = 16, study: int = 1, **changes: Any) -> bytes:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CR, f"1.2.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.4.{study}", f"1.2.5.{study}"
    ds.PatientID, ds.PatientName, ds.Modality = "MRN1", "CANARY^NAME", "CR"
    ds.Rows = ds.Columns = size
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(number).integers(0, 4096, (size, size), dtype=np.uint16).tobytes()
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def multipart(*files: bytes, boundary: str = "bound", kind: str = "application/dicom", end: bool = True) -> bytes:
    parts = b"".join(f"--{boundary}\r\nContent-Type: {kind}\r\n\r\n".encode() + file + b"\r\n" for file in files)
    return parts + (f"--{boundary}--\r\n".encode() if end else b"")


def post(stow: Stow, body: Any, *, path: str = "/studies", boundary: str = "bound", **headers: str) -> httpx.Response:
    sent = {**AUTH, "Content-Type": TYPE.format(boundary), **{k.replace("_", "-"): v for k, v in headers.items()}}
    return httpx.post(f"http://127.0.0.1:{stow.port}{path}", content=body, headers=sent, timeout=60)


def kept(response: httpx.Response) -> list[str]:
    """SOP instance UIDs of the ReferencedSOPSequence."""
    items = response.json().get("00081199", {}).get("Value", [])
    return [item["00081155"]["Value"][0] for item in items]


def reasons(response: httpx.Response) -> list[int]:
    """Failure reasons of both failure sequences."""
    found = response.json()
    items = [*found.get("00081198", {}).get("Value", []), *found.get("0008119A", {}).get("Value", [])]
    return [item["00081197"]["Value"][0] for item in items]


def stored(landing: Landing) -> list[str]:
    return [row.sop_uid for row in landing._catalog.pending()]


def leftovers(landing: Landing) -> list[Path]:
    """Files of landing and quarantine that no row knows."""
    known = {row.source_sha256 for row in landing._catalog.pending()}
    known |= {row.source_sha256 for row in landing._catalog.quarantined()}
    files = [path for folder in (landing.landing, landing.quarantine) for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if path.name != ".lock" and path.stem not in known]


def test_instances_are_kept_and_the_same_again_is_the_same(stow: Stow, landing: Landing) -> None:
    """If this failed, a gateway would lose studies, or resending after a lost answer would make doubles."""
    files = [dicom(n) for n in range(5)]
    response = post(stow, multipart(*files))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/dicom+json"
    assert kept(response) == [f"1.2.3.{n}" for n in range(5)]
    assert len(stored(landing)) == 5
    [row] = [row for row in landing._catalog.pending() if row.sop_uid == Pseudonymiser(KEY).uid("1.2.3.0")]
    assert (row.site, row.sender) == ("north", "nifi")
    again = post(stow, multipart(*files))
    assert (again.status_code, len(kept(again))) == (200, 5)
    assert (stow.counts["new"], stow.counts["same"], stow.counts["received"]) == (5, 5, 10)
    assert len(stored(landing)) == 5
    assert leftovers(landing) == []


def test_a_bad_part_does_not_block_the_good_ones(stow: Stow, landing: Landing) -> None:
    """If this failed, one broken file would hold up a study for ever, as in peers that take a payload whole or not at all."""
    response = post(stow, multipart(dicom(1), b"no DICOM at all", dicom(2), b"", dicom(3)))
    assert response.status_code == 202
    assert kept(response) == ["1.2.3.1", "1.2.3.2", "1.2.3.3"]
    assert reasons(response) == [0xC000, 0xC000]
    assert len(stored(landing)) == 3
    assert leftovers(landing) == []
    assert landing._catalog.quarantined() == []
    nothing = post(stow, multipart(b"no DICOM at all"))
    assert (nothing.status_code, reasons(nothing)) == (409, [0xC000])


def test_what_cannot_be_used_is_kept_in_quarantine_and_counts_as_received(stow: Stow, landing: Landing) -> None:
    """If this failed, a sender would repeat for ever what only a person can decide about."""
    response = post(stow, multipart(dicom(1, PatientID="")))
    assert (response.status_code, kept(response)) == (200, ["1.2.3.1"])
    [held] = landing._catalog.quarantined()
    assert held.reason == "NO_PATIENT_ID"
    assert stow.counts["quarantined"] == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer secret-of-nif"}, 401),
        ({"Authorization": "Basic secret-of-nifi"}, 401),
        ({"Content_Type": "application/json"}, 415),
        ({"Content_Type": "multipart/related; type=application/dicom+json; boundary=bound"}, 415),
        ({"Content_Type": 'multipart/related; type="application/dicom"'}, 400),
        ({"Accept": "text/html"}, 406),
    ],
)
def test_what_is_refused_before_a_byte_is_read(
    stow: Stow, landing: Landing, headers: dict[str, str], status: int
) -> None:
    """If this failed, anybody could put images into a hospital's data, or a misconfigured sender would get no reason."""
    response = post(stow, multipart(dicom(1)), **headers)
    assert response.status_code == status
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert stored(landing) == []
    assert stow.counts["rejected"] == 1


def test_other_paths_and_methods(stow: Stow) -> None:
    """If this failed, a client that asks for QIDO or WADO would wait for what is not offered."""
    base = f"http://127.0.0.1:{stow.port}"
    assert httpx.get(f"{base}/studies", headers=AUTH).status_code == 405
    assert httpx.post(f"{base}/nothing", headers=AUTH).status_code == 404


def test_each_sender_has_its_own_site(stow: Stow, landing: Landing) -> None:
    """If this failed, the images of one hospital would be taken for another's, and its patients confused."""
    post(stow, multipart(dicom(1)), Authorization="bearer secret-of-ris")
    assert [(row.sender, row.site) for row in landing._catalog.pending()] == [("ris", "south")]


def test_the_answer_in_xml(stow: Stow) -> None:
    """If this failed, a sender that reads the Native DICOM Model could not tell what was kept."""
    response = post(stow, multipart(dicom(1), b"x"), Accept="application/dicom+xml")
    assert response.headers["content-type"] == "application/dicom+xml"
    root = ElementTree.fromstring(response.content)
    space = "{http://dicom.nema.org/PS3.19/models/NativeDICOM}"
    found = {e.get("keyword"): [v.text for v in e.iter(f"{space}Value")] for e in root.iter(f"{space}DicomAttribute")}
    assert found["ReferencedSOPInstanceUID"] == ["1.2.3.1"]
    assert found["FailureReason"] == [str(0xC000)]


def test_instances_of_another_study_than_the_url_names(stow: Stow, landing: Landing) -> None:
    """If this failed, a mix-up at the sender would go unseen."""
    response = post(stow, multipart(dicom(1, study=1), dicom(2, study=2)), path="/studies/1.2.4.1")
    assert (response.status_code, kept(response), reasons(response)) == (202, ["1.2.3.1"], [0xA900])
    assert len(stored(landing)) == 1


@pytest.mark.parametrize(
    ("body", "status", "count"),
    [
        (b"", 400, 0),
        (b"nothing that begins like a part", 400, 0),
        (multipart(dicom(1), boundary="other"), 400, 0),
        (multipart(dicom(1), dicom(2), end=False)[:-100], 202, 1),
        (multipart(dicom(1), end=False), 400, 0),
        (b"preamble\r\n" + multipart(dicom(1)) + b"epilogue" * 1000, 200, 1),
        (b"--bound\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 400, 0),
        (multipart(), 400, 0),
    ],
)
def test_messages_that_are_malformed(stow: Stow, landing: Landing, body: bytes, status: int, count: int) -> None:
    """If this failed, half a message would be taken for a whole one, or what came whole in it be lost."""
    response = post(stow, body)
    assert response.status_code == status
    assert len(stored(landing)) == count
    assert leftovers(landing) == []


def test_a_large_part_is_not_held_in_memory(stow: Stow, landing: Landing) -> None:
    """If this failed, a few enhanced CTs at once would end the process for want of memory."""
    large = dicom(1, size=2600)
    assert len(large) > SPOOL_BYTES
    response = post(stow, multipart(large, dicom(2)))
    assert kept(response) == ["1.2.3.1", "1.2.3.2"]
    [row] = [row for row in landing._catalog.pending() if row.source_bytes == len(large)]
    assert landing.landed(row.source_sha256).read_bytes() == large
    assert leftovers(landing) == []


def _raw(stow: Stow, length: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", stow.port), timeout=30)
    head = f"POST /studies HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-of-nifi\r\nContent-Length: {length}\r\n"
    connection.sendall((head + f"Content-Type: {TYPE.format('bound')}\r\n\r\n").encode())
    return connection


def test_a_gigabyte_declared_and_not_sent(stow: Stow, landing: Landing) -> None:
    """If this failed, a client that breaks off would leave pieces, or a lying length would take the memory."""
    connection = _raw(stow, 1 << 30)
    connection.sendall(multipart(dicom(1), end=False) + b"--bound\r\n\r\n" + b"half")
    deadline = time.monotonic() + 60
    while stow.active != 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    connection.close()
    while stow.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stow.active == 0
    assert len(stored(landing)) == 1, "the instance that came whole is kept"
    assert leftovers(landing) == []
    assert post(stow, multipart(dicom(1), dicom(2))).status_code == 200
    assert stow.counts["same"] == 1


def test_a_client_that_stops_sending_is_let_go(landing: Landing) -> None:
    """If this failed, a few dead connections would fill all places, and nobody else could send."""
    with Stow(landing, senders=SENDERS, max_requests=1, idle_s=0.5) as stow:
        connection = _raw(stow, 10_000)
        connection.sendall(multipart(dicom(1), end=False))
        deadline = time.monotonic() + 60
        while stow.active != 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        busy = post(stow, multipart(dicom(2)))
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "120")
        assert b" 408 " in connection.recv(100)
        connection.close()
        assert post(stow, multipart(dicom(2))).status_code == 200


def test_a_slow_client_gets_through(stow: Stow, landing: Landing) -> None:
    """If this failed, a slow line would never deliver a study."""
    body = multipart(dicom(1), dicom(2))

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(body), 97):
            yield body[start : start + 97]

    assert kept(post(stow, slowly())) == ["1.2.3.1", "1.2.3.2"]


def test_several_clients_at_once(stow: Stow, landing: Landing) -> None:
    """If this failed, two gateways sending together would get failures, or instances would be lost between them."""
    found: list[int] = []

    def send(first: int) -> None:
        found.append(post(stow, multipart(*(dicom(n) for n in range(first, first + 12)))).status_code)

    threads = [threading.Thread(target=send, args=(8 * n,)) for n in range(4)]  # ranges overlap
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 4
    assert len(stored(landing)) == 36


def test_a_full_disk_is_told_for_each_instance(stow: Stow, landing: Landing, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a sender would delete what there was no room for."""
    real = landing.receive_one

    def full_for_the_second(arrival: Any) -> Any:
        if arrival.sop_uid == "1.2.3.2":
            raise StorageFull("no space left")
        return real(arrival)

    monkeypatch.setattr(landing, "receive_one", full_for_the_second)
    response = post(stow, multipart(dicom(1), dicom(2), dicom(3)))
    assert (response.status_code, kept(response), reasons(response)) == (202, ["1.2.3.1", "1.2.3.3"], [0xA700])
    response = post(stow, multipart(dicom(2)))
    assert (response.status_code, reasons(response)) == (503, [0xA700])
    assert int(response.headers["retry-after"]) > 0
    monkeypatch.undo()
    assert post(stow, multipart(dicom(2))).status_code == 200


def test_nothing_of_a_patient_is_logged(
    stow: Stow, landing: Landing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If this failed, a log would name patients or hold a token."""

    def broken(_arrival: Any) -> Any:
        raise RuntimeError("CANARY^NAME")

    monkeypatch.setattr(landing, "receive_one", broken)
    response = post(stow, multipart(dicom(1)))
    assert (response.status_code, reasons(response)) == (409, [0x0110])
    assert "could not be kept: RuntimeError" in caplog.text
    assert "CANARY" not in caplog.text + response.text
    assert "secret" not in caplog.text


def test_settings_that_cannot_work(landing: Landing, stow: Stow) -> None:
    """If this failed, a receiver without tokens would take from all, or a taken port end in a stack trace."""
    with pytest.raises(SettingsError, match="nobody may send"):
        Stow(landing, senders={})
    with pytest.raises(SettingsError, match="the same token"):
        Stow(landing, senders={"a": Sender(b"x", "s"), "b": Sender(b"x", "s")})
    with pytest.raises(EngineError, match=r"cannot listen on 127\.0\.0\.1"):
        Stow(landing, senders=SENDERS, port=stow.port).start()


_SERVE = """
import sys, signal
from pathlib import Path
from tests_stow import SENDERS, open_landing
from radloop.dicom.stow import Stow
landing = open_landing(Path(sys.argv[1]))
landing.recover()
print(Stow(landing, senders=SENDERS).start(), flush=True)
signal.pause()
"""


def test_a_killed_server_has_what_it_acknowledged_once(home: Path, tmp_path: Path) -> None:
    """If this failed, a gateway that trusts our 200 would have deleted what we lost."""
    (tmp_path / "tests_stow.py").write_bytes(Path(__file__).read_bytes())
    seeded = random.Random(7)
    acknowledged: set[str] = set()
    for last in (False, False, True):
        with subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(home)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        ) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            killer = threading.Timer(30 if last else seeded.uniform(0.1, 0.6), server.send_signal, [signal.SIGKILL])
            killer.start()
            try:
                for start in range(0, 60, 6):
                    body = multipart(*(dicom(n, size=64) for n in range(start, start + 6)))
                    headers = {**AUTH, "Content-Type": TYPE.format("bound")}
                    response = httpx.post(f"http://127.0.0.1:{port}/studies", content=body, headers=headers, timeout=30)
                    assert response.status_code == 200
                    acknowledged |= set(kept(response))
            except httpx.TransportError:
                assert not last
            finally:
                killer.cancel()
                server.kill()
    landing = open_landing(home)
    rows = landing._catalog.pending()
    assert {Pseudonymiser(KEY).uid(uid) for uid in acknowledged} == {row.sop_uid for row in rows}
    assert len(acknowledged) == len(rows) == 60
    assert leftovers(landing) == []


@given(
    st.lists(st.binary(max_size=300).filter(lambda b: b"--B" not in b), max_size=5),
    st.lists(st.integers(min_value=1, max_value=90), min_size=1, max_size=8),
    st.sampled_from(["B", "B=_?:", "B" * 70]),
)
@settings(deadline=None)
def test_however_the_bytes_are_cut_the_parts_are_the_same(files: list[bytes], cuts: list[int], boundary: str) -> None:
    """If this failed, an instance would be damaged by where the network happened to cut."""
    body = multipart(*files, boundary=boundary)
    parser = Parts(boundary.encode(), Path("/tmp"), 1 << 20)
    found: list[Part] = []
    at = 0
    while at < len(body):
        for cut in cuts:
            found += parser.feed(body[at : at + cut])
            at += cut
    parser.end()
    assert [bytes(part.data) for part in found] == files
    assert {part.content_type for part in found} <= {"application/dicom"}


def test_lines_that_only_begin_like_the_boundary(tmp_path: Path) -> None:
    """If this failed, pixel data that happens to hold the boundary's first bytes would cut an instance short."""
    parser = Parts(b"B", tmp_path, 1 << 20)
    body = b"--B\r\n\r\none\r\n--Bx\r\n--\r\n--B \r\n\r\ntwo\r\n--B--"
    found = [part for byte in body for part in parser.feed(bytes([byte]))]
    assert [bytes(part.data) for part in found] == [b"one\r\n--Bx\r\n--", b"two"]
    with pytest.raises(Malformed):
        Parts(b"B", tmp_path, 10).end()


def test_a_part_larger_than_allowed_is_passed_over(tmp_path: Path) -> None:
    """If this failed, one endless part would take the disk, or the parts after it be lost."""
    parser = Parts(b"B", tmp_path, 1000)
    large, small = parser.feed(multipart(bytes(5000), b"x", boundary="B"))
    assert (large.too_large, large.size, small.too_large, bytes(small.data)) == (True, 5000, False, b"x")


def test_a_header_that_names_another_instance(stow: Stow, landing: Landing) -> None:
    """If this failed, an instance would be lost, or kept under another's identity, because its writer was careless."""
    file = dicom(1)
    wrong = file.replace(b"UI\x08\x001.2.3.1\0", b"UI\x08\x001.2.3.9\0", 1)
    assert wrong != file
    response = post(stow, multipart(wrong))
    assert response.status_code == 200
    [row] = landing._catalog.pending()
    assert row.sop_uid == Pseudonymiser(KEY).uid("1.2.3.1")
    assert landing.landed(row.source_sha256).read_bytes() == wrong
    assert post(stow, multipart(file)).status_code == 200
    assert stow.counts["same"] == 1, "the data set is the same, whatever is written before it"


def test_memory_that_is_used_again_holds_nothing_of_the_part_before(stow: Stow, landing: Landing) -> None:
    """If this failed, the end of one patient's image would stand in another's."""
    sizes = [300, 40, 800, 16, 500, 64]  # up to 1.3 MB: within and beyond what is used again
    for turn in range(3):
        post(stow, multipart(*(dicom(100 * turn + n, size=size) for n, size in enumerate(sizes))))
    assert len(stow._pool._free) > 0
    wanted = {dicom(100 * turn + n, size=size)[-200:] for turn in range(3) for n, size in enumerate(sizes)}
    files = [landing.landed(row.source_sha256) for row in landing._catalog.pending()]
    assert {path.read_bytes()[-200:] for path in files} == wanted
    assert all(identity(path.read_bytes()) == path.stem for path in files)


def test_the_same_instance_by_c_store_and_by_stow_is_one(stow: Stow, landing: Landing) -> None:
    """If this failed, a study sent by two routes would look as if it had been corrected."""
    file = dicom(1)
    landing.receive(file, site="north", sender="CT1")
    post(stow, multipart(b"\1" * 128 + file[128:]))
    assert stow.counts["same"] == 1
    assert len(stored(landing)) == 1

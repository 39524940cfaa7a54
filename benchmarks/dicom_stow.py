"""STOW-RS received: ours and Orthanc's DICOMweb plugin, the same client, in one run.

Method: synthetic CT (512 x 512, 16 bit: 526 KB a file), each instance sent once. The client is one process: threads with one
connection each (http.client, TCP_NODELAY), `FILES` instances a request, bodies prepared before. Each server is a process of its
own on this machine, its folder on the same file system. Ours is durable (fsync before the answer) and registers each instance
under pseudonyms; Orthanc runs as Debian ships it, with its DICOMweb plugin, and is not durable. Rounds alternate, ours, Orthanc,
ours, Orthanc; medians of rounds: files/s by the wall, and the server's CPU time (user + system, /proc/PID/stat) a file, which
does not depend on what else this machine does.

Promise: 1 ms of server CPU a file of 520 KB (Orthanc measured here: 5 ms).

    .venvs/core/bin/python benchmarks/dicom_stow.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS, ROUNDS, FILES, REQUESTS = (1, 4), 3, 10, 20
PROMISE_MS = 1.0
KEY = bytes(range(32)).hex()
_OURS = """
import signal, sys
from pathlib import Path
from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.stow import Sender, Stow
from radloop.dicom.uids import Pseudonymiser
home, key = Path(sys.argv[1]), bytes.fromhex(sys.argv[2])
catalog = Catalog(f"sqlite:///{home}/catalog.db")
landing = Landing(home, catalog, Pseudonymiser(key), Crosswalk(home / "identity" / "crosswalk.db", key, catalog.ledger))
landing.recover()
print(Stow(landing, senders={"bench": Sender(b"bench", "site")}).start(), flush=True)
signal.pause()
"""


class Server:
    """A running server: where it listens, its process."""

    def __init__(self, name: str, port: int, path: str, pid: int, token: str) -> None:
        self.name, self.port, self.path, self.pid, self.token = name, port, path, pid, token

    def cpu_s(self) -> float:
        """User and system time of its process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def ours(folder: Path) -> Iterator[Server]:
    """Our receiver in a process of its own."""
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", _OURS, str(folder), KEY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield Server("radloop", int(process.stdout.readline()), "/studies", process.pid, "Bearer bench")
        process.kill()


@contextmanager
def orthanc(folder: Path) -> Iterator[Server]:
    """Orthanc with its DICOMweb plugin."""
    from radloop.testing.pacs_peers import Orthanc

    with Orthanc(folder, AuthenticationEnabled=False, TcpNoDelay=True) as running:
        port = int(running.rest.rpartition(":")[2])
        process = running._process
        assert process is not None
        yield Server("orthanc", port, "/dicom-web/studies", process.pid, "Bearer none")


def template() -> tuple[bytes, list[int]]:
    """One CT instance, and where the digits of its own UID stand in it."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, "1.2.3.4.10000000"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3.5", "1.2.3.6"
    ds.PatientID, ds.PatientName, ds.Modality, ds.StudyDate = "MRN-1", "DOE^JANE", "CT", "20200101"
    ds.AccessionNumber, ds.PatientBirthDate, ds.PatientSex, ds.StudyTime = "A1", "19500101", "F", "120000"
    ds.Manufacturer, ds.InstanceNumber, ds.ImagePositionPatient = "ACME", 1, [0, 0, 0]
    ds.Rows = ds.Columns = 512
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.random.default_rng(0).integers(0, 4096, (512, 512), dtype=np.uint16).tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    data, places, at = file.getvalue(), [], -1
    while (at := data.find(b"10000000", at + 1)) >= 0:
        places.append(at)
    return data, places


def body(data: bytes, places: list[int], first: int) -> bytes:
    """A multipart message of FILES instances."""
    out = bytearray()
    for number in range(first, first + FILES):
        one = bytearray(data)
        for place in places:
            one[place : place + 8] = b"%08d" % (10_000_000 + number)
        out += b"--0d5f4c1e-7a34-4c1d-9a1b-6f1f0f6b2c11\r\nContent-Type: application/dicom\r\n\r\n" + one + b"\r\n"
    return bytes(out + b"--0d5f4c1e-7a34-4c1d-9a1b-6f1f0f6b2c11--\r\n")


def load(server: Server, bodies: list[bytes]) -> None:
    """One client: a connection, requests one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    headers = {
        "Authorization": server.token,
        "Accept": "application/dicom+json",
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=0d5f4c1e-7a34-4c1d-9a1b-6f1f0f6b2c11',
    }
    for one in bodies:
        connection.request("POST", server.path, one, headers)
        response = connection.getresponse()
        said = response.read()
        assert response.status == 200, (server.name, response.status, said[:300])
    connection.close()


def measure(server: Server, clients: int, data: bytes, places: list[int], first: int) -> tuple[float, float]:
    """Files/s, and ms of server CPU a file."""
    share = REQUESTS // clients
    bodies = [
        [body(data, places, first + (client * share + n) * FILES) for n in range(share)] for client in range(clients)
    ]
    threads = [threading.Thread(target=load, args=(server, mine)) for mine in bodies]
    cpu, began = server.cpu_s(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, files = time.perf_counter() - began, share * clients * FILES
    return files / took, (server.cpu_s() - cpu) / files * 1000


def run(rounds: int, *, peers: bool) -> list[dict[str, Any]]:
    """All rounds; one line for each server and number of clients."""
    data, places = template()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="radloop-stow-") as folder:
        servers = [stack.enter_context(ours(Path(folder, "ours")))]
        if peers:
            servers.append(stack.enter_context(orthanc(Path(folder, "orthanc"))))
        first = 0
        for number in range(rounds + 1):
            for clients in CLIENTS:
                for server in servers:
                    told = measure(server, clients, data, places, first)
                    if number:  # the first warms
                        found.setdefault((server.name, clients), []).append(told)
                first += FILES * REQUESTS
    return [
        {
            "server": name,
            "clients": clients,
            "files_s": round(statistics.median(rate for rate, _ in all_), 1),
            "server_cpu_ms": round(statistics.median(cpu for _, cpu in all_), 2),
        }
        for (name, clients), all_ in found.items()
    ]


def main() -> int:
    """Print the table; 1 if the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    lines = run(chosen.rounds, peers=not chosen.without_peers)
    if chosen.json:
        print(json.dumps(lines))
    else:
        print(f"{'server':<10}{'clients':>8}{'files/s':>10}{'server CPU ms/file':>20}")
        for line in lines:
            print(f"{line['server']:<10}{line['clients']:>8}{line['files_s']:>10}{line['server_cpu_ms']:>20}")
        print(f"promise: {PROMISE_MS} ms of server CPU a file")
    return int(max(line["server_cpu_ms"] for line in lines if line["server"] == "radloop") > PROMISE_MS)


if __name__ == "__main__":
    sys.exit(main())

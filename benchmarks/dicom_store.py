"""C-STORE received: radloop and its peers, one and four associations, the same sender, in one run.

Method: 800 CT slices of 512 x 512 (520 KB) of one study, each with its own SOPInstanceUID, their files in the page cache.
dcmtk's `storescu` sends them, over one association or a quarter each over four. Every server runs in turn, A B C A B C, each
round with an empty store; its start is not timed. TCP_NODELAY on both ends, 128 KB PDUs everywhere. Medians over the rounds.
What an answer means differs: radloop's says that the file is fsynced and the instance in the catalog. Orthanc runs with
SyncStorageArea. dcmtk's storescp and pynetdicom's plain SCP write without fsync, and keep no catalog: they show what the network
and the sender allow. The limit printed is write + fsync of such files, and of their folder, one after the other.
CPU is the server's, user and system, a file.

Promises, on a machine of two cores that does nothing else: 690 files a second with one association, 990 with four. Exits with 1
where one is not kept.

    python benchmarks/dicom_store.py [--instances 800] [--rounds 3] [--only radloop,orthanc,storescp,pynetdicom]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SIDE, PDU = 512, 131072
PROMISED = {1: 690.0, 4: 990.0}
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
TICKS = os.sysconf("SC_CLK_TCK")
Command = Callable[[Path, int], list[str]]


def make(folder: Path, instances: int) -> None:
    """One study of CT slices, in four folders."""
    slices = np.random.default_rng(0).normal(40, 20, (SIDE, SIDE * 2)).astype(np.int16)
    for number in range(instances):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.3.4.{number}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
        ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "BENCH", "Bench^Mark", "19700101", "O"
        ds.Modality, ds.Manufacturer, ds.AccessionNumber, ds.StudyID = "CT", "radloop", "ACC1", "1"
        ds.StudyDate, ds.StudyTime, ds.SeriesNumber, ds.InstanceNumber = "20260101", "120000", 1, number
        ds.ImageType, ds.KVP, ds.SliceThickness, ds.PatientPosition = ["ORIGINAL", "PRIMARY", "AXIAL"], 120, 1, "HFS"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.RescaleIntercept, ds.RescaleSlope = [0.7, 0.7], -1024, 1
        ds.Rows = ds.Columns = SIDE
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.PixelData = np.roll(slices, number, axis=1)[:, :SIDE].tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / str(number % 4) / f"{number:05}.dcm"
        path.parent.mkdir(exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        path.read_bytes()


# Servers


def radloop(home: Path, port: int) -> list[str]:
    """This listener, in a process of its own."""
    return [sys.executable, __file__, "--serve", "radloop", str(home), str(port)]


def pynetdicom(home: Path, port: int) -> list[str]:
    """pynetdicom's SCP that writes files, as its documentation shows."""
    return [sys.executable, __file__, "--serve", "pynetdicom", str(home), str(port)]


def storescp(home: Path, port: int) -> list[str]:
    """dcmtk's, bit-preserving, a process for each association."""
    return ["storescp", "--fork", "+B", "-pdu", str(PDU), "-od", str(home), str(port)]


def orthanc(home: Path, port: int) -> list[str]:
    """Orthanc with fsync, without HTTP."""
    settings = {
        "Name": "bench",
        "StorageDirectory": str(home),
        "IndexDirectory": str(home),
        "HttpServerEnabled": False,
        "DicomAet": "RADLOOP",
        "DicomPort": port,
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "DicomThreadsCount": 4,
        "MaximumPduLength": PDU,
        "SyncStorageArea": True,
        "SaveJobs": False,
        "Plugins": [],
    }
    (home / "orthanc.json").write_text(json.dumps(settings))
    return ["Orthanc", str(home / "orthanc.json")]


SERVERS: dict[str, tuple[str, Command]] = {
    "radloop": ("radloop: fsync, catalog", radloop),
    "orthanc": ("Orthanc: fsync, index", orthanc),
    "storescp": ("storescp: no fsync", storescp),
    "pynetdicom": ("pynetdicom: no fsync", pynetdicom),
}


def serve(kind: str, home: Path, port: int) -> None:
    """Run one of our own servers until it is ended."""
    if kind == "radloop":
        from radloop.catalog.store import Catalog
        from radloop.dicom.identity import Crosswalk
        from radloop.dicom.landing import Landing
        from radloop.dicom.listener import Listener
        from radloop.dicom.uids import Pseudonymiser

        key = bytes(range(32))
        catalog = Catalog(f"sqlite:///{home}/catalog.db")
        crosswalk = Crosswalk(home / "identity" / "crosswalk.db", key, catalog.ledger)
        landing = Landing(home, catalog, Pseudonymiser(key), crosswalk)
        Listener(landing, ae_title="RADLOOP", sites={"STORESCU": "bench"}, port=port).start()
    else:
        from pynetdicom import AE, AllStoragePresentationContexts, evt

        def store(event: evt.Event) -> int:
            (home / f"{event.request.AffectedSOPInstanceUID}.dcm").write_bytes(event.encoded_dataset())
            return 0

        def no_delay(event: evt.Event) -> None:
            event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        ae = AE(ae_title="RADLOOP")
        ae.maximum_pdu_size = PDU
        ae.supported_contexts = AllStoragePresentationContexts
        handlers = [(evt.EVT_C_STORE, store), (evt.EVT_CONN_OPEN, no_delay)]
        ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    threading.Event().wait()


# Measuring


def once(command: Command, study: Path, instances: int, associations: int, scratch: Path) -> tuple[float, float]:
    """Files a second, and the server's CPU in milliseconds a file."""
    home = Path(tempfile.mkdtemp(dir=scratch))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with (home / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            command(home, port), env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True, cwd=home
        )
    try:
        wait_for(server, port, home)
        before = cpu_s(server.pid)
        began = time.perf_counter()
        senders = [sender(port, study, parts) for parts in (["0123"] if associations == 1 else "0123")]
        for process in senders:
            _, errors = process.communicate()
            assert process.returncode == 0, errors.decode()
        took = time.perf_counter() - began
        spent = cpu_s(server.pid) - before
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        shutil.rmtree(home)
    return instances / took, 1000 * spent / instances


def sender(port: int, study: Path, parts: str) -> subprocess.Popen[bytes]:
    """dcmtk's storescu: pynetdicom puts a program of the same name into an environment's bin."""
    program = str(Path(shutil.which("dcmsend") or "dcmsend").with_name("storescu"))
    folders = [str(study / part) for part in parts]
    command = [program, "-aec", "RADLOOP", "+sd", "+r", "127.0.0.1", str(port), *folders]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(server: subprocess.Popen[bytes], port: int, home: Path) -> None:
    """Return when it listens."""
    for _ in range(600):
        assert server.poll() is None, (home / "log.txt").read_text()
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    time.sleep(0.5)  # what it does after it listens


def cpu_s(pid: int) -> float:
    """Seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def limit(study: Path, scratch: Path) -> float:
    """Files a second: write, fsync, fsync of the folder."""
    home = Path(tempfile.mkdtemp(dir=scratch))
    contents = [path.read_bytes() for path in sorted(study.glob("*/*.dcm"))[:200]]
    began = time.perf_counter()
    for number, content in enumerate(contents):
        for path, flags in ((home / str(number), os.O_CREAT | os.O_WRONLY), (home, os.O_RDONLY)):
            handle = os.open(path, flags, 0o600)
            if path != home:
                os.write(handle, content)
            os.fsync(handle)
            os.close(handle)
    took = time.perf_counter() - began
    shutil.rmtree(home)
    return len(contents) / took


def main() -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--instances", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(SERVERS))
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "HOME", "PORT"))
    told = parser.parse_args()
    if told.serve:
        serve(told.serve[0], Path(told.serve[1]), int(told.serve[2]))
    chosen = [name for name in SERVERS if name in told.only.split(",")]
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    limits = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, study = Path(folder), Path(folder) / "study"
        study.mkdir()
        make(study, told.instances)
        os.sync()
        for _ in range(told.rounds):
            limits.append(limit(study, scratch))
            for name in chosen:
                for associations in (1, 4):
                    found = once(SERVERS[name][1], study, told.instances, associations, scratch)
                    rates.setdefault((name, associations), []).append(found)
    return report(chosen, rates, limits)


def report(chosen: list[str], rates: dict[tuple[str, int], list[tuple[float, float]]], limits: list[float]) -> int:
    """Print medians, ratios and promises; the exit code."""
    floor = statistics.median(limits)
    print(f"{'files a second':26} associations   median      min      max   of the limit   CPU ms a file   radloop is")
    kept = True
    for name in chosen:
        for associations in (1, 4):
            found = [rate for rate, _ in rates[name, associations]]
            cpu, median = statistics.median(c for _, c in rates[name, associations]), statistics.median(found)
            ratio = ""
            if name != "radloop" and "radloop" in chosen:
                ratio = f"{statistics.median(r for r, _ in rates['radloop', associations]) / median:9.1f}x"
            figures = f"{median:8.0f} {min(found):8.0f} {max(found):8.0f}"
            print(f"{SERVERS[name][0]:26} {associations:12} {figures} {median / floor:14.2f} {cpu:15.2f}   {ratio}")
    print(f"{'limit: write + fsync':26} {1:12} {floor:8.0f} {min(limits):8.0f} {max(limits):8.0f}")
    for associations, promised in PROMISED.items() if "radloop" in chosen else ():
        median = statistics.median(rate for rate, _ in rates["radloop", associations])
        kept &= median >= promised
        print(
            f"radloop, {associations} association(s): {median:.0f} files a second, promised {promised:.0f}: "
            f"{'kept' if median >= promised else 'NOT KEPT'}"
        )
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())

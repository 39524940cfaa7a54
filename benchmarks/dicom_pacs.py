"""Fetching from a PACS: ours into the landing zone (durable, catalogued) beside what only writes files, in one run.

Method: Orthanc on loopback holds a study of CT slices of 512 x 512 (520 KB). Ours is `radloop.dicom.pacs.fetch` by C-GET, C-MOVE
and WADO-RS into a new landing zone each time: listed, compared, retrieved, fsynced, in crosswalk and catalog. Beside it, not
durable: dcmtk's `getscu` and `movescu` (bit preserving), and httpx that reads the same WADO-RS answer and throws it away.
TCP_NODELAY on both sides, the same largest PDU (131072). A first round warms up; then rounds alternate; medians of instances a
second, wall clock; CPU of our process alone.

    .venvs/core/bin/python benchmarks/dicom_pacs.py --instances 200 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from radloop.dicom.pacs import Query
from radloop.dicom.pacs.fetch import fetch
from radloop.dicom.pacs.web import DicomWeb
from radloop.testing.pacs_peers import Orthanc, free_port
from radloop.testing.pacs_suite import ROOT, Archive, open_target

STUDY = f"{ROOT}.1"
Run = Callable[[Path], float]


def ours(peer: Orthanc, way: str) -> Run:
    """Fetch the study; CPU seconds of this process."""

    def run(folder: Path) -> float:
        if way == "WADO-RS":
            pacs = DicomWeb("main", peer.url, user="radloop", password=peer.password)
        else:
            peer.moves = way == "C-MOVE"
            pacs = peer.pacs()  # type: ignore[assignment]
        target = open_target(folder)
        begun = time.process_time()
        with pacs:
            report = fetch(pacs, Query(study_uids=(STUDY,)), target, actor="benchmark")
        assert report.ways == {way: report.received}, report
        assert report.missing == 0 and report.received == len(peer_files), report
        return time.process_time() - begun

    return run


def dcmtk(peer: Orthanc, *command: str) -> Run:
    """A program of dcmtk that writes files."""

    def run(folder: Path) -> float:
        folder.mkdir()
        keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={STUDY}"]
        said = [
            "-S",
            "-aet",
            "RADLOOP",
            "-aec",
            peer.title,
            "-od",
            str(folder),
            "+B",
            *keys,
            "127.0.0.1",
            str(peer.port),
        ]
        env = {**os.environ, "TCP_NODELAY": "1"}
        done = subprocess.run([*command, *said], env=env, cwd=folder, check=True, capture_output=True, text=True)
        assert len(list(folder.iterdir())) == len(peer_files), done.stderr or done.stdout
        return 0.0

    return run


def download(peer: Orthanc) -> Run:
    """The same answer, read and thrown away."""

    def run(_: Path) -> float:
        accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
        begun = time.process_time()
        with (
            httpx.Client(auth=("radloop", peer.password), trust_env=False, timeout=120) as client,
            client.stream("GET", f"{peer.url}/studies/{STUDY}", headers=accept) as response,
        ):
            size = sum(len(chunk) for chunk in response.iter_bytes(1 << 20))
        assert size > sum(path.stat().st_size for path in peer_files) * 0.9
        return time.process_time() - begun

    return run


peer_files: list[Path] = []


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of a name")
    told = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="radloop-pacs-"))
    try:
        with Orthanc(home / "orthanc") as peer:
            (home / "given").mkdir()
            archive = Archive(peer, home / "given")
            archive.add("1", told.instances, side=512)
            peer_files.extend(archive.files.values())
            moves = ["-aem", "RADLOOP", "+P", str(peer.move_port)]
            runs: dict[str, Run] = {
                "radloop C-GET": ours(peer, "C-GET"),
                "dcmtk getscu (not durable)": dcmtk(peer, "getscu"),
                "radloop C-MOVE": ours(peer, "C-MOVE"),
                "dcmtk movescu (not durable)": dcmtk(peer, "movescu", *moves),
                "radloop WADO-RS": ours(peer, "WADO-RS"),
                "httpx WADO-RS (thrown away)": download(peer),
            }
            measure(runs, told.rounds, told.only, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def measure(runs: dict[str, Run], rounds: int, only: str, home: Path) -> None:
    """Rounds that alternate; a table."""
    for name, run in runs.items():  # imports, and what the PACS keeps in memory
        if only in name:
            run(home / f"first-{free_port()}")
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, run in runs.items():
            if only not in name:
                continue
            folder = home / f"run{number}-{free_port()}"
            os.sync()
            begun = time.perf_counter()
            cpu = run(folder)
            walls.setdefault(name, []).append(time.perf_counter() - begun)
            cpus.setdefault(name, []).append(cpu)
            shutil.rmtree(folder, ignore_errors=True)
    count = len(peer_files)
    print(f"{'what':32} {'instances/s':>12} {'spread':>15} {'our CPU ms':>11}")
    for name, times in walls.items():
        rates = sorted(count / seconds for seconds in times)
        spread = f"{rates[0]:.0f} to {rates[-1]:.0f}"
        cpu = statistics.median(cpus[name]) / count * 1000
        print(f"{name:32} {statistics.median(rates):12.0f} {spread:>15} {cpu or float('nan'):11.2f}")


if __name__ == "__main__":
    main()

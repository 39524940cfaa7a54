"""Headers indexed and files de-identified: radloop and its peers on the same files, in one run.

Method: CT slices of 512 x 512 (520 KB), in series of 50, their headers those of real scanners where RADLOOP_TEST_DATA has
them (GE 238 elements, Siemens 110 to 126, explicit and implicit VR; each slice with its own UID, number, position and time;
what says that they are de-identified already is taken out), else those of pydicom's CT_small. The files are in the page
cache, the output goes to the same disk. Every case runs in turn, A B C A B C, each round with an empty folder and, for
radloop, with nothing remembered of the round before. Medians over the rounds, in files a second; CPU is user and system, a
file. Peers run on the first 100 files, in their own process, whose start and imports are not timed; command-line tools
(gdcmanon, gdcmscanner) take the whole folder, and their start counts.

What they do differs. radloop's gate reads what will be written before it is written; "digest" adds the SHA-256 of the output,
which no peer computes. The limits printed: `cp -r` of the files, pydicom reading them, and opening and reading 16 KB of each.
RSNA CTP, the most widely deployed, is a Java program that no package registry has, and is not measured.

Promises, on a machine of two cores that does nothing else: 1650 files a second de-identified by one process without gate and
digest, 1000 with the gate; twice as many (1.7 times) by two processes; 8000 headers. Exits with 1 where one is not kept.

    python benchmarks/dicom.py [--files 1000] [--rounds 3] [--no-peers]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.deidentify.rewrite import rewrite
from radloop.dicom.index import Index
from radloop.dicom.uids import Pseudonymiser

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venvs/bench/bin/python"
KEYWORDS = (HERE / "dicom_keywords.txt").read_text().split()
SIDE, SERIES, PEER_FILES = 512, 50, 100
_SAID = ("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence")
Took = tuple[float, float]
Case = Callable[[list[Path], Path], Took]


# ---- the files


def real() -> list[Path]:
    """Real CT slices of this size, uncompressed."""
    data = Path(os.environ.get("RADLOOP_TEST_DATA", HERE.parent / "../shared/data"))
    return sorted((data / "ct_contrast_tcga").rglob("*.dcm"))


def make(folder: Path, count: int) -> list[Path]:
    """So many slices, in series of 50."""
    sources = real() or [Path(pydicom.data.__file__).parent / "test_files" / "CT_small.dcm"]
    files = []
    for number in range(count):
        series, slice_ = divmod(number, SERIES)
        if slice_ == 0:
            ds = pydicom.dcmread(sources[series % len(sources)])
            if ds.Rows != SIDE:
                ds.Rows = ds.Columns = SIDE
                ds.PixelRepresentation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 16, 16, 15
                ds.PixelData = np.random.default_rng(0).integers(-1024, 1024, (SIDE, SIDE), dtype=np.int16).tobytes()
            for keyword in _SAID:
                ds.pop(Tag(keyword), None)
            ds.PatientName, ds.PatientID = f"Bench^Mark {series}", f"BENCH{series}"
        own(ds, series, slice_)
        files.append(folder / f"{series:03d}_{slice_:02d}.dcm")
        ds.save_as(files[-1])
    return files


def own(ds: Dataset, series: int, number: int) -> None:
    """What differs from slice to slice."""
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.826.0.1.3680043.8.{series}.1", f"1.2.826.0.1.3680043.8.{series}.2"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.8.{series}.3.{number + 1}"
    ds.InstanceNumber, ds.SliceLocation = number + 1, f"{2.5 * number - 100:.4f}"
    ds.ImagePositionPatient[2] = f"{2.5 * number - 100:.4f}"
    for keyword in ("ContentTime", "AcquisitionTime"):
        if keyword in ds:
            ds[keyword].value = f"1230{number:02d}.{number * 7919 % 10**6:06d}"


# ---- what is timed


def timed(run: Callable[[], object]) -> Took:
    """Seconds of wall clock, and of CPU in this process and its children."""
    before, began = os.times(), time.perf_counter()
    run()
    after = os.times()
    return time.perf_counter() - began, sum(after[:4]) - sum(before[:4])


def cleaner() -> Deidentifier:
    return Deidentifier(Pseudonymiser(bytes(range(32))), profile="basic")


def plain(files: list[Path], out: Path, owner: Deidentifier | None = None) -> Took:
    """No gate, no digest: what the peers do."""
    fast = (owner or cleaner())._fast

    def run() -> None:
        for file in files:
            if rewrite(fast, file, out / file.name, site="A", tally=None, gate=None, digest=False) is None:
                raise SystemExit(f"the fast path refused {file.name}")

    return timed(run)


def gated(files: list[Path], out: Path, *, digest: bool = False) -> Took:
    """As `radloop deidentify` does it."""
    owner = cleaner()
    return timed(lambda: [owner.clean_file(file, out / file.name, site="A", digest=digest) for file in files])


def slowly(files: list[Path], out: Path) -> Took:
    """The slow path, through pydicom, for comparison."""
    owner = cleaner()
    owner._fast.head = lambda *_: None  # type: ignore[method-assign]
    return timed(lambda: [owner.clean_file(file, out / file.name, site="A") for file in files[:PEER_FILES]])


def half(files: list[Path], out: Path, start: object, done: object) -> None:
    owner = cleaner()
    plain(files[:1], out, owner)
    owner = cleaner()
    start.wait()  # type: ignore[attr-defined]
    plain(files, out, owner)
    done.wait()  # type: ignore[attr-defined]


def two_processes(files: list[Path], out: Path) -> Took:
    """Each takes every other series."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(3), context.Barrier(3)
    parts = [[f for n, f in enumerate(files) if n // SERIES % 2 == part] for part in (0, 1)]
    workers = [context.Process(target=half, args=(part, out, start, done)) for part in parts]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    done.wait()
    took = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return took, float("nan")


def indexed(files: list[Path], out: Path) -> Took:
    """Forty attributes."""
    index = Index(KEYWORDS)
    return timed(lambda: [index.read(file) for file in files])


def by_pydicom(files: list[Path], out: Path) -> Took:
    """The same attributes by pydicom."""

    def run() -> None:
        for file in files:
            ds = pydicom.dcmread(file, stop_before_pixels=True)
            for keyword in KEYWORDS:
                ds.get(keyword)

    return timed(run)


def first_bytes(files: list[Path], out: Path) -> Took:
    """The limit of an index."""

    def run() -> None:
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            os.pread(handle, 1 << 14, 0)
            os.close(handle)

    return timed(run)


def copied(files: list[Path], out: Path) -> Took:
    """The limit of anything that writes."""
    return timed(lambda: subprocess.run(["cp", "-r", files[0].parent, out / "copy"], check=True))


def read_by_pydicom(files: list[Path], out: Path) -> Took:
    """The limit of anything that uses pydicom."""
    return timed(lambda: [pydicom.dcmread(file) for file in files])


def peer(name: str) -> Case:
    """A peer of the environment `bench`, on 100 files."""

    def run(files: list[Path], out: Path) -> Took:
        (out / "list").write_text("\n".join(map(str, files[:PEER_FILES])))
        command = [PEERS, HERE / "peer_dicom.py", name, out / "list", out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        wall, cpu = json.loads(done.stdout.splitlines()[-1])
        return wall, cpu

    return run


def gdcmanon(files: list[Path], out: Path) -> Took:
    """GDCM's Basic profile; what is removed goes encrypted under a throw-away certificate."""
    key, certificate = out / "key.pem", out / "certificate.pem"
    make_key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=nobody", "-days", "1"]
    subprocess.run([*make_key, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    command = ["gdcmanon", "-r", "-e", "-c", certificate, "--continue", "-i", files[0].parent, "-o", out / "anon"]
    took = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    if len(list((out / "anon").rglob("*.dcm"))) != len(files):
        raise SystemExit("gdcmanon did not write every file")
    return took


def gdcmscanner(files: list[Path], out: Path) -> Took:
    """GDCM's Scanner, by its command line."""
    tags = [part for k in KEYWORDS for part in ("-t", f"{Tag(k).group:04x},{Tag(k).element:04x}")]
    command = ["gdcmscanner", "-d", files[0].parent, *tags]
    return timed(lambda: subprocess.run(command, check=True, capture_output=True))


# ---- the table


def cases(*, peers: bool) -> dict[str, tuple[Case, int | None]]:
    """Each with how many files it takes; None: all."""
    found: dict[str, tuple[Case, int | None]] = {
        "limit: cp -r": (copied, None),
        "limit: pydicom reads": (read_by_pydicom, None),
        "de-identify: radloop": (plain, None),
        "de-identify: radloop, 2 processes": (two_processes, None),
        "de-identify: radloop, gate": (gated, None),
        "de-identify: radloop, gate, digest": (lambda f, o: gated(f, o, digest=True), None),
        "de-identify: radloop, slow path": (slowly, PEER_FILES),
        "limit: open and read 16 KB": (first_bytes, None),
        "index: radloop": (indexed, None),
        "index: pydicom": (by_pydicom, None),
    }
    if not peers:
        return found
    if shutil.which("gdcmanon"):
        found |= {"de-identify: gdcmanon": (gdcmanon, None), "index: gdcmscanner": (gdcmscanner, None)}
    for name in ("deid", "dicom-anonymizer", "dicognito", "dicomsdl"):
        probe = [PEERS, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
        if PEERS.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            what = "index" if name == "dicomsdl" else "de-identify"
            found[f"{what}: {name}"] = (peer(name), PEER_FILES)
        else:
            print(f"({name} is left out: scripts/setup bench)")
    return found


def main() -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="radloop-bench-") as name:
        folder = Path(name)
        (folder / "in").mkdir()
        files = make(folder / "in", chosen.files)
        size = sum(file.stat().st_size for file in files) / len(files)
        print(f"{len(files)} files of {size / 1000:.0f} KB, {'real' if real() else 'made-up'} headers;", end=" ")
        print(f"pydicom {metadata.version('pydicom')}")
        rates, cpu = measure(cases(peers=not chosen.no_peers), files, folder, chosen.rounds)
    return report(rates, cpu)


def measure(
    todo: dict[str, tuple[Case, int | None]], files: list[Path], folder: Path, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Files a second and CPU microseconds a file, by case, one figure a round."""
    rates: dict[str, list[float]] = {name: [] for name in todo}
    cpu: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, (run, limit) in todo.items():
            out = folder / "out"
            out.mkdir()
            wall, used = run(files, out)
            rates[name].append((limit or len(files)) / wall)
            cpu[name].append(1e6 * used / (limit or len(files)))
            shutil.rmtree(out)
    return rates, cpu


def report(rates: dict[str, list[float]], cpu: dict[str, list[float]]) -> int:
    """Print the table and the promises; 1 if one is not kept."""
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{'files a second':36}  median     min     max   CPU us   of the limit")
    for name, values in rates.items():
        floor = median["limit: open and read 16 KB" if "index" in name or "16 KB" in name else "limit: cp -r"]
        used = statistics.median(cpu[name])
        figures = f"{median[name]:8.0f}{min(values):8.0f}{max(values):8.0f}{used:9.0f}"
        print(f"{name:36}{figures}   {median[name] / floor:11.2f}")
    ours = {"de-identify": median["de-identify: radloop"], "index": median["index: radloop"]}
    for name in median:
        what, _, tool = name.partition(": ")
        if what in ours and not tool.startswith("radloop"):
            print(f"{what}: radloop is {ours[what] / median[name]:.1f} times as fast as {tool}")
    promises = [
        ("de-identified, one process", ours["de-identify"], 1650.0),
        ("de-identified, two processes", median["de-identify: radloop, 2 processes"], 1.7 * ours["de-identify"]),
        ("de-identified, with the gate", median["de-identify: radloop, gate"], 1000.0),
        ("headers indexed", ours["index"], 8000.0),
    ]
    for name, found, promised in promises:
        print(f"{name:36}{found:8.0f}, promised {promised:.0f}: {'kept' if found >= promised else 'NOT KEPT'}")
    return int(any(found < promised for _, found, promised in promises))


if __name__ == "__main__":
    sys.exit(main())

"""Broken files through the whole front door: received, then de-identified, in a process with little memory and time.

20,000 of them by `make torture`, 300 otherwise; seeded, so that a failure names the file that made it:
`python tests/unit/dicom/test_fuzz.py HOME FIRST LAST`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from radloop.catalog.store import Catalog
from radloop.dicom.deidentify import Deidentifier, read
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.profile import chosen
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError
from radloop.testing.mutants import mutant

KEY = bytes(range(32))
CANARIES = (b"zanzibarsky", b"quetzalina", b"canary4711x")
SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
)
PYDICOM = Path(pydicom.data.__file__).parent / "test_files"
MEMORY, SECONDS, GROWTH = 3 << 30, 10, 300 << 20
"""Bytes that a process may map; seconds of CPU for one file; bytes that its memory may grow by, whatever comes."""
SHARE = 500
"""Files of one process."""


def planted(ds: Dataset) -> Dataset:
    """A canary wherever a name stands in a hospital's files."""
    ds.PatientName, ds.PatientID = "Zanzibarsky^Quetzalina", "CANARY4711X"
    ds.PatientBirthDate, ds.StudyDate, ds.SpecificCharacterSet = "19520314", "20240229", "ISO_IR 100"
    ds.PatientComments = "Mrs Zanzibarsky called, CANARY4711X"
    ds.OtherPatientNames = ["Quetzalina^Z", "Zanzibarsky^Q"]
    ds.ReferringPhysicianName = "Zanzibarsky^Brother"
    ds.StudyDescription = "CT for Zanzibarsky"
    step = Dataset()
    step.ScheduledProcedureStepDescription, step.RequestedProcedureID = "head, Quetzalina Zanzibarsky", "CANARY4711X"
    ds.RequestAttributesSequence = Sequence([step, step])
    ds.private_block(0x0029, "ZANZIBARSKY SYSTEMS", create=True).add_new(1, "LO", "Quetzalina Zanzibarsky")
    return ds


def bases() -> list[bytes]:
    """Small sound files: pydicom's own, and one image with canaries under each transfer syntax."""
    found = [data for path in sorted(PYDICOM.glob("*.dcm")) if len(data := path.read_bytes()) < 40_000]
    for syntax in SYNTAXES:
        ds = planted(pydicom.dcmread(PYDICOM / "CT_small.dcm"))
        ds.Rows = ds.Columns = 16
        cells = np.arange(256, dtype="<i2")
        ds.PixelData = cells.astype(">i2" if syntax == ExplicitVRBigEndian else "<i2").tobytes()
        found += [written(ds, syntax)] * 6
    return found


def written(ds: Dataset, syntax: UID) -> bytes:
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    little = syntax != ExplicitVRBigEndian
    ds._read_implicit, ds._read_little = syntax == ImplicitVRLittleEndian, little
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def one(landing: Landing, cleaners: list[Deidentifier], data: bytes, seed: int, out: Path) -> Iterator[str]:
    """What became of one file, asserted on the way."""
    outcome = landing.receive(data, site="A", sender="FUZZ")
    held = (landing.landed if outcome.reason is None else landing.quarantined)(outcome.sha256)
    assert held.exists(), "acknowledged, and not there"
    yield f"received {outcome.kind}"
    source = out.with_name("source.dcm")
    source.write_bytes(data)
    for cleaner in cleaners:
        try:
            cleaner.clean_file(source, out, site="A")
        except DicomError as error:
            assert not out.exists(), "refused, and written"
            quoted = f"{error} {error.what}".lower().encode()
            assert not any(canary in quoted for canary in CANARIES), "a refusal that quotes the file"
            yield f"{cleaner.profile.name} {error.reason}"
            continue
        clean = out.read_bytes()
        pixels = read(clean).get_item("PixelData")
        header = clean[: len(clean) - len(pixels.value)] if pixels is not None and pixels.value else clean
        assert not any(canary in header.lower() for canary in CANARIES), "a name is left"
        out.unlink()
        yield f"{cleaner.profile.name} cleaned"


def main(home: Path, first: int, last: int) -> None:
    """Files `first` to `last`; one line of JSON at the end. Exits with 9 where one takes too long."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    pseudonymiser = Pseudonymiser(KEY)
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    landing = Landing(home, catalog, pseudonymiser, crosswalk)
    cleaners = [Deidentifier(pseudonymiser, profile=chosen(name)) for name in ("basic", "research")]
    sound, counts = bases(), Counter[str]()
    for data in sound[-30:]:  # what every process needs once
        list(one(landing, cleaners, data, -1, home / "out.dcm"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for seed in range(first, last):
        signal.signal(signal.SIGPROF, partial(_too_long, seed))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU: other processes may have the machine
        try:
            counts.update(one(landing, cleaners, mutant(sound[seed % len(sound)], seed), seed, home / "out.dcm"))
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    print(json.dumps({"counts": counts, "grown": grown}))


def _too_long(seed: int, *_: object) -> None:
    os.write(2, f"seed {seed} took more than {SECONDS} s\n".encode())
    os._exit(9)


def run(home: Path, first: int, last: int) -> subprocess.Popen[str]:
    folder = home / str(first)
    folder.mkdir(mode=0o700)
    arguments = [sys.executable, __file__, str(folder), str(first), str(last)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("files", [300, pytest.param(20_000, marks=pytest.mark.torture)])
def test_broken_files_are_stored_and_cleaned_or_refused(tmp_path: Path, files: int) -> None:
    """One file that crashes, hangs or fills the memory stops the front door of a hospital; one name let through is worse."""
    share = min(SHARE, files // 2)
    todo = [(first, min(first + share, files)) for first in range(0, files, share)]
    running: list[tuple[int, subprocess.Popen[str]]] = []
    counts, grown = Counter[str](), 0
    try:
        while todo or running:
            while todo and len(running) < 2:
                first, last = todo.pop(0)
                running.append((first, run(tmp_path, first, last)))
            first, process = running.pop(0)
            said, complaint = process.communicate(timeout=1800)
            assert process.returncode == 0, f"files from {first}: exit {process.returncode}\n{complaint[-2000:]}"
            found = json.loads(said.splitlines()[-1])
            counts.update(found["counts"])
            grown = max(grown, found["grown"])
    finally:
        for _, process in running:
            process.kill()
            process.wait()
    assert sum(n for name, n in counts.items() if name.startswith("received")) == files
    assert grown < GROWTH, f"memory grew by {grown >> 20} MiB"
    for what in ("received new", "received quarantined", "basic cleaned", "research cleaned", "basic NOT_DICOM"):
        assert counts[what] > 0, what
    print(f"{files} files: {dict(sorted(counts.items()))}, memory grew by {grown >> 20} MiB")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(11, id="thousands of JPEG segments in one another: hours in the gate"),
        pytest.param(16190, id="empty PixelData of a VR that there is not"),
        pytest.param(4098, id="a number as long as the rest of the header, names and all"),
    ],
)
def test_files_that_once_got_through(tmp_path: Path, seed: int) -> None:
    """What fuzzing has found must not come back."""
    process = run(tmp_path, seed, seed + 1)
    _, complaint = process.communicate(timeout=240)
    assert process.returncode == 0, complaint[-2000:]


if __name__ == "__main__":
    began = time.monotonic()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(f"{time.monotonic() - began:.1f} s", file=sys.stderr)

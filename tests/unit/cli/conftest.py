"""A project, the command as a user runs it, and small DICOM files with a name in them that may turn up nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from radloop.cli.init import make_project

NAME = "ZORBAXX^QUENTIN"
"""A patient whose name must be in no output, no log and no file outside landing, quarantine and identity."""


class Ran:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        """Stdout, which must be one JSON document."""
        return json.loads(self.out)


class Command:
    """`radloop`, run as a process of its own or in this one."""

    def __init__(self, project: Path) -> None:
        self.project = project

    def __call__(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Ran:
        """Run it as a user does: a process, in the project's folder."""
        done = subprocess.run(
            [sys.executable, "-m", "radloop.cli", *arguments],
            cwd=cwd or self.project,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def running(self, *arguments: str, ready: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
        """A server in the background: the process, and what its ready file says."""
        with subprocess.Popen(
            [sys.executable, "-m", "radloop.cli", *arguments, "--ready-file", str(ready)],
            cwd=self.project,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                until = time.monotonic() + 60
                while not ready.exists():
                    assert process.poll() is None, process.communicate()[1]
                    assert time.monotonic() < until, "no ready file within a minute"
                    time.sleep(0.02)
                yield process, json.loads(ready.read_text())
            finally:
                if process.poll() is None:
                    process.kill()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a new project, as `radloop init` makes it, that knows one sender."""
    folder = tmp_path / "project"
    make_project(folder)
    configure(folder, '[listen.senders]\nCT1 = "site-a"\n')
    return folder


@pytest.fixture
def radloop(project: Path) -> Command:
    """Return the command, run in the project's folder."""
    return Command(project)


@pytest.fixture
def inside(project: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Ran]:
    """Return the command, run in this process: the same code without 0.2 s of start-up."""
    from radloop.cli.app import run_app

    def run(*arguments: str) -> Ran:
        capsysbinary.readouterr()
        code = run_app([*arguments, "--project", str(project)])
        said = capsysbinary.readouterr()
        return Ran(code, said.out.decode(), said.err.decode())

    return run


def configure(project: Path, toml: str) -> None:
    """Give the project settings of its own, instead of the commented ones."""
    (project / "radloop.toml").write_text(toml)


def write_dicom(
    path: Path,
    *,
    study: int = 1,
    instance: int = 1,
    patient: str = "MRN-77",
    accession: str = "00123",
    issuer: str = "",
) -> Path:
    """A small DX instance; UIDs are `1.2.3.{study}` and `1.2.3.{study}.1.{instance}`."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"1.2.3.{study}", f"1.2.3.{study}.1"
    ds.SOPInstanceUID = f"1.2.3.{study}.1.{instance}"
    ds.PatientID, ds.PatientName, ds.AccessionNumber, ds.Modality = patient, NAME, accession, "DX"
    if issuer:
        ds.IssuerOfPatientID = issuer
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 32, 32, 16, 12, 11
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    pixels = np.random.default_rng(study * 100 + instance).integers(0, 4096, (32, 32), np.uint16)
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def dicom_folder(tmp_path: Path) -> Path:
    """Return a folder of three studies of three patients, and one file that is no DICOM."""
    folder = tmp_path / "export"
    for number in (1, 2, 3):
        write_dicom(folder / f"sub/{number}.dcm", study=number, patient=f"MRN-{number}", accession=f"0012{number}")
    (folder / "readme.txt").write_text(f"exported for {NAME}")
    return folder

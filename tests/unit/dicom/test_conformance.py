"""What de-identification leaves is valid DICOM: dciodvfy (dicom3tools) finds no error that was not there before."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_files
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.profile import OPTIONS, Profile, chosen
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import RadloopError

CLEANING = ["clean-graphics", "clean-structured-content", "clean-descriptors"]
RETAINING = [name for name in OPTIONS if name.startswith("retain-") and name != "retain-modified-dates"]
PROFILES = {
    "basic": chosen("basic"),
    "research": chosen("research", CLEANING),
    "retain": chosen("basic", RETAINING + CLEANING),
}


def errors(path: Path, scratch: Path) -> set[str]:
    """Dciodvfy's errors without values and item numbers; a deflated file, which it cannot read, is inflated first."""
    ds = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    if ds.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        whole = pydicom.dcmread(path)
        whole.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = scratch / "inflated.dcm"
        whole.save_as(path)
    done = subprocess.run(["nice", "dciodvfy", "-new", str(path)], capture_output=True, timeout=120, check=False)
    lines = (done.stdout + done.stderr).decode("latin-1").splitlines()
    return {re.sub(r"= <[^>]*>", "=", re.sub(r"\[\d+\]", "", line)) for line in lines if line.startswith("Error")}


def new_errors(job: tuple[Path, str, Profile, Path]) -> tuple[str, list[str]] | None:
    """Errors that de-identification made, under the file's name; None if the file is refused."""
    file, name, profile, folder = job
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    scratch = folder / f"{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    target = scratch / "out.dcm"
    try:
        Deidentifier(Pseudonymiser(bytes(range(32))), profile=profile).clean_file(file, target, site="A")
    except RadloopError:
        return None
    return f"{name} {file.name}", sorted(errors(target, scratch) - errors(file, scratch))


def kind(file: Path) -> tuple[str, ...] | None:
    """What files of one make have in common; None: pydicom cannot read it."""
    try:
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        keywords = ("SOPClassUID", "Manufacturer", "ManufacturerModelName", "NumberOfFrames")
        return (str(ds.file_meta.get("TransferSyntaxUID")), *(str(ds.get(keyword, "")) for keyword in keywords))
    except Exception:
        return None


def check(files: list[Path], folder: Path, *, at_least: int) -> None:
    """Clean each file under each profile and compare; one of each make unless `make torture` asks for all."""
    if not os.environ.get("RADLOOP_TORTURE"):
        one_of_each = {made: file for file in reversed(files) if (made := kind(file)) is not None}
        files = sorted(one_of_each.values())
    jobs = [(file, name, profile, folder) for file in files for name, profile in PROFILES.items()]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = [result for result in pool.map(new_errors, jobs, chunksize=8) if result is not None]
    assert {name: new for name, new in found if new} == {}
    assert len(found) >= at_least


@pytest.fixture
def dciodvfy(require_service: Callable[..., str]) -> str:
    """Debian's dicom3tools."""
    return require_service("dciodvfy", "dciodvfy")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_no_new_error_in_pydicoms_files(dciodvfy: str, tmp_path: Path) -> None:
    """A cleaned file that a viewer or an archive refuses as broken is lost to research."""
    check([Path(f) for f in sorted(get_testdata_files("*.dcm"))], tmp_path, at_least=100)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_no_new_error_in_real_files(dciodvfy: str, test_data: Path, tmp_path: Path) -> None:
    """CT, MR, enhanced, segmentations, RT objects, slides, annotations, reports, waveforms of many makers."""
    files = [f for f in sorted(test_data.rglob("*")) if f.is_file() and f.suffix in (".dcm", ".seg", "")]
    check(files, tmp_path, at_least=150)


def test_the_verifier_sees_a_missing_attribute(dciodvfy: str, tmp_path: Path) -> None:
    """A comparison of two empty lists would always pass."""
    ds = pydicom.dcmread(str(get_testdata_files("CT_small.dcm")[0]))
    whole, broken = tmp_path / "whole.dcm", tmp_path / "broken.dcm"
    ds.save_as(whole)
    del ds.SeriesInstanceUID
    ds.save_as(broken)
    assert any("SeriesInstanceUID" in line for line in errors(broken, tmp_path) - errors(whole, tmp_path))

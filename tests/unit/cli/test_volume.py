"""`radloop volume` says what a folder holds, and writes what others can read."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from radloop.cli.app import run_app

from .conftest import NAME, Ran, write_dicom


@pytest.fixture
def volume(capsysbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Ran]:
    def run(*arguments: str | Path) -> Ran:
        capsysbinary.readouterr()
        code = run_app(["volume", *map(str, arguments)])
        said = capsysbinary.readouterr()
        return Ran(code, said.out.decode(), said.err.decode())

    return run


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """Return a folder with a CT of 4 slices, and a radiograph under a patient's name."""
    folder = tmp_path / "in"
    for number in range(4):
        ds = pydicom.dcmread(write_dicom(folder / f"{number}", instance=number))
        ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "CT", 1, -1024
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-10, -20, 2.5 * number], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing = [0.5, 0.75]
        ds.save_as(folder / f"{number}")
    write_dicom(folder / NAME, study=2)
    return folder


def test_it_lists_volumes_and_refusals_and_writes_nifti(volume: Callable[..., Ran], ct: Path, tmp_path: Path) -> None:
    """Before a training anyone wants to know which of a folder's series can be used at all."""
    ran = volume(ct, "--out", tmp_path / "out", "--json")
    refused, found = ran.json
    assert ran.code == 0
    assert (refused["refused"], found["shape"], found["file"]) == ("NO_GEOMETRY", [4, 32, 32], "2.nii.gz")
    assert found["spacing_mm"] == [2.5, 0.5, 0.75] and found["unit"] == "HU"
    raw = gzip.decompress((tmp_path / "out/2.nii.gz").read_bytes())
    assert struct.unpack_from("<4h", raw, 40) == (3, 32, 32, 4)
    values = np.frombuffer(raw, "<f4", offset=352).reshape((32, 32, 4), order="F")
    stored = pydicom.dcmread(ct / "3").pixel_array
    assert np.array_equal(values[:, :, 3].T, stored - 1024.0)
    assert np.frombuffer(raw, "<f4", 12, 280).tolist() == [-0.75, 0, 0, 10, 0, -0.5, 0, 20, 0, 0, 2.5, 0]
    said = volume(ct)
    assert "NO_GEOMETRY" in said.out and "4 x 32 x 32" in said.out
    assert NAME not in said.out + said.err + ran.out


def test_no_volume_is_exit_3(volume: Callable[..., Ran], ct: Path, tmp_path: Path) -> None:
    """A script that converts folders must see that there was nothing to convert."""
    (tmp_path / "one").mkdir()
    (ct / "1").rename(tmp_path / "one/1")
    assert volume(tmp_path / "one").code == 3
    assert volume(tmp_path / "none").code == 1

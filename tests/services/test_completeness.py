"""A study is complete when the PACS says so: asked of a real Orthanc, by C-FIND and by QIDO-RS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from radloop.cli.init import make_project
from radloop.cli.intake import landing_at
from radloop.cli.run import run_one
from radloop.settings import load
from radloop.stages.project import open_catalog
from radloop.testing.pacs_peers import Orthanc

pytestmark = pytest.mark.services


def _study(folder: Path, instances: int) -> list[Path]:
    paths = []
    for number in range(instances):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.826.0.1.{number + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.826.0.2.1", "1.2.826.0.3.1"
        ds.PatientID, ds.PatientName, ds.Modality, ds.StudyDate = "MRN-1", "DOE^JANE", "CT", "20260101"
        ds.Rows = ds.Columns = 16
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = np.random.default_rng(number).integers(0, 4096, (16, 16), dtype=np.uint16).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{number}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


@pytest.fixture
def orthanc(tmp_path: Path, require_service: Callable[..., str]) -> Iterator[Orthanc]:
    require_service("Orthanc", "Orthanc")
    with Orthanc(tmp_path / "orthanc") as running:
        yield running


def _project(folder: Path, pacs: str, quiet_s: float) -> Path:
    make_project(folder)
    (folder / "radloop.toml").write_text(f"[ingest]\nquiet_s = {quiet_s}\n{pacs}")
    return folder


def _receive(project: Path, files: list[Path]) -> None:
    with landing_at(project) as landing:
        for path in files:
            landing.receive(path, site="site-a", sender="CT1")


@pytest.mark.parametrize("kind", ["dimse", "dicomweb"])
def test_the_count_of_a_pacs_ends_the_wait(
    orthanc: Orthanc, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this failed, a study of which the PACS has more would be used too early, or a whole one wait for nothing."""
    files = _study(tmp_path, 4)
    orthanc.store(files)
    monkeypatch.setenv("PASSWORD", orthanc.password)
    dimse = f'kind = "dimse"\nhost = "127.0.0.1"\nport = {orthanc.port}\ncalled = "ORTHANC"\n'
    web = f'kind = "dicomweb"\nurl = "{orthanc.url}"\nuser = "radloop"\npassword = "env:PASSWORD"\n'
    pacs = f'[pacs.main]\nsite = "site-a"\n{dimse if kind == "dimse" else web}'
    monkeypatch.setattr("radloop.stages.completeness._SETTLED", 0.0)
    project = _project(tmp_path / "project", pacs, 3600.0)
    _receive(project, files[:3])
    waits = run_one(project, load(project), "prepare", upto="ingest")
    assert (waits.status, "1 studies (3 images) are still arriving" in waits.message) == ("waiting", True)
    with open_catalog(project) as catalog:
        assert [(study.expected, study.present) for study in catalog.unreleased()] == [(4, 3)]
    _receive(project, files[3:])
    assert run_one(project, load(project), "prepare", upto="ingest").status == "succeeded"
    with open_catalog(project) as catalog:
        assert len(catalog.ready()) == 4
        asked = [row for row in catalog.ledger.rows("audit", "crosswalk") if row.actor == "ingest"]
    assert asked, "who looked up the original study UID, and why"


def test_a_pacs_that_is_down_stops_nothing(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a PACS under maintenance would stop the hospital's pipeline."""
    monkeypatch.setattr("radloop.stages.completeness._SETTLED", 0.0)
    pacs = f'[pacs.main]\nkind = "dimse"\nsite = "site-a"\nhost = "127.0.0.1"\nport = {free_port}\ncalled = "X"\ntries = 1\n'
    project = _project(tmp_path / "project", pacs, 3600.0)
    _receive(project, _study(tmp_path, 1))
    result = run_one(project, load(project), "prepare", upto="ingest")
    assert (result.status, "are still arriving" in result.message) == ("waiting", True)

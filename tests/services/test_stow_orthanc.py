"""Orthanc's DICOMweb plugin as the client of our STOW-RS receiver: what a hospital's gateway would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.stow import Sender, Stow
from radloop.dicom.uids import Pseudonymiser
from radloop.testing.pacs_peers import Orthanc

pytestmark = pytest.mark.services
KEY = bytes(range(32))


@pytest.fixture
def stow(home: Path) -> Iterator[Stow]:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    landing = Landing(home, catalog, Pseudonymiser(KEY), crosswalk)
    with Stow(landing, senders={"orthanc": Sender(b"token-of-orthanc", "north")}) as running:
        yield running


@pytest.fixture
def orthanc(tmp_path: Path, stow: Stow, require_service: Callable[..., str]) -> Iterator[Orthanc]:
    require_service("Orthanc", "Orthanc")
    server = {
        "Url": f"http://127.0.0.1:{stow.port}/",
        "HttpHeaders": {"Authorization": "Bearer token-of-orthanc"},
        "ChunkedTransfers": True,
    }
    web = {"Enable": True, "Root": "/dicom-web/", "EnableWado": False, "Servers": {"us": server}}
    with Orthanc(tmp_path / "orthanc", DicomWeb=web) as running:
        yield running


def _study(folder: Path, instances: int) -> list[Path]:
    paths = []
    for number in range(instances):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.826.0.1.{number + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.826.0.2.1", "1.2.826.0.3.1"
        ds.PatientID, ds.PatientName, ds.Modality = "MRN-1", "DOE^JANE", "CT"
        ds.Rows = ds.Columns = 256
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = np.random.default_rng(number).integers(0, 4096, (256, 256), dtype=np.uint16).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{number}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def test_orthanc_sends_a_study_and_sends_it_again(stow: Stow, orthanc: Orthanc, tmp_path: Path) -> None:
    """If this failed, the most common free gateway could not send to us, or would think that we lost what we have."""
    orthanc.store(_study(tmp_path, 30))
    with httpx.Client(auth=("radloop", orthanc.password), trust_env=False, timeout=120) as client:
        for _ in range(2):
            studies = client.get(f"{orthanc.rest}/studies").json()
            answer = client.post(
                f"{orthanc.rest}/dicom-web/servers/us/stow", json={"Resources": studies, "Synchronous": True}
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["InstancesCount"] == "30"
    assert stow.counts["new"] == 30
    assert stow.counts["same"] == 30
    assert stow.counts["failed"] == stow.counts["rejected"] == 0


def test_orthanc_with_a_wrong_token_is_told(stow: Stow, orthanc: Orthanc, tmp_path: Path) -> None:
    """If this failed, a mistyped token would look like a delivered study."""
    orthanc.store(_study(tmp_path, 1))
    stow._tokens = [(b"other", "orthanc", "north")]
    with httpx.Client(auth=("radloop", orthanc.password), trust_env=False, timeout=120) as client:
        studies = client.get(f"{orthanc.rest}/studies").json()
        answer = client.post(
            f"{orthanc.rest}/dicom-web/servers/us/stow", json={"Resources": studies, "Synchronous": True}
        )
    assert answer.status_code >= 400
    assert stow.counts["received"] == 0
    assert stow.counts["rejected"] >= 1

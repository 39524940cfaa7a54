"""Studies in, results out: a real listener's landing, a served model, and Orthanc as the PACS that radiologists look at."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from radloop.cli.init import make_project
from radloop.dicom import results
from radloop.dicom.audit.message import message
from radloop.serving import rollout
from radloop.serving.desired import Desired, ModelRef, desired
from radloop.stages.project import open_catalog, open_landing
from radloop.testing.pacs_peers import Orthanc

_HELPERS = Path(__file__).parents[1] / "unit" / "serving" / "packages.py"
_spec = importlib.util.spec_from_file_location("answer_packages", _HELPERS)
assert _spec is not None and _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)


class Hospital:
    """A project with a served model, and the PACS it answers to."""

    def __init__(self, project: Path, orthanc: Orthanc) -> None:
        self.project, self.orthanc = project, orthanc

    def receive(self, *files: bytes) -> None:
        with open_catalog(self.project) as catalog:
            landing = open_landing(self.project, catalog)
            for data in files:
                assert landing.receive(data, site="site-a", sender="CT1").reason is None

    def answer(self, *options: str, code: int = 0) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "radloop.cli", "answer", "--to", "reading", "--json", *options]
        done = subprocess.run(command, cwd=self.project, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        return list(json.loads(done.stdout)["studies"])

    def stored(self, study_uid: str) -> list[pydicom.Dataset]:
        """What Orthanc holds of a study, by C-GET."""
        found: list[pydicom.Dataset] = []
        with self.orthanc.pacs() as pacs:
            pacs.fetch(study_uid, lambda data: found.append(pydicom.dcmread(io.BytesIO(bytes(data)))))
        return found

    def rows(self, kind: str) -> list[Any]:
        with open_catalog(self.project) as catalog:
            return catalog.ledger.rows(kind=kind)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, require_service: Callable[..., str]) -> Iterator[Hospital]:
    require_service("Orthanc", "Orthanc")
    require_service("Envoy", "envoy")
    tmp_path = tmp_path_factory.mktemp("hospital")
    project = tmp_path / "project"
    make_project(project)
    with Orthanc(tmp_path / "orthanc") as orthanc:
        toml = orthanc.toml().replace("[pacs.main]", "[pacs.reading]") + 'site = "site-a"\n'
        (project / "radloop.toml").write_text(f"[ingest]\nquiet_s = 0.0\n[serve]\nport = 0\n{toml}\n")
        key = bytes.fromhex((project / "radloop.key").read_text().strip())
        digest = packages.build(project / "models" / "1", key=key)
        command = [sys.executable, "-m", "radloop.cli", "serve", "--port", "0", "--ready-file", str(tmp_path / "ready")]
        with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL) as serve:
            try:
                until = time.monotonic() + 60
                while not (tmp_path / "ready").exists():
                    assert serve.poll() is None and time.monotonic() < until
                    time.sleep(0.05)
                champion = ModelRef(package="models/1", version="1", model_digest=digest)
                rollout.deploy(project, rollout.single(project, champion), timeout_s=60)
                yield Hospital(project, orthanc)
            finally:
                serve.terminate()


def study(number: int, image: int = 0, **options: Any) -> bytes:
    """One image of a study of its own patient."""
    ds = pydicom.dcmread(
        io.BytesIO(packages.dicom(number, patient=f"MRN-{number}", seed=100 * number + image, **options))
    )
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.2.1.{number}.{image}"
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_a_study_gets_its_result_once_and_under_its_own_name(hospital: Hospital) -> None:
    """The whole way: a report and a picture, with the patient's own attributes, stand in the PACS; nothing twice."""
    hospital.receive(study(1), study(2))
    told = hospital.answer()
    assert [one["analysed"] for one in told] == [1, 1]
    for number in (1, 2):
        original = pydicom.dcmread(io.BytesIO(study(number)))
        report, picture = sorted(hospital.stored(str(original.StudyInstanceUID)), key=lambda ds: ds.Modality == "OT")
        assert report.Modality == "SR" and picture.BurnedInAnnotation == "YES"
        red, _, blue = np.moveaxis(picture.pixel_array.astype(int), -1, 0)
        assert (red > blue).any(), "where the answer came from is shown in colour"
        for made in (report, picture):
            assert (made.PatientID, made.PatientName) == (f"MRN-{number}", original.PatientName)
            assert made.AccessionNumber == original.AccessionNumber
            assert made.SeriesDescription == "AI - investigational"
        assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
        referenced = (
            report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
        )
        assert [item.ReferencedSOPInstanceUID for item in referenced] == [original.SOPInstanceUID]
        prediction = told[number - 1]["said"][0] if told[0]["said"] else ""
        assert prediction
    assert hospital.answer() == []
    assert {row.subject for row in hospital.rows("result")} >= {one["study"] for one in told}
    actions = {row.payload["action"]: row for row in hospital.rows("audit")}
    assert {"landing read", "results sent"} <= actions.keys(), "who looked at whom, and where it went, must be told"
    assert b"DICOM Instances Transferred" in message(actions["results sent"], "test")


def test_a_study_answered_by_the_challenger_is_answered_once(hospital: Hospital) -> None:
    """Under a canary the answer is not the champion's: asking again and again would fill the PACS with reports."""
    key = bytes.fromhex((hospital.project / "radloop.key").read_text().strip())
    digest = packages.build(hospital.project / "models" / "2", weight=2.0, key=key)
    challenger = ModelRef(package="models/2", version="2", model_digest=digest)
    champion = (desired(hospital.project) or Desired()).models.champion
    assert champion is not None
    rollout.deploy(hospital.project, rollout.canary(hospital.project, challenger, 100), timeout_s=60)
    try:
        hospital.receive(study(9))
        assert [(one["version"], one["analysed"]) for one in hospital.answer()] == [("2", 1)]
        assert hospital.answer() == []
        rollout.deploy(hospital.project, rollout.promoted(hospital.project), timeout_s=60)
        hospital.answer()
        uid = str(pydicom.dcmread(io.BytesIO(study(9))).StudyInstanceUID)
        assert [ds.Modality for ds in hospital.stored(uid)].count("SR") == 1, "its result is the new champion's already"
    finally:
        rollout.deploy(hospital.project, rollout.single(hospital.project, champion), timeout_s=60)


def test_a_kill_after_sending_sends_the_same_again(hospital: Hospital) -> None:
    """A second report of the same answer, under another UID, reads as a second opinion."""
    hospital.receive(study(10))
    uid = str(pydicom.dcmread(io.BytesIO(study(10))).StudyInstanceUID)
    code = (
        "import os, sys\n"
        "from radloop.cli import answer\n"
        "sent = answer.Desk._sent\n"
        "answer.Desk._sent = lambda *a: (sent(*a), os._exit(9))\n"
        "from radloop.cli.app import run_app\n"
        "sys.exit(run_app(['answer', '--to', 'reading', '--json']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=hospital.project, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 9, done.stderr
    first = {str(ds.SOPInstanceUID) for ds in hospital.stored(uid)}
    assert len(first) == 2
    (told,) = hospital.answer()
    assert told["analysed"] == 1
    assert {str(ds.SOPInstanceUID) for ds in hospital.stored(uid)} == first
    assert not list((hospital.project / "landing" / ".results").iterdir())


def test_results_that_come_back_are_not_answered_again(hospital: Hospital) -> None:
    """A PACS that forwards everything would make the two talk to each other for ever."""
    hospital.receive(study(3))
    hospital.answer()
    uid = str(pydicom.dcmread(io.BytesIO(study(3))).StudyInstanceUID)
    back = []
    for ds in hospital.stored(uid):
        stream = io.BytesIO()
        ds.save_as(stream, enforce_file_format=True)
        back.append(stream.getvalue())
    hospital.receive(*back)
    before = len(hospital.rows("result"))
    assert hospital.answer() == []
    assert len(hospital.rows("result")) == before


def test_a_study_that_grew_gets_a_report_that_cites_the_former(hospital: Hospital) -> None:
    """Two reports side by side, neither of which says that it replaces the other, are a trap."""
    hospital.receive(study(4))
    hospital.answer()
    uid = str(pydicom.dcmread(io.BytesIO(study(4))).StudyInstanceUID)
    (first,) = [ds for ds in hospital.stored(uid) if ds.Modality == "SR"]
    hospital.receive(study(4, image=1))
    assert [one["analysed"] for one in hospital.answer()] == [2]
    reports = {ds.SOPInstanceUID: ds for ds in hospital.stored(uid) if ds.Modality == "SR"}
    later = next(ds for name, ds in reports.items() if name != first.SOPInstanceUID)
    cited = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert cited.ReferencedSOPInstanceUID == first.SOPInstanceUID


def test_what_is_not_analysed_says_why(hospital: Hospital) -> None:
    """A CT sent to an X-ray model must not read as "nothing found"."""
    hospital.receive(study(5, modality="CT"))
    (told,) = hospital.answer()
    assert told["analysed"] == 0
    uid = str(pydicom.dcmread(io.BytesIO(study(5))).StudyInstanceUID)
    (report,) = hospital.stored(uid)
    values = [
        item.ConceptCodeSequence[0].CodeMeaning
        for group in report.ContentSequence
        for outer in group.get("ContentSequence") or []
        for item in outer.get("ContentSequence") or []
        if item.ValueType == "CODE"
    ]
    assert any(value.startswith("not analysed: the model is not for this modality") for value in values)
    assert results.is_result(report)


def test_what_is_late_says_so(hospital: Hospital) -> None:
    """A result that comes after the reading helps nobody; its absence must be told."""
    hospital.receive(study(6))
    (told,) = hospital.answer("--deadline-s", "0.000001")
    assert told["said"] == ["late: no answer in time"]


def test_a_pacs_that_is_down_loses_no_result(hospital: Hospital) -> None:
    """What could not be sent is sent by the next run."""
    hospital.receive(study(7))
    hospital.orthanc.kill()
    before = len(hospital.rows("result"))
    (told,) = hospital.answer(code=1)
    assert "error" in told and len(hospital.rows("result")) == before
    hospital.orthanc.start()
    assert [one["analysed"] for one in hospital.answer()] == [1]


def test_studies_can_be_fetched_answered_and_sent_back(hospital: Hospital, tmp_path: Path) -> None:
    """A site without a route to our listener points at its archive instead."""
    path = tmp_path / "one.dcm"
    path.write_bytes(study(8))
    hospital.orthanc.store([path])
    uid = str(pydicom.dcmread(path).StudyInstanceUID)
    (told,) = hospital.answer("--from", "reading", "--study", uid)
    assert told["analysed"] == 1
    assert sorted(ds.Modality for ds in hospital.stored(uid)) == ["DX", "OT", "SR"]
    (again,) = hospital.answer("--from", "reading", "--study", uid)
    assert "nothing new" in again["message"]
    assert "canary" not in json.dumps(told).lower() and "MRN-8" not in json.dumps(told)


def test_results_can_be_withdrawn_where_they_were_sent(hospital: Hospital) -> None:
    """A wrong report that nobody can take back is read for ever; a second note for the same would confuse."""
    hospital.receive(study(41))
    [told] = hospital.answer()
    uid = str(pydicom.dcmread(io.BytesIO(study(41))).StudyInstanceUID)
    options = ("--withdraw", "patient safety", "--from", "reading", "--study", uid)
    sent = {str(ds.SOPInstanceUID) for ds in hospital.stored(uid)}
    assert [(one["study"], one["withdrawn"]) for one in hospital.answer(*options)] == [(told["study"], len(sent))]
    [note] = [ds for ds in hospital.stored(uid) if ds.Modality == "KO"]
    named = {
        str(item.ReferencedSOPInstanceUID)
        for series in note.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert named == sent and note.PatientID == "MRN-41"
    assert [one["withdrawn"] for one in hospital.answer(*options)] == [0]
    assert [row.subject for row in hospital.rows("withdrawal")] == [told["study"]]
    assert hospital.answer() == [], "what was withdrawn is not said again"

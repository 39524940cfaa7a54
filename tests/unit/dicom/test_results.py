"""What goes back to the PACS: valid objects, about the right patient, that say what they are."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from radloop.dicom import results
from radloop.dicom.results import Algorithm, Analysis
from radloop.errors import DicomError

AT = datetime(2026, 11, 26, 12, 0, 0, tzinfo=UTC)
ALGORITHM = Algorithm(name="pneumonia", version="7", digest="ab" * 32)
ANALYSIS = Analysis(
    prediction_id="0b2f6a38-1111-4222-8333-444455556666",
    finding="Pneumonia",
    probability=0.8231,
    decision=1,
    threshold=0.5,
)


@pytest.fixture
def ct() -> Dataset:
    return pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))


def report(image: Dataset, answer: Analysis | str = ANALYSIS, **options: Any) -> Dataset:
    return results.report([image], [answer], ALGORITHM, at=AT, **options)


def problems(made: Dataset, folder: Path, dciodvfy: str) -> list[str]:
    """Errors that dciodvfy finds."""
    path = folder / "made.dcm"
    made.save_as(path, enforce_file_format=True)
    told = subprocess.run([dciodvfy, "-new", str(path)], capture_output=True, text=True).stderr
    return [line for line in told.splitlines() if line.startswith("Error")]


def written(made: Dataset) -> Dataset:
    stream = io.BytesIO()
    made.save_as(stream, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(stream.getvalue()))


def texts(items: Any) -> dict[str, str]:
    """Concept name to value, of a content tree."""
    found: dict[str, str] = {}
    for item in items or []:
        name = item.ConceptNameCodeSequence[0].CodeMeaning if "ConceptNameCodeSequence" in item else ""
        if item.ValueType == "CODE":
            found[name] = item.ConceptCodeSequence[0].CodeMeaning
        elif item.ValueType == "NUM":
            found[name] = str(item.MeasuredValueSequence[0].NumericValue)
        elif item.ValueType == "TEXT":
            found[name] = found.get(name, "") + item.TextValue + ";"
        found |= texts(item.get("ContentSequence"))
    return found


@pytest.fixture
def dciodvfy(require_service: Callable[..., str]) -> str:
    return require_service("dicom3tools", "dciodvfy")


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm", "examples_rgb_color.dcm"])
def test_reports_are_valid_and_about_their_patient(name: str, tmp_path: Path, dciodvfy: str) -> None:
    """A report that the PACS refuses, or files under another patient, is worse than none."""
    image = pydicom.dcmread(str(get_testdata_file(name)))
    made = report(image)
    assert problems(made, tmp_path, dciodvfy) == []
    read = written(made)
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"):
        assert read.get(keyword, "") == image.get(keyword, "")
    (reference,) = read.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert reference.ReferencedSOPInstanceUID == image.SOPInstanceUID


def test_a_report_says_what_was_found_by_what_and_that_nobody_checked_it(ct: Dataset) -> None:
    """A reader must see probability, decision, model version and prediction id, and take it for no diagnosis."""
    read = written(report(ct))
    assert (read.VerificationFlag, read.PreliminaryFlag, read.CompletionFlag) == (
        "UNVERIFIED",
        "PRELIMINARY",
        "COMPLETE",
    )
    assert read.SeriesDescription == "AI - investigational"
    said = texts(read.ContentSequence)
    assert said["Pneumonia"] == "Present"
    assert float(said["Calibrated probability of the finding"]) == 0.8231
    assert (said["Algorithm Name"], said["Algorithm Version"]) == ("pneumonia;", "7;")
    assert ANALYSIS.prediction_id in said["Algorithm Parameters"] and ALGORITHM.digest in said["Algorithm Parameters"]


def test_what_was_not_analysed_says_so(ct: Dataset, tmp_path: Path, dciodvfy: str) -> None:
    """Silence would read as "nothing found"."""
    made = report(ct, "the model is not for CT")
    assert problems(made, tmp_path, dciodvfy) == []
    assert texts(written(made).ContentSequence)["Analysis"] == "not analysed: the model is not for CT"


def test_a_study_of_several_images_has_one_report(ct: Dataset, tmp_path: Path, dciodvfy: str) -> None:
    """A reader looks at one report, in which each image has its answer, or why it has none."""
    second = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    second.SOPInstanceUID = "1.2.3.4"
    made = results.report([ct, second], [ANALYSIS, "truncated"], ALGORITHM, at=AT)
    assert problems(made, tmp_path, dciodvfy) == []
    said = texts(made.ContentSequence)
    assert (said["Pneumonia"], said["Analysis"]) == ("Present", "not analysed: truncated")


def test_the_same_result_is_the_same_instance_and_a_later_one_cites_it(
    ct: Dataset, tmp_path: Path, dciodvfy: str
) -> None:
    """A result sent twice must not stand twice in the study; a corrected one says what it replaces."""
    first, again = report(ct), report(ct)
    assert first.SOPInstanceUID == again.SOPInstanceUID
    cited_as = results.former(str(ct.StudyInstanceUID), [ANALYSIS.prediction_id], ALGORITHM)
    later = report(ct, msgspec.structs.replace(ANALYSIS, prediction_id="another"), previous=cited_as)
    assert later.SOPInstanceUID != first.SOPInstanceUID and later.SeriesInstanceUID == first.SeriesInstanceUID
    cited = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert cited.ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert problems(later, tmp_path, dciodvfy) == []


def test_the_picture_is_marked_and_holds_no_name(ct: Dataset, tmp_path: Path, dciodvfy: str) -> None:
    """A heat map on a workstation looks like a finding unless it says that it is none."""
    shown = np.zeros((128, 128), np.uint8)
    made = results.picture(ct, np.eye(16, dtype=np.float32), shown, ANALYSIS, ALGORITHM, at=AT)
    assert problems(made, tmp_path, dciodvfy) == []
    read = written(made)
    assert read.BurnedInAnnotation == "YES" and "NOT FOR DIAGNOSIS" in read.ImageComments
    assert read.PatientID == ct.PatientID and read.pixel_array.shape[2] == 3
    assert read.pixel_array[:128].any() and read.pixel_array[128:].any()
    assert read.SourceImageSequence[0].ReferencedSOPInstanceUID == ct.SOPInstanceUID


def test_segments_are_valid_and_refer_to_their_slices(ct: Dataset, tmp_path: Path, dciodvfy: str) -> None:
    """A mask over the wrong slice marks the wrong place."""
    mask = np.zeros((1, ct.Rows, ct.Columns), np.uint8)
    mask[0, 20:40, 30:60] = 1
    made = results.segmentation(
        [ct], mask, [("Opacity", Code("4147007", "SCT", "Mass"))], ALGORITHM, prediction_id="p", at=AT
    )
    assert problems(made, tmp_path, dciodvfy) == []
    read = written(made)
    assert np.array_equal(read.pixel_array.reshape(mask.shape), mask)
    assert read.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"


@pytest.mark.parametrize("why", ["quality", "patient safety", "incorrect worklist entry"])
def test_a_rejection_note_names_what_it_withdraws(ct: Dataset, why: str, tmp_path: Path, dciodvfy: str) -> None:
    """A wrong result that cannot be withdrawn stays in front of readers."""
    wrong = report(ct)
    made = results.rejection([wrong], why, at=AT)
    assert problems(made, tmp_path, dciodvfy) == []
    named = made.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert named.ReferencedSOPInstanceUID == wrong.SOPInstanceUID


def test_our_own_results_are_recognised_and_nothing_else(ct: Dataset) -> None:
    """Results that come back by auto-forward would be predicted, and trained on."""
    made = [report(ct), report(ct, "late")]
    made.append(results.picture(ct, None, np.zeros((64, 64), np.uint8), ANALYSIS, ALGORITHM, at=AT))
    assert all(results.is_result(written(one)) for one in made)
    assert not results.is_result(ct)


def test_results_of_several_studies_are_refused(ct: Dataset) -> None:
    """One report on two patients' studies would show one of them the other's name."""
    other = pydicom.dcmread(str(get_testdata_file("MR_small.dcm")))
    with pytest.raises(DicomError, match="one study"):
        results.report([ct, other], [ANALYSIS, ANALYSIS], ALGORITHM, at=AT)

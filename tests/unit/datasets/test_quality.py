"""Every image passes or is refused with its reason; none is dropped."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from radloop.catalog.reason import Reason
from radloop.datasets import quality
from radloop.errors import ArtifactError, DataError
from radloop.imaging import pixels

DX = str(DigitalXRayImageStorageForPresentation)
CANARY = "Zzyzxson^Quilliam"


def noise(seed: int, rows: int = 48, columns: int = 40) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 4096, (rows, columns)).astype(np.uint16)


def written(path: Path, array: NDArray[np.integer], **attributes: object) -> Path:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = DX, "2.25.1", "DX"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = DX, "2.25.1"
    ds.PatientName = CANARY  # there should be none here; if there is, it must not get out
    ds.Rows, ds.Columns = array.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = array.tobytes()
    for keyword, value in attributes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def row(path: Path, sop_uid: str = "2.25.1", patient: str = "P1", **more: Any) -> dict[str, Any]:
    return {"sop_uid": sop_uid, "revision": 1, "patient": patient, "path": path.name, "age_years": 50.0, **more}


def check_one(path: Path, **arguments: Any) -> quality.Refused | None:
    """Check one file; its refusal, or None."""
    passed, refused = quality.check([row(path)], path.parent, **arguments)
    assert len(passed) + len(refused) == 1
    return refused[0] if refused else None


def white(share: float) -> NDArray[np.uint16]:
    array = noise(5)
    array[: round(48 * share)] = 4095
    return array


def black(share: float) -> NDArray[np.uint16]:
    array = noise(6, 100, 100)
    array[: round(100 * share)] = 0
    return array


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize(
    ("array", "attributes", "reason"),
    [
        (noise(1), {"PixelData": None}, Reason.NO_PIXELS),
        (noise(1), {"PixelData": b"\0\0"}, Reason.PIXELS_UNDECODABLE),
        (noise(1), {"NumberOfFrames": 2}, Reason.MULTI_FRAME),
        (noise(1), {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, Reason.MULTI_CHANNEL),
        (noise(1, 31, 60), {}, Reason.BAD_GEOMETRY),
        (noise(1, 40, 280), {}, Reason.BAD_GEOMETRY),
        (noise(1), {"PixelSpacing": [0.1, 0]}, Reason.BAD_GEOMETRY),
        (noise(1), {"ImagerPixelSpacing": [-0.1, 0.1]}, Reason.BAD_GEOMETRY),
        (noise(1), {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, Reason.BAD_GEOMETRY),
        (noise(1), {"ImageOrientationPatient": [1, 0, 0, 0, 1.01, 0]}, Reason.BAD_GEOMETRY),
        (noise(1), {"WindowCenter": 100, "WindowWidth": 0.5}, Reason.BAD_WINDOW),
        (noise(1), {"WindowCenter": [40, 500], "WindowWidth": [400, -1]}, Reason.BAD_WINDOW),
        (noise(1), {"WindowCenter": [40, 500], "WindowWidth": 400}, Reason.BAD_WINDOW),
        (noise(1), {"WindowCenter": 1, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"}, Reason.BAD_WINDOW),
        (noise(1), {"RescaleSlope": "0", "RescaleIntercept": "0"}, Reason.BAD_WINDOW),
        (np.full((48, 40), 7, np.uint16), {}, Reason.EMPTY_IMAGE),
        (black(0.97), {}, Reason.EMPTY_IMAGE),
        (white(0.6), {}, Reason.SATURATED_IMAGE),
        (4095 - white(0.6), {"PhotometricInterpretation": "MONOCHROME1"}, Reason.SATURATED_IMAGE),
    ],
)
def test_each_flaw_has_its_reason(
    tmp_path: Path, array: NDArray[np.uint16], attributes: dict[str, object], reason: Reason
) -> None:
    """A network learns from whatever passes; whoever clears the quarantine acts on the reason."""
    refused = check_one(written(tmp_path / "1.dcm", array, **attributes))
    assert refused is not None
    assert refused.reason is reason
    assert refused.detail
    assert "Zzyzxson" not in refused.detail


@pytest.mark.parametrize(
    ("array", "attributes"),
    [
        (noise(1), {}),
        (noise(1), {"PixelSpacing": [0.14, 0.14], "WindowCenter": 40, "WindowWidth": 1}),
        (noise(1), {"WindowCenter": 1, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}),
        (noise(1), {"ImageOrientationPatient": [0.999848, 0.0174524, 0, -0.0174524, 0.999848, 0]}),
        (noise(1), {"WindowCenter": "", "WindowWidth": "", "PixelSpacing": ""}),
        (black(0.9), {}),
        (white(0.4), {}),
        (4095 - white(0.4), {"PhotometricInterpretation": "MONOCHROME1"}),
    ],
)
def test_what_is_sound_passes(tmp_path: Path, array: NDArray[np.uint16], attributes: dict[str, object]) -> None:
    """A check that refuses good images costs patients of the rarest kind first."""
    assert check_one(written(tmp_path / "1.dcm", array, **attributes)) is None


def test_other_modalities_and_sop_classes_are_refused(tmp_path: Path) -> None:
    """One CT among radiographs, or a screenshot, teaches a network nonsense."""
    path = written(tmp_path / "1.dcm", noise(1))
    assert check_one(path) is None
    assert check_one(path, expected_modalities=["CR", "DX"], expected_sop_classes=[DX]) is None
    refused = check_one(path, expected_modalities=["CT"])
    assert refused is not None
    assert (refused.reason, refused.detail) == (Reason.UNEXPECTED_MODALITY, "another modality; expected CT; got DX")
    refused = check_one(path, expected_sop_classes=[str(CTImageStorage)])
    assert refused is not None
    assert refused.reason is Reason.UNEXPECTED_SOP_CLASS
    assert "Digital X-Ray" in refused.detail


def test_a_file_that_is_no_dicom_or_cut_short_is_refused(tmp_path: Path) -> None:
    """The archive should hold none; a disk may think otherwise."""
    text = tmp_path / "1.dcm"
    text.write_text("not an image")
    refused = check_one(text)
    assert refused is not None
    assert refused.reason is Reason.NOT_DICOM
    whole = written(tmp_path / "2.dcm", noise(1)).read_bytes()
    for length in (200, 600, len(whole) - 50):
        path = tmp_path / f"{length}.dcm"
        path.write_bytes(whole[:length])
        refused = check_one(path)
        assert refused is not None
        assert refused.reason in (Reason.TRUNCATED, Reason.NO_PIXELS, Reason.PIXELS_UNDECODABLE, Reason.MULTI_CHANNEL)


def test_a_lost_or_changed_file_stops_the_stage(tmp_path: Path) -> None:
    """Quarantining what somebody deleted or edited behind radloop's back would hide it."""
    path = written(tmp_path / "1.dcm", noise(1))
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(quality.check([row(path, file_sha256=right)], tmp_path)[0]) == 1
    with pytest.raises(ArtifactError, match="not the one that was de-identified"):
        quality.check([row(path, file_sha256="0" * 64)], tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match="not in the archive"):
        quality.check([row(path)], tmp_path)


def test_of_duplicates_in_one_patient_the_smallest_uid_stays(tmp_path: Path) -> None:
    """Twice in training is a weight nobody chose; which one stays must not hang on the order of arrival."""
    path = written(tmp_path / "1.dcm", noise(1))
    rows = [row(path, f"2.25.{i}") for i in (3, 1, 2)]
    passed, refused = quality.check(rows, tmp_path)
    assert passed["sop_uid"].to_pylist() == ["2.25.1"]
    assert [(r.sop_uid, r.reason) for r in refused] == [(f"2.25.{i}", Reason.DUPLICATE_PIXELS) for i in (2, 3)]


def test_duplicates_across_patients_are_all_refused(tmp_path: Path) -> None:
    """One of the patients has somebody else's image: the label is wrong for one, and a split could leak the other."""
    path = written(tmp_path / "1.dcm", noise(1))
    other = written(tmp_path / "2.dcm", noise(2))
    rows = [row(path, "2.25.1", "P1"), row(path, "2.25.2", "P1"), row(path, "2.25.3", "P2"), row(other, "2.25.4", "P2")]
    passed, refused = quality.check(rows, tmp_path)
    assert passed["sop_uid"].to_pylist() == ["2.25.4"]
    assert {r.reason for r in refused} == {Reason.DUPLICATE_PIXELS_ACROSS_PATIENTS}


def test_what_a_person_released_passes_for_that_reason_only(tmp_path: Path) -> None:
    """A release from quarantine that changes nothing is a button without a wire; one that opens every door is worse."""
    path = written(tmp_path / "1.dcm", black(0.97), WindowCenter=1, WindowWidth=-5)
    assert check_one(path, released={"2.25.1": {"BAD_WINDOW"}}).reason is Reason.EMPTY_IMAGE  # type: ignore[union-attr]
    assert check_one(path, released={"2.25.1": {"BAD_WINDOW", "EMPTY_IMAGE"}}) is None
    assert check_one(path, released={"2.25.9": {"BAD_WINDOW", "EMPTY_IMAGE"}}) is not None
    good = written(tmp_path / "2.dcm", noise(1))
    rows = [row(good, "2.25.1", "P1"), row(good, "2.25.2", "P2")]
    overruled = {"2.25.2": {"DUPLICATE_PIXELS_ACROSS_PATIENTS"}}
    passed, refused = quality.check(rows, tmp_path, released=overruled)
    assert passed["sop_uid"].to_pylist() == ["2.25.2"]
    assert [r.sop_uid for r in refused] == ["2.25.1"]


def test_a_refused_twin_still_casts_doubt_on_another_patients_copy(tmp_path: Path) -> None:
    """Whose image it is stays unknown, whatever else is wrong with one of the two headers."""
    good = written(tmp_path / "1.dcm", noise(1))
    bad = written(tmp_path / "2.dcm", noise(1), WindowCenter=1, WindowWidth=-5)
    _, refused = quality.check([row(good, "2.25.1", "P1"), row(bad, "2.25.2", "P2")], tmp_path)
    assert [r.reason for r in refused] == [Reason.DUPLICATE_PIXELS_ACROSS_PATIENTS, Reason.BAD_WINDOW]
    passed, refused = quality.check([row(good, "2.25.2", "P1"), row(bad, "2.25.1", "P1")], tmp_path)
    assert passed["sop_uid"].to_pylist() == ["2.25.2"]  # the sound one of the two stays
    assert [r.reason for r in refused] == [Reason.BAD_WINDOW]


def test_an_instance_twice_in_the_table_is_a_mistake_of_ours(tmp_path: Path) -> None:
    """It would be refused as its own duplicate."""
    path = written(tmp_path / "1.dcm", noise(1))
    with pytest.raises(DataError, match="comes twice"):
        quality.check([row(path), row(path)], tmp_path)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for i in range(6):
        written(folder / f"good{i}.dcm", noise(i))
    written(folder / "small.dcm", noise(9, 20, 20))
    written(folder / "flat.dcm", np.full((48, 40), 7, np.uint16))
    written(folder / "window.dcm", noise(0), WindowCenter=1, WindowWidth=-5)
    (folder / "text.dcm").write_text("not an image")
    return folder


@settings(max_examples=40)
@given(data=st.data())
def test_passed_and_refused_are_the_input(archive: Path, data: st.DataObject) -> None:
    """Nothing is dropped, no image stands in two patients or twice, and the order of the rows does not matter."""
    names = sorted(path.name for path in archive.iterdir())
    picks = data.draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from("PQR")), max_size=20))
    rows = [row(archive / name, f"2.25.{i:02d}", patient) for i, (name, patient) in enumerate(picks)]
    passed, refused = quality.check(rows, archive)
    both = [*passed["sop_uid"].to_pylist(), *(r.sop_uid for r in refused)]
    assert sorted(both) == [r["sop_uid"] for r in rows]
    digests = passed["pixel_sha256"].to_pylist()
    assert len(set(digests)) == len(digests)
    patients: defaultdict[str, set[str]] = defaultdict(set)
    for name, patient in picks:
        patients[hashlib.sha256((archive / name).read_bytes()).hexdigest()].add(patient)
    for uid in passed["sop_uid"].to_pylist():
        name = picks[int(uid[5:])][0]
        assert name.startswith("good")
        assert len(patients[hashlib.sha256((archive / name).read_bytes()).hexdigest()]) == 1
    random.Random(0).shuffle(rows)
    again, refused_again = quality.check(rows, archive)
    assert again.equals(passed)
    assert refused_again == refused


def test_the_table_keeps_its_columns_and_gains_features(archive: Path) -> None:
    """Drift, TFDV and the manifest read these columns by name, also from a table where nothing passed."""
    rows = [row(archive / "good0.dcm", pixel_sha256=None), row(archive / "flat.dcm", "2.25.2")]
    passed, _ = quality.check(rows, archive)
    expected = {"sop_uid", "revision", "patient", "path", "age_years", "pixel_sha256"}
    expected |= {f"f_{name}" for name in pixels.FEATURES}
    assert set(passed.column_names) == expected
    array = pixels.decode(pydicom.dcmread(archive / "good0.dcm"))
    assert passed["pixel_sha256"].to_pylist() == [pixels.digest(array)]
    assert passed["f_mean"].to_pylist() == [pixels.features(array, "MONOCHROME2", 12)["mean"]]
    nothing, _ = quality.check(rows[1:], archive)
    assert len(nothing) == 0
    assert {"sop_uid", "f_mean", "pixel_sha256"} <= set(nothing.column_names)


def test_several_processes_find_the_same(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A faster machine must not make another dataset version."""
    monkeypatch.setattr(quality, "_POOL_FROM", 30)
    names = [path.name for path in sorted(archive.iterdir())]
    rows = [row(archive / names[i % len(names)], f"2.25.{i:03d}", f"P{i % len(names)}") for i in range(40)]
    seen: list[tuple[int, int]] = []
    alone = quality.check(rows, archive, progress=lambda done, total: seen.append((done, total)))
    together = quality.check(rows, archive, workers=2)
    assert together[0].equals(alone[0])
    assert together[1] == alone[1]
    assert seen == [(i, 40) for i in range(1, 41)]


@pytest.mark.data
def test_real_ct_slices_pass_but_for_their_duplicates(test_data: Path) -> None:
    """52 slices, 50 distinct (SOURCE.md): real images are not refused for what they look like, copies are found."""
    root = test_data / "ct_contrast_tcga"
    rows = []
    for path in sorted(root.rglob("*.dcm")):
        with pydicom.dcmread(path, stop_before_pixels=True) as ds:
            patient = str(ds.PatientID)
        rows.append({"sop_uid": path.stem, "patient": patient, "path": str(path.relative_to(root))})
    passed, refused = quality.check(rows, root, expected_modalities=["CT"])
    assert len(passed) + len(refused) == len(rows)
    reasons = {r.reason for r in refused}
    assert reasons <= {Reason.DUPLICATE_PIXELS, Reason.DUPLICATE_PIXELS_ACROSS_PATIENTS}
    assert len(rows) == 52
    assert len(passed) == 50

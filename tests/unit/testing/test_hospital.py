"""The simulated hospital: valid instances, and a truth about each file that the real rooms confirm."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pydicom
import pytest
from cryptography.fernet import Fernet
from pydicom.uid import JPEGLSLossless, RLELossless

from radloop.catalog.store import Catalog
from radloop.datasets import quality
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.listener import Listener
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError
from radloop.testing.hospital import CONSPICUITY, SIZES, Hospital, clinic, demo_hospitals, labels_csv, make_hospital
from radloop.testing.modality import send


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hospital]:
    folder = tmp_path_factory.mktemp("hospitals")
    return {
        site: make_hospital(folder / site, patients=16, images=30, site=site, seed=3)  # type: ignore[arg-type]
        for site in "AB"
    }


def headers(hospital: Hospital) -> Iterator[tuple[Any, pydicom.Dataset]]:
    for one in hospital.sent:
        if one.kind == "good":
            with pydicom.dcmread(one.path, stop_before_pixels=True) as ds:
                yield one, ds


def test_a_seed_is_a_hospital(tmp_path: Path, hospitals: dict[str, Hospital]) -> None:
    """The torture test compares digests of two runs; another seed is other patients."""
    again = make_hospital(tmp_path / "again", patients=16, images=30, site="B", seed=3, workers=2)
    first = hospitals["B"]
    assert [p.relative_to(again.images) for p in again.files] == [p.relative_to(first.images) for p in first.files]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again.files, first.files, strict=True))
    assert again.labels.read_bytes() == first.labels.read_bytes()
    other = make_hospital(tmp_path / "other", patients=2, images=4, site="B", seed=4, broken=False)
    assert {one.sop_uid for one in other.sent}.isdisjoint(one.sop_uid for one in first.sent)
    assert {one.patient_id for one in other.sent}.isdisjoint(one.patient_id for one in first.sent)


@pytest.mark.parametrize("site", ["A", "B"])
def test_patients_come_back_and_labels_belong_to_studies(hospitals: dict[str, Hospital], site: str) -> None:
    """Splits by patient, labels by accession, and changing findings are what the loop must get right."""
    good = [one for one in hospitals[site].sent if one.kind == "good"]
    assert len(good) == len({one.sop_uid for one in good}) == 30
    studies: defaultdict[str, set[str]] = defaultdict(set)
    for one in good:
        studies[one.patient_id].add(one.accession)
    assert len(studies) == 16
    assert 0.25 <= sum(len(s) > 1 for s in studies.values()) / 16 <= 0.5
    assert len({(one.study_uid, one.accession, one.label) for one in good}) == len({one.study_uid for one in good})
    with hospitals[site].labels.open() as file:
        told = {row["AccessionNumber"]: int(row["label"]) for row in csv.DictReader(file)}
    assert told == {one.accession: one.label for one in good}
    assert 0.35 < sum(told.values()) / len(told) < 0.55


@pytest.mark.parametrize("site", ["A", "B"])
def test_headers_are_whole_identifying_and_say_what_the_file_is(hospitals: dict[str, Hospital], site: str) -> None:
    """De-identification is shown on what hospitals really send: names in sequences and private tags, ages, places."""
    syntaxes: Counter[str] = Counter()
    for one, ds in headers(hospitals[site]):
        assert (ds.SOPInstanceUID, ds.PatientID, ds.AccessionNumber) == (one.sop_uid, one.patient_id, one.accession)
        assert ds.file_meta.MediaStorageSOPInstanceUID == one.sop_uid
        assert (ds.Modality, ds.BitsStored) == (("CR", 12) if site == "A" else ("DX", 14))
        assert ds.PhotometricInterpretation == ("MONOCHROME2" if site == "A" else "MONOCHROME1")
        born, day = str(ds.PatientBirthDate), str(ds.StudyDate)
        assert int(str(ds.PatientAge)[:3]) in {int(day[:4]) - int(born[:4]) - less for less in (0, 1)}
        assert ds.OtherPatientIDsSequence
        assert ds.PatientName
        assert any(element.tag.is_private for element in ds)
        syntaxes[ds.file_meta.TransferSyntaxUID] += 1
    assert syntaxes[RLELossless if site == "A" else JPEGLSLossless] > 0
    assert len(syntaxes) > 1


def mandatory(iod: str) -> dict[str, str]:
    """Keyword -> Type (1 or 2) of the top-level attributes of an IOD's mandatory modules, from highdicom's tables."""
    tables = resources.files("highdicom") / "_standard"
    modules = json.loads((tables / "iod_module_map.json").read_text())[iod]
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    return {
        attribute["keyword"]: attribute["type"]
        for module in modules
        if module["usage"] == "M"
        for attribute in attributes[module["key"]]
        if not attribute["path"] and attribute["type"] in ("1", "2")
    }


@pytest.mark.parametrize(
    ("site", "iod"), [("A", "computed-radiography-image"), ("B", "digital-x-ray-image")], ids=["CR", "DX"]
)
def test_instances_hold_what_their_iod_asks_for(hospitals: dict[str, Hospital], site: str, iod: str) -> None:
    """A phantom that no PACS would take shows nothing about the loop."""
    wanted = mandatory(iod)
    assert len(wanted) > 20
    one = hospitals[site].good[0]
    with pydicom.dcmread(one.path) as ds:
        missing = [k for k, kind in wanted.items() if k not in ds or (kind == "1" and ds[k].is_empty)]
    assert missing == []


class Rooms:
    """Landing, de-identification and quality, as the stages use them."""

    def __init__(self, home: Path, catalog: Catalog, key: bytes) -> None:
        self.home, self.pseudonymiser = home, Pseudonymiser(key)
        crosswalk = Crosswalk(home / "identity" / "crosswalk.db", Fernet.generate_key(), catalog.ledger)
        self.landing = Landing(home, catalog, self.pseudonymiser, crosswalk)
        self.cleaner = Deidentifier(self.pseudonymiser)

    def reasons(self, hospital: Hospital) -> dict[str, str]:
        """Original SOPInstanceUID -> why it is in no dataset."""
        out: dict[str, str] = {}
        rows = []
        for one in hospital.sent:
            if one.outcome != "new":
                continue
            target = self.home / "archive" / f"{self.pseudonymiser.uid(one.sop_uid)}.dcm"
            try:
                cleaned = self.cleaner.clean_file(one.path, target, site=hospital.site)
            except DicomError as error:
                out[one.sop_uid] = str(error.reason)
                continue
            rows.append({"sop_uid": cleaned.sop_uid, "patient": cleaned.patient, "path": target.name})
        _, refused = quality.check(rows, self.home / "archive", expected_modalities=["CR", "DX"])
        originals = {self.pseudonymiser.uid(one.sop_uid): one.sop_uid for one in hospital.sent}
        return out | {originals[r.sop_uid]: str(r.reason) for r in refused}


@pytest.fixture
def rooms(home: Path, project_key: bytes) -> Iterator[Rooms]:
    (home / "identity").mkdir()
    (home / "archive").mkdir()
    with Catalog(f"sqlite:///{home / 'catalog.db'}") as catalog:
        yield Rooms(home, catalog, project_key)


@pytest.mark.parametrize("site", ["A", "B"])
def test_the_truth_of_each_file_is_what_the_rooms_find(hospitals: dict[str, Hospital], rooms: Rooms, site: str) -> None:
    """Every flow count of the demo's report is checked against this truth: here it is checked itself."""
    hospital = hospitals[site]
    outcomes = [rooms.landing.receive(one.path, site=site, sender="test") for one in hospital.sent]
    for one, outcome in zip(hospital.sent, outcomes, strict=True):
        assert str(outcome.kind) == one.outcome, one.kind
        if one.outcome == "quarantined":
            assert str(outcome.reason) in one.reasons, one.kind
    found = rooms.reasons(hospital)
    for one in hospital.sent:
        if one.outcome != "new":
            continue
        if one.either is None:
            assert (found.get(one.sop_uid) in one.reasons) if one.reasons else one.sop_uid not in found, one.kind
        else:
            assert (one.sop_uid in found) is not (one.either in found)
            assert found.get(one.sop_uid, found.get(one.either)) in one.reasons
    assert len({one.kind for one in hospital.sent}) == 14


def test_the_modality_delivers_the_hospital_over_the_network(hospitals: dict[str, Hospital], rooms: Rooms) -> None:
    """The demo's second step, and C-STORE must come to the same as reading the files."""
    hospital = hospitals["A"]
    with Listener(rooms.landing, ae_title="RADLOOP", sites={"XRAY": "A"}) as listener:
        counts = send(hospital.files, "127.0.0.1", listener.port, calling_ae="XRAY", called_ae="RADLOOP")
        heard = listener.counts
    sendable = [one for one in hospital.sent if one.sendable]
    assert counts == {"0000": len(sendable), "not sendable": 1}
    expected = Counter(one.outcome for one in sendable)
    assert {kind: heard[kind] for kind in expected} == dict(expected)


def test_helpers_of_the_demo(tmp_path: Path, hospitals: dict[str, Hospital]) -> None:
    """Late labels are those of the sites asked for, and the clinic sends images that a predictor must take."""
    both = labels_csv(hospitals.values(), tmp_path / "late.csv")
    with both.open() as file:
        told = {row["AccessionNumber"] for row in csv.DictReader(file)}
    assert told == {one.accession for h in hospitals.values() for one in h.sent if one.kind == "good"}
    sent = list(clinic(hospitals["B"], limit=3))
    assert [site for _, site in sent] == ["B"] * 3
    assert [data[128:132] for data, _ in sent] == [b"DICM"] * 3
    assert SIZES["full"]["A"][0] + SIZES["full"]["B"][0] >= 600
    assert SIZES["full"]["A"][1] + SIZES["full"]["B"][1] >= 300
    assert sum(images for images, _ in SIZES["small"].values()) == 120


def test_the_sizes_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sites, progress over both, no patient or label shared between them."""
    monkeypatch.setitem(SIZES, "tiny", {"A": (25, 9), "B": (24, 8)})
    monkeypatch.setitem(CONSPICUITY, "tiny", 1.0)
    seen: list[tuple[int, int]] = []
    made = demo_hospitals(tmp_path, "tiny", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 49) for i in range(1, 50)]
    patients = [{one.patient_id for one in hospital.sent if one.kind == "good"} for hospital in made.values()]
    assert [len(p) for p in patients] == [9, 8]
    assert patients[0].isdisjoint(patients[1])


@pytest.mark.parametrize(("patients", "images"), [(1, 30), (10, 20), (31, 30)])
def test_a_hospital_too_small_for_its_mishaps_is_refused(tmp_path: Path, patients: int, images: int) -> None:
    """Two mishaps on one image would make the truth ambiguous."""
    with pytest.raises(ValueError, match="patients and images expected"):
        make_hospital(tmp_path, patients=patients, images=images, site="A", seed=1)

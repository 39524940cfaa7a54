"""Two identities that are one person."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from radloop.catalog.patients import CROSSING
from radloop.catalog.schema import Member
from radloop.stages.project import open_catalog, pseudonymiser

from .conftest import Ran


def _csv(tmp_path: Path, *rows: str, header: str = "patient_id_a,patient_id_b,reason") -> str:
    path = tmp_path / "links.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return str(path)


def _published(project: Path, dicom_folder: Path, inside: Callable[..., Ran]) -> tuple[str, str]:
    """Two of the folder's patients, in one dataset version: one in train, one in test."""
    assert inside("ingest", str(dicom_folder), "--site", "site-a").code == 0
    key = pseudonymiser(project, "file:radloop.key")
    a, b = key.patient("MRN-1", "site-a"), key.patient("MRN-2", "site-a")
    with open_catalog(project) as catalog:
        catalog.assign_parts({a: "train", b: "test"}, key_id=key.key_id)
        members = [
            Member(sop_uid=row.sop_uid, revision=1, patient=row.patient, part="train" if row.patient == a else "test")
            for row in catalog.ready()
            if row.patient in (a, b)
        ]
        catalog.add_dataset("d" * 64, path="d.parquet", members=members, actor="test")
        catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p", version="3")
    return a, b


def test_link_flags_what_learnt_from_both_and_says_what_to_do(
    inside: Callable[..., Ran], project: Path, dicom_folder: Path, tmp_path: Path
) -> None:
    """If this failed, a model would go on being trusted whose test patients it had learnt from under another number."""
    a, b = _published(project, dicom_folder, inside)
    ran = inside("patients", "link", _csv(tmp_path, "MRN-1,mrn-2,double registration", "MRN-1,MRN-99,merged"))
    assert ran.code == 0, ran.err
    assert "2 pairs linked, 0 known already" in ran.out
    assert "1 identity has no image here (yet)" in ran.out
    assert "1 patient moved to the part of the person they are" in ran.out
    assert "The leakage gate refuses dataset version 1" in ran.out
    assert "Flagged too: model 3." in ran.out
    assert "radloop run prepare" in ran.out
    again = inside("patients", "link", _csv(tmp_path, "MRN-2,MRN-1,double registration"), "--json")
    assert again.json == {
        "linked": 0, "known": 1, "without_image": 0, "moved": {}, "flagged_datasets": [], "flagged_models": []
    }  # fmt: skip
    with open_catalog(project) as catalog:
        assert catalog.parts() == {a: "train", b: "train"}
        assert list(catalog.datasets()[0].flags) == [CROSSING]
        audits = [row for row in catalog.ledger.rows("audit") if row.subject == "patients"]
        assert [row.payload["pairs"] for row in audits] == [2, 1]
    told = inside("patients", "list", "--json").json
    assert len(told["links"]) == 2
    for path in (project / "catalog.db", project / "catalog.db-wal"):
        assert b"MRN-99" not in path.read_bytes() if path.exists() else True
    assert inside("patients", "unlink", _csv(tmp_path, "MRN-1,MRN-2,wrong"), "--json").json == {
        "unlinked": 1, "not_linked": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("patient_id_a,reason", "MRN-1,x", "no column 'patient_id_b'"),
        ("patient_id_a,patient_id_b", "MRN-1,unknown", "line 2: patient_id_b names no patient"),
        ("patient_id_a,patient_id_b,reason", "MRN-1,MRN-2,as MRN-2 told us", "line 2: the reason cannot be kept"),
        ("patient_id_a,patient_id_b", "MRN-1", "line 2 has another number of columns"),
        ("patient_id_a,patient_id_b", "", "the file has no rows"),
    ],
)
def test_a_file_that_cannot_be_used_links_nothing_and_shows_no_identity(
    inside: Callable[..., Ran], project: Path, dicom_folder: Path, tmp_path: Path, header: str, row: str, said: str
) -> None:
    """If this failed, a typo would join two people, or the error would put a patient's number into a log."""
    inside("ingest", str(dicom_folder), "--site", "site-a")
    ran = inside("patients", "link", _csv(tmp_path, row, header=header))
    assert ran.code == 1
    assert said in ran.err
    assert "MRN" not in ran.err + ran.out
    with open_catalog(project) as catalog:
        assert catalog.links() == []


def test_with_several_sites_the_issuer_must_be_named(
    inside: Callable[..., Ran], project: Path, dicom_folder: Path, tmp_path: Path
) -> None:
    """If this failed, number 7 of one hospital would be taken for number 7 of another."""
    for site in ("site-a", "site-b"):
        (dicom_folder / "readme.txt").write_text(site)
        inside("ingest", str(dicom_folder if site == "site-a" else _other(tmp_path)), "--site", site)
    ran = inside("patients", "link", _csv(tmp_path, "MRN-1,MRN-2,x"))
    assert ran.code == 1
    assert "it is not known who issued patient_id_a" in ran.err
    header = "Patient_ID_A;Issuer_A;Patient_ID_B;Issuer_B"
    assert inside("patients", "link", _csv(tmp_path, "MRN-1;site-a;MRN-9;site-b", header=header)).code == 0
    key = pseudonymiser(project, "file:radloop.key")
    with open_catalog(project) as catalog:
        assert set(catalog.persons()) == {key.patient("MRN-1", "site-a"), key.patient("MRN-9", "site-b")}


def _other(tmp_path: Path) -> Path:
    from .conftest import write_dicom

    return write_dicom(tmp_path / "other" / "1.dcm", study=9, patient="MRN-9").parent

from __future__ import annotations

import pytest

from radloop.catalog.schema import InstanceRow, Member
from radloop.catalog.store import Catalog
from radloop.errors import DataError


def _receive(catalog: Catalog, sop: str, sha: str, patient: str) -> None:
    row = InstanceRow(
        sop_uid=sop,
        study_uid="S",
        series_uid="R",
        patient=patient,
        key_id="k",
        site="A",
        sender="T",
        sop_class_uid="1.2",
        transfer_syntax_uid="1.2",
        source_sha256=sha,
        source_bytes=1,
    )
    catalog.record(row, lambda _row, _stored: True)


def _add(catalog: Catalog, digest: str, *members: tuple[str, str]) -> int:
    rows = [Member(sop_uid=sop, revision=1, patient=patient, part="train") for sop, patient in members]
    return catalog.add_dataset(
        digest, path=f"datasets/{digest}", members=rows, counts={"n": len(rows)}, actor="publish"
    )


def test_a_patients_part_never_changes(catalog: Catalog) -> None:
    """If this failed, a patient could be in the training set of one version and in the test set of the next."""
    assert catalog.assign_parts({"P1": "train", "P2": "test"}, key_id="k") == {"P1": "train", "P2": "test"}
    assert catalog.assign_parts({"P2": "train", "P3": "validation"}, key_id="k") == {"P2": "test", "P3": "validation"}
    assert catalog.assign_part("P1", "test", key_id="k") == "train"
    assert catalog.parts() == {"P1": "train", "P2": "test", "P3": "validation"}


def test_a_dataset_version_is_recorded_once_and_numbered(catalog: Catalog) -> None:
    """If this failed, a stage run again would make a second version of the same data."""
    assert _add(catalog, "d" * 64, ("I2", "P1"), ("I1", "P1")) == 1
    assert _add(catalog, "e" * 64, ("I1", "P1")) == 2
    assert _add(catalog, "d" * 64, ("I2", "P1"), ("I1", "P1")) == 1
    assert [member.sop_uid for member in catalog.members("d" * 64)] == ["I1", "I2"]
    assert [version.number for version in catalog.datasets()] == [1, 2]
    assert len(catalog.ledger.rows("dataset")) == 2
    assert catalog.dataset("2").digest == catalog.dataset("eeeeee").digest == "e" * 64
    with pytest.raises(DataError, match="no dataset version is called '7'"):
        catalog.dataset("7")


def test_a_model_traces_back_to_its_instances(catalog: Catalog) -> None:
    """If this failed, nobody could say which patients' images a model learned from."""
    _add(catalog, "d" * 64, ("I1", "P1"), ("I2", "P2"))
    assert catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p", info={"seed": 1})
    assert not catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p", version="3")
    trace = catalog.trace("mmmmmm")
    assert (trace.model.version, trace.model.info, trace.dataset.number) == ("3", {"seed": 1}, 1)
    assert [member.sop_uid for member in trace.members] == ["I1", "I2"]
    assert catalog.model("3").digest == "m" * 64


def test_a_model_belongs_to_one_known_dataset_version(catalog: Catalog) -> None:
    """If this failed, a trace could end at the wrong patients, or at none."""
    with pytest.raises(DataError, match="unknown dataset version"):
        catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p")
    _add(catalog, "d" * 64, ("I1", "P1"))
    _add(catalog, "e" * 64, ("I1", "P1"))
    catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p")
    with pytest.raises(DataError, match="cannot change the dataset version"):
        catalog.add_model("m" * 64, dataset_digest="e" * 64, preprocessing_digest="p")


def test_what_an_instance_touched_can_be_found(catalog: Catalog) -> None:
    """If this failed, a withdrawn consent or a wrong image could not be followed into models."""
    _add(catalog, "d" * 64, ("I1", "P1"))
    _add(catalog, "e" * 64, ("I1", "P1"), ("I2", "P2"))
    catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p")
    assert catalog.affected_by(["I2"]).datasets == ["e" * 64]
    assert catalog.affected_by(["I2"]).models == []
    assert catalog.affected_by(["I1", "I2"]).datasets == ["d" * 64, "e" * 64]
    assert catalog.affected_by(["I1"]).models == ["m" * 64]
    assert catalog.affected_by(["I9"]).datasets == []


def test_a_changed_patient_moves_the_instance_and_flags_what_used_it(catalog: Catalog) -> None:
    """If this failed, a PACS correction would leave two patients mixed in a test set without anybody knowing."""
    _receive(catalog, "I1", "a1", "P1")
    _receive(catalog, "I2", "b1", "P1")
    _add(catalog, "d" * 64, ("I1", "P1"), ("I2", "P1"))
    _add(catalog, "e" * 64, ("I2", "P1"))
    catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p")
    _receive(catalog, "I1", "a2", "P9")
    assert catalog.current("I1").patient == "P9"  # type: ignore[union-attr]
    assert catalog.dataset("1").flags == {"patient_changed": ["I1"]}
    assert catalog.dataset("2").flags == {}
    assert catalog.model("mmmmmm").flags == {"patient_changed": ["I1"]}
    [row] = catalog.ledger.rows("revision")
    assert row.payload["patient_changed"] is True
    _receive(catalog, "I2", "b2", "P1")  # the header changed, the patient did not
    assert catalog.dataset("2").flags == {}


def test_a_version_built_while_a_patient_changed_is_flagged_at_once(catalog: Catalog) -> None:
    """If this failed, a correction during a run would go unseen for ever."""
    _receive(catalog, "I1", "a1", "P1")
    _receive(catalog, "I1", "a2", "P9")
    _add(catalog, "d" * 64, ("I1", "P1"))
    catalog.add_model("m" * 64, dataset_digest="d" * 64, preprocessing_digest="p")
    assert catalog.dataset("1").flags == {"patient_changed": ["I1"]}
    assert catalog.model("mmmmmm").flags == {"patient_changed": ["I1"]}


def test_a_label_request_is_opened_and_closed_once(catalog: Catalog) -> None:
    """If this failed, every look at a drift would ask the radiologists again."""
    assert catalog.open_label_request("r1", sop_uids=["I2", "I1", "I2"], why="drift of p50", actor="watch")
    assert not catalog.open_label_request("r1", sop_uids=["I3"], why="again", actor="watch")
    [request] = catalog.label_requests("open")
    assert (request.sop_uids, request.why) == (["I1", "I2"], "drift of p50")
    assert catalog.close_label_request("r1", actor="ada")
    assert not catalog.close_label_request("r1", actor="ada")
    assert catalog.label_requests("open") == []
    assert [row.payload.get("status") for row in catalog.ledger.rows("label_request")] == [None, "closed"]

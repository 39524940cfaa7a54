from __future__ import annotations

from radloop.catalog.patients import CROSSING
from radloop.catalog.schema import Member
from radloop.catalog.store import Catalog

A, B, C, D = "PA", "PB", "PC", "PD"


def _dataset(catalog: Catalog, digest: str, **patients: str) -> None:
    members = [Member(sop_uid=f"I-{p}", revision=1, patient=p, part=part) for p, part in patients.items()]
    catalog.add_dataset(digest * 64, path=f"{digest}.parquet", members=members, actor="test")


def test_linked_patients_get_the_part_that_was_learnt_from(catalog: Catalog) -> None:
    """If this failed, one person would be in training and in test, and the test would flatter the model."""
    catalog.assign_parts({A: "train", B: "test", C: "validation", D: "test"}, key_id="k")
    done = catalog.link([(B, A, "double"), (C, D, "double"), (A, B, "double"), (A, A, "double")], by="ada")
    assert (done.new, done.known) == (2, 2)
    assert done.moved == {B: ("test", "train"), D: ("test", "validation")}
    assert catalog.parts() == {A: "train", B: "train", C: "validation", D: "validation"}
    assert catalog.persons() == {A: A, B: A, C: C, D: C}
    assert [(link.patient_a, link.patient_b, link.by) for link in catalog.links()] == [(A, B, "ada"), (C, D, "ada")]
    kinds = [(row.subject, row.payload["action"]) for row in catalog.ledger.rows("patients")]
    assert sorted(kinds) == [(A, "link"), (B, "moved"), (C, "link"), (D, "moved")]


def test_links_reach_from_one_to_the_next(catalog: Catalog) -> None:
    """If this failed, a person registered three times would count as two."""
    catalog.assign_parts({A: "test", C: "train"}, key_id="k")
    catalog.link([(A, B, "x"), (C, D, "x")], by="ada")
    done = catalog.link([(B, D, "x")], by="ada")
    assert done.moved == {A: ("test", "train")}
    assert set(catalog.persons().values()) == {A}
    assert catalog.assign_parts({B: "test", D: "validation"}, key_id="k") == {B: "train", D: "train"}


def test_new_patients_that_are_linked_get_one_part(catalog: Catalog) -> None:
    """If this failed, links made before the images came would be forgotten when the parts are decided."""
    catalog.link([(A, B, "x")], by="ada")
    held = catalog.assign_parts({A: "test", B: "train", C: "train"}, key_id="k")
    assert held == {A: "test", B: "test", C: "train"}
    assert catalog.parts() == held


def test_versions_in_which_one_person_crosses_are_flagged_with_their_models(catalog: Catalog) -> None:
    """If this failed, figures measured on a patient that the model had learnt from would go on being believed."""
    catalog.assign_parts({A: "train", B: "test", C: "train"}, key_id="k")
    _dataset(catalog, "a", PA="train", PB="test", PC="train")
    _dataset(catalog, "b", PA="train", PC="train")
    catalog.add_model("m" * 64, dataset_digest="a" * 64, preprocessing_digest="p")
    catalog.add_model("n" * 64, dataset_digest="b" * 64, preprocessing_digest="p")
    done = catalog.link([(A, B, "x")], by="ada")
    assert (done.datasets, done.models) == (["a" * 64], ["m" * 64])
    assert [version.flags for version in catalog.datasets()] == [{CROSSING: ["I-PA", "I-PB"]}, {}]
    assert {model.digest[0]: model.flags for model in catalog.models()} == {"m": {CROSSING: ["I-PA", "I-PB"]}, "n": {}}


def test_a_link_taken_back_leaves_the_parts(catalog: Catalog) -> None:
    """If this failed, a wrong link could never be mended, or mending it would bring a learnt-from patient back into test."""
    catalog.assign_parts({A: "train", B: "test"}, key_id="k")
    catalog.link([(A, B, "x")], by="ada")
    assert catalog.unlink(B, A, by="ada", reason="wrong")
    assert not catalog.unlink(B, A, by="ada", reason="wrong")
    assert catalog.persons() == {}
    assert catalog.parts() == {A: "train", B: "train"}


def test_a_version_published_while_patients_were_linked_is_flagged_too(catalog: Catalog) -> None:
    """If this failed, a link made during a run would miss the very version that the run makes."""
    catalog.link([(A, B, "x")], by="ada")
    _dataset(catalog, "a", PA="train", PB="test")
    assert catalog.datasets()[0].flags == {CROSSING: ["I-PA", "I-PB"]}

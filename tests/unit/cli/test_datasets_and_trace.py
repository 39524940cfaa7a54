"""Dataset versions told apart, and one prediction followed back to the images behind its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from radloop.catalog.schema import Member
from radloop.datasets import manifest
from radloop.serving.predictions import PredictionLog, PredictionRow
from radloop.stages.project import open_catalog

from .conftest import Ran

Run = Callable[..., Ran]
PARTS = ("train", "train", "validation", "test")
SERVED = "5e" * 32


def table(count: int, *, flipped: int | None = None) -> pa.Table:
    """A manifest of `count` instances of as many patients."""
    rows = [
        {
            "sop_uid": f"2.25.{1000 + n}", "revision": 1, "patient": f"P{n:032x}", "site": "site-a" if n % 3 else "site-b",
            "part": PARTS[n % 4], "label": (n % 2) ^ (n == flipped), "label_source": "instance", "file_sha256": f"{n:064x}",
            "path": f"s/{n}.dcm",
        }
        for n in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


@pytest.fixture
def versions(project: Path) -> list[str]:
    """Two versions: 30 instances; then 40, with one label corrected."""
    digests: list[str] = []
    with open_catalog(project) as catalog:
        for made in (table(30), table(40, flipped=3)):
            digest = manifest.digest(made)
            manifest.write(made, project / f"datasets/{digest}.parquet")
            rows = made.select(["sop_uid", "revision", "patient", "part"]).to_pylist()
            catalog.add_dataset(
                digest, path=f"datasets/{digest}.parquet", members=[Member(**row) for row in rows],
                parent=digests[-1] if digests else None, counts=manifest.counts(made), actor="publish",
            )  # fmt: skip
            digests.append(digest)
    return digests


def test_list_and_show(inside: Run, versions: list[str]) -> None:
    """What a model was trained on must be found by its number, its digest, or as the latest."""
    listed = inside("dataset", "list", "--json").json
    assert [(v["number"], v["digest"]) for v in listed] == [(1, versions[0]), (2, versions[1])]
    assert "40" in inside("dataset", "list").out
    for ref, digest in (("1", versions[0]), (versions[0][:8], versions[0]), ("latest", versions[1])):
        told = inside("dataset", "show", ref, "--json").json
        assert told["digest"] == digest
        assert sum(group["instances"] for group in told["groups"]) == told["counts"]["instances"]
    assert "site-b" in inside("dataset", "show").out


@pytest.mark.parametrize("ref", ["3", "abc", "fffffff", ""])
def test_a_version_that_is_not_there(inside: Run, versions: list[str], ref: str) -> None:
    """Another version than the one meant would be trusted like it."""
    ran = inside("dataset", "show", ref)
    assert ran.code == 1
    assert "there is no dataset version" in ran.err
    assert versions[1][:12] in ran.err


def test_diff_says_what_changed(inside: Run, versions: list[str]) -> None:
    """A better figure on a new version is worth something only if one knows what is new."""
    told = inside("dataset", "diff", "1", "2", "--json").json
    assert (told["added"]["count"], told["removed"]["count"], told["relabelled"]["count"]) == (10, 0, 1)
    assert told["relabelled"]["sop_uids"] == ["2.25.1003"]
    assert told["moved"]["count"] == 0
    ran = inside("dataset", "diff", "1")
    assert "From version 1 to version 2" in ran.out


def test_a_manifest_that_was_changed_is_refused(inside: Run, project: Path, versions: list[str]) -> None:
    """A version is what its digest says, or it is evidence of nothing."""
    manifest.write(table(39), project / f"datasets/{versions[1]}.parquet")
    ran = inside("dataset", "show", "latest")
    assert ran.code == 1
    assert "changed after it was published" in ran.err


def prediction(number: int, **changed: Any) -> PredictionRow:
    row = {
        "prediction_id": f"{number:08x}-aaaa-4bbb-8ccc-000000000000", "request_id": f"r{number}",
        "at": "2026-01-01T00:00:00+00:00",
        "model_name": "default", "version": "4", "model_digest": SERVED, "role": "champion", "served": True,
        "compared_with": None, "sop_uid": "2.25.77", "study_uid": "2.25.7", "patient": "P1", "site": "site-a",
        "input_digest": "d" * 64, "tags": {}, "features": {}, "probability": 0.25, "decision": 0, "latency_ms": 3.0,
        "status": "ok",
    }  # fmt: skip
    return {**row, **changed}  # type: ignore[typeddict-item]


@pytest.fixture
def predicted(project: Path, versions: list[str]) -> None:
    """A model of version 2, and three answers: two of it, one of a model that the catalog does not know."""
    with open_catalog(project) as catalog:
        info = {"package": "artifacts/k/package", "package_digest": "9a" * 32, "run_id": "run-17"}
        catalog.add_model(SERVED, dataset_digest=versions[1], preprocessing_digest="3c" * 32, version="4", info=info)
        catalog.ledger.append("training", SERVED, {"dataset": versions[1], "version": "4"}, actor="register")
        catalog.ledger.append("approval", "9a" * 32, {"role": "clinical", "why": "reviewed"}, actor="A. Ito")
    log = PredictionLog(project / "predictions", "4")
    for row in (prediction(1), prediction(16 + 1), prediction(0x99, model_digest="77" * 32)):
        log.append(row)
    log.close()


def test_trace_leads_to_the_instances(inside: Run, predicted: None, versions: list[str]) -> None:
    """When a patient was harmed, this is the question that will be asked."""
    told = inside("trace", "00000001", "--json").json
    assert told["prediction"]["probability"] == 0.25
    assert (told["model"]["version"], told["model"]["model_digest"]) == ("4", SERVED)
    assert told["model"]["package"] == "artifacts/k/package"
    assert told["training"]["run"] == "run-17"
    assert (told["dataset"]["number"], told["dataset"]["digest"]) == (2, versions[1])
    assert (told["instances"]["count"], told["instances"]["learnt_from"]) == (40, 30)
    assert len(told["instances"]["listed"]) == 20
    assert {row["kind"] for row in told["ledger"]} == {"dataset", "training", "approval"}
    everything = inside("trace", "00000001", "--instances", "--json").json
    assert len(everything["instances"]["listed"]) == 40


def test_trace_for_people(inside: Run, predicted: None) -> None:
    """Who signs off reads this on a terminal."""
    ran = inside("trace", "00000001-aaaa")
    for text in ("digest        " + SERVED, "run-17", "40, of which it learnt from 30", "2.25.1000", "A. Ito"):
        assert text in ran.out


def test_trace_of_a_model_from_elsewhere(inside: Run, project: Path, predicted: None, versions: list[str]) -> None:
    """To name patients as its teachers who were not would be false evidence; that nobody knows them must be said."""
    with open_catalog(project) as catalog:
        catalog.add_model(
            SERVED, dataset_digest=versions[1], preprocessing_digest="3c" * 32, info={"trained": "elsewhere"}
        )
    told = inside("trace", "00000001", "--json").json
    assert told["training"]["trained"] == "elsewhere"
    assert {row["part"] for row in told["instances"]["listed"]} == {"validation"}
    assert "trained elsewhere, on what is not known" in inside("trace", "00000001").out


@pytest.mark.parametrize(
    "wanted,said",
    [
        ("ffffffff", "there is no prediction with this id"),
        ("000000", "3 predictions begin with this id"),
        ("0000", "there is no prediction with this id"),
        ("00000099", "the model of this prediction is not in the catalog"),
    ],
)
def test_trace_of_what_is_not_clear(inside: Run, predicted: None, wanted: str, said: str) -> None:
    """Evidence about another prediction than the one meant is worse than none."""
    ran = inside("trace", wanted)
    assert ran.code == 1
    assert said in ran.err
    if "id" in said.split():
        assert "3 predictions in 1 file under" in ran.err

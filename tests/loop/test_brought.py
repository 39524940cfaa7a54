"""`develop` with a network that was made elsewhere: the same pipeline, the same gates, the same registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from radloop.artifact import commit
from radloop.begin import pipeline_of
from radloop.catalog.lineage import learnt_from
from radloop.catalog.schema import Member
from radloop.datasets import manifest
from radloop.engines import local
from radloop.learning.package import Packaged
from radloop.pipeline.records import RunResult
from radloop.settings import load
from radloop.stages import kinds
from radloop.stages.project import check, open_catalog, open_tracking
from radloop.testing import discs, networks

TOML = """
[task]
name = "disc"
[preprocess]
size = 32
[train]
network = "models/vendor.pt2"
[evaluate]
resamples = 100
minimum_patients = 5
[gates]
subgroup_gap = 0.3
"""


class Project:
    """A project folder that `prepare` might have left, with the toy task."""

    def __init__(self, home: Path) -> None:
        self.home = home
        toy = discs.make(home / "toy", patients=160)
        (home / "radloop.toml").write_text(TOML)
        preprocessing = {"parameters": msgspec.to_builtins(toy.preprocessing), "digest": toy.preprocessing.digest}
        (home / "toy/preprocessing.json").write_bytes(msgspec.json.encode(preprocessing))
        (home / "made").mkdir()
        (home / "checked").mkdir()
        (home / "checked/summary.json").write_text("{}")
        digest = manifest.write(toy.table, home / "made/manifest.parquet")
        (home / "made/dataset.json").write_bytes(msgspec.json.encode({"manifest": digest}))
        self.inputs: dict[str, Path | None] = {"champion": None, "champion_dataset": None}
        for name, folder, kind in (
            ("tensors", "toy", kinds.Tensors),
            ("dataset", "made", kinds.Dataset),
            ("validation", "checked", kinds.Validation),
        ):
            self.inputs[name] = commit(home / folder, home / "artifacts" / name / name, kind, {}).path
        rows = toy.table.to_pylist()
        members = [Member(sop_uid=r["sop_uid"], revision=1, patient=r["patient"], part=r["part"]) for r in rows]
        with open_catalog(home) as catalog:
            catalog.add_dataset(digest, path="x", members=members, actor="test")

    def develop(self, *, approved: bool = True, upto: str | None = None) -> RunResult:
        settings = load(self.home)
        check(settings)
        pipeline = pipeline_of("develop", settings)
        pipeline = pipeline if upto is None else pipeline.upto(upto)
        return local.run(pipeline, home=self.home, inputs=self.inputs, approved=lambda *_: approved)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    (tmp_path / "models").mkdir()
    networks.write_exported_program(tmp_path / "models/vendor.pt2")
    return made


def version(result: RunResult) -> int:
    told: Any = result.output("register.registered").json("registered.json")
    return int(told["version"])


def test_a_network_from_elsewhere_goes_round_the_loop(project: Project) -> None:
    """A vendor's network that skipped a gate, or could not be traced, would be the one that nobody checked."""
    waiting = project.develop(approved=False)
    assert waiting.status == "waiting" and "provenance" in waiting.message
    result = project.develop()
    assert result.status == "succeeded", result.message
    model, packed = result.output("train.model"), result.output("package.package")
    assert set(model.description.members) == {"model.pt2", "runtime.json", "preprocessing.json", "history.json"}
    packaged = Packaged(packed.path)
    packaged.check()
    assert packaged.platform == "pytorch_exportedprogram"
    assert "trained elsewhere" in (packed.path / "MODEL_CARD.md").read_text()
    tracking = open_tracking(project.home)
    assert tracking.alias("disc", "challenger") == version(result) == 1
    assert "exported_program" in str(tracking._client.get_run(_run(project)).data.params)
    with open_catalog(project.home) as catalog:
        traced = catalog.trace(packaged.identity.model_digest)
        parts = {member.part for member in learnt_from(traced.model, traced.members)}
    assert traced.model.version == "1" and parts == {"validation"}  # its own training patients are nobody's here
    # Nothing changed: nothing is made again. Another network in the file: another model, another version.
    again = project.develop()
    assert again.output("package.package").digest == packed.digest and version(again) == 1
    networks.write_exported_program(project.home / "models/vendor.pt2", module=Blurred())
    other = project.develop()
    assert other.output("train.model").digest != model.digest and version(other) == 2


class Blurred(torch.nn.Module):
    """Another network that finds the discs."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = torch.nn.AvgPool2d(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 20 * (self.pool(x).amax((2, 3)) - 0.6)


def test_a_champion_from_elsewhere_is_compared_with(project: Project) -> None:
    """Without the comparison, the first model that radloop trains would replace the vendor's unseen."""
    first = project.develop()
    project.inputs |= {"champion": first.output("package.package").path, "champion_dataset": project.inputs["dataset"]}
    (project.home / "radloop.toml").write_text(TOML.replace('network = "models/vendor.pt2"', "epochs = 2"))
    result = project.develop(upto="evaluate")
    comparison: Any = result.output("evaluate.evaluation").json("evaluation.json")
    assert comparison["comparison"]["overall"]["patients"] > 20 and not comparison["trained_elsewhere"]
    assert "weights.npz" in result.output("train.model").description.members


@pytest.mark.parametrize(
    ("network", "match"),
    [
        ("../vendor.pt2", "outside the project"),
        ("models/none.onnx", "no such network"),
        ("radloop.toml", "no such network"),
    ],
)
def test_a_path_that_is_none_is_told(project: Project, network: str, match: str) -> None:
    """An engine elsewhere sees the project folder only, and a typo must not end in a traceback."""
    (project.home / "radloop.toml").write_text(TOML.replace("models/vendor.pt2", network))
    result = project.develop(upto="train")
    assert result.status == "failed" and match in result.message


def _run(project: Project) -> str:
    tracking = open_tracking(project.home)
    (run,) = tracking._client.search_runs([tracking.experiment_id])
    return str(run.info.run_id)

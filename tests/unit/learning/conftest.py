"""The toy task of `radloop.testing.discs`, learnt once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from radloop.learning import evaluate, package, train
from radloop.testing.discs import SIZE, Toy, make


@dataclass(frozen=True)
class Trained:
    """A model folder, its evaluation and its package."""

    toy: Toy
    model: Path
    out: Path
    evaluation: evaluate.Evaluation
    package: Path
    identity: package.Identity


def config(**changes: Any) -> train.TrainConfig:
    """A training of seconds."""
    return train.TrainConfig(**{"epochs": 4, "batch_size": 16, "threads": 1, **changes})


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """480 images of 240 patients."""
    return make(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One training, evaluation and packaging for all tests."""
    folder = tmp_path_factory.mktemp("trained")
    model, out, packed = folder / "model", folder / "evaluation", folder / "package"
    train.fit(toy.tensors, toy.table, toy.preprocessing, config(), model)
    measured = evaluate.evaluate(
        model, toy.tensors, toy.table, toy.preprocessing,
        evaluate.EvaluateConfig(resamples=300, minimum_patients=5, threads=1), out, task="disc",
    )  # fmt: skip
    inputs = package.Inputs(modalities=["CR", "DX"], size=SIZE, positive="disc", negative="no disc")
    identity = package.build(
        model, out, toy.tensors, toy.tensors.sop_uids, packed,
        task="disc", dataset_digest="d" * 64, key_id="0a0b0c0d", inputs=inputs,
    )  # fmt: skip
    return Trained(toy, model, out, measured, packed, identity)

"""Training: it learns, it repeats, it sees pixels only, and it says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from radloop.errors import ArtifactError, DataError, SettingsError
from radloop.learning import network, train


def config(**changes: Any) -> train.TrainConfig:
    """A training of seconds."""
    return train.TrainConfig(**{"epochs": 4, "batch_size": 16, "threads": 1, **changes})


def changed(table: pa.Table, **columns: Any) -> pa.Table:
    """The table with columns replaced."""
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def test_it_learns_and_keeps_the_best_epoch(trained: Any) -> None:
    """A loop that does not learn would be found at the gate, an hour later."""
    history = msgspec.json.decode((trained.model / "history.json").read_bytes())
    aucs = [epoch["validation_auc"] for epoch in history["epochs"]]
    assert max(aucs) > 0.95
    assert aucs[history["best_epoch"] - 1] == max(aucs)
    part = train.labelled(trained.toy.table, "validation")
    net = network.load(trained.model)
    scores = network.logits(net, trained.toy.tensors, trained.toy.preprocessing, part.sop_uids)
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(part.labels, scores) == pytest.approx(max(aucs))


def test_the_same_seed_gives_the_same_weights_from_pixels_alone(toy: Any, tmp_path: Path) -> None:
    """A stage must be repeatable, or a resumed run is another run; and site or vendor must not reach the network."""
    seen: list[tuple[int, int]] = []
    epochs: list[train.Epoch] = []
    small = config(epochs=2)
    first = train.fit(
        toy.tensors, toy.table, toy.preprocessing, small, tmp_path / "a",
        progress=lambda done, of: seen.append((done, of)), on_epoch=epochs.append,
    )  # fmt: skip
    n = len(toy.table)
    other = changed(toy.table, site=pa.array(["Z"] * n), manufacturer=pa.array(["none"] * n), rows=pa.array([1] * n))
    rows = np.random.default_rng(0).permutation(n)
    train.fit(toy.tensors, other.take(pa.array(rows)), toy.preprocessing, small, tmp_path / "b")
    for name in ("weights.npz", "architecture.json", "preprocessing.json", "history.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert network.weights_digest(tmp_path / "a") == network.weights_digest(tmp_path / "b")
    assert epochs == first.history
    assert seen[-1][0] == seen[-1][1] == len(seen)
    train.fit(toy.tensors, toy.table, toy.preprocessing, config(epochs=1, seed=9), tmp_path / "c")
    assert network.weights_digest(tmp_path / "c") != network.weights_digest(tmp_path / "a")


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_very_short_training_ends(toy: Any, tmp_path: Path, epochs: int) -> None:
    """If this failed, who tries a first training on a handful of images would see torch divide by zero."""
    all_at_once = config(epochs=epochs, batch_size=len(toy.table))
    assert len(train.fit(toy.tensors, toy.table, toy.preprocessing, all_at_once, tmp_path).history) == epochs


def test_training_leaves_torch_as_it_was(toy: Any, tmp_path: Path) -> None:
    """A pipeline that runs in somebody's process must not change their seed or threads."""
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train.fit(toy.tensors, toy.table, toy.preprocessing, config(epochs=1, threads=2), tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_one_class_only_is_said(toy: Any, tmp_path: Path, part: str) -> None:
    """Labels of one class are a common first import; a division by zero would not tell what to do."""
    labels = [None if p == part and v == 1 else v for p, v in zip(
        toy.table["part"].to_pylist(), toy.table["label"].to_pylist(), strict=True
    )]  # fmt: skip
    with pytest.raises(
        DataError, match=f"the {part} part does not hold both classes(.|\n)*next: add patients or labels"
    ):
        train.fit(
            toy.tensors, changed(toy.table, label=pa.array(labels, pa.int8())), toy.preprocessing, config(), tmp_path
        )


def test_an_unknown_model_is_said(toy: Any, tmp_path: Path) -> None:
    """A typo in radloop.toml must not end in a KeyError."""
    with pytest.raises(SettingsError, match="expected: densenet"):
        train.fit(toy.tensors, toy.table, toy.preprocessing, config(model="dense"), tmp_path)


def test_augmentation_never_mirrors(toy: Any) -> None:
    """A mirrored chest is situs inversus: the network must not learn that left is right."""
    import torch

    images = torch.zeros(64, 1, 32, 32)
    images[:, :, 8:24, 22:28] = 1
    made = train.augment(images, train.TrainConfig(), torch.Generator().manual_seed(0))
    assert made.shape == images.shape
    assert bool((made[..., 16:].mean((1, 2, 3)) > made[..., :16].mean((1, 2, 3)) + 0.1).all())
    again = train.augment(images, train.TrainConfig(), torch.Generator().manual_seed(0))
    assert torch.equal(made, again)
    still = train.TrainConfig(max_shift=0, max_rotation_deg=0, max_gain=0)
    same = train.augment(images, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)


def test_weights_that_cannot_be_read_are_said(trained: Any, tmp_path: Path) -> None:
    """A model folder cut short must not be served."""
    import shutil

    shutil.copytree(trained.model, tmp_path / "m")
    (tmp_path / "m/weights.npz").write_bytes((trained.model / "weights.npz").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="weights cannot be read"):
        network.load(tmp_path / "m")

"""Training: one binary task, one logit, the same weights for the same seed on the same machine.

Only pixels reach the network. Acquisition and compression attributes never do: they would be a shortcut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from radloop.datasets.tensors import Samples, TensorSet
from radloop.errors import DataError
from radloop.imaging.transforms import Preprocessing
from radloop.learning import network
from radloop.learning.runtimes import Gives

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from torch.utils.data import DataLoader

_AUTO_STEPS = 350
_AUTO_EPOCHS = (3, 24)


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train.

    Attributes:
        model: the architecture, a key of `network.ARCHITECTURES`.
        epochs: passes over the training part; None: about 350 steps, but 3 to 24 epochs.
        batch_size: images a step.
        learning_rate: the peak of the one-cycle schedule (Smith & Topin 2019).
        weight_decay: AdamW's (Loshchilov & Hutter 2019).
        max_shift: augmentation, the largest shift as a fraction of the side.
        max_rotation_deg: augmentation, degrees. There are no flips: they would change laterality.
        max_gain: augmentation, contrast and brightness change by up to this fraction.
        patience: stop after so many epochs without a better validation AUC.
        seed: of initial weights, order and augmentation.
        threads: CPU threads; None: all. Weights are the same for the same number only. One is the default: so small a
            network gains little from a second core, and loses most of both where other processes want them.
        max_seconds: stop after the epoch that passes it. The result then depends on the machine's speed.
        network: a network that was made elsewhere, as a path in the project: it is taken instead, and nothing is trained.
        network_output: what its numbers are.
    """

    model: str = "densenet"
    epochs: int | None = None
    batch_size: int = 32
    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    max_shift: float = 0.05
    max_rotation_deg: float = 5.0
    max_gain: float = 0.15
    patience: int = 8
    seed: int = 0
    threads: int | None = 1
    max_seconds: float | None = None
    network: str = ""
    network_output: Gives = "logit"


class Epoch(msgspec.Struct, frozen=True):
    """One line of `history.json`. Losses are means over images; the AUC is that of the validation part."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_auc: float


class Fitted(msgspec.Struct, frozen=True):
    """What training gave: the epoch whose weights were kept (from 1), the history, wall time, device, threads used."""

    best_epoch: int
    history: list[Epoch]
    seconds: float
    device: str


class Part(msgspec.Struct, frozen=True):
    """The labelled instances of one part, sorted by sop_uid: uids, labels `(n,)` 0/1, patients."""

    sop_uids: list[str]
    labels: NDArray[np.int8]
    patients: list[str]


def labelled(table: pa.Table, name: str) -> Part:
    """The labelled instances of one part of a manifest.

    Raises:
        DataError: there are none, or all are of one class: nothing can be learnt or measured then.
    """
    chosen = table.filter((pc.field("part") == name) & pc.field("label").is_valid()).sort_by("sop_uid")
    labels = np.array(chosen["label"].to_pylist(), dtype=np.int8)
    negative, positive = int((labels == 0).sum()), int((labels == 1).sum())
    if not negative or not positive:
        raise DataError(
            f"the {name} part does not hold both classes",
            expected="at least one patient of each class",
            got=f"{negative} negative and {positive} positive images",
            next_step="add patients or labels (radloop labels import FILE), or raise this part's share in radloop.toml",
        )
    uids, patients = ([str(value) for value in chosen[c].to_pylist()] for c in ("sop_uid", "patient"))
    return Part(uids, labels, patients)


def fit(
    tensors: TensorSet,
    table: pa.Table,
    preprocessing: Preprocessing,
    config: TrainConfig,
    out: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Train on the train part, keep the epoch with the best validation AUC, write the model folder `out`.

    Args:
        tensors: holds every labelled instance of train and validation.
        table: the manifest.
        preprocessing: the one that made the tensors.
        config: how.
        out: gets `weights.npz`, `architecture.json`, `preprocessing.json`, `history.json`.
        progress: called with (steps done, steps in all).
        on_epoch: called after each epoch.

    Raises:
        DataError: one class only in train or validation, or a loss that is no number.
    """
    started = time.monotonic()
    train, validation = labelled(table, "train"), labelled(table, "validation")
    samples = Samples(tensors, preprocessing, train.sop_uids, train.labels)
    description = network.architecture(config.model)
    with network.deterministic(config.seed, config.threads) as device:
        loop = _Loop(config, description, samples, train, device, progress)
        history: list[Epoch] = []
        best, kept = _Best(), None
        for number in range(1, loop.epochs + 1):
            loss = loop.epoch()
            epoch = _validated(number, loss, loop.network, tensors, preprocessing, validation)
            history.append(epoch)
            if on_epoch is not None:
                on_epoch(epoch)
            if best.improves(epoch):
                kept = {name: value.clone() for name, value in loop.network.state_dict().items()}
            late = config.max_seconds is not None and time.monotonic() - started > config.max_seconds
            if late or number - best.epoch >= config.patience:
                break
        if kept is not None:
            loop.network.load_state_dict(kept)
    out.mkdir(parents=True, exist_ok=True)
    network.save(loop.network, description, preprocessing, out)
    (out / "history.json").write_bytes(msgspec.json.encode({"best_epoch": best.epoch, "epochs": history}))
    return Fitted(best.epoch, history, time.monotonic() - started, device)


class _Best:
    """The best epoch so far, by validation AUC and, between equals, validation loss."""

    def __init__(self) -> None:
        self.epoch, self._mark = 0, (-math.inf, -math.inf)

    def improves(self, epoch: Epoch) -> bool:
        mark = (epoch.validation_auc, -epoch.validation_loss)
        if mark <= self._mark:
            return False
        self.epoch, self._mark = epoch.epoch, mark
        return True


def _validated(
    number: int, loss: float, net: nn.Module, tensors: TensorSet, preprocessing: Preprocessing, part: Part
) -> Epoch:
    from sklearn.metrics import roc_auc_score

    scores = network.logits(net, tensors, preprocessing, part.sop_uids)
    signed = np.where(part.labels == 1, -scores, scores)
    return Epoch(number, loss, float(np.logaddexp(0, signed).mean()), float(roc_auc_score(part.labels, scores)))


class _Loop:
    """Network, optimiser, schedule and loader of one training."""

    def __init__(
        self,
        config: TrainConfig,
        description: network.Architecture,
        samples: Samples,
        train: Part,
        device: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        import torch

        self.config, self.device, self.progress, self.done = config, device, progress, 0
        # Channels last: half as fast again in oneDNN's kernels on a CPU, the same figures.
        self._format = torch.channels_last
        self.network = network.create(description).to(device).to(memory_format=self._format)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.loader = _loader(samples, config.batch_size, self.generator)
        self.epochs = config.epochs or min(
            max(math.ceil(_AUTO_STEPS / len(self.loader)), _AUTO_EPOCHS[0]), _AUTO_EPOCHS[1]
        )
        self.steps = self.epochs * len(self.loader)
        positive = float(train.labels.mean())
        self.loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor((1 - positive) / positive, device=device))
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        # A rise of a quarter of four steps ends at its first: torch divides by zero there.
        steps = 5 if self.steps == 4 else self.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, config.learning_rate, total_steps=steps, pct_start=0.25
        )

    def epoch(self) -> float:
        """One pass; returns the mean loss over images."""
        self.network.train()
        total, seen = 0.0, 0
        for images, labels in self._batches():
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.loss(self.network(images).reshape(-1), labels)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            total, seen, self.done = total + loss.item() * len(labels), seen + len(labels), self.done + 1
            if self.progress is not None:
                self.progress(self.done, self.steps)
        if not math.isfinite(total):
            raise DataError(
                "training diverged", expected="a finite loss", got=total, next_step="lower train.learning_rate"
            )
        return total / seen

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            made = augment(images.to(self.device), self.config, self.generator)
            yield made.contiguous(memory_format=self._format), labels.to(self.device)


def _loader(samples: Samples, batch_size: int, generator: Generator) -> DataLoader[Any]:
    """Shuffled whole batches. A last, smaller batch is left out: batch normalisation would see too few images."""
    from torch.utils.data import DataLoader

    return DataLoader(
        samples,  # type: ignore[arg-type]  # a map-style dataset by protocol, so that datasets needs no torch
        batch_size=batch_size,
        shuffle=True,
        drop_last=len(samples) > batch_size,
        collate_fn=Samples.whole,
        generator=generator,
    )


def augment(images: Tensor, config: TrainConfig, generator: Generator) -> Tensor:
    """Small shifts, rotations and changes of grey scale, each image its own. No flips: laterality is anatomy.

    Args:
        images: `(n, 1, size, size)`, 0 to 1.
        config: the largest changes.
        generator: a CPU generator; the same state gives the same images.
    """
    import torch
    from torch.nn import functional

    n = len(images)
    noise = (torch.rand((n, 5), generator=generator) * 2 - 1).to(images.device)
    angle = noise[:, 0] * math.radians(config.max_rotation_deg)
    # affine_grid's coordinates span -1 to 1, so a shift by a fraction of the side is twice that fraction.
    shift = noise[:, 1:3] * 2 * config.max_shift
    rotation = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1)
    theta = torch.cat([rotation.reshape(n, 2, 2), shift[:, :, None]], 2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, offset = 1 + noise[:, 3] * config.max_gain, noise[:, 4] * config.max_gain / 2
    return moved * gain[:, None, None, None] + offset[:, None, None, None]

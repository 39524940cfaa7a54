"""A toy task that a network learns in seconds: a bright disc in the right half of a noisy square is the finding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from radloop.datasets.tensors import TensorSet
from radloop.imaging.transforms import Preprocessing

SIZE = 32


@dataclass(frozen=True)
class Toy:
    """Tensors, their manifest and their preprocessing."""

    tensors: TensorSet
    table: pa.Table
    preprocessing: Preprocessing


def draw(n: int, seed: int, contrast: float) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images `(n, SIZE, SIZE)` of 8 bits and labels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    labels = random.integers(2, size=n)
    images = random.normal(90, 25, (n, SIZE, SIZE))
    for image, label in zip(images, labels, strict=True):
        cy, cx = random.uniform(8, 24), random.uniform(18, 26)
        image += label * contrast * (((y - cy) ** 2 + (x - cx) ** 2) < 25)
    return np.clip(images, 0, 255).astype(np.uint8), labels


def make(folder: Path, *, patients: int = 240, seed: int = 1, contrast: float = 60, key_id: str = "0a0b0c0d") -> Toy:
    """Two images a patient of one label, two sites, half of each sex, all ages."""
    images, labels = draw(patients, seed, contrast)
    images = np.concatenate([images, np.clip(images + np.random.default_rng(seed).normal(0, 10, images.shape), 0, 255)])
    labels = np.tile(labels, 2)
    folder.mkdir(parents=True, exist_ok=True)
    n = len(labels)
    uids = [f"2.25.{i:05d}" for i in range(n)]
    np.save(folder / "shard-0000.npy", images.astype(np.uint8))
    index: dict[str, Any] = {
        "sop_uid": uids,
        "shard": ["shard-0000.npy"] * n,
        "row": pa.array(range(n), pa.int32()),
        "dtype": ["|u1"] * n,
    }
    pq.write_table(pa.table(index), folder / "index.parquet")
    who = [i % patients for i in range(n)]
    parts = ["train", "train", "validation", "test", "test"]
    table = pa.table({
        "sop_uid": uids,
        "patient": [f"P{i:04d}" for i in who],
        "key_id": [key_id] * n,
        "site": ["AB"[i % 2] for i in who],
        "sex": ["FM"[i // 2 % 2] for i in who],
        "age_years": [float(i % 90) for i in who],
        "manufacturer": [f"vendor {i % 3}" for i in who],
        "rows": [512 + i % 2 for i in who],
        "label": pa.array([int(v) for v in labels], pa.int8()),
        "part": [parts[i % 5] for i in who],
    })  # fmt: skip
    return Toy(TensorSet(folder), table, Preprocessing(size=SIZE))

"""Preprocessed images as flat, memory-mapped arrays in their native integer type, windowed when a batch is read.

A folder holds shards `shard-0000.npy`, each `(n, size, size)` of one integer type, and `index.parquet` (sop_uid, shard,
row, dtype), one row an image, sorted by sop_uid. The same rows and preprocessing give the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from radloop.errors import ArtifactError, DicomError
from radloop.imaging.pixels import Pixels
from radloop.imaging.transforms import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.parquet"
SHARD_BYTES = 64 << 20
"""A shard is closed before it grows past this: the most memory that writing holds, once per integer type."""

_POOL_FROM = 64  # images; below it a pool's start (each worker imports pydicom and numpy) costs more than it saves


class Refused(msgspec.Struct, frozen=True):
    """An image that preprocessing refused, and the quarantine reason (`radloop.catalog.schema.Reason`)."""

    sop_uid: str
    reason: str
    detail: str


class Written(msgspec.Struct, frozen=True):
    """What `write` left: images kept, shards, and what was refused, sorted by sop_uid."""

    images: int
    shards: int
    refused: list[Refused]


def write(
    rows: Sequence[Mapping[str, Any]],
    archive: Path,
    preprocessing: Preprocessing,
    out: Path,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Decode and preprocess instances into shards under `out`; the index is written last, by rename.

    Args:
        rows: at least `sop_uid` and `path` (relative to `archive`), in any order; each sop_uid once.
        archive: the de-identified archive.
        preprocessing: what makes each image `(size, size)`.
        out: an existing or new folder.
        workers: processes that decode; 1 works in this one.
        progress: called with (done, total).

    Raises:
        ArtifactError: an instance's file is not in the archive, or a sop_uid comes twice.
    """
    ordered = sorted((str(row["sop_uid"]), str(archive / str(row["path"]))) for row in rows)
    uids = [uid for uid, _ in ordered]
    if len(set(uids)) != len(uids):
        raise ArtifactError("an instance comes twice", expected=f"{len(uids)} different sop_uids", got=len(set(uids)))
    out.mkdir(parents=True, exist_ok=True)
    shards, refused = _Shards(out), []
    with _mapper(workers if len(ordered) >= _POOL_FROM else 1) as mapped:
        images = mapped(partial(_native, preprocessing), [path for _, path in ordered])
        for done, (uid, image) in enumerate(zip(uids, images, strict=True), start=1):
            if isinstance(image, np.ndarray):
                shards.add(uid, image)
            else:
                refused.append(Refused(uid, *image))
            if progress is not None:
                progress(done, len(ordered))
    return Written(shards.close(), shards.count, refused)


def _native(preprocessing: Preprocessing, path: str) -> Pixels | tuple[str, str]:
    """One image, or (reason, detail) of its refusal. Runs in a worker, so nothing but plain values goes back."""
    import pydicom

    try:
        with pydicom.dcmread(path) as ds:
            return preprocessing.native(ds)
    except DicomError as error:
        return str(error.reason), error.what
    except FileNotFoundError:
        raise ArtifactError(
            "an instance's file is not in the archive",
            expected="every row's path under archive/",
            got=Path(path).name,
            next_step="run the prepare pipeline again; if that does not help, restore archive/ from its backup",
        ) from None


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Pixels | tuple[str, str]]]]:
    """`map`, or that of a pool. Spawned, never forked: a fork of a process with torch's threads can hang."""
    if workers <= 1:
        yield map
        return
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else the workers' BLAS threads fight for the cores
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield partial(pool.map, chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before


class _Shards:
    """Open buffers, one an integer type, and the index that grows beside them."""

    def __init__(self, out: Path) -> None:
        self.out, self.count = out, 0
        self._buffers: dict[str, tuple[str, list[Pixels]]] = {}
        self._index: list[tuple[str, str, int, str]] = []

    def add(self, uid: str, image: Pixels) -> None:
        dtype = image.dtype.str
        if dtype not in self._buffers:
            self._buffers[dtype] = (f"shard-{self.count:04d}.npy", [])
            self.count += 1
        name, images = self._buffers[dtype]
        self._index.append((uid, name, len(images), dtype))
        images.append(image)
        if (len(images) + 1) * image.nbytes > SHARD_BYTES:
            self._flush(dtype)

    def _flush(self, dtype: str) -> None:
        name, images = self._buffers.pop(dtype)
        np.save(self.out / name, np.stack(images), allow_pickle=False)

    def close(self) -> int:
        for dtype in list(self._buffers):
            self._flush(dtype)
        columns = list(zip(*self._index, strict=True)) or [(), (), (), ()]
        types = [pa.string(), pa.string(), pa.int32(), pa.string()]
        arrays = [pa.array(c, t) for c, t in zip(columns, types, strict=True)]
        partial_name = self.out / f"{INDEX}.partial"
        pq.write_table(pa.table(arrays, names=["sop_uid", "shard", "row", "dtype"]), partial_name)
        partial_name.replace(self.out / INDEX)
        return len(self._index)


class TensorSet:
    """A folder of `write`, opened for reading; shards are memory-mapped and shared between processes.

    Raises:
        ArtifactError: the index or a shard is missing, or they do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise ArtifactError("no tensors are there", expected=f"a folder with {INDEX}", got=folder.name)
        index = pq.read_table(folder / INDEX, memory_map=False)
        self.sop_uids = [str(uid) for uid in index["sop_uid"].to_pylist()]
        names = [str(name) for name in index["shard"].to_pylist()]
        order = {name: i for i, name in enumerate(sorted(set(names)))}
        self._shards = [_open_shard(folder / name) for name in order]
        self._shard = np.array([order[name] for name in names], dtype=np.intp)
        self._row = np.array(index["row"].to_pylist(), dtype=np.intp)
        self._place = {uid: i for i, uid in enumerate(self.sop_uids)}
        for i, shard in enumerate(self._shards):
            rows = self._row[self._shard == i]
            if shard.ndim != 3 or sorted(rows.tolist()) != list(range(len(shard))):
                raise ArtifactError("index and shard do not fit", expected=f"{len(rows)} images", got=shard.shape)

    def __len__(self) -> int:
        return len(self.sop_uids)

    def __contains__(self, sop_uid: object) -> bool:
        return sop_uid in self._place

    @property
    def size(self) -> int:
        """Side of the images in pixels; 0 if the set is empty."""
        return int(self._shards[0].shape[1]) if self._shards else 0

    def places(self, sop_uids: Sequence[str]) -> NDArray[np.intp]:
        """Positions of instances in this set, for `take`. Raises ArtifactError if one is not in it."""
        missing = sum(uid not in self._place for uid in sop_uids)
        if missing:
            raise ArtifactError(
                "instances have no tensor",
                expected="every instance of the manifest, preprocessed",
                got=f"{missing} of {len(sop_uids)} missing",
                next_step="run preprocess again: these tensors belong to another dataset version",
            )
        return np.array([self._place[uid] for uid in sop_uids], dtype=np.intp)

    def take(self, places: NDArray[np.intp]) -> Pixels:
        """Images `(n, size, size)` at positions, copied once out of the memory map.

        A batch of several integer types takes the smallest type that holds them all, so values never change.
        """
        if not len(places):
            return np.empty((0, self.size, self.size), dtype=np.uint8)
        shards, rows = self._shard[places], self._row[places]
        used = np.unique(shards)
        if len(used) == 1:
            taken: Pixels = np.take(self._shards[used[0]], rows, axis=0)
            return taken
        dtype = np.result_type(*(self._shards[i].dtype for i in used))
        batch = np.empty((len(places), self.size, self.size), dtype=dtype)
        for i in used:
            here = shards == i
            batch[here] = self._shards[i][rows[here]]
        return batch

    def gather(self, sop_uids: Sequence[str]) -> Pixels:
        """`take(places(sop_uids))`: native images `(n, size, size)` in the order asked."""
        return self.take(self.places(sop_uids))


def _open_shard(path: Path) -> Pixels:
    try:
        shard: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError("a shard cannot be read", expected=path.name, got=type(error).__name__) from None
    return shard


class Samples:
    """A map-style torch `Dataset` over a TensorSet that hands out whole batches.

    `torch.utils.data.DataLoader` asks `__getitems__` for a batch of indices at once: one gather from the memory map and
    one vectorised windowing, no copy beside. Use it with `collate_fn=Samples.whole`.

    Args:
        tensors: the images.
        preprocessing: windows a batch.
        sop_uids: the instances, in the order that indices mean.
        labels: 0 or 1 for each, `(n,)`.
    """

    def __init__(
        self, tensors: TensorSet, preprocessing: Preprocessing, sop_uids: Sequence[str], labels: NDArray[Any]
    ) -> None:
        self._tensors, self._preprocessing = tensors, preprocessing
        self._places = tensors.places(sop_uids)
        self.labels = np.ascontiguousarray(labels, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 images `(n, 1, size, size)` and labels `(n,)`, in the order asked."""
        import torch

        chosen = np.asarray(indices, dtype=np.intp)
        images = self._preprocessing.windowed(self._tensors.take(self._places[chosen]))
        return torch.from_numpy(images), torch.from_numpy(self.labels[chosen])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image `(1, size, size)` and its label, a scalar."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    @staticmethod
    def whole(batch: Any) -> Any:
        """A collate function for batches that already are one."""
        return batch

"""Tensors: what is read back is what preprocessing made, byte for byte, in any order, on any number of processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from radloop.datasets import tensors
from radloop.datasets.tensors import Samples, TensorSet
from radloop.errors import ArtifactError
from radloop.imaging.transforms import Preprocessing

SMALL = Preprocessing(size=16)


def dicom(path: Path, seed: int, bits: int) -> None:
    """A noise image of 20 x 24 pixels, 8 or 16 bits allocated."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, UID("1.2.840.10008.5.1.4.1.1.7")
    meta.MediaStorageSOPInstanceUID = UID(f"2.25.{seed}")
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPInstanceUID, ds.SOPClassUID = meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 20, 24, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits, bits - 1, 0
    ds.PixelData = np.random.default_rng(seed).integers(2**bits, size=(20, 24)).astype(f"<u{bits // 8}").tobytes()
    ds.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images, every third of 16 bits."""
    folder = tmp_path_factory.mktemp("archive")
    for i in range(70):
        dicom(folder / f"{i}.dcm", i, 16 if i % 3 == 0 else 8)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Their rows, not in order."""
    return [{"sop_uid": f"2.25.{i:03d}", "path": f"{i}.dcm"} for i in reversed(range(70))]


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_what_is_read_is_what_preprocessing_made(archive: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A row that pointed at another image would give a patient another patient's label."""
    seen: list[tuple[int, int]] = []
    written = tensors.write(rows, archive, SMALL, tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert (written.images, written.shards, written.refused) == (70, 2, [])
    assert seen == [(i, 70) for i in range(1, 71)]
    opened = TensorSet(tmp_path)
    assert opened.sop_uids == sorted(row["sop_uid"] for row in rows)
    assert opened.size == 16
    for row in rows[:9]:
        expected = SMALL.native(pydicom.dcmread(archive / row["path"]))
        (got,) = opened.gather([row["sop_uid"]])
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_a_batch_of_two_integer_types_keeps_values(archive: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """8-bit and 16-bit scanners meet in one batch; a wrapped value would be a white lung."""
    tensors.write(rows, archive, SMALL, tmp_path)
    opened, uids = TensorSet(tmp_path), ["2.25.007", "2.25.003", "2.25.001", "2.25.000"]
    batch = opened.gather(uids)
    assert batch.dtype == np.uint16
    for uid, image in zip(uids, batch, strict=True):
        np.testing.assert_array_equal(image, opened.gather([uid])[0])


def test_bytes_do_not_depend_on_order_or_processes(archive: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The artifact's digest would change with the machine, and every cache after it would be void."""
    tensors.write(rows, archive, SMALL, tmp_path / "a")
    tensors.write(rows[::-1], archive, SMALL, tmp_path / "b", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_many_shards_read_like_one(
    archive: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large datasets do not fit into one shard; an image at a boundary must not be lost."""
    tensors.write(rows, archive, SMALL, tmp_path / "one")
    monkeypatch.setattr(tensors, "SHARD_BYTES", 5 * 16 * 16)
    assert tensors.write(rows, archive, SMALL, tmp_path / "many").shards > 10
    one, many = TensorSet(tmp_path / "one"), TensorSet(tmp_path / "many")
    np.testing.assert_array_equal(one.gather(one.sop_uids), many.gather(one.sop_uids))


def test_an_image_that_cannot_be_used_is_refused_not_raised(
    archive: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """One broken file must not stop the other 5,000, and must be told with its reason."""
    with pydicom.dcmread(archive / "1.dcm") as ds:
        ds.NumberOfFrames = 4
        ds.save_as(archive / "broken.dcm")
    written = tensors.write([*rows, {"sop_uid": "2.25.999", "path": "broken.dcm"}], archive, SMALL, tmp_path, workers=2)
    assert written.images == 70
    assert [(r.sop_uid, r.reason) for r in written.refused] == [("2.25.999", "MULTI_FRAME")]
    with pytest.raises(ArtifactError, match="1 of 2 missing"):
        TensorSet(tmp_path).gather(["2.25.999", "2.25.001"])


def test_a_file_missing_from_the_archive_stops(archive: Path, tmp_path: Path) -> None:
    """A hole in the archive is no bad image: going on would train on less than the manifest says."""
    with pytest.raises(ArtifactError, match="not in the archive"):
        tensors.write([{"sop_uid": "2.25.1", "path": "gone.dcm"}], archive, SMALL, tmp_path)


def test_samples_feed_a_torch_loader(archive: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """What the network sees must be the windowed image with its own label, whatever the shuffling."""
    from torch.utils.data import DataLoader

    tensors.write(rows, archive, SMALL, tmp_path)
    opened = TensorSet(tmp_path)
    labels = np.arange(70)
    samples = Samples(opened, SMALL, opened.sop_uids, labels)
    seen = 0
    for images, given in DataLoader(samples, batch_size=16, shuffle=True, collate_fn=Samples.whole):  # type: ignore[arg-type]
        expected = SMALL.windowed(opened.gather([opened.sop_uids[int(i)] for i in given]))
        np.testing.assert_array_equal(images.numpy(), expected)
        seen += len(given)
    assert seen == 70
    image, label = samples[3]
    assert image.shape == (1, 16, 16)
    assert label.item() == 3


def test_half_written_tensors_are_refused(archive: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A folder left by a killed process must not be trained on."""
    tensors.write(rows, archive, SMALL, tmp_path)
    shard = tmp_path / "shard-0001.npy"
    np.save(shard, np.load(shard)[:-1])
    with pytest.raises(ArtifactError, match="do not fit"):
        TensorSet(tmp_path)
    shard.write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TensorSet(tmp_path)
    (tmp_path / "index.parquet").unlink()
    with pytest.raises(ArtifactError, match="no tensors are there"):
        TensorSet(tmp_path)

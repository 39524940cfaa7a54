"""Preprocessing: exact, oriented, and one function for training and serving."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import radloop
from radloop.catalog.reason import Reason
from radloop.errors import DicomError, SettingsError
from radloop.imaging.transforms import Preprocessing

SMALL = Preprocessing(size=8)
planes = hnp.arrays(
    st.sampled_from([np.uint8, np.uint16, np.int16]),
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=37),
)


def dataset(array: NDArray[np.integer], **attributes: object) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.Rows, ds.Columns = array.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = array.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def by_hand(array: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Area averaging the slow way: enlarge until output pixels are whole blocks, then average blocks, half up."""
    rows, columns = array.shape
    side = max(rows, columns)
    square = np.full((side, side), array.min(), dtype=np.int64)
    top, left = (side - rows) // 2, (side - columns) // 2
    square[top : top + rows, left : left + columns] = array
    large = np.kron(square, np.ones((size, size), dtype=np.int64))
    total = large.reshape(size, side, size, side).sum(axis=(1, 3))
    return (2 * total + side * side) // (2 * side * side)


@given(planes, st.integers(8, 13))
def test_resizing_is_exact_area_averaging(array: NDArray[np.integer], size: int) -> None:
    """A rounding that hangs on the BLAS library would give training and serving different pixels."""
    native = Preprocessing(size=size).native(array)
    assert native.dtype == array.dtype
    np.testing.assert_array_equal(native, by_hand(array, size))


def test_32_bit_images_are_resized_exactly_too() -> None:
    """Their sums leave float64's whole numbers; the wrong path would lose the lowest bits without a word."""
    array = np.random.default_rng(0).integers(0, 2**32, (300, 200), dtype=np.uint32)
    np.testing.assert_array_equal(SMALL.native(array), by_hand(array, 8))


@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16, np.int16]), (5, 8, 8)))
def test_training_and_serving_see_the_same_bits(images: NDArray[np.integer]) -> None:
    """Training windows batches of stored tensors, serving one data set: a difference is training-serving skew."""
    stored = np.stack([SMALL.native(image) for image in images])
    batch = SMALL.windowed(stored)
    assert batch.shape == (5, 1, 8, 8)
    assert batch.dtype == np.float32
    for one, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(one, SMALL.from_dataset(dataset(image)))


@given(planes)
def test_what_the_network_sees_lies_between_0_and_1(array: NDArray[np.integer]) -> None:
    """NaN from an image of one value would make every prediction of its batch NaN."""
    seen = SMALL.windowed(SMALL.native(array))
    assert seen.shape == (1, 8, 8)
    assert np.isfinite(seen).all()
    assert seen.min() >= 0
    assert seen.max() <= 1
    if array.min() == array.max():
        assert not seen.any()


def test_monochrome1_is_the_same_image_as_its_inverse() -> None:
    """A network that saw half of its radiographs inverted learns the vendor, not the patient."""
    two = np.random.default_rng(0).integers(100, 4000, (40, 40)).astype(np.uint16)
    ours = Preprocessing(size=40)
    one = dataset((4095 - two).astype(np.uint16), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(ours.from_dataset(one), ours.from_dataset(dataset(two)))
    mirrored, straight = ours.native(4095 - two, "MONOCHROME1"), ours.native(two)
    np.testing.assert_array_equal(mirrored - mirrored.min(), straight - straight.min())


def test_a_negative_slope_turns_the_grey_scale_round() -> None:
    """RescaleSlope -1 with MONOCHROME2 displays as MONOCHROME1 does (PS3.3 C.11.1, C.7.6.3.1.2)."""
    array = np.arange(64, dtype=np.uint16).reshape(8, 8)
    turned = dataset(array, RescaleSlope="-1", RescaleIntercept="4095")
    np.testing.assert_array_equal(SMALL.native(turned), SMALL.native(array, "MONOCHROME1"))
    both = dataset(array, RescaleSlope="-1", RescaleIntercept="4095", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(SMALL.native(both), array)


def test_the_percentile_window_does_not_care_for_gain_and_offset() -> None:
    """Exposure and detector gain carry no diagnosis."""
    array = np.random.default_rng(0).integers(0, 1000, (8, 8)).astype(np.uint16)
    np.testing.assert_array_equal(SMALL.windowed(array), SMALL.windowed((4 * array + 300).astype(np.uint16)))


def test_the_window_runs_between_the_percentiles_asked_for() -> None:
    """Nearest rank: what is stated in the model card is what is done."""
    array = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    seen = Preprocessing(size=100, p_low=10, p_high=60).windowed(array)[0].ravel()
    assert seen[:1001].max() == 0
    assert seen[1001] > 0
    assert seen[5998] < 1
    assert seen[5999:].min() == 1


def test_a_wide_image_is_padded_above_and_below_with_dark() -> None:
    """Stretched instead, hearts would be as wide as their detectors."""
    array = np.full((10, 40), 500, np.uint16)
    array[0, 0] = 100
    native = Preprocessing(size=40).native(array)
    assert (native[:15] == 100).all()
    assert (native[25:] == 100).all()
    np.testing.assert_array_equal(native[15:25], array)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_darkness_not_tissue(photometric: str) -> None:
    """Around a circular field of view -2000 would stretch the window, and after inversion shine."""
    array = np.full((8, 8), 700, np.int16)
    array[2:6, 2:6] = 900
    array[:, 0] = -2000
    native = SMALL.native(dataset(array, PhotometricInterpretation=photometric, PixelPaddingValue=-2000))
    assert native.min() == 700
    assert (native[:, 0] == 700).all()
    assert native[3, 3] == (900 if photometric == "MONOCHROME2" else 700)


def test_a_padding_range_and_an_unsigned_padding_value_are_understood() -> None:
    """US 63536 is what many scanners write for SS -2000; a range covers scanned film (PS3.3 C.7.5.1.1.2)."""
    array = np.full((8, 8), 5, np.int16)
    array[0], array[1] = -2000, -1990
    array[4, 4] = 60
    assert SMALL.native(array, padding=(63536, 63546)).min() == 5
    assert SMALL.native(array, padding=(63536, 63536)).min() == -1990
    everything = np.full((8, 8), -2000, np.int16)
    assert (SMALL.native(everything, padding=(-2000, -2000)) == -2000).all()


def test_hounsfield_units_come_from_slope_and_intercept() -> None:
    """A CT network without them would see another scanner's water as bone."""
    ct = Preprocessing(size=8, window="hu", low_hu=-100, high_hu=300)
    stored = np.full((8, 8), 1024, np.uint16)
    stored[0] = 1324
    ds = dataset(stored, RescaleSlope="1", RescaleIntercept="-1024")
    native = ct.native(ds)
    assert native.dtype == np.int16
    assert (native[0] == 300).all()
    assert (native[1:] == 0).all()
    seen = ct.from_dataset(ds)
    assert (seen[0, 0] == 1).all()
    np.testing.assert_allclose(seen[0, 1:], 0.25)


def test_hounsfield_units_of_an_image_without_a_scale_are_refused() -> None:
    """Guessing slope 1 and intercept 0 would shift every tissue by 1024."""
    with pytest.raises(DicomError, match='set window = "percentile"') as caught:
        Preprocessing(window="hu").from_dataset(dataset(np.zeros((40, 40), np.uint16)))
    assert Reason(caught.value.reason) is Reason.BAD_WINDOW


def test_only_planes_are_taken() -> None:
    """The first frame of a cine is not the image that somebody labelled."""
    with pytest.raises(DicomError, match="not one plane") as caught:
        SMALL.native(np.zeros((3, 40, 40), np.uint8))
    assert Reason(caught.value.reason) is Reason.MULTI_FRAME
    with pytest.raises(DicomError, match="impossible size"):
        SMALL.native(np.zeros((0, 40), np.uint8))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"size": 4}, "size is out of range"),
        ({"p_low": 99.0, "p_high": 1.0}, "percentiles are no range"),
        ({"p_low": float("nan")}, "percentiles are no range"),
        ({"window": "hu", "low_hu": 300, "high_hu": 300}, "HU window is no range"),
    ],
)
def test_impossible_parameters_are_refused_at_once(values: dict[str, object], match: str) -> None:
    """Better now than after the training."""
    with pytest.raises(SettingsError, match=match):
        Preprocessing(**values)  # type: ignore[arg-type]


def test_the_digest_tells_parameters_apart_and_survives_json() -> None:
    """It is what a predictor compares before it dares to serve."""
    digests = {p.digest for p in (Preprocessing(), SMALL, Preprocessing(p_low=2), Preprocessing(window="hu"))}
    assert len(digests) == 4
    again = msgspec.json.decode(msgspec.json.encode(Preprocessing()), type=Preprocessing)
    assert again.digest == Preprocessing().digest


@pytest.mark.parametrize("module", ["transforms", "pixels", None])
def test_the_digest_changes_with_the_code(tmp_path: Path, module: str | None) -> None:
    """A predictor with a mended resize must refuse a model that was trained with the broken one."""
    package = tmp_path / "radloop"
    source = Path(radloop.__file__).parent
    shutil.copytree(source / "imaging", package / "imaging", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, package / name)
    if module:
        with (package / "imaging" / f"{module}.py").open("a") as file:
            file.write("\n# another version\n")
    code = "from radloop.imaging.transforms import Preprocessing as P; print(P().digest)"
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == Preprocessing().digest) is (module is None)


@pytest.mark.data
def test_real_ct_ends_in_a_window_of_soft_tissue(test_data: Path) -> None:
    """Real slopes, padding and signs, through the whole of it."""
    ct = Preprocessing(window="hu")
    for file in sorted((test_data / "ct_contrast_tcga").rglob("*.dcm"))[::12]:
        with pydicom.dcmread(file) as ds:
            native, seen = ct.native(ds), ct.from_dataset(ds)
        assert native.dtype == np.int16
        assert -2049 <= native.min() < -700
        assert 0.02 < float(((seen > 0) & (seen < 1)).mean()) < 0.9

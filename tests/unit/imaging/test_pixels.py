"""Decoding, digests and statistics of pixels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from radloop.catalog.reason import Reason
from radloop.errors import DicomError
from radloop.imaging import pixels

CANARY = "Zzyzxson^Quilliam"


def image(array: NDArray[np.integer], *, bits_stored: int = 12, photometric: str = "MONOCHROME2") -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PatientName = CANARY
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    ds.Rows, ds.Columns = array.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.BitsAllocated = array.itemsize * 8
    ds.BitsStored, ds.HighBit = bits_stored, bits_stored - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def ramp(rows: int = 40, columns: int = 50) -> NDArray[np.uint16]:
    return (np.arange(rows * columns) * 7 % 4096).astype(np.uint16).reshape(rows, columns)


def reread(ds: Dataset) -> Dataset:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return pydicom.dcmread(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLSLossless]
)
def test_one_image_has_one_digest_under_every_lossless_transfer_syntax(syntax: str) -> None:
    """Else a PACS that recompresses would turn each image into a conflict, and duplicates would pass unseen."""
    ds = image(ramp())
    if syntax in (RLELossless, JPEGLSLossless):
        ds.compress(syntax, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        ds.PixelData = ramp().astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    array = pixels.decode(reread(ds))
    np.testing.assert_array_equal(array, ramp())
    assert array.dtype == np.dtype("<u2")
    assert pixels.digest(array) == pixels.digest(ramp())


def test_bits_above_bits_stored_are_no_pixel_values() -> None:
    """An old overlay in bit 15 would otherwise shine as the brightest thing in the image, and change the digest."""
    dirty = ramp() | np.uint16(0x8000)
    np.testing.assert_array_equal(pixels.decode(image(dirty)), ramp())


def test_signed_values_of_twelve_bits_keep_their_sign() -> None:
    """CT numbers below zero would otherwise become the highest ones."""
    values = (ramp().astype(np.int16) - 2048).astype(np.int16)
    stored = (values.astype(np.uint16) & 0x0FFF).view(np.int16)
    array = pixels.decode(image(stored))
    np.testing.assert_array_equal(array, values)
    assert array.dtype == np.dtype("<i2")


def without(keyword: str) -> Callable[[Dataset], object]:
    return lambda ds: delattr(ds, keyword)


def having(**values: object) -> Callable[[Dataset], object]:
    return lambda ds: [setattr(ds, keyword, value) for keyword, value in values.items()]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without("PixelData"), Reason.NO_PIXELS),
        (having(PixelData=b""), Reason.NO_PIXELS),
        (having(NumberOfFrames=2), Reason.MULTI_FRAME),
        (having(NumberOfFrames=0), Reason.MULTI_FRAME),
        (having(SamplesPerPixel=3, PhotometricInterpretation="RGB"), Reason.MULTI_CHANNEL),
        (having(PhotometricInterpretation="PALETTE COLOR"), Reason.MULTI_CHANNEL),
        (without("PhotometricInterpretation"), Reason.MULTI_CHANNEL),
        (having(Rows=0), Reason.BAD_GEOMETRY),
        (having(Rows=65535), Reason.BAD_GEOMETRY),
        (without("Columns"), Reason.BAD_GEOMETRY),
        (having(PixelData=b"\0\0" * 999), Reason.PIXELS_UNDECODABLE),
        (without("BitsAllocated"), Reason.PIXELS_UNDECODABLE),
        (having(BitsStored=17), Reason.PIXELS_UNDECODABLE),
    ],
)
def test_what_is_no_plain_image_is_refused_with_its_reason(spoil: Callable[[Dataset], object], reason: Reason) -> None:
    """A wrong reason sends whoever clears the quarantine looking in the wrong place; PHI in it would reach the log."""
    ds = image(ramp())
    spoil(ds)
    with pytest.raises(DicomError) as caught:
        pixels.decode(ds)
    assert Reason(caught.value.reason) is reason
    assert "Zzyzxson" not in str(caught.value)


def test_floating_point_pixels_are_no_image_of_this_kind() -> None:
    """A parametric map is whole and readable: NO_PIXELS would be a lie."""
    ds = image(ramp())
    del ds.PixelData
    ds.FloatPixelData = ramp().astype(np.float32).tobytes()
    with pytest.raises(DicomError, match="floating-point") as caught:
        pixels.decode(ds)
    assert Reason(caught.value.reason) is Reason.UNSUPPORTED_OBJECT


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless, "1.2.3.4.5"])
def test_a_broken_codestream_is_undecodable_and_never_a_crash(syntax: str) -> None:
    """One bad file must not end the run of a night."""
    ds = image(ramp())
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(range(256)) * 3])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    with pytest.raises(DicomError) as caught:
        pixels.decode(ds)
    assert Reason(caught.value.reason) is Reason.PIXELS_UNDECODABLE


@given(
    hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)),
    st.data(),
)
def test_the_digest_sees_each_pixel_the_shape_and_the_type(array: NDArray[np.uint16], data: st.DataObject) -> None:
    """Two different images with one digest would be called duplicates, and one of them thrown out."""
    digest = pixels.digest(array)
    assert digest == pixels.digest(array.copy(order="F")) == pixels.digest(array.astype(">u2"))
    changed = array.copy()
    changed.flat[data.draw(st.integers(0, array.size - 1))] ^= 1
    others = [changed, array.reshape(1, -1, 1), array.view(np.int16)]
    if array.shape[0] != array.shape[1]:
        others.append(array.reshape(array.shape[::-1]))
    assert digest not in {pixels.digest(other) for other in others}


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.uint32]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    ),
    st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
)
def test_every_image_has_features_within_their_bounds(array: NDArray[np.integer], photometric: str) -> None:
    """One NaN would silence the drift test of its column."""
    found = pixels.features(array, photometric)
    assert tuple(found) == pixels.FEATURES
    assert all(math.isfinite(value) for value in found.values())
    for name in ("mean", "std", "p01", "p50", "p99", "entropy", "saturated_fraction"):
        assert 0 <= found[name] <= 1, name
    assert found["p01"] <= found["p50"] <= found["p99"]
    assert found["edge_energy"] >= 0
    assert found["noise_sigma"] >= 0


def scene(bits: int, *, seed: int = 0) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:256, 0:256] / 256
    value = 0.2 + 0.5 * x * y + rng.normal(0, 0.01, x.shape)
    return np.rint(np.clip(value, 0, 1) * ((1 << bits) - 1)).astype(np.uint16)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_features_do_not_depend_on_bit_depth(bits: int) -> None:
    """A scanner whose software update writes 14 bits instead of 12 must not raise a drift alert."""
    reference, found = pixels.features(scene(12), bits_stored=12), pixels.features(scene(bits), bits_stored=bits)
    for name in pixels.FEATURES:
        assert found[name] == pytest.approx(reference[name], rel=0.02, abs=2e-3), name


def test_features_see_the_image_as_displayed() -> None:
    """MONOCHROME1 and 2 of one scene are one scene; else every second vendor would drift."""
    two = scene(12)
    assert pixels.features(4095 - two, "MONOCHROME1", 12) == pixels.features(two, "MONOCHROME2", 12)


@pytest.mark.parametrize("sigma", [4.0, 20.0, 80.0])
def test_noise_sigma_finds_the_noise_that_was_put_in(sigma: float) -> None:
    """It is what tells a tired detector from another population."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:300, 0:280]
    clean = 1000 + 4 * x + 3 * y
    found = pixels.features(np.rint(clean + rng.normal(0, sigma, x.shape)).astype(np.uint16), bits_stored=12)
    contrast = (found["p99"] - found["p01"]) * 4095
    assert found["noise_sigma"] * contrast == pytest.approx(sigma, rel=0.03)


def test_features_of_a_known_image() -> None:
    """Every alert and report rests on these numbers: here they are by hand."""
    array = np.array([[0, 0, 100, 100]] * 4, np.uint8)
    found = pixels.features(array)
    assert found["mean"] == pytest.approx(50 / 255, abs=1e-6)
    assert found["std"] == pytest.approx(50 / 255, abs=1e-6)
    assert (found["p01"], found["p50"]) == (0, 0)
    assert found["p99"] == pytest.approx(100 / 255, abs=1e-6)
    assert found["entropy"] == 1 / 8  # two equal bins: one bit
    assert found["edge_energy"] == pytest.approx(4 / 24, abs=1e-6)  # 4 of 12 + 12 differences are 100 of 100
    assert found["saturated_fraction"] == 0.5


def test_features_are_cheap() -> None:
    """They run in every prediction: 2 ms on a free core; ten times that is allowed on a busy one."""
    array = np.random.default_rng(0).integers(0, 4096, (512, 512)).astype(np.uint16)

    def once() -> float:
        start = perf_counter()
        pixels.features(array, "MONOCHROME1", 12)
        return perf_counter() - start

    assert min(once() for _ in range(10)) < 0.02


@pytest.mark.data
def test_real_ct_decodes_in_hounsfield_range(test_data: Path) -> None:
    """Real headers are stranger than ours: padding, signs, slopes."""
    files = sorted((test_data / "ct_contrast_tcga").rglob("*.dcm"))
    assert len(files) >= 50
    for file in files[::10]:
        with pydicom.dcmread(file) as ds:
            array = pixels.decode(ds)
            assert array.shape == (ds.Rows, ds.Columns)
            hounsfield = array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
            assert -2100 <= hounsfield.min() < -800
            assert 0 < hounsfield.max() < 8192

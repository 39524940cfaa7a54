"""What hides in pixel data goes, and no pixel changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RLELossless

from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.deidentify.stowaways import Bits, cleared, remove
from radloop.dicom.phi import codestream_texts
from radloop.dicom.uids import Pseudonymiser
from radloop.testing.phi.generate import generate

SECRET = b"Featherstone, Ambrose"
CLEANER = Deidentifier(Pseudonymiser(b"0123456789abcdef0123456789abcdef"))


def said(ds: Dataset) -> bool:
    return any(SECRET.decode() in text for text in codestream_texts(ds))


def comment(marker: int, extra: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + (len(SECRET) + len(extra) + 3).to_bytes(2, "big") + extra + SECRET + b"\0"


JPEGS = ["SC_rgb_jpeg_dcmtk.dcm", "JPEG-lossy.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_rgb_jls_lossy_sample.dcm"]


@pytest.mark.parametrize("name", [*JPEGS, "SC_rgb_small_odd_jpeg.dcm"])
@pytest.mark.parametrize("marker", [0xFE, 0xE1, 0xEF])
def test_comments_of_jpeg_go_and_pixels_stay(name: str, marker: int) -> None:
    """No header cleaner sees the name that an encoder wrote into the codestream, and no decoder shows it."""
    ds = pydicom.dcmread(get_testdata_file(name))
    count = int(ds.get("NumberOfFrames") or 1)
    frames = [f[:2] + comment(marker) + f[2:] for f in generate_frames(ds.PixelData, number_of_frames=count)]
    before = list(generate_frames(ds.PixelData, number_of_frames=count))
    ds.PixelData = encapsulate(frames)
    assert said(ds)
    assert remove(ds)
    assert not said(ds)
    after = list(generate_frames(ds.PixelData, number_of_frames=count))
    scans = [f[f.find(b"\xff\xda") :].rstrip(b"\0") for f in (*before, *after)]
    assert scans[: len(before)] == scans[len(before) :]
    assert not remove(ds)


def test_what_decoding_needs_stays() -> None:
    """Without Adobe's segment a decoder takes RGB for YBR: every colour would be another."""
    ds = pydicom.dcmread(get_testdata_file("SC_rgb_jpeg_lossy_gdcm.dcm"))
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
    ds.PixelData = encapsulate([frame[:2] + adobe + comment(0xFE) + frame[2:]])
    assert remove(ds)
    assert adobe in ds.PixelData
    assert not said(ds)


@pytest.mark.parametrize("extended", [False, True])
def test_comments_of_jpeg2000_go_and_pixels_stay(extended: bool) -> None:
    """As for JPEG; a table of offsets into the old fragments would point into the middle of others."""
    ds = pydicom.dcmread(get_testdata_file("J2K_pixelrep_mismatch.dcm"))
    pixels = pixel_array(ds, raw=True)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    first = frame.find(b"\xff\x52")  # COD, after SIZ
    odd = frame[:first] + comment(0x64, b"\0\1") + frame[first:]
    if extended:
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended([odd])
    else:
        ds.PixelData = encapsulate([odd])
    assert said(ds)
    assert remove(ds)
    assert not said(ds)
    assert "ExtendedOffsetTable" not in ds
    assert np.array_equal(pixel_array(ds, raw=True), pixels)


def test_unused_offsets_of_rle_are_zeroed() -> None:
    """Forty-eight bytes that no decoder reads hold a name with ease."""
    ds = pydicom.dcmread(get_testdata_file("MR_small_RLE.dcm"))
    pixels = pixel_array(ds, raw=True)
    frame = bytearray(next(generate_frames(ds.PixelData, number_of_frames=1)))
    frame[20 : 20 + len(SECRET)] = SECRET
    ds.PixelData = encapsulate([bytes(frame)])
    assert ds.file_meta.TransferSyntaxUID == RLELossless
    assert said(ds)
    assert remove(ds)
    assert not said(ds)
    assert np.array_equal(pixel_array(ds, raw=True), pixels)


def test_bits_above_the_stored_ones() -> None:
    """Four bits a pixel are half a byte of text; sign, and the scanner's value for "outside", are no text."""
    unsigned = np.array([0, 5, 4095, 0x1005, 0xF830], "<u2")
    bits = Bits(16, 12, signed=False)
    assert np.frombuffer(cleared(unsigned.tobytes(), bits) or b"", "<u2").tolist() == [0, 5, 4095, 5, 0x830]
    padded = Bits(16, 12, signed=False, padding=0xF830)
    assert np.frombuffer(cleared(unsigned.tobytes(), padded) or b"", "<u2").tolist() == [0, 5, 4095, 5, 0xF830]
    assert cleared(unsigned[:3].tobytes(), bits) is None
    signed = Bits(16, 12, signed=True)
    values = np.array([-2048, -1, 2047, 0], "<i2")
    assert cleared(values.tobytes(), signed) is None
    assert cleared((values.view("<u2") & 0xFFF).tobytes(), signed) is None
    assert np.frombuffer(cleared(np.array([0x4FFF], "<u2").tobytes(), signed) or b"", "<i2").tolist() == [-1]
    assert cleared(unsigned.tobytes(), Bits(16, 16, signed=False)) is None


def test_a_file_is_cleaned_of_them(tmp_path: Path) -> None:
    """What is in a module and not on the way helps nobody."""
    source = tmp_path / "in.dcm"
    found = 0
    for specimen in generate(3, 40, kinds=("CR", "CT", "DX"), burned_in=False):
        source.write_bytes(specimen.data)
        places = {r.path for r in specimen.answer.requirements} & {"(codestream)", "(unused bits)"}
        found += len(places)
        CLEANER.clean_file(source, tmp_path / "2.25.1.dcm", site="A")
    assert found > 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # what pydicom finds odd in odd files
def test_nothing_is_taken_from_pydicoms_own_files() -> None:
    """An encoder's own mark is in most JPEG 2000 files; rewriting these would cost time and prove nothing."""
    looked = 0
    for path in sorted(Path(get_testdata_file("CT_small.dcm")).parent.rglob("*.dcm")):
        try:
            ds = pydicom.dcmread(path)
            before = pixel_array(ds, raw=True)
        except Exception:
            continue
        changed = remove(ds)
        looked += 1
        assert not changed or np.array_equal(pixel_array(ds, raw=True) & 0xFF, before & 0xFF), path
    assert looked > 50

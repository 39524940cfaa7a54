"""Text burned into pixels: which images are looked at, that the text goes, and that nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.uid import (
    UID,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from radloop.catalog.reason import Reason
from radloop.dicom.burned_in import MARGIN, Decision, Pixels
from radloop.dicom.burned_in.ocr import Reader, is_marker
from radloop.dicom.deidentify import Deidentifier
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError, SettingsError
from radloop.imaging.frames import displayed, stored_frames
from radloop.testing import phantoms
from radloop.testing.burned import Burned, burn

pytest.importorskip("rapidocr", reason="the extra ocr is not installed")
NAMES = Pseudonymiser(b"0123456789abcdef0123456789abcdef")
PIXELS = Pixels(draw=NAMES.fraction)
READER = Reader()
TEXT = "HARROWGATE, MILLICENT"


def chest(seed: int = 1, site: str = "A") -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    body = phantoms.anatomy(rng, sex="F", age_years=50)
    return phantoms.radiograph(body, phantoms.SCANNERS[site], rng, finding=False)


def image(
    frames: NDArray[Any], *, photometric: str = "MONOCHROME2", bits_stored: int = 12, **attributes: Any
) -> Dataset:
    """A DX image, or what the attributes make of it; `frames` is (rows, columns), or (frames, rows, columns[, 3])."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    ds.Modality, ds.PatientID, ds.PatientName = "DX", "H1", "Harrowgate^Millicent"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    shape = frames.shape if frames.ndim > 2 else (1, *frames.shape)
    ds.Rows, ds.Columns = shape[1:3]
    if shape[0] > 1:
        ds.NumberOfFrames = shape[0]
    ds.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    if frames.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = frames.dtype.itemsize * 8
    ds.BitsStored = bits_stored
    ds.HighBit = bits_stored - 1
    ds.PixelRepresentation = int(frames.dtype.kind == "i")
    ds.PixelData = frames.tobytes()
    ds["PixelData"].VR = "OB" if frames.dtype.itemsize == 1 else "OW"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    ds.set_original_encoding(False, True)
    return ds


def burned(**options: Any) -> tuple[NDArray[np.uint16], Burned]:
    plane = chest()
    told: dict[str, Any] = {"at": (20, 12), "size_px": 16, "value": 4095} | options
    return plane, burn(plane, told.pop("text", TEXT), **told)


def cleaned(ds: Dataset) -> Dataset:
    out = PIXELS.cleaned(ds)
    assert out is not None
    return out


def inside(frames: NDArray[Any], where: Burned) -> NDArray[Any]:
    x, y, width, height = where.box
    return frames[:, y : y + height, x : x + width]


# ---- which images are looked at


@pytest.mark.parametrize(
    "attributes, rule, look",
    [
        ({"Modality": "DX"}, "projection", True),
        ({"Modality": "MG", "BurnedInAnnotation": "NO"}, "projection", True),
        ({"Modality": "US"}, "ultrasound", True),
        ({"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "CT"}, "secondary-capture", True),
        ({"Modality": "MR", "ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen-save", True),
        ({"Modality": "CT", "ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "derived-secondary", True),
        ({"Modality": "CT", "BurnedInAnnotation": "YES"}, "declared", True),
        ({"Modality": "CT", "InstanceNumber": "1"}, "original-tomography", True),
        ({"Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer", True),
        ({"Modality": "SEG", "SOPClassUID": UID("1.2.840.10008.5.1.4.1.1.66.4")}, "computed", False),
        ({"Modality": "XX", "ImageType": None}, "everything-else", True),
    ],
)
def test_the_table(attributes: dict[str, Any], rule: str, look: bool) -> None:
    """A kind of image that hospitals write on would pass unseen."""
    decision = PIXELS.decide(image(chest(), **attributes))
    assert (decision.rule, decision.look) == (rule, look)


@pytest.mark.parametrize("kind", [["DERIVED", "SECONDARY", "DOSE_INFO"], ["DERIVED", "PRIMARY", "LABEL", "NONE"]])
def test_pages_of_text_are_refused(kind: list[str]) -> None:
    """A dose page or a slide's label is nothing but identity and text."""
    with pytest.raises(DicomError, match="refused by the rule") as caught:
        PIXELS.decide(image(chest(), ImageType=kind))
    assert caught.value.reason == Reason.BURNED_IN_DECLARED


def test_a_sample_of_slices() -> None:
    """One slice in fifty and the first of each series, the same ones in every run: the documentation promises it."""
    for series in ("1.2.3.3", "1.2.3.4"):
        ds = image(chest(), Modality="CT", SOPClassUID=CTImageStorage, SeriesInstanceUID=series)
        looked = []
        for number in range(1, 501):
            ds.InstanceNumber = number
            if PIXELS.decide(ds).look:
                looked.append(number)
        assert looked[0] == 1
        assert len(looked) in (10, 11)
        assert set(np.diff(looked[1:])) == {50}


def test_own_rules_come_first_and_are_checked() -> None:
    """A site that knows its devices says so; a typo in it must not silently look at nothing."""
    mine = [{"name": "our-plates", "action": "pass", "manufacturer": ["aurora*"], "blank": [[0, 0, 1, 0.1]]}]
    plane = chest()
    ds = image(plane, Manufacturer="Aurora Imaging")
    pixels = Pixels(rules=mine)
    decision = pixels.decide(ds)
    assert (decision.rule, decision.look, decision.reads_pixels) == ("our-plates", False, True)
    out = pixels.cleaned(ds)
    assert out is not None
    frames, _ = stored_frames(out)
    assert (frames[0, :28] == frames.min()).all()
    assert (frames[0, 29:, :, 0] == plane[29:]).all()
    with pytest.raises(SettingsError, match=r"pixel_rules.*manufactorer"):
        Pixels(rules=[{"name": "x", "action": "pass", "manufactorer": ["a"]}])
    with pytest.raises(SettingsError, match="no such mode"):
        Pixels("clear")  # type: ignore[arg-type]


def test_the_header_s_bytes_decide_as_the_dataset_does(tmp_path: Path) -> None:
    """The fast path would copy pixels that somebody must look at."""
    for number, attributes in enumerate(
        ({"Modality": "CT", "InstanceNumber": 7}, {"Modality": "US"}, {"BurnedInAnnotation": "YES"}, {"Modality": "MR"})
    ):
        ds = image(chest(), **attributes)
        path = tmp_path / f"{number}.dcm"
        ds.save_as(path, enforce_file_format=True)
        told = PIXELS.decide_bytes(path.read_bytes(), implicit=False)
        expected = PIXELS.decide(ds)
        assert (told.rule, told.look, told.blank) == (expected.rule, expected.look, expected.blank)


# ---- text goes


@pytest.mark.parametrize("size_px", [10, 16, 40])
@pytest.mark.parametrize("angle", [0, 90])
def test_text_of_any_size_goes(size_px: int, angle: int) -> None:
    """A name in the corner of a radiograph leaves the hospital."""
    text = "DOB 14.03.61" if size_px == 40 else TEXT
    plane, where = burned(size_px=size_px, angle=angle, text=text)
    frames, _ = stored_frames(cleaned(image(plane)))
    assert (inside(frames, where) == frames.min()).all()


@pytest.mark.parametrize("value", [0, 3300, 4095])
def test_text_of_any_shade_goes(value: int) -> None:
    """Black, grey or white: film digitisers write in all of them."""
    plane, where = burned(value=value, at=(60, 150))
    frames, _ = stored_frames(cleaned(image(plane)))
    assert (inside(frames, where) == frames.min()).all()


def test_white_text_on_white_goes() -> None:
    """Text in the largest value against pixels nearly as bright is seen by whoever changes the window."""
    plane = np.full((256, 256), 4000, dtype=np.uint16)
    plane[128:] = 300
    where = burn(plane, TEXT, at=(20, 40), size_px=16, value=4095)
    frames, _ = stored_frames(cleaned(image(plane)))
    assert len(np.unique(inside(frames, where))) == 1


def test_one_small_text_in_a_large_image_is_found() -> None:
    """A radiograph of millions of pixels with one line of 12: the detector must see it in parts, or it sees nothing."""
    scanner = replace(phantoms.SCANNERS["B"], rows=1280, columns=1280)
    rng = np.random.default_rng(0)
    plane = phantoms.radiograph(phantoms.anatomy(rng, sex="M", age_years=60), scanner, rng, finding=False)
    view = (255 - (plane >> 6)).astype(np.uint8)
    value = float(np.median(view[700:712, 600:750])) - 70
    x, y, width, height = burn(view, TEXT, at=(600, 700), size_px=12, value=value).box
    boxes = [box.wider(*MARGIN, view.shape) for box in READER.texts(view[:, :, np.newaxis])]
    assert any(box.x0 <= x and box.x1 >= x + width and box.y0 <= y and box.y1 >= y + height for box in boxes)
    assert sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in boxes) < 0.01 * view.size


def test_monochrome1_is_filled_with_what_looks_black() -> None:
    """A white hole in an inverted image would be taken for metal."""
    plane, where = burned()
    top = plane.max()
    frames, _ = stored_frames(cleaned(image((4095 - plane).astype(np.uint16), photometric="MONOCHROME1")))
    assert (inside(frames, where) == frames.max()).all()
    assert top == 4095


def test_padding_and_bits_above_are_regarded() -> None:
    """Text may hide in bits that no viewer shows, and a hole should say that there is no image."""
    plane, where = burned()
    high = (plane | 0xF000).astype(np.uint16)
    ds = image(high, PixelPaddingValue=7, SmallestImagePixelValue=3)
    out = cleaned(ds)
    words = np.frombuffer(out.PixelData, dtype="<u2").reshape(1, *plane.shape)
    assert (inside(words, where) == 7).all()
    assert (words[0, 150:] == high[150:]).all()
    assert "SmallestImagePixelValue" not in out


def test_colour() -> None:
    """A console writes in yellow over grey."""
    grey = (chest() >> 4).astype(np.uint8)
    colour = np.repeat(grey[np.newaxis, :, :, np.newaxis], 3, axis=3)
    where = burn(colour[0], TEXT, at=(20, 20), size_px=16, value=(250, 240, 20))
    planar = image(colour, photometric="RGB", bits_stored=8)
    planar.PlanarConfiguration, planar.PixelData = 1, np.moveaxis(colour, 3, 1).tobytes()
    for ds in (image(colour, photometric="RGB", bits_stored=8), planar):
        out = cleaned(ds)
        assert out.PlanarConfiguration == ds.PlanarConfiguration
        frames, _ = stored_frames(out)
        assert not inside(frames, where).any()
        assert (frames[0, 150:] == colour[0, 150:]).all()


def test_text_in_one_frame_of_many_goes_from_all() -> None:
    """The last frame of a cine loop is often the one with the name."""
    frames = np.stack([(chest(seed) >> 4).astype(np.uint8) for seed in (1, 1, 2)])
    where = burn(frames[2], TEXT, at=(20, 20), size_px=14, value=255)
    ds = image(frames, bits_stored=8, SOPClassUID=UltrasoundMultiFrameImageStorage, Modality="US")
    after, _ = stored_frames(cleaned(ds))
    assert (inside(after, where) == after.min()).all()


# ---- compressed


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_frames_stay_compressed_without_loss(syntax: UID) -> None:
    """A cleaned archive would be three times as large, or its pixels changed; frames that do not change are copied."""
    first = chest()
    where = burn(first, TEXT, at=(20, 12), size_px=16, value=4095)
    second = chest(2)
    x, y, width, height = where.box
    second[max(y - 12, 0) : y + height + 12, max(x - 12, 0) : x + width + 12] = 0
    second[0, 0] = first.min()
    stack = np.stack([first, second])
    ds = image(stack)
    ds.compress(syntax, encoding_plugin={RLELossless: "pydicom"}.get(syntax, ""), generate_instance_uid=False)
    out = cleaned(ds)
    assert out.file_meta.TransferSyntaxUID == syntax
    frames, _ = stored_frames(out)
    assert (inside(frames, where) == 0).all()
    assert (frames[:, 150:, :, 0] == stack[:, 150:]).all()
    before, after = (list(generate_frames(one.PixelData, number_of_frames=2)) for one in (ds, out))
    assert before[1] == after[1]
    assert before[0] != after[0]


def test_lossy_stays_marked() -> None:
    """Pixels that were lossy once stay so, whatever the syntax they are written in now."""
    ds = pydicom.dcmread(get_testdata_file("examples_ybr_color.dcm"))  # ultrasound, JPEG baseline, 30 frames
    ds.NumberOfFrames = 1
    ds.PixelData = pydicom.encaps.encapsulate([next(generate_frames(ds.PixelData, number_of_frames=30))])
    ds["PixelData"].is_undefined_length = True
    if "LossyImageCompression" in ds:
        del ds.LossyImageCompression
    out = cleaned(ds)
    assert out.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert out.LossyImageCompression == "01"
    frames, photometric = stored_frames(out)
    assert photometric == "YBR_FULL"
    assert (frames[0, :31] == (0, 128, 128)).all()  # above the ultrasound region


# ---- nothing else goes


def test_markers_stay() -> None:
    """A radiograph without its L or R can be read the wrong way round."""
    for text in ("R", "L", "AP ERECT", "PORTABLE", "LAT"):
        plane = np.full((256, 256), 600, dtype=np.uint16)
        burn(plane, text, at=(20, 20), size_px=24, value=4000)
        assert PIXELS.cleaned(image(plane)) is None, text
    assert not is_marker("R HARROWGATE")
    assert not is_marker("")


@pytest.mark.parametrize("site", ["A", "B"])
def test_a_chest_is_no_text(site: str) -> None:
    """A blanked lung is a finding lost."""
    photometric = phantoms.SCANNERS[site].photometric
    bits, kept = phantoms.SCANNERS[site].bits_stored, 0
    for seed in range(6):
        plane = chest(seed, site)
        out = PIXELS.cleaned(image(plane, photometric=photometric, bits_stored=bits))
        changed = 0.0 if out is None else float((stored_frames(out)[0][0, :, :, 0] != plane).mean())
        assert changed < 0.01
        kept += changed == 0
    assert kept >= 5


@pytest.mark.data
def test_real_images_keep_markers_and_pixels(test_data: Path) -> None:
    """Children's radiographs with R and L burned in, and chest CT: at most a stray letter may go."""
    paths = sorted((test_data / "cxr_kermany224/train/NORMAL").glob("*.jpeg"))[::120]
    views = [np.asarray(Image.open(path).convert("L")) for path in paths]
    for path in sorted((test_data / "ct_contrast_tcga").rglob("*.dcm"))[:4]:
        ds = pydicom.dcmread(path)
        frames, photometric = stored_frames(ds)
        views.append(displayed(frames, photometric, ds)[0, :, :, 0])
    for view in views:
        boxes = READER.texts(view[:, :, np.newaxis])
        assert sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in boxes) < 0.02 * view.size


@pytest.mark.data
@pytest.mark.parametrize("name", ["GREYSCALE_IMAGE.dcm", "RGB_IMAGE.dcm"])
def test_real_ultrasound_comes_out_without_names(test_data: Path, name: str, tmp_path: Path) -> None:
    """Consoles' own screens: the patient's name, id, dates and hospital stand above and beside the image."""
    source = next(test_data.rglob(name))
    done = Deidentifier(NAMES, pixels=PIXELS).clean_file(source, tmp_path / "out.dcm", site="A")
    out = pydicom.dcmread(tmp_path / "out.dcm")
    assert done.pixels.endswith("text removed")
    assert out.BurnedInAnnotation == "NO"
    assert "113101" in [code.CodeValue for code in out.DeidentificationMethodCodeSequence]
    frames, photometric = stored_frames(out)
    assert READER.texts(displayed(frames, photometric, out)[0]) == []
    assert (frames[0, :38] == frames[0, 0, 0]).all()
    before, _ = stored_frames(pydicom.dcmread(source))
    middle = (slice(None), slice(260, 640), slice(200, 800))
    assert (frames[middle] == before[middle]).all()


# ---- what is refused, and what is said


def test_refusing_instead_of_cleaning() -> None:
    """Some sites may not change a pixel: then such an image goes nowhere."""
    plane, _ = burned()
    with pytest.raises(DicomError, match="text is burned into the image") as caught:
        Pixels("refuse").cleaned(image(plane))
    assert caught.value.reason == Reason.BURNED_IN_TEXT
    assert TEXT.split(",")[0] not in str(caught.value)


def test_declared_and_not_found_is_refused() -> None:
    """BurnedInAnnotation YES, and nothing found: only a person can say who is wrong."""
    with pytest.raises(DicomError, match="declares text in the pixels, and none was found") as caught:
        PIXELS.cleaned(image(chest(), BurnedInAnnotation="YES"))
    assert caught.value.reason == Reason.BURNED_IN_DECLARED


def test_no_is_said_only_where_something_was_done(tmp_path: Path) -> None:
    """BurnedInAnnotation NO that nobody checked is how names get through elsewhere."""
    cleaner = Deidentifier(NAMES, pixels=PIXELS)
    plane, _ = burned()
    for number, (pixels, said) in enumerate(((plane, "text removed"), (chest(), "looked at, no text found"))):
        source, target = tmp_path / f"{number}.dcm", tmp_path / f"{number}.out.dcm"
        image(pixels).save_as(source, enforce_file_format=True)
        assert cleaner.clean_file(source, target, site="A").pixels == f"projection: {said}"
        out = pydicom.dcmread(target)
        assert out.get("BurnedInAnnotation") == ("NO" if number == 0 else None)
        codes = [code.CodeValue for code in out.DeidentificationMethodCodeSequence]
        assert ("113101" in codes) is (number == 0)


def test_off_looks_at_nothing_and_refuses_what_is_declared() -> None:
    """A site that cleans pixels elsewhere; what says itself that it holds text still goes nowhere."""
    off = Pixels("off")
    plane, _ = burned()
    assert off.decide(image(plane)) == Decision(False, "projection", off.decide(image(plane)).why)
    with pytest.raises(DicomError, match="text is burned"):
        off.decide(image(plane, BurnedInAnnotation="YES"))


def test_the_digest_tells_what_was_asked() -> None:
    """Images cleaned under other rules would not be cleaned again."""
    rules = [{"name": "mine", "action": "pass"}]
    assert len({Pixels(mode, own).digest for mode in ("clean", "refuse", "off") for own in ((), rules)}) == 6

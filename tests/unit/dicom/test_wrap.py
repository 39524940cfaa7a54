from __future__ import annotations

import csv
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from radloop.catalog.schema import KeyKind, LabelRow, Reason
from radloop.catalog.store import Catalog
from radloop.dicom.identity import Crosswalk
from radloop.dicom.landing import Landing
from radloop.dicom.uids import Pseudonymiser
from radloop.dicom.wrap import Columns, WrapReport, to_bytes, wrap_folder, wrap_image
from radloop.errors import DataError, DicomError

KEY = bytes(range(32))
GREY = np.random.default_rng(1).integers(0, 256, (9, 7), dtype=np.uint8)


@pytest.fixture
def landing(home: Path) -> Landing:
    catalog = Catalog(f"sqlite:///{home}/catalog.db")
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", KEY, catalog.ledger)
    return Landing(home, catalog, Pseudonymiser(KEY), crosswalk)


def encode(pixels: np.ndarray[Any, Any], form: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    buffer = BytesIO()
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


def wrap(data: bytes, **keys: Any) -> Dataset:
    given = {"patient_id": "P-1", "modality": "CR", "relative_path": "a/b.png"} | keys
    return wrap_image(data, **given)


def reason_of(data: bytes) -> str:
    with pytest.raises(DicomError) as caught:
        wrap(data)
    return caught.value.reason


def test_a_png_becomes_a_secondary_capture_with_its_own_pixels() -> None:
    """If this failed, a picture would be altered on its way into DICOM."""
    ds = pydicom.dcmread(BytesIO(to_bytes(wrap(encode(GREY), sex="F", age="034Y", view="PA"))))
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert np.array_equal(ds.pixel_array, GREY)
    assert (ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation) == (9, 7, 1, "MONOCHROME2")
    assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (8, 8, 7, 0)
    assert (ds.ConversionType, ds.Modality, ds.PatientID) == ("WSD", "CR", "P-1")
    assert (ds.PatientSex, ds.PatientAge, ds.ViewPosition) == ("F", "034Y", "PA")
    assert "radloop" in ds.SeriesDescription
    assert ds.SecondaryCaptureDeviceManufacturer == "radloop"


def test_nothing_is_invented() -> None:
    """If this failed, a spacing or a date that nobody measured would be believed."""
    ds = wrap(encode(GREY))
    for keyword in (
        *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "BurnedInAnnotation", "Manufacturer"),
        *("ContentDate", "DateOfSecondaryCapture", "WindowCenter", "PatientAge", "ViewPosition", "BodyPartExamined"),
        *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    ):
        assert keyword not in ds, keyword
    for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"):
        assert ds[keyword].is_empty, keyword


def test_a_jpeg_says_that_it_was_lossy() -> None:
    """If this failed, an image degraded by compression would pass as an original."""
    data = encode(GREY, "JPEG", quality=60)
    ds = wrap(data)
    assert (ds.LossyImageCompression, ds.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
    assert float(ds.LossyImageCompressionRatio) == pytest.approx(63 / len(data), abs=0.01)
    assert ds.ImageType[0] == "DERIVED"
    assert np.array_equal(ds.pixel_array, np.asarray(Image.open(BytesIO(data))))


def test_equal_channels_become_one_and_colour_is_refused() -> None:
    """If this failed, a colour picture would be read as a radiograph, or all public JPEGs be refused."""
    rgb = np.repeat(GREY[..., None], 3, axis=2)
    ds = wrap(encode(rgb))
    assert np.array_equal(ds.pixel_array, GREY)
    assert "equal channels reduced to one" in ds.DerivationDescription
    grey_jpeg = encode(rgb, "JPEG")
    channels = np.asarray(Image.open(BytesIO(grey_jpeg)))
    assert np.array_equal(wrap(grey_jpeg).pixel_array, channels[..., 0])
    assert float(wrap(grey_jpeg).LossyImageCompressionRatio) == pytest.approx(3 * 63 / len(grey_jpeg), abs=0.01)
    rgb = rgb.copy()
    rgb[3, 3, 2] ^= 1
    assert reason_of(encode(rgb)) == Reason.MULTI_CHANNEL
    assert reason_of(encode(GREY, "JPEG", mode="CMYK")) == Reason.MULTI_CHANNEL


def test_transparency_is_dropped_only_where_there_is_none() -> None:
    """If this failed, what an editor had hidden would come to light, or what it showed be lost."""
    opaque = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])
    assert np.array_equal(wrap(encode(opaque)).pixel_array, GREY)
    opaque[0, 0, 3] = 254
    assert reason_of(encode(opaque)) == Reason.MULTI_CHANNEL


def test_a_grey_palette_is_grey() -> None:
    """If this failed, a PNG that was made smaller without loss would be refused, or its indices taken for grey."""
    picture = Image.fromarray(GREY).convert("P")
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    assert np.array_equal(wrap(buffer.getvalue()).pixel_array, GREY)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: encode(GREY.astype(np.uint16) * 257), Reason.UNSUPPORTED_IMAGE),
        (lambda: encode(GREY, mode="1"), Reason.UNSUPPORTED_IMAGE),
        (lambda: encode(GREY, "GIF"), Reason.UNSUPPORTED_IMAGE),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100) + encode(GREY)[-12:], Reason.UNSUPPORTED_IMAGE),
        (lambda: b"", Reason.UNSUPPORTED_IMAGE),
        (lambda: encode(np.zeros((64, 64), np.uint8), "JPEG")[:-90], Reason.TRUNCATED),
        (lambda: encode(GREY)[:-40], Reason.TRUNCATED),
        (lambda: encode(GREY)[:-4], Reason.TRUNCATED),
        (lambda: encode(GREY, save_all=True, append_images=[Image.fromarray(GREY[::-1])]), Reason.UNSUPPORTED_IMAGE),
    ],
    ids=["16 bit", "1 bit", "GIF", "no PNG", "empty", "cut JPEG", "cut PNG", "PNG without its end", "animated"],
)
def test_what_cannot_be_wrapped_without_guessing_is_refused(make: Any, reason: Reason) -> None:
    """If this failed, 16-bit pixels would be cut to 8 in silence, or half a picture be taken for a whole."""
    assert reason_of(make()) == reason


def test_16_bit_colour_is_seen_although_the_decoder_hides_it() -> None:
    """If this failed, the low byte of every sample would be lost without a word: the decoder reads such files as 8 bit."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    header = struct.pack(">LLBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(range(12)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert Image.open(BytesIO(data)).mode == "RGB"
    assert reason_of(data) == Reason.UNSUPPORTED_IMAGE


def test_exif_is_dropped_and_its_orientation_obeyed() -> None:
    """If this failed, a camera's serial number or a name would ride along, or the picture lie on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    exif[0x010E] = "CANARY"
    data = encode(GREY, "JPEG", exif=exif, quality=95)
    assert b"CANARY" in data
    ds = wrap(data)
    assert (ds.Rows, ds.Columns) == (7, 9)
    assert np.array_equal(ds.pixel_array, np.rot90(np.asarray(Image.open(BytesIO(data))), k=-1))
    assert "EXIF orientation" in ds.DerivationDescription
    assert b"CANARY" not in to_bytes(ds)


def test_the_same_image_is_the_same_bytes_and_keys_make_the_uids() -> None:
    """If this failed, importing a folder twice would double it, or two patients would share an instance."""
    data = encode(GREY)
    one = wrap(data)
    assert to_bytes(one) == to_bytes(wrap(data))
    elsewhere, other_content = wrap(data, relative_path="a/c.png"), wrap(encode(GREY[::-1]))
    assert len({one.SOPInstanceUID, elsewhere.SOPInstanceUID, other_content.SOPInstanceUID}) == 3
    moved = wrap(data, patient_id="P-2")
    assert moved.SOPInstanceUID == one.SOPInstanceUID  # a corrected patient is a revision of the same instance
    first, second = (wrap(data, study="S", relative_path=path) for path in "xy")
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.StudyInstanceUID != wrap(data, study="S", patient_id="P-2").StudyInstanceUID
    assert one.StudyInstanceUID != elsewhere.StudyInstanceUID
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        assert one[keyword].value.is_valid
        assert one[keyword].value.startswith("2.25.")


def test_a_wrapped_image_is_a_valid_secondary_capture(tmp_path: Path, require_service: Any) -> None:
    """If this failed, other software would refuse what radloop wrote."""
    import subprocess

    dciodvfy = require_service("dciodvfy", "dciodvfy")
    path = tmp_path / "a.dcm"
    path.write_bytes(to_bytes(wrap(encode(GREY, "JPEG"), sex="F", age="034Y")))
    done = subprocess.run([dciodvfy, str(path)], capture_output=True, text=True, check=False)
    assert "Error" not in done.stderr + done.stdout, done.stderr


# A folder with a manifest


def make_folder(
    where: Path, rows: list[dict[str, str]], *, images: dict[str, bytes] | None = None
) -> tuple[Path, Path]:
    folder, manifest = where / "images", where / "manifest.csv"
    for number, row in enumerate(rows):
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((images or {}).get(row["file"], encode(np.roll(GREY, number))))
    with manifest.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder, manifest


ROWS = [
    {"file": "n/1.png", "patient": "P1", "sex": "female", "age": "4", "view": "ap"},
    {"file": "n/2.png", "patient": "P1", "sex": "F", "age": "004Y", "view": "AP"},
    {"file": "p/1.png", "patient": "P2", "sex": "", "age": "", "view": ""},
]
COLUMNS = Columns(sex="sex", age="age", view="view")


def run(landing: Landing, folder: Path, manifest: Path, **more: Any) -> WrapReport:
    return wrap_folder(landing, folder, manifest, **({"modality": "CR", "site": "K", "columns": COLUMNS} | more))


def test_a_folder_is_imported_once_and_labels_find_it_by_path(landing: Landing, tmp_path: Path) -> None:
    """If this failed, public data sets could not be used, or each import would double them."""
    folder, manifest = make_folder(tmp_path, ROWS)
    (folder / "extra.png").write_bytes(encode(GREY))
    (folder / "readme.txt").write_text("no image")
    seen: list[tuple[int, int]] = []
    report = run(landing, folder, manifest, progress=lambda done, total: seen.append((done, total)))
    assert report == WrapReport(rows=3, outcomes={"new": 3}, reasons={}, files_without_row=1)
    assert seen == [(3, 3)]
    assert run(landing, folder, manifest).outcomes == {"same": 3}
    catalog, pseudonym = landing._catalog, Pseudonymiser(KEY)
    rows = catalog.pending()
    assert {row.site for row in rows} == {"K"}
    assert {row.patient for row in rows} == {pseudonym.patient("P1", "K"), pseudonym.patient("P2", "K")}
    label = LabelRow(key_kind=KeyKind.FILE, key=pseudonym.file("p/1.png"), value="1")
    assert catalog.import_labels("t", [label], source="m", actor="x").unmatched == 0
    assert len(catalog.resolve_labels("t").values) == 1
    ages = {pydicom.dcmread(landing.landed(row.source_sha256)).get("PatientAge") for row in rows}
    assert ages == {"004Y", None}


def test_a_corrected_patient_in_the_manifest_moves_the_image(landing: Landing, tmp_path: Path) -> None:
    """If this failed, a corrected key would leave the image with both patients, one perhaps in the test set."""
    run(landing, *make_folder(tmp_path, ROWS))
    corrected = [*ROWS[:2], ROWS[2] | {"patient": "P1"}]
    assert run(landing, *make_folder(tmp_path, corrected)).outcomes == {"revision": 1, "same": 2}
    assert {row.patient for row in landing._catalog.pending()} == {Pseudonymiser(KEY).patient("P1", "K")}


def test_what_is_refused_is_kept_and_the_rest_goes_on(landing: Landing, tmp_path: Path) -> None:
    """If this failed, one bad picture would stop five thousand, or vanish."""
    rows = [*ROWS, {**ROWS[0], "file": "c.png"}, {**ROWS[0], "file": "x.png", "patient": ""}]
    colour = encode(np.random.default_rng(2).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    folder, manifest = make_folder(tmp_path, rows, images={"c.png": colour})
    report = run(landing, folder, manifest)
    assert report.outcomes == {"new": 3, "quarantined": 2}
    assert report.reasons == {"MULTI_CHANNEL": 1, "NO_PATIENT_ID": 1}
    held = {row.reason: row for row in landing._catalog.quarantined()}
    row = held[Reason.MULTI_CHANNEL]
    assert landing.quarantined(row.source_sha256).read_bytes() == colour
    assert (row.stage, row.site) == ("import-images", "K")
    with pytest.raises(DataError, match="holds no DICOM"):
        landing.retry(row.id, by="ada")
    landing.purge(row.id, by="ada")
    assert run(landing, folder, manifest).outcomes == {"quarantined": 2, "same": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.append({**ROWS[0], "file": "missing.png"}), "1 row whose file is not in the folder.*line 5"),
        (lambda rows: rows.append({**ROWS[0], "patient": "P9"}), "1 row that contradict an earlier row.*line 5"),
        (lambda rows: rows[1].update(sex="X"), "sex is none of M, F, O.*line 3"),
        (lambda rows: rows[1].update(age="old"), "age is no age.*line 3"),
        (lambda rows: rows[1].update(view="a\\b"), "view is no DICOM CS.*line 3"),
        (lambda rows: rows[1].update(patient="P" * 65), "patient is no DICOM LO.*line 3"),
        (lambda rows: rows[1].update(file="../n/2.png"), "file is no path within the folder.*line 3"),
        (lambda rows: rows.clear(), "manifest is empty"),
    ],
)
def test_a_wrong_manifest_imports_nothing(landing: Landing, tmp_path: Path, change: Any, message: str) -> None:
    """If this failed, half a data set would be imported under wrong keys before anybody noticed."""
    folder, manifest = make_folder(tmp_path, ROWS)
    rows = [dict(row) for row in ROWS]
    change(rows)
    with manifest.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(DataError, match=f"(?s){message}"):
        run(landing, folder, manifest)
    assert landing._catalog.pending() == []


def test_a_missing_column_is_named_with_those_that_are_there(landing: Landing, tmp_path: Path) -> None:
    """If this failed, a mistyped column would make one patient of all images."""
    folder, manifest = make_folder(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"(?s)no column 'patient_key'.*got: columns file, patient, sex"):
        run(landing, folder, manifest, columns=Columns(patient="patient_key"))
    with pytest.raises(DataError, match="no DICOM modality"):
        run(landing, folder, manifest, modality="x-ray!")


@pytest.mark.data
def test_real_public_data_are_imported(landing: Landing, test_data: Path) -> None:
    """If this failed, public data with a manifest of their own could not be trained on."""
    nih = test_data / "cxr_nih1000_64"
    manifest = next(iter(sorted(nih.glob("*.csv"))))
    with manifest.open(newline="") as handle:
        header = csv.DictReader(handle).fieldnames or []
    patient = next(name for name in header if "patient" in name.lower())
    report = run(landing, nih, manifest, columns=Columns(patient=patient), modality="DX")
    assert report.outcomes == {"new": report.rows}
    assert report.rows >= 1000

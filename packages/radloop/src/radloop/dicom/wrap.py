"""JPEG and PNG as Secondary Capture Image Storage, with nothing in it that the picture does not say.

DX or CR objects would need attributes that would have to be invented (exposure, detector, spacing). A Secondary Capture
(PS3.3 section A.8.1) needs none of them: `ConversionType` WSD, the modality as declared, one 8-bit MONOCHROME2 sample.
UIDs follow from path and content, so the same import again is the same instance, and a corrected patient key in the
manifest is a new revision of it.
"""

from __future__ import annotations

import csv
import hashlib
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from radloop.catalog.reason import Reason
from radloop.dicom.folder import list_files
from radloop.dicom.landing import Arrival, Landing
from radloop.errors import DataError, DicomError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

STAGE = "import-images"
SUFFIXES = (".jpg", ".jpeg", ".png")
BATCH = 256
_LISTED = 10
_ORIENTATION = 0x0112  # EXIF
_END = {True: b"\xff\xd9", False: b"IEND\xae\x42\x60\x82"}  # how a JPEG and a PNG end
# A constant: pydicom would write its own version, and every upgrade would make new revisions of all images.
_IMPLEMENTATION_UID = UID("2.25.287938497135470924693418327652083213881")
_SEX = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O", "": ""}
_AGE = re.compile(r"(\d{1,3})(?:\.\d+)?\s*([DWMY]?)", re.IGNORECASE)
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Which column of the manifest says what; `file` is the path relative to the folder."""

    file: str = "file"
    patient: str = "patient"
    study: str | None = None
    sex: str | None = None
    age: str | None = None
    view: str | None = None


class ImageKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest says of one image; identifying. `age`: a number of years, or DICOM's AS (`034Y`, `003M`)."""

    relative_path: str
    patient_id: str
    study: str | None = None
    sex: str = ""
    age: str = ""
    view: str = ""

    def __repr__(self) -> str:
        return "ImageKeys()"  # an image in a log must not say whose it is


class WrapReport(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one import: rows of the manifest, outcomes (`new`, `same`, ...), reasons, and images without a row."""

    rows: int
    outcomes: dict[str, int]
    reasons: dict[str, int]
    files_without_row: int


def wrap_image(
    data: bytes | Path,
    *,
    patient_id: str,
    modality: str,
    relative_path: str,
    study: str | None = None,
    sex: str = "",
    age: str = "",
    view: str = "",
) -> Dataset:
    """Wrap one JPEG or PNG.

    Args:
        data: the image file's bytes, or its path.
        patient_id: as the manifest keys the patient.
        modality: as declared by the user: CR, DX, US, ...
        relative_path: the image's path in its folder; with the content it makes the SOPInstanceUID.
        study: key of the study within the patient; without one each image is a study of its own.
        sex: M, F, O, or empty.
        age: DICOM's AS (`034Y`) or empty.
        view: ViewPosition (a standard extension of the SOP class), or empty.

    Returns:
        A dataset (rows, columns), 8 bits, MONOCHROME2, Explicit VR Little Endian, with its file meta information.

    Raises:
        DicomError: MULTI_CHANNEL (colour, or transparency), UNSUPPORTED_IMAGE (not JPEG or PNG, 1 or 16 bits a sample,
            animated), TRUNCATED.
    """
    content = data if isinstance(data, bytes) else Path(data).read_bytes()
    pixels, channels, steps = _read(content)
    digest = hashlib.sha256(content).hexdigest()
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = _uid("instance", relative_path, digest)
    dataset.StudyInstanceUID = (
        _uid("study", "key", patient_id, study) if study else _uid("study", "file", relative_path, digest)
    )
    dataset.SeriesInstanceUID = _uid("series", dataset.StudyInstanceUID)
    dataset.Modality = modality
    dataset.ConversionType = "WSD"
    dataset.PatientID = patient_id
    dataset.PatientSex = sex
    if age:
        dataset.PatientAge = age
    if view:
        dataset.ViewPosition = view
    # Type 2: must be there, may be empty.
    for keyword in (
        *("PatientName", "PatientBirthDate", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID"),
        *("AccessionNumber", "SeriesNumber", "Laterality", "InstanceNumber", "PatientOrientation"),
    ):
        setattr(dataset, keyword, None)
    dataset.SecondaryCaptureDeviceManufacturer = "radloop"
    dataset.SeriesDescription = "Imported by radloop"
    dataset.DerivationDescription = "; ".join(steps)
    if _is_jpeg(content):
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionMethod = "ISO_10918_1"
        dataset.LossyImageCompressionRatio = f"{pixels.size * channels / len(content):.2f}"
    _set_pixels(dataset, pixels)
    return dataset


def to_bytes(dataset: Dataset) -> bytes:
    """The wrapped image as the bytes of a DICOM file; the same for the same image, whatever wrote it."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def wrap_folder(
    landing: Landing,
    folder: Path,
    manifest: Path,
    *,
    modality: str,
    site: str,
    columns: Columns | None = None,
    sender: str = STAGE,
    progress: Callable[[int, int], None] | None = None,
) -> WrapReport:
    """Wrap and receive every image that the manifest names; again, what was received is `same`.

    The path in the manifest is the file's key for labels. An image that cannot be wrapped is kept in quarantine with
    its reason. Images without a row are counted and left.

    Raises:
        DataError: a column is missing, a row has no file, a value is not what its column is for, or one file has two
            rows that differ. Nothing is imported then. Rows are named by number, since a path may say who it is.
        StorageFull: no space left; what was received before stays.
    """
    if not _CODE.fullmatch(modality):
        raise DataError("no DICOM modality", expected="a code such as CR, DX or US", got=repr(modality))
    folder = Path(folder)
    rows = read_manifest(Path(manifest), columns or Columns())
    present = set(list_files(folder))
    missing = [number for number, keys in rows if keys.relative_path not in present]
    if missing:
        raise _rows_error("whose file is not in the folder", missing, "correct the manifest, or add the files")
    without_row = {path for path in present if path.lower().endswith(SUFFIXES)} - {k.relative_path for _, k in rows}
    images = list({keys.relative_path: keys for _, keys in rows}.values())
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        for kind, reason in _receive(landing, folder, batch, modality=modality, site=site, sender=sender):
            outcomes[str(kind)] += 1
            if reason is not None:
                reasons[str(reason)] += 1
        if progress is not None:
            progress(start + len(batch), len(images))
    landing.complete(sender)
    landing.seal(actor=sender)
    return WrapReport(
        rows=len(rows),
        outcomes=dict(sorted(outcomes.items())),
        reasons=dict(sorted(reasons.items())),
        files_without_row=len(without_row),
    )


def _receive(
    landing: Landing, folder: Path, batch: Sequence[ImageKeys], *, modality: str, site: str, sender: str
) -> Iterator[tuple[str, str | None]]:
    arrivals, refused = [], []
    for keys in batch:
        content = (folder / keys.relative_path).read_bytes()
        try:
            dataset = wrap_image(content, modality=modality, **msgspec.structs.asdict(keys))
        except DicomError as error:
            arrival = Arrival(data=content, site=site, sender=sender, relative_path=keys.relative_path)
            refused.append((arrival, Reason(error.reason), error.what))
            continue
        path = keys.relative_path
        arrivals.append(Arrival(data=to_bytes(dataset), site=site, sender=sender, relative_path=path))
    if refused:
        landing.keep_refused(refused, stage=STAGE)
        for _, reason, _ in refused:
            yield "quarantined", reason
    for outcome in landing.receive_many(arrivals):
        yield outcome.kind, outcome.reason


# The manifest


def read_manifest(path: Path, columns: Columns) -> list[tuple[int, ImageKeys]]:
    """Rows of a CSV file with their line numbers, the header being line 1.

    Raises:
        DataError: as `wrap_folder`.
    """
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        header = reader.fieldnames or []
        wanted = [name for name in msgspec.structs.astuple(columns) if name is not None]
        absent = [name for name in wanted if name not in header]
        if absent:
            raise DataError(
                f"the manifest has no column {', '.join(map(repr, absent))}",
                expected=f"columns {', '.join(wanted)}",
                got=f"columns {', '.join(header)}",
                next_step="name the manifest's own columns in the command or in radloop.toml",
            )
        rows = [(number, _keys(row, columns, number)) for number, row in enumerate(reader, 2)]
    if not rows:
        raise DataError("the manifest is empty", expected="one row an image", got="no row")
    first: dict[str, ImageKeys] = {}
    differing = [number for number, keys in rows if first.setdefault(keys.relative_path, keys) != keys]
    if differing:
        raise _rows_error("that contradict an earlier row for the same file", differing, "keep one row a file")
    return rows


def _keys(row: Mapping[str, str | None], columns: Columns, number: int) -> ImageKeys:
    def value(column: str | None) -> str:
        return (row.get(column) or "").strip() if column is not None else ""

    path = value(columns.file).replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.startswith("/") or ".." in parts:
        raise _rows_error("whose file is no path within the folder", [number], "give paths relative to the folder")
    patient, view = value(columns.patient), value(columns.view).upper()
    if len(patient) > 64 or "\\" in patient or not patient.isprintable():
        raise _rows_error("whose patient is no DICOM LO", [number], "use at most 64 characters, no backslash")
    if view and not _CODE.fullmatch(view):
        raise _rows_error("whose view is no DICOM CS", [number], "use codes such as PA, AP or LL")
    sex = _SEX.get(value(columns.sex).lower())
    if sex is None:
        raise _rows_error("whose sex is none of M, F, O or empty", [number], "correct the row")
    return ImageKeys(
        relative_path="/".join(parts),
        patient_id=patient,
        study=value(columns.study) or None,
        sex=sex,
        age=_age(value(columns.age), number),
        view=view,
    )


def _age(text: str, number: int) -> str:
    """Years, or DICOM's AS, as AS."""
    if not text:
        return ""
    match = _AGE.fullmatch(text)
    if match is None:
        raise _rows_error("whose age is no age", [number], "give years, or DICOM's form such as 034Y or 003M")
    return f"{int(match[1]):03d}{(match[2] or 'Y').upper()}"


def _rows_error(what: str, numbers: Sequence[int], next_step: str) -> DataError:
    listed = ", ".join(map(str, numbers[:_LISTED])) + (" ..." if len(numbers) > _LISTED else "")
    count = len(numbers)
    return DataError(
        f"the manifest has {count} {'row' if count == 1 else 'rows'} {what}", got=f"line {listed}", next_step=next_step
    )


# The picture


def _read(content: bytes) -> tuple[NDArray[np.uint8], int, list[str]]:
    """Pixels (rows, columns), how many samples a pixel has in the file, and what was done."""
    from PIL import Image, ImageOps

    jpeg = _is_jpeg(content)
    if not jpeg and not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise _unsupported("neither JPEG nor PNG")
    if not jpeg and content[24:25] == b"\x10":  # IHDR's bit depth; Pillow would cut colour to 8 bits in silence
        raise _unsupported("16 bits a sample", "export it as DICOM, or as 8-bit PNG with a window of your own choice")
    if _END[jpeg] not in content:  # a PNG without its end is decoded in silence
        raise DicomError("the image file ends early", reason=Reason.TRUNCATED)
    steps = ["decoded from JPEG" if jpeg else "decoded from PNG"]
    try:
        with Image.open(BytesIO(content), formats=["JPEG", "PNG"]) as image:
            if getattr(image, "n_frames", 1) != 1:
                raise _unsupported("more than one frame")
            image.load()
            channels = len(image.getbands())
            if image.getexif().get(_ORIENTATION, 1) != 1:
                steps.append("turned as its EXIF orientation says")
            pixels = _one_channel(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:  # UnidentifiedImageError is an OSError
        if "truncated" in str(error).lower():
            raise DicomError("the image file ends early", reason=Reason.TRUNCATED) from None
        raise _unsupported("cannot be decoded") from None
    if channels > 1:
        steps.append("equal channels reduced to one")
    return pixels, channels, steps


def _one_channel(image: Image) -> NDArray[np.uint8]:
    """Grey as it is; colour only if it is grey in all three channels; transparency only if there is none."""
    import numpy as np

    if image.mode == "L":
        return np.asarray(image, dtype=np.uint8)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB" if image.mode == "P" else "RGBA")
    if image.mode not in ("RGB", "RGBA", "LA"):
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            raise DicomError("colour", reason=Reason.MULTI_CHANNEL)
        raise _unsupported("not 8 bits a sample", "export it as DICOM or as 8-bit PNG")
    planes = np.asarray(image, dtype=np.uint8)
    if image.mode in ("LA", "RGBA"):
        if (planes[..., -1] != 255).any():
            raise DicomError("transparency", reason=Reason.MULTI_CHANNEL)
        planes = planes[..., :-1]
    if (planes != planes[..., :1]).any():
        raise DicomError("colour: the channels differ", reason=Reason.MULTI_CHANNEL)
    return np.ascontiguousarray(planes[..., 0])


def _unsupported(what: str, next_step: str | None = None) -> DicomError:
    return DicomError(what, reason=Reason.UNSUPPORTED_IMAGE, next_step=next_step)


def _is_jpeg(content: bytes) -> bool:
    return content.startswith(b"\xff\xd8\xff")


def _set_pixels(dataset: Dataset, pixels: NDArray[np.uint8]) -> None:
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelRepresentation = 0
    raw = pixels.tobytes()
    dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    dataset["PixelData"].VR = "OB"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _IMPLEMENTATION_UID
    meta.ImplementationVersionName = "RADLOOP"
    dataset.file_meta = meta


def _uid(*fields: str) -> str:
    """A UUID of version 8 (RFC 9562) from a digest, as a UID (PS3.5 section B.2)."""
    message = b"".join(len(raw).to_bytes(4, "big") + raw for raw in (field.encode() for field in fields))
    bits = bytearray(hashlib.sha256(b"radloop import-images 1" + message).digest()[:16])
    bits[6] = bits[6] & 0x0F | 0x80
    bits[8] = bits[8] & 0x3F | 0x80
    return f"2.25.{uuid.UUID(bytes=bytes(bits)).int}"

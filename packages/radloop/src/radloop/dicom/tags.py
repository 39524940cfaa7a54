"""The tags radloop uses: what a catalog row and a dataset version say of an instance."""

from __future__ import annotations

import math
import re
from typing import Any

from pydicom import config
from pydicom.dataset import Dataset

# pydicom's validation quotes values in its warnings and log records, and values here are PHI. Every module of this
# room that reads values imports this one.
config.settings.reading_validation_mode = config.IGNORE

_AGE = re.compile(r"(\d{1,3})([YMWD])")
_DAYS = {"Y": 365.25, "M": 365.25 / 12, "W": 7.0, "D": 1.0}


def describe(ds: Dataset) -> dict[str, Any]:
    """The tags of an instance that quality, datasets, subgroups and drift use; None where absent or unreadable.

    Run it on the de-identified instance: it copies values.

    Returns:
        `modality`, `manufacturer`, `model_name`, `view_position`, `body_part`, `laterality`, `sex` (M, F, O),
        `age_years` (float; 90.0 stands for 90 and over), `rows`, `columns`, `frames`, `samples_per_pixel`,
        `bits_allocated`, `bits_stored`, `photometric`, `transfer_syntax_uid`, `lossy` (bool), `lossy_ratio`,
        `pixel_spacing_mm` (between rows: the first value of PixelSpacing, else of ImagerPixelSpacing, which is
        measured at the detector), `conversion_type`, `study_date` (YYYYMMDD, shifted in the research profile).
    """
    meta = getattr(ds, "file_meta", None)
    return {
        "modality": _text(ds, "Modality"),
        "manufacturer": _text(ds, "Manufacturer"),
        "model_name": _text(ds, "ManufacturerModelName"),
        "view_position": _text(ds, "ViewPosition"),
        "body_part": _text(ds, "BodyPartExamined"),
        "laterality": _text(ds, "ImageLaterality") or _text(ds, "Laterality"),
        "sex": _text(ds, "PatientSex"),
        "age_years": age_years(_text(ds, "PatientAge")),
        "rows": _integer(ds, "Rows"),
        "columns": _integer(ds, "Columns"),
        "bits_allocated": _integer(ds, "BitsAllocated"),
        "bits_stored": _integer(ds, "BitsStored"),
        "photometric": _text(ds, "PhotometricInterpretation"),
        "frames": _integer(ds, "NumberOfFrames") or 1,
        "samples_per_pixel": _integer(ds, "SamplesPerPixel"),
        "transfer_syntax_uid": None if meta is None else _text(meta, "TransferSyntaxUID"),
        "lossy": _text(ds, "LossyImageCompression") == "01",
        "lossy_ratio": _number(ds, "LossyImageCompressionRatio"),
        "pixel_spacing_mm": _number(ds, "PixelSpacing") or _number(ds, "ImagerPixelSpacing"),
        "conversion_type": _text(ds, "ConversionType"),
        "study_date": _text(ds, "StudyDate"),
    }


def age_years(age: str | None) -> float | None:
    """Years of a DICOM age string such as `057Y`, `008M`, `003W`, `012D` (PS3.5, VR AS); None if it is none."""
    match = _AGE.fullmatch(age.strip()) if age else None
    return None if match is None else int(match[1]) * _DAYS[match[2]] / 365.25


def _first(ds: Dataset, keyword: str) -> Any:
    try:
        value = ds.get(keyword)
    except Exception:  # noqa: BLE001 - pydicom raises many kinds on bytes that are not what the VR says
        return None
    if value is not None and not isinstance(value, str) and hasattr(value, "__getitem__"):
        return value[0] if len(value) else None
    return value


def _text(ds: Dataset, keyword: str) -> str | None:
    value = _first(ds, keyword)
    return (str(value).strip() or None) if value is not None else None


def _integer(ds: Dataset, keyword: str) -> int | None:
    number = _number(ds, keyword)
    return None if number is None else int(number)


def _number(ds: Dataset, keyword: str) -> float | None:
    try:
        number = float(_first(ds, keyword))
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None

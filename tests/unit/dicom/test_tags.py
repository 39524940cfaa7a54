from __future__ import annotations

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from radloop.dicom.tags import age_years, describe


def test_describe_reads_what_the_header_says() -> None:
    """Quality, subgroups and drift are computed from these columns: a wrong unit misleads all of them."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.PatientAge, ds.PixelSpacing = "018M", [0.5, 0.75]
    found = describe(ds)
    assert found == {
        "modality": "CT",
        "manufacturer": "GE MEDICAL SYSTEMS",
        "model_name": "RHAPSODE",
        "view_position": None,
        "body_part": None,
        "laterality": None,
        "sex": "O",
        "age_years": 1.5,
        "rows": 128,
        "columns": 128,
        "bits_allocated": 16,
        "bits_stored": 16,
        "photometric": "MONOCHROME2",
        "frames": 1,
        "samples_per_pixel": 1,
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "lossy": False,
        "lossy_ratio": None,
        "pixel_spacing_mm": 0.5,
        "conversion_type": None,
        "study_date": "20040119",
    }


def test_describe_survives_an_empty_and_a_broken_header() -> None:
    """One odd instance must be refused for its oddity, not stop the batch."""
    ds = Dataset()
    assert set(describe(ds).values()) == {None, 1, False}
    ds.PatientAge = "young"
    ds.add_new("LossyImageCompressionRatio", "LO", "about ten")
    ds.add_new("ImagerPixelSpacing", "LO", ["nan", "nan"])
    found = describe(ds)
    assert (found["age_years"], found["lossy_ratio"], found["pixel_spacing_mm"]) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "years"), [("057Y", 57.0), ("006M", 0.5), ("090Y", 90.0), ("007D", 7 / 365.25), ("", None), ("57", None)]
)
def test_age_in_years(text: str, years: float | None) -> None:
    """A newborn's age in days taken for years puts it in the wrong age band."""
    assert age_years(text) == (pytest.approx(years) if years is not None else None)

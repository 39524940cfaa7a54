"""Why something is in quarantine. Apart from the tables, so that a predictor needs no database to name a reason."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why an instance or a file was refused. Each is kept in quarantine, never dropped."""

    NOT_DICOM = "NOT_DICOM"
    TRUNCATED = "TRUNCATED"
    UNKNOWN_TRANSFER_SYNTAX = "UNKNOWN_TRANSFER_SYNTAX"
    NO_PATIENT_ID = "NO_PATIENT_ID"
    MISSING_UID = "MISSING_UID"
    UID_CONFLICT = "UID_CONFLICT"
    """The SOPInstanceUID is known, with other decoded pixels."""
    NO_PIXELS = "NO_PIXELS"
    PIXELS_UNDECODABLE = "PIXELS_UNDECODABLE"
    UNEXPECTED_SOP_CLASS = "UNEXPECTED_SOP_CLASS"
    UNEXPECTED_MODALITY = "UNEXPECTED_MODALITY"
    BAD_GEOMETRY = "BAD_GEOMETRY"
    BAD_WINDOW = "BAD_WINDOW"
    DUPLICATE_PIXELS = "DUPLICATE_PIXELS"
    DUPLICATE_PIXELS_ACROSS_PATIENTS = "DUPLICATE_PIXELS_ACROSS_PATIENTS"
    EMPTY_IMAGE = "EMPTY_IMAGE"
    SATURATED_IMAGE = "SATURATED_IMAGE"
    PHI_FOUND = "PHI_FOUND"
    BURNED_IN_DECLARED = "BURNED_IN_DECLARED"
    BURNED_IN_TEXT = "BURNED_IN_TEXT"
    """Text was found in the pixels, and is not to be or cannot be removed."""
    UNSUPPORTED_OBJECT = "UNSUPPORTED_OBJECT"
    RECOGNIZABLE_FACE = "RECOGNIZABLE_FACE"
    """The option clean-visual-features is asked for, and the images may show a face."""
    WITHDRAWN = "WITHDRAWN"
    """A rejection note names it (IHE IOCM)."""
    MULTI_CHANNEL = "MULTI_CHANNEL"
    MULTI_FRAME = "MULTI_FRAME"
    UNSUPPORTED_IMAGE = "UNSUPPORTED_IMAGE"
    """A JPEG or PNG that cannot be wrapped without inventing something (16-bit samples, several frames)."""
    SCHEMA_ANOMALY = "SCHEMA_ANOMALY"
    """The validation stage's schema does not hold for this instance's tags."""


RELEASABLE = frozenset(
    {
        Reason.UID_CONFLICT,
        Reason.UNEXPECTED_SOP_CLASS,
        Reason.UNEXPECTED_MODALITY,
        Reason.BAD_GEOMETRY,
        Reason.BAD_WINDOW,
        Reason.DUPLICATE_PIXELS,
        Reason.DUPLICATE_PIXELS_ACROSS_PATIENTS,
        Reason.EMPTY_IMAGE,
        Reason.SATURATED_IMAGE,
        Reason.SCHEMA_ANOMALY,
        Reason.WITHDRAWN,
    }
)
"""What a person may overrule. All else cannot be used as it is (no pixels, no patient) or may not be (PHI)."""

"""Why frames are no volume."""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    """Why a series, or a part of one, was refused as a volume."""

    UNREADABLE = "UNREADABLE"
    """A file is no DICOM or has no pixels that can be decoded."""
    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    """Segmentation, slide, dose, report: no image volume."""
    NO_GEOMETRY = "NO_GEOMETRY"
    """A frame does not say where it lies (position, orientation, spacing), or says it in no number."""
    LOCALIZER = "LOCALIZER"
    MOSAIC = "MOSAIC"
    """Siemens' many slices in one plane."""
    MODALITY_LUT = "MODALITY_LUT"
    RESCALE = "RESCALE"
    """No rescale where there must be one, a slope of 0, or slices of different units."""
    COLOUR = "COLOUR"
    """Colour that is not RGB."""
    NOT_ORTHONORMAL = "NOT_ORTHONORMAL"
    MIXED_SERIES = "MIXED_SERIES"
    MIXED_FRAME_OF_REFERENCE = "MIXED_FRAME_OF_REFERENCE"
    MIXED_MATRIX = "MIXED_MATRIX"
    """Rows, columns or the type of the pixels differ."""
    MIXED_SPACING = "MIXED_SPACING"
    MIXED_ORIENTATION = "MIXED_ORIENTATION"
    MIXED_KIND = "MIXED_KIND"
    """Magnitude and phase, or several echo times, in one stack."""
    SINGLE_SLICE = "SINGLE_SLICE"
    SEVERAL_VOLUMES = "SEVERAL_VOLUMES"
    """Several images at each position that attributes tell apart: times, echoes, b-values. `split_series` does it."""
    DUPLICATE_POSITIONS = "DUPLICATE_POSITIONS"
    """Several images at one position that nothing tells apart."""
    MISSING_SLICES = "MISSING_SLICES"
    IRREGULAR_SPACING = "IRREGULAR_SPACING"
    IRREGULAR_POSITIONS = "IRREGULAR_POSITIONS"
    """Slices that do not lie on one line."""
    GANTRY_TILT = "GANTRY_TILT"
    """Slices that do lie on one line, which is not perpendicular to them."""

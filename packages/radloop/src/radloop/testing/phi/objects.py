"""Instances of many IODs with headers as scanners write them, before anybody's name is in them.

Each comes with the attributes that say nothing about a person and that research needs: a de-identification has to leave
them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

Generator = np.random.Generator
Kept = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    Attributes:
        modality: Modality (0008,0060); sop_class: its storage class.
        kept: attributes that stay, top level.
        descriptors: descriptive texts without anybody in them; they stay under clean-descriptors (113105).
        private: (group, creator, element, VR, value) that PS3.15 table E.3.10-1 lists as safe.
        rows, columns, frames, bits: of the image; no image where rows is 0.
        rgb: colour.
    """

    modality: str
    sop_class: str
    kept: Kept
    descriptors: Mapping[str, str]
    private: tuple[tuple[int, str, int, str, Any], ...] = ()
    rows: int = 0
    columns: int = 0
    frames: int = 1
    bits: int = 12
    rgb: bool = False


_PROJECTION = {
    "ImageType": ["ORIGINAL", "PRIMARY"], "KVP": "117", "ExposureTime": "8", "XRayTubeCurrent": "320", "Exposure": "3",
    "BodyPartExamined": "CHEST", "ViewPosition": "PA", "PhotometricInterpretation": "MONOCHROME2",
    "PixelIntensityRelationship": "LOG", "WindowCenter": "2048", "WindowWidth": "4096", "Grid": "FOCUSED",
    "DistanceSourceToDetector": "1800", "PatientOrientation": ["L", "F"], "LossyImageCompression": "00",
    "BurnedInAnnotation": "NO",
}  # fmt: skip
_SLICE = {
    "PixelSpacing": ["0.9", "0.9"], "SliceThickness": "2.5", "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
    "PatientPosition": "HFS", "PhotometricInterpretation": "MONOCHROME2",
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "CR": Kind(
        "CR", "1.2.840.10008.5.1.4.1.1.1",
        _PROJECTION | {"Manufacturer": "FUJIFILM Corporation", "ManufacturerModelName": "0402", "SoftwareVersions": "A05",
                       "PlateType": "ST-VI", "Sensitivity": "213", "PixelSpacing": ["0.2", "0.2"], "CassetteSize": "35CMX43CM"},
        {"SeriesDescription": "Chest PA", "StudyDescription": "Chest 2 views"},
        rows=224, columns=192,
    ),
    "DX": Kind(
        "DX", "1.2.840.10008.5.1.4.1.1.1.1",
        _PROJECTION | {"Manufacturer": "Philips Medical Systems", "ManufacturerModelName": "DigitalDiagnost",
                       "SoftwareVersions": ["1.2.1", "PMS81.101.1.1 GXR GXRIM4.0"], "PresentationIntentType": "FOR PRESENTATION",
                       "ImagerPixelSpacing": ["0.143", "0.143"], "DetectorType": "SCINTILLATOR", "ImageLaterality": "U",
                       "DetectorManufacturerName": "Trixell", "FilterMaterial": "COPPER"},
        {"SeriesDescription": "Thorax lateral", "ProtocolName": "Chest lateral"},
        rows=240, columns=200, bits=14,
    ),
    "CT": Kind(
        "CT", "1.2.840.10008.5.1.4.1.1.2",
        _SLICE | {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "Manufacturer": "GE MEDICAL SYSTEMS",
                  "ManufacturerModelName": "Revolution CT", "SoftwareVersions": "revo_ct_21a.33", "KVP": "120",
                  "ConvolutionKernel": "STANDARD", "FilterType": "BODY FILTER", "GantryDetectorTilt": "0",
                  "RescaleIntercept": "-1024", "RescaleSlope": "1", "RescaleType": "HU", "SpiralPitchFactor": 0.98,
                  "ScanOptions": "HELICAL MODE", "BodyPartExamined": "ABDOMEN", "ContrastBolusRoute": "IV",
                  "ContrastBolusVolume": "100", "DataCollectionDiameter": "500", "ReconstructionDiameter": "360"},
        {"SeriesDescription": "Abdomen axial 2.5 mm", "ProtocolName": "Abdomen pelvis with contrast",
         "ContrastBolusAgent": "contrast"},
        ((0x0043, "GEMS_PARM_01", 0x27, "SH", "/0.98:1"), (0x0019, "GEMS_ACQU_01", 0x23, "DS", "39.37"),
         (0x0045, "GEMS_HELIOS_01", 0x01, "SS", 64)),
        rows=128, columns=128,
    ),
    "MR": Kind(
        "MR", "1.2.840.10008.5.1.4.1.1.4",
        _SLICE | {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"], "Manufacturer": "SIEMENS", "ManufacturerModelName": "Aera",
                  "SoftwareVersions": "syngo MR E11", "SequenceName": "*tfl3d1_16ns", "ScanningSequence": ["GR", "IR"],
                  "SequenceVariant": ["SK", "SP", "MP"], "RepetitionTime": "2200", "EchoTime": "2.67", "FlipAngle": "8",
                  "InversionTime": "900", "MagneticFieldStrength": "1.5", "ImagedNucleus": "1H", "EchoTrainLength": "1",
                  "TransmitCoilName": "Body", "MRAcquisitionType": "3D", "BodyPartExamined": "KNEE", "SAR": "0.02"},
        {"SeriesDescription": "T1 sagittal", "ProtocolName": "T1 MPRAGE sagittal"},
        ((0x0019, "SIEMENS MR HEADER", 0x0C, "IS", "1000"), (0x0019, "SIEMENS MR HEADER", 0x0D, "CS", "DIRECTIONAL"),
         (0x0019, "SIEMENS MR HEADER", 0x0E, "FD", [0.5, 0.5, 0.70710678])),
        rows=96, columns=96,
    ),
    "MR-philips": Kind(
        "MR", "1.2.840.10008.5.1.4.1.1.4",
        _SLICE | {"ImageType": ["ORIGINAL", "PRIMARY", "M_SE", "M", "SE"], "Manufacturer": "Philips Medical Systems",
                  "ManufacturerModelName": "Ingenia", "SoftwareVersions": ["5.3.1", "5.3.1.3"], "ScanningSequence": "SE",
                  "SequenceVariant": "SK", "RepetitionTime": "4200", "EchoTime": "95", "FlipAngle": "90",
                  "MagneticFieldStrength": "3", "BodyPartExamined": "PELVIS", "ReceiveCoilName": "MULTI COIL",
                  "PhotometricInterpretation": "MONOCHROME2", "AcquisitionContrast": "DIFFUSION"},
        {"SeriesDescription": "T2 axial", "ProtocolName": "DWI axial"},
        ((0x2001, "Philips Imaging DD 001", 0x03, "FL", 1000.0), (0x2001, "Philips Imaging DD 001", 0x08, "IS", "1")),
        rows=96, columns=80,
    ),
    "PT": Kind(
        "PT", "1.2.840.10008.5.1.4.1.1.128",
        _SLICE | {"ImageType": ["ORIGINAL", "PRIMARY"], "Manufacturer": "Philips Medical Systems",
                  "ManufacturerModelName": "Guardian Body(C)", "SoftwareVersions": "3.3.1", "Units": "BQML",
                  "CountsSource": "EMISSION", "SeriesType": ["WHOLE BODY", "IMAGE"], "DecayCorrection": "START",
                  "CorrectedImage": ["DECY", "ATTN", "SCAT"], "AttenuationCorrectionMethod": "CT-AC",
                  "ScatterCorrectionMethod": "SS-SIMUL", "ReconstructionMethod": "BLOB-OS-TF", "RescaleSlope": "1.7",
                  "RescaleIntercept": "0", "FrameReferenceTime": "1200", "DecayFactor": "1.02", "CollimatorType": "NONE"},
        {"SeriesDescription": "PET whole body", "ProtocolName": "PET CT"},
        ((0x7053, "Philips PET Private Group", 0x00, "DS", "0.000412"),
         (0x7053, "Philips PET Private Group", 0x09, "DS", "1.57")),
        rows=64, columns=64, bits=16,
    ),
    "MG": Kind(
        "MG", "1.2.840.10008.5.1.4.1.1.1.2",
        _PROJECTION | {"Manufacturer": "HOLOGIC, Inc.", "ManufacturerModelName": "Selenia Dimensions", "KVP": "29",
                       "SoftwareVersions": "AWS:1.10.1.1", "PresentationIntentType": "FOR PRESENTATION", "ViewPosition": "CC",
                       "BodyPartExamined": "BREAST", "ImageLaterality": "R", "CompressionForce": "98", "OrganDose": "0.012",
                       "BodyPartThickness": "55", "AnodeTargetMaterial": "TUNGSTEN", "FilterMaterial": "RHODIUM",
                       "PositionerType": "MAMMOGRAPHIC", "PatientOrientation": ["P", "L"]},
        {"SeriesDescription": "R CC", "ProtocolName": "Mammography screening"},
        rows=256, columns=160, bits=14,
    ),
    "US": Kind(
        "US", "1.2.840.10008.5.1.4.1.1.3.1",
        {"ImageType": ["ORIGINAL", "PRIMARY", "ABDOMINAL", "0001"], "Manufacturer": "GE Healthcare", "FrameTime": "33",
         "ManufacturerModelName": "LOGIQE9", "SoftwareVersions": "LOGIQE9:R6.1.2", "TransducerType": "CURVED LINEAR",
         "PhotometricInterpretation": "RGB", "LossyImageCompression": "00", "UltrasoundColorDataPresent": 0,
         "ProcessingFunction": "ABDOMEN", "BodyPartExamined": "LIVER", "FrameIncrementPointer": 0x00181063},
        {"SeriesDescription": "Liver", "StudyDescription": "Ultrasound abdomen"},
        rows=240, columns=320, frames=3, bits=8, rgb=True,
    ),
    "SC": Kind(
        "OT", "1.2.840.10008.5.1.4.1.1.7",
        {"ImageType": ["DERIVED", "SECONDARY"], "ConversionType": "WSD", "Manufacturer": "TeraRecon",
         "SecondaryCaptureDeviceManufacturer": "TeraRecon", "SecondaryCaptureDeviceSoftwareVersions": "4.4.11",
         "PhotometricInterpretation": "RGB"},
        {"SeriesDescription": "3D volume rendering"},
        rows=240, columns=320, bits=8, rgb=True,
    ),
    "SEG": Kind(
        "SEG", "1.2.840.10008.5.1.4.1.1.66.4",
        {"ImageType": ["DERIVED", "PRIMARY"], "Manufacturer": "QIICR", "ManufacturerModelName": "dcmqi",
         "SoftwareVersions": "1.2.4", "PhotometricInterpretation": "MONOCHROME2", "SegmentationType": "BINARY",
         "ContentLabel": "SEGMENTATION", "LossyImageCompression": "00",
         "SegmentSequence[0].SegmentNumber": 1, "SegmentSequence[0].SegmentAlgorithmType": "SEMIAUTOMATIC",
         "SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue": "10200004"},
        {"SeriesDescription": "Segmentation"},
        rows=64, columns=64, frames=2, bits=1,
    ),
    "RTSTRUCT": Kind(
        "RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3",
        {"Manufacturer": "Varian Medical Systems", "ManufacturerModelName": "ARIA RadOnc", "SoftwareVersions": "15.6.05",
         "StructureSetROISequence[0].ROINumber": "1", "ROIContourSequence[0].ReferencedROINumber": "1",
         "ROIContourSequence[0].ROIDisplayColor": ["255", "0", "0"],
         "ROIContourSequence[0].ContourSequence[0].ContourGeometricType": "CLOSED_PLANAR",
         "ROIContourSequence[0].ContourSequence[0].NumberOfContourPoints": "3",
         "ROIContourSequence[0].ContourSequence[0].ContourData": ["0", "0", "5", "9", "0", "5", "9", "9", "5"],
         "RTROIObservationsSequence[0].RTROIInterpretedType": "ORGAN"},
        {"StructureSetROISequence[0].ROIName": "Lung left"},
    ),
    "SR": Kind(
        "SR", "1.2.840.10008.5.1.4.1.1.88.22",
        {"Manufacturer": "PixelMed", "ManufacturerModelName": "report server", "ValueType": "CONTAINER",
         "ContinuityOfContent": "SEPARATE", "CompletionFlag": "COMPLETE", "VerificationFlag": "UNVERIFIED",
         "ConceptNameCodeSequence[0].CodeValue": "18748-4", "ContentSequence[1].RelationshipType": "CONTAINS",
         "ContentSequence[1].ValueType": "NUM", "ContentSequence[1].MeasuredValueSequence[0].NumericValue": "14.5"},
        {"SeriesDescription": "Report"},
    ),
}  # fmt: skip


def build(kind: Kind, rng: Generator) -> tuple[Dataset, NDArray[Any] | None]:
    """An instance without identity, UIDs, dates or pixel data, and its pixels.

    Returns:
        the data set, and an array `(frames, rows, columns)` or `(frames, rows, columns, 3)`; None for no image.
    """
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = kind.sop_class, kind.modality
    for path, value in {**kind.kept, **kind.descriptors}.items():
        put(ds, path, value)
    for group, creator, element, vr, value in kind.private:
        ds.private_block(group, creator, create=True).add_new(element, vr, value)
    _extra = _EXTRAS.get(kind.modality)
    if _extra is not None:
        _extra(ds)
    ds.file_meta = FileMetaDataset()
    implicit = kind.modality in ("PT", "RTSTRUCT")
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return ds, _pixels(ds, kind, rng) if kind.rows else None


def put(ds: Dataset, path: str, value: Any) -> None:
    """Set the attribute at a path such as `ContentSequence[1].TextValue`; sequences and items are made as needed."""
    *parents, keyword = path.split(".")
    for part in parents:
        name, number = part.rstrip("]").split("[")
        if name not in ds:
            setattr(ds, name, Sequence())
        items = getattr(ds, name)
        while len(items) <= int(number):
            items.append(Dataset())
        ds = items[int(number)]
    setattr(ds, keyword, value)


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """A coded entry (PS3.3 section 8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _segmentation(ds: Dataset) -> None:
    segment = ds.SegmentSequence[0]
    segment.SegmentLabel = "Segment 1"
    segment.SegmentedPropertyCategoryCodeSequence = Sequence([code("123037004", "SCT", "Anatomical Structure")])
    segment.SegmentedPropertyTypeCodeSequence = Sequence([code("10200004", "SCT", "Liver")])


def _report(ds: Dataset) -> None:
    ds.ConceptNameCodeSequence = Sequence([code("18748-4", "LN", "Diagnostic imaging study")])
    number = ds.ContentSequence[1]
    number.ConceptNameCodeSequence = Sequence([code("410668003", "SCT", "Length")])
    number.MeasuredValueSequence[0].MeasurementUnitsCodeSequence = Sequence([code("mm", "UCUM", "mm")])


def _emission(ds: Dataset) -> None:
    drug = Dataset()
    drug.Radiopharmaceutical, drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = "FDG", "370000000", "6586.2"
    drug.RadionuclideCodeSequence = Sequence([code("77004003", "SCT", "^18^Fluorine")])
    ds.RadiopharmaceuticalInformationSequence = Sequence([drug])


def _region(ds: Dataset) -> None:
    ds.AnatomicRegionSequence = Sequence([code("51185008", "SCT", "Chest")])


_EXTRAS: dict[str, Callable[[Dataset], None]] = {
    "SEG": _segmentation, "SR": _report, "PT": _emission, "DX": _region, "MG": _region,
}  # fmt: skip


def _pixels(ds: Dataset, kind: Kind, rng: Generator) -> NDArray[Any]:
    """A smooth body on a dark ground with noise: nothing in it reads as text."""
    ds.Rows, ds.Columns = kind.rows, kind.columns
    ds.SamplesPerPixel = 3 if kind.rgb else 1
    ds.BitsAllocated = 1 if kind.bits == 1 else 8 if kind.bits == 8 else 16
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = kind.bits, kind.bits - 1, 0
    if kind.frames > 1:
        ds.NumberOfFrames = kind.frames
    if kind.rgb:
        ds.PlanarConfiguration = 0
    y, x = np.mgrid[-1 : 1 : kind.rows * 1j, -1 : 1 : kind.columns * 1j]
    body = np.clip(1.2 - (x / 0.75) ** 2 - (y / 0.85) ** 2, 0, 1)
    frames = []
    for number in range(kind.frames):
        grain = rng.normal(0, 0.015, body.shape)
        frames.append(np.clip(0.08 + 0.55 * body * (0.9 + 0.1 * np.cos(6 * x + number)) + grain, 0, 1))
    if kind.bits == 1:
        return (np.stack(frames) > 0.3).astype(np.uint8)
    scaled = np.rint(np.stack(frames) * ((1 << kind.bits) - 1))
    stored = scaled.astype(np.uint8 if kind.bits == 8 else np.uint16)
    return np.repeat(stored[..., np.newaxis], 3, axis=-1) if kind.rgb else stored

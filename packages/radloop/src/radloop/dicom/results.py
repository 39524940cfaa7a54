"""Results where radiologists look: structured reports, segmentations and pictures that go back to the PACS.

Encoded as IHE AI Results asks: a Comprehensive 3D SR after TID 1500 (PS3.16), one new series a kind, "AI - investigational",
UNVERIFIED and PRELIMINARY, with the algorithm, the model's version, the prediction's id and references to the images; beside it
a picture for viewers that cannot show an SR. What was not analysed says so, and why, in the same form.

The objects are identified: patient and study attributes are those of the images they are made from. They stay inside the
hospital. All UIDs follow from what the result is about, so that the same result made again is the same instance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import UID, Comprehensive3DSRStorage

from radloop.errors import DicomError

if TYPE_CHECKING:
    from highdicom.ko import KeyObjectSelectionDocument
    from highdicom.sc import SCImage
    from highdicom.seg import Segmentation
    from highdicom.sr import Comprehensive3DSR

D = TypeVar("D", bound=Dataset)

MANUFACTURER = "radloop"
SERIES_DESCRIPTION = "AI - investigational"
NOT_FOR_DIAGNOSIS = "NOT FOR DIAGNOSIS"
_SERIES = {"report": 9901, "picture": 9902, "segmentation": 9903, "rejection": 9904}
_LOCAL = "99RADLOOP"
_PRESENT, _ABSENT = Code("52101004", "SCT", "Present"), Code("2667000", "SCT", "Absent")
_PROBABILITY = Code("probability", _LOCAL, "Calibrated probability of the finding")
_FAMILY = Code("123110", "DCM", "Artificial Intelligence")
_NEEDED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
_REJECTED = {
    "quality": Code("113001", "DCM", "Rejected for Quality Reasons"),
    "patient safety": Code("113037", "DCM", "Rejected for Patient Safety Reasons"),
    "incorrect worklist entry": Code("113038", "DCM", "Incorrect Modality Worklist Entry"),
}


class Algorithm(msgspec.Struct, frozen=True, kw_only=True):
    """Which model: its task, the registry's version and its digest."""

    name: str
    version: str
    digest: str


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """One answer about one image. `finding` in words; `threshold` is what `decision` was made by."""

    prediction_id: str
    finding: str
    probability: float
    decision: int
    threshold: float


def is_result(ds: Dataset) -> bool:
    """Whether an instance is one of ours that comes back: never predicted, never trained on."""
    return str(ds.get("Manufacturer") or "").strip() == MANUFACTURER and str(
        ds.get("SeriesDescription") or ""
    ).startswith(SERIES_DESCRIPTION)


def report(
    images: Sequence[Dataset],
    answers: Sequence[Analysis | str],
    algorithm: Algorithm,
    *,
    at: datetime,
    previous: Dataset | None = None,
) -> Comprehensive3DSR:
    """What was found in a study, image by image, as one structured report.

    Args:
        images: the instances it is about, of one study, as received.
        answers: one for each image: what the model said, or why it was not asked or did not answer, in words without
            identifying text ("not analysed: ...").
        at: when.
        previous: the report that this one replaces; it is cited as its predecessor (PS3.3 C.17.2).

    Raises:
        DicomError: images of several studies, or none.
    """
    from highdicom import sr

    evidence = _evidence(images)
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=_uid("device", algorithm.digest), manufacturer_name=MANUFACTURER, model_name=algorithm.name
    )
    observer = sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_procedure(evidence[0]),
        imaging_measurements=[_group(*one, algorithm) for one in zip(evidence, answers, strict=True)],
        title=codes.DCM.ImagingMeasurementReport,
    )
    what = [answer if isinstance(answer, str) else answer.prediction_id for answer in answers]
    made = sr.Comprehensive3DSR(
        evidence=evidence,
        content=content[0],
        is_complete=True,
        is_final=False,
        is_verified=False,
        manufacturer=MANUFACTURER,
        previous_versions=None if previous is None else [previous],
        **_place("report", str(evidence[0].StudyInstanceUID), algorithm, "\n".join(what)),
    )
    return _finished(made, algorithm, at)


def _group(image: Dataset, answer: Analysis | str, algorithm: Algorithm) -> Any:
    """TID 1501: what was said of one image, by which algorithm."""
    from highdicom import sr

    told, measurements = [f"model {algorithm.digest}"], None
    if isinstance(answer, str):
        name, value = sr.CodedConcept("analysis", _LOCAL, "Analysis"), f"not analysed: {answer}"[:64]
        evaluation = sr.QualitativeEvaluation(name, sr.CodedConcept(_code(answer), _LOCAL, value))
    else:
        told += [f"prediction {answer.prediction_id}", f"threshold {answer.threshold:.4f}"]
        finding = sr.CodedConcept(_code(answer.finding), _LOCAL, answer.finding)
        evaluation = sr.QualitativeEvaluation(finding, _PRESENT if answer.decision else _ABSENT)
        probability = sr.CodedConcept.from_code(_PROBABILITY)
        measurements = [sr.Measurement(probability, round(answer.probability, 4), codes.UCUM.NoUnits)]
    source = sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(_uid("tracking", image.SOPInstanceUID, *told), MANUFACTURER),
        algorithm_id=sr.AlgorithmIdentification(
            name=algorithm.name,
            version=algorithm.version,
            parameters=told,
            manufacturer=MANUFACTURER,
            family=_FAMILY,
        ),
        measurements=measurements,
        qualitative_evaluations=[evaluation],
        source_images=[source] if "Rows" in image else None,
    )


def former(study_uid: str, what: Sequence[str], algorithm: Algorithm) -> Dataset:
    """An earlier report as a reference to cite: its UIDs follow from what it was about, `what` being its prediction ids."""
    place = _place("report", study_uid, algorithm, "\n".join(what))
    made = Dataset()
    made.StudyInstanceUID, made.SeriesInstanceUID = study_uid, place["series_instance_uid"]
    made.SOPClassUID, made.SOPInstanceUID = Comprehensive3DSRStorage, place["sop_instance_uid"]
    return made


def picture(
    image: Dataset,
    heat: NDArray[np.float32] | None,
    shown: NDArray[np.uint8],
    analysis: Analysis,
    algorithm: Algorithm,
    *,
    at: datetime,
) -> SCImage:
    """A secondary capture for viewers that cannot show an SR: the image, where the answer came from, and the answer in words.

    Args:
        image: the instance, for patient and study.
        heat: saliency `(rows, columns)`, 0 to 1, or None.
        shown: the image in grey `(rows, columns)`, 8 bits.
        analysis, algorithm, at: the answer.

    The words are burned in: "NOT FOR DIAGNOSIS", the model's version and the answer, no name. BurnedInAnnotation says YES.
    """
    from highdicom.sc import SCImage

    (evidence,) = _evidence([image])
    made = SCImage(
        pixel_array=_drawn(heat, shown, analysis, algorithm),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=evidence.StudyInstanceUID,
        manufacturer=MANUFACTURER,
        patient_id=evidence.PatientID,
        patient_name=evidence.PatientName,
        patient_birth_date=evidence.PatientBirthDate or None,
        patient_sex=evidence.PatientSex or None,
        accession_number=evidence.AccessionNumber,
        study_id=evidence.StudyID,
        study_date=evidence.StudyDate or None,
        study_time=evidence.StudyTime or None,
        referring_physician_name=evidence.ReferringPhysicianName,
        patient_orientation=("L", "F"),
        **_place("picture", str(evidence.StudyInstanceUID), algorithm, analysis.prediction_id),
    )
    if "Laterality" not in made:
        made.Laterality = str(image.get("Laterality") or "")
    made.BurnedInAnnotation = "YES"
    made.ImageComments = f"{NOT_FOR_DIAGNOSIS}. Prediction {analysis.prediction_id}"
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = evidence.SOPClassUID, evidence.SOPInstanceUID
    made.SourceImageSequence = [reference]
    return _finished(made, algorithm, at)


def segmentation(
    images: Sequence[Dataset], mask: NDArray[np.uint8], labels: Sequence[tuple[str, Code]], algorithm: Algorithm,
    *, prediction_id: str, at: datetime,
) -> Segmentation:  # fmt: skip
    """Segments as a DICOM SEG.

    Args:
        images: the slices, in the order of the mask's first axis.
        mask: `(slices, rows, columns)`, 0 for nothing, n for the nth label.
        labels: a name for each segment and what it is, as a code (PS3.16 CID 7150 and below).
        algorithm, prediction_id, at: as in a report.
    """
    import highdicom as hd

    evidence = _evidence(images)
    family = hd.AlgorithmIdentificationSequence(algorithm.name, _FAMILY, algorithm.version, source=MANUFACTURER)
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=kind,
            algorithm_type="AUTOMATIC",
            algorithm_identification=family,
        )
        for number, (name, kind) in enumerate(labels, 1)
    ]
    made = hd.seg.Segmentation(
        source_images=list(evidence),
        pixel_array=mask,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=algorithm.name,
        software_versions=algorithm.version,
        device_serial_number=algorithm.digest[:16],
        content_label="AI_SEGMENTATION",
        omit_empty_frames=bool(mask.any()),
        **_place("segmentation", str(evidence[0].StudyInstanceUID), algorithm, prediction_id),
    )
    return _finished(made, algorithm, at)


def rejection(instances: Sequence[Dataset], why: str, *, at: datetime) -> KeyObjectSelectionDocument:
    """A rejection note (Key Object Selection): archives hide the instances it names (IHE IOCM).

    Args:
        instances: our own results that are withdrawn, of one study.
        why: `quality`, `patient safety` or `incorrect worklist entry`.
    """
    from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument

    evidence = _evidence(instances)
    version, digest = [*(str(one) for one in evidence[0].get("SoftwareVersions") or []), "", ""][:2]
    algorithm = Algorithm(name=str(evidence[0].get("ManufacturerModelName") or ""), version=version, digest=digest)
    names = "".join(sorted(str(ds.SOPInstanceUID) for ds in evidence))
    made = KeyObjectSelectionDocument(
        evidence=evidence,
        content=KeyObjectSelection(document_title=_REJECTED[why], referenced_objects=evidence),
        manufacturer=MANUFACTURER,
        **_place("rejection", str(evidence[0].StudyInstanceUID), algorithm, names),
    )
    return _finished(made, algorithm, at)


def _evidence(images: Sequence[Dataset]) -> list[Dataset]:
    """The instances, with what a result must copy of them, empty where they have it not (Type 2)."""
    studies = {str(ds.get("StudyInstanceUID") or "") for ds in images}
    if len(studies) != 1 or "" in studies:
        raise DicomError("a result is about one study", reason="MISSING_UID", expected="1 study", got=f"{len(studies)}")
    made = []
    for ds in images:
        one = Dataset()
        one.update({element.tag: element for element in ds if element.tag != 0x7FE00010})
        if (meta := getattr(ds, "file_meta", None)) is not None:
            one.file_meta = meta
        for keyword in _NEEDED:
            if keyword not in one:
                setattr(one, keyword, "")
        made.append(one)
    return made


def _procedure(image: Dataset) -> Code:
    """What was done: the study's own code, else that it was imaging."""
    for item in image.get("ProcedureCodeSequence") or []:
        if item.get("CodeValue") and item.get("CodingSchemeDesignator") and item.get("CodeMeaning"):
            return Code(item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning)
    return Code("363679005", "SCT", "Imaging procedure")


def _place(kind: str, study_uid: str, algorithm: Algorithm, what: str) -> dict[str, Any]:
    return {
        "series_instance_uid": _uid("series", kind, study_uid, algorithm.digest),
        "series_number": _SERIES[kind],
        "sop_instance_uid": _uid(kind, study_uid, algorithm.digest, what),
        "instance_number": 1,
    }


def _finished(made: D, algorithm: Algorithm, at: datetime) -> D:
    made.SeriesDescription = SERIES_DESCRIPTION
    made.ManufacturerModelName = algorithm.name[:64]
    made.SoftwareVersions = [algorithm.version, algorithm.digest[:16]]
    date, time = at.strftime("%Y%m%d"), at.strftime("%H%M%S")
    made.SeriesDate = made.ContentDate = made.InstanceCreationDate = date
    made.SeriesTime = made.ContentTime = made.InstanceCreationTime = time
    return made


def _uid(*parts: str) -> UID:
    """A UID that follows from what it names: `2.25.` and a UUIDv8 (PS3.5 B.2)."""
    bits = int.from_bytes(hashlib.sha256("\n".join(("radloop result", *parts)).encode()).digest()[:16], "big")
    bits = bits & ~(0xF << 76) | (0x8 << 76)
    return UID(f"2.25.{bits & ~(0x3 << 62) | (0x2 << 62)}")


def _code(words: str) -> str:
    """A local code value of up to 16 characters, always the same for the same words."""
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _drawn(
    heat: NDArray[np.float32] | None, shown: NDArray[np.uint8], analysis: Analysis, algorithm: Algorithm
) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw, ImageFont

    grey = np.repeat(shown[:, :, np.newaxis], 3, axis=2).astype(np.float32)
    if heat is not None:
        scaled = Image.fromarray((heat * 255).astype(np.uint8)).resize(
            (shown.shape[1], shown.shape[0]), Image.Resampling.BILINEAR
        )
        alpha = 0.5 * np.asarray(scaled, np.float32)[:, :, np.newaxis] / 255
        grey = (grey * (1 - alpha) + np.array([255.0, 115.0, 0.0]) * alpha).astype(np.float32)
    width = max(shown.shape[1], 512)
    side = "above" if analysis.decision else "below"
    words = [
        f"{NOT_FOR_DIAGNOSIS}: {SERIES_DESCRIPTION}",
        f"{analysis.finding}: probability {analysis.probability:.3f}, {side} {analysis.threshold:.3f}",
        f"{algorithm.name} version {algorithm.version}, {algorithm.digest[:12]}",
        f"prediction {analysis.prediction_id}",
        *(["colour: covering this part makes the answer fall"] if heat is not None else []),
    ]
    size = width // 36
    canvas = Image.new("RGB", (width, shown.shape[0] + (len(words) + 1) * (size + 6)))
    canvas.paste(Image.fromarray(grey.clip(0, 255).astype(np.uint8)), ((width - shown.shape[1]) // 2, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    for number, line in enumerate(words):
        pen.text((size // 2, shown.shape[0] + 6 + number * (size + 6)), line, fill=(255, 255, 255), font=font)
    return np.asarray(canvas, np.uint8)

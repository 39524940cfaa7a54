"""De-identification of what refers to images: segmentations, RT objects, reports, presentation states, waveforms."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from radloop.catalog.reason import Reason
from radloop.dicom.deidentify import Deidentifier, read
from radloop.dicom.profile import chosen
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError

NAMES = Pseudonymiser(bytes(range(32)))
CLEANING = ["clean-graphics", "clean-structured-content", "clean-descriptors"]
BASIC = Deidentifier(NAMES, profile="basic")
RESEARCH = Deidentifier(NAMES, profile=chosen("research", CLEANING))
BOTH = pytest.mark.parametrize("cleaner", [Deidentifier(NAMES, profile=chosen("basic", CLEANING)), RESEARCH])


def elements(ds: Dataset, path: str = "") -> Iterator[tuple[str, pydicom.DataElement]]:
    for element in ds:
        here = f"{path}.{element.keyword}"
        yield here, element
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item, here)


def references(ds: Dataset, to: set[str]) -> Counter[str]:
    """How often each UID of a set is named, the instance's own UID aside."""
    found: Counter[str] = Counter()
    for path, element in elements(ds):
        if element.VR == "UI" and path != ".SOPInstanceUID":
            values = element.value if element.VM > 1 else [element.value]
            found.update(str(value) for value in values if str(value) in to)
    return found


def written(ds: Dataset) -> Dataset:
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return read(buffer.getvalue())


def file_of(ds: Dataset, folder: Path, name: str) -> Path:
    path = folder / f"{name}.dcm"
    dcmwrite(path, ds, enforce_file_format=True)
    return path


def slices(count: int = 3) -> list[Dataset]:
    """A CT series in one frame of reference."""
    made = []
    for number in range(count):
        ds = deepcopy(pydicom.dcmread(get_testdata_file("CT_small.dcm")))
        ds.SOPInstanceUID = f"1.2.3.4.{number + 1}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.ImagePositionPatient = [-158.1, -179.0, -75.7 + 5 * number]
        ds.InstanceNumber = number + 1
        ds.PatientName, ds.PatientID = "Harrowgate^Mina", "HG-448812"
        ds.PatientBirthDate, ds.PatientSex = "19470120", "F"
        ds.StudyDate, ds.StudyID, ds.AccessionNumber = "20040119", "S77123", "ACC-99121"
        ds.ReferringPhysicianName = "Quist^Ole"
        made.append(ds)
    return made


def segmentation(images: list[Dataset]) -> Dataset:
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription

    mask = np.zeros((len(images), 128, 128), np.uint8)
    mask[:, 20:40, 20:40] = 1
    algorithm = AlgorithmIdentificationSequence("Harrowgate net", codes.DCM.ArtificialIntelligence, "1.0")
    description = SegmentDescription(
        1, "Mina liver", codes.SCT.Organ, codes.SCT.Liver, "AUTOMATIC", algorithm, tracking_uid=generate_uid()
        , tracking_id="Mina 1",
    )  # fmt: skip
    made = Segmentation(
        images, mask, "BINARY", [description], "1.2.3.5.1", 7, "1.2.3.5.2", 1, "Maker", "Model", "1", "SN-Quist-1",
        content_description="for Mina", content_creator_name="Quist^Ole",
    )  # fmt: skip
    return written(made)


def report(images: list[Dataset]) -> Dataset:
    from highdicom import sr

    context = sr.ObservationContext(
        observer_person_context=sr.ObserverContext(
            codes.DCM.Person, sr.PersonObserverIdentifyingAttributes("Quist^Ole", organization_name="Quist Clinic")
        )
    )
    source = sr.SourceImageForMeasurement.from_source_image(images[0])
    length = sr.Measurement(
        codes.SCT.Length, 12.5, codes.UCUM.Millimeter,
        tracking_identifier=sr.TrackingIdentifier("1.2.3.6.1", "Mina lesion 1"), referenced_images=[source],
    )  # fmt: skip
    group = sr.MeasurementsAndQualitativeEvaluations(
        sr.TrackingIdentifier("1.2.3.6.1", "Mina lesion 1"),
        source_images=[sr.SourceImageForMeasurementGroup.from_source_image(images[0])],
        measurements=[length],
    )
    content = sr.MeasurementReport(context, codes.LN.CTUnspecifiedBodyRegion, imaging_measurements=[group])
    document = sr.Comprehensive3DSR(
        images, content[0], "1.2.3.7.1", 9, "1.2.3.7.2", 1, "Maker", is_verified=True, is_complete=True,
        verifying_observer_name="Quist^Ole", verifying_organization="Quist Clinic",
        performed_procedure_codes=[codes.LN.CTUnspecifiedBodyRegion],
    )  # fmt: skip
    made = written(document)  # as read: plain data sets, to which anything can be added
    free = Dataset()
    free.RelationshipType, free.ValueType = "CONTAINS", "TEXT"
    free.TextValue = "Mina Harrowgate, seen by Dr Quist on 19 January 2004: lesion in the right liver, 12 mm"
    subject = [
        content_item("PNAME", "121029", "Subject Name", PersonName="Harrowgate^Mina"),
        content_item("DATE", "121031", "Subject Birth Date", Date="19470120"),
        content_item("DATE", "121125", "Procedure Date", Date="20040119"),
        content_item(
            "CODE", "121032", "Subject Sex", ConceptCodeSequence=Sequence([code("248152002", "SCT", "Female")])
        ),
        content_item("NUM", "121033", "Subject Age", MeasuredValueSequence=Sequence([measured("96", "a")])),
    ]
    made.ContentSequence.extend([free, *subject])
    return made


def code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def measured(value: str, unit: str) -> Dataset:
    item = Dataset()
    item.NumericValue, item.MeasurementUnitsCodeSequence = value, Sequence([code(unit, "UCUM", unit)])
    return item


def content_item(kind: str, concept: str, meaning: str, **values: object) -> Dataset:
    item = Dataset()
    item.RelationshipType, item.ValueType = "CONTAINS", kind
    item.ConceptNameCodeSequence = Sequence([code(concept, "DCM", meaning)])
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def key_objects(images: list[Dataset]) -> Dataset:
    from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument

    content = KeyObjectSelection(codes.DCM.ForTeaching, images, description="Mina, for Dr Quist: liver lesion")
    return written(KeyObjectSelectionDocument(images, content, "1.2.3.8.1", 3, "1.2.3.8.2", 1))


def presentation(images: list[Dataset]) -> Dataset:
    from highdicom import pr

    line = pr.GraphicObject("POLYLINE", np.array([[10.0, 10.0], [40.0, 40.0]]), units="PIXEL")
    text = pr.TextObject("Mina: liver lesion", units="PIXEL", anchor_point=(10.0, 10.0))
    layer = pr.GraphicLayer("LAYER", 1)
    annotation = pr.GraphicAnnotation(images, layer, graphic_objects=[line], text_objects=[text])
    return written(
        pr.GrayscaleSoftcopyPresentationState(
            images, "1.2.3.9.1", 5, "1.2.3.9.2", 1, "Maker", "Model", "1", "SN1", "LABEL", "content of Mina",
            graphic_annotations=[annotation], graphic_layers=[layer], content_creator_name="Quist^Ole",
        )
    )  # fmt: skip


BUILDERS = {"SEG": segmentation, "SR": report, "KO": key_objects, "PR": presentation}
SECRETS = (
    "Harrowgate",
    "Mina",
    "HG-448812",
    "Quist",
    "S77123",
    "ACC-99121",
    "19470120",
    "20040119",
    "1.2.3.4.",
    "SN-Quist",
)


@BOTH
@pytest.mark.parametrize("modality", BUILDERS)
@pytest.mark.filterwarnings("ignore")
def test_references_still_point_at_their_images(cleaner: Deidentifier, modality: str, tmp_path: Path) -> None:
    """A segmentation or report whose images cannot be found is worth nothing."""
    images = slices()
    made = BUILDERS[modality](images)
    group = [*images, made]
    cleaned = []
    for number, ds in enumerate(group):
        target = tmp_path / f"out{number}.dcm"
        cleaner.clean_file(file_of(ds, tmp_path, f"in{number}"), target, site="A")
        cleaned.append(pydicom.dcmread(target))
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        originals = {str(ds[keyword].value) for ds in group}
        before = references(made, originals)
        assert references(cleaned[-1], {NAMES.uid(uid) for uid in originals}) == Counter(
            {NAMES.uid(uid): times for uid, times in before.items()}
        ), keyword
    assert {ds.PatientID for ds in cleaned} == {cleaned[0].PatientID}
    assert {ds.StudyInstanceUID for ds in cleaned} == {cleaned[0].StudyInstanceUID}
    if "FrameOfReferenceUID" in made:
        assert cleaned[-1].FrameOfReferenceUID == cleaned[0].FrameOfReferenceUID


@BOTH
@pytest.mark.parametrize("modality", BUILDERS)
@pytest.mark.filterwarnings("ignore")
def test_no_secret_is_left_in_the_bytes(cleaner: Deidentifier, modality: str, tmp_path: Path) -> None:
    """Names stand in labels, observers, free text, drawings and algorithm names, not in the patient module alone."""
    made = BUILDERS[modality](slices())
    before = file_of(made, tmp_path, "in").read_bytes()
    target = tmp_path / "out.dcm"
    cleaner.clean_file(tmp_path / "in.dcm", target, site="A")
    data = target.read_bytes()
    assert sum(secret.encode() in before for secret in SECRETS) >= 5
    assert [secret for secret in SECRETS if secret.encode() in data] == []


@pytest.mark.filterwarnings("ignore")
def test_a_report_keeps_its_structure() -> None:
    """Measurements, codes and their tree are what a report is kept for."""
    made = report(slices())
    out = RESEARCH.clean(made, site="A")

    def tree(ds: Dataset) -> list[object]:
        return [(item.ValueType, tree(item)) for item in ds.get("ContentSequence", [])]

    assert tree(out) == tree(made)
    texts = [e.value for _, e in elements(out) if e.keyword == "TextValue"]
    assert "by Dr on lesion in the right liver 12 mm" in texts
    numbers = [float(e.value) for path, e in elements(out) if path.endswith("MeasuredValueSequence.NumericValue")]
    assert numbers == [12.5, 90.0]  # the age capped
    assert {str(e.value) for _, e in elements(out) if e.keyword == "PersonName"} == {"REMOVED"}
    assert out.VerifyingObserverSequence[0].VerifyingObserverName == "REMOVED"
    assert "Quist" not in str(out)


@pytest.mark.filterwarnings("ignore")
def test_what_a_report_says_of_the_patient_follows_the_options() -> None:
    """A birth date moved with the other dates would tell the age to the day; an age over 89 singles somebody out."""
    made = report(slices())
    out = RESEARCH.clean(made, site="A").ContentSequence
    dates = [item.Date for item in out if item.ValueType == "DATE"]
    shift = NAMES.day_shift(NAMES.patient("HG-448812", "A"))
    assert dates == ["19000101", f"{date(2004, 1, 19) + timedelta(days=shift):%Y%m%d}"]
    assert out[-2].ConceptCodeSequence[0].CodeMeaning == "Female"
    assert out[-1].MeasuredValueSequence[0].NumericValue == 90
    basic = Deidentifier(NAMES, profile=chosen("basic", CLEANING)).clean(made, site="A").ContentSequence
    assert [item.Date for item in basic if item.ValueType == "DATE"] == ["19000101", "19000101"]
    assert basic[-2].ConceptCodeSequence[0].CodeMeaning == "REMOVED"
    assert len(basic[-1].MeasuredValueSequence) == 0


def test_a_report_without_the_option_is_refused() -> None:
    """A report emptied of its content would look like one that says nothing was found."""
    with pytest.raises(DicomError, match="clean-structured-content") as caught:
        BASIC.clean(pydicom.dcmread(get_testdata_file("test-SR.dcm")), site="A")
    assert caught.value.reason == Reason.UNSUPPORTED_OBJECT


@pytest.mark.filterwarnings("ignore")
def test_drawings_stay_only_with_the_option() -> None:
    """Text in a drawing names the patient as often as any other; lines do not."""
    made = presentation(slices())
    assert "GraphicAnnotationSequence" not in BASIC.clean(made, site="A")
    item = RESEARCH.clean(made, site="A").GraphicAnnotationSequence[0]
    assert item.TextObjectSequence[0].UnformattedTextValue == "liver lesion"
    assert list(item.GraphicObjectSequence[0].GraphicData) == list(
        made.GraphicAnnotationSequence[0].GraphicObjectSequence[0].GraphicData
    )


def test_an_ecg_keeps_its_signal_and_loses_its_annotations() -> None:
    """The signal is what it is kept for; annotations are free text."""
    ds = pydicom.dcmread(get_testdata_file("waveform_ecg.dcm"))
    ds.PatientID = "7"
    note = Dataset()
    note.UnformattedTextValue = "Mina Harrowgate, chest pain"
    note.ReferencedWaveformChannels = [1, 0]
    ds.WaveformAnnotationSequence = Sequence([note])
    out = BASIC.clean(ds, site="A")
    assert out.WaveformSequence[0].WaveformData == ds.WaveformSequence[0].WaveformData
    assert "WaveformAnnotationSequence" not in out
    kept = RESEARCH.clean(ds, site="A").WaveformAnnotationSequence[0]
    assert kept.UnformattedTextValue == "chest"
    assert kept.ReferencedWaveformChannels == [1, 0]


@pytest.mark.parametrize("name", ["rtplan.dcm", "rtdose.dcm", "liver_1frame.dcm"])
@pytest.mark.filterwarnings("ignore")
def test_rt_objects_and_segmentations_of_others(name: str, tmp_path: Path) -> None:
    """Beams, doses and masks stay; labels that people type go."""
    ds = pydicom.dcmread(get_testdata_file(name))
    ds.Manufacturer, ds.ManufacturerModelName = "Maker", "Model"
    out = RESEARCH.clean(ds, site="A")
    if name == "rtplan.dcm":
        assert [b.BeamNumber for b in out.BeamSequence] == [b.BeamNumber for b in ds.BeamSequence]
        assert out.RTPlanLabel == "Plan1" or out.RTPlanLabel == "REMOVED"
        assert out.ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID == NAMES.uid(
            ds.ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID
        )
    else:
        assert out.PixelData == ds.PixelData
        assert out.FrameOfReferenceUID == NAMES.uid(ds.FrameOfReferenceUID)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_references_in_real_sets(test_data: Path) -> None:
    """RT structures, segmentations, reports and annotations of several makers, each beside its images."""
    files = [f for f in sorted((test_data / "dicom_objects").rglob("*")) if f.suffix in (".dcm", ".seg")]
    sources = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
    instances = {str(ds.SOPInstanceUID) for ds in sources}
    checked = 0
    for source in sources:
        if source.Modality not in ("SEG", "SR", "RTSTRUCT", "RTPLAN", "RWV", "ANN"):
            continue
        before = references(source, instances)
        try:
            out = RESEARCH.clean(source, site="A")
        except DicomError as error:
            assert error.reason == Reason.NO_PATIENT_ID
            continue
        after = references(out, {NAMES.uid(uid) for uid in instances})
        assert after == Counter({NAMES.uid(uid): times for uid, times in before.items()})
        checked += sum(before.values())
    assert checked > 100


def test_implicit_and_explicit_give_the_same(tmp_path: Path) -> None:
    """Which transfer syntax a sender chose must not decide what is kept of a segmentation."""
    explicit = segmentation(slices())
    implicit = deepcopy(explicit)
    list(elements(implicit))
    implicit.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2")
    first, second = (RESEARCH.clean(written(ds), site="A") for ds in (explicit, implicit))
    assert explicit.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert [(p, e.value) for p, e in elements(first) if e.VR != "SQ"] == [
        (p, e.value) for p, e in elements(second) if e.VR != "SQ"
    ]

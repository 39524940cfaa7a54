"""Where hospitals leave their patients in a header, each time with what a de-identification is required to do there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from radloop.testing.phi.answers import META, PREAMBLE, Action, Requirement
from radloop.testing.phi.identities import Identity
from radloop.testing.phi.objects import Kind, code, put

DATES, SEX_AND_AGE, DEVICE, INSTITUTION, DESCRIPTORS, SAFE_PRIVATE = (
    "113107", "113108", "113109", "113112", "113105", "113111",
)  # fmt: skip
FULL_DATES, UIDS, STRUCTURED = "113106", "113110", "113104"


@dataclass
class Visit:
    """What all instances of one study share.

    Attributes:
        who: the patient; day: StudyDate; accession, study_uid, frame_uid: of the study.
        previous: UIDs of instances that later objects refer to.
    """

    who: Identity
    day: date
    accession: str
    study_uid: str
    frame_uid: str
    previous: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Planting:
    """One instance while PHI is planted into it."""

    ds: Dataset
    visit: Visit
    kind: Kind
    rng: np.random.Generator
    required: list[Requirement] = field(default_factory=list)

    @property
    def who(self) -> Identity:
        """Whose instance it is."""
        return self.visit.who

    def require(
        self, action: Action, path: str, value: str = "", *, needs: Iterable[str] = (), unless: Iterable[str] = ()
    ) -> None:
        """Add a requirement."""
        self.required.append(Requirement(action, path, value, needs=frozenset(needs), unless=frozenset(unless)))

    def hide(self, path: str, text: Any, *secrets: str, unless: Iterable[str] = ()) -> None:
        """Write a text of which these secrets must go; without secrets the whole text."""
        put(self.ds, path, text)
        for secret in secrets or (str(text),):
            self.require(Action.TEXT_REMOVED, path, secret, unless=unless)

    def hide_date(self, path: str, day: date, suffix: str = "") -> None:
        """Write a date that must move or go."""
        put(self.ds, path, f"{day:%Y%m%d}{suffix}")
        self.require(Action.DATE_SHIFTED, path, f"{day:%Y%m%d}", unless=(FULL_DATES,))

    def hide_uid(self, path: str, uid: str) -> None:
        """Write a UID that must become another one, the same everywhere."""
        put(self.ds, path, uid)
        self.require(Action.UID_CHANGED, path, uid, unless=(UIDS,))
        self.require(Action.UID_CONSISTENT, path, uid)

    def chance(self, probability: float) -> bool:
        """Whether it happens this time."""
        return bool(self.rng.random() < probability)

    def comment(self) -> tuple[str, tuple[str, ...]]:
        """A sentence as people type it, and what in it identifies."""
        who, born = self.who, as_date(self.who.birth_date)
        doctor, mrn = spoken(who.referring), who.patient_id
        texts = (
            (f"Pt. {who.spoken_name}, DOB {born.month}/{born.day}/{born.year}, seen by Dr. {doctor}",
             (who.spoken_name, f"{born.month}/{born.day}/{born.year}", doctor)),
            (f"{who.spoken_name} tel {who.phone} known here since {self.visit.day.year - 8}", (who.spoken_name, who.phone)),
            (f"please call mother {spoken(who.mother)} {who.phone}; MRN {mrn}", (spoken(who.mother), who.phone, mrn)),
            (f"lives at {who.address}; e-mail {who.email}", (who.address, who.email)),
            (f"{who.other_id}; exam {self.visit.day:%d.%m.%Y} at {who.institution}",
             (who.other_id, f"{self.visit.day:%d.%m.%Y}", who.institution)),
            (f"read by {spoken(who.reader)} on {self.visit.day:%B %d, %Y}, acc. {self.visit.accession}",
             (spoken(who.reader), f"{self.visit.day:%B %d, %Y}", self.visit.accession)),
        )  # fmt: skip
        return texts[int(self.rng.integers(len(texts)))]


def plant_header(p: Planting, number: int, sop_uid: str, series_uid: str) -> None:
    """Everything an instance of any kind may hold of its patient."""
    charsets = list(p.who.charsets)
    p.ds.SpecificCharacterSet = charsets if len(charsets) > 1 else charsets[0]
    _uids(p, sop_uid, series_uid)
    _patient(p)
    _study(p, number)
    _equipment(p)
    _descriptions(p)
    _sequences(p)
    _private(p)
    _of_its_kind(p)


def _uids(p: Planting, sop_uid: str, series_uid: str) -> None:
    p.hide_uid("SOPInstanceUID", sop_uid)
    p.hide_uid("StudyInstanceUID", p.visit.study_uid)
    p.hide_uid("SeriesInstanceUID", series_uid)
    for path in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        p.require(Action.TEXT_NOTNULL, path)
    if p.kind.modality in ("CT", "MR", "PT", "SEG", "RTSTRUCT"):
        p.hide_uid("FrameOfReferenceUID", p.visit.frame_uid)
        p.require(Action.TEXT_NOTNULL, "FrameOfReferenceUID")
    if p.kind.modality in ("CT", "MR", "PT"):
        p.ds.PositionReferenceIndicator = "SN"  # the sternal notch
        p.require(Action.TEXT_RETAINED, "PositionReferenceIndicator", "SN")


def _patient(p: Planting) -> None:
    ds, who, born = p.ds, p.who, as_date(p.who.birth_date)
    p.hide("PatientName", who.patient_name, *words_of(who.patient_name))
    p.hide("PatientID", who.patient_id)
    p.require(Action.PATID_CONSISTENT, "PatientID", who.patient_id)
    p.hide_date("PatientBirthDate", born)
    for path in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"):
        p.require(Action.TAG_RETAINED, path)
    ds.PatientSex = who.sex
    p.require(Action.TEXT_RETAINED, "PatientSex", who.sex, needs=(SEX_AND_AGE,))
    p.require(Action.TEXT_REMOVED, "PatientSex", who.sex, unless=(SEX_AND_AGE,))
    years = (p.visit.day - born).days // 366
    ds.PatientAge = f"{years:03d}Y"
    if years > 90:
        p.require(Action.TEXT_REMOVED, "PatientAge", ds.PatientAge)
    elif years < 90:
        p.require(Action.TEXT_RETAINED, "PatientAge", ds.PatientAge, needs=(SEX_AND_AGE,))
        p.require(Action.TEXT_REMOVED, "PatientAge", ds.PatientAge, unless=(SEX_AND_AGE,))
    for keyword, value in (("PatientSize", "1.71"), ("PatientWeight", "68.5")):
        setattr(ds, keyword, value)
        p.require(Action.TEXT_RETAINED, keyword, value, needs=(SEX_AND_AGE,))
        p.require(Action.TEXT_REMOVED, keyword, value, unless=(SEX_AND_AGE,))
    if who.issuer:
        p.hide("IssuerOfPatientID", who.issuer)
    often = {
        "PatientAddress": who.address, "PatientTelephoneNumbers": who.phone,
        "PatientTelecomInformation": who.email, "Occupation": who.occupation, "PatientBirthName": who.birth_name,
        "PatientMotherBirthName": who.mother, "OtherPatientNames": who.mother, "RegionOfResidence": who.city,
        "MilitaryRank": "Bandmaster", "BranchOfService": "Lighthouse Board", "PatientReligiousPreference": "Pastafarian",
        "ResponsiblePerson": who.mother, "ResponsibleOrganization": who.institution, "InsurancePlanIdentification": who.other_id,
        "MedicalRecordLocator": who.other_id, "AdmissionID": f"ADM{who.other_id[-6:]}", "CurrentPatientLocation": who.department,
        "Allergies": f"bees, says {spoken(who.mother)}", "MedicalAlerts": f"ask {spoken(who.referring)}",
    }  # fmt: skip
    for keyword, value in often.items():
        if value and p.chance(0.5):
            p.hide(keyword, value)


def _study(p: Planting, number: int) -> None:
    ds, who, day = p.ds, p.who, p.visit.day
    for keyword in ("StudyDate", "SeriesDate", "ContentDate", "AcquisitionDate"):
        if keyword != "AcquisitionDate" or p.kind.rows:
            p.hide_date(keyword, day + timedelta(days=keyword == "ContentDate" and p.chance(0.2)))
    p.require(Action.TEXT_NOTNULL, "StudyDate", needs=(DATES, FULL_DATES))
    p.hide_date("InstanceCreationDate", day)
    p.hide_date("PerformedProcedureStepStartDate", day)
    if p.kind.modality in ("CT", "MR", "PT"):
        p.hide_date("AcquisitionDateTime", day, "101512.25")
    ds.StudyTime, ds.SeriesTime, ds.ContentTime = "101500", "101510", "101511.500000"
    ds.SeriesNumber, ds.InstanceNumber = "3", str(number)
    p.require(Action.TEXT_RETAINED, "InstanceNumber", str(number))
    p.hide("AccessionNumber", p.visit.accession)
    p.hide("StudyID", p.visit.accession[-6:])
    p.hide("ReferringPhysicianName", who.referring, *words_of(who.referring))
    for path in ("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName", "SeriesNumber"):
        p.require(Action.TAG_RETAINED, path)
    p.hide("NameOfPhysiciansReadingStudy", who.reader, *words_of(who.reader))
    p.hide("PerformingPhysicianName", who.performing, *words_of(who.performing))
    p.hide("OperatorsName", [who.operator, who.reader], *words_of(who.operator), *words_of(who.reader))
    p.hide("RequestingService", who.department)
    p.hide("PerformedProcedureStepID", f"PPS{p.visit.accession[-6:]}")


def _equipment(p: Planting) -> None:
    ds, who = p.ds, p.who
    p.hide("InstitutionName", who.institution, unless=(INSTITUTION,))
    p.hide("InstitutionAddress", who.address, unless=(INSTITUTION,))
    p.hide("InstitutionalDepartmentName", who.department, unless=(INSTITUTION,))
    p.hide("StationName", who.station, unless=(DEVICE,))
    p.hide("DeviceSerialNumber", who.device_serial, unless=(DEVICE,))
    p.require(Action.TEXT_RETAINED, "DeviceSerialNumber", who.device_serial, needs=(DEVICE,))
    p.require(Action.TEXT_RETAINED, "InstitutionName", who.institution, needs=(INSTITUTION,))
    if p.chance(0.15):  # an owner's name scratched into the device, as consoles allow
        ds.DeviceSerialNumber = f"{spoken(who.operator)}"
        p.required[:] = [r for r in p.required if r.path != "DeviceSerialNumber"]
        p.require(Action.TEXT_REMOVED, "DeviceSerialNumber", spoken(who.operator), unless=(DEVICE,))
    ds.file_meta.SourceApplicationEntityTitle = f"AE{who.station}"
    p.require(Action.TEXT_REMOVED, META, f"AE{who.station}")
    if p.chance(0.3):
        ds.file_meta.PrivateInformationCreatorUID = UID("1.2.826.0.1.3680043.9.7777")
        ds.file_meta.PrivateInformation = f"{who.spoken_name} {who.patient_id} ".encode()
        p.require(Action.TEXT_REMOVED, META, who.patient_id)
    ds.preamble = b"\0" * 128
    if p.chance(0.2):
        ds.preamble = f"{who.patient_id}/{who.birth_date}".encode("ascii").ljust(128, b"\0")
        p.require(Action.TEXT_REMOVED, PREAMBLE, who.patient_id)


def _descriptions(p: Planting) -> None:
    """Texts that say what was done, half of them with somebody's name in it."""
    who = p.who
    intruders = (who.spoken_name, f"Dr. {spoken(who.referring)}", who.patient_id, who.phone, p.visit.accession)
    for path, text in p.kind.descriptors.items():
        p.require(Action.TEXT_RETAINED, path, text, needs=(DESCRIPTORS,))
        if p.chance(0.5):
            who_else = intruders[int(p.rng.integers(len(intruders)))]
            p.hide(path, f"{text} {who_else}"[:64], who_else.removeprefix("Dr. "))
    for path in ("ImageComments", "PatientComments", "AdditionalPatientHistory", "StudyComments",
                 "AcquisitionComments", "RequestedProcedureComments", "ReasonForStudy",
                 "AdmittingDiagnosesDescription", "VisitComments", "InterpretationText"):  # fmt: skip
        if p.chance(0.35):
            text, secrets = p.comment()
            p.hide(
                path,
                text[:64] if path in _SHORT else text,
                *(s for s in secrets if path not in _SHORT or s in text[:64]),
            )
    p.hide("RequestedProcedureDescription", f"{who.birth_date} {who.spoken_name}"[:64], who.birth_date, who.spoken_name)
    if p.kind.rows and p.chance(0.4):
        p.hide(
            "DerivationDescription",
            f"for {who.spoken_name} by {spoken(who.operator)}",
            who.spoken_name,
            spoken(who.operator),
        )


_SHORT = frozenset({"ReasonForStudy", "AdmittingDiagnosesDescription"})  # LO: 64 characters


def _sequences(p: Planting) -> None:
    ds, who, visit = p.ds, p.who, p.visit
    request = "RequestAttributesSequence[0]."
    p.hide(request + "RequestedProcedureID", f"RP{visit.accession[-6:]}")
    p.hide(request + "ScheduledProcedureStepID", f"SPS{visit.accession[-6:]}")
    p.hide(request + "ScheduledProcedureStepDescription", f"for {who.spoken_name}"[:64], who.spoken_name)
    p.hide(request + "RequestedProcedureDescription", spoken(who.referring))
    step = request + "ScheduledProtocolCodeSequence[0]."
    put(ds, step + "CodeValue", "P1")
    put(ds, step + "CodingSchemeDesignator", "99HOSPITAL")
    p.hide(step + "CodeMeaning", who.spoken_name)
    context = step + "ProtocolContextSequence[0]."
    put(ds, context + "ValueType", "TEXT")
    text, secrets = p.comment()
    p.hide(context + "TextValue", text, *secrets)
    doctor = "ReferringPhysicianIdentificationSequence[0]."
    p.hide(doctor + "InstitutionName", who.institution, unless=(INSTITUTION,))
    p.hide(doctor + "PersonTelephoneNumbers", who.phone)
    p.hide(doctor + "PersonAddress", who.address)
    p.hide(doctor + "PersonIdentificationCodeSequence[0].CodeValue", who.device_serial)
    p.hide(doctor + "PersonIdentificationCodeSequence[0].CodeMeaning", spoken(who.referring))
    put(ds, doctor + "PersonIdentificationCodeSequence[0].CodingSchemeDesignator", "99STAFF")
    other = "OtherPatientIDsSequence[0]."
    p.hide(other + "PatientID", who.other_id)
    p.hide(other + "IssuerOfPatientID", who.institution)
    p.hide_uid("ReferencedStudySequence[0].ReferencedSOPInstanceUID", visit.study_uid)
    p.hide_uid("ReferencedPerformedProcedureStepSequence[0].ReferencedSOPInstanceUID", visit.study_uid + ".7")
    p.hide("ContributingEquipmentSequence[0].InstitutionName", who.institution, unless=(INSTITUTION,))
    p.hide("ContributingEquipmentSequence[0].StationName", who.station, unless=(DEVICE,))
    put(ds, "ContributingEquipmentSequence[0].Manufacturer", "Merge Healthcare")
    before = "OriginalAttributesSequence[0].ModifiedAttributesSequence[0]."
    put(ds, before + "SpecificCharacterSet", "ISO_IR 192")
    p.hide(before + "PatientName", who.birth_name)
    p.hide(before + "PatientID", who.other_id)
    p.hide("OriginalAttributesSequence[0].ModifyingSystem", who.station)
    ds.ProcedureCodeSequence = Sequence([code("CTABD", "99RIS", f"{spoken(who.reader)}"[:64])])
    p.require(Action.TEXT_REMOVED, "ProcedureCodeSequence[0].CodeMeaning", spoken(who.reader))
    for number, (sop_class, uid) in enumerate(visit.previous[-2:]):
        if p.kind.rows:
            path = f"SourceImageSequence[{number}]."
            put(ds, path + "ReferencedSOPClassUID", sop_class)
            p.hide_uid(path + "ReferencedSOPInstanceUID", uid)


def _private(p: Planting) -> None:
    ds, who = p.ds, p.who
    for group, creator, element, _, value in p.kind.private:
        first = value[0] if isinstance(value, list) else value
        p.require(Action.TEXT_RETAINED, private(group, element, creator), str(first), needs=(SAFE_PRIVATE,))
    block = ds.private_block(0x0011, "ACME WARD 1.1", create=True)
    block.add_new(0x01, "LO", who.patient_id)
    block.add_new(0x02, "PN", who.patient_name)
    block.add_new(0x03, "UN", who.spoken_name.encode("utf-8"))
    block.add_new(0x05, "UN", b"\1\0\0\7" + f"{who.patient_id}|{who.birth_date}".encode("utf-16-le"))
    inner = Dataset()
    inner.PatientName, inner.PatientComments = who.patient_name, p.comment()[0]
    block.add_new(0x04, "SQ", Sequence([inner]))
    secrets = {1: who.patient_id, 2: words_of(who.patient_name)[0], 3: who.spoken_name, 4: "", 5: who.patient_id}
    for element, secret in secrets.items():
        p.require(Action.TEXT_REMOVED, private(0x11, element, "ACME WARD 1.1"), secret)
    if p.kind.modality == "MR" and "SIEMENS" in str(ds.Manufacturer):
        header = f"SV10\4\3\2\1PatientName\0{who.patient_id}\0tPatientBirthDate {who.birth_date}".encode("ascii")
        ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x20, "OB", header.ljust(256, b"\0"))
        p.require(Action.TEXT_REMOVED, private(0x29, 0x20, "SIEMENS CSA HEADER"), who.patient_id)
    if p.kind.modality == "CT":
        ds.private_block(0x0009, "GEMS_IDEN_01", create=True).add_new(0x02, "SH", who.station)
        p.require(Action.TEXT_REMOVED, private(0x09, 0x02, "GEMS_IDEN_01"), who.station)
    if p.kind.modality == "MR" and "Philips" in str(ds.Manufacturer):  # a safe block with an unsafe element
        ds.private_block(0x2001, "Philips Imaging DD 001").add_new(0xC8, "LO", spoken(who.operator))
        p.require(Action.TEXT_REMOVED, private(0x2001, 0xC8, "Philips Imaging DD 001"), spoken(who.operator))


def _of_its_kind(p: Planting) -> None:
    who, plants = p.who, {
        "SEG": _segmentation, "RTSTRUCT": _structures, "SR": _report,
    }.get(p.kind.modality)  # fmt: skip
    if plants is not None:
        plants(p)
    elif p.kind.modality == "PT":
        p.hide(
            "RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime", f"{p.visit.day:%Y%m%d}0915"
        )
        p.require(Action.TEXT_RETAINED, "RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose", "370000000")
        p.require(Action.TEXT_RETAINED, "RadiopharmaceuticalInformationSequence[0].Radiopharmaceutical", "FDG")
    elif p.kind.modality in ("DX", "MG"):
        p.require(Action.TEXT_RETAINED, "AnatomicRegionSequence[0].CodeValue", "51185008")
        p.hide("DetectorID", who.device_serial, unless=(DEVICE,))
    elif p.kind.modality == "CR":
        p.hide("PlateID", who.device_serial, unless=(DEVICE,))
        p.hide("CassetteID", who.station, unless=(DEVICE,))


def _segmentation(p: Planting) -> None:
    who = p.who
    p.hide("ContentCreatorName", who.reader, *words_of(who.reader))
    p.require(Action.TAG_RETAINED, "ContentCreatorName")
    p.hide("ContentDescription", f"liver of {who.spoken_name}"[:64], who.spoken_name)
    p.hide("SegmentSequence[0].SegmentDescription", f"drawn by {spoken(who.reader)}", spoken(who.reader))
    p.require(Action.TEXT_NOTNULL, "SegmentSequence[0].SegmentLabel")
    p.require(Action.TEXT_RETAINED, "SegmentSequence[0].SegmentLabel", "Segment 1", needs=(DESCRIPTORS,))
    for number, (sop_class, uid) in enumerate(p.visit.previous[-2:]):
        path = f"ReferencedSeriesSequence[0].ReferencedInstanceSequence[{number}]."
        put(p.ds, path + "ReferencedSOPClassUID", sop_class)
        p.hide_uid(path + "ReferencedSOPInstanceUID", uid)


def _structures(p: Planting) -> None:
    who = p.who
    p.hide("StructureSetLabel", f"PLAN {who.patient_id}"[:16], who.patient_id)
    p.require(Action.TEXT_NOTNULL, "StructureSetLabel")
    p.hide("StructureSetName", f"{who.spoken_name}")
    p.hide_date("StructureSetDate", p.visit.day)
    p.hide("ReviewerName", who.reader, *words_of(who.reader))
    p.hide("RTROIObservationsSequence[0].ROIInterpreter", who.reader, *words_of(who.reader))
    p.require(Action.TAG_RETAINED, "RTROIObservationsSequence[0].ROIInterpreter")
    p.hide(
        "RTROIObservationsSequence[0].ROIObservationDescription",
        f"asked {spoken(who.referring)}",
        spoken(who.referring),
    )
    p.require(Action.TAG_RETAINED, "StructureSetROISequence[0].ROIName")
    p.hide_uid("StructureSetROISequence[0].ReferencedFrameOfReferenceUID", p.visit.frame_uid)
    for number, (sop_class, uid) in enumerate(p.visit.previous[-1:]):
        path = f"ROIContourSequence[0].ContourSequence[0].ContourImageSequence[{number}]."
        put(p.ds, path + "ReferencedSOPClassUID", sop_class)
        p.hide_uid(path + "ReferencedSOPInstanceUID", uid)


def _report(p: Planting) -> None:
    """Content items; without clean-structured-content a report may be refused as a whole."""
    who, ds = p.who, p.ds
    text, secrets = p.comment()
    findings = "ContentSequence[0]."
    put(ds, findings + "RelationshipType", "CONTAINS")
    put(ds, findings + "ValueType", "TEXT")
    p.hide(findings + "TextValue", f"Findings: {text}", *secrets)
    observer = "ContentSequence[2]."
    put(ds, observer + "RelationshipType", "HAS OBS CONTEXT")
    put(ds, observer + "ValueType", "PNAME")
    p.hide(observer + "PersonName", who.reader, *words_of(who.reader))
    p.hide("VerifyingObserverSequence[0].VerifyingObserverName", who.reader, *words_of(who.reader))
    p.hide("VerifyingObserverSequence[0].VerifyingOrganization", who.institution)
    for number in (0, 2):
        ds.ContentSequence[number].ConceptNameCodeSequence = Sequence([code("121071", "DCM", "Finding")])
    for number, (sop_class, uid) in enumerate(p.visit.previous[-1:]):
        path = "CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence"
        put(ds, f"{path}[{number}].ReferencedSOPClassUID", sop_class)
        p.hide_uid(f"{path}[{number}].ReferencedSOPInstanceUID", uid)
        p.hide_uid("CurrentRequestedProcedureEvidenceSequence[0].StudyInstanceUID", p.visit.study_uid)


def require_kept(p: Planting) -> None:
    """What says nothing about a person and is needed: it stays, to the letter. Called when the pixels are encoded."""
    for path, value in p.kind.kept.items():
        if path in ("BurnedInAnnotation", "FrameIncrementPointer"):
            continue
        if path in ("PhotometricInterpretation", "LossyImageCompression"):
            value = str(p.ds.get(path))
        for text in map(str, value if isinstance(value, list) else [value]):
            p.require(Action.TEXT_RETAINED, path, text)
    for path in ("Modality", "SOPClassUID"):
        p.require(Action.TEXT_RETAINED, path, str(p.ds.get(path)))
    if p.kind.rows:
        for path in ("Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation"):
            p.require(Action.TEXT_RETAINED, path, str(p.ds.get(path)))


# ---- writing names


def private(group: int, element: int, creator: str) -> str:
    """The path of a private element, whatever block its creator has."""
    return f"({group:04X},{element:02X} {creator})"


def spoken(name: str) -> str:
    """A PN as one says it: given name first, of the native script where there is one."""
    family, given = (name.split("=")[1:2] or [name])[0].split("^")[:2]
    return f"{given} {family}"


def words_of(name: str) -> tuple[str, ...]:
    """The words of a PN, of all component groups, that are long enough to be anybody."""
    return tuple(
        dict.fromkeys(w for w in name.replace("=", "^").replace(" ", "^").split("^") if len(w) > 1 and w != "Mrs")
    )


def as_date(text: str) -> date:
    """A DA as a date."""
    return date(int(text[:4]), int(text[4:6]), int(text[6:]))

"""A simulated hospital: patients who come back, two sites with scanners of their own, and the files nobody wants.

`make_hospital` draws one site from a seed and writes real CR or DX instances with identifying headers, labels keyed by
AccessionNumber, and the truth about every file, which tests compare with what radloop made of it.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from radloop.testing import phantoms
from radloop.testing.phi import Identity, identity, plant

Site = Literal["A", "B"]
Progress = Callable[[int, int], None]

SIZES: dict[str, dict[Site, tuple[int, int]]] = {
    "full": {"A": (420, 210), "B": (200, 100)},
    "small": {"A": (84, 44), "B": (36, 20)},
}
"""(images, patients) of each site; broken files come on top."""

CONSPICUITY = {"full": 1.0, "small": 2.0}
"""The small size has too few images to learn a subtle finding from."""

PREVALENCE = 0.45
RETURNING = 0.4
_SYNTAXES: dict[Site, tuple[tuple[str, float], ...]] = {
    "A": ((ExplicitVRLittleEndian, 0.7), (RLELossless, 0.2), (ImplicitVRLittleEndian, 0.1)),
    "B": ((ExplicitVRLittleEndian, 0.6), (JPEGLSLossless, 0.4)),
}
_AGES: dict[Site, tuple[float, float]] = {"A": (60.0, 17.0), "B": (41.0, 13.0)}
_SOP_CLASSES = {"CR": ComputedRadiographyImageStorage, "DX": DigitalXRayImageStorageForPresentation}


@dataclass(frozen=True)
class Sent:
    """One file and what must become of it. Identifiers are the original ones.

    Attributes:
        kind: "good", or what is wrong with it (the keys of `_BROKEN`).
        outcome: what landing must say: new, same, revision, conflict or quarantined.
        reasons: the quarantine reasons any of which is right; empty if it belongs into a dataset.
        either: SOPInstanceUID of a twin: exactly one of the two is refused, for `reasons`.
        sendable: C-STORE can carry it; others come by folder only.
    """

    path: Path
    kind: str
    sop_uid: str
    study_uid: str
    patient_id: str
    accession: str
    label: int
    outcome: str = "new"
    reasons: frozenset[str] = frozenset()
    either: str | None = None
    sendable: bool = True


@dataclass(frozen=True)
class Hospital:
    """What `make_hospital` wrote. Originals stand before their copies in `sent`: send them in that order."""

    site: Site
    images: Path
    labels: Path
    sent: tuple[Sent, ...]

    @property
    def files(self) -> list[Path]:
        """All files, in the order in which to send them."""
        return [one.path for one in self.sent]

    @property
    def good(self) -> list[Sent]:
        """The instances that belong into a dataset without any question."""
        return [one for one in self.sent if not one.reasons and one.outcome == "new" and one.either is None]


@dataclass(frozen=True)
class _Exposure:
    """All that is decided about an image before it is drawn."""

    seed: tuple[int, ...]
    site: Site
    number: int
    patient: int
    who: Identity
    study_uid: str
    series_uid: str
    sop_uid: str
    accession: str
    day: date
    age_years: int
    view: str
    instance: int
    finding: bool
    syntax: str
    conspicuity: float = 1.0


def make_hospital(
    folder: Path,
    *,
    patients: int,
    images: int,
    site: Site,
    seed: int,
    broken: bool = True,
    conspicuity: float = 1.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Hospital:
    """Draw one site and write it: `folder/images/...` and, apart from them, `folder/labels.csv`.

    About 40 % of the patients have several studies, whose findings may differ; some studies have two images. The
    finding is independent of patient, view, age, sex, scanner and transfer syntax.

    Args:
        folder: empty or new.
        patients: how many; at most `images`.
        images: how many good instances.
        site: "A" (CR, 12 bits, MONOCHROME2) or "B" (DX, 14 bits, MONOCHROME1, another look and younger patients).
        seed: the same seed gives the same patients, studies and pixels.
        broken: add what a modality and a PACS get wrong: see `Sent.kind`.
        conspicuity: of the finding; 1 is subtle.
        workers: processes that draw.
        progress: called with (done, total).
    """
    least = (2, 24) if broken else (1, 1)
    if not least[0] <= patients <= images >= least[1]:
        raise ValueError(f"at least {least} patients and images expected, got {patients} and {images}")
    target = folder / "images"
    planned = [replace(one, conspicuity=conspicuity) for one in _planned(patients, images, site, seed)]
    draw = partial(_write, target)
    sent: list[Sent] = []
    for one in _mapped(draw, planned, workers):
        sent.append(one)
        if progress is not None:
            progress(len(sent), len(planned))
    labels = {one.accession: one.label for one in sent}
    if broken:
        sent = _with_broken(target, sent, planned, copies=max(1, images // 200))
    path = folder / "labels.csv"
    _write_labels(path, labels)
    return Hospital(site, target, path, tuple(sent))


def demo_hospitals(
    folder: Path, size: str, *, seed: int = 1, workers: int = 1, progress: Progress | None = None
) -> dict[Site, Hospital]:
    """Both sites in a size of `SIZES`, under `folder/A` and `folder/B`; progress counts over both."""
    total = sum(images for images, _ in SIZES[size].values())
    hospitals: dict[Site, Hospital] = {}
    before = 0
    for site, (images, patients) in SIZES[size].items():

        def step(done: int, _: int, offset: int = before) -> None:
            if progress is not None:
                progress(offset + done, total)

        hospitals[site] = make_hospital(
            folder / site, patients=patients, images=images, site=site, seed=seed, workers=workers, progress=step,
            conspicuity=CONSPICUITY[size],
        )  # fmt: skip
        before += images
    return hospitals


def clinic(hospital: Hospital, *, limit: int | None = None) -> Iterator[tuple[bytes, str]]:
    """(DICOM bytes, site) of its good instances, as a PACS would hand them to a predictor."""
    for one in hospital.good[:limit]:
        yield one.path.read_bytes(), hospital.site


def labels_csv(hospitals: Iterable[Hospital], target: Path) -> Path:
    """The labels of several hospitals in one CSV (AccessionNumber, label), for when they arrive late."""
    rows: dict[str, int] = {}
    for hospital in hospitals:
        with hospital.labels.open(newline="") as file:
            rows.update((row["AccessionNumber"], int(row["label"])) for row in csv.DictReader(file))
    _write_labels(target, rows)
    return target


def _write_labels(path: Path, labels: dict[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("AccessionNumber", "label"))
        writer.writerows(sorted(labels.items()))


def _mapped(draw: Callable[[_Exposure], Sent], planned: Sequence[_Exposure], workers: int) -> Iterator[Sent]:
    if workers <= 1:
        yield from map(draw, planned)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(draw, planned, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


# What happens when, to whom


def _planned(patients: int, images: int, site: Site, seed: int) -> list[_Exposure]:
    """Everything that is decided before an image is drawn, in the order of time."""
    root = (seed, ord(site))
    rng = np.random.default_rng(root)
    counts = _images_of_patients(patients, images, rng)
    exposures: list[_Exposure] = []
    for patient, count in enumerate(counts):
        who, born = _person(site, seed, patient, rng)
        day = date(2023 if site == "A" else 2025, 1, 1) + timedelta(days=int(rng.integers(300)))
        while count > 0:
            pair = min(count, 2 if rng.random() < 0.12 else 1)
            exposures += _study(site, root, patient, who, born, day, pair, rng)
            day += timedelta(days=int(rng.integers(20, 300)))
            count -= pair
    exposures.sort(key=lambda one: (one.day, one.accession, one.instance))
    studies = list(dict.fromkeys(one.accession for one in exposures))
    ill = set(rng.permutation(studies)[: round(PREVALENCE * len(studies))].tolist())
    return [replace(one, number=i, finding=one.accession in ill) for i, one in enumerate(exposures)]


def _images_of_patients(patients: int, images: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many images each patient has: one, and more for the share `RETURNING`."""
    counts = np.ones(patients, dtype=np.int64)
    returning = rng.permutation(patients)[: max(1, round(RETURNING * patients))]
    extra = images - patients
    counts[returning] += extra // returning.size
    counts[rng.permutation(returning)[: extra % returning.size]] += 1
    return counts


def _person(site: Site, seed: int, patient: int, rng: np.random.Generator) -> tuple[Identity, date]:
    """An identity with the site's age distribution, and the date of birth."""
    mean, spread = _AGES[site]
    age = float(np.clip(rng.normal(mean, spread), 18, 97))
    born = date(2024, 7, 1) - timedelta(days=int(age * 365.25))
    sex = "F" if rng.random() < 0.5 else "M"
    someone = identity(seed * 10_000 + (0 if site == "A" else 5_000) + patient)
    return replace(someone, birth_date=born.strftime("%Y%m%d"), sex=sex), born


def _study(
    site: Site,
    root: tuple[int, ...],
    patient: int,
    who: Identity,
    born: date,
    day: date,
    images: int,
    rng: np.random.Generator,
) -> list[_Exposure]:
    """One study of one or two images."""
    age = (day - born).days * 100 // 36525
    accession = f"{site}{day:%y}{int(rng.integers(10**7)):07d}"
    name = [*map(str, root), str(patient), accession]
    study, series = generate_uid(entropy_srcs=[*name, "study"]), generate_uid(entropy_srcs=[*name, "series"])
    view = "AP" if rng.random() < 0.2 else "PA"
    names, weights = zip(*_SYNTAXES[site], strict=True)
    return [
        _Exposure(
            seed=root,
            site=site,
            number=0,
            patient=patient,
            who=replace(who, age=f"{min(age, 130):03d}Y"),
            study_uid=study,
            series_uid=series,
            sop_uid=generate_uid(entropy_srcs=[*name, str(i)]),
            accession=accession,
            day=day,
            age_years=age,
            view=view,
            instance=i + 1,
            finding=False,
            syntax=str(rng.choice(names, p=weights)),
        )
        for i in range(images)
    ]


# The images as DICOM


def _pixels(one: _Exposure) -> NDArray[np.uint16]:
    """Anatomy from the patient's seed, everything else from the image's."""
    body_rng = np.random.default_rng((*one.seed, one.patient))
    body = phantoms.anatomy(body_rng, sex=one.who.sex, age_years=one.age_years)
    rng = np.random.default_rng((*one.seed, one.patient, int(one.sop_uid[-9:])))
    return phantoms.radiograph(body, phantoms.SCANNERS[one.site], rng, finding=one.finding, conspicuity=one.conspicuity)


def _write(folder: Path, one: _Exposure) -> Sent:
    """Draw one image and write it as a hospital files it. Runs in a worker."""
    ds = _dataset(one, _pixels(one))
    path = folder / one.who.patient_id / one.accession / f"IM{one.number:05d}.dcm"
    _save(ds, path, one.syntax)
    return _sent(one, path, "good")


def _sent(one: _Exposure, path: Path, kind: str) -> Sent:
    return Sent(path, kind, one.sop_uid, one.study_uid, one.who.patient_id, one.accession, int(one.finding))


def _save(ds: Dataset, path: Path, syntax: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == RLELossless:
        ds.compress(RLELossless, encoding_plugin="gdcm", generate_instance_uid=False)
    elif syntax == JPEGLSLossless:
        ds.compress(JPEGLSLossless, encoding_plugin="pyjpegls", generate_instance_uid=False)
    else:
        ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.save_as(path, enforce_file_format=True)


def _dataset(one: _Exposure, pixels: NDArray[np.uint16]) -> Dataset:
    """A CR or DX instance with every mandatory attribute of its IOD (PS3.3 A.2, A.26), and somebody's identity."""
    scanner = phantoms.SCANNERS[one.site]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = _SOP_CLASSES[scanner.modality], one.sop_uid
    ds.file_meta.MediaStorageSOPClassUID = UID(ds.SOPClassUID)
    ds.file_meta.MediaStorageSOPInstanceUID = UID(one.sop_uid)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.AccessionNumber = one.study_uid, one.series_uid, one.accession
    day, clock = one.day.strftime("%Y%m%d"), f"{8 + one.number % 9:02d}{one.number % 60:02d}{one.instance:02d}"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = clock
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = scanner.modality, scanner.manufacturer, scanner.model_name
    ds.SoftwareVersions = "4.2.1"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 1, one.instance, one.instance
    ds.BodyPartExamined, ds.ViewPosition = "CHEST", one.view
    ds.PatientOrientation, ds.Laterality = ["L", "F"], ""
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.ImagerPixelSpacing = [scanner.spacing_mm, scanner.spacing_mm]
    _add_pixels(ds, pixels, scanner)
    if scanner.modality == "DX":
        _add_dx(ds, one)
    else:
        ds.PlateType, ds.KVP, ds.ExposureTime = "PHOSPHOR", "117", "12"
    plant(ds, one.who, np.random.default_rng((*one.seed, one.patient, int(one.sop_uid[-9:]), 1)))
    return ds


def _add_pixels(ds: Dataset, pixels: NDArray[np.uint16], scanner: phantoms.Scanner) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, scanner.photometric
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, scanner.bits_stored, scanner.bits_stored - 1
    ds.PixelRepresentation = 0
    ds.WindowCenter, ds.WindowWidth = 1 << (scanner.bits_stored - 1), 1 << scanner.bits_stored
    ds.PixelData = np.ascontiguousarray(pixels, dtype="<u2").tobytes()


def _add_dx(ds: Dataset, one: _Exposure) -> None:
    """What DX asks for beyond CR: presentation intent, anatomy, detector, grey scale (PS3.3 C.8.11)."""
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
    ds.AnatomicRegionSequence = [region]
    ds.PresentationIntentType, ds.ImageLaterality = "FOR PRESENTATION", "U"
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PresentationLUTShape = "INVERSE"
    ds.DetectorType, ds.DetectorConfiguration = "SCINTILLATOR", "AREA"
    ds.DetectorDescription, ds.DetectorID = "CsI flat panel", one.who.device_serial
    ds.AcquisitionContextSequence = []
    ds.KVP, ds.ExposureTime = "125", "6"


# What goes wrong

_BROKEN = (
    "truncated",
    "not_dicom",
    "no_pixels",
    "empty",
    "saturated",
    "placeholder",
    "screenshot",
    "burned_in",
    "resent",
    "same_pixels",
    "other_patient",
    "conflict",
    "corrected",
)


def _with_broken(target: Path, sent: list[Sent], planned: Sequence[_Exposure], *, copies: int) -> list[Sent]:
    """Add each kind of `_BROKEN` `copies` times, each at the cost of another good image's study."""
    out = list(sent)
    rng = np.random.default_rng((*planned[0].seed, 99))
    victims = iter(rng.permutation(len(planned)).tolist() * (len(_BROKEN) * copies))
    for number in range(copies):
        for kind in _BROKEN:
            at = next(victims)
            one = planned[at]
            path = target / one.who.patient_id / one.accession / f"{kind.upper()}{number}.dcm"
            if kind in ("resent", "same_pixels", "conflict", "corrected"):
                out.append(_copied(kind, one, sent[at].path, path))
                if kind == "same_pixels":
                    out[at] = replace(out[at], reasons=out[-1].reasons, either=out[-1].sop_uid)
            elif kind == "other_patient":
                other = next(i for i in victims if planned[i].patient != one.patient)
                out.append(_misfiled(one, planned[other].who, path))
                out[at] = replace(out[at], reasons=out[-1].reasons)
            else:
                out.append(_spoilt(kind, one, path))
    return out


def _copied(kind: str, one: _Exposure, source: Path, path: Path) -> Sent:
    """An instance that shares UID or pixels with one that was sent before."""
    sent = _sent(one, path, kind)
    if kind == "conflict":  # a modality that numbers its images anew after each start
        other = replace(one, sop_uid=generate_uid(entropy_srcs=[one.sop_uid, kind]))
        _save(_dataset(one, _pixels(other)), path, ExplicitVRLittleEndian)
        return replace(sent, outcome="conflict", reasons=frozenset({"UID_CONFLICT"}))
    ds = pydicom.dcmread(source)
    if kind == "resent":  # a modality repeats what it thinks was lost, byte for byte
        path.write_bytes(source.read_bytes())
        return replace(sent, outcome="same")
    if kind == "corrected":  # a PACS coerces and corrects headers
        ds.StudyDescription = "Chest, corrected"
        ds.save_as(path)
        return replace(sent, outcome="revision")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[one.sop_uid, kind])
    ds.save_as(path)
    return replace(sent, sop_uid=ds.SOPInstanceUID, reasons=frozenset({"DUPLICATE_PIXELS"}), either=one.sop_uid)


def _misfiled(one: _Exposure, who: Identity, path: Path) -> Sent:
    """One patient's image once more, under another patient: somebody stood before the wrong worklist entry."""
    study, series, image = (
        generate_uid(entropy_srcs=[uid, "other"]) for uid in (one.study_uid, one.series_uid, one.sop_uid)
    )
    accession = one.accession[:-1] + "X"
    moved = replace(one, who=who, study_uid=study, series_uid=series, sop_uid=image, accession=accession)
    _save(_dataset(moved, _pixels(one)), path, ExplicitVRLittleEndian)
    return replace(_sent(moved, path, "other_patient"), reasons=frozenset({"DUPLICATE_PIXELS_ACROSS_PATIENTS"}))


def _spoilt(kind: str, one: _Exposure, path: Path) -> Sent:
    """A new instance of a patient's study that must not reach a dataset."""
    one = replace(one, sop_uid=generate_uid(entropy_srcs=[one.sop_uid, kind]), instance=one.instance + 10)
    sent = _sent(one, path, kind)
    if kind == "not_dicom":
        path.write_bytes(b"Export of PACS, 3 of 7\r\n" * 50)
        return replace(sent, outcome="quarantined", reasons=frozenset({"NOT_DICOM"}), sendable=False)
    pixels = _pixels(one)
    top = (1 << phantoms.SCANNERS[one.site].bits_stored) - 1
    inverted = phantoms.SCANNERS[one.site].photometric == "MONOCHROME1"
    if kind == "empty":
        pixels[:] = top // 8
    if kind == "saturated":
        pixels[: int(0.7 * len(pixels))] = 0 if inverted else top
    ds = _dataset(one, pixels)
    if kind == "placeholder":
        ds.PatientID = "UNKNOWN"
    if kind == "burned_in":
        ds.BurnedInAnnotation = "YES"
    if kind == "no_pixels":
        del ds.PixelData
    if kind == "screenshot":
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        ds.Modality, ds.ConversionType = "OT", "WSD"
    _save(ds, path, ExplicitVRLittleEndian)
    if kind == "truncated":
        os.truncate(path, int(0.6 * path.stat().st_size))
    outcome, reasons = _FATE[kind]
    patient_id = "UNKNOWN" if kind == "placeholder" else sent.patient_id
    return replace(sent, outcome=outcome, reasons=frozenset(reasons.split()), patient_id=patient_id)


_FATE = {
    "truncated": ("quarantined", "TRUNCATED"),
    "no_pixels": ("quarantined", "NO_PIXELS"),
    "empty": ("new", "EMPTY_IMAGE"),
    "saturated": ("new", "SATURATED_IMAGE"),
    "placeholder": ("quarantined", "NO_PATIENT_ID"),
    "screenshot": ("new", "UNEXPECTED_MODALITY UNEXPECTED_SOP_CLASS"),
    "burned_in": ("new", "BURNED_IN_DECLARED"),
}

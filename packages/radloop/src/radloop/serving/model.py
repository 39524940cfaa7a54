"""The model behind a predictor: a package, its preprocessing, and the key that turns identities into pseudonyms."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError

from radloop.catalog.reason import Reason
from radloop.dicom import tags
from radloop.dicom.header import check_inflated
from radloop.dicom.results import is_result
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError, ServingError
from radloop.imaging import pixels, sandbox
from radloop.learning.package import Packaged

TAGS = ("modality", "manufacturer", "view_position", "sex", "age_years", "rows", "columns")
"""What of `tags.describe` the prediction log keeps, for drift and subgroups."""

_IDENTIFYING = (
    "PatientName",
    "PatientID",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "AccessionNumber",
    "ReferringPhysicianName",
    "OperatorsName",
)


class Examined(msgspec.Struct, frozen=True):
    """One DICOM instance, ready to be predicted. Everything but `image` may be logged: it holds pseudonyms only."""

    image: NDArray[np.float32]  # (1, size, size)
    input_digest: str
    sop_uid: str
    study_uid: str
    patient: str
    site: str
    tags: dict[str, Any]
    features: dict[str, float]


class ServedModel:
    """A package loaded, checked against its own reference answers, and thereby warm.

    Args:
        package: folder that `learning.package.build` wrote.
        pseudonymiser: made from the project's key.
        expect_digest: the model digest that is asked for; None takes what is there.
        threads: requests at once: so many CPU threads may the network take, and so many processes are held ready for
            compressed images.

    Raises:
        ArtifactError: the package is damaged, this radloop preprocesses in another way than the one that trained the
            model, or this machine computes other answers than those packaged.
        ServingError: another model than asked for; another project key.
    """

    def __init__(
        self, package: Path, pseudonymiser: Pseudonymiser, *, expect_digest: str | None = None, threads: int = 1
    ) -> None:
        self._packaged = Packaged(package, threads=threads)
        self._pseudonymiser = pseudonymiser
        identity = self._packaged.identity
        self.digest = identity.model_digest
        self.size = self._packaged.inputs.size
        self.platform = self._packaged.platform
        if expect_digest is not None and expect_digest != self.digest:
            raise ServingError("the package holds another model", expected=expect_digest, got=self.digest)
        if identity.key_id != pseudonymiser.key_id:
            raise ServingError(
                "the project key is not the one that made the model's pseudonyms",
                expected=f"key {identity.key_id}",
                got=f"key {pseudonymiser.key_id}",
                next_step="point --key-file at the key of the project that trained this model",
            )
        self._packaged.check()
        sandbox.warm(threads)

    def check(self, images: NDArray[np.float32]) -> None:
        """Raises DataError if these are no preprocessed images (n, 1, size, size)."""
        self._packaged.check_tensor(images)

    def compute(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Calibrated probabilities and decisions, each (n,), of images that were checked. From any thread."""
        return self._packaged.compute(images)

    def examine(self, data: bytes, site: str) -> Examined:
        """Read a DICOM file, refuse what the model is not for, pseudonymise, preprocess. All in memory.

        Args:
            data: a DICOM Part 10 file.
            site: the sender's site code, "" if unknown; needed where the file has no IssuerOfPatientID.

        Raises:
            DicomError: with a quarantine reason; never with a value that could identify a patient.
        """
        ds = read_dicom(data)
        self._check_declared(ds)
        pseudonymiser = self._pseudonymiser
        issuer = str(ds.get("IssuerOfPatientID") or "") or site
        if not issuer:
            raise DicomError(
                "whose PatientID this is cannot be told",
                reason=Reason.NO_PATIENT_ID,
                expected="IssuerOfPatientID in the file, or the sender's site code",
                got="neither",
                next_step="send the header x-radloop-site with the site code of the sender",
            )
        array = pixels.decode(ds)
        photometric, bits = str(ds.PhotometricInterpretation), int(ds.BitsStored)
        return Examined(
            image=self._packaged.preprocessing.from_dataset(ds),
            input_digest=hashlib.sha256(data).hexdigest(),
            sop_uid=pseudonymiser.uid(_uid(ds, "SOPInstanceUID")),
            study_uid=pseudonymiser.uid(_uid(ds, "StudyInstanceUID")),
            patient=pseudonymiser.patient(str(ds.get("PatientID") or ""), issuer),
            site=site,
            tags=_loggable(ds, tags.describe(ds)),
            features={f"f_{name}": value for name, value in pixels.features(array, photometric, bits).items()},
        )

    def _check_declared(self, ds: pydicom.Dataset) -> None:
        """The modality that the model card declares; and never our own result."""
        if is_result(ds):
            raise DicomError(
                "this is a result of radloop's own",
                reason=Reason.UNSUPPORTED_OBJECT,
                expected="an image of a patient",
                got="a result that came back",
            )
        declared, modality = self._packaged.inputs.modalities, str(ds.get("Modality") or "")
        if declared and modality not in declared:
            raise DicomError(
                "the model is not for this modality",
                reason=Reason.UNEXPECTED_MODALITY,
                expected=" or ".join(declared),
                got=modality if _is_code(modality) else "a value that is no code",
                next_step="send images of the declared modality only; the model card says what the model is for",
            )


def read_dicom(data: bytes) -> pydicom.Dataset:
    """A DICOM Part 10 file in memory.

    Raises:
        DicomError: NOT_DICOM, TRUNCATED, or UNSUPPORTED_OBJECT for a deflated file that swells beyond 512 MiB.
    """
    check_inflated(data)
    try:
        ds = pydicom.dcmread(io.BytesIO(data))
        for _element in ds:  # elements are read lazily: have them all, or the error, here
            pass
    except InvalidDicomError:
        raise DicomError(
            "this is no DICOM file",
            reason=Reason.NOT_DICOM,
            expected="a DICOM Part 10 file: 128 bytes preamble, then DICM",
            got=f"{len(data)} bytes of something else",
        ) from None
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds on broken input
        raise DicomError(
            "the DICOM file ends early or is damaged",
            reason=Reason.TRUNCATED,
            expected="a whole DICOM Part 10 file",
            got=f"{type(error).__name__} after {len(data)} bytes",
            next_step="send the file again; if it fails again, it is damaged at the source",
        ) from None
    return ds


def _loggable(ds: pydicom.Dataset, described: dict[str, Any]) -> dict[str, Any]:
    """What of the tags goes to the log, which holds no PHI though they come from the identified instance.

    Ages over 89 are 90, as the research profile has it; a text that repeats a part of the patient's name or of an
    identifier is left out.
    """
    kept = {name: described.get(name) for name in TAGS}
    if kept["age_years"] is not None:
        kept["age_years"] = min(float(kept["age_years"]), 90.0)
    said = " ".join(str(ds.get(keyword) or "") for keyword in _IDENTIFYING).casefold()
    tokens = {token for token in re.split(r"[\W_]+", said) if len(token) >= 4}
    for name, value in kept.items():
        if isinstance(value, str) and any(token in value.casefold() for token in tokens):
            kept[name] = None
    return kept


def _uid(ds: pydicom.Dataset, keyword: str) -> str:
    value = str(ds.get(keyword) or "")
    if not value:
        raise DicomError(f"{keyword} is missing", reason=Reason.MISSING_UID, expected=keyword, got="none")
    return value


def _is_code(value: str) -> bool:
    """A modality's code may be told back; free text typed into the attribute may not."""
    return 2 <= len(value) <= 8 and value.isalnum() and value.isupper()

"""Keyed pseudonyms: the same identity under the same project key is always the same pseudonym.

Every pseudonym is HMAC-SHA256(key, domain || fields), with the domain and each field length-prefixed, so that no two
kinds of identifier and no two field boundaries can meet. UIDs are `2.25.` followed by the decimal value of a UUID
(DICOM PS3.5 section B.2) whose 122 free bits are the HMAC and whose version is 8 (RFC 9562 section 5.8). Nothing
here can be inverted without the key; the key never rotates (a lost or leaked key means a new archive).
"""

from __future__ import annotations

import hmac
import re
import unicodedata

from radloop.catalog.reason import Reason
from radloop.errors import DataError, DicomError, SettingsError

MIN_KEY_BYTES = 32
MAX_SHIFT_DAYS = 3650

STANDARD_ROOT = "1.2.840.10008."
"""DICOM's own root: SOP classes, transfer syntaxes, well-known frames of reference. Never instance-identifying."""

_PADDING = " \t\r\n\0"

# What modalities, gateways and de-identifiers write where nobody typed an id. Compared after normalisation and
# without punctuation. Mapping them to a pseudonym would make one "patient" of many.
_PLACEHOLDERS = frozenset(
    str.split("""
    anon anonym anonymous anonymised anonymized anonymouspatient blank deid deidentified default dummy empty id
    missing na nan nil nn no noid nomrn none noname nopatientid notavailable notgiven notknown null patient patientid
    phantom pid qa qc redacted removed tbd temp test testpatient tester testing undefined unidentified unk unknown
    unspecified void
    """)
)
_FILLER = re.compile(r"0+|x+|9{5,}")


class Pseudonymiser:
    """Maps identifiers to pseudonyms under one project key.

    Args:
        key: at least 32 secret bytes, chosen at random once for a project.

    Raises:
        SettingsError: the key is shorter than 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise SettingsError(
                "the project key is too short",
                expected=f"at least {MIN_KEY_BYTES} random bytes",
                got=f"{len(key)} bytes",
                next_step="run `radloop init`, which makes a key, or point the key reference at the right file",
            )
        self._key = bytes(key)
        self.key_id: str = self._mac("key-id").hex()[:8]

    def __repr__(self) -> str:
        return f"Pseudonymiser(key_id={self.key_id!r})"

    def uid(self, original: str) -> str:
        """The pseudonym of an instance-identifying UID: `2.25.` and a UUIDv8 as a decimal number, up to 44 characters.

        UIDs under DICOM's own root are returned unchanged.

        Raises:
            DicomError: `MISSING_UID`, the UID is empty.
        """
        text = original.strip(_PADDING)
        if not text:
            raise DicomError("a UID is empty", reason=Reason.MISSING_UID, expected="a UID (PS3.5 section 9)")
        if text.startswith(STANDARD_ROOT):
            return text
        bits = int.from_bytes(self._mac("uid", text)[:16], "big")
        bits = bits & ~(0xF << 76) | (0x8 << 76)  # version 8: the top four bits of octet 6
        bits = bits & ~(0x3 << 62) | (0x2 << 62)  # RFC 9562 variant: the top two bits of octet 8
        return f"2.25.{bits}"

    def patient(self, patient_id: str, issuer: str) -> str:
        """The patient's pseudonym, `P` and 32 hex digits.

        Args:
            patient_id: PatientID (0010,0020) as received; case, outer and repeated spaces do not count.
            issuer: IssuerOfPatientID (0010,0021) if present, else the configured site code.

        Raises:
            DicomError: `NO_PATIENT_ID`, the id is empty or one of the words that stand for "nobody".
        """
        text = normalise(patient_id)
        if is_placeholder(text):
            raise DicomError(
                "the patient cannot be told from others",
                reason=Reason.NO_PATIENT_ID,
                expected="a PatientID that belongs to one patient",
                got="an empty PatientID or a placeholder",
                next_step="correct PatientID in the source and send the instance again",
            )
        return "P" + self._mac("patient", normalise(issuer), text).hex()[:32]

    def accession(self, accession: str, issuer: str) -> str:
        """The key of an AccessionNumber (0008,0050), `A` and 32 hex digits; `issuer` as in `patient`.

        Raises:
            DataError: the accession number is blank. A key for "none" would join unrelated studies.
        """
        text = normalise(accession)
        if not text:
            raise DataError("a blank accession number has no key", expected="an AccessionNumber", got="nothing")
        return "A" + self._mac("accession", normalise(issuer), text).hex()[:32]

    def file(self, relative_path: str) -> str:
        """The key of a source file by its path relative to the input folder, `F` and 32 hex digits.

        Backslashes, `.` parts and doubled slashes do not count, nor the Unicode form (macOS decomposes names).

        Raises:
            DataError: the path is empty.
        """
        text = unicodedata.normalize("NFC", relative_path.replace("\\", "/"))
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if not parts:
            raise DataError("an empty path has no key", expected="a path relative to the input folder", got="nothing")
        return "F" + self._mac("file", *parts).hex()[:32]

    def seal(self, identity: str, site: str, sender: str) -> bytes:
        """32 bytes that only this key can make: the proof that radloop itself wrote whence a landed file came."""
        return self._mac("landing", identity, site, sender)

    def day_shift(self, patient: str) -> int:
        """By how many whole days all dates of this patient (a pseudonym) move: -1 to -3650, always into the past."""
        number = int.from_bytes(self._mac("day-shift", patient)[:8], "big")
        return -1 - number % MAX_SHIFT_DAYS

    def fraction(self, patient: str) -> float:
        """The patient's place in the split, uniform in [0, 1), the same for ever (53 bits of an HMAC)."""
        return (int.from_bytes(self._mac("fraction", patient)[:8], "big") >> 11) / (1 << 53)

    def _mac(self, domain: str, *fields: str) -> bytes:
        message = bytearray()
        for field in ("radloop/1", domain, *fields):
            raw = field.encode("utf-8", "surrogatepass")
            message += len(raw).to_bytes(4, "big") + raw
        return hmac.digest(self._key, bytes(message), "sha256")


def normalise(identifier: str) -> str:
    """An identifier as it is compared: Unicode NFC, case-folded, no outer padding, inner white space single."""
    folded = unicodedata.normalize("NFC", identifier).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).replace("\0", " ").split())


def is_placeholder(identifier: str) -> bool:
    """Whether an identifier is empty or stands for "nobody in particular" (`0`, `unknown`, `anonymous`, `n/a`)."""
    letters = "".join(c for c in normalise(identifier) if c.isalnum())
    return not letters or letters in _PLACEHOLDERS or _FILLER.fullmatch(letters) is not None

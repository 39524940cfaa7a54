"""De-identification of one instance, by the attribute and through every nested sequence (DICOM PS3.15 Annex E).

An instance is rebuilt, not edited: what no rule of `radloop.dicom.profile` keeps is not in the output. Elements that
are kept byte for byte stay in pydicom's raw form, so pixel data is neither decoded nor copied twice.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable
from datetime import date, timedelta
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pydicom
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import UID

from radloop.catalog.reason import Reason
from radloop.dicom import phi
from radloop.dicom.profile import PUBLIC_SCHEMES, TEXT_VRS, Action, Profile, image_iods, named, table, tables_digest
from radloop.dicom.tags import describe
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DicomError, PhiError

IMPLEMENTATION_CLASS_UID = "2.25.137040963726250685507015692927111798080"
IMPLEMENTATION_VERSION_NAME = "RADLOOP_1"

# Transfer syntaxes whose codestreams the gate can read: uncompressed, RLE and the JPEG families. No video.
TRANSFER_SYNTAXES = frozenset(
    {f"1.2.840.10008.1.2{suffix}" for suffix in ("", ".1", ".1.99", ".2", ".5")}
    | {f"1.2.840.10008.1.2.4.{n}" for n in (*range(50, 67), 70, 80, 81, 90, 91, 92, 93, 201, 202, 203)}
)

_CODED = re.compile(r"[A-Za-z0-9 _.,+/&()*#:;<>=%'-]{0,64}")
_STRINGS = {
    "CS": re.compile(r"[A-Za-z0-9 _.+/&()*-]{0,16}"),
    "DS": re.compile(r" *[+-]?[0-9.]*([eE][+-]?[0-9]+)? *"),
    "IS": re.compile(r" *[+-]?[0-9]{0,12} *"),
    "TM": re.compile(r"[0-9.: ]{0,16}"),
    "UI": re.compile(r"[0-9.]{0,64} ?"),
    "SH": re.compile(r"([+-][0-9]{4} *)?"),  # TimezoneOffsetFromUTC, the one SH that is kept as a string
}
_DATE = re.compile(r"(\d{4})[.-]?(\d{2})?[.-]?(\d{2})?")
_DATETIME = re.compile(r"(\d{4})(\d{2})?(\d{2})?(\d{0,6}(\.\d{1,6})?([+-]\d{4})?)")
_DUMMIES: dict[str, str | bytes | int | float] = {
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
    "AS": "000Y",
    "UR": "removed:",
    "IS": "0",
    "DS": "0",
    "OB": b"\0\0",
    "OW": b"\0\0",
    "UN": b"\0\0",
    "US": 0,
}
DUMMY_TEXT = "REMOVED"
_LOCAL_CODE = {"CodeValue": DUMMY_TEXT, "CodingSchemeDesignator": "99RADLOOP", "CodeMeaning": DUMMY_TEXT}
_CODE_KEYWORDS = ("CodeValue", "LongCodeValue", "URNCodeValue", "CodeMeaning", "CodingSchemeDesignator")
_MAX_DEPTH = 64


class CleanedFile(msgspec.Struct, frozen=True):
    """What `Deidentifier.clean_file` wrote; every identifier is a pseudonym."""

    sop_uid: str
    study_uid: str
    series_uid: str
    patient: str
    sop_class_uid: str
    transfer_syntax_uid: str
    file_sha256: str
    file_bytes: int
    tags: dict[str, Any]
    """`radloop.dicom.tags.describe` of the output."""


class Deidentifier:
    """Cleans instances under one project key and one profile. Safe to share between threads.

    Args:
        pseudonymiser: the project's.
        profile: `research` (dates shifted, sex and age kept) or `basic` (neither).

    Raises:
        SettingsError: no such profile.
    """

    def __init__(self, pseudonymiser: Pseudonymiser, *, profile: str = "research") -> None:
        self.pseudonymiser = pseudonymiser
        self.profile: Profile = named(profile)
        self.digest: str = _digest(self.profile.name)
        self.kept_keywords: frozenset[str] = frozenset(
            row.keyword for tag, row in table().items() if self._retains(tag, DicomDictionary.get(tag, ("",))[0])
        )

    def _retains(self, tag: int, vr: str) -> bool:
        action = self.profile.action(tag, vr, "") if self.profile.option(tag) else Action.REMOVE
        return action in (Action.SHIFT, Action.KEEP, Action.KEEP_STRING, Action.AGE)

    def clean(self, ds: Dataset, *, site: str) -> Dataset:
        """A de-identified copy, with file meta information written anew and the preamble zeroed.

        The input is not changed. Pixel data is passed on as it is. The PHI gate is not run: `clean_file` runs it.

        Args:
            ds: as read from a file or built with a `file_meta` that names the transfer syntax.
            site: the configured site code; stands for the issuer where IssuerOfPatientID (0010,0021) is absent. It
                enters the pseudonym and nothing else.

        Raises:
            DicomError: the instance cannot be made safe; `reason` is one of UNKNOWN_TRANSFER_SYNTAX, MISSING_UID,
                NO_PATIENT_ID, UNSUPPORTED_OBJECT, BURNED_IN_DECLARED, NOT_DICOM.
        """
        syntax, iod = _check(ds, self.pseudonymiser.key_id)
        patient = self.pseudonymiser.patient(_text(ds, "PatientID"), _text(ds, "IssuerOfPatientID") or site)
        items = _Items(self, iod, self.pseudonymiser.day_shift(patient), UID(syntax))
        try:
            out = items.clean(ds, "")
        except RecursionError:
            _refuse(Reason.UNSUPPORTED_OBJECT, "sequences are nested too deep", f"at most {_MAX_DEPTH} levels")
        self._stamp(out, ds, patient)
        out.preamble = b"\0" * 128
        out.file_meta = _file_meta(out, syntax)
        return out

    def clean_file(self, source: Path, target: Path, *, site: str) -> CleanedFile:
        """Clean one file, pass it through the PHI gate and make it visible at `target` by one rename.

        Nothing is written before the gate has read the very bytes to be written. No fsync: the landing zone still
        holds the source, and a run that is killed is run again with the same result, byte for byte.

        Args:
            source: an identified DICOM file; target: a path without identifying parts (its name is checked);
            site: as in `clean`.

        Raises:
            DicomError: as `clean`, and NOT_DICOM or TRUNCATED if the file cannot be read.
            PhiError: PHI_FOUND, the gate found identifying text; the message names tag paths.
            OSError: the disk is full or the file cannot be read.
        """
        original = read(source.read_bytes())
        out = self.clean(original, site=site)
        data = _written(out)
        self._gate(original, data, target.name)
        _put(data, target)
        tags = describe(out)
        return CleanedFile(
            sop_uid=str(out.SOPInstanceUID),
            study_uid=str(out.StudyInstanceUID),
            series_uid=str(out.SeriesInstanceUID),
            patient=str(out.PatientID),
            sop_class_uid=str(out.SOPClassUID),
            transfer_syntax_uid=str(out.file_meta.TransferSyntaxUID),
            file_sha256=hashlib.sha256(data).hexdigest(),
            file_bytes=len(data),
            tags=tags,
        )

    def _gate(self, original: Dataset, data: bytes, name: str) -> None:
        reread = read(data)
        if not _same_pixels(original, reread):
            _refuse(Reason.UNSUPPORTED_OBJECT, "pixel data did not survive being written", "the same bytes")
        leaks = phi.find_leaks(original, reread, file_name=name, kept_keywords=self.kept_keywords)
        if leaks:
            more = f" and {len(leaks) - 8} more" if len(leaks) > 8 else ""
            raise PhiError(
                f"identifying text is left after de-identification in {', '.join(leaks[:8])}{more}",
                reason=Reason.PHI_FOUND,
                next_step="see `radloop quarantine show`; correct the attribute in the source or purge the instance",
            )

    def _stamp(self, out: Dataset, original: Dataset, patient: str) -> None:
        """Who this is now, and what was done (PS3.15 E.1.1, PS3.3 C.12.1.1.3 and C.7.1.1)."""
        out.PatientName = out.PatientID = patient
        out.PatientBirthDate = ""
        if self.profile.keeps_patient and not out.get("PatientAge"):
            age = _age(_text(original, "PatientBirthDate"), _text(original, "StudyDate"))
            if age:
                out.PatientAge = age
        out.PatientIdentityRemoved = "YES"
        out.DeidentificationMethod = [f"radloop {self.profile.name}", f"key {self.pseudonymiser.key_id}"]
        codes = list(out.get("DeidentificationMethodCodeSequence") or [])
        out.DeidentificationMethodCodeSequence = Sequence(codes + [_code(*code) for code in self.profile.codes])
        out.LongitudinalTemporalInformationModified = self.profile.temporal
        if any(not text.isascii() for text in _texts(out)):
            out.SpecificCharacterSet = "ISO_IR 192"


def read(data: bytes) -> Dataset:
    """A Dataset from the bytes of a DICOM file (PS3.10).

    Raises:
        DicomError: NOT_DICOM or TRUNCATED.
    """
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except InvalidDicomError:
        _refuse(Reason.NOT_DICOM, "the file is no DICOM file", "a preamble and DICM (PS3.10 section 7.1)")
    except EOFError:
        _refuse(Reason.TRUNCATED, "the file ends inside an element", "a whole file")
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds on garbage; their texts may quote it
        _refuse(Reason.NOT_DICOM, f"the file cannot be parsed ({type(error).__name__})", "DICOM elements")


def _same_pixels(original: Dataset, reread: Dataset) -> bool:
    """Whether the pixel data element has the same bytes; one that was of odd length may have got its padding byte."""
    before, after = original.get_item("PixelData"), reread.get_item("PixelData")
    if before is None or after is None:
        return before is after
    padding = b"\0" if len(before.value) % 2 else b""
    return bool(after.value in (before.value, before.value + padding))


class _Items:
    """Cleans one instance's items, outermost first. Holds what is the same for all of them."""

    def __init__(self, owner: Deidentifier, iod: str, shift_days: int, syntax: UID) -> None:
        self.profile, self.pseudonymiser, self.iod = owner.profile, owner.pseudonymiser, iod
        self.shift, self.syntax = timedelta(days=shift_days), syntax
        self.depth = 0
        self.handlers: dict[Action, Callable[[DataElement, str], DataElement | None]] = {
            Action.EMPTY: lambda e, vr: DataElement(e.tag, vr, Sequence() if vr == "SQ" else None),
            Action.DUMMY: lambda e, vr: DataElement(e.tag, vr, _DUMMIES.get(vr, DUMMY_TEXT)),
            Action.KEEP_TEXT: lambda e, vr: _with(e, vr, _plain(_values(e))),
            Action.MAP_UID: lambda e, vr: _with(e, vr, [v and self.pseudonymiser.uid(v) for v in _values(e)]),
            Action.SHIFT: lambda e, vr: _with(e, vr, [self._shifted(v, vr) for v in _values(e)]),
            Action.AGE: lambda e, vr: _with(e, vr, [a for v in _values(e) if (a := _capped(v))]),
            Action.RECURSE: self._recurse,
        }

    def clean(self, source: Dataset, parent: str) -> Dataset:
        """A cleaned copy of a data set or sequence item; `parent` is the keyword of the enclosing sequence."""
        out = Dataset()
        # Raw elements may be written as they are only if they were read in this transfer syntax.
        encoding = (self.syntax.is_implicit_VR, self.syntax.is_little_endian)
        native = source.original_encoding == encoding
        if native:
            out.set_original_encoding(*encoding, out._character_set)
        public = _is_public_code(source)
        for tag in list(source.keys()):
            new = self._element(source, tag, parent, native, public)
            if new is not None:
                out[tag] = new
        if public is False:
            for keyword, value in _LOCAL_CODE.items():
                setattr(out, keyword, value)
        return out

    def _element(
        self, source: Dataset, tag: Any, parent: str, native: bool, public: bool | None
    ) -> DataElement | RawDataElement | None:
        element = source.get_item(tag, keep_deferred=True)
        action = self.profile.action(int(tag), _vr(element), self.iod, parent)
        if action is Action.CODE:
            action = Action.KEEP_TEXT if public else Action.REMOVE
        if action is Action.REMOVE:
            return None
        try:
            if element.VR == "UN" or element.value is None or (element.is_raw and not native):
                element = source[tag]  # now of the VR that the dictionary says
                if element.VR == "UN":
                    return None
            if action is Action.KEEP:
                return element if isinstance(element, RawDataElement) else copy.copy(element)
            if action is Action.KEEP_STRING:
                return _kept_string(element)
            return self.handlers[action](source[tag], source[tag].VR)
        except (DicomError, RecursionError):
            raise
        except Exception:  # noqa: BLE001 - bytes that are not what the VR says: unreadable, so not kept
            return None

    def _recurse(self, element: DataElement, vr: str) -> DataElement:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise RecursionError
        keyword = keyword_for_tag(element.tag)
        items = [self.clean(item, keyword) for item in element.value]
        self.depth -= 1
        return DataElement(element.tag, "SQ", Sequence(items))

    def _shifted(self, text: str, vr: str) -> str:
        """A DA or DT moved by whole days, at the precision it had; empty if it is no date."""
        match = (_DATE if vr == "DA" else _DATETIME).fullmatch(text.strip())
        if match is None:
            return ""
        try:
            day = date(int(match[1]), int(match[2] or 1), int(match[3] or 1)) + self.shift
        except (ValueError, OverflowError):
            return ""
        digits = f"{day:%Y%m%d}" if day.year > 999 else ""
        precision = 8 if match[3] else 6 if match[2] else 4
        time_of_day = match[4] if vr == "DT" and match[3] and digits else ""
        return digits[:precision] + time_of_day


def _check(ds: Dataset, key_id: str) -> tuple[str, str]:
    """Transfer syntax and IOD of an instance that can be made safe; raises DicomError for any other."""
    syntax = _text(getattr(ds, "file_meta", None) or Dataset(), "TransferSyntaxUID")
    if syntax not in TRANSFER_SYNTAXES:
        shown = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "none"
        _refuse(Reason.UNKNOWN_TRANSFER_SYNTAX, "the transfer syntax is not supported", "a still-image syntax", shown)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not _text(ds, keyword):
            _refuse(Reason.MISSING_UID, f"{keyword} is missing or empty", "a UID")
    iod = image_iods().get(_text(ds, "SOPClassUID"))
    if iod is None:
        _refuse(Reason.UNSUPPORTED_OBJECT, "radloop de-identifies images only", "an image storage SOP class")
    if _text(ds, "BurnedInAnnotation").upper() not in ("NO", ""):
        _refuse(Reason.BURNED_IN_DECLARED, "BurnedInAnnotation declares text in the pixels", "NO, or absent")
    if "LABEL" in _text(ds, "ImageType").upper().split("\\"):
        _refuse(Reason.BURNED_IN_DECLARED, "ImageType says LABEL: a photographed label", "an image without a label")
    if f"key {key_id}" in _text(ds, "DeidentificationMethod").split("\\"):
        _refuse(Reason.UNSUPPORTED_OBJECT, "already de-identified by radloop under this key", "an original instance")
    for group in {tag.group for tag in list(ds.keys()) if tag.group & 0xFF00 == 0x6000 and tag.element == 0x0102}:
        if (group, 0x3000) not in ds and _number(ds, group, 0x0102) != 0:
            _refuse(Reason.UNSUPPORTED_OBJECT, "an overlay hides in unused bits of the pixels", "no such overlay")
    return syntax, iod


def _refuse(reason: Reason, what: str, expected: str, got: str | None = None) -> NoReturn:
    raise DicomError(what, reason=reason, expected=expected, got=got)


def _vr(element: DataElement | RawDataElement) -> str:
    vr = element.VR
    if vr is None or vr == "UN":
        vr = DicomDictionary.get(int(element.tag), ("UN",))[0]
    return vr.split(" or ")[-1]  # "US or SS": either will do here


def _values(element: DataElement) -> list[str]:
    """An element's values as text; PersonName in all its component groups."""
    value = element.value
    if value is None or value == "":
        return []
    many = not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "components")
    return [str(v).strip(" \0") for v in value] if many else [str(value).strip(" \0")]


def _text(ds: Dataset, keyword: str) -> str:
    """An attribute as text, values joined by backslashes; empty if absent or unreadable."""
    try:
        return "\\".join(_values(ds[keyword])) if keyword in ds else ""
    except Exception:  # noqa: BLE001 - unreadable is as good as absent here
        return ""


def _number(ds: Dataset, group: int, element: int) -> int | None:
    try:
        return int(ds[group, element].value)
    except Exception:  # noqa: BLE001 - unreadable is as good as absent here
        return None


def _with(element: DataElement, vr: str, values: list[str]) -> DataElement:
    return DataElement(element.tag, vr, values[0] if len(values) == 1 else values or None)


def _plain(values: list[str]) -> list[str]:
    """Text without control characters, which no kept attribute needs (ISO 2022 escapes were decoded)."""
    return ["".join(c for c in value if c.isprintable()) for value in values]


def _kept_string(element: DataElement | RawDataElement) -> DataElement | RawDataElement | None:
    """The element if each value is what its VR allows: a name in a code string or a number goes."""
    pattern = _STRINGS[_vr(element)]
    if isinstance(element, RawDataElement):
        values = (element.value or b"").decode("ascii", "replace").rstrip(" \0").split("\\")
    else:
        values = _values(element)
    if not all(pattern.fullmatch(value.strip(" \0")) for value in values):
        return None
    return element if isinstance(element, RawDataElement) else copy.copy(element)


def _is_public_code(item: Dataset) -> bool | None:
    """Whether a coded entry (PS3.3 section 8.8) is of a public scheme; None if the item is no coded entry."""
    if not any(keyword in item for keyword in _CODE_KEYWORDS):
        return None
    value = _text(item, "CodeValue") or _text(item, "LongCodeValue")
    scheme, version = _text(item, "CodingSchemeDesignator"), _text(item, "CodingSchemeVersion")
    return scheme in PUBLIC_SCHEMES and all(_CODED.fullmatch(part) for part in (value, version)) and bool(value)


def _capped(age: str) -> str | None:
    """An AS value with ages over 89 as 090Y; None if it is no AS value (PS3.5 table 6.2-1)."""
    match = re.fullmatch(r"(\d{3})([YMWD])", age.strip())
    if match is None:
        return None
    years = int(match[1]) / {"Y": 1, "M": 12, "W": 52.1775, "D": 365.25}[match[2]]
    return "090Y" if years >= 90 else match[0]


def _age(birth: str, study: str) -> str | None:
    """PatientAge on the study date, in the unit used at that age: years from 2, months from 1, else days."""
    try:
        born, seen = (date(int(t[:4]), int(t[4:6]), int(t[6:8])) for t in (birth, study) if len(t) == 8)
    except ValueError:
        return None
    months = (seen.year - born.year) * 12 + seen.month - born.month - (seen.day < born.day)
    if not 0 <= months < 130 * 12:
        return None
    if months >= 24:
        return _capped(f"{months // 12:03d}Y")
    return f"{months:03d}M" if months else f"{(seen - born).days:03d}D"


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _texts(ds: Dataset) -> list[str]:
    """Every text of a cleaned data set. Cleaning decoded them all, so raw elements are none of them."""
    found: list[str] = []
    for tag in list(ds.keys()):
        element = ds.get_item(tag, keep_deferred=True)
        if element.is_raw:
            continue
        if element.VR == "SQ":
            found += [text for item in element.value for text in _texts(item)]
        elif element.VR in TEXT_VRS:
            found += _values(element)
    return found


def _file_meta(out: Dataset, syntax: str) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = out.SOPClassUID
    meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta


def _written(out: Dataset) -> bytes:
    buffer = io.BytesIO()
    try:
        dcmwrite(buffer, out, enforce_file_format=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, its message may quote a value
        kind = type(error).__name__
        _refuse(Reason.UNSUPPORTED_OBJECT, f"the cleaned instance cannot be written ({kind})", "a conformant data set")
    return buffer.getvalue()


def _put(data: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _digest(profile: str) -> str:
    """Changes when the profile, its tables or the code that applies them change."""
    digest = hashlib.sha256(f"{profile} {tables_digest()}".encode())
    for name in ("profile.py", "deidentify.py", "uids.py"):
        digest.update(resources.files(__package__).joinpath(name).read_bytes())
    return digest.hexdigest()

"""De-identification of one instance, by the attribute and through every nested sequence (DICOM PS3.15 Annex E).

An instance is rebuilt, not edited: what no rule of `radloop.dicom.profile` keeps is not in the output. Elements that
are kept byte for byte stay in pydicom's raw form, so pixel data is neither decoded nor copied twice.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pydicom
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import UID

from radloop.catalog.reason import Reason
from radloop.dicom import phi, spans
from radloop.dicom.burned_in import Decision, Pixels
from radloop.dicom.burned_in.redact import replaced
from radloop.dicom.deidentify import stowaways
from radloop.dicom.deidentify.check import REQUIRED_UIDS, TRANSFER_SYNTAXES, check
from radloop.dicom.deidentify.face_cleaner import FaceCleaner
from radloop.dicom.deidentify.fast import Fast, Head
from radloop.dicom.deidentify.items import DUMMY_TEXT, MAX_DEPTH, Items
from radloop.dicom.deidentify.meta import file_meta
from radloop.dicom.deidentify.rewrite import Written, rewrite
from radloop.dicom.deidentify.values import age_of, refuse, text_of, texts_of
from radloop.dicom.header import check_inflated, check_whole
from radloop.dicom.profile import Action, Profile, named, table, tables_digest
from radloop.dicom.tags import describe
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import PhiError, RadloopError, SettingsError

__all__ = ["DUMMY_TEXT", "TRANSFER_SYNTAXES", "CleanedFile", "Deidentifier", "read"]


# What was done to dates before does not get undone: UNMODIFIED, MODIFIED, REMOVED, in the order of what is lost.
_TEMPORAL = ("UNMODIFIED", "MODIFIED", "REMOVED")


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
    pixels: str = ""
    """What was done about text in the pixels, and by which rule; empty if nobody looks for any."""


class Deidentifier:
    """Cleans instances under one project key and one profile. Safe to share between threads.

    Args:
        pseudonymiser: the project's.
        profile: `research` (dates shifted, sex and age kept), `basic` (neither), or what `profile.chosen` made.
        pixels: finds and removes text in the pixels; None: nobody looks, and what the header declares is refused, unless
            the profile has the option clean-pixel-data.
        face_cleaner: what `faces.clean_series` gives series of heads to under the option clean-visual-features; None: they
            are refused.

    Raises:
        SettingsError: no such profile, or `pixels` or `face_cleaner` contradicts it.
    """

    def __init__(
        self,
        pseudonymiser: Pseudonymiser,
        *,
        profile: str | Profile = "research",
        pixels: Pixels | None = None,
        face_cleaner: FaceCleaner | None = None,
    ) -> None:
        self.pseudonymiser = pseudonymiser
        self.profile: Profile = profile if isinstance(profile, Profile) else named(profile)
        self.pixels = pixels or Pixels("clean" if self.profile.cleans_pixels else "off")
        if self.profile.cleans_pixels and self.pixels.mode != "clean":
            raise SettingsError(
                "the option clean-pixel-data (113101) is chosen, and text in pixels is not to be cleaned",
                expected='[deidentify] pixels = "clean"',
                got=self.pixels.mode,
            )
        self.face_cleaner = face_cleaner
        if face_cleaner is not None and not self.profile.cleans_faces:
            raise SettingsError(
                "there is a face cleaner, and the option clean-visual-features (113102) is not chosen: it would never run",
                expected="both, or neither",
                next_step='[deidentify] options = ["clean-visual-features"], or --option clean-visual-features',
            )
        self.digest: str = _digest(self.profile, self.pixels, face_cleaner)
        self._fast = Fast(self.profile, pseudonymiser, self._clean)
        self._codes = frozenset(code for code, _ in self.profile.codes)
        self.kept_keywords: frozenset[str] = frozenset(
            row.keyword for tag, row in table().items() if self._retains(tag, DicomDictionary.get(tag, ("",))[0])
        )

    def _retains(self, tag: int, vr: str) -> bool:
        action = self.profile.action(tag, vr, "") if self.profile.option(tag) else Action.REMOVE
        return action not in (Action.REMOVE, Action.EMPTY, Action.DUMMY, Action.MAP_UID, Action.RECURSE)

    def clean(self, ds: Dataset, *, site: str) -> Dataset:
        """A de-identified copy, with file meta information written anew and the preamble zeroed.

        The input is not changed. Pixel data is passed on as it is, unless text is found in it. The PHI gate is not run:
        `clean_file` runs it.

        Args:
            ds: as read from a file or built with a `file_meta` that names the transfer syntax.
            site: the configured site code; stands for the issuer where IssuerOfPatientID (0010,0021) is absent. It
                enters the pseudonym and nothing else.

        Raises:
            DicomError: the instance cannot be made safe; `reason` is one of UNKNOWN_TRANSFER_SYNTAX, MISSING_UID,
                NO_PATIENT_ID, UNSUPPORTED_OBJECT, BURNED_IN_DECLARED, BURNED_IN_TEXT, PIXELS_UNDECODABLE, NOT_DICOM.
        """
        return self._clean_all(ds, site, None)[0]

    def _clean_all(
        self, ds: Dataset, site: str, tally: Counter[tuple[str, str]] | None, *, faceless: bool = False
    ) -> tuple[Dataset, Dataset, str]:
        """The pixels and then the header: the clean instance, what its pixels are of, what was done about them."""
        check(ds, self.profile, self.pseudonymiser.key_id, faceless=faceless)  # before a codec is asked
        try:
            decision = self.pixels.decide(ds)
            without = self.pixels.cleaned(ds) if decision.reads_pixels else None
        except (RadloopError, OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - bytes that are not what their VR says; the message may quote them
            refuse(Reason.NOT_DICOM, f"the image's header cannot be read ({type(error).__name__})", "DICOM elements")
        out = self._clean(ds if without is None else without, site, tally, faceless=faceless)
        said = self._said(decision, found=without is not None)
        if faceless:
            out.RecognizableVisualFeatures = "NO"
            said = f"faces by the face cleaner; {said or 'text not looked at'}"
        if without is not None:
            out.BurnedInAnnotation = "NO"
            out.DeidentificationMethodCodeSequence.append(_code("113101", "Clean Pixel Data Option"))
        return out, ds if without is None else without, said

    def _said(self, decision: Decision, *, found: bool) -> str:
        if self.pixels.mode == "off":
            return ""
        done = "text removed" if found else "looked at, no text found" if decision.look else "not looked at"
        return f"{decision.rule}: {done}"

    def _clean(
        self, ds: Dataset, site: str, tally: Counter[tuple[str, str]] | None, *, faceless: bool = False
    ) -> Dataset:
        syntax, iod = check(ds, self.profile, self.pseudonymiser.key_id, faceless=faceless)
        patient = self.pseudonymiser.patient(text_of(ds, "PatientID"), text_of(ds, "IssuerOfPatientID") or site)
        shift = self.pseudonymiser.day_shift(patient)
        items = Items(self.profile, self.pseudonymiser, ds, iod=iod, shift_days=shift, syntax=UID(syntax), tally=tally)
        try:
            out = items.clean(ds, "")
        except RecursionError:
            refuse(Reason.UNSUPPORTED_OBJECT, "sequences are nested too deep", f"at most {MAX_DEPTH} levels")
        for keyword in REQUIRED_UIDS:
            if keyword not in out:  # its bytes are not what its VR says
                refuse(Reason.MISSING_UID, f"{keyword} is missing or unreadable", "a UID")
        self._stamp(out, ds, patient)
        out.preamble = b"\0" * 128
        out.file_meta = file_meta(out, syntax)
        return out

    def clean_file(
        self,
        source: Path,
        target: Path,
        *,
        site: str,
        tally: Counter[tuple[str, str]] | None = None,
        digest: bool = True,
        faceless: Path | None = None,
    ) -> CleanedFile:
        """Clean one file, pass it through the PHI gate and make it visible at `target` by one rename.

        Nothing is written before the gate has read the very bytes to be written. No fsync: the landing zone still
        holds the source, and a run that is killed is run again with the same result, byte for byte.

        Args:
            source: an identified DICOM file; target: a path without identifying parts (its name is checked);
            site: as in `clean`;
            tally: counts what was done by (keyword path without item numbers, `Action` name), if given;
            digest: whether to compute `file_sha256`, which takes as long as all else;
            faceless: the instance's pixels without a face, as `faces.clean_series` wrote them: they take the place of its own.

        Raises:
            DicomError: as `clean`, and NOT_DICOM or TRUNCATED if the file cannot be read.
            PhiError: PHI_FOUND, the gate found identifying text; the message names tag paths.
            OSError: the disk is full or the file cannot be read.
        """
        decided: list[Decision] = []
        gate = partial(self._gate_bytes, name=target.name, decided=decided)
        if faceless is None:
            written = rewrite(self._fast, source, target, site=site, tally=tally, gate=gate, digest=digest)
            if written is not None:
                return _cleaned_file(written, self._said(decided[-1], found=False))
        original = self.opened(source)
        pictured = original if faceless is None else replaced(original, np.load(faceless, allow_pickle=False))
        out, source_of_pixels, said = self._clean_all(pictured, site, tally, faceless=faceless is not None)
        data = _written(out)
        self._gate(original, source_of_pixels, data, target.name)
        _put(data, target)
        tags = describe(out)
        return CleanedFile(
            sop_uid=str(out.SOPInstanceUID),
            study_uid=str(out.StudyInstanceUID),
            series_uid=str(out.SeriesInstanceUID),
            patient=str(out.PatientID),
            sop_class_uid=str(out.SOPClassUID),
            transfer_syntax_uid=str(out.file_meta.TransferSyntaxUID),
            file_sha256=hashlib.sha256(data).hexdigest() if digest else "",
            file_bytes=len(data),
            tags=tags,
            pixels=said,
        )

    def opened(self, source: Path) -> Dataset:
        """A file as it is cleaned: whole, and nothing beside its pixels. Raises DicomError as `clean_file`; OSError."""
        data = source.read_bytes()
        original = read(data)
        check_whole(data, original)
        stowaways.remove(original)
        return original

    def for_face_cleaner(self, original: Dataset, *, site: str) -> Dataset:
        """What a face cleaner gets: the header clean, the pixels as they are. Raises DicomError as `clean`."""
        return self._clean(original, site, None, faceless=True)

    def _gate_bytes(self, data: bytes, head: Head, texts: Iterable[str], *, name: str, decided: list[Decision]) -> None:
        """The gate on the bytes of two headers; raises NotPlain where it needs pydicom to read them, or the pixels."""
        decided.append(self.pixels.decide_bytes(data, implicit=head.implicit))
        if decided[-1].reads_pixels:
            raise spans.NotPlain
        self._pass(
            phi.find_leaks_in_files(
                data,
                head.header,
                implicit=head.implicit,
                file_name=name,
                kept_keywords=self.kept_keywords,
                options=self._codes,
                texts={"PixelData": texts},
            )
        )

    def _gate(self, original: Dataset, source_of_pixels: Dataset, data: bytes, name: str) -> None:
        reread = read(data)
        if not _same_pixels(source_of_pixels, reread):
            refuse(Reason.UNSUPPORTED_OBJECT, "pixel data did not survive being written", "the same bytes")
        kept, codes = self.kept_keywords, self._codes
        self._pass(phi.find_leaks(original, reread, file_name=name, kept_keywords=kept, options=codes))

    def _pass(self, leaks: list[str]) -> None:
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
            age = age_of(text_of(original, "PatientBirthDate"), text_of(original, "StudyDate"))
            if age:
                out.PatientAge = age
        out.PatientIdentityRemoved = "YES"
        out.DeidentificationMethod = [f"radloop {self.profile.name}", f"key {self.pseudonymiser.key_id}"]
        codes = list(out.get("DeidentificationMethodCodeSequence") or [])
        out.DeidentificationMethodCodeSequence = Sequence(codes + [_code(*code) for code in self.profile.codes])
        before = text_of(original, "LongitudinalTemporalInformationModified")
        lost = [_TEMPORAL.index(said) for said in (before, self.profile.temporal) if said in _TEMPORAL]
        out.LongitudinalTemporalInformationModified = _TEMPORAL[max(lost)]
        if any(not text.isascii() for text in texts_of(out)):
            out.SpecificCharacterSet = "ISO_IR 192"


def _cleaned_file(written: Written, pixels: str) -> CleanedFile:
    head = written.head
    sop_class, sop, study, series, patient = (
        head.text(tag) for tag in (0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00100020)
    )
    return CleanedFile(
        sop_uid=sop,
        study_uid=study,
        series_uid=series,
        patient=patient,
        sop_class_uid=sop_class,
        transfer_syntax_uid=head.syntax,
        file_sha256=written.sha256,
        file_bytes=written.size,
        tags=head.tags,
        pixels=pixels,
    )


def read(data: bytes) -> Dataset:
    """A Dataset from the bytes of a DICOM file (PS3.10).

    Raises:
        DicomError: NOT_DICOM or TRUNCATED; UNSUPPORTED_OBJECT for a deflated one that swells beyond 512 MiB.
    """
    check_inflated(data)
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except InvalidDicomError:
        refuse(Reason.NOT_DICOM, "the file is no DICOM file", "a preamble and DICM (PS3.10 section 7.1)")
    except EOFError:
        refuse(Reason.TRUNCATED, "the file ends inside an element", "a whole file")
    except Exception as error:  # noqa: BLE001 - pydicom raises many kinds on garbage; their texts may quote it
        refuse(Reason.NOT_DICOM, f"the file cannot be parsed ({type(error).__name__})", "DICOM elements")


def _same_pixels(original: Dataset, reread: Dataset) -> bool:
    """Whether the pixel data element has the same bytes; one that was of odd length may have got its padding byte."""
    before, after = (ds.get_item("PixelData", keep_deferred=True) for ds in (original, reread))
    if before is None or after is None:
        return before is after
    value = before.value or b""
    padding = b"\0" if len(value) % 2 else b""
    return bool((after.value or b"") in (value, value + padding))


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _written(out: Dataset) -> bytes:
    buffer = io.BytesIO()
    try:
        dcmwrite(buffer, out, enforce_file_format=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, its message may quote a value
        kind = type(error).__name__
        refuse(Reason.UNSUPPORTED_OBJECT, f"the cleaned instance cannot be written ({kind})", "a conformant data set")
    return buffer.getvalue()


def _put(data: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _digest(profile: Profile, pixels: Pixels, face_cleaner: FaceCleaner | None) -> str:
    """Changes when the profile, its tables, what is done about pixels, or the code that applies them change."""
    told = f"{profile.name} {' '.join(profile.options)} {tables_digest()} {pixels.digest}"
    if face_cleaner is not None:
        told += " " + "\0".join(face_cleaner.command)
    digest = hashlib.sha256(told.encode())
    here = Path(__file__).parent
    files = [*here.glob("*.*"), *(here.parent / "burned_in").glob("*.*"), *here.parent.glob("profile*.py")]
    for file in [*sorted(files), here.parent / "uids.py"]:
        if file.suffix in (".py", ".csv", ".toml", ".txt"):
            digest.update(file.read_bytes())
    return digest.hexdigest()

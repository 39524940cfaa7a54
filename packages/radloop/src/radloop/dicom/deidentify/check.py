"""Which instances can be made safe at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from pydicom.dataset import Dataset

from radloop.catalog.reason import Reason
from radloop.dicom.deidentify.values import number_of, refuse, text_of
from radloop.dicom.profile import Profile, storage_classes

# Transfer syntaxes whose codestreams the gate can read: uncompressed, RLE and the JPEG families. No video.
TRANSFER_SYNTAXES = frozenset(
    {f"1.2.840.10008.1.2{suffix}" for suffix in ("", ".1", ".1.99", ".2", ".5")}
    | {f"1.2.840.10008.1.2.4.{n}" for n in (*range(50, 67), 70, 80, 81, 90, 91, 92, 93, 201, 202, 203)}
)


REQUIRED_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_NO_IMAGE = {
    "": "radloop does not de-identify such objects",
    "audio": "a voice cannot be de-identified",
}
# Body parts whose volume shows a face: defined terms of BodyPartExamined (0018,0015), PS3.16 Annex L.
_FACES = frozenset(
    str.split("""
    BRAIN CEREBELLUM CHEEK CEREBHEM CRANIALVENSYS CSPINE CTSPINE EAR ETHMOIDSIN EYE EYELID FACE FRONTALSIN HEAD
    HEADNECK IAC JAW LIP MANDIBLE MASTOID MAXILLA MAXSINUS MOUTH NASOPHARYNX NECK NOSE OPTICCANAL ORBIT PARANASALSINUS
    PARANASALSIN PAROTID PHARYNX PITUITARY SELLA SINUS SKULL TEETH TEMPLE TMJ TONGUE WHOLEBODY ZYGOMA
    """)
)
_VOLUMES = frozenset({"CT", "MR", "PT", "XC"})
Text = Callable[[str], str]


def check(ds: Dataset, profile: Profile, key_id: str, *, faceless: bool = False) -> tuple[str, str]:
    """Transfer syntax and IOD of an instance that can be made safe; raises DicomError for any other.

    `faceless`: a face cleaner has had its pixels.
    """
    syntax = text_of(getattr(ds, "file_meta", None) or Dataset(), "TransferSyntaxUID")
    if syntax not in TRANSFER_SYNTAXES:
        shown = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "none"
        refuse(Reason.UNKNOWN_TRANSFER_SYNTAX, "the transfer syntax is not supported", "a still-image syntax", shown)
    for keyword in REQUIRED_UIDS:
        if not text_of(ds, keyword):
            refuse(Reason.MISSING_UID, f"{keyword} is missing or empty", "a UID")
    iod, kind = storage_classes().get(text_of(ds, "SOPClassUID"), ("", ""))
    _check_kind(iod, kind, profile)
    _check_pixels(ds)
    if profile.cleans_faces and not faceless and "PixelData" in ds and shows_face(partial(text_of, ds)):
        refuse(
            Reason.RECOGNIZABLE_FACE,
            "clean-visual-features (113102) is asked for, and the images may show a face",
            "no head, or a cleaner of your own: [deidentify] face_cleaner",
        )
    if f"key {key_id}" in text_of(ds, "DeidentificationMethod").split("\\"):
        refuse(Reason.UNSUPPORTED_OBJECT, "already de-identified by radloop under this key", "an original instance")
    return syntax, iod


def _check_kind(iod: str, kind: str, profile: Profile) -> None:
    if not kind:
        what = "audio" if iod.endswith("audio-waveform") else ""
        refuse(
            Reason.UNSUPPORTED_OBJECT,
            _NO_IMAGE[what],
            "an image, a report, an RT or other object of PS3.3",
            iod or None,
        )
    if kind == "structured" and "structured" not in profile.columns:
        refuse(
            Reason.UNSUPPORTED_OBJECT,
            "without its content a report says nothing",
            "the option clean-structured-content (113104) for reports and key object selections",
            iod,
        )


def _check_pixels(ds: Dataset) -> None:
    for group in {tag.group for tag in list(ds.keys()) if tag.group & 0xFF00 == 0x6000 and tag.element == 0x0102}:
        if (group, 0x3000) not in ds and number_of(ds, group, 0x0102) != 0:
            refuse(Reason.UNSUPPORTED_OBJECT, "an overlay hides in unused bits of the pixels", "no such overlay")


def volume(text: Text) -> bool:
    """Whether images of this header are slices or views that a face may be made of."""
    return text("Modality").upper() in _VOLUMES


def shows_face(text: Text) -> bool:
    """Whether a volume of images of this header may be rendered into a face (PS3.15 E.3.2); where nothing is said, it may.

    Args:
        text: the value of an attribute, by keyword, as text.
    """
    if text("RecognizableVisualFeatures").upper() == "YES":
        return True
    part = re.sub(r"[^A-Z]", "", text("BodyPartExamined").upper())
    told = not part or part in _FACES or any(part.startswith(word) for word in ("HEAD", "FACE", "SKULL", "BRAIN"))
    return told and volume(text)

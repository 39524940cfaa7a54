"""Which instances can be made safe at all."""

from __future__ import annotations

import re

from pydicom.dataset import Dataset

from radloop.catalog.reason import Reason
from radloop.dicom.deidentify.values import number_of, refuse, text_of
from radloop.dicom.profile import image_iods

# Transfer syntaxes whose codestreams the gate can read: uncompressed, RLE and the JPEG families. No video.
TRANSFER_SYNTAXES = frozenset(
    {f"1.2.840.10008.1.2{suffix}" for suffix in ("", ".1", ".1.99", ".2", ".5")}
    | {f"1.2.840.10008.1.2.4.{n}" for n in (*range(50, 67), 70, 80, 81, 90, 91, 92, 93, 201, 202, 203)}
)


def check(ds: Dataset, key_id: str) -> tuple[str, str]:
    """Transfer syntax and IOD of an instance that can be made safe; raises DicomError for any other."""
    syntax = text_of(getattr(ds, "file_meta", None) or Dataset(), "TransferSyntaxUID")
    if syntax not in TRANSFER_SYNTAXES:
        shown = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "none"
        refuse(Reason.UNKNOWN_TRANSFER_SYNTAX, "the transfer syntax is not supported", "a still-image syntax", shown)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not text_of(ds, keyword):
            refuse(Reason.MISSING_UID, f"{keyword} is missing or empty", "a UID")
    iod = image_iods().get(text_of(ds, "SOPClassUID"))
    if iod is None:
        refuse(Reason.UNSUPPORTED_OBJECT, "radloop de-identifies images only", "an image storage SOP class")
    if text_of(ds, "BurnedInAnnotation").upper() not in ("NO", ""):
        refuse(Reason.BURNED_IN_DECLARED, "BurnedInAnnotation declares text in the pixels", "NO, or absent")
    if "LABEL" in text_of(ds, "ImageType").upper().split("\\"):
        refuse(Reason.BURNED_IN_DECLARED, "ImageType says LABEL: a photographed label", "an image without a label")
    if f"key {key_id}" in text_of(ds, "DeidentificationMethod").split("\\"):
        refuse(Reason.UNSUPPORTED_OBJECT, "already de-identified by radloop under this key", "an original instance")
    for group in {tag.group for tag in list(ds.keys()) if tag.group & 0xFF00 == 0x6000 and tag.element == 0x0102}:
        if (group, 0x3000) not in ds and number_of(ds, group, 0x0102) != 0:
            refuse(Reason.UNSUPPORTED_OBJECT, "an overlay hides in unused bits of the pixels", "no such overlay")
    return syntax, iod

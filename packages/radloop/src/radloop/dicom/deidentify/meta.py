"""File meta information of what radloop writes (DICOM PS3.10 section 7.1)."""

from __future__ import annotations

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

IMPLEMENTATION_CLASS_UID = "2.25.137040963726250685507015692927111798080"
IMPLEMENTATION_VERSION_NAME = "RADLOOP_1"
PREFIX = b"\0" * 128 + b"DICM"
"""An empty preamble, and the prefix."""


def file_meta(out: Dataset, syntax: str) -> FileMetaDataset:
    """The meta information of a cleaned data set: nothing of the source's but the transfer syntax."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = out.SOPClassUID
    meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta


def meta_bytes(sop_class: bytes, sop_instance: bytes, syntax: str) -> bytes:
    """The same as bytes, of two UIDs as they stand in the file (padded to even length)."""
    elements = b"".join(
        (
            b"\x02\0\x01\0OB\0\0\x02\0\0\0\0\x01",
            _element(b"\x02\0\x02\0UI", sop_class),
            _element(b"\x02\0\x03\0UI", sop_instance),
            _element(b"\x02\0\x10\0UI", _padded(syntax)),
            _OURS,
        )
    )
    return b"\x02\0\0\0UL\x04\0" + len(elements).to_bytes(4, "little") + elements


def _element(prefix: bytes, value: bytes) -> bytes:
    return prefix + len(value).to_bytes(2, "little") + value


def _padded(uid: str) -> bytes:
    return uid.encode("ascii") + b"\0" * (len(uid) % 2)


_VERSION = IMPLEMENTATION_VERSION_NAME.encode() + b" " * (len(IMPLEMENTATION_VERSION_NAME) % 2)
_OURS = _element(b"\x02\0\x12\0UI", _padded(IMPLEMENTATION_CLASS_UID)) + _element(b"\x02\0\x13\0SH", _VERSION)

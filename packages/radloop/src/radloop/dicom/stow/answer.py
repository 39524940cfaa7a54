"""The Store Instances Response (PS3.18 sections 10.5.3 and I.2): which instances were kept, which were not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import msgspec

OUT_OF_RESOURCES = 0xA700
ANOTHER_STUDY = 0xA900
"""Error: the data set does not match: the URL names another study."""
CANNOT_UNDERSTAND = 0xC000
PROCESSING_FAILURE = 0x0110

_CLASS, _INSTANCE, _REASON, _URL = "00081150", "00081155", "00081197", "00081190"
_FAILED, _KEPT, _OTHER = "00081198", "00081199", "0008119A"
_KEYWORDS = {
    _CLASS: ("UI", "ReferencedSOPClassUID"),
    _INSTANCE: ("UI", "ReferencedSOPInstanceUID"),
    _REASON: ("US", "FailureReason"),
    _URL: ("UR", "RetrieveURL"),
    _FAILED: ("SQ", "FailedSOPSequence"),
    _KEPT: ("SQ", "ReferencedSOPSequence"),
    _OTHER: ("SQ", "OtherFailuresSequence"),
}
Item = dict[str, Any]


class Stored(msgspec.Struct, frozen=True):
    """What became of one part: its SOP class and instance UID as far as they could be read, and why it was not kept."""

    sop_class_uid: str
    sop_uid: str
    failure: int | None = None


def status_of(results: Sequence[Stored], *, malformed: bool, too_large: bool) -> int:
    """The HTTP status (PS3.18 table 10.5.3-1)."""
    kept = sum(result.failure is None for result in results)
    if kept:
        return 202 if kept < len(results) or malformed else 200
    if malformed or not results:
        return 400
    if too_large:
        return 413
    return 503 if all(result.failure == OUT_OF_RESOURCES for result in results) else 409


def module(results: Sequence[Stored]) -> Item:
    """The response as a data set: tag -> value; a sequence is a list of such."""
    found: Item = {}
    for result in results:
        item: Item = {}
        if result.sop_class_uid and result.sop_uid:
            item |= {_CLASS: result.sop_class_uid, _INSTANCE: result.sop_uid}
        if result.failure is None:
            found.setdefault(_KEPT, []).append(item)
        else:
            found.setdefault(_FAILED if item else _OTHER, []).append({**item, _REASON: result.failure})
    return found


def as_json(found: Item) -> bytes:
    """The DICOM JSON model (PS3.18 Annex F)."""
    return msgspec.json.encode(_json(found))


def _json(found: Item) -> Item:
    return {
        tag: {
            "vr": _KEYWORDS[tag][0],
            "Value": [_json(item) for item in value] if isinstance(value, list) else [value],
        }
        for tag, value in sorted(found.items())
    }


def as_xml(found: Item) -> bytes:
    """The Native DICOM Model (PS3.19 section A.1)."""
    root = ElementTree.Element("NativeDicomModel", {"xmlns": "http://dicom.nema.org/PS3.19/models/NativeDICOM"})
    _xml(root, found)
    encoded: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return encoded


def _xml(parent: ElementTree.Element, found: Item) -> None:
    for tag, value in sorted(found.items()):
        vr, keyword = _KEYWORDS[tag]
        element = ElementTree.SubElement(parent, "DicomAttribute", {"tag": tag, "vr": vr, "keyword": keyword})
        if isinstance(value, list):
            for number, item in enumerate(value, 1):
                _xml(ElementTree.SubElement(element, "Item", {"number": str(number)}), item)
        else:
            ElementTree.SubElement(element, "Value", {"number": "1"}).text = str(value)

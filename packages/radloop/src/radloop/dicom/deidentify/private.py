"""Private elements that are known to be safe: PS3.15 Table E.3.10-1 (option retain-safe-private)."""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from radloop.dicom.profile import BULK_VRS
from radloop.dicom.profile_tables import safe_private


def safe_elements(ds: Dataset) -> Iterator[tuple[BaseTag, str, str]]:
    """Tag, private creator and VR of each element of a data set or item that may stay.

    The creator is the one that reserves the element's block in this very data set (PS3.5 section 7.8.1). Elements in a VR
    other than the list's go, and bulk data of the list too: nobody can look into it.
    """
    safe = safe_private()
    creators = {(tag.group, tag.element): _creator(ds, tag) for tag in list(ds.keys()) if tag.is_private_creator}
    for tag in list(ds.keys()):
        if not tag.is_private or tag.element < 0x1000:
            continue
        creator = creators.get((tag.group, tag.element >> 8), "")
        vr = safe.get((creator, tag.group, tag.element & 0xFF), "")
        if vr and vr not in BULK_VRS and "/" not in vr and _declared(ds, tag) in (None, "UN", vr):
            yield tag, creator, vr


def as_vr(ds: Dataset, tag: BaseTag, vr: str) -> DataElement:
    """The element read in the VR that the list gives, where the file gives none (implicit VR) or UN.

    Raises:
        Exception: many kinds, if its bytes are not what the VR says.
    """
    element = ds.get_item(tag)
    if isinstance(element, RawDataElement):
        element = convert_raw_data_element(element._replace(VR=vr), encoding=ds._character_set, ds=ds)
    if element.VR == "UN" and vr != "SQ":
        raw = RawDataElement(tag, vr, len(element.value), element.value, 0, False, ds.is_little_endian is not False)
        element = convert_raw_data_element(raw, encoding=ds._character_set, ds=ds)
    if vr != element.VR:
        raise ValueError("an element in another VR")
    return element


def _creator(ds: Dataset, tag: BaseTag) -> str:
    try:
        return str(ds[tag].value).strip(" \0")
    except Exception:  # noqa: BLE001 - an unreadable creator reserves nothing
        return ""


def _declared(ds: Dataset, tag: BaseTag) -> str | None:
    return ds.get_item(tag, keep_deferred=True).VR

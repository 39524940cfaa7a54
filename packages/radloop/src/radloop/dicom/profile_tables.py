"""The data files beside this module: what DICOM says of attributes, IODs and private elements.

- `profile_table.csv`: PS3.15 Table E.1-1, edition 2026d: the Basic profile's action and one column for each option.
- `private_safe.csv`: PS3.15 Table E.3.10-1, edition 2026d: private elements that are safe, by creator, group and VR.
- `iods.csv`: PS3.4 and PS3.3: each storage SOP class, its IOD, and how radloop handles it (empty: it is refused).
- `iod_types.csv`: PS3.3: the Type (1, 2 or 3; a conditional one counts as its unconditional one) of the attributes
  whose action depends on it, by enclosing sequence.

The last two are written by `scripts/dicom_tables.py`.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

TABLE_SOURCE = "DICOM PS3.15 2026d, Table E.1-1"
FILES = ("profile_table.csv", "private_safe.csv", "iods.csv", "iod_types.csv", "descriptors.txt")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of Table E.1-1: the Basic profile's action, and the options' by column (`K` keep, `C` clean)."""

    keyword: str
    basic: str
    options: Mapping[str, str]


@lru_cache(maxsize=1)
def table() -> Mapping[int, Row]:
    """Table E.1-1 by tag number; the repeating groups 50xx and 60xx and private groups are handled by rule."""
    rows: dict[int, Row] = {}
    for record in _read("profile_table.csv"):
        tag, keyword, basic = record.pop("tag"), record.pop("keyword"), record.pop("basic")
        if tag != "private" and "x" not in tag:
            options = {name: action for name, action in record.items() if action}
            rows[int(tag, 16)] = Row(keyword, basic, MappingProxyType(options))
    return MappingProxyType(rows)


@lru_cache(maxsize=1)
def storage_classes() -> Mapping[str, tuple[str, str]]:
    """SOP class UID to IOD and kind: `image`, `object`, `structured`, `presentation`, `waveform`, or `` (refused)."""
    return MappingProxyType({r["sop_class_uid"]: (r["iod"], r["kind"]) for r in _read("iods.csv")})


@lru_cache(maxsize=1)
def kinds() -> Mapping[str, str]:
    """IOD to kind, as `storage_classes` has it."""
    return MappingProxyType(dict(storage_classes().values()))


@lru_cache(maxsize=1)
def image_iods() -> Mapping[str, str]:
    """SOP class UID to IOD, for every image storage class but the video ones."""
    return MappingProxyType({uid: iod for uid, (iod, kind) in storage_classes().items() if kind == "image"})


@lru_cache(maxsize=1)
def safe_private() -> Mapping[tuple[str, int, int], str]:
    """Table E.3.10-1: private creator, group and element within the block (0x00 to 0xFF), to the VR."""
    return MappingProxyType(
        {
            (r["creator"], int(r["group"], 16), int(element, 16)): r["vr"]
            for r in _read("private_safe.csv")
            for element in r["elements"].split()
        }
    )


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Words that a cleaned descriptor may keep: `descriptors.txt`, where `#` begins a comment."""
    lines = resources.files(__package__).joinpath("descriptors.txt").read_text(encoding="utf-8").splitlines()
    return tuple(word for line in lines for word in line.split("#")[0].split())


@lru_cache(maxsize=1)
def _types() -> Mapping[tuple[str, str], tuple[str, Mapping[str, str]]]:
    types: dict[tuple[str, str], tuple[str, Mapping[str, str]]] = {}
    for r in _read("iod_types.csv"):
        exceptions: dict[str, str] = {}
        for group in filter(None, r["exceptions"].split(";")):
            kind, iods = group.split(":")
            exceptions.update(dict.fromkeys(iods.split(), kind))
        types[r["keyword"], r["parent"]] = (r["type"], exceptions)
    return MappingProxyType(types)


def attribute_type(iod: str, keyword: str, parent: str = "") -> str | None:
    """The Type (`1`, `2` or `3`) of an attribute in an IOD, where it decides something; None if not tabled.

    Args:
        iod: as `storage_classes` names it.
        keyword: the attribute.
        parent: keyword of the sequence it stands in, empty at the top level.
    """
    entry = _types().get((keyword, parent))
    return None if entry is None else entry[1].get(iod, entry[0])


def tables_digest() -> str:
    """sha256 over the data files."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(resources.files(__package__).joinpath(name).read_bytes())
    return digest.hexdigest()


def _read(name: str) -> list[dict[str, str]]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))

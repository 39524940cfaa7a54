"""What arrives, and what became of it."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from radloop.catalog.reason import Reason
from radloop.dicom.header import Header
from radloop.dicom.landed import Buffer
from radloop.dicom.spool import Spool
from radloop.errors import DataError

_FIRST_BYTES = 4096


class OutcomeKind(StrEnum):
    """What became of bytes that arrived."""

    NEW = "new"
    SAME = "same"
    REVISION = "revision"
    CONFLICT = "conflict"
    QUARANTINED = "quarantined"


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes as they arrive. `relative_path`: path within the input folder; labels may be keyed by it."""

    data: Buffer
    site: str
    sender: str
    relative_path: str | None = None

    def __repr__(self) -> str:
        return f"Arrival({len(self.data)} bytes from {self.sender!r})"


class Received(Arrival, frozen=True, kw_only=True):
    """An instance as C-STORE brought it. `data` begins with a header of `radloop.dicom.landed`, sealed.

    sha256: the identity of `data`.
    sop_class_uid, sop_uid: what the command announced (PS3.7 section 9.3.1.1).
    spool: a file without a name in the landing folder that holds `data` already.
    """

    sha256: str
    sop_class_uid: str
    sop_uid: str
    spool: Spool | None = None

    def __repr__(self) -> str:
        return f"Received({len(self.data)} bytes from {self.sender!r})"


class Mismatch(DataError):
    """The data set is not the instance that the command announced. Nothing was kept."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one arrival. `sop_uid` is the pseudonym; `reason` is set for `conflict` and `quarantined`."""

    kind: OutcomeKind
    sop_uid: str | None
    reason: Reason | None
    sha256: str


def check_announced(arrival: Arrival, header: Header) -> None:
    """Raise `Mismatch` when the data set is not of the class and instance that C-STORE's command announced."""
    if not isinstance(arrival, Received):
        return
    if (header.sop_class_uid, header.sop_uid) != (arrival.sop_class_uid, arrival.sop_uid):
        which = "SOP class" if header.sop_class_uid != arrival.sop_class_uid else "SOP instance"
        raise Mismatch(f"the data set is of another {which} than the command announced")


def is_announced(arrival: Received) -> bool:
    """Whether the announced UIDs stand in the first bytes of the data set, as elements: a quick look, and a safe one."""
    start = bytes(arrival.data[:_FIRST_BYTES])
    return all(
        b"\x08\0" + element + b"\0UI" + encoded in start
        or b"\x08\0" + element + b"\0" + encoded[:2] + b"\0\0" + encoded[2:] in start
        for element, encoded in ((b"\x16", _encoded(arrival.sop_class_uid)), (b"\x18", _encoded(arrival.sop_uid)))
    )


def _encoded(uid: str) -> bytes:
    value = uid.encode("ascii", "replace")
    value += b"\0" * (len(value) % 2)
    return len(value).to_bytes(2, "little") + value


def arrival_from(data: Buffer, source: dict[str, str]) -> Arrival:
    """What came before, with the crosswalk's word of whence (`Identity.SOURCE`)."""
    path = source.get("path") or None
    return Arrival(data=data, site=source["site"], sender=source["sender"], relative_path=path)

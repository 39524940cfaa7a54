"""Group 0002 of a part: what instance it is, and where its data set begins."""

from __future__ import annotations

import struct

import msgspec

_FIRST_BYTES = 4096
_LONG_VRS = frozenset((b"OB", b"UN", b"OW", b"OD", b"OF", b"OL", b"SQ", b"UT", b"UC", b"UR"))
_SHORT, _LONG = struct.Struct("<HH2sH"), struct.Struct("<HH2sHI")


class Head(msgspec.Struct, frozen=True):
    """What group 0002 says; empty where it says nothing that can be used. `end`: where the data set begins."""

    sop_class_uid: str = ""
    sop_uid: str = ""
    transfer_syntax_uid: str = ""
    end: int = 0

    @property
    def whole(self) -> bool:
        """All three are there."""
        return bool(self.sop_class_uid and self.sop_uid and self.transfer_syntax_uid)


def head_of(data: memoryview) -> Head:
    """Read group 0002, explicit VR little endian (PS3.10 section 7.1); an empty Head where it is broken, long, or not there."""
    first = bytes(data[:_FIRST_BYTES])
    found = {0x0002: "", 0x0003: "", 0x0010: ""}
    at = 132
    if first[128:132] != b"DICM":
        return Head()
    while at + 12 <= len(first):
        group, element, vr, length = _SHORT.unpack_from(first, at)
        if group != 2:
            break
        value = at + 8
        if vr in _LONG_VRS:
            length, value = _LONG.unpack_from(first, at)[4], value + 4
        if value + length > len(first) or not vr.isalpha():
            return Head()
        if element in found:
            found[element] = first[value : value + length].rstrip(b"\0 ").decode("ascii", "replace")
        at = value + length
    else:
        return Head()
    sop_class, sop, syntax = found.values()
    if not all(0 < len(uid) <= 64 and not uid.strip("0123456789.") for uid in (sop_class, sop)):
        return Head()
    return Head(sop_class, sop, syntax if not syntax.strip("0123456789.") else "", at)

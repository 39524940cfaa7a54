"""C-STORE's command sets (PS3.7 section 9.3.1), read and written without a data set library: implicit VR little endian."""

from __future__ import annotations

import re
import struct

import msgspec

C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001
_NO_DATA_SET = 0x0101
_ELEMENT = struct.Struct("<HHI")
_SHORT = struct.Struct("<H")
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_COMMENT_CHARACTERS = 64

COMMAND, LAST = 1, 2
"""Bits of a fragment's control header (PS3.8 section E.2)."""


class Malformed(Exception):
    """What the peer sent is no PDU, or no message, of the standard. The association is aborted."""


class Command(msgspec.Struct, frozen=True):
    """What is used of a command set. UIDs are empty where the command has none that is one."""

    field: int
    message_id: int
    sop_class_uid: str
    sop_uid: str
    has_data_set: bool


def read_command(data: bytes) -> Command:
    """Read a command set.

    Raises:
        Malformed: its lengths do not fit, or it has no CommandField.
    """
    values: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        if position + 8 > len(data):
            raise Malformed("a command set ends within an element")
        group, element, length = _ELEMENT.unpack_from(data, position)
        position += 8
        if group != 0 or position + length > len(data):
            raise Malformed("a command set with other elements, or one that is cut")
        values[element] = data[position : position + length]
        position += length
    if len(values.get(0x0100, b"")) != 2:
        raise Malformed("a command set without CommandField")
    return Command(
        _number(values.get(0x0100)),
        _number(values.get(0x0110)),
        _uid(values.get(0x0002)),
        _uid(values.get(0x1000)),
        _number(values.get(0x0800)) != _NO_DATA_SET,
    )


def store_response(command: Command, context_id: int, status: int, comment: str, longest_pdu: int) -> bytes:
    """C-STORE-RSP (PS3.7 section 9.3.1.2) in as many P-DATA-TF PDUs as the peer's maximum length asks for.

    Args:
        comment: ErrorComment (0000,0902); no value of an attribute, no name.
        longest_pdu: the peer's maximum length; 0: no limit.
    """
    elements = _element(0x0002, command.sop_class_uid.encode(), b"\0") if command.sop_class_uid else b""
    elements += _element(0x0100, _SHORT.pack(C_STORE_RSP))
    elements += _element(0x0120, _SHORT.pack(command.message_id))
    elements += _element(0x0800, _SHORT.pack(_NO_DATA_SET))
    elements += _element(0x0900, _SHORT.pack(status))
    if comment:
        elements += _element(0x0902, comment[:_COMMENT_CHARACTERS].encode("ascii", "replace"), b" ")
    if command.sop_uid:
        elements += _element(0x1000, command.sop_uid.encode(), b"\0")
    message = _element(0, struct.pack("<I", len(elements))) + elements
    size = max(longest_pdu - 6, 2) if longest_pdu else len(message)
    parts = [message[start : start + size] for start in range(0, len(message), size)]
    return b"".join(fragment(context_id, COMMAND | (LAST if part is parts[-1] else 0), part) for part in parts)


def fragment(context_id: int, control: int, data: bytes) -> bytes:
    """One P-DATA-TF PDU with one fragment (PS3.8 section 9.3.5)."""
    return struct.pack(">BBIIBB", 4, 0, len(data) + 6, len(data) + 2, context_id, control) + data


def _element(number: int, value: bytes, padding: bytes = b"\0") -> bytes:
    value += padding * (len(value) % 2)
    return _ELEMENT.pack(0, number, len(value)) + value


def _number(value: bytes | None) -> int:
    return int(_SHORT.unpack(value)[0]) if value is not None and len(value) == 2 else 0


def _uid(value: bytes | None) -> str:
    text = (value or b"").rstrip(b"\0 ").decode("ascii", "replace")
    return text if len(text) <= 64 and _UID.fullmatch(text) else ""

"""A C-STORE sender made of bytes: it can stream what no memory holds, stop in the middle, and lie.

Well-behaved senders are dcmtk's and pynetdicom's; this one is for what they would never do.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType

from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import build_context

_APPLICATION = "1.2.840.10008.3.1.1.1"  # PS3.7 annex A.2.1
_IMPLEMENTATION = "2.25.58313826424216343927439219391183452743"
ABORT = b"\x07\0" + struct.pack(">I", 4) + bytes(4)
RELEASE = b"\x05\0" + struct.pack(">I", 4) + bytes(4)


class Refused(Exception):
    """The association was rejected: result, source, reason (PS3.8 section 9.3.4)."""


class Aborted(Exception):
    """The peer aborted, or closed the connection."""


class Sender:
    """One association. A context manager, which releases it.

    Args:
        port: of a listener on this machine.
        contexts: (abstract syntax, transfer syntax); ids are 1, 3, 5, ...
        tls: speak TLS.
        timeout_s: of every read.

    Raises:
        Refused: the association was rejected.
    """

    def __init__(
        self,
        port: int,
        contexts: Sequence[tuple[str, str]],
        *,
        calling: str = "CT_A",
        called: str = "RADLOOP",
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if tls is not None:
                self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
            self.socket.sendall(_request(contexts, calling, called))
            kind, body = self.pdu()
            if kind != 2:
                raise Refused(*body[1:4]) if kind == 3 else Aborted
        except BaseException:
            self.socket.close()
            raise
        self._message_id = 0

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.release()
        finally:
            self.socket.close()

    def release(self) -> None:
        """Release the association and wait for the answer."""
        self.socket.sendall(RELEASE)
        while self.pdu()[0] != 6:
            pass

    def abort(self) -> None:
        """Abort and close."""
        self.socket.sendall(ABORT)
        self.socket.close()

    def store(
        self, sop_class_uid: str, sop_uid: str, data: Iterable[bytes], *, context_id: int = 1, data_set: bool = True
    ) -> int:
        """Send an instance in fragments as they come; the status of the answer.

        Raises:
            Aborted: the peer aborted instead.
        """
        self.announce(sop_class_uid, sop_uid, context_id=context_id, data_set=data_set)
        before = None
        for part in data:
            if before is not None:
                self.fragment(before, context_id, 0)
            before = part
        if before is not None:
            self.fragment(before, context_id, 2)
        return self.answer()

    def announce(self, sop_class_uid: str, sop_uid: str, *, context_id: int = 1, data_set: bool = True) -> None:
        """Send the command set of a C-STORE."""
        self._message_id += 1
        self.fragment(command(sop_class_uid, sop_uid, self._message_id, data_set=data_set), context_id, 3)

    def fragment(self, data: bytes, context_id: int, control: int) -> None:
        """Send one P-DATA-TF PDU."""
        self.socket.sendall(struct.pack(">BBIIBB", 4, 0, len(data) + 6, len(data) + 2, context_id, control) + data)

    def answer(self) -> int:
        """The status of the next answer. Raises `Aborted`."""
        kind, body = self.pdu()
        if kind != 4:
            raise Aborted
        position = 6
        while position < len(body):
            _, element, length = struct.unpack_from("<HHI", body, position)
            if element == 0x0900:
                return int(struct.unpack_from("<H", body, position + 8)[0])
            position += 8 + length
        raise AssertionError("an answer without a status")

    def pdu(self) -> tuple[int, bytes]:
        """The next PDU: its type and what follows its length. Raises `Aborted` when the connection is closed."""
        head = self._exactly(6)
        return head[0], self._exactly(int.from_bytes(head[2:], "big"))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self.socket.recv(count - len(data))
            except ConnectionError:
                part = b""
            if not part:
                raise Aborted
            data += part
        return data


def command(sop_class_uid: str, sop_uid: str, message_id: int = 1, *, data_set: bool = True) -> bytes:
    """The command set of a C-STORE request (PS3.7 section 9.3.1.1)."""
    elements = b""
    for element, value in (
        (0x0002, _even(sop_class_uid)),
        (0x0100, struct.pack("<H", 1)),
        (0x0110, struct.pack("<H", message_id)),
        (0x0700, struct.pack("<H", 0)),
        (0x0800, struct.pack("<H", 0 if data_set else 0x0101)),
        (0x1000, _even(sop_uid)),
    ):
        elements += struct.pack("<HHI", 0, element, len(value)) + value
    return struct.pack("<HHII", 0, 0, 4, len(elements)) + elements


def _even(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def _request(contexts: Sequence[tuple[str, str]], calling: str, called: str) -> bytes:
    proposed = [build_context(abstract, transfer) for abstract, transfer in contexts]
    for number, context in enumerate(proposed):
        context.context_id = 2 * number + 1
    longest, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    longest.maximum_length_received = 16384
    implementation.implementation_class_uid = _IMPLEMENTATION
    request = A_ASSOCIATE()
    request.application_context_name = _APPLICATION
    request.calling_ae_title, request.called_ae_title = calling, called
    request.presentation_context_definition_list = proposed
    request.user_information = [longest, implementation]
    return bytes(A_ASSOCIATE_RQ(request).encode())

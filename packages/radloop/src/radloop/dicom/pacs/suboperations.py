"""Instances that a PACS sends on request, C-GET's and C-MOVE's sub-operations, beneath pynetdicom.

The listener's upper layer takes fragments of a C-STORE straight into their buffer (`radloop.dicom.listener.upper_layer`), here
for associations that we opened, too. Each instance, once whole, goes to a sink; Success then says that the sink took it.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from pynetdicom import evt
from pynetdicom.association import Association

from radloop.dicom.landed import IMPLEMENTATION_CLASS_UID, Buffer
from radloop.dicom.listener.messages import Command

OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0xA700, 0xC000
_LOOK_EVERY_S = 0.25
_FIRST_BYTES = 1 << 20
_SHORT, _LONG = struct.Struct("<HH2sH"), struct.Struct("<HH2sHI")


class Intake:
    """One retrieval: what came, and the sink's error, after which nothing more is taken.

    Args:
        sink: called by one thread at a time, with a whole Part 10 file.
    """

    def __init__(self, sink: Callable[[Buffer], None]) -> None:
        self._sink, self._lock = sink, threading.Lock()
        self.received = 0
        self.error: BaseException | None = None
        self.last = time.monotonic()

    def take(self, data: Buffer) -> int:
        """Give it to the sink; the status for the PACS."""
        with self._lock:
            if self.error is not None:
                return OUT_OF_RESOURCES
            try:
                self._sink(data)
            except BaseException as error:  # noqa: BLE001 - raised again where the retrieval waits
                self.error = error
                return OUT_OF_RESOURCES
            finally:
                self.last = time.monotonic()
            self.received += 1
            return 0


class Receiving:
    """The `Service` of an association on which instances come. `intake` says where to; None: nothing was asked for."""

    def __init__(self, intake: Callable[[], Intake | None]) -> None:
        self._intake = intake

    def begin(self, command: Command, transfer_syntax_uid: str) -> Any:
        """Make room for an instance; None: it is not taken."""
        intake = self._intake()
        if intake is None or intake.error is not None or not command.sop_class_uid or not command.sop_uid:
            return None
        return _Instance(intake, _head(command, transfer_syntax_uid))

    def finish(self, command: Command, incoming: Any) -> tuple[int, str]:
        """It has come."""
        if incoming is None:
            named = command.sop_class_uid and command.sop_uid and command.has_data_set
            return (OUT_OF_RESOURCES if named else CANNOT_UNDERSTAND), ""
        return incoming.intake.take(incoming.complete()), ""

    def malformed(self, what: str) -> None:
        """The peer did not speak DICOM; its association is aborted, which ends the retrieval."""

    def ended(self, *, released: bool) -> None:
        """The association is over."""


class _Instance:
    """An instance on its way in, in memory: a batch of them is."""

    def __init__(self, intake: Intake, head: bytes) -> None:
        self.intake = intake
        self._bytes, self._at = bytearray(_FIRST_BYTES), len(head)
        self._bytes[: self._at] = head
        self._view = memoryview(self._bytes)

    def room(self, wanted: int) -> memoryview:
        """Where the next bytes are to be written."""
        if self._at + wanted > len(self._bytes):
            larger = bytearray(max(self._at + wanted, 2 * len(self._bytes)))
            larger[: self._at] = self._view[: self._at]
            self._view.release()
            self._bytes, self._view = larger, memoryview(larger)
        return self._view[self._at : self._at + wanted]

    def took(self, count: int) -> None:
        """So many were."""
        self._at += count
        self.intake.last = time.monotonic()

    def complete(self) -> bytes:
        """The whole file; its own memory is given back."""
        return bytes(self._view[: self._at])

    def close(self) -> None:
        """Forget it."""
        self._view.release()


def _head(command: Command, transfer_syntax_uid: str) -> bytes:
    """Preamble and group 0002 (PS3.10 section 7.1): what C-STORE does not bring."""

    def uid(element: int, value: str) -> bytes:
        padded = value.encode("ascii")
        padded += b"\0" * (len(padded) % 2)
        return _SHORT.pack(2, element, b"UI", len(padded)) + padded

    rest = b"".join(
        (
            _LONG.pack(2, 1, b"OB", 0, 2) + b"\0\1",
            uid(0x0002, command.sop_class_uid),
            uid(0x0003, command.sop_uid),
            uid(0x0010, transfer_syntax_uid),
            uid(0x0012, IMPLEMENTATION_CLASS_UID),
        )
    )
    return bytes(128) + b"DICM" + _SHORT.pack(2, 0, b"UL", 4) + len(rest).to_bytes(4, "little") + rest


def wait_for(association: Association, intake: Intake, timeout_s: float) -> None:
    """Let an association wait for its next answer as long as instances come; a PACS need not say "pending" meanwhile.

    It waits no longer when the sink has failed.
    """
    messages: queue.Queue[Any] = association.dimse.msg_queue

    def get_msg(block: bool = False) -> Any:
        since = time.monotonic()
        while True:
            try:
                return messages.get(block=block, timeout=_LOOK_EVERY_S)
            except queue.Empty:
                silent_s = time.monotonic() - max(since, intake.last)
                if not block or intake.error is not None or silent_s > timeout_s:
                    return None, None

    association.dimse.get_msg = get_msg  # type: ignore[method-assign]


def in_slices(event: evt.Event) -> None:
    """Let a blocked read look up now and then, as the listener's upper layer expects."""
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.settimeout(0.5)

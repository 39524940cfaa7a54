"""pynetdicom's upper layer with a quick way in for C-STORE.

pynetdicom negotiates, rejects, releases, aborts and answers C-ECHO. It reads PDUs in pieces of 4 KB, decodes each of them into
objects, and passes messages between two threads that look every millisecond: 2.6 ms of CPU for a CT slice. So while an
association is established its provider thread reads P-DATA here: fragments of a C-STORE go straight into their buffer, the
answer goes straight to the socket. All else, whole PDUs and messages of other services, is given to pynetdicom's state machine.

What is used of pynetdicom 3 beyond its documentation: `DULServiceProvider._is_transport_event`, `._read_pdu_data`,
`._decode_pdu`, `._recv_pdu`, `.event_queue` (events of PS3.8 section 9.2.3), `Association._accepted_cx`, `._reactor_checkpoint`,
and `RequestHandler._create_association`. tests/unit/dicom/test_listener.py holds what depends on them.
"""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import A_ABORT, A_P_ABORT
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from radloop.dicom.listener.incoming import Incoming
from radloop.dicom.listener.inlet import SLICE_S, Inlet, Wake
from radloop.dicom.listener.messages import (
    C_STORE_RQ,
    COMMAND,
    LAST,
    Command,
    Malformed,
    fragment,
    read_command,
    store_response,
)

LOG = logging.getLogger(__name__)

LONGEST_PDU = 1 << 18
"""Offered to peers. One that sends longer P-DATA is read as well: what is held does not depend on it."""
_LONGEST_OTHER_PDU = 1 << 20
_LONGEST_COMMAND = 1 << 16
_P_DATA, _RELEASE_RQ = 4, 5
_HEADS = 12  # of a PDU and of the fragment in it
_ESTABLISHED = "Sta6"
_CLOSED, _INVALID = "Evt17", "Evt19"
_LOOK_EVERY_S = 0.05  # whether another thread ends the association
_SPARE_CONNECTIONS = 64


class Service(Protocol):
    """What an association does with C-STORE."""

    def begin(self, command: Command, transfer_syntax_uid: str) -> Incoming | None:
        """An instance is announced; None: it is not taken, and `finish` says why."""

    def finish(self, command: Command, incoming: Incoming | None) -> tuple[int, str]:
        """It has come: the status and an error comment for the peer."""

    def malformed(self, what: str) -> None:
        """The peer did not speak DICOM; its association is aborted."""

    def ended(self, *, released: bool) -> None:
        """The association is over."""


Refused = Callable[[str, str], None]
"""Told of a connection that was closed before it became an association: what failed, with which kind of error."""


class _PeerGone(Exception):
    """The connection was closed."""


class _Stop(Exception):
    """Another thread aborts this association."""


class _Parking(threading.Event):
    """Where pynetdicom's association thread waits while there is nothing for it, instead of looking every millisecond."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(_LOOK_EVERY_S if timeout is None else timeout)


class _Waking(queue.Queue[Any]):
    """What another thread wants to send: it wakes who waits for the peer."""

    def __init__(self, wake: Wake) -> None:
        super().__init__()
        self._wake = wake

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._wake()


class UpperLayer(DULServiceProvider):
    """One association's provider thread.

    Args:
        assoc: the association; the new provider takes the place of its own.
        serve: makes the `Service` of an association that was accepted.
    """

    def __init__(self, assoc: Association, serve: Callable[[Association], Service]) -> None:
        before = assoc.dul
        super().__init__(assoc)
        self.socket, self.event_queue = before.socket, before.event_queue
        self._idle_timer.timeout, self.artim_timer.timeout = assoc.network_timeout, assoc.acse_timeout
        self._serve = serve
        self._connection = self._socket()
        self._wake = Wake()
        self.to_provider_queue = _Waking(self._wake)
        self._inlet: Inlet | None = None
        self._service: Service | None = None
        self._command, self._context = bytearray(), 0
        self._syntaxes: dict[int, str] = {}
        self._announced: Command | None = None
        self._incoming: Incoming | None = None
        self._foreign = False
        self._broken = self._released = False
        self._parking = _Parking()
        self._parking.set()
        assoc._reactor_checkpoint = self._parking
        assoc.dul = self

    def run_reactor(self) -> None:
        """Read and send until the association is over."""
        try:
            super().run_reactor()
        finally:
            self._parking.set()
            self._drop()
            self._connection.close()  # pynetdicom leaves it open when the peer has reset it
            self._wake.close()
            if self._service is not None:
                self._service.ended(released=self._released)

    # What pynetdicom asks

    def _is_transport_event(self) -> bool:
        if self.state_machine.current_state != _ESTABLISHED:
            return super()._is_transport_event()
        if self._service is None:
            self._service = self._serve(self.assoc)
        return self._guarded(self._messages)

    def _read_pdu_data(self) -> None:
        if self._broken:  # aborted: what is still coming is not looked at
            try:
                if self._socket().recv(1 << 16):
                    return
            except (_PeerGone, OSError):
                pass
            self.event_queue.put(_CLOSED)
            return
        self._guarded(self._other_state)

    def _other_state(self) -> bool:
        head = bytearray(6)
        self._fill(memoryview(head))
        self._hand_over(head)
        return True

    def _guarded(self, read: Callable[[], bool]) -> bool:
        """Turn what may happen on the network into the state machine's events."""
        try:
            return read()
        except _Stop:
            return False
        except (_PeerGone, OSError):
            self._give(_CLOSED)
        except Malformed as error:
            self._broken = True
            if self._service is not None:
                self._service.malformed(str(error))
            self._give(_INVALID)
        return True

    def _give(self, event: str) -> None:
        self._drop()
        self._parking.set()
        self.event_queue.put(event)

    def _drop(self) -> None:
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None

    # Reading

    def _socket(self) -> socket.socket:
        if self.socket is None or self.socket.socket is None:
            raise _PeerGone
        return self.socket.socket

    def _messages(self) -> bool:
        """Take what the peer sends until pynetdicom has something to do; False: nothing has come for a while."""
        if self.to_user_queue.empty() and self.assoc.dimse.msg_queue.empty() and not self._kill_thread:
            self._parking.clear()
        head = bytearray(6)
        view = memoryview(head)
        while not self.to_provider_queue.queue and not self._kill_thread:
            if not self._readable():
                if self._idle_timer.expired:
                    self._parking.set()  # the association's thread looks at the timer, and aborts
                return False
            self._fill(view)
            self._idle_timer.restart()
            if head[0] != _P_DATA:
                self._hand_over(head)
                return True
            if self._p_data(int.from_bytes(head[2:6], "big")):
                return True
        return False

    def _readable(self) -> bool:
        """Whether to read: within a message reading waits, between messages it also looks for what is to be sent."""
        return self._announced is not None or self._in().readable(_LOOK_EVERY_S)

    def _in(self) -> Inlet:
        """Made when first something is read: of an association that we ask for, the connection is not there before."""
        connection = self._socket()
        if self._inlet is None:
            self._inlet = Inlet(connection, self._wake)
        return self._inlet

    def _fill(self, view: memoryview, after: int = 0) -> None:
        """Receive exactly so many bytes. `after`: so many more are sure to follow."""
        inlet = self._in()
        # Only who is established may be read ahead: what comes before and after is pynetdicom's.
        established = self.state_machine.current_state == _ESTABLISHED
        done, wanted, last = 0, len(view), time.monotonic()
        while done < wanted:
            count = inlet.read(view[done:], ahead=established, after=after)
            if count is None:
                self._may_wait(last)
            elif not count:
                raise _PeerGone
            else:
                done += count
                if established and done < wanted:
                    last = time.monotonic()

    def _may_wait(self, since: float) -> None:
        aborting = any(isinstance(waits, A_ABORT | A_P_ABORT) for waits in list(self.to_provider_queue.queue))
        if aborting or self._kill_thread or self.artim_timer.expired:
            raise _Stop
        timeout_s = self.network_timeout
        if timeout_s is not None and time.monotonic() - since > timeout_s:
            LOG.error("a peer stopped within a message; its connection is closed")
            raise _PeerGone

    def _hand_over(self, head: bytearray) -> None:
        """Give one whole PDU to the state machine."""
        length = int.from_bytes(head[2:6], "big")
        if not 1 <= head[0] <= 7 or length > _LONGEST_OTHER_PDU:
            raise Malformed("a PDU of unknown type, or longer than it may be")
        body = bytearray(length)
        self._fill(memoryview(body))
        self._released |= head[0] == _RELEASE_RQ
        self._decode(head + body)

    def _decode(self, pdu: bytearray) -> None:
        try:
            decoded, event = self._decode_pdu(pdu)
        except Exception as error:
            raise Malformed("a PDU that cannot be decoded") from error
        self._parking.set()
        self.event_queue.put(event)
        self._recv_pdu.put(decoded)

    # P-DATA (PS3.8 section 9.3.5 and annex E)

    def _p_data(self, left: int) -> bool:
        """Read one PDU's fragments; True when something was given to pynetdicom."""
        item = bytearray(6)
        view, given = memoryview(item), False
        while left:
            if left < 6:
                raise Malformed("a P-DATA PDU that ends within a fragment's head")
            self._fill(view)
            size, context_id, control = int.from_bytes(item[:4], "big") - 2, item[4], item[5]
            left -= 6 + size
            if size < 0 or left < 0:
                raise Malformed("a fragment that is longer than its PDU")
            if context_id not in self.assoc._accepted_cx:
                raise Malformed("a fragment in a presentation context that was not accepted")
            if control & COMMAND:
                given |= self._take_command(size, context_id, last=bool(control & LAST))
            else:
                given |= self._take_data(size, context_id, control)
        return given

    def _take_command(self, size: int, context_id: int, *, last: bool) -> bool:
        if self._announced is not None or (self._command and context_id != self._context):
            raise Malformed("a command before the data set of the last one")
        if len(self._command) + size > _LONGEST_COMMAND:
            raise Malformed("a command set that is too long")
        part = bytearray(size)
        self._fill(memoryview(part))
        self._command += part
        self._context = context_id
        if not last:
            return False
        content, self._command = bytes(self._command), bytearray()
        command = read_command(content)
        if command.field != C_STORE_RQ:
            self._foreign = command.has_data_set
            self._announced = command if command.has_data_set else None
            self._decode(bytearray(fragment(context_id, COMMAND | LAST, content)))
            return True
        assert self._service is not None
        self._incoming = self._service.begin(command, self._syntax(context_id)) if command.has_data_set else None
        if command.has_data_set:
            self._announced = command
        else:
            self._answer(command)
        return False

    def _syntax(self, context_id: int) -> str:
        if context_id not in self._syntaxes:
            self._syntaxes[context_id] = str(self.assoc._accepted_cx[context_id].transfer_syntax[0])
        return self._syntaxes[context_id]

    def _take_data(self, size: int, context_id: int, control: int) -> bool:
        if self._announced is None or context_id != self._context:
            raise Malformed("a data set without a command")
        last = bool(control & LAST)
        if self._foreign:
            part = bytearray(size)
            self._fill(memoryview(part))
            self._decode(bytearray(fragment(context_id, control, bytes(part))))
            if last:
                self._announced, self._foreign = None, False
            return True
        if self._incoming is None:
            self._discard(size)
        else:
            self._receive(self._incoming, size, after=0 if last else _HEADS)
        if last:
            command, self._announced = self._announced, None
            self._answer(command)
        return False

    def _receive(self, incoming: Incoming, left: int, after: int) -> None:
        while left:
            room = incoming.room(left)
            self._fill(room, after if len(room) == left else 0)
            incoming.took(len(room))
            left -= len(room)

    def _discard(self, left: int) -> None:
        scratch = memoryview(bytearray(min(left, 1 << 16)))
        while left:
            part = scratch[: min(left, len(scratch))]
            self._fill(part)
            left -= len(part)

    def _answer(self, command: Command) -> None:
        assert self._service is not None
        incoming, self._incoming = self._incoming, None
        try:
            status, comment = self._service.finish(command, incoming)
        finally:
            if incoming is not None:
                incoming.close()
        longest = int(self.assoc.requestor.maximum_length or 0)
        self._socket().sendall(store_response(command, self._context, status, comment, longest))
        self._idle_timer.restart()


class Entity(AE):
    """pynetdicom's AE, which counts associations against its maximum: those that have asked and have not ended."""

    @property
    def active_associations(self) -> list[Association]:
        """Not those whose thread is about to end, nor connections on which nobody has asked yet."""
        return [
            association
            for association in super().active_associations
            if association.requestor.primitive is not None
            and not (association.is_rejected or association.is_released or association.is_aborted)
        ]


class Handler(RequestHandler):
    """Makes an association of a connection: TLS first, in this connection's own thread, then ours beneath pynetdicom's."""

    server: Server

    def handle(self) -> None:
        """Shake hands, then start the association's threads."""
        if isinstance(self.request, ssl.SSLSocket):
            try:
                self.request.settimeout(self.server.ae.acse_timeout)
                self.request.do_handshake()
            except OSError as error:
                self.server.refused("TLS", type(error).__name__)
                self.server.shutdown_request(self.request)
                return
        self.request.settimeout(SLICE_S)
        super().handle()

    def _create_association(self) -> Association:
        association = super()._create_association()
        UpperLayer(association, self.server.serve)
        return association


class Server(ThreadedAssociationServer):
    """Accepts connections. One that does not shake hands, or says nothing, holds up nobody else.

    Attributes:
        serve: makes the `Service` of an association.
        refused: a `Refused`.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any, serve: Callable[[Association], Service], refused: Refused, **more: Any) -> None:
        self.serve, self.refused = serve, refused
        super().__init__(*args, **{"request_handler": Handler, **more})

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; without Nagle's algorithm, which with delayed acknowledgements holds every answer for 40 ms or more."""
        assert self.socket is not None
        connection, address = self.socket.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.ssl_context is not None:
            connection = self.ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection may become an association: far more than may be open are not even listened to."""
        return len(self.active_associations) < self.ae.maximum_associations + _SPARE_CONNECTIONS

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the kind only."""
        LOG.exception("a connection failed before it became an association")

    def service_actions(self) -> None:
        """pynetdicom collects garbage here, which stops all associations for as long."""

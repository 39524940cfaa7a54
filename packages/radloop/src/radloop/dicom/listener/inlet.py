"""What comes in on a connection, with few system calls."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading

SLICE_S = 0.5
"""How long a read waits before its caller may look around."""
_AHEAD_BYTES = 4096


class Wake:
    """Something for a thread that waits on a connection to wait on as well. From any thread, at any time."""

    def __init__(self) -> None:
        self._handle = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open, self._lock = True, threading.Lock()

    def fileno(self) -> int:
        """For `select.poll`."""
        return self._handle

    def __call__(self) -> None:
        """Wake who waits, or who will wait next."""
        with self._lock:  # the number of a closed handle may be another file's by now
            if self._open:
                os.eventfd_write(self._handle, 1)

    def clear(self) -> None:
        """It woke us."""
        os.eventfd_read(self._handle)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._handle)


class Inlet:
    """Small pieces come from what was read ahead, large ones go straight to where they belong.

    A plain socket is made a blocking one with a time limit in the kernel: one call waits and receives, and may be told to
    return only when all has come. Python's own time limit asks `poll` before each piece.

    Args:
        connection: a connected socket, with or without TLS.
        wake: ends `readable`.
    """

    def __init__(self, connection: socket.socket, wake: Wake) -> None:
        self._connection, self._wake = connection, wake
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None
        self._all = 0
        if self._tls is None:
            connection.settimeout(None)
            limit = struct.pack("@ll", 0, int(SLICE_S * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._all = socket.MSG_WAITALL
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._start = self._end = 0
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(wake, select.POLLIN)

    def readable(self, timeout_s: float) -> bool:
        """Wait until something has come (True), or somebody wakes us, or the time is over."""
        if self._start < self._end or (self._tls is not None and self._tls.pending()):
            return True
        came = False
        for handle, _ in self._poll.poll(timeout_s * 1000):
            if handle == self._wake.fileno():
                self._wake.clear()
            else:
                came = True
        return came

    def read(self, view: memoryview, *, ahead: bool, after: int = 0) -> int | None:
        """Receive into a view, not always all of it.

        Args:
            view: at least one byte.
            ahead: more may be read from the connection than is asked for now.
            after: so many bytes are sure to follow: they are waited for as well where that saves a call.

        Returns:
            How many bytes; 0 when the peer has closed the connection, None when nothing came for `SLICE_S`.

        Raises:
            OSError: the connection is broken.
        """
        if self._start == self._end:
            try:
                if not ahead or len(view) >= _AHEAD_BYTES:
                    if after and self._tls is None:
                        return self._with(view, after)
                    return self._connection.recv_into(view, 0, self._all)
                self._start, self._end = 0, self._connection.recv_into(self._ahead)
            except (TimeoutError, BlockingIOError):
                return None
        count = min(len(view), self._end - self._start)
        view[:count] = self._ahead[self._start : self._start + count]
        self._start += count
        return count

    def _with(self, view: memoryview, after: int) -> int:
        count = self._connection.recvmsg_into([view, self._ahead[:after]], 0, self._all)[0]
        self._start, self._end = 0, max(count - len(view), 0)
        return min(count, len(view))

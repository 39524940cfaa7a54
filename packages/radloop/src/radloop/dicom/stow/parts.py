"""multipart/related (RFC 2046 section 5.1) as it streams in: no part is larger in memory than `SPOOL_BYTES`.

A part that grows larger goes on in a file without a name in the landing folder (O_TMPFILE), which is gone with the process.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from email.message import Message
from pathlib import Path

from radloop.catalog.database import storage_errors

SPOOL_BYTES = 8 << 20
BEFORE = 1024
"""Bytes kept free before a part in its memory: a header of ours may take the place of the sender's without a copy."""
_FIRST_BYTES = 1 << 20
_POOLED = 64
_MOST_HEADER_BYTES = 16 << 10
_HEADERS_END = b"\r\n\r\n"


class Malformed(ValueError):
    """The bytes are no multipart message, or end before its last boundary."""


class UnsupportedMedia(ValueError):
    """The body is no multipart/related of DICOM instances."""


def boundary_of(content_type: str) -> bytes:
    """The boundary of a `multipart/related; type="application/dicom"; boundary=...` (PS3.18 section 8.7.2).

    Raises:
        UnsupportedMedia: it is of another type.
        Malformed: it names no boundary.
    """
    message = Message()
    message["Content-Type"] = content_type
    inner = message.get_param("type")
    if message.get_content_type() != "multipart/related" or (inner and str(inner).lower() != "application/dicom"):
        raise UnsupportedMedia
    boundary = message.get_param("boundary")
    if not isinstance(boundary, str) or not 0 < len(boundary) <= 200:
        raise Malformed("the Content-Type names no boundary")
    return boundary.encode("latin-1")


class Pool:
    """Memory that parts give back, so that the next ones need not ask the system for it. Safe for several threads."""

    def __init__(self) -> None:
        self._free: deque[bytearray] = deque()

    def take(self) -> bytearray:
        """Some memory; what is in it means nothing."""
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(_FIRST_BYTES)

    def give(self, memory: bytearray) -> None:
        """Memory that nobody looks at any more."""
        if len(memory) == _FIRST_BYTES and len(self._free) < _POOLED:
            self._free.append(memory)


class Part:
    """One part: its Content-Type in lower case, and its bytes.

    `too_large`: it grew larger than allowed; `unkept`: there was no room to spool it. Its bytes are not there then.
    """

    def __init__(self, content_type: str, folder: Path, most_bytes: int, pool: Pool) -> None:
        self.content_type = content_type
        self.size = 0
        self.too_large = self.unkept = False
        self._folder, self._most = folder, most_bytes
        self._pool = pool
        self.memory = pool.take()
        """Its bytes begin at `BEFORE`, unless it is spooled."""
        self._spool = -1
        self._map: mmap.mmap | None = None

    def write(self, data: memoryview) -> None:
        """More of it."""
        at = BEFORE + self.size
        self.size += len(data)
        if self.lost:
            return
        if self.size > self._most:
            self.too_large = True
            self.close()
        elif self._spool < 0 and self.size <= SPOOL_BYTES:
            if at + len(data) > len(self.memory):
                self._grow(at, at + len(data))
            self.memory[at : at + len(data)] = data
        else:
            try:
                with storage_errors("landing"):
                    self._to_spool(data)
            except OSError:
                raise
            except Exception:  # noqa: BLE001 - StorageFull: told for this part, the others go on
                self.unkept = True
                self.close()

    def _grow(self, used: int, needed: int) -> None:
        larger = bytearray(max(needed, 2 * len(self.memory)))
        larger[:used] = memoryview(self.memory)[:used]
        self._forget()
        self.memory = larger

    def _forget(self) -> None:
        memory, self.memory = self.memory, bytearray()
        self._pool.give(memory)

    def _to_spool(self, data: memoryview) -> None:
        if self._spool < 0:
            self._spool = os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o600)
            _write_all(self._spool, memoryview(self.memory)[BEFORE : BEFORE + self.size - len(data)])
            self._forget()
        _write_all(self._spool, data)

    @property
    def lost(self) -> bool:
        """Its bytes are not there."""
        return self.too_large or self.unkept

    @property
    def spooled(self) -> bool:
        """It is in a file, not in memory."""
        return self._spool >= 0

    @property
    def data(self) -> memoryview:
        """All of it, in memory or mapped."""
        if self._spool < 0:
            return memoryview(self.memory)[BEFORE : BEFORE + self.size]
        if self._map is None:
            self._map = mmap.mmap(self._spool, self.size, prot=mmap.PROT_READ)
        return memoryview(self._map)

    def close(self) -> None:
        """Give its memory or its file back."""
        self._forget()
        if self._spool >= 0:
            os.close(self._spool)
            self._spool = -1


def _write_all(handle: int, data: memoryview) -> None:
    written = 0
    while written < len(data):
        written += os.write(handle, data[written:])


class Parts:
    """The parser: `feed` what comes, take the parts that are complete, `end` at the end.

    Args:
        boundary: see `boundary_of`.
        folder: where large parts are spooled.
        most_bytes: a larger part is passed over, and says so.
        pool: where parts take their memory from.
    """

    def __init__(self, boundary: bytes, folder: Path, most_bytes: int, pool: Pool | None = None) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._folder, self._most, self._pool = folder, most_bytes, pool or Pool()
        self._rest = b"\r\n"  # the first delimiter may be the first line
        self._part: Part | None = None
        self._heading = self.ended = False

    def feed(self, data: bytes) -> list[Part]:
        """Parts that are complete with these bytes. Raises `Malformed`."""
        if self.ended:  # an epilogue means nothing
            return []
        buffer = self._rest + data
        view = memoryview(buffer)
        complete: list[Part] = []
        at = 0
        while not self.ended:
            if self._heading:
                after = self._read_heading(buffer, at)
                if after is None:
                    break
                at = after
                continue
            found = buffer.find(self._delimiter, at)
            after = found + len(self._delimiter)
            if found < 0 or after + 2 > len(buffer):
                keep = max(at, found if found >= 0 else len(buffer) - len(self._delimiter) - 1)
                self._write(view[at:keep])
                at = keep
                break
            if buffer[after : after + 2] not in (b"--", b"\r\n") and buffer[after] not in b" \t":
                self._write(view[at:after])  # a line that only begins like the boundary
                at = after
                continue
            self._write(view[at:found])
            if self._part is not None:
                complete.append(self._part)
                self._part = None
            at, self._heading = after, True
        self._rest = bytes(view[at:])
        return complete

    def end(self) -> None:
        """No more will come. Raises `Malformed` unless the last boundary has been seen."""
        self.close()
        if not self.ended:
            raise Malformed("the message ends before its last boundary")

    def close(self) -> None:
        """Give back what an unfinished part holds."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def _write(self, data: memoryview) -> None:
        if self._part is not None and len(data):
            self._part.write(data)

    def _read_heading(self, buffer: bytes, at: int) -> int | None:
        """After a delimiter: `--`, or the rest of its line and headers. Where the body begins; None: more must come."""
        if buffer.startswith(b"--", at):
            self.ended = True
            return len(buffer)
        end = buffer.find(_HEADERS_END, at)
        if end < 0:
            if len(buffer) - at > _MOST_HEADER_BYTES:
                raise Malformed("the headers of a part do not end")
            return None
        kind = ""
        for line in buffer[at:end].decode("latin-1").split("\r\n")[1:]:
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-type":
                kind = value.strip().lower()
        self._part, self._heading = Part(kind, self._folder, self._most, self._pool), False
        return end + len(_HEADERS_END)

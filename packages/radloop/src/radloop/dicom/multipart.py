"""multipart/related (RFC 2387, RFC 2046 section 5.1) as it streams in, one part in memory at a time.

DICOMweb carries instances so (PS3.18 section 8.6). Push bytes in, take parts out; who reads from the network stays free
in how.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.message import Message

import msgspec

_HEADERS_END = b"\r\n\r\n"
_MOST_HEADER_BYTES = 16 << 10


class MultipartError(ValueError):
    """The bytes are no multipart message, end before their last boundary, or a part is larger than allowed."""


class Part(msgspec.Struct, frozen=True):
    """One part: its headers, names in lower case, and its body."""

    headers: dict[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"Part({len(self.body)} bytes)"


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names. Raises MultipartError when it is no multipart or names none."""
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_maintype() != "multipart" or not isinstance(boundary, str) or not boundary:
        raise MultipartError("no multipart message, or one without a boundary")
    return boundary.encode("latin-1")


class Multipart:
    """A parser: `feed` what has come, take what is complete, `end` at the end.

    Args:
        boundary: see `boundary_of`.
        max_part_bytes: a part that grows larger is refused.
    """

    def __init__(self, boundary: bytes, *, max_part_bytes: int) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._max = max_part_bytes
        self._buffer = bytearray(b"\r\n")  # the first delimiter may be the first line
        self._searched = 0
        self._begun = self._ended = False
        self._headers: dict[str, str] | None = None
        self._length: int | None = None

    def feed(self, data: bytes) -> Iterator[Part]:
        """Parts that are complete with these bytes. Raises MultipartError."""
        if self._ended:  # an epilogue means nothing
            return
        self._buffer += data
        while (part := self._next()) is not None:
            yield part

    def end(self) -> None:
        """No more will come. Raises MultipartError unless the last boundary has been seen."""
        if not self._ended:
            raise MultipartError("the message ends before its last boundary")

    def _next(self) -> Part | None:
        """Advance as far as the buffer goes; a part if one is complete."""
        while not self._ended:
            if self._begun and self._headers is None and not self._read_headers():
                return None
            found = self._find_delimiter()
            if found is None:
                return None
            body, headers = bytes(memoryview(self._buffer)[:found]), self._headers
            del self._buffer[: found + len(self._delimiter)]
            self._searched, self._headers = 0, None
            was, self._begun = self._begun, True
            if was:
                return Part(headers or {}, body)
        return None

    def _read_headers(self) -> bool:
        """What follows a delimiter: the rest of its line and the headers, or `--`."""
        if len(self._buffer) >= 2 and self._buffer[:2] == b"--":
            self._ended = True
            self._buffer.clear()
            return False
        end = self._buffer.find(_HEADERS_END)
        if end < 0:
            if len(self._buffer) > _MOST_HEADER_BYTES:
                raise MultipartError("the headers of a part do not end")
            return False
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")[1:]
        self._headers = {name.strip().lower(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
        length = self._headers.get("content-length", "")
        self._length = int(length) if re.fullmatch(r"\d{1,15}", length) else None
        del self._buffer[: end + len(_HEADERS_END)]
        return True

    def _find_delimiter(self) -> int | None:
        """Where the part ends. Its Content-Length, where true, saves looking for the boundary among its bytes."""
        buffer, delimiter = self._buffer, self._delimiter
        if self._headers is not None:
            if max(self._length or 0, len(buffer) - len(delimiter)) > self._max:
                raise MultipartError(f"a part is larger than {self._max} bytes")
            if self._length is not None:
                if len(buffer) < self._length + len(delimiter):
                    return None
                if buffer.startswith(delimiter, self._length):
                    return self._length
                self._length = None
        found = buffer.find(delimiter, self._searched)
        if found < 0:
            self._searched = max(len(buffer) - len(delimiter) + 1, 0)
            if self._headers is None:  # a preamble means nothing
                del buffer[: self._searched]
                self._searched = 0
            return None
        return found

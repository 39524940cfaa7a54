"""A plain file to a clean one: the header from `fast`, the pixels copied by the kernel, or through one small buffer."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from radloop.dicom import spans
from radloop.dicom.deidentify.fast import Fast, Head
from radloop.dicom.deidentify.stowaways import Bits, cleared, uncommented
from radloop.dicom.phi import pixel_texts

Tally = Counter[tuple[str, str]]
Gate = Callable[[bytes, Head, Iterable[str]], None]
"""Called with the source's first bytes, what will be written and texts of the codestream, before anything is written;
raises PhiError, or NotPlain where it cannot tell."""

_FIRST, _WHOLE = 1 << 15, 1 << 26
"""Bytes of a file that are read first; of the longest that is read whole for its header or its frames."""
_BUFFER = 1 << 17
_PHOTOMETRIC = 0x00280004
NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1"})
_mine = threading.local()


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    head: Head
    sha256: str
    """Of the file; empty if it was not asked for."""
    size: int


class _NotClean(Exception):
    """Something hides beside the pixels."""


def rewrite(
    fast: Fast, source: Path, target: Path, *, site: str, tally: Tally | None, gate: Gate | None, digest: bool
) -> Written | None:
    """Clean a file into another, visible at its place by one rename; None, and nothing written, if it is not plain.

    Args:
        fast: cleans headers. source, target, site, tally: as in `Deidentifier.clean_file`.
        gate: raises PhiError. digest: whether to compute the file's SHA-256, half of all work on a large file.

    Raises:
        PhiError: the gate's. OSError: the disk is full or the source cannot be read.
    """
    handle = os.open(source, os.O_RDONLY)
    try:
        size, wanted = os.fstat(handle).st_size, _FIRST
        counts: Tally = Counter()
        while True:
            data = os.pread(handle, wanted, 0)
            try:
                head = fast.head(data, size, site, None if tally is None else counts)
                break
            except spans.NeedMore:
                if size > _WHOLE or wanted >= size:
                    return None
                wanted = size
        if head is None:
            return None
        plain, texts = _stowaways(head, data)
        if not plain:
            return None
        try:
            if gate is not None:
                gate(data, head, texts)
        except (spans.NotPlain, spans.NeedMore):
            return None
        try:
            sha256 = _write(handle, target, head, digest)
        except _NotClean:
            return None
        if tally is not None:
            tally.update(counts)
        return Written(head, sha256, len(head.header) + head.pixels[1] - head.pixels[0])
    finally:
        os.close(handle)


def _stowaways(head: Head, data: bytes) -> tuple[bool, Iterable[str]]:
    """Whether PixelData is whole and holds pixels only, as far as can be told before it is copied; texts in it."""
    begin, end = head.pixels
    frames = max(head.number("NumberOfFrames"), 1)
    encapsulated = data[begin - 4 : begin] == b"\xff\xff\xff\xff"
    if encapsulated is (head.syntax in NATIVE) or b"422" in head.elements.get(_PHOTOMETRIC, b""):
        return False, ()
    if encapsulated:
        if end > len(data):
            return False, ()
        value = data[begin : end - 8]
        whole = len(spans.fragments(data, begin, end)[0]) > frames
        return whole and uncommented(value, head.syntax, frames) is None, pixel_texts(value, head.syntax, 0, frames)
    cells = head.number("Rows") * head.number("Columns") * head.number("SamplesPerPixel") * frames
    return (end - begin) * 8 - cells * head.number("BitsAllocated") in range(16), ()


def _write(source: int, target: Path, head: Head, digest: bool) -> str:
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        out = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
    try:
        try:
            sha256 = _copy(source, out, head, digest)
        finally:
            os.close(out)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return sha256


def _copy(source: int, out: int, head: Head, digest: bool) -> str:
    """Write the header and the pixels; looks at what passes by if it has to."""
    begin, end = head.pixels
    bits = head.bits if head.syntax in NATIVE and head.bits is not None and head.bits.have_room else None
    if bits is not None and (end - begin) % (bits.allocated // 8):
        bits = None
    if bits is None and not digest:
        _put(out, head.header)
        _by_kernel(source, out, begin, end)
        return ""
    buffer = getattr(_mine, "buffer", None)
    if buffer is None:
        buffer = _mine.buffer = memoryview(bytearray(_BUFFER))
    state = hashlib.sha256(head.header) if digest else None
    ahead = head.header
    while begin < end:
        got = os.preadv(source, [buffer[: min(_BUFFER, end - begin)]], begin)
        chunk = buffer[: got // 8 * 8 or got]  # whole cells
        if not chunk:
            raise _NotClean  # the file became shorter
        if bits is not None and _beyond_stored(chunk, bits):
            raise _NotClean
        if state is not None:
            state.update(chunk)
        _put(out, ahead, chunk)
        ahead, begin = b"", begin + len(chunk)
    return state.hexdigest() if state is not None else ""


def _beyond_stored(cells: memoryview, bits: Bits) -> bool:
    """Whether bits above BitsStored are neither zero nor the sign nor padding: `stowaways.cleared` would clear some."""
    pixels = np.frombuffer(cells, f"<u{bits.allocated // 8}")
    if int(np.bitwise_or.reduce(pixels)) < 1 << bits.stored:
        return False
    if bits.signed:
        spare = bits.allocated - bits.stored
        extended = (pixels << pixels.dtype.type(spare)).view(f"<i{bits.allocated // 8}")
        extended >>= extended.dtype.type(spare)
        if np.array_equal(extended.view(pixels.dtype), pixels):
            return False
    return cleared(bytes(cells), bits) is not None


def _put(out: int, *parts: bytes | memoryview) -> None:
    left = sum(map(len, parts))
    left -= os.writev(out, parts)
    if left:  # a signal, or a disk that is nearly full
        rest = memoryview(b"".join(parts))[-left:]
        while rest:
            rest = rest[os.write(out, rest) :]


def _by_kernel(source: int, out: int, begin: int, end: int) -> None:
    """Copy `source[begin:end]` to where `out` stands; a file system that can share blocks does."""
    try:
        while begin < end:
            copied = os.copy_file_range(source, out, end - begin, begin)
            if not copied:
                raise _NotClean
            begin += copied
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        while begin < end:  # between two file systems, or one that cannot
            copied = os.sendfile(out, source, begin, end - begin)
            if not copied:
                raise _NotClean from None
            begin += copied

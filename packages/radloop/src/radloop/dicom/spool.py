"""A file that has no name yet, so that a kill leaves nothing; written past the system's cache where that can be.

What is received is large, and is not read again soon. Cached, each of its pages would be taken, filled and given back: on a
virtual machine this cost more than all else that receiving an instance takes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import threading
from pathlib import Path

BLOCK_BYTES = 4096
"""What O_DIRECT asks places and lengths to be multiples of, in memory and in the file."""
_BOUNCE_BYTES = 1 << 20


class Spool:
    """A nameless file in a folder.

    Attributes:
        handle: its file descriptor; `close` closes it.

    Raises:
        OSError: no space left, or another failure of the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.handle, self._direct = _nameless(folder)

    def write(self, memory: memoryview, start: int, end: int, at: int) -> None:
        """Write a part of some memory.

        Args:
            memory: begins at a page of memory, is whole pages long.
            start, end: the part; `start` is a multiple of `BLOCK_BYTES`. Where `end` is not, the file ends with this part.
            at: where in the file; a multiple of `BLOCK_BYTES`.
        """
        whole = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        stop = whole if self._direct else end
        while start < stop:
            try:
                count = os.pwrite(self.handle, memory[start:stop], at)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._cache()  # this file system wants other multiples
                stop = end
                continue
            start, at = start + count, at + count
        if start > end:  # what lay in memory behind the part is not of this file
            os.ftruncate(self.handle, at - (start - end))

    def fill(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of the file, from memory of any kind."""
        if not self._direct:
            write_all(self.handle, data)
            return
        bounce = _bounce()
        with memoryview(data) as view, memoryview(bounce) as memory:
            for at in range(0, len(view), _BOUNCE_BYTES):
                piece = view[at : at + _BOUNCE_BYTES]
                memory[: len(piece)] = piece
                self.write(memory, 0, len(piece), at)

    def empty(self) -> None:
        """Give its space back."""
        os.ftruncate(self.handle, 0)

    def close(self) -> None:
        """Done with it: it goes, unless it was named."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _cache(self) -> None:
        self._direct = False
        fcntl.fcntl(self.handle, fcntl.F_SETFL, fcntl.fcntl(self.handle, fcntl.F_GETFL) & ~os.O_DIRECT)


_LOCAL = threading.local()


def _bounce() -> mmap.mmap:
    """This thread's memory that begins at a page."""
    found = getattr(_LOCAL, "bounce", None)
    if found is None:
        found = _LOCAL.bounce = mmap.mmap(-1, _BOUNCE_BYTES)
    return found


def _nameless(folder: Path) -> tuple[int, bool]:
    """A handle, and whether it is written past the cache. Not every file system can do either."""
    for flags, direct in ((os.O_TMPFILE | os.O_DIRECT, True), (os.O_TMPFILE, False)):
        try:
            return os.open(folder, flags | os.O_RDWR, 0o600), direct
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno()), False


def write_all(handle: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of it where the file is at."""
    with memoryview(data) as view:
        written = os.write(handle, view)
        while written < len(view):
            written += os.write(handle, view[written:])

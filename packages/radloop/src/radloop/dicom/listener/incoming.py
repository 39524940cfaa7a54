"""One instance on its way in: hashed, and written, as its fragments arrive.

Its bytes go past the system's cache to a file that has no name yet, in large pieces, straight from the memory that they were
received into: nobody will read them soon, and cached pages would cost more than all else that is done here. As long as they are
few they stay in that memory, where the header is read.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

from radloop.catalog.database import StorageFull, storage_errors
from radloop.dicom import landed
from radloop.dicom.landing import Landing, Received
from radloop.dicom.listener.messages import Command
from radloop.dicom.spool import BLOCK_BYTES, Spool

HELD_BYTES = 8 << 20
"""What one association holds in memory of an instance; of a larger one, the file is mapped."""
_PIECE_BYTES = 1 << 20
_HASHED_BYTES = 64 << 10


class Hold:
    """The memory of one association, used again for each instance. Pages that no instance has needed yet take no memory."""

    def __init__(self) -> None:
        self.bytes = mmap.mmap(-1, HELD_BYTES)


class Incoming:
    """Give it room to receive into (`room`), say how much was received (`took`), then `complete` and `close` it.

    Where the disk is full or fails, it takes and drops the rest of the message: the peer gets its answer when all of it has come.
    """

    def __init__(
        self,
        command: Command,
        transfer_syntax_uid: str,
        *,
        sender: str,
        site: str,
        landing: Landing,
        hold: Hold,
    ) -> None:
        self.command, self.sender, self.site = command, sender, site
        self.failure: Exception | None = None
        self.size = 0
        """Bytes of the data set so far."""
        self._landing = landing
        self._head = landed.header(
            sop_class_uid=command.sop_class_uid,
            sop_uid=command.sop_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            sender=sender,
            site=site,
        )
        self._digest = landed.begin(transfer_syntax_uid)
        self._view = memoryview(hold.bytes)
        self._at = len(self._head)  # where in the view the next bytes go
        self._view[: self._at] = self._head
        self._start = 0  # where in the file the view begins
        self._written = 0  # of the view
        self._hashed = self._at
        self._map: mmap.mmap | None = None
        self._spool: Spool | None = None

    def room(self, wanted: int) -> memoryview:
        """Where the next bytes are to be written: up to `wanted`, at least one."""
        if self._at == HELD_BYTES:
            self._write(HELD_BYTES)
            self._start, self._at, self._written, self._hashed = self._start + HELD_BYTES, 0, 0, 0
        return self._view[self._at : self._at + wanted]

    def took(self, count: int) -> None:
        """So many bytes were written into `room`."""
        self.size += count
        self._at += count
        if self._at - self._hashed >= _HASHED_BYTES:
            self._hash()
        if self._at - self._written >= _PIECE_BYTES:
            self._write(self._at - self._at % BLOCK_BYTES)

    def complete(self) -> Received:
        """The whole instance, its header sealed. Valid until `close`.

        Raises:
            StorageFull: there was no room for it.
            OSError: the disk failed.
        """
        self._hash()
        sha256 = self._digest.hexdigest()
        where, stamp = landed.seal_at(self._head), self._landing.stamp(sha256, self.site, self.sender)
        if self._start == 0:
            self._view[where] = stamp
        self._write(self._at, last=True)
        if self.failure is not None:
            raise self.failure
        assert self._spool is not None
        if self._start == 0:
            data = self._view[: self._at]
        else:
            self._map = mmap.mmap(self._spool.handle, 0)
            self._map[where] = stamp
            data = memoryview(self._map)
        return Received(
            data=data,
            site=self.site,
            sender=self.sender,
            sha256=sha256,
            sop_class_uid=self.command.sop_class_uid,
            sop_uid=self.command.sop_uid,
            spool=self._spool,
        )

    def close(self) -> None:
        """Forget it; what was not kept is gone."""
        self._view.release()
        if self._map is not None:
            with suppress(BufferError):  # somebody still looks at it; it goes with the last view
                self._map.close()
        if self._spool is not None:
            self._spool.close()

    def _hash(self) -> None:
        self._digest.update(self._view[self._hashed : self._at])
        self._hashed = self._at

    def _write(self, upto: int, *, last: bool = False) -> None:
        """Write the view up to here. The first block comes twice where its seal was not known yet."""
        if self.failure is not None:
            return
        self._hash()
        try:
            if self._spool is None:
                self._spool = Spool(self._landing.landing)
            if last and self._start == 0 and self._written:
                self._spool.write(self._view, 0, BLOCK_BYTES, 0)
            self._spool.write(self._view, self._written, upto, self._start + self._written)
            self._written = upto
        except OSError as error:
            self.failure = _told(error)
            if self._spool is not None:
                self._spool.empty()


def _told(error: OSError) -> Exception:
    """`StorageFull` where it says that there is no space left; what is something else stays what it is."""
    try:
        with storage_errors("landing"):
            raise error
    except (StorageFull, OSError) as told:
        return told

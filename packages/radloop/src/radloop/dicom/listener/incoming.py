"""One instance on its way in: hashed as its fragments arrive, in memory up to a bound, beyond it in a file without a name."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

from radloop.catalog.database import StorageFull, storage_errors
from radloop.dicom import landed
from radloop.dicom.landing import Landing, Received
from radloop.dicom.listener.messages import Command

HELD_BYTES = 8 << 20
"""What one association holds in memory of an instance; a larger one goes on in a file."""
_FIRST_BYTES = 1 << 20


class Hold:
    """The memory of one association, used again for each instance: it grows to what is needed, up to `HELD_BYTES`."""

    def __init__(self) -> None:
        self.bytes = bytearray(_FIRST_BYTES)


class Incoming:
    """Give it room to receive into (`room`), say how much was received (`took`), then `complete` and `close` it.

    Where the disk is full, it takes and drops the rest of the message: the peer gets its answer when all of it has come.
    """

    def __init__(
        self, command: Command, transfer_syntax_uid: str, *, sender: str, site: str, landing: Landing, hold: Hold
    ) -> None:
        self.command, self.sender, self.site = command, sender, site
        self.full: StorageFull | None = None
        self._landing, self._hold = landing, hold
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
        self._spool: int | None = None
        self._map: mmap.mmap | None = None
        self.size = 0
        """Bytes of the data set so far."""

    def room(self, wanted: int) -> memoryview:
        """Where the next bytes are to be written: up to `wanted`, at least one."""
        if self._spool is None and self._at + wanted > len(self._view):
            if self._at + wanted <= HELD_BYTES:
                self._grow(self._at + wanted)
            else:
                self._start_spool()
        return self._view[self._at : self._at + wanted]

    def took(self, count: int) -> None:
        """So many bytes were written into `room`."""
        new = self._view[self._at : self._at + count]
        self.size += count
        if self.full is not None:
            return
        self._digest.update(new)
        if self._spool is None:
            self._at += count
        else:
            self._write(new)

    def complete(self) -> Received:
        """The whole instance, its header sealed. Valid until `close`.

        Raises:
            StorageFull: there was no room for it.
        """
        if self.full is not None:
            raise self.full
        sha256 = self._digest.hexdigest()
        where, stamp = landed.seal_at(self._head, self.site), self._landing.stamp(sha256, self.site, self.sender)
        if self._spool is None:
            self._view[where] = stamp
            data = self._view[: self._at]
        else:
            os.pwrite(self._spool, stamp, where.start)
            self._map = mmap.mmap(self._spool, 0, access=mmap.ACCESS_READ)
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
            os.close(self._spool)

    def _grow(self, needed: int) -> None:
        larger = bytearray(min(max(needed, 2 * len(self._hold.bytes)), HELD_BYTES))
        larger[: self._at] = self._view[: self._at]
        self._view.release()
        self._hold.bytes, self._view = larger, memoryview(larger)

    def _start_spool(self) -> None:
        """Go on in a file."""
        try:
            with storage_errors("landing"):
                self._spool = landed.nameless(self._landing.landing)
        except StorageFull as error:
            self.full = error
        held, self._at = self._view[: self._at], 0
        if self._spool is not None:
            self._write(held)

    def _write(self, data: memoryview) -> None:
        assert self._spool is not None
        try:
            with storage_errors("landing"):
                while data:
                    data = data[os.write(self._spool, data) :]
        except StorageFull as error:
            self.full = error
            os.ftruncate(self._spool, 0)

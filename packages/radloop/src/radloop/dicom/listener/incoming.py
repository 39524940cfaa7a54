"""One instance on its way in: written and hashed as its fragments arrive.

Its bytes go to a file that has no name yet; as long as they are few they stay in memory as well, where its header is read.
Where a core is free, a second thread hashes meanwhile.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from radloop.catalog.database import StorageFull, storage_errors
from radloop.dicom import landed
from radloop.dicom.landing import Landing, Received
from radloop.dicom.listener.messages import Command

HELD_BYTES = 8 << 20
"""What one association holds in memory of an instance; of a larger one, the file is mapped."""
_FIRST_BYTES = 1 << 20
_WRITE_OUT_BYTES = 8 << 20


class Aside:
    """One thread that does things aside, in order; `wait` returns when all are done, and raises what one of them raised."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._pending = 0
        self._thread: threading.Thread | None = None

    def __call__(self, task: Callable[..., object], *arguments: object) -> None:
        """Do this aside."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="aside", daemon=True)
            self._thread.start()
        self._pending += 1
        self._tasks.put((task, arguments))

    def wait(self) -> None:
        """Return when nothing is left to do."""
        errors = []
        while self._pending:
            errors.append(self._done.get())
            self._pending -= 1
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the thread when it has done all."""
        if self._thread is not None:
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task[0](*task[1])
            except BaseException as error:  # noqa: BLE001 - `wait` raises it
                self._done.put(error)
            else:
                self._done.put(None)
            del task


class Hold:
    """The memory of one association, used again for each instance: it grows to what is needed, up to `HELD_BYTES`."""

    def __init__(self) -> None:
        self.bytes = bytearray(_FIRST_BYTES)
        self.aside = Aside()


class Incoming:
    """Give it room to receive into (`room`), say how much was received (`took`), then `complete` and `close` it.

    Where the disk is full or fails, it takes and drops the rest of the message: the peer gets its answer when all of it has come.

    Args:
        parallel: hash in a thread aside; worth it where a core would else be idle.
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
        parallel: bool,
    ) -> None:
        self.command, self.sender, self.site = command, sender, site
        self.failure: Exception | None = None
        self.size = 0
        """Bytes of the data set so far."""
        self.aside = hold.aside if parallel else None
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
        self._held = True
        self._map: mmap.mmap | None = None
        self._file: int | None = None
        try:
            self._file = landed.nameless(landing.landing)
        except OSError as error:
            self.failure = _told(error)
        self._write(self._view[: self._at])

    def room(self, wanted: int) -> memoryview:
        """Where the next bytes are to be written: up to `wanted`, at least one."""
        if self._held and self._at + wanted > len(self._view):
            if self._at + wanted <= HELD_BYTES:
                self._grow(self._at + wanted)
            else:
                self._let_go()
        return self._view[self._at : self._at + wanted]

    def took(self, count: int) -> None:
        """So many bytes were written into `room`."""
        new = self._view[self._at : self._at + count]
        self.size += count
        if self.failure is not None:
            return
        self._write(new)
        if self._held and self.aside is not None:
            self.aside(self._go_ahead, new)
        else:
            self._digest.update(new)
        if self._held:
            self._at += count

    def _go_ahead(self, new: memoryview) -> None:
        """Aside: the disk begins, and the digest goes on."""
        if self._file is not None:
            landed.start_writing(self._file)
        self._digest.update(new)

    def complete(self) -> Received:
        """The whole instance, its header sealed. Valid until `close`.

        Raises:
            StorageFull: there was no room for it.
            OSError: the disk failed.
        """
        if self.aside is not None:
            self.aside.wait()
        if self.failure is not None:
            raise self.failure
        assert self._file is not None
        sha256 = self._digest.hexdigest()
        where, stamp = landed.seal_at(self._head), self._landing.stamp(sha256, self.site, self.sender)
        with storage_errors("landing"):
            os.pwrite(self._file, stamp, where.start)
        if self._held:
            self._view[where] = stamp
            data = self._view[: self._at]
        else:
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
            data = memoryview(self._map)
        return Received(
            data=data,
            site=self.site,
            sender=self.sender,
            sha256=sha256,
            sop_class_uid=self.command.sop_class_uid,
            sop_uid=self.command.sop_uid,
            spool=self._file,
        )

    def close(self) -> None:
        """Forget it; what was not kept is gone."""
        if self.aside is not None:
            with suppress(BaseException):
                self.aside.wait()
        self._view.release()
        if self._map is not None:
            with suppress(BufferError):  # somebody still looks at it; it goes with the last view
                self._map.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _grow(self, needed: int) -> None:
        larger = bytearray(min(max(needed, 2 * len(self._hold.bytes)), HELD_BYTES))
        larger[: self._at] = self._view[: self._at]
        self._view.release()
        self._hold.bytes, self._view = larger, memoryview(larger)

    def _let_go(self) -> None:
        """Too large to be held: from here on it is in the file only."""
        if self.aside is not None:
            self.aside.wait()
        self._held, self._at = False, 0

    def _write(self, data: memoryview) -> None:
        if self._file is None:
            return
        left = data
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self.failure = _told(error)
            os.ftruncate(self._file, 0)
        if self.size // _WRITE_OUT_BYTES > (self.size - len(data)) // _WRITE_OUT_BYTES:
            landed.start_writing(self._file)  # not all of it at the end


def _told(error: OSError) -> Exception:
    """`StorageFull` where it says that there is no space left; what is something else stays what it is."""
    try:
        with storage_errors("landing"):
            raise error
    except (StorageFull, OSError) as told:
        return told

"""Files that are written past the system's cache: whole blocks only, though instances end anywhere."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radloop.dicom.spool import BLOCK_BYTES, Spool

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "disk":
        return tmp_path
    if not SHARED_MEMORY.is_dir():
        pytest.skip("no /dev/shm")
    return SHARED_MEMORY


def contents(spool: Spool) -> bytes:
    return Path(f"/proc/self/fd/{spool.handle}").read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=st.lists(st.integers(1, 70), max_size=4), rest=st.integers(0, BLOCK_BYTES), seed=st.integers(0, 255))
def test_a_file_holds_what_was_written_and_nothing_of_the_memory_behind_it(
    folder: Path, blocks: list[int], rest: int, seed: int
) -> None:
    """If this failed, an instance would end in bytes of another patient's, or lack its own."""
    with mmap.mmap(-1, (sum(blocks) + 2) * BLOCK_BYTES) as memory:
        memory[:] = bytes((seed + index // 7) % 256 for index in range(len(memory)))
        view, at = memoryview(memory), 0
        with closing(Spool(folder)) as spool:
            for count in blocks:
                spool.write(view, at, at + count * BLOCK_BYTES, at)
                at += count * BLOCK_BYTES
            spool.write(view, at, at + rest, at)
            memory[0] ^= 255
            spool.write(view, 0, BLOCK_BYTES if at else rest, 0)  # a seal, put in at the end
            assert contents(spool) == bytes(view[: at + rest])
        view.release()


@pytest.mark.parametrize("most", [1, 700, BLOCK_BYTES, 6000])
def test_a_disk_that_takes_less_than_it_was_given(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write a part, and then want no more that is not whole blocks: bytes of another patient's would stay."""
    whole = os.pwrite

    def short(handle: int, data: memoryview, at: int) -> int:
        if at:  # as the system says it: EINVAL, unless these are blocks
            return whole(handle, bytes(data[:most]), at)
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        count = whole(handle, bytes(data[:most]), 0)
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
        return count

    monkeypatch.setattr(os, "pwrite", short)
    with mmap.mmap(-1, 2 * BLOCK_BYTES) as memory:
        memory[:] = b"mine" * 1250 + b"other's " * 399
        view = memoryview(memory)
        with closing(Spool(tmp_path)) as spool:
            spool.write(view, 0, 5000, 0)
            assert contents(spool) == b"mine" * 1250
        view.release()


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_memory_of_any_kind_fills_a_file(folder: Path, size: int) -> None:
    """If this failed, what STOW-RS brought would be damaged on disk."""
    data = memoryview(b"-" + os.urandom(size))[1:]  # begins at no page
    with closing(Spool(folder)) as spool:
        spool.fill(data)
        assert contents(spool) == bytes(data)
        spool.empty()
        assert contents(spool) == b""

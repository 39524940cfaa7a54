"""Codecs crash, hang and eat memory; radloop must not."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames

from radloop.catalog.reason import Reason
from radloop.errors import DicomError
from radloop.imaging import pixels, sandbox


def example(name: str) -> Dataset:
    return pydicom.dcmread(str(get_testdata_file(name)))


def with_stream(ds: Dataset, stream: bytes) -> Dataset:
    ds.PixelData = encapsulate([stream])
    return ds


def abort_stream() -> Dataset:
    """Return an image on which GDCM 3.2 calls abort()."""
    return with_stream(example("MR_small_jp2klossless.dcm"), b"\xff\x4f\xff\x51" + bytes(range(256)) * 3)


def grey(name: str) -> Dataset:
    """A grey example of a syntax for which pydicom ships colour only: its header says grey, its stream does not matter."""
    ds = example(name)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    return ds


def test_a_stream_that_aborts_the_codec_costs_one_instance() -> None:
    """In this process it would kill the predictor, or the quality stage at the same file at each retry."""
    with pytest.raises(DicomError, match="the decoder crashed") as caught:
        pixels.decode(abort_stream())
    assert Reason(caught.value.reason) is Reason.PIXELS_UNDECODABLE
    assert pixels.decode(example("MR_small_jp2klossless.dcm")).shape == (64, 64)


@pytest.mark.parametrize("name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm"])
def test_damaged_streams_end_in_an_array_or_a_reason(name: str) -> None:
    """Disks, networks and archives damage files in more ways than anybody writes tests for."""
    ds = grey(name)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    rng = random.Random(7)
    for _ in range(12):
        damaged = bytearray(frame[: rng.randrange(2, len(frame))] if rng.random() < 0.4 else frame)
        for _ in range(rng.randrange(6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            array = pixels.decode(with_stream(ds, bytes(damaged)))
        except DicomError as error:
            assert Reason(error.reason) is Reason.PIXELS_UNDECODABLE
        else:
            assert array.shape == (ds.Rows, ds.Columns)


@pytest.mark.parametrize("name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"])
def test_the_child_returns_what_the_codec_read(name: str) -> None:
    """pydicom ships one image in several lossless syntaxes: they must agree pixel by pixel."""
    plain = pixels.decode(example("MR_small.dcm"))
    found = pixels.decode(example(name))
    np.testing.assert_array_equal(found, plain)
    assert pixels.digest(found) == pixels.digest(plain)


def test_a_codec_that_hangs_is_stopped() -> None:
    """A prediction that never answers blocks its worker for ever."""
    child = sandbox._borrowed()
    child._process.send_signal(signal.SIGSTOP)  # what an endless loop looks like from outside
    sandbox._idle.append(child)
    start = time.monotonic()
    with pytest.raises(sandbox.Undecodable, match="took too long"):
        sandbox.decode(example("MR_small_jp2klossless.dcm"), timeout_s=0.3)
    assert time.monotonic() - start < 5
    assert child._process.returncode is not None


def test_threads_get_their_own_answers() -> None:
    """Two patients' images exchanged between two requests is the worst that a predictor can do."""
    names = ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"]
    expected = {name: pixels.stored(example(name)) for name in names}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(5):
            if not np.array_equal(pixels.stored(example(name)), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _shape_in_fork(queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    queue.put((len(sandbox._idle), pixels.decode(example("MR_small_jp2klossless.dcm")).shape))


def test_a_forked_process_uses_no_child_of_its_parent() -> None:
    """Airflow forks its tasks: two processes that read one pipe get halves of each other's images."""
    pixels.decode(example("MR_small_jp2klossless.dcm"))
    assert sandbox._idle
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_shape_in_fork, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == (0, (64, 64))
    process.join(10)
    assert pixels.decode(example("MR_small_jp2klossless.dcm")).shape == (64, 64)


def test_a_child_ends_with_its_parent() -> None:
    """A SIGKILLed predictor must leave no decoders behind."""
    child = sandbox._Child()
    assert Path(f"/proc/{child._process.pid}").exists()
    assert child._process.stdin is not None
    child._process.stdin.close()  # what the kernel does to the pipe of a killed parent
    assert child._process.wait(10) == 0
    assert child._process.stdout is not None
    child._process.stdout.close()

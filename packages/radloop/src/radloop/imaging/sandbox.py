"""Compressed pixel data is decoded in a child process, because the codecs cannot be trusted with broken streams.

GDCM 3.2 aborts the whole process on damaged JPEG, JPEG Lossless and JPEG 2000 streams, and CharLS as wrapped by pyjpegls
can loop for ever on a cut one. One such file must cost one instance, not a predictor or a night's run.

The child reads requests from its stdin and ends with it, so it never outlives its parent. Both sides send frames of
`(length of header, length of body)`, a JSON header and raw bytes: nothing that the child says is executed.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import struct
import subprocess
import sys
import time
from collections import deque
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.uid import UID

TIMEOUT_S = 60.0
"""A whole-field mammogram in JPEG 2000 takes 5 s on a busy core."""
MEMORY_BYTES = 8 << 30
_LENGTHS = struct.Struct("<QQ")
_ATTRIBUTES = (
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
)
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")


class Undecodable(Exception):
    """The child could not decode the stream; says how it ended, never what it read."""


def decode(ds: Dataset, *, timeout_s: float = TIMEOUT_S) -> NDArray[Any]:
    """Stored values of compressed PixelData, decoded in a child. Safe for threads.

    Raises:
        Undecodable: the codec refused, crashed, took too long or too much memory.
    """
    return decode_colour(ds, timeout_s=timeout_s)[0]


def decode_colour(ds: Dataset, *, timeout_s: float = TIMEOUT_S) -> tuple[NDArray[Any], str]:
    """As `decode`, with the PhotometricInterpretation that the values have now: JPEG 2000 undoes its colour transform.

    Raises:
        Undecodable: as `decode`.
    """
    header: dict[str, Any] = {"syntax": str(ds.file_meta.TransferSyntaxUID)}
    for keyword in _ATTRIBUTES:
        if (value := ds.get(keyword)) is not None:
            header[keyword] = value if isinstance(value, int) else str(value)
    child = _borrowed()
    try:
        answer, body = child.ask(header, ds.PixelData, timeout_s)
    except (OSError, EOFError, TimeoutError) as error:
        child.end()
        how = "took too long" if isinstance(error, TimeoutError) else "crashed"
        raise Undecodable(f"the decoder {how}") from None
    except (
        BaseException
    ):  # interrupted between request and answer: the child would answer the next request with this one
        child.end()
        raise
    _idle.append(child)
    if "error" in answer:
        raise Undecodable(f"{answer['error']} from the decoder")
    return np.frombuffer(body, dtype=answer["dtype"]).reshape(answer["shape"]), answer["photometric"]


def decoded(ds: Dataset, plugin: str = "") -> tuple[NDArray[Any], str]:
    """Decode here, in this process: native and RLE data only, which pydicom reads itself. Raises whatever it likes."""
    array, properties = get_decoder(UID(ds.file_meta.TransferSyntaxUID)).as_array(
        ds, raw=True, decoding_plugin=plugin, **as_pixel_options(ds)
    )
    return array, str(properties["photometric_interpretation"])


def warm(count: int) -> None:
    """Start so many children and wait until they answer, so that their imports are not the first patients' time."""
    children = [_Child() for _ in range(count - len(_idle))]
    for child in children:
        child.ask({"syntax": _JPEG_LS[0]}, b"", TIMEOUT_S)  # nothing to decode: it answers with an error
        _idle.append(child)


class _Child:
    """One decoding process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # by path: radloop need not be importable there
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def ask(self, header: dict[str, Any], body: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """One request, one answer. Raises OSError, EOFError or TimeoutError if none comes."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        deadline = time.monotonic() + timeout_s
        _send(stdin, header, body)
        lengths = _LENGTHS.unpack(_received(stdout.fileno(), _LENGTHS.size, deadline))
        if lengths[0] > 1 << 16 or lengths[1] > MEMORY_BYTES:
            raise EOFError("no answer of ours")
        told = json.loads(_received(stdout.fileno(), lengths[0], deadline))
        return told, _received(stdout.fileno(), lengths[1], deadline)

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.__exit__(None, None, None)  # closes the pipes and reaps


_idle: deque[_Child] = deque()


def _borrowed() -> _Child:
    """A child that nobody else uses; it goes back to `_idle` after a good answer."""
    while True:
        try:
            child = _idle.pop()
        except IndexError:
            return _Child()
        if child.alive():
            return child
        child.end()


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget_in_fork() -> None:
    """A forked process shares the pipes of its parent's children, and must not use them."""
    _parents.extend(_idle)
    _idle.clear()


_parents: list[_Child] = []
os.register_at_fork(after_in_child=_forget_in_fork)


def _send(pipe: IO[bytes], header: dict[str, Any], body: bytes) -> None:
    told = json.dumps(header).encode()
    pipe.write(_LENGTHS.pack(len(told), len(body)))
    pipe.write(told)
    pipe.write(body)
    pipe.flush()


def _received(fd: int, length: int, deadline: float) -> bytes:
    """Exactly `length` bytes."""
    out = bytearray()
    while len(out) < length:
        if not select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        part = os.read(fd, min(length - len(out), 1 << 20))
        if not part:
            raise EOFError
        out += part
    return bytes(out)


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _decoded(header: dict[str, Any], body: bytes) -> tuple[NDArray[Any], str]:
    """In the child: rebuild what the codec needs, and ask it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(header["syntax"])
    for keyword in _ATTRIBUTES:
        if keyword in header:
            setattr(ds, keyword, header[keyword])
    ds.PixelData = body
    ds["PixelData"].is_undefined_length = True
    return decoded(ds, "gdcm" if header["syntax"] in _JPEG_LS else "")


def main() -> None:
    """Answer until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's pixels
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a codec prints is no answer
    while True:
        try:
            lengths = _LENGTHS.unpack(_exactly(requests, _LENGTHS.size))
            header = json.loads(_exactly(requests, lengths[0]))
            body = _exactly(requests, lengths[1])
        except EOFError:
            return
        try:
            found, photometric = _decoded(header, body)
            array = np.ascontiguousarray(found)
            answer = {"dtype": array.dtype.str, "shape": list(array.shape), "photometric": photometric}
            data = array.tobytes()
        except Exception as error:  # noqa: BLE001 - codecs raise whatever they like
            answer, data = {"error": type(error).__name__}, b""
        _send(answers, answer, data)


if __name__ == "__main__":
    main()

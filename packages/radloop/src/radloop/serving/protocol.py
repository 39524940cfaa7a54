"""Open Inference Protocol v2 over REST: what a request says, what an answer looks like, how a refusal reads.

Inputs: `image`, FP32 [n, 1, size, size], already preprocessed; or `dicom`, BYTES [n], DICOM Part 10 files in base64
(`"parameters": {"content_type": "base64"}`). A body of type application/dicom is one such file as it is, one of type
multipart/related (PS3.18 section 8.6) or multipart/form-data several.
Outputs: `probability` FP64 [n, 1], `decision` INT64 [n, 1], `prediction_id` BYTES [n, 1].

Binary tensor data extension: with the header Inference-Header-Content-Length: N a body is N bytes of JSON, then the raw
tensors, little endian, of the inputs that say `"parameters": {"binary_data_size": BYTES}`. BYTES elements are each led by
their length (uint32). Outputs come so where `binary_data` (output) or `binary_data_output` (request) is true.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_INPUTS = 256
"""Images in one request."""

OUTPUTS = {"probability": "FP64", "decision": "INT64", "prediction_id": "BYTES"}
_SHORT = 1024
_SITE = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        reason: one word for log and metrics.
        message: what is wrong and what to do, without any value of the request that could identify a patient.
    """

    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.headers = status, reason, message, headers


class Question(msgspec.Struct, frozen=True):
    """A request understood: either `images` (n, 1, size, size) or `files`, n DICOM files.

    `binary`: the outputs, of `outputs`, that are asked for as raw bytes.
    """

    images: NDArray[np.float32] | None
    files: tuple[bytes, ...]
    site: str
    id: str | None = None
    outputs: tuple[str, ...] = tuple(OUTPUTS)
    binary: frozenset[str] = frozenset()


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_decoder = msgspec.json.Decoder(_Request)


def parse(
    body: bytes | memoryview, content_type: str, site: str | None, size: int, header_length: str | None = None
) -> Question:
    """Understand a request's body.

    Args:
        body: a view where raw tensors follow the JSON: they are not copied.
        content_type: application/json, application/octet-stream (binary tensors), application/dicom, or multipart.
        site: the header x-radloop-site; the request's parameter `site` goes before it.
        size: the model's image side in pixels.
        header_length: the header Inference-Header-Content-Length.

    Raises:
        Refusal: 400 or 415.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/dicom":
        return Question(images=None, files=(bytes(body),), site=checked_site(site))
    if kind in ("multipart/related", "multipart/form-data"):
        return Question(images=None, files=_parts(bytes(body), content_type), site=checked_site(site))
    if kind not in ("", "application/json", "application/octet-stream"):
        message = "send application/json (Open Inference Protocol v2), application/dicom, or multipart/related of it"
        raise Refusal(415, "content_type", message)
    text, raw = _split(body, header_length)
    request, outputs, binary = _remembered(bytes(text)) if len(text) <= _SHORT else _decoded(text)
    where = checked_site(request.parameters.get("site", site))
    if len(request.inputs) != 1 or request.inputs[0].name not in ("image", "dicom"):
        raise _bad('send exactly one input, named "image" (FP32 tensor) or "dicom" (files)')
    given = request.inputs[0]
    data = _raw(given, raw)
    images: NDArray[np.float32] | None = None
    files: tuple[bytes, ...] = ()
    if given.name == "dicom":
        files = _files(given) if data is None else raw_files(given.datatype, given.shape, data)
    else:
        images = _images(given, size) if data is None else raw_images(given.datatype, given.shape, data, size)
    return Question(images=images, files=files, site=where, id=request.id, outputs=outputs, binary=binary)


def _decoded(text: bytes | memoryview) -> tuple[_Request, tuple[str, ...], frozenset[str]]:
    """The JSON of a request, the outputs asked for, and which of them as raw bytes."""
    try:
        request = _decoder.decode(text)
    except msgspec.DecodeError as error:
        raise _bad(f"the body is no Open Inference Protocol v2 request: {_harmless(error)}") from None
    return request, *_outputs(request)


_remembered = lru_cache(maxsize=256)(
    _decoded
)  # with binary tensors, a client's requests have the same JSON over and over


def _split(body: bytes | memoryview, header_length: str | None) -> tuple[bytes | memoryview, memoryview | None]:
    """The request's JSON and, where the header says that there are some, its raw tensors."""
    if header_length is None:
        return body, None
    if not (header_length.isascii() and header_length.isdigit()) or not 0 < int(header_length) <= len(body):
        raise _bad(f"Inference-Header-Content-Length is no number from 1 to the body's length, {len(body)}")
    view = memoryview(body)
    return view[: int(header_length)], view[int(header_length) :]


def _raw(given: _Input, raw: memoryview | None) -> memoryview | None:
    """The raw tensor of the one input; None where its values stand in the JSON."""
    told = given.parameters.get("binary_data_size")
    if told is None:
        if raw:
            raise _bad(f'raw data follows the JSON, but input "{given.name}" has no parameter binary_data_size')
        return None
    if raw is None:
        raise _bad("binary_data_size without the header Inference-Header-Content-Length")
    if isinstance(told, bool) or told != len(raw):
        raise _bad(f"binary_data_size is not the number of bytes that follow the JSON, {len(raw)}")
    if bytes(given.data):
        raise _bad(f'input "{given.name}" has data in the JSON and after it; send one of them')
    return raw


def _outputs(request: _Request) -> tuple[tuple[str, ...], frozenset[str]]:
    """Names of the outputs asked for, and which of them as raw bytes."""
    outputs = tuple(output.name for output in request.outputs) or tuple(OUTPUTS)
    if unknown := [number for number, name in enumerate(outputs) if name not in OUTPUTS]:
        raise _bad(f"output {unknown[0]} has an unknown name; there are: {', '.join(OUTPUTS)}")
    every = request.parameters.get("binary_data_output") is True
    told = {output.name: output.parameters.get("binary_data", every) is True for output in request.outputs}
    return outputs, frozenset(name for name in outputs if told.get(name, every))


def raw_images(datatype: str, shape: Sequence[int], data: bytes | memoryview, size: int) -> NDArray[np.float32]:
    """An input `image` of raw little-endian FP32 values, not copied; whether they are finite `check_finite` tells.

    Raises:
        Refusal: 400.
    """
    _check_image(datatype, shape, size)
    if len(data) != 4 * math.prod(shape):
        raise _bad(f'input "image" has {len(data)} bytes; its shape {list(shape)} needs {4 * math.prod(shape)}')
    return np.frombuffer(data, "<f4").reshape(tuple(shape))


def raw_files(datatype: str, shape: Sequence[int], data: bytes | memoryview) -> tuple[bytes, ...]:
    """An input `dicom` of raw BYTES elements, each led by its length (uint32, little endian). Raises Refusal (400)."""
    count = _check_files(datatype, shape)
    view, found, position = memoryview(data), [], 0
    for _ in range(count):
        end = position + 4 + int.from_bytes(view[position : position + 4], "little")
        if position + 4 > len(view) or end > len(view):
            raise _bad('input "dicom": an element is longer than the data that was sent')
        found.append(bytes(view[position + 4 : end]))
        position = end
    if position != len(view):
        raise _bad(f'input "dicom": {len(view) - position} bytes follow the last element')
    return tuple(found)


def _parts(body: bytes, content_type: str) -> tuple[bytes, ...]:
    """The files of a multipart body (RFC 2046 section 5.1.1)."""
    match = re.search(r'boundary="?([^";\s]{1,70})"?', content_type, re.IGNORECASE)
    if match is None:
        raise _bad("a multipart body needs its boundary in the Content-Type")
    delimiter = b"--" + match[1].encode("latin-1")
    pieces = (b"\r\n" + body).split(b"\r\n" + delimiter)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise _bad("the multipart body has no part, or ends before its closing boundary")
    if len(pieces) - 2 > MAX_INPUTS:
        raise _bad(f"the multipart body has {len(pieces) - 2} parts; expected at most {MAX_INPUTS}")
    found = []
    for piece in pieces[1:-1]:
        _, end, content = piece.partition(b"\r\n\r\n")
        if not end:
            raise _bad("a part of the multipart body has no empty line after its headers")
        found.append(content)
    return tuple(found)


def checked_site(site: Any) -> str:
    """A site code, "" for none. Raises Refusal (400) on what is no code: it goes to the log."""
    if site is None or site == "":
        return ""
    if not isinstance(site, str) or not _SITE.fullmatch(site):
        raise _bad("x-radloop-site is no site code: 1 to 64 letters, digits, '.', '_' or '-'")
    return site


def answer(
    question: Question, name: str, version: str, parameters: Mapping[str, str], columns: Mapping[str, Sequence[Any]]
) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON where raw tensors follow it.

    Args:
        columns: n values for each output.
    """
    count = len(columns["probability"])
    outputs, raw = [], []
    for output in question.outputs:
        told: dict[str, Any] = {"name": output, "shape": [count, 1], "datatype": OUTPUTS[output]}
        if output in question.binary:
            raw.append(raw_output(output, columns[output]))
            told["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            told["data"] = list(columns[output])
        outputs.append(told)
    made: dict[str, Any] = {"model_name": name, "model_version": version}
    if question.id is not None:
        made["id"] = question.id
    text = msgspec.json.encode(made | {"parameters": dict(parameters), "outputs": outputs})
    return (b"".join([text, *raw]), len(text)) if raw else (text, None)


def raw_output(name: str, values: Sequence[Any]) -> bytes:
    """An output's values as raw bytes: little endian, BYTES elements each led by their length (uint32)."""
    if OUTPUTS[name] == "BYTES":
        texts = [str(value).encode() for value in values]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return np.asarray(values, "<f8" if OUTPUTS[name] == "FP64" else "<i8").tobytes()


def _images(given: _Input, size: int) -> NDArray[np.float32]:
    _check_image(given.datatype, given.shape, size)
    try:
        values = np.array(msgspec.json.decode(given.data, type=list[float]), np.float64)
    except msgspec.DecodeError:
        values = _nested(given)
    if values.size != math.prod(given.shape):
        raise _bad(f'input "image" has {values.size} values; its shape {given.shape} needs {math.prod(given.shape)}')
    with np.errstate(over="ignore"):
        images = values.astype(np.float32).reshape(given.shape)
    check_finite(images)
    return images


def _check_image(datatype: str, shape: Sequence[int], size: int) -> None:
    expected = f"FP32 [n, 1, {size}, {size}] with n from 1 to {MAX_INPUTS}"
    if datatype != "FP32":
        raise _bad(f'input "image" has the wrong datatype; expected {expected}')
    if len(shape) != 4 or not 1 <= shape[0] <= MAX_INPUTS or list(shape[1:]) != [1, size, size]:
        raise _bad(f'input "image" has the shape {list(shape[:8])}; expected {expected}')


def check_finite(images: NDArray[np.float32]) -> None:
    """Raises Refusal (400) where a value is not finite."""
    if not np.isfinite(images).all():
        raise _bad('input "image" has values that are not finite in 32 bits')


def _nested(given: _Input) -> NDArray[np.float64]:
    """The protocol allows data as nested lists too."""
    try:
        values = np.array(msgspec.json.decode(given.data, type=list[list[list[list[float]]]]), np.float64)
    except (msgspec.DecodeError, ValueError):
        raise _bad('input "image": data is neither a flat list of numbers nor nested as its shape says') from None
    if list(values.shape) != given.shape:
        raise _bad(f'input "image": data is nested as {list(values.shape)}, its shape says {given.shape}')
    return values


def checked_files(datatype: str, shape: Sequence[int], files: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """An input `dicom` whose elements came apart. Raises Refusal (400)."""
    count = _check_files(datatype, shape)
    if len(files) != count:
        raise _bad(f'input "dicom" has {len(files)} files; its shape {list(shape)} needs {count}')
    return files


def _files(given: _Input) -> tuple[bytes, ...]:
    _check_files(given.datatype, given.shape)
    if given.parameters.get("content_type", "base64") != "base64":
        raise _bad('input "dicom": the only content_type is base64')
    try:
        texts = msgspec.json.decode(given.data, type=list[str])
        return checked_files(
            given.datatype, given.shape, tuple(base64.b64decode(text, validate=True) for text in texts)
        )
    except msgspec.DecodeError:
        raise _bad('input "dicom": data is no flat list of strings') from None
    except (binascii.Error, ValueError):
        raise _bad('input "dicom": data is not valid base64 (RFC 4648 section 4, with padding)') from None


def _check_files(datatype: str, shape: Sequence[int]) -> int:
    if datatype != "BYTES":
        raise _bad('input "dicom" has the wrong datatype; expected BYTES')
    if len(shape) not in (1, 2) or min(shape) < 1 or math.prod(shape) > MAX_INPUTS:
        raise _bad(f'input "dicom" has the shape {list(shape[:8])}; expected [n] with n from 1 to {MAX_INPUTS}')
    return math.prod(shape)


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)


def _harmless(error: msgspec.DecodeError) -> str:
    """What msgspec says: it names types and places. Where it quotes, it quotes the request: leave that out."""
    return re.sub(r"'[^']*'", "'...'", str(error)) + " (note that NaN and Infinity are no JSON)"

"""Open Inference Protocol v2 over REST: what a request says, what an answer looks like, how a refusal reads.

Inputs: `image`, FP32 [n, 1, size, size], already preprocessed; or `dicom`, BYTES [n], DICOM Part 10 files in base64
(`"parameters": {"content_type": "base64"}`). A body of type application/dicom is one such file as it is.
Outputs: `probability` FP64 [n, 1], `decision` INT64 [n, 1], `prediction_id` BYTES [n, 1].
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_INPUTS = 256
"""Images in one request."""

OUTPUTS = {"probability": "FP64", "decision": "INT64", "prediction_id": "BYTES"}
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
    """A request understood: either `images` (n, 1, size, size) or `files`, n DICOM files."""

    images: NDArray[np.float32] | None
    files: tuple[bytes, ...]
    site: str
    id: str | None = None
    outputs: tuple[str, ...] = tuple(OUTPUTS)


class _Output(msgspec.Struct):
    name: str


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_decoder = msgspec.json.Decoder(_Request)


def parse(body: bytes, content_type: str, site: str | None, size: int) -> Question:
    """Understand a request's body.

    Args:
        content_type: application/json (or none) or application/dicom.
        site: the header x-radloop-site; the request's parameter `site` goes before it.
        size: the model's image side in pixels.

    Raises:
        Refusal: 400 or 415.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/dicom":
        return Question(images=None, files=(body,), site=checked_site(site))
    if kind not in ("", "application/json"):
        raise Refusal(415, "content_type", "send application/json (Open Inference Protocol v2) or application/dicom")
    try:
        request = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise _bad(f"the body is no Open Inference Protocol v2 request: {_harmless(error)}") from None
    where = checked_site(request.parameters.get("site", site))
    outputs = tuple(output.name for output in request.outputs) or tuple(OUTPUTS)
    if unknown := [number for number, name in enumerate(outputs) if name not in OUTPUTS]:
        raise _bad(f"output {unknown[0]} has an unknown name; there are: {', '.join(OUTPUTS)}")
    if len(request.inputs) != 1 or request.inputs[0].name not in ("image", "dicom"):
        raise _bad('send exactly one input, named "image" (FP32 tensor) or "dicom" (base64 files)')
    given = request.inputs[0]
    images, files = (_images(given, size), ()) if given.name == "image" else (None, _files(given))
    return Question(images=images, files=files, site=where, id=request.id, outputs=outputs)


def checked_site(site: Any) -> str:
    """A site code, "" for none. Raises Refusal (400) on what is no code: it goes to the log."""
    if site is None or site == "":
        return ""
    if not isinstance(site, str) or not _SITE.fullmatch(site):
        raise _bad("x-radloop-site is no site code: 1 to 64 letters, digits, '.', '_' or '-'")
    return site


def answer(
    question: Question, name: str, version: str, parameters: Mapping[str, str], columns: Mapping[str, Sequence[Any]]
) -> bytes:
    """The response's JSON. `columns` gives n values for each output."""
    count = len(columns["probability"])
    outputs = [
        {"name": output, "shape": [count, 1], "datatype": OUTPUTS[output], "data": list(columns[output])}
        for output in question.outputs
    ]
    made: dict[str, Any] = {"model_name": name, "model_version": version}
    if question.id is not None:
        made["id"] = question.id
    return msgspec.json.encode(made | {"parameters": dict(parameters), "outputs": outputs})


def _images(given: _Input, size: int) -> NDArray[np.float32]:
    expected = f"FP32 [n, 1, {size}, {size}] with n from 1 to {MAX_INPUTS}"
    if given.datatype != "FP32":
        raise _bad(f'input "image" has the wrong datatype; expected {expected}')
    if len(given.shape) != 4 or not 1 <= given.shape[0] <= MAX_INPUTS or given.shape[1:] != [1, size, size]:
        raise _bad(f'input "image" has the shape {given.shape[:8]}; expected {expected}')
    try:
        values = np.array(msgspec.json.decode(given.data, type=list[float]), np.float64)
    except msgspec.DecodeError:
        values = _nested(given)
    if values.size != math.prod(given.shape):
        raise _bad(f'input "image" has {values.size} values; its shape {given.shape} needs {math.prod(given.shape)}')
    with np.errstate(over="ignore"):
        images = values.astype(np.float32).reshape(given.shape)
    if not np.isfinite(images).all():
        raise _bad('input "image" has values that are not finite in 32 bits')
    return images


def _nested(given: _Input) -> NDArray[np.float64]:
    """The protocol allows data as nested lists too."""
    try:
        values = np.array(msgspec.json.decode(given.data, type=list[list[list[list[float]]]]), np.float64)
    except (msgspec.DecodeError, ValueError):
        raise _bad('input "image": data is neither a flat list of numbers nor nested as its shape says') from None
    if list(values.shape) != given.shape:
        raise _bad(f'input "image": data is nested as {list(values.shape)}, its shape says {given.shape}')
    return values


def _files(given: _Input) -> tuple[bytes, ...]:
    if given.datatype != "BYTES":
        raise _bad('input "dicom" has the wrong datatype; expected BYTES')
    if given.parameters.get("content_type", "base64") != "base64":
        raise _bad('input "dicom": the only content_type is base64')
    if len(given.shape) not in (1, 2) or not 1 <= math.prod(given.shape) <= MAX_INPUTS:
        raise _bad(f'input "dicom" has the shape {given.shape[:8]}; expected [n] with n from 1 to {MAX_INPUTS}')
    try:
        texts = msgspec.json.decode(given.data, type=list[str])
        if len(texts) != math.prod(given.shape):
            raise _bad(f'input "dicom" has {len(texts)} files; its shape {given.shape} needs {math.prod(given.shape)}')
        return tuple(base64.b64decode(text, validate=True) for text in texts)
    except msgspec.DecodeError:
        raise _bad('input "dicom": data is no flat list of strings') from None
    except (binascii.Error, ValueError):
        raise _bad('input "dicom": data is not valid base64 (RFC 4648 section 4, with padding)') from None


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)


def _harmless(error: msgspec.DecodeError) -> str:
    """What msgspec says: it names types and places. Where it quotes, it quotes the request: leave that out."""
    return re.sub(r"'[^']*'", "'...'", str(error)) + " (note that NaN and Infinity are no JSON)"

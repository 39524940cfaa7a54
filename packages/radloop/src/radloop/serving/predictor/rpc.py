"""Open Inference Protocol v2 by gRPC, in the same event loop as REST."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from radloop.serving import protocol
from radloop.serving.predictions import OK
from radloop.serving.predictor.core import Asked, Core
from radloop.serving.predictor.messages import MESSAGES, SERVICE
from radloop.serving.predictor.rest import EXTENSIONS, version_of_radloop
from radloop.serving.protocol import OUTPUTS, Question, Refusal

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
_HEALTH = ("ServerLive", "ServerReady")


class Rpc:
    """The service: `bind` adds it to a server of `grpc.aio`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def server(self) -> Any:
        """A server of this service; the caller binds and starts it."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._core.max_body_bytes),
                ("grpc.max_send_message_length", self._core.max_body_bytes),
                ("grpc.so_reuseport", 0),  # a second process on the port is an error
            ]
        )
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(self._call, name),
                request_deserializer=MESSAGES[f"{name}Request"].FromString,
                response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
            )
            for name in _METHODS
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        return server

    async def _call(self, method: str, request: Any, context: Any) -> Any:
        metadata = {str(name): str(value) for name, value in context.invocation_metadata() or ()}
        try:
            if method not in _HEALTH:
                self._core.authorise(metadata.get("authorization", ""))
            if method == "ModelInfer":
                return await self._infer(request, context, metadata)
            return self._about(method, request)
        except Refusal as refusal:
            code = _CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
            await context.abort(code, refusal.message)

    def _about(self, method: str, request: Any) -> Any:
        core = self._core
        if method.startswith("Model"):
            core.check_model(request.name, request.version)
        response = MESSAGES[f"{method}Response"]
        if method == "ServerLive":
            return response(live=True)
        if method in ("ServerReady", "ModelReady"):
            return response(ready=core.is_ready)
        if method == "ServerMetadata":
            return response(name="radloop", version=version_of_radloop(), extensions=EXTENSIONS)
        return response(**core.metadata)

    async def _infer(self, request: Any, context: Any, metadata: Mapping[str, str]) -> Any:
        core = self._core
        asked, status, reason = Asked.of("grpc", metadata, core.model.digest), 500, "internal"
        core.begin()
        try:
            core.check_model(request.model_name, request.model_version)
            core.check_load()
            question = _question(request, asked.site, core.model.size)
            answered = await core.answer(question, asked, context.time_remaining())
            made = _answer(request, question, core, answered.columns, answered.parameters)
            status, reason = 200, OK
            return made
        except Refusal as refusal:
            status, reason = refusal.status, refusal.reason
            raise
        except Exception as error:  # noqa: BLE001 - a message could hold anything: only its kind is told
            reason = type(error).__name__
            raise Refusal(500, reason, f"the predictor failed ({reason}), a fault of radloop or the model") from None
        finally:
            core.end(asked, status, reason)


def _question(request: Any, site: str | None, size: int) -> Question:
    outputs = tuple(output.name for output in request.outputs) or tuple(OUTPUTS)
    if any(name not in OUTPUTS for name in outputs):
        raise _bad(f"an output has an unknown name; there are: {', '.join(OUTPUTS)}")
    if len(request.inputs) != 1 or request.inputs[0].name not in ("image", "dicom"):
        raise _bad('send exactly one input, named "image" (FP32 tensor) or "dicom" (files)')
    given = request.inputs[0]
    where = protocol.checked_site(request.parameters["site"].string_param if "site" in request.parameters else site)
    raw = None
    if request.raw_input_contents:
        if len(request.raw_input_contents) != 1 or given.HasField("contents"):
            raise _bad("raw_input_contents needs one entry for the one input, which then has no contents")
        raw = request.raw_input_contents[0]
    told: dict[str, Any] = {"site": where, "id": request.id or None, "outputs": outputs}
    if given.name == "image":
        data = np.array(given.contents.fp32_contents, "<f4").tobytes() if raw is None else raw
        return Question(images=protocol.raw_images(given.datatype, given.shape, data, size), files=(), **told)
    if raw is not None:
        return Question(images=None, files=protocol.raw_files(given.datatype, given.shape, raw), **told)
    files = protocol.checked_files(given.datatype, given.shape, tuple(given.contents.bytes_contents))
    return Question(images=None, files=files, **told)


def _answer(
    request: Any, question: Question, core: Core, columns: Mapping[str, list[Any]], parameters: Mapping[str, str]
) -> Any:
    """The response; raw where the request was, as the protocol wants one form for all of a message's tensors."""
    made = MESSAGES["ModelInferResponse"](model_name=core.name, model_version=core.version, id=request.id)
    for name, value in parameters.items():
        made.parameters[name].string_param = value
    for name in question.outputs:
        output = made.outputs.add(name=name, datatype=OUTPUTS[name], shape=[len(columns[name]), 1])
        if request.raw_input_contents:
            made.raw_output_contents.append(protocol.raw_output(name, columns[name]))
        elif name == "probability":
            output.contents.fp64_contents.extend(columns[name])
        elif name == "decision":
            output.contents.int64_contents.extend(columns[name])
        else:
            output.contents.bytes_contents.extend(value.encode() for value in columns[name])
    return made


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message)

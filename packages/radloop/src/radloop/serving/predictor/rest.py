"""Open Inference Protocol v2 by REST: an ASGI application."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from radloop.serving import protocol
from radloop.serving.predictions import OK
from radloop.serving.predictor.core import Asked, Core
from radloop.serving.protocol import Refusal

BODY_TIMEOUT_S = 60.0
BINARY_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
Endpoint = Callable[[Request], Awaitable[Response]]


class Rest:
    """The ASGI application. Inference is plain ASGI, asked before the routes; whatever else there is goes by Starlette.

    Args:
        core: the model.
        lifespan: what begins and ends with it.
    """

    def __init__(self, core: Core, lifespan: Callable[[Any], AbstractAsyncContextManager[None]]) -> None:
        self._core = core
        self._infer = Infer(core)
        one = "/v2/models/{name}"
        named = (one, one + "/versions/{version}")
        routes = [Route(path + "/infer", self._infer, methods=["POST"]) for path in named]
        routes += [
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._guard(self._about_server)),
            Route("/v2/", self._guard(self._about_server)),
            Route("/metrics", self._guard(self._metrics_page)),
        ]
        for path in named:
            routes += [
                Route(path, self._guard(self._about_model)),
                Route(path + "/ready", self._guard(self._model_ready)),
            ]
        self._others = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
        self._mine = {f"/v2/models/{core.name}/infer": {"name": core.name}}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's scope: a request, or the process's life."""
        if scope["type"] == "http" and scope["method"] == "POST" and (asked := self._mine.get(scope["path"])):
            scope["path_params"] = asked
            await self._infer(scope, receive, send)
        else:
            await self._others(scope, receive, send)

    async def _live(self, request: Request) -> Response:
        del request
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        del request
        return _json({"ready": self._core.is_ready}, 200 if self._core.is_ready else 503)

    async def _about_server(self, request: Request) -> Response:
        del request
        return _json({"name": "radloop", "version": version_of_radloop(), "extensions": EXTENSIONS})

    async def _about_model(self, request: Request) -> Response:
        self._check_path(request)
        return _json(self._core.metadata)

    async def _model_ready(self, request: Request) -> Response:
        self._check_path(request)
        return _json({"name": self._core.name, "ready": self._core.is_ready}, 200 if self._core.is_ready else 503)

    async def _metrics_page(self, request: Request) -> Response:
        del request
        page = generate_latest(self._core.metrics.registry)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _guard(self, endpoint: Endpoint) -> Endpoint:
        """Token first; refusals become answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._core.authorise(request.headers.get("authorization", ""))
                return await endpoint(request)
            except Refusal as refusal:
                return _refused(refusal)

        return guarded

    def _check_path(self, request: Request) -> None:
        self._core.check_model(request.path_params["name"], request.path_params.get("version", ""))


class Infer:
    """Inference, an ASGI application whose path parameters are `name` and perhaps `version`.

    Without Starlette's requests, responses and routes, which take about as long as all that is done here.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        core = self._core
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, reason = 500, "internal"
        asked = Asked.of("rest", headers, core.model.digest)
        core.begin()
        try:
            try:
                self._admit(headers, scope["path_params"])
                content, told = await self._answer(headers, await self._body(receive), asked)
                status, reason = 200, OK
            except Refusal as refusal:
                status, reason = refusal.status, refusal.reason
                content, told = _refused_as(refusal)
            except ClientDisconnect:
                status, reason = 499, "client_gone"
                return
            except Exception as error:  # noqa: BLE001 - the server lives; a message could hold anything: only its kind is told
                reason = type(error).__name__
                message = f"the predictor failed ({reason}), a fault of radloop or the model"
                content, told = _refused_as(Refusal(500, reason, message))
            told.append((b"content-length", b"%d" % len(content)))
            await send({"type": "http.response.start", "status": status, "headers": told})
            await send({"type": "http.response.body", "body": content})
        finally:
            core.end(asked, status, reason)

    async def _answer(self, headers: Mapping[str, str], body: bytes, asked: Asked) -> tuple[bytes, _Headers]:
        core, kind, length = self._core, headers.get("content-type", ""), headers.get(BINARY_HEADER)
        if length or kind == "application/dicom":  # raw tensors and files are not parsed, only pointed at
            question = protocol.parse(body, kind, asked.site, core.model.size, length)
        else:
            parse = functools.partial(protocol.parse, body, kind, asked.site, core.model.size, length)
            question = await core.understood(parse, len(body))
        answered = await core.answer(question, asked)
        content, json_length = protocol.answer(question, core.name, core.version, answered.parameters, answered.columns)
        if json_length is None:
            return content, [_JSON]
        return content, [_BINARY, (BINARY_HEADER.encode(), b"%d" % json_length)]

    def _admit(self, headers: Mapping[str, str], path: Mapping[str, str]) -> None:
        """Everything that is checked before the body is read."""
        self._core.authorise(headers.get("authorization", ""))
        self._core.check_model(path["name"], path.get("version", ""))
        self._core.check_load()
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "content_encoding", "send the body without content-encoding")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._core.max_body_bytes:
            raise self._core.too_large()

    async def _body(self, receive: Receive) -> bytes:
        chunks, total, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    total += len(chunk)
                    if total > self._core.max_body_bytes:
                        raise self._core.too_large()
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, "slow_body", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


_Headers = list[tuple[bytes, bytes]]
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _refused_as(refusal: Refusal) -> tuple[bytes, _Headers]:
    headers = [(name.encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
    return msgspec.json.encode({"error": refusal.message}), [_JSON, *headers]


def _refused(refusal: Refusal) -> Response:
    content, told = _refused_as(refusal)
    return Response(content, refusal.status, headers={name.decode(): value.decode() for name, value in told})


async def _http_error(request: Request, error: Exception) -> Response:
    del request
    status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "internal error")
    return _json({"error": detail}, status)


def version_of_radloop() -> str:
    """Of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("radloop")
    except PackageNotFoundError:
        return "unknown"

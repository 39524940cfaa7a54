"""Open Inference Protocol v2 by REST: an ASGI application."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
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
        self._core, self.infer = core, Infer(core)
        one = "/v2/models/{name}"
        named = (one, one + "/versions/{version}")
        routes = [Route(path + "/infer", self.infer, methods=["POST"]) for path in named]
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
            await self.infer(scope, receive, send)
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
        return Response(self._core.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

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


class Answer(msgspec.Struct, frozen=True):
    """An HTTP response, but for its length and what belongs to the connection."""

    status: int
    headers: list[tuple[bytes, bytes]]
    content: bytes


class Infer:
    """Inference: for `Connection`, which reads a request itself, and as an ASGI application.

    Without Starlette's requests, responses and routes, which take about as long as all that is done here.

    Attributes:
        start: how a request to answer begins.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._path = {"name": core.name, "version": ""}
        self.start = f"POST /v2/models/{core.name}/infer HTTP/1.1\r\n".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, whose path parameters are `name` and perhaps `version`."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = self.begin(headers)
        try:
            self._admit(headers, scope["path_params"])
            body = await self._body(receive)
        except Refusal as refusal:
            answer = self.refuse(asked, refusal)
        except ClientDisconnect:
            self.gone(asked)
            return
        except BaseException as error:
            self._core.end(asked, 500, type(error).__name__)
            raise
        else:
            answer = await self.respond(asked, headers, body)
        told = [*answer.headers, (b"content-length", b"%d" % len(answer.content))]
        await send({"type": "http.response.start", "status": answer.status, "headers": told})
        await send({"type": "http.response.body", "body": answer.content})

    def begin(self, headers: Mapping[str, str]) -> Asked:
        """A request came in; `respond`, `refuse` or `gone` follows. `headers` have lower-case names."""
        asked = Asked.of("rest", headers, self._core.model.digest)
        self._core.begin()
        return asked

    def gone(self, asked: Asked) -> None:
        """The client went away before it had sent all."""
        self._core.end(asked, 499, "client_gone")

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """The answer to a request that is not answered."""
        self._core.end(asked, refusal.status, refusal.reason)
        return _refused_as(refusal)

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether a request to `start` may be read: it has the token, is not too long, and there is room for it."""
        try:
            self._admit(headers, self._path)
        except Refusal:
            return False
        return True

    async def respond(self, asked: Asked, headers: Mapping[str, str], body: bytes | memoryview) -> Answer:
        """Answer a request that was read."""
        core, kind, length = self._core, headers.get("content-type", ""), headers.get(BINARY_HEADER)
        try:
            if length or kind == "application/dicom":  # raw tensors and files are not parsed, only pointed at
                question = protocol.parse(body, kind, asked.site, core.model.size, length)
            else:
                parse = functools.partial(protocol.parse, body, kind, asked.site, core.model.size, length)
                question = await core.understood(parse, len(body))
            answered = await core.answer(question, asked)
            content, json_length = protocol.answer(
                question, core.name, core.version, answered.parameters, answered.columns
            )
        except Refusal as refusal:
            return self.refuse(asked, refusal)
        except Exception as error:  # noqa: BLE001 - the server lives; a message could hold anything: only its kind is told
            reason = type(error).__name__
            message = f"the predictor failed ({reason}), a fault of radloop or the model"
            return self.refuse(asked, Refusal(500, reason, message))
        except BaseException:
            core.end(asked, 500, "ended")
            raise
        core.end(asked, 200, OK)
        if json_length is None:
            return Answer(200, [_JSON], content)
        return Answer(200, [_BINARY, (BINARY_HEADER.encode(), b"%d" % json_length)], content)

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


_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _refused_as(refusal: Refusal) -> Answer:
    headers = [(name.encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
    return Answer(refusal.status, [_JSON, *headers], msgspec.json.encode({"error": refusal.message}))


def _refused(refusal: Refusal) -> Response:
    answer = _refused_as(refusal)
    return Response(
        answer.content, answer.status, headers={name.decode(): value.decode() for name, value in answer.headers}
    )


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

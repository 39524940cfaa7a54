"""Open Inference Protocol v2 by REST: an ASGI application."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from radloop.serving import protocol
from radloop.serving.predictions import OK
from radloop.serving.predictor.core import Asked, Core
from radloop.serving.protocol import Refusal

BODY_TIMEOUT_S = 60.0
BINARY_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
Endpoint = Callable[[Request], Awaitable[Response]]


class Rest:
    """The application: `app`.

    Args:
        core: the model.
        lifespan: what begins and ends with it.
    """

    def __init__(self, core: Core, lifespan: Callable[[Any], AbstractAsyncContextManager[None]]) -> None:
        self._core = core
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
        self.app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})

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
        self._core.metrics.unlogged.set(self._core.log.pending)
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

    async def _infer(self, request: Request) -> Response:
        core, headers = self._core, request.headers
        status, reason = 500, "internal"
        asked = Asked.of("rest", headers, core.model.digest)
        core.begin()
        try:
            body = await self._admit(request)
            kind, length = headers.get("content-type", ""), headers.get(BINARY_HEADER)
            parse = functools.partial(protocol.parse, body, kind, asked.site, core.model.size, length)
            # Raw tensors and files are not parsed, only pointed at.
            question = await core.understood(parse, 0 if length or kind == "application/dicom" else len(body))
            answered = await core.answer(question, asked)
            content, json_length = protocol.answer(
                question, core.name, core.version, answered.parameters, answered.columns
            )
            status, reason = 200, OK
            if json_length is None:
                return Response(content, media_type="application/json")
            told = {BINARY_HEADER: str(json_length)}
            return Response(content, headers=told, media_type="application/octet-stream")
        except Refusal as refusal:
            status, reason = refusal.status, refusal.reason
            return _refused(refusal)
        except ClientDisconnect:
            status, reason = 499, "client_gone"
            return Response(status_code=400)
        except Exception as error:  # noqa: BLE001 - the server lives; a message could hold anything: only its kind is told
            reason = type(error).__name__
            return _refused(Refusal(500, reason, f"the predictor failed ({reason}), a fault of radloop or the model"))
        finally:
            core.end(asked, status, reason)

    async def _admit(self, request: Request) -> bytes:
        """Everything that is checked before work begins, and the body."""
        self._core.authorise(request.headers.get("authorization", ""))
        self._check_path(request)
        self._core.check_load()
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "content_encoding", "send the body without content-encoding")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._core.max_body_bytes:
            raise self._core.too_large()
        chunks, total = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    total += len(chunk)
                    if total > self._core.max_body_bytes:
                        raise self._core.too_large()
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, "slow_body", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
        return b"".join(chunks)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _refused(refusal: Refusal) -> Response:
    headers = None if refusal.headers is None else dict(refusal.headers)
    body = msgspec.json.encode({"error": refusal.message})
    return Response(body, refusal.status, headers=headers, media_type="application/json")


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

"""The predictor: one model behind Open Inference Protocol v2 (REST), one process.

`python -m radloop.serving.predictor --package DIR --key-file FILE --predictions DIR` prints one JSON line with the
bound port once it takes requests. It listens on 127.0.0.1 unless told otherwise; Envoy stands in front of it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from radloop.dicom.uids import Pseudonymiser
from radloop.errors import DataError, DicomError, RadloopError, SettingsError
from radloop.serving import process, protocol
from radloop.serving.children import REFUSED_EXIT
from radloop.serving.gateway import CHALLENGER_HEADER, CHAMPION_HEADER, MAX_BODY_BYTES, MIRROR_HEADER
from radloop.serving.model import Examined, ServedModel
from radloop.serving.predictions import CHALLENGER, CHAMPION, FLUSH_INTERVAL_S, OK, PredictionLog, PredictionRow
from radloop.serving.protocol import Question, Refusal

BODY_TIMEOUT_S = 60.0
DRAIN_S = 10
QUEUE = 256
"""Requests that may be under way; one more is answered 429."""
MOST_UNLOGGED = 10_000
"""Rows waiting for a disk that does not take them, at which the predictor stops being ready."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
Endpoint = Callable[[Request], Awaitable[Response]]


class _Metrics:
    def __init__(self, digest: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "radloop_requests", "Inference requests by role, HTTP status and reason.",
            ["role", "status", "reason"], registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "radloop_request_seconds", "From the request's first byte to the answer.", ["status"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), registry=self.registry,
        )  # fmt: skip
        self.under_way = Gauge("radloop_requests_under_way", "Inference requests under way.", registry=self.registry)
        self.unlogged = Gauge("radloop_predictions_unlogged", "Rows not on disk yet.", registry=self.registry)
        Gauge("radloop_model", "The model served.", ["digest", "version"], registry=self.registry).labels(
            digest, version
        ).set(1)


class Server:
    """The ASGI application of one model.

    Args:
        model: loaded and warm.
        log: where predictions go.
        name, version: what the model is called in paths and answers.
        token: bearer token asked for everywhere but at /v2/health; None asks for none.
        threads: predictions computed at once.
        max_body_bytes: a larger body is answered 413.
    """

    def __init__(
        self,
        model: ServedModel,
        log: PredictionLog,
        *,
        name: str,
        version: str,
        token: str | None = None,
        threads: int = 2,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._model, self._log, self._name, self._version = model, log, name, version
        self._token, self._max_body_bytes = token, max_body_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predict")
        self._metrics = _Metrics(model.digest, version)
        self._under_way = 0
        self.draining = False
        one = "/v2/models/{name}"
        routes = [
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._guard(self._about_server)),
            Route("/v2/", self._guard(self._about_server)),
            Route("/metrics", self._guard(self._metrics_page)),
        ]
        for path in (one, one + "/versions/{version}"):
            routes += [
                Route(path, self._guard(self._about_model)),
                Route(path + "/ready", self._guard(self._model_ready)),
                Route(path + "/infer", self._infer, methods=["POST"]),
            ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _http_error})

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        yield
        self._pool.shutdown()
        self._log.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: not while draining, nor while the log cannot be written."""
        return not self.draining and self._log.pending < MOST_UNLOGGED

    async def _live(self, request: Request) -> Response:
        del request
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        del request
        return _json({"ready": self.is_ready}, 200 if self.is_ready else 503)

    async def _about_server(self, request: Request) -> Response:
        del request
        return _json({"name": "radloop", "version": _version_of_radloop(), "extensions": []})

    async def _about_model(self, request: Request) -> Response:
        self._check_path(request)
        size = self._model.size
        inputs = [("image", "FP32", [-1, 1, size, size]), ("dicom", "BYTES", [-1])]
        outputs = [(name, datatype, [-1, 1]) for name, datatype in protocol.OUTPUTS.items()]
        return _json(
            {
                "name": self._name,
                "versions": [self._version],
                "platform": "onnx_onnxruntime",
                "inputs": [_tensor(*one) for one in inputs],
                "outputs": [_tensor(*one) for one in outputs],
                "properties": {"model_digest": self._model.digest},
            }
        )

    async def _model_ready(self, request: Request) -> Response:
        self._check_path(request)
        return _json({"name": self._name, "ready": self.is_ready}, 200 if self.is_ready else 503)

    async def _metrics_page(self, request: Request) -> Response:
        del request
        self._metrics.unlogged.set(self._log.pending)
        return Response(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _guard(self, endpoint: Endpoint) -> Endpoint:
        """Token first; refusals become answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._authorise(request)
                return await endpoint(request)
            except Refusal as refusal:
                return _refused(refusal)

        return guarded

    async def _infer(self, request: Request) -> Response:
        started, status, reason = time.perf_counter(), 500, "internal"
        asked = _Asked.of(request, self._model.digest)
        self._under_way += 1
        self._metrics.under_way.set(self._under_way)
        try:
            body = await self._admit(request)
            loop = asyncio.get_running_loop()
            content = await loop.run_in_executor(self._pool, self._work, body, asked, started)
            status, reason = 200, OK
            return Response(content, media_type="application/json")
        except Refusal as refusal:
            status, reason = refusal.status, refusal.reason
            if status not in (401, 404):
                self._record_refusal(asked, reason, started)
            return _refused(refusal)
        except ClientDisconnect:
            status, reason = 499, "client_gone"
            return Response(status_code=400)
        except Exception as error:  # noqa: BLE001 - the server lives; a message could hold anything: only its kind is told
            reason = type(error).__name__
            self._record_refusal(asked, reason, started)
            return _refused(Refusal(500, reason, f"the predictor failed ({reason}), a fault of radloop or the model"))
        finally:
            self._under_way -= 1
            self._metrics.under_way.set(self._under_way)
            self._metrics.requests.labels(asked.role, str(status), reason).inc()
            self._metrics.seconds.labels(str(status)).observe(time.perf_counter() - started)

    async def _admit(self, request: Request) -> bytes:
        """Everything that is checked before work begins, and the body."""
        self._authorise(request)
        self._check_path(request)
        if not self.is_ready:
            raise Refusal(503, "not_ready", "the predictor is ending or its log cannot be written; ask again elsewhere")
        if self._under_way > QUEUE:
            raise Refusal(429, "busy", "too many requests are under way; ask again later", {"retry-after": "1"})
        return await self._body(request)

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "content_encoding", "send the body without content-encoding")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        chunks, total = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    total += len(chunk)
                    if total > self._max_body_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, "slow_body", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
        return b"".join(chunks)

    def _too_large(self) -> Refusal:
        limit = f"{self._max_body_bytes // (1024 * 1024)} MiB"
        return Refusal(413, "too_large", f"the body is larger than {limit}", {"connection": "close"})

    def _authorise(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            message = "a token is needed: send the header Authorization: Bearer TOKEN"
            raise Refusal(401, "token", message, {"www-authenticate": "Bearer"})

    def _check_path(self, request: Request) -> None:
        name, version = request.path_params["name"], request.path_params.get("version", self._version)
        if name != self._name:
            raise Refusal(404, "unknown_model", f'no such model here; the model served is "{self._name}"')
        if version != self._version:
            raise Refusal(404, "unknown_version", f'no such version here; the version served is "{self._version}"')

    def _work(self, body: bytes, asked: _Asked, started: float) -> bytes:
        """Parse, examine, predict, log: in a thread of the pool."""
        question = protocol.parse(body, asked.content_type, asked.site, self._model.size)
        examined, images = self._images(question)
        try:
            probabilities, decisions = self._model.predict(images)
        except DataError as error:
            raise Refusal(400, "not_preprocessed", _one_line(error)) from None
        if not np.isfinite(probabilities).all():
            raise Refusal(500, "not_finite", "the model gave a probability that is not finite; nothing can be said")
        columns: dict[str, list[Any]] = {
            "probability": [float(p) for p in probabilities],
            "decision": [int(d) for d in decisions],
            "prediction_id": [str(uuid.uuid4()) for _ in probabilities],
        }
        parameters = {"model_version": self._version, "model_digest": self._model.digest}
        if len(columns["prediction_id"]) == 1:
            parameters["prediction_id"] = str(columns["prediction_id"][0])
        content = protocol.answer(question, self._name, self._version, parameters, columns)
        latency_ms = _since(started)
        for number in range(len(images)):
            self._log.append(self._row(asked, question, examined, images, columns, number, latency_ms))
        return content

    def _images(self, question: Question) -> tuple[list[Examined], Any]:
        if question.images is not None:
            return [], question.images
        examined = []
        for number, data in enumerate(question.files):
            try:
                examined.append(self._model.examine(data, question.site))
            except DicomError as error:
                where = f"file {number}: " if len(question.files) > 1 else ""
                raise Refusal(422, str(error.reason), where + _one_line(error)) from None
        return examined, np.stack([one.image for one in examined])

    def _row(
        self,
        asked: _Asked,
        question: Question,
        examined: Sequence[Examined],
        images: Any,
        columns: dict[str, list[Any]],
        number: int,
        latency_ms: float,
    ) -> PredictionRow:
        row = self._empty_row(asked, OK, latency_ms)
        row["prediction_id"] = columns["prediction_id"][number]
        row["probability"], row["decision"] = columns["probability"][number], columns["decision"][number]
        row["site"] = question.site or None
        if examined:
            one = examined[number]
            row["sop_uid"], row["study_uid"], row["patient"] = one.sop_uid, one.study_uid, one.patient
            row["input_digest"], row["tags"], row["features"] = one.input_digest, one.tags, one.features
        else:
            row["input_digest"] = hashlib.sha256(images[number].tobytes()).hexdigest()
        return row

    def _record_refusal(self, asked: _Asked, reason: str, started: float) -> None:
        self._log.append(self._empty_row(asked, reason, _since(started)))

    def _empty_row(self, asked: _Asked, status: str, latency_ms: float) -> PredictionRow:
        return PredictionRow(
            prediction_id=str(uuid.uuid4()),
            request_id=asked.request_id,
            at=datetime.now(UTC).isoformat(),
            model_name=self._name,
            version=self._version,
            model_digest=self._model.digest,
            role=asked.role,
            served=asked.served,
            compared_with=asked.compared_with,
            sop_uid=None,
            study_uid=None,
            patient=None,
            site=None,
            input_digest=None,
            tags={},
            features={},
            probability=None,
            decision=None,
            latency_ms=latency_ms,
            status=status,
        )


class _Asked(msgspec.Struct, frozen=True):
    """What the headers say: the gateway's words on roles and copies, and the sender's site."""

    request_id: str
    role: str
    served: bool
    compared_with: str | None
    content_type: str
    site: str | None

    @classmethod
    def of(cls, request: Request, digest: str) -> _Asked:
        headers = request.headers
        models = {name: headers.get(name, "") for name in (CHAMPION_HEADER, CHALLENGER_HEADER)}
        others = [model for model in models.values() if model != digest and _DIGEST.fullmatch(model)]
        return cls(
            request_id=_request_id(headers.get("x-request-id", "")),
            role=CHALLENGER if models[CHALLENGER_HEADER] == digest else CHAMPION,
            served=MIRROR_HEADER not in headers,
            compared_with=others[0] if others else None,
            content_type=headers.get("content-type", ""),
            site=headers.get("x-radloop-site"),
        )


def _request_id(given: str) -> str:
    """A UUID as it is; anything else by its digest, as it might say who the patient is."""
    try:
        return str(uuid.UUID(given))
    except ValueError:
        return hashlib.sha256(given.encode()).hexdigest()[:32] if given else str(uuid.uuid4())


def _one_line(error: Exception) -> str:
    return "; ".join(str(error).split("\n  "))


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


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


def _version_of_radloop() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("radloop")
    except PackageNotFoundError:
        return "unknown"


class _Uvicorn(uvicorn.Server):
    """Ends by SIGTERM as by SIGINT: not ready, requests under way finished, log written, exit status 0."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._radloop = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        del sig, frame
        self._radloop.draining = True
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; exit status 78 if this model cannot be served as asked."""
    options = _options(arguments)
    if options.parent:
        process.die_with_parent(options.parent, signal.SIGTERM)
        threading.Thread(target=_watch_parent, args=(options.parent,), daemon=True).start()
    _hush()
    try:
        bound = _bind(options.host, options.port)
        key = _pseudonymiser(options.key_file)
        model = ServedModel(options.package, key, expect_digest=options.expect_digest, decoders=options.threads)
        token = None if options.token_file is None else _token(options.token_file)
    except (RadloopError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED_EXIT
    log = PredictionLog(options.predictions, options.version, interval_s=options.flush_interval_s)
    server = Server(
        model, log, name=options.name, version=options.version, token=token,
        threads=options.threads, max_body_bytes=options.max_body_bytes,
    )  # fmt: skip
    _serve(server, bound, model.digest)
    return 0


def _serve(server: Server, bound: socket.socket, digest: str) -> None:
    config = uvicorn.Config(
        server.app,
        access_log=False,
        log_level="error",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="on",
    )
    line = {"port": bound.getsockname()[1], "pid": os.getpid(), "model_digest": digest}
    bound.listen(2048)  # from here on a request waits instead of being refused
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()
    _Uvicorn(config, server).run(sockets=[bound])


def _bind(host: str, port: int) -> socket.socket:
    # With the protocol named, asyncio sets TCP_NODELAY on each connection; without it every answer waits 40 ms (Nagle).
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise SettingsError(
            "the predictor's port cannot be bound", expected=f"{host}:{port} to be free", got=error.strerror
        ) from None
    return bound


def _pseudonymiser(key_file: Path) -> Pseudonymiser:
    try:
        return Pseudonymiser(bytes.fromhex(key_file.read_text().strip()))
    except (OSError, ValueError) as error:
        raise SettingsError(
            "the project key cannot be read",
            expected=f"{key_file.name} with 64 hex digits",
            got=type(error).__name__,
            next_step="run `radloop init`, or point --key-file at the project's key",
        ) from None


def _token(token_file: Path) -> str:
    token = token_file.read_text().strip()
    if len(token) < 16:
        raise SettingsError("the token is too short", expected="at least 16 characters", got=f"{len(token)}")
    return token


def _hush() -> None:
    """Silence pydicom: it quotes attribute values in warnings and logs, and none of that may reach a log file."""
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").disabled = True
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def _watch_parent(parent: int) -> None:
    """For systems without PR_SET_PDEATHSIG, and for a drain that hangs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(DRAIN_S + 2)
    os._exit(1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m radloop.serving.predictor", description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder of the model package")
    parser.add_argument("--key-file", type=Path, required=True, help="the project key, for pseudonyms")
    parser.add_argument("--predictions", type=Path, required=True, help="folder of the prediction log")
    parser.add_argument("--name", default="default", help="the model's name in paths")
    parser.add_argument("--version", default="1", help="the model's version in paths")
    parser.add_argument("--expect-digest", help="refuse to serve a model with another digest")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--token-file", type=Path, help="bearer token to ask for")
    parser.add_argument("--threads", type=int, default=2, help="predictions at once")
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES)
    parser.add_argument("--flush-interval-s", type=float, default=FLUSH_INTERVAL_S)
    parser.add_argument("--parent", type=int, default=0, help="end when this process, the parent, ends")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

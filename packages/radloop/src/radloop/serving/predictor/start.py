"""A predictor's process: options, sockets, the order in which it begins and ends."""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import uvicorn

from radloop import logs
from radloop.dicom.uids import Pseudonymiser
from radloop.errors import RadloopError, SettingsError
from radloop.serving import process
from radloop.serving.children import REFUSED_EXIT
from radloop.serving.gateway import MAX_BODY_BYTES
from radloop.serving.model import ServedModel
from radloop.serving.predictions import FLUSH_INTERVAL_S, PredictionLog
from radloop.serving.predictor.connection import Connection
from radloop.serving.predictor.core import DEADLINE_S, Core
from radloop.serving.predictor.rest import Rest

DRAIN_S = 10

_DOC = """The predictor: one model behind Open Inference Protocol v2 (REST, and gRPC with --grpc-port), one process."""


class _Uvicorn(uvicorn.Server):
    """Ends by SIGTERM as by SIGINT: not ready, requests under way finished, log written, exit status 0."""

    def __init__(self, config: uvicorn.Config, core: Core) -> None:
        super().__init__(config)
        self._core = core

    def handle_exit(self, sig: int, frame: Any) -> None:
        del sig, frame
        self._core.draining = True
        self.should_exit = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; exit status 78 if this model cannot be served as asked."""
    options = _options(arguments)
    if options.parent:
        process.die_with_parent(options.parent, signal.SIGTERM)
        threading.Thread(target=_watch_parent, args=(options.parent,), daemon=True).start()
    _hush()
    logs.configure("predictor")
    try:
        bound = _bind(options.host, options.port)
        key = _pseudonymiser(options.key_file)
        model = ServedModel(options.package, key, expect_digest=options.expect_digest, threads=options.threads)
        token = None if options.token_file is None else _token(options.token_file)
    except (RadloopError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED_EXIT
    gc.collect()
    gc.freeze()  # what is there now stays: collections need not look through it while somebody waits for an answer
    log = PredictionLog(options.predictions, options.version, interval_s=options.flush_interval_s)
    core = Core(
        model, log, name=options.name, version=options.version, token=token,
        threads=options.threads, max_body_bytes=options.max_body_bytes, deadline_s=options.deadline_s,
        lines=logs.Lines() if logs.wanted() else None,
    )  # fmt: skip
    try:
        _serve(core, bound, options)
    except RadloopError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED_EXIT
    return 0


def _serve(core: Core, bound: socket.socket, options: argparse.Namespace) -> None:
    failed: list[RadloopError] = []

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        line = {"port": bound.getsockname()[1], "pid": os.getpid(), "model_digest": core.model.digest}
        rpc = None
        try:
            if options.grpc_port is not None:
                rpc, line["grpc_port"] = await _start_rpc(core, options)
        except RadloopError as error:
            failed.append(error)
            raise
        bound.listen(2048)  # from here on a request waits instead of being refused
        sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        sys.stdout.flush()
        yield
        if rpc is not None:
            await rpc.stop(DRAIN_S)
        core.close()

    app = Rest(core, lifespan)
    config = uvicorn.Config(
        app,
        http=cast(Any, functools.partial(Connection, app.infer)),
        access_log=False,
        log_level="critical",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="on",
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
    )
    server = _Uvicorn(config, core)
    try:
        server.run(sockets=[bound])
    except SystemExit:  # uvicorn's way to say that the lifespan failed
        raise failed[0] if failed else SettingsError("the predictor did not start") from None
    if failed:
        raise failed[0]


async def _start_rpc(core: Core, options: argparse.Namespace) -> tuple[Any, int]:
    """The gRPC server, and the port it is bound to."""
    from radloop.serving.predictor.rpc import Rpc

    server = Rpc(core).server()
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port}"
    try:
        if options.tls_certificate:
            import grpc

            pair = (Path(options.tls_key).read_bytes(), Path(options.tls_certificate).read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except (RuntimeError, OSError) as error:
        got = type(error).__name__
        raise SettingsError("the predictor's gRPC port cannot be bound", expected=f"{address} free", got=got) from None
    await server.start()
    return server, int(port)


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
    parser = argparse.ArgumentParser(prog="python -m radloop.serving.predictor", description=_DOC)
    parser.add_argument("--package", type=Path, required=True, help="folder of the model package")
    parser.add_argument("--key-file", type=Path, required=True, help="the project key, for pseudonyms")
    parser.add_argument("--predictions", type=Path, required=True, help="folder of the prediction log")
    parser.add_argument("--name", default="default", help="the model's name in paths")
    parser.add_argument("--version", default="1", help="the model's version in paths")
    parser.add_argument("--expect-digest", help="refuse to serve a model with another digest")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--grpc-port", type=int, help="also answer gRPC here; 0: any free port")
    parser.add_argument("--tls-certificate", help="PEM file; both protocols then speak TLS only")
    parser.add_argument("--tls-key", help="PEM file")
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="what is not answered by then is refused")
    parser.add_argument("--token-file", type=Path, help="bearer token to ask for")
    parser.add_argument(
        "--threads", type=int, default=2, help="predictions at once; one that is alone takes all of them (ONNX)"
    )
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES)
    parser.add_argument("--flush-interval-s", type=float, default=FLUSH_INTERVAL_S)
    parser.add_argument("--parent", type=int, default=0, help="end when this process, the parent, ends")
    return parser.parse_args(arguments)

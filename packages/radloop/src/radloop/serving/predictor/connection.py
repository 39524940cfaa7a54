"""HTTP connections of the predictor: inferences are answered here, everything else by uvicorn.

A general server's work on a request, 0.1 to 0.2 ms of CPU more than here, counts beside a small model's 4 ms. So a connection
begins here: a request whose head says that it is a plain inference (POST, Content-Length, nothing to negotiate, admitted) is read
and answered without that. The first request that is anything else takes its connection to uvicorn's own protocol, from its first
byte and for good.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast

import httptools
import numpy as np
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from radloop.serving.predictor.core import Asked
from radloop.serving.predictor.rest import BODY_TIMEOUT_S, Answer, Infer
from radloop.serving.protocol import Refusal

_INBOX_BYTES = 16 * 1024
"""The longest head that is looked at here."""
_LOOK_S = 5.0
"""How often a connection is looked at for clients that have fallen silent."""

_STATUS = {code.value: f"HTTP/1.1 {code.value} {code.phrase}\r\n".encode() for code in HTTPStatus}
_NEGOTIATED = frozenset({"transfer-encoding", "expect", "upgrade"})


class Connection(asyncio.BufferedProtocol):
    """One connection, in uvicorn's terms an HTTP protocol.

    A body is read to where the model takes it from: only what came with its head is copied.

    Args:
        infer: answers inferences.
        config, server_state, app_state: uvicorn's, as it gives them to each of its protocols.
    """

    def __init__(
        self,
        infer: Infer,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._infer, self._config, self._state, self._app_state = infer, config, server_state, app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport = None  # type: ignore[assignment] # until connection_made
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._filled = 0  # of the inbox: what is neither answered nor a body
        self._asked: Asked | None = None
        self._headers: Mapping[str, str] = {}
        self._body = memoryview(b"")
        self._missing = 0  # bytes of the body
        self._answering: asyncio.Task[None] | None = None
        self._last = False
        self._heard = time.monotonic()
        self._look = self._loop.call_later(_LOOK_S, self._look_after)

    # What uvicorn and asyncio call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio.BufferedProtocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)  # type: ignore[arg-type] # so that uvicorn waits for it when it ends

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio.BufferedProtocol. What is being computed is finished, and logged."""
        del exc
        self._look.cancel()
        self._state.connections.discard(self)
        if self._asked is not None and self._answering is None:
            self._infer.gone(self._asked)

    def shutdown(self) -> None:
        """The server ends: so does this connection, once its request is answered."""
        self._last = True
        if self._asked is None:
            self._transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        """As asyncio.BufferedProtocol."""
        del sizehint
        return self._body[-self._missing :] if self._missing else self._inbox[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """As asyncio.BufferedProtocol."""
        self._heard = time.monotonic()
        if self._missing:
            self._missing -= nbytes
            if not self._missing:
                self._answer()
            return
        self._filled += nbytes
        if self._asked is None:
            self._begin()
        else:  # a request before the one before it is answered: it waits, and its client with it
            self._transport.pause_reading()

    # One request

    def _begin(self) -> None:
        data, start = bytes(self._inbox[: self._filled]), self._infer.start
        might_be_ours = data.startswith(start) if len(data) >= len(start) else start.startswith(data)
        end = data.find(b"\r\n\r\n") + 4
        if might_be_ours and end < 4 and len(data) < _INBOX_BYTES:
            return
        headers = _plain_inference(data[:end]) if might_be_ours else None
        if headers is None or not self._infer.admits(headers):
            self._hand_over(data)
            return
        length = int(headers["content-length"])
        # Not zeroed: what a client announces takes no memory until it comes.
        self._headers, self._body = headers, np.empty(length, np.uint8).data
        self._asked = self._infer.begin(headers)
        came = data[end : end + length]
        self._body[: len(came)] = came
        self._missing = length - len(came)
        self._filled -= end + len(came)
        self._inbox[: self._filled] = data[end + len(came) :]
        if not self._missing:
            self._answer()

    def _hand_over(self, data: bytes) -> None:
        self._look.cancel()
        self._state.connections.discard(self)
        protocol = HttpToolsProtocol(self._config, self._state, self._app_state, self._loop)
        protocol.connection_made(self._transport)
        self._transport.set_protocol(protocol)
        protocol.data_received(data)

    def _answer(self) -> None:
        body, self._body = self._body, memoryview(b"")
        self._answering = self._loop.create_task(self._respond(body))

    async def _respond(self, body: memoryview) -> None:
        assert self._asked is not None
        self._write(await self._infer.respond(self._asked, self._headers, body))

    def _write(self, answer: Answer) -> None:
        """Send an answer, in one piece, and look at what came meanwhile."""
        self._asked = self._answering = None
        self._heard = time.monotonic()
        if self._transport.is_closing():
            return
        parts = [_STATUS[answer.status]]
        for name, value in answer.headers:
            parts += [name, b": ", value, b"\r\n"]
        if self._last:
            parts.append(b"connection: close\r\n")
        parts += [b"content-length: %d\r\n\r\n" % len(answer.content), answer.content]
        self._transport.write(b"".join(parts))
        if self._last:
            self._transport.close()
        elif self._filled:
            self._transport.resume_reading()
            self._begin()

    def _look_after(self) -> None:
        """Close what is idle, refuse a body that does not come."""
        self._look = self._loop.call_later(_LOOK_S, self._look_after)
        silent = time.monotonic() - self._heard
        if self._asked is None:
            if silent > self._config.timeout_keep_alive:
                self._transport.close()
        elif self._missing and time.perf_counter() - self._asked.started > BODY_TIMEOUT_S:
            self._last, self._missing = True, 0
            message = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
            self._write(self._infer.refuse(self._asked, Refusal(408, "slow_body", message)))


class _Head:
    """Collects headers for httptools."""

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._headers = headers

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))


@lru_cache(maxsize=64)  # a client's heads are the same over and over
def _plain_inference(head: bytes) -> Mapping[str, str] | None:
    """The headers, names in lower case, of a request to be answered here; None for any other."""
    given: list[tuple[bytes, bytes]] = []
    parser = httptools.HttpRequestParser(_Head(given))
    try:
        parser.feed_data(head)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in given}
    length = headers.get("content-length", "")
    if len(headers) < len(given) or _NEGOTIATED & headers.keys() or not length.isdigit() or int(length) == 0:
        return None
    return headers if headers.get("connection", "keep-alive").lower() == "keep-alive" else None

"""The server: who may send, what is taken from the stream, when it is kept, what is answered."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from radloop.catalog.database import StorageFull
from radloop.catalog.reason import Reason
from radloop.dicom import landed
from radloop.dicom.landing import Arrival, Landing, Mismatch, Outcome, Received
from radloop.dicom.listener.status import Peer, Status, Tally
from radloop.dicom.stow import answer
from radloop.dicom.stow.head import Head, head_of
from radloop.dicom.stow.parts import BEFORE, Malformed, Part, Parts, Pool, UnsupportedMedia, boundary_of
from radloop.errors import DicomError, EngineError, SettingsError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOG = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""The largest instance: lengths in DICOM have 32 bits."""
_BATCH_PARTS = 64
_BATCH_BYTES = 8 << 20
_STORING = 4
_IDLE_S = 60.0
_GRACE_S = 10
_RETRY_AFTER_S = 120
_JSON, _XML = "application/dicom+json", "application/dicom+xml"


class Sender(msgspec.Struct, frozen=True):
    """Who may send: the bearer token it shows, and the site code of what it sends."""

    token: bytes
    site: str

    def __repr__(self) -> str:
        return f"Sender(site={self.site!r})"


class Stow:
    """Receives by STOW-RS: `POST /studies` and `POST /studies/{StudyInstanceUID}`. A context manager.

    Args:
        landing: where instances go.
        senders: name -> who may send. Others get 401.
        host: address to listen on; loopback unless told otherwise.
        port: 0 lets the system choose.
        tls: speak TLS with this.
        max_requests: how many at once; more get 503 and Retry-After.
        idle_s: a client that sends nothing for so long gets 408.

    Raises:
        SettingsError: nobody may send, two senders have one token, or the extra `serve` is not installed.
    """

    def __init__(
        self,
        landing: Landing,
        *,
        senders: Mapping[str, Sender],
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        max_requests: int = 20,
        idle_s: float = _IDLE_S,
    ) -> None:
        self.check(senders)
        self._landing, self._address, self._tls, self._idle_s = landing, (host, port), tls, idle_s
        self._tokens = [(hashlib.sha256(who.token).digest(), name, who.site) for name, who in senders.items()]
        self._max, self._active = max_requests, 0
        self._pool = Pool()
        self._storing = ThreadPoolExecutor(_STORING, thread_name_prefix="stow-store")  # their commits go together
        self._tally = Tally()
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.port = 0

    @staticmethod
    def check(senders: Mapping[str, Sender]) -> None:
        """Raise SettingsError when nobody may send, or two senders have one token."""
        if not senders:
            raise SettingsError(
                "nobody may send to the STOW-RS receiver",
                expected="at least one sender with its token and site code",
                next_step="add [listen.stow.tokens.NAME] with token and site to radloop.toml",
            )
        if len({who.token for who in senders.values()}) < len(senders):
            raise SettingsError("two STOW-RS senders have the same token", next_step="give each a token of its own")

    @property
    def counts(self) -> dict[str, int]:
        """How many instances: `received`, by outcome (`new`, `same`, ...), `failed`; and `rejected` requests."""
        return self._tally.counts

    def status(self) -> Status:
        """A snapshot; a request counts as an association, and its sender's name stands for the AE title."""
        return self._tally.status()

    @property
    def active(self) -> int:
        """Requests under way."""
        return self._active

    def start(self) -> int:
        """Listen in a thread of this process; returns the port.

        Raises:
            EngineError: the port is taken, or the address is not this machine's.
        """
        uvicorn = _uvicorn()
        listening = _bound(*self._address)
        self.port = int(listening.getsockname()[1])
        config = uvicorn.Config(
            self.app(),
            log_config=None,  # a log of requests would hold study UIDs
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE_S,
            ssl_context_factory=(lambda *_: self._tls) if self._tls else None,
        )
        self._server = uvicorn.Server(config)
        started = self._server
        self._thread = threading.Thread(target=started.run, kwargs={"sockets": [listening]}, name="stow", daemon=True)
        self._thread.start()
        return self.port

    def stop(self) -> None:
        """Take no new requests, let those under way end."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = None
        self._storing.shutdown()

    def __enter__(self) -> Stow:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def app(self) -> Any:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        paths = ("/studies", "/studies/{study}")
        return Starlette(routes=[Route(path, self._post, methods=["POST"]) for path in paths])

    async def _post(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        who = self._who(request)
        if who is None:
            return self._refused(401, "token", "a bearer token that is known is needed", {"WWW-Authenticate": "Bearer"})
        form = _accepted(request.headers.get("accept", "*/*"))
        if form is None:
            return self._refused(406, "form", f"{_JSON} and {_XML} are what there is")
        try:
            boundary = boundary_of(request.headers.get("content-type", ""))
        except UnsupportedMedia:
            return self._refused(415, "form", 'multipart/related; type="application/dicom" is what is taken')
        except Malformed as error:
            return self._refused(400, "form", str(error))
        if self._active >= self._max:
            return self._refused(503, "limit", "too many requests at once", {"Retry-After": str(_RETRY_AFTER_S)})
        self._active += 1
        peer, whole = self._tally.opened(who[0]), False
        taking = _Taking(self._landing, *who, request.path_params.get("study"), self._tally, peer, self._storing)
        try:
            malformed = await self._take(
                request, Parts(boundary, self._landing.landing, MOST_BYTES, self._pool), taking
            )
            whole = not malformed
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except TimeoutError:
            return self._refused(408, "idle", "nothing came for a while", {"Connection": "close"})
        finally:
            try:
                await taking.finish()
            finally:
                self._active -= 1
                self._tally.closed(peer, released=whole)
        status = answer.status_of(taking.results, malformed=malformed, too_large=taking.too_large)
        found = answer.module(taking.results)
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else {}
        if malformed:  # what is left on the connection cannot be told apart from a next request
            headers["Connection"] = "close"
        content = answer.as_json(found) if form == _JSON else answer.as_xml(found)
        return Response(content, status, headers, media_type=form)

    async def _take(self, request: Request, parts: Parts, taking: _Taking) -> bool:
        """Read to the end, keep part by part; whether the message was malformed."""
        stream = request.stream().__aiter__()
        try:
            while True:
                async with asyncio.timeout(self._idle_s):
                    chunk = await anext(stream, None)
                if chunk is None:
                    parts.end()
                    return False
                for part in parts.feed(chunk):
                    await taking.add(part)
        except Malformed:
            return True
        finally:
            parts.close()

    def _who(self, request: Request) -> tuple[str, str] | None:
        """Name and site of the sender whose token this is. Every token is compared, in the same time."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1", "replace")).digest()
        found = None
        for digest, name, site in self._tokens:
            if hmac.compare_digest(digest, given):
                found = (name, site)
        return found if scheme.lower() == "bearer" else None

    def _refused(self, status: int, reason: str, why: str, headers: Mapping[str, str] | None = None) -> Response:
        from starlette.responses import PlainTextResponse

        self._tally.rejected(reason)
        return PlainTextResponse(why + "\n", status, dict(headers or {}))


class _Taking:
    """One request: parts are gathered, and kept in batches in a thread while the next ones are read."""

    def __init__(
        self,
        landing: Landing,
        sender: str,
        site: str,
        study: str | None,
        tally: Tally,
        peer: Peer,
        storing: ThreadPoolExecutor,
    ) -> None:
        self.results: list[answer.Stored] = []
        self.too_large = False
        self._landing, self._sender, self._site, self._study = landing, sender, site, study
        self._tally, self._peer, self._storing = tally, peer, storing
        self._batch: list[Part] = []
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None

    async def add(self, part: Part) -> None:
        """Take a part that is complete."""
        self._batch.append(part)
        self._bytes += part.size
        if len(self._batch) >= _BATCH_PARTS or self._bytes >= _BATCH_BYTES:
            await self._flush()

    async def finish(self) -> None:
        """Until all is kept that came whole; then `results` is complete."""
        await self._flush()
        if self._task is not None:
            await self._task

    async def _flush(self) -> None:
        if self._task is not None:
            await self._task
            self._task = None
        if self._batch:
            batch, self._batch, self._bytes = self._batch, [], 0
            self._task = asyncio.create_task(asyncio.to_thread(self._keep, batch))

    def _keep(self, parts: list[Part]) -> None:
        began = time.perf_counter()
        told: list[tuple[answer.Stored, str]] = []
        wanted: list[tuple[int, Part, Head]] = []
        for part in parts:
            refused = self._refusal(part)
            head = Head() if part.lost else head_of(part.data)
            if refused is None:
                wanted.append((len(told), part, head))
            told.append((answer.Stored(head.sop_class_uid, head.sop_uid, refused), "failed"))
        for (place, _, _), outcome in zip(wanted, self._storing.map(self._store, wanted), strict=True):
            told[place] = _told(told[place][0], outcome)
        self.results += [stored for stored, _ in told]
        each = (time.perf_counter() - began) / len(parts)
        sizes = [part.size for part in parts]
        for part in parts:
            part.close()
        for (_, kind), size in zip(told, sizes, strict=True):
            self._tally.stored(self._peer, kind, size, each)

    def _refusal(self, part: Part) -> int | None:
        """Why a part is not even looked at."""
        if part.lost:
            self.too_large |= part.too_large
            return answer.OUT_OF_RESOURCES
        kind = part.content_type.partition(";")[0].strip()
        if kind not in ("", "application/dicom") or bytes(part.data[128:132]) != b"DICM":
            return answer.CANNOT_UNDERSTAND
        if self._study is not None and _study_of(part) not in (None, self._study):
            return answer.ANOTHER_STUDY
        return None

    def _store(self, wanted: tuple[int, Part, Head]) -> Outcome | int:
        """Keep one instance."""
        _, part, head = wanted
        try:
            if head.whole and not part.spooled:
                theirs = bytes(part.data[: head.end])
                try:
                    return self._landing.receive_one(self._received(part, head))
                except Mismatch:  # group 0002 names another instance than the data set: kept as it came
                    part.memory[BEFORE : BEFORE + head.end] = theirs
            return self._landing.receive_many([Arrival(data=part.data, site=self._site, sender=self._sender)])[0]
        except StorageFull:
            LOG.error("no space left: an instance from %s was refused", self._sender)
            self._tally.failed(self._sender, "no space left")
            return answer.OUT_OF_RESOURCES
        except Exception as error:  # noqa: BLE001 - the peer is told, and may send it again
            LOG.error("an instance from %s could not be kept: %s", self._sender, type(error).__name__)
            self._tally.failed(self._sender, f"could not be kept: {type(error).__name__}")
            return answer.PROCESSING_FAILURE

    def _received(self, part: Part, head: Head) -> Received:
        """As C-STORE would have brought it: the data set behind a header of our own, which says whence it came."""
        ours = landed.header(
            sop_class_uid=head.sop_class_uid,
            sop_uid=head.sop_uid,
            transfer_syntax_uid=head.transfer_syntax_uid,
            sender=self._sender,
            site=self._site,
        )
        data_set = part.data[head.end :]
        digest = landed.begin(head.transfer_syntax_uid)
        digest.update(data_set)
        sha256 = digest.hexdigest()
        data = _behind(ours, part, head)
        data[landed.seal_at(ours)] = self._landing.stamp(sha256, self._site, self._sender)
        return Received(
            data=data,
            site=self._site,
            sender=self._sender,
            sha256=sha256,
            sop_class_uid=head.sop_class_uid,
            sop_uid=head.sop_uid,
        )


def _behind(ours: bytes, part: Part, head: Head) -> memoryview:
    """Our header and a part's data set, in the part's own memory: ours takes the place of the sender's and of what is free."""
    start = BEFORE + head.end - len(ours)
    if start < 0:  # never: both headers have some hundred bytes
        return memoryview(bytearray(ours + part.data[head.end :]))
    part.memory[start : start + len(ours)] = ours
    return memoryview(part.memory)[start : BEFORE + part.size]


def _told(stored: answer.Stored, outcome: Outcome | int) -> tuple[answer.Stored, str]:
    if isinstance(outcome, int):
        return msgspec.structs.replace(stored, failure=outcome), "failed"
    if outcome.reason is Reason.NOT_DICOM or not stored.sop_uid:  # kept in quarantine; but of what, nobody can say
        return msgspec.structs.replace(stored, failure=answer.CANNOT_UNDERSTAND), str(outcome.kind)
    return stored, str(outcome.kind)


def _study_of(part: Part) -> str | None:
    from radloop.dicom.header import read_header

    try:
        return read_header(part.data).study_uid
    except DicomError:
        return None  # quarantine will have it


def _accepted(accept: str) -> str | None:
    """The form of the answer that the client takes; JSON where it may choose."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    if any(kind in ("", "*/*", "application/*", _JSON, "application/json") for kind in kinds):
        return _JSON
    return _XML if any(kind in (_XML, "application/xml", "text/xml") for kind in kinds) else None


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise EngineError(
            f"cannot listen on {host}:{port}",
            expected="a free port on an address of this machine",
            got=error.strerror,
            next_step="stop what uses the port, or set another `port` under [listen.stow] in radloop.toml",
        ) from error
    return listening


def _uvicorn() -> Any:
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        raise SettingsError(
            "the STOW-RS receiver is not installed",
            expected="starlette and uvicorn",
            got=str(error),
            next_step='pip install "radloop[serve]"',
        ) from error
    del starlette
    return uvicorn

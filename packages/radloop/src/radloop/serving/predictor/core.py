"""What both protocols share: who may ask, what is too much, how a question becomes an answer and a row of the log."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import math
import random
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.errors import DataError, DicomError
from radloop.logs import Lines
from radloop.serving.batching import Answer, Batcher
from radloop.serving.gateway import ANSWERS_HEADER, CHALLENGER_HEADER, CHAMPION_HEADER, MAX_BODY_BYTES, MIRROR_HEADER
from radloop.serving.model import Examined, ServedModel
from radloop.serving.predictions import CHALLENGER, CHAMPION, OK, Digests, PredictionLog, PredictionRow
from radloop.serving.predictor.metrics import Metrics
from radloop.serving.protocol import OUTPUTS, Question, Refusal, check_finite

DEADLINE_S = 30.0
QUEUE = 256
"""Requests that may be under way; one more is answered 429."""
MOST_UNLOGGED = 10_000
"""Rows waiting for a disk that does not take them, at which the predictor stops being ready."""

_PARSED_AT_ONCE = 65_536
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_random = random.Random()  # noqa: S311 - ids are no secrets; seeded by the system, and asks it for nothing more
_SILENT = frozenset({401, 404, 429})
"""Refusals that are counted, not logged: they are not about an image."""


class Asked(msgspec.Struct):
    """What the headers (gRPC: the metadata) say: the gateway's words on roles and copies, and the sender's site.

    `images`: how many were computed, once they were.
    """

    protocol: str
    request_id: str
    role: str
    served: bool
    compared_with: str | None
    site: str | None
    started: float
    images: int = 0

    @classmethod
    def of(cls, protocol: str, headers: Mapping[str, str], digest: str) -> Asked:
        """`headers` in lower case; `digest` of the model that was asked."""
        models = {name: headers.get(name, "") for name in (CHAMPION_HEADER, CHALLENGER_HEADER)}
        others = [model for model in models.values() if model and model != digest and _DIGEST.fullmatch(model)]
        return cls(
            protocol=protocol,
            request_id=_request_id(headers.get("x-request-id", "")),
            role=CHALLENGER if models[CHALLENGER_HEADER] == digest else CHAMPION,
            served=MIRROR_HEADER not in headers and headers.get(ANSWERS_HEADER, digest) == digest,
            compared_with=others[0] if others else None,
            site=headers.get("x-radloop-site"),
            started=time.perf_counter(),
        )


class Answered(msgspec.Struct, frozen=True):
    """Values of each output, and what is said of the answer as a whole."""

    columns: dict[str, list[Any]]
    parameters: dict[str, str]


class Core:
    """One model behind both protocols.

    Args:
        model: loaded and warm.
        log: where predictions go.
        name, version: what the model is called in paths and answers.
        token: bearer token asked for everywhere but at the health paths; None asks for none.
        threads: calls of the model at once, and DICOM files examined at once.
        max_body_bytes: a larger body is refused.
        deadline_s: what is not answered by then is refused.
        lines: the log that gets a line a request.
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
        deadline_s: float = DEADLINE_S,
        lines: Lines | None = None,
    ) -> None:
        self.model, self.log, self.name, self.version = model, log, name, version
        self.max_body_bytes, self.deadline_s = max_body_bytes, deadline_s
        self.metrics = Metrics(model.digest, version)
        self.draining = False
        self._lines = lines
        self._token = None if token is None else token.encode()
        self._batcher = Batcher(model.compute, threads=threads, observe=self.metrics.batch.observe)
        self._examiners = ThreadPoolExecutor(threads, thread_name_prefix="examine")
        self._under_way = 0
        self.metrics.watch(lambda: self._under_way, lambda: self._batcher.waiting, lambda: log.pending)

    def close(self) -> None:
        """Finish what was taken, and write the log."""
        self._examiners.shutdown()
        self._batcher.close()
        self.log.close()
        if self._lines is not None:
            self._lines.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: not while draining, nor while the log cannot be written."""
        return not self.draining and self.log.pending < MOST_UNLOGGED

    @property
    def metadata(self) -> dict[str, Any]:
        """The protocol's model metadata."""
        size = self.model.size
        inputs = [("image", "FP32", [-1, 1, size, size]), ("dicom", "BYTES", [-1])]
        outputs = [(name, datatype, [-1, 1]) for name, datatype in OUTPUTS.items()]
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": self.model.platform,
            "inputs": [dict(zip(("name", "datatype", "shape"), one, strict=True)) for one in inputs],
            "outputs": [dict(zip(("name", "datatype", "shape"), one, strict=True)) for one in outputs],
            "properties": {"model_digest": self.model.digest},
        }

    # One request

    def authorise(self, header: str) -> None:
        """Raises Refusal (401) unless the Authorization header bears the token, if one is asked for."""
        if self._token is None:
            return
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            message = "a token is needed: send the header Authorization: Bearer TOKEN"
            raise Refusal(401, "token", message, {"www-authenticate": "Bearer"})

    def check_model(self, name: str, version: str) -> None:
        """Raises Refusal (404) for another model or version; an empty version is any."""
        if name != self.name:
            raise Refusal(404, "unknown_model", f'no such model here; the model served is "{self.name}"')
        if version and version != self.version:
            raise Refusal(404, "unknown_version", f'no such version here; the version served is "{self.version}"')

    def check_load(self) -> None:
        """Raises Refusal: 503 while ending, 429 when too much is under way."""
        if not self.is_ready:
            raise Refusal(503, "not_ready", "the predictor is ending or its log cannot be written; ask again elsewhere")
        if self._under_way > QUEUE:
            raise Refusal(429, "busy", "too many requests are under way; ask again later", {"retry-after": "1"})

    def too_large(self) -> Refusal:
        """What a body beyond the limit is told."""
        limit = f"{self.max_body_bytes // (1024 * 1024)} MiB"
        return Refusal(413, "too_large", f"the body is larger than {limit}", {"connection": "close"})

    def begin(self) -> None:
        """A request came in; `end` follows, whatever becomes of it."""
        self._under_way += 1

    def end(self, asked: Asked, status: int, reason: str) -> None:
        """A request was answered; refusals of images are logged as answers are."""
        self._under_way -= 1
        self.metrics.answered(asked.protocol, asked.role, str(status), reason, time.perf_counter() - asked.started)
        if reason != OK and status not in _SILENT and reason != "client_gone":
            self.log.append(functools.partial(self._row, asked, reason, _since(asked.started), time.time()))
        if self._lines is not None:
            self._tell(self._lines, asked, status, reason)

    def _tell(self, lines: Lines, asked: Asked, status: int, reason: str) -> None:
        facts = {
            "id": asked.request_id,
            "protocol": asked.protocol,
            "model": self.name,
            "version": self.version,
            "model_digest": self.model.digest[:16],
            "role": asked.role,
            "status": status,
            "reason": reason,
            "images": asked.images,
            "duration_ms": _since(asked.started),
        }
        lines.append("info" if status < 400 else "error" if status >= 500 else "warning", facts)

    async def understood(self, parse: Callable[[], Question], length: int) -> Question:
        """What `parse` makes of a body of `length` bytes; a long one in a thread, so that nobody else waits for it."""
        if length <= _PARSED_AT_ONCE:
            return parse()
        return await asyncio.get_running_loop().run_in_executor(self._examiners, parse)

    async def answer(self, question: Question, asked: Asked, deadline_s: float | None = None) -> Answered:
        """Examine, predict, log.

        Args:
            deadline_s: the client's own, if it is sooner than this predictor's.

        Raises:
            Refusal: with its status.
        """
        limit = self.deadline_s if deadline_s is None else min(deadline_s, self.deadline_s)
        try:
            if question.images is None:
                async with asyncio.timeout(limit - (time.perf_counter() - asked.started)):
                    examined = await self._examined(question)
                images = np.stack([one.image for one in examined])
            else:
                examined, images = [], self._checked(question.images)
            digests = None if examined else Digests(images)
            left_s = limit - (time.perf_counter() - asked.started)
            probabilities, decisions = await self._computed(images, left_s, digests.find if digests else None)
        except TimeoutError:
            message = f"there was no answer within {limit:g} s; ask again later, or send fewer images at once"
            raise Refusal(504, "deadline", message) from None
        columns: dict[str, list[Any]] = {
            "probability": probabilities.tolist(),
            "decision": decisions.tolist(),
            "prediction_id": [_new_id() for _ in range(len(probabilities))],
        }
        if not all(map(math.isfinite, columns["probability"])):
            raise Refusal(500, "not_finite", "the model gave a probability that is not finite; nothing can be said")
        asked.images = len(images)
        self._log(asked, question.site, examined, digests, columns)
        parameters = {"model_version": self.version, "model_digest": self.model.digest}
        if len(images) == 1:
            parameters["prediction_id"] = columns["prediction_id"][0]
        return Answered(columns, parameters)

    async def _examined(self, question: Question) -> list[Examined]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._examiners, self._examine, question.files, question.site)

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            self.model.check(images)
        except DataError as error:
            check_finite(images)
            raise Refusal(400, "not_preprocessed", one_line(error)) from None
        return images

    async def _computed(
        self, images: NDArray[np.float32], seconds: float, afterwards: Callable[[], object] | None
    ) -> Answer:
        """Raises TimeoutError. A timer of its own does what asyncio.timeout does, for a quarter of its time."""
        future = self._batcher.submit(images, afterwards)
        timer = future.get_loop().call_later(seconds, _too_late, future)
        try:
            return await future
        finally:
            timer.cancel()

    def _examine(self, files: Sequence[bytes], site: str) -> list[Examined]:
        examined = []
        for number, data in enumerate(files):
            try:
                examined.append(self.model.examine(data, site))
            except DicomError as error:
                where = f"file {number}: " if len(files) > 1 else ""
                raise Refusal(422, str(error.reason), where + one_line(error)) from None
        return examined

    def _log(
        self,
        asked: Asked,
        site: str,
        examined: Sequence[Examined],
        digests: Digests | None,
        columns: dict[str, list[Any]],
    ) -> None:
        """Rows are made by the log's thread: here the client waits."""
        latency_ms, at = _since(asked.started), time.time()
        for number in range(asked.images):
            found = {name: columns[name][number] for name in OUTPUTS} | {"site": site or None}
            row = functools.partial(self._row, asked, OK, latency_ms, at)
            if digests is None:
                self.log.append(functools.partial(_filled, row, found, examined[number]))
            else:
                self.log.append(functools.partial(_filled, row, found, None, functools.partial(digests.of, number)))

    def _row(self, asked: Asked, status: str, latency_ms: float, at: float) -> PredictionRow:
        return PredictionRow(
            prediction_id=_new_id(),
            request_id=asked.request_id,
            at=datetime.fromtimestamp(at, UTC).isoformat(),
            model_name=self.name,
            version=self.version,
            model_digest=self.model.digest,
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


def _filled(
    make: Callable[[], PredictionRow],
    found: Mapping[str, Any],
    one: Examined | None,
    digest: Callable[[], str] | None = None,
) -> PredictionRow:
    """A row with its answer; of a DICOM instance, `one`, with what is known of it, of a tensor with its digest."""
    row = make()
    row.update(found)  # type: ignore[typeddict-item]
    if one is not None:
        row["sop_uid"], row["study_uid"], row["patient"] = one.sop_uid, one.study_uid, one.patient
        row["input_digest"], row["tags"], row["features"] = one.input_digest, one.tags, one.features
    elif digest is not None:
        row["input_digest"] = digest()
    return row


def _too_late(future: asyncio.Future[Answer]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _request_id(given: str) -> str:
    """A UUID as it is; anything else by its digest, as it might say who the patient is."""
    if not given:
        return _new_id()
    if _UUID.fullmatch(given):
        return given
    try:
        return str(uuid.UUID(given))
    except ValueError:
        return hashlib.sha256(given.encode()).hexdigest()[:32]


def _new_id() -> str:
    """A random UUID, version 4. `uuid.uuid4` asks the system each time, and lets another thread run meanwhile."""
    digits = f"{_random.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def one_line(error: Exception) -> str:
    """A radloop error as one line of an answer."""
    return "; ".join(str(error).split("\n  "))


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)

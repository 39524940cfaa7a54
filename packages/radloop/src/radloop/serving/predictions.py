"""The prediction log: one JSON line a prediction, in files that only grow.

Rows hold pseudonyms only. They are written by a background thread every `interval_s` and fsynced, so that an answer
does not wait for the disk: a process killed by SIGKILL loses at most the rows of its last interval. The last line of a
file may be torn by such a kill; the reader leaves it out.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from radloop.errors import DataError

FLUSH_INTERVAL_S = 0.2
CHAMPION = "champion"
CHALLENGER = "challenger"
OK = "ok"


class PredictionRow(TypedDict):
    """One answered request. What is unknown (a tensor has no patient, a refusal no probability) is None or empty.

    `request_id` is the gateway's x-request-id: the champion's and the challenger's answer to one request share it.
    `served` is false for the copy of a request whose answer the gateway threw away (shadow).
    """

    prediction_id: str
    request_id: str
    at: str  # UTC, ISO 8601
    model_name: str
    version: str
    model_digest: str
    role: str  # "champion" or "challenger" when the request came in
    served: bool
    compared_with: str | None  # model_digest of the other model that the gateway sent this request to
    sop_uid: str | None
    study_uid: str | None
    patient: str | None
    site: str | None
    input_digest: str | None  # SHA-256 of the DICOM bytes or of the tensor's bytes
    tags: dict[str, Any]  # a part of dicom.tags.describe: TAGS
    features: dict[str, float]  # f_*, imaging.pixels.features
    probability: float | None
    decision: int | None
    latency_ms: float
    status: str  # "ok", or the reason the request was refused


class Pair(msgspec.Struct, frozen=True):
    """The two answers to one request; `challenger` is None if it never answered."""

    champion: PredictionRow
    challenger: PredictionRow | None


class Digests:
    """SHA-256 of the bytes of each of several images, found once.

    The thread that computed calls `find` as soon as the answer is on its way: the images are still in its core's cache, and are
    let go of. Left to the log's thread, five times a second, it would be milliseconds at once, for which an answer in fifty
    had to wait; before the answer, every client would wait.
    """

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images: NDArray[np.float32] | None = images
        self._found: list[str] = []

    def find(self) -> None:
        """Find them, unless they are found. From any thread."""
        images = self._images
        if images is not None:  # hashlib lets other threads run meanwhile
            self._found = [hashlib.sha256(np.ascontiguousarray(image).data).hexdigest() for image in images]
            self._images = None

    def of(self, number: int) -> str:
        """Of one image, hexadecimal. From any thread."""
        self.find()
        return self._found[number]


class PredictionLog:
    """Appends rows to `{directory}/{label}-{start}-{pid}.jsonl`.

    Args:
        directory: made if absent (0700).
        label: the model's version, for whoever looks at the folder; anything but letters, digits, `.`, `_` becomes `_`.
        interval_s: how long a row may wait in memory, in seconds.

    `pending` and `failures` say how many rows wait and how often writing failed: with a full disk rows are kept in
    memory and tried again.
    """

    def __init__(self, directory: Path, label: str, *, interval_s: float = FLUSH_INTERVAL_S) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = "".join(c if c.isalnum() or c in "._" else "_" for c in label) or "model"
        start = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.path = directory / f"{name}-{start}-{os.getpid()}-{uuid.uuid4().hex[:4]}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._encoder = msgspec.json.Encoder()
        self._rows: deque[Callable[[], PredictionRow] | PredictionRow] = deque()
        self._made: list[PredictionRow] = []  # taken from there, and not on disk yet
        self._closing = threading.Event()
        self._interval_s = interval_s
        self.failures = 0
        self._whole = 0  # bytes of the file that are whole lines
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)
        self._thread.start()

    def append(self, row: PredictionRow | Callable[[], PredictionRow]) -> None:
        """Hand over a row, or what makes it, which is called once and in the background. Returns at once; from any thread."""
        self._rows.append(row)

    @property
    def pending(self) -> int:
        """Rows that are not on disk yet."""
        return len(self._rows) + len(self._made)

    def close(self) -> None:
        """Write what waits and close the file."""
        self._closing.set()
        self._thread.join()
        os.close(self._file)

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        for _ in range(len(self._rows)):
            row = self._rows[0]
            self._made.append(row() if callable(row) else row)
            self._rows.popleft()  # only now, so that `pending` never misses it
        if not self._made:
            return
        data = b"".join(self._encoder.encode(row) + b"\n" for row in self._made)
        try:
            self._write(data)
        except OSError:
            self.failures += 1
        else:
            self._made.clear()

    def _write(self, data: bytes) -> None:
        """All of it or, as far as the file is concerned, nothing: a half-written batch is cut off again."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._whole)
            raise
        self._whole += len(data)


def read(directory: Path, *, status: str | None = None) -> Iterator[PredictionRow]:
    """All rows of all files, file by file in name order, rows in the order they were written.

    Args:
        directory: may be absent: no rows.
        status: only rows of this status, such as "ok".

    Raises:
        DataError: a line that is not the torn end of a file cannot be read.
    """
    for path in _paths(directory):
        for row in _rows(path):
            if status is None or row["status"] == status:
                yield row


def find(directory: Path, prediction_id: str) -> PredictionRow | None:
    """The row of one prediction, None if there is none."""
    needle = prediction_id.encode()
    for path in _paths(directory):
        if needle in path.read_bytes():
            for row in _rows(path):
                if row["prediction_id"] == prediction_id:
                    return row
    return None


def pairs(directory: Path, champion_digest: str, challenger_digest: str, *, settle_s: float = 2.0) -> list[Pair]:
    """Requests that the gateway sent to both models, with both answers; see `join`."""
    settled = datetime.now(UTC) - timedelta(seconds=settle_s)
    return join(read(directory), champion_digest, challenger_digest, settled=settled.isoformat())


def join(
    rows: Iterable[PredictionRow], champion_digest: str, challenger_digest: str, *, settled: str | None = None
) -> list[Pair]:
    """Pair the answers of two models, oldest first.

    Two rows pair when request_id and input_digest agree; a refusal, which has no input_digest, by request_id alone. Of
    repeated answers (a retried request) the best counts: an ok one before a refusal, then a served one, then the last.
    A champion's ok answer to a request that the gateway also sent to the challenger is there with `challenger=None` if
    the challenger has no row for it.

    Args:
        settled: UTC, ISO 8601: a missing answer to a request later than this may still come and is no pair yet.

    Raises:
        DataError: both digests are the same.
    """
    if champion_digest == challenger_digest:
        raise DataError("a model cannot be compared with itself", got=champion_digest)
    answers: dict[str, dict[tuple[str, str | None], PredictionRow]] = {champion_digest: {}, challenger_digest: {}}
    for row in rows:
        mine = answers.get(row["model_digest"])
        if mine is not None:
            key = (row["request_id"], row["input_digest"])
            if key not in mine or _rank(row) >= _rank(mine[key]):
                mine[key] = row
    theirs = answers[challenger_digest]
    joined = []
    for key, row in answers[champion_digest].items():
        other = theirs.get(key) or theirs.get((key[0], None))
        if other is not None or _is_unanswered(row, challenger_digest, settled):
            joined.append(Pair(champion=row, challenger=other))
    return sorted(joined, key=lambda pair: (pair.champion["at"], pair.champion["prediction_id"]))


def _is_unanswered(row: PredictionRow, challenger_digest: str, settled: str | None) -> bool:
    sent_to_both = row["status"] == OK and row["compared_with"] == challenger_digest
    return sent_to_both and (settled is None or row["at"] < settled)


def _rank(row: PredictionRow) -> tuple[bool, bool, str]:
    return row["status"] == OK, row["served"], row["at"]


_decoder = msgspec.json.Decoder(PredictionRow)


def _paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl")) if directory.is_dir() else []


def _rows(path: Path) -> Iterator[PredictionRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # torn by a kill, or being written at this moment
            try:
                yield _decoder.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(
                    "a line of the prediction log cannot be read",
                    expected="one JSON object as radloop's predictor writes it",
                    got=f"line {number} of {path.name}: {error}",
                    next_step="the file was changed or damaged; restore it, or move it out of the folder",
                ) from None

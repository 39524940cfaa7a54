"""JSON lines on stderr, one an event, when `RADLOOP_LOG=json` is set, for whatever collects logs. Without it nothing here works.

What stands in a line is what radloop itself says: its messages hold no value of an attribute, and no header, path or text that a
client sent. Of other packages' messages, and of exceptions', only the place is told: pydicom quotes values. Children (predictors,
Envoy) write to the stderr of the process that began them, in whole lines of at most 4096 bytes, which a pipe does not tear.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ENV, _FD = "RADLOOP_LOG", "RADLOOP_LOG_FD"
FLUSH_INTERVAL_S = 0.2
MOST_WAITING = 10_000
_CHUNK_BYTES = 4096
_OURS = "radloop"
_FRAMES = 8
_process = "radloop"


def wanted() -> bool:
    """Whether logs are asked for."""
    return os.environ.get(ENV) == "json"


def configure(process: str) -> None:
    """Send what `logging` gets in this process to the log, from INFO on for radloop's own, from WARNING on for the rest.

    Does nothing unless logs are asked for.

    Args:
        process: what this process is: `listen`, `predictor`.
    """
    global _process
    if not wanted():
        return
    _process = process
    root = logging.getLogger()
    root.handlers = [one for one in root.handlers if not isinstance(one, _Handler)] + [_Handler()]
    logging.getLogger(_OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)


def inherited() -> tuple[int, ...]:
    """Descriptors that a child needs for its lines; its environment says which. Empty unless logs are asked for."""
    if not wanted():
        return ()
    if _FD not in os.environ:
        os.environ[_FD] = str(os.dup(2))
    return (int(os.environ[_FD]),)


def write(level: str, facts: Mapping[str, Any]) -> None:
    """One line, at once, in the name that `configure` was given. Nothing unless logs are asked for."""
    if wanted():
        _put(_line(time.time(), level, facts))


class Lines:
    """Lines written in the background, for who must not wait: `append` costs a microsecond.

    More than 10,000 that wait are dropped, and the next line says how many.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, str, Mapping[str, Any]]] = deque()
        self._dropped = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def append(self, level: str, facts: Mapping[str, Any]) -> None:
        """Hand a line over. `facts` are not changed any more."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
            return
        self._waiting.append((time.time(), level, facts))

    def close(self) -> None:
        """Write what waits; a reader that takes nothing is waited for a second, no longer."""
        self._closing.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closing.wait(FLUSH_INTERVAL_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        chunk = b""
        while self._waiting:
            at, level, facts = self._waiting.popleft()
            line = _line(at, level, facts)
            if len(chunk) + len(line) > _CHUNK_BYTES:
                _put(chunk)
                chunk = b""
            chunk += line
        dropped, self._dropped = self._dropped, 0
        if dropped:
            chunk += _line(time.time(), "warning", {"message": "lines were dropped", "dropped": dropped})
        _put(chunk)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a log that fails must not stop what it tells of
            _put(_line(record.created, record.levelname.lower(), _facts(record)))


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {"logger": record.name}
    if record.name == _OURS or record.name.startswith(f"{_OURS}."):
        facts["message"] = record.getMessage()
    elif record.name == "py.warnings":  # "PATH:LINE: CATEGORY: what may quote anything"
        where, _, rest = record.getMessage().partition(": ")
        facts |= {"where": Path(where).name, "warning": rest.partition(":")[0]}
    else:
        facts["where"] = f"{record.filename}:{record.lineno}"
    if record.exc_info and record.exc_info[0] is not None:
        facts["exception"] = record.exc_info[0].__name__
        frames = traceback.extract_tb(record.exc_info[2])[-_FRAMES:]
        facts["frames"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return facts


def _line(at: float, level: str, facts: Mapping[str, Any]) -> bytes:
    import msgspec

    stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    told = {"at": stamp, "level": level, "process": _process, "pid": os.getpid(), **facts}
    made = msgspec.json.encode(told) + b"\n"
    if len(made) <= _CHUNK_BYTES:
        return made
    short = {name: value[:200] if isinstance(value, str) else value for name, value in told.items() if name != "frames"}
    return msgspec.json.encode(short) + b"\n"


def _put(data: bytes) -> None:
    if data:
        with suppress(OSError):
            os.write(int(os.environ.get(_FD, 2)), data)

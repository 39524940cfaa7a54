"""What a line of the log holds, and what it costs who writes it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from radloop import logs

NAME = "ZORBAXX^QUENTIN"
Read = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    """Turn the log on, into a pipe; return a function that reads its lines."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setenv("RADLOOP_LOG", "json")
    monkeypatch.setenv("RADLOOP_LOG_FD", str(writing))
    root, ours = logging.getLogger(), logging.getLogger("radloop")
    handlers, level = list(root.handlers), ours.level

    def lines() -> list[dict[str, Any]]:
        try:
            data = os.read(reading, 1 << 20)
        except BlockingIOError:
            return []
        return [json.loads(line) for line in data.splitlines()]

    yield lines
    root.handlers = handlers
    ours.setLevel(level)
    logging.captureWarnings(False)
    for each in (reading, writing):
        os.close(each)


OTHERS = """
import logging, sys, warnings
from radloop import logs

name = sys.argv[1]
logs.configure("listen")
logging.getLogger("radloop.dicom.listener").info("an association of %s is over", "CT1")
logging.getLogger("pydicom").warning("Invalid value %s", name)
warnings.warn(f"Invalid value {name}", UserWarning, stacklevel=1)
try:
    raise ValueError(name)
except ValueError:
    logging.getLogger("radloop.dicom.listener").exception("a connection failed")
"""


def test_our_words_are_told_and_others_are_not(tmp_path: Path) -> None:
    """If this failed, a warning of pydicom that quotes PatientName would be in the hospital's log server, for everybody.

    In a process of its own: what becomes of a warning is the whole process's affair, and any thread of it may change that.
    """
    script = tmp_path / "others.py"
    script.write_text(OTHERS)
    done = subprocess.run(
        [sys.executable, str(script), NAME], env=os.environ | {"RADLOOP_LOG": "json"}, capture_output=True, check=True
    )
    assert NAME.encode() not in done.stderr + done.stdout
    association, foreign, warned, failed = map(json.loads, done.stderr.splitlines())
    assert (association["message"], association["level"], association["process"]) == (
        "an association of CT1 is over", "info", "listen",
    )  # fmt: skip
    assert (foreign["logger"], foreign["where"].partition(":")[0]) == ("pydicom", "others.py")
    assert (warned["warning"], warned["where"].partition(":")[0]) == ("UserWarning", "others.py")
    assert failed["exception"] == "ValueError" and "<module>" in failed["frames"][-1]


def test_a_line_is_never_torn(read: Read) -> None:
    """If this failed, lines of two processes on one pipe would mix, and a collector would drop both."""
    logs.configure("x")
    logging.getLogger("radloop").warning("a" * 100_000)
    logs.write("info", {"message": "b"})
    long, short = read()
    assert len(json.dumps(long)) < 4096 and short["message"] == "b"


def test_without_the_variable_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, who asks for no log would get one, or lose what Python prints."""
    monkeypatch.delenv("RADLOOP_LOG", raising=False)
    before = list(logging.getLogger().handlers)
    logs.configure("x")
    assert logging.getLogger().handlers == before and logs.inherited() == ()


def test_a_reader_that_stands_still_holds_up_nobody(read: Read) -> None:
    """If this failed, a log server that hangs would stop predictions."""
    lines = logs.Lines()
    many = logs.MOST_WAITING + 5_000  # nothing is read yet, and the pipe holds a few hundred of them

    def hand_over() -> None:
        for number in range(many):
            lines.append("info", {"id": number, "text": "x" * 100})
        lines.close()

    handing = threading.Thread(target=hand_over, daemon=True)
    handing.start()
    handing.join(60)
    assert not handing.is_alive()
    ids, dropped, until = list[int](), 0, time.monotonic() + 60
    while len(ids) + dropped < many and time.monotonic() < until:
        time.sleep(0.002)  # the thread goes on as we read
        for line in read():
            ids += [line["id"]] if "id" in line else []
            dropped += line.get("dropped", 0)
    assert len(ids) + dropped == many and dropped > 4_000
    assert ids == sorted(set(ids)) and len(ids) >= logs.MOST_WAITING

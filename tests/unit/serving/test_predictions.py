"""The prediction log: what is written is found again, whatever happened to the process that wrote it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.errors import DataError
from radloop.serving import predictions
from radloop.serving.predictions import PredictionLog, PredictionRow

CHAMPION, CHALLENGER = "a" * 64, "b" * 64


def row(number: int = 0, **changes: Any) -> PredictionRow:
    made: dict[str, Any] = {
        "prediction_id": f"id-{number}",
        "request_id": f"request-{number}",
        "at": f"2026-01-01T00:00:{number % 60:02d}+00:00",
        "model_name": "default",
        "version": "1",
        "model_digest": CHAMPION,
        "role": "champion",
        "served": True,
        "compared_with": None,
        "sop_uid": f"2.25.{number}",
        "study_uid": "2.25.9",
        "patient": "P1",
        "site": "A",
        "input_digest": f"digest-{number}",
        "tags": {"modality": "DX"},
        "features": {"f_mean": 0.5},
        "probability": 0.25,
        "decision": 0,
        "latency_ms": 4.0,
        "status": "ok",
    }
    return made | changes  # type: ignore[return-value]


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.01)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """A prediction that cannot be found again cannot be traced to the instances that trained its model."""
    log = PredictionLog(tmp_path / "predictions", "3")
    for number in range(500):
        log.append(row(number))
    log.close()
    assert list(predictions.read(tmp_path / "predictions")) == [row(number) for number in range(500)]
    assert predictions.find(tmp_path / "predictions", "id-321") == row(321)
    assert predictions.find(tmp_path / "predictions", "id-32") == row(32)
    assert predictions.find(tmp_path / "predictions", "id-9999") is None
    assert log.path.stat().st_mode & 0o777 == 0o600
    assert log.path.parent.stat().st_mode & 0o777 == 0o700


def test_no_folder_is_no_predictions(tmp_path: Path) -> None:
    """`radloop status` on a new project must not fail because nothing was predicted yet."""
    assert list(predictions.read(tmp_path / "none")) == []
    assert predictions.find(tmp_path / "none", "x") is None


def test_status_filters(tmp_path: Path) -> None:
    """Refused requests have no probability; a drift window that took them in would fail or lie."""
    log = PredictionLog(tmp_path, "1")
    log.append(row(1))
    log.append(row(2, status="TRUNCATED", probability=None))
    log.close()
    assert [r["prediction_id"] for r in predictions.read(tmp_path, status="ok")] == ["id-1"]


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_predictions import row
from radloop.serving.predictions import PredictionLog
log = PredictionLog(Path({folder!r}), "1")
number = 0
while True:
    log.append(row(number))
    print(number, flush=True)
    number += 1
    time.sleep(0.001)
"""


def test_a_kill_loses_at_most_the_last_interval(tmp_path: Path) -> None:
    """The stated promise of the log: without it, answers given to clinicians vanish with the process."""
    # A machine may be too busy to write in one of them, not in all.
    assert any(_kept_until_killed(tmp_path / str(number)) for number in range(5))


def _kept_until_killed(folder: Path) -> bool:
    """Kill a writer; whether all is there but what came in the last interval."""
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen: list[tuple[float, int]] = []
        until = time.monotonic() + 60
        while (not seen or seen[-1][0] - seen[0][0] < 1.5) and time.monotonic() < until:
            number = int(writer.stdout.readline())
            seen.append((time.monotonic(), number))
        os.kill(writer.pid, signal.SIGKILL)
        killed = time.monotonic()
    kept = list(predictions.read(folder))
    numbers = [int(r["prediction_id"].removeprefix("id-")) for r in kept]
    assert numbers == list(range(len(numbers))), "a hole before the end"
    # The interval, and the time that a busy machine takes for one write.
    safe = max(number for at, number in seen if at < killed - predictions.FLUSH_INTERVAL_S - 0.5)
    return bool(numbers) and numbers[-1] >= safe


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    """A kill in the middle of a write must not make every earlier prediction unreadable."""
    log = PredictionLog(tmp_path, "1")
    for number in range(3):
        log.append(row(number))
    log.close()
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-5])
    assert len(list(predictions.read(tmp_path))) == 2


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    """Evidence that was changed must be noticed, not skipped."""
    log = PredictionLog(tmp_path, "1")
    for number in range(3):
        log.append(row(number))
    log.close()
    log.path.write_bytes(log.path.read_bytes().replace(b'"id-1"', b"7", 1))
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(predictions.read(tmp_path))
    assert "line 2" in str(caught.value)


def test_a_row_is_pending_until_it_is_on_disk(tmp_path: Path) -> None:
    """A predictor is ready while few rows wait: those that a slow disk is being given wait, too."""
    log, taken, go_on = PredictionLog(tmp_path, "1", interval_s=0.02), threading.Event(), threading.Event()

    def slow() -> PredictionRow:
        taken.set()
        go_on.wait(10)
        return row(0)

    log.append(slow)
    assert taken.wait(10)
    pending = log.pending
    go_on.set()
    wait_until(lambda: log.pending == 0)
    assert pending == 1
    assert list(predictions.read(tmp_path)) == [row(0)]
    log.close()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Rows wait in memory while the disk is full, the file stays whole lines, and all is there once there is room."""
    import resource

    log = PredictionLog(tmp_path, "1", interval_s=0.02)
    log.append(row(0))
    wait_until(lambda: log.pending == 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 100, before[1]))
        log.append(row(1))
        wait_until(lambda: log.failures > 0)
        assert log.pending == 1
        assert list(predictions.read(tmp_path)) == [row(0)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    log.append(row(2))
    log.close()
    assert list(predictions.read(tmp_path)) == [row(0), row(1), row(2)]


def challenger(number: int, **changes: Any) -> PredictionRow:
    return row(number, **({"model_digest": CHALLENGER, "role": "challenger", "served": False} | changes))


def test_the_answers_to_one_request_are_paired() -> None:
    """The judge compares answers to the same image; a wrong pairing would compare two patients."""
    rows = [row(1, compared_with=CHALLENGER), row(2, compared_with=CHALLENGER), row(3), challenger(2), challenger(1)]
    pairs = predictions.join(rows, CHAMPION, CHALLENGER)
    assert [(p.champion["request_id"], p.challenger and p.challenger["request_id"]) for p in pairs] == [
        ("request-1", "request-1"),
        ("request-2", "request-2"),
    ]


def test_an_answer_that_never_came_is_seen() -> None:
    """A challenger that dies on hard images must not look good because only its answers are counted."""
    rows = [row(1, compared_with=CHALLENGER), row(2, compared_with="c" * 64), row(3)]
    assert predictions.join(rows, CHAMPION, CHALLENGER) == [predictions.Pair(rows[0], None)]
    early = predictions.join(rows, CHAMPION, CHALLENGER, settled="2026-01-01T00:00:00+00:00")
    assert early == [], "an answer that may still come was counted as missing"


def test_a_challengers_refusal_is_its_answer() -> None:
    """A refusal has no input digest, and still belongs to the request that was refused."""
    refused = challenger(1, input_digest=None, status="UNEXPECTED_MODALITY", probability=None, decision=None)
    [pair] = predictions.join([row(1, compared_with=CHALLENGER), refused], CHAMPION, CHALLENGER)
    assert pair.challenger == refused


def test_of_repeated_answers_the_best_counts() -> None:
    """The gateway asks again when a connection breaks; the broken attempt must not count against the model."""
    broken = challenger(1, status="internal", probability=None, input_digest="digest-1")
    for rows in ([row(1), broken, challenger(1)], [challenger(1), row(1), broken]):
        [pair] = predictions.join(rows, CHAMPION, CHALLENGER)
        assert pair.challenger == challenger(1)


def test_one_request_id_for_two_images_makes_no_false_pair() -> None:
    """A client that repeats its request id must not get two patients compared with each other."""
    rows = [row(1, request_id="same"), challenger(2, request_id="same")]
    assert predictions.join(rows, CHAMPION, CHALLENGER) == []


def test_a_model_is_not_compared_with_itself() -> None:
    """A release of the model that is served already would be judged perfect."""
    with pytest.raises(DataError, match="itself"):
        predictions.join([], CHAMPION, CHAMPION)


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_pairing_does_not_depend_on_the_order_of_files(order: list[int], answered: set[int]) -> None:
    """Rows come from several processes' files in any order; the verdict must not."""
    rows = [row(n, compared_with=CHALLENGER) for n in range(12)] + [challenger(n) for n in answered]
    shuffled = [rows[n] for n in order] + rows[12:]
    pairs = predictions.join(shuffled, CHAMPION, CHALLENGER)
    assert pairs == predictions.join(rows, CHAMPION, CHALLENGER)
    assert len(pairs) == 12
    assert {p.champion["request_id"] for p in pairs if p.challenger} == {f"request-{n}" for n in answered}

"""Seconds an op of Dagster, in process, with five empty ops in a row. Run by engines.py under an environment that holds it."""

from __future__ import annotations

import json
import sys
import time

from dagster import job, op

STAGES = 5


@op
def empty(after: int) -> int:
    return after


@op
def first() -> int:
    return 0


@job
def five():
    last = first()
    for number in range(STAGES - 1):
        last = empty.alias(f"empty{number}")(last)


five.execute_in_process()
times = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    assert five.execute_in_process().success
    times.append((time.perf_counter() - began) / STAGES)
print(json.dumps({"dagster (in process)": times}))

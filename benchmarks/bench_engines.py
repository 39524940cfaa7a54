"""What a stage costs over its bare function, on each engine of this issue.

Method: a pipeline of five stages that write one small artifact each, wired in a row, on a fresh home each round; the bare
functions are called in this process in the same rounds, A B A B. The median over the rounds, a stage. The record (request,
result, events, artifact with fsync) is kept each time. The physical limit printed is two fsyncs of a small file in a new
directory, renamed: what a record that survives a power cut costs at the least on this disk.

    make bench ARGS="-k engines"
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from radloop.engines import local, subprocess
from radloop.pipeline import Builder, Pipeline
from radloop.testing import suite_stages as s

STAGES, ROUNDS = 5, 15


def chain() -> Pipeline:
    b = Builder("bench")
    last = b.add(s.numbers).made
    for number in range(STAGES - 1):
        last = b.add(s.total, name=f"total{number}", given=last).summed
    return b.build()


def seconds(run: object, home: Path) -> float:
    began = time.perf_counter()
    run(home)  # type: ignore[operator]
    return (time.perf_counter() - began) / STAGES


def bare(home: Path) -> None:
    for _ in range(STAGES):
        values = [1.5 * i for i in range(3)]
        sum(values)


def limit(home: Path) -> None:
    for number in range(STAGES):
        folder = home / f"{number}.new"
        folder.mkdir(parents=True)
        for name in ("numbers.json", "artifact.json"):
            with (folder / name).open("wb") as f:
                f.write(b"{}")
                f.flush()
                os.fsync(f.fileno())
        folder.rename(home / str(number))


def test_engines() -> None:
    pipeline = chain()
    cases = {
        "bare functions": bare,
        "limit: two fsyncs and a rename": limit,
        "local": lambda home: local.run(pipeline, home=home),
        "subprocess": lambda home: subprocess.run(pipeline, home=home),
    }
    took: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name, run in cases.items():
                if name == "subprocess" and number >= 3:
                    continue
                home = Path(folder, f"{number}-{name[:3]}")
                took[name].append(seconds(run, home))
                shutil.rmtree(home, ignore_errors=True)
    print(f"\n{'ms a stage':36} median     min     max")
    for name, values in took.items():
        figures = (statistics.median(values), min(values), max(values))
        print(f"{name:36} " + " ".join(f"{1000 * v:7.2f}" for v in figures))

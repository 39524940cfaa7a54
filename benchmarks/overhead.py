"""What radloop adds to the work itself: a stage over its bare function, and starting the command line.

Method: a pipeline of five stages that write one small artifact each, wired in a row, on a fresh home each round; the bare
functions are called in the same rounds, A B A B. Medians over the rounds, a stage. The record (request, result, events,
artifact with fsync) is kept each time. The limit printed is two fsyncs of small files in a new directory, renamed: what a
record that survives a power cut costs at the least on this disk. The command line is timed as a process, best of seven: what
else the machine does only ever adds. Exits with 1 where a promise is not kept.

    make bench
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess as processes
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from radloop.engines import local, subprocess
from radloop.pipeline import Builder, Pipeline
from radloop.testing import suite_stages as s

STAGES, ROUNDS, SLOW_ROUNDS = 5, 15, 3


def chain() -> Pipeline:
    """Five stages in a row."""
    b = Builder("bench")
    last = b.add(s.numbers).made
    for number in range(STAGES - 1):
        last = b.add(s.total, name=f"total{number}", given=last).summed
    return b.build()


def bare(home: Path) -> None:
    """What the stages compute."""
    for _ in range(STAGES):
        sum([1.5 * i for i in range(3)])


def limit(home: Path) -> None:
    """The least that a durable record costs."""
    for number in range(STAGES):
        folder = home / f"{number}.new"
        folder.mkdir(parents=True)
        for name in ("numbers.json", "artifact.json"):
            with (folder / name).open("wb") as f:
                f.write(b"{}")
                f.flush()
                os.fsync(f.fileno())
        folder.rename(home / str(number))


def stages() -> dict[str, list[float]]:
    """Seconds a stage, by engine."""
    pipeline = chain()
    cases: dict[str, Callable[[Path], object]] = {
        "bare functions": bare,
        "limit: two fsyncs and a rename": limit,
        "local": lambda home: local.run(pipeline, home=home),
        "subprocess": lambda home: subprocess.run(pipeline, home=home),
    }
    took: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name, run in cases.items():
                if name == "subprocess" and number >= SLOW_ROUNDS:
                    continue
                home = Path(folder, f"{number}-{name[:3]}")
                began = time.perf_counter()
                run(home)
                took[name].append((time.perf_counter() - began) / STAGES)
                shutil.rmtree(home, ignore_errors=True)
    return took


def best_of(*arguments: str, tries: int = 7) -> float:
    """Shortest time, in seconds, of an interpreter with these arguments."""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        processes.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> int:
    """Print the table; the exit code."""
    took = stages()
    print(f"{'ms a stage':32} median     min     max    over the limit")
    floor = statistics.median(took["limit: two fsyncs and a rename"])
    for name, values in took.items():
        median = statistics.median(values)
        figures = " ".join(f"{1000 * v:7.2f}" for v in (median, min(values), max(values)))
        print(f"{name:32} {figures}   {median / floor:8.1f}")
    promises = (
        ("a stage of the local engine", statistics.median(took["local"]), 0.005),
        ("radloop --help", best_of("-m", "radloop.cli", "--help"), 0.3),
    )
    for name, seconds, promised in promises:
        kept = "kept" if seconds <= promised else "NOT KEPT"
        print(f"{name:32} {1000 * seconds:7.1f} ms, promised {1000 * promised:.0f}: {kept}")
    return int(any(seconds > promised for _, seconds, promised in promises))


if __name__ == "__main__":
    sys.exit(main())

"""Measure what we promise about overhead; exit 1 where a promise is not kept.

The best of several tries is taken: what else the machine does only ever adds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from radloop.engines import local
from radloop.pipeline import Builder, Pipeline
from radloop.testing import suite_stages

STEPS = 5


def best(measured: Callable[[], object], tries: int) -> float:
    """Return the shortest of several runs, in seconds."""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        measured()
        times.append(time.perf_counter() - began)
    return min(times)


def process(*arguments: str) -> Callable[[], object]:
    """Return what starts an interpreter with these arguments and waits for it."""
    return lambda: subprocess.run([sys.executable, *arguments], capture_output=True, check=True)


def almost_empty() -> Pipeline:
    """Return five steps that each write one small artifact."""
    builder = Builder("bench")
    handle = builder.add(suite_stages.numbers).made
    for step in range(1, STEPS):
        handle = builder.add(suite_stages.total, name=f"total{step}", given=handle).summed
    return builder.build()


def one_run(pipeline: Pipeline) -> None:
    """Run it in a home of its own, with its record kept."""
    with tempfile.TemporaryDirectory() as folder:
        result = local.run(pipeline, home=Path(folder) / "home")
    assert result.status == "succeeded", result.message


def main() -> int:
    """Print one line a promise; the exit code."""
    pipeline = almost_empty()
    one_run(pipeline)
    rows = [
        ("an empty step of a pipeline, its record kept", best(lambda: one_run(pipeline), 10) / STEPS, 0.005),
        ("radloop --help", best(process("-m", "radloop.cli", "--help"), 7), 0.3),
        ("import radloop", best(process("-c", "import radloop"), 7), 0.1),
    ]
    for name, seconds, promised in rows:
        print(
            f"{name:<48}{seconds * 1e3:>8.1f} ms   promised {promised * 1e3:.0f} ms{'' if seconds <= promised else '   NOT KEPT'}"
        )
    return int(any(seconds > promised for _, seconds, promised in rows))


if __name__ == "__main__":
    sys.exit(main())

"""What each engine adds to a stage, ours and its peers', in one run.

Method: a chain of five stages that write one small artifact each. Every engine runs it in turn, A B C A B C, each round in a
fresh home; medians over the rounds, per stage. Ours keep the record each time (request, result, events, artifact with fsync).
Peers run five empty functions wired in the same way: Dagster, in process; plain Kubeflow Pipelines, by its own
SubprocessRunner; plain Airflow, by `dag.test()` of five Python tasks. On Airflow a DAG's fixed part is taken out: a chain of
five against a chain of ten, both ours and plain. The limit printed is two fsyncs of small files in a new directory, renamed:
what a record that survives a power cut costs at the least on this disk. The command line is timed as a process, best of
seven: what else the machine does only ever adds.

Promises: a stage of the local engine 5 ms with its record, `radloop --help` 0.3 s, and a stage of ours on Kubeflow and on Airflow
at most 1.3 times the bare engine's plus one Python start. Exits with 1 where one is not kept.

    make bench
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess as processes
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from radloop.engines import kubeflow, local, mlflow_project, subprocess
from radloop.pipeline import Builder, Pipeline
from radloop.testing import suite_stages as s

STAGES, ROUNDS, SLOW_ROUNDS = 5, 15, 3
HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / ".venvs"


def chain(stages: int = STAGES) -> Pipeline:
    """Stages in a row."""
    b = Builder("bench")
    last = b.add(s.numbers).made
    for number in range(stages - 1):
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


def checked(run: Callable[..., object]) -> Callable[[Path], None]:
    """An engine that must succeed: a chain that failed early would be quick."""

    def timed(home: Path) -> None:
        result = run(chain(), home=home)
        assert result.status == "succeeded", result.message  # type: ignore[attr-defined]

    return timed


def plain_kubeflow() -> Callable[[Path], None]:
    """Five empty components, by the engine's own runner in this environment."""
    from kfp import dsl
    from kfp import local as kfp_local

    def empty(after: str) -> str:
        return after

    empty.__annotations__ = {"after": str, "return": str}  # kfp reads types, and this file's annotations are text
    step = dsl.component(empty, base_image="python:3.11", install_kfp_package=False)

    def five() -> None:
        last = step(after="").output
        for _ in range(STAGES - 1):
            last = step(after=last).output

    five.__annotations__ = {}
    five = dsl.pipeline(five)

    def run(home: Path) -> None:
        kfp_local.init(runner=kfp_local.SubprocessRunner(use_venv=False), pipeline_root=str(home / "kfp"))
        five()

    return run


def stages() -> dict[str, list[float]]:
    """Seconds a stage, by engine."""
    cases: dict[str, Callable[[Path], object]] = {
        "bare functions": bare,
        "limit: two fsyncs and a rename": limit,
        "local": checked(local.run),
        "subprocess": checked(subprocess.run),
        "plain kubeflow (kfp.local)": plain_kubeflow(),
        "radloop on kubeflow (kfp.local)": checked(kubeflow.run),
        "radloop on mlflow project": checked(mlflow_project.run),
    }
    quick = set(list(cases)[:3])
    took: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for case, (name, run) in enumerate(cases.items()):
                if name not in quick and number >= SLOW_ROUNDS:
                    continue
                home = Path(folder, f"{number}-{case}")
                began = time.perf_counter()
                run(home)
                took[name].append((time.perf_counter() - began) / STAGES)
                shutil.rmtree(home, ignore_errors=True)
    return took


def elsewhere(environment: str, script: str) -> dict[str, list[float]]:
    """Seconds a stage by case, measured by a script under another environment's Python; empty where that is not set up."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        print(f"({environment} is left out: scripts/setup {environment})")
        return {}
    done = processes.run(
        [python, HERE / script, sys.executable, str(SLOW_ROUNDS)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    took = stages() | elsewhere("bench", "peer_dagster.py") | elsewhere("airflow", "peer_airflow.py")
    median = {name: statistics.median(values) for name, values in took.items()}
    floor = median["limit: two fsyncs and a rename"]
    print(f"{'ms a stage':34}  median      min      max   over the limit")
    for name, values in took.items():
        figures = " ".join(f"{1000 * v:8.2f}" for v in (median[name], min(values), max(values)))
        print(f"{name:34}{figures}   {median[name] / floor:10.1f}")
    start = best_of("-c", "pass")
    print(f"{'one Python start':34}{1000 * start:8.2f}")
    promises = [
        ("a stage of the local engine", median["local"], 0.005),
        ("radloop --help", best_of("-m", "radloop.cli", "--help"), 0.3),
    ]
    for engine in ("kubeflow (kfp.local)", "airflow (dag.test)"):
        if f"plain {engine}" in median:
            bound = 1.3 * median[f"plain {engine}"] + start
            promises.append((f"a stage on {engine}", median[f"radloop on {engine}"], bound))
    for name, seconds, promised in promises:
        kept = "kept" if seconds <= promised else "NOT KEPT"
        print(f"{name:34}{1000 * seconds:8.1f} ms, promised {1000 * promised:.0f}: {kept}")
    return int(any(seconds > promised for _, seconds, promised in promises))


if __name__ == "__main__":
    sys.exit(main())

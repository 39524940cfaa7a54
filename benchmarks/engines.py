"""What each engine adds to a stage, ours and its peers', in one run.

Method: a chain of five stages that write one small artifact each. Every engine runs it in turn, A B C A B C, each round in a
fresh home; medians over the rounds, per stage. Ours keep the record each time (request, result, events, artifact with fsync).
Peers run empty functions wired in the same way: Dagster, in process; plain Kubeflow Pipelines, by its own
SubprocessRunner; plain Airflow, by `dag.test()` of Python tasks. On Kubeflow and Airflow what a run costs whatever its stages is
taken out: a chain of five against a chain of ten, both ours and plain. "One Python start" is that of `radloop stage --help`: an
interpreter and the imports of a process that runs a stage, which is what any engine pays for one.
The limit printed is two fsyncs of small files in a new directory, renamed: what a record that survives a power cut costs at the
least on this disk. The command line is timed as a process, best of seven: what else the machine does only ever adds.

Promises: a stage of the local engine 5 ms with its record, `radloop --help` 0.3 s, and a stage of ours on Kubeflow and on Airflow
at most 1.3 times the bare engine's plus one Python start. Exits with 1 where one is not kept.

    make bench
"""

from __future__ import annotations

import json
import os
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
Case = Callable[[Path, int], object]
HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / ".venvs"


def chain(stages: int = STAGES) -> Pipeline:
    """Stages in a row."""
    b = Builder("bench")
    last = b.add(s.numbers).made
    for number in range(stages - 1):
        last = b.add(s.total, name=f"total{number}", given=last).summed
    return b.build()


def bare(home: Path, stages: int) -> None:
    """What the stages compute."""
    for _ in range(stages):
        sum([1.5 * i for i in range(3)])


def limit(home: Path, stages: int) -> None:
    """The least that a durable record costs."""
    for number in range(stages):
        folder = home / f"{number}.new"
        folder.mkdir(parents=True)
        for name in ("numbers.json", "artifact.json"):
            with (folder / name).open("wb") as f:
                f.write(b"{}")
                f.flush()
                os.fsync(f.fileno())
        folder.rename(home / str(number))


def checked(run: Callable[..., object]) -> Case:
    """An engine that must succeed: a chain that failed early would be quick."""

    def timed(home: Path, stages: int) -> None:
        result = run(chain(stages), home=home)
        assert result.status == "succeeded", result.message  # type: ignore[attr-defined]

    return timed


def plain_kubeflow() -> Case:
    """Empty components, by the engine's own runner in this environment."""
    from kfp import dsl
    from kfp import local as kfp_local

    def empty(after: str) -> str:
        return after

    empty.__annotations__ = {"after": str, "return": str}
    component = dsl.component(empty, base_image="python:3.11", install_kfp_package=False)

    def run(home: Path, stages: int) -> None:
        def graph():
            last = component(after="").output
            for _ in range(stages - 1):
                last = component(after=last).output

        kfp_local.init(runner=kfp_local.SubprocessRunner(use_venv=False), pipeline_root=str(home / "kfp"))
        dsl.pipeline(graph)()

    return run


def stages() -> dict[str, list[float]]:
    """Seconds a stage, by engine."""
    quick: dict[str, Case] = {
        "bare functions": bare,
        "limit: two fsyncs and a rename": limit,
        "local": checked(local.run),
        "subprocess": checked(subprocess.run),
    }
    # What costs something whatever its stages: a longer chain against a shorter one.
    fixed: dict[str, Case] = {
        "plain kubeflow (kfp.local)": plain_kubeflow(),
        "radloop on kubeflow (kfp.local)": checked(kubeflow.run),
        "radloop on mlflow project": checked(mlflow_project.run),
    }
    took: dict[str, list[float]] = {name: [] for name in quick | fixed}
    for number in range(ROUNDS):
        for name, run in quick.items():
            if name != "subprocess" or number < SLOW_ROUNDS:
                took[name].append(once(run, STAGES) / STAGES)
        for name, run in fixed.items() if number < SLOW_ROUNDS else ():
            took[name].append((once(run, 2 * STAGES) - once(run, STAGES)) / STAGES)
    return took


def once(run: Case, stages: int) -> float:
    """Seconds of one chain, in a home of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        began = time.perf_counter()
        run(Path(home), stages)
        return time.perf_counter() - began


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
    start = best_of("-m", "radloop.cli", "stage", "--help")
    print(f"{'one Python start':34}{1000 * start:8.2f}   (a bare interpreter: {1000 * best_of('-c', 'pass'):.0f})")
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

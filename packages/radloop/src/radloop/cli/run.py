"""`radloop run`: the loop, or one of its pipelines, on this machine or as Jobs on a Kubernetes cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, command

if TYPE_CHECKING:
    from radloop.pipeline.records import RunResult
    from radloop.settings import Settings
    from radloop.stage.protocol import Event

ORDER = ("prepare", "develop", "release", "watch")
EXAMPLES = (
    "radloop run",
    "radloop run prepare",
    "radloop run develop --json",
    "radloop run develop --engine kubernetes",
)


class Engine(StrEnum):
    """The engines that this command drives by itself; the others are exported to, or import."""

    LOCAL = "local"
    SUBPROCESS = "subprocess"
    KUBERNETES = "kubernetes"
    KUBEFLOW = "kubeflow"
    MLFLOW_PROJECT = "mlflow-project"


def register(app: typer.Typer) -> None:
    """Add `run`."""

    @command(app, "run", examples=EXAMPLES, after="radloop status, radloop report")
    def run(
        pipeline: Annotated[
            str | None,
            typer.Argument(
                help="prepare, develop, release or watch; all of them, if left out. Or train, evaluate, retrain."
            ),
        ] = None,
        engine: Annotated[
            Engine, typer.Option("--engine", help="What runs the stages: [kubernetes] in radloop.toml says where.")
        ] = Engine.LOCAL,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Run the loop, or one of its pipelines, from radloop.toml.

        What was done already and has not changed is not done again, so a run that was stopped or killed goes on where it was.
        `release` needs `radloop serve` running. When `watch` finds drift and the labels to learn from it have arrived, the
        loop goes round once more.
        """
        from radloop.cli.export import write_report
        from radloop.settings import load
        from radloop.stage.protocol import EXIT

        settings = load(project)
        results = (
            [run_one(project, settings, pipeline, engine=engine)]
            if pipeline
            else list(run_loop(project, settings, engine))
        )
        last, page = results[-1], write_report(project)
        _tell_audit(project, settings)
        if json:
            import msgspec

            output.print_json([msgspec.to_builtins(result) for result in results])
        else:
            for result in results:
                summarise(result)
            print(f"report: {page}")
        raise typer.Exit(EXIT[last.status])


def _tell_audit(project: Path, settings: Settings) -> None:
    """Send audit messages that wait, where there is a sink."""
    if settings.audit.syslog:
        from radloop.cli.audit import send_now
        from radloop.cli.common import catalog_at

        with catalog_at(project) as catalog:
            _, why = send_now(project, settings, catalog)
        if why:
            output.say(f"audit: {settings.audit.syslog} cannot be told ({why}); messages wait in the ledger")


def run_loop(project: Path, settings: Settings, engine: Engine = Engine.LOCAL) -> Iterator[RunResult]:
    """All pipelines in order, once, and once more when `watch` asks for it; ends where one does not succeed."""
    for again in (False, True):
        for name in ORDER:
            result = run_one(project, settings, name, engine=engine)
            yield result
            if result.status != "succeeded":
                return
        if again or not decision(result)["retrain"]:
            return


def decision(result: RunResult) -> dict[str, Any]:
    """What the last stage of `watch` decided: `retrain`, `why`."""
    told = result.output("decide.decision").json("decision.json")
    assert isinstance(told, dict)
    return told


def run_one(
    project: Path,
    settings: Settings,
    name: str,
    watcher: Callable[[Event], None] | None = None,
    *,
    upto: str | None = None,
    engine: Engine = Engine.LOCAL,
) -> RunResult:
    """Run one pipeline with bars on the terminal, its inputs taken from the latest runs before it.

    Args:
        project: the project folder.
        settings: its settings.
        name: the pipeline.
        watcher: receives every event too.
        upto: only this stage and what it needs.
        engine: what runs its stages.
    """
    from radloop.begin import inputs_of, pipeline_of
    from radloop.stages.project import check

    pipeline = pipeline_of(name, settings)
    check(settings)
    if upto is not None:
        pipeline = pipeline.upto(upto)
    with bars(name, [node.name for node in pipeline.nodes]) as show:

        def emit(event: Event) -> None:
            show(event)
            if watcher is not None:
                watcher(event)

        start = _starter(engine, project, settings)
        return start(pipeline, home=project, inputs=inputs_of(project, name), emit=emit)


def _starter(engine: Engine, project: Path, settings: Settings) -> Callable[..., RunResult]:
    """An engine's `run`, with what the settings say of it."""
    from radloop.cli.stage import approvals
    from radloop.engines import kubeflow, kubernetes, local, mlflow_project, subprocess
    from radloop.stages.project import section, tracking_uri

    if engine is Engine.KUBERNETES:
        return partial(kubernetes.run, options=section("kubernetes", settings.kubernetes, kubernetes.Options))
    if engine is Engine.KUBEFLOW:
        return partial(kubeflow.run, environments=settings.environments)
    if engine is Engine.MLFLOW_PROJECT:
        return partial(mlflow_project.run, environments=settings.environments, tracking_uri=tracking_uri(project))
    if engine is Engine.SUBPROCESS:
        return partial(subprocess.run, environments=settings.environments)
    return partial(local.run, environments=settings.environments, approved=approvals(project))


@contextmanager
def bars(pipeline: str, stages: list[str]) -> Iterator[Callable[[Event], None]]:
    """Yields what shows a run's events: a bar for each stage on a terminal, a line for each elsewhere."""
    if not sys.stderr.isatty():
        yield _lines(pipeline)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=output.console(stderr=True)) as progress:
        tasks = {name: progress.add_task(f"{pipeline} {name}", total=None, start=False, said="") for name in stages}

        def show(event: Event) -> None:
            task = tasks.get(event.node)
            if task is None:
                return
            if event.event == "started":
                progress.start_task(task)
            elif event.event == "progress":
                progress.update(task, completed=event.done, total=event.total or None, said=event.message)
            elif event.event == "log":
                progress.console.print(f"  {event.node}: {event.message}")
            else:
                total = progress.tasks[task].total or 1
                done = event.status == "succeeded"
                progress.update(
                    task, total=total, completed=total if done else 0, said=event.message.split("\n")[0][:80]
                )
                progress.stop_task(task)

        yield show


def _lines(pipeline: str) -> Callable[[Event], None]:
    began: dict[str, float] = {}

    def show(event: Event) -> None:
        if event.event == "started":
            began[event.node] = time.monotonic()
        elif event.event == "log":
            output.say(f"  {event.node}: {event.message}")
        elif event.event == "closed":
            took = time.monotonic() - began.get(event.node, time.monotonic())
            said = f" - {event.message.splitlines()[0]}" if event.message else ""
            output.say(f"{pipeline} {event.node}: {event.status} in {took:.1f} s{said}")

    return show


def summarise(result: RunResult) -> None:
    """One line for people, and what to do where a run did not succeed."""
    print(f"{result.pipeline}: {result.status} in {result.seconds:.1f} s (run {result.run_id})")
    if result.message:
        print("  " + result.message.replace("\n", "\n  "))

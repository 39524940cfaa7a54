"""`radloop run`: the loop, or one of its pipelines, on this machine by the `local` engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, command
from radloop.errors import DataError, DefinitionError

if TYPE_CHECKING:
    from radloop.pipeline.records import RunResult
    from radloop.settings import Settings
    from radloop.stage.protocol import Event

ORDER = ("prepare", "develop", "release", "watch")
EXAMPLES = ("radloop run", "radloop run prepare", "radloop run develop --json")


def register(app: typer.Typer) -> None:
    """Add `run`."""

    @command(app, "run", examples=EXAMPLES, after="radloop status, radloop report")
    def run(
        pipeline: Annotated[
            str | None, typer.Argument(help=f"One of {', '.join(ORDER)}. All of them, if left out.")
        ] = None,
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
        from radloop.stages.project import check

        if pipeline is not None and pipeline not in ORDER:
            raise DefinitionError(f"there is no pipeline {pipeline!r}", expected=", ".join(ORDER), got=pipeline)
        settings = load(project)
        check(settings)
        results = [run_one(project, settings, pipeline)] if pipeline else list(run_loop(project, settings))
        last, page = results[-1], write_report(project)
        if json:
            import msgspec

            output.print_json([msgspec.to_builtins(result) for result in results])
        else:
            for result in results:
                summarise(result)
            print(f"report: {page}")
        raise typer.Exit(EXIT[last.status])


def run_loop(project: Path, settings: Settings) -> Iterator[RunResult]:
    """All pipelines in order, once, and once more when `watch` asks for it; ends where one does not succeed."""
    for again in (False, True):
        for name in ORDER:
            result = run_one(project, settings, name)
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
) -> RunResult:
    """Run one pipeline with bars on the terminal, its inputs taken from the latest runs before it.

    Args:
        project: the project folder.
        settings: its settings.
        name: the pipeline.
        watcher: receives every event too.
        upto: only this stage and what it needs.
    """
    from radloop.cli.stage import approvals
    from radloop.engines import local
    from radloop.loop import PIPELINES

    pipeline = PIPELINES[name](settings)
    if upto is not None:
        pipeline = pipeline.upto(upto)
    with bars(name, [node.name for node in pipeline.nodes]) as show:

        def emit(event: Event) -> None:
            show(event)
            if watcher is not None:
                watcher(event)

        return local.run(
            pipeline,
            home=project,
            inputs=inputs_of(project, name),
            environments=settings.environments,
            approved=approvals(project),
            emit=emit,
        )


def inputs_of(project: Path, name: str) -> dict[str, Path | None]:
    """The artifacts a pipeline starts from: outputs of the latest run before it, and what belongs to the champion.

    Raises:
        DataError: the pipeline before it has not succeeded yet.
    """
    champion = champion_places(project)
    if name == "prepare":
        return {"baseline": champion.get("validation")}
    if name == "develop":
        done = latest(project, "prepare", "publish.dataset")
        return {
            "dataset": Path(done["publish.dataset"]),
            "tensors": Path(done["preprocess.tensors"]),
            "validation": Path(done["validate.validation"]),
            "champion": champion.get("package"),
            "champion_dataset": champion.get("dataset"),
        }
    if name == "release":
        done = latest(project, "develop", "register.registered")
        return {"package": Path(done["package.package"]), "registered": Path(done["register.registered"])}
    if not champion:
        raise DataError(
            "there is nothing to watch", expected="a champion in production", next_step="radloop run release"
        )
    return {part: champion[part] for part in ("dataset", "evaluation", "package")}


def latest(project: Path, pipeline: str, wanted: str) -> dict[str, str]:
    """Outputs of the newest run of a pipeline, if it made what is wanted.

    Raises:
        DataError: there is none, or the newest did not come so far: an older one would be stale.
    """
    from radloop.pipeline.records import read_run

    for record in sorted((project / "runs").glob("*/run.json"), reverse=True):
        run = read_run(record)
        if run.pipeline != pipeline:
            continue
        if wanted not in run.outputs:
            raise DataError(
                f"the latest run of {pipeline} did not come so far",
                expected=f"status succeeded, with {wanted}",
                got=f"{run.status}: {run.message}",
                next_step=f"radloop run {pipeline}",
            )
        return run.outputs
    raise DataError(f"{pipeline} has not run yet", next_step=f"radloop run {pipeline}")


def champion_places(project: Path) -> dict[str, Path]:
    """Where the champion's dataset, tensors, validation, model, evaluation and package lie; empty without a champion."""
    from radloop.serving.desired import desired
    from radloop.stages.project import open_catalog

    now = desired(project)
    if now is None or now.models.champion is None:
        return {}
    with open_catalog(project) as catalog:
        info = catalog.model(now.models.champion.model_digest).info
    names = ("dataset", "tensors", "validation", "model", "evaluation", "package")
    return {name: project / info[name] for name in names}


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

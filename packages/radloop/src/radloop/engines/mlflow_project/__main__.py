"""What an entry point's command does: `python -m radloop.engines.mlflow_project stage|pipeline ...`, called by `mlflow run`."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from radloop.engines.mlflow_project.chain import EVENTS, PART, Chain
from radloop.engines.mlflow_project.project import NAME, from_text
from radloop.engines.mlflow_project.runs import Runs
from radloop.errors import DefinitionError, RadloopError, SettingsError
from radloop.pipeline import read_pipeline
from radloop.pipeline.records import Record
from radloop.pipeline.run import Launcher, run_node
from radloop.stage.execute import Emit
from radloop.stage.launch import die_with_parent
from radloop.stage.protocol import EXIT, Event, Request, Result, encode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an entry point; see the MLproject file. Returns the exit code: 0 succeeded, 1 failed, 3 stopped, 4 waiting."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="mlflow run", description="What `mlflow run` calls.")
    parser.add_argument("what", choices=("stage", "pipeline"))
    parser.add_argument("spec", type=Path)
    parser.add_argument("node", nargs="?", default="")
    parser.add_argument("--project", type=Path, required=True)
    for option in ("--input", "--gate", "--param", "--python"):
        parser.add_argument(option, action="append", default=[])
    options, unknown = parser.parse_known_args(arguments)
    try:
        if unknown:  # its value is not repeated: it may be a secret
            known = "those that the MLproject file names; secrets stay references, in radloop.toml"
            raise DefinitionError("a parameter is unknown", expected=known, got=unknown[0].partition("=")[0])
        if "MLFLOW_RUN_ID" not in os.environ:
            raise SettingsError("this is what MLflow calls", next_step="mlflow run DIR -e STAGE --env-manager local")
        if options.what == "pipeline":
            return _run_pipeline(options)
        return _run_part(options) if PART in os.environ else _run_stage(options)
    except RadloopError as error:
        sys.stderr.write(f"radloop: {error}\n")
        return 1


def _run_part(options: argparse.Namespace) -> int:
    """A stage of a run that a chained entry point has begun: what it was given lies in the run's record."""
    run_id, _, item = os.environ[PART].partition("/")
    index = int(item) if item else None
    record = Record.load(options.project, run_id)
    node = record.pipeline.node(options.node)
    launcher = Launcher(_pairs(options.python))
    try:
        tries = node.retries + 1
        result = run_node(record, node, index, launcher, record.emitter(_teller()), attempts=tries)
    except RadloopError as error:
        result = Result(status="failed", node=node.name, message=str(error), error=type(error).__name__)
        record.keep(node, index, record.request(node, index), result)
    return EXIT[result.status]


def _run_stage(options: argparse.Namespace) -> int:
    """One stage of artifacts named by hand. Its record is mlflow/stages/RUN, named by the MLflow run."""
    home, run = options.project.resolve(), os.environ["MLFLOW_RUN_ID"]
    pipeline = read_pipeline(options.spec.read_bytes())
    node = pipeline.node(options.node)
    inputs = {name: text for name, text in _pairs(options.input).items() if text}
    request = Request(
        stage=node.stage,
        node=node.name,
        pipeline=pipeline.name,
        run_id=run,
        params={**node.params, **{n: from_text(text, node.params[n]) for n, text in _pairs(options.param).items()}},
        inputs={n: msgspec.json.decode(text) if text.startswith("[") else text for n, text in inputs.items()},
        gates=tuple(options.gate),
        approval=node.approval,
        home=str(home),
    )
    launcher, tell = Launcher(_pairs(options.python)), _teller()
    for attempt in range(1, node.retries + 2):
        request = msgspec.structs.replace(request, attempt=attempt)
        result = launcher(node, request, home / "mlflow" / "stages" / run, tell)
        if result.status != "failed":
            break
    for name in result.outputs:
        sys.stdout.write(f"{name}: {home / result.place / name}\n")
    if result.status != "succeeded":
        sys.stderr.write(f"{node.name}: {result.status}: {result.message}\n")
    sys.stdout.flush()
    Runs.here().log_stage(run, home, request, result)
    return EXIT[result.status]


def _run_pipeline(options: argparse.Namespace) -> int:
    """A chained entry point: begins a run, and runs the stages as child runs of this one."""
    pipeline = read_pipeline(options.spec.read_bytes())
    runs, home = Runs.here(), options.project.resolve()
    command = [sys.executable, "-m", "radloop.cli", "engine", "open", pipeline.name, "--engine", NAME]
    command += ["--project", str(home), "--spec", str(options.spec)]
    for name, path in _pairs(options.input).items():
        command += ["--input", f"{name}={path}"] if path else []
    opened = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if opened.returncode:
        return opened.returncode  # it has said why
    record = Record.load(home, msgspec.json.decode(opened.stdout)["run_id"])
    ended = Chain(record, Path.cwd(), runs, os.environ["MLFLOW_RUN_ID"], _pairs(options.python), {}).run()
    said = f"{ended.message}\n" if ended.message else ""
    sys.stdout.write(f"{ended.pipeline}: {ended.status} (run {ended.run_id}, {record.folder})\n{said}")
    return EXIT[ended.status]


def _pairs(given: Sequence[str]) -> dict[str, str]:
    return {name: text for name, _, text in (one.partition("=") for one in given)}


def _teller() -> Emit:
    """Where a stage's events go: to whoever waits for them, or to the terminal that MLflow passes on."""
    if path := os.environ.get(EVENTS):
        pipe = Path(path).open("ab", buffering=0)  # noqa: SIM115 - open until this process ends

        def pass_on(event: Event) -> None:
            with contextlib.suppress(BrokenPipeError):  # the watcher is gone; the record still tells
                pipe.write(encode(event) + b"\n")

        return pass_on

    def say(event: Event) -> None:
        if event.event in ("log", "closed"):
            said = event.message.split("\n")[0]
            sys.stdout.write(f"{event.node}: {event.status}{' - ' if event.status and said else ''}{said}\n")
            sys.stdout.flush()

    return say


if __name__ == "__main__":
    sys.exit(main())

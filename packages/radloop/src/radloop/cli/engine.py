"""`radloop engine open`, `due`, `close`: what an orchestrator asks before and after the stages of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, command, group, settings_at
from radloop.errors import DefinitionError

if TYPE_CHECKING:
    from radloop.pipeline.records import RunResult

_FILE = typer.Option(
    "--spec", metavar="FILE", help="pipeline.json; radloop.toml's pipeline, if left out.", dir_okay=False
)
_INPUT = typer.Option("--input", metavar="NAME=DIR", help="An input artifact; those of the latest runs, if left out.")


def register(app: typer.Typer) -> None:
    """Add `engine`."""
    engine = group(app, "engine", "What Airflow, Kubeflow and their like call around the stages of a run.")

    @command(
        engine,
        "due",
        examples=("radloop engine due prepare",),
        after="`radloop engine open` begins the run.",
    )
    def due(
        pipeline: Annotated[str, typer.Argument(help="A pipeline of the loop, or a part of one.")],
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Say whether a pipeline has something new to do: what a sensor asks. Prints JSON: due, why.

        prepare: complete studies, labels or a reviewed schema have come. train: a new dataset version, and no model yet or a
        decision to train again. evaluate: a trained model without evaluation. release: MLflow's alias `challenger` names a
        version not tried yet. watch, retrain: a champion is in production.
        """
        from radloop import begin

        settings_at(project)
        output.print_json(begin.due(project, pipeline))

    @command(
        engine,
        "open",
        examples=("radloop engine open prepare --engine airflow", "radloop engine open develop --spec develop.json"),
        after="run the stages in order (`radloop stage`), then `radloop engine close RUN`.",
    )
    def open_(
        pipeline: Annotated[str, typer.Argument(help="A pipeline of the loop, a part of one, or the one in --spec.")],
        engine_name: Annotated[str, typer.Option("--engine", metavar="NAME", help="Who runs it.")] = "other",
        spec: Annotated[Path | None, _FILE] = None,
        given: Annotated[list[str] | None, _INPUT] = None,
        by: Annotated[
            str,
            typer.Option(
                "--by", metavar="NAME", help="Whom the engine knows to have started it; who trained may not approve."
            ),
        ] = "",
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Begin a run: find its inputs and open its record. Prints JSON: run_id, inputs."""
        run_id, inputs = open_run(project, pipeline, engine=engine_name, spec=spec, given=given or [], by=by)
        output.print_json({"run_id": run_id, "inputs": inputs})

    @command(
        engine,
        "close",
        examples=("radloop engine close 20261126-093000-1f2e3d --alert",),
        after="radloop status",
    )
    def close(
        run: Annotated[str, typer.Argument(help="The run that `open` began.")],
        alert: Annotated[bool, typer.Option("--alert", help="Mail [alerts] recipients if it did not succeed.")] = False,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """End a run, however its stages ended. Prints the run as JSON; exits as `radloop run` does (0, 1, 3, 4)."""
        import msgspec

        from radloop.stage.protocol import EXIT

        ended = close_run(project, run, alert=alert)
        output.print_json(msgspec.to_builtins(ended))
        raise typer.Exit(EXIT[ended.status])


def open_run(
    project: Path, name: str, *, engine: str, spec: Path | None, given: list[str], by: str = ""
) -> tuple[str, dict[str, str | None]]:
    """Begin a run of a pipeline; its id and inputs.

    Raises:
        DefinitionError: the spec cannot be read or is another pipeline's, or an input is missing or of another kind.
        DataError: the pipeline before it has not succeeded yet.
        RunLocked: another run of it is under way.
    """
    from radloop.begin import inputs_of, pipeline_of
    from radloop.loop import PARTS, PIPELINES
    from radloop.pipeline import read_pipeline
    from radloop.pipeline.records import Record
    from radloop.stages.project import settings_of

    pipeline = read_pipeline(spec.read_bytes()) if spec else pipeline_of(name, settings_of(project))
    if pipeline.name != name:
        raise DefinitionError(f"{spec} holds another pipeline", expected=name, got=pipeline.name)
    named = dict(_named(one) for one in given)
    inputs: dict[str, Path | None] = {**named}
    if not named and name in {**PIPELINES, **PARTS}:
        inputs = inputs_of(project, name)
    record = Record.open(pipeline, project, inputs, engine=engine, by=by)
    return record.run_id, {i.name: record.inputs.get(i.name) for i in pipeline.inputs}


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise DefinitionError("an input is not understood", expected="--input NAME=DIR", got=text)
    return name, Path(path)


def close_run(project: Path, run_id: str, *, alert: bool) -> RunResult:
    """End a run; where it did not succeed, tell the recipients of [alerts] if asked to. A mail not sent is said, not raised."""
    from radloop.pipeline.records import Record

    ended = Record.load(project, run_id).close()
    if alert and ended.status != "succeeded":
        _alert(project, ended)
    return ended


def _alert(project: Path, run: RunResult) -> None:
    from radloop.errors import EngineError
    from radloop.monitoring.alerts import Mail, run_alert, send
    from radloop.stages.project import open_catalog, settings_of

    where = settings_of(project).alerts
    stage, why = _cause(run)
    one = run_alert(
        *(run.pipeline, run.status, stage, why), project=project.resolve().name, run_id=run.run_id, engine=run.engine
    )
    with open_catalog(project) as catalog:
        told = any(row.payload["sent"] for row in catalog.ledger.rows(kind="alert", subject=one.id))
        if told:
            return
        sent = False
        if where.smtp_host and where.recipients:
            mail = Mail(
                host=where.smtp_host,
                port=where.smtp_port,
                sender=where.sender,
                recipients=tuple(where.recipients),
                tls=where.tls,
            )
            try:
                sent = send(one, mail).sent
            except EngineError as error:  # the run's own end is what the engine must hear of
                output.say(str(error))
        figures = {
            "kind": one.kind,
            "subject": one.subject,
            "figures": one.figures,
            "episode": run.run_id,
            "sent": sent,
        }
        catalog.ledger.append("alert", one.id, figures, actor=run.engine, key=f"alert:run:{run.run_id}:{sent}")


def _cause(run: RunResult) -> tuple[str, str]:
    """The stage at which a run ended and why: a gate's words; of an error only its class, for its text may repeat a value."""
    name, _, words = run.message.partition(": ")
    result = next((r for r in run.results.values() if r.status == run.status), None)
    if run.status == "failed":
        return (result.node, result.error) if result else (name, "it was never run")
    return name, words.splitlines()[0] if words else ""

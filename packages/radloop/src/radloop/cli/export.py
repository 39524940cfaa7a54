"""`radloop schema`, `export`, `report`: what leaves radloop as a file."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, command, group, settings_at


class SchemaName(StrEnum):
    """What passes between radloop and an engine."""

    PIPELINE = "pipeline"
    REQUEST = "request"
    RESULT = "result"
    EVENT = "event"


def register(app: typer.Typer) -> None:
    """Add `schema`, `export` and `report`."""

    @command(
        app,
        "schema",
        examples=("radloop schema pipeline > pipeline.schema.json",),
        after="`radloop export json prepare` writes a pipeline that the schema describes.",
    )
    def schema(
        name: Annotated[SchemaName, typer.Argument(help="Which of them.")] = SchemaName.PIPELINE,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Print the JSON schema of what passes between radloop and an engine.

        A pipeline is what an engine compiles or imports; request, result and event are what `radloop stage` reads,
        writes and streams. Version 1; always JSON, with or without --json.
        """
        from radloop.pipeline import schema as schema_of

        output.print_json(schema_of(name.value))

    exports = group(app, "export", "Write a pipeline in the form another engine takes.")

    @command(
        exports,
        "json",
        examples=("radloop export json develop > pipeline.json",),
        after="give the file to the engine; `radloop schema pipeline` says what each field means.",
    )
    def json_(
        pipeline: Annotated[str, typer.Argument(help="prepare, develop, release or watch.")],
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Print a pipeline as pipeline.json, as this project's radloop.toml sets it up.

        Secrets stand in it as references, never as values.
        """
        from radloop.begin import pipeline_of

        sys.stdout.buffer.write(pipeline_of(pipeline, settings_at(project)).to_json())
        sys.stdout.flush()

    @command(
        app,
        "report",
        examples=("radloop report", "xdg-open reports/report.html"),
        after="open the page in any browser; it is one file and needs no network.",
    )
    def report(project: Project = HERE, json: Json = False) -> None:
        """Write reports/report.html: the whole loop of this project on one page.

        Counts from received to predicted, quarantine, dataset versions, ROC and calibration, subgroups, gates, canary,
        drift, and the trace of one prediction. It holds pseudonyms only.
        """
        settings_at(project)
        path = write_report(project)
        if json:
            output.print_json({"report": str(path)})
        else:
            print(path)


def write_report(project: Path) -> Path:
    """Collect what the report shows, write it whole, and return its path."""
    from radloop.monitoring.report import ReportData, write
    from radloop.stages.report import build

    return write(cast(ReportData, build(project)), project.resolve() / "reports" / "report.html")

"""`radloop schema`, `export`, `report`: what leaves radloop as a file."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, cast

import typer

from radloop.cli import kserve, output
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
        exports,
        "mlflow-project",
        examples=("radloop export mlflow-project project/", "mlflow run project/ -e prepare --env-manager local"),
        after="mlflow run DIR -e STAGE -P NAME=VALUE ... --env-manager local (this Python) or uv (one of its own).",
    )
    def mlflow_project(
        folder: Annotated[
            Path, typer.Argument(metavar="DIR", help="Where to; what an earlier export left is replaced.")
        ],
        extras: Annotated[
            str, typer.Option("--extras", metavar="NAMES", help="Extras of radloop that `--env-manager uv` installs.")
        ] = "pixels,ocr,train",
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Write an MLflow project: an entry point for each stage, and one for each pipeline that runs its stages in order.

        A stage's artifacts are paths, its parameters have the values of this project's radloop.toml; lists, mappings and
        truth values are JSON. Secret references stay in the specs. The folder carries radloop's wheel.
        """
        from radloop.begin import pipeline_of
        from radloop.engines import mlflow_project as engine
        from radloop.learning import wheel
        from radloop.loop import PARTS, PIPELINES

        settings = settings_at(project)
        pipelines = [pipeline_of(name, settings) for name in {**PIPELINES, **PARTS}]
        wanted = [name for name in extras.split(",") if name]
        pins = wheel.requirements(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            built = wheel.build(Path(scratch))
            built = built.replace(folder / built.name)
        points = engine.export(
            pipelines,
            folder,
            home=project,
            environments=settings.environments,
            requirements=[f"./{built.name}" + (f"[{','.join(wanted)}]" if wanted else ""), *pins],
        )
        for old in set(folder.glob("radloop-*.whl")) - {built}:
            old.unlink()
        if json:
            output.print_json({"folder": str(folder), "entry_points": points})
        else:
            print(f"{folder}: {', '.join(points)}")

    @command(
        exports,
        "kubeflow",
        examples=("radloop export kubeflow kfp", "radloop export kubeflow kfp --image registry.example/radloop-core:1"),
        after="upload DIR/*.yaml to Kubeflow Pipelines, or compose DIR/components/*.yaml; "
        "`radloop run --engine kubeflow` runs the same here.",
    )
    def kubeflow(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the YAML files go.")],
        image: Annotated[str, typer.Option(help="With radloop and kfp (EXTRAS of deploy/images/core: kubeflow).")] = "",
        image_tfdv: Annotated[str, typer.Option(help="The same, with the environment tfdv.")] = "",
        claim: Annotated[str, typer.Option(help="PersistentVolumeClaim that holds this project, ReadWriteMany.")] = "",
        secret: Annotated[str, typer.Option(help="Secret that holds what stages read as env:NAME, by NAME.")] = "",
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Write the loop as Kubeflow pipelines, and every stage as a reusable component.

        Gates become conditions, an exit handler tells the recipients of [alerts], secrets stay references. What is left out
        is taken from [kubernetes] in radloop.toml.
        """
        from radloop.engines import kubeflow as engine
        from radloop.loop import PIPELINES

        engine.check()
        settings = settings_at(project)
        known = {name: settings.kubernetes.get(name, "") for name in ("image", "claim", "secret")}
        known["image_tfdv"] = settings.kubernetes.get("images", {}).get("tfdv", "")
        asked = {"image": image, "image_tfdv": image_tfdv, "claim": claim, "secret": secret}
        chosen = {name: asked[name] or known[name] for name in asked if asked[name] or known[name]}
        written = engine.export((build(settings) for build in PIPELINES.values()), directory, engine.Cluster(**chosen))
        if json:
            output.print_json([str(path) for path in written])
        else:
            print("\n".join(map(str, written)))

    @command(
        exports,
        "airflow",
        examples=("radloop export airflow ~/airflow/dags", "make airflow PROJECT=my-project"),
        after="Airflow reads the folder; its environment needs radloop-airflow, and no more of radloop than its base.",
    )
    def airflow(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Airflow's DAG folder, or one in it.")],
        core: Annotated[
            str, typer.Option(metavar="PYTHON", help="Core environment on the workers.", show_default="this Python")
        ] = "",
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Write the loop as Airflow DAGs: a spec and a DAG file of three lines each.

        ingest-and-prepare waits for complete studies, release for MLflow's alias `challenger`; train, evaluate, watch and
        retrain begin by what the others leave (assets), or by the clock. Approvals are asked in Airflow's required actions.
        """
        from radloop.begin import pipeline_of
        from radloop.engines import airflow as engine

        settings = settings_at(project)
        mailed = settings.alerts.recipients if settings.alerts.smtp_host else ()
        written = engine.export(
            (pipeline_of(name, settings) for name in engine.LOOP),
            folder,
            project=project.resolve(),
            core=core or sys.executable,
            notify={"watch": mailed},
        )
        if json:
            output.print_json({"files": [str(path) for path in written]})
        else:
            print("\n".join(map(str, written)))

    kserve.register(exports)

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

"""`radloop trace`: from one prediction back to the images that trained the model, or calibrated it if it came from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.approvals import say_payload
from radloop.cli.common import HERE, Json, Project, catalog_at, command, short
from radloop.errors import DataError

if TYPE_CHECKING:
    from radloop.catalog.schema import Model
    from radloop.catalog.store import Catalog
    from radloop.serving.predictions import PredictionRow

SHOWN = 20
_SHORTEST = 6


def register(app: typer.Typer) -> None:
    """Add `trace`."""

    @command(
        app,
        "trace",
        examples=("radloop predict image.dcm", "radloop trace 5b1d9c04 --instances --json"),
        after="`radloop dataset show VERSION` and `radloop ledger --subject DIGEST` tell more of each step.",
    )
    def trace(
        prediction: Annotated[
            str, typer.Argument(help=f"The prediction's id, or its beginning ({_SHORTEST} characters or more).")
        ],
        instances: Annotated[
            bool, typer.Option("--instances", help=f"All training instances, not the first {SHOWN}.")
        ] = False,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Trace a prediction: to the model version, its package, its training, its dataset version, its instances.

        With the rows of the ledger about each. Everything shown is a pseudonym.
        """
        with catalog_at(project) as catalog:
            told = trace_prediction(project, catalog, prediction, limit=None if instances else SHOWN)
        if json:
            output.print_json(told)
        else:
            _show(told)


def trace_prediction(project: Path, catalog: Catalog, prediction: str, *, limit: int | None = SHOWN) -> dict[str, Any]:
    """Everything behind one prediction.

    Args:
        limit: training instances listed; None: all. Their number is told anyway.

    Raises:
        DataError: no prediction, or several, begin with this id; or its model is not in the catalog.
    """
    import msgspec

    from radloop.catalog.lineage import learnt_from
    from radloop.stages.approvals import shown

    row = find_prediction(project / "predictions", prediction)
    model = find_model(catalog, row["model_digest"])
    dataset = catalog.dataset(model.dataset_digest)
    members = catalog.members(dataset.digest)
    learnt = learnt_from(model, members)
    listed = members if limit is None else learnt[:limit]
    subjects = {model.digest, model.info.get("package_digest"), dataset.digest}
    return {
        "prediction": dict(row),
        "model": {
            "version": row["version"],
            "model_digest": model.digest,
            "preprocessing_digest": model.preprocessing_digest,
            "package": model.info.get("package"),
            "package_digest": model.info.get("package_digest"),
            "registered_at": model.created_at,
            "flags": model.flags,
        },
        "training": {
            "run": model.info.get("run_id"),
            "evaluation": model.info.get("evaluation"),
            "trained": model.info.get("trained", "here"),
        },
        "dataset": {
            "number": dataset.number,
            "digest": dataset.digest,
            "path": dataset.path,
            "counts": dataset.counts,
            "flags": dataset.flags,
        },
        "instances": {
            "count": len(members),
            "learnt_from": len(learnt),
            "listed": msgspec.to_builtins(listed),
        },
        "ledger": [
            {**msgspec.to_builtins(r), "payload": shown(project, r)}
            for r in catalog.ledger.rows()
            if r.subject in subjects
        ],
    }


def find_prediction(folder: Path, wanted: str) -> PredictionRow:
    """The one row of the prediction log whose id begins so."""
    from radloop.serving import predictions

    row = predictions.find(folder, wanted)
    if row is not None:
        return row
    found: dict[str, PredictionRow] = {}
    rows = 0
    for row in predictions.read(folder):
        rows += 1
        if len(wanted) >= _SHORTEST and row["prediction_id"].startswith(wanted):
            found[row["prediction_id"]] = row
    if len(found) == 1:
        return next(iter(found.values()))
    files = len(list(folder.glob("*.jsonl"))) if folder.is_dir() else 0
    looked = f"{output.plural(rows, 'prediction')} in {output.plural(files, 'file')} under {folder}"
    raise DataError(
        f"{len(found)} predictions begin with this id" if found else "there is no prediction with this id",
        expected=f"an id as `radloop predict` prints it, or its first {_SHORTEST} characters or more",
        got=f"{wanted!r}; looked at {looked}",
        next_step="give more characters" if found else "check --project: each project has its own prediction log",
    )


def find_model(catalog: Catalog, served_digest: str) -> Model:
    """The catalog's model behind an answer.

    Raises:
        DataError: it is not there.
    """
    models = catalog.models()
    for model in models:
        if model.digest == served_digest:
            return model
    raise DataError(
        "the model of this prediction is not in the catalog",
        expected=f"model {short(served_digest)}",
        got=f"{output.plural(len(models), 'model')}: {', '.join(short(m.digest) for m in models[:5]) or 'none'}",
        next_step="it was served from another project's package, or the catalog was replaced: restore it from backup",
    )


def _show(told: dict[str, Any]) -> None:
    row, model, dataset, instances = told["prediction"], told["model"], told["dataset"], told["instances"]
    flagged = ", ".join(model["flags"])
    output.print_pairs(
        "Prediction",
        [
            ("id", row["prediction_id"]),
            ("at", row["at"][:19]),
            ("status", row["status"]),
            ("probability", row["probability"]),
            ("decision", row["decision"]),
            ("answered as", row["role"] + ("" if row["served"] else ", the answer reached nobody")),
            ("instance", row["sop_uid"]),
            ("site", row["site"]),
        ],
    )
    output.print_pairs(
        "made by model",
        [
            ("version", model["version"]),
            ("digest", model["model_digest"]),
            ("package", model["package"]),
            ("training run", told["training"]["run"]),
            ("flags", flagged),
        ],
    )
    elsewhere = told["training"]["trained"] != "here"
    did = "was calibrated on" if elsewhere else "learnt from"
    output.print_pairs(
        "trained elsewhere, on what is not known; calibrated on dataset version"
        if elsewhere
        else "trained on dataset version",
        [
            ("number", dataset["number"]),
            ("digest", dataset["digest"]),
            ("manifest", dataset["path"]),
            ("instances", f"{instances['count']:,}, of which it {did} {instances['learnt_from']:,}"),
        ],
    )
    listed = instances["listed"]
    title = "Instances" if len(listed) == instances["count"] else f"The first {len(listed)} it {did} (--instances: all)"
    output.print_table(
        title,
        ["instance", "revision", "patient", "part"],
        [(m["sop_uid"], m["revision"], m["patient"], m["part"]) for m in listed],
    )
    output.print_table(
        "Ledger",
        ["no.", "at", "kind", "by", "what"],
        [(r["seq"], r["at"][:19], r["kind"], r["actor"], say_payload(r["payload"])) for r in told["ledger"]],
    )

"""`radloop status`: where the loop stands, what waits for whom, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, catalog_at, command, settings_at, short

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.settings import Settings


def register(app: typer.Typer) -> None:
    """Add `status`."""

    @command(
        app,
        "status",
        examples=("radloop status", "radloop status --json"),
        after="what its last lines say.",
    )
    def status(project: Project = HERE, json: Json = False) -> None:
        """Show where the loop stands: images, labels, dataset versions, models, serving, runs, and what waits for whom."""
        settings = settings_at(project)
        with catalog_at(project) as catalog:
            told = state(project, settings, catalog)
        if json:
            output.print_json(told)
        else:
            _show(told)


def state(project: Path, settings: Settings, catalog: Catalog) -> dict[str, Any]:
    """Where everything stands. MLflow is not asked (it takes seconds): who serves is read from serving/."""
    from radloop.cli import records
    from radloop.cli.labels import state_of

    sites = catalog.counts()
    totals: dict[str, int] = {}
    for by_status in sites.values():
        for name, count in by_status.items():
            totals[name] = totals.get(name, 0) + count
    held = catalog.quarantined()
    reasons: dict[str, int] = {}
    for row in held:
        reasons[row.reason] = reasons.get(row.reason, 0) + 1
    told: dict[str, Any] = {
        "project": str(project.resolve()),
        "task": settings.task.name,
        "images": {**totals, "by_site": sites},
        "studies": _studies(settings, catalog),
        "quarantine": {"held": len(held), "reasons": dict(sorted(reasons.items()))},
        "labels": state_of(catalog, settings.task.name),
        "datasets": [
            {"number": v.number, "digest": v.digest, "created_at": v.created_at, "counts": v.counts, "flags": v.flags}
            for v in catalog.datasets()
        ],
        "serving": _serving(project),
        "models": [],
        "runs": [_run(run) for run in records.last_runs(project)],
        "waiting": _waiting(project, catalog),
    }
    told["models"] = _models(catalog, told["serving"])
    told["next"] = _next(told)
    return told


def _studies(settings: Settings, catalog: Catalog) -> dict[str, int]:
    """Studies that are still arriving, in how many seconds the last of them is complete, and how many were revised since."""
    from radloop.catalog.studies import complete, seconds_left

    quiet_s = settings.ingest.quiet_s
    found = catalog.unreleased()
    done = {study.study_uid for study in complete(found, quiet_s)}
    arriving = [study for study in found if study.study_uid not in done]
    left = round(seconds_left(arriving, quiet_s))
    return {"arriving": len(arriving), "seconds_left": left, "revised": len(catalog.study_revisions())}


def _say_studies(told: dict[str, int]) -> str | None:
    said = []
    if told["arriving"]:
        some = f"{output.plural(told['arriving'], 'study is', 'studies are')} still arriving"
        said.append(f"{some}, the last will be complete in {told['seconds_left']} s")
    if told["revised"]:
        some = output.plural(told["revised"], "study has", "studies have")
        said.append(f"{some} a new revision: late instances, or corrected ones")
    return "; ".join(said) or None


def _serving(project: Path) -> dict[str, Any]:
    from radloop.serving.desired import Desired, desired, observed, supervisor_pid

    wanted, now, pid = desired(project) or Desired(), observed(project), supervisor_pid(project)
    seen = now if pid is not None and now is not None and now.pid == pid else None
    models = {
        name: {"version": ref.version, "model_digest": ref.model_digest}
        for name in ("champion", "challenger", "previous")
        if (ref := getattr(wanted.models, name)) is not None
    }
    return {
        "running": pid is not None,
        "pid": pid,
        "port": seen.gateway.port if seen else None,
        "ready": bool(seen and seen.gateway.ready and all(model.ready for model in seen.models)),
        "in_effect": bool(seen and seen.generation == wanted.generation),
        "error": _why_not(seen) if seen else None,
        **models,
        "strategy": wanted.routing.strategy,
        "percent": wanted.routing.percent,
    }


def _why_not(seen: Any) -> str | None:
    """What the supervisor says hinders it, in its own words."""
    if seen.error:
        return str(seen.error)
    for model in seen.models:
        if not model.ready and model.last_error:
            return f"version {model.version}: {model.last_error.splitlines()[0]}"
    return None if seen.gateway.ready else seen.gateway.last_error


def _models(catalog: Catalog, serving: dict[str, Any]) -> list[dict[str, Any]]:
    """The catalog's models, each with what it is in serving."""
    numbers = {version.digest: version.number for version in catalog.datasets()}
    roles = {serving[name]["model_digest"]: name for name in ("previous", "challenger", "champion") if name in serving}
    return [
        {
            "version": model.version,
            "digest": model.digest,
            "dataset": numbers.get(model.dataset_digest),
            "created_at": model.created_at,
            "role": roles.get(model.digest),
            "flags": model.flags,
        }
        for model in catalog.models()
    ]


def _run(run: Any) -> dict[str, Any]:
    stages = {name: result.status for name, result in run.results.items()}
    return {
        "run_id": run.run_id,
        "pipeline": run.pipeline,
        "status": run.status,
        "message": run.message,
        "seconds": run.seconds,
        "stages": stages,
    }


def _waiting(project: Path, catalog: Catalog) -> list[dict[str, Any]]:
    """What waits for a person, and whether somebody has approved it since."""
    import msgspec

    from radloop.cli import records
    from radloop.stages.approvals import said_of, that_count

    found = []
    for one in records.waiting(project):
        given = that_count(project, catalog, one.digest, one.role)
        by = [said_of(project, row) for row in given]
        found.append({**msgspec.to_builtins(one), "approved": bool(given), "approved_by": by})
    return found


def _next(told: dict[str, Any]) -> list[dict[str, str]]:
    """What to type, and why; the most urgent first."""
    steps = [_about_run(told, run) for run in told["runs"]]
    found = [step for step in steps if step is not None]
    for one in told["waiting"]:
        if one["approved"]:
            found.append(
                {
                    "why": f"{one['pipeline']} was approved by {', '.join(one['approved_by'])}",
                    "command": f"radloop run {one['pipeline']}",
                }
            )
        else:
            what = f"{one['pipeline']} waits for a person who is {one['role']}, to approve the {one['kind']}"
            found.append(
                {"why": what, "command": f'radloop approve {short(one["digest"])} --role {one["role"]} --why "..."'}
            )
    if told["labels"]["requests"]:
        asked = told["labels"]["requests"][0]
        found.append(
            {"why": f"labels are asked for {asked['images']} images", "command": "radloop labels import FILE ..."}
        )
    return found or [_first_step(told)]


def _about_run(told: dict[str, Any], run: dict[str, Any]) -> dict[str, str] | None:
    why = f"{run['pipeline']} {run['status']}" + (f": {run['message'].splitlines()[0]}" if run["message"] else "")
    if run["status"] in ("failed", "interrupted"):
        return {"why": why, "command": f"radloop run {run['pipeline']}"}
    if run["status"] == "stopped":
        return {"why": why, "command": "radloop report"}
    return None


def _first_step(told: dict[str, Any]) -> dict[str, str]:
    done = {run["pipeline"] for run in told["runs"] if run["status"] == "succeeded"}
    champion = "champion" in told["serving"]
    ladder = (
        (
            not told["images"]["by_site"],
            "no image has come yet",
            "radloop listen, or radloop ingest FOLDER --site CODE",
        ),
        (not told["labels"]["labels"], "no label has come yet", "radloop labels import FILE ..."),
        ("prepare" not in done, "no dataset version yet", "radloop run prepare"),
        ("develop" not in done, "no model yet", "radloop run develop"),
        (not told["serving"]["running"], "nothing is served", "radloop serve"),
        (not champion, "no model is released", "radloop run release"),
    )
    for is_next, why, typed in ladder:
        if is_next:
            return {"why": why, "command": typed}
    return {"why": "the loop is closed", "command": "radloop run watch"}


def _show(told: dict[str, Any]) -> None:
    images, labels, serving = told["images"], told["labels"], told["serving"]
    counts = {name: count for name, count in images.items() if name != "by_site"}
    latest = told["datasets"][-1] if told["datasets"] else None
    models = [f"version {m['version']}" + (f" ({m['role']})" if m["role"] else "") for m in told["models"]]
    output.print_pairs(
        f"{told['project']}, task {told['task']}",
        [
            ("images", output.counts_line(counts)),
            ("studies", _say_studies(told["studies"])),
            ("quarantine", output.counts_line(told["quarantine"]["reasons"]) if told["quarantine"]["held"] else None),
            (
                "labels",
                f"{labels['labels']:,}, on {labels['images_labelled']:,} images, {labels['unmatched']:,} unmatched",
            ),
            ("dataset", _say_dataset(latest) if latest else "no version yet"),
            ("models", ", ".join(models[-5:]) or "none yet"),
            ("serving", _say_serving(serving)),
        ],
    )
    if told["runs"]:
        output.print_table(
            "Last runs",
            ["pipeline", "status", "run", "seconds", "message"],
            [
                (
                    r["pipeline"],
                    r["status"],
                    r["run_id"],
                    round(r["seconds"], 1),
                    (r["message"].splitlines() or [""])[0],
                )
                for r in told["runs"]
            ],
        )
    print("Next")
    for step in told["next"]:
        print(f"  {step['why']}\n    {step['command']}")


def _say_dataset(version: dict[str, Any]) -> str:
    flags = f", flagged: {', '.join(version['flags'])}" if version["flags"] else ""
    counts = version["counts"]
    return (
        f"version {version['number']} ({short(version['digest'])}): {counts.get('instances', '?')} instances of "
        f"{counts.get('patients', '?')} patients{flags}"
    )


def _say_serving(serving: dict[str, Any]) -> str:
    parts = [f"{name} version {serving[name]['version']}" for name in ("champion", "challenger") if name in serving]
    if serving["strategy"] != "single":
        parts.append(serving["strategy"] + (f" {serving['percent']} %" if serving["percent"] else ""))
    if not serving["running"]:
        parts.append("not running")
    elif serving["error"]:
        parts.append(serving["error"])
    else:
        parts.append(f"port {serving['port']}" if serving["ready"] else "starting")
    return ", ".join(parts)

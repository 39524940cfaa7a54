"""What the report shows, gathered from the project folder: catalog, ledger, artifacts and run records."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from radloop import __version__
from radloop.artifact import open_artifact
from radloop.catalog.reason import Reason
from radloop.errors import ArtifactError
from radloop.pipeline.records import read_run
from radloop.stages.approvals import said_of, shown
from radloop.stages.project import open_catalog, settings_of

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog

MEANING = {
    Reason.NOT_DICOM: "no DICOM file",
    Reason.TRUNCATED: "the file ends before its data does",
    Reason.UNKNOWN_TRANSFER_SYNTAX: "encoded in a way nobody here knows",
    Reason.NO_PATIENT_ID: "no patient identifier, or a placeholder: it cannot be kept apart from others",
    Reason.MISSING_UID: "an identifying UID is missing",
    Reason.UID_CONFLICT: "another image under a SOP Instance UID that is known",
    Reason.NO_PIXELS: "no image in it",
    Reason.PIXELS_UNDECODABLE: "the image cannot be decoded",
    Reason.UNEXPECTED_SOP_CLASS: "a kind of object that the task is not for",
    Reason.UNEXPECTED_MODALITY: "a modality that the task is not for",
    Reason.BAD_GEOMETRY: "size, spacing or orientation cannot be right",
    Reason.BAD_WINDOW: "the display window cannot be right",
    Reason.DUPLICATE_PIXELS: "the same image of the same patient again",
    Reason.DUPLICATE_PIXELS_ACROSS_PATIENTS: "the same image under several patients: whose it is, is in doubt",
    Reason.EMPTY_IMAGE: "nothing to be seen",
    Reason.SATURATED_IMAGE: "largely over- or underexposed",
    Reason.PHI_FOUND: "identifying text was left after cleaning",
    Reason.BURNED_IN_DECLARED: "text is burned into the image, as it says itself",
    Reason.BURNED_IN_TEXT: "text was found in the image",
    Reason.UNSUPPORTED_OBJECT: "an object that cannot be de-identified safely yet",
    Reason.RECOGNIZABLE_FACE: "the images may show a face",
    Reason.WITHDRAWN: "a rejection note names it",
    Reason.MULTI_CHANNEL: "a colour image",
    Reason.MULTI_FRAME: "several frames in one instance",
}
_LEDGER_ROWS = 40
_TRACED = 20


def build(home: Path) -> dict[str, Any]:
    """The data of the report page (`radloop.monitoring.report.ReportData`) for a project as it stands."""
    settings = settings_of(home)
    runs = read_runs(home)
    from radloop.catalog.schema import now

    with open_catalog(home) as catalog:
        evaluations = _evaluations(home, catalog, runs)
        data: dict[str, Any] = {
            "project": {
                "name": home.resolve().name,
                "task": settings.task.name,
                "intended_use": settings.task.intended_use,
                "version": __version__,
                "engine": "local",
                "generated_at": now(),
            },
            "status": _status(home, catalog, evaluations),
            "flow": _flow(home, catalog, runs),
            "quarantine": _quarantine(catalog),
            "datasets": [msgspec.to_builtins(version) for version in catalog.datasets()],
            "dataset_diffs": _diffs(home, catalog),
            "models": evaluations,
            "rollouts": _rollouts(home, catalog),
            "alerts": [
                {"at": row.at, "id": row.subject, "state": "sent" if row.payload.get("sent") else "kept", **_said(row)}
                for row in catalog.ledger.rows(kind="alert")
            ],
            "label_requests": _requests(catalog, settings.task.name),
            "ledger": [
                {**msgspec.to_builtins(row), "payload": shown(home, row)}
                for row in catalog.ledger.rows()[-_LEDGER_ROWS:]
            ],
            "trace": _trace(home, catalog),
        }
    data |= _of_runs(runs)
    data["timing"] = [
        {"name": f"{run['pipeline']} {name}", "seconds": result["seconds"], "cached": result["cached"]}
        for run in _latest_each(runs)
        for name, result in run["results"].items()
    ]
    return {name: value for name, value in data.items() if value}


def read_runs(home: Path) -> list[dict[str, Any]]:
    """Records of all runs, oldest first."""
    found = []
    for record in sorted((home / "runs").glob("*/run.json")):
        found.append(msgspec.to_builtins(read_run(record)))
    return found


def _latest_each(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = {run["pipeline"]: run for run in runs}
    return [last[name] for name in ("prepare", "develop", "release", "watch") if name in last]


def _json(run: dict[str, Any], output: str, member: str) -> Any:
    """A JSON member of a run's output; None if the run did not come so far or it was removed since."""
    if output not in run["outputs"]:
        return None
    path = Path(run["outputs"][output]) / member
    return msgspec.json.decode(path.read_bytes()) if path.exists() else None


def _of_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What only run records point to: validation, split, drift and performance."""
    data: dict[str, Any] = {}
    drifts = []
    for run in runs:
        if run["pipeline"] == "prepare" and (summary := _json(run, "validate.validation", "summary.json")):
            data["validation"] = {
                "summary": summary,
                "instances": summary.get("instances"),
                "anomalies": _json(run, "validate.validation", "anomalies.json"),
                "statistics": _json(run, "validate.validation", "statistics.json"),
                "comparisons": _json(run, "validate.validation", "drift.json"),
            }
        if run["pipeline"] == "develop" and (split := _json(run, "split.split", "split.json")):
            data["split"] = {"leakage": split, "parts": _parts(run)}
        if run["pipeline"] == "watch":
            if drift := _json(run, "drift.drift", "drift.json"):
                drifts.append(drift)
            if performance := _json(run, "performance.performance", "performance.json"):
                data["performance"] = performance
    alarms = [i for i, drift in enumerate(drifts) if drift["verdict"] == "drifted"]
    if drifts:
        first = alarms[0] if alarms else len(drifts) - 1
        data["drift"] = {"before": drifts[first], "after": drifts[-1] if len(drifts) - 1 > first else None}
    return data


def _parts(run: dict[str, Any]) -> Any:
    evaluation = _json(run, "evaluate.evaluation", "evaluation.json")
    return evaluation["parts"] if evaluation else None


def _evaluations(home: Path, catalog: Catalog, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each evaluated model once, oldest first, refused ones too."""
    registered = {model.info["evaluation"]: model for model in catalog.models() if "evaluation" in model.info}
    numbers = {version.digest: version.number for version in catalog.datasets()}
    champion = _champion(home)
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        evaluation = _json(run, "evaluate.evaluation", "evaluation.json") if run["pipeline"] == "develop" else None
        if evaluation is None:
            continue
        folder = Path(run["outputs"]["evaluate.evaluation"])
        place = str(folder.relative_to(home.resolve())) if folder.is_relative_to(home.resolve()) else str(folder)
        model, split = registered.get(place), _json(run, "split.split", "split.json")
        verdict = _json(run, "evaluate.verdict", "verdict.json")
        alias = "champion" if model and model.digest == champion else ""
        found[place] = {
            "version": model.version if model else "not registered",
            "digest": model.digest if model else folder.parent.name,
            "dataset": numbers.get(model.dataset_digest) if model else (split and max(numbers.values(), default=None)),
            "alias": alias,
            "trained_at": model.created_at if model else "",
            "evaluation": evaluation,
            "gates": verdict["gates"] if verdict else [],
            "verdict_digest": open_artifact(Path(run["outputs"]["evaluate.verdict"])).digest if verdict else "",
            "examples": [
                {**{k: v for k, v in e.items() if k != "file"}, "image": folder / e["file"]}
                for e in evaluation.get("examples", [])
                if (folder / e["file"]).exists()
            ],
        }
    return list(found.values())


def _champion(home: Path) -> str:
    from radloop.serving.desired import desired

    now = desired(home)
    return now.models.champion.model_digest if now and now.models.champion else ""


def _flow(home: Path, catalog: Catalog, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Instances from received to published, and what each step kept back."""
    from radloop.serving import predictions

    prepared = [run for run in runs if run["pipeline"] == "prepare" and run["results"]]
    if not prepared:
        return {}
    by_stage: dict[str, Counter[str]] = {}
    for row in catalog.quarantined(state=None):
        by_stage.setdefault(row.stage, Counter())[str(row.reason)] += 1

    def lost(stage: str) -> list[dict[str, Any]]:
        return [{"reason": reason, "count": n} for reason, n in sorted(by_stage.get(stage, {}).items())]

    def count(stage: str, output: str, name: str = "instances") -> int:
        outputs = prepared[-1]["results"].get(stage, {}).get("outputs", {})
        found = outputs.get(output, {}).get("counts", {}).get(name, 0)
        return int(found)

    kept = sum(sum(per.values()) for per in catalog.counts().values())
    refused = sum(by_stage.get("landing", Counter()).values())
    steps = [
        {"name": "received", "count": kept + refused, "lost": lost("landing")},
        {"name": "de-identified", "count": count("deidentify", "clean"), "lost": lost("deidentify")},
        {"name": "passed quality", "count": count("quality", "checked"), "lost": lost("quality")},
        {"name": "preprocessed", "count": count("preprocess", "tensors", "images"), "lost": lost("preprocess")},
        {"name": "published", "count": count("publish", "dataset")},
    ]
    predicted = {row["sop_uid"] for row in predictions.read(home / "predictions", status=predictions.OK)}
    ends = [{"name": part, "count": count("publish", "dataset", part)} for part in ("train", "validation", "test")]
    return {"steps": steps, "ends": [*ends, {"name": "predicted", "count": len(predicted - {None})}]}


def _status(home: Path, catalog: Catalog, models: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The headline where a person decided what the newest model's gates could not; else the page makes its own."""
    gates = models[-1]["gates"] if models else []
    open_gates = [gate["gate"] for gate in gates if gate["verdict"] == "undetermined"]
    approvals = {row.subject: row for row in catalog.ledger.rows(kind="approval")}
    given = approvals.get(models[-1]["verdict_digest"]) if models else None
    if given is None or not open_gates or any(gate["verdict"] == "fail" for gate in gates):
        return None
    passed = sum(gate["verdict"] == "pass" for gate in gates)
    return {
        "verdict": "approved",
        "headline": f"The newest model passed {passed} of {len(gates)} gates; what was undetermined ({', '.join(open_gates)})"
        f" was approved by {said_of(home, given)}.",
    }


def _quarantine(catalog: Catalog) -> list[dict[str, Any]]:
    counted = Counter((str(row.reason), row.stage) for row in catalog.quarantined(state=None))
    return [
        {"reason": reason, "stage": stage, "count": n, "meaning": MEANING.get(Reason(reason), "")}
        for (reason, stage), n in sorted(counted.items())
    ]


def _diffs(home: Path, catalog: Catalog) -> list[dict[str, Any]]:
    from radloop.datasets import manifest

    versions = catalog.datasets()
    found = []
    for before, after in pairwise(versions):
        try:
            a, b = (manifest.read(home / version.path) for version in (before, after))
        except ArtifactError:  # removed since; the ledger still names it
            continue
        found.append({"before": before.number, "after": after.number, "changes": manifest.diff(a, b)})
    return found


def _rollouts(home: Path, catalog: Catalog) -> list[dict[str, Any]]:
    """One entry a model that was released or tried, its steps in the order they were taken."""
    found: dict[str, dict[str, Any]] = {}
    versions = {model.digest: model.version for model in catalog.models()}
    champion = ""
    for row in catalog.ledger.rows():
        if row.kind not in ("release", "rollback") or str(row.payload.get("step", "")).endswith("began"):
            continue
        entry = found.setdefault(row.subject, {"challenger": versions.get(row.subject), "steps": [], "verdict": ""})
        told = row.payload
        step: dict[str, Any] = {"name": told["step"], "at": row.at, "verdict": told.get("verdict", "")}
        if "figures" in told:
            step["judge"] = {name: value for name, value in told.items() if name not in ("step", "percent")}
        if row.kind == "rollback":
            step["name"], step["verdict"], entry["verdict"] = "rolled back", "stop", "rolled back"
            step["detail"] = told.get("why", "")
        if told["step"] == "promoted":
            step["verdict"], entry["verdict"] = "pass", "promoted"
            entry["champion"], champion = champion, str(versions.get(row.subject))
        if "percent" in told or str(told["step"]).startswith("canary"):
            step["percent"] = float(str(told["step"]).split()[1]) if " " in str(told["step"]) else None
        if "n_patients" in told:
            step["detail"] = f"{told['n_patients']} patients, {told['n_requests']} requests"
        entry["steps"].append(step)
    approvals = {row.subject: row for row in catalog.ledger.rows(kind="approval")}
    packages = {model.digest: model.info.get("package_digest") for model in catalog.models()}
    for digest, entry in found.items():
        approval = approvals.get(str(packages.get(digest)))
        if approval is not None:
            entry["approved_by"] = f"{said_of(home, approval)}: {approval.payload.get('why')}"
    return list(found.values())


def _requests(catalog: Catalog, task: str) -> list[dict[str, Any]]:
    labelled = catalog.resolve_labels(task).values
    sites = {row.sop_uid: row.site for row in [*catalog.pending(), *catalog.archived()]}
    return [
        {
            "id": request.id,
            "opened_at": request.opened_at,
            "status": request.status,
            "count": len(request.sop_uids),
            "arrived": sum(uid in labelled for uid in request.sop_uids),
            "sites": Counter(sites.get(uid, "unknown") for uid in request.sop_uids),
            "why": request.why,
        }
        for request in catalog.label_requests()
    ]


def _said(row: Any) -> dict[str, Any]:
    return {"kind": row.payload["kind"], "subject": row.payload["subject"]}


def _trace(home: Path, catalog: Catalog) -> dict[str, Any]:
    """The latest served prediction of an image, down to the instances its model learnt from."""
    from radloop.catalog.lineage import ELSEWHERE, learnt_from
    from radloop.errors import DataError
    from radloop.serving import predictions

    rows = [r for r in predictions.read(home / "predictions", status=predictions.OK) if r["sop_uid"] and r["served"]]
    if not rows:
        return {}
    row = max(rows, key=lambda r: r["at"])
    try:
        traced = catalog.trace(row["model_digest"])
    except DataError:  # served from a package of another project
        return {}
    learnt = [member.sop_uid for member in learnt_from(traced.model, traced.members)]
    shown = ("prediction_id", "at", "sop_uid", "site", "probability", "decision")
    return {
        "prediction": {name: row[name] for name in shown},  # type: ignore[literal-required]
        "model": {"version": traced.model.version, "digest": traced.model.digest},
        "run": {"id": traced.model.info.get("run_id")},
        "dataset": {"number": traced.dataset.number, "digest": traced.dataset.digest},
        "instances": learnt[:_TRACED],
        "count": len(learnt),
        "trained_elsewhere": traced.model.info.get("trained") == ELSEWHERE,
    }

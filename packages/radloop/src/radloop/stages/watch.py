"""Stages of `watch`: what production sees, whether it still is what the champion was trained on, and what to do."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from radloop.stage import Home, In, Out, stage
from radloop.stage.execute import log
from radloop.stages.kinds import Dataset, Decision, Drift, Evaluation, Package, Performance, Predictions

_KEPT = ("sop_uid", "study_uid", "patient", "site", "probability", "decision", "tags", "features")


@stage(cache=False)
def collect(package: In[Package], predictions: Out[Predictions], *, home: Home, patients: int = 500) -> None:
    """The champion's latest answers: the images of the last `patients` patients in the prediction log."""
    from radloop.serving import predictions as log_files

    digest = identity(package)["model_digest"]
    rows = [
        row
        for row in log_files.read(home / "predictions", status=log_files.OK)
        if row["model_digest"] == digest and row["patient"] and row["served"]
    ]
    rows.sort(key=lambda row: row["at"], reverse=True)
    latest: dict[str, None] = {}
    for row in rows:
        latest.setdefault(str(row["patient"]))
    window = set(list(latest)[:patients])
    kept = {row["sop_uid"]: row for row in reversed(rows) if row["patient"] in window}
    told = [{name: kept[uid][name] for name in _KEPT} for uid in sorted(kept, key=str)]
    predictions.write_json("predictions.json", told)
    predictions.counts.update(images=len(told), patients=len(window), answered=len(rows))


@stage(cache=False)
def drift(
    predictions: In[Predictions],
    dataset: In[Dataset],
    evaluation: In[Evaluation],
    drift: Out[Drift],
    *,
    home: Home,
    thresholds: dict[str, Any] = {},  # noqa: B006 - stages never change their parameters
) -> None:
    """Compare the window with the data the champion learnt from. An alarm is raised and cleared with hysteresis."""
    from radloop.monitoring import drift as compare
    from radloop.stages.prepare import read_table
    from radloop.stages.project import open_catalog

    scores = {row["sop_uid"]: row["probability"] for row in read_table(evaluation.file("predictions.parquet"))}
    rows = [row for row in read_table(dataset.file("manifest.parquet")) if row["part"] != "test"]
    reference = compare.population({**row, "probability": scores.get(row["sop_uid"])} for row in rows)
    window = compare.population(window_rows(predictions))
    with open_catalog(home) as catalog:
        former = [row for row in catalog.ledger.rows(kind="drift") if row.subject == dataset.digest]
        report = compare.compare(
            reference,
            window,
            thresholds=msgspec.convert(thresholds, compare.Thresholds),
            state=former[-1].payload["state"] if former else None,
        )
        catalog.ledger.append(
            "drift",
            dataset.digest,
            {"verdict": report.verdict, "state": report.state, "summary": report.summary},
            actor="watch",
            key=f"drift:{dataset.digest}:{predictions.digest}:{report.verdict}",
        )
    log(report.summary)
    drift.write_json("drift.json", msgspec.to_builtins(report))
    drift.counts.update(patients=report.window_patients, images=report.window_images)


@stage(cache=False)
def performance(
    predictions: In[Predictions],
    evaluation: In[Evaluation],
    package: In[Package],
    performance: Out[Performance],
    *,
    home: Home,
    task: str = "finding",
    label_definition: str = "",
) -> None:
    """Join the window with the labels that have arrived, and measure.

    Labels of another definition than the model's give figures that are shown, and compared with nothing.
    """
    from radloop.monitoring import performance as measure

    decision = package.json("decision.json")
    assert isinstance(decision, dict)
    labels = labels_now(home, task)
    measured = evaluation.json("evaluation.json")
    assert isinstance(measured, dict)
    found = measure.assess(
        window_rows(predictions),
        labels,
        threshold=decision["threshold"],
        reference=measure.reference_of(measured, label_definition=identity(package)["task"]),
        label_definition=label_definition or task,
    )
    log(found.summary)
    performance.write_json("performance.json", msgspec.to_builtins(found))


@stage(cache=False, retries=1)
def alert(
    drift: In[Drift],
    performance: In[Performance],
    predictions: In[Predictions],
    package: In[Package],
    *,
    home: Home,
    smtp: dict[str, Any] = {},  # noqa: B006
    label_request_size: int = 100,
) -> None:
    """Tell people of drift or lost performance, once, and ask for the labels that would settle it."""
    from radloop.monitoring import alerts, labelling
    from radloop.monitoring.drift import DRIFTED, DriftReport
    from radloop.monitoring.performance import DEGRADED
    from radloop.monitoring.performance import Performance as Found
    from radloop.stages.project import open_catalog

    report = msgspec.convert(drift.json("drift.json"), DriftReport)
    found = msgspec.convert(performance.json("performance.json"), Found)
    model = identity(package)["model_digest"][:12]
    with open_catalog(home) as catalog:
        if report.verdict == DRIFTED:
            decision = package.json("decision.json")
            assert isinstance(decision, dict)
            requested = {uid for request in catalog.label_requests() for uid in request.sop_uids}
            wanted = labelling.choose(
                window_rows(predictions),
                limit=label_request_size,
                threshold=decision["threshold"],
                drifted_sites=report.drifted_sites(),
                exclude=requested,
            )
            if wanted.wanted and not catalog.label_requests("open"):
                catalog.open_label_request(wanted.id, sop_uids=wanted.sop_uids(), why=report.summary, actor="watch")
                log(f"opened a labelling request for {len(wanted.wanted)} images")
        if report.verdict == DRIFTED:
            calm = sum(row.payload["verdict"] != DRIFTED for row in catalog.ledger.rows(kind="drift"))
            episode = f"{model}:{','.join(report.drifted_sites())}:{calm}"
            _tell(catalog, alerts.drift_alert(report, project=home.resolve().name, model=model), episode, smtp)
        if found.verdict == DEGRADED:
            one = alerts.performance_alert(found, project=home.resolve().name, model=model)
            _tell(catalog, one, f"{model}:{found.verdict}", smtp)


@stage(cache=False)
def decide(
    drift: In[Drift],
    dataset: In[Dataset],
    decision: Out[Decision],
    *,
    home: Home,
    task: str = "finding",
    label_definition: str = "",
    patients_per_class: int = 20,
) -> None:
    """Whether to train again: a labelling request is open and enough newly labelled patients of each class are there."""
    from radloop.stages.prepare import read_table
    from radloop.stages.project import open_catalog

    report = drift.json("drift.json")
    assert isinstance(report, dict)
    learnt = {row["sop_uid"] for row in read_table(dataset.file("manifest.parquet")) if row["label"] is not None}
    labels = labels_now(home, task)
    new: dict[int, set[str]] = defaultdict(set)
    with open_catalog(home) as catalog:
        asked = catalog.label_requests("open")
        for row in [*catalog.pending(), *catalog.archived()]:
            if row.sop_uid in labels and row.sop_uid not in learnt:
                new[labels[row.sop_uid]].add(row.patient)
    enough = min(len(new[0]), len(new[1])) >= patients_per_class
    why = (
        f"{len(new[1])} newly labelled patients with and {len(new[0])} without the finding "
        f"({patients_per_class} of each wanted), {len(asked)} labelling requests open"
    )
    retrain = bool(asked) and enough
    if label_definition and label_definition != task:
        retrain, why = False, f"the labels mean something else ({label_definition}) and teach this task nothing; {why}"
    decision.write_json("decision.json", {"retrain": retrain, "why": why, "requests": [r.id for r in asked]})
    log(f"{'train again' if retrain else 'no training now'}: {why}")


def identity(package: In[Package]) -> dict[str, str]:
    """The digests that a package names: model, dataset, preprocessing, key id, task."""
    return msgspec.json.decode(package.file("identity.json").read_bytes(), type=dict[str, str])


def window_rows(predictions: In[Predictions]) -> list[dict[str, Any]]:
    """Rows of the production window."""
    return msgspec.json.decode(predictions.file("predictions.json").read_bytes(), type=list[dict[str, Any]])


def labels_now(home: Home, task: str) -> dict[str, int]:
    """Pseudonymous SOP UID -> 0 or 1, of all labels that join an instance now."""
    from radloop.stages.prepare import CLASSES
    from radloop.stages.project import open_catalog

    with open_catalog(home) as catalog:
        values = catalog.resolve_labels(task).values
    return {uid: CLASSES[value] for uid, (value, _) in values.items() if value in CLASSES}


def _tell(catalog: Any, one: Any, episode: str, smtp: dict[str, Any]) -> None:
    """Send one alert, unless this episode (the same model, the same sites, no calm in between) was told already."""
    from radloop.monitoring import alerts

    payload = {"kind": one.kind, "subject": one.subject, "figures": one.figures, "episode": episode}
    if not smtp.get("smtp_host"):
        key = f"alert:{one.kind}:{episode}:kept"
        catalog.ledger.append("alert", one.id, {**payload, "sent": False}, actor="watch", key=key)
        log(f"{one.subject} (no [alerts] smtp_host: kept in the ledger)")
        return
    told = {row.payload["episode"] for row in catalog.ledger.rows(kind="alert") if row.payload["sent"]}
    mail = alerts.Mail(
        host=smtp["smtp_host"],
        port=smtp["smtp_port"],
        sender=smtp["sender"],
        recipients=tuple(smtp["recipients"]),
        tls=smtp["tls"],
    )
    if alerts.send(one, mail, already_sent=lambda _: episode in told).sent:
        key = f"alert:{one.kind}:{episode}"
        catalog.ledger.append("alert", one.id, {**payload, "sent": True}, actor="watch", key=key)
        log(f"sent: {one.subject}")

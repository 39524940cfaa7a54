"""From what happened to what the report's template shows: verdicts, tiles, plots, and which parts there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from radloop.monitoring import plots

Plain = Mapping[str, Any]

# Section id, title, the key of the data it needs, and the command that makes that data.
SECTIONS = (
    ("flow", "From received to predicted", "flow", "radloop run prepare"),
    ("quarantine", "Quarantine", "quarantine", "radloop run prepare"),
    ("datasets", "Dataset versions", "datasets", "radloop run prepare"),
    ("validation", "Data validation", "validation", "radloop run prepare"),
    ("split", "Split by patient", "split", "radloop run develop"),
    ("model", "Discrimination and calibration", "models", "radloop run develop"),
    ("subgroups", "Subgroups", "models", "radloop run develop"),
    ("shortcut", "Shortcut audit", "models", "radloop run develop"),
    ("examples", "Example images", "examples", "radloop run develop"),
    ("gates", "Gates", "models", "radloop run develop"),
    ("release", "Shadow and canary", "rollouts", "radloop run release"),
    ("drift", "Drift", "drift", "radloop run watch"),
    ("performance", "Performance in production", "performance", "radloop run watch"),
    ("alerts", "Alerts and labelling requests", "alerts", "radloop run watch"),
    ("trace", "Trace of one prediction", "trace", "radloop trace PREDICTION"),
    ("ledger", "Ledger", "ledger", "radloop run"),
    ("time", "Where the time went", "timing", "radloop run"),
    ("use", "Intended use", "", ""),
)

_PASS = {
    "pass", "passed", "ok", "stable", "kept", "clean", "succeeded", "promoted", "approved", "released", "sent",
    "closed", "operationally_safe", "non_inferior", "serving", "champion",
}  # fmt: skip
_STOP = {
    "fail", "failed", "stop", "stopped", "refused", "drifted", "degraded", "rolled back", "rejected", "harm", "error",
    "unsent",
}  # fmt: skip

_METRICS = (
    ("auc", "AUC", "area under the ROC curve"),
    ("sensitivity", "Sensitivity", "at the frozen threshold"),
    ("specificity", "Specificity", "at the frozen threshold"),
    ("ppv", "PPV", "at the declared prevalence"),
    ("npv", "NPV", "at the declared prevalence"),
    ("ece", "Calibration error", "expected, equal-count bins"),
    ("brier", "Brier score", "mean squared error of the probability"),
)


def tone(verdict: Any) -> str:
    """pass, stop or unknown: which shape and colour a verdict gets. A word that is not known is no pass."""
    word = str(verdict).strip().lower()
    return "pass" if word in _PASS else "stop" if word in _STOP else "unknown"


def page(data: Plain) -> dict[str, Any]:
    """The template's context: `data` itself, and what is derived from it."""
    models = [model for model in data.get("models") or [] if isinstance(model, Mapping)]
    newest = next((m for m in reversed(models) if m.get("evaluation")), {})
    before = next((m for m in reversed(models) if m.get("evaluation") and m is not newest), {})
    examples = list(data.get("examples") or []) or _examples(newest)
    flow = _flow(data.get("flow") or {})
    there = {
        **data,
        "flow": flow["steps"],
        "examples": examples,
        "alerts": data.get("alerts") or data.get("label_requests"),
    }
    if models and not newest:
        there["models"] = None
    sections = [
        {"id": name, "title": title, "command": command, "there": not key or bool(there.get(key))}
        for name, title, key, command in SECTIONS
    ]
    return {
        **data,
        "sections": sections,
        "part": {section["id"]: section for section in sections},
        "status": status(data, models),
        "tiles": tiles(data, newest),
        "newest": newest,
        "evaluation": newest.get("evaluation") or {},
        "examples": examples,
        "flow": flow,
        "plots": _plots(flow, newest, before),
        "metrics": _metrics(newest, before),
        "subgroups": _subgroups(newest),
        "drift_view": _drift(data.get("drift") or {}),
        "total_seconds": sum(_number(row.get("seconds")) or 0.0 for row in data.get("timing") or []),
        "most_seconds": max([_number(row.get("seconds")) or 0.0 for row in data.get("timing") or []] + [1e-9]),
    }


def status(data: Plain, models: Sequence[Plain]) -> dict[str, Any]:
    """The page's verdict: the caller's, or what the newest model's gates say."""
    given = dict(data.get("status") or {})
    gates: list[Plain] = next((m["gates"] for m in reversed(models) if m.get("gates")), [])
    tones = [tone(gate.get("verdict")) for gate in gates]
    worst = (
        "not run yet" if not tones else "stop" if "stop" in tones else "undetermined" if "unknown" in tones else "pass"
    )
    passed = sum(one == "pass" for one in tones)
    said = f"The newest model passed {passed} of {len(tones)} gates." if tones else "No model has been judged yet."
    if tones and worst == "undetermined":
        said += " What is undetermined needs a person's approval."
    return {"verdict": worst, "headline": said} | {key: value for key, value in given.items() if value}


def tiles(data: Plain, newest: Plain) -> list[dict[str, Any]]:
    """The figures at the top of the page; only those there are."""
    found: list[dict[str, Any]] = []
    steps = _flow(data.get("flow") or {})["steps"]
    if steps:
        found.append({"name": "Instances received", "value": f"{steps[0]['count']:,}", "note": ""})
    versions = data.get("datasets") or []
    if versions:
        counts = versions[-1].get("counts") or {}
        note = f"{counts.get('instances', 0):,} instances of {counts.get('patients', 0):,} patients"
        found.append({"name": "Dataset version", "value": str(versions[-1].get("number", "–")), "note": note})
    area = ((newest.get("evaluation") or {}).get("metrics") or {}).get("auc") or {}
    if _number(area.get("value")) is not None:
        note = f"95 % interval {_three(area.get('lower'))} to {_three(area.get('upper'))}"
        found.append({"name": "Test AUC", "value": _three(area["value"]), "note": note})
    gates = newest.get("gates") or []
    if gates:
        passed = sum(tone(gate.get("verdict")) == "pass" for gate in gates)
        rest = [str(g.get("gate")) for g in gates if tone(g.get("verdict")) != "pass"]
        note = ", ".join(rest) + " did not pass" if rest else "all passed"
        found.append({"name": "Gates passed", "value": f"{passed} of {len(gates)}", "note": note})
    drift = data.get("drift") or {}
    last = drift.get("after") or drift.get("before")
    if last:
        found.append({"name": "Drift", "value": str(last.get("verdict", "–")).capitalize(), "note": _drift_note(drift)})
    serving = [m for m in data.get("models") or [] if m.get("alias") == "champion"]
    if serving:
        note = f"trained on dataset version {serving[-1]['dataset']}" if serving[-1].get("dataset") else ""
        found.append({"name": "Model in service", "value": f"Version {serving[-1].get('version', '–')}", "note": note})
    return found


def _drift_note(drift: Plain) -> str:
    before, after = drift.get("before") or {}, drift.get("after") or {}
    if before and after:
        return f"was {before.get('verdict')} before the new model"
    return f"{(before or after).get('window_patients', 0):,} patients in the window"


def _examples(newest: Plain) -> list[dict[str, Any]]:
    """The newest evaluation's own example images, where its folder is known."""
    folder, evaluation = newest.get("folder"), newest.get("evaluation") or {}
    if not folder:
        return list(newest.get("examples") or [])
    return [{**one, "image": f"{folder}/{one['file']}"} for one in evaluation.get("examples") or [] if one.get("file")]


def _plots(flow: Plain, newest: Plain, before: Plain) -> dict[str, Markup]:
    made: dict[str, Markup] = {}
    if flow["steps"]:
        steps = [{**step, **_lost(step)} for step in flow["steps"]]
        made["flow"] = plots.flow(steps, flow["ends"], title="Instances from step to step; a table below has the same")
    evaluation = newest.get("evaluation") or {}
    if evaluation.get("roc"):
        older = (before.get("evaluation") or {}).get("roc")
        curves = [(f"version {before.get('version')}, its own test", older)] if older else []
        curves.append((f"version {newest.get('version', '')}".strip(), evaluation["roc"]))
        made["roc"] = plots.roc(curves, point=_operating(evaluation), title=f"ROC curve, {_area_words(evaluation)}")
    if evaluation.get("reliability"):
        bins = [{"predicted": p, "observed": o, "count": c} for p, o, c in evaluation["reliability"]]
        made["calibration"] = plots.calibration(bins, title="Reliability diagram: predicted against observed share")
    return made


def _flow(flow: Plain) -> dict[str, Any]:
    """Steps and ends, each with name, count and lost; an end that the last step cannot hold stands apart from it."""
    shown: dict[str, Any] = {
        key: [
            {"name": str(row.get("name", "–")), "count": int(row.get("count") or 0), "lost": row.get("lost") or []}
            for row in flow.get(key) or []
        ]
        for key in ("steps", "ends")
    }
    left = shown["steps"][-1]["count"] if shown["steps"] else 0
    for end in shown["ends"]:
        end["apart"] = end["count"] > left
        left -= 0 if end["apart"] else end["count"]
    return shown


def _lost(step: Plain) -> dict[str, Any]:
    rows = step.get("lost") or []
    name = rows[0].get("reason", "") if len(rows) == 1 else f"{len(rows)} reasons"
    return {"lost": sum(int(row.get("count") or 0) for row in rows), "lost_name": name}


def _operating(evaluation: Plain) -> tuple[float, float] | None:
    metrics = evaluation.get("metrics") or {}
    hit, spared = (_number((metrics.get(name) or {}).get("value")) for name in ("sensitivity", "specificity"))
    return None if hit is None or spared is None else (1 - spared, hit)


def _area_words(evaluation: Plain) -> str:
    area = (evaluation.get("metrics") or {}).get("auc") or {}
    return f"AUC {_three(area.get('value'))}, 95 % interval {_three(area.get('lower'))} to {_three(area.get('upper'))}"


def _metrics(newest: Plain, before: Plain) -> list[dict[str, Any]]:
    now, then = ((m.get("evaluation") or {}).get("metrics") or {} for m in (newest, before))
    return [
        {"name": name, "meaning": meaning, "figure": now[key], "before": then.get(key)}
        for key, name, meaning in _METRICS
        if key in now
    ]


def _subgroups(newest: Plain) -> list[dict[str, Any]]:
    """One group a factor, with its gap; the bar of an interval as percentages of the axis 0.5 to 1."""
    evaluation = newest.get("evaluation") or {}
    gaps = {gap.get("factor"): gap for gap in evaluation.get("gaps") or []}
    factors: dict[str, list[dict[str, Any]]] = {}
    for row in evaluation.get("subgroups") or []:
        factors.setdefault(str(row.get("factor")), []).append({**row, "bar": _bar(row.get("auc"))})
    return [{"factor": name, "rows": rows, "gap": gaps.get(name)} for name, rows in factors.items()]


def _bar(figure: Plain | None) -> dict[str, float] | None:
    ends = [_number((figure or {}).get(key)) for key in ("lower", "value", "upper")]
    if any(end is None for end in ends):
        return None
    low, middle, high = (100 * min(1.0, max(0.0, (float(end or 0) - 0.5) / 0.5)) for end in ends)
    return {"low": low, "width": max(1.0, high - low), "value": middle}


def _drift(drift: Plain) -> dict[str, Any]:
    """Features of the scopes that decided, the same feature before and after in one row, and the plots of the worst."""
    worst = _scope(drift.get("before") or {})
    shown = {"before": worst, "after": _scope(drift.get("after") or {}, worst)}
    features: dict[str, dict[str, Any]] = {}
    for when, scope in shown.items():
        for feature in (scope or {}).get("features") or []:
            if {"feature", "effect", "p_adjusted"} <= feature.keys():
                features.setdefault(str(feature["feature"]), {})[when] = feature
    rows = [{"feature": name, **both} for name, both in features.items()]
    rows.sort(key=lambda row: -max(float((row.get(w) or {}).get("effect") or 0) for w in ("before", "after")))
    return {
        "scopes": shown,
        "rows": rows,
        "histograms": [
            _histograms(row) for row in rows if (row.get("before") or row.get("after") or {}).get("drifted")
        ][:6],
        "reports": [(when, drift[when]) for when in ("before", "after") if drift.get(when)],
    }


def _scope(report: Plain, like: Plain | None = None) -> Plain | None:
    """The scope to show in detail: the one shown before, else of those that decided the one with the most drift."""
    scopes = [scope for scope in report.get("scopes") or [] if scope.get("features")]
    wanted = (like or {}).get("scope")
    ranked = sorted(
        scopes,
        key=lambda s: (s.get("scope") != wanted, not s.get("decides"), -float(s.get("share_drifted") or 0)),
    )
    return ranked[0] if ranked else None


def _histograms(row: Plain) -> dict[str, Any]:
    drawn = {}
    for when in ("before", "after"):
        feature = row.get(when) or {}
        numeric = feature.get("test") == "Kolmogorov-Smirnov"
        bars = len(feature.get("reference_shares") or [])
        if bars and bars == len(feature.get("window_shares") or []) == len(feature.get("bins") or []) - numeric:
            drawn[when] = plots.two_histograms(
                [str(edge) for edge in feature["bins"]],
                feature["reference_shares"],
                feature["window_shares"],
                title=f"{row['feature']}, {when}: reference {feature.get('reference_summary')}, "
                f"window {feature.get('window_summary')}",
                numeric=numeric,
            )
    return {"feature": row["feature"], **drawn}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _three(value: Any) -> str:
    return "–" if _number(value) is None else f"{value:.3f}"

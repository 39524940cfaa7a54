"""A whole loop's report data, as the stages hand it over: real drift and performance reports, real shapes elsewhere."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np

from radloop.learning.statistics import Interval
from radloop.monitoring import drift, performance

SITES = {"A": 0.0, "B": 1.4}


def png(number: int) -> bytes:
    """A picture as the evaluation writes it: an image and, beside it, the same with an orange spot."""
    from PIL import Image

    size = 96
    rows, columns = np.mgrid[0:size, 0:size] / size
    lungs = np.exp(-(((rows - 0.5) / 0.34) ** 4)) * (
        np.exp(-(((columns - 0.3) / 0.15) ** 2)) + np.exp(-(((columns - 0.7) / 0.15) ** 2))
    )
    rng = np.random.default_rng(number)
    image = np.clip(0.75 - 0.55 * lungs + 0.04 * rng.normal(size=(size, size)), 0, 1)
    across, down = rng.uniform(0.25, 0.75), rng.uniform(0.3, 0.7)
    spot = np.exp(-(((rows - down) ** 2 + (columns - across) ** 2) / 0.01))
    grey = np.repeat(np.clip(image + 0.3 * spot, 0, 1)[:, :, None], 3, axis=2)
    heat = 0.6 * spot[:, :, None]
    pair = np.concatenate([grey, grey * (1 - heat) + np.array([1.0, 0.45, 0.0]) * heat], axis=1)
    out = io.BytesIO()
    Image.fromarray((pair * 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)).save(out, format="PNG")
    return out.getvalue()


def rows(patients: int, seed: int, sites: tuple[str, ...]) -> list[dict[str, Any]]:
    """Predictions of patients at some sites; site B's scanner differs."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(patients):
        site = sites[number % len(sites)]
        shift = SITES[site]
        found.append(
            {
                "sop_uid": f"2.25.{seed}{number:04d}",
                "study_uid": f"2.25.9{seed}{number:04d}",
                "patient": f"P{seed}-{number}",
                "site": site,
                "probability": float(np.clip(rng.beta(1.2, 2.4) + 0.08 * shift, 0, 1)),
                "tags": {
                    "manufacturer": "Phantom Imaging" if site == "A" else "Borealis",
                    "view_position": str(rng.choice(["PA", "AP"])),
                    "sex": str(rng.choice(["F", "M"])),
                    "age_years": float(rng.normal(58, 14)),
                },
                "features": {
                    "f_mean": float(rng.normal(0.42 + 0.09 * shift, 0.06)),
                    "f_std": float(rng.normal(0.2, 0.03)),
                    "f_entropy": float(rng.normal(6.1 - 0.4 * shift, 0.3)),
                    "f_noise_sigma": float(abs(rng.normal(0.012 + 0.008 * shift, 0.003))),
                    "f_p99": float(rng.normal(0.9, 0.04)),
                },
            }
        )
    return found


def interval(value: float, half: float = 0.03) -> dict[str, Any]:
    """An interval as JSON has it."""
    return {"value": value, "lower": max(0.0, value - half), "upper": min(1.0, value + half), "method": "bootstrap"}


def evaluation(auc: float, champion: str | None = None) -> dict[str, Any]:
    """evaluation.json."""
    false_rate = np.linspace(0, 1, 90)
    true_rate = false_rate ** ((1 - auc) / auc)
    groups = [
        ("site", "A", 61, 24, 37, auc + 0.01), ("site", "B", 44, 20, 24, auc - 0.03), ("sex", "F", 52, 21, 31, auc),
        ("sex", "M", 53, 23, 30, auc - 0.01), ("age", "18-39", 14, 4, 10, None), ("age", "40-59", 45, 19, 26, auc),
        ("age", "60-79", 46, 21, 25, auc - 0.02),
    ]  # fmt: skip
    compared = {
        "site": "all", "new": False, "patients": 105, "champion": interval(auc - 0.05), "challenger": interval(auc),
        "difference": {"value": 0.05, "lower": 0.012, "upper": 0.09, "method": "bootstrap"}, "note": "",
    }  # fmt: skip
    new = {**compared, "site": "B", "new": True, "patients": 44}
    few = {
        "site": "C", "new": True, "patients": 6, "champion": None, "challenger": None, "difference": None,
        "note": "insufficient evidence",
    }  # fmt: skip
    return {
        "task": "nodule",
        "parts": {
            "train": {"images": 428, "patients": 210, "positive": 171},
            "validation": {"images": 92, "patients": 45, "positive": 37},
            "test": {"images": 214, "patients": 105, "positive": 88},
        },
        "decision": {"slope": 1.2, "intercept": -0.3, "threshold": 0.412, "prevalence": 0.1},
        "metrics": {
            "auc": interval(auc), "sensitivity": interval(0.91, 0.05), "specificity": interval(0.88, 0.05),
            "brier": interval(0.07), "ece": interval(0.035, 0.02), "ppv": interval(0.46, 0.1), "npv": interval(0.989, 0.01),
        },
        "validation_auc": auc + 0.005,
        "roc": [[float(x), float(y)] for x, y in zip(false_rate, true_rate, strict=True)],
        "reliability": [[0.03, 0.02, 40], [0.1, 0.13, 38], [0.3, 0.27, 30], [0.55, 0.6, 26], [0.8, 0.77, 38], [0.97, 0.98, 42]],
        "subgroups": [
            {"factor": f, "value": v, "patients": n, "positive": p, "negative": q,
             "auc": None if a is None else interval(a, 0.04), "note": "insufficient evidence" if a is None else ""}
            for f, v, n, p, q, a in groups
        ],
        "gaps": [{"factor": "site", "low": "B", "high": "A", "difference": 0.04}],
        "shortcut": {
            "auc": interval(0.56, 0.05), "patients": 360, "positive": 148, "negative": 212, "reason": "",
            "fields": {"manufacturer": 0.55, "site": 0.55, "view_position": 0.53, "rows": 0.51, "lossy": 0.5},
        },
        "leakage": {
            "patients": 360, "crossing_patients": 0, "crossing": {"train+validation": 0, "train+test": 0},
            "parts": {"train": 210, "validation": 45, "test": 105}, "crossing_pixels": 0, "trained_on_test": {},
        },
        "comparison": champion and {
            "champion": champion, "overall": compared, "sites": [new, few], "excluded_patients": 0, "reason": "",
        },
        "examples": [],
        "trained_elsewhere": False,
    }  # fmt: skip


def gates(auc: float, undetermined: bool = False) -> list[dict[str, Any]]:
    """Gates as `learning.gates.judge` lists them."""
    return [
        {"gate": "leakage", "verdict": "pass", "figure": 0.0, "bound": 0.0,
         "detail": "no patient of 360 is in more than one part"},
        {"gate": "auc", "verdict": "pass", "figure": auc - 0.03, "bound": 0.8,
         "detail": f"AUC {auc:.3f}, lower 95 % bound {auc - 0.03:.3f}; at least 0.8 is asked"},
        {"gate": "calibration", "verdict": "pass", "figure": 0.035, "bound": 0.1,
         "detail": "expected calibration error 0.035; at most 0.1 is asked"},
        {"gate": "subgroups", "verdict": "undetermined" if undetermined else "pass", "figure": 0.04, "bound": 0.1,
         "detail": "insufficient evidence for age 18-39 (14 patients); AUC differs by 0.040 between site B and A"},
        {"gate": "shortcut", "verdict": "pass", "figure": 0.51, "bound": 0.65,
         "detail": "metadata alone predicts the label with AUC 0.560, lower 95 % bound 0.510"},
        {"gate": "non_inferiority", "verdict": "pass", "figure": 0.012, "bound": -0.05,
         "detail": "AUC minus that of version 1 on the same 105 patients is +0.050, lower 95 % bound +0.012"},
    ]  # fmt: skip


def judged(verdict: str, patients: int) -> dict[str, Any]:
    """A JudgeVerdict."""
    names = [
        ("error_rate", 0.0, 0.0, 0.04, 0.1), ("slow", 0.02, 0.0, 0.07, 0.1),
        ("disagreement", 0.14, 0.08, 0.22, 0.3), ("mean_absolute_difference", 0.09, 0.07, 0.12, 0.25),
        ("score_shift", 0.04, -0.03, 0.11, 0.25),
    ]  # fmt: skip
    sure = verdict == "operationally_safe"
    return {
        "verdict": verdict, "n_requests": patients * 2, "n_patients": patients, "n_labelled_patients": 0,
        "reasons": [] if sure else [f"patients: {patients} of 30"],
        "figures": [{"name": n, "figure": f, "low": a, "high": b, "bound": m, "ok": sure, "harm": False}
                    for n, f, a, b, m in names],
    }  # fmt: skip


def digest(text: str) -> str:
    """Any digest."""
    return hashlib.sha256(text.encode()).hexdigest()


def sample() -> dict[str, Any]:
    """Everything the report can show."""
    reference = drift.population(rows(180, 1, ("A",)))
    widened = drift.population(rows(260, 2, ("A", "B")))
    before = drift.compare(reference, drift.population(rows(90, 3, ("A", "B"))))
    after = drift.compare(widened, drift.population(rows(80, 4, ("A", "B"))))
    seen = rows(90, 5, ("A", "B"))
    rng = np.random.default_rng(6)
    labels = {r["sop_uid"]: int(rng.random() < r["probability"] ** 0.7) for r in seen[:70]}
    lately = performance.assess(
        seen, labels, threshold=0.41, reference=performance.Reference(Interval(0.91, 0.88, 0.94), 0.4, ["A"])
    )
    return {
        "project": {
            "name": "Chest radiographs, nodule", "task": "nodule", "version": "0.1.0", "engine": "local",
            "generated_at": "2026-11-23T09:41:12+00:00",
            "intended_use": "Research on simulated radiographs of adults, PA and AP, two sites. Not for use on patients.",
        },
        "status": {
            "headline": "Version 2 is in service. It was trained after drift was found at site B, passed five of six "
            "gates and its canary; the subgroup gate was undetermined and approved by a person.",
            "next_command": "radloop run watch",
        },
        "flow": {
            "steps": [
                {"name": "Received", "count": 812, "lost": [
                    {"reason": "the same again", "count": 24}, {"reason": "no DICOM or truncated", "count": 9},
                    {"reason": "no usable PatientID", "count": 4}]},
                {"name": "De-identified", "count": 775, "lost": [{"reason": "identifying text found", "count": 6}]},
                {"name": "Quality checked", "count": 769, "lost": [
                    {"reason": "duplicate pixels", "count": 18}, {"reason": "empty or saturated", "count": 11}]},
                {"name": "In dataset 2", "count": 740, "lost": [{"reason": "unlabelled", "count": 6}]},
            ],
            "ends": [{"name": "train", "count": 428}, {"name": "validation", "count": 92}, {"name": "test", "count": 214},
                     {"name": "predicted", "count": 160}],
        },
        "quarantine": [
            {"reason": "DUPLICATE_PIXELS", "stage": "quality", "count": 18, "meaning": "pixel for pixel as another image"},
            {"reason": "EMPTY_IMAGE", "stage": "quality", "count": 11, "meaning": "one value everywhere"},
            {"reason": "NOT_DICOM", "stage": "ingest", "count": 9, "meaning": "the bytes are no DICOM file"},
            {"reason": "PHI_FOUND", "stage": "deidentify", "count": 6, "meaning": "identifying text was left in the output"},
        ],
        "datasets": [
            {"number": 1, "digest": digest("d1"), "created_at": "2026-11-23T09:37:02+00:00", "flags": {},
             "counts": {"instances": 412, "patients": 204, "labelled": 412, "positive": 165, "train": 289,
                        "validation": 61, "test": 62}},
            {"number": 2, "digest": digest("d2"), "created_at": "2026-11-23T09:39:48+00:00", "flags": {},
             "counts": {"instances": 740, "patients": 360, "labelled": 734, "positive": 296, "train": 430,
                        "validation": 93, "test": 217}},
        ],
        "dataset_diffs": [
            {"before": 1, "after": 2, "changes": {
                "added": {"count": 328, "by_site": {"A": 12, "B": 316}, "by_label": {"0": 191, "1": 131, "none": 6}},
                "removed": {"count": 0, "by_site": {}, "by_label": {}},
                "revised": {"count": 2, "by_site": {"A": 2}, "by_label": {"0": 2}},
                "relabelled": {"count": 3, "by_site": {"A": 3}, "by_label": {"1": 3}},
                "moved": {"count": 0, "by_site": {}, "by_label": {}}}},
        ],
        "validation": {
            "summary": {"verdict": "pass", "schema": "baseline", "instances": 740, "features": 19, "anomalies": 2,
                        "stops": 0, "warnings": 2, "drifted": ["manufacturer"]},
            "anomalies": [
                {"feature": "manufacturer", "type": "ENUM_TYPE_UNEXPECTED_STRING_VALUES", "severity": "warn",
                 "short": "Unexpected string values",
                 "long": "Examples contain values missing from the schema: Borealis (~42%)."},
                {"feature": "site", "type": "ENUM_TYPE_UNEXPECTED_STRING_VALUES", "severity": "warn",
                 "short": "Unexpected string values", "long": "Examples contain values missing from the schema: B (~42%)."},
            ],
            "comparisons": {"features": [
                {"feature": "age_years", "measure": "jensen_shannon_divergence", "drift": 0.04, "skew": 0.04,
                 "threshold": 0.1, "drifted": False},
                {"feature": "manufacturer", "measure": "l_infty", "drift": 0.42, "skew": 0.42, "threshold": 0.1,
                 "drifted": True}]},
            "statistics": {"instances": 740, "features": {
                "age_years": {"kind": "number", "count": 731, "missing": 9, "mean": 57.8, "std": 14.2, "min": 19.0,
                              "median": 58.0, "max": 90.0, "deciles": []},
                "manufacturer": {"kind": "category", "count": 740, "missing": 0, "unique": 2,
                                 "top": [{"value": "Phantom Imaging", "count": 424}, {"value": "Borealis", "count": 316}]}}},
        },
        "split": {"parts": evaluation(0.9)["parts"], "leakage": evaluation(0.9)["leakage"]},
        "models": [
            {"version": "1", "digest": digest("m1"), "dataset": 1, "alias": "previous", "evaluation": evaluation(0.93),
             "gates": gates(0.93)[:5]},
            {"version": "2", "digest": digest("m2"), "dataset": 2, "alias": "champion",
             "evaluation": evaluation(0.958, champion="version 1"), "gates": gates(0.958, undetermined=True)},
        ],
        "examples": [
            {"image": png(n), "outcome": outcome, "probability": p}
            for n, (outcome, p) in enumerate([("TP", 0.97), ("FP", 0.71), ("FN", 0.22), ("TN", 0.02), ("TP", 0.93), ("TN", 0.05)])
        ],
        "rollouts": [
            {"challenger": "1", "verdict": "promoted", "approved_by": "demo (--yes)", "steps": [
                {"name": "Smoke test", "at": "2026-11-23T09:38:20+00:00", "verdict": "pass",
                 "figures": {"reference images": 8, "largest difference": "2.1e-07"}},
                {"name": "In service", "percent": 100, "at": "2026-11-23T09:38:24+00:00"}]},
            {"champion": "1", "challenger": "2", "verdict": "promoted", "approved_by": "demo (--yes)", "steps": [
                {"name": "Shadow", "percent": 0, "at": "2026-11-23T09:40:31+00:00", "judge": judged("operationally_safe", 44)},
                {"name": "Canary", "percent": 5, "at": "2026-11-23T09:40:42+00:00", "judge": judged("undetermined", 12)},
                {"name": "Canary", "percent": 25, "at": "2026-11-23T09:40:50+00:00", "judge": judged("operationally_safe", 41)},
                {"name": "Canary", "percent": 100, "at": "2026-11-23T09:40:58+00:00", "judge": judged("operationally_safe", 60)},
                {"name": "Promoted", "at": "2026-11-23T09:41:03+00:00", "detail": "Version 2 became champion."}]},
        ],
        "drift": {"before": before, "after": after},
        "performance": lately,
        "alerts": [{"at": "2026-11-23T09:39:10+00:00", "kind": "drift", "id": digest("a"), "state": "sent",
                    "subject": "[radloop] Chest radiographs, nodule: drift, verdict drifted"}],
        "label_requests": [{"id": digest("l"), "opened_at": "2026-11-23T09:39:11+00:00", "status": "closed", "count": 60,
                            "arrived": 60, "sites": {"B": 60}, "why": "drift at site B"}],
        "trace": {
            "prediction": {"prediction_id": "0b8b2c1e-3f60-4c1f-9a51-0a1d3a6f0f55", "at": "2026-11-23T09:40:44+00:00",
                           "probability": 0.83, "decision": 1, "site": "B", "role": "champion",
                           "sop_uid": "2.25.292415120837592735891264128345728934561"},
            "model": {"version": "2", "digest": digest("m2"), "preprocessing": digest("p")[:12]},
            "run": {"run_id": "8f3c1e4b", "epochs": 3, "seed": 0, "tracking": "MLflow"},
            "dataset": {"number": 2, "digest": digest("d2"), "instances": 740, "patients": 360},
            "instances": [f"2.25.2924151208375927358912641283457289{n:04d}" for n in range(30)],
            "count": 430,
        },
        "ledger": [
            {"seq": n + 1, "key": None, "at": f"2026-11-23T09:{37 + n // 4}:0{n % 4}+00:00", "kind": kind, "actor": actor,
             "subject": digest(f"s{n}"), "payload": payload}
            for n, (kind, actor, payload) in enumerate([
                ("ingest", "listener", {"new": 412, "same": 24, "quarantined": 13}),
                ("deidentification", "stage deidentify", {"cleaned": 399, "refused": 6, "profile": "research"}),
                ("dataset", "stage publish", {"number": 1, "instances": 412}),
                ("training", "stage train", {"epochs": 3, "seconds": 21.4}),
                ("gate", "stage gate", {"verdict": "pass", "gates": 5}),
                ("approval", "demo (--yes)", {"version": "1", "role": "demo"}),
                ("release", "stage promote", {"version": "1"}),
                ("drift", "stage drift", {"verdict": "drifted", "site": "B"}),
                ("alert", "stage alert", {"kind": "drift"}),
                ("label_request", "stage request", {"images": 60}),
            ])
        ],
        "timing": [{"name": n, "seconds": s, "cached": c} for n, s, c in [
            ("ingest", 14.2, False), ("deidentify", 22.8, False), ("quality", 9.7, False), ("validate (TFDV)", 31.5, False),
            ("preprocess", 12.1, True), ("train", 64.0, False), ("evaluate", 18.3, False), ("release", 41.2, False),
            ("watch", 12.9, False)]],
    }  # fmt: skip

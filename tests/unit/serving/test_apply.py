"""Readiness as KServe tells it: what keeps traffic away. The cluster itself is in tests/cluster."""

from __future__ import annotations

from typing import Any

import pytest

from radloop.serving.apply import unready


def told(ready: str, predictor: str, **changed: Any) -> dict[str, Any]:
    """An InferenceService as the API answers it."""
    conditions = [
        {"type": "IngressReady", "status": ready},
        {"type": "PredictorReady", "status": predictor, "reason": "MinimumReplicasUnavailable"},
        {"type": "Ready", "status": ready, "message": "Deployment does not have minimum availability."},
    ]
    made = {"metadata": {"name": "radloop-v4", "generation": 2}, "status": {"conditions": conditions}}
    return {**made, **changed}


def test_ready_is_ready() -> None:
    """Otherwise no release would ever begin."""
    assert unready(told("True", "True")) == ""
    seen = {"observedGeneration": 2, "conditions": told("True", "True")["status"]["conditions"]}
    assert unready(told("True", "True", status=seen)) == ""


@pytest.mark.parametrize(
    ("service", "why"),
    [
        (told("False", "False"), "minimum availability"),
        (told("Unknown", "Unknown"), "Ready is Unknown"),
        (told("True", "False"), "MinimumReplicasUnavailable"),
        (told("True", "True", status={}), "says nothing"),
        ({"metadata": {"generation": 1}}, "says nothing"),
        (told("True", "True", metadata={"deletionTimestamp": "2026-11-26T22:00:00Z"}), "deleted"),
        (
            told("True", "True", status={"observedGeneration": 1, **told("True", "True")["status"]}),
            "generation 2",
        ),
    ],
)
def test_anything_else_gets_no_traffic(service: dict[str, Any], why: str) -> None:
    """A share of the patients would get 503 instead of an answer."""
    assert why in unready(service)

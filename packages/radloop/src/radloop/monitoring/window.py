"""Which rows of the prediction log a model is watched by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec


class Window(msgspec.Struct, frozen=True):
    """Usable rows, and how many were left out for which cause, so that nothing vanishes silently."""

    rows: list[Mapping[str, Any]]
    other_models: int
    refused: int
    without_patient: int


def select(rows: Iterable[Mapping[str, Any]], model_digest: str) -> Window:
    """One model's answered requests that belong to a patient.

    Args:
        rows: of the prediction log, in the order written.
        model_digest: of the model to watch; the other answers of a shadow or canary are left out.

    Returns:
        One row an image, the last one of an image that was predicted again. A tensor request has no patient, a refused
        one no probability: both are counted.
    """
    latest: dict[str, Mapping[str, Any]] = {}
    others = refused = nobody = 0
    for row in rows:
        if row["model_digest"] != model_digest:
            others += 1
        elif row["status"] != "ok" or row["probability"] is None:
            refused += 1
        elif not (row["patient"] and row["sop_uid"] and row["site"]):
            nobody += 1
        else:
            latest[row["sop_uid"]] = row
    return Window([latest[uid] for uid in sorted(latest)], others, refused, nobody)

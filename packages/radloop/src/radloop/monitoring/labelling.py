"""Which studies to label first.

Two aims pull apart: the next training learns most from what the model is unsure of (uncertainty sampling, Lewis and
Gale 1994), and an honest figure of performance needs a random sample. A request therefore holds both, each marked with
why: a random share, and the most uncertain of each predicted class. Drifted sites come first, one image per patient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from radloop.errors import DataError

RANDOM = "random sample"
UNCERTAIN = "uncertain"


class Wanted(msgspec.Struct, frozen=True):
    """One image whose label is asked for. UIDs are pseudonymous; the crosswalk alone knows the originals."""

    sop_uid: str
    study_uid: str
    patient: str
    site: str
    probability: float
    why: str


class LabellingRequest(msgspec.Struct, frozen=True):
    """What to label, first things first. `id` depends on the content alone, so asking again opens nothing new."""

    id: str
    wanted: list[Wanted]
    sites: dict[str, int]
    candidates: int

    def sop_uids(self) -> list[str]:
        """The pseudonymous SOP UIDs, in the order of the request."""
        return [one.sop_uid for one in self.wanted]


def choose(
    predictions: Iterable[Mapping[str, Any]],
    *,
    limit: int,
    threshold: float,
    drifted_sites: Collection[str] = (),
    exclude: Collection[str] = (),
    random_share: float = 0.3,
) -> LabellingRequest:
    """Rank what was predicted by what its label would be worth.

    Args:
        predictions: rows with `sop_uid`, `study_uid`, `patient`, `site`, `probability`.
        limit: at most so many images; also the number of patients, one image each.
        threshold: the decision threshold; uncertainty is the distance to it in logits.
        drifted_sites: only these sites while they have patients enough for the limit; then the others fill up.
        exclude: pseudonymous SOP UIDs that have a label or were asked for already; their patients are not asked again.
        random_share: of the request, drawn at random (by a hash of the SOP UID, so the same again on the next call).

    Raises:
        DataError: a limit below 1, or a share outside 0 to 1.
    """
    if limit < 1 or not 0 <= random_share <= 1:
        raise DataError("a labelling request that cannot be filled", expected="limit >= 1, 0 <= random_share <= 1")
    rows = {str(row["sop_uid"]): row for row in predictions}
    asked = {str(rows[uid]["patient"]) for uid in exclude if uid in rows}
    left = [row for uid, row in sorted(rows.items()) if uid not in exclude and str(row["patient"]) not in asked]
    first = [row for row in left if row["site"] in drifted_sites]
    others = [row for row in left if row["site"] not in drifted_sites]
    wanted: list[Wanted] = []
    for group in (first, others):
        wanted += _of_group(group, limit - len(wanted), threshold, random_share, {one.patient for one in wanted})
    sites = {site: sum(one.site == site for one in wanted) for site in sorted({one.site for one in wanted})}
    digest = hashlib.sha256("\n".join(sorted(one.sop_uid for one in wanted)).encode()).hexdigest()
    return LabellingRequest(id=digest[:16], wanted=wanted, sites=sites, candidates=len(left))


def _of_group(
    rows: list[Mapping[str, Any]], number: int, threshold: float, random_share: float, taken: set[str]
) -> list[Wanted]:
    """A random share first, then the most uncertain, predicted positive and predicted negative by turns."""
    picked: list[Wanted] = []
    _take(picked, sorted(rows, key=_draw), round(number * random_share), RANDOM, taken)
    nearest = sorted(rows, key=lambda row: (_distance(row["probability"], threshold), _draw(row)))
    positive = [row for row in nearest if row["probability"] >= threshold]
    negative = [row for row in nearest if row["probability"] < threshold]
    while len(picked) < number and (positive or negative):
        for side in (positive, negative):
            _take_next(picked, side, number, taken)
    return picked


def _take(picked: list[Wanted], rows: list[Mapping[str, Any]], number: int, why: str, taken: set[str]) -> None:
    for row in rows:
        if len(picked) >= number:
            return
        if str(row["patient"]) not in taken:
            picked.append(_wanted(row, why))
            taken.add(str(row["patient"]))


def _take_next(picked: list[Wanted], side: list[Mapping[str, Any]], number: int, taken: set[str]) -> None:
    while side and len(picked) < number:
        row = side.pop(0)
        if str(row["patient"]) not in taken:
            picked.append(_wanted(row, UNCERTAIN))
            taken.add(str(row["patient"]))
            return


def _wanted(row: Mapping[str, Any], why: str) -> Wanted:
    return Wanted(
        sop_uid=str(row["sop_uid"]),
        study_uid=str(row.get("study_uid") or ""),
        patient=str(row["patient"]),
        site=str(row["site"]),
        probability=float(row["probability"]),
        why=why,
    )


def _distance(probability: float, threshold: float) -> float:
    return abs(_logit(probability) - _logit(threshold))


def _logit(p: float) -> float:
    inside = min(max(float(p), 1e-9), 1 - 1e-9)
    return math.log(inside / (1 - inside))


def _draw(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(b"label" + str(row["sop_uid"]).encode()).hexdigest()

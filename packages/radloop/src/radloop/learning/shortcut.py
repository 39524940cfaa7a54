"""The shortcut audit: can acquisition metadata alone predict the label?

If it can, a network may have learnt the scanner instead of the finding (Zech et al., PLoS Med 15:e1002683, 2018), and a
good AUC proves little. The audit trains on metadata only and never sees a pixel; the network never sees metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from radloop.learning import statistics
from radloop.learning.statistics import Interval

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.tree import DecisionTreeClassifier

FIELDS = (
    "site",
    "modality",
    "view_position",
    "body_part",
    "laterality",
    "manufacturer",
    "model_name",
    "conversion_type",
    "transfer_syntax_uid",
    "photometric",
    "lossy",
    "lossy_ratio",
    "rows",
    "columns",
    "frames",
    "bits_allocated",
    "bits_stored",
    "pixel_spacing_mm",
    "source_bytes",
)
"""Manifest columns that say how an image was taken and stored. Age and sex are the patient's, not the scanner's."""

_FOLDS = 5


class Shortcut(msgspec.Struct, frozen=True, kw_only=True):
    """What metadata alone reaches.

    Attributes:
        auc: of all fields together, out of fold, patients resampled; None where it could not be measured.
        fields: AUC of each field alone, out of fold, largest first. Fields with one value are left out.
        patients, positive, negative: patients in all, and with an image of each class.
        reason: why `auc` is None.
    """

    auc: Interval | None
    fields: dict[str, float] = {}
    patients: int = 0
    positive: int = 0
    negative: int = 0
    reason: str = ""


def audit(
    table: pa.Table, *, resamples: int = 1000, seed: int = 0, minimum: int = 10, fields: Sequence[str] = FIELDS
) -> Shortcut:
    """Predict the label from metadata by a random forest, cross-validated with whole patients in each fold.

    Args:
        table: a manifest; all labelled rows are used, for no figure of the model depends on this.
        resamples: bootstrap resamples of patients.
        seed: of folds and resamples.
        minimum: patients of each class below which there is insufficient evidence.
        fields: columns to look at; those absent are passed over.
    """
    rows = table.filter(table["label"].is_valid()).sort_by("sop_uid")
    labels = np.array(rows["label"].to_pylist(), dtype=np.int8)
    patients = [str(p) for p in rows["patient"].to_pylist()]
    negative, positive = statistics.class_patients(labels, patients)
    seen = Shortcut(auc=None, patients=len(set(patients)), positive=positive, negative=negative)
    if min(positive, negative) < max(minimum, _FOLDS):
        return msgspec.structs.replace(seen, reason="insufficient evidence: too few patients of a class")
    columns = {name: _column(rows[name].to_pylist()) for name in fields if name in rows.column_names}
    varying = {name: column for name, column in columns.items() if len(np.unique(column)) > 1}
    if not varying:
        return msgspec.structs.replace(seen, auc=Interval(0.5, 0.5, 0.5, "constant"))
    folds = _folds(labels, patients, seed)
    alone = {name: _area(labels, _scores(column[:, np.newaxis], labels, folds)) for name, column in varying.items()}
    together = _scores(np.column_stack(list(varying.values())), labels, folds)
    auc = statistics.area_of(together, labels, patients, resamples=resamples, seed=seed)
    ranked = dict(sorted(alone.items(), key=lambda item: (-item[1], item[0])))
    return msgspec.structs.replace(seen, auc=auc, fields=ranked)


def _column(values: list[Any]) -> NDArray[np.float64]:
    """Numbers as they are, anything else as codes of its text.

    An absent value lies below all others: that a field is filled in at all can tell the label.
    """
    if not all(v is None or isinstance(v, (int, float)) for v in values):
        codes = {text: i for i, text in enumerate(sorted({str(v) for v in values if v is not None}))}
        values = [None if v is None else codes[str(v)] for v in values]
    column = np.array([np.nan if v is None else float(v) for v in values])
    lowest = np.nanmin(column) if not np.isnan(column).all() else 0.0
    return np.where(np.isnan(column), lowest - 1, column)


def _folds(labels: NDArray[np.int8], patients: list[str], seed: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    return list(splitter.split(labels, labels, patients))


def _scores(
    x: NDArray[np.float64], labels: NDArray[np.int8], folds: list[tuple[NDArray[Any], NDArray[Any]]]
) -> NDArray[np.float64]:
    """Out-of-fold probabilities of features `(n, fields)`: a tree for one field, a forest for several."""
    scores = np.empty(len(labels))
    for train, test in folds:
        if len(np.unique(labels[train])) < 2:
            scores[test] = labels[train].mean()
            continue
        scores[test] = _classifier(*x[train].shape).fit(x[train], labels[train]).predict_proba(x[test])[:, 1]
    return scores


def _classifier(rows: int, fields: int) -> DecisionTreeClassifier | RandomForestClassifier:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.tree import DecisionTreeClassifier

    leaf = max(5, rows // 100)
    if fields == 1:
        return DecisionTreeClassifier(min_samples_leaf=leaf, random_state=0)
    return RandomForestClassifier(50, min_samples_leaf=leaf, random_state=0, n_jobs=1)


def _area(labels: NDArray[np.int8], scores: NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(labels, scores)), 4)

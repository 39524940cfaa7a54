"""From a logit to a probability and a decision: fitted on validation, frozen before test, carried by the package."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray


class Decision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Calibration and threshold.

    Attributes:
        slope, intercept: Platt scaling (Platt 1999): probability = 1 / (1 + exp(-(slope * logit + intercept))). It
            holds at the validation part's prevalence.
        threshold: decision 1 from this probability on.
        prevalence: the declared prevalence where the model is to be used; predictive values are for it.
    """

    slope: float
    intercept: float
    threshold: float
    prevalence: float

    def probability(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated probabilities, in float64, of the same shape."""
        z = self.slope * np.asarray(logits, dtype=np.float64) + self.intercept
        probability: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -z))  # no overflow at either end
        return probability

    def decide(self, probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
        """1 where the finding is called present, else 0."""
        return (probabilities >= self.threshold).astype(np.int64)


def fit(
    logits: NDArray[np.float64],
    labels: NDArray[np.int8],
    *,
    prevalence: float,
    rule: Literal["youden", "sensitivity"] = "youden",
    target_sensitivity: float = 0.95,
) -> Decision:
    """Fit calibration and threshold on the validation part, which must hold both classes.

    Calibration is logistic regression of the label on the logit with a weak L2 penalty, so that separable classes give
    a finite slope. The threshold is Youden's (largest sensitivity + specificity - 1) or the highest that reaches the
    target sensitivity; it lies midway between the last score called positive and the first called negative.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1.0).fit(logits[:, np.newaxis], labels)
    draft = Decision(
        slope=float(model.coef_[0, 0]), intercept=float(model.intercept_[0]), threshold=0.5, prevalence=prevalence
    )
    return msgspec.structs.replace(
        draft, threshold=_threshold(draft.probability(logits), labels, rule, target_sensitivity)
    )


def _threshold(
    probabilities: NDArray[np.float64], labels: NDArray[np.int8], rule: str, target_sensitivity: float
) -> float:
    from sklearn.metrics import roc_curve

    false_rate, true_rate, cuts = roc_curve(labels, probabilities, drop_intermediate=False)
    if rule == "sensitivity":
        best = int(np.argmax(true_rate >= target_sensitivity - 1e-12))  # cuts fall, so the first is the highest
    else:
        best = int(np.argmax(true_rate - false_rate))
    if not np.isfinite(cuts[best]):  # roc_curve's first point calls nothing positive
        return 1.0
    below = cuts[best + 1] if best + 1 < len(cuts) else 0.0
    return float((cuts[best] + below) / 2)

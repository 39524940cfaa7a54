"""What MLflow loads: `mlflow.pyfunc.load_model` calls `_load_pyfunc` by name, from the wheel that the model carries.

Input: a pandas frame with a column `dicom` of DICOM Part 10 bytes. Output: `probability` (double), `decision` (long).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radloop.learning.package import Packaged


class DicomModel:
    """A package behind MLflow's interface."""

    def __init__(self, packaged: Packaged) -> None:
        self.packaged = packaged

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """One row an instance, in the order given. Raises DicomError for bytes that the model cannot use."""
        import pandas as pd

        answers = [self.packaged.predict_dicom(bytes(data)) for data in model_input["dicom"]]
        return pd.DataFrame(
            {
                "probability": pd.Series([a.probability for a in answers], dtype="float64"),
                "decision": pd.Series([a.decision for a in answers], dtype="int64"),
            }
        )


def _load_pyfunc(data_path: str) -> DicomModel:
    return DicomModel(Packaged(Path(data_path)))

"""radloop on Apache Airflow: stages as tasks, artifacts as assets, approvals as required actions.

    from radloop_airflow.dags import dag_from_spec

    dag = dag_from_spec("prepare.json", project="/srv/opacity", core="/srv/radloop/.venvs/core/bin/python")

A worker needs radloop's base only. Stages run by `radloop stage` under the Python of their own environment.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def provider_info() -> dict[str, Any]:
    """What Airflow is told of this package (`airflow providers list`). Imports nothing: Airflow asks while it starts."""
    name = "radloop"
    return {
        "package-name": "radloop-airflow",
        "name": name,
        "description": "MLOps for medical imaging: radloop's stages and pipelines.",
        "versions": [__version__],
        "operators": [{"integration-name": name, "python-modules": ["radloop_airflow.operators"]}],
        "sensors": [{"integration-name": name, "python-modules": ["radloop_airflow.sensors"]}],
        "triggers": [{"integration-name": name, "python-modules": ["radloop_airflow.triggers"]}],
    }

"""radloop on Apache Airflow: operators, sensors, triggers, and DAGs made of `pipeline.json`."""

from __future__ import annotations

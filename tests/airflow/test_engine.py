"""The conformance suite on Airflow: every run is a DAG run, every stage a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from running import engine as engine_of

from radloop.pipeline.records import RunResult
from radloop.testing.engine_suite import EngineSuite


class TestAirflow(EngineSuite):
    name = "airflow"

    @pytest.fixture
    def engine(self, metadata: Path, core: str) -> Callable[..., RunResult]:
        return engine_of(metadata, core)

"""The conformance suite on MLflow Projects."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radloop.engines import mlflow_project
from radloop.pipeline import Pipeline
from radloop.pipeline.records import RunResult
from radloop.testing.engine_suite import EngineSuite


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store as MLflow makes it, which takes it seconds: copied, not made anew for each test."""
    from radloop.engines.mlflow_project.runs import Runs

    home = tmp_path_factory.mktemp("store")
    Runs.of(home, f"sqlite:///{home / 'mlflow.db'}", "Default")
    return home / "mlflow.db"


@pytest.fixture
def engine(empty_store: Path) -> Callable[..., RunResult]:
    """The engine, on the project's own store."""

    def run(pipeline: Pipeline, *, home: Path, **options: Any) -> RunResult:
        if not (home / "mlflow").exists():
            (home / "mlflow").mkdir(parents=True)
            shutil.copy(empty_store, home / "mlflow" / "mlflow.db")
        return mlflow_project.run(pipeline, home=home, **options)

    return run


class TestMlflowProject(EngineSuite):
    name = "mlflow-project"

    @pytest.fixture
    def engine(self, engine: Callable[..., RunResult]) -> Callable[..., RunResult]:
        return engine

"""The conformance suite on Kubeflow Pipelines (kfp.local), what only it has, and its compiled YAML against golden files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from radloop.engines import kubeflow
from radloop.pipeline.records import RunResult
from radloop.testing.engine_suite import EngineSuite


class TestKubeflow(EngineSuite):
    name = "kubeflow"

    @pytest.fixture
    def engine(self) -> Callable[..., RunResult]:
        return kubeflow.run

"""The conformance suite on the `local` engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from radloop.cli.stage import approvals
from radloop.engines import local
from radloop.errors import DefinitionError, RunLocked, SettingsError
from radloop.pipeline import Builder, Pipeline
from radloop.pipeline.run import RunResult
from radloop.testing import suite_stages as s
from radloop.testing.engine_suite import EngineSuite, small


class TestLocal(EngineSuite):
    @pytest.fixture
    def engine(self) -> Callable[..., RunResult]:
        def run(pipeline: Pipeline, *, home: Path, **options: Any) -> RunResult:
            return local.run(pipeline, home=home, approved=approvals(home), **options)

        return run

"""The conformance suite on the `subprocess` engine: an engine's test file is one fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from radloop.engines import subprocess
from radloop.pipeline.records import RunResult
from radloop.testing.engine_suite import EngineSuite


class TestSubprocess(EngineSuite):
    name = "subprocess"

    @pytest.fixture
    def engine(self) -> Callable[..., RunResult]:
        return subprocess.run

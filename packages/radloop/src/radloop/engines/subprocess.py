"""The `subprocess` engine: every stage by `radloop stage` in a process of its own. docs/engines.md shows it as the
smallest engine there is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from radloop.errors import SettingsError
from radloop.pipeline import Node, Pipeline
from radloop.pipeline.run import RunResult, walk
from radloop.stage.execute import Emit
from radloop.stage.launch import launch
from radloop.stage.protocol import Request, Result


class _Subprocess:
    def __init__(self, environments: Mapping[str, str]) -> None:
        self.environments = {"core": sys.executable, **environments}

    def external(self, node: Node) -> bool:
        return True

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        if node.environment not in self.environments:
            raise SettingsError(
                f"the environment {node.environment!r} is not there",
                expected=", ".join(sorted(self.environments)),
                next_step="radloop setup",
            )
        python = self.environments[node.environment]
        return launch(request, folder, emit, python=python, timeout_s=node.timeout_s)


def run(
    pipeline: Pipeline,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    environments: Mapping[str, str] | None = None,
    emit: Emit = lambda event: None,
) -> RunResult:
    """Run a pipeline, each stage in its own process; approvals are read there, by `radloop stage`."""
    return walk(pipeline, _Subprocess(environments or {}), home=home, inputs=inputs, emit=emit)

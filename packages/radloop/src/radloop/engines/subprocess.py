"""The `subprocess` engine: every stage by `radloop stage` in a process of its own. docs/engines.md shows it as the
smallest engine there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from radloop.pipeline import Pipeline
from radloop.pipeline.records import RunResult
from radloop.pipeline.run import Launcher, walk
from radloop.stage.execute import Emit


def run(
    pipeline: Pipeline,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    environments: Mapping[str, str] | None = None,
    emit: Emit = lambda event: None,
) -> RunResult:
    """Run a pipeline, each stage in its own process."""
    return walk(pipeline, Launcher(environments or {}), home=home, inputs=inputs, emit=emit)

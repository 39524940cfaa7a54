"""The `local` engine: core stages in this process, stages of another environment under that environment's Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from radloop.pipeline import Node, Pipeline
from radloop.pipeline.records import RunResult
from radloop.pipeline.run import Launcher, walk
from radloop.stage.execute import Approved, Emit, execute, never_approved
from radloop.stage.protocol import Request, Result


class _Local(Launcher):
    name = "local"

    def __init__(self, environments: Mapping[str, str], approved: Approved) -> None:
        super().__init__(environments)
        self.approved = approved

    def external(self, node: Node) -> bool:
        # A stage with a time limit needs a process that can be ended.
        return node.environment != "core" or node.timeout_s is not None

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        return (
            super().__call__(node, request, folder, emit)
            if self.external(node)
            else execute(request, emit, self.approved)
        )


def run(
    pipeline: Pipeline,
    *,
    home: Path,
    inputs: Mapping[str, Path | None] | None = None,
    environments: Mapping[str, str] | None = None,
    approved: Approved = never_approved,
    emit: Emit = lambda event: None,
) -> RunResult:
    """Run a pipeline on this machine.

    Args:
        pipeline: what to run.
        home: the project's home directory.
        inputs: artifact directory of each pipeline input.
        environments: interpreter by environment name, as `[environments]` in radloop.toml.
        approved: whether an artifact's digest was approved by someone of a role.
        emit: receives every event.
    """
    local = _Local(environments or {}, approved)
    for node in pipeline.nodes:
        local.python(node.environment)
    return walk(pipeline, local, home=home, inputs=inputs, emit=emit)

"""The `local` engine: core stages in this process, stages of another environment under that environment's Python."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from radloop.errors import SettingsError
from radloop.pipeline import Node, Pipeline
from radloop.pipeline.run import RunResult, walk
from radloop.stage.execute import Approved, Emit, execute, never_approved
from radloop.stage.launch import launch
from radloop.stage.protocol import Request, Result


class _Local:
    def __init__(self, environments: Mapping[str, str], approved: Approved) -> None:
        self.environments, self.approved = environments, approved

    def external(self, node: Node) -> bool:
        # A stage with a time limit needs a process that can be ended.
        return node.environment != "core" or node.timeout_s is not None

    def __call__(self, node: Node, request: Request, folder: Path, emit: Emit) -> Result:
        if not self.external(node):
            return execute(request, emit, self.approved)
        python = python_of(node.environment, self.environments)
        return launch(request, folder, emit, python=python, timeout_s=node.timeout_s)


def python_of(environment: str, environments: Mapping[str, str]) -> str:
    """The interpreter of a named environment. Raises SettingsError naming what sets it up."""
    if environment == "core":
        return environments.get("core", sys.executable)
    python = environments.get(environment)
    if python is None or not Path(python).exists():
        raise SettingsError(
            f"the environment {environment!r} is not there",
            expected=f"[environments] {environment} = a Python interpreter that exists",
            got=python or "no such setting",
            next_step="radloop setup",
        )
    return python


def environment_digests(environments: Mapping[str, str]) -> dict[str, str]:
    """What of each environment enters cache keys: names and versions of what is installed, and the source of radloop's
    own packages in it that no stage imports at its top (radloop_tfdv).
    """
    digests = {}
    for name, python in {"core": sys.executable, **environments}.items():
        site = Path(python).parent.parent / "lib"
        installed = sorted(p.name for p in site.glob("python3*/site-packages/*.dist-info"))
        digest = hashlib.sha256("\n".join(installed).encode())
        for source in _own_sources(site):
            digest.update(source.read_bytes())
        digests[name] = digest.hexdigest()
    return digests


def _own_sources(site: Path) -> list[Path]:
    """Modules of radloop_* packages in an environment, editable ones through their .pth files."""
    folders = list(site.glob("python3*/site-packages"))
    links = [
        line for folder in folders for pth in folder.glob("*radloop*.pth") for line in pth.read_text().splitlines()
    ]
    folders += [Path(line) for line in links if Path(line).is_dir()]
    return sorted({source for folder in folders for source in folder.glob("radloop_*/**/*.py")})


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
    environments = environments or {}
    for node in pipeline.nodes:
        python_of(node.environment, environments)
    return walk(
        pipeline,
        _Local(environments, approved),
        home=home,
        inputs=inputs,
        emit=emit,
        environment_digests=environment_digests(environments),
    )

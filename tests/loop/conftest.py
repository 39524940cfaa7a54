"""One small demo for all tests of the loop: it is what `make run` does, with 120 images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest


class Done(NamedTuple):
    """A demo that ran to its end."""

    project: Path
    told: dict[str, object]
    stderr: str


def run_radloop(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in another process."""
    environment = {**os.environ, "RADLOOP_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "radloop.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="session")
def radloop() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, as a function."""
    return run_radloop


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """`radloop demo --size small --yes`, once."""
    project = tmp_path_factory.mktemp("demo") / "hospital-demo"
    done = run_radloop("demo", str(project), "--size", "small", "--yes", "--json")
    told = msgspec.json.decode(done.stdout[done.stdout.index("{") :])
    return Done(project, told, done.stderr)

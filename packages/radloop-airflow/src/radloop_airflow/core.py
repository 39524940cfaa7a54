"""What a worker asks radloop's core environment: its commands, by their JSON."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from radloop.errors import EngineError, SettingsError
from radloop.settings import FILE, load

_LINES = 20
_ENDED = (0, 1, 3, 4)


class Core(NamedTuple):
    """A project folder, and the Python of the environment that knows everything about it.

    Attributes:
        project: the project's home directory.
        python: interpreter of the core environment; empty: `[environments] core` in the project's radloop.toml.
    """

    project: str
    python: str = ""

    def environments(self) -> dict[str, str]:
        """Interpreter by environment name: `[environments]` in radloop.toml, and core's.

        Raises:
            SettingsError: nothing says where core is, or what is said is no file.
        """
        home = Path(self.project)
        named = dict(load(home).environments) if (home / FILE).exists() else {}
        python = self.python or named.get("core", "")
        if not python or not Path(python).is_file():
            raise SettingsError(
                "radloop's core environment is not there",
                expected="dag_from_spec(..., core=PYTHON), or [environments] core in radloop.toml, on every worker",
                got=python or "no such setting",
                next_step="radloop export airflow writes it into the DAG files",
            )
        return {**named, "core": python}

    def command(self, *arguments: str) -> list[str]:
        """The command line of `radloop ARGUMENTS` for this project."""
        return [self.environments()["core"], "-m", "radloop.cli", *arguments, "--project", self.project]

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Run a command and decode the JSON it prints.

        Raises:
            SettingsError: the core environment is not there.
            EngineError: it failed; says what it said.
        """
        command = self.command(*arguments)
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except OSError as error:
            raise SettingsError(f"radloop's core environment cannot be started: {error}", got=command[0]) from None
        return answer(arguments, done.returncode, done.stdout, done.stderr)


def answer(arguments: Sequence[str], code: int, stdout: bytes, stderr: bytes) -> dict[str, Any]:
    """The JSON that a command printed. Raises EngineError with its own words where it printed none, or an error."""
    try:
        told = msgspec.json.decode(stdout)
    except msgspec.MsgspecError:
        told = None
    if code not in _ENDED or not isinstance(told, dict) or "error" in told:
        said = "\n".join(stderr.decode(errors="replace").strip().splitlines()[-_LINES:])
        raise EngineError(said.removeprefix("radloop: ") or f"radloop {' '.join(arguments[:2])} exited {code}")
    return told

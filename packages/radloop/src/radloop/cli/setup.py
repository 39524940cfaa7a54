"""`radloop setup`: the environment that TFDV needs for itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, command, settings_at
from radloop.errors import EngineError, SettingsError

NAME = "tfdv"
PACKAGES = ("radloop", "radloop-tfdv", "tensorflow-data-validation")
_ASK = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))" % (PACKAGES,)  # noqa: UP031
_ASK_TIMEOUT_S = 60.0
_DONE = "radloop-setup-done"


def register(app: typer.Typer) -> None:
    """Add `setup`."""

    @command(
        app,
        "setup",
        examples=("radloop setup", "radloop setup --find-links ./wheels"),
        after="`radloop doctor` checks it; `radloop run prepare` uses it for its validation.",
    )
    def setup(
        find_links: Annotated[
            Path | None,
            typer.Option("--find-links", metavar="DIR", help="Take radloop's wheels from this folder.", exists=True),
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Make the environment of the validation stage (TensorFlow Data Validation), and enter it in radloop.toml.

        TFDV cannot live beside what trains, so it gets an environment of its own, about 2 GB, under .venvs/tfdv in the
        project folder. An environment that a checkout's `make setup` made is used as it is. Interrupted, run it again.
        """
        told = set_up(project.resolve(), find_links)
        if json:
            output.print_json(told)
            return
        print(f"The environment {NAME} is ready: {told['python']}")
        if told["added"]:
            print(f"Added to {told['file']}, under [environments]:\n  {told['added']}")
        print("Next: radloop doctor")


def set_up(project: Path, find_links: Path | None = None) -> dict[str, Any]:
    """Make or find the environment and enter its interpreter.

    Raises:
        SettingsError: radloop.toml names an interpreter that is not there.
        EngineError: the installation failed; with its exit status.
    """
    from radloop.settings import FILE

    told = {"python": "", "added": "", "file": str(project / FILE), "made": False}
    named = settings_at(project).environments.get(NAME)
    target = project / ".venvs" / NAME
    if named is not None and works(Path(named)):
        return {**told, "python": named}
    if named is not None and Path(named) != target / "bin" / "python":
        raise SettingsError(
            f"[environments] {NAME} names an interpreter that does not work",
            expected=f"a Python with {', '.join(PACKAGES)}",
            got=named,
            next_step=f"correct that line in {FILE}, or remove it and run `radloop setup` again",
        )
    checkout = find_checkout()
    python = checkout / ".venvs" / NAME / "bin" / "python" if checkout else target / "bin" / "python"
    if not works(python):
        python = target / "bin" / "python"
    ours = python.parent.parent == target
    made = not works(python) or (ours and not (target / _DONE).exists())  # cut short: something may be missing
    if made:
        _install(target, checkout, find_links)
        if not works(python):
            raise EngineError("the environment was installed and does not work", got=str(python))
        (target / _DONE).write_text("made by `radloop setup`\n")
    line = f'{NAME} = "{python}"'
    if named is None:
        enter(project / FILE, line)
    return {**told, "python": str(python), "added": line if named is None else "", "made": made}


def works(python: Path) -> bool:
    """Whether an interpreter has all that validation needs."""
    return versions(python) is not None


def versions(python: Path) -> dict[str, str] | None:
    """Versions of `PACKAGES` there; None where one is missing or it does not run. Nothing heavy is imported."""
    import msgspec

    try:
        done = subprocess.run(
            [str(python), "-I", "-c", _ASK], capture_output=True, timeout=_ASK_TIMEOUT_S, check=True, cwd="/"
        )
        return msgspec.json.decode(done.stdout, type=dict[str, str])
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError):
        return None


def find_checkout() -> Path | None:
    """The checkout that this radloop runs from, None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[5]
    parts = ("locks/tfdv.txt", "packages/radloop-tfdv/pyproject.toml")
    return root if all((root / part).is_file() for part in parts) else None


def enter(file: Path, line: str) -> None:
    """Put a line under [environments] in radloop.toml, whole or not at all; the rest stays as the user wrote it."""
    text = file.read_text()
    header = re.compile(r"^\[environments\][ \t]*(#.*)?$", re.MULTILINE)
    if header.search(text):
        text = header.sub(lambda found: f"{found.group()}\n{line}", text, count=1)
    else:
        text = f"{text.rstrip()}\n\n[environments]\n{line}\n"
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text)
    shutil.copymode(file, scratch)
    os.replace(scratch, file)


def _install(target: Path, checkout: Path | None, find_links: Path | None) -> None:
    """From a checkout: its lock, with hashes, and its packages. Else: this version from the package index."""
    uv = shutil.which("uv") or (str(checkout / ".venvs/uv/bin/uv") if checkout else None)
    target.parent.mkdir(parents=True, exist_ok=True)
    for step in commands(target, checkout, find_links, uv if uv and Path(uv).exists() else None):
        output.say("$ " + " ".join(step))
        done = subprocess.run(step, stdout=sys.stderr, check=False)
        if done.returncode:
            raise EngineError(
                "the environment could not be installed",
                expected="exit status 0",
                got=f"exit status {done.returncode} of {' '.join(step[:4])} ...; its own words are above",
                next_step="mend the cause (network, package index, disk) and run `radloop setup` again",
            )


def commands(target: Path, checkout: Path | None, find_links: Path | None, uv: str | None) -> list[list[str]]:
    """What is run, in order: by uv where it is, else by venv and pip."""
    from radloop import __version__

    python = str(target / "bin" / "python")
    if uv:
        make, pip, to = (
            [uv, "venv", "--clear", "--python", sys.executable, str(target)],
            [uv, "pip"],
            ["--python", python],
        )
    else:
        make, pip, to = [sys.executable, "-m", "venv", "--clear", str(target)], [python, "-m", "pip"], []
    if checkout is None:
        links = ["--find-links", str(find_links.resolve())] if find_links else []
        wanted = [f"radloop=={__version__}", f"radloop-tfdv=={__version__}"]
        return [make, [*pip, "install", *to, *links, *wanted]]
    locked = ["--require-hashes", "--only-binary", ":all:", "-r", str(checkout / "locks/tfdv.txt")]
    sources = [str(checkout / "packages" / name) for name in ("radloop", "radloop-tfdv")]
    return [make, [*pip, "install", *to, *locked], [*pip, "install", *to, "--no-deps", *sources]]

"""`radloop init`: a new project."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, command
from radloop.errors import SettingsError

KEY_BYTES = 32
_IGNORED = """\
# Written by `radloop init`. None of this belongs in version control: keys, identified images, pseudonymous data.
*.key
*.token
.venvs/
landing/
quarantine/
identity/
archive/
catalog.db*
datasets/
artifacts/
runs/
serving/
predictions/
mlflow/
reports/
airflow/
logs/
"""
LOSING = (
    (
        "radloop.key",
        "makes all pseudonyms. Lost: new images of a known patient become somebody else's, labels no longer join, and "
        "the dataset must be built anew from the originals. Leaked: whoever has a list of patients can tell who is who.",
    ),
    (
        "crosswalk.key",
        "decrypts identity/. Lost: no pseudonym leads back to its study any more (results to the PACS, withdrawal of "
        "consent). Leaked, with identity/: everyone in it is named.",
    ),
)


def register(app: typer.Typer) -> None:
    """Add `init`."""

    @command(
        app,
        "init",
        examples=("radloop init chest-project", "cd chest-project"),
        after="edit radloop.toml, then `radloop setup` and `radloop doctor`.",
    )
    def init(
        directory: Annotated[
            Path | None,
            typer.Argument(metavar="[DIR]", help="The new project's folder; here if left out.", show_default=False),
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Make a new project: a commented radloop.toml and two secret keys.

        All that radloop makes later lies in this folder too. The keys can be read by you alone and are never written
        anywhere else: back them up where patient data may be.
        """
        folder = directory or project
        made = make_project(folder)
        if json:
            output.print_json({"project": str(folder.resolve()), "made": made, "back_up": [name for name, _ in LOSING]})
            return
        print(f"A project in {folder.resolve()}: {', '.join(made)}\n\nBack up both keys, apart from each other:")
        for name, meaning in LOSING:
            print(f"  {name} {meaning}")
        go = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
        print(f"\nNext: edit radloop.toml, then: {go}radloop doctor")


def make_project(folder: Path) -> list[str]:
    """Write radloop.toml, both keys and .gitignore.

    Returns:
        The names of the files made.

    Raises:
        SettingsError: one of the first three is there already; nothing was written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    template = Path(__file__).with_name("project.toml").read_bytes()
    wanted = {"radloop.key": _key(), "crosswalk.key": _key(), "radloop.toml": template}
    present = [name for name in sorted(wanted) if os.path.lexists(folder / name)]
    if present:
        raise SettingsError(
            "there is a project here already",
            expected="a folder without radloop.toml and keys",
            got=f"{', '.join(present)} in {folder.resolve()}",
            next_step="`radloop status` shows where it stands. A key is never made anew: restore a lost one from backup",
        )
    for name, content in wanted.items():
        _write_new(folder / name, content, mode=0o600 if name.endswith(".key") else 0o644)
    ignored = folder / ".gitignore"
    if not ignored.exists():
        _write_new(ignored, _IGNORED.encode(), mode=0o644)
        return [*wanted, ".gitignore"]
    return list(wanted)


def _key() -> bytes:
    return secrets.token_hex(KEY_BYTES).encode() + b"\n"


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    """O_EXCL: a file that appeared meanwhile is not overwritten, and a key is never readable by others, not for a moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

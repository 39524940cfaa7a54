"""What every command shares: its options, the project it works on, how its help teaches. Light: no rich, no catalog."""

from __future__ import annotations

import getpass
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from radloop.errors import SettingsError

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

DONE, FAILED, USAGE, STOPPED, WAITING = 0, 1, 2, 3, 4
"""Exit codes of every command."""

Project = Annotated[
    Path,
    typer.Option("--project", metavar="DIR", envvar="RADLOOP_PROJECT", help="The project folder.", show_default="here"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", show_default=False)]
HERE = Path()


def command(app: typer.Typer, name: str, *, examples: tuple[str, ...], after: str, **options: Any) -> Callable[[F], F]:
    """Register a command whose help says what it does (the docstring), gives examples, and names what comes next."""

    def register(function: F) -> F:
        said = inspect.cleandoc(function.__doc__ or "")
        shown = "\n".join(f"  {line}" for line in examples)
        text = f"{said}\n\n\b\nExample:\n{shown}\n\n\b\nNext:\n  {after}"
        app.command(name, help=text, short_help=said.splitlines()[0].split(". ")[0].rstrip("."), **options)(function)
        return function

    return register


def group(app: typer.Typer, name: str, said: str) -> typer.Typer:
    """A command that holds commands, such as `radloop dataset`."""
    inner = typer.Typer(
        name=name, help=said, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    app.add_typer(inner, name=name, help=said, short_help=said.rstrip("."))
    return inner


def settings_at(project: Path) -> Settings:
    """The project's settings. Raises SettingsError where there is no radloop.toml: commands never guess a project."""
    from radloop.settings import load

    return load(project)


def catalog_at(project: Path) -> Catalog:
    """The project's catalog, once it is sure that there is a project."""
    from radloop.stages.project import open_catalog

    settings_at(project)
    return open_catalog(project)


def actor(by: str | None = None) -> str:
    """Who acts, for the ledger: the name given, or that of the operating system's user.

    Raises:
        SettingsError: the system knows no name for this user, and none was given.
    """
    if by is not None and by.strip():
        return by.strip()
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        raise SettingsError(
            "nobody's name can be put in the ledger",
            expected="a user that this system knows",
            got=f"user id {os.getuid()}",
            next_step="give a name: --by NAME, or set the environment variable LOGNAME",
        ) from None


def short(digest: str | None, length: int = 12) -> str:
    """The beginning of a digest, enough to tell it from others."""
    return (digest or "")[:length]


def check_code(value: str, what: str) -> str:
    """A site code as it may stand in the archive and the logs.

    Raises:
        SettingsError: it is empty or holds what no code holds. The value is not repeated: it may be a name.
    """
    if not value or len(value) > 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in value):
        raise SettingsError(
            f"{what} is no site code",
            expected="1 to 64 letters, digits, '.', '_' or '-'",
            next_step="choose a short code that tells nobody more than it must, such as site-a",
        )
    return value

"""The command `radloop`: what there is to type, in the order in which a user meets it, and how errors read.

A command lives in a light module (this package's, never importing rich, the catalog or a room at its top) that has
`register(app)`; what it needs it imports when it runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from radloop import logs
from radloop.cli.output import fail, print_json
from radloop.errors import RadloopError

if TYPE_CHECKING:
    from types import TracebackType

MODULES = (
    "demo",
    "init",
    "setup",
    "doctor",
    "intake",
    "pacs",
    "labels",
    "patients",
    "deidentify",
    "run",
    "status",
    "quarantine",
    "datasets",
    "approvals",
    "serving",
    "answer",
    "trace",
    "volume",
    "backup",
    "audit",
    "export",
    "engine",
)
"""Modules of this package that register commands."""

SECTIONS = {
    "Start": ("demo", "init", "setup", "doctor"),
    "Bring images and labels": ("listen", "ingest", "pacs", "import-images", "labels", "patients"),
    "On its own": ("deidentify", "volume"),
    "Run the loop": ("run", "stage", "status", "approve", "report"),
    "Serve": ("serve", "predict", "answer", "rollback"),
    "Look into it": ("dataset", "quarantine", "trace", "ledger"),
    "Keep it": ("backup", "restore", "audit"),
    "Other engines": ("schema", "export", "engine"),
}

ABOUT = """MLOps for medical imaging: from a PACS to a watched model and back, gated and evidenced.

Not a medical device. Every command takes --project DIR (here, by default; or RADLOOP_PROJECT) and --json.

\b
First:
  radloop demo              the whole loop on a simulated hospital
  radloop init my-project   a project of your own

\b
Exit codes: 0 done, 1 failed or bad input, 2 usage, 3 stopped by a gate, 4 waiting for a person.
"""


class _Sections(TyperGroup):
    """Lists commands under `SECTIONS`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in SECTIONS.items():
            known = [(name, self.commands[name]) for name in names if name in self.commands]
            if not known:
                continue
            with formatter.section(title):
                formatter.write_dl([(name, found.get_short_help_str(limit=90)) for name, found in known])


def make_app() -> typer.Typer:
    """The command line with all its commands."""
    app = typer.Typer(
        cls=_Sections,
        name="radloop",
        help=ABOUT,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @app.callback()
    def top(
        version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True, callback=_version),
    ) -> None:
        pass

    for name in MODULES:
        import_module(f"radloop.cli.{name}").register(app)
    _register_stage(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"radloop {version('radloop')}")
        raise typer.Exit


def _register_stage(app: typer.Typer) -> None:
    """`radloop stage` never comes here (`cli.main` takes it first, without typer); it stands in the list all the same."""

    @app.command("stage", context_settings={"ignore_unknown_options": True, "help_option_names": []})
    def stage(arguments: list[str] = typer.Argument(None)) -> None:
        """Run one stage from its request: what every engine calls"""
        from radloop.cli.stage import run_stage

        raise typer.Exit(run_stage(arguments or []))


def run_app(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name (those of this process by default); the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {name for names in SECTIONS.values() for name in names}
    logs.configure(next((word for word in given if word in commands), "radloop"))
    try:
        typer.main.get_command(make_app()).main(given, prog_name="radloop")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except RadloopError as error:
        return _refused(error, given)
    except Exception as error:  # noqa: BLE001 - the last resort: a user gets a line and a file, not a traceback
        return _crashed(error, given)
    return 0


def _refused(error: RadloopError, given: Sequence[str]) -> int:
    if os.environ.get("RADLOOP_DEBUG") == "1":
        traceback.print_exception(error)
    if logs.wanted():  # what was got stays out: it may be a name that somebody gave
        logs.write("error", {"message": error.what, "error": type(error).__name__, "next_step": error.next_step})
    else:
        fail(str(error))
    if "--json" in given:
        details = {"expected": error.expected, "got": error.got, "next_step": error.next_step}
        said = {name: None if value is None else str(value) for name, value in details.items()}
        print_json({"error": {"type": type(error).__name__, "what": error.what, **said}})
    return 1


def _crashed(error: Exception, given: Sequence[str]) -> int:
    if os.environ.get("RADLOOP_DEBUG") == "1":
        traceback.print_exception(error)
        return 1
    reason = f"{type(error).__name__}"
    if isinstance(error, OSError) and error.strerror:
        reason += f": {error.strerror}"
    where = _write_log(error, given)
    if logs.wanted():
        told = {"message": "this should not have happened", "error": type(error).__name__, "written_to": where.name}
        logs.write("critical", told)
    else:
        fail(
            f"this should not have happened ({reason})\n  written to: {where}\n  next: RADLOOP_DEBUG=1 prints it in full"
        )
    if "--json" in given:
        print_json({"error": {"type": type(error).__name__, "what": reason, "log": str(where)}})
    return 1


def _write_log(error: Exception, given: Sequence[str]) -> Path:
    """Where the error was, without its message: that may repeat a value out of someone's file."""
    folder = project_of(given) / "logs"
    if not (folder.parent / "radloop.toml").exists():
        folder = Path(tempfile.mkdtemp(prefix="radloop-"))
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        chain: BaseException | None = error
        while chain is not None:
            file.write(f"{type(chain).__module__}.{type(chain).__name__} (its message is left out: it may hold PHI)\n")
            file.write("".join(traceback.format_list(_frames(chain.__traceback__))))
            chain = chain.__cause__ or chain.__context__
    return path


def _frames(place: TracebackType | None) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(place))


def project_of(given: Sequence[str]) -> Path:
    """The project folder that the arguments name, before anything has parsed them."""
    for index, word in enumerate(given):
        if word == "--project" and index + 1 < len(given):
            return Path(given[index + 1])
        if word.startswith("--project="):
            return Path(word.partition("=")[2])
    return Path(os.environ.get("RADLOOP_PROJECT") or ".")

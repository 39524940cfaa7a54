"""The command as a whole: what it costs to ask it, what its help teaches, how it fails."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from radloop.cli.app import SECTIONS, make_app, run_app

from .conftest import NAME, Command, Ran


def commands(command: Any = None, path: str = "radloop") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its path."""
    command = command or typer.main.get_command(make_app())
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name, child in inner.items():
        yield from commands(child, f"{path} {name}")


ALL = [(path, command) for path, command in commands() if path != "radloop stage"]


def test_help_is_quick(radloop: Command) -> None:
    """Help that takes seconds is not asked for; a heavy import at some module's top would make it so."""
    cached = {"PYTHONDONTWRITEBYTECODE": ""}  # as for a user, whatever this machine's setting
    radloop("--help", env=cached)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert radloop("--help", env=cached).code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.3


def test_help_lists_every_command(radloop: Command) -> None:
    """A command that no section lists would be there and never be found."""
    top = typer.main.get_command(make_app())
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(getattr(top, "commands"))  # noqa: B009 - typer's group is untyped
    said = radloop("--help").out
    assert all(re.search(rf"^  {name} ", said, re.MULTILINE) for name in listed)


@pytest.mark.parametrize("path,command", ALL, ids=[path for path, _ in ALL])
def test_each_help_teaches(path: str, command: Any) -> None:
    """A user who asks for help must learn what to type, and what comes after it."""
    said = command.help
    example = said.split("Example:\n")[1].split("\n\n")[0]
    assert any(line.startswith(f"  {path}") for line in example.splitlines()), "no example of the command itself"
    assert re.search(r"Next:\n  \S", said)
    names = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in names
    if path not in ("radloop demo", "radloop volume"):  # they need no project
        assert "--project" in names


def test_every_example_would_be_understood() -> None:
    """An example with an option that was renamed teaches an error."""
    known = dict(commands())
    for path, command in ALL:
        said = command.help.split("Example:\n")[1].split("\n\n")[0]
        for line in said.splitlines():
            words = line.split(" > ")[0].split()
            named = next((p for p in sorted(known, key=len, reverse=True) if line.strip().startswith(p)), None)
            if words[0] != "radloop":
                continue
            assert named is not None, line
            options = {o for parameter in known[named].params for o in parameter.opts}
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= options, f"{path}: {line.strip()}"


def test_a_mistyped_command_is_a_usage_error_with_the_nearest_name(radloop: Command) -> None:
    """Scripts tell usage errors (2) from failed work (1); people want the name they meant."""
    ran = radloop("statsu")
    assert ran.code == 2
    assert "status" in ran.err


def test_no_project_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a project nothing may be written: a command in the wrong folder would start a second catalog there."""
    monkeypatch.chdir(tmp_path)
    for command in (["status"], ["ledger"], ["quarantine", "list"], ["dataset", "list"], ["doctor"], ["report"]):
        assert run_app(command) == 1, command
        said = capsys.readouterr().err
        assert "there is no radloop.toml here" in said
        assert "next: radloop init" in said
    assert list(tmp_path.iterdir()) == []


def test_project_by_environment_variable(radloop: Command, tmp_path: Path) -> None:
    """A service has no shell to change folders in."""
    ran = radloop("status", "--json", cwd=tmp_path, env={"RADLOOP_PROJECT": str(radloop.project)})
    assert ran.json["project"] == str(radloop.project)


def test_typo_in_settings_names_the_nearest(radloop: Command) -> None:
    """A setting that is silently not there would run with its default: a gate's bound that nobody set."""
    (radloop.project / "radloop.toml").write_text("[release]\nclincal_canary = true\n")
    ran = radloop("status")
    assert ran.code == 1
    assert "clincal_canary" in ran.err
    assert "did you mean 'clinical_canary'?" in ran.err


def test_errors_are_json_where_json_was_asked_for(radloop: Command) -> None:
    """A script that reads stdout must be told why in the form it asked for."""
    (radloop.project / "radloop.key").unlink()
    options = ("--key", "study", "--key-column", "a", "--value-column", "b", "--json")
    ran = radloop("labels", "import", "radloop.toml", *options)
    assert ran.code == 1
    assert ran.json["error"]["type"] in ("SettingsError", "DataError")
    assert ran.json["error"]["what"] in ran.err


def test_missing_key_names_the_backup(inside: Callable[..., Ran], project: Path, dicom_folder: Path) -> None:
    """A key made anew would give every known patient a second pseudonym, and put them into two parts of the split."""
    (project / "radloop.key").unlink()
    ran = inside("ingest", str(dicom_folder), "--site", "site-a")
    assert ran.code == 1
    assert "restore it from your backup" in ran.err
    assert not (project / "radloop.key").exists()


def test_key_that_others_can_read_is_refused(inside: Callable[..., Ran], project: Path, dicom_folder: Path) -> None:
    """Whoever reads the key can tell from a list of patients who is who."""
    (project / "radloop.key").chmod(0o644)
    ran = inside("ingest", str(dicom_folder), "--site", "site-a")
    assert ran.code == 1
    assert "chmod 600" in ran.err


def test_an_unexpected_error_is_a_line_and_a_file_without_its_message(
    project: Path, inside: Callable[..., Ran]
) -> None:
    """A traceback on the screen helps no user, and its message may repeat a value out of a patient's file."""
    (project / "predictions").mkdir()
    (project / "predictions" / "a.jsonl").mkdir()  # reading it fails as no radloop error does
    ran = inside("trace", "abcdefg")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert "IsADirectoryError: Is a directory" in ran.err
    where = Path(re.findall(r"written to: (.*)", ran.err)[0])
    assert where.parent == project / "logs"
    assert where.stat().st_mode & 0o077 == 0
    assert "trace.py" in where.read_text()
    assert "a.jsonl" not in where.read_text()


def test_debug_prints_the_traceback(radloop: Command) -> None:
    """Whoever mends radloop needs it."""
    (radloop.project / "predictions" / "a.jsonl").mkdir(parents=True)
    ran = radloop("trace", "abcdefg", env={"RADLOOP_DEBUG": "1"})
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "a.jsonl" in ran.err


def test_a_closed_pipe_is_no_error(project: Path) -> None:
    """`radloop ... | head` must not end in a traceback."""
    line = f"{sys.executable} -m radloop.cli --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=project, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_version(radloop: Command) -> None:
    """A bug report begins with it."""
    assert re.fullmatch(r"radloop \d+\.\d+\.\d+\S*\n", radloop("--version").out)


def test_a_name_in_a_file_reaches_no_output(inside: Callable[..., Ran], project: Path, dicom_folder: Path) -> None:
    """A name on a terminal, in a log or in the catalog is a breach that no later care undoes."""
    said = []
    for command in (
        ["ingest", str(dicom_folder), "--site", "site-a"],
        ["ingest", str(dicom_folder), "--site", "site-a", "--json"],
        ["quarantine", "list"],
        ["quarantine", "show", "1", "--json"],
        ["status", "--json"],
        ["ledger", "--json"],
        ["doctor"],
    ):
        ran = inside(*command)
        assert ran.code == 0, ran.err
        said.append(ran.out + ran.err)
    for text in (NAME, "ZORBAXX", "MRN-1", "00121", "readme.txt", "1.2.3.1"):
        assert not any(text in each for each in said), text
    kept = [path for path in project.rglob("*") if path.is_file() and path.relative_to(project).parts[0] not in PRIVATE]
    assert any(path.name == "catalog.db" for path in kept)
    for path in kept:
        assert b"ZORBAXX" not in path.read_bytes(), path
        assert b"MRN-1" not in path.read_bytes(), path


PRIVATE = ("landing", "quarantine", "identity")

"""`radloop deidentify`: a folder in, a folder out, a report. For those who use radloop for this alone."""

from __future__ import annotations

import os
import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import STOPPED, Json, check_code, command
from radloop.errors import DataError, SettingsError

if TYPE_CHECKING:
    from radloop.dicom.batch import Files, Recipe, Summary

_MAX_WORKERS = 8


def register(app: typer.Typer) -> None:
    """Add `deidentify`."""

    @command(
        app,
        "deidentify",
        examples=(
            "radloop deidentify export/ clean/ --report report.html",
            "radloop deidentify export/ clean/ --profile basic --option retain-device-identity --dry-run",
            "radloop deidentify --explain export/IM0001",
        ),
        after="read the report: it says what is left for you to do. The same command again goes on where it ended.",
    )
    def deidentify(
        source: Annotated[
            Path | None,
            typer.Argument(metavar="IN", help="A DICOM file, or a folder of any depth.", show_default=False),
        ] = None,
        target: Annotated[
            Path | None, typer.Argument(metavar="OUT", help="A new folder for the output.", show_default=False)
        ] = None,
        profile: Annotated[
            str | None, typer.Option("--profile", help="basic, or research.", show_default="research")
        ] = None,
        option: Annotated[
            list[str] | None,
            typer.Option("--option", metavar="NAME", help="An option of PS3.15 by name or code; may be repeated."),
        ] = None,
        pixels: Annotated[
            str | None,
            typer.Option(
                "--pixels", help="Text in pixels: clean, refuse, or off (not looked for).", show_default="clean"
            ),
        ] = None,
        face_cleaner: Annotated[
            str | None,
            typer.Option(
                "--face-cleaner",
                metavar="COMMAND",
                help='With the option clean-visual-features: your own, as "deface {input} {output}".',
                show_default="none: heads are refused",
            ),
        ] = None,
        key: Annotated[
            Path | None,
            typer.Option(
                "--key",
                metavar="FILE",
                help="The key; made if it is not there.",
                show_default="~/.config/radloop/deidentify.key",
            ),
        ] = None,
        site: Annotated[str, typer.Option("--site", help="A code for where the images are from.")] = "local",
        report: Annotated[
            Path | None, typer.Option("--report", metavar="FILE", help="Write the report: .html or .json.")
        ] = None,
        refused: Annotated[
            Path | None,
            typer.Option(
                "--refused", metavar="FILE", help="Write the paths of refused files, which may name patients."
            ),
        ] = None,
        workers: Annotated[
            int | None, typer.Option("--workers", min=1, help="Processes.", show_default="one a core, at most 8")
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Look and report; write nothing.", show_default=False)
        ] = False,
        explain: Annotated[
            Path | None,
            typer.Option("--explain", metavar="FILE", help="Say what becomes of one file, attribute by attribute."),
        ] = None,
        show_values: Annotated[
            bool, typer.Option("--show-values", help="With --explain: values, too. They identify.", show_default=False)
        ] = False,
        project: Annotated[
            Path | None, typer.Option("--project", metavar="DIR", help="Use the key and [deidentify] of this project.")
        ] = None,
        json: Json = False,
    ) -> None:
        """De-identify DICOM files by PS3.15 Annex E: a folder in, a folder out, a report. Needs no project.

        The output is PATIENT/STUDY/SERIES/INSTANCE.dcm, all pseudonyms; the input is only read. What cannot be made safe
        is refused, counted and never copied. The same key gives the same pseudonyms in every run: keep it, and keep it
        from who gets the images. Exit code 3 if files were refused.
        """
        recipe = _recipe(
            profile, option or [], pixels, face_cleaner, key, site, project, make=not dry_run and explain is None
        )
        if explain is not None:
            _explain(explain, recipe, values=show_values, json=json)
            return
        if source is None or (target is None and not dry_run):
            raise typer.BadParameter("IN and OUT are missing", param_hint="IN OUT")
        if report is not None and report.suffix not in (".html", ".json"):
            raise SettingsError(
                "a report is .html or .json", expected="--report report.html", got=report.suffix or "none"
            )
        _run(source, None if dry_run else target, recipe, workers, report, refused, json=json)


def _run(
    source: Path,
    target: Path | None,
    recipe: Recipe,
    workers: int | None,
    report: Path | None,
    refused: Path | None,
    *,
    json: bool,
) -> None:
    from radloop.cli.deidentify_report import facts, write
    from radloop.dicom.batch import clean_folder, files_of

    files = files_of(source)
    workers = workers or min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    with output.progress("de-identify") as bar:
        summary = clean_folder(files, target, recipe, workers=workers, progress=bar)
    told = facts(summary, recipe, dry_run=target is None)
    if report is not None:
        write(report, told)
    if refused is not None:
        _write_refused(refused, files, summary)
    if json:
        output.print_json(told)
    else:
        _say(summary, told, report)
    if summary.outcomes["refused"]:
        raise typer.Exit(STOPPED)


def _say(summary: Summary, told: dict[str, Any], report: Path | None) -> None:
    from radloop.cli.deidentify_report import OUTCOMES

    counts = {OUTCOMES[name]: summary.outcomes[name] for name in OUTCOMES} | {"DICOMDIR left out": summary.skipped}
    print(f"{output.plural(summary.files, 'file')}: {output.counts_line(counts)}")
    if told["dry_run"]:
        print("A dry run: nothing was written.")
    done = {"patient": summary.patients, "study": summary.studies, "series": summary.series}
    many = {"study": "studies", "series": "series"}
    print("Of " + ", ".join(output.plural(len(found), name, many.get(name)) for name, found in done.items()))
    rows = [(row["files"], row["reason"], row["what"]) for row in told["refused"]]
    if rows:
        output.print_table("Refused", ["files", "reason", "what was wrong"], rows)
        print("They were not copied. --refused FILE writes which they are.")
    if report is not None:
        print(f"Report: {report}")
    print(f"Key {told['key_id']}: keep it, or later images of these patients will be other patients'.")


def _recipe(
    profile: str | None,
    options: list[str],
    pixels: str | None,
    face_cleaner: str | None,
    key: Path | None,
    site: str,
    project: Path | None,
    *,
    make: bool,
) -> Recipe:
    from radloop.dicom.batch import Recipe
    from radloop.settings import Deidentify, secret
    from radloop.stages.project import face_cleaner_of

    check_code(site, "--site")
    told = Deidentify()
    if project is not None:
        from radloop.cli.common import settings_at

        told = settings_at(project).deidentify
    theirs = None if key is not None else project
    data = _read_key(key or _own_key(), make=make) if theirs is None else secret(told.key, theirs)
    recipe = Recipe(
        key=bytes.fromhex(data.decode()),
        profile=profile or told.profile,
        options=tuple(options or told.options),
        pixels=pixels or told.pixels,  # type: ignore[arg-type] # Pixels checks it
        pixel_rules=told.pixel_rules,
        face_cleaner=face_cleaner_of(
            told.face_cleaner if face_cleaner is None else shlex.split(face_cleaner), told.face_timeout_s
        ),
        site=site,
    )
    recipe.deidentifier()  # whatever is wrong with it, before a file is read
    return recipe


def _own_key() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "radloop" / "deidentify.key"


def _read_key(path: Path, *, make: bool) -> bytes:
    """The key in a file that its owner alone can read, or a new one.

    Raises:
        SettingsError: others can read it, or it is no key.
    """
    if not path.exists():
        data = secrets.token_hex(32).encode()
        if make:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data + b"\n")
                file.flush()
                os.fsync(file.fileno())
            output.say(
                f"A new key: {path}. Keep a copy apart from the images: it alone makes the same pseudonyms again."
            )
        else:
            output.say("There is no key yet: the pseudonyms are those of a key that nobody keeps.")
        return data
    if path.stat().st_mode & 0o077:
        raise SettingsError(
            "the key can be read by others", expected="mode 0600", got=f"{path}", next_step=f"chmod 600 {path}"
        )
    data = path.read_bytes().strip()
    try:
        bytes.fromhex(data.decode())
    except ValueError:
        raise SettingsError("that file is no key", expected="64 hexadecimal digits", got=f"{path}") from None
    return data


def _write_refused(path: Path, files: Files, summary: Summary) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", errors="surrogateescape") as file:
        file.writelines(f"{reason}\t{files.paths[number - 1]}\n" for number, reason in summary.refused)


def _explain(file: Path, recipe: Recipe, *, values: bool, json: bool) -> None:
    from radloop.dicom.deidentify import read
    from radloop.dicom.explain import explain

    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError("the file cannot be read", got=error.strerror) from None
    rows = explain(read(data), recipe.deidentifier(), site=recipe.site, values=values)
    if json:
        output.print_json([_plain(row, values) for row in rows])
        return
    for row in rows:
        print(f"{row.action:<11}  {row.vr:<2}  {row.path}  ({row.why})")
        if values:
            print(f"{'':15}  {row.before} -> {row.after}")


def _plain(row: Any, values: bool) -> dict[str, str]:
    import msgspec

    plain: dict[str, str] = msgspec.to_builtins(row)
    return plain if values else {name: value for name, value in plain.items() if name not in ("before", "after")}

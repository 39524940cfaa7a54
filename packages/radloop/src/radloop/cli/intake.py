"""`radloop listen`, `ingest`, `import-images`: how images come in."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, catalog_at, check_code, command, settings_at
from radloop.errors import SettingsError

if TYPE_CHECKING:
    from radloop.dicom.landing import Landing
    from radloop.dicom.listener import Listener
    from radloop.settings import Settings

_LOOK_EVERY_S = 0.25
_DRAIN_S = 30.0


def register(app: typer.Typer) -> None:
    """Add `listen`, `ingest` and `import-images`."""

    @command(
        app,
        "listen",
        examples=("radloop listen", "radloop listen --port 0 --ready-file /run/radloop/listen.json"),
        after="send to it from a PACS or a modality; then `radloop run prepare` in another terminal.",
    )
    def listen(
        port: Annotated[
            int | None, typer.Option("--port", help="Instead of [listen] port; 0: any free one.", show_default=False)
        ] = None,
        ready_file: Annotated[
            Path | None, typer.Option("--ready-file", help="JSON with host, port, pid, written once it listens.")
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Receive images by C-STORE until Ctrl-C or SIGTERM.

        Senders are those of [listen.senders] in radloop.toml; others are rejected. Success is answered when an image
        is on disk and in the catalog. What cannot be used is kept in quarantine with its reason, never dropped. On
        SIGTERM, associations under way may end.
        """
        listen_until_stopped(project, settings_at(project), port=port, ready_file=ready_file, json=json)

    @command(
        app,
        "ingest",
        examples=("radloop ingest /media/export --site site-a",),
        after="`radloop labels import` brings labels; `radloop run prepare` makes a dataset version.",
    )
    def ingest(
        folder: Annotated[Path, typer.Argument(help="A folder of DICOM files, with sub-folders.", show_default=False)],
        site: Annotated[str, typer.Option("--site", metavar="CODE", help="Code of the site the files come from.")],
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Take in a folder of DICOM now. The same folder again takes in what is new, and nothing twice.

        Files are copied; the folder is left as it is. A file's path below the folder can key its label.
        """
        settings_at(project)
        check_code(site, "--site")
        with landing_at(project) as landing, output.progress("ingest") as progress:
            report = landing.receive_folder(folder, site=site, progress=progress)
        _say_report({"files": report.files}, report.outcomes, report.reasons, json=json, empty_is="no file was new")

    @command(
        app,
        "import-images",
        examples=(
            "radloop import-images xrays --manifest xrays.csv --modality DX --patient patient_key --site public",
            "radloop import-images xrays --manifest xrays.csv --modality DX --patient id --file path --age age --sex sex",
        ),
        after="`radloop labels import MANIFEST --key file --key-column COLUMN --value-column COLUMN`.",
    )
    def import_images(
        folder: Annotated[Path, typer.Argument(help="The folder the manifest's paths start from.", show_default=False)],
        manifest: Annotated[
            Path, typer.Option("--manifest", metavar="CSV", help="One row an image.", exists=True, dir_okay=False)
        ],
        modality: Annotated[str, typer.Option("--modality", help="What the images are: DX, CR, CT, ...")],
        patient: Annotated[str, typer.Option("--patient", metavar="COLUMN", help="Column with the patient's key.")],
        file: Annotated[str, typer.Option("--file", metavar="COLUMN", help="Column with the image's path.")] = "file",
        study: Annotated[
            str | None, typer.Option("--study", metavar="COLUMN", help="Column with a study's key.")
        ] = None,
        age: Annotated[
            str | None, typer.Option("--age", metavar="COLUMN", help="Column with the age in years.")
        ] = None,
        sex: Annotated[
            str | None, typer.Option("--sex", metavar="COLUMN", help="Column with the sex (M, F, O).")
        ] = None,
        view: Annotated[
            str | None, typer.Option("--view", metavar="COLUMN", help="Column with the view position (PA, AP, ...).")
        ] = None,
        site: Annotated[
            str, typer.Option("--site", metavar="CODE", help="Code of the site the images come from.")
        ] = "import",
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Wrap JPEG and PNG images as DICOM (Secondary Capture) and take them in.

        Nothing is invented: no spacing, no DX attributes. What was lossy says so, EXIF is dropped, and the images are
        marked as radloop's import. RGB with equal channels is reduced to one; other colour is refused.
        """
        settings_at(project)
        check_code(site, "--site")
        from radloop.dicom.wrap import Columns, wrap_folder

        columns = Columns(file=file, patient=patient, study=study, sex=sex, age=age, view=view)
        with landing_at(project) as landing, output.progress("import") as progress:
            report = wrap_folder(
                landing, folder, manifest, modality=modality, site=site, columns=columns, progress=progress
            )
        if report.files_without_row:
            output.say(f"{output.plural(report.files_without_row, 'image')} in the folder have no row in the manifest")
        files = {"files": report.rows, "files_without_row": report.files_without_row}
        _say_report(files, report.outcomes, report.reasons, json=json, empty_is="no image was new")


@contextmanager
def landing_at(project: Path) -> Iterator[Landing]:
    """The project's landing folder, brought in order after a kill."""
    from radloop.stages.project import open_landing

    with catalog_at(project) as catalog:
        landing = open_landing(project, catalog)
        landing.recover()
        yield landing


def listen_until_stopped(
    project: Path, settings: Settings, *, port: int | None, ready_file: Path | None, json: bool
) -> None:
    """Receive until a signal says stop.

    Raises:
        SettingsError: no sender is configured.
        EngineError: the port is busy.
    """
    from radloop.cli.foreground import announced, ending_with
    from radloop.dicom.listener import Listener

    if not settings.listen.senders:
        raise SettingsError(
            "nobody may send to this listener",
            expected="the calling AE titles of your modalities or PACS, each with a site code",
            got="an empty [listen.senders]",
            next_step='add a line such as CT1 = "site-a" under [listen.senders] in radloop.toml',
        )
    stop = threading.Event()
    with landing_at(project) as landing, ending_with(stop.set):
        listener = Listener(
            landing,
            ae_title=settings.listen.ae_title,
            sites=settings.listen.senders,
            host=settings.listen.host,
            port=settings.listen.port if port is None else port,
        )
        bound = listener.start()
        try:
            with announced(ready_file, settings.listen.host, bound):
                _say_listening(settings, bound, json=json)
                _watch(listener, stop, quiet=json)
        finally:
            listener.stop(grace_s=_DRAIN_S)
            landing.seal(actor="listen")
    if json:
        output.print_json({"ended": True, "host": settings.listen.host, "port": bound, "counts": listener.counts})
    else:
        print(f"radloop listen: ended; {output.counts_line(listener.counts)}")


def _say_listening(settings: Settings, port: int, *, json: bool) -> None:
    told = settings.listen
    known = ", ".join(f"{title} ({site})" for title, site in told.senders.items())
    line = f"radloop listen: {told.ae_title} at {told.host}:{port}; known senders: {known}; Ctrl-C ends it"
    print(line, file=sys.stderr if json else sys.stdout, flush=True)


def _watch(listener: Listener, stop: threading.Event, *, quiet: bool) -> None:
    """Counts by outcome: one living line on a terminal, else a line whenever they have changed for a while."""
    if quiet:
        stop.wait()
        return
    if sys.stdout.isatty():
        with output.console().status("waiting") as line:
            while not stop.wait(_LOOK_EVERY_S):
                line.update(f"received: {output.counts_line(listener.counts)}")
        return
    said = before = listener.counts
    while not stop.wait(1.0):
        now = listener.counts
        if now == before and now != said:  # a lull after something came
            print(output.counts_line(now), flush=True)
            said = now
        before = now


def _say_report(
    files: dict[str, int], outcomes: dict[str, int], reasons: dict[str, int], *, json: bool, empty_is: str
) -> None:
    """What became of a folder: how many files, by outcome, and by reason of quarantine."""
    if json:
        output.print_json({**files, "outcomes": outcomes, "reasons": reasons})
        return
    print(f"{output.plural(files['files'], 'file')}: {output.counts_line(outcomes)}")
    if reasons:
        print(f"In quarantine: {output.counts_line(reasons)}\nNext: radloop quarantine list")
    elif not outcomes.get("new") and not outcomes.get("revision"):
        print(empty_is)
    else:
        print("Next: radloop run prepare")

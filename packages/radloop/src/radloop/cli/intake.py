"""`radloop listen`, `ingest`, `import-images`: how images come in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, catalog_at, check_code, command, settings_at

if TYPE_CHECKING:
    from radloop.dicom.landing import Landing


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
        """Receive images by C-STORE, and by STOW-RS where [listen.stow] says so, until Ctrl-C or SIGTERM.

        Senders are those of [listen.senders] in radloop.toml; others are rejected. Success is answered when an image
        is on disk and in the catalog. What cannot be used is kept in quarantine with its reason, never dropped. On
        SIGTERM, associations under way may end. A study counts as complete when nothing of it has come for [ingest] quiet_s
        seconds.
        """
        from radloop.cli.listen import listen_until_stopped

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

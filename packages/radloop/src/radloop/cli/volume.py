"""`radloop volume`: what volumes a folder holds, and NIfTI files of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import STOPPED, Json, command
from radloop.errors import DataError, VolumeError

if TYPE_CHECKING:
    from radloop.imaging.volume import Part


def register(app: typer.Typer) -> None:
    """Add `volume`."""

    @command(
        app,
        "volume",
        examples=("radloop volume clean/P1/study", "radloop volume clean/P1/study --out nifti/"),
        after="docs/volumes.md says what each refusal means; `radloop.imaging.volume` is the same from Python.",
    )
    def volume(
        source: Annotated[
            Path, typer.Argument(metavar="IN", help="A folder of DICOM files of any depth, or one file.")
        ],
        out: Annotated[
            Path | None, typer.Option("--out", metavar="DIR", help="Write each volume there as NIfTI, 1.nii.gz and on.")
        ] = None,
        json: Json = False,
    ) -> None:
        """Say which volumes a folder holds, and why other images make none. Needs no project.

        NIfTI files hold the values in their unit (HU for CT) and the place in RAS mm. Exit code 3 if there is no volume.
        """
        from radloop.dicom.batch import files_of
        from radloop.imaging.volume import split_series

        files = files_of(source)
        rows = []
        for number, part in enumerate(split_series([files.root / path for path in files.paths]), 1):
            rows.append(_row(part, None if out is None else out / f"{number}.nii.gz"))
        if json:
            output.print_json(rows)
        else:
            _say(rows)
        if not any("shape" in row for row in rows):
            raise typer.Exit(STOPPED)


def _row(part: Part, file: Path | None) -> dict[str, Any]:
    """What a part is; written to the file, if it is a volume that NIfTI can hold."""
    from radloop.imaging.volume import write_nifti

    row: dict[str, Any] = {"images": len(part.sources), "told_by": part.told_by}
    try:
        volume = part.load()
    except VolumeError as error:
        return {**row, "refused": error.refusal, "why": error.what, "expected": error.expected, "got": error.got}
    row |= {
        "modality": volume.modality,
        "shape": list(volume.array.shape),
        "spacing_mm": [round(length, 6) for length in volume.spacing_mm],
        "unit": volume.rescale_type,
        "affine_lps": volume.affine.round(6).tolist(),
    }
    if file is not None and volume.array.ndim == 3:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(file, volume.rescaled().swapaxes(0, 2), volume.nifti()[1])
        except OSError as error:
            raise DataError("the volume cannot be written", got=error.strerror) from None
        row["file"] = file.name
    return row


def _say(rows: list[dict[str, Any]]) -> None:
    found = [row for row in rows if "shape" in row]
    columns = ["images", "modality", "slices, rows, columns", "spacing mm", "unit", "told by", "file"]
    lines = [
        (
            row["images"],
            row["modality"],
            " x ".join(map(str, row["shape"])),
            " x ".join(f"{length:.3f}" for length in row["spacing_mm"]),
            row["unit"],
            ", ".join(f"{name} {value}" for name, value in row["told_by"].items()),
            row.get("file"),
        )
        for row in found
    ]
    output.print_table("Volumes", columns, lines)
    refused = [(r["images"], r["refused"], r["why"], r["expected"], r["got"]) for r in rows if "refused" in r]
    if refused:
        output.print_table("No volumes", ["images", "refused as", "why", "expected", "got"], refused)

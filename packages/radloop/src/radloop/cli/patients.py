"""`radloop patients`: which patients are one person, and what that means for the data that models learnt from."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.artifact import file_digest
from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, actor, catalog_at, check_code, command, group, settings_at, short
from radloop.errors import DataError, DicomError

if TYPE_CHECKING:
    from radloop.catalog.patients import Linked
    from radloop.catalog.store import Catalog
    from radloop.dicom.uids import Pseudonymiser
    from radloop.settings import Settings

REQUIRED = ("patient_id_a", "patient_id_b")
OPTIONAL = ("issuer_a", "issuer_b", "reason")
_REASON = re.compile(r"[A-Za-z][A-Za-z ._-]{0,63}")  # no digit: an identifier typed there would stay for ever
_Pair = tuple[str, str, str]

By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")]
Csv = Annotated[
    Path, typer.Argument(metavar="CSV", help="One pair of identities a row; UTF-8.", exists=True, dir_okay=False)
]
Site = Annotated[str | None, typer.Option("--site", metavar="CODE", help="Site of identities that name no issuer.")]


def register(app: typer.Typer) -> None:
    """Add `patients link`, `unlink` and `list`."""
    patients = group(app, "patients", "Which patients are one person.")

    @command(
        patients,
        "link",
        examples=("radloop patients link merged.csv --site site-a",),
        after="`radloop run prepare`: a dataset version in which each person stands in one part.",
    )
    def link(file: Csv, site: Site = None, by: By = None, project: Project = HERE, json: Json = False) -> None:
        """Say that pairs of patient identities are one person each: double registrations, mergers of hospitals.

        Columns: patient_id_a, patient_id_b, and if you like issuer_a, issuer_b (IssuerOfPatientID, or the code of a site; empty:
        --site) and reason (a few words without digits, such as "double registration"; no patient's data). Identities are turned
        into pseudonyms at once and never stored.

        Pseudonyms stay; from now on the linked have one part of the split: train if one of them was learnt from. The leakage gate
        is asked again about every dataset version: where one person stands in two parts, it and its models are flagged.
        """
        settings, name = settings_at(project), actor(by)
        with catalog_at(project) as catalog:
            pairs = read_pairs(project, settings, catalog, file, site)
            done = catalog.link(pairs, by=name)
            _audit(catalog, "link", file, len(pairs), name)
            told = _told(catalog, done, pairs)
        if json:
            output.print_json(told)
        else:
            _say(told)

    @command(
        patients,
        "unlink",
        examples=("radloop patients unlink wrong.csv --site site-a",),
        after="`radloop patients list`.",
    )
    def unlink(file: Csv, site: Site = None, by: By = None, project: Project = HERE, json: Json = False) -> None:
        """Take links back that were wrong; columns as in `patients link`.

        Parts stay as they are: a model may have learnt from both meanwhile.
        """
        settings, name = settings_at(project), actor(by)
        with catalog_at(project) as catalog:
            pairs = read_pairs(project, settings, catalog, file, site)
            gone = sum(catalog.unlink(a, b, by=name, reason=reason) for a, b, reason in pairs)
            _audit(catalog, "unlink", file, len(pairs), name)
        if json:
            output.print_json({"unlinked": gone, "not_linked": len(pairs) - gone})
        else:
            print(f"{output.plural(gone, 'link')} taken back; {len(pairs) - gone} were not linked")

    @command(
        patients, "list", examples=("radloop patients list", "radloop patients list --json"), after="`radloop status`."
    )
    def list_(project: Project = HERE, json: Json = False) -> None:
        """List linked patients by pseudonym, with their part, who linked them and why."""
        with catalog_at(project) as catalog:
            links, parts, persons = catalog.links(), catalog.parts(), catalog.persons()
        if json:
            output.print_json({"links": links, "persons": persons})
            return
        columns = ["patient", "is also", "part", "reason", "by", "since"]
        rows = [
            (short(r.patient_a), short(r.patient_b), parts.get(r.patient_a, "none yet"), r.reason, r.by, r.linked_at[:19])
            for r in links
        ]  # fmt: skip
        output.print_table("Linked patients", columns, rows)


def read_pairs(project: Path, settings: Settings, catalog: Catalog, file: Path, site: str | None) -> list[_Pair]:
    """The pairs of a file as pseudonyms, with the reason of each.

    Raises:
        DataError: the file cannot be read, a column is missing, an identity is blank or a placeholder,
            or its issuer is not known.
            Lines are named, values never are.
    """
    from radloop.stages.project import pseudonymiser

    if site is not None:
        check_code(site, "--site")
    known = sorted(catalog.counts())
    default = site or (known[0] if len(known) == 1 else "")
    key = pseudonymiser(project, settings.deidentify.key)
    pairs = [_pair(key, line, row, default) for line, row in _rows(file)]
    if not pairs:
        raise DataError("the file has no rows", expected="one pair of identities a row", got="none")
    return pairs


def _pair(key: Pseudonymiser, line: int, row: dict[str, str], default: str) -> _Pair:
    found = []
    for end in ("a", "b"):
        issuer = row.get(f"issuer_{end}") or default
        if not issuer:
            raise DataError(
                f"line {line}: it is not known who issued patient_id_{end}",
                expected=f"a value in issuer_{end}, or --site",
                next_step="images come from several sites here: name the one that gave these identities",
            )
        try:
            found.append(key.patient(row[f"patient_id_{end}"], issuer))
        except DicomError as error:
            raise DataError(f"line {line}: patient_id_{end} names no patient", got=error.got) from None
    reason = row.get("reason") or "merged"
    if not _REASON.fullmatch(reason):
        raise DataError(
            f"line {line}: the reason cannot be kept",
            expected="up to 64 letters, spaces, '.', '_' and '-': a few words without a patient's data",
            next_step='write what kind of link it is, such as "double registration"',
        )
    return found[0], found[1], reason


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            first = handle.readline()
            handle.seek(0)
            reader = csv.reader(handle, delimiter=max(",;\t", key=first.count), strict=True)
            header = [name.strip().casefold() for name in next(reader, [])]
            if missing := [name for name in REQUIRED if name not in header]:
                raise DataError(
                    f"the file has no column {missing[0]!r}",
                    expected=f"columns {', '.join(REQUIRED)}; optional: {', '.join(OPTIONAL)}",
                    got=f"{len(header)} columns",
                    next_step="radloop patients link --help",
                )
            for row in reader:
                if len(row) == len(header):
                    yield reader.line_num, {name: value.strip() for name, value in zip(header, row, strict=True)}
                elif row:
                    raise DataError(
                        f"line {reader.line_num} has another number of columns", expected=len(header), got=len(row)
                    )
    except UnicodeDecodeError:
        raise DataError("the file is no UTF-8 text", next_step="save it as CSV UTF-8") from None
    except csv.Error:
        raise DataError("the file is no CSV", expected="CSV (RFC 4180)", got=f"line {reader.line_num}") from None


def _audit(catalog: Catalog, action: str, file: Path, pairs: int, by: str) -> None:
    from radloop.catalog.audit import record

    record(
        catalog.ledger, f"patients {action}", "patients", actor=by, detail={"pairs": pairs, "file": file_digest(file)}
    )


def _told(catalog: Catalog, done: Linked, pairs: list[_Pair]) -> dict[str, Any]:
    numbers = {version.digest: version.number for version in catalog.datasets()}
    versions = {model.digest: model.version or short(model.digest) for model in catalog.models()}
    identities = {one for a, b, _ in pairs for one in (a, b)}
    return {
        "linked": done.new,
        "known": done.known,
        "without_image": len(identities - catalog.known_patients(identities)),
        "moved": {patient: list(way) for patient, way in done.moved.items()},
        "flagged_datasets": [numbers[digest] for digest in done.datasets],
        "flagged_models": [versions[digest] for digest in done.models],
    }


def _say(told: dict[str, Any]) -> None:
    print(f"{output.plural(told['linked'], 'pair')} linked, {told['known']} known already")
    if told["without_image"]:
        some = output.plural(told["without_image"], "identity has", "identities have")
        print(f"{some} no image here (yet): check issuer and spelling if that surprises you")
    if told["moved"]:
        print(f"{output.plural(len(told['moved']), 'patient')} moved to the part of the person they are")
    if told["flagged_datasets"]:
        versions = ", ".join(map(str, told["flagged_datasets"]))
        print(f"The leakage gate refuses dataset version {versions}: one person stands in several parts. Flagged.")
    if told["flagged_models"]:
        models = ", ".join(map(str, told["flagged_models"]))
        print(
            f"Flagged too: model {models}. Their test figures hold patients that they learnt from: do not rely on them."
        )
    if told["linked"]:
        print("Next: radloop run prepare, then radloop run develop; both leave out nothing and mix up nobody")

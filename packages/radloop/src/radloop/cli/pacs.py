"""`radloop pacs echo`, `find`, `fetch`: what a PACS has, and bringing it here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import FAILED, HERE, Json, Project, actor, catalog_at, command, group, settings_at
from radloop.cli.intake import landing_at

if TYPE_CHECKING:
    from radloop.dicom.pacs import Query, StudyFound
    from radloop.dicom.pacs.fetch import Report

_Name = Annotated[str, typer.Argument(metavar="NAME", help="A PACS of [pacs] in radloop.toml.", show_default=False)]
_Modality = Annotated[
    list[str] | None, typer.Option("--modality", metavar="CODE", help="CT, MR, DX, ...; several times: any of them.")
]
_From = Annotated[str, typer.Option("--from", metavar="DAY", help="StudyDate: 2026-01-31, or 30d: days before today.")]
_To = Annotated[str, typer.Option("--to", metavar="DAY", help="The last day, included.")]
_Description = Annotated[
    str,
    typer.Option("--description", metavar="TEXT", help='StudyDescription, such as "*thorax*"; case does not count.'),
]
_Accessions = Annotated[
    str, typer.Option("--accessions", metavar="FILE|LIST", help="Accession numbers: one a line, or with commas.")
]
_Patients = Annotated[str, typer.Option("--patients", metavar="FILE|LIST", help="PatientIDs, likewise.")]
_Studies = Annotated[str, typer.Option("--studies", metavar="FILE|LIST", help="StudyInstanceUIDs, likewise.")]
_Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="At most so many studies.", min=1)]


def register(app: typer.Typer) -> None:
    """Add `pacs`."""
    pacs = group(app, "pacs", "Find studies in a PACS and fetch them.")
    _register_echo(pacs)
    _register_find(pacs)
    _register_fetch(pacs)


def _register_echo(pacs: typer.Typer) -> None:
    @command(pacs, "echo", examples=("radloop pacs echo main",), after="radloop pacs find NAME --from 7d")
    def echo(name: _Name, project: Project = HERE, json: Json = False) -> None:
        """Ask a PACS whether it is there and knows us (C-ECHO; a search for one study, by DICOMweb)."""
        import time

        from radloop.stages.project import open_pacs

        settings_at(project)
        with open_pacs(project, name) as peer:
            begun = time.perf_counter()
            peer.echo()
            took_ms = round((time.perf_counter() - begun) * 1000)
        if json:
            output.print_json({"pacs": name, "answered_ms": took_ms})
        else:
            print(f"{name} answers, in {took_ms} ms")


def _register_find(pacs: typer.Typer) -> None:
    @command(
        pacs,
        "find",
        examples=(
            "radloop pacs find main --modality CT --from 7d",
            'radloop pacs find main --from 2026-01-01 --to 2026-01-31 --description "*thorax*"',
            "radloop pacs find main --accessions reads.txt --json",
        ),
        after="the same filters with `radloop pacs fetch`.",
    )
    def find(
        name: _Name,
        modality: _Modality = None,
        begin: _From = "",
        end: _To = "",
        description: _Description = "",
        accessions: _Accessions = "",
        patients: _Patients = "",
        studies: _Studies = "",
        limit: _Limit = None,
        by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who asks, for the ledger.")] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """List the studies of a PACS that fit. What is shown identifies patients: the ledger notes who asked.

        Give dates: a search without them makes some PACS list everything.
        """
        from itertools import islice

        from radloop.dicom.pacs.fetch import audit
        from radloop.stages.project import open_pacs

        query = _query(modality, begin, end, description, accessions, patients, studies)
        with catalog_at(project) as catalog, open_pacs(project, name) as peer:
            audit(catalog, peer, "pacs find", query, actor=actor(by))
            found = sorted(islice(peer.find(query), limit), key=lambda one: (one.study_date, one.study_time))
        _show(found, json=json)


def _register_fetch(pacs: typer.Typer) -> None:
    @command(
        pacs,
        "fetch",
        examples=(
            "radloop pacs fetch main --modality CT --from 30d --dry-run",
            "radloop pacs fetch main --accessions reads.txt",
        ),
        after="radloop run prepare",
    )
    def fetch(
        name: _Name,
        modality: _Modality = None,
        begin: _From = "",
        end: _To = "",
        description: _Description = "",
        accessions: _Accessions = "",
        patients: _Patients = "",
        studies: _Studies = "",
        limit: _Limit = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much it would be; fetch nothing.")] = False,
        by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who asks, for the ledger.")] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Fetch the studies of a PACS that fit, as `ingest` does for [[ingest.pacs]]. Only what is not here yet.

        Stopped in whatever way, the same again goes on where it was. A study that has grown gives what is new of it. Rate
        and hours are those of [pacs.NAME]. Exit code 1 if instances are still missing after several tries.
        """
        query = _query(modality, begin, end, description, accessions, patients, studies)
        settings_at(project)
        who = actor(by)
        if dry_run:
            _would_fetch(project, name, query, who, limit=limit, json=json)
            return
        report = _fetch(project, name, query, who, limit=limit)
        _say(report, json=json)
        if report.missing:
            raise typer.Exit(FAILED)


def _query(
    modality: list[str] | None, begin: str, end: str, description: str, accessions: str, patients: str, studies: str
) -> Query:
    from radloop.dicom.pacs.search import read_query

    return read_query(
        modalities=[one for given in modality or [] for one in given.split(",")],
        begin=begin,
        end=end,
        description=description,
        accessions=accessions,
        patient_ids=patients,
        study_uids=studies,
    )


def _fetch(project: Path, name: str, query: Query, who: str, *, limit: int | None) -> Report:
    from radloop.dicom.pacs.fetch import fetch
    from radloop.stages.project import fetch_target, open_catalog, open_pacs

    with (
        open_pacs(project, name) as peer,
        open_catalog(project) as catalog,
        landing_at(project) as landing,
        output.progress(f"fetch from {name}") as progress,
    ):
        target = fetch_target(project, name, landing, catalog)
        try:
            return fetch(peer, query, target, actor=who, limit=limit, progress=progress)
        finally:
            landing.seal(actor="pacs")


def _would_fetch(project: Path, name: str, query: Query, who: str, *, limit: int | None, json: bool) -> None:
    from itertools import islice

    from radloop.dicom.pacs.fetch import audit
    from radloop.stages.project import open_catalog, open_pacs, pseudonymiser

    with open_catalog(project) as catalog, open_pacs(project, name) as peer:
        audit(catalog, peer, "pacs find", query, actor=who)
        found = list(islice(peer.find(query), limit))
        known = catalog.fetched(name)
    pseudonym = pseudonymiser(project, settings_at(project).deidentify.key).uid
    here = sum(
        (done := known.get(pseudonym(study.study_uid))) is not None
        and not done.missing
        and done.listed == study.instances
        for study in found
    )
    instances = sum(study.instances or 0 for study in found)
    unsaid = sum(study.instances is None for study in found)
    if json:
        output.print_json({"studies": len(found), "unchanged": here, "instances": instances, "not_counted": unsaid})
        return
    print(
        f"{output.plural(len(found), 'study', 'studies')}, {here:,} of them here and unchanged; {instances:,} instances"
    )
    if unsaid:
        print(f"{output.plural(unsaid, 'study', 'studies')} whose instances the PACS does not count")


def _show(found: list[StudyFound], *, json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "date": one.study_date,
            "time": one.study_time[:6],
            "modalities": "\\".join(one.modalities),
            "description": one.description,
            "accession": one.accession,
            "patient_id": one.patient_id,
            "patient_name": one.patient_name,
            "instances": one.instances,
            "study_uid": one.study_uid,
        }
        for one in found
    ]
    if json:
        output.print_json(rows)
        return
    columns = ["date", "modalities", "description", "accession", "patient_id", "patient_name", "instances", "study_uid"]
    output.print_table("Studies", columns, [[row[name] for name in columns] for row in rows])
    if rows:
        print(f"{output.plural(len(rows), 'study', 'studies')}")


def _say(report: Report, *, json: bool) -> None:
    import msgspec

    if json:
        output.print_json(msgspec.to_builtins(report))
        return
    print(report.summary)
    if report.outcomes:
        print(f"Landing: {output.counts_line(report.outcomes)}")
    if report.reasons:
        print(f"In quarantine: {output.counts_line(report.reasons)}\nNext: radloop quarantine list")
    if report.missing:
        print("Next: the same again asks for what is missing; if it stays so, the PACS cannot send it (see its log)")
    elif report.left:
        print("Next: the same again fetches what is left")
    elif report.fetched and not report.reasons:
        print("Next: radloop run prepare")

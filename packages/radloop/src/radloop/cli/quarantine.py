"""`radloop quarantine`: what was refused, why, and what a person decides about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radloop.cli import output
from radloop.cli.common import FAILED, HERE, Json, Project, actor, catalog_at, command, group, settings_at, short
from radloop.errors import DataError, RadloopError

if TYPE_CHECKING:
    from radloop.catalog.schema import Quarantined
    from radloop.dicom.landing import Landing, Outcome

MEANING = {
    "NOT_DICOM": "the file is no DICOM",
    "TRUNCATED": "the file ends too early",
    "UNKNOWN_TRANSFER_SYNTAX": "its transfer syntax is not known",
    "NO_PATIENT_ID": "PatientID is empty or a placeholder: its patient cannot be told from others",
    "MISSING_UID": "a UID that identifies it is missing",
    "UID_CONFLICT": "its SOPInstanceUID is known, with other pixels",
    "NO_PIXELS": "it has no image",
    "PIXELS_UNDECODABLE": "its pixel data cannot be decoded",
    "UNEXPECTED_SOP_CLASS": "its SOP class is not one of [accept] sop_classes",
    "UNEXPECTED_MODALITY": "its modality is not one of [accept] modalities",
    "BAD_GEOMETRY": "rows, columns or spacing contradict each other",
    "BAD_WINDOW": "its window is impossible",
    "DUPLICATE_PIXELS": "the same pixels are there under another UID",
    "DUPLICATE_PIXELS_ACROSS_PATIENTS": "the same pixels are there for another patient",
    "EMPTY_IMAGE": "the image is empty",
    "SATURATED_IMAGE": "most pixels are at the limit of the scale",
    "PHI_FOUND": "identifying text was left after de-identification",
    "BURNED_IN_DECLARED": "it declares identifying text in the pixels",
    "BURNED_IN_TEXT": "text was found in its pixels",
    "UNSUPPORTED_OBJECT": "objects of this kind cannot be handled",
    "WITHDRAWN": "a rejection note names it: whoever made it says that nobody should use it",
    "RECOGNIZABLE_FACE": "the images may show a face, and the project asks that none does",
    "MULTI_CHANNEL": "it has colour channels that differ",
    "MULTI_FRAME": "it has several frames",
    "UNSUPPORTED_IMAGE": "it cannot be wrapped as DICOM without inventing something",
    "SCHEMA_ANOMALY": "its tags break the validation's schema",
}
"""What each reason means, for whoever reads `quarantine show`."""

Ids = Annotated[list[int], typer.Argument(metavar="ID...", help="Numbers from `radloop quarantine list`.")]
By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")]


def register(app: typer.Typer) -> None:
    """Add `quarantine list`, `show`, `retry`, `release` and `purge`."""
    quarantine = group(app, "quarantine", "What was refused, why, and what a person decides about it.")

    @command(
        quarantine,
        "list",
        examples=("radloop quarantine list", "radloop quarantine list --reason UID_CONFLICT"),
        after="`radloop quarantine show ID` says what each is; retry, release or purge decide it.",
    )
    def list_(
        reason: Annotated[str | None, typer.Option("--reason", help="Only entries held for this reason.")] = None,
        settled: Annotated[bool, typer.Option("--all", help="Also what was retried, released or purged.")] = False,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """List what is held, with counts by reason. No name, no original identifier and no file name is shown."""
        from radloop.catalog.reason import Reason

        if reason is not None and reason.upper() not in list(Reason):
            raise DataError("there is no such reason", expected=", ".join(Reason), got=reason)
        wanted = None if reason is None else Reason(reason.upper())
        with catalog_at(project) as catalog:
            rows = catalog.quarantined(state=None if settled else "held", reason=wanted)
        counts = dict(sorted(Counter(str(row.reason) for row in rows).items()))
        if json:
            output.print_json({"counts": counts, "entries": [_plain(row) for row in rows]})
            return
        output.print_table(
            "Quarantine", ["entries", "reason", "meaning"], [(n, r, MEANING[r]) for r, n in counts.items()]
        )
        if rows:
            columns = ["id", "reason", "stage", "site", "since", "state", "instance"]
            lines = [
                (r.id, r.reason, r.stage, r.site, r.created_at[:19], r.state, (r.sop_uid or "")[-12:]) for r in rows
            ]
            output.print_table("Entries", columns, lines)

    @command(
        quarantine,
        "show",
        examples=("radloop quarantine show 7",),
        after="`radloop quarantine retry 7`, `release 7` or `purge 7`.",
    )
    def show(
        entry: Annotated[int, typer.Argument(metavar="ID", help="Number from `radloop quarantine list`.")],
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Show one entry: what was wrong, at which stage, and what can be done."""
        from radloop.catalog.audit import record
        from radloop.catalog.reason import RELEASABLE

        with catalog_at(project) as catalog:
            row = catalog.quarantine_row(entry)
            record(catalog.ledger, "quarantine show", "quarantine", actor=actor(), detail={"id": entry})
        if json:
            output.print_json({**_plain(row), "meaning": MEANING[row.reason], "releasable": row.reason in RELEASABLE})
            return
        output.print_pairs(
            f"Quarantine entry {row.id}",
            [
                ("reason", f"{row.reason}: {MEANING[row.reason]}"),
                ("detail", row.detail),
                ("stage", row.stage),
                ("site", row.site),
                ("since", row.created_at[:19]),
                ("state", row.state + (f" by {row.by}" if row.by else "")),
                ("instance", row.sop_uid),
                ("identity", f"sha256 {row.source_sha256}, of transfer syntax and data set if it is DICOM"),
                ("release", "possible" if row.reason in RELEASABLE else "not possible: it cannot be used as it is"),
            ],
        )

    @command(
        quarantine,
        "retry",
        examples=("radloop quarantine retry 7 8 9",),
        after="`radloop run prepare`: what was taken back in is looked at anew.",
    )
    def retry(ids: Ids, by: By = None, project: Project = HERE, json: Json = False) -> None:
        """Look at entries anew, after radloop or its settings were corrected. Held again if the reason still stands."""

        def again(landing: Landing, entry: int, name: str) -> str:
            outcome = landing.retry(entry, by=name)
            _use_now(landing, outcome, name)
            return f"held again: {outcome.reason}" if outcome.reason else "taken back in"

        _decide(project, ids, by, json, again)

    @command(
        quarantine,
        "release",
        examples=("radloop quarantine release 7 --by 'A. Ito'",),
        after="`radloop run prepare`.",
    )
    def release(
        entry: Annotated[int, typer.Argument(metavar="ID", help="Number from `radloop quarantine list`.")],
        by: By = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Use an entry although it was refused. You answer for it: your name stands in the ledger.

        Of two instances with one UID and different pixels, the released one replaces the other. What has no patient,
        no pixels or identifying text cannot be released.
        """

        def use(landing: Landing, number: int, name: str) -> str:
            _use_now(landing, landing.release(number, by=name), name)
            return "in use"

        _decide(project, [entry], by, json, use)

    @command(
        quarantine,
        "purge",
        examples=("radloop quarantine purge 7",),
        after="nothing: the bytes are gone; that they were there, and who removed them, stays in the ledger.",
    )
    def purge(
        entry: Annotated[int, typer.Argument(metavar="ID", help="Number from `radloop quarantine list`.")],
        by: By = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Remove an entry's bytes for good."""

        def remove(landing: Landing, number: int, name: str) -> str:
            landing.purge(number, by=name)
            return "purged"

        _decide(project, [entry], by, json, remove)


def _use_now(landing: Landing, outcome: Outcome, by: str) -> None:
    """What a person has taken back in does not wait until its study is quiet."""
    if outcome.reason is None and outcome.sop_uid is not None:
        landing.use_now(outcome.sop_uid, by=by)


def _decide(project: Any, ids: list[int], by: str | None, json: bool, act: Callable[[Landing, int, str], str]) -> None:
    """Do one thing to each entry; those for which it fails are named, and the exit code is 1."""
    from radloop.cli.intake import landing_at

    settings_at(project)
    name = actor(by)
    done: list[dict[str, Any]] = []
    with landing_at(project) as landing:
        for number in ids:
            try:
                done.append({"id": number, "outcome": act(landing, number, name)})
            except RadloopError as error:
                if len(ids) == 1:
                    raise
                done.append({"id": number, "error": str(error)})
    if json:
        output.print_json(done)
    else:
        for line in done:
            print(f"{line['id']}: {line.get('outcome') or line['error']}")
    if any("error" in line for line in done):
        raise typer.Exit(FAILED)


def _plain(row: Quarantined) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(row)
    return plain | {"source_sha256": short(row.source_sha256, 64)}

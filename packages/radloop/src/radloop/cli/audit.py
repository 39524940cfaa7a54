"""`radloop audit`: who had access to what identifies patients, whether the ledger is whole, and telling an audit repository."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radloop.cli import output
from radloop.cli.approvals import say_payload
from radloop.cli.common import FAILED, HERE, Json, Project, actor, catalog_at, command, group, settings_at, short
from radloop.errors import DataError, EngineError, SettingsError

if TYPE_CHECKING:
    from radloop.catalog.schema import LedgerRow
    from radloop.catalog.store import Catalog
    from radloop.settings import Settings

By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")]
Since = Annotated[
    str, typer.Option("--since", metavar="DATE", help="Only what happened from then on: 2026-11-26 or later parts.")
]


def register(app: typer.Typer) -> None:
    """Add `audit list`, `export`, `verify` and `send`."""
    audit = group(app, "audit", "Who had access to what identifies patients.")

    @command(
        audit,
        "list",
        examples=("radloop audit list", "radloop audit list --since 2026-11-01 --json"),
        after="`radloop audit export` gives the same as DICOM audit messages.",
    )
    def list_(since: Since = "", project: Project = HERE, json: Json = False) -> None:
        """List every access to landing, quarantine, crosswalk, labels by original identifier, backups, and what was received.

        Who, when, what and why; patients stand as pseudonyms.
        """
        with catalog_at(project) as catalog:
            rows = _rows(catalog, since)
        if json:
            output.print_json(rows)
            return
        columns = ["no.", "at", "by", "of", "what"]
        lines = [(r.seq, r.at[:19], r.actor, short(r.subject), say_payload(_without_names(r))) for r in rows]
        output.print_table("Audit", columns, lines)

    @command(
        audit,
        "export",
        examples=("radloop audit export > audit.xml", "radloop audit export --since 2026-11-01 > november.xml"),
        after="give it to whoever asks for it; each line is one message.",
    )
    def export(since: Since = "", by: By = None, project: Project = HERE, json: Json = False) -> None:
        """Print audit messages as DICOM and IHE ATNA define them (PS3.15 A.5: AuditMessage in XML), one a line.

        That you did is an audit event too.
        """
        from radloop.catalog.audit import record
        from radloop.dicom.audit import message

        settings = settings_at(project)
        with catalog_at(project) as catalog:
            rows = _rows(catalog, since)
            record(catalog.ledger, "audit read", "ledger", actor=actor(by), detail={"messages": len(rows)})
        if json:
            output.print_json(
                [{"seq": row.seq, "message": message(row, settings.audit.source).decode()} for row in rows]
            )
            return
        for row in rows:
            sys.stdout.buffer.write(message(row, settings.audit.source) + b"\n")
        sys.stdout.flush()

    @command(
        audit,
        "verify",
        examples=("radloop audit verify", "radloop audit verify --expect 1207:9f2c..."),
        after="keep the number and hash it prints where nobody with this machine can change them.",
    )
    def verify(
        expect: Annotated[
            str,
            typer.Option("--expect", metavar="NUMBER:HASH", help="What it printed once: that row must still be there."),
        ] = "",
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Check that no row of the ledger was changed, removed or inserted: each row's hash holds that of the row before.

        The signatures of approvals are checked too.
        Whoever can write to the database can cut off the end, or make the whole chain anew: --expect tells that.
        The exit code is 1 if anything is wrong.
        """
        with catalog_at(project) as catalog:
            found = catalog.ledger.verify()
            wrong = f"row {found.broken.seq}: {found.broken.what}" if found.broken else _unexpected(catalog, expect)
            worth, forged = _approvals(project, catalog)
            wrong = wrong or forged
        if json:
            told = {"rows": found.rows, "seq": found.seq, "hash": found.hash, "wrong": wrong, "approvals": worth}
            output.print_json(told)
        elif wrong:
            output.fail(f"the ledger is not whole: {wrong}; {output.plural(found.rows, 'row')} before that hold")
        else:
            print(f"{output.plural(found.rows, 'row')}, unbroken\nlatest: {found.seq}:{found.hash}")
            if worth:
                print(f"approvals: {output.counts_line(worth)}")
        if wrong:
            raise typer.Exit(FAILED)

    @command(
        audit,
        "send",
        examples=("radloop audit send",),
        after="nothing: `radloop listen` and `radloop run` send by themselves; this is for a timer where neither runs.",
    )
    def send(project: Project = HERE, json: Json = False) -> None:
        """Send audit messages that the syslog server of [audit] has not got yet; what cannot be sent now waits in the ledger."""
        settings = settings_at(project)
        if not settings.audit.syslog:
            raise SettingsError(
                "there is no audit sink", expected='syslog = "tls://HOST:6514" under [audit] in radloop.toml'
            )
        with catalog_at(project) as catalog:
            sent, why = send_now(project, settings, catalog)
        if why:
            raise EngineError(
                f"the audit sink {settings.audit.syslog} cannot be told",
                got=why,
                next_step="nothing is lost: it is sent once the sink answers",
            )
        if json:
            output.print_json({"sent": sent})
        else:
            print(f"{output.plural(sent, 'message')} sent")


def send_now(project: Path, settings: Settings, catalog: Catalog) -> tuple[int, str]:
    """Send what waits, if there is a sink: how many messages, and why not all; never raises for a dead sink."""
    from radloop.dicom.audit import drain

    told = settings.audit
    if not told.syslog:
        return 0, ""
    try:
        ca = project / told.ca if told.ca else None
        return drain(catalog.ledger, told.syslog, told.source, home=project, ca=ca), ""
    except OSError as error:
        return 0, error.strerror or type(error).__name__


def _rows(catalog: Catalog, since: str) -> list[LedgerRow]:
    from radloop.dicom.audit import auditable

    if since and not since[:4].isdigit():
        raise DataError("this is no date", expected="2026-11-26, or 2026-11-26T08:00", got=since)
    return [row for row in catalog.ledger.rows() if auditable(row) and row.at >= since]


def _without_names(row: LedgerRow) -> dict[str, object]:
    """The payload with the number of its pseudonyms in their place."""
    told: dict[str, object] = {name: value for name, value in row.payload.items() if name != "pseudonyms"}
    named = row.payload.get("pseudonyms", [])
    return told | ({"pseudonyms": len(named)} if named else {})


def _approvals(project: Path, catalog: Catalog) -> tuple[dict[str, int], str]:
    """How many approvals there are of each standing; and the first whose signature is not of what stands there."""
    from collections import Counter

    from radloop.stages.approvals import approvers_of, standing

    approvers = approvers_of(settings_at(project))
    rows = catalog.ledger.rows(kind="approval")
    found = [(row, standing(row, approvers)) for row in rows]
    forged = [f"row {row.seq}: an approval by {row.actor}: {one.said}" for row, one in found if one.state == "forged"]
    return dict(Counter(one.state for _, one in found)), forged[0] if forged else ""


def _unexpected(catalog: Catalog, expect: str) -> str:
    if not expect:
        return ""
    number, _, wanted = expect.partition(":")
    if not number.isdigit() or not wanted:
        raise DataError("this is no row", expected="NUMBER:HASH, as `radloop audit verify` prints it", got=expect)
    found = catalog.ledger.since(int(number) - 1, 1)
    if not found or found[0].seq != int(number):
        return f"row {number} is gone: the end was cut off"
    return "" if found[0].hash == wanted else f"row {number} has another hash: the chain was made anew"

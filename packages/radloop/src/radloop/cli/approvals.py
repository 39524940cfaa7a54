"""`radloop approve`, `ledger`: what a person decided, and all that was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, actor, catalog_at, command, settings_at, short
from radloop.errors import DataError

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.cli.records import Waiting

_SHORTEST = 6


def register(app: typer.Typer) -> None:
    """Add `approve` and `ledger`."""

    @command(
        app,
        "approve",
        examples=(
            "radloop status",
            'radloop approve 3f9c0d2a71be --why "reviewed 40 cases with Dr. Ito, agree with the card"',
        ),
        after="run the pipeline that waited again, such as `radloop run release`: it goes on where it stood.",
    )
    def approve(
        subject: Annotated[str, typer.Argument(help="The digest that waits, or its beginning (6 characters or more).")],
        why: Annotated[str, typer.Option("--why", help="The reason, for whoever audits this. No patient's data.")],
        role: Annotated[str, typer.Option("--role", help="The role in which you approve.")] = "clinical",
        by: Annotated[
            str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")
        ] = None,
        key: Annotated[
            Path | None,
            typer.Option(
                "--key",
                metavar="FILE",
                envvar="RADLOOP_APPROVAL_KEY",
                help="The private key that signs, where [approvers] names who may.",
                show_default="~/.ssh/id_ed25519",
            ),
        ] = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Approve what waits for a person: a gate that could not decide, or the release of a model.

        `radloop status` shows what waits and for which role. The approval is of that exact digest: a model trained
        again, or a gate with other figures, waits anew. It cannot be taken back, only overtaken (`radloop rollback`).
        Where [approvers] in radloop.toml names people, it is signed by ssh-keygen, and who trained the model may not.
        """
        settings_at(project)
        if not why.strip():
            raise DataError("an approval needs its reason", expected='--why "..."', got="nothing")
        with catalog_at(project) as catalog:
            given = approve_waiting(project, catalog, subject, role=role, why=why.strip(), by=actor(by), key=key)
        if json:
            output.print_json(given)
            return
        said = "approved" if given["new"] else "was approved already"
        print(
            f"{given['kind']} {short(str(given['subject']))} {said} by {given['actor']} as {given['role']}, {given['how']}"
        )
        print(f"Next: radloop run {given['pipeline']}")

    @command(
        app,
        "ledger",
        examples=("radloop ledger --kind approval", "radloop ledger --subject 3f9c0d2a71be --json"),
        after="`radloop trace PREDICTION` shows the rows behind one prediction.",
    )
    def ledger(
        kind: Annotated[
            str | None, typer.Option("--kind", help="ingest, dataset, training, gate, approval, release, alert, ...")
        ] = None,
        subject: Annotated[
            str | None, typer.Option("--subject", help="A digest, run or pseudonym, or its beginning.")
        ] = None,
        limit: Annotated[int, typer.Option("--limit", min=0, help="Only the last so many; 0: all.")] = 0,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Show the ledger: what happened, when, and who did it. Rows are never changed and never removed."""
        from radloop.catalog.ledger import Kind
        from radloop.stages.approvals import shown

        if kind is not None and kind not in list(Kind):
            raise DataError("the ledger has no such kind of row", expected=", ".join(Kind), got=kind)
        with catalog_at(project) as catalog:
            rows = [r for r in catalog.ledger.rows(kind=kind) if subject is None or r.subject.startswith(subject)]
        rows = rows[-limit:] if limit else rows
        if json:
            output.print_json(rows)
            return
        output.print_table(
            "Ledger",
            ["no.", "at", "kind", "subject", "by", "what"],
            [(r.seq, r.at[:19], r.kind, short(r.subject), r.actor, say_payload(shown(project, r))) for r in rows],
        )


def approve_waiting(
    project: Path, catalog: Catalog, subject: str, *, role: str, why: str, by: str, key: Path | None = None
) -> dict[str, object]:
    """Append the approval of what waits under a digest, or the beginning of one.

    Raises:
        DataError: nothing that waits has this digest, several have, or it waits for another role; or this person may not
            approve it (radloop.stages.approvals).
    """
    from radloop.cli.records import waiting
    from radloop.stages import approvals

    chosen = _the_one(waiting(project), subject)
    if role != chosen.role:
        raise DataError(
            "this waits for a person of another role",
            expected=f"the role {chosen.role!r}",
            got=f"the role {role!r}",
            next_step=f"ask someone who is {chosen.role} to approve it (--role {chosen.role})",
        )
    told = {"what": chosen.kind, "pipeline": chosen.pipeline, "stage": chosen.stage}
    return approvals.give(project, catalog, chosen.digest, role=role, why=why, by=by, key=key, **told)


def _the_one(candidates: list[Waiting], subject: str) -> Waiting:
    found = {w.digest: w for w in candidates if len(subject) >= _SHORTEST and w.digest.startswith(subject)}
    if len(found) == 1:
        return next(iter(found.values()))
    waits = "; ".join(f"{short(w.digest)} ({w.kind}, for {w.role})" for w in candidates) or "nothing waits"
    if len(found) > 1:
        raise DataError("several things that wait begin like this", expected="a longer beginning", got=waits)
    raise DataError(
        "nothing that waits has this digest",
        expected=f"the first {_SHORTEST} characters or more of: {waits}",
        got=subject,
        next_step="radloop status",
    )


def say_payload(payload: dict[str, object], width: int = 90) -> str:
    """The facts of a ledger row in one line."""
    said = ", ".join(f"{name} {_plain(value)}" for name, value in payload.items() if value not in (None, "", {}, []))
    return said if len(said) <= width else said[: width - 1] + "…"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Who may approve, who did, and whether that counts: decided here for the command line, Airflow, the demo and every gate.

A project that names nobody in [approvers] takes names on trust: its approvals are recorded as unauthenticated, and count. Once
somebody is named, only an approval counts that is signed by the key of a person with the role (or by a server that vouches for
the person), and never that of who trained the model. The signature of all that was decided stands beside it in the ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from radloop.errors import DataError, SettingsError
from radloop.pipeline.records import RunResult
from radloop.settings import FILE, Approver, Settings
from radloop.stage.protocol import Request, Result
from radloop.stages import sshsig
from radloop.stages.kinds import Model
from radloop.stages.project import settings_of

if TYPE_CHECKING:
    from radloop.catalog.schema import LedgerRow
    from radloop.catalog.store import Catalog

NAMESPACE = "radloop-approval"
UNAUTHENTICATED = "unauthenticated"
DEFAULT_KEY = "~/.ssh/id_ed25519"
_SIGNED = ("decision", "what", "pipeline", "stage", "role", "why", "at", "trained_by")

Approvers = Mapping[str, Approver]


class Standing(msgspec.Struct, frozen=True):
    """What an approval is worth.

    Attributes:
        state: signed by who may; unauthenticated; a stranger's (a whole signature, by nobody whom [approvers] lets); or forged:
            the signature is not of what stands there.
        said: the same for a person, such as "signed by anna".
    """

    state: Literal["signed", "unauthenticated", "stranger", "forged"]
    said: str


def approvers_of(settings: Settings) -> Approvers:
    """Who may approve, by name.

    Raises:
        SettingsError: a key that is none, a name or key that two have, a person without a role.
    """
    names: dict[str, str] = {}
    keys: dict[bytes, str] = {}
    for name, one in settings.approvers.items():
        here = f"{FILE}: [approvers.{name}]"
        try:
            blob = sshsig.public_key(one.key)
        except ValueError as error:
            expected = "the line in an id_ed25519.pub: ssh-ed25519 AAAA..."
            step = "ssh-keygen -t ed25519 makes one"
            raise SettingsError(f"{here} key is none", expected=expected, got=error, next_step=step) from None
        if keys.setdefault(blob, name) != name:
            raise SettingsError(f"{here} has the key of {keys[blob]}", expected="a key of each person's own")
        if one.vouches == bool(one.roles):
            expected = "roles of a person, or vouches = true and no roles"
            raise SettingsError(f"{here} is neither a person nor a server that vouches", expected=expected)
        for alias in _names(name, one):
            if names.setdefault(alias, name) != name:
                raise SettingsError(f"{here} has a name of {names[alias]}", expected="one person a name", got=alias)
    return settings.approvers


def _names(name: str, one: Approver) -> set[str]:
    return {alias.strip().casefold() for alias in (name, *one.users)}


def give(
    home: Path,
    catalog: Catalog,
    subject: str,
    *,
    role: str,
    why: str,
    by: str,
    key: Path | None = None,
    what: str = "",
    pipeline: str = "",
    stage: str = "",
) -> dict[str, Any]:
    """Append a person's approval of a digest to the ledger, if the person may give it.

    Args:
        home: the project.
        catalog: its catalog.
        subject: the digest that is approved.
        role: in which the person approves.
        why: the reason.
        by: the person: a name of [approvers] or of its `users`; where nobody is named there, any.
        key: the private key that signs; `~/.ssh/id_ed25519`, by default.
        what: the kind of what is approved.
        pipeline: which pipeline waits for it.
        stage: which of its stages.

    Returns:
        subject, kind, role, actor, how, pipeline, new (False: the same was there).

    Raises:
        DataError: the person is not named, has not the role, trained the model, or the key is another's.
        SettingsError: [approvers] is not as it must be, or there is no key to sign with.
    """
    from radloop.catalog.schema import now

    approvers = approvers_of(settings_of(home))
    trained = trainers(home, subject)
    payload: dict[str, Any] = {
        "role": role, "how": UNAUTHENTICATED, "why": why, "what": what, "pipeline": pipeline, "stage": stage,
        "decision": "approve", "at": now(), "trained_by": sorted(filter(None, trained)),
    }  # fmt: skip
    person, owner = by, b""
    if approvers:
        person = _may(approvers, by, role, trained)
        message = _statement(subject, person, payload)
        payload["signature"] = sshsig.sign(message, key or Path(DEFAULT_KEY).expanduser(), NAMESPACE)
        owner = sshsig.signer(message, payload["signature"], NAMESPACE) or b""
        standing = _standing(approvers, subject, person, payload)
        if standing.state != "signed":
            raise DataError(
                f"this key does not sign for {person}",
                expected=f"the private half of the key under [approvers.{person}] in {FILE}",
                got=standing.said,
                next_step="--key FILE",
            )
        payload["how"] = standing.said
    given = hashlib.sha256(json.dumps([role, person, owner.hex()]).encode()).hexdigest()
    new = catalog.ledger.append("approval", subject, payload, actor=person, key=f"approval:{subject}:{given}")
    return {
        "subject": subject, "kind": what, "role": role, "actor": person, "how": payload["how"],
        "trained_by": payload["trained_by"], "pipeline": pipeline, "new": new,
    }  # fmt: skip


def approved(home: Path, catalog: Catalog, subject: str, role: str) -> bool:
    """Whether the ledger holds an approval of a digest, in a role, that counts."""
    return bool(that_count(home, catalog, subject, role))


def that_count(home: Path, catalog: Catalog, subject: str, role: str) -> list[LedgerRow]:
    """The approvals of a digest, in a role, that count."""
    rows = [row for row in catalog.ledger.rows(kind="approval", subject=subject) if row.payload.get("role") == role]
    approvers = approvers_of(settings_of(home)) if rows else {}
    if not approvers:
        return rows
    good = [row for row in rows if standing(row, approvers).state == "signed"]
    trained = {name.casefold() for name in trainers(home, subject)} if good else set()
    return [row for row in good if not _names(row.actor, approvers[row.actor]) & trained]


def standing(row: LedgerRow, approvers: Approvers) -> Standing:
    """What a row of the kind approval is worth, its signature checked anew."""
    return _standing(approvers, row.subject, row.actor, row.payload)


def _standing(approvers: Approvers, subject: str, person: str, payload: dict[str, Any]) -> Standing:
    signature = payload.get("signature")
    if not signature:
        own = ", by who trained it" if person in payload.get("trained_by", ()) else ""
        return Standing("unauthenticated", UNAUTHENTICATED + own)
    found = sshsig.signer(_statement(subject, person, payload), str(signature), NAMESPACE)
    if found is None:
        return Standing("forged", "its signature is not of this approval")
    owner = next((name for name, one in approvers.items() if sshsig.public_key(one.key) == found), None)
    if owner is None:
        return Standing("stranger", f"signed by a key that {FILE} does not name")
    if person not in approvers or approvers[person].vouches:
        return Standing("stranger", f"signed by {owner}, for {person}, who is no person of [approvers]")
    if owner != person and not approvers[owner].vouches:
        return Standing("stranger", f"signed by {owner}, for {person}")
    if payload["role"] not in approvers[person].roles:
        return Standing("stranger", f"signed by {owner}; {person} has not the role {payload['role']!r}")
    return Standing("signed", f"signed by {owner}" + ("" if owner == person else f", who vouches for {person}"))


def _statement(subject: str, person: str, payload: dict[str, Any]) -> bytes:
    """What is signed: JSON, keys sorted, no white space, ASCII."""
    told = {name: payload.get(name) for name in _SIGNED} | {"subject": subject, "by": person}
    return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _may(approvers: Approvers, by: str, role: str, trained: Mapping[str, str]) -> str:
    """The name of the person, who may approve in this role. Raises DataError saying who may instead."""
    holders = [name for name, one in approvers.items() if role in one.roles]
    own = {name.casefold(): run for name, run in trained.items()}
    others = [name for name in holders if not _names(name, approvers[name]) & own.keys()]
    whom = " or ".join(others) or f"nobody yet: name a person with roles = [{role!r}] under [approvers] in {FILE}"
    wanted = by.strip().casefold()
    person = next((n for n, one in approvers.items() if not one.vouches and wanted in _names(n, one)), None)
    if person is None:
        raise DataError(
            f"{by} is no person who may approve here",
            expected=whom,
            got=by,
            next_step=f"--by NAME, or put {by!r} into `users` of the person under [approvers] in {FILE}",
        )
    if role not in approvers[person].roles:
        got = f"{person}, who is {', '.join(approvers[person].roles)}"
        raise DataError(f"{person} has not the role {role!r}", expected=whom, got=got, next_step=f"ask {whom}")
    if "" in trained:
        raise DataError(
            "it is not known who trained this model, who must not approve it",
            expected="the record under runs/ of the training, with `by` in its run.json",
            got=f"none for {trained['']}",
            next_step=f"restore it from backup; or remove {trained['']} and `radloop run develop` trains anew",
        )
    if mine := sorted(_names(person, approvers[person]) & own.keys()):
        raise DataError(
            "who trained a model cannot approve it",
            expected=whom,
            got=f"{person}, who as {mine[0]} ran the training ({own[mine[0]]})",
            next_step=f"ask {whom}",
        )
    return person


def trainers(home: Path, subject: str) -> dict[str, str]:
    """Who trained the model that an artifact is, or was made from: names, each with the run; empty without a model.

    A model whose training no record tells of stands under the name "", with its place.
    """
    made = _made(home)
    left = [place for place, one in made.items() if subject in one.digests]
    seen, found = set(left), dict[str, str]()
    while left:
        one = made.get(place := left.pop())
        if one is None:
            continue
        if one.is_model:
            found.update(one.by or {"": place})
        else:
            new = one.needs - seen
            seen |= new
            left += new
    return found


class _Made(msgspec.Struct):
    """What is known of a folder of artifacts/: what it holds, what it was made from, who did, in which run."""

    digests: set[str] = msgspec.field(default_factory=set)
    needs: set[str] = msgspec.field(default_factory=set)
    by: dict[str, str] = msgspec.field(default_factory=dict)
    is_model: bool = False


def _made(home: Path) -> dict[str, _Made]:
    """Everything that the records under runs/ tell of, by its place; records that cannot be read are left out."""
    found: dict[str, _Made] = {}
    for record in sorted((home / "runs").glob("[0-9]*/run.json")):
        try:
            run = msgspec.json.decode(record.read_bytes(), type=RunResult)
        except (OSError, msgspec.MsgspecError):
            continue
        for path in (*record.parent.glob("*/result.json"), *record.parent.glob("*/[0-9]*/result.json")):
            try:
                result = msgspec.json.decode(path.read_bytes(), type=Result)
                request = msgspec.json.decode(path.with_name("request.json").read_bytes(), type=Request)
            except (OSError, msgspec.MsgspecError):
                continue
            if result.place:
                one = found.setdefault(result.place, _Made())
                one.digests |= {made.digest for made in result.outputs.values()}
                one.needs |= _places(request)
                one.is_model |= any(made.kind == Model.name for made in result.outputs.values())
                one.by |= {} if result.cached else dict.fromkeys(run.by, f"run {run.run_id}")
    return found


def _places(request: Request) -> set[str]:
    """The folders of artifacts/ that a stage has read, but for the champion's: what it is compared with did not make it."""
    given: list[str] = list(request.gates)
    for path in (path for name, path in request.inputs.items() if not name.startswith("champion")):
        given += path if isinstance(path, list) else [path] if path else []
    return {str(Path(path).parent) for path in given}


def said_of(home: Path, row: LedgerRow) -> str:
    """Who approved, and as what: name, role, how it is known who that was."""
    how = standing(row, approvers_of(settings_of(home))).said
    return f"{row.actor} ({row.payload.get('role')}, {how})"


def shown(home: Path, row: LedgerRow) -> dict[str, Any]:
    """A row's payload for a person: of an approval without the signature, and with what that is worth now."""
    if row.kind != "approval":
        return row.payload
    told = {name: value for name, value in row.payload.items() if name not in ("signature", "at", "decision", "how")}
    return {"role": told.pop("role", None), "how": standing(row, approvers_of(settings_of(home))).said, **told}

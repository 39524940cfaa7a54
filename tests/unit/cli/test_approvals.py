"""A person decides, on exactly what they looked at, and that is written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radloop.cli.stage import approvals
from radloop.engines import local
from radloop.pipeline import Builder
from radloop.pipeline.records import Record
from radloop.pipeline.run import Launcher, run_node
from radloop.stage.protocol import Approval
from radloop.stages.project import open_catalog
from radloop.testing import suite_stages as s

from .conftest import Ran

Run = Callable[..., Ran]


def waits_for_a_gate(**params: Any) -> Any:
    b = Builder("develop")
    made = b.add(s.numbers, **params).made
    verdict = b.add(s.limit, given=made, ask=True).verdict
    b.add(s.report, given=made, gates=[verdict])
    return b.build()


def waits_for_release(**params: Any) -> Any:
    b = Builder("release")
    made = b.add(s.numbers, count=9, **params).made
    b.add(s.report, given=made, approval=Approval(of="given", role="physics"))
    return b.build()


def start(project: Path, pipeline: Any) -> Any:
    """Run it as `radloop run` does."""
    return local.run(pipeline, home=project, approved=approvals(project))


def test_a_waiting_gate_is_approved_and_the_run_goes_on(inside: Run, project: Path) -> None:
    """An undetermined gate needs a person; without the command the loop would stand still for ever."""
    assert start(project, waits_for_a_gate()).status == "waiting"
    told = inside("status", "--json").json
    assert [(w["pipeline"], w["kind"], w["role"], w["approved"]) for w in told["waiting"]] == [
        ("develop", "verdict", "clinical", False)
    ]
    digest = told["waiting"][0]["digest"]
    typed = told["next"][0]["command"]
    assert typed.startswith(f"radloop approve {digest[:12]} --role clinical")
    ran = inside("approve", digest[:12], "--why", "looked at 40 cases", "--by", "A. Ito", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["subject"], ran.json["actor"], ran.json["new"]) == (digest, "A. Ito", True)
    assert inside("status", "--json").json["next"][0]["command"] == "radloop run develop"
    assert start(project, waits_for_a_gate()).status == "succeeded"
    rows = inside("ledger", "--kind", "approval", "--json").json
    assert [(r["subject"], r["actor"], r["payload"]["why"]) for r in rows] == [(digest, "A. Ito", "looked at 40 cases")]


def test_what_waits_within_a_run_can_be_approved(inside: Run, project: Path) -> None:
    """On an orchestrator a run that waits is still open: who approves it there must not be told that nothing waits."""
    record = Record.open(waits_for_a_gate(), project, engine="airflow")
    for node in record.pipeline.nodes:
        run_node(record, node, None, Launcher({}), lambda event: None)
    told = inside("status", "--json").json
    assert [(w["pipeline"], w["stage"], w["kind"]) for w in told["waiting"]] == [("develop", "report", "verdict")]
    assert inside("approve", told["waiting"][0]["digest"][:12], "--why", "looked").code == 0
    assert run_node(record, record.pipeline.nodes[-1], None, Launcher({}), lambda event: None).status == "succeeded"


def test_another_result_waits_anew(inside: Run, project: Path) -> None:
    """An approval of one model must never release the next."""
    start(project, waits_for_release())
    digest = inside("status", "--json").json["waiting"][0]["digest"]
    assert inside("approve", digest[:12], "--role", "physics", "--why", "fine").code == 0
    assert start(project, waits_for_release()).status == "succeeded"
    assert start(project, waits_for_release(scale=2.5)).status == "waiting"


def test_the_role_is_the_one_asked_for(inside: Run, project: Path) -> None:
    """A release that asks for the physicist's approval is not approved by somebody else's."""
    start(project, waits_for_release())
    digest = inside("status", "--json").json["waiting"][0]["digest"]
    ran = inside("approve", digest[:12], "--why", "fine")
    assert ran.code == 1
    assert "the role 'physics'" in ran.err
    assert start(project, waits_for_release()).status == "waiting"


def test_what_does_not_wait_cannot_be_approved(inside: Run, project: Path) -> None:
    """An approval in advance would let through what nobody looked at."""
    start(project, waits_for_a_gate())
    digest = inside("status", "--json").json["waiting"][0]["digest"]
    for wrong in ("f" * 12, digest[:4], ""):
        ran = inside("approve", wrong, "--why", "fine")
        assert ran.code == 1
        assert "nothing that waits has this digest" in ran.err
        assert digest[:12] in ran.err
    with open_catalog(project) as catalog:
        assert catalog.ledger.rows(kind="approval") == []


def test_a_reason_is_needed(inside: Run, project: Path) -> None:
    """An approval without a reason is a signature under nothing."""
    start(project, waits_for_a_gate())
    digest = inside("status", "--json").json["waiting"][0]["digest"]
    assert inside("approve", digest[:12], "--why", "  ").code == 1
    assert inside("approve", digest[:12]).code == 2


def test_twice_is_once(inside: Run, project: Path) -> None:
    """A second click must not look like a second opinion; a second person's is one."""
    start(project, waits_for_a_gate())
    digest = inside("status", "--json").json["waiting"][0]["digest"]
    for by, new in (("A. Ito", True), ("A. Ito", False), ("B. Roy", True)):
        assert inside("approve", digest[:12], "--why", "fine", "--by", by, "--json").json["new"] is new


def test_the_ledger_is_shown_by_kind_and_subject(inside: Run, project: Path) -> None:
    """An auditor asks for one thing at a time; a mistyped kind must not read as 'nothing happened'."""
    with open_catalog(project) as catalog:
        catalog.ledger.append(
            "gate", "ab" * 32, {"gate": "auc", "verdict": "pass", "figure": 0.912345}, actor="evaluate"
        )
        catalog.ledger.append("release", "cd" * 32, {"step": "promoted"}, actor="release")
    assert [r["kind"] for r in inside("ledger", "--subject", "cdcd", "--json").json] == ["release"]
    assert [r["kind"] for r in inside("ledger", "--limit", "1", "--json").json] == ["release"]
    assert "figure 0.9123" in inside("ledger", "--kind", "gate").out
    ran = inside("ledger", "--kind", "gates")
    assert ran.code == 1
    assert "gate, approval" in ran.err


def test_status_of_failed_and_interrupted_runs(inside: Run, project: Path) -> None:
    """A run that was killed says 'running' on disk for ever; whoever believes it waits for ever."""
    b = Builder("prepare")
    b.add(s.refuse)
    failed = start(project, b.build())
    told = inside("status", "--json").json
    assert [(r["pipeline"], r["status"]) for r in told["runs"]] == [("prepare", "failed")]
    assert told["next"][0]["command"] == "radloop run prepare"
    record = project / "runs" / failed.run_id / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    told = inside("status", "--json").json
    assert told["runs"][0]["status"] == "interrupted"
    assert told["next"][0]["command"] == "radloop run prepare"


@pytest.mark.parametrize("half", [b"", b"{", b'{"run_id": 3}'])
def test_a_half_written_record_hides_nothing(inside: Run, project: Path, half: bytes) -> None:
    """A full disk leaves such a file; the status of all else must still be told."""
    start(project, waits_for_a_gate())
    (project / "runs/99999999-000000-abc").mkdir()
    (project / "runs/99999999-000000-abc/run.json").write_bytes(half)
    assert len(inside("status", "--json").json["waiting"]) == 1

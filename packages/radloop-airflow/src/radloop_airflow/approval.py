"""Approvals by Airflow's human-in-the-loop: a stage that waits asks in "Required Actions", and radloop's ledger gets the answer.

The task that waits holds no worker. What is approved is an exact digest, as with `radloop approve`; rejecting fails the task.
Where the project names who may approve, the worker's key (RADLOOP_APPROVAL_KEY), which radloop.toml says to vouch, signs for whom
Airflow has logged in; whom it may sign for, and for which model, `radloop approve` decides as on the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowFailException, TaskAwaitingInput
from airflow.sdk.execution_time.hitl import HITLUser, upsert_hitl_detail

from radloop.artifact import Artifact, open_artifact
from radloop.pipeline.records import Record
from radloop.stage.execute import read_verdict
from radloop.stage.protocol import Result

if TYPE_CHECKING:
    from airflow.sdk import Context

    from radloop_airflow.operators import RadloopStageOperator

APPROVE, REJECT = "Approve", "Reject"
_LONGEST = 20_000  # characters of a card
_CLINICAL = "clinical"  # the role that a gate's "wait" asks for (radloop.stage.execute)


def ask_person(operator: RadloopStageOperator, context: Context, record: Record, result: Result) -> None:
    """Put the question, and end this worker's part until somebody answers; then `answered` is called."""
    subjects = waits_for(operator, record)
    roles = {role for _, role in subjects}
    allowed = [set(operator.approvers[role]) for role in roles if role in operator.approvers]
    users = sorted(set.intersection(*allowed)) if allowed else []
    if allowed and not users:
        raise AirflowFailException(
            f"nobody of `approvers` holds all the roles {', '.join(sorted(roles))}\n{result.message}"
        )
    why = Param("", type=["string", "null"], title="Why", description="For whoever audits this. No patient's data.")
    operator.log.info("%s\n  or answer in Airflow: Required Actions", result.message)
    upsert_hitl_detail(
        ti_id=context["ti"].id,
        subject=f"{record.pipeline.name} {operator.node}: approve as {', '.join(sorted(roles))}?",
        body=_question(record, result, subjects),
        options=[APPROVE, REJECT],
        params={"why": why.serialize()},
        assigned_users=[HITLUser(id=name, name=name) for name in users],
    )
    raise TaskAwaitingInput(method_name="answered")


def record_answer(operator: RadloopStageOperator, record: Record, event: dict[str, Any]) -> None:
    """Write an approval into the project's ledger, in the name of who gave it.

    Raises:
        AirflowFailException: it was rejected, or Airflow says that nobody answered.
        EngineError: this person may not approve it; says why not.
    """
    user = event.get("responded_by_user") or {}
    by = user.get("name") or user.get("id")
    if "error" in event or not by:
        raise AirflowFailException(f"nobody answered: {event.get('error', 'no name came with the answer')}")
    why = str((event.get("params_input") or {}).get("why") or "").strip()
    if event["chosen_options"] != [APPROVE]:
        raise AirflowFailException(f"rejected by {by}" + (f": {why}" if why else ""))
    for subject, role in waits_for(operator, record):
        why = why or f"approved in Airflow ({operator.dag_id}, run {record.run_id})"
        told = operator.asked.ask("approve", subject.digest, "--why", why, "--role", role, "--by", str(by), "--json")
        operator.log.info("%s %s approved by %s as %s", told["kind"], subject.digest[:12], by, role)


def waits_for(operator: RadloopStageOperator, record: Record) -> list[tuple[Artifact[Any], str]]:
    """All that a person must approve before the stage runs, with the role: gates that say wait, and an input."""
    request = record.request(record.pipeline.node(operator.node), operator.index)
    gates = [open_artifact(record.home / path) for path in request.gates]
    found = [(gate, _CLINICAL) for gate in gates if read_verdict(gate)[0] == "wait"]
    if request.approval is not None:
        subject = open_artifact(record.home / str(request.inputs[request.approval.of]))
        found.append((subject, request.approval.role))
    return found


def _question(record: Record, result: Result, subjects: list[tuple[Artifact[Any], str]]) -> str:
    """Markdown: what is asked, of which digests, where to look, and what they say of themselves (a package: its model card)."""
    lines = [result.message.split("\n  next:")[0], "", "What is approved, by its exact digest:", ""]
    for subject, role in subjects:
        counts = "".join(f", {value} {name}" for name, value in subject.counts.items())
        lines.append(f"- {subject.description.kind} `{subject.digest[:12]}`{counts} (role: {role})")
    lines += ["", f"Run `{record.run_id}`. `radloop status` and `reports/report.html` in the project say more."]
    for subject, _ in subjects:
        cards = [name for name in subject.description.members if name.endswith(".md")]
        lines += ["", *(subject.file(name).read_text(encoding="utf-8")[:_LONGEST] for name in cards)]
    return "\n".join(lines)

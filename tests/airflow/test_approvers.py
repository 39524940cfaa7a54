"""An approval given in Airflow obeys the same rule as one on the command line: whom radloop.toml names, and not who trained."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from radloop.errors import EngineError
from radloop.pipeline import Builder
from radloop.pipeline.records import Record, account
from radloop.pipeline.run import Launcher, run_node
from radloop.stage.protocol import Approval
from radloop.stages.project import open_catalog
from radloop.testing import suite_stages as s
from radloop_airflow.approval import record_answer
from radloop_airflow.operators import RadloopStageOperator


def waiting(home: Path, core: str, *, triggered_by: str) -> Record:
    """A run that trained a model and waits for the approval of what was made from it."""
    b = Builder("suite")
    model = b.add(s.learn, given=b.add(s.numbers).made).model
    b.add(s.report, given=b.add(s.weigh, model=model).made, approval=Approval(of="given"))
    record = Record.open(b.build(), home, engine="airflow", by=triggered_by)
    for node in record.pipeline.nodes:
        result = run_node(record, node, None, Launcher({}, core), lambda event: None)
    assert result.status == "waiting"
    record.close()
    return record


def answer(user: str) -> dict[str, Any]:
    """What Airflow hands on of an answer in "Required Actions"."""
    return {
        "chosen_options": ["Approve"],
        "params_input": {"why": "read the card"},
        "responded_by_user": {"id": user, "name": user},
    }


def test_airflow_vouches_for_whom_the_project_names_and_who_did_not_train(
    home: Path, core: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may click in Airflow must not thereby release their own model, nor one in a role they have not."""
    lines = {}
    for name in ("worker", "ito", "roy", "fox"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
        lines[name] = (tmp_path / f"{name}.pub").read_text().strip()
    (home / "radloop.toml").write_text(
        f'[approvers.airflow]\nkey = "{lines["worker"]}"\nvouches = true\n'
        f'[approvers."A. Ito"]\nkey = "{lines["ito"]}"\nroles = ["clinical"]\nusers = ["ito"]\n'
        f'[approvers."B. Roy"]\nkey = "{lines["roy"]}"\nroles = ["clinical"]\nusers = ["roy"]\n'
        f'[approvers."C. Fox"]\nkey = "{lines["fox"]}"\nroles = ["physics"]\nusers = ["fox"]\n'
    )
    record = waiting(home, core, triggered_by="ito")
    operator = RadloopStageOperator(task_id="report", node="report", project=str(home), core=core)

    monkeypatch.setenv("RADLOOP_APPROVAL_KEY", str(tmp_path / "worker"))
    with pytest.raises(EngineError, match=r"who trained a model cannot approve it(.|\n)*A\. Ito, who as ito"):
        record_answer(operator, record, answer("ito"))
    with pytest.raises(EngineError, match="has not the role 'clinical'"):
        record_answer(operator, record, answer("fox"))
    with pytest.raises(EngineError, match="admin is no person who may approve here"):
        record_answer(operator, record, answer("admin"))
    monkeypatch.setenv("RADLOOP_APPROVAL_KEY", str(tmp_path / "fox"))
    with pytest.raises(EngineError, match=r"this key does not sign for B\. Roy"):
        record_answer(operator, record, answer("roy"))

    monkeypatch.setenv("RADLOOP_APPROVAL_KEY", str(tmp_path / "worker"))
    record_answer(operator, record, answer("roy"))
    with open_catalog(home) as catalog:
        (row,) = catalog.ledger.rows(kind="approval")
    assert (row.actor, row.payload["how"]) == ("B. Roy", "signed by airflow, who vouches for B. Roy")
    assert row.payload["trained_by"] == sorted({account(), "ito"})
    node = record.pipeline.node("report")
    assert run_node(record, node, None, Launcher({}, core), lambda event: None).status == "succeeded"

"""Who may approve: the person who says so, with the role, and never who trained the model."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from radloop.cli.demo import Demo
from radloop.cli.stage import approvals
from radloop.engines import local
from radloop.errors import DataError, SettingsError
from radloop.pipeline import Builder, Pipeline
from radloop.pipeline.records import account
from radloop.settings import Approver, Settings
from radloop.stage.protocol import Approval
from radloop.stages.approvals import NAMESPACE, approved, approvers_of, give, standing, trainers
from radloop.stages.project import open_catalog, settings_of
from radloop.testing import suite_stages as s

from .conftest import Ran, configure

Run = Callable[..., Ran]


class People:
    """Three people with real keys, and a server that vouches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("anna", "bo", "eve", "airflow"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.key(name))]
            subprocess.run(command, check=True)

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def public(self, name: str) -> str:
        return self.key(name).with_suffix(".key.pub").read_text().strip()

    def settings(self, **users: str) -> str:
        """radloop.toml with anna (clinical), bo (physics and clinical), airflow (vouches); eve is nobody."""
        told = ""
        for name, more in (
            ("anna", 'roles = ["clinical"]'),
            ("bo", 'roles = ["physics", "clinical"]'),
            ("airflow", "vouches = true"),
        ):
            told += f'[approvers.{name}]\nkey = "{self.public(name)}"\n{more}\n'
            told += f'users = ["{users[name]}"]\n' if name in users else ""
        return told


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory, require_service: Callable[..., str]) -> People:
    """Return people with keys."""
    require_service("OpenSSH", "ssh-keygen")
    return People(tmp_path_factory.mktemp("keys"))


def trained_model() -> Pipeline:
    """Trains, and waits for an approval of what was made from the model."""
    b = Builder("develop")
    model = b.add(s.learn, given=b.add(s.numbers).made).model
    b.add(s.report, given=b.add(s.weigh, model=model).made, approval=Approval(of="given", role="clinical"))
    return b.build()


def train(project: Path) -> Any:
    return local.run(trained_model(), home=project, approved=approvals(project))


def what_waits(inside: Run) -> str:
    return str(inside("status", "--json").json["waiting"][0]["digest"])


def test_a_signed_approval_counts_and_is_checked_by_openssh_too(
    inside: Run, project: Path, people: People, tmp_path: Path
) -> None:
    """An auditor must be able to tell who approved, without trusting radloop."""
    configure(project, people.settings())
    assert train(project).status == "waiting"
    digest = what_waits(inside)
    ran = inside(
        "approve", digest[:12], "--why", "40 cases", "--by", "anna", "--key", str(people.key("anna")), "--json"
    )
    assert ran.code == 0, ran.err
    assert (ran.json["actor"], ran.json["how"], ran.json["trained_by"]) == ("anna", "signed by anna", [account()])
    assert "approved by anna (clinical, signed by anna)" in inside("status", "--json").json["next"][0]["why"]
    assert train(project).status == "succeeded"
    verified = inside("audit", "verify", "--json")
    assert (verified.code, verified.json["approvals"]) == (0, {"signed": 1})
    assert "signed by anna" in inside("ledger", "--kind", "approval").out

    (row,) = inside("ledger", "--kind", "approval", "--json").json
    signed = ("decision", "what", "pipeline", "stage", "role", "why", "at", "trained_by")
    told = {name: row["payload"][name] for name in signed} | {"subject": row["subject"], "by": row["actor"]}
    message = msgspec.json.encode(told, order="sorted")
    armored = base64.encodebytes(base64.b64decode(row["payload"]["signature"])).decode()
    (tmp_path / "sig").write_text(f"-----BEGIN SSH SIGNATURE-----\n{armored}-----END SSH SIGNATURE-----\n")
    (tmp_path / "allowed").write_text(f"anna {people.public('anna')}\n")
    command = ["ssh-keygen", "-Y", "verify", "-n", NAMESPACE, "-I", "anna", "-f", "allowed", "-s", "sig"]
    done = subprocess.run(command, input=message, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("by", "key", "said"),
    [
        ("eve", "eve", "eve is no person who may approve here"),
        ("anna", "eve", "this key does not sign for anna"),
        ("anna", "bo", "signed by bo, for anna"),
        ("airflow", "airflow", "airflow is no person who may approve here"),
        ("anna", "nobody", "there is no key to sign with"),
    ],
)
def test_who_is_not_who_they_say_is_refused(
    inside: Run, project: Path, people: People, by: str, key: str, said: str
) -> None:
    """A name is quickly typed; if that were enough, anybody could release a model in a radiologist's name."""
    configure(project, people.settings())
    train(project)
    ran = inside("approve", what_waits(inside)[:12], "--why", "fine", "--by", by, "--key", str(people.key(key)))
    assert ran.code == 1
    assert said in ran.err
    assert "expected:" in ran.err
    assert "next:" in ran.err
    with open_catalog(project) as catalog:
        assert catalog.ledger.rows(kind="approval") == []
    assert train(project).status == "waiting"


@pytest.mark.parametrize("mapped", [True, False], ids=["by another name", "by the same name"])
def test_who_trained_a_model_cannot_approve_it(inside: Run, project: Path, people: People, mapped: bool) -> None:
    """Nobody judges their own work; a colleague can."""
    told = people.settings(anna=account()) if mapped else people.settings().replace(".anna]", f".{account()}]")
    configure(project, told)
    train(project)
    digest, name = what_waits(inside), "anna" if mapped else account()
    ran = inside("approve", digest[:12], "--why", "mine", "--by", name, "--key", str(people.key("anna")))
    assert ran.code == 1
    assert "who trained a model cannot approve it" in ran.err
    assert f"{name}, who as {account()} ran the training (run 2" in ran.err
    assert "ask bo" in ran.err
    assert train(project).status == "waiting"
    assert train(project).results["learn"].cached  # that bo runs it again would not make it bo's
    ran = inside("approve", digest[:12], "--why", "looked", "--by", "bo", "--key", str(people.key("bo")))
    assert ran.code == 0, ran.err
    assert train(project).status == "succeeded"


def test_a_training_that_nobody_knows_of(inside: Run, project: Path, people: People) -> None:
    """Who removes the record of their training must not thereby become its judge."""
    configure(project, people.settings(anna=account()))
    first = train(project)
    train(project)
    shutil.rmtree(project / "runs" / first.run_id)
    ran = inside("approve", what_waits(inside)[:12], "--why", "mine", "--by", "anna", "--key", str(people.key("anna")))
    assert ran.code == 1
    assert "it is not known who trained this model" in ran.err


def test_nobody_named_is_as_before_and_says_so(inside: Run, project: Path) -> None:
    """On a laptop it must work without keys; but whoever reads it later must see that nobody proved who they were."""
    train(project)
    ran = inside("approve", what_waits(inside)[:12], "--why", "fine", "--json")
    assert (ran.code, ran.json["how"]) == (0, "unauthenticated")
    assert "(clinical, unauthenticated, by who trained it)" in inside("status", "--json").json["next"][0]["why"]
    assert "unauthenticated, by who trained it" in inside("ledger", "--kind", "approval").out
    assert inside("audit", "verify", "--json").json["approvals"] == {"unauthenticated": 1}
    assert inside("report").code == 0
    assert "unauthenticated, by who trained it" in (project / "reports" / "report.html").read_text()
    assert train(project).status == "succeeded"


def test_unauthenticated_ones_end_with_the_first_approver(inside: Run, project: Path, people: People) -> None:
    """An approval from before, or put into the database by hand, must not let a model through; a signed one must."""
    train(project)
    digest = what_waits(inside)
    assert inside("approve", digest[:12], "--why", "fine", "--by", "anna").code == 0
    configure(project, people.settings())
    assert train(project).status == "waiting"
    assert inside("approve", digest[:12], "--why", "fine", "--by", "anna", "--key", str(people.key("anna"))).code == 0
    assert train(project).status == "succeeded"


def test_a_changed_approval_is_found(inside: Run, project: Path, people: People) -> None:
    """Whoever owns the database can make its chain anew, but not the signature."""
    configure(project, people.settings())
    train(project)
    digest = what_waits(inside)
    inside("approve", digest[:12], "--why", "fine", "--by", "anna", "--key", str(people.key("anna")))
    with open_catalog(project) as catalog:
        (row,) = catalog.ledger.rows(kind="approval")
        for payload, actor, subject in (
            ({**row.payload, "why": "better"}, "anna", digest),
            ({**row.payload, "role": "physics"}, "bo", digest),
            (row.payload, "bo", digest),
            (row.payload, "anna", "f" * 64),
        ):
            catalog.ledger.append("approval", subject, payload, actor=actor)
        forged = [
            standing(one, approvers_of(settings_of(project))).state for one in catalog.ledger.rows(kind="approval")
        ]
        assert forged == ["signed", "forged", "forged", "forged", "forged"]
        assert not approved(project, catalog, "f" * 64, "clinical")
        assert not approved(project, catalog, digest, "physics")
    ran = inside("audit", "verify")
    assert ran.code == 1
    assert "an approval by anna: its signature is not of this approval" in ran.err


def test_the_one_rule_for_all(project: Path, people: People) -> None:
    """Command line, Airflow and demo ask the same function: a server vouches for whom it knows, and for nobody else."""
    configure(project, people.settings(anna="a.ito@hospital"))
    run = train(project)
    digest = run.output("weigh.made").digest
    assert trainers(project, digest) == {account(): f"run {run.run_id}"}
    with open_catalog(project) as catalog:
        told = {"role": "clinical", "why": "fine"}
        for by in ("mallory", account(), "demo"):
            with pytest.raises(DataError, match="is no person who may approve here"):
                give(project, catalog, digest, by=by, key=people.key("airflow"), **told)
        with pytest.raises(DataError, match="anna has not the role 'physics'"):
            give(project, catalog, digest, by="anna", key=people.key("airflow"), role="physics", why="fine")
        assert not approved(project, catalog, digest, "clinical")
        given = give(project, catalog, digest, by="A.Ito@hospital", key=people.key("airflow"), **told)
        assert (given["actor"], given["how"]) == ("anna", "signed by airflow, who vouches for anna")
        assert approved(project, catalog, digest, "clinical")
        configure(project, people.settings(anna=account()))  # found out later
        assert not approved(project, catalog, digest, "clinical")


def test_the_demo_says_that_no_person_looked(project: Path, tmp_path: Path, people: People) -> None:
    """A demonstration's own approval must never pass for a person's, nor in a project that names who may."""
    run = train(project)
    demo = Demo(project, "small", yes=True)
    digest = run.output("weigh.made").digest
    assert demo._approve(digest, "undetermined")
    assert not demo._approve(digest, "undetermined")
    with open_catalog(project) as catalog:
        (row,) = catalog.ledger.rows(kind="approval")
    assert (row.actor, row.payload["how"], row.payload["trained_by"]) == ("demo", "unauthenticated", [account()])
    assert row.payload["why"].startswith("demo --yes, no person looked")
    configure(project, people.settings())
    with pytest.raises(DataError, match="demo is no person who may approve here"):
        demo._approve(digest, "undetermined")


def test_settings_that_name_nobody_for_sure(people: People) -> None:
    """Two people with one key, or one name, would be one person to the ledger."""
    a, b = people.public("anna"), people.public("bo")
    person = ("clinical",)
    for approvers, said in (
        ({"anna": Approver(key="ssh-rsa AAAA", roles=person)}, "key is none"),
        ({"anna": Approver(key=a[:-30], roles=person)}, "key is none"),
        ({"anna": Approver(key="", roles=person)}, "key is none"),
        ({"anna": Approver(key=a, roles=person), "bo": Approver(key=a, roles=person)}, "has the key of anna"),
        ({"anna": Approver(key=a, roles=person), "bo": Approver(key=b, roles=person, users=("Anna",))}, "name of anna"),
        ({"anna": Approver(key=a)}, "neither a person nor a server"),
        ({"anna": Approver(key=a, roles=person, vouches=True)}, "neither a person nor a server"),
    ):
        with pytest.raises(SettingsError, match=said):
            approvers_of(Settings(approvers=approvers))


def test_a_name_is_not_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trains with LOGNAME set to a colleague's would be free to approve."""
    before = account()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")
    assert account() == before

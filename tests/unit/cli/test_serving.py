"""A model in use: served until told otherwise, asked, and taken back."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from radloop.serving.desired import ModelRef, Models, Routing, State, desire, desired
from radloop.serving.rollout import wait_for
from radloop.settings import secret
from radloop.stages.project import open_catalog, open_tracking, pseudonymiser

from .conftest import NAME, Command, Ran, configure, write_dicom

_spec = importlib.util.spec_from_file_location("serving_packages", Path(__file__).parents[1] / "serving/packages.py")
assert _spec is not None
assert _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)

Run = Callable[..., Ran]


def ref(version: str) -> ModelRef:
    return ModelRef(package=f"artifacts/{version}/package", version=version, model_digest=version * 64)


def promote(project: Path, *versions: str) -> None:
    """The ledger and the catalog as releases leave them; packages with their identity."""
    with open_catalog(project) as catalog:
        catalog.add_dataset("d" * 64, path="datasets/d.parquet", members=[], actor="publish")
        for version in versions:
            mine = ref(version)
            (project / mine.package).mkdir(parents=True, exist_ok=True)
            (project / mine.package / "identity.json").write_text('{"task": "finding"}')
            catalog.add_model(
                mine.model_digest, dataset_digest="d" * 64, preprocessing_digest="p" * 64, version=version,
                info={"package": mine.package},
            )  # fmt: skip
            payload = {"step": "promoted", "version": version}
            catalog.ledger.append("release", mine.model_digest, payload, actor="release")


def registered(project: Path, *versions: int) -> None:
    """As many versions in a real registry, the last of them champion."""
    from mlflow import MlflowClient

    tracking = open_tracking(project)
    client = MlflowClient(tracking.uri, tracking.uri)
    client.create_registered_model("finding")
    for version in versions:
        client.create_model_version("finding", source=f"file:///nowhere/{version}")
    tracking.set_alias("finding", "champion", versions[-1])


@pytest.mark.slow
def test_rollback_moves_serving_registry_and_ledger(inside: Run, project: Path) -> None:
    """A model that harms must be out at once, everywhere, and it must be known who did it and why."""
    promote(project, "1", "2")
    registered(project, 1, 2)
    desire(project, State(models=Models(champion=ref("2"), previous=ref("1"))))
    ran = inside("rollback", "--why", "agreement fell", "--by", "A. Ito", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["from"], ran.json["to"], ran.json["in_effect"]) == ("2", "1", False)
    assert "The registry was not told" not in ran.json["message"]
    now = desired(project)
    assert now is not None
    assert now.models.champion == ref("1")
    assert open_tracking(project).alias("finding", "champion") == 1
    rows = inside("ledger", "--kind", "rollback", "--json").json
    assert [(r["subject"], r["actor"], r["payload"]["why"]) for r in rows] == [("1" * 64, "A. Ito", "agreement fell")]


def test_rollback_without_anything_before(inside: Run, project: Path) -> None:
    """A rollback to nothing would leave a hospital without answers."""
    for state in (None, State(models=Models(champion=ref("1")))):
        if state is not None:
            desire(project, state)
        ran = inside("rollback")
        assert ran.code == 1
        assert "there is nothing to roll back to" in ran.err
    now = desired(project)
    assert now is not None
    assert now.models.champion == ref("1")


def test_rollback_of_a_trial_leaves_the_champion(inside: Run, project: Path) -> None:
    """While a challenger is under trial, the champion is not what has to go."""
    desire(project, State(models=Models(champion=ref("1"), challenger=ref("2")), routing=Routing("canary", 25)))
    ran = inside("rollback")
    assert ran.code == 0, ran.err
    assert "the challenger, version 2, was taken out; the champion is version 1" in ran.out
    now = desired(project)
    assert now is not None
    assert (now.models.champion, now.models.challenger, now.routing.percent) == (ref("1"), None, 0)


def test_rollback_to_a_named_version(inside: Run, project: Path) -> None:
    """The version before may be as bad; only what was champion once has passed the gates."""
    promote(project, "1", "2", "3")
    desire(project, State(models=Models(champion=ref("3"), previous=ref("2"))))
    ran = inside("rollback", "--to", "7")
    assert ran.code == 1
    assert "version 7 never was the champion" in ran.err
    assert "1, 2, 3" in ran.err
    (project / ref("1").package / "identity.json").unlink()
    ran = inside("rollback", "--to", "1")
    assert ran.code == 1
    assert "the package of version 1 is not there any more" in ran.err
    now = desired(project)
    assert now is not None
    assert now.models.champion == ref("3")


def test_rollback_is_done_though_the_registry_is_away(inside: Run, project: Path) -> None:
    """Patients come before bookkeeping; but what was not written down must be said."""
    promote(project, "1", "2")
    configure(project, '[mlflow]\nuri = "http://127.0.0.1:9"\n')
    desire(project, State(models=Models(champion=ref("2"), previous=ref("1"))))
    ran = inside("rollback")
    assert ran.code == 0, ran.err
    assert "version 1 is served again instead of version 2" in ran.out
    assert "The registry was not told" in ran.out
    assert "radloop rollback --to 1" in ran.out


def test_predict_without_a_gateway(inside: Run, tmp_path: Path) -> None:
    """Whoever asks must be told that nothing answers, and what to start."""
    ran = inside("predict", str(write_dicom(tmp_path / "1.dcm")))
    assert ran.code == 1
    assert "nothing serves this home" in ran.err
    assert "radloop serve" in ran.err
    ran = inside("predict", str(tmp_path / "1.dcm"), "--url", "http://127.0.0.1:9")
    assert ran.code == 1
    assert "no answer from the predictor" in ran.err


@pytest.mark.services
def test_serve_says_where_and_ends_cleanly(
    radloop: Command, require_service: Callable[..., str], tmp_path: Path
) -> None:
    """A service manager starts it, waits for its file, and ends it; children that stay would hold the port for ever."""
    require_service("Envoy", "envoy")
    ready = tmp_path / "serve.json"
    with radloop.running("serve", "--port", "0", ready=ready) as (process, told):
        url = f"http://{told['host']}:{told['port']}"
        assert httpx.post(f"{url}/v2/models/default/infer", content=b"{}").status_code == 503
        ran = radloop("status", "--json")
        assert (ran.json["serving"]["running"], ran.json["serving"]["port"]) == (True, told["port"])
        second = radloop("serve", "--port", "0")
        assert second.code == 1
        assert "another `radloop serve` supervises this home" in second.err
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert url in out
    assert not ready.exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", told["port"])) != 0, "something still listens there"


@pytest.mark.services
def test_a_model_is_served_asked_and_traced(
    radloop: Command, require_service: Callable[..., str], tmp_path: Path
) -> None:
    """The way of every answer that reaches a reader: gateway, predictor with the project's key, log, trace."""
    require_service("Envoy", "envoy")
    project = radloop.project
    digest = packages.build(
        project / "artifacts/k/package", key=bytes.fromhex(secret("file:radloop.key", project).decode())
    )
    served = ModelRef(package="artifacts/k/package", version="1", model_digest=digest)
    with open_catalog(project) as catalog:
        catalog.add_dataset("d" * 64, path="datasets/d.parquet", members=[], actor="publish")
        info = {"package": served.package, "run_id": "run-1"}
        catalog.add_model(digest, dataset_digest="d" * 64, preprocessing_digest="p" * 64, version="1", info=info)
    desire(project, State(models=Models(champion=served)))
    image = write_dicom(tmp_path / "1.dcm")
    junk = tmp_path / "junk.dcm"
    junk.write_bytes(b"no DICOM")
    with radloop.running("serve", "--port", "0", ready=tmp_path / "serve.json") as (process, _):
        wait_for(project, 1)
        ran = radloop("predict", str(image), str(junk), "--site", "site-a", "--json")
        assert ran.code == 1, "one file was refused"
        assert "error" in ran.json[1]
        assert (ran.json[0]["version"], ran.json[0]["model_digest"]) == ("1", digest)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    told = radloop("trace", ran.json[0]["id"][:13], "--json").json
    assert told["prediction"]["probability"] == ran.json[0]["probability"]
    ours = pseudonymiser(project, "file:radloop.key").uid("1.2.3.1.1.1")
    assert told["prediction"]["sop_uid"] == ours, "serving and archive must name an image alike"
    assert told["training"]["run"] == "run-1"
    assert NAME not in ran.out + ran.err


@pytest.mark.services
def test_serve_on_a_busy_port(inside: Run, require_service: Callable[..., str]) -> None:
    """A gateway that seems to start on a port that another program answers would send images there."""
    require_service("Envoy", "envoy")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = inside("serve", "--port", str(taken.getsockname()[1]))
    assert ran.code == 1
    assert "the gateway's port cannot be bound" in ran.err


def test_a_secret_for_a_child_is_private_and_gone_after(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key kept out of the file system on purpose must not be left there by a server that wants a path."""
    from radloop.cli.foreground import secret_file

    monkeypatch.setenv("RADLOOP_KEY", "5" * 64)
    with secret_file("env:RADLOOP_KEY", project) as path:
        assert path.read_bytes() == b"5" * 64
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0
    assert not path.parent.exists()
    with secret_file("file:radloop.key", project) as path:
        assert path == project / "radloop.key"
    assert path.exists()


def test_a_ready_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """A script that reads half a port connects to another one."""
    from radloop.cli.foreground import announced

    place = tmp_path / "r.json"
    with announced(place, "127.0.0.1", 4711):
        assert place.read_bytes() == b'{"host":"127.0.0.1","port":4711,"pid":%d}\n' % os.getpid()
        assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert list(tmp_path.iterdir()) == []

"""`radloop pacs` and the stage `ingest` on a real PACS."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from radloop.cli.app import run_app
from radloop.cli.init import make_project
from radloop.stages.project import open_catalog
from radloop.testing.pacs_peers import OrthancWeb
from radloop.testing.pacs_suite import ROOT, Archive

pytestmark = [pytest.mark.services, pytest.mark.slow]

INGEST = '[ingest]\nquiet_s = 3600.0\n[[ingest.pacs]]\nname = "main"\nmodalities = ["DX"]\nsince = "2026-01-01"\n'


@pytest.fixture(scope="module")
def peer(require_service: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrthancWeb]:
    require_service("Orthanc", "Orthanc")
    with OrthancWeb(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.fixture(scope="module")
def archive(peer: OrthancWeb, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    archive = Archive(peer, tmp_path_factory.mktemp("given"))
    archive.add("1", 3, modality="DX", patient="MRN-CANARY-1", name="Zorbaxx^Quentin", description="Thorax p.a.")
    archive.add("2", 2, modality="CT", patient="MRN-CANARY-2", day="20260201")
    return archive


@pytest.fixture
def project(peer: OrthancWeb, archive: Archive, tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    make_project(folder)
    (folder / "radloop.toml").write_text(f'{peer.toml()}site = "site-a"\ntries = 2\ntimeout_s = 15.0\n{INGEST}')
    (folder / "pacs.password").touch(0o600)
    (folder / "pacs.password").write_text(peer.password)
    return folder


@pytest.fixture
def radloop(project: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_app([*words, "--project", str(project)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


Run = Callable[..., tuple[int, str, str]]


def ingest(project: Path) -> dict[str, Any]:
    """Return the result of the stage, run as every engine does."""
    from radloop.loop import prepare
    from radloop.settings import load

    node = next(node for node in prepare(load(project)).nodes if node.name == "ingest")
    request = {"stage": node.stage, "node": node.name, "params": node.params, "home": str(project)}
    (project / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "radloop.cli", "stage", "ingest"]
    files = ["--request", str(project / "request.json"), "--result", str(project / "result.json")]
    subprocess.run([*command, *files], capture_output=True, check=False, timeout=120, env=os.environ)
    return dict(json.loads((project / "result.json").read_text()))


def test_echo(radloop: Run, project: Path) -> None:
    """The first thing one tries; a wrong name must say which there are."""
    code, out, err = radloop("pacs", "echo", "main")
    assert code == 0, err
    assert "main answers, in " in out
    code, _, err = radloop("pacs", "echo", "mian")
    assert code == 1
    assert "expected: main" in err


def test_find_shows_and_the_ledger_notes_it(radloop: Run, project: Path) -> None:
    """Looking at patients is access to their data: who did, and by which keys, must stand in the ledger; what, not."""
    code, out, err = radloop("pacs", "find", "main", "--modality", "DX", "--from", "2026-01-01", "--by", "dr.a")
    assert code == 0, err
    assert "Zorbaxx^Quentin" in out
    assert "Thorax p.a." in out
    code, out, _ = radloop("pacs", "find", "main", "--accessions", "ACC1,ACC2", "--json")
    assert [row["study_uid"] for row in json.loads(out)] == [f"{ROOT}.1", f"{ROOT}.2"]
    with open_catalog(project) as catalog:
        rows = [row for row in catalog.ledger.rows("audit") if row.payload["action"] == "pacs find"]
    assert rows[0].actor == "dr.a"
    assert [row.payload["keys"] for row in rows] == [["modalities", "begin"], ["accessions"]]
    assert "ACC" not in str(rows)


def test_fetch_says_what_it_did(radloop: Run, project: Path) -> None:
    """A dry run fetches nothing; the same command again fetches nothing more."""
    code, out, err = radloop("pacs", "fetch", "main", "--from", "2026-01-01", "--dry-run")
    assert code == 0, err
    assert "2 studies, 0 of them here and unchanged; 5 instances" in out
    code, out, _ = radloop("pacs", "fetch", "main", "--from", "2026-01-01")
    assert code == 0
    assert "studies: 2 found, 2 fetched; instances: 5 received (5 by WADO-RS)" in out
    assert "Next: radloop run prepare" in out
    code, out, _ = radloop("pacs", "fetch", "main", "--from", "2026-01-01", "--json")
    assert (code, json.loads(out)["unchanged"], json.loads(out)["received"]) == (0, 2, 0)
    code, out, _ = radloop("pacs", "fetch", "main", "--from", "2026-01-01", "--dry-run")
    assert "2 of them here and unchanged" in out
    kept = b"".join(path.read_bytes() for path in project.glob("catalog.db*"))
    assert b"CANARY" not in kept
    assert b"ACC1" not in kept
    with open_catalog(project) as catalog:
        assert [row.payload["instances"] for row in catalog.ledger.rows("ingest")] == [5]


def test_ingest_brings_what_is_new(radloop: Run, project: Path, archive: Archive) -> None:
    """A study that a PACS gave whole is complete: training need not wait for a quiet hour."""
    result = ingest(project)
    assert result["status"] == "succeeded", result["message"]
    assert result["outputs"]["received"]["counts"] == {"instances": 3}
    again = ingest(project)
    assert again["outputs"]["received"]["digest"] == result["outputs"]["received"]["digest"]
    with open_catalog(project) as catalog:
        assert {row.sender for row in catalog.ready()} == {"main"}
        assert {row.modality for row in catalog.ready()} == {"DX"}


def test_a_dead_pacs_fails_the_stage_and_loses_nothing(radloop: Run, project: Path, peer: OrthancWeb) -> None:
    """What came stays; the error names the PACS and what to do, and comes within bounds."""
    assert ingest(project)["status"] == "succeeded"
    peer.kill()
    try:
        result = ingest(project)
        assert result["status"] == "failed"
        assert result["error"] == "PacsUnavailable"
        assert "main cannot be reached" in result["message"]
        assert "radloop pacs echo main" in result["message"]
        code, _, err = radloop("pacs", "fetch", "main")
        assert code == 1
        assert "main cannot be reached" in err
    finally:
        peer.start()
    with open_catalog(project) as catalog:
        assert len(catalog.ready()) == 3
    assert ingest(project)["status"] == "succeeded"


def test_one_fetch_at_a_time(radloop: Run, project: Path) -> None:
    """A person's fetch beside the night's run would load the PACS twice for the same images."""
    (project / "landing").mkdir(mode=0o700)
    with (project / "landing" / ".pacs-main.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = radloop("pacs", "fetch", "main")
        assert code == 1
        assert "another fetch from main is under way" in err
    assert radloop("pacs", "fetch", "main")[0] == 0


def test_a_password_is_no_setting(radloop: Run, project: Path) -> None:
    """A password in radloop.toml ends in version control."""
    text = (project / "radloop.toml").read_text().replace("file:pacs.password", "hunter2")
    (project / "radloop.toml").write_text(text)
    code, out, err = radloop("pacs", "echo", "main")
    assert code == 1
    assert "a secret is no reference" in err
    assert "hunter2" not in out + err


def test_a_misspelt_setting_is_named(radloop: Run, project: Path) -> None:
    """`max_instance_per_s` that is passed over would fetch at full speed."""
    text = (
        (project / "radloop.toml").read_text().replace('site = "site-a"\n', 'site = "site-a"\nmax_instance_per_s = 5\n')
    )
    (project / "radloop.toml").write_text(text)
    code, _, err = radloop("pacs", "echo", "main")
    assert code == 1
    assert "did you mean 'max_instances_per_s'" in err

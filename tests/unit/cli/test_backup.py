"""A project lost, and put back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from radloop.catalog.store import Catalog
from radloop.cli.app import run_app
from radloop.cli.intake import landing_at
from radloop.dicom.identity import Identity
from radloop.stages.project import open_catalog

from .conftest import NAME, Ran, write_dicom


@pytest.fixture
def lived_in(inside: Callable[..., Ran], project: Path, dicom_folder: Path) -> Path:
    """A project with images, a dataset version and a reviewed schema."""
    assert inside("ingest", str(dicom_folder), "--site", "site-a").code == 0
    (project / "datasets").mkdir()
    (project / "datasets" / f"{'d' * 64}.parquet").write_bytes(b"manifest")
    (project / "schema.pbtxt").write_text("feature {}")
    return project


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _restored(tmp_path: Path, backup: Path, *more: str) -> tuple[int, Path]:
    target = tmp_path / "new"
    return run_app(["restore", str(backup), "--project", str(target), "--by", "ada", *more]), target


def test_a_lost_project_comes_back(
    inside: Callable[..., Ran], lived_in: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """If this failed, a dead disk would be the end of all pseudonyms, approvals and evidence."""
    backup = tmp_path / "backup"
    ran = inside("backup", str(backup), "--by", "ada")
    assert ran.code == 0, ran.err
    assert "The keys are not in it" in ran.out
    assert "landing/, quarantine/, archive/ (copy them now)" in ran.out
    assert backup.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o077 for p in backup.rglob("*") if p.is_file()} == {0}
    held = _tree(backup)
    assert not any(name.endswith(".key") for name in held)
    assert not any(NAME.encode() in content or b"MRN-1" in content for content in held.values())
    with open_catalog(lived_in) as catalog:
        images, audits = catalog.ready(), [r.payload["action"] for r in catalog.ledger.rows("audit")]
    assert "backup" in audits
    keys = {name: (lived_in / name).read_bytes() for name in ("radloop.key", "crosswalk.key")}
    shutil.rmtree(lived_in)
    code, target = _restored(tmp_path, backup)
    said = capsysbinary.readouterr().out.decode()
    assert code == 0
    assert "Put back from where you keep them: radloop.key, crosswalk.key" in said
    for name, content in keys.items():
        (target / name).touch(mode=0o600)
        (target / name).write_bytes(content)
    with open_catalog(target) as catalog:
        assert [row.sop_uid for row in catalog.ready()] == [row.sop_uid for row in images]
        assert catalog.ledger.verify().broken is None
        assert catalog.ledger.rows("audit")[-1].payload["action"] == "restore"
    assert (target / "schema.pbtxt").read_text() == "feature {}"
    assert (target / "datasets" / f"{'d' * 64}.parquet").read_bytes() == b"manifest"
    assert (target / "catalog.db").stat().st_mode & 0o777 == 0o600
    assert run_app(["status", "--project", str(target)]) == 0
    with landing_at(target) as landing:  # the crosswalk opens with its key, and knows who it was
        [held_row] = landing._catalog.quarantined()
        source = landing._crosswalk.get(Identity.SOURCE, held_row.source_sha256, who="test", why="test")
        assert source is not None
        assert source["site"] == "site-a"


def test_the_keys_only_if_asked(inside: Callable[..., Ran], lived_in: Path, tmp_path: Path) -> None:
    """If this failed, a tape in a cupboard would name every patient, or a restore would find no key."""
    ran = inside("backup", str(tmp_path / "backup"), "--with-keys", "--json")
    assert {"radloop.key", "crosswalk.key"} <= {kept["path"] for kept in ran.json["files"]}
    code, target = _restored(tmp_path, tmp_path / "backup")
    assert code == 0
    assert (target / "radloop.key").read_bytes() == (lived_in / "radloop.key").read_bytes()
    assert (target / "radloop.key").stat().st_mode & 0o777 == 0o600


def test_a_project_that_is_there_is_not_overwritten(
    inside: Callable[..., Ran], lived_in: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """If this failed, a restore typed in the wrong folder would destroy what came since the backup."""
    inside("backup", str(tmp_path / "backup"))
    before = _tree(lived_in)
    ran = inside("restore", str(tmp_path / "backup"))
    assert ran.code == 1
    assert "there is a project already" in ran.err
    plain = [name for name in before if ".db" not in name]  # SQLite may write a log back at any time
    assert {name: _tree(lived_in)[name] for name in plain} == {name: before[name] for name in plain}
    assert list(lived_in.glob("replaced-*")) == []
    with open_catalog(lived_in) as catalog:
        assert catalog.ledger.rows("audit")[-1].payload["action"] == "backup"
    assert inside("restore", str(tmp_path / "backup"), "--force").code == 0
    [aside] = lived_in.glob("replaced-*")
    assert (aside / "radloop.toml").read_bytes() == before["radloop.toml"]
    assert aside.stat().st_mode & 0o777 == 0o700
    capsysbinary.readouterr()


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no manifest", "garbage manifest", "outside"])
def test_a_damaged_backup_is_refused_before_anything_is_touched(
    inside: Callable[..., Ran], lived_in: Path, tmp_path: Path, damage: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """If this failed, a rotten tape would replace a catalog."""
    backup = tmp_path / "backup"
    inside("backup", str(backup))
    catalog, manifest = backup / "catalog.db", backup / "backup.json"
    if damage == "changed":
        content = bytearray(catalog.read_bytes())
        content[5000] ^= 1
        catalog.write_bytes(content)
    elif damage == "cut":
        os.truncate(catalog, 4096)
    elif damage == "missing":
        catalog.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "garbage manifest":
        manifest.write_bytes(b"{")
    else:
        told = json.loads(manifest.read_bytes())
        told["files"][0]["path"] = "../catalog.db"
        manifest.write_text(json.dumps(told))
    code, target = _restored(tmp_path, backup)
    assert code == 1
    assert not target.exists()
    assert b"backup" in capsysbinary.readouterr().err


def test_places_that_will_not_do(inside: Callable[..., Ran], lived_in: Path, tmp_path: Path) -> None:
    """If this failed, a backup would be mixed with other files, or lie on the disk it is meant to outlive."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "something there already" in inside("backup", str(tmp_path / "full")).err
    assert "inside the project" in inside("backup", str(lived_in / "backup")).err
    (tmp_path / "empty").mkdir()
    assert inside("backup", str(tmp_path / "empty")).code == 0


def test_a_backup_while_images_come_is_of_one_moment(
    inside: Callable[..., Ran], lived_in: Path, tmp_path: Path
) -> None:
    """If this failed, a hospital would have to stop receiving for its backup, or restore a catalog that contradicts itself."""
    stop = threading.Event()
    sent: list[int] = []

    def send() -> None:
        with landing_at(lived_in) as landing:
            for number in range(10_000):
                if stop.is_set():
                    return
                path = write_dicom(tmp_path / "sent.dcm", study=1000 + number, patient=f"MRN-{number}")
                landing.receive(path, site="site-a", sender="CT1")
                sent.append(number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        while len(sent) < 5:
            time.sleep(0.01)
        for number in range(3):
            before = len(sent)
            assert inside("backup", str(tmp_path / f"backup-{number}")).code == 0
            with Catalog(f"sqlite:///{tmp_path}/backup-{number}/catalog.db") as copied:
                assert len(copied.pending()) >= before + 3
                assert copied.ledger.verify().broken is None
                rows = copied.pending()
            import sqlite3

            with sqlite3.connect(tmp_path / f"backup-{number}" / "identity" / "crosswalk.db") as crosswalk:
                found = crosswalk.execute("SELECT pseudonym FROM identity WHERE kind = 'instance'").fetchall()
            assert {row.sop_uid for row in rows} <= {uid for (uid,) in found}
    finally:
        stop.set()
        sender.join()


_KILLED = """
import os, signal, sys
from pathlib import Path
from radloop.cli import backup
from radloop.cli.app import run_app
real, left = backup._write, [int(sys.argv[1])]
def write(path, content, **more):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(path, content, **more)
backup._write = write
sys.exit(run_app(sys.argv[2:]))
"""


def _killed_at(step: int, *arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", _KILLED, str(step), *arguments], capture_output=True, timeout=120, check=False
    ).returncode


def test_killed_in_the_middle_nothing_half_is_taken_for_whole(
    inside: Callable[..., Ran], lived_in: Path, tmp_path: Path
) -> None:
    """If this failed, a backup or a restore cut short by a reboot would be taken for a good one."""
    backup, target = tmp_path / "backup", tmp_path / "new"
    for step in range(3):
        assert _killed_at(step, "backup", str(backup), "--project", str(lived_in)) == -signal.SIGKILL
        assert not backup.exists()
    assert inside("backup", str(backup)).code == 0
    assert [path.name for path in tmp_path.glob(".*.partial")] == []
    for step in range(1, 4):
        assert _killed_at(step, "restore", str(backup), "--project", str(target)) == -signal.SIGKILL
        assert not (target / "radloop.toml").exists(), "half a project must not pass for one"
    code, _ = _restored(tmp_path, backup)
    assert code == 0
    with open_catalog(target) as catalog:
        assert len(catalog.ready()) == 3
    assert not (target / ".restoring").exists()

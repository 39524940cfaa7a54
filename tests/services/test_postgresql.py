"""A project whose catalog and MLflow store are in a real PostgreSQL that asks for a password."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radloop.catalog.database import SCHEMA_VERSIONS, Database
from radloop.catalog.store import Catalog
from radloop.cli.app import run_app
from radloop.cli.init import make_project
from radloop.errors import EngineError, SettingsError
from radloop.stages.project import open_catalog, open_tracking
from radloop.testing.postgresql import PostgreSQL

pytestmark = pytest.mark.services

_HELPERS = Path(__file__).parents[1] / "unit" / "cli" / "conftest.py"
_spec = importlib.util.spec_from_file_location("cli_helpers", _HELPERS)
assert _spec is not None and _spec.loader is not None
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, postgresql: PostgreSQL) -> Path:
    """Return a new project whose catalog is in PostgreSQL; the password is in a file."""
    folder = tmp_path / "project"
    make_project(folder)
    password = folder / "catalog.password"
    password.touch(mode=0o600)
    password.write_text(postgresql.password + "\n")
    _configure(folder, postgresql.database())
    return folder


def _configure(project: Path, url: str, *more: str) -> None:
    lines = [f'catalog = "{url}"', 'catalog_password = "file:catalog.password"', *more]
    (project / "radloop.toml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def ask(project: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Ask:
    """Return the command, run in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsysbinary.readouterr()
        code = run_app([*arguments, "--project", str(project)])
        said = capsysbinary.readouterr()
        return code, said.out.decode(), said.err.decode()

    return run


def _say(done: tuple[int, str, str]) -> Any:
    assert done[0] == 0, done[2]
    return json.loads(done[1])


def test_two_that_receive_the_same_at_once_record_it_once(project: Path, tmp_path: Path) -> None:
    """If this failed, two listeners on one catalog would double instances, or break the ledger's chain."""
    for number in range(1, 21):
        helpers.write_dicom(tmp_path / f"export/{number}.dcm", study=number, patient=f"MRN-{number}")
    command = [sys.executable, "-m", "radloop.cli", "ingest", str(tmp_path / "export"), "--site", "site-a", "--json"]
    both = [
        subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    with open_catalog(project) as catalog:
        assert len({row.sop_uid for row in catalog.pending()}) == len(catalog.pending()) == 20
        found = catalog.ledger.verify()
    assert found.broken is None
    assert not (project / "catalog.db").exists(), "something went to SQLite after all"


def test_the_ledgers_chain_holds_under_many_writers(project: Path) -> None:
    """If this failed, two that append at once would follow the same row, and the evidence would be broken for ever."""
    code = (
        "import sys; from pathlib import Path; from radloop.stages.project import open_catalog\n"
        "with open_catalog(Path(sys.argv[1])) as catalog:\n"
        "    for n in range(25): catalog.ledger.append('audit', f'{sys.argv[2]}.{n}', {'n': float('nan')}, actor='test')"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(project), name]) for name in ("a", "b")]
    with open_catalog(project) as catalog:

        def append(name: str) -> None:
            for n in range(25):
                catalog.ledger.append("audit", f"{name}.{n}", {"n": n / 3}, actor="test")

        threads = [threading.Thread(target=append, args=(name,)) for name in ("c", "d", "e")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [process.wait(60) for process in others] == [0, 0]
        found = catalog.ledger.verify()
    assert (found.rows, found.seq, found.broken) == (125, 125, None)


def test_it_takes_what_sqlite_takes(project: Path) -> None:
    """If this failed, an odd value of a damaged image would be an error of the database on PostgreSQL only."""
    with open_catalog(project) as catalog:
        assert catalog.ledger.append("audit", "s" * 400, {"auc": float("inf")}, actor="a" * 100)
        catalog.quarantine(stage="landing", reason="NOT_DICOM", detail="a\0b", source_sha256="q" * 64, site="site-a\0")
        [held] = catalog.quarantined()
        assert held.site == "site-a\N{REPLACEMENT CHARACTER}"
        assert catalog.ledger.verify().broken is None


def test_the_password_is_nowhere_but_in_its_file(project: Path, ask: Ask, postgresql: PostgreSQL) -> None:
    """If this failed, who reads a log, an error, a report or a backup could read the whole catalog."""
    outputs = []
    for arguments in (
        ("doctor", "--json"),
        ("status", "--json"),
        ("backup", str(project.parent / "backup"), "--by", "ada"),
    ):
        code, out, err = ask(*arguments)
        assert code == 0, out + err
        outputs.append(out + err)
    [catalog] = [check for check in json.loads(outputs[0]) if check["name"] == "catalog"]
    assert catalog["found"].startswith(f"schema {SCHEMA_VERSIONS[-1]}, PostgreSQL, 127.0.0.1:")
    assert "pg_dump" in outputs[2]
    (project / "catalog.password").write_text("wrong")
    code, out, err = ask("status")
    assert code == 1 and "PostgreSQL cannot be reached" in err and "password authentication failed" in err
    outputs.append(out + err)
    (project / "catalog.password").write_text(postgresql.password)
    (project / "radloop.toml").write_text(f'catalog = "{postgresql.with_password(postgresql.database())}"\n')
    code, out, err = ask("status")
    assert code != 0 and "a password stands in catalog" in err
    outputs.append(out + err)
    assert not [said for said in outputs if postgresql.password in said]
    kept = [
        path
        for path in project.parent.rglob("*")
        if path.is_file() and path.name not in ("catalog.password", "radloop.toml")
    ]
    assert kept and not [path for path in kept if postgresql.password.encode() in path.read_bytes()]


def test_backup_with_pg_dump_and_restore(project: Path, ask: Ask, postgresql: PostgreSQL, tmp_path: Path) -> None:
    """If this failed, a hospital on PostgreSQL would find out at its first dead disk that its backup was half a project."""
    helpers.write_dicom(tmp_path / "export/1.dcm")
    assert ask("ingest", str(tmp_path / "export"), "--site", "site-a")[0] == 0
    with open_catalog(project) as catalog:
        before, head, name = catalog.pending(), catalog.ledger.head(), str(catalog._url.database)
    environment = os.environ | {"PGPASSWORD": postgresql.password}
    place = ["-h", "127.0.0.1", "-p", str(postgresql.port), "-U", postgresql.user]
    backup, dump = tmp_path / "backup", str(tmp_path / "catalog.dump")
    command = [str(postgresql.programs / "pg_dump"), *place, "--format=custom", "--file", dump, name]
    subprocess.run(command, env=environment, check=True)
    told = _say(ask("backup", str(backup), "--with-keys", "--by", "ada", "--json"))
    assert told["catalog"] == "postgresql" and "catalog.db" not in {kept["path"] for kept in told["files"]}
    target, empty = tmp_path / "new", postgresql.database()
    assert run_app(["restore", str(backup), "--project", str(target), "--by", "ada"]) == 0
    back = ["--clean", "--if-exists", "--dbname", empty.rpartition("/")[2], dump]
    subprocess.run([str(postgresql.programs / "pg_restore"), *place, *back], env=environment, check=True)
    (target / "catalog.password").touch(mode=0o600)
    (target / "catalog.password").write_text(postgresql.password)
    _configure(target, empty)
    with open_catalog(target) as catalog:
        assert (catalog.pending(), catalog.ledger.head()) == (before, head)
        assert catalog.ledger.verify().broken is None


def test_a_server_that_is_gone_is_named_and_found_again(postgresql: PostgreSQL) -> None:
    """If this failed, a restart of the database would need a restart of the listener, or end in a stack trace."""
    url = postgresql.database()
    with pytest.raises(EngineError, match=r"cannot be reached\n.*127.0.0.1:1, database"):
        Database(url.replace(f":{postgresql.port}/", ":1/"))
    with Catalog(postgresql.with_password(url)) as catalog:
        catalog.ledger.append("audit", "before", {}, actor="test")
        postgresql.sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.rpartition('/')[2]}'"
        )
        catalog.ledger.append("audit", "after", {}, actor="test")
        assert [row.subject for row in catalog.ledger.rows()] == ["before", "after"]
    # As most people write it; SQLAlchemy 2.1 would take it for another driver.
    with Catalog(postgresql.with_password(url).replace("+psycopg2", "")) as catalog:
        assert len(catalog.ledger.rows()) == 2


@pytest.mark.parametrize("url", ["mysql://root:hunter2@host/radloop", "postgresql:/hunter2@host"])
def test_another_database_or_no_url_is_refused(url: str) -> None:
    """If this failed, a mistyped URL would end in a stack trace that shows its password."""
    with pytest.raises(SettingsError, match="catalog") as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)


def test_mlflows_store_takes_its_password_by_reference(project: Path, postgresql: PostgreSQL) -> None:
    """If this failed, a project with MLflow on PostgreSQL would have its password in radloop.toml."""
    store = postgresql.database()
    _configure(project, postgresql.database(), "[mlflow]", f'uri = "{store}"', 'password = "env:RADLOOP_TEST_MLFLOW"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RADLOOP_TEST_MLFLOW", postgresql.password)
        tracking = open_tracking(project)
        run = tracking.log_run("key", name="run", params={"a": 1}, metrics={"auc": 0.9})
        assert tracking.log_run("key", name="run", params={"a": 1}, metrics={"auc": 0.9}) == run

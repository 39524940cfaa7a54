from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DatabaseError

from radloop.catalog import migrations, schema
from radloop.catalog.database import SCHEMA_VERSIONS, Database, StorageFull, storage_errors
from radloop.catalog.store import Catalog
from radloop.errors import SettingsError


def _url(home: Path) -> str:
    return f"sqlite:///{home}/catalog.db"


def _execute(url: str, statement: str) -> Any:
    """With the database's own means, around radloop: the first value of what comes back, if anything does."""
    engine = create_engine(url)
    with engine.begin() as connection:
        done = connection.execute(text(statement))
        value = done.scalar() if done.returns_rows else None
    engine.dispose()
    return value


def test_migrations_lead_to_the_schema_that_the_code_uses(url: str) -> None:
    """If this failed, an upgraded catalog and a new one would differ, and a column would be missing in one of them."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with Catalog(url) as catalog, catalog._read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    script = ScriptDirectory.from_config(migrations.config())
    assert script.get_heads() == [SCHEMA_VERSIONS[-1]]
    assert tuple(reversed([r.revision for r in script.walk_revisions()])) == SCHEMA_VERSIONS


def test_a_catalog_of_the_first_version_is_upgraded(url: str) -> None:
    """If this failed, an upgrade of radloop would lose a project, let its images wait anew, or leave its ledger unsealed."""
    from alembic import command

    engine = create_engine(url)
    with engine.begin() as connection:
        command.upgrade(migrations.config(connection), "0001")
        columns = "sop_uid, revision, study_uid, series_uid, patient, key_id, site, sender, sop_class_uid"
        more = "transfer_syntax_uid, source_sha256, source_bytes, received_at, status, tags"
        for sop, status in (("I1", "archived"), ("I2", "received")):
            values = (
                f"'{sop}', 1, 'S-{sop}', 'R', 'P', 'k', 'A', 'CT1', 'c', 't', '{sop}', 1, '2020-01-01T00:00:00+00:00'"
            )
            connection.execute(text(f"INSERT INTO instances ({columns}, {more}) VALUES ({values}, '{status}', '{{}}')"))
        for number in (1, 2):
            fields = f"{number}, '2020-01-01', 'audit', 's{number}', 'ada', '{{\"a\": 0.1}}'"
            connection.execute(text(f"INSERT INTO ledger (seq, at, kind, subject, actor, payload) VALUES ({fields})"))
    engine.dispose()
    with Catalog(url) as catalog:
        assert [study.study_uid for study in catalog.unreleased()] == ["S-I2"]
        assert catalog.ledger.verify().rows == 2
        assert catalog.ledger.append("audit", "s3", {}, actor="ada")
        found = catalog.ledger.verify()
        assert (found.rows, found.broken) == (3, None)
        with pytest.raises(DatabaseError, match="append-only"), catalog._write() as connection:
            connection.execute(text("UPDATE ledger SET actor = 'nobody'"))


def test_a_newer_schema_is_refused_with_both_versions(url: str) -> None:
    """If this failed, an old radloop would write into a catalog that it does not understand."""
    Catalog(url).close()
    _execute(url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SettingsError, match=f"newer radloop\n.*{SCHEMA_VERSIONS[-1]}.*\n.*9999"):
        Catalog(url)


def test_opening_a_catalog_at_head_does_not_import_alembic(url: str) -> None:
    """If this failed, every command and every stage would pay a second for migrations that are not needed."""
    Catalog(url).close()
    code = (
        "import sys; from radloop.catalog.store import Catalog; Catalog(sys.argv[1]).close(); "
        "sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, url], check=False, timeout=60).returncode == 0


def test_a_commit_survives_a_power_cut_and_nobody_else_reads_it(home: Path) -> None:
    """If this failed, C-STORE would have answered Success for what a power cut loses."""
    with Catalog(_url(home)) as catalog, catalog._read() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 30_000
    assert (home / "catalog.db").stat().st_mode & 0o777 == 0o600


def test_many_processes_may_make_the_catalog_at_once(url: str) -> None:
    """If this failed, `radloop listen` and `radloop run` started together in a new project would break each other."""
    code = "import sys; from radloop.catalog.store import Catalog; Catalog(sys.argv[1]).close()"
    running = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]


def test_a_migration_killed_before_its_commit_leaves_nothing_and_is_run_again(url: str) -> None:
    """If this failed, a machine switched off during an upgrade would have half a schema, and no way forth or back."""
    child = os.fork()
    if child == 0:
        done = migrations.upgrade

        def upgrade_and_die(connection: object) -> None:
            done(connection)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        migrations.upgrade = upgrade_and_die
        Catalog(url)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    table = "sqlite_master" if url.startswith("sqlite") else "pg_tables WHERE schemaname = 'public'"
    assert _execute(url, f"SELECT count(*) FROM {table}") == 0
    with Catalog(url) as catalog:
        assert catalog.datasets() == []


def test_a_forked_child_does_not_use_its_parents_connections(url: str) -> None:
    """If this failed, a worker process would corrupt the catalog that its parent has open."""
    with Catalog(url) as catalog:
        catalog.ledger.append("audit", "parent", {}, actor="test")
        child = os.fork()
        if child == 0:
            worked = catalog.ledger.append("audit", "child", {}, actor="test")
            os._exit(0 if worked else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert catalog.ledger.append("audit", "parent", {}, actor="test")
        assert [row.subject for row in catalog.ledger.rows()] == ["parent", "child", "parent"]


def test_writers_in_threads_wait_for_each_other(url: str) -> None:
    """If this failed, a listener with several associations would answer failures under load."""
    with Catalog(url) as catalog:

        def append(number: int) -> None:
            for step in range(20):
                catalog.ledger.append("audit", f"{number}.{step}", {}, actor="test")

        threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [row.seq for row in catalog.ledger.rows()] == list(range(1, 161))


def test_two_catalogs_in_one_process_keep_their_locks(home: Path) -> None:
    """If this failed, what a listener acknowledged would be gone: another process would remove the log it still writes to."""
    with Catalog(_url(home)) as first:
        first.ledger.append("audit", "first", {}, actor="test")
        Catalog(_url(home)).close()
        code = "import sys; from radloop.catalog.store import Catalog; Catalog(sys.argv[1]).close()"
        subprocess.run([sys.executable, "-c", code, _url(home)], check=True, timeout=60)
        assert (home / "catalog.db-wal").exists(), "the other process took itself for the last one"
        first.ledger.append("audit", "second", {}, actor="test")
        seen = "import sys; from radloop.catalog.store import Catalog; print(len(Catalog(sys.argv[1]).ledger.rows()))"
        done = subprocess.run(
            [sys.executable, "-c", seen, _url(home)], check=True, timeout=60, capture_output=True, text=True
        )
        assert done.stdout.strip() == "2"


def test_a_catalog_in_memory_is_refused() -> None:
    """If this failed, a mistyped URL would keep a hospital's index in memory, and lose it."""
    with pytest.raises(SettingsError, match="needs a file"):
        Database("sqlite://")


def test_no_space_left_is_told_as_such() -> None:
    """If this failed, a full disk would show as a stack trace of SQLAlchemy."""
    with pytest.raises(StorageFull, match="no space left to write the catalog"), storage_errors("catalog"):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), storage_errors("catalog"):
        raise PermissionError(13, "Permission denied")

"""`radloop backup` and `restore`: what cannot be made again, copied while radloop runs, and put back whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from radloop.artifact import file_digest
from radloop.cli import output
from radloop.cli.common import HERE, Json, Project, actor, catalog_at, command, settings_at
from radloop.errors import DataError, RadloopError, SettingsError

if TYPE_CHECKING:
    from radloop.settings import Settings

MANIFEST = "backup.json"
_VERSION = 1
_RESTORING = ".restoring"
_CATALOG, _CROSSWALK = "catalog.db", "identity/crosswalk.db"
_PLAIN = ("radloop.toml", "schema.pbtxt")


class Kept(msgspec.Struct, frozen=True):
    """One file of a backup: its path in the project, size in bytes, digest (SHA-256)."""

    path: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds. `ledger_seq` and `ledger_hash`: the ledger's head; `key_id`: of the project key."""

    version: int
    created_at: str
    radloop: str
    key_id: str
    catalog: str
    ledger_seq: int
    ledger_hash: str
    keys: bool
    files: list[Kept]


By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="Your name.", show_default="the system's user")]


def register(app: typer.Typer) -> None:
    """Add `backup` and `restore`."""

    @command(
        app,
        "backup",
        examples=("radloop backup /backup/radloop-2026-11-26",),
        after="copy landing/, quarantine/ and archive/ with your file backup, after this one; keep the keys elsewhere.",
    )
    def backup(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
        with_keys: Annotated[
            bool,
            typer.Option("--with-keys", help="Also both keys: who has this backup can then name every patient in it."),
        ] = False,
        by: By = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Copy what cannot be made again: catalog with its ledger, crosswalk, dataset manifests, radloop.toml, schema.pbtxt.

        Works while `listen`, `serve` and runs go on. The copy is of one moment, complete or not there, and carries digests. It
        holds who the patients are, encrypted; the keys are never in it unless you ask. Files are not in it: landing/, quarantine/
        and archive/ only grow by whole files, so copy them afterwards with what copies files (rsync); artifacts/, runs/ and
        mlflow/ can be made again, or copied likewise. A catalog in PostgreSQL is left to pg_dump, before this.
        """
        told = make_backup(project, settings_at(project), folder, with_keys=with_keys, by=actor(by))
        if json:
            output.print_json({"folder": str(folder.resolve()), **msgspec.to_builtins(told)})
            return
        size = sum(kept.bytes for kept in told.files) / 1e6
        print(
            f"{output.plural(len(told.files), 'file')}, {size:,.1f} MB, in {folder}; ledger up to row {told.ledger_seq}"
        )
        print(
            "Both keys are in it: guard it as you guard the patients' names" if told.keys else "The keys are not in it"
        )
        print("Not in it: landing/, quarantine/, archive/ (copy them now), artifacts/, runs/, mlflow/")
        if told.catalog == "postgresql":
            print(
                "The catalog is in PostgreSQL: before each backup, pg_dump --format=custom --file CATALOG.dump DATABASE"
            )

    @command(
        app,
        "restore",
        examples=("radloop restore /backup/radloop-2026-11-26 --project chest-project",),
        after="put the keys back if they were not in it, copy landing/, quarantine/ and archive/ back, then `radloop doctor`.",
    )
    def restore(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `radloop backup` made.", exists=True)],
        force: Annotated[
            bool, typer.Option("--force", help="Over a project that is there: what it held is moved to replaced-TIME/.")
        ] = False,
        by: By = None,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Put a backup back into a project folder; end `listen`, `serve` and runs of it first.

        Every file is checked against the backup's digests before anything is touched.
        """
        told = restore_backup(project, folder, force=force, by=actor(by))
        missing = [name for name in ("radloop.key", "crosswalk.key") if not (project / name).exists()]
        if json:
            output.print_json({"project": str(project.resolve()), **msgspec.to_builtins(told), "missing_keys": missing})
            return
        print(f"{output.plural(len(told.files), 'file')} of {told.created_at[:19]} restored to {project.resolve()}")
        if missing:
            print(f"Put back from where you keep them: {', '.join(missing)} (the project key has the id {told.key_id})")
        if told.catalog == "postgresql":
            print("The catalog: pg_restore --clean --if-exists --dbname DATABASE CATALOG.dump")
        print("Next: copy landing/, quarantine/ and archive/ back, then radloop doctor")


def make_backup(project: Path, settings: Settings, folder: Path, *, with_keys: bool, by: str) -> Manifest:
    """Make a backup of a project.

    Order: the catalog first, since what its rows name (crosswalk entries, manifests) was written before them.

    Raises:
        SettingsError: the folder is there, or a key is no file.
        DataError: a database is damaged.
        StorageFull: no space left; nothing is left behind under the folder's name.
    """
    from radloop.catalog.audit import record

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(
            "there is something there already", expected="a folder that does not exist", got=str(folder)
        )
    if folder.resolve().is_relative_to(project.resolve()):
        raise SettingsError(
            "a backup inside the project would be lost with it", expected="another place", got=str(folder)
        )
    if settings.catalog.startswith("sqlite"):
        raise SettingsError(
            "the catalog is a file of its own, which a backup does not follow",
            expected="`catalog` empty (catalog.db in the project) or of PostgreSQL",
            next_step="end what runs, move the file to catalog.db in the project, and take `catalog` out of radloop.toml",
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a backup that was killed
    with catalog_at(project) as catalog:
        record(catalog.ledger, "backup", "catalog", actor=by, detail={"keys": with_keys})
        partial.mkdir(mode=0o700, parents=True)
        try:
            paths = list(_copy_all(project, settings, partial, with_keys=with_keys))
            told = _manifest(project, settings, partial, paths, with_keys=with_keys)
            _write(partial / MANIFEST, msgspec.json.format(msgspec.json.encode(told), indent=2))
            _sync_folders(partial)
            os.replace(partial, folder)
            _sync(folder.resolve().parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return told


def _copy_all(project: Path, settings: Settings, target: Path, *, with_keys: bool) -> Iterator[str]:
    from radloop.catalog.copy import copy_sqlite

    (target / "identity").mkdir(mode=0o700)
    (target / "datasets").mkdir(mode=0o700)
    if not settings.catalog:
        copy_sqlite(project / _CATALOG, target / _CATALOG)
        yield _CATALOG
    if (project / _CROSSWALK).exists():
        copy_sqlite(project / _CROSSWALK, target / _CROSSWALK)
        yield _CROSSWALK
    plain = [*_PLAIN, *(f"datasets/{path.name}" for path in sorted((project / "datasets").glob("*.parquet")))]
    for name in [*plain, *(_key_files(settings) if with_keys else [])]:
        if (project / name).exists():
            (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(target / name, (project / name).read_bytes())
            yield name


def _key_files(settings: Settings) -> list[str]:
    """Both keys' paths in the project. Raises SettingsError when a key is no file there."""
    names = []
    for reference in (settings.deidentify.key, settings.deidentify.crosswalk_key):
        kind, _, name = reference.partition(":")
        if kind != "file" or Path(name).is_absolute() or ".." in Path(name).parts:
            raise SettingsError(
                "a key is not in the project, and cannot be in its backup",
                expected="file:PATH within the project",
                got=reference,
                next_step="leave --with-keys out, and back this key up where it is kept",
            )
        names.append(name)
    return names


def _manifest(project: Path, settings: Settings, target: Path, paths: list[str], *, with_keys: bool) -> Manifest:
    from radloop import __version__
    from radloop.catalog.schema import now
    from radloop.stages.project import open_catalog, pseudonymiser

    if settings.catalog:
        with open_catalog(project) as catalog:
            seq, head = catalog.ledger.head()
    else:
        seq, head = _head_of(target / _CATALOG)
    return Manifest(
        version=_VERSION,
        created_at=now(),
        radloop=__version__,
        key_id=pseudonymiser(project, settings.deidentify.key).key_id,
        catalog="postgresql" if settings.catalog else "sqlite",
        ledger_seq=seq,
        ledger_hash=head,
        keys=with_keys,
        files=[Kept(name, (target / name).stat().st_size, file_digest(target / name)) for name in sorted(paths)],
    )


def _head_of(catalog: Path) -> tuple[int, str]:
    """The ledger's head in a copy, without opening it for writing."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(f"file:{catalog}?mode=ro", uri=True)) as database:
        row = database.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
    return (row[0], row[1]) if row else (0, "0" * 64)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a backup, all files checked against it.

    Raises:
        DataError: this is no backup, it was cut short, or a file is missing or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError("this is no backup, or one that was cut short", expected=f"{MANIFEST} in it", got=str(folder))
    try:
        told = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.MsgspecError:
        raise DataError("the backup's manifest is damaged", got=str(path), next_step="use another backup") from None
    if told.version > _VERSION:
        raise DataError("the backup was made by a newer radloop", expected=f"version {_VERSION}", got=told.version)
    for kept in told.files:
        _check(folder, kept)
    return told


def _check(folder: Path, kept: Kept) -> None:
    name = Path(kept.path)
    if name.is_absolute() or ".." in name.parts:
        raise DataError("the backup's manifest names a file outside the project", got=kept.path)
    file = folder / name
    if not file.is_file():
        found = "it is missing"
    elif file.stat().st_size != kept.bytes or file_digest(file) != kept.sha256:
        found = "it was changed"
    else:
        return
    raise DataError(f"the backup is damaged: {kept.path}", got=found, next_step="use another backup")


def restore_backup(project: Path, folder: Path, *, force: bool, by: str) -> Manifest:
    """Put a backup into a project folder. Killed on the way, the same command goes on.

    Raises:
        DataError: the backup is damaged, or there is a project and `force` was not given; nothing was changed.
    """
    told = read_manifest(folder)
    project.mkdir(mode=0o700, parents=True, exist_ok=True)
    marker = project / _RESTORING
    going_on = marker.exists() and marker.read_text() == told.created_at
    there = [name for name in _touched(project, told) if (project / name).exists()]
    if there and not going_on:
        if not force:
            raise DataError(
                "there is a project already",
                expected="a folder without " + ", ".join(there[:4]),
                got=str(project.resolve()),
                next_step="give --force: what is there now is moved to a folder replaced-TIME/, nothing is removed",
            )
        _move_aside(project, there)
    _write(marker, told.created_at.encode(), replace=True)
    for name in (_CATALOG, _CROSSWALK):  # of a restore that was killed: a log must never meet another database
        for log in ("-wal", "-shm"):
            (project / f"{name}{log}").unlink(missing_ok=True)
    # radloop.toml last: until it is there, nothing takes the folder for a project.
    for kept in sorted(told.files, key=lambda kept: kept.path == "radloop.toml"):
        target = project / kept.path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = 0o644 if kept.path in _PLAIN else 0o600
        _write(target, (folder / kept.path).read_bytes(), replace=True, mode=mode)
        _sync(target.parent)
    _record(project, told, by)
    marker.unlink()
    _sync(project)
    return told


def _touched(project: Path, told: Manifest) -> list[str]:
    """What a restore would replace, and what must not stand beside it: logs of the databases, other manifests."""
    names = {kept.path for kept in told.files} | {"radloop.toml"}
    for database in (_CATALOG, _CROSSWALK):
        names |= {database, f"{database}-wal", f"{database}-shm"}
    names |= {f"datasets/{path.name}" for path in (project / "datasets").glob("*.parquet")}
    return sorted(names)


def _move_aside(project: Path, names: list[str]) -> None:
    aside = project / f"replaced-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    for name in names:
        (aside / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.replace(project / name, aside / name)
    aside.chmod(0o700)


def _record(project: Path, told: Manifest, by: str) -> None:
    """The ledger must be whole, and end where the backup says; the restore is its next row."""
    from radloop.catalog.audit import record

    if told.catalog != "sqlite":
        return
    with catalog_at(project) as catalog:
        found = catalog.ledger.verify()
        if found.broken is not None or (found.seq, found.hash) != (told.ledger_seq, told.ledger_hash):
            where = f"row {found.broken.seq}: {found.broken.what}" if found.broken else f"it ends at row {found.seq}"
            raise DataError("the restored ledger is not whole", expected=f"row {told.ledger_seq}", got=where)
        detail = {"backup_of": told.created_at, "ledger_seq": told.ledger_seq}
        record(catalog.ledger, "restore", "catalog", actor=by, detail=detail)


def _write(path: Path, content: bytes, *, replace: bool = False, mode: int = 0o600) -> None:
    """A whole file, durable; over one that is there only if `replace`."""
    from radloop.catalog.database import storage_errors

    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    with storage_errors("backup"):
        try:
            with os.fdopen(os.open(scratch, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, mode), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not replace and path.exists():
                raise RadloopError("a file is there already", got=path.name)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def _sync_folders(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""`radloop doctor`: is everything as it must be, and if not, what to do."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from radloop.cli import output
from radloop.cli.common import FAILED, HERE, Json, Project, command, settings_at, short
from radloop.errors import RadloopError, ServingError

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.settings import Settings

OK, WARN, FAIL = "ok", "warn", "fail"
_ENOUGH_BYTES, _LITTLE_BYTES = 10 << 30, 1 << 30
_SAMPLE = 20
_PRIVATE = ("landing", "quarantine", "identity")


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    verdict: str
    found: str
    next_step: str = ""


def register(app: typer.Typer) -> None:
    """Add `doctor`."""

    @command(
        app,
        "doctor",
        examples=("radloop doctor", "radloop doctor --all --json"),
        after="what each warning and failure says.",
    )
    def doctor(
        every: Annotated[
            bool, typer.Option("--all", help="Read every artifact and archived image, not a sample.")
        ] = False,
        project: Project = HERE,
        json: Json = False,
    ) -> None:
        """Check settings, keys, environments, catalog, disk, ports, Envoy, MLflow, and whether what was stored is intact.

        Changes nothing. The exit code is 1 if anything failed; a warning alone is no failure.
        """
        with output.progress("doctor") as progress:
            checks = examine(project, every=every, progress=progress)
        if json:
            output.print_json([check._asdict() for check in checks])
        else:
            rows = [(c.verdict, c.name, c.found, c.next_step) for c in checks]
            output.print_table("Doctor", ["", "what", "found", "next"], rows)
        if any(check.verdict == FAIL for check in checks):
            raise typer.Exit(FAILED)


def examine(project: Path, *, every: bool = False, progress: output.Progress = lambda done, total: None) -> list[Check]:
    """All checks, in the order in which one failing explains the next.

    Raises:
        SettingsError: there is no project here, or its radloop.toml cannot be read.
    """
    settings = settings_at(project)
    groups: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("settings", lambda: _settings(settings)),
        ("keys", lambda: _keys(project, settings)),
        ("listener", lambda: _listener(project, settings)),
        ("folders", lambda: _folders(project)),
        ("environments", lambda: _environments(settings)),
        ("network", lambda: _network(project, settings)),
        ("catalog", lambda: _catalog(project, settings, every=every)),
        ("artifacts", lambda: _artifacts(project, every=every)),
        ("ports", lambda: _ports(project, settings)),
        ("pools", lambda: _pools(project, settings)),
        ("Envoy", _envoy),
        ("MLflow", lambda: _mlflow(project, settings)),
    ]
    found: list[Check] = []
    for number, (name, look) in enumerate(groups, 1):
        found += _guarded(name, look)
        progress(number, len(groups))
    return found


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of one group; what stops them is itself a failed check."""
    found: list[Check] = []
    try:
        for check in look():
            found.append(check)
    except RadloopError as error:
        got = f" (got: {error.got})" if error.got else ""
        found.append(Check(name, FAIL, f"{error.what}{got}", error.next_step or ""))
    except (OSError, ImportError) as error:
        found.append(Check(name, FAIL, f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"))
    return found


def _settings(settings: Settings) -> Iterator[Check]:
    from radloop.stages.project import check

    fits = sys.version_info[:2] == (3, 11)
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("Python", OK if fits else WARN, version, "" if fits else "radloop is made for Python 3.11")
    check(settings)
    yield Check("radloop.toml", OK, f"task {settings.task.name}")
    if not settings.task.intended_use:
        yield Check("intended use", WARN, "not stated", "say under [task] what the model is for, and for whom")


def _keys(project: Path, settings: Settings) -> Iterator[Check]:
    from radloop.dicom.identity import MIN_KEY_BYTES
    from radloop.settings import secret
    from radloop.stages.project import pseudonymiser

    key_id = pseudonymiser(project, settings.deidentify.key).key_id
    yield Check("project key", OK, f"{settings.deidentify.key}, id {key_id}")
    size = len(secret(settings.deidentify.crosswalk_key, project))
    enough = size >= MIN_KEY_BYTES
    found = settings.deidentify.crosswalk_key if enough else f"{size} bytes, {MIN_KEY_BYTES} are needed"
    yield Check("crosswalk key", OK if enough else FAIL, found, "" if enough else "restore it from your backup")
    if settings.serve.token:
        secret(settings.serve.token, project)
        yield Check("serve token", OK, settings.serve.token)


def _listener(project: Path, settings: Settings) -> Iterator[Check]:
    """TLS and the STOW-RS receiver, where they are configured."""
    from radloop.cli.listen import stow_senders, tls_of
    from radloop.dicom.stow import Stow

    told = settings.listen
    tls = tls_of(project, settings)
    if tls is not None:
        yield Check("TLS of listen", OK, f"{told.tls.certificate}" + (", mutual" if told.tls.client_ca else ""))
    elif told.host not in ("127.0.0.1", "localhost", "::1"):
        found = f"{told.host} is no loopback address, and images cross the network in the clear"
        yield Check("TLS of listen", WARN, found, "certificate and key under [listen.tls]")
    if told.stow.port is not None:
        senders = stow_senders(project, settings)
        Stow.check(senders)
        yield Check("STOW-RS", OK, f"{output.plural(len(senders), 'sender')}: {', '.join(senders)}")


def _folders(project: Path) -> Iterator[Check]:
    open_ones = [name for name in _PRIVATE if (project / name).is_dir() and (project / name).stat().st_mode & 0o077]
    if open_ones:
        yield Check(
            "private folders", FAIL, f"others may enter {', '.join(open_ones)}", f"chmod 700 {' '.join(open_ones)}"
        )
    else:
        yield Check("private folders", OK, f"{', '.join(_PRIVATE)}: yours alone")
    free = shutil.disk_usage(project).free
    verdict = OK if free > _ENOUGH_BYTES else WARN if free > _LITTLE_BYTES else FAIL
    yield Check(
        "disk",
        verdict,
        f"{free / (1 << 30):.1f} GB free",
        "" if verdict == OK else "make room before images are refused",
    )


def _environments(settings: Settings) -> Iterator[Check]:
    from importlib.util import find_spec

    from radloop import __version__
    from radloop.cli.setup import versions

    for extra, modules in (("train", ("torch", "monai", "mlflow", "onnx")), ("serve", ("onnxruntime", "uvicorn"))):
        missing = [name for name in modules if find_spec(name) is None]
        found = f"without {', '.join(missing)}" if missing else "installed"
        yield Check(
            f"extra {extra}", WARN if missing else OK, found, f'pip install "radloop[{extra}]"' if missing else ""
        )
    python = settings.environments.get("tfdv")
    if python is None:
        yield Check("environment tfdv", WARN, "not set up", "radloop setup")
        return
    told = versions(Path(python))
    if told is None:
        yield Check("environment tfdv", FAIL, f"{python} does not work", "radloop setup")
    elif told["radloop"] != __version__:
        yield Check("environment tfdv", FAIL, f"radloop {told['radloop']}, here it is {__version__}", "radloop setup")
    else:
        yield Check("environment tfdv", OK, f"TFDV {told['tensorflow-data-validation']}")


def _network(project: Path, settings: Settings) -> Iterator[Check]:
    """The network that was brought, and what runs it."""
    from importlib.util import find_spec

    if not (path := settings.train.get("network")):
        return
    from radloop.learning import brought, runtimes
    from radloop.learning.runtimes.signature import EXTRAS
    from radloop.stages.develop import network_path

    form = brought.form_of(network_path(project, path))
    framework = runtimes.FRAMEWORKS[form]
    there = find_spec(framework) is not None
    step = "" if there else f'pip install "radloop[{EXTRAS[framework]}]"'
    yield Check("network", OK if there else FAIL, f"{path}, {form}, for {framework}", step)


def _catalog(project: Path, settings: Settings, *, every: bool) -> Iterator[Check]:
    from radloop.catalog.database import SCHEMA_VERSIONS
    from radloop.stages.project import open_catalog, open_landing, pseudonymiser

    if not settings.catalog and not (project / "catalog.db").exists():
        yield Check("catalog", OK, "nothing has come yet")
        return
    with open_catalog(project) as catalog:
        yield Check("catalog", OK, f"schema {SCHEMA_VERSIONS[-1]}, {catalog.place}")
        if catalog.in_the_clear:
            found = "the password and all rows may cross the network in the clear"
            step = "add ?sslmode=verify-full&sslrootcert=FILE to `catalog` in radloop.toml"
            yield Check("TLS of catalog", WARN, found, step)
        key_id = pseudonymiser(project, settings.deidentify.key).key_id
        rows = catalog.archived()
        others = {row.key_id for row in [*rows, *catalog.pending()]} - {key_id}
        if others:
            found = f"instances under the key {', '.join(sorted(others))}, the project's is {key_id}"
            yield Check(
                "pseudonyms", FAIL, found, "restore the key they were made with; patients are split in two otherwise"
            )
        open_landing(project, catalog)
        yield Check("crosswalk", OK, "opens with its key")
        yield _archive(project, rows, every=every)
        yield _manifests(project, catalog)


def _archive(project: Path, rows: list[Any], *, every: bool) -> Check:
    from radloop.artifact import file_digest

    archive = project / "archive"
    missing = [row for row in rows if not (archive / str(row.archive_path)).is_file()]
    if missing:
        found = f"{len(missing)} of {len(rows)} images are gone, such as {missing[0].archive_path}"
        return Check("archive", FAIL, found, "restore archive/ from a backup")
    read = rows if every else rows[:: max(1, len(rows) // _SAMPLE)]
    changed = [
        row for row in read if row.file_sha256 and file_digest(archive / str(row.archive_path)) != row.file_sha256
    ]
    if changed:
        found = f"{len(changed)} of {len(read)} images read were changed, such as {changed[0].archive_path}"
        return Check("archive", FAIL, found, "restore archive/ from a backup")
    return Check("archive", OK, f"{output.plural(len(rows), 'image')} there, {len(read)} read and unchanged")


def _manifests(project: Path, catalog: Catalog) -> Check:
    from radloop.datasets import manifest

    versions = catalog.datasets()
    for version in versions:
        try:
            manifest.read(project / version.path, expected_digest=version.digest)
        except RadloopError as error:
            return Check(
                "dataset versions", FAIL, f"version {version.number}: {error.what}", "restore datasets/ from a backup"
            )
    return Check("dataset versions", OK, f"{output.plural(len(versions), 'version')}, unchanged")


def _artifacts(project: Path, *, every: bool) -> Iterator[Check]:
    from radloop.artifact import open_artifact

    folders = sorted(path.parent for path in (project / "artifacts").glob("[!.]*/*/artifact.json"))
    newest = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
    read = newest if every else newest[:_SAMPLE]
    broken = []
    for path in read:
        try:
            open_artifact(path, verify=True)
        except RadloopError as error:
            broken.append((path, error))
    if broken:
        path, first = broken[0]
        where = f"{short(path.parent.name)}/{path.name}"
        found = f"{len(broken)} of {len(read)} read, such as {where}: {first.what}"
        yield Check("artifacts", FAIL, found, f"remove {path.parent} and run its pipeline again")
    else:
        yield Check("artifacts", OK, f"{len(folders)} there, {len(read)} read and unchanged")


def _ports(project: Path, settings: Settings) -> Iterator[Check]:
    from radloop.serving.desired import observed, supervisor_pid

    pid, now = supervisor_pid(project), observed(project)
    serving = now.gateway.port if pid is not None and now is not None and now.pid == pid else None
    told = settings.listen
    more = [("listen.stow", told.stow.port), ("listen metrics", told.metrics_port)]
    for name, host, port in (
        ("listen", told.host, told.port),
        *((name, told.host, port) for name, port in more if port is not None),
        ("serve", settings.serve.host, settings.serve.port),
    ):
        if name == "serve" and serving is not None:
            yield Check("port of serve", OK, f"{host}:{serving}, served by process {pid}")
        elif (why := _cannot_bind(host, port)) is None:
            yield Check(f"port of {name}", OK, f"{host}:{port} is free" if port else "any free one")
        else:
            step = f"if that is not `radloop {name}` itself, set another port under [{name}]"
            yield Check(f"port of {name}", WARN, f"{host}:{port}: {why}", step)


def _cannot_bind(host: str, port: int) -> str | None:
    """Why a server could not listen there; None if it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or type(error).__name__
    return None


def _pools(project: Path, settings: Settings) -> Iterator[Check]:
    """MLflow's servers behind the gateway: do they answer, and may everybody ask?"""
    from radloop.cli.serving import pools_of

    for pool in pools_of(project, settings):
        silent = [server for server in pool.servers if not pool.answers(server)]
        name, found = f"pool {pool.name}", f"{len(pool.servers) - len(silent)} of {len(pool.servers)} answer"
        verdict = FAIL if len(silent) == len(pool.servers) else WARN if silent else OK
        yield Check(name, verdict, found, f"start {', '.join(silent)}" if silent else "")
        if not pool.token and settings.serve.host not in ("127.0.0.1", "localhost", "::1"):
            found = f"{settings.serve.host} is no loopback address, and no token is asked for"
            yield Check(name, WARN, found, f"token under [serve.pools.{pool.name}], or MLflow's own authentication")


def _envoy() -> Iterator[Check]:
    from radloop.serving.gateway import envoy_path

    try:
        path = envoy_path()
    except ServingError as error:  # whoever only trains or orchestrates needs none
        yield Check("Envoy", WARN, error.what, error.next_step or "")
        return
    if not os.access(path, os.X_OK):
        yield Check("Envoy", FAIL, f"{path} cannot be run", f"chmod +x {path}")
    else:
        yield Check("Envoy", OK, str(path))


def _mlflow(project: Path, settings: Settings) -> Iterator[Check]:
    from importlib.util import find_spec

    if find_spec("mlflow") is None:
        yield Check("MLflow", WARN, "not installed", 'pip install "radloop[train]"')
        return
    if not settings.mlflow.uri and not (project / "mlflow" / "mlflow.db").exists():
        yield Check("MLflow", OK, "not used yet")
        return
    from radloop.stages.project import open_tracking

    tracking = open_tracking(project)
    yield Check("MLflow", OK, f"{settings.mlflow.uri or 'mlflow/mlflow.db'}, experiment {tracking.experiment}")

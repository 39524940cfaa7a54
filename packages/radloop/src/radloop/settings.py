"""radloop.toml: what a project says of itself. Read in `cli/` and `stages/` only; other rooms get plain values.

The project folder holds radloop.toml, the keys, and everything radloop makes (see docs/house.md).
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from radloop.errors import SettingsError

FILE = "radloop.toml"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Task(_Section, frozen=True):
    """What is predicted."""

    name: str = "finding"
    positive: tuple[str, ...] = ("1", "true", "yes", "positive")
    negative: tuple[str, ...] = ("0", "false", "no", "negative")
    intended_use: str = ""


class Tls(_Section, frozen=True):
    """PEM files: the listener's certificate and key, and the authorities of clients, which must then show a certificate."""

    certificate: str = ""
    key: str = ""
    client_ca: str = ""


class Token(_Section, frozen=True):
    """A STOW-RS sender: the secret reference of its bearer token, and the site code of what it sends."""

    token: str
    site: str


class StowReceiver(_Section, frozen=True):
    """The STOW-RS receiver, beside the C-STORE listener; off without a port. `tokens`: who may send, by name."""

    port: int | None = None
    tokens: dict[str, Token] = {}


class Listen(_Section, frozen=True):
    """What receives: calling AE titles it knows, each with its site code. `metrics_port`: Prometheus; off without."""

    ae_title: str = "RADLOOP"
    host: str = "127.0.0.1"
    port: int = 11112
    max_associations: int = 20
    metrics_port: int | None = None
    senders: dict[str, str] = {}
    tls: Tls = Tls()
    stow: StowReceiver = StowReceiver()


class Folder(_Section, frozen=True):
    """A folder of DICOM that `ingest` reads, and the site code of what lies in it."""

    path: str
    site: str


class FromPacs(_Section, frozen=True):
    """Studies that `ingest` fetches from a PACS: what is new since the last run.

    `name`: of a PACS under [pacs]. `since`: a date, or days before today such as "30d"; empty: all. `accessions`: a file
    with one accession number a line. `overlap_days`: how long after its date a study may reach the PACS.
    """

    name: str
    modalities: tuple[str, ...] = ()
    since: str = ""
    description: str = ""
    accessions: str = ""
    overlap_days: int = 14


class Ingest(_Section, frozen=True):
    """What besides the listener brings images; a study is complete when nothing of it has come for `quiet_s` seconds."""

    folders: tuple[Folder, ...] = ()
    pacs: tuple[FromPacs, ...] = ()
    quiet_s: float = 60.0


class _Pacs(_Section, frozen=True, kw_only=True, tag_field="kind"):
    """What both kinds of PACS have: site code, pace, patience, TLS files (paths)."""

    site: str
    max_instances_per_s: float = 0.0
    hours: str = ""
    timeout_s: float = 60.0
    tries: int = 5
    cut_at: int = 0
    ca: str = ""
    certificate: str = ""
    key: str = ""


class DimsePacs(_Pacs, frozen=True, kw_only=True, tag="dimse"):
    """A PACS by C-FIND, C-GET, C-MOVE. `called` is its AE title, `calling` ours; `move_port`: where it sends to us."""

    host: str
    port: int
    called: str
    calling: str = "RADLOOP"
    move_port: int | None = None
    move_host: str = "127.0.0.1"
    move_ae: str = ""
    move_first: bool = False
    tls: bool = False


class WebPacs(_Pacs, frozen=True, kw_only=True, tag="dicomweb"):
    """A PACS by QIDO-RS and WADO-RS. `token` and `password` are secret references."""

    url: str
    token: str = ""
    user: str = ""
    password: str = ""


class Deidentify(_Section, frozen=True):
    """How identity is removed (DICOM PS3.15 Annex E): a named profile and further options, by name or code.

    `face_cleaner`: a command for series that may show a face, with the words {input} and {output}.
    """

    profile: str = "research"
    options: tuple[str, ...] = ()
    pixels: Literal["clean", "refuse", "off"] = "clean"
    pixel_rules: tuple[dict[str, Any], ...] = ()
    face_cleaner: tuple[str, ...] = ()
    face_timeout_s: float = 3600.0
    key: str = "file:radloop.key"
    crosswalk_key: str = "file:crosswalk.key"


class Accept(_Section, frozen=True):
    """What images the task is for; anything else is quarantined, and refused by the predictor."""

    modalities: tuple[str, ...] = ("CR", "DX")
    sop_classes: tuple[str, ...] = ()


class Split(_Section, frozen=True):
    """Shares of patients. A patient's part is decided once and kept for ever.

    `given`: the label task that holds a split you brought (radloop labels import ... --task split); it must not leak.
    """

    given: str = ""
    train: float = 0.6
    validation: float = 0.15
    test: float = 0.25


class Release(_Section, frozen=True):
    """How a challenger reaches patients."""

    clinical_canary: bool = False
    approver_role: str = "clinical"
    steps: tuple[int, ...] = (5, 25, 50, 100)
    judge: dict[str, Any] = {}
    wait_s: float = 600.0


class Approver(_Section, frozen=True):
    """Who may approve: roles, and the OpenSSH public key (ssh-ed25519) by which the person, of the section's name, signs.

    `users`: the person's other names, on this system and in Airflow. `vouches`: no person but a server, whose key signs for whom
    it has logged in.
    """

    key: str
    roles: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    vouches: bool = False


class KServe(_Section, frozen=True):
    """Serving on a cluster, beside what [kubernetes] says. `gateway`: "NAMESPACE/NAME" of the Gateway that leads in.

    `url`: where clients reach it; its host is the one that routes are for. `replicas`, `resources`: of each predictor.
    """

    gateway: str = ""
    url: str = ""
    mesh: Literal["gateway", "istio"] = "gateway"
    replicas: int = 1
    resources: dict[str, Any] = {}


class MlflowPool(_Section, frozen=True):
    """MLflow servers, run by whatever runs them, that `radloop serve` makes one address of. `token`: a secret reference."""

    kind: Literal["mlflow-server", "mlflow-models"]
    port: int
    servers: tuple[str, ...]
    token: str = ""


class Serve(_Section, frozen=True):
    """Where predictions are served: on this machine, or where `kserve` says."""

    host: str = "127.0.0.1"
    port: int = 8080
    token: str = ""
    kserve: KServe = KServe()
    pools: dict[str, MlflowPool] = {}


class Watch(_Section, frozen=True):
    """When production is called drifted, and when to train again.

    `label_definition`: what production's labels mean, where that is not what the model was trained on: the figures are then
    shown as a change of population, not as the model's performance.
    """

    window_patients: int = 500
    label_definition: str = ""
    drift: dict[str, Any] = {}
    retrain_patients_per_class: int = 20
    label_request_size: int = 100


class Alerts(_Section, frozen=True):
    """Where alerts go; without a host they stay in the ledger."""

    smtp_host: str = ""
    smtp_port: int = 25
    tls: Literal["none", "starttls", "tls"] = "none"
    sender: str = "radloop@localhost"
    recipients: tuple[str, ...] = ()


class Audit(_Section, frozen=True):
    """Where audit messages go besides the ledger: a syslog server. `source`: which system says so; `ca`: a PEM file."""

    syslog: str = ""
    source: str = "radloop"
    ca: str = ""


class Mlflow(_Section, frozen=True):
    """Tracking and registry, one experiment a task. Empty: SQLite and a folder in the project.

    `password`: a secret reference, where `uri` is a database's.
    """

    uri: str = ""
    password: str = ""
    artifacts: str = ""


class Settings(_Section, frozen=True):
    """radloop.toml, decoded."""

    task: Task = Task()
    listen: Listen = Listen()
    ingest: Ingest = Ingest()
    pacs: dict[str, DimsePacs | WebPacs] = {}
    deidentify: Deidentify = Deidentify()
    accept: Accept = Accept()
    preprocess: dict[str, Any] = {}
    split: Split = Split()
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    gates: dict[str, Any] = {}
    release: Release = Release()
    approvers: dict[str, Approver] = {}
    serve: Serve = Serve()
    watch: Watch = Watch()
    alerts: Alerts = Alerts()
    audit: Audit = Audit()
    mlflow: Mlflow = Mlflow()
    catalog: str = ""
    catalog_password: str = ""
    environments: dict[str, str] = {}
    kubernetes: dict[str, Any] = {}


def load(project: Path) -> Settings:
    """Read `project/radloop.toml`.

    Raises:
        SettingsError: no such file, no TOML, an unknown name (with the nearest known one), or a value of a wrong type.
    """
    path = project / FILE
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SettingsError(
            f"there is no {FILE} here",
            expected=f"a project folder with {FILE}",
            got=str(project),
            next_step="radloop init",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{FILE} is no valid TOML", expected="TOML 1.0", got=str(error)) from None
    try:
        return msgspec.convert(data, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{FILE}: {error}", next_step=_nearest(str(error)) or "see the comments in it") from None


def _nearest(message: str) -> str | None:
    """The known name nearest to the unknown one that msgspec's message names."""
    if "unknown field" not in message:
        return None
    wrong = message.split("`")[1]
    listed = (Token, Folder, FromPacs, DimsePacs, WebPacs, Approver, MlflowPool)
    sections: list[type[msgspec.Struct]] = [*_sections(Settings), *listed]
    names = {n for section in sections for n in section.__struct_fields__}
    near = difflib.get_close_matches(wrong, names, 1)
    return f"did you mean {near[0]!r}?" if near else None


def _sections(struct: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    found = [struct]
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found += _sections(field.type)
    return found


def secret(reference: str, project: Path) -> bytes:
    """The value of a secret reference: `env:NAME`, or `file:PATH` (relative to the project folder; mode 0600).

    Raises:
        SettingsError: it is not there, is empty, or can be read by others. Never repeats a value.
    """
    kind, _, name = reference.partition(":")
    if kind == "env" and name:
        value = os.environ.get(name, "")
        if not value:
            raise SettingsError(f"the secret {reference} is not set", expected=f"an environment variable {name}")
        return value.encode()
    if kind != "file" or not name:
        raise SettingsError("a secret is no reference", expected="env:NAME or file:PATH")
    path = project / name
    try:
        mode = path.stat().st_mode & 0o777
        value_bytes = path.read_bytes().strip()
    except FileNotFoundError:
        raise SettingsError(
            f"the secret {reference} is missing",
            expected=str(path),
            next_step="restore it from your backup; `radloop init` makes one for a new project only",
        ) from None
    if mode & 0o077:
        raise SettingsError(
            f"the secret {reference} can be read by others",
            expected="mode 600",
            got=f"mode {mode:o}",
            next_step=f"chmod 600 {path}",
        )
    if not value_bytes:
        raise SettingsError(f"the secret {reference} is empty", next_step="restore it from your backup")
    return value_bytes

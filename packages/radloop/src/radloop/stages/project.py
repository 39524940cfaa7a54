"""A project folder, opened: what stages and commands find in it. The one place where settings become objects."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from radloop.errors import SettingsError
from radloop.settings import FILE, Settings, load, secret

if TYPE_CHECKING:
    from ssl import SSLContext

    from radloop.catalog.store import Catalog
    from radloop.dicom.deidentify.face_cleaner import FaceCleaner
    from radloop.dicom.landing import Landing
    from radloop.dicom.pacs import Pacs
    from radloop.dicom.pacs.fetch import Target
    from radloop.dicom.profile import Profile
    from radloop.dicom.uids import Pseudonymiser
    from radloop.learning.tracking import Tracking
    from radloop.settings import DimsePacs

T = TypeVar("T", bound=msgspec.Struct)


def settings_of(home: Path) -> Settings:
    """The project's settings; the defaults where it has no radloop.toml (an engine's test project)."""
    return load(home) if (home / FILE).exists() else Settings()


def open_catalog(home: Path) -> Catalog:
    """The project's catalog: `catalog` in radloop.toml, or catalog.db in the project folder."""
    from radloop.catalog.store import Catalog

    told = settings_of(home)
    if not told.catalog:
        return Catalog(f"sqlite:///{home.resolve() / 'catalog.db'}")
    return Catalog(_with_password(told.catalog, told.catalog_password, home, "catalog", "catalog_password"))


def _with_password(url: str, reference: str, home: Path, setting: str, where: str) -> str:
    """A database's URL with the password that `reference` leads to.

    Raises:
        SettingsError: the URL cannot be read, or has a password in it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        made = make_url(url)
    except ArgumentError:  # its message may repeat a password
        raise SettingsError(
            f"{FILE}: {setting} is no URL", expected="postgresql+psycopg2://USER@HOST/DATABASE"
        ) from None
    if made.password is not None:
        raise SettingsError(
            f"{FILE}: a password stands in {setting}",
            expected="a URL without one: the file is copied, shown and backed up",
            next_step=f'put it into a file (chmod 600) and write {where} = "file:NAME", or "env:NAME"',
        )
    if not reference:
        return url
    return made.set(password=secret(reference, home).decode()).render_as_string(hide_password=False)


def pseudonymiser(home: Path, key: str) -> Pseudonymiser:
    """The pseudonymiser of the project key that `key` refers to. Raises SettingsError if that is no hexadecimal text."""
    from radloop.dicom.uids import Pseudonymiser

    try:
        return Pseudonymiser(bytes.fromhex(secret(key, home).decode()))
    except ValueError:  # its message would repeat the key
        raise SettingsError(
            f"the project key {key} cannot be read",
            expected="64 hexadecimal digits, as `radloop init` writes them",
            next_step="restore it from your backup",
        ) from None


def open_landing(home: Path, catalog: Catalog) -> Landing:
    """The landing folder with the catalog and the crosswalk it writes to."""
    from radloop.dicom.identity import Crosswalk
    from radloop.dicom.landing import Landing

    chosen = settings_of(home).deidentify
    crosswalk = Crosswalk(home / "identity" / "crosswalk.db", secret(chosen.crosswalk_key, home), catalog.ledger)
    return Landing(home, catalog, pseudonymiser(home, chosen.key), crosswalk)


def open_tracking(home: Path) -> Tracking:
    """The MLflow store: `[mlflow]` in radloop.toml, or SQLite and a folder in the project."""
    from radloop.learning.tracking import Tracking

    settings = settings_of(home)
    folder = home.resolve() / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    if settings.mlflow.uri:
        artifacts = Path(settings.mlflow.artifacts) if settings.mlflow.artifacts else None
        return Tracking(tracking_uri(home), artifacts, settings.task.name)
    return Tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts", settings.task.name)


def tracking_uri(home: Path) -> str:
    """Where MLflow is, with the password if there is one: not to be shown. Empty: the project's own store."""
    told = settings_of(home).mlflow
    if not told.uri:
        return ""
    if not told.uri.startswith(("http://", "https://")):
        return _with_password(told.uri, told.password, home, "[mlflow] uri", "[mlflow] password")
    if told.password or "@" in told.uri.split("/")[2]:
        raise SettingsError(
            f"{FILE}: [mlflow] takes no password for a server",
            expected="a URL without user and password",
            next_step="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, which MLflow itself reads",
        )
    return told.uri


def open_pacs(home: Path, name: str) -> Pacs:
    """A PACS of [pacs], with its secrets. Raises SettingsError where there is none of this name."""
    from radloop.dicom.pacs import Patience
    from radloop.dicom.pacs.tls import tls_context
    from radloop.settings import DimsePacs

    known = settings_of(home).pacs
    if name not in known:
        raise SettingsError(
            "there is no such PACS",
            expected=", ".join(known) or f"a section [pacs.{name}] in {FILE}",
            got=name,
            next_step="see the comments under [pacs] in it",
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):  # it stands in the catalog, as the sender
        raise SettingsError(
            "the name of a PACS is no code", expected="1 to 64 letters, digits, '.', '_' or '-'", got=name
        )
    told = known[name]
    ca, certificate, key = (home / path if path else None for path in (told.ca, told.certificate, told.key))
    tls = tls_context(ca, certificate, key) if ca or certificate else None
    more: dict[str, Any] = {
        "patience": Patience(tries=told.tries),
        "cut_at": told.cut_at,
        "timeout_s": told.timeout_s,
    }
    if isinstance(told, DimsePacs):
        from radloop.dicom.pacs.dimse import Address, Dimse

        return Dimse(
            name,
            Address(host=told.host, port=told.port, called=told.called, calling=told.calling),
            move_port=told.move_port,
            move_host=told.move_host,
            move_ae=told.move_ae,
            move_first=told.move_first,
            move_tls=_move_tls(told, ca, certificate, key),
            tls=tls or (tls_context() if told.tls else None),
            **more,
        )
    from radloop.dicom.pacs.web import DicomWeb

    token, password = (secret(one, home).decode() if one else "" for one in (told.token, told.password))
    return DicomWeb(name, told.url, token=token, user=told.user, password=password, tls=tls, **more)


def _move_tls(told: DimsePacs, ca: Path | None, certificate: Path | None, key: Path | None) -> SSLContext | None:
    """What the PACS sends to us by: TLS where we speak TLS to it."""
    from radloop.dicom.tls import server_context

    if told.move_port is None or not (told.tls or ca or certificate):
        return None
    if certificate is None or key is None:
        raise SettingsError(
            "by C-MOVE images would come without TLS",
            expected="certificate and key of ours, for the port that the PACS sends to",
            next_step=f"set both under [pacs.NAME] in {FILE}, or leave move_port out and fetch by C-GET",
        )
    return server_context(certificate, key, ca)


def fetch_target(home: Path, name: str, landing: Landing, catalog: Catalog) -> Target:
    """Where instances of a PACS of [pacs] go, how quickly, and when."""
    from radloop.dicom.pacs.fetch import Target

    settings = settings_of(home)
    told = settings.pacs[name]
    return Target(
        landing,
        catalog,
        pseudonymiser(home, settings.deidentify.key),
        told.site,
        per_s=told.max_instances_per_s,
        hours=told.hours,
    )


def loop_profile(name: str, options: Sequence[str]) -> Profile:
    """The de-identification profile of the loop, whose archive and catalog hold pseudonymous UIDs only.

    Raises:
        SettingsError: no such profile or option, a contradiction, or retain-uids.
    """
    from radloop.dicom.profile import chosen

    profile = chosen(name, options)
    if profile.keeps_uids:
        raise SettingsError(
            "the loop's archive cannot keep original UIDs (option retain-uids, 113110)",
            expected="options without it; the archive and the catalog are keyed by pseudonyms",
            next_step="`radloop deidentify IN OUT --option retain-uids` writes such files elsewhere",
        )
    return profile


def face_cleaner_of(command: Sequence[str], timeout_s: float) -> FaceCleaner | None:
    """The face cleaner of these settings; None if there is none. Raises SettingsError: a command that is none."""
    from radloop.dicom.deidentify.face_cleaner import FaceCleaner

    return FaceCleaner(tuple(command), timeout_s) if command else None


def check(settings: Settings) -> None:
    """Check the sections that a room reads, before a long run meets a typo.

    Raises:
        SettingsError: an unknown name, with the nearest known one, or a value of a wrong type.
    """
    from radloop.dicom.burned_in import Pixels
    from radloop.dicom.deidentify import Deidentifier
    from radloop.dicom.uids import MIN_KEY_BYTES, Pseudonymiser
    from radloop.imaging.transforms import Preprocessing
    from radloop.learning.evaluate import EvaluateConfig
    from radloop.learning.gates import GateConfig
    from radloop.learning.train import TrainConfig
    from radloop.monitoring.drift import Thresholds
    from radloop.serving.judge import Margins
    from radloop.stages.approvals import approvers_of

    approvers_of(settings)
    chosen = settings.deidentify
    Deidentifier(
        Pseudonymiser(bytes(MIN_KEY_BYTES)),
        profile=loop_profile(chosen.profile, chosen.options),
        pixels=Pixels(chosen.pixels, chosen.pixel_rules),
        face_cleaner=face_cleaner_of(chosen.face_cleaner, chosen.face_timeout_s),
    )
    for name, values, struct in (
        ("preprocess", settings.preprocess, Preprocessing),
        ("train", settings.train, TrainConfig),
        ("evaluate", settings.evaluate, EvaluateConfig),
        ("gates", settings.gates, GateConfig),
        ("watch.drift", settings.watch.drift, Thresholds),
        ("release.judge", settings.release.judge, Margins),
    ):
        section(name, values, struct)


def section(name: str, values: dict[str, Any], struct: type[T]) -> T:
    """One section of radloop.toml as the room that reads it wants it. Raises SettingsError on what it does not know."""
    known = [field.name for field in msgspec.structs.fields(struct)]
    for given in values:
        if given not in known:
            near = difflib.get_close_matches(given, known, 1)
            raise SettingsError(
                f"{FILE}: [{name}] has no setting {given!r}",
                expected=", ".join(known),
                next_step=f"did you mean {near[0]!r}?" if near else "see the comments in it",
            )
    try:
        return msgspec.convert(values, struct)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{FILE}: [{name}] {error}", next_step="see the comments in it") from None

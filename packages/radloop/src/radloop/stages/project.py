"""A project folder, opened: what stages and commands find in it. The one place where settings become objects."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from radloop.errors import SettingsError
from radloop.settings import FILE, Settings, load, secret

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.dicom.landing import Landing
    from radloop.dicom.uids import Pseudonymiser
    from radloop.learning.tracking import Tracking

T = TypeVar("T", bound=msgspec.Struct)


def settings_of(home: Path) -> Settings:
    """The project's settings; the defaults where it has no radloop.toml (an engine's test project)."""
    return load(home) if (home / FILE).exists() else Settings()


def open_catalog(home: Path) -> Catalog:
    """The project's catalog: `catalog` in radloop.toml, or catalog.db in the project folder."""
    from radloop.catalog.store import Catalog

    return Catalog(settings_of(home).catalog or f"sqlite:///{home.resolve() / 'catalog.db'}")


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
        return Tracking(settings.mlflow.uri, artifacts, settings.task.name)
    return Tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts", settings.task.name)


def check(settings: Settings) -> None:
    """Check the sections that a room reads, before a long run meets a typo.

    Raises:
        SettingsError: an unknown name, with the nearest known one, or a value of a wrong type.
    """
    from radloop.imaging.transforms import Preprocessing
    from radloop.learning.evaluate import EvaluateConfig
    from radloop.learning.gates import GateConfig
    from radloop.learning.train import TrainConfig
    from radloop.monitoring.drift import Thresholds
    from radloop.serving.judge import Margins

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

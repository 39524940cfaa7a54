"""A project folder, opened: what stages and commands find in it. The one place where settings become objects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from radloop.settings import FILE, Settings, load, secret

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.dicom.landing import Landing
    from radloop.dicom.uids import Pseudonymiser
    from radloop.learning.tracking import Tracking


def settings_of(home: Path) -> Settings:
    """The project's settings; the defaults where it has no radloop.toml (an engine's test project)."""
    return load(home) if (home / FILE).exists() else Settings()


def open_catalog(home: Path) -> Catalog:
    """The project's catalog: `catalog` in radloop.toml, or catalog.db in the project folder."""
    from radloop.catalog.store import Catalog

    return Catalog(settings_of(home).catalog or f"sqlite:///{home.resolve() / 'catalog.db'}")


def pseudonymiser(home: Path, key: str) -> Pseudonymiser:
    """The pseudonymiser of the project key that `key` refers to."""
    from radloop.dicom.uids import Pseudonymiser

    return Pseudonymiser(secret(key, home))


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
    return Tracking(
        settings.mlflow.uri or f"sqlite:///{folder / 'mlflow.db'}",
        settings.mlflow.artifacts or (folder / "artifacts").as_uri(),
        settings.mlflow.experiment or settings.task.name,
    )

"""The catalog: one object over one database."""

from __future__ import annotations

from types import TracebackType

from radloop.catalog.fetched import Fetched
from radloop.catalog.labels import Labels
from radloop.catalog.ledger import Ledger
from radloop.catalog.lineage import Lineage
from radloop.catalog.patients import Patients
from radloop.catalog.studies import Studies
from radloop.catalog.withdrawals import Withdrawals


class Catalog(Studies, Withdrawals, Labels, Lineage, Patients, Fetched):
    """Instances, studies, quarantine, labels, patients' parts, dataset versions, models and the ledger of one project.

    Safe for several threads and several processes. Nothing identified is in it.

    Args:
        url: an SQLAlchemy URL: `sqlite:////home/catalog.db` (WAL; made when missing) or `postgresql+psycopg2://...`.

    Raises:
        SettingsError: the schema is newer than this code.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.ledger = Ledger(self)

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()

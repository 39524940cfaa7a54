"""Finding and fetching from a PACS: one interface, `Pacs`, over two adapters, and the work above both.

- `dimse.Dimse`: C-ECHO, C-FIND, C-GET, C-MOVE and C-STORE (PS3.4 Annexes A to C);
- `web.DicomWeb`: QIDO-RS, WADO-RS and STOW-RS (PS3.18 section 10);
- `fetch.fetch`: what is new at a PACS, into the landing zone: incremental, paced, resumed after every kind of stop.

Queries and answers identify patients: their `repr` shows none of it, and nothing here logs a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from radloop.dicom.landed import Buffer
from radloop.dicom.pacs.pace import Patience, again
from radloop.errors import PacsError, PacsUnavailable

if TYPE_CHECKING:
    from radloop.dicom.pacs.search import Answer

Sink = Callable[[Buffer], None]
"""Takes one instance, a whole Part 10 file (PS3.10), as it arrives. What it raises ends the fetch."""


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which studies. What is empty matches all; several values of one key are alternatives; all keys must fit.

    `begin` and `end`: StudyDate, both included. `description`: `*` is any text and `?` any character, whatever its case.
    It is compared with StudyDescription here, since PACS differ in case and in character sets: it narrows what is
    found, not what the PACS must list, so give dates too.
    """

    modalities: tuple[str, ...] = ()
    begin: date | None = None
    end: date | None = None
    description: str = ""
    accessions: tuple[str, ...] = ()
    patient_ids: tuple[str, ...] = ()
    study_uids: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """Names of the keys that are set: what may be told of a query."""
        return [name for name in self.__struct_fields__ if getattr(self, name)]

    def __repr__(self) -> str:
        return f"Query({', '.join(self.keys)})"


class StudyFound(msgspec.Struct, frozen=True, kw_only=True):
    """A study as a PACS describes it, identifying. `instances` is None where the PACS does not say."""

    study_uid: str
    study_date: str = ""
    study_time: str = ""
    description: str = ""
    modalities: tuple[str, ...] = ()
    accession: str = ""
    patient_id: str = ""
    patient_name: str = ""
    instances: int | None = None

    def __repr__(self) -> str:
        return "StudyFound(...)"


class SeriesFound(msgspec.Struct, frozen=True, kw_only=True):
    """A series of a study. `instances` is None where the PACS does not say."""

    series_uid: str
    modality: str = ""
    description: str = ""
    instances: int | None = None

    def __repr__(self) -> str:
        return "SeriesFound(...)"


class InstanceFound(msgspec.Struct, frozen=True, kw_only=True):
    """An instance of a study. `sop_class_uid` is empty where the PACS does not say."""

    sop_uid: str
    series_uid: str
    sop_class_uid: str = ""

    def __repr__(self) -> str:
        return "InstanceFound(...)"


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """How one retrieval ended: instances given to the sink, those the PACS could not send, and by which service."""

    received: int
    failed: int
    way: str


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """What a PACS said to one instance sent to it. `status`: 0 is Success (PS3.4 section B.2.3)."""

    path: Path
    status: int

    @property
    def stored(self) -> bool:
        """Success, or a warning (the Bxxx range): the PACS has it."""
        return self.status == 0 or self.status & 0xF000 == 0xB000


class Pacs(ABC):
    """A PACS. A context manager; not for several threads at once, so that one PACS sees one association of ours.

    Every method raises `PacsUnavailable` when the PACS cannot be reached, ends the connection, is too slow or too busy
    (again may help), and `PacsError` when it refuses (again will not).

    Attributes:
        name: what the project calls it; stands in messages, in the ledger and as the sender of what it gives.
        patience: how often and after which pauses a search is tried again. `fetch` is tried again by its caller, who
            knows what has arrived.
        cut_at: a PACS that cuts its lists without a word does so at this many answers; 0: it does not.
    """

    def __init__(self, name: str, *, patience: Patience | None = None, cut_at: int = 0) -> None:
        self.name, self.patience, self.cut_at = name, patience or Patience(), cut_at

    @abstractmethod
    def echo(self) -> None:
        """Ask whether it is there and knows us; returns if so."""

    def find(self, query: Query) -> Iterator[StudyFound]:
        """The studies that fit, each once. A PACS that ignores a key is corrected: its answers are looked at again."""
        from radloop.dicom.pacs.search import studies

        return studies(self, query)

    @abstractmethod
    def series(self, study_uid: str) -> list[SeriesFound]:
        """The series of a study."""

    @abstractmethod
    def instances(self, study_uid: str, series_uid: str | None = None) -> list[InstanceFound]:
        """The instances of a study, or of one of its series."""

    def count(self, study_uid: str) -> int | None:
        """How many instances a study has: what the PACS says of it, else how many it lists. None: no such study."""
        found = next(self.find(Query(study_uids=(study_uid,))), None)
        if found is None:
            return None
        return found.instances if found.instances is not None else len(self.listed(study_uid))

    def listed(self, study_uid: str) -> list[InstanceFound]:
        """As `instances` of the whole study, tried again after a failure."""
        return again(lambda: self.instances(study_uid), self.patience)

    @abstractmethod
    def fetch(
        self,
        study_uid: str,
        sink: Sink,
        *,
        series_uid: str | None = None,
        instances: Sequence[InstanceFound] | None = None,
        attempt: int = 0,
    ) -> Fetched:
        """Retrieve a study, one of its series, or some instances of it, in the encoding the PACS keeps them in.

        `attempt`: how often these were asked for and did not come, which makes an adapter ask in another way.

        One instance at a time is in memory. What the sink took before an error stays taken.
        """

    @abstractmethod
    def send(self, files: Iterable[Path]) -> list[Sent]:
        """Send DICOM files to it, as they are."""

    @abstractmethod
    def search(self, keys: dict[str, str]) -> tuple[list[Answer], bool]:
        """One search at the study level: the answers, and whether they are all (False: the PACS cut its list)."""

    @abstractmethod
    def close(self) -> None:
        """End all connections; the object opens new ones when it is used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()


__all__ = [
    "Fetched",
    "InstanceFound",
    "Pacs",
    "PacsError",
    "PacsUnavailable",
    "Patience",
    "Query",
    "Sent",
    "SeriesFound",
    "Sink",
    "StudyFound",
]

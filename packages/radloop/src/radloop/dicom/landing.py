"""Where instances land: durable before anybody is told so, registered, or kept in quarantine with a reason.

Order of a batch, so that a kill at any moment loses nothing that was acknowledged and doubles nothing:

1. the crosswalk: what the pseudonyms stand for, and for each file its site, sender and path;
2. the bytes, under their identity (`radloop.dicom.landed`), in `landing/` or `quarantine/`: temporary name, fsync, rename,
   fsync of the folder;
3. the catalog, in one transaction.

Killed after 1: nothing is visible. After 2: files without a row, which `Landing.recover` registers, knowing from the
crosswalk whence they came. Names are identities, so everything may be repeated.

What C-STORE brings (`Received`) has its own, quicker order. radloop writes the header of these files and puts in, under a seal,
whence they came; so the fsynced file alone is enough to make crosswalk entry and row again:

1. the crosswalk;
2. the file: written as it comes, without a name; then link to its name, fsync of file and folder;
3. the catalog. Both databases commit once for all associations that wait, without fsync (`synchronous = NORMAL`).

Then Success is answered: every reader sees the instance. A kill cannot take a commit, since it is in the system's memory. A power
cut may take the last commits of either database, never a file: `Landing.recover`, which runs whenever a project's landing is
opened to be used, finds files without a row and rows without a crosswalk entry, and makes both anew, in the order in which they
came. Only a new instance is recorded that way. A revision, a conflict, a refusal change what is known already: these are
committed with fsync, as a batch is, which makes all earlier commits durable too. A file that a power cut tore was never
acknowledged; its bytes are not those that its name says, and recovery removes it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import msgspec

from radloop.catalog.schema import (
    RELEASABLE,
    Instance,
    InstanceRow,
    Quarantined,
    QuarantineState,
    Reason,
    Recorded,
    Status,
)
from radloop.catalog.store import Catalog
from radloop.dicom.arrival import Arrival as Arrival  # this room's words
from radloop.dicom.arrival import Mismatch as Mismatch
from radloop.dicom.arrival import Outcome as Outcome
from radloop.dicom.arrival import OutcomeKind as OutcomeKind
from radloop.dicom.arrival import Received as Received
from radloop.dicom.arrival import arrival_from, check_announced, is_announced
from radloop.dicom.folder import FolderReport, SiteOf, receive_folder
from radloop.dicom.header import Header, read_header
from radloop.dicom.identity import Crosswalk, Entry, Identity, Row
from radloop.dicom.landed import identity, make_folders, place, write_durably
from radloop.dicom.recorder import Together
from radloop.dicom.same_pixels import same_pixels
from radloop.dicom.spool import Spool
from radloop.dicom.uids import Pseudonymiser, normalise
from radloop.errors import DataError, DicomError

STAGE = "landing"
_REMEMBERED = 4096


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of `Landing.recover`: files registered, torn and half-written ones removed, those of unknown origin left."""

    registered: int
    removed: int
    unknown: int


class _Item(msgspec.Struct):
    """An arrival on its way through a batch."""

    arrival: Arrival
    sha256: str
    header: Header | None = None
    row: InstanceRow | None = None
    refusal: DicomError | None = None
    sop_uid: str | None = None
    outcome: Outcome | None = None


class Landing:
    """`home/landing` and `home/quarantine` (both 0700, files 0600). Safe for several threads and processes.

    Args:
        home: the project's folder.
        catalog: where instances are registered, under pseudonyms.
        pseudonymiser: the project key.
        crosswalk: where the originals are kept, encrypted.
    """

    def __init__(self, home: Path, catalog: Catalog, pseudonymiser: Pseudonymiser, crosswalk: Crosswalk) -> None:
        self.home = Path(home)
        self._catalog, self._pseudonymiser, self._crosswalk = catalog, pseudonymiser, crosswalk
        self.landing, self.quarantine = self.home / "landing", self.home / "quarantine"
        for folder in (self.landing, self.quarantine):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        self._put_together: Together[list[Row], int] = Together(self._put)
        self._record_together: Together[InstanceRow, Recorded | None] = Together(catalog.record_new)
        # All instances of a study share these.
        self._uid = lru_cache(_REMEMBERED)(pseudonymiser.uid)
        self._patient = lru_cache(_REMEMBERED)(pseudonymiser.patient)
        self._accession = lru_cache(_REMEMBERED)(pseudonymiser.accession)

    @property
    def catalog(self) -> Catalog:
        """Where instances are registered."""
        return self._catalog

    def pseudonym(self, uid: str) -> str:
        """What stands for a UID."""
        return self._uid(uid)

    # Receiving

    def receive(self, data: bytes | Path, *, site: str, sender: str, relative_path: str | None = None) -> Outcome:
        """Take one file: durable in landing (or quarantine), crosswalk and catalog before this returns.

        Args:
            data: the bytes of a DICOM file, or its path.
            site: the configured code of the sender's site; it stands in for a missing IssuerOfPatientID.
            sender: AE title, or what else sent it; without PHI.
            relative_path: path within the input folder.

        Bad DICOM never raises: it is quarantined with a reason.

        Raises:
            StorageFull: no space left; nothing was accepted.
        """
        content = data if isinstance(data, bytes) else Path(data).read_bytes()
        return self.receive_many([Arrival(data=content, site=site, sender=sender, relative_path=relative_path)])[0]

    def receive_many(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """As `receive`, with one commit for all: durable together when this returns."""
        with self._lock(fcntl.LOCK_SH):
            return self._receive(arrivals)

    def _receive(self, arrivals: Sequence[Arrival], *, again: bool = False) -> list[Outcome]:
        """`again`: look anew at bytes that quarantine holds."""
        items = [_Item(arrival, _identity(arrival)) for arrival in arrivals]
        self._pass_over_known(items, again=again)
        fresh = [item for item in items if item.outcome is None]
        for item in fresh:
            self._read(item)
        self._keep(fresh)
        return [item.outcome for item in items if item.outcome is not None]

    def receive_one(self, arrival: Received) -> Outcome:
        """Take what C-STORE brought: durable and in the catalog when this returns. See this module's docstring.

        Raises:
            StorageFull: no space left; nothing was accepted.
            Mismatch: another SOP class or instance than was announced; nothing was kept.
        """
        with self._lock(fcntl.LOCK_SH):
            item = _Item(arrival, arrival.sha256)
            if not self._catalog.unseen(item.sha256, self._pseudonymiser.key_id):
                self._pass_over_known([item], again=False)
            if item.outcome is None and (not is_announced(arrival) or not self._is_new(item, arrival.spool)):
                if item.row is None and item.refusal is None:
                    self._read(item)
                self._keep([item])
            assert item.outcome is not None
            return item.outcome

    def _is_new(self, item: _Item, spool: Spool | None) -> bool:
        """Keep it the quick way if it is new. False: all of it must be kept the careful way."""
        self._read(item)
        if item.row is None:
            return False
        if rows := self._crosswalk.encrypted(_identities(item)):
            self._put_together(rows)
        place(self.landed(item.sha256), item.arrival.data, spool)
        if self._record_together(item.row) is not Recorded.NEW:
            return False
        item.outcome = Outcome(OutcomeKind.NEW, item.sop_uid, None, item.sha256)
        return True

    def _put(self, groups: list[list[Row]]) -> list[int]:
        self._crosswalk.put_rows([row for rows in groups for row in rows], durable=False)
        return [len(rows) for rows in groups]

    def prepare(self) -> None:
        """Make the folders of all identities now: made when they are first needed, each costs an instance two more fsyncs."""
        for folder in (self.landing, self.quarantine):
            make_folders(folder)

    def stamp(self, sha256: str, site: str, sender: str) -> bytes:
        """What makes a header of `radloop.dicom.landed` a proof of whence its file came."""
        return self._pseudonymiser.seal(sha256, site, sender)

    def remember(self, arrival: Received) -> None:
        """Make the crosswalk entries of a registered file anew, which a power cut had taken."""
        item = _Item(arrival, arrival.sha256)
        self._read(item)
        self._crosswalk.put_many(_identities(item))

    def _keep(self, fresh: Sequence[_Item]) -> None:
        """Crosswalk, files, catalog; each item gets its outcome."""
        self._crosswalk.put_many(entry for item in fresh for entry in _entries(item))
        self._write_files(fresh)
        self._register(fresh)

    def _pass_over_known(self, items: Sequence[_Item], *, again: bool) -> None:
        digests = [item.sha256 for item in items]
        known = self._catalog.known_sources(digests, self._pseudonymiser.key_id)
        held = {} if again else self._catalog.held_sources(digests)
        keys = []
        for item in items:
            stored = known.get(item.sha256)
            if stored is not None:
                if stored.status == Status.RECEIVED and not self.landed(item.sha256).exists():
                    continue  # still needed, and gone: write it again; the catalog will say SAME
                if item.arrival.relative_path is not None:
                    keys.append((self._pseudonymiser.file(item.arrival.relative_path), stored.sop_uid))
                item.outcome = Outcome(OutcomeKind.SAME, stored.sop_uid, None, item.sha256)
            elif item.sha256 in held and self.quarantined(item.sha256).exists():
                row = held[item.sha256]
                kind = OutcomeKind.CONFLICT if row.reason is Reason.UID_CONFLICT else OutcomeKind.QUARANTINED
                item.outcome = Outcome(kind, row.sop_uid, row.reason, item.sha256)
        if keys:
            self._catalog.add_file_keys(keys)

    def _read(self, item: _Item) -> None:
        """Header to row, or to a refusal."""
        try:
            item.header = header = read_header(item.arrival.data)
            check_announced(item.arrival, header)
            item.sop_uid = self._pseudonymiser.uid(header.sop_uid)
            item.row = self._row(item, header)
        except DicomError as error:
            item.refusal = error

    def _row(self, item: _Item, header: Header) -> InstanceRow:
        arrival, pseudonym = item.arrival, self._pseudonymiser
        issuer = header.issuer or arrival.site
        return InstanceRow(
            sop_uid=item.sop_uid or pseudonym.uid(header.sop_uid),
            study_uid=self._uid(header.study_uid),
            series_uid=self._uid(header.series_uid),
            patient=self._patient(header.patient_id, issuer),
            key_id=pseudonym.key_id,
            # The site numbers its studies, whoever issued the patient's identifier.
            accession_key=self._accession(header.accession, arrival.site) if normalise(header.accession) else None,
            file_key=pseudonym.file(arrival.relative_path) if arrival.relative_path else None,
            site=arrival.site,
            sender=arrival.sender,
            sop_class_uid=header.sop_class_uid,
            modality=header.modality,
            transfer_syntax_uid=header.transfer_syntax_uid,
            source_sha256=item.sha256,
            source_bytes=len(arrival.data),
        )

    def _write_files(self, items: Sequence[_Item]) -> None:
        targets = {
            self.landed(item.sha256) if item.row is not None else self.quarantined(item.sha256): item.arrival.data
            for item in items
        }
        write_durably(targets)

    def _register(self, items: Sequence[_Item]) -> None:
        accepted = [(item, item.row) for item in items if item.row is not None]
        verdicts = self._catalog.record_many([row for _, row in accepted], self._same_pixels) if accepted else []
        for (item, row), verdict in zip(accepted, verdicts, strict=True):
            if verdict is Recorded.CONFLICT:
                self._quarantine_conflict(item, row)
            else:
                item.outcome = Outcome(OutcomeKind(verdict), row.sop_uid, None, item.sha256)
        for item in items:
            if item.refusal is not None:
                reason = Reason(item.refusal.reason)
                self._hold(item, reason, item.refusal.what)
                item.outcome = Outcome(OutcomeKind.QUARANTINED, item.sop_uid, reason, item.sha256)

    def _quarantine_conflict(self, item: _Item, row: InstanceRow) -> None:
        write_durably({self.quarantined(item.sha256): item.arrival.data})
        detail = "the SOPInstanceUID is known with other pixels, or with pixels that could not be decoded to compare"
        self._hold(item, Reason.UID_CONFLICT, detail)
        if self._catalog.known(item.sha256, row.key_id) is None:
            self.landed(item.sha256).unlink(missing_ok=True)
        item.outcome = Outcome(OutcomeKind.CONFLICT, row.sop_uid, Reason.UID_CONFLICT, item.sha256)

    def _hold(self, item: _Item, reason: Reason, detail: str, *, stage: str = STAGE) -> None:
        self._catalog.quarantine(
            stage=stage,
            reason=reason,
            detail=detail,
            source_sha256=item.sha256,
            sop_uid=item.sop_uid,
            site=item.arrival.site,
        )

    def _same_pixels(self, row: InstanceRow, stored: Instance) -> bool:
        stored_path = self.landed(stored.source_sha256)
        if not stored_path.exists() and stored.archive_path is not None:
            stored_path = self.home / "archive" / stored.archive_path
        return same_pixels(self.landed(row.source_sha256), stored_path)

    # Files

    def landed(self, sha256: str) -> Path:
        """Where accepted bytes lie."""
        return self.landing / sha256[:2] / f"{sha256}.dcm"

    def quarantined(self, sha256: str) -> Path:
        """Where refused bytes lie that never became an instance."""
        return self.quarantine / sha256[:2] / f"{sha256}.bin"

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        """Receiving shares the lock; who removes files has it alone."""
        handle = os.open(self.landing / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)

    def keep_refused(self, arrivals: Sequence[tuple[Arrival, Reason, str]], *, stage: str) -> None:
        """Keep bytes that were refused before they became DICOM: (arrival, reason, detail without PHI)."""
        with self._lock(fcntl.LOCK_SH):
            items = [(_Item(a, _identity(a)), reason, detail) for a, reason, detail in arrivals]
            self._crosswalk.put_many(entry for item, _, _ in items for entry in _entries(item))
            self._write_files([item for item, _, _ in items])
            for item, reason, detail in items:
                self._hold(item, reason, detail, stage=stage)

    def receive_folder(
        self,
        folder: Path,
        *,
        site: SiteOf,
        sender: str = "folder",
        progress: Callable[[int, int], None] | None = None,
    ) -> FolderReport:
        """Receive every file below a folder: see `radloop.dicom.folder.receive_folder`."""
        return receive_folder(self, Path(folder), site=site, sender=sender, progress=progress)

    def seal(self, *, actor: str) -> bool:
        """Close the ingest batch with one ledger row; False when nothing arrived since the last."""
        return self._catalog.seal_ingest(actor=actor) is not None

    def complete(self, sender: str) -> None:
        """All has come that this sender had: studies of which everything new is from it need not wait until they are quiet."""
        self._catalog.release_from(sender, actor=sender)

    def studies(self, pseudonyms: Iterable[str], *, who: str, why: str) -> dict[str, str]:
        """Pseudonym -> original StudyInstanceUID, of those that are known; the ledger notes who asked, and why."""
        found = self._crosswalk.get_many(Identity.STUDY, pseudonyms, who=who, why=why)
        return {pseudonym: values["StudyInstanceUID"] for pseudonym, values in found.items()}

    def use_now(self, sop_uid: str, *, by: str) -> None:
        """A person decided that an instance (pseudonym) is to be used: its study need not wait until it is quiet."""
        self._catalog.release_instance(sop_uid, actor=by)

    # After a kill

    def recover(self) -> Recovered:
        """Register files that a kill or a power cut left unregistered, make lost crosswalk entries anew, remove torn files."""
        from radloop.dicom.recovery import recover

        with self._lock(fcntl.LOCK_EX):
            return recover(self)

    # Decisions of a person about what quarantine holds

    def retry(self, quarantine_id: int, *, by: str) -> Outcome:
        """Look at a held entry anew, as if it came again: after a correction of radloop or of its settings.

        An instance that a stage had refused becomes `received` again, and every stage looks at it anew.

        Raises:
            DataError: no such entry, it is not held, or its bytes are gone.
        """
        row = self._held(quarantine_id)
        if row.revision is None and row.stage != STAGE:
            raise DataError(
                f"quarantine entry {row.id} holds no DICOM",
                next_step=f"correct the file and run `radloop {row.stage}` again, then purge this entry",
            )
        if row.revision is not None:
            self._catalog.settle(row.id, QuarantineState.RETRIED, by=by, outcome="received")
            return Outcome(OutcomeKind.SAME, row.sop_uid, None, row.source_sha256)
        with self._lock(fcntl.LOCK_EX):
            arrival = self._held_arrival(row, by=by, why=f"retry of quarantine {row.id}")
            outcome = self._receive([arrival], again=True)[0]
            if outcome.reason is not row.reason:
                self._catalog.settle(row.id, QuarantineState.RETRIED, by=by, outcome=outcome.kind)
            if outcome.reason is None:
                self.quarantined(row.source_sha256).unlink(missing_ok=True)
        return outcome

    def release(self, quarantine_id: int, *, by: str) -> Outcome:
        """Use a held entry although it was refused. Of two instances with one UID, this one replaces the other.

        Raises:
            DataError: no such entry, it is not held, or its reason is one that nobody can overrule (no pixels, no
                patient, PHI).
        """
        row = self._held(quarantine_id)
        if row.reason not in RELEASABLE:
            raise DataError(
                f"what is held for {row.reason} cannot be released",
                expected=f"one of {', '.join(sorted(RELEASABLE))}",
                got=row.reason,
                next_step=f"correct it at its source and send it again, or `radloop quarantine retry {row.id}`",
            )
        if row.revision is not None:
            self._catalog.settle(row.id, QuarantineState.RELEASED, by=by, outcome="in use")
            return Outcome(OutcomeKind.SAME, row.sop_uid, None, row.source_sha256)
        with self._lock(fcntl.LOCK_EX):
            item = _Item(self._held_arrival(row, by=by, why=f"release of quarantine {row.id}"), row.source_sha256)
            self._read(item)
            if item.row is None:
                raise DataError("these bytes cannot be used as they are", got=item.refusal and item.refusal.reason)
            self._crosswalk.put_many(_entries(item))
            self._write_files([item])
            verdict = self._catalog.replace(item.row, by=by)
            self._catalog.settle(row.id, QuarantineState.RELEASED, by=by, outcome=verdict)
            self.quarantined(row.source_sha256).unlink(missing_ok=True)
        return Outcome(OutcomeKind(verdict), item.sop_uid, None, row.source_sha256)

    def purge(self, quarantine_id: int, *, by: str) -> None:
        """Remove the bytes of a held entry for good. Its row stays, and says who did it.

        Raises:
            DataError: no such entry, or it is not held.
        """
        row = self._held(quarantine_id)
        with self._lock(fcntl.LOCK_EX):
            # Bytes first: killed in between, the entry is still held and can be purged again.
            self.quarantined(row.source_sha256).unlink(missing_ok=True)
            if row.revision is not None:
                self.landed(row.source_sha256).unlink(missing_ok=True)
            for held in self._catalog.quarantined(source_sha256=row.source_sha256):
                self._catalog.settle(held.id, QuarantineState.PURGED, by=by, outcome="bytes removed")

    def _held(self, quarantine_id: int) -> Quarantined:
        row = self._catalog.quarantine_row(quarantine_id)
        if row.state is not QuarantineState.HELD:
            raise DataError(
                f"quarantine entry {quarantine_id} is settled",
                expected="an entry that is held",
                got=f"{row.state} by {row.by}",
                next_step="`radloop quarantine list` shows what is held",
            )
        return row

    def _held_arrival(self, row: Quarantined, *, by: str, why: str) -> Arrival:
        path = self.quarantined(row.source_sha256)
        source = self._crosswalk.get(Identity.SOURCE, row.source_sha256, who=by, why=why)
        if source is None or not path.exists():
            raise DataError(f"the bytes of quarantine entry {row.id} are gone", next_step="send the instance again")
        return arrival_from(path.read_bytes(), source)


def _identity(arrival: Arrival) -> str:
    return arrival.sha256 if isinstance(arrival, Received) else identity(arrival.data)


def _entries(item: _Item) -> Iterator[Entry]:
    arrival = item.arrival
    source = {"site": arrival.site, "sender": arrival.sender, "path": arrival.relative_path or ""}
    yield Entry(Identity.SOURCE, item.sha256, source)
    yield from _identities(item)


def _identities(item: _Item) -> Iterator[Entry]:
    """What the pseudonyms of an instance stand for; whence it came is not among it."""
    arrival = item.arrival
    if item.row is None or item.header is None:
        return
    row, header = item.row, item.header
    patient = {"PatientID": header.patient_id, "IssuerOfPatientID": header.issuer, "site": arrival.site}
    yield Entry(Identity.PATIENT, row.patient, patient)
    yield Entry(Identity.STUDY, row.study_uid, {"StudyInstanceUID": header.study_uid})
    yield Entry(Identity.SERIES, row.series_uid, {"SeriesInstanceUID": header.series_uid})
    yield Entry(Identity.INSTANCE, row.sop_uid, {"SOPInstanceUID": header.sop_uid})
    if row.accession_key is not None:
        yield Entry(Identity.ACCESSION, row.accession_key, {"AccessionNumber": header.accession})

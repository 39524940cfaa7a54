"""What is new at a PACS, into the landing zone: found, compared with the catalog, retrieved, looked after.

The catalog is the memory. Before a study is retrieved its instances are listed and those that are here already are left
out; after it, what is missing is asked for again, one list of instances at a time. So a kill, a dropped association, a
study that has grown and a second run are all the same case, and nothing is taken twice. A batch that was not committed
when a process died is simply missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from radloop.catalog.audit import record
from radloop.catalog.fetched import FetchedStudy
from radloop.dicom.landed import Buffer
from radloop.dicom.landing import Arrival, Landing, OutcomeKind
from radloop.dicom.pacs import InstanceFound, Pacs, Query, StudyFound
from radloop.dicom.pacs.pace import Hours, Rate
from radloop.errors import PacsError, PacsUnavailable

if TYPE_CHECKING:
    from radloop.catalog.store import Catalog
    from radloop.dicom.uids import Pseudonymiser

LOG = logging.getLogger(__name__)

_BATCH, _BATCH_BYTES = 64, 32 << 20
_ATTEMPTS = 3
_REFUSED_IN_A_ROW = 3

Progress = Callable[[int, int], None]


class Target(msgspec.Struct, frozen=True):
    """Where fetched instances go, under which site code, how quickly, and when."""

    landing: Landing
    catalog: Catalog
    pseudonymiser: Pseudonymiser
    site: str
    per_s: float = 0.0
    hours: str = ""


class Report(msgspec.Struct, kw_only=True):
    """How a fetch ended. Studies: `found` = `fetched` + `unchanged` + `incomplete` + `left`.

    `incomplete`: instances are `missing` although they were asked for several times; they are asked for again by the next
    run. `left`: not begun, because of `limit` or of the hours. `outcomes`, `reasons`: as `Landing` counts them.
    `ways`: instances by service.
    """

    found: int = 0
    fetched: int = 0
    unchanged: int = 0
    incomplete: int = 0
    left: int = 0
    received: int = 0
    missing: int = 0
    outcomes: dict[str, int] = {}
    reasons: dict[str, int] = {}
    ways: dict[str, int] = {}
    closed: bool = False

    @property
    def summary(self) -> str:
        """One line, without PHI."""
        counts = {
            "found": self.found,
            "fetched": self.fetched,
            "unchanged": self.unchanged,
            "incomplete": self.incomplete,
            "left for later": self.left,
        }
        studies = ", ".join(f"{value:,} {name}" for name, value in counts.items() if value) or "none found"
        ways = ", ".join(f"{value:,} by {name}" for name, value in sorted(self.ways.items()))
        line = f"studies: {studies}; instances: {self.received:,} received" + (f" ({ways})" if ways else "")
        line += f", {self.missing:,} missing" if self.missing else ""
        return line + ("; outside its hours" if self.closed else "")

    @property
    def whole(self) -> bool:
        """Whether all that was found is here."""
        return not self.incomplete and not self.left


def fetch(
    pacs: Pacs,
    query: Query,
    target: Target,
    *,
    actor: str,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Retrieve the instances of the studies found that are not here yet; again, or after a kill, it goes on.

    Args:
        pacs: where from; its name is the sender.
        query: which studies; oldest first.
        target: where to.
        actor: who asks, for the ledger: there is one audit row before anything is retrieved.
        limit: most studies to retrieve.
        progress: called with instances done and known of.

    Raises:
        PacsUnavailable: the PACS was unavailable at all tries in a row; what came before is kept.
        PacsError: it refuses us, or several studies in a row; or another fetch from it is under way.
        StorageFull: no space left; what came before is kept.
    """
    with _alone(target.landing.landing, pacs.name):
        audit(target.catalog, pacs, "pacs fetch", query, actor=actor)
        found = sorted(pacs.find(query), key=lambda study: (study.study_date, study.study_time, study.study_uid))
        run = _Run(pacs, target, progress)
        try:
            return run.studies(found, limit)
        finally:
            run.close()


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """One fetch from a PACS at a time: two would load it twice, and bring the same. The lock goes with the process."""
    handle = os.open(folder / f".pacs-{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PacsError(
            f"another fetch from {name} is under way",
            expected="one at a time",
            next_step="wait until it has ended (radloop status shows runs), then try again",
        ) from None
    finally:
        os.close(handle)


def audit(catalog: Catalog, pacs: Pacs, action: str, query: Query, *, actor: str, **counts: int) -> None:
    """One audit row: who asked which PACS, and by which keys; never their values."""
    record(catalog.ledger, action, "pacs", actor=actor, detail={"pacs": pacs.name, "keys": query.keys, **counts})


def fetch_new(
    pacs: Pacs,
    query: Query,
    target: Target,
    *,
    overlap_days: int,
    actor: str,
    progress: Progress = lambda done, total: None,
) -> Report:
    """As `fetch`, looking only at study dates since the last run that left nothing open, less `overlap_days`.

    Studies that reach a PACS later than that after their StudyDate are found by `fetch` only. Queries by identifier, or
    with an end, are asked in full.
    """
    if query.end or query.accessions or query.patient_ids or query.study_uids:
        return fetch(pacs, query, target, actor=actor, progress=progress)
    digest = hashlib.sha256(repr((sorted(query.modalities), query.description)).encode()).hexdigest()
    looked = target.catalog.looked(pacs.name, digest)
    today = date.today()  # noqa: DTZ011 - StudyDate is local time
    since, asked = query.begin, query
    if looked is not None and (looked[0] is None or (since is not None and looked[0] <= since)):
        begin = looked[1] - timedelta(days=overlap_days)
        asked = msgspec.structs.replace(query, begin=max(begin, since) if since else begin)
        since = looked[0]
    report = fetch(pacs, asked, target, actor=actor, progress=progress)
    if report.whole:
        target.catalog.set_looked(pacs.name, digest, since, today)
    return report


class _Run:
    """One fetch."""

    def __init__(self, pacs: Pacs, target: Target, progress: Progress) -> None:
        self._pacs, self._target, self._progress = pacs, target, progress
        self._hours = Hours(target.hours)
        self._report = Report()
        self._intake = _Intake(target, pacs.name, self._landed)
        self._known = target.catalog.fetched(pacs.name)
        self._best = 0
        self._done = self._total = 0

    def studies(self, found: Sequence[StudyFound], limit: int | None) -> Report:
        report = self._report
        report.found = len(found)
        self._total = sum(study.instances or 0 for study in found)
        refused: list[PacsError] = []
        for number, study in enumerate(found):
            if not self._hours.open() or (limit is not None and report.fetched + report.incomplete >= limit):
                report.closed = not self._hours.open()
                report.left = report.found - number
                break
            try:
                self._study(study)
                refused.clear()
            except PacsUnavailable:
                raise
            except PacsError as error:
                refused.append(error)
                report.incomplete += 1
                report.missing += study.instances or 0
                LOG.warning("a study cannot be retrieved from %s: %s", self._pacs.name, error.what)
                if len(refused) >= _REFUSED_IN_A_ROW:
                    raise
        if refused and len(refused) == report.found - report.left - report.unchanged:
            raise refused[-1]
        report.outcomes = dict(sorted(self._intake.outcomes.items()))
        report.reasons = dict(sorted(self._intake.reasons.items()))
        return report

    def close(self) -> None:
        self._intake.close()

    def _study(self, study: StudyFound) -> None:
        uid = self._target.pseudonymiser.uid(study.study_uid)
        before = self._known.get(uid)
        if before is not None and not before.missing and before.listed == study.instances:
            self._report.unchanged += 1
            self._step(study.instances or 0)
            return
        listed = self._pacs.listed(study.study_uid)
        self._total += len(listed) - (study.instances or 0)
        missing = self._missing(listed)
        self._step(len(listed) - len(missing))
        new = bool(missing)
        if new:
            missing = self._retrieve(study.study_uid, listed, missing)
        self._target.catalog.set_fetched(
            self._pacs.name, FetchedStudy(study_uid=uid, listed=len(listed), missing=len(missing))
        )
        self._report.missing += len(missing)
        if missing:
            self._report.incomplete += 1
        elif new:
            self._report.fetched += 1
            self._target.catalog.expect({uid: self._usable(listed)})
        else:
            self._report.unchanged += 1

    def _retrieve(
        self, study_uid: str, listed: Sequence[InstanceFound], missing: list[InstanceFound]
    ) -> list[InstanceFound]:
        """Ask for what is missing until it is here or was asked for in all ways; what is missing still."""
        failures, whole = 0, True
        attempts = sorted(range(_ATTEMPTS), key=lambda attempt: attempt != self._best)
        began = len(missing)
        self._intake.nameless.clear()
        while missing and attempts:
            before = len(missing)
            try:
                self._ask(study_uid, listed, missing, attempts[0], whole=whole)
            except PacsUnavailable as error:
                missing = self._settle(listed)
                failures = 1 if len(missing) < before else failures + 1
                if failures >= self._pacs.patience.tries:
                    raise
                time.sleep(self._pacs.patience.pause_s(failures, error.retry_after_s))
                continue
            except PacsError:
                if whole and len(self._settle(listed)) == before:
                    raise
            finally:
                self._intake.flush()
            missing = self._missing(listed)
            if len(missing) <= len(self._intake.nameless):
                return []  # bytes so broken that they do not say who they are: quarantine holds them
            if len(missing) < before / 2:
                self._best = attempts[0]  # the next study comes the same way, most likely
            attempts, whole = attempts[1:], False
        if len(missing) == began:
            raise PacsError(
                f"{self._pacs.name} lists instances and sends none of them",
                next_step="see its log; by C-MOVE it must reach us: our AE title, host and move_port in its list of nodes",
            )
        return missing

    def _settle(self, listed: Sequence[InstanceFound]) -> list[InstanceFound]:
        self._intake.flush()
        return self._missing(listed)

    def _ask(
        self,
        study_uid: str,
        listed: Sequence[InstanceFound],
        missing: Sequence[InstanceFound],
        attempt: int,
        *,
        whole: bool,
    ) -> None:
        for series_uid, instances in _pieces(listed, missing, whole=whole):
            got = self._pacs.fetch(
                study_uid, self._intake.take, series_uid=series_uid, instances=instances, attempt=attempt
            )
            self._report.ways[got.way] = self._report.ways.get(got.way, 0) + got.received

    def _missing(self, listed: Sequence[InstanceFound]) -> list[InstanceFound]:
        """Of the instances of a study, those that have not come."""
        pseudonym = self._target.pseudonymiser.uid
        uids = {one.sop_uid: pseudonym(one.sop_uid) for one in listed}
        here = self._target.catalog.have(uids.values())
        return [one for one in listed if uids[one.sop_uid] not in here]

    def _usable(self, listed: Sequence[InstanceFound]) -> int:
        """How many of them did not go to quarantine: what makes the study complete."""
        pseudonym = self._target.pseudonymiser.uid
        return len(self._target.catalog.in_use(pseudonym(one.sop_uid) for one in listed))

    def _landed(self, count: int) -> None:
        self._report.received += count
        self._step(count)

    def _step(self, count: int) -> None:
        self._done += count
        self._progress(min(self._done, self._total), self._total)


class _Intake:
    """Takes instances as they come, not faster than allowed, and gives them to the landing zone in batches.

    One batch is written while the next one comes: no more than two are in memory.
    """

    def __init__(self, target: Target, sender: str, landed: Callable[[int], None]) -> None:
        self._target, self._sender, self._landed = target, sender, landed
        self._rate = Rate(target.per_s)
        self._batch: list[Arrival] = []
        self._bytes = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fetched")
        self._writing: Future[None] | None = None
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.nameless: set[str] = set()

    def take(self, data: Buffer) -> None:
        """One instance. Raises what writing an earlier batch raised."""
        self._rate.wait()
        self._batch.append(Arrival(data=data, site=self._target.site, sender=self._sender))
        self._bytes += len(data)
        if len(self._batch) >= _BATCH or self._bytes >= _BATCH_BYTES:
            self._write_behind()

    def flush(self) -> None:
        """All that came is durable and in the catalog when this returns."""
        self._write_behind()
        self._written()

    def close(self) -> None:
        """End the writer; what it has begun is written."""
        self._writer.shutdown()

    def _write_behind(self) -> None:
        self._written()
        batch, self._batch, self._bytes = self._batch, [], 0
        if batch:
            self._writing = self._writer.submit(self._write, batch)

    def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, batch: list[Arrival]) -> None:
        for outcome in self._target.landing.receive_many(batch):
            self.outcomes[str(outcome.kind)] += 1
            if outcome.reason is not None:
                self.reasons[str(outcome.reason)] += 1
            if outcome.kind is OutcomeKind.QUARANTINED and outcome.sop_uid is None:
                self.nameless.add(outcome.sha256)
        self._landed(len(batch))


def _pieces(
    listed: Sequence[InstanceFound], missing: Sequence[InstanceFound], *, whole: bool
) -> Iterator[tuple[str | None, list[InstanceFound] | None]]:
    """What to ask for: the study where all is missing, else whole series, else instances: (series, instances)."""
    if whole and len(missing) == len(listed):
        yield None, None
        return
    of_series = Counter(one.series_uid for one in listed)
    by_series: dict[str, list[InstanceFound]] = {}
    for one in missing:
        by_series.setdefault(one.series_uid, []).append(one)
    for series_uid, instances in by_series.items():
        all_missing = whole and len(instances) == of_series[series_uid]
        yield (series_uid, None) if all_missing else (None, instances)

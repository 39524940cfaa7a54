"""What a listener can say of itself: for a screen, for metrics. No name, no identifier of a patient."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter

import msgspec

from radloop.catalog.schema import now
from radloop.dicom.landing import OutcomeKind

BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the histogram of store durations, in seconds."""


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """One association that is open: who called, since when (ISO 8601, UTC), what it has brought."""

    calling_ae: str
    since: str
    instances: int
    bytes: int


class LastError(msgspec.Struct, frozen=True, kw_only=True):
    """The last thing that went wrong: when (ISO 8601, UTC), with whom, what."""

    at: str
    calling_ae: str
    what: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Rates come from two of them: difference of `instances` or `bytes` over that of `at_s`.

    Attributes:
        at_s: seconds on a clock that only goes forward.
        associations: those open now, the oldest first.
        counts: as `Listener.counts`.
        rejected: associations refused, by reason: `calling AE`, `called AE`, `limit`, `TLS`, `other`.
        aborted: associations that ended otherwise than by a release.
        instances, bytes: received since the start, whatever became of them; bytes of data sets.
        store_s: how long storing took, from the last fragment to the answer: how many within each of `BOUNDS_S`, and beyond.
        store_s_sum: seconds in all.
        last_at_s: when the last instance came, seconds of Unix time; None before the first.
    """

    at_s: float
    associations: list[Open]
    counts: dict[str, int]
    rejected: dict[str, int]
    aborted: int
    instances: int
    bytes: int
    store_s: list[int]
    store_s_sum: float
    last_error: LastError | None
    last_at_s: float | None = None


class Peer:
    """One open association, counted by its own thread."""

    def __init__(self, calling_ae: str) -> None:
        self.calling_ae, self.since = calling_ae, now()
        self.instances = self.bytes = 0


class Tally:
    """Counts of all associations. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._aborted = 0
        self._bytes = 0
        self._store_s, self._sum_s = [0] * (len(BOUNDS_S) + 1), 0.0
        self._peers: dict[int, Peer] = {}
        self._last_error: LastError | None = None
        self._last_at_s: float | None = None

    @property
    def open(self) -> int:
        """How many associations are open."""
        return len(self._peers)

    def opened(self, calling_ae: str) -> Peer:
        """An association was accepted."""
        peer = Peer(calling_ae)
        with self._lock:
            self._peers[id(peer)] = peer
        return peer

    def closed(self, peer: Peer, *, released: bool) -> None:
        """It has ended."""
        with self._lock:
            del self._peers[id(peer)]
            self._aborted += not released

    def stored(self, peer: Peer, name: str, size: int, seconds: float) -> None:
        """An instance was answered: `name` is an `OutcomeKind`, or `failed`."""
        with self._lock:
            self._counts["received"] += 1
            self._counts[name] += 1
            self._bytes += size
            self._last_at_s = time.time()
            peer.instances += 1
            peer.bytes += size
            self._store_s[bisect_left(BOUNDS_S, seconds)] += 1
            self._sum_s += seconds

    def rejected(self, reason: str) -> None:
        """An association was refused."""
        with self._lock:
            self._counts["rejected"] += 1
            self._rejected[reason] += 1

    def failed(self, calling_ae: str, what: str) -> None:
        """Something went wrong; `what` names no patient."""
        with self._lock:
            self._last_error = LastError(at=now(), calling_ae=calling_ae, what=what)

    @property
    def counts(self) -> dict[str, int]:
        """How many: `received`, by outcome (`new`, `same`, ...), `failed`, `rejected` associations."""
        with self._lock:
            return self._named()

    def status(self) -> Status:
        """A snapshot."""
        with self._lock:
            return Status(
                at_s=time.monotonic(),
                associations=[
                    Open(calling_ae=p.calling_ae, since=p.since, instances=p.instances, bytes=p.bytes)
                    for p in self._peers.values()
                ],
                counts=self._named(),
                rejected=dict(self._rejected),
                aborted=self._aborted,
                instances=self._counts["received"],
                bytes=self._bytes,
                store_s=list(self._store_s),
                store_s_sum=self._sum_s,
                last_error=self._last_error,
                last_at_s=self._last_at_s,
            )

    def _named(self) -> dict[str, int]:
        names = ("received", *OutcomeKind, "failed", "rejected")
        return {str(name): self._counts[name] for name in names}

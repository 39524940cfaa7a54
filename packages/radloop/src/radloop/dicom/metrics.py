"""Prometheus metrics of what receives: numbers only, no patient, no study; senders are not named."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from radloop.catalog.store import Catalog
from radloop.catalog.studies import complete
from radloop.dicom.listener.status import BOUNDS_S, Status
from radloop.errors import EngineError, SettingsError

_CATALOG_EVERY_S = 5.0


class Metrics:
    """Serves `/metrics` in a thread. A context manager.

    Args:
        sources: route (`cstore`, `stow`) -> its status.
        catalog: for what waits and what is held.
        folder: on the file system whose free space is told.
        quiet_s: as in [ingest].
        host, port: where; port 0 lets the system choose.

    Raises:
        SettingsError: prometheus-client is not installed.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Status]],
        catalog: Catalog,
        folder: Path,
        *,
        quiet_s: float,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._sources, self._catalog, self._folder, self._quiet_s = sources, catalog, folder, quiet_s
        self._address = (host, port)
        self._asked_at, self._asked = 0.0, (0, 0, dict[str, int]())
        self._server: Any = None
        self.port = 0

    def start(self) -> int:
        """Listen; returns the port.

        Raises:
            EngineError: the port is taken.
        """
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise SettingsError(
                "metrics need prometheus-client", got=str(error), next_step='pip install "radloop[serve]"'
            ) from error
        registry = CollectorRegistry()
        registry.register(self)
        host, port = self._address
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise EngineError(
                f"cannot serve metrics on {host}:{port}",
                expected="a free port on an address of this machine",
                got=error.strerror,
                next_step="set another metrics_port under [listen] in radloop.toml",
            ) from error
        self.port = int(self._server.server_address[1])
        return self.port

    def stop(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Metrics:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def describe(self) -> list[Any]:
        """Nothing is asked when the collector is registered."""
        return []

    def collect(self) -> Iterator[Any]:
        """All metrics, as they are now."""
        told = {route: ask() for route, ask in self._sources.items()}
        yield from _of_routes(told)
        yield from self._of_catalog()

    def _of_catalog(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        if time.monotonic() - self._asked_at > _CATALOG_EVERY_S or not self._asked_at:
            found = self._catalog.unreleased()
            done = len(complete(found, self._quiet_s))
            self._asked = (len(found) - done, done, self._catalog.held_counts())
            self._asked_at = time.monotonic()
        arriving, waiting, held = self._asked
        studies = Gauge("radloop_studies_waiting", "Studies not yet used, by whether all has come.", labels=["state"])
        studies.add_metric(["arriving"], arriving)
        studies.add_metric(["complete"], waiting)
        yield studies
        quarantine = Gauge("radloop_quarantine_held", "Entries held in quarantine.", labels=["reason"])
        for reason, number in held.items():
            quarantine.add_metric([reason], number)
        yield quarantine
        free = shutil.disk_usage(self._folder).free
        yield Gauge("radloop_landing_free_bytes", "Free space where images land.", value=free)


def _of_routes(told: Mapping[str, Status]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge
    from prometheus_client.core import HistogramMetricFamily as Histogram

    active = Gauge("radloop_receive_associations", "Associations or requests open now.", labels=["route"])
    aborted = Counter("radloop_receive_aborted", "Associations or requests that broke off.", labels=["route"])
    instances = Counter("radloop_received_instances", "Instances by outcome.", labels=["route", "outcome"])
    size = Counter("radloop_received_bytes", "Bytes of instances.", labels=["route"])
    rejected = Counter("radloop_receive_rejected", "Associations or requests refused.", labels=["route", "reason"])
    seconds = Histogram("radloop_store_seconds", "From the last byte to the answer.", labels=["route"])
    last = Gauge("radloop_last_arrival_timestamp_seconds", "When the last instance came.", labels=["route"])
    for route, status in told.items():
        active.add_metric([route], len(status.associations))
        aborted.add_metric([route], status.aborted)
        for outcome, number in status.counts.items():
            if outcome not in ("received", "rejected"):
                instances.add_metric([route, outcome], number)
        size.add_metric([route], status.bytes)
        for reason, number in status.rejected.items():
            rejected.add_metric([route, reason], number)
        below, buckets = 0, []
        for bound, number in zip((*map(str, BOUNDS_S), "+Inf"), status.store_s, strict=True):
            below += number
            buckets.append((bound, below))
        seconds.add_metric([route], buckets, status.store_s_sum)
        if status.last_at_s is not None:
            last.add_metric([route], status.last_at_s)
    yield from (active, aborted, instances, size, rejected, seconds, last)

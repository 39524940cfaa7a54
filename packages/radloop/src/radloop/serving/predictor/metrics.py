"""What a predictor counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_COUNTED_AT_ONCE = 64


class Metrics:
    """Requests, latency, batches and what waits, of one model."""

    def __init__(self, digest: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "radloop_requests", "Inference requests by protocol, role, HTTP status and reason.",
            ["protocol", "role", "status", "reason"], registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "radloop_request_seconds", "From the request's first byte to the answer.", ["status"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), registry=self.registry,
        )  # fmt: skip
        self.batch = Histogram(
            "radloop_batch_images", "Images in one call of the model.",
            buckets=(1, 2, 4, 8, 16, 32), registry=self.registry,
        )  # fmt: skip
        self._answered: list[tuple[str, str, str, str, float]] = []
        Gauge("radloop_model", "The model served.", ["digest", "version"], registry=self.registry).labels(
            digest, version
        ).set(1)

    def answered(self, protocol: str, role: str, status: str, reason: str, seconds: float) -> None:
        """A request was answered. From the event loop."""
        self._answered.append((protocol, role, status, reason, seconds))
        if len(self._answered) >= _COUNTED_AT_ONCE:
            self._count()

    def page(self) -> bytes:
        """The metrics in Prometheus' text format. From the event loop."""
        self._count()
        return generate_latest(self.registry)

    def _count(self) -> None:
        """Many at once, as the library's counters take as long for one as all else that is done for an answer."""
        answered, self._answered = self._answered, []
        for protocol, role, status, reason, seconds in answered:
            self.requests.labels(protocol, role, status, reason).inc()
            self.seconds.labels(status).observe(seconds)

    def watch(
        self, under_way: Callable[[], float], waiting: Callable[[], float], unlogged: Callable[[], float]
    ) -> None:
        """What is asked for when somebody reads the metrics."""
        gauges = {
            "radloop_requests_under_way": ("Inference requests under way.", under_way),
            "radloop_requests_waiting": ("Requests no thread has taken yet.", waiting),
            "radloop_predictions_unlogged": ("Rows not on disk yet.", unlogged),
        }
        for name, (told, ask) in gauges.items():
            Gauge(name, told, registry=self.registry).set_function(ask)

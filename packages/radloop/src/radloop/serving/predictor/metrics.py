"""What a predictor counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


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
        self.under_way = Gauge("radloop_requests_under_way", "Inference requests under way.", registry=self.registry)
        self.waiting = Gauge("radloop_requests_waiting", "Requests no thread has taken yet.", registry=self.registry)
        self.unlogged = Gauge("radloop_predictions_unlogged", "Rows not on disk yet.", registry=self.registry)
        Gauge("radloop_model", "The model served.", ["digest", "version"], registry=self.registry).labels(
            digest, version
        ).set(1)

"""Metrics: what the service counts about itself, in Prometheus' terms.

In: events from the other rooms.  Out: the text of /metrics. Counters are floats: exact up to 2**53.
"""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from .statistics import Statistics

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # a series per series that says when it began
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One registry per application, so that two in one process do not mix."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.statistics = Statistics()
        self._series: dict = {}
        work = {"labelnames": ("model", "device"), "registry": self.registry}
        model = {"labelnames": ("model",), "registry": self.registry}
        self.requests = Counter(
            "cconv_requests", "Requests answered, by route, by the model that computed and its version, and by status.",
            ("route", "model", "version", "code"), registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "cconv_request_seconds", "From arrival to answer.", ("route",), registry=self.registry, buckets=_SECONDS
        )
        self.rejected = Counter(
            "cconv_rejected", "Requests refused, by reason; nothing was billed.", ("reason",), registry=self.registry
        )
        self.inferences = Counter("cconv_inferences", "Images answered.", **model)
        self.executions = Counter("cconv_executions", "Runs; one may serve several requests.", **model)
        self.macs = Counter("cconv_macs", "Multiply-accumulates billed.", **work)
        self.flops = Counter("cconv_flops", "Floating-point operations billed as 2 * macs.", **work)
        self.flops_other = Counter("cconv_flops_other", "Floating-point operations billed beside the macs.", **work)
        self.discarded_flops = Counter(
            "cconv_discarded_flops", "flops + flops_other of runs begun and not answered.", **work
        )
        self.queue_seconds = Histogram(
            "cconv_queue_seconds", "From submission to the start of a run.", registry=self.registry, buckets=_SECONDS
        )
        self.compute_seconds = Histogram("cconv_compute_seconds", "One run.", **model, buckets=_SECONDS)
        self.batch_size = Histogram("cconv_batch_size", "Images of one run.", **model, buckets=_IMAGES)
        self.pending_requests = Gauge("cconv_pending_requests", "Requests in the house.", registry=self.registry)
        self.pending_flops = Gauge("cconv_pending_flops", "flops + flops_other in the house.", registry=self.registry)
        self.pending_bytes = Gauge(
            "cconv_pending_bytes", "Bytes that the requests in the house hold.", registry=self.registry
        )
        self.bytes_in = Counter("cconv_bytes_in", "Bytes of request bodies announced.", registry=self.registry)
        self.bytes_out = Counter("cconv_bytes_out", "Bytes of computed answers.", registry=self.registry)

        self.pool_idle = Gauge(
            "cconv_pool_idle_bytes",
            "Memory that is kept for the next runs, CCONV_POOL_BYTES at most.",
            registry=self.registry,
        )

        self.ledger_writes = Counter("cconv_ledger_writes", "Bills recorded.", registry=self.registry)
        self.ledger_failures = Counter(
            "cconv_ledger_failures",
            "Requests refused because their bill could not be recorded.",
            registry=self.registry,
        )
        self.ledger_doubtful = Counter(
            "cconv_ledger_doubtful",
            "Of these, requests whose bill may be recorded all the same: the database did not say.",
            registry=self.registry,
        )
        self.ledger_waiting = Gauge(
            "cconv_ledger_waiting_bytes", "Bytes of bills that wait for the database.", registry=self.registry
        )
        self.ledger_lag = Gauge(
            "cconv_ledger_lag_seconds", "How long the oldest bill has waited for the database.", registry=self.registry
        )
        self.ledger_refused = Gauge(
            "cconv_ledger_refused_lines", "Lines of the spool that no ledger takes.", registry=self.registry
        )
        self.replays = Counter(
            "cconv_replays", "Requests answered again under an idempotency key, unbilled.", registry=self.registry
        )

    def _of(self, metric, *labels: str):
        """A series; to look it up takes prometheus_client as long as to count."""
        found = self._series.get((metric, labels))
        if found is None:
            found = self._series[metric, labels] = metric.labels(*labels)
        return found

    def answered(self, route: str, model: str, version: str, code: int, seconds: float) -> None:
        self._of(self.requests, route, model, version, str(code)).inc()
        self._of(self.seconds, route).observe(seconds)

    def turned_away(self) -> None:
        """A request that was refused unread, so that nobody knows its route."""
        self._of(self.requests, "unread", "", "", "503").inc()
        self._of(self.rejected, "overloaded").inc()

    def ran(self, model: str, version: str, images: int, seconds: float) -> None:
        self.statistics.ran(model, version, images, seconds)
        self._of(self.executions, model).inc()
        self._of(self.batch_size, model).observe(images)
        self._of(self.compute_seconds, model).observe(seconds)

    def billed(self, model: str, device: str, cost, images: int) -> None:
        self._of(self.inferences, model).inc(images)
        self._of(self.macs, model, device).inc(cost.macs)
        self._of(self.flops, model, device).inc(cost.flops)
        self._of(self.flops_other, model, device).inc(cost.flops_other)

    def discarded(self, model: str, device: str, flops: int) -> None:
        self._of(self.discarded_flops, model, device).inc(flops)

    def text(self) -> bytes:
        return generate_latest(self.registry)

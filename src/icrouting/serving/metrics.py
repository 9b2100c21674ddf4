"""Metrics: what a server has done, for Prometheus."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts of one server, which another one in the same process has its own of."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "icr_requests",
            "Requests by path, model and HTTP status.",
            ("path", "model", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "icr_request_seconds",
            "Seconds from a request to its whole answer.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "icr_batch_requests",
            "Requests that were run together.",
            ("kind",),
            buckets=SIZES,
            registry=self.registry,
        )
        self._model_seconds = Counter(
            "icr_model_seconds", "Seconds that the model ran.", ("kind",), registry=self.registry
        )
        self._tokens = Counter("icr_tokens", "Tokens generated.", registry=self.registry)
        self._queue = Gauge("icr_queue_requests", "Requests that wait.", registry=self.registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Has the queue's length read whenever it is asked for."""
        self._queue.set_function(length)

    def request(self, path: str, model: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        self._requests.labels(path, model, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def tokens(self, n_tokens: int) -> None:
        """Counts generated tokens."""
        self._tokens.inc(n_tokens)

    @contextmanager
    def batch(self, kind: str, n_jobs: int) -> Iterator[None]:
        """Inside, a batch runs."""
        self._batches.labels(kind).observe(n_jobs)
        started = time.monotonic()
        try:
            yield
        finally:
            self._model_seconds.labels(kind).inc(time.monotonic() - started)

    def text(self) -> bytes:
        """Returns all of them as Prometheus reads them."""
        return generate_latest(self.registry)

"""What a server counts, for Prometheus. Each application has a registry of its own.

Labels are routes, statuses, and domains that were loaded: nothing a caller can invent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from peftrank.ranker import Ranker
    from peftrank.serving.batching import Batcher, Round

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._histogram(
            "request_seconds", "From a request's arrival to its answer.", ("route", "status")
        )
        self.errors = self._counter("errors", "Requests refused or failed.", ("type",))
        self.slates = self._counter("slates", "Slates ranked.", ("domain",))
        self.events = self._counter("events", "Events stored.")
        self.duplicates = self._counter("event_duplicates", "Events that were stored before.")
        self.histories = self._counter(
            "histories", "Stored histories read, by whether there was one.", ("found",)
        )
        self.adapter_reads = self._counter(
            "adapter_reads",
            "Uses of an adapter, by where it was; beyond the device it is a cache miss.",
            ("tier",),
        )
        self.batch_seconds = self._histogram("batch_seconds", "Time to score a batch.")
        self.batch_slates = self._histogram(
            "batch_slates", "Slates scored together.", buckets=_COUNTS
        )
        self.occupancy = self._histogram(
            "batch_occupancy", "Share of the token budget that a batch used.", buckets=_SHARES
        )
        self.tokens = self._counter("tokens", "Tokens scored, those that were kept included.")
        self._reused = self._counter(
            "prefix_tokens", "Of these, tokens not computed since their keys and values were kept."
        )
        self._reused_before = 0
        self.batch_failures = self._counter("batch_failures", "Tries to score that failed.")
        self.swaps = self._counter(
            "adapter_swaps", "Versions put into use, each in place of another or of none.",
            ("domain",),
        )  # fmt: skip
        self.load_failures = self._counter(
            "adapter_load_failures", "Versions that could not be loaded.", ("domain",)
        )
        self.stale = self._gauge(
            "adapter_stale", "1 while the active version cannot be loaded.", ("domain",)
        )
        self.watch_failures = self._counter(
            "watch_failures", "Times the store could not be looked at."
        )
        self.ready = self._gauge("ready", "1 while requests are taken.")
        self._queue = self._gauge("queue_tokens", "Tokens waiting to be scored.")
        self._waiting = self._gauge("queue_slates", "Slates waiting to be scored.")
        self._loaded = self._gauge("adapters_loaded", "Domains loaded.")
        self._bytes = {
            "base_bytes": self._gauge("base_bytes", "Weights of the base."),
            "device_bytes": self._gauge(
                "adapter_device_bytes", "Adapter weights kept on the base's device."
            ),
            "host_bytes": self._gauge(
                "adapter_host_bytes", "Adapter weights kept in host memory beside them."
            ),
            "prefix_bytes": self._gauge(
                "prefix_bytes", "Keys and values of prompts' beginnings kept on the device."
            ),
        }

    def observe(self, done: Round) -> None:
        """Counts what was scored together."""
        self.batch_seconds.observe(done.seconds)
        self.batch_slates.observe(done.slates)
        self.occupancy.observe(done.occupancy)
        self.tokens.inc(done.tokens)
        self.batch_failures.inc(done.failures)

    def look(self, ranker: Ranker, batcher: Batcher) -> None:
        """Takes the state of these two, to show it next."""
        self._loaded.set(len(ranker.domains))
        for name, value in ranker.memory().items():
            self._bytes[name].set(value)
        reused = ranker.prefix_tokens
        self._reused.inc(reused - self._reused_before)
        self._reused_before = reused
        self._queue.set(batcher.queued_tokens)
        self._waiting.set(batcher.queued_slates)

    def text(self) -> bytes:
        """Returns all of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"peftrank_{name}", help_, labels, registry=self.registry)

    def _gauge(self, name: str, help_: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"peftrank_{name}", help_, labels, registry=self.registry)

    def _histogram(
        self,
        name: str,
        help_: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = _SECONDS,
    ) -> Histogram:
        return Histogram(f"peftrank_{name}", help_, labels, registry=self.registry, buckets=buckets)

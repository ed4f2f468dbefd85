"""What a server counts, in Prometheus' terms. One registry per app, so that tests do not share."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters, each with its own meaning; `registry` is what /metrics shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.latency = Histogram(
            "peftrank_request_seconds",
            "Time from a request's arrival to its answer.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.errors = Counter(
            "peftrank_errors", "Requests refused or failed.", ["type"], registry=registry
        )
        self.slates = Counter("peftrank_slates", "Slates ranked.", ["domain"], registry=registry)
        self.tokens = Counter("peftrank_tokens", "Tokens scored.", registry=registry)
        self.batch_slates = Histogram(
            "peftrank_batch_slates",
            "Slates scored together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.occupancy = Histogram(
            "peftrank_batch_occupancy",
            "Share of the token budget that a batch used.",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0),
            registry=registry,
        )
        self.scoring = Histogram(
            "peftrank_batch_seconds", "Time to score a batch.", buckets=_SECONDS, registry=registry
        )
        self.queue_tokens = Gauge(
            "peftrank_queue_tokens", "Tokens waiting to be scored.", registry=registry
        )
        self.swaps = Counter(
            "peftrank_adapter_swaps",
            "Versions put into use, each in place of another or of none.",
            ["domain"],
            registry=registry,
        )
        self.load_failures = Counter(
            "peftrank_adapter_load_failures",
            "Versions that could not be loaded.",
            ["domain"],
            registry=registry,
        )
        self.stale = Gauge(
            "peftrank_adapter_stale",
            "1 while the active version of a domain cannot be loaded and an older one serves.",
            ["domain"],
            registry=registry,
        )
        self.loaded = Gauge("peftrank_adapters_loaded", "Domains loaded.", registry=registry)
        self.device_bytes = Gauge(
            "peftrank_adapter_device_bytes",
            "Adapter weights kept on the base's device.",
            registry=registry,
        )
        self.events = Counter("peftrank_events", "Events stored.", registry=registry)
        self.histories = Counter(
            "peftrank_histories",
            "Slates that brought no history, by whether the store had one.",
            ["found"],
            registry=registry,
        )

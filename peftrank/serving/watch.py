"""Keeps a ranker on the versions that a store says are active, while it serves.

A version is loaded whole and checked before it replaces another; one that cannot be loaded leaves
the other serving and raises an alarm. It knows the store and the ranker, no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from peftrank import store
from peftrank.errors import AdapterError, PeftRankError
from peftrank.ranker import Ranker
from peftrank.serving.metrics import Metrics

_RETRY_SECONDS = 60.0
"""A version that failed is tried again after this long: its disk may be back."""
_log = logging.getLogger(__name__)


class Watcher:
    """Looks at the ACTIVE files of a store; `scan` once, or `start` to do so again and again."""

    def __init__(self, ranker: Ranker, metrics: Metrics, domains: Sequence[str] | None = None):
        """`domains`: those to serve; None: all that have an active version, new ones too."""
        self._ranker, self._metrics, self._domains = ranker, metrics, domains
        self._seen: dict[str, str] = {}
        """By domain the active version that was last acted upon."""
        self._failed: dict[str, float] = {}
        """By domain when loading its active version last failed."""
        self._loading = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, seconds: float) -> None:
        """Scans every so many seconds, in a thread."""

        def run() -> None:
            while not self._stop.wait(seconds):
                self.scan()

        self._thread = threading.Thread(target=run, name="peftrank-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def scan(self) -> dict[str, PeftRankError]:
        """Loads what became active since the last time; returns by domain why it could not be."""
        found = self._domains if self._domains is not None else store.domains(self._ranker.store)
        failures: dict[str, PeftRankError] = {}
        for domain in found:
            try:
                self._follow(domain)
            except PeftRankError as error:
                failures[domain] = error
            except OSError as error:
                failures[domain] = AdapterError(f"cannot read the store of {domain!r}: {error}")
        for domain, reason in failures.items():
            self._alarm(domain, reason)
        return failures

    def load(self, domain: str, version: str | None = None) -> str:
        """Loads a version of a domain, absent: the active one, and returns which.

        It serves until another version becomes active.

        Raises:
            AdapterError: it cannot be loaded; what served before goes on.
        """
        store.check_domain(domain)
        wanted = version or store.active(self._ranker.store, domain)
        if wanted is None:
            raise AdapterError(f"no version of {domain!r} is active; name one")
        with self._loading:
            self._ranker.load_adapter(f"{domain}@{wanted}", domain=domain)
            self._metrics.swaps.labels(domain).inc()
            self._metrics.stale.labels(domain).set(0)
            self._failed.pop(domain, None)
        self.count()
        _log.info("adapter loaded", extra={"domain": domain, "version": wanted})
        return wanted

    def count(self) -> None:
        """Updates the gauges of what is loaded."""
        self._metrics.loaded.set(len(self._ranker.domains))
        self._metrics.device_bytes.set(self._ranker.memory()["device_bytes"])

    def _follow(self, domain: str) -> None:
        waiting = time.monotonic() - self._failed.get(domain, -_RETRY_SECONDS) < _RETRY_SECONDS
        try:
            version = store.active(self._ranker.store, domain)
        except AdapterError:
            if waiting:
                return
            raise
        if version is None:
            if self._domains is not None and domain not in self._seen and not waiting:
                raise AdapterError(f"no version of {domain!r} in {self._ranker.store} is active")
            return
        changed = self._seen.get(domain) != version
        if not changed and (domain not in self._failed or waiting):
            return
        self._seen[domain] = version
        loaded = self._ranker.adapters.get(domain)
        if loaded is None or loaded.version != version or domain in self._failed:
            self.load(domain, version)

    def _alarm(self, domain: str, error: PeftRankError) -> None:
        self._failed[domain] = time.monotonic()
        self._metrics.load_failures.labels(domain).inc()
        self._metrics.stale.labels(domain).set(1)
        _log.error("adapter not loaded", extra={"domain": domain, "reason": str(error)})

"""Keeps a ranker as the store says: a newly active version is loaded in place of the earlier one.

A pointer is looked at once a second or so, and its file read only where it changed. A version that
cannot be loaded leaves the earlier one in service and raises an alarm (`peftrank_adapter_stale`);
it is tried again when the pointer changes, or after a while. Knows no requests.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from peftrank import store
from peftrank.config import DOMAIN_NAME
from peftrank.errors import AdapterError
from peftrank.ranker import Ranker
from peftrank.serving.logs import log, log_exception
from peftrank.serving.metrics import Metrics

_Mark = tuple[int, int, int]
"""What changes when a pointer is replaced, also by the same version."""
_FIRST_RETRY, _LONGEST_RETRY = 5.0, 300.0


@dataclass(frozen=True)
class _Failure:
    tries: int
    retry_at: float
    """On the monotonic clock."""


class Watcher:
    """The ranker's link to its store. All changes of adapters go through one lock."""

    def __init__(
        self,
        ranker: Ranker,
        metrics: Metrics,
        *,
        domains: Sequence[str] | None = None,
        seconds: float = 1.0,
    ):
        """Looks at nothing yet.

        Args:
            ranker: Its `store` is watched.
            metrics: Told of swaps and failures.
            domains: Those served; None: all of the store that fit the base.
            seconds: Between looks.
        """
        self._ranker, self._store, self._metrics = ranker, ranker.store, metrics
        self._domains, self._seconds = domains, seconds
        self._marks: dict[str, _Mark | None] = {}
        self._failures: dict[str, _Failure] = {}
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peftrank-watch", daemon=True)

    def load_all(self) -> None:
        """Loads what is active.

        Raises:
            AdapterError: a domain that was asked for has no active version, or it cannot be loaded.
        """
        for domain in self._domains or ():
            self.load(domain, None)
        self.poll()

    def start(self) -> None:
        """Looks again and again, in a thread; never, if `seconds` is 0."""
        if self._seconds:
            self._thread.start()

    def close(self) -> None:
        """Ends the looking."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def poll(self) -> None:
        """Looks at every domain once."""
        for domain in self._domains or self._found():
            try:
                self._look(domain)
            except OSError as error:  # the store's disk may come back
                self._cannot_look(error)

    def stale(self, domain: str) -> bool:
        """Returns whether the domain's active version could not be loaded."""
        return domain in self._failures

    def load(self, domain: str, version: str | None) -> None:
        """Loads a version, None for the active one, and keeps it until another is activated.

        Raises:
            AdapterError: there is none, or it cannot be loaded; what was loaded stays.
        """
        store.check_domain(domain)
        with self._writing:
            mark = self._mark(domain)
            self._load(domain, self._active(domain) if version is None else version)
            self._marks[domain] = mark
            self._settle(domain)

    def unload(self, domain: str) -> None:
        """Stops serving a domain until a version of it is loaded or activated.

        Raises:
            ConfigError: it is not loaded.
        """
        with self._writing:
            self._ranker.unload_adapter(domain)
            self._marks[domain] = self._mark(domain)
            self._settle(domain)

    def activate(self, domain: str, version: str) -> None:
        """Loads a version and makes it the store's active one.

        Raises:
            AdapterError: it cannot be loaded, or the disk refuses; all stays as it was.
        """
        store.check_domain(domain)
        with self._writing:
            before = self._ranker.adapters.get(domain)
            self._load(domain, version)
            try:
                store.activate(self._store, domain, version)
            except AdapterError:
                if before is None:
                    self._ranker.unload_adapter(domain)
                else:
                    self._ranker.load_adapter(before.source, domain=domain)
                raise
        self._look(domain)  # another process may have been quicker

    def _run(self) -> None:
        while True:
            try:
                self.poll()
            except Exception as error:
                self._cannot_look(error)
            if self._stopped.wait(self._seconds):
                return

    def _cannot_look(self, error: Exception) -> None:
        self._metrics.watch_failures.inc()
        log_exception("watch_failed", error)

    def _found(self) -> list[str]:
        try:
            with os.scandir(self._store) as entries:
                return sorted(e.name for e in entries if DOMAIN_NAME.fullmatch(e.name))
        except FileNotFoundError:
            return []

    def _look(self, domain: str) -> None:
        with self._writing:
            # Taken before the pointer is read: a change in between is seen the next time.
            mark = self._mark(domain)
            failure = self._failures.get(domain)
            if mark == self._marks.get(domain):
                if failure is None or time.monotonic() < failure.retry_at:
                    return
            else:
                failure = None
            self._marks[domain] = mark
            if mark is None:  # never activated, or its folder was taken away
                return
            version = None
            try:
                version = self._active(domain)
                self._load(domain, version)
                self._settle(domain)
            except Exception as error:  # also what a device raises that has no memory left
                self._alarm(domain, version, error, failure)

    def _mark(self, domain: str) -> _Mark | None:
        try:
            found = (self._store / domain / "ACTIVE").stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _active(self, domain: str) -> str:
        version = store.active(self._store, domain)
        if version is None:
            raise AdapterError(
                f"no version of {domain!r} in {self._store} is active; activate one with: "
                f"peftrank adapters activate {domain}@VERSION"
            )
        return version

    def _load(self, domain: str, version: str) -> None:
        source = f"{domain}@{version}"
        served = self._ranker.adapters.get(domain)
        if served is not None and served.version == version and served.source in (domain, source):
            return
        known = store.versions(self._store, domain)
        if version not in known:
            raise AdapterError(
                f"{domain!r} has no version {version!r} in the store. "
                f"Versions: {', '.join(known) or 'none'}."
            )
        started = time.perf_counter()
        self._ranker.load_adapter(source, domain=domain)
        self._metrics.swaps.labels(domain).inc()
        log(
            logging.INFO,
            "adapter_loaded",
            domain=domain,
            version=version,
            before=None if served is None else served.version,
            ms=round(1000 * (time.perf_counter() - started), 1),
        )

    def _settle(self, domain: str) -> None:
        self._failures.pop(domain, None)
        self._metrics.stale.labels(domain).set(0)

    def _alarm(
        self, domain: str, version: str | None, error: Exception, earlier: _Failure | None
    ) -> None:
        served = self._ranker.adapters.get(domain)
        if served is None and version is not None and not self._fits(domain, version):
            log(logging.WARNING, "adapter_left_out", domain=domain, reason=str(error))
            return
        tries = 1 if earlier is None else earlier.tries + 1
        wait = min(_FIRST_RETRY * 2 ** (tries - 1), _LONGEST_RETRY)
        self._failures[domain] = _Failure(tries, time.monotonic() + wait)
        self._metrics.stale.labels(domain).set(1)
        self._metrics.load_failures.labels(domain).inc()
        log(
            logging.ERROR,
            "adapter_load_failed",
            domain=domain,
            version=version,
            serving=None if served is None else served.version,
            retry_seconds=wait,
            reason=str(error),
        )

    def _fits(self, domain: str, version: str) -> bool:
        """Returns False if the version is sound and was trained on another base."""
        try:
            files = store.load_adapter(self._store / domain / version)
        except AdapterError:
            return True
        try:
            store.check_base(files.manifest, self._ranker.base.identity)
        except AdapterError:
            return False
        return True

"""Histories in a SQLite file, which several processes of one machine may share.

An event that was acknowledged is on the disk: the journal is a write-ahead log and is flushed at
every commit (`synchronous=FULL`). `NORMAL` would survive a killed process too, but lose the last
events with the power. Deleted events are overwritten, so that a forgotten user is.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftrank.serving.history import Event, HistoryError, check_text, decode, encode

_APPLICATION = 0x50524B48
"""In the file's header ("PRKH"): tells our files from those of other programs."""
_VERSION = 1
_BUSY_SECONDS = 5.0
_CONNECTIONS = 16
_SCHEMA = (
    """CREATE TABLE events (
        arrival INTEGER PRIMARY KEY, user_id TEXT NOT NULL, domain TEXT NOT NULL,
        timestamp REAL NOT NULL, event_id TEXT, body BLOB NOT NULL)""",
    "CREATE INDEX events_in_order ON events (user_id, domain, timestamp, arrival)",
    # An id is known while its event is kept (until is null), and then until a time.
    """CREATE TABLE ids (
        user_id TEXT NOT NULL, domain TEXT NOT NULL, event_id TEXT NOT NULL, until REAL,
        PRIMARY KEY (user_id, domain, event_id)) WITHOUT ROWID""",
    "CREATE INDEX ids_by_end ON ids (until) WHERE until IS NOT NULL",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full. Free some space, and send the events again",
    sqlite3.SQLITE_BUSY: f"another process has locked it for {_BUSY_SECONDS:g} s. Send the events "
    "again; if it stays so, end the program that holds it",
    sqlite3.SQLITE_CORRUPT: "the file is damaged. Move it away and restore a copy of it, or save "
    "what can be read with: sqlite3 FILE .recover | sqlite3 NEW_FILE",
    sqlite3.SQLITE_NOTADB: "the file is damaged or no SQLite database. Name another file, or move "
    "this one away",
    sqlite3.SQLITE_READONLY: "the file cannot be written. Let this user write to it and to its "
    "folder",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened. Let this user write to it and to its "
    "folder",
    sqlite3.SQLITE_PERM: "this user may not open the file. Let it write to the file and its folder",
    sqlite3.SQLITE_IOERR: "the disk reports an error. Look at its space and its health",
}


class SqliteHistory:
    """A `History` in a file, or in memory."""

    def __init__(self, path: Path | None, *, max_items: int, remember_seconds: float) -> None:
        self._max_items = max_items
        self._remember_seconds = remember_seconds
        self._name = "in memory" if path is None else str(path)
        self._uri = "file::memory:" if path is None else path.absolute().as_uri()
        # A connection is one thread's for the length of a call. They are handed round, and do not
        # belong to threads, because a server's worker threads come and go. Each connection to
        # memory would be a database of its own, so of these there is one, which is kept.
        self._lasting = path is None
        self._slots = threading.BoundedSemaphore(1 if self._lasting else _CONNECTIONS)
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        if path is not None:
            try:
                path.absolute().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise HistoryError(
                    f"cannot make the folder of the history {path}: {error.strerror}. Name "
                    "another file, or let this user write there."
                ) from error
        self.ping()

    def append(self, events: Sequence[Event]) -> int:
        """See `History`."""
        bodies = encode(events)
        now = time.time()
        with self._transaction("BEGIN IMMEDIATE") as connection:
            connection.execute("DELETE FROM ids WHERE until <= ?", (now,))
            stored = sum(
                _insert(connection, event, body) for event, body in zip(events, bodies, strict=True)
            )
            for user_id, domain in sorted({(event.user_id, event.domain) for event in events}):
                self._prune(connection, user_id, domain, now + self._remember_seconds)
        return stored

    def recent(self, user_id: str, domain: str, n: int) -> list[Event]:
        """See `History`."""
        check_text(user_id, "user_id")
        check_text(domain, "domain")
        with self._transaction("BEGIN") as connection:
            rows = connection.execute(
                "SELECT body FROM events WHERE user_id = ? AND domain = ? "
                "ORDER BY timestamp DESC, arrival DESC LIMIT ?",
                (user_id, domain, max(n, 0)),
            ).fetchall()
        return [decode(user_id, domain, body) for (body,) in reversed(rows)]

    def forget(self, user_id: str) -> int:
        """See `History`."""
        check_text(user_id, "user_id")
        with self._transaction("BEGIN IMMEDIATE") as connection:
            deleted = connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,))
            connection.execute("DELETE FROM ids WHERE user_id = ?", (user_id,))
        with self._connected() as connection:  # the log holds the old pages until this
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return deleted.rowcount

    def ping(self) -> None:
        """See `History`."""
        with self._transaction("BEGIN") as connection:
            connection.execute("SELECT 1 FROM events LIMIT 1").fetchone()

    def close(self) -> None:
        """See `History`."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _prune(
        self, connection: sqlite3.Connection, user_id: str, domain: str, until: float
    ) -> None:
        excess = connection.execute(
            "SELECT arrival, event_id FROM events WHERE user_id = ? AND domain = ? "
            "ORDER BY timestamp DESC, arrival DESC LIMIT -1 OFFSET ?",
            (user_id, domain, self._max_items),
        ).fetchall()
        for arrival, event_id in excess:
            connection.execute("DELETE FROM events WHERE arrival = ?", (arrival,))
            connection.execute(
                "UPDATE ids SET until = ? WHERE user_id = ? AND domain = ? AND event_id = ?",
                (until, user_id, domain, event_id),
            )

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._connected() as connection:
            connection.execute(begin)
            yield connection
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._slots, self._explained():
            if self._closed:
                raise HistoryError(f"the history {self._name} was closed")
            connection = self._take()
            failed = True
            try:
                yield connection
                failed = False
            finally:
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                if self._closed or (failed and not self._lasting):
                    connection.close()
                else:
                    self._idle.append(connection)

    def _take(self) -> sqlite3.Connection:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        connection = sqlite3.connect(
            self._uri,
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # First, so that nothing is written to a file that is not ours.
        connection.execute("BEGIN")
        new = self._is_new(connection)
        connection.execute("COMMIT")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        mode = _use_log(connection)
        if mode != "wal" and not self._lasting:
            raise HistoryError(
                f"the history {self._name} lies on a file system that cannot share a log between "
                f"processes (journal mode {mode}); name a file on a local disk"
            )
        if new:
            connection.execute("BEGIN IMMEDIATE")
            if self._is_new(connection):  # no other process was quicker
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")

    def _is_new(self, connection: sqlite3.Connection) -> bool:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version) == (_APPLICATION, _VERSION):
            return False
        if (application, version, tables) == (0, 0, 0):
            return True
        if application == _APPLICATION:
            raise HistoryError(
                f"the history {self._name} has format {version}, and this PeftRank reads format "
                f"{_VERSION}. Use the PeftRank that wrote it, or name another file."
            )
        raise HistoryError(
            f"{self._name} is the database of another program. Name another file for the history."
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)  # absent where SQLite was not asked
            reason = _REASONS.get(code & 0xFF, "SQLite refuses")
            raise HistoryError(f"the history {self._name}: {reason} ({error}).") from error


def _use_log(connection: sqlite3.Connection) -> str:
    """Returns the journal mode, which is `wal` wherever that is possible."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)
        except sqlite3.OperationalError as error:
            # Where two processes make the change in a new file at once, SQLite lets neither wait.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.001, 0.02))


def _insert(connection: sqlite3.Connection, event: Event, body: bytes) -> bool:
    """Returns whether the event is new; then it was stored."""
    key = (event.user_id, event.domain)
    if event.event_id is not None:
        known = connection.execute(
            "INSERT OR IGNORE INTO ids VALUES (?, ?, ?, NULL)", (*key, event.event_id)
        )
        if known.rowcount == 0:
            return False
    connection.execute(
        "INSERT INTO events (user_id, domain, timestamp, event_id, body) VALUES (?, ?, ?, ?, ?)",
        (*key, event.timestamp, event.event_id, body),
    )
    return True

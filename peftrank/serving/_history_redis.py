"""Histories in Redis (6 or later), for servers on several machines. `pip install peftrank[redis]`.

Each change is one Lua script, so Redis makes it whole or not at all. How safe an acknowledged event
is, is a setting of Redis: with `appendonly yes` and `appendfsync always` it is on the disk, with
the usual `everysec` the last second may be lost with the machine. A forgotten user is gone from
Redis at once, and from its files when it next rewrites them. Redis Cluster is not supported.

    peftrank:history:1:arrivals                  a counter
    peftrank:history:1:<user>:domains            set: where this user has events
    peftrank:history:1:<user>:events:<domain>    sorted set: arrival and event, by timestamp
    peftrank:history:1:<user>:ids:<domain>       sorted set: event ids, by the time they expire

<user> is a hash of the user id: keys show up in Redis' logs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from peftrank.errors import ConfigError
from peftrank.serving.history import Event, HistoryError, check_text, decode, encode

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ModuleNotFoundError as error:
    raise ConfigError(
        f"a history in Redis needs {error.name}, which is not installed; run: "
        'pip install "peftrank[redis]"'
    ) from error

_PREFIX = "peftrank:history:1:"
_TIMEOUT_SECONDS = 0.8
"""For connecting and for each answer. A name may have two addresses, which are tried in turn."""
_ARRIVAL_DIGITS = 16
_APPEND = """
local prefix, max_items, remember = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
-- First, because Redis refuses a script for want of memory at its first write or not at all.
local arrival = redis.call('INCRBY', prefix .. 'arrivals', (#ARGV - 3) / 5)
local stored = 0
for i = 4, #ARGV, 5 do
  local user, domain, timestamp = prefix .. ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local event_id, body = ARGV[i + 3], ARGV[i + 4]
  local events, ids = user .. ':events:' .. domain, user .. ':ids:' .. domain
  redis.call('ZREMRANGEBYSCORE', ids, '-inf', now)
  if event_id == '' or redis.call('ZADD', ids, 'NX', '+inf', event_id) == 1 then
    local place = string.format('%016d', arrival - (#ARGV - i) / 5)
    redis.call('ZADD', events, timestamp, place .. body)
    redis.call('SADD', user .. ':domains', domain)
    stored = stored + 1
  end
  local excess = redis.call('ZCARD', events) - max_items
  if excess > 0 then
    local pruned = redis.call('ZPOPMIN', events, excess)
    for j = 1, #pruned, 2 do
      local old = cjson.decode(string.sub(pruned[j], 17)).event_id
      if type(old) == 'string' then
        redis.call('ZADD', ids, now + remember, old)
      end
    end
  end
end
return stored
"""
_FORGET = """
local user, deleted = ARGV[1] .. ARGV[2], 0
for _, domain in ipairs(redis.call('SMEMBERS', user .. ':domains')) do
  deleted = deleted + redis.call('ZCARD', user .. ':events:' .. domain)
  redis.call('DEL', user .. ':events:' .. domain, user .. ':ids:' .. domain)
end
redis.call('DEL', user .. ':domains')
return deleted
"""


class RedisHistory:
    """A `History` in Redis."""

    def __init__(self, url: str, address: str, *, max_items: int, remember_seconds: float) -> None:
        self._address = address
        self._max_items = max_items
        self._remember_seconds = remember_seconds
        self._closed = False
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=64,
                timeout=_TIMEOUT_SECONDS,
                socket_connect_timeout=_TIMEOUT_SECONDS,
                socket_timeout=_TIMEOUT_SECONDS,
                # An event without an id must not be sent twice, so a call is never repeated here.
                retry=Retry(NoBackoff(), 0),
            )
            pool.make_connection()  # finds options that no connection takes
        except (TypeError, ValueError, AttributeError):  # their messages may quote the URL
            raise ConfigError(
                f"the history's URL, {address}, has options after the ? that Redis connections do "
                "not take"
            ) from None
        self._client = redis.Redis(connection_pool=pool)

    def append(self, events: Sequence[Event]) -> int:
        """See `History`."""
        arguments: list[Any] = [_PREFIX, self._max_items, self._remember_seconds]
        for event, body in zip(events, encode(events), strict=True):
            arguments += [_hashed(event.user_id), event.domain, float(event.timestamp)]
            arguments += [event.event_id or "", body]
        with self._explained():
            return int(self._client.eval(_APPEND, 0, *arguments))

    def recent(self, user_id: str, domain: str, n: int) -> list[Event]:
        """See `History`."""
        check_text(user_id, "user_id")
        check_text(domain, "domain")
        if n < 1:
            return []
        key = f"{_PREFIX}{_hashed(user_id)}:events:{domain}"
        with self._explained():
            members = self._client.zrevrange(key, 0, n - 1)
        return [decode(user_id, domain, member[_ARRIVAL_DIGITS:]) for member in reversed(members)]

    def forget(self, user_id: str) -> int:
        """See `History`."""
        check_text(user_id, "user_id")
        with self._explained():
            return int(self._client.eval(_FORGET, 0, _PREFIX, _hashed(user_id)))

    def ping(self) -> None:
        """See `History`."""
        with self._explained():
            self._client.ping()

    def close(self) -> None:
        """See `History`."""
        self._closed = True
        self._client.connection_pool.disconnect()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        if self._closed:
            raise HistoryError(f"the history {self._address} was closed")
        try:
            yield
        except redis.RedisError as error:
            raise HistoryError(
                f"the history {self._address}: {_reason(error)} ({str(error)[:200]})."
            ) from error


def _hashed(user_id: str) -> str:
    return hashlib.sha256(user_id.encode()).hexdigest()[:32]


def _reason(error: redis.RedisError) -> str:
    if isinstance(error, redis.AuthenticationError):  # a ConnectionError too, so it comes first
        return "Redis refuses the user or the password of the URL"
    if isinstance(error, redis.BusyLoadingError):
        return "Redis is still reading its files. Try again in a moment"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return "Redis does not answer. Start it, or check the address, and send the events again"
    if isinstance(error, redis.OutOfMemoryError):
        return "Redis is full. Raise its maxmemory, or keep fewer events per user"
    return "Redis refuses"

import itertools
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftrank.errors import ConfigError, DataError
from peftrank.serving import _history_sqlite
from peftrank.serving.history import Event, HistoryError, open_history
from peftrank.types import Item

USERS, DOMAINS = ("ada", "bob"), ("news", "video")
SURROGATE = "half \ud800"


def event(name="i1", *, user="ada", domain="news", at=1.0, event_id=None, **fields):
    item = Item(name, {"title": f"Title of {name}", **fields})
    return Event(user, domain, item, feedback=None, timestamp=at, event_id=event_id)


def names(events):
    return [event.item.item_id for event in events]


def append_until_refused(history, **fields):
    """Appends event 0, 1, ... to two domains; returns how many were acknowledged, and the error."""
    for n in itertools.count():
        pair = [event(str(n), domain=d, at=n, event_id=str(n), **fields) for d in DOMAINS]
        try:
            history.append(pair)
        except HistoryError as error:
            return n, str(error)


class Redis:
    """A real redis-server in a folder, with whatever options."""

    def __init__(self, folder, *options, tls=False):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis{'s' if tls else ''}://127.0.0.1:{self.port}/0"
        ports = (0, self.port) if tls else (self.port, 0)
        self._command = ["redis-server", "--port", str(ports[0]), "--bind", "127.0.0.1"]
        self._command += ["--tls-port", str(ports[1])] if tls else []
        self._command += ["--dir", str(folder), "--save", "", *options]
        self.start()

    def start(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def signal(self, number):
        self._process.send_signal(number)

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def redis_package():
    pytest.importorskip("redis", reason="needs the extra peftrank[redis]")
    if shutil.which("redis-server") is None:
        pytest.skip("needs the program redis-server")


@contextmanager
def serving(folder, *options, tls=False):
    server = Redis(folder, *options, tls=tls)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def shared_redis(redis_package, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", "redis"])
def url(request, tmp_path):
    """The URL of an empty history, of each kind."""
    if request.param == "redis":
        server = request.getfixturevalue("shared_redis")
        import redis

        with closing(redis.Redis.from_url(server.url)) as client:
            client.flushall()
        return server.url
    return "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/history.db"


@pytest.fixture
def opened(url):
    """Opens that history; all that a test opened are closed at its end."""
    made = []

    def open_it(**options):
        made.append(open_history(url, **options))
        return made[-1]

    yield open_it
    for history in made:
        history.close()


def test_an_event_comes_back_as_it_was_given(opened):
    item = Item(
        "i", {"title": "Zoë's 🐈 \0 \\ \" {{ x }}", "empty": ""}, {"price": 1 / 3, "n": 2.0}
    )
    given = [
        Event("ada", "news", item, feedback=4.5, timestamp=1_700_000_000.123456, event_id="é\n"),
        Event("ada", "news", Item("bare"), feedback=None, timestamp=1_800_000_000.0),
    ]
    history = opened()
    assert history.append(given) == 2
    assert history.recent("ada", "news", 10) == given


def test_recent_gives_the_newest_oldest_first_and_equal_times_in_the_order_of_arrival(opened):
    history = opened()
    history.append([event("c", at=3.0), event("a", at=1.0), event("b1", at=2.0)])
    history.append([event("b2", at=2.0), event("before-1970", at=-5.5)])
    assert names(history.recent("ada", "news", 99)) == ["before-1970", "a", "b1", "b2", "c"]
    assert names(history.recent("ada", "news", 2)) == ["b2", "c"]
    assert history.recent("ada", "news", 0) == []


def test_users_and_domains_have_histories_of_their_own(opened):
    history = opened()
    odd = ["ada", "ada:events:news", "{ada}", "ADA", " ada", "*"]
    history.append([event(f"{u}-{d}", user=u, domain=d) for u in odd for d in ("news", "news:x")])
    for user in odd:
        assert names(history.recent(user, "news", 9)) == [f"{user}-news"]
        assert names(history.recent(user, "news:x", 9)) == [f"{user}-news:x"]
    assert history.recent("nobody", "news", 9) == []


def test_a_full_history_loses_its_oldest_event_whatever_the_order_of_arrival(opened):
    history = opened(max_items=3)
    history.append([event(str(at), at=at) for at in (5.0, 1.0, 4.0, 3.0, 2.0)])
    history.append([event("other", domain="video", at=0.0), event("old", at=0.5)])
    assert names(history.recent("ada", "news", 99)) == ["3.0", "4.0", "5.0"]
    assert names(history.recent("ada", "video", 99)) == ["other"]


def test_an_event_sent_again_is_stored_once(opened):
    history = opened()
    assert history.append([event("a", event_id="1"), event("again", event_id="1")]) == 1
    assert history.append([event("later", at=9.0, event_id="1"), event("b", event_id="2")]) == 1
    assert names(history.recent("ada", "news", 9)) == ["a", "b"]
    elsewhere = [event("a", user="bob", event_id="1"), event("a", domain="video", event_id="1")]
    assert history.append(elsewhere) == 2
    assert history.append([event("a"), event("a")]) == 2  # without an id nothing is a repetition


def test_the_id_of_a_pruned_event_is_known_for_a_while(opened):
    history = opened(max_items=1, remember_seconds=0.3)
    history.append([event("a", event_id="1"), event("b", at=2.0, event_id="2")])
    assert history.append([event("a", at=3.0, event_id="1")]) == 0
    time.sleep(0.4)
    assert history.append([event("b", at=3.0, event_id="2")]) == 0  # it is still kept
    assert history.append([event("a", at=3.0, event_id="1")]) == 1


def test_a_forgotten_user_leaves_neither_events_nor_ids(opened):
    history = opened()
    mine = [event("a", event_id="1"), event("b", domain="video", event_id="1"), event("c")]
    history.append([*mine, event("other", user="bob")])
    assert history.forget("ada") == 3
    assert history.forget("ada") == 0
    assert history.recent("ada", "news", 9) == history.recent("ada", "video", 9) == []
    assert names(history.recent("bob", "news", 9)) == ["other"]
    assert history.append(mine) == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (event("x", title=SURROGATE), "surrogate"),
        (event(SURROGATE), "surrogate"),
        (event(user=SURROGATE), "user_id holds half a character"),
        (event(domain=SURROGATE), "domain holds half a character"),
        (event(event_id=SURROGATE), "event_id holds half a character"),
        (event(user=""), "user_id must be a text"),
        (event(event_id=""), "event_id must be a text"),
        (event(at=float("nan")), "timestamp must be a finite number"),
        (Event("ada", "news", Item("x"), float("inf"), 1.0), "feedback must be a finite number"),
        (Event("ada", "news", Item("x", {}, {"f": float("nan")}), None, 1.0), "feature 'f'"),
        (Event("ada", "news", Item("x", {"title": 3}), None, 1.0), "must be a text"),
    ],
)
def test_of_a_call_with_a_bad_event_nothing_is_stored_and_the_error_names_it(opened, bad, reason):
    history = opened()
    with pytest.raises(DataError, match=r"^events\[1\]: ") as raised:
        history.append([event("good"), bad])
    assert reason in str(raised.value)
    assert history.recent("ada", "news", 9) == []


def test_asking_for_a_user_that_is_no_text_is_an_error(opened):
    history = opened()
    for call in (lambda: history.recent(SURROGATE, "news", 1), lambda: history.forget(SURROGATE)):
        with pytest.raises(DataError, match="half a character"):
            call()


def test_long_texts_are_stored_whole(opened):
    long = event("x" * 10_000, user="u" * 100_000, event_id="e" * 100_000, title="ü" * 3_000_000)
    history = opened(max_items=1)
    assert history.append([long]) == 1
    assert history.append([long]) == 0
    assert history.recent(long.user_id, "news", 1) == [long]


def test_threads_share_a_history(opened):
    history = opened()

    def work(thread):
        for i in range(15):
            both = [event(f"{thread}-{i}", at=i), event("x", user=f"u{thread}", event_id=str(i))]
            assert history.append(both) == 2
            assert history.recent(f"u{thread}", "news", 99)[-1].event_id == str(i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    expected = {f"{thread}-{i}" for thread in range(8) for i in range(15)}
    assert sorted(names(history.recent("ada", "news", 999))) == sorted(expected)


def test_a_retry_that_races_itself_is_stored_once(opened):
    history = opened()
    batch = [event(str(i), event_id=str(i)) for i in range(10)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(history.append, [batch] * 16)) == 10
    assert len(history.recent("ada", "news", 99)) == 10


def test_a_closed_history_says_so(opened):
    history = opened()
    history.append([event()])
    history.close()
    for call in (history.ping, lambda: history.append([]), lambda: history.recent("a", "news", 1)):
        with pytest.raises(HistoryError, match="was closed"):
            call()


EVENTS = st.builds(
    Event,
    st.sampled_from(USERS),
    st.sampled_from(DOMAINS),
    st.builds(
        Item,
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=5),
        st.dictionaries(
            st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))
        ),
        st.dictionaries(st.sampled_from("fg"), st.floats(allow_nan=False, allow_infinity=False)),
    ),
    feedback=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    timestamp=st.integers(0, 3).map(float) | st.floats(allow_nan=False, allow_infinity=False),
    event_id=st.none() | st.sampled_from("1234"),
)
STEPS = st.lists(
    st.tuples(st.just("append"), st.lists(EVENTS, max_size=5))
    | st.tuples(st.just("recent"), st.integers(0, 6))
    | st.tuples(st.just("forget"), st.sampled_from(USERS)),
    max_size=12,
)


class Model:
    """What a history must do, in plain Python."""

    def __init__(self, max_items):
        self.kept, self.ids, self.max_items = {}, set(), max_items

    def append(self, events):
        stored = 0
        for new in events:
            key = (new.user_id, new.domain)
            if new.event_id is not None and (*key, new.event_id) in self.ids:
                continue
            self.ids.add((*key, new.event_id))
            by_time = sorted([*self.kept.get(key, []), new], key=lambda kept: kept.timestamp)
            self.kept[key] = by_time[-self.max_items :]
            stored += 1
        return stored

    def recent(self, user, domain, n):
        return self.kept.get((user, domain), [])[-n:] if n else []

    def forget(self, user):
        self.ids = {known for known in self.ids if known[0] != user}
        return sum(len(self.kept.pop((user, domain), [])) for domain in DOMAINS)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_any_sequence_of_calls_does_what_a_plain_list_would(opened, steps):
    history, model = opened(max_items=4), Model(4)
    for user in USERS:
        history.forget(user)
    for call, argument in steps:
        if call == "recent":
            for user in USERS:
                for domain in DOMAINS:
                    assert history.recent(user, domain, argument) == model.recent(
                        user, domain, argument
                    )
        else:
            assert getattr(history, call)(argument) == getattr(model, call)(argument)
    for user in USERS:
        for domain in DOMAINS:
            assert history.recent(user, domain, 9) == model.recent(user, domain, 9)
    history.close()


WRITER = """
import sys
from peftrank.serving.history import Event, open_history
from peftrank.types import Item

history = open_history(sys.argv[1], max_items=10**6)
for n in range(10**6):
    item = Item(f"{sys.argv[2]}-{n}", {"title": "word " * 50})
    history.append([Event("ada", d, item, None, float(n), str(n)) for d in ("news", "video")])
    print(item.item_id, flush=True)
"""


def written_until_killed(url, count, *writers):
    """What processes acknowledged that were killed (-9) after about `count` events each."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, name], stdout=subprocess.PIPE, text=True
        )
        for name in writers
    ]
    acknowledged = []
    for process in running:
        for _ in range(count):
            acknowledged.append(process.stdout.readline().strip())
    for process in running:
        process.kill()
    for process in running:
        acknowledged += process.communicate()[0].split()
    return [name for name in acknowledged if name]


@pytest.mark.parametrize("url", ["file", "redis"], indirect=True)
def test_every_event_a_killed_process_acknowledged_is_there(opened, url):
    acknowledged = written_until_killed(url, 60, "one")
    assert len(acknowledged) >= 60
    history = opened(max_items=10**6)
    news, video = (names(history.recent("ada", domain, 10**6)) for domain in DOMAINS)
    assert news == video  # each call was stored whole
    assert set(acknowledged) <= set(news)
    assert len(news) - len(acknowledged) <= 1


@pytest.mark.parametrize("url", ["file", "redis"], indirect=True)
def test_processes_share_a_history(opened, url):
    acknowledged = written_until_killed(url, 20, "one", "two", "three")
    history = opened(max_items=10**6)
    # The three use the same event ids, so each id is stored once, whoever came first.
    ids = [kept.event_id for kept in history.recent("ada", "news", 10**6)]
    assert len(ids) == len(set(ids)) >= 20
    assert {name.partition("-")[2] for name in acknowledged} <= set(ids)


@pytest.mark.parametrize(
    "bad",
    [
        *("", "history.db", "postgres://u:secret@h/x"),
        *("sqlite://host/x", "sqlite:///", "sqlite:/x"),
        *("redis://:secret@h:port/0", "redis://:sec/ret@h:1/0", "redis://:secret@h:1/zero"),
    ],
)
def test_a_url_that_names_no_store_is_an_error_that_shows_no_password(bad):
    with pytest.raises(ConfigError, match="expected") as raised:
        open_history(bad)
    assert "secret" not in str(raised.value)
    assert "sec" not in str(raised.value)


def test_numbers_out_of_range_are_errors():
    with pytest.raises(ConfigError, match="at least 1 event"):
        open_history("sqlite://", max_items=0)
    with pytest.raises(ConfigError, match="remember_seconds is nan"):
        open_history("sqlite://", remember_seconds=float("nan"))


def test_without_the_redis_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "peftrank.serving._history_redis", raising=False)
    with pytest.raises(ConfigError, match=r"pip install \"peftrank\[redis\]\""):
        open_history("redis://localhost/0")


# SQLite: what can happen to a file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "history.db"


@contextmanager
def in_file(path, **options):
    history = open_history(f"sqlite:///{path}", **options)
    try:
        yield history
    finally:
        history.close()


def test_a_file_is_made_with_its_folder_and_keeps_events_from_run_to_run(tmp_path):
    path = tmp_path / "a" / "b?#%20 é" / ":memory:"
    with in_file(path) as history:
        history.append([event("a", event_id="1")])
    assert path.is_file()
    with in_file(path) as history:
        assert history.append([event("a", event_id="1")]) == 0
        assert names(history.recent("ada", "news", 9)) == ["a"]


OPENER = """
import sys
from peftrank.serving.history import open_history

for url in sys.stdin:
    open_history(url.strip()).close()
    print("opened", flush=True)
"""


def test_processes_that_make_one_file_at_once_all_open_it(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", OPENER], **pipes) for _ in range(4)]
    for name in range(20):
        for process in running:
            print(f"sqlite:///{tmp_path}/{name}.db", file=process.stdin, flush=True)
        assert [process.stdout.readline() for process in running] == ["opened\n"] * 4
    for process in running:
        process.communicate()


def test_the_text_of_a_forgotten_user_is_gone_from_the_disk(file):
    with in_file(file) as history:
        history.append([event("a", user="carol-the-user", title="very private", event_id="id-77")])
        history.append([event("b", title="public")])
        history.forget("carol-the-user")
        on_disk = b"".join(path.read_bytes() for path in file.parent.iterdir())
    assert b"public" in on_disk
    for text in (b"very private", b"carol-the-user", b"id-77"):
        assert text not in on_disk


def test_a_file_of_something_else_is_refused_and_stays_as_it_was(file):
    file.write_bytes(b"title,user\n" * 500)
    with pytest.raises(HistoryError, match=r"no SQLite database. Name another file"):
        open_history(f"sqlite:///{file}")
    assert file.read_bytes() == b"title,user\n" * 500


def test_the_database_of_another_program_is_refused_and_stays_as_it_was(file):
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE events (name)")
        other.commit()
    before = file.read_bytes()
    with pytest.raises(HistoryError, match=r"database of another program. Name another file"):
        open_history(f"sqlite:///{file}")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_file_of_a_newer_version_is_refused(file):
    with in_file(file):
        pass
    with closing(sqlite3.connect(file)) as other:
        other.execute("PRAGMA user_version = 7")
    with pytest.raises(HistoryError, match="has format 7, and this PeftRank reads format 1"):
        open_history(f"sqlite:///{file}")


def test_damage_is_an_error_that_says_so_wherever_it_is_noticed(file):
    expected = [event(str(i), at=i, event_id=str(i), text="word " * 40) for i in range(100)]
    with in_file(file) as history:
        history.append(expected)
    whole, noticed = file.read_bytes(), 0
    for place in range(0, len(whole), 501):
        damaged = bytearray(whole)
        damaged[place : place + 60] = b"\xaa" * 60
        file.write_bytes(damaged)
        try:
            with in_file(file) as history:
                assert history.recent("ada", "news", 99) == expected[-99:]
        except HistoryError as error:
            noticed += 1
            reasons = ("damaged", "database of another program", "has format")
            assert any(reason in str(error) for reason in reasons), error  # noqa: PT017
    assert noticed > 50


def test_a_file_cut_short_is_an_error_that_says_so(file):
    with in_file(file) as history:
        history.append([event(str(i), text="word " * 40) for i in range(100)])
    os.truncate(file, 8192)
    with pytest.raises(HistoryError, match="damaged"), in_file(file) as history:
        history.recent("ada", "news", 99)


@pytest.fixture
def read_only_folder(tmp_path):
    """A folder in which this process may not write, even where root runs the tests."""
    folder = tmp_path / "read-only"
    folder.mkdir(0o555)
    root = os.geteuid() == 0
    if root:
        for above in (tmp_path, *tmp_path.parents[:2]):
            above.chmod(0o755)
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)


def test_a_folder_that_may_not_be_written_is_an_error_that_says_so(read_only_folder):
    with pytest.raises(HistoryError, match="Let this user write to it and to its folder"):
        open_history(f"sqlite:///{read_only_folder}/history.db")
    with pytest.raises(HistoryError, match="cannot make the folder"):
        open_history(f"sqlite:///{read_only_folder}/folder/history.db")


def test_a_file_that_may_not_be_written_is_an_error_that_says_so(file, read_only_folder):
    name = read_only_folder / "history.db"
    mine, root = os.geteuid(), os.getuid() == 0
    if root:
        os.seteuid(0)
    read_only_folder.chmod(0o755)
    with in_file(name) as history:
        history.append([event()])
    name.chmod(0o444)
    read_only_folder.chmod(0o555)
    if root:
        os.seteuid(mine)
    with pytest.raises(HistoryError, match="Let this user write to it and to its folder"):
        open_history(f"sqlite:///{name}").append([event()])


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from peftrank.serving.history import Event, HistoryError, open_history
from peftrank.types import Item

path = Path(sys.argv[1])
history = open_history(f"sqlite:///{path}", max_items=10**6)
item = Item("i", {"title": "word " * 400})
acknowledged = 0

def write(count):
    global acknowledged
    for n in range(acknowledged, acknowledged + count):
        history.append([Event("ada", "news", item, None, float(n), str(n))])
        acknowledged += 1

write(10)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    write(10**6)
except HistoryError as error:
    print(error)
assert 10 <= acknowledged < 500, acknowledged
assert len(history.recent("ada", "news", 10**6)) == acknowledged
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
write(10)
history.close()
history = open_history(f"sqlite:///{path}")
assert [e.event_id for e in history.recent("ada", "news", 10**6)] == [
    str(n) for n in range(acknowledged)
]
"""


def test_where_the_disk_takes_no_more_the_call_fails_and_nothing_acknowledged_is_lost(file):
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(file)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "the disk" in ran.stdout


def test_a_full_disk_is_named(file):
    with in_file(file) as history:
        with history._connected() as connection:
            connection.execute("PRAGMA max_page_count = 30")
        count, error = append_until_refused(history, text="word " * 400)
        assert "the disk is full. Free some space" in error
        for domain in DOMAINS:
            kept = names(history.recent("ada", domain, 99))
            assert kept == [str(n) for n in range(count)]
        assert history.append([event("next", event_id=str(count))]) == 1


def test_a_file_that_another_process_holds_is_waited_for_then_an_error(file, monkeypatch):
    monkeypatch.setattr(_history_sqlite, "_BUSY_SECONDS", 0.5)
    with in_file(file) as history, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert history.recent("ada", "news", 1) == []  # reading goes on
        with pytest.raises(HistoryError, match="another process has locked it"):
            history.append([event()])
        other.execute("COMMIT")
        assert history.append([event()]) == 1


# Redis: what can happen to a server


def test_a_redis_that_is_gone_is_an_error_at_once_and_works_again_when_it_is_back(
    redis_package, tmp_path
):
    with serving(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        history = open_history(server.url)
        history.append([event("a", event_id="1")])
        server.kill()
        for call in (history.ping, lambda: history.append([event("b")])):
            start = time.monotonic()
            with pytest.raises(HistoryError, match=r"Redis does not answer\. Start it"):
                call()
            assert time.monotonic() - start < 2
        server.start()
        assert history.append([event("a", event_id="1"), event("c", event_id="2")]) == 1
        assert names(history.recent("ada", "news", 9)) == ["a", "c"]
        history.close()


def test_a_redis_that_hangs_is_an_error_within_two_seconds(redis_package, tmp_path):
    with serving(tmp_path) as server:
        history, other = open_history(server.url), open_history(server.url)
        history.ping()
        server.signal(signal.SIGSTOP)
        for one in (history, other):  # with a connection, and without
            start = time.monotonic()
            with pytest.raises(HistoryError, match="Redis does not answer"):
                one.append([event()])
            assert time.monotonic() - start < 2
        server.signal(signal.SIGCONT)
        history.ping()
        history.close()
        other.close()


def test_a_redis_that_is_killed_while_it_is_written_keeps_what_was_acknowledged(
    redis_package, tmp_path
):
    with serving(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        history = open_history(server.url, max_items=10**6)
        killer = threading.Timer(0.3, server.kill)
        killer.start()
        count, _ = append_until_refused(history)
        killer.join()
        server.start()
        news, video = (names(history.recent("ada", domain, 10**6)) for domain in DOMAINS)
        assert news == video
        assert len(news) in (count, count + 1)
        assert count > 10
        history.close()


def test_a_password_is_taken_from_the_url_and_never_shown(redis_package, tmp_path):
    with serving(tmp_path, "--requirepass", "s3cret/word") as server:
        right = f"redis://:s3cret%2Fword@127.0.0.1:{server.port}/0"
        history = open_history(right)
        assert history.append([event()]) == 1
        history.close()
        for wrong in (right.replace("s3cret", "s3crets"), server.url):
            history = open_history(wrong)
            with pytest.raises(HistoryError, match="refuses the user or the password") as raised:
                history.ping()
            shown = [raised.value, raised.value.__cause__, history]
            assert not any("s3cret" in text for x in shown for text in (str(x), repr(x)))
            history.close()
    with pytest.raises(ConfigError, match=r"redis://h:1/0, has options") as raised:
        open_history("redis://:s3cret@h:1/0?colour=s3cret")
    assert "s3cret" not in str(raised.value)


def test_a_full_redis_is_named_and_keeps_what_it_has(redis_package, tmp_path):
    options = ("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    with serving(tmp_path, *options) as server:
        history = open_history(server.url)
        count, error = append_until_refused(history, text="word " * 2000)
        assert "Redis is full. Raise its maxmemory" in error
        for domain in DOMAINS:
            assert names(history.recent("ada", domain, 500)) == [str(n) for n in range(count)]
        assert history.forget("ada") == 2 * count
        history.close()


def test_redis_over_tls(redis_package, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    files = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no")
    with serving(tmp_path, *files, tls=True) as server:
        with closing(open_history(f"{server.url}?ssl_ca_certs={certificate}")) as history:
            assert history.append([event()]) == 1
        with closing(open_history(server.url)) as history:  # nobody vouches for the certificate
            with pytest.raises(HistoryError, match=r"rediss://127.0.0.1:\d+/0.*certificate"):
                history.ping()

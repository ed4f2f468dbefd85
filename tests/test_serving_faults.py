"""A real server under what happens to servers: kills, damage, full disks, lost stores, bad clients.

After every fault the process still runs and ranks as the ranker does.
"""

import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("uvicorn", reason="needs the extra peftrank[serve]")

from test_ranker import close
from test_serving_history import Redis
from test_serving_process import ITEMS, SLATE, Process

from peftrank import store
from peftrank.base import load_base
from peftrank.formats._record import slate_from_record
from peftrank.ranker import Ranker

VERSIONS = ("0001", "0002")
STORED = {key: SLATE[key] for key in ("user_id", "domain", "candidates")}
"""A slate that brings no history."""


class Server(Process):
    """A process that serves a copy of the tiny store, and knows what its answers must be."""

    def __init__(self, workplace, folder, *options):
        self.store = folder / "adapters"
        shutil.copytree(workplace / "adapters", self.store)
        super().__init__("--store", self.store, *options)
        base = load_base(str(workplace / "base"), quantization="none")
        self._rankers = {}
        for version in VERSIONS:
            self._rankers[version] = Ranker(base, store=self.store)
            self._rankers[version].load_adapter(f"news@{version}")
        self._rankers["0003"] = self._rankers["0002"]
        self._known = {}

    def check(self, slate=SLATE, version=None, **options):
        """Ranks a slate, checks the answer against the version it names, and returns it."""
        status, value = self.call("POST", "/v1/rank", {"slate": slate, **options})
        assert status == 200, value
        (found,) = value["rankings"]
        assert version in (None, found["version"])
        self.same(found, slate)
        return found

    def same(self, found, slate=SLATE):
        """Fails unless a ranking is the ranker's."""
        key = json.dumps(slate), found["version"]
        if key not in self._known:
            record = {"slate_id": "0", **slate}
            self._known[key] = self._rankers[key[1]].rank(slate_from_record(record, None))
        expected = self._known[key]
        assert tuple(found["item_ids"]) == expected.item_ids
        assert close([found["scores"]], [expected.scores])

    def metric(self, line):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return next((float(x.split()[-1]) for x in lines if x.startswith(line + " ")), 0.0)

    def until(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.lines[-5:]
            time.sleep(0.01)

    def send(self, data, *, wait=True):
        """Sends bytes over a connection of their own; returns what came before it was closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=15) as connection:
            # It may answer, and close, before it was told everything.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while wait and (part := connection.recv(65536)):
                    answer += part
            return answer


@contextlib.contextmanager
def running(*arguments):
    server = Server(*arguments)
    try:
        server.until_ready()
        yield server
    finally:
        if server.popen.poll() is None:
            server.popen.kill()
            server.wait()


@pytest.fixture(scope="module")
def one_server(workplace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    options = ("--watch-seconds", 0.05, "--drain-seconds", 0, "--max-requests", 64)
    history = f"sqlite:///{folder}/users.db"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PEFTRANK_ADMIN_TOKEN", "boss")
        environment.delenv("PEFTRANK_TOKEN", raising=False)
        with running(workplace, folder, "--history", history, *options) as server:
            yield server
            server.check()
            assert server.end() == 0
            for word in ("amber", "velvet", "river", '"ann"', "boss", "Traceback"):
                assert word not in json.dumps(server.lines)


@pytest.fixture
def server(one_server):
    """The server of this file: the active version is 0002, and after each test all is well."""
    yield one_server
    store.activate(one_server.store, "news", "0002")
    one_server.until(lambda: one_server.check()["version"] == "0002")
    assert one_server.metric('peftrank_adapter_stale{domain="news"}') == 0
    assert one_server.metric("peftrank_queue_tokens") == 0


def body_of(slate, **options):
    return json.dumps({"slate": slate, **options}).encode()


def post(body, path="/v1/rank", *headers):
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *headers)
    if not any(line.startswith(("Transfer-Encoding", "Content-Length")) for line in headers):
        lines = (*lines, f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + body


def chunked(body, size=65536):
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


TEN_MEGABYTES = body_of(SLATE) + b" " * 10**7
MANY = [{**ITEMS[0], "item_id": str(n)} for n in range(10_000)]
LONG = body_of({**SLATE, "candidates": [{**ITEMS[0], "fields": {"title": "amber " * 10**5}}]})
BOSS = "Authorization: Bearer boss"


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        (post(TEN_MEGABYTES), 413, "limit"),
        (post(chunked(TEN_MEGABYTES), "/v1/rank", "Transfer-Encoding: chunked"), 413, "limit"),
        (post(b"", "/v1/rank", "Content-Length: 99999999999"), 413, "limit"),
        (post(body_of({**SLATE, "candidates": MANY})), 400, "limit"),
        (post(LONG), 200, None),
        (post(b'{"slate": "\xff\xfe"}'), 400, "data"),
        (post(b"[" * 10**6), 400, "data"),
        (post(b"9" * 10**6), 400, "data"),
        (post(body_of({**SLATE, "domain": "../../etc/passwd"})), 400, "config"),
        (post(body_of(SLATE, domain="../news")), 400, "config"),
        (post(b"", "/v1/adapters/../load", BOSS), 400, "data"),
        (post(b"", "/v1/adapters/%2e%2e/load", BOSS), 400, "data"),
        (post(b"", "/v1/adapters/..%2f..%2fetc/load", BOSS), 404, "data"),
        (post(b'{"version": "../0001"}', "/v1/adapters/news/load", BOSS), 400, "adapter"),
        (post(b'{"version": "/etc"}', "/v1/adapters/news/activate", BOSS), 400, "adapter"),
        (b"GET /page/../app.py HTTP/1.0\r\n\r\n", 404, "data"),
        (b"GET /page/%2e%2e/%2e%2e/app.py HTTP/1.0\r\n\r\n", 404, "data"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10**7, 400, None),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 10**6, 400, None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, None),
        (b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}", 400, None),
    ],
    ids=[
        "ten megabytes", "ten megabytes in chunks", "a declared length", "ten thousand candidates",
        "a long title", "no UTF-8", "nested JSON", "a long number", "a path as a slate's domain",
        "a path as the domain", "a path as an adapter's domain", "an encoded path as one",
        "an encoded longer one", "a path as a version", "an absolute path as one",
        "a path beside the page", "an encoded path beside the page",
        "a long header", "many headers", "TLS", "a negative length",
    ],
)  # fmt: skip
def test_a_hostile_request_is_answered_as_documented(server, request_, status, kind):
    before = resident(server.popen.pid)
    head, _, body = server.send(request_).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    if kind is not None:
        error = json.loads(body)["error"]
        assert error["type"] == kind
        assert "amber" not in error["message"]
    server.check()
    assert resident(server.popen.pid) < before + 100 * 2**20


def resident(pid):
    """Bytes of memory that a process holds (Linux)."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_clients_that_leave_are_counted_and_take_nothing_from_others(server):
    name = 'peftrank_request_seconds_count{route="/v1/rank",status="499"}'
    gone = server.metric(name)
    long = json.dumps({"slates": [SLATE] * 10, "explain": True}).encode()
    for _ in range(4):
        server.send(post(long)[:-100], wait=False)  # in the middle of the body
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(post(long))  # and before the answer
            time.sleep(0.02)
        server.check()
    server.until(lambda: server.metric(name) == gone + 8)
    server.until(lambda: server.metric("peftrank_queue_tokens") == 0)


def test_a_client_that_sends_nothing_holds_up_nobody(server):
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    try:
        for connection in connections:
            connection.sendall(b"POST /v1/rank HTTP/1.1\r\n")
        server.check()
    finally:
        for connection in connections:
            connection.close()


ACTIVATE = """
import itertools, sys
from pathlib import Path
from peftrank import store
print("go", flush=True)
for version in itertools.cycle(("0001", "0002")):
    store.activate(Path(sys.argv[1]), "news", version)
"""


@pytest.mark.slow
def test_a_killed_activation_breaks_no_pointer_and_no_answer(server):
    stop, seen = threading.Event(), set()

    def ask():
        while not stop.is_set():
            seen.add(server.check()["version"])

    failures = server.metric('peftrank_adapter_load_failures_total{domain="news"}')
    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        try:
            for pause in (0.0, 0.013, 0.029):
                command = [sys.executable, "-c", ACTIVATE, server.store]
                child = subprocess.Popen(command, stdout=subprocess.PIPE)
                assert child.stdout.readline() == b"go\n"
                time.sleep(0.2 + pause)
                child.kill()
                child.wait()
                child.stdout.close()
                active = store.active(server.store, "news")
                server.until(lambda wanted=active: server.check()["version"] == wanted)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert seen == set(VERSIONS)
    assert server.metric('peftrank_adapter_load_failures_total{domain="news"}') == failures


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "readout.safetensors"])
def test_a_truncated_version_is_not_served_and_raises_the_alarm(server, name):
    failures = server.metric('peftrank_adapter_load_failures_total{domain="news"}')
    stale = 'peftrank_adapter_stale{domain="news"}'
    damaged = server.store / "news" / "0003"
    shutil.copytree(server.store / "news" / "0001", damaged)
    with open(damaged / name, "r+b") as file:
        file.truncate((damaged / name).stat().st_size // 2)
    store.activate(server.store, "news", "0003")
    server.until(lambda: server.metric(stale) == 1)
    assert server.check()["version"] == "0002"
    (adapter,) = server.call("GET", "/v1/adapters")[1]["adapters"]
    assert (adapter["version"], adapter["active"], adapter["stale"]) == ("0002", "0003", True)
    assert server.metric('peftrank_adapter_load_failures_total{domain="news"}') > failures
    store.activate(server.store, "news", "0001")
    server.until(lambda: server.check()["version"] == "0001")
    assert server.metric(stale) == 0
    shutil.rmtree(damaged)


def events_of(user, numbers, words=400):
    fields = {"title": "river " * words}
    return [
        {
            "user_id": user,
            "domain": "news",
            "item": {"item_id": f"h{n}", "fields": fields},
            "event_id": str(n),
            "timestamp": n,
        }
        for n in numbers
    ]


def keep(server, user, number):
    return server.call("POST", "/v1/events", {"events": events_of(user, [number])})


def fill(server, user, most=2000):
    """Sends events until one is refused; returns how many were acknowledged, and the refusal."""
    for number in range(most):
        status, value = keep(server, user, number)
        if status != 200:
            return number, status, value
    raise AssertionError("the disk took everything")


def has_kept(server, user, count):
    """Fails unless a user has exactly these events, in order."""
    newest = events_of(user, range(count))[-100:]
    slate = {**STORED, "user_id": user}
    filled = {**slate, "history": [event["item"] for event in newest]}
    status, value = server.call("POST", "/v1/rank", {"slate": slate})
    assert status == 200
    server.same(value["rankings"][0], filled)
    for at in range(0, count, 100):
        again = {"events": events_of(user, range(at, min(at + 100, count)))}
        _, value = server.call("POST", "/v1/events", again)
        assert value["stored"] == 0


@contextlib.contextmanager
def file_limit(pid, size):
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def refused(status, value):
    assert (status, value["error"]["type"]) == (503, "internal")
    assert "nothing was changed" in value["error"]["message"]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_takes_no_more_loses_nothing_that_was_acknowledged(server):
    with file_limit(server.popen.pid, 300_000):
        count, *answer = fill(server, "full")
        refused(*answer)
        assert count > 10
        has_kept(server, "full", count)
        server.check()
    assert keep(server, "full", count)[0] == 200
    has_kept(server, "full", count + 1)


@contextlib.contextmanager
def small_disk(folder, size="1m"):
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    mounted = mounted and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.check_call(["umount", folder])


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_acknowledged(workplace, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        history = f"sqlite:///{disk}/users.db"
        with running(workplace, tmp_path, "--history", history) as server:
            (disk / "other").write_bytes(b"x" * 500_000)
            count, *answer = fill(server, "full")
            refused(*answer)
            has_kept(server, "full", count)
            server.check()
            (disk / "other").unlink()
            assert keep(server, "full", count)[0] == 200
            has_kept(server, "full", count + 1)
            assert server.end() == 0


@pytest.mark.slow
def test_a_killed_server_has_kept_what_it_acknowledged(workplace, tmp_path):
    history = ("--history", f"sqlite:///{tmp_path}/users.db")
    acknowledged = -1
    for start in range(2):
        (tmp_path / str(start)).mkdir()
        with running(workplace, tmp_path / str(start), *history) as server:
            if acknowledged >= 0:
                # The last one may have been kept and its answer lost.
                assert keep(server, "killed", acknowledged)[0] == 200
                has_kept(server, "killed", acknowledged + 1)
                return
            killer = threading.Timer(0.7, server.popen.kill)
            killer.start()
            with contextlib.suppress(OSError, http.client.HTTPException):
                for number in itertools.count():
                    assert keep(server, "killed", number)[0] == 200
                    acknowledged = number + 1
            assert acknowledged > 10


@pytest.mark.slow
def test_a_lost_redis_fails_what_needs_it_and_is_used_again_when_it_is_back(workplace, tmp_path):
    pytest.importorskip("redis", reason="needs the extra peftrank[redis]")
    if shutil.which("redis-server") is None:
        pytest.skip("needs the program redis-server")
    redis = Redis(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    try:
        with running(workplace, tmp_path, "--history", redis.url) as server:
            for number in range(5):
                assert keep(server, "ada", number)[0] == 200
            has_kept(server, "ada", 5)
            redis.kill()
            refused(*keep(server, "ada", 5))
            refused(*server.call("POST", "/v1/rank", {"slate": {**STORED, "user_id": "ada"}}))
            server.check()
            redis.start()
            has_kept(server, "ada", 5)
            redis.signal(signal.SIGSTOP)
            started = time.monotonic()
            refused(*keep(server, "ada", 5))
            assert time.monotonic() - started < 5
            server.check()
            assert server.call("GET", "/readyz")[0] == 200
            redis.signal(signal.SIGCONT)
            assert keep(server, "ada", 5)[0] == 200
            has_kept(server, "ada", 6)
            redis.signal(signal.SIGSTOP)
            assert server.end() == 0
    finally:
        redis.kill()


@pytest.mark.slow
def test_a_stop_under_load_cuts_no_answer(workplace, tmp_path):
    done = []

    def ask():
        while True:
            try:
                status, value = server.call("POST", "/v1/rank", {"slates": [SLATE] * 3})
            except ConnectionRefusedError:
                return
            done.append(status)
            if status == 200:
                for found in value["rankings"]:
                    server.same(found)
            else:
                assert (status, value["error"]["type"]) == (503, "overloaded")
                time.sleep(0.05)

    options = ("--history", "none", "--drain-seconds", 0.5)
    with running(workplace, tmp_path, *options) as server, ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask) for _ in range(8)]
        time.sleep(1)
        assert server.end() == 0
        for one in asking:
            one.result()
    assert done.count(200) > 20
    assert done.count(503) > 8


@pytest.mark.slow
def test_a_stop_while_it_loads_ends_it_in_good_order(workplace, tmp_path):
    server = Server(workplace, tmp_path, "--history", "none", "--drain-seconds", 0)
    try:
        assert server.event("ready") is None
        assert server.end() == 0
    finally:
        if server.popen.poll() is None:
            server.popen.kill()
            server.wait()

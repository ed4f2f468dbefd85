"""`peftrank serve` as a process: how it starts, how it ends, and what it says when it cannot."""

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("uvicorn", reason="needs the extra peftrank[serve]")

ITEMS = [
    {"item_id": f"i{n}", "fields": {"title": f"amber {word} castle {n}"}}
    for n, word in enumerate(("river", "velvet", "garden", "island") * 10)
]
SLATE = {"user_id": "ann", "domain": "news", "history": ITEMS[:10], "candidates": ITEMS}


class Process:
    """A running `peftrank serve`."""

    def __init__(self, *options):
        command = [sys.executable, "-m", "peftrank", "serve", "--port", "0", *map(str, options)]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines, self.listening = [], threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.listening.wait(60), self.lines
        self.port = int(self.event("listening")["url"].rpartition(":")[2])

    def _read(self):
        for line in self.popen.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == "listening":
                self.listening.set()

    def event(self, name):
        return next((line for line in self.lines if line["event"] == name), None)

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def until_ready(self):
        end = time.monotonic() + 60
        while (status := self.call("GET", "/readyz")[0]) != 200:
            assert status == 503
            assert time.monotonic() < end, self.lines
            time.sleep(0.02)

    def end(self, signal_=signal.SIGTERM):
        self.popen.send_signal(signal_)
        return self.wait()

    def wait(self):
        code = self.popen.wait(30)
        self._reader.join(10)
        self.popen.stderr.close()
        return code


@pytest.fixture(autouse=True)
def loggers():
    """Puts back the logs that a server in this process sent to its stderr."""
    found = [logging.getLogger(name) for name in ("peftrank", "uvicorn")]
    before = [(one.handlers, one.propagate, one.level) for one in found]
    yield
    for one, (handlers, propagate, level) in zip(found, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def run(place):
    """Returns a function that starts `peftrank serve` in a copy of the workplace."""
    made = []

    def start(*options):
        made.append(Process("--history", "sqlite:///users.db", *options))
        return made[-1]

    yield start
    for process in made:
        if process.popen.poll() is None:
            process.popen.kill()
            process.wait()


def test_it_answers_while_it_loads_then_ranks_and_finishes_its_work_before_it_ends(run):
    process = run("--drain-seconds", 0.5, "--queue-tokens", 10**7)
    assert process.call("GET", "/healthz") == (200, {"status": "ok"})
    process.until_ready()
    status, value = process.call("POST", "/v1/rank", {"slate": SLATE})
    assert status == 200
    assert value["rankings"][0]["version"] == "0002"

    answers = []
    long = {"slates": [SLATE] * 100, "explain": True}
    thread = threading.Thread(target=lambda: answers.append(process.call("POST", "/v1/rank", long)))
    thread.start()
    time.sleep(0.2)
    assert answers == [], "the request was too quick to be under way"
    process.popen.send_signal(signal.SIGTERM)
    while process.event("stopping") is None:
        time.sleep(0.005)
    assert process.call("GET", "/readyz")[0] == 503
    status, value = process.call("POST", "/v1/rank", {"slate": SLATE})
    assert (status, value["error"]["type"]) == (503, "overloaded")
    thread.join(60)
    assert process.wait() == 0
    assert answers[0][0] == 200
    assert len(answers[0][1]["rankings"]) == 100
    assert process.lines[-1]["event"] == "stopped"
    assert not any("amber" in json.dumps(line) for line in process.lines)


@pytest.mark.slow
def test_requests_that_outlast_the_grace_are_answered_503(run):
    options = {"drain-seconds": 0, "grace-seconds": 0.1, "batch-tokens": 256, "queue-tokens": 10**7}
    process = run(*(part for name in options for part in (f"--{name}", options[name])))
    process.until_ready()
    answers = []
    long = {"slates": [SLATE] * 200, "explain": True}
    thread = threading.Thread(target=lambda: answers.append(process.call("POST", "/v1/rank", long)))
    thread.start()
    time.sleep(0.5)
    assert process.end() == 0
    thread.join(30)
    status, value = answers[0]
    assert (status, value["error"]["type"]) == (503, "overloaded")


@pytest.mark.slow
def test_a_stop_resets_no_connection_but_one_that_comes_as_the_port_closes(run):
    """Between the last look at the port and its end the kernel may let one more in to wait."""
    process = run("--drain-seconds", 0.3)
    process.until_ready()

    def ask():
        seen = set()
        try:
            while True:
                seen.add(process.call("POST", "/v1/rank", {"slate": SLATE})[0])
        except ConnectionRefusedError:
            return seen, 0
        except ConnectionResetError:
            return seen, 1

    with ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(ask) for _ in range(12)]
        time.sleep(1)
        assert process.end() == 0
        answers, resets = zip(*(one.result() for one in asking), strict=True)
    assert set().union(*answers) == {200, 503}
    assert sum(resets) <= 1


@pytest.mark.slow
def test_events_outlive_the_server(run):
    event = {"user_id": "ann", "domain": "news", "item": ITEMS[0], "event_id": "e"}
    first = run("--drain-seconds", 0)
    first.until_ready()
    assert first.call("POST", "/v1/events", {"events": [event]})[1]["stored"] == 1
    assert first.end(signal.SIGINT) == 0
    second = run("--drain-seconds", 0)
    second.until_ready()
    assert second.call("POST", "/v1/events", {"events": [event]})[1]["duplicates"] == 1
    ask = {key: SLATE[key] for key in ("user_id", "domain", "candidates")}
    _, value = second.call("POST", "/v1/rank", {"slate": ask, "explain": True})
    assert value["rankings"][0]["explanation"]["history"] == ["i0"]
    assert second.end() == 0


def test_a_base_that_cannot_be_loaded_ends_the_server(run, tmp_path):
    (tmp_path / "nothing").mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "peftrank", "serve", "--port", "0", "--base", tmp_path / "nothing"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in process.stderr


def test_a_port_that_is_taken_is_said_to_be(cli, place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("serve", "--port", port)
    assert result.code == 2
    assert f"cannot listen at 127.0.0.1:{port}" in result.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--store", "nowhere"), "has no sound active adapter"),
        (("--domains", "news,nuws"), "nuws"),
        (("--history", "mysql://x"), "expected sqlite:///FILE"),
        (("--history", "sqlite:///data/train.jsonl"), "no SQLite database"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(cli, place, options, told):
    result = cli("serve", "--port", 0, *options)
    assert result.code == 2
    assert told in result.err.splitlines()[-1]


def test_an_empty_token_does_not_open_the_server(cli, place, monkeypatch):
    monkeypatch.setenv("PEFTRANK_TOKEN", "")
    result = cli("serve", "--port", 0)
    assert result.code == 2
    assert "PEFTRANK_TOKEN is set and empty" in result.err


def test_every_setting_can_be_given_on_the_command_line(cli, monkeypatch):
    import dataclasses

    import peftrank.serving
    from peftrank.serving import ServeSettings

    given = {}
    monkeypatch.setattr(peftrank.serving, "serve", lambda **options: given.update(options), False)
    changed = []
    for field in dataclasses.fields(ServeSettings):
        if "token" not in field.name or field.name.endswith("tokens"):
            changed += [f"--{field.name.replace('_', '-')}", int(field.default) + 1]
    more = ("--domains", "news, video", "--history", "none", "--device-megabytes", 1.5)
    assert cli("serve", *changed, *more).code == 0
    for field in dataclasses.fields(ServeSettings):
        value = getattr(given["settings"], field.name)
        assert value == (None if field.default is None else int(field.default) + 1)
    assert (given["domains"], given["history"]) == (["news", "video"], None)
    assert given["device_bytes"] == 1_572_864


@pytest.mark.parametrize(("module", "missing"), [("app", "fastapi"), ("server", "uvicorn")])
def test_a_missing_extra_is_named_with_what_to_install(monkeypatch, module, missing):
    import importlib

    from peftrank.errors import ConfigError

    monkeypatch.delitem(sys.modules, f"peftrank.serving.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs {missing}.*peftrank\[serve\]"):
        importlib.import_module(f"peftrank.serving.{module}")

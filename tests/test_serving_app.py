"""The HTTP API over a real port: every route, every refusal."""

# ruff: noqa: E402 - without the extra the tests are skipped before its modules are imported

import contextlib
import http.client
import json
import logging
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra peftrank[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra peftrank[serve]")

from conftest import _random_llama
from test_ranker import METHODS, close, publish
from test_ranker_many import mixed_slates

from peftrank.base import base_from_model
from peftrank.errors import AdapterError, ConfigError
from peftrank.formats._record import slate_from_record, slate_record
from peftrank.ranker import Ranker
from peftrank.serving import ServeSettings, _openapi, _schemas, create_app
from peftrank.serving.history import HistoryError, open_history

ITEM = {"item_id": "a", "fields": {"title": "amber castle"}}
OTHER = {"item_id": "b", "fields": {"title": "velvet river"}}
SLATE = {"user_id": "ann", "domain": "news", "history": [], "candidates": [ITEM, OTHER]}
MANY = [{**ITEM, "item_id": str(n)} for n in range(10_000)]
ADMIN = {"Authorization": "Bearer boss"}


class Client:
    """Calls a server, one connection a call."""

    def __init__(self, port, service):
        self.port, self.service = port, service

    def __call__(self, method, path, body=None, **headers):
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        value = json.loads(data) if is_json else data.decode()
        return SimpleNamespace(status=answer.status, value=value, headers=answer.headers)

    def rank(self, *slates, **options):
        return self("POST", "/v1/rank", {"slates": list(slates), **options})

    def metric(self, line):
        found = [x for x in self("GET", "/metrics").value.splitlines() if x.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else None


@contextlib.contextmanager
def serving(ranker, *, history=None, domains=None, **settings):
    """A client of the app, which serves in a thread."""
    app = create_app(ranker, ServeSettings(**settings), history=history, domains=domains)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Client(port, app.state.service)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds=5.0):
    """Waits for a condition and returns its last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return value


@pytest.fixture(scope="module")
def stocked(tokenizer, tmp_path_factory):
    """A base, and a store with three domains of three methods; neither is changed."""
    base = base_from_model(_random_llama(tokenizer), tokenizer, name="tiny-decoder")
    folder = tmp_path_factory.mktemp("stocked") / "adapters"
    for domain in METHODS:
        publish(base, folder, domain, seed=len(domain))
    return base, folder


def loaded(base, folder):
    made = Ranker(base, store=folder)
    for domain in METHODS:
        made.load_adapter(domain)
    return made


@pytest.fixture
def ranker(stocked, tmp_path):
    """Three domains, with a store of their own that may be changed."""
    base, folder = stocked
    shutil.copytree(folder, tmp_path / "adapters")
    with loaded(base, tmp_path / "adapters") as made:
        yield made


@pytest.fixture
def history():
    return open_history("sqlite://")


@pytest.fixture
def call(ranker, history):
    """A server of its own."""
    with serving(ranker, history=history, watch_seconds=0, admin_token="boss") as client:
        yield client


@pytest.fixture(scope="module")
def shared(stocked):
    """A server for tests that change nothing."""
    kept = open_history("sqlite://")
    with (
        loaded(*stocked) as made,
        serving(made, history=kept, watch_seconds=0, admin_token="boss") as client,
    ):
        yield client


@pytest.fixture
def held(ranker, monkeypatch):
    """A gate: while it is closed, the server's scoring stands still."""
    score, gate, begun = ranker.score_prepared, threading.Event(), threading.Event()
    batches = []

    def wait(prepared):
        begun.set()
        assert gate.wait(10)
        batches.append([one.slate.slate_id for one in prepared])
        return score(prepared)

    monkeypatch.setattr(ranker, "score_prepared", wait)
    yield SimpleNamespace(gate=gate, begun=begun, batches=batches)
    gate.set()


def in_thread(function, *arguments, **options):
    return ThreadPoolExecutor(1).submit(function, *arguments, **options)


def error(answer):
    assert set(answer.value) == {"error"}, answer.value
    assert set(answer.value["error"]) == {"type", "message"}
    return answer.status, answer.value["error"]["type"]


def message(answer):
    return answer.value["error"]["message"]


# --- ranking ------------------------------------------------------------------------------------


def test_concurrent_requests_of_mixed_domains_get_what_the_ranker_gives(call, ranker, make_slate):
    slates = mixed_slates(make_slate, 24)
    alone = {s.slate_id: ranker.rank(s) for s in slates}
    groups = [slates[i : i + 3] for i in range(0, 24, 3)] * 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda g: call.rank(*map(slate_record, g)), groups))
    for group, answer in zip(groups, answers, strict=True):
        assert answer.status == 200
        for slate, ranking in zip(group, answer.value["rankings"], strict=True):
            expected = alone[slate.slate_id]
            assert ranking["slate_id"] == slate.slate_id
            assert (ranking["domain"], ranking["version"]) == (slate.domain, "0001")
            assert ranking["item_ids"] == list(expected.item_ids)
            assert close(ranking["scores"], expected.scores)
            assert ranking["explanation"] is None
    assert call.metric('peftrank_slates_total{domain="news"}') == 24


def test_one_slate_needs_neither_an_id_nor_a_list(shared):
    answer = shared("POST", "/v1/rank", {"slate": SLATE})
    assert [r["slate_id"] for r in answer.value["rankings"]] == ["0"]
    several = shared.rank(SLATE, {**SLATE, "slate_id": "mine"}, SLATE).value["rankings"]
    assert [r["slate_id"] for r in several] == ["0", "mine", "2"]


def test_the_domain_of_the_request_counts_before_those_of_its_slates(shared):
    (ranking,) = shared.rank(SLATE, domain="video").value["rankings"]
    assert ranking["domain"] == "video"


def test_k_keeps_the_best(shared):
    everything = shared.rank(SLATE).value["rankings"][0]
    best = shared.rank(SLATE, k=1).value["rankings"][0]
    assert best["item_ids"] == everything["item_ids"][:1]
    assert len(best["scores"]) == 1


def test_an_empty_request_has_no_rankings(shared):
    assert shared.rank().value == {"rankings": []}


def test_an_explanation_is_the_rankers(call, ranker, make_slate):
    slates = [make_slate(n_history=n, domain="video", seed=n, labels=False) for n in (3, 0, 2)]
    answer = call.rank(*map(slate_record, slates), explain=True, k=2)
    for slate, ranking in zip(slates, answer.value["rankings"], strict=True):
        expected = ranker.explain(slate)
        told = ranking["explanation"]
        assert told["history"] == [slate.history[i].item_id for i in expected.history]
        assert list(told["effects"]) == ranking["item_ids"]
        for place, item in enumerate(slate.candidates):
            if item.item_id in told["effects"]:
                column = [effect[place] for effect in expected.effects]
                assert close(told["effects"][item.item_id], column)


def test_the_untrained_base_ranks_under_the_domains_prompt(call, ranker, make_slate):
    slate = make_slate(domain="news")
    answer = call.rank(slate_record(slate), adapter="none")
    (ranking,) = answer.value["rankings"]
    (expected,) = ranker.rank_prepared(ranker.prepare([slate], untrained=True))
    assert (ranking["version"], ranking["item_ids"]) == ("none", list(expected.item_ids))
    assert close(ranking["scores"], expected.scores)


def test_an_encoder_cannot_rank_untrained(tiny_encoder, tmp_path):
    publish(tiny_encoder, tmp_path, "news")
    ranker = Ranker(tiny_encoder, store=tmp_path)
    ranker.load_adapter("news")
    with serving(ranker, watch_seconds=0) as call:
        assert call.rank(SLATE).status == 200
        answer = call.rank(SLATE, adapter="none")
        assert error(answer) == (400, "config")
        assert "vocabulary head" in message(answer)


def test_a_request_finishes_with_the_version_it_was_prepared_with(
    ranker, held, tiny_decoder, make_slate
):
    slate = make_slate(domain="news")
    before = ranker.prepare([slate])
    with serving(ranker, watch_seconds=0) as call:
        first = in_thread(call.rank, slate_record(slate))
        assert held.begun.wait(5)
        publish(tiny_decoder, ranker.store, "news", seed=77)
        ranker.load_adapter("news")
        second = in_thread(call.rank, slate_record(slate))
        time.sleep(0.05)
        held.gate.set()
        old, new = (f.result(10).value["rankings"][0] for f in (first, second))
    assert (old["version"], new["version"]) == ("0001", "0002")
    assert close(old["scores"], ranker.rank_prepared(before)[0].scores)
    assert close(new["scores"], ranker.rank(slate).scores)
    assert not close(old["scores"], new["scores"])


# --- histories ----------------------------------------------------------------------------------


def test_a_slate_without_history_gets_the_stored_one(call, ranker, make_slate):
    slate = make_slate(n_history=3, domain="news", user_id="ann")
    record = slate_record(slate)
    events = [
        {"user_id": "ann", "domain": "news", "item": item, "timestamp": n}
        for n, item in enumerate(record["history"])
    ]
    stored = call("POST", "/v1/events", {"events": events})
    assert (stored.status, stored.value) == (200, {"stored": 3, "duplicates": 0})
    for absent in ({**record, "history": None}, {k: record[k] for k in record if k != "history"}):
        (ranking,) = call.rank(absent).value["rankings"]
        assert close(ranking["scores"], ranker.rank(slate).scores)
    (elsewhere,) = call.rank({**record, "history": None}, domain="video").value["rankings"]
    bare = ranker.rank(make_slate(n_history=0, domain="video"))  # same seed: same candidates
    assert len(elsewhere["scores"]) == len(bare.scores)
    (own,) = call.rank({**record, "history": []}, explain=True).value["rankings"]
    assert own["explanation"]["history"] == []
    assert call.metric('peftrank_histories_total{found="yes"}') == 2
    assert call.metric('peftrank_histories_total{found="no"}') == 1


def test_stored_feedback_is_used_where_every_event_has_some(ranker, history, monkeypatch):
    seen = []
    prepare = ranker.prepare
    monkeypatch.setattr(ranker, "prepare", lambda s, **o: seen.extend(s) or prepare(s, **o))
    ask = {k: v for k, v in SLATE.items() if k != "history"}
    event = {"user_id": "ann", "domain": "news", "item": ITEM}
    with serving(ranker, history=history, watch_seconds=0) as call:
        for feedback in (4, None):
            assert call("POST", "/v1/events", {"events": [{**event, "feedback": feedback}]})
            assert call.rank(ask).status == 200
    assert [s.history_feedback for s in seen] == [(4.0,), None]
    assert [len(s.history) for s in seen] == [1, 2]


def test_an_event_that_is_sent_again_is_stored_once(call):
    event = {"user_id": "ann", "domain": "news", "item": ITEM, "event_id": "e1"}
    assert call("POST", "/v1/events", {"events": [event]}).value == {"stored": 1, "duplicates": 0}
    again = call("POST", "/v1/events", {"events": [event, {**event, "event_id": "e2"}]})
    assert again.value == {"stored": 1, "duplicates": 1}


def test_a_forgotten_user_has_no_history(call):
    event = {"user_id": "ann/x y", "domain": "news", "item": ITEM}
    call("POST", "/v1/events", {"events": [event]})
    assert error(call("DELETE", "/v1/users/ann%2Fx%20y")) == (401, "auth")
    answer = call("DELETE", "/v1/users/ann%2Fx%20y", **ADMIN)
    assert (answer.status, answer.value) == (200, {"deleted": 1})
    assert call("DELETE", "/v1/users/ann%2Fx%20y", **ADMIN).value == {"deleted": 0}


def test_events_of_a_domain_that_is_nowhere_are_refused(shared):
    event = {"user_id": "ann", "domain": "newz", "item": ITEM}
    answer = shared("POST", "/v1/events", {"events": [event]})
    assert error(answer) == (400, "config")
    assert "did you mean 'news'" in message(answer)


def test_a_server_without_histories_says_so(ranker):
    with serving(ranker, watch_seconds=0) as call:
        event = {"user_id": "ann", "domain": "news", "item": ITEM}
        assert error(call("POST", "/v1/events", {"events": [event]})) == (400, "config")
        ask = {k: v for k, v in SLATE.items() if k != "history"}
        assert call.rank(ask).status == 200


class Lost:
    """A history that cannot be reached; its message holds what callers need not know."""

    def fails(self, *_):
        raise HistoryError("redis://secret-host:6379/0: Redis does not answer")

    append = recent = forget = ping = fails

    def close(self):
        pass


def test_a_lost_history_fails_what_needs_it_and_nothing_else(ranker):
    with serving(ranker, history=Lost(), watch_seconds=0, admin_token="boss") as call:
        event = {"user_id": "ann", "domain": "news", "item": ITEM}
        ask = {k: v for k, v in SLATE.items() if k != "history"}
        for answer in (
            call("POST", "/v1/events", {"events": [event]}),
            call.rank(ask),
            call("DELETE", "/v1/users/ann", **ADMIN),
        ):
            assert error(answer) == (503, "internal")
            assert answer.headers["Retry-After"] == "1"
            assert "secret-host" not in message(answer)
        assert call.rank(SLATE).status == 200


# --- adapters -----------------------------------------------------------------------------------


def test_adapters_are_listed_with_what_the_store_has(call, ranker, tiny_decoder):
    publish(tiny_decoder, ranker.store, "news", seed=5)
    ranker.unload_adapter("social")
    listed = call("GET", "/v1/adapters").value
    assert listed["base"]["name"] == "tiny-decoder"
    assert "tokenizer_hash" not in listed["base"]
    news, social, video = listed["adapters"]
    assert (news["domain"], news["method"], news["version"]) == ("news", "lora", "0001")
    assert (news["active"], news["versions"], news["stale"]) == ("0002", ["0001", "0002"], False)
    assert (social["version"], social["active"]) == (None, "0001")
    assert video["tier"] == "device"


def test_an_admin_loads_unloads_and_activates(call, ranker, tiny_decoder):
    publish(tiny_decoder, ranker.store, "news", seed=5)

    def change(what, **body):
        answer = call("POST", f"/v1/adapters/news/{what}", body, **ADMIN)
        assert answer.status == 200, answer.value
        return answer.value["version"], answer.value["active"]

    assert change("load") == ("0002", "0002")
    assert change("load", version="0001") == ("0001", "0002")
    assert change("activate", version="0001") == ("0001", "0001")
    assert change("unload") == (None, "0001")
    assert error(call.rank(SLATE)) == (400, "config")
    assert error(call("POST", "/v1/adapters/news/unload", b"", **ADMIN)) == (400, "config")
    assert call("POST", "/v1/adapters/news/load", b"", **ADMIN).value["version"] == "0001"
    assert call.rank(SLATE).status == 200


@pytest.mark.parametrize("what", ["load", "activate"])
def test_a_version_that_does_not_exist_changes_nothing(shared, what):
    answer = shared("POST", f"/v1/adapters/news/{what}", {"version": "0009"}, **ADMIN)
    assert error(answer) == (400, "adapter")
    assert "Versions: 0001" in message(answer)
    assert shared.rank(SLATE).value["rankings"][0]["version"] == "0001"


def test_activating_needs_a_version(shared):
    assert error(shared("POST", "/v1/adapters/news/activate", {}, **ADMIN)) == (400, "data")


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2f..%2fetc", "News", "a%00b", "%2Fetc", "x" * 65]
)
@pytest.mark.parametrize("what", ["load", "unload", "activate"])
def test_a_domain_name_cannot_leave_the_store(shared, name, what):
    version = {"version": "../../etc"}
    before = shared("GET", "/v1/adapters").value
    answer = shared("POST", f"/v1/adapters/{name}/{what}", version, **ADMIN)
    assert answer.status in (400, 404)
    assert error(answer)[1] == "data"
    if what != "unload":
        answer = shared("POST", f"/v1/adapters/news/{what}", version, **ADMIN)
        assert error(answer) == (400, "adapter")
    assert shared("GET", "/v1/adapters").value == before
    body = {"events": [{"user_id": "u", "domain": "../news", "item": ITEM}]}
    assert error(shared("POST", "/v1/events", body)) == (400, "config")
    assert error(shared.rank(SLATE, domain="../news")) == (400, "config")


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd"]
)
def test_the_page_shows_no_other_file(shared, path):
    assert error(shared("GET", path)) == (404, "data")


def test_the_page_and_its_files_come_with_a_strict_policy(shared):
    for path, kind in (("/", "text/html"), ("/page/page.js", "javascript"), ("/docs", "text/html")):
        answer = shared("GET", path)
        assert answer.status == 200
        assert kind in answer.headers["Content-Type"]
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    docs = shared("GET", "/docs").value
    assert "POST /v1/rank" in docs
    assert "<script" not in docs
    assert "http://" not in docs
    assert "https://" not in docs


def test_samples_are_slates_that_can_be_ranked(shared):
    slates = shared("GET", "/v1/samples/news?n=3").value["slates"]
    assert len(slates) == 3
    assert shared.rank(*slates, domain="news").status == 200
    assert len(shared("GET", "/v1/samples/news").value["slates"]) == 10
    assert error(shared("GET", "/v1/samples/none")) == (404, "data")
    for n in ("0", "101", "x"):
        assert error(shared("GET", f"/v1/samples/news?n={n}")) == (400, "data")


# --- what is refused ----------------------------------------------------------------------------


def rank_body(**changes):
    return json.dumps({"slates": [{**SLATE, **changes}]}).encode()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8: byte 0"),
        (rank_body().replace(b"amber", b"\xc3\x28"), "not UTF-8"),
        (rank_body().replace(b"amber", b'\\ud800"'[:6]), "lone surrogate"),
        (b'{"slates": [NaN]}', "NaN is no number"),
        (rank_body(timestamp=0).replace(b": 0}", b": Infinity}"), "Infinity is no number"),
        (rank_body(timestamp=0).replace(b": 0}", b": 1e999}"), "timestamp is inf"),
        (rank_body(timestamp=0).replace(b": 0}", b": " + b"9" * 5000 + b"}"), "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must be a JSON object"),
        (b'{"slates": [], "slates": []}', "'slates' occurs twice"),
        (b"{}", "needs slates"),
        (b'{"slates": [], "slate": {}}', "needs slates"),
        (b'{"slates": {}}', "must be an array"),
        (b'{"slates": [7]}', r"slates[0] must be an object"),
        (b'{"slate": 7}', r"slates[0] must be an object"),
        (b'{"slates": [], "domian": 1}', "did you mean 'domain'"),
        (b'{"slates": [], "k": 0}', "k must be"),
        (b'{"slates": [], "k": true}', "k must be"),
        (b'{"slates": [], "k": 1.5}', "k must be"),
        (b'{"slates": [], "explain": 1}', "explain must be true or false"),
        (b'{"slates": [], "domain": 1}', "domain must be a text"),
        (b'{"slates": [], "adapter": "news"}', 'adapter must be "none"'),
        (rank_body(candidates=[]), "slate '0': candidates is empty"),
        (rank_body(candidates=[ITEM, ITEM]), "slate '0': candidate 'a' occurs twice"),
        (rank_body(candidates=["a"]), "slate '0': item 'a' has no fields"),
        (rank_body(candidates=[{"item_id": "a"}]), "send its text"),
        (rank_body(candidates=[{"item_id": "a", "fields": {"title": 3}}]), "must be a text"),
        (rank_body(candidates=[{"item_id": "a", "fields": {"name": "x"}}]), "slate '0': candidate"),
        (rank_body(slate_id="mine", history="x"), "slate 'mine': history must be an array"),
        (rank_body(slate_id=3), "slate_id must be a text"),
        (rank_body(history=None, history_feedback=[1]), "history_feedback needs the history"),
        (rank_body(history_feedback=[1]), "slate '0': history_feedback has 1 numbers for 0"),
        (rank_body(history=None, user_id=None), "slate '0': give a history, or the user_id"),
        (rank_body(colour="red"), "slate '0': unknown key 'colour'"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_told_what_is_wrong(shared, body, told):
    answer = shared("POST", "/v1/rank", body)
    assert error(answer) == (400, "data")
    assert told in message(answer)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({}, "events[0]: key 'user_id' is missing"),
        ({"user_id": "", "domain": "news", "item": ITEM}, "events[0]: user_id must be a text"),
        (
            {"user_id": "u", "domain": "news", "item": {"item_id": "a"}},
            "events[0]: item 'a' has no",
        ),
        ({"user_id": "u", "domain": "news", "item": ITEM, "feedback": "5"}, "feedback must be"),
        ({"user_id": "u", "domain": "news", "item": ITEM, "timestamp": True}, "timestamp must be"),
        ({"user_id": "u", "domain": "news", "item": ITEM, "timestamp": 10**400}, "timestamp must"),
        ({"user_id": "u", "domain": "news", "item": ITEM, "when": 1}, "unknown key 'when'"),
        ([], "events[0]: an event must be an object"),
    ],
)
def test_a_malformed_event_is_named_by_its_place(shared, event, told):
    answer = shared("POST", "/v1/events", {"events": [event]})
    assert error(answer) == (400, "data")
    assert told in message(answer)


def test_one_bad_slate_refuses_the_request_and_is_named(shared):
    answer = shared.rank(
        {**SLATE, "slate_id": "good"}, {**SLATE, "slate_id": "lost", "domain": "nuws"}
    )
    assert error(answer) == (400, "config")
    assert "slate 'lost'" in message(answer)
    assert "did you mean 'news'" in message(answer)
    no_domain = {k: v for k, v in SLATE.items() if k != "domain"}
    assert "slate '0'" in message(shared.rank(no_domain))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"slates": [SLATE] * 5}, "5 slates; this server takes 4"),
        ({"slates": [{**SLATE, "candidates": MANY}]}, "slate '0' has 10000 candidates; this"),
        ({"slates": [{**SLATE, "history": [ITEM] * 8}]}, "has 8 history; this server takes at m"),
    ],
    ids=["slates", "candidates", "history"],
)  # fmt: skip
def test_a_request_beyond_a_limit_is_told_the_limit(ranker, body, told):
    with serving(ranker, watch_seconds=0, max_slates=4, max_history=7) as call:
        answer = call("POST", "/v1/rank", body)
        assert error(answer) == (400, "limit")
        assert told in message(answer)


def test_too_many_events_are_told_the_limit(ranker, history):
    event = {"user_id": "ann", "domain": "news", "item": ITEM}
    with serving(ranker, history=history, watch_seconds=0, max_events=2) as call:
        assert error(call("POST", "/v1/events", {"events": [event] * 3})) == (400, "limit")
        assert history.recent("ann", "news", 9) == []


def test_a_slate_longer_than_a_pass_is_ranked_whole(shared):
    titles = [{"item_id": str(n), "fields": {"title": "amber " * 30}} for n in range(200)]
    answer = shared.rank({**SLATE, "candidates": titles})
    assert answer.status == 200
    (ranking,) = answer.value["rankings"]
    assert sorted(ranking["item_ids"]) == sorted(str(n) for n in range(200))


def test_a_request_that_no_queue_could_hold_is_too_large(ranker):
    with serving(ranker, watch_seconds=0, queue_tokens=50) as call:
        assert error(call.rank(*[SLATE] * 20)) == (413, "limit")
        small = {**SLATE, "history": [ITEM, OTHER] * 2, "candidates": [ITEM]}
        assert call.rank(small).status == 200
        assert error(call.rank(small, explain=True)) == (413, "limit")  # five times the slate


def test_an_explanation_that_no_queue_could_hold_is_refused_before_it_is_made(ranker, monkeypatch):
    made, variants = [], ranker.variants
    monkeypatch.setattr(ranker, "variants", lambda one: made.append(one) or variants(one))
    slate = {**SLATE, "history": [ITEM, OTHER] * 4}
    (prepared,) = ranker.prepare([slate_from_record({"slate_id": "0", **slate}, None)])
    needed = sum(one.tokens for one in variants(prepared))
    with serving(ranker, watch_seconds=0, queue_tokens=needed) as call:
        assert call.rank(slate, explain=True).status == 200
        assert len(made) == 1
        assert error(call.rank(slate, slate, explain=True)) == (413, "limit")
        assert len(made) == 1


def test_a_body_of_ten_megabytes_is_refused_and_the_connection_goes_on(shared):
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=20)
    for chunked in (False, True):
        body = b'{"slates": ["' + b"x" * 10_000_000 + b'"]}'
        if chunked:  # no Content-Length to be refused by
            pieces = (body[n : n + 65_536] for n in range(0, len(body), 65_536))
            connection.request("POST", "/v1/rank", pieces, encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        else:
            connection.request("POST", "/v1/rank", body)
        answer = connection.getresponse()
        value = json.loads(answer.read())
        assert (answer.status, value["error"]["type"]) == (413, "limit")
    connection.request("POST", "/v1/rank", json.dumps({"slate": SLATE}))
    assert connection.getresponse().status == 200
    connection.close()


def test_what_is_not_there_is_answered_in_json(shared):
    assert error(shared("GET", "/v1/nothing")) == (404, "data")
    assert error(shared("GET", "/v1/rank")) == (405, "data")
    assert shared("GET", "/v1/rank").headers["Allow"] == "POST"


def test_a_fault_of_the_server_is_answered_without_its_text(call, ranker, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("amber castle of ann")

    monkeypatch.setattr(ranker, "prepare", fail)
    with caplog.at_level(logging.DEBUG, logger="peftrank.serving"):
        answer = call.rank(SLATE)
    assert error(answer) == (500, "internal")
    assert "amber" not in str(answer.value)
    (fault,) = [r.fields for r in caplog.records if r.getMessage() == "request_failed"]
    assert fault["exception"] == "RuntimeError"
    assert "fail" in fault["where"][-1]
    assert "amber" not in caplog.text + str(fault)


def test_scores_that_are_not_finite_fail_that_request_alone(call, ranker, monkeypatch):
    score = ranker.score_prepared

    def poisoned(prepared):
        if any(one.domain == "video" for one in prepared):
            raise AdapterError("domain 'video' gave NaN")
        return score(prepared)

    monkeypatch.setattr(call.service._parts.batcher, "_score_prepared", poisoned)
    with ThreadPoolExecutor(8) as pool:
        domains = ["news", "video", "social"] * 5
        answers = list(pool.map(lambda d: call.rank(SLATE, domain=d), domains))
    for domain, answer in zip(domains, answers, strict=True):
        if domain == "video":
            assert error(answer) == (500, "adapter")
        else:
            assert answer.status == 200
    assert call("GET", "/healthz").status == 200


# --- who may ------------------------------------------------------------------------------------


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_a_token_is_needed_where_the_server_has_one(ranker):
    with serving(ranker, watch_seconds=0, token="user", admin_token="boss") as call:
        body = json.dumps({"slate": SLATE}).encode()
        for headers in ({}, bearer("wrong"), bearer(""), bearer("usér"), {"Authorization": "user"}):
            headers = {k: v.encode() for k, v in headers.items()}
            answer = call("POST", "/v1/rank", body, **headers)
            assert error(answer) == (401, "auth")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for token in ("user", "boss"):
            assert call("POST", "/v1/rank", body, **bearer(token)).status == 200
        for path in (
            "/",
            "/page/page.js",
            "/healthz",
            "/readyz",
            "/metrics",
            "/openapi.json",
            "/docs",
        ):
            assert call("GET", path).status == 200
        for path in ("/v1/adapters", "/v1/samples/news"):
            assert error(call("GET", path)) == (401, "auth")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters/news/load"),
        ("POST", "/v1/adapters/news/unload"),
        ("POST", "/v1/adapters/news/activate"),
        ("DELETE", "/v1/users/ann"),
    ],
)
def test_only_an_admin_changes_things(ranker, history, method, path):
    with serving(
        ranker, history=history, watch_seconds=0, token="user", admin_token="boss"
    ) as call:
        assert error(call(method, path, b"")) == (401, "auth")
        assert error(call(method, path, b"", **bearer("wrong"))) == (401, "auth")
        assert error(call(method, path, b"", **bearer("user"))) == (403, "auth")
    with serving(ranker, history=history, watch_seconds=0, token="user") as call:
        assert error(call(method, path, b"", **bearer("user"))) == (403, "auth")
    assert ranker.domains == tuple(METHODS)


def test_tokens_come_from_the_environment_and_are_never_shown():
    names = {"PEFTRANK_TOKEN": "s3cret", "PEFTRANK_ADMIN_TOKEN": "b0ss"}
    settings = ServeSettings(max_slates=3).with_tokens(names)
    assert (settings.token, settings.admin_token, settings.max_slates) == ("s3cret", "b0ss", 3)
    assert "s3cret" not in repr(settings)
    assert "b0ss" not in repr(settings)
    assert ServeSettings().with_tokens({}).token is None
    for empty in ("", " "):
        with pytest.raises(ConfigError, match="PEFTRANK_TOKEN is set and empty"):
            ServeSettings().with_tokens({"PEFTRANK_TOKEN": empty})


@pytest.mark.parametrize(
    "wrong", [{"batch_tokens": 0}, {"timeout_seconds": float("nan")}, {"max_wait_ms": -1}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServeSettings(**wrong)


# --- under load ---------------------------------------------------------------------------------


def test_a_full_queue_answers_429_and_when_to_come_back(ranker, held):
    size = ranker.prepare([_schemas.rank_call(rank_body(), ServeSettings()).slates[0]])[0].tokens
    with serving(ranker, watch_seconds=0, queue_tokens=2 * size, max_wait_ms=0) as call:
        first = in_thread(call.rank, SLATE)
        assert held.begun.wait(5)
        waiting = [in_thread(call.rank, SLATE) for _ in range(2)]
        assert until(lambda: call.metric("peftrank_queue_slates") == 2)
        answer = call.rank(SLATE)
        assert error(answer) == (429, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        held.gate.set()
        assert [f.result(10).status for f in (first, *waiting)] == [200, 200, 200]
        assert call.metric('peftrank_errors_total{type="overloaded"}') == 1


def test_more_requests_than_may_be_under_way_are_answered_429(ranker, held):
    with serving(ranker, watch_seconds=0, max_requests=1) as call:
        first = in_thread(call.rank, SLATE)
        assert held.begun.wait(5)
        assert error(call.rank(SLATE)) == (429, "overloaded")
        for path in ("/healthz", "/readyz"):  # a busy server is not to lose its place
            assert call("GET", path).status == 200
        held.gate.set()
        assert first.result(10).status == 200


def test_a_request_that_takes_too_long_is_given_up_and_leaves_the_queue(ranker, held):
    with serving(ranker, watch_seconds=0, timeout_seconds=0.3, max_wait_ms=0) as call:
        first = in_thread(call.rank, {**SLATE, "slate_id": "first"})
        assert held.begun.wait(5)
        assert error(call.rank({**SLATE, "slate_id": "second"})) == (504, "timeout")
        assert error(first.result(10)) == (504, "timeout")
        assert call.metric("peftrank_queue_slates") == 0
        held.gate.set()
        assert call.rank({**SLATE, "slate_id": "third"}).status == 200
    assert held.batches == [["first"], ["third"]]


def test_an_answer_that_a_client_does_not_take_in_time_is_not_answered_again(ranker):
    import asyncio

    from peftrank.serving.app import _Edge
    from peftrank.serving.service import Service

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(5)  # as while a full buffer is waited for

    service = Service(ranker, ServeSettings(timeout_seconds=0.05), None, None)
    sent = []

    async def send(message):
        sent.append(message["type"])

    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(_Edge(app, service)(scope, None, send))
    assert sent == ["http.response.start"]
    assert not service.under_way


def send_and_leave(port, body, part=None):
    """Sends a request, or a part of it, and closes the connection without reading."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:part])
        time.sleep(0.1)


def test_what_a_client_left_behind_is_not_scored(ranker, held):
    with serving(ranker, watch_seconds=0, max_wait_ms=0) as call:
        first = in_thread(call.rank, {**SLATE, "slate_id": "first"})
        assert held.begun.wait(5)
        send_and_leave(call.port, rank_body(slate_id="left"))
        send_and_leave(call.port, rank_body(slate_id="half"), part=40)
        gone = 'peftrank_request_seconds_count{route="/v1/rank",status="499"}'
        assert until(lambda: call.metric(gone) == 2)
        assert call.metric("peftrank_queue_slates") == 0
        held.gate.set()
        assert first.result(10).status == 200
        assert call.rank({**SLATE, "slate_id": "next"}).status == 200
    assert held.batches == [["first"], ["next"]]


def test_events_are_kept_although_their_client_left(call, history):
    body = json.dumps({"events": [{"user_id": "ann", "domain": "news", "item": ITEM}]}).encode()
    with socket.create_connection(("127.0.0.1", call.port)) as connection:
        head = f"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
    assert until(lambda: len(history.recent("ann", "news", 9)) == 1)


def test_a_stopping_server_refuses_new_work_and_finishes_the_old(ranker, held):
    with serving(ranker, watch_seconds=0) as call:
        first = in_thread(call.rank, SLATE)
        assert held.begun.wait(5)
        call.service.drain()
        for answer in (call.rank(SLATE), call("GET", "/readyz")):
            assert error(answer) == (503, "overloaded")
        assert call("GET", "/healthz").status == 200
        held.gate.set()
        assert first.result(10).status == 200


def test_a_server_that_loads_says_so_until_it_is_ready(ranker):
    go = threading.Event()

    def make():
        assert go.wait(10)
        return ranker

    with serving(make, domains=["news"]) as call:
        for answer in (call("GET", "/readyz"), call.rank(SLATE), call("GET", "/v1/adapters")):
            assert error(answer) == (503, "overloaded")
            assert "loading" in message(answer)
        assert call("GET", "/healthz").status == 200
        assert call.metric("peftrank_ready") == 0
        go.set()
        assert until(lambda: call("GET", "/readyz").status == 200)
        assert call.rank(SLATE).status == 200
        assert call.metric("peftrank_ready") == 1


def test_a_server_that_cannot_start_stays_unready_and_says_why_in_its_log(ranker):
    with serving(lambda: ranker, domains=["nuws"]) as call:
        assert until(lambda: call.service.failure is not None)
        assert "nuws" in str(call.service.failure)
        assert error(call("GET", "/readyz")) == (503, "overloaded")


# --- what is seen of it -------------------------------------------------------------------------


def test_logs_and_metrics_hold_no_text_and_no_ids(call, caplog):
    secret = {"item_id": "item-77", "fields": {"title": "amber scandal"}}
    slate = {**SLATE, "user_id": "user-77", "slate_id": "slate-77", "candidates": [secret, OTHER]}
    event = {"user_id": "user-77", "domain": "news", "item": secret}
    with caplog.at_level(logging.DEBUG):
        assert call.rank(slate).status == 200
        assert call.rank({**slate, "candidates": [secret, secret]}).status == 400
        assert call.rank(slate, domain="domain-77").status == 400
        assert call("POST", "/v1/events", {"events": [event]}).status == 200
        assert call("DELETE", "/v1/users/user-77", **ADMIN).status == 200
        assert call("GET", "/v1/path-77").status == 404
    ours = [r for r in caplog.records if r.name.startswith("peftrank")]
    seen = call("GET", "/metrics").value + "".join(str(vars(record)) for record in ours)
    for text in ("amber", "item-77", "user-77", "slate-77", "domain-77", "path-77", "boss"):
        assert text not in seen
    requests = [r.fields for r in ours if r.getMessage() == "request"]
    assert {"method", "route", "status", "ms"} <= set(requests[0])
    assert "/v1/users/{user_id:path}" in {r["route"] for r in requests}


def test_log_lines_are_json_with_where_a_fault_was_and_not_its_message():
    from peftrank.serving.logs import JsonLines

    record = logging.LogRecord("x", logging.INFO, "f.py", 1, "request", (), None)
    record.fields = {"route": "/v1/rank", "status": 200}
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["level"], line["route"]) == ("request", "info", "/v1/rank")
    try:
        raise KeyError("amber")
    except KeyError as fault:
        record.exc_info = (KeyError, fault, fault.__traceback__)
    text = JsonLines().format(record)
    assert json.loads(text)["exception"] == "KeyError"
    assert "amber" not in text


def test_openapi_describes_every_route_and_its_examples_work(shared):
    described = shared("GET", "/openapi.json").value
    assert set(described["paths"]) == {
        "/v1/rank", "/v1/events", "/v1/users/{user_id}", "/v1/adapters", "/v1/samples/{domain}",
        "/v1/adapters/{domain}/load", "/v1/adapters/{domain}/unload",
        "/v1/adapters/{domain}/activate", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    assert "422" not in json.dumps(described["paths"])
    names = set(described["components"]["schemas"])
    used = set(part.split('"')[0] for part in json.dumps(described).split("/schemas/")[1:])
    assert used <= names
    for path, operations in described["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content")
        for example in (content or {}).get("application/json", {}).get("examples", {}).values():
            if path in ("/v1/rank", "/v1/events"):
                assert shared("POST", path, example["value"]).status == 200


def test_answers_have_the_shape_that_openapi_says(shared):
    _openapi.RankResponse.model_validate(shared.rank(SLATE, explain=True).value)
    _openapi.Adapters.model_validate(shared("GET", "/v1/adapters").value)
    _openapi.Samples.model_validate(shared("GET", "/v1/samples/video").value)
    _openapi.Error.model_validate(shared("GET", "/nothing").value)
    event = {"user_id": "ann", "domain": "news", "item": ITEM}
    answer = shared("POST", "/v1/events", {"events": [event]})
    _openapi.EventsResponse.model_validate(answer.value)


def test_metrics_tell_requests_batches_adapters_and_memory(call):
    assert call.rank(SLATE, SLATE).status == 200
    assert call.metric('peftrank_request_seconds_count{route="/v1/rank",status="200"}') == 1
    assert call.metric("peftrank_batch_slates_sum") == 2
    assert call.metric("peftrank_batch_occupancy_count") == 1
    assert call.metric("peftrank_tokens_total") > 10
    assert call.metric("peftrank_adapters_loaded") == 3
    assert call.metric("peftrank_adapter_device_bytes") > 0
    assert call.metric("peftrank_base_bytes") > 0
    assert call.metric('peftrank_adapter_reads_total{tier="device"}') == 1

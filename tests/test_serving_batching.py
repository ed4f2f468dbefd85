"""The queue of the server: what is scored together, what is refused, and who fails."""

import random
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrank.errors import AdapterError
from peftrank.serving.batching import Batcher, OverloadedError, StoppedError, TooLargeError


def slates(*sizes, name="s"):
    return [SimpleNamespace(tokens=size, name=f"{name}{place}") for place, size in enumerate(sizes)]


class Scorer:
    """Scores a slate by its tokens, notes each batch, and waits while `gate` is closed."""

    def __init__(self, *, bad=(), seconds=0.0):
        self.batches, self.bad, self.seconds = [], bad, seconds
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, prepared):
        self.batches.append([one.name for one in prepared])
        self.begun.set()
        assert self.gate.wait(10)
        time.sleep(self.seconds)
        if any(one.name in self.bad for one in prepared):
            raise AdapterError("NaN")
        return [(float(one.tokens),) for one in prepared]


@pytest.fixture
def start():
    """Returns a maker of batchers, which are closed at the end."""
    made = []

    def make(score, **options):
        options = {"batch_tokens": 100, "queue_tokens": 1000, "max_wait_seconds": 0, **options}
        made.append(Batcher(score, **options))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close(5)
        assert not batcher.alive


def held(start, score, **options):
    """A batcher whose thread is busy with a slate until `score.gate` is set."""
    score.gate.clear()
    batcher = start(score, **options)
    first = batcher.submit(slates(1, name="busy"))
    assert score.begun.wait(5)
    return batcher, first


def test_each_request_gets_its_own_scores_in_its_own_order(start):
    batcher = start(Scorer())
    tickets = [batcher.submit(slates(3, 7, 5)), batcher.submit(slates(2))]
    assert [t.future.result(5) for t in tickets] == [[(3.0,), (7.0,), (5.0,)], [(2.0,)]]


def test_a_request_without_slates_is_done_at_once(start):
    assert start(Scorer()).submit([]).future.result(0) == []


def test_what_waits_is_scored_together_up_to_the_budget(start):
    score = Scorer()
    batcher, _ = held(start, score)
    tickets = [batcher.submit(slates(40, name=n)) for n in "abcd"]
    score.gate.set()
    for ticket in tickets:
        ticket.future.result(5)
    assert score.batches == [["busy0"], ["a0", "b0"], ["c0", "d0"]]


def test_a_slow_machine_takes_less_at_a_time(start):
    score = Scorer(seconds=0.1)
    batcher = start(score, batch_seconds=0.2)
    for _ in range(2):
        batcher.submit(slates(10)).future.result(5)  # 100 tokens a second, so 20 in time
    tickets = [batcher.submit(slates(9, name=n)) for n in "abcdef"]
    for ticket in tickets:
        ticket.future.result(5)
    assert max(len(names) for names in score.batches) <= 3
    assert len(score.batches) > 2


def test_a_slate_beyond_the_budget_is_scored_alone(start):
    score = Scorer()
    batcher, _ = held(start, score)
    ticket = batcher.submit(slates(10, 500, 10))
    score.gate.set()
    ticket.future.result(5)
    assert score.batches[1:] == [["s0"], ["s1"], ["s2"]]


def test_an_idle_server_waits_for_company_and_no_longer_than_it_may(start):
    score = Scorer()
    batcher = start(score, max_wait_seconds=0.3)
    started = time.monotonic()
    first = batcher.submit(slates(10, name="a"))
    second = batcher.submit(slates(10, name="b"))
    first.future.result(5), second.future.result(5)
    assert time.monotonic() - started >= 0.29
    assert score.batches == [["a0", "b0"]]
    started = time.monotonic()
    batcher.submit(slates(100)).future.result(5)  # a full budget waits for nobody
    assert time.monotonic() - started < 0.2


def test_a_full_queue_says_when_to_come_back(start):
    score = Scorer(seconds=0.05)
    batcher = start(score)
    for _ in range(2):
        batcher.submit(slates(100)).future.result(5)  # so 2000 tokens a second are known
    score.gate.clear()
    score.begun.clear()
    batcher.submit(slates(100, name="busy"))
    assert score.begun.wait(5)
    for _ in range(10):
        batcher.submit(slates(100))
    assert batcher.queued_tokens == 1000
    with pytest.raises(OverloadedError, match="1000 of 1000 tokens wait") as caught:
        batcher.submit(slates(1))
    with pytest.raises(OverloadedError):
        batcher.check_room()
    assert 1 <= caught.value.retry_after_seconds <= 2
    score.gate.set()


def test_work_that_would_come_too_late_is_refused_but_never_by_an_empty_queue(start):
    score = Scorer(seconds=0.05)
    batcher = start(score, longest_seconds=0.1)
    for _ in range(2):
        batcher.submit(slates(10)).future.result(5)  # 200 tokens a second, so 20 in time
    score.gate.clear()
    score.begun.clear()
    batcher.submit(slates(50, name="busy"))  # late, but it tells the rate
    assert score.begun.wait(5)
    batcher.submit(slates(19))
    with pytest.raises(OverloadedError, match="before the request's time is over"):
        batcher.submit(slates(19))
    score.gate.set()


def test_a_round_that_was_slow_for_once_refuses_nobody(start):
    score = Scorer(seconds=0.3)
    batcher = start(score, longest_seconds=0.5)
    batcher.submit(slates(10)).future.result(5)  # the first: its code is made
    score.seconds = 0.001
    tickets = [batcher.submit(slates(10)) for _ in range(20)]
    for ticket in tickets:
        ticket.future.result(5)
    score.seconds = 0.3
    batcher.submit(slates(10)).future.result(5)
    score.seconds = 0.001
    for ticket in [batcher.submit(slates(10)) for _ in range(20)]:
        ticket.future.result(5)


def test_a_request_larger_than_the_queue_is_told_so(start):
    with pytest.raises(TooLargeError, match="1001 tokens or more and the queue holds 1000"):
        start(Scorer()).submit(slates(1000, 1))


def test_only_requests_whose_slates_fail_fail(start):
    score = Scorer(bad=("bad0", "worse1"))
    batcher, _ = held(start, score)
    good = [batcher.submit(slates(5, 5, name=f"good{n}-")) for n in range(5)]
    bad = [batcher.submit(slates(5, name="bad")), batcher.submit(slates(5, 5, name="worse"))]
    score.gate.set()
    for ticket in good:
        assert ticket.future.result(5) == [(5.0,), (5.0,)]
    for ticket in bad:
        with pytest.raises(AdapterError, match="NaN"):
            ticket.future.result(5)
    assert batcher.alive
    assert batcher.submit(slates(4)).future.result(5) == [(4.0,)]


def test_an_unexpected_error_ends_neither_the_thread_nor_other_requests(start):
    def score(prepared):
        if any(one.tokens == 13 for one in prepared):
            raise MemoryError
        return [(1.0,) for _ in prepared]

    batcher = start(score)
    with pytest.raises(MemoryError):
        batcher.submit(slates(13)).future.result(5)
    assert batcher.submit(slates(4)).future.result(5) == [(1.0,)]


def test_a_scorer_that_returns_too_little_is_an_error_and_not_a_hang(start):
    batcher = start(lambda prepared: [])
    with pytest.raises(ValueError, match="shorter"):
        batcher.submit(slates(4)).future.result(5)


def test_a_dropped_request_leaves_the_queue_at_once(start):
    score = Scorer()
    batcher, _ = held(start, score)
    gone, stays = batcher.submit(slates(30, 30, name="gone")), batcher.submit(slates(20))
    batcher.drop(gone)
    assert (batcher.queued_tokens, batcher.queued_slates) == (20, 1)
    score.gate.set()
    assert stays.future.result(5) == [(20.0,)]
    assert score.batches == [["busy0"], ["s0"]]
    with pytest.raises(CancelledError):
        gone.future.result(0)


def test_dropping_a_request_that_is_being_scored_or_done_disturbs_nobody(start):
    score = Scorer()
    batcher, busy = held(start, score)
    batcher.drop(busy)
    score.gate.set()
    done = batcher.submit(slates(5))
    assert done.future.result(5) == [(5.0,)]
    batcher.drop(done)
    assert done.future.result(0) == [(5.0,)]


def test_a_request_dropped_while_the_server_waits_for_company_ends_the_wait(start):
    score = Scorer()
    batcher = start(score, max_wait_seconds=0.05)
    batcher.drop(batcher.submit(slates(5)))
    assert batcher.submit(slates(6)).future.result(5) == [(6.0,)]


def test_closing_finishes_what_is_scored_and_fails_what_waits(start):
    score = Scorer()
    batcher, busy = held(start, score)
    waiting = batcher.submit(slates(5))
    threading.Timer(0.05, score.gate.set).start()
    batcher.close(5)
    assert busy.future.result(0) == [(1.0,)]
    with pytest.raises(StoppedError):
        waiting.future.result(0)
    with pytest.raises(StoppedError):
        batcher.submit(slates(5))


def test_every_round_is_told_of_with_its_occupancy(start):
    rounds = []
    batcher = start(Scorer(), observe=rounds.append)
    batcher.submit(slates(50)).future.result(5)
    batcher.close(5)
    assert [(r.slates, r.tokens, r.occupancy, r.failures) for r in rounds] == [(1, 50, 0.5, 0)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 120), max_size=4), max_size=30),
    st.integers(0, 2**16),
)
def test_whatever_comes_and_goes_the_count_of_tokens_returns_to_zero(requests, seed):
    chance = random.Random(seed)
    batcher = Batcher(
        lambda prepared: [(one.tokens,) for one in prepared],
        batch_tokens=100,
        queue_tokens=10**6,
        max_wait_seconds=0.0005,
    )
    try:
        tickets = []
        for sizes in requests:
            tickets.append(batcher.submit(slates(*sizes)))
            if chance.random() < 0.3:
                batcher.drop(chance.choice(tickets))
        for ticket, sizes in zip(tickets, requests, strict=True):
            if not ticket.future.cancelled():
                assert ticket.future.result(5) == [(size,) for size in sizes]
    finally:
        batcher.close(5)
    assert (batcher.queued_tokens, batcher.queued_slates) == (0, 0)

"""What is made ahead of its moment comes as if it were made then."""

import threading
import time
from contextlib import closing

import pytest

from peftrank.training.ahead import ahead


def threads():
    return [t for t in threading.enumerate() if t.name == "peftrank-ahead"]


def test_values_come_in_order_and_the_thread_ends():
    with closing(ahead(iter(range(50)), 3)) as values:
        assert list(values) == list(range(50))
    assert list(ahead(iter(()), 1)) == []
    assert threads() == []


def test_no_more_than_the_given_number_is_made_ahead():
    made = []

    def values():
        for i in range(100):
            made.append(i)
            yield i

    with closing(ahead(values(), 2)) as found:
        assert next(found) == 0
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 4  # one taken, two that wait, one that waits for room
    assert threads() == []
    assert len(made) <= 5


def test_an_error_comes_where_its_value_would_have():
    def values():
        yield from (1, 2)
        raise ValueError("the third")

    found = ahead(values(), 5)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(found)
    assert threads() == []


def test_the_thread_ends_when_its_user_fails():
    def use():
        with closing(ahead(iter(range(10**9)), 2)) as found:
            next(found)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert threads() == []

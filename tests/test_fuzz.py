"""Whatever comes from outside is read, or refused with a message; `fuzz.py` tries far more."""

import json
import signal
import string
from argparse import Namespace

import fuzz
import pytest
from fuzz_targets import TARGETS, warm_up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BYTES = [name for name, target in TARGETS.items() if target.blob is not None]
# The keys of slates, items, events, requests, manifests and configurations.
KEYS = (
    "slate_id user_id history candidates labels history_feedback timestamp domain context item_id "
    "fields features slates slate k explain adapter events item feedback event_id format_version "
    "peftrank_version method prompt readout base config metrics data versions created files name "
    "options feature_names parts mode peft_type r lora_alpha rank_pattern training seed loss"
).split()
_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_value = st.recursive(
    _leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=8)
    ),
    max_leaves=20,
)
_text = st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode)


def broken(inputs, first=0):
    """Feeds inputs in a process of their own; returns what broke and how many there were."""
    tally = fuzz.run(Namespace(inputs=inputs, first=first, seed="tests", target=None))
    return tally.broken, sum(tally.counts.values())


def test_almost_valid_inputs_are_read_or_refused_with_a_message():
    assert broken(3000) == ({}, 3000)


@pytest.mark.slow
def test_many_almost_valid_inputs_are_read_or_refused_with_a_message():
    assert broken(100_000, first=3000) == ({}, 100_000)


@pytest.fixture(scope="module")
def timed():
    """What is slow raises here too."""
    warm_up()
    before = signal.signal(signal.SIGPROF, fuzz._slow)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("name", BYTES)
def test_any_json_and_any_bytes_are_read_or_refused_with_a_message(name, timed, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(_value.map(json.dumps).map(str.encode) | _text)
    def check(data):
        fuzz.feed(name, TARGETS[name].blob(data), folder / "x")

    check()

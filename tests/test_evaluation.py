"""Means and intervals by hand, the rows beside an adapter's, and the report."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from peftrank.baselines.popularity import popularity
from peftrank.baselines.random import random as by_chance
from peftrank.errors import ConfigError
from peftrank.evaluation import (
    Evaluation,
    baseline_rows,
    cold_slates,
    compare,
    evaluate,
    evaluate_scores,
)
from peftrank.evaluation.cosine import cosine_scores
from peftrank.evaluation.report import as_html, as_json, as_table
from peftrank.ranker import Ranker
from peftrank.types import Item, Slate

PROMPT = {"parts": {"history": "- {{ title }}\n", "candidate": "{{ title }}"}, "fields": ("title",)}
METRICS = ("ndcg@10", "mrr", "hit@1")


def labelled(*labels, slate_id="s"):
    candidates = tuple(Item(f"{slate_id}-{i}", {"title": "x"}) for i in range(len(labels)))
    return Slate(slate_id, "u", (), candidates, tuple(map(float, labels)))


def evaluation(values, name="a", metric="mrr"):
    return Evaluation(name, {metric: np.asarray(values, dtype=float)})


# --- metrics, means, intervals


def test_means_are_those_computed_by_hand():
    slates = [labelled(3, 1, 0), labelled(0, 0, 1), labelled(0, 0, 0)]
    # First: the 1 before the 3. Second: the relevant one at rank 2. Third: nothing to find.
    scores = [(2.0, 3.0, 1.0), (9.0, 1.0, 5.0), (1.0, 2.0, 3.0)]
    found = evaluate_scores("mine", slates, scores, ["ndcg@10", "mrr", "hit@1"])
    ideal = 3 + 1 / np.log2(3)
    first, second = (1 + 3 / np.log2(3)) / ideal, 1 / np.log2(3)
    assert found.mean("ndcg@10") == pytest.approx((first + second) / 2)
    assert found.mean("mrr") == pytest.approx((1 + 1 / 2) / 2)
    assert found.mean("hit@1") == pytest.approx(1 / 2)
    assert (found.name, found.counted, found.left_out) == ("mine", 2, 1)


def test_slates_without_a_relevant_candidate_do_not_move_a_mean_or_its_interval():
    slates = [labelled(0, 1), labelled(1, 0), labelled(1, 0, 0)]
    scores = [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0, 2.0)]
    alone = evaluate_scores("a", slates, scores, METRICS)
    beside = evaluate_scores(
        "a", [*slates, labelled(0, 0), labelled(0)], [*scores, (0.0, 1.0), (5.0,)], METRICS
    )
    for metric in METRICS:
        assert beside.mean(metric) == alone.mean(metric)
        assert beside.interval(metric) == alone.interval(metric)
    assert (beside.counted, beside.left_out) == (3, 2)


def test_without_any_relevant_candidate_there_is_no_mean():
    found = evaluate_scores("a", [labelled(0, 0)], [(1.0, 2.0)], METRICS)
    assert (found.counted, found.left_out) == (0, 1)
    assert np.isnan([found.mean("mrr"), *found.interval("mrr")]).all()
    assert np.isnan(compare(found, found, "mrr")).all()


def test_the_interval_is_the_bootstraps():
    assert evaluation([0.25] * 30).interval("mrr") == (0.25, 0.25)
    assert evaluation([0, 1]).interval("mrr") == (0, 1)  # all of (0, 0), (0, 1), (1, 1) are likely
    # Of many slates: the normal approximation.
    low, high = evaluation([0, 1] * 200).interval("mrr")
    half_width = 1.96 * 0.5 / np.sqrt(400)
    assert (low, high) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=0.006)


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_mean_and_its_interval_stay_among_the_values(values):
    found = evaluation(values)
    low, high = found.interval("mrr")
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert min(values) - 1e-12 <= found.mean("mrr") <= max(values) + 1e-12
    assert found.interval("mrr") == (low, high)


def test_compare_pairs_the_slates():
    # Slates differ by far more than the two rankings do; the pairing takes that away.
    rng = np.random.default_rng(0)
    hard = rng.random(100) * 0.5
    a, b = evaluation(hard + 0.1), evaluation(hard)
    assert compare(a, b, "mrr") == pytest.approx((0.1, 0.1, 0.1))
    assert compare(b, a, "mrr") == pytest.approx((-0.1, -0.1, -0.1))
    low, high = a.interval("mrr")
    assert high - low > 0.04
    mean, low, high = compare(a, evaluation(rng.permutation(hard)), "mrr")
    assert mean == pytest.approx(0.1)
    assert low < 0.1 < high


def test_compare_counts_only_slates_with_both_values():
    a, b = evaluation([0.5, np.nan, 1.0, 0.2]), evaluation([0.25, 1.0, np.nan, 0.2])
    assert compare(a, b, "mrr")[0] == pytest.approx(0.125)


def test_only_takes_slates_by_index():
    found = evaluation([0.1, np.nan, 0.5, 0.9]).only([3, 1])
    assert (found.mean("mrr"), found.counted, found.left_out) == (0.9, 1, 1)
    assert evaluation([0.1]).only([]).left_out == 0


def test_a_loaded_domain_is_evaluated_by_its_own_scores(tiny_decoder, make_slate):
    slates = [make_slate(seed=i) for i in range(5)]
    with Ranker(tiny_decoder) as ranker:
        ranker.load_readout("news", prompt=PROMPT)
        found = evaluate(ranker, slates, domain="news", metrics=METRICS)
        scores = ranker.score(slates, domain="news")
        with pytest.raises(ConfigError, match="'video' is not loaded"):
            evaluate(ranker, slates, domain="video")
        with pytest.raises(ConfigError, match="'s0' has no labels"):
            evaluate(ranker, [replace(slates[0], labels=None)], domain="news")
    assert found.name == "news"
    for metric, values in evaluate_scores("b", slates, scores, METRICS).values.items():
        np.testing.assert_array_equal(found.values[metric], values)


# --- rows beside an adapter's


def test_cold_slates_have_no_relevant_candidate_that_training_saw():
    def of(*names, labels=None, history=()):
        items = [tuple(map(Item, part)) for part in (history, names)]
        return Slate("s", "u", *items, labels)

    train = [of("a", "b", labels=(1.0, 0.0), history=("h",))]
    slates = [
        of("new", "a", labels=(1.0, 0.0)),  # only the irrelevant one was seen
        of("a", "new", labels=(1.0, 0.0)),
        of("b", "new", labels=(0.5, 1.0)),  # one of two relevant ones was seen
        of("h", labels=(1.0,)),
        of("new", "newer", labels=(2.0, 1.0)),
        of("new", labels=(0.0,)),  # nothing relevant: neither cold nor warm
        of("new"),
    ]
    assert cold_slates(slates, train) == [0, 4]
    assert cold_slates(slates, []) == [0, 1, 2, 3, 4]


def rows_of(names, base, slates, train=(), **options):
    return baseline_rows(
        names, slates, train=train, base=base, prompt=PROMPT, metrics=METRICS, **options
    )


def test_baseline_rows_are_the_baselines_in_their_order(tiny_encoder, make_slate):
    slates = [make_slate(seed=i) for i in range(6)]
    train = [replace(slates[2], labels=(0.0, 1.0, 0.0, 0.0)), make_slate(seed=9)]
    chance, popular = rows_of(["random", "popularity"], tiny_encoder, slates, train, seed=4)
    assert (chance.name, popular.name) == ("random", "popularity")
    for row, baseline in ((chance, by_chance), (popular, popularity)):
        scores = baseline(slates, train=train, seed=4)
        for metric, values in evaluate_scores("", slates, scores, METRICS).values.items():
            np.testing.assert_array_equal(row.values[metric], values)
    with pytest.raises(ConfigError, match="did you mean 'popularity'"):
        rows_of(["populrity"], tiny_encoder, slates)


def test_an_untrained_decoder_gives_a_row_per_way_to_read_it(tiny_decoder, make_slate):
    slates = [make_slate(seed=i) for i in range(4)]
    before = tiny_decoder.state_hash()
    first, second = rows_of(["zero_shot"], tiny_decoder, slates)
    assert (first.name, second.name) == ("zero_shot (yes_no)", "zero_shot (likelihood)")
    assert first.counted == second.counted == 4
    with Ranker(tiny_decoder) as ranker:
        ranker.load_readout("bare", prompt=PROMPT, readout="likelihood")
        expected = evaluate(ranker, slates, domain="bare", metrics=METRICS)
    np.testing.assert_array_equal(second.values["mrr"], expected.values["mrr"])
    assert tiny_decoder.state_hash() == before
    assert [m for m in tiny_decoder.model.modules() if m._forward_hooks] == []


def test_an_untrained_encoder_compares_candidates_with_the_history(tiny_encoder):
    def item(title):
        return Item(title, {"title": title})

    titles = ("velvet umbrella", "amber castle", "quartz river")
    slates = [
        Slate(
            str(i),
            "u",
            (replace(item(titles[i]), item_id="liked"),),
            tuple(map(item, titles)),
            tuple(float(i == j) for j in range(3)),
        )
        for i in range(3)
    ]
    # The same id must not have two texts, so each slate is scored alone.
    for slate in slates:
        (row,) = rows_of(["zero_shot"], tiny_encoder, [slate])
        assert row.name == "zero_shot (cosine)"
        assert row.mean("hit@1") == 1


def test_cosine_is_one_for_the_same_text_and_needs_a_history(tiny_encoder, make_slate):
    slate = make_slate(n_history=1)
    same = replace(slate.history[0], item_id="same")
    scores = cosine_scores(
        tiny_encoder,
        [replace(slate, candidates=(same, *slate.candidates)), replace(slate, history=())],
        ["title"],
    )
    assert scores[0][0] == pytest.approx(1, abs=1e-5)
    assert all(value < 0.9999 for value in scores[0][1:])
    assert scores[1] == (0.0,) * 4


def test_cosine_does_not_depend_on_what_is_encoded_beside(tiny_encoder, make_slate):
    slate, long = make_slate(), make_slate(seed=1)
    long = replace(long, history=(Item("long", {"title": "amber castle " * 30}),))
    alone = cosine_scores(tiny_encoder, [slate], ["title"])[0]
    beside = cosine_scores(tiny_encoder, [long, slate], ["title"])[1]
    assert beside == pytest.approx(alone, abs=1e-5)


# --- the report


class Page(HTMLParser):
    """Collects a page's tags, attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture
def part():
    slates = [labelled(1, 0, 0), labelled(0, 1, 0), labelled(0, 0)]
    rows = [
        evaluate_scores("<b>bold</b> & co", slates, [(0, 1, 2), (0, 1, 2), (0, 1)], METRICS),
        evaluate_scores("adapter", slates, [(2, 1, 0), (0, 2, 1), (0, 1)], METRICS),
    ]
    return as_json('<script>alert("x")</script> test', rows)


def test_the_json_says_what_the_rows_say(part):
    assert json.loads(json.dumps(part, allow_nan=False)) == part
    assert (part["counted"], part["left_out"], part["metrics"]) == (2, 1, list(METRICS))
    first, last = part["rows"]
    assert first["metrics"]["mrr"]["mean"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert last["metrics"]["mrr"] == {"mean": 1, "low": 1, "high": 1}
    difference = first["metrics"]["mrr"]["reference_minus_this"]
    assert difference["mean"] == pytest.approx(1 - (1 / 3 + 1 / 2) / 2)
    assert difference["low"] <= difference["mean"] <= difference["high"]


def test_the_page_stands_alone_and_shows_names_as_text(part):
    text = as_html("<i>news</i>: accuracy", [part, {**part, "name": "cold items only"}])
    page = Page(text)
    assert set(page.tags).isdisjoint({"script", "link", "img", "iframe", "b", "i"})
    assert {name for name, _ in page.attributes} == {"lang", "charset"}
    assert "//" not in text
    assert "url(" not in text
    for shown in (
        "<i>news</i>: accuracy",
        '<script>alert("x")</script> test',
        "cold items only",
        "<b>bold</b> & co",
        "1.000",
        "[1.000, 1.000]",
    ):
        assert shown in page.texts
    assert any("2 slates; 1 without" in shown for shown in page.texts)


def printed(part):
    stream = StringIO()
    Console(file=stream, width=200).print(as_table(part))
    return stream.getvalue()


def test_the_table_shows_means_intervals_and_counts(part):
    text = printed(part)
    assert "1.000 ± 0.000" in text
    assert "<b>bold</b> & co" in text
    assert "2 slates, 1 without" in text


def test_the_table_shows_names_as_text():
    row = evaluate_scores("[/b][red]x", [labelled(1, 0)], [(1, 0)], METRICS)
    text = printed(as_json("[/i]test", [row]))
    assert "[/b][red]x" in text
    assert "[/i]test: 1 slates" in text


def test_where_nothing_is_relevant_table_page_and_json_show_that_there_is_no_value():
    row = evaluate_scores("adapter", [labelled(0, 0)], [(0, 1)], METRICS)
    part = as_json("news", [row, row])
    (first, _) = json.loads(json.dumps(part, allow_nan=False))["rows"]
    assert first["metrics"]["mrr"] == {"mean": None, "low": None, "high": None}
    assert "– ± –" in printed(part)
    assert "[–, –]" in Page(as_html("news", [part])).texts


def test_a_report_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="give an adapter or at least one baseline"):
        as_json("news", [])

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrank.errors import ConfigError
from peftrank.metrics import per_slate
from peftrank.types import Item, Slate


def slate(labels, slate_id="s"):
    items = tuple(Item(f"i{n}") for n in range(len(labels)))
    return Slate(slate_id, "u", (), items, tuple(map(float, labels)))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("hit@1", 0.0),
        ("hit@2", 1.0),
        ("mrr", 0.5),
        ("recall@2", 0.5),
        ("precision@2", 0.5),
        ("map", (1 / 2 + 2 / 4) / 2),
        ("ndcg@2", (1 / math.log2(3)) / (1 + 1 / math.log2(3))),
        ("auc", (1 + 0 + 1 + 1) / 4 - 0.25),
    ],
)
def test_relevant_at_ranks_two_and_four(metric, expected):
    value = per_slate(metric, [slate([0, 1, 0, 1])], [(4.0, 3.0, 2.0, 1.0)])[0]
    assert value == pytest.approx(expected if metric != "auc" else 1 / 4)


def test_graded_ndcg_has_linear_gains_and_keeps_half_stars():
    value = per_slate("ndcg@10", [slate([2.5, 1, 0])], [(1.0, 3.0, 2.0)])[0]
    dcg = 1 + 2.5 / math.log2(4)
    assert value == pytest.approx(dcg / (2.5 + 1 / math.log2(3)), abs=1e-6)


def test_a_slate_without_a_relevant_candidate_is_nan():
    values = per_slate("ndcg@10", [slate([0, 0]), slate([0, 1])], [(1.0, 0.0), (0.0, 1.0)])
    assert math.isnan(values[0])
    assert values[1] == 1.0


def test_equal_scores_give_the_accuracy_of_chance_whatever_the_input_order():
    slates = [slate([1, 0, 0, 0], slate_id=f"s{n}") for n in range(2000)]
    values = per_slate("hit@1", slates, [(0.0,) * 4] * len(slates))
    assert np.mean(values) == pytest.approx(0.25, abs=0.04)


@given(st.lists(st.floats(-5, 5, allow_nan=False), min_size=3, max_size=8, unique=True))
def test_auc_is_the_share_of_pairs_in_the_right_order(scores):
    labels = [1] + [0] * (len(scores) - 1)
    value = per_slate("auc", [slate(labels)], [scores])[0]
    assert value == pytest.approx(np.mean([scores[0] > other for other in scores[1:]]))


@pytest.mark.parametrize("metric", ["ndgc@10", "recall", "auc@3", "ndcg@0", "NDCG"])
def test_a_metric_that_makes_no_sense_is_refused(metric):
    with pytest.raises(ConfigError, match="metric"):
        per_slate(metric, [slate([1, 0])], [(1.0, 0.0)])


def test_slates_without_labels_are_refused():
    unlabelled = Slate("s9", "u", (), (Item("a"),))
    with pytest.raises(ConfigError, match="'s9' has no labels"):
        per_slate("ndcg@10", [unlabelled], [(1.0,)])

"""Each loss equals its closed form, computed here in plain Python."""

import math

import pytest
import torch

from peftrank.errors import ConfigError
from peftrank.losses.bce import bce
from peftrank.losses.lambdarank import lambdarank
from peftrank.losses.listmle import listmle
from peftrank.losses.listnet import listnet
from peftrank.losses.mse import mse

SCORES = [0.3, -1.2, 2.0, 0.1]


def as_batch(labels, scores=SCORES):
    return (
        torch.tensor([scores], dtype=torch.float64),
        torch.tensor([labels], dtype=torch.float64),
        torch.ones(1, len(scores), dtype=torch.bool),
    )


def log_softmax(scores):
    total = math.log(sum(math.exp(s) for s in scores))
    return [s - total for s in scores]


def test_listnet_with_one_positive_is_softmax_cross_entropy():
    assert float(listnet(*as_batch([0, 1, 0, 0]))) == pytest.approx(-log_softmax(SCORES)[1])


@pytest.mark.parametrize(
    ("gain", "target"),
    [
        ("linear", [1 / 6, 0, 3 / 6, 2 / 6]),
        ("exponential", [1 / 11, 0, 7 / 11, 3 / 11]),
        ("softmax", [math.exp(x) / sum(map(math.exp, [1, 0, 3, 2])) for x in [1, 0, 3, 2]]),
    ],
)
def test_listnet_is_cross_entropy_with_the_graded_target(gain, target):
    expected = -sum(p * q for p, q in zip(target, log_softmax(SCORES), strict=True))
    assert float(listnet(*as_batch([1, 0, 3, 2]), gain=gain)) == pytest.approx(expected)


def test_listnet_names_the_gains_it_knows():
    with pytest.raises(ConfigError, match=r"linear, exponential or softmax"):
        listnet(*as_batch([1, 0, 0, 0]), gain="cubic")


def test_listmle_is_the_plackett_luce_likelihood_of_distinct_labels():
    order = [2, 3, 0, 1]  # labels 1 0 3 2
    expected = 0.0
    for place, i in enumerate(order):
        expected -= SCORES[i] - math.log(sum(math.exp(SCORES[j]) for j in order[place:]))
    assert float(listmle(*as_batch([1, 0, 3, 2]))) == pytest.approx(expected)


def test_listmle_with_one_positive_is_softmax_cross_entropy():
    batch = as_batch([0, 0, 1, 0])
    assert float(listmle(*batch)) == pytest.approx(float(listnet(*batch)))


@pytest.mark.parametrize("k", [None, 1, 2])
def test_lambdarank_sums_ndcg_weighted_pairs(k):
    labels = [1, 0, 3, 2]
    gains = [2**label - 1 for label in labels]
    ranks = [sorted(SCORES, reverse=True).index(s) + 1 for s in SCORES]

    def discount(rank):
        return 1 / math.log2(1 + rank) if k is None or rank <= k else 0.0

    ideal = sum(g * discount(r + 1) for r, g in enumerate(sorted(gains, reverse=True)))
    expected = sum(
        abs(gains[i] - gains[j])
        * abs(discount(ranks[i]) - discount(ranks[j]))
        / ideal
        * math.log(1 + math.exp(-2.0 * (SCORES[i] - SCORES[j])))
        for i in range(4)
        for j in range(4)
        if labels[i] > labels[j]
    )
    assert float(lambdarank(*as_batch(labels), sigma=2.0, k=k)) == pytest.approx(expected)


def test_bce_is_the_mean_logistic_loss_of_clicks():
    expected = sum(
        math.log(1 + math.exp(-s)) if y else math.log(1 + math.exp(s))
        for s, y in zip(SCORES, [0, 0, 1, 1], strict=True)
    )
    assert float(bce(*as_batch([1, 3, 5, 4]), positive_above=3.5)) == pytest.approx(expected / 4)


def test_mse_is_the_mean_squared_error():
    expected = sum((s - y) ** 2 for s, y in zip(SCORES, [1, 0, 3, 2], strict=True)) / 4
    assert float(mse(*as_batch([1, 0, 3, 2]))) == pytest.approx(expected)


@pytest.mark.parametrize("function", [listnet, listmle, lambdarank, bce, mse])
def test_gradients_are_those_of_finite_differences(function):
    scores, labels, mask = as_batch([0, 2, 1, 0])
    weights = torch.tensor([[1.0, 0.5, 2.0, 1.0]], dtype=torch.float64)
    if function is lambdarank:  # ranks are constants: finite differences must not change them
        scores = scores * 10
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: function(s, labels, mask, weights), scores)

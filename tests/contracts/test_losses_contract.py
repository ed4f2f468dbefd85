"""Every file in peftrank/losses keeps the contract of `peftrank.losses`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peftrank import plugins

LOSSES = plugins.available("losses")


def slates(seed: int, n_slates: int = 4, n: int = 6):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_slates, n, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (n_slates, n), generator=generator).double()
    lengths = torch.randint(1, n + 1, (n_slates,), generator=generator)
    mask = torch.arange(n) < lengths[:, None]
    return scores, labels.masked_fill(~mask, 0.0), mask


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_finite_non_negative_number_per_slate(name):
    scores, labels, mask = slates(0)
    losses = plugins.load("losses", name)(scores, labels, mask)
    assert losses.shape == (4,)
    assert bool(torch.isfinite(losses).all())
    assert bool((losses >= -1e-12).all())


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), filler=st.sampled_from([-1e4, -3.0, 0.0, 7.0, 1e4]))
def test_padded_candidates_change_neither_value_nor_gradient(name, seed, filler):
    loss = plugins.load("losses", name)
    scores, labels, mask = slates(seed)
    filled_scores = scores.masked_fill(~mask, filler).requires_grad_()
    filled_labels = labels.masked_fill(~mask, abs(filler) / 1e4 * 3)
    plain = scores.masked_fill(~mask, 0.0).requires_grad_()
    a = loss(filled_scores, filled_labels, mask)
    b = loss(plain, labels, mask)
    torch.testing.assert_close(a, b)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(filled_scores.grad, plain.grad)
    assert bool((filled_scores.grad[~mask] == 0).all())


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuting_the_candidates_changes_nothing(name, seed):
    loss = plugins.load("losses", name)
    scores, labels, mask = slates(seed)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        loss(scores, labels, mask), loss(scores[:, order], labels[:, order], mask[:, order])
    )


@pytest.mark.parametrize("name", LOSSES)
def test_cutting_a_batch_in_two_changes_no_slate(name):
    loss = plugins.load("losses", name)
    scores, labels, mask = slates(3)
    whole = loss(scores, labels, mask)
    halves = [loss(scores[i : i + 2], labels[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(halves))


@pytest.mark.parametrize("name", LOSSES)
@given(
    scores=arrays("float32", (1, 5), elements=st.sampled_from([-1e4, -1.0, 0.0, 2.0, 1e4])),
    labels=arrays("float32", (1, 5), elements=st.sampled_from([0.0, 1.0, 4.0])),
)
@settings(max_examples=50, deadline=None)
def test_extreme_scores_give_no_nan(name, scores, labels):
    tensor = torch.from_numpy(scores).requires_grad_()
    mask = torch.tensor([[True, True, True, True, False]])
    value = plugins.load("losses", name)(tensor, torch.from_numpy(labels), mask).sum()
    value.backward()
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(tensor.grad).all())


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_steps_rank_the_relevant_candidate_first(name):
    labels = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    scores = torch.tensor([[0.5, -0.5, 0.0, 0.3]], requires_grad=True)
    for _ in range(200):
        plugins.load("losses", name)(scores, labels, mask).sum().backward()
        with torch.no_grad():
            scores -= 0.5 * scores.grad
        scores.grad = None
    assert int(scores.argmax()) == 1


@pytest.mark.parametrize("name", ["listnet", "listmle", "lambdarank"])
def test_a_slate_without_order_has_no_loss(name):
    scores = torch.randn(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    losses = plugins.load("losses", name)(scores, torch.zeros(2, 3), mask)
    assert losses.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_one_change_nothing_and_weights_scale(name):
    loss = plugins.load("losses", name)
    scores, labels, mask = slates(5)
    labels = torch.where(labels > 2, labels, torch.zeros_like(labels))
    plain = loss(scores, labels, mask)
    torch.testing.assert_close(loss(scores, labels, mask, torch.ones_like(scores)), plain)
    doubled = loss(scores, labels, mask, torch.full_like(scores, 2.0))
    assert bool((doubled >= plain - 1e-12).all())
    assert float(doubled.sum()) > float(plain.sum())

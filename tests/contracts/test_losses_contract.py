"""Every file in peftrank/losses keeps the contract of `peftrank.losses` and its row in the docs."""

import functools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peftrank import plugins

LOSSES = plugins.available("losses")
DOCS = Path(__file__).parents[2] / "docs" / "losses.md"
POINTWISE = ("bce", "mse")
VARIANTS = [
    ("listnet", {"gain": "softmax", "label_smoothing": 0.2}),
    ("listnet", {"gain": "exponential", "normalise": False}),
    ("bce", {"label_smoothing": 0.2}),
    ("softmax", {"label_smoothing": 0.3}),
    ("infonce", {"label_smoothing": 0.3}),
    ("softmax_dpo", {"label_smoothing": 0.3}),
    ("listmle", {"label_smoothing": 0.3}),
    ("p_listmle", {"label_smoothing": 0.3}),
    ("ranknet", {"label_smoothing": 0.3}),
    ("lambdarank", {"label_smoothing": 0.3}),
    ("p_listmle", {"importance": "logarithmic"}),
    ("lambdarank", {"k": 2}),
    ("lambdaloss", {"scheme": "ndcg_loss1"}),
    ("lambdaloss", {"scheme": "ndcg_loss2"}),
    ("neural_ndcg", {"k": 2, "temperature": 0.5, "iterations": 5}),
]
CASES = [(name, {}) for name in LOSSES] + VARIANTS

every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())])
)
every_seed = given(seed=st.integers(0, 10_000))
few = settings(max_examples=10, deadline=None)


def loss_of(case, slates):
    """Returns the losses of slates, which are the arguments by name; `reference` where taken."""
    name, options = case
    if "reference" not in plugins.option_names("losses", name):
        slates = {key: value for key, value in slates.items() if key != "reference"}
    return plugins.load("losses", name)(**slates, **options)


def value_and_gradient(case, slates):
    scores = slates["scores"].detach().clone().requires_grad_()
    values = loss_of(case, {**slates, "scores": scores})
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    return values.detach(), gradient


def make(seed, n_slates=4, n=6):
    """Returns slates of 1 to n candidates, padded in any place, with graded and tied labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_slates, n)

    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(shape, generator=generator) < 0.7
    mask[:, 2] = True
    slates = {
        "scores": normal(),
        "labels": torch.randint(0, 4, shape, generator=generator).double(),
        "weights": normal().exp(),
        "reference": normal(),
    }
    return {**{k: v.masked_fill(~mask, 0.0) for k, v in slates.items()}, "mask": mask}


@every_case
@few
@every_seed
def test_a_loss_is_one_finite_non_negative_number_per_slate(case, seed):
    slates = {**make(seed), "weights": None}
    losses = loss_of(case, slates)
    assert losses.shape == (4,)
    assert bool(torch.isfinite(losses).all())
    assert bool((losses >= -1e-12).all())


@every_case
@few
@given(
    seed=st.integers(0, 10_000),
    filler=st.sampled_from([float("nan"), float("inf"), -1e4, -3.0, 7.0, 1e4]),
)
def test_padded_candidates_change_neither_value_nor_gradient(case, seed, filler):
    slates = make(seed)
    mask = slates["mask"]
    filled = {k: v if k == "mask" else v.masked_fill(~mask, filler) for k, v in slates.items()}
    values, gradient = value_and_gradient(case, slates)
    filled_values, filled_gradient = value_and_gradient(case, filled)
    torch.testing.assert_close(filled_values, values)
    torch.testing.assert_close(filled_gradient, gradient)
    assert bool((filled_gradient[~mask] == 0).all())


@every_case
@few
@every_seed
def test_a_slate_is_the_same_alone_and_unpadded(case, seed):
    slates = make(seed, n_slates=2)
    values, gradient = value_and_gradient(case, slates)
    for i, mask in enumerate(slates["mask"]):
        alone = {key: tensor[i : i + 1, mask] for key, tensor in slates.items()}
        value, own_gradient = value_and_gradient(case, alone)
        torch.testing.assert_close(value, values[i : i + 1])
        torch.testing.assert_close(own_gradient[0], gradient[i, mask])


@every_case
@few
@given(seed=st.integers(0, 10_000), tied=st.booleans())
def test_permuting_candidates_permutes_gradients(case, seed, tied):
    slates = make(seed)
    if tied:
        slates["scores"] = slates["scores"].round()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    values, gradient = value_and_gradient(case, slates)
    other_values, other_gradient = value_and_gradient(
        case, {key: tensor[:, order] for key, tensor in slates.items()}
    )
    torch.testing.assert_close(other_values, values)
    torch.testing.assert_close(other_gradient, gradient[:, order])


@every_case
@few
@every_seed
def test_a_loss_is_linear_in_the_weights(case, seed):
    slates, other = make(seed), make(seed + 1)["weights"]

    def weighted(weights):
        return loss_of(case, {**slates, "weights": weights})

    own, ones = slates["weights"], torch.ones_like(slates["weights"])
    torch.testing.assert_close(weighted(own + 2 * other), weighted(own) + 2 * weighted(other))
    torch.testing.assert_close(weighted(ones), weighted(None))


@every_case
@few
@every_seed
def test_a_loss_falls_along_its_negative_gradient(case, seed):
    if case[0] == "neural_ndcg":  # its bound, for sorts that have not settled, has no gradient
        case = case[0], {k: v for k, v in case[1].items() if k == "k"}
    slates = {**make(seed, n_slates=1), "weights": None}
    value, gradient = value_and_gradient(case, slates)
    largest = gradient.abs().max()
    if largest > 1e-6:
        lower = loss_of(case, {**slates, "scores": slates["scores"] - 1e-5 * gradient / largest})
        assert float(lower) < float(value)
    else:
        assert float(value) < 10.0  # only a slate with nothing to learn has no gradient


@every_case
@given(
    scores=arrays("float32", (1, 5), elements=st.sampled_from([-1e4, -1.0, 0.0, 2.0, 1e4])),
    labels=arrays("float32", (1, 5), elements=st.sampled_from([0.0, 1.0, 4.0])),
)
@settings(max_examples=20, deadline=None)
def test_extreme_scores_give_finite_values_and_gradients(case, scores, labels):
    slates = {
        "scores": torch.from_numpy(scores),
        "labels": torch.from_numpy(labels),
        "mask": torch.tensor([[True, True, True, True, False]]),
        "weights": torch.full((1, 5), 20.0),
        "reference": torch.from_numpy(scores).flip(-1),
    }
    values, gradient = value_and_gradient(case, slates)
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(gradient).all())


@every_case
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_steps_rank_the_relevant_candidate_first(case, tied):
    slates = {
        "scores": torch.zeros(1, 4) if tied else torch.tensor([[0.5, -0.5, 0.0, 0.3]]),
        "labels": torch.tensor([[0.0, 1.0, 0.0, 0.0]]),
        "mask": torch.ones(1, 4, dtype=torch.bool),
        "reference": torch.zeros(1, 4),
    }
    for _ in range(30):
        _, gradient = value_and_gradient(case, slates)
        slates["scores"] = slates["scores"] - 2.0 * gradient
    assert int(slates["scores"].argmax()) == 1


@every_case
@pytest.mark.parametrize("without", ["relevant", "rivals", "candidates"])
def test_a_slate_that_says_nothing_about_the_order_has_no_loss_and_no_gradient(case, without):
    slates = {**make(1), "weights": None}
    if without == "relevant":
        slates["labels"] = torch.zeros_like(slates["labels"])
    else:
        slates["mask"] = torch.zeros_like(slates["mask"])
        slates["mask"][:, 0] = without == "rivals"
    values, gradient = value_and_gradient(case, slates)
    if case[0] in POINTWISE and without != "candidates":
        assert float(values.sum()) > 0
    else:
        assert values.tolist() == [0.0] * 4
        assert bool((gradient == 0).all())


@functools.cache
def documented():
    """Returns the rows of the table of losses: name -> column -> cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    return {re.sub("`", "", row[0]): dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_every_loss_has_one_row_in_the_documentation():
    assert sorted(documented()) == list(LOSSES)


@every_case
@few
@given(seed=st.integers(0, 10_000), shift=st.sampled_from([-30.0, 1.0, 200.0]))
def test_adding_a_constant_to_all_scores_changes_what_is_documented(case, seed, shift):
    slates = make(seed)
    values, gradient = value_and_gradient(case, slates)
    moved, moved_gradient = value_and_gradient(case, {**slates, "scores": slates["scores"] + shift})
    if documented()[case[0]]["shift-invariant?"] == "yes":
        torch.testing.assert_close(moved, values)
        torch.testing.assert_close(moved_gradient, gradient)
    else:
        assert not torch.allclose(moved, values)


@pytest.mark.parametrize("name", LOSSES)
def test_grades_matter_where_it_is_documented(name):
    mask = torch.ones(1, 6, dtype=torch.bool)
    slates = {**make(0, n_slates=1), "mask": mask, "weights": None}
    graded, binary = torch.tensor([[2.0, 1, 0, 0, 0, 0]]), torch.tensor([[1.0, 1, 0, 0, 0, 0]])
    a, b = (loss_of((name, {}), {**slates, "labels": labels}) for labels in (graded, binary))
    assert (not torch.allclose(a, b)) == (documented()[name]["graded?"] == "yes")

"""Each loss equals its paper's formula, written here in plain Python, and small closed forms."""

import itertools
import math
import random

import pytest
import torch

from peftrank import plugins
from peftrank.errors import ConfigError
from peftrank.losses.listnet import listnet
from peftrank.losses.neural_ndcg import neural_ndcg
from peftrank.losses.softmax import softmax

REFERENCE = [0.4, -0.3, 0.9, 0.0, -1.1]


def loss(name, scores, labels, weights=None, **options):
    """Returns the loss of one slate of Python numbers."""
    rows = [torch.tensor([row], dtype=torch.float64) for row in (scores, labels)]
    mask = torch.ones(1, len(scores), dtype=torch.bool)
    if weights is not None:
        weights = torch.tensor([weights], dtype=torch.float64)
    function = plugins.load("losses", name)
    return float(function(*rows, mask, weights, **options))


# The formulas. Each returns the terms that belong to each candidate; a loss is their sum.


def logistic(x):
    return math.log(1 + math.exp(-x))


def log_sum_exp(values):
    return math.log(sum(math.exp(value) for value in values))


def cross_entropy(own, rivals, smoothing):
    """Of the softmax over rivals, which include one's own score, with a smoothed target."""
    probabilities = [math.exp(s - log_sum_exp(rivals)) for s in rivals]
    target = [smoothing / len(rivals) + (1 - smoothing) * (s is own) for s in rivals]
    return -sum(t * math.log(p) for t, p in zip(target, probabilities, strict=True))


def smoothed_logistic(x, smoothing):
    return (1 - smoothing / 2) * logistic(x) + smoothing / 2 * logistic(-x)


def discount(rank, k=None):
    return 1 / math.log2(1 + rank) if k is None or rank <= k else 0.0


def gains(labels, k=None):
    ideal = sorted((2**label - 1 for label in labels), reverse=True)
    best = sum(gain * discount(rank, k) for rank, gain in enumerate(ideal, start=1))
    return [(2**label - 1) / best for label in labels]


def ranks(scores):
    return [sorted(scores, reverse=True).index(score) + 1 for score in scores]


def pairwise(labels, term, pairs=lambda better, worse: better > worse):
    n = range(len(labels))
    return [sum(term(i, j) for j in n if i != j and pairs(labels[i], labels[j])) for i in n]


def listnet_terms(scores, labels, target, smoothing=0.0):
    masses = [target(label) for label in labels]
    target_of = [(1 - smoothing) * m / sum(masses) + smoothing / len(labels) for m in masses]
    return [p * (log_sum_exp(scores) - s) for p, s in zip(target_of, scores, strict=True)]


def listmle_terms(scores, labels, importance=None, smoothing=0.0):
    """Breslow: a tied candidate competes with all that is not above it; ties share a(i)."""
    n, terms = len(scores), []
    for i in range(n):
        rivals = [scores[j] for j in range(n) if labels[j] <= labels[i]]
        places = [p for p in range(1, n + 1) if sorted(labels)[n - p] == labels[i]]
        share = 1 if importance is None else sum(importance(p, n) for p in places) / len(places)
        known = labels[i] > min(labels)
        terms.append(share * cross_entropy(scores[i], rivals, smoothing) if known else 0.0)
    return terms


def ranknet_terms(scores, labels, sigma, smoothing=0.0):
    n_pairs = sum(a > b for a in labels for b in labels)

    def term(i, j):
        return smoothed_logistic(sigma * (scores[i] - scores[j]), smoothing) / n_pairs

    return pairwise(labels, term)


def margin_terms(scores, labels, size):
    n_pairs = sum(a > b for a in labels for b in labels)
    return pairwise(labels, lambda i, j: max(0.0, size - scores[i] + scores[j]) / n_pairs)


def lambdarank_terms(scores, labels, sigma, k, smoothing=0.0):
    g, r = gains(labels, k), ranks(scores)

    def term(i, j):
        swap = abs(g[i] - g[j]) * abs(discount(r[i], k) - discount(r[j], k))
        return swap * smoothed_logistic(sigma * (scores[i] - scores[j]), smoothing)

    return pairwise(labels, term)


def lambdaloss_terms(scores, labels, scheme, sigma, mu):
    g, r = gains(labels), ranks(scores)

    def importance(i, j):
        if scheme == "ndcg_loss1":
            return g[i] * discount(r[i])
        apart = abs(r[i] - r[j])
        delta = abs(discount(apart) - discount(apart + 1))
        rho = abs(discount(r[i]) - discount(r[j]))
        return abs(g[i] - g[j]) * (delta if scheme == "ndcg_loss2" else rho + mu * delta)

    def term(i, j):
        probability = 1 / (1 + math.exp(-sigma * (scores[i] - scores[j])))
        return -math.log2(probability ** importance(i, j))

    if scheme == "ndcg_loss1":
        return pairwise(labels, term, pairs=lambda better, worse: True)
    return pairwise(labels, term)


def shortfall_terms(labels, expected, k=None):
    g = gains(labels, k)
    return [g_i / sum(g) - g_i * d for g_i, d in zip(g, expected, strict=True)]


def approx_ndcg_terms(scores, labels, temperature):
    expected = []
    for i, score in enumerate(scores):
        others = scores[:i] + scores[i + 1 :]
        alpha = 1 / temperature
        behind = [
            math.exp(-alpha * (score - s)) / (1 + math.exp(-alpha * (score - s))) for s in others
        ]
        expected.append(discount(1 + sum(behind)))
    return shortfall_terms(labels, expected)


def neural_ndcg_terms(scores, labels, temperature, k):
    """NeuralSort, then Sinkhorn scaling of plain matrices, many more times than the loss."""
    n = len(scores)
    away = [sum(abs(s - t) for t in scores) for s in scores]
    sort = []
    for rank in range(1, n + 1):
        row = [
            ((n + 1 - 2 * rank) * s - a) / temperature for s, a in zip(scores, away, strict=True)
        ]
        sort.append([math.exp(x - log_sum_exp(row)) for x in row])
    for _ in range(300):
        columns = [sum(row[j] for row in sort) for j in range(n)]
        sort = [[x / c for x, c in zip(row, columns, strict=True)] for row in sort]
        sort = [[x / sum(row) for x in row] for row in sort]
    expected = [sum(sort[r][j] * discount(r + 1, k) for r in range(n)) for j in range(n)]
    return shortfall_terms(labels, expected, k)


def softmax_terms(scores, labels, smoothing=0.0):
    terms = []
    for i, label in enumerate(labels):
        below = [scores[j] for j, other in enumerate(labels) if other < label]
        own = scores[i]
        terms.append(cross_entropy(own, [own, *below], smoothing) if label > 0 else 0.0)
    return [term / sum(label > 0 for label in labels) for term in terms]


def smoothed_infonce_terms(scores, labels, temperature, above, smoothing):
    binary = [int(label > above) for label in labels]
    return softmax_terms([s / temperature for s in scores], binary, smoothing)


def smoothed_dpo_terms(scores, labels, beta, smoothing):
    rewards = [beta * (s - r) for s, r in zip(scores, REFERENCE, strict=True)]
    return softmax_terms(rewards, labels, smoothing)


def infonce_terms(scores, labels, temperature, above):
    positives = [i for i, label in enumerate(labels) if label > above]
    negatives = [math.exp(scores[i] / temperature) for i in range(5) if i not in positives]
    terms = [0.0] * 5
    for i in positives:
        own = math.exp(scores[i] / temperature)
        terms[i] = -math.log(own / (own + sum(negatives))) / len(positives)
    return terms


def softmax_dpo_terms(scores, labels, beta):
    """-log sigmoid(-log sum_j exp(beta log-ratio_j - beta log-ratio_i)), as in the paper."""
    log_p = [s - log_sum_exp(scores) for s in scores]
    log_reference = [s - log_sum_exp(REFERENCE) for s in REFERENCE]
    ratio = [beta * (a - b) for a, b in zip(log_p, log_reference, strict=True)]
    terms = [0.0] * 5
    for i, label in enumerate(labels):
        below = [math.exp(ratio[j] - ratio[i]) for j in range(5) if labels[j] < label]
        if below:
            inner = -math.log(sum(below))
            terms[i] = -math.log(1 / (1 + math.exp(-inner))) / sum(x > 0 for x in labels)
    return terms


def bce_terms(scores, labels, above, smoothing):
    targets = [(label > above) * (1 - smoothing) + smoothing / 2 for label in labels]
    return [
        (y * logistic(s) + (1 - y) * logistic(-s)) / 5 for y, s in zip(targets, scores, strict=True)
    ]


def mse_terms(scores, labels):
    return [(s - y) ** 2 / 5 for s, y in zip(scores, labels, strict=True)]


def identity(label):
    return label


def paper_importance(i, n):
    return (2 ** (n - i) - 1) / (2 ** (n - 1) - 1)


def log_importance(i, n):
    return discount(i)


FORMULAS = [
    ("listnet", {}, lambda s, y: listnet_terms(s, y, identity)),
    (
        "listnet",
        {"gain": "exponential", "label_smoothing": 0.2},
        lambda s, y: listnet_terms(s, y, lambda label: 2**label - 1, 0.2),
    ),
    ("listnet", {"gain": "softmax"}, lambda s, y: listnet_terms(s, y, math.exp)),
    (
        "listnet",
        {"normalise": False},
        lambda s, y: [sum(y) * term for term in listnet_terms(s, y, identity)],
    ),
    ("listmle", {}, listmle_terms),
    ("p_listmle", {}, lambda s, y: listmle_terms(s, y, paper_importance)),
    (
        "p_listmle",
        {"importance": "logarithmic"},
        lambda s, y: listmle_terms(s, y, log_importance),
    ),
    ("softmax", {}, softmax_terms),
    (
        "infonce",
        {"temperature": 0.5, "positive_above": 1},
        lambda s, y: infonce_terms(s, y, 0.5, 1),
    ),
    (
        "softmax_dpo",
        {"beta": 0.7, "reference": torch.tensor([REFERENCE], dtype=torch.float64)},
        lambda s, y: softmax_dpo_terms(s, y, 0.7),
    ),
    ("ranknet", {"sigma": 2.0}, lambda s, y: ranknet_terms(s, y, 2.0)),
    ("margin", {"margin": 0.8}, lambda s, y: margin_terms(s, y, 0.8)),
    *(
        ("lambdarank", {"sigma": 2.0, "k": k}, lambda s, y, k=k: lambdarank_terms(s, y, 2.0, k))
        for k in (None, 1, 2)
    ),
    *(
        (
            "lambdaloss",
            {"scheme": scheme, "sigma": 2.0, "mu": 3.0},
            lambda s, y, scheme=scheme: lambdaloss_terms(s, y, scheme, 2.0, 3.0),
        )
        for scheme in ("ndcg_loss1", "ndcg_loss2", "ndcg_loss2++")
    ),
    ("approx_ndcg", {"temperature": 0.5}, lambda s, y: approx_ndcg_terms(s, y, 0.5)),
    ("neural_ndcg", {"iterations": 300}, lambda s, y: neural_ndcg_terms(s, y, 1.0, None)),
    (
        "neural_ndcg",
        {"iterations": 300, "temperature": 2.0, "k": 2},
        lambda s, y: neural_ndcg_terms(s, y, 2.0, 2),
    ),
    (
        "bce",
        {"positive_above": 1, "label_smoothing": 0.1},
        lambda s, y: bce_terms(s, y, 1, 0.1),
    ),
    ("mse", {}, mse_terms),
    ("softmax", {"label_smoothing": 0.2}, lambda s, y: softmax_terms(s, y, 0.2)),
    (
        "infonce",
        {"temperature": 0.5, "positive_above": 1, "label_smoothing": 0.2},
        lambda s, y: smoothed_infonce_terms(s, y, 0.5, 1, 0.2),
    ),
    (
        "softmax_dpo",
        {
            "beta": 0.7,
            "reference": torch.tensor([REFERENCE], dtype=torch.float64),
            "label_smoothing": 0.2,
        },
        lambda s, y: smoothed_dpo_terms(s, y, 0.7, 0.2),
    ),
    ("listmle", {"label_smoothing": 0.2}, lambda s, y: listmle_terms(s, y, smoothing=0.2)),
    (
        "p_listmle",
        {"label_smoothing": 0.2},
        lambda s, y: listmle_terms(s, y, paper_importance, smoothing=0.2),
    ),
    (
        "ranknet",
        {"sigma": 2.0, "label_smoothing": 0.2},
        lambda s, y: ranknet_terms(s, y, 2.0, 0.2),
    ),
    (
        "lambdarank",
        {"sigma": 2.0, "k": 2, "label_smoothing": 0.2},
        lambda s, y: lambdarank_terms(s, y, 2.0, 2, 0.2),
    ),
]


def test_every_loss_is_compared_with_a_formula():
    assert {name for name, _, _ in FORMULAS} == set(plugins.available("losses"))


@pytest.mark.parametrize("labels", [[0, 2, 1, 0, 2], [0, 0, 2, 0, 0], [3, 1, 0, 2, 4]], ids=str)
@pytest.mark.parametrize(
    ("name", "options", "terms"),
    FORMULAS,
    ids=[f"{name}{i}" for i, (name, _, _) in enumerate(FORMULAS)],
)
def test_values_and_gradients_are_those_of_the_formula(name, options, terms, labels):
    generator = random.Random(str((name, labels)))
    scores = [generator.gauss(0, 1) for _ in labels]
    weights = [generator.uniform(0.2, 3) for _ in labels]

    def formula(values):
        return sum(w * term for w, term in zip(weights, terms(values, labels), strict=True))

    tensor = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    value = plugins.load("losses", name)(
        tensor,
        torch.tensor([labels], dtype=torch.float64),
        torch.ones(1, 5, dtype=torch.bool),
        torch.tensor([weights], dtype=torch.float64),
        **options,
    )
    assert float(value) == pytest.approx(formula(scores), rel=1e-6)
    value.sum().backward()
    step = 1e-5
    for i in range(5):
        up, down = ([*scores[:i], scores[i] + e, *scores[i + 1 :]] for e in (step, -step))
        slope = (formula(up) - formula(down)) / (2 * step)
        assert float(tensor.grad[0, i]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


SMOOTHED = ("listnet", "softmax", "infonce", "softmax_dpo", "listmle", "p_listmle", "ranknet",
            "lambdarank")  # fmt: skip


def test_label_smoothing_is_an_option_where_the_target_is_a_probability():
    taking = {
        n
        for n in plugins.available("losses")
        if "label_smoothing" in plugins.option_names("losses", n)
    }
    assert taking == {*SMOOTHED, "bce"}


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_labels_ask_for_a_finite_lead_and_no_more(name, smoothing):
    """Two candidates: the better one's probability 1 / (1 + exp(-lead)) should be 1 - e / 2."""
    lead = math.log((1 - smoothing / 2) / (smoothing / 2))
    reference = {"reference": torch.zeros(1, 2)} if name == "softmax_dpo" else {}

    def slope(at, smoothing):
        scores = torch.tensor([[at, 0.0]], dtype=torch.float64, requires_grad=True)
        labels, mask = torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 2, dtype=torch.bool)
        function = plugins.load("losses", name)
        function(scores, labels, mask, label_smoothing=smoothing, **reference).sum().backward()
        return float(scores.grad[0, 0])

    assert slope(lead, smoothing) == pytest.approx(0, abs=1e-12)
    assert slope(lead - 0.1, smoothing) < 0 < slope(lead + 0.1, smoothing)
    assert slope(lead + 0.1, 0.0) < 0


LOG3 = math.log2(3)
LOGARITHMIC = {"importance": "logarithmic"}


@pytest.mark.parametrize(
    ("name", "scores", "labels", "options", "expected"),
    [
        ("listnet", [0, 0, 0, 0], [1, 1, 0, 0], {}, math.log(4)),
        ("listnet", [0, math.log(3)], [0, 1], {}, math.log(4 / 3)),
        ("listnet", [0, math.log(3)], [0, 1], {"label_smoothing": 0.5}, math.log(4 / 3**0.75)),
        ("softmax", [0, math.log(3)], [0, 1], {"label_smoothing": 0.5}, math.log(4 / 3**0.75)),
        ("softmax", [0, 0, 0, 0], [1, 1, 0, 0], {}, math.log(3)),
        ("softmax", [0, 0, 0, 0], [2, 1, 0, 0], {}, (math.log(4) + math.log(3)) / 2),
        ("infonce", [0, math.log(2)], [1, 0], {"temperature": 0.5}, math.log(5)),
        ("softmax_dpo", [0, 0], [1, 0], {"reference": torch.tensor([[1, 0]])}, logistic(-1)),
        ("listmle", [0, 0, 0], [2, 1, 0], {}, math.log(3) + math.log(2)),
        ("p_listmle", [0, 0, 0], [2, 1, 0], {}, math.log(3) + math.log(2) / 3),
        ("p_listmle", [0, 0, 0], [1, 1, 0], {}, (1 + 1 / 3) * math.log(3)),
        ("p_listmle", [0, 0, 0], [2, 1, 0], LOGARITHMIC, math.log(3) + math.log(2) / LOG3),
        ("ranknet", [0, math.log(3)], [1, 0], {}, math.log(4)),
        ("ranknet", [0, math.log(3)], [1, 0], {"label_smoothing": 0.5}, math.log(4 / 3**0.25)),
        ("listmle", [0, 0, math.log(2)], [0, 0, 1], {"label_smoothing": 0.6}, math.log(4 / 2**0.6)),
        ("margin", [0.2, 0.5, -3], [1, 0, 0], {}, 1.3 / 2),
        ("lambdarank", [0, 0], [1, 0], {}, (1 - 1 / LOG3) * math.log(2)),
        ("lambdaloss", [0, 0], [1, 0], {"scheme": "ndcg_loss1"}, 1 / LOG3),
        ("lambdaloss", [0, 0], [1, 0], {"scheme": "ndcg_loss2"}, 1 - 1 / LOG3),
        ("lambdaloss", [0, 0], [1, 0], {"scheme": "ndcg_loss2++"}, 11 * (1 - 1 / LOG3)),
        ("approx_ndcg", [0, 0], [1, 0], {}, 1 - 1 / math.log2(2.5)),
        ("neural_ndcg", [0, 0], [1, 0], {}, 1 - (1 + 1 / LOG3) / 2),
        ("bce", [0, math.log(3)], [0, 1], {}, (math.log(2) + math.log(4 / 3)) / 2),
        ("mse", [1, 3], [0, 1], {}, 2.5),
    ],
)  # fmt: skip
def test_small_slates_by_hand(name, scores, labels, options, expected):
    assert loss(name, scores, labels, **options) == pytest.approx(expected, rel=1e-6)


def test_a_smooth_sort_that_has_not_settled_is_never_better_than_the_best_order():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300, 6), generator=generator).double()
    scores = labels + torch.randn(300, 6, generator=generator, dtype=torch.float64)
    values = neural_ndcg(scores, labels, torch.ones(300, 6, dtype=torch.bool), iterations=5)
    assert float(values.min()) >= -1e-12


def test_a_weight_of_two_is_the_same_click_logged_twice():
    scores, labels = [0.3, -1.2, 2.0], [1, 1, 0]
    once, again = loss("listnet", scores, labels, normalise=False), [1.0, 0.0, 0.0]
    only_it = loss("listnet", scores, labels, again, normalise=False)
    twice = loss("listnet", scores, [2, 1, 0], normalise=False)  # a label of 2: two clicks
    weighted = loss("listnet", scores, labels, [2.0, 1.0, 1.0], normalise=False)
    assert weighted == pytest.approx(twice)
    assert weighted == pytest.approx(once + only_it)


def test_inverse_propensities_undo_the_position_bias_of_clicks():
    scores, relevant, seen = [0.3, -1.2, 2.0, 0.1], [1, 0, 1, 1], [0.9, 0.6, 0.3, 0.1]
    weights = [1 / p for p in seen]
    expected = 0.0
    for looked in itertools.product([0, 1], repeat=4):
        chance = math.prod(p if x else 1 - p for p, x in zip(seen, looked, strict=True))
        clicks = [r * x for r, x in zip(relevant, looked, strict=True)]
        expected += chance * loss("listnet", scores, clicks, weights, normalise=False)
    assert expected == pytest.approx(loss("listnet", scores, relevant, normalise=False))


def ndcg(scores, labels, k=None):
    g = gains(labels, k)
    return sum(gain * discount(rank, k) for gain, rank in zip(g, ranks(scores), strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "options"), [("approx_ndcg", {}), ("neural_ndcg", {}), ("neural_ndcg", {"k": 2})]
)
def test_a_cold_smooth_ndcg_is_ndcg(name, options, seed):
    generator = random.Random(seed)
    scores = generator.sample(range(-20, 20), 5)
    labels = [generator.randint(0, 3) for _ in range(4)] + [1]
    value = loss(name, scores, labels, temperature=0.02, **options)
    assert value == pytest.approx(1 - ndcg(scores, labels, options.get("k")), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ndcg_loss2_bounds_the_ndcg_lost_with_one_relevant_candidate(seed):
    scores = [random.Random(seed).gauss(0, 3) for _ in range(6)]
    labels = [0, 0, 1, 0, 0, 0]
    assert loss("lambdaloss", scores, labels, scheme="ndcg_loss2") >= 1 - ndcg(scores, labels)


def test_with_one_positive_the_softmax_family_is_one_loss():
    scores, labels = [0.3, -1.2, 2.0, 0.1], [0, 1, 0, 0]
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    values = [
        loss(name, scores, labels)
        for name in ("listnet", "softmax", "infonce", "listmle", "p_listmle")
    ]
    values.append(loss("softmax_dpo", scores, labels, reference=zeros))
    assert values == pytest.approx([values[0]] * 6)


def test_positives_above_all_negatives_satisfy_softmax_but_not_listnet():
    scores = torch.tensor([[60.0, 30.0, -30.0]], requires_grad=True)
    labels, mask = torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    (apart,) = torch.autograd.grad(softmax(scores, labels, mask).sum(), scores)
    (shared,) = torch.autograd.grad(listnet(scores, labels, mask).sum(), scores)
    assert apart.abs().max() < 1e-6
    assert shared[0].tolist() == pytest.approx([0.5, -0.5, 0.0], abs=1e-6)


def test_equal_scores_teach_the_losses_that_look_at_ranks():
    mask = torch.ones(1, 3, dtype=torch.bool)
    for name in ("lambdarank", "lambdaloss"):
        for labels in itertools.permutations([0.0, 1.0, 0.0]):
            scores = torch.zeros(1, 3, requires_grad=True)
            function = plugins.load("losses", name)
            function(scores, torch.tensor([labels]), mask).sum().backward()
            expected = [-0.2 if label else 0.1 for label in labels]
            slope = scores.grad[0] / -scores.grad[0].min() * 0.2
            assert slope.tolist() == pytest.approx(expected)


def test_huge_labels_do_not_overflow_the_gains():
    value = loss("lambdarank", [0.0, 1.0, 2.0], [3000, 1, 0])
    assert value == pytest.approx(logistic(-1) * (1 / LOG3 - 0.5) + logistic(-2) * 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listnet", {"gain": "cubic"}, r"loss\.gain is 'cubic'; expected linear, exponential or"),
        ("listnet", {"label_smoothing": 1.0}, r"loss\.label_smoothing is 1\.0; expected 0 or more"),
        ("bce", {"label_smoothing": -0.1}, r"loss\.label_smoothing is -0\.1"),
        ("softmax", {"label_smoothing": 1.5}, r"loss\.label_smoothing is 1\.5"),
        ("infonce", {"label_smoothing": -1.0}, r"loss\.label_smoothing is -1\.0"),
        ("listmle", {"label_smoothing": 1.0}, r"loss\.label_smoothing is 1\.0"),
        ("ranknet", {"label_smoothing": 1.0}, r"loss\.label_smoothing is 1\.0"),
        ("lambdarank", {"label_smoothing": 1.0}, r"loss\.label_smoothing is 1\.0"),
        ("p_listmle", {"importance": "no"}, r"loss\.importance is 'no'; expected exponential or"),
        ("lambdaloss", {"scheme": "no"}, r"loss\.scheme is 'no'; expected ndcg_loss1, ndcg_loss2"),
        ("lambdaloss", {"sigma": -1.0}, r"loss\.sigma is -1\.0; expected a number above 0"),
        ("lambdarank", {"sigma": 0.0}, r"loss\.sigma is 0\.0"),
        ("lambdarank", {"k": 0}, r"loss\.k is 0"),
        ("ranknet", {"sigma": float("nan")}, r"loss\.sigma is nan"),
        ("margin", {"margin": 0.0}, r"loss\.margin is 0\.0"),
        ("infonce", {"temperature": 0.0}, r"loss\.temperature is 0\.0"),
        ("approx_ndcg", {"temperature": -1.0}, r"loss\.temperature is -1\.0"),
        ("neural_ndcg", {"temperature": 0.0}, r"loss\.temperature is 0\.0"),
        ("neural_ndcg", {"iterations": 0}, r"loss\.iterations is 0"),
        ("softmax_dpo", {"beta": 0.0}, r"loss\.beta is 0\.0"),
        ("softmax_dpo", {}, r"softmax_dpo needs the scores of a frozen reference"),
    ],
)
def test_an_impossible_option_is_named_with_what_is_possible(name, options, message):
    with pytest.raises(ConfigError, match=message):
        loss(name, [0.0, 1.0], [1, 0], **options)


def test_the_reference_gets_no_gradient():
    reference = torch.zeros(1, 2, requires_grad=True)
    scores = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    function = plugins.load("losses", "softmax_dpo")
    function(scores, torch.tensor([[1.0, 0.0]]), mask, reference=reference).sum().backward()
    assert reference.grad is None
    assert scores.grad[0].tolist() == [-0.5, 0.5]

"""Writes data/peer_losses.json: values and gradients of other packages' losses, in our units.

`test_losses_peers.py` compares with them. Made by

    pip install --no-deps --target peers allrank sentence-transformers \\
        scikit-learn joblib threadpoolctl cloudpickle narwhals
    PYTHONPATH=peers:. python tests/record_peer_losses.py

allRank asks for a PyTorch of 2021 and for torchvision. Its losses need neither, only a constant and
a function of two modules that do, which are stood in for.
"""

import json
import sys
import types
from importlib import metadata
from pathlib import Path

import torch

RECORDED = Path(__file__).parent / "data" / "peer_losses.json"
SLATES = {
    "graded": [0, 2, 1, 0, 2],
    "one": [0, 0, 1, 0, 0],
    "several": [1, 0, 1, 0, 0],
    "order": [3, 1, 0, 2, 4],
}
"""Labels by name; `order` has no ties, `one` and `several` are binary."""


def all_cases():
    """Yields (peer, our loss, our options, slates, function of scores and labels (N,))."""
    yield from _allrank()
    yield from _sentence_transformers()


def _allrank():
    stand_ins = {
        "allrank.data.dataset_loading": {"PADDED_Y_VALUE": -1},
        "allrank.models.model_utils": {"get_torch_device": lambda: torch.device("cpu")},
    }
    for name, values in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        sys.modules.setdefault(name, module)
    from allrank.models import losses
    from allrank.models.losses.loss_utils import sinkhorn_scaling

    # Theirs ends when rows and columns sum to 1 within 1e-6; its gradient is not as far by then.
    def all_iterations(matrix, mask, tol, max_iter):
        return sinkhorn_scaling(matrix, mask, tol=0.0, max_iter=max_iter)

    vars(sys.modules["allrank.models.losses.neuralNDCG"])["sinkhorn_scaling"] = all_iterations

    def padded(function, **options):
        """With two padded candidates, which have the label -1."""

        def call(s, y):
            more = torch.tensor([7.0, -3.0], dtype=s.dtype)
            s = torch.cat([s, more])[None]
            return function(s, torch.cat([y, -torch.ones_like(more)])[None], **options)

        return call

    def lambdas(scheme, **options):
        return padded(losses.lambdaLoss, weighing_scheme=scheme, **options)

    def first(s, y):
        # Their pairs hold each candidate with itself, which adds log2(2) times its weight.
        return lambdas("ndcgLoss1_scheme", sigma=2.0)(s, y) - _gain_over_discount(s, y).sum()

    steep = {"sigma": 2.0}
    yield "listNet", "listnet", {"gain": "softmax"}, "any", padded(losses.listNet)
    yield "binary_listNet", "listnet", {}, "any", padded(losses.binary_listNet)
    yield "listMLE", "listmle", {}, "order", padded(losses.listMLE)
    yield "rankNet", "ranknet", {}, "any", padded(losses.rankNet)
    yield (
        "lambdaLoss lambdaRank", "lambdarank", steep, "any",
        lambdas("lambdaRank_scheme", reduction_log="natural", **steep),
    )  # fmt: skip
    yield "lambdaLoss 1", "lambdaloss", {"scheme": "ndcg_loss1", **steep}, "any", first
    yield (
        "lambdaLoss 2", "lambdaloss", {"scheme": "ndcg_loss2", **steep}, "any",
        lambdas("ndcgLoss2_scheme", **steep),
    )  # fmt: skip
    yield (
        "lambdaLoss 2++", "lambdaloss", {"mu": 3.0, **steep}, "any",
        lambdas("ndcgLoss2PP_scheme", mu=3.0, **steep),
    )  # fmt: skip
    approximate = padded(losses.approxNDCGLoss, alpha=2.0)
    yield (
        "approxNDCG",
        "approx_ndcg",
        {"temperature": 0.5},
        "any",
        lambda s, y: 1 + approximate(s, y),
    )
    for k in (None, 2):
        neural = padded(losses.neuralNDCG, temperature=2.0, k=k)
        yield (
            "neuralNDCG", "neural_ndcg", {"temperature": 2.0, "k": k}, "any",
            lambda s, y, neural=neural: 1 + neural(s.float(), y.float()),
        )  # fmt: skip
    yield (
        "bce", "bce", {}, "binary",  # of probabilities, and a sum over the slate
        lambda s, y: losses.bce(s.sigmoid()[None], y[None]) / len(s),
    )  # fmt: skip
    rmse = padded(losses.pointwise_rmse, no_of_levels=1)
    yield "pointwise_rmse", "mse", {}, "any", lambda s, y: rmse(s, y) ** 2


def _model(scores):
    """Returns a cross-encoder that gives these scores; a document's text is its place there."""
    from sentence_transformers.cross_encoder import CrossEncoder

    class Model(CrossEncoder):
        num_labels, device = 1, torch.device("cpu")

        def __init__(self):
            torch.nn.Module.__init__(self)

        def preprocess(self, pairs, **_):
            return {"place": torch.tensor([int(document) for _, document in pairs])}

        def forward(self, features):
            return {"scores": scores[features["place"]][:, None]}

    return Model()


def _listwise(kind, **options):
    def call(s, y):
        made = kind(_model(s), mini_batch_size=-1, **options)
        return made([["query"], [[str(i) for i in range(len(s))]]], [y])

    return call


def _pointwise(kind):
    def call(s, y):
        return kind(_model(s))([["query"] * len(s), [str(i) for i in range(len(s))]], y)

    return call


def _lambdas(scheme, pairs, **options):
    """Theirs is a mean over pairs, ours a sum."""
    from sentence_transformers.cross_encoder.losses import LambdaLoss

    mean = _listwise(LambdaLoss, weighting_scheme=scheme, **options)
    return lambda s, y: mean(s, y) * pairs(y)


def _better(y):
    return int((y[:, None] > y).sum())


def _square(y):
    return len(y) ** 2


def _multiple_negatives(s, y):
    """With one positive, at the temperature 1/2."""
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    places = [int(y.argmax()), *(i for i, label in enumerate(y.tolist()) if label == 0)]
    made = MultipleNegativesRankingLoss(
        _model(s), num_negatives=0, scale=2.0, activation_fn=torch.nn.Identity()
    )
    return made([["query"], *([str(i)] for i in places)], None)


def _sentence_transformers():
    from sentence_transformers.cross_encoder import losses

    by_position = _listwise(losses.PListMLELoss, respect_input_order=False)

    def p_listmle(s, y):
        # Their weights sum to 1, and of ours the first is 1.
        n = len(s)
        ours = [(2 ** (n - i) - 1) / (2 ** (n - 1) - 1) for i in range(1, n + 1)]
        return by_position(s, y) * sum(ours)

    def first(s, y):
        one = _lambdas(losses.NDCGLoss1Scheme(), _square)
        return one(s, y) - _gain_over_discount(s, y).sum()

    yield "ListNetLoss", "listnet", {"gain": "softmax"}, "any", _listwise(losses.ListNetLoss)
    mle = _listwise(losses.ListMLELoss, respect_input_order=False)
    yield "ListMLELoss", "listmle", {}, "order", mle
    yield "PListMLELoss", "p_listmle", {}, "order", p_listmle
    ranknet = _listwise(losses.RankNetLoss, sigma=2.0, reduction_log="natural")
    yield "RankNetLoss", "ranknet", {"sigma": 2.0}, "any", ranknet
    lambdarank = _lambdas(losses.LambdaRankScheme(), _better, reduction_log="natural")
    yield "LambdaRankScheme", "lambdarank", {}, "any", lambdarank
    yield "NDCGLoss1Scheme", "lambdaloss", {"scheme": "ndcg_loss1"}, "any", first
    second = _lambdas(losses.NDCGLoss2Scheme(), _better)
    yield "NDCGLoss2Scheme", "lambdaloss", {"scheme": "ndcg_loss2"}, "any", second
    both = _lambdas(losses.NDCGLoss2PPScheme(), _better)
    yield "NDCGLoss2PPScheme", "lambdaloss", {}, "any", both
    name = "MultipleNegativesRankingLoss"
    yield name, "infonce", {"temperature": 0.5}, "one", _multiple_negatives
    yield name, "softmax", {}, "one", lambda s, y: _multiple_negatives(s / 2, y)
    yield "BinaryCrossEntropyLoss", "bce", {}, "binary", _pointwise(losses.BinaryCrossEntropyLoss)
    yield "MSELoss", "mse", {}, "any", _pointwise(losses.MSELoss)


def _gain_over_discount(s, y):
    discount = torch.log2(2.0 + torch.arange(len(s)))
    best = ((2 ** y.sort(descending=True).values - 1) / discount).sum()
    rank = s.argsort(descending=True).argsort()
    return (2**y - 1) / best / discount[rank]


def record():
    """Returns the versions and, for each case and slate, the value and gradient of the scores."""
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(5, generator=generator) for name in SLATES}
    kinds = {
        "any": tuple(SLATES),
        "binary": ("one", "several"),
        "one": ("one",),
        "order": ("order",),
    }
    rows = []
    for peer, loss, options, kind, function in all_cases():
        for name in kinds[kind]:
            s = scores[name].clone().requires_grad_()
            value = function(s, torch.tensor(SLATES[name], dtype=torch.float32))
            (gradient,) = torch.autograd.grad(value, s)
            rows.append(
                {
                    "peer": peer,
                    "loss": loss,
                    "options": options,
                    "labels": SLATES[name],
                    "scores": s.tolist(),
                    "value": float(value.detach()),
                    "gradient": gradient.tolist(),
                }
            )
    versions = {name: metadata.version(name) for name in ("allrank", "sentence-transformers")}
    return {"versions": versions, "cases": rows}


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    made = record()
    lines = ",\n".join(map(json.dumps, made["cases"]))  # a case a line
    text = f'{{"versions": {json.dumps(made["versions"])},\n"cases": [\n{lines}\n]}}\n'
    RECORDED.write_text(text, encoding="utf-8")

"""Every file in peftrank/readouts keeps the contract of `peftrank.readouts`."""

import inspect
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from peftrank import plugins
from peftrank.attention import attention_mask
from peftrank.errors import ConfigError
from peftrank.prompts import PromptTemplate, collate
from peftrank.prompts.template import TURNS

READOUTS = plugins.available("readouts")
VARIANTS = [
    ("score_head", {"width": 8, "match": True}),
    ("pooled", {"pool": "max", "match": True}),
    ("likelihood", {"normalize": "sum"}),
    ("multi_task", {"tasks": ["click", "stay"], "score": {"rank": 1.0, "click": -0.5, "stay": 2}}),
]
REQUIRED = {"multi_task": {"tasks": ["click"], "score": {"rank": 1.0, "click": 1.0}}}
WORDS = {"yes_no": {"yes_words": ["a"], "no_words": ["b"]}}
CASES = [(name, {**REQUIRED.get(name, {}), **WORDS.get(name, {})}) for name in READOUTS] + VARIANTS
BASES = ("tiny_decoder", "tiny_encoder")
PARTS = {
    "preamble": "liked\n",
    "history": "- {{ title }}\n",
    "question": "next\n",
    "candidate": "{{ title }}\n",
    "answer": "yes or no",
    "choice": "which",
}

every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())])
)
every_base = pytest.mark.parametrize("kind", BASES)


class Reading:
    """A readout on a base, and what its prompt needs."""

    def __init__(self, base, case, features=()):
        name, options = case
        self.base, self.features = base, features
        torch.manual_seed(0)
        self.readout = plugins.load("readouts", name).build(
            base.hidden_size, base.tokenizer, base.lm_head, feature_names=features, **options
        )
        self.template = PromptTemplate(
            base.tokenizer,
            parts=PARTS,
            turn=self.readout.turn,
            mode="joint" if self.readout.turn == "list" else "isolated",
            window=3,
        )

    def states_and_batch(self, slates):
        batch = collate(
            slates,
            self.template,
            pad_token_id=self.base.pad_token_id,
            feature_names=self.features,
        )
        mask = attention_mask(batch, causal=self.base.is_decoder, dtype=self.base.compute_dtype)
        with torch.no_grad():
            states = self.base.hidden_states(batch.input_ids, mask, batch.position_ids)
        return states, batch

    def scores(self, slates):
        return self.readout(*self.states_and_batch(slates))


@pytest.fixture
def reading(request):
    """Returns a maker of `Reading`s; a readout that a base cannot have skips the test."""

    def make(kind, case, **options):
        base = request.getfixturevalue(kind)
        try:
            return Reading(base, case, **options)
        except ConfigError as error:
            if kind == "tiny_encoder" and "decoder base" in str(error):
                pytest.skip("needs a vocabulary head, and says so")
            raise

    return make


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_says_where_the_candidate_stands_and_takes_what_all_take(name):
    readout = plugins.load("readouts", name)
    assert readout.turn in TURNS
    parameters = list(inspect.signature(readout.build).parameters)
    assert parameters[:4] == ["hidden_size", "tokenizer", "lm_head", "feature_names"]
    assert inspect.getdoc(readout.build)


@every_base
@every_case
def test_scores_are_float32_and_0_at_padding(kind, case, reading, make_slate):
    made = reading(kind, case)
    slates = [make_slate(n_candidates=n, seed=n) for n in (2, 5)]
    states, batch = made.states_and_batch(slates)
    for dtype in (torch.float32, torch.bfloat16):
        scores = made.readout(states.to(dtype), batch)
        assert scores.shape == (2, 5)
        assert scores.dtype == torch.float32
        assert bool(torch.isfinite(scores).all())
        assert scores[0, 2:].tolist() == [0.0] * 3
    assert scores[1].unique().numel() > 1


@every_base
@every_case
def test_padded_candidates_and_other_slates_change_nothing(kind, case, reading, make_slate):
    made = reading(kind, case)
    slates = [make_slate(n_candidates=n, seed=n, user_id="u") for n in (3, 6, 1)]
    states, batch = made.states_and_batch(slates)
    together = made.readout(states, batch)
    for s, slate in enumerate(slates):
        alone = made.scores([slate])
        torch.testing.assert_close(
            together[s, : len(slate.candidates)], alone[0], rtol=1e-4, atol=1e-4
        )
    # Whatever indices stand at padding, they are not read.
    places = {
        name: getattr(batch, name).masked_fill(~batch.mask, value)
        for name, value in {"row": 0, "end": 1, "start": 1, "stop": 3, "before": 0}.items()
    }
    torch.testing.assert_close(made.readout(states, replace(batch, **places)), together)


@every_base
@every_case
@pytest.mark.parametrize("n_history", [0, 2])
def test_one_slate_of_one_candidate_is_scored(kind, case, n_history, reading, make_slate):
    made = reading(kind, case)
    scores = made.scores([make_slate(n_history=n_history, n_candidates=1, labels=False)])
    assert scores.shape == (1, 1)
    assert bool(torch.isfinite(scores).all())


@every_base
@every_case
def test_gradients_reach_everything_that_trains_and_the_states(kind, case, reading, make_slate):
    features = ("a", "b")
    try:
        made = reading(kind, case, features=features)
    except ConfigError:
        made, features = reading(kind, case), ()
    slates = [make_slate(n_candidates=n, seed=n, features=features[:1]) for n in (3, 4)]
    states, batch = made.states_and_batch(slates)
    states.requires_grad_()
    scores = made.readout(states, batch)
    weights = torch.linspace(-1, 2, scores.numel()).view(scores.shape)
    (scores * weights).sum().backward()
    assert float(states.grad.abs().max()) > 0
    for name, parameter in made.readout.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@every_base
@every_case
def test_a_saved_readout_scores_the_same(kind, case, reading, make_slate):
    made = reading(kind, case)
    slates = [make_slate(n_candidates=3, seed=1)]
    states, batch = made.states_and_batch(slates)
    expected = made.readout(states, batch)
    with torch.no_grad():
        for parameter in made.readout.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    changed = made.readout(states, batch)
    saved = save({name: t.contiguous() for name, t in made.readout.state_dict().items()})
    again = reading(kind, case)
    torch.testing.assert_close(again.readout(states, batch), expected)
    again.readout.load_state_dict(load(saved), strict=True)
    torch.testing.assert_close(again.readout(states, batch), changed)
    if any(True for _ in made.readout.parameters()):
        assert not torch.allclose(changed, expected)


@every_base
@every_case
def test_the_order_of_isolated_candidates_never_matters(kind, case, reading, make_slate):
    made = reading(kind, case)
    if made.template.mode != "isolated":
        pytest.skip("reads candidates one after another")
    slate = make_slate(n_candidates=5, seed=3)
    order = [3, 0, 4, 2, 1]
    moved = replace(slate, candidates=tuple(slate.candidates[i] for i in order))
    expected, found = made.scores([slate])[0], made.scores([moved])[0]
    torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-4)

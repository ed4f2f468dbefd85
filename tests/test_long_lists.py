"""Lists longer than a row, and slates longer than a pass: how they are cut changes no score."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import _random_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_attention import ends
from test_ranker import METHODS, PARTS, publish

from peftrank import plugins
from peftrank import ranker as ranking
from peftrank.base import base_from_model
from peftrank.config import load_config
from peftrank.doctor import memory_plan
from peftrank.formats.slates import write_slates
from peftrank.model import RankingModel, hidden_states
from peftrank.prompts import PromptTemplate, collate, pack
from peftrank.prompts.tree import CandidateTokens, grow, windows
from peftrank.ranker import Ranker
from peftrank.training import train
from peftrank.training.bottom import Bottom

HUGE = 10**7
_text = st.lists(st.integers(4, 99), min_size=1, max_size=5).map(tuple)
_trees = st.lists(
    st.builds(
        lambda trunk, texts: grow(
            "s", trunk, [CandidateTokens(text, 0, 1) for text in texts], mode="isolated"
        ),
        st.lists(_text, max_size=4),
        st.lists(_text, min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(params=["tiny_decoder", "tiny_encoder"])
def base(request):
    return request.getfixturevalue(request.param)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(trees=_trees, row_tokens=st.integers(1, 60))
def test_a_candidate_gets_the_same_state_in_whichever_row_it_lies(base, trees, row_tokens):
    for tree, found in zip(trees, ends(base, trees, row_tokens=row_tokens), strict=True):
        torch.testing.assert_close(
            found, ends(base, [tree], row_tokens=HUGE)[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("match", [False, True])
def test_gradients_are_those_of_one_row(base, make_slate, match):
    """Of the adapter and of a head that reads the trunk and features."""
    head = plugins.load("readouts", "score_head").build(
        base.hidden_size, base.tokenizer, None, feature_names=("a",), match=match
    )
    targets = r".*(q_proj|query|down_proj|output\.dense)"
    get_peft_model(base.model, LoraConfig(target_modules=targets, init_lora_weights=False))
    model = RankingModel(base, head)
    template = PromptTemplate(base.tokenizer, parts=PARTS)
    slates = [make_slate(n, 60, seed=n, user_id="u", features=("a",)) for n in (0, 2, 3)]
    loss = plugins.load("losses", "listnet")

    def gradients(row_tokens):
        model.zero_grad()
        batch = collate(
            slates, template, pad_token_id=0, row_tokens=row_tokens, feature_names=("a",)
        )
        scores = model(batch)
        loss(scores, batch.labels, batch.mask).sum().backward()
        named = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return batch, scores.detach(), named

    one, expected, whole = gradients(HUGE)
    several, found, split = gradients(60)
    assert one.input_ids.shape[0] == 1
    assert all(len(rows.unique()) > 1 for rows in several.row)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert whole.keys() == split.keys()
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def exact(tokenizer, tmp_path_factory):
    """A ranker of three domains and methods that computes in float64: rounding hides nothing."""
    base = base_from_model(_random_llama(tokenizer).double(), tokenizer, name="tiny-decoder")
    folder = tmp_path_factory.mktemp("exact")
    with Ranker(base, store=folder) as ranker:
        for seed, domain in enumerate(METHODS):
            publish(base, folder, domain, seed=seed)
            ranker.load_adapter(domain)
        yield ranker


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 300), micro=st.integers(1, 2000))
def test_passes_over_rows_of_several_domains_give_the_scores_of_a_row_each(
    exact, make_slate, seed, rows, micro
):
    rng = random.Random(seed)
    slates = [
        make_slate(
            n_history=rng.randrange(6),
            n_candidates=rng.choice((1, 2, 8, 30)),
            seed=rng.randrange(10**6),
            user_id=f"u{rng.randrange(2)}",
            domain=rng.choice(list(METHODS)),
        )
        for _ in range(rng.randrange(1, 6))
    ]
    exact._row_tokens = exact._micro_tokens = HUGE
    expected = [exact.score(slate) for slate in slates]
    exact._row_tokens, exact._micro_tokens = rows, micro
    for found, one in zip(exact.score(slates), expected, strict=True):
        assert found == pytest.approx(one, abs=2e-6)  # a readout computes in float32


@pytest.fixture
def sizes(monkeypatch):
    """The tokens of each forward pass of a ranker."""
    sizes = []
    monkeypatch.setattr(
        ranking,
        "hidden_states",
        lambda base, batch, **more: (
            sizes.append(batch.input_ids.numel()) or hidden_states(base, batch, **more)
        ),
    )
    return sizes


def test_500_candidates_and_500_history_items_are_ranked_in_bounded_passes(
    tiny_decoder, tmp_path, make_slate, sizes
):
    parts = PARTS | {"candidate": "{{ title }} question for this user: yes no"}
    prompt = PromptTemplate(
        tiny_decoder.tokenizer, parts=parts, history_length=500, max_tokens=8000
    ).describe()
    publish(tiny_decoder, tmp_path, "news", prompt=prompt, features=("a",))
    for n_history, most in ((10, 1000), (500, 5000)):
        ranker = Ranker(tiny_decoder, store=tmp_path, micro_tokens=most)
        ranker.load_adapter("news")
        slate = make_slate(n_history, 500, domain="news", features=("a",))
        twin = replace(slate.candidates[3], item_id="twin")  # in another row than its twin
        slate = replace(slate, candidates=(*slate.candidates[:-1], twin))
        sizes.clear()
        (prepared,) = ranker.prepare([slate])
        assert len(prepared.history_read) == n_history
        scores = ranker.score(slate)
        passes = list(sizes)
        assert len(passes) > 1
        assert max(passes) <= most
        assert scores[3] == scores[-1]
        ranker._row_tokens = ranker._micro_tokens = HUGE
        assert scores == pytest.approx(ranker.score(slate), abs=1e-4)
        assert len(sizes) == len(passes) + 1


def test_windows_with_letters_are_ranked_in_bounded_passes(tiny_decoder, make_slate, sizes):
    ranker = Ranker(tiny_decoder, micro_tokens=700)
    prompt = {"parts": PARTS, "mode": "joint", "window": 7}
    ranker.load_readout("news", prompt=prompt, readout="identifier")
    slate = make_slate(5, 300, domain="news")
    scores = ranker.score(slate)
    assert len(sizes) > 2
    assert max(sizes) <= 700
    keeping = Ranker(tiny_decoder, micro_tokens=700, prefix_bytes=2**24)
    keeping.load_readout("news", prompt=prompt, readout="identifier")
    for _ in range(2):
        assert keeping.score(slate) == pytest.approx(scores, abs=1e-4)
    assert keeping.prefix_tokens > 0
    ranker._row_tokens = ranker._micro_tokens = HUGE
    assert scores == pytest.approx(ranker.score(slate), abs=1e-4)
    # A window is the list of its members behind the first candidate.
    members = (0, *windows(300, 7)[1])
    alone = replace(slate, candidates=tuple(slate.candidates[i] for i in members))
    assert ranker.score(alone) == pytest.approx([scores[i] for i in members], abs=1e-4)


@pytest.fixture
def long_config(workplace, tmp_path, make_slate):
    """A training whose slates of 500 candidates are far longer than its passes and rows."""
    data = {}
    for part, count in (("train", 4), ("valid", 2)):
        slates = [make_slate(3, 500, seed=i, features=("a",)) for i in range(count)]
        data[f"data.{part}"] = tmp_path / f"{part}.jsonl"
        write_slates(data[f"data.{part}"], slates)
    return lambda **overrides: load_config(
        domain="news",
        method="lora",
        overrides={
            "base.name": str(workplace / "base"),
            "base.quantization": "none",
            "base.compute_dtype": "float32",
            "method.layers": "all",
            "training.max_steps": 2,
            "training.batch_size": 2,
            "training.micro_tokens": 100,
            **data,
            **overrides,
        },
    )


def test_training_on_slates_longer_than_a_pass_publishes_what_it_trained(long_config, tmp_path):
    """Publishing compares the passes of training with those of a ranker."""
    train(long_config(), output=tmp_path / "store")
    plan = memory_plan(long_config())
    assert plan.measured
    assert plan.rows > 1
    assert plan.rows * plan.tokens > 1024  # one slate


def test_lists_with_letters_train_in_windows(long_config, tmp_path):
    letters = {"readout.name": "identifier", "prompt.mode": "joint", "data.features": []}
    before = memory_plan(long_config(**letters))
    path = train(long_config(**letters, **{"training.learning_rate": 0.05}), output=tmp_path)
    assert before.measured
    assert before.rows > 1
    weights = load_file(path / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["tiny_decoder", "tiny_encoder"])
def test_what_is_kept_of_the_lower_layers_fits_a_list_in_rows(kind, request, make_slate):
    base = request.getfixturevalue(kind)
    template = PromptTemplate(base.tokenizer, parts=PARTS)
    trees = [template.tree(make_slate(3, n, seed=n)) for n in (50, 4)]
    kept = Bottom(base, 1, trees)
    for row_tokens in (60, 512):
        batch = pack(trees, pad_token_id=base.pad_token_id, row_tokens=row_tokens)
        with torch.no_grad():
            whole = hidden_states(base, batch)
            found = hidden_states(base, batch, kept.entering(batch))
        real = batch.segment_ids >= 0
        torch.testing.assert_close(found[real], whole[real], atol=1e-5, rtol=1e-5)

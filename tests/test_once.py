"""What rows share is computed once: states, gradients and scores stay, and tokens are fewer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from peftrank import plugins
from peftrank.base import base_from_model
from peftrank.model import RankingModel, hidden_states, move
from peftrank.prompts import PromptTemplate, computed_tokens, pack, token_count
from peftrank.prompts.tree import CandidateTokens, grow
from peftrank.types import Item
from tests.test_prompts_pack import _trees
from tests.tiny import DECODERS, tiny_model

PARTS = {"history": "- {{ title }}\n", "question": "Next:", "candidate": " {{ title }}"}


def successive(shown=5, before=6, candidates=3):
    """Trees of a user's lists, each behind one history item more than the last."""
    items = [(10 + i,) * 4 for i in range(before + shown)]
    return [
        grow(
            "s",
            [(1, 2), *items[: before + n], (3,)],
            [CandidateTokens((40 + n, 60 + c), 0, 2) for c in range(candidates)],
            mode="isolated",
        )
        for n in range(shown)
    ]


def distinct_tokens(trees):
    """Tokens of the segments that differ in their path."""
    paths = {}
    for tree in trees:
        own = []
        for segment in tree.segments:
            above = () if segment.parent < 0 else own[segment.parent]
            own.append((*above, segment.tokens))
        paths |= {path: len(path[-1]) for path in own}
    return sum(paths.values())


@pytest.fixture(scope="module")
def decoders(tokenizer):
    return {
        kind: base_from_model(tiny_model(kind, len(tokenizer)), tokenizer, name=kind)
        for kind in DECODERS
    }


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(DECODERS)),
    trees=st.one_of(_trees, _trees.map(lambda trees: successive() + trees)),
    row_tokens=st.integers(4, 60),
)
def test_states_are_those_of_tokens_computed_in_every_row(decoders, kind, trees, row_tokens):
    """Of every architecture, sliding windows included; real tokens of all rows."""
    base = decoders[kind]
    batch = pack(trees, pad_token_id=1, row_tokens=row_tokens, once=True)
    with torch.inference_mode():
        once = hidden_states(base, batch)
        everywhere = hidden_states(base, replace(batch, once=None))
    real = batch.segment_ids >= 0
    torch.testing.assert_close(once[real], everywhere[real], atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(_trees.map(lambda trees: successive() + trees), st.integers(4, 60))
def test_every_token_that_differs_is_computed_once(trees, row_tokens):
    batch = pack(trees, pad_token_id=1, row_tokens=row_tokens, once=True)
    plain = pack(trees, pad_token_id=1, row_tokens=row_tokens)
    if batch.once is None:
        assert torch.equal(batch.input_ids, plain.input_ids)
        return
    rows, places = batch.once.row[:, None], batch.once.place
    assert computed_tokens(batch) <= computed_tokens(plain)
    assert places.numel() <= plain.input_ids.numel()  # the promise of micro_batches
    computed = batch.input_ids[rows, places.clamp(min=0)].flatten()
    depths = batch.position_ids[rows, places.clamp(min=0)].flatten()
    real = batch.segment_ids >= 0
    found = batch.once.found[real]
    assert torch.equal(computed[found], batch.input_ids[real])
    assert torch.equal(depths[found], batch.position_ids[real])
    assert len(found.unique()) == computed_tokens(batch)


def test_successive_lists_of_a_user_compute_the_history_once():
    trees = successive(shown=10, before=40, candidates=20)
    batch = pack(trees, pad_token_id=1, once=True)
    assert batch.once is not None
    assert computed_tokens(batch) == distinct_tokens(trees)
    assert computed_tokens(batch) < 0.45 * sum(map(token_count, trees))
    assert batch.once.place.numel() < 1.2 * computed_tokens(batch)  # little padding


def test_lists_that_share_nothing_are_packed_as_ever():
    trees = [
        grow("s", [(n,) * 30], [CandidateTokens((n, c), 0, 2) for c in range(4)], mode="isolated")
        for n in range(6)
    ]
    assert pack(trees, pad_token_id=1, once=True).once is None


def test_gradients_are_those_of_tokens_computed_in_every_row(tiny_decoder, make_slate):
    base = tiny_decoder
    head = plugins.load("readouts", "score_head").build(base.hidden_size, base.tokenizer, None)
    targets = r".*(q_proj|k_proj|v_proj|down_proj)"
    get_peft_model(base.model, LoraConfig(target_modules=targets, init_lora_weights=False))
    model = RankingModel(base, head)
    template = PromptTemplate(base.tokenizer, parts=PARTS)
    first = make_slate(12, 3, seed=0)
    slates = [
        replace(
            first,
            slate_id=str(n),
            history=(*first.history, *(Item(f"x{i}", {"title": "amber"}) for i in range(n))),
            candidates=make_slate(1, 3, seed=n).candidates,
        )
        for n in range(4)
    ]
    trees = [template.tree(slate) for slate in slates]
    labels = [slate.labels for slate in slates]
    batch = pack(trees, pad_token_id=0, row_tokens=1, once=True, labels=labels)
    assert batch.once is not None
    loss = plugins.load("losses", "listnet")

    def gradients(given):
        model.zero_grad()
        loss(model(move(given, base.device)), given.labels, given.mask).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    once, everywhere = gradients(batch), gradients(replace(batch, once=None))
    assert any(bool(value.any()) for value in once.values())
    for name, value in once.items():
        torch.testing.assert_close(value, everywhere[name], atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.integers(4, 60))
def test_spans_tell_whose_the_computed_tokens_are(groups, row_tokens):
    trees = successive()
    batch = pack(trees, pad_token_id=1, row_tokens=row_tokens, once=True, groups=groups)
    size = batch.input_ids.numel() if batch.once is None else batch.once.place.numel()
    stops = [0, *(stop for _, _, stop in batch.spans)]
    assert [start for _, start, _ in batch.spans] == stops[:-1]
    assert stops[-1] == size
    owner = torch.cat([torch.full((stop - start,), g) for g, start, stop in batch.spans])
    for s, group in enumerate(groups):
        for row, end in zip(batch.row[s].tolist(), batch.end[s].tolist(), strict=True):
            at = row * batch.input_ids.shape[1] + end
            place = at if batch.once is None else int(batch.once.found[row, end])
            assert int(owner[place]) == group

"""Readouts on a tiny base, against the plain language-model computation."""

import math
from dataclasses import replace

import pytest
import torch

from peftrank.attention import attention_mask
from peftrank.errors import ConfigError, DataError
from peftrank.prompts import PromptTemplate, collate
from peftrank.prompts.tree import path_tokens, windows
from peftrank.readouts.identifier import Identifier
from peftrank.readouts.likelihood import Likelihood
from peftrank.readouts.multi_task import MultiTask
from peftrank.readouts.pooled import Pooled
from peftrank.readouts.score_head import ScoreHead
from peftrank.readouts.yes_no import YesNo

PARTS = {
    "preamble": "liked\n",
    "history": "- {{ title }}\n",
    "question": "next\n",
    "candidate": "{{ title }}\n",
    "answer": "yes or no",
}


def states_and_batch(base, template, slates, **options):
    batch = collate(slates, template, pad_token_id=base.pad_token_id, **options)
    mask = attention_mask(batch, causal=base.is_decoder, dtype=base.compute_dtype)
    with torch.no_grad():
        return base.hidden_states(batch.input_ids, mask, batch.position_ids), batch


def built(readout, base, **options):
    return readout.build(base.hidden_size, base.tokenizer, base.lm_head, **options)


def test_likelihood_is_the_mean_log_probability_of_the_candidates_text(tiny_decoder, make_slate):
    readout = built(Likelihood, tiny_decoder)
    template = PromptTemplate(tiny_decoder.tokenizer, parts=PARTS, turn=readout.turn)
    slates = [make_slate(n_candidates=3, seed=1), make_slate(n_candidates=5, seed=2)]
    states, batch = states_and_batch(tiny_decoder, template, slates)
    scores = readout(states, batch)
    assert scores.shape == (2, 5)
    for s, slate in enumerate(slates):
        tree = template.tree(slate)
        for c, span in enumerate(tree.candidates):
            path = torch.tensor([path_tokens(tree, span.segment)])
            with torch.no_grad():
                log_p = tiny_decoder.model(path).logits.log_softmax(-1)[0]
            first = path.shape[1] - len(tree.segments[span.segment].tokens)
            wanted = range(first + span.start, first + span.stop)
            expected = torch.stack([log_p[t - 1, path[0, t]] for t in wanted]).mean()
            assert float(scores[s, c]) == pytest.approx(float(expected), abs=1e-4)
    assert scores[0, 3:].tolist() == [0.0, 0.0]


def test_yes_no_is_the_difference_of_the_answers_logits(tiny_decoder, make_slate):
    words = {"yes_words": ["a"], "no_words": ["b"]}
    readout = built(YesNo, tiny_decoder, **words)
    yes, no = (tiny_decoder.tokenizer.encode(w, add_special_tokens=False)[0] for w in "ab")
    template = PromptTemplate(tiny_decoder.tokenizer, parts=PARTS, turn=readout.turn)
    slate = make_slate(n_candidates=3)
    states, batch = states_and_batch(tiny_decoder, template, [slate])
    scores = readout(states, batch)
    tree = template.tree(slate)
    for c, span in enumerate(tree.candidates):
        path = torch.tensor([path_tokens(tree, span.segment)])
        with torch.no_grad():
            logits = tiny_decoder.model(path).logits[0, -1]
        expected = float(logits[yes] - logits[no])
        assert float(scores[0, c]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("readout", [YesNo, Likelihood])
def test_token_readouts_refuse_an_encoder(readout, tiny_encoder):
    with pytest.raises(ConfigError, match="decoder base"):
        built(readout, tiny_encoder)


@pytest.mark.parametrize("readout", [YesNo, Likelihood])
def test_token_readouts_refuse_features(readout, tiny_decoder):
    with pytest.raises(ConfigError, match="score_head"):
        built(readout, tiny_decoder, feature_names=("popularity",))


def test_score_head_standardises_with_the_training_statistics(tiny_encoder):
    head = built(ScoreHead, tiny_encoder, feature_names=("a", "b"))
    head.fit_features(torch.tensor([3.0, 5.0]), torch.tensor([1.5, 0.0]))
    assert head.feature_mean.tolist() == [3.0, 5.0]
    assert head.feature_std[0] == 1.5
    assert head.feature_std[1] == 1.0  # a constant feature is not divided by zero


@pytest.mark.parametrize("mode", ["isolated", "joint"])
def test_a_matching_score_head_reads_the_trunk_and_ignores_other_slates(
    mode, tiny_decoder, make_slate
):
    head = built(ScoreHead, tiny_decoder, match=True, width=8)
    template = PromptTemplate(tiny_decoder.tokenizer, parts=PARTS, mode=mode)
    slates = [make_slate(n_candidates=3, seed=1), make_slate(n_candidates=5, seed=2)]
    together = head(*states_and_batch(tiny_decoder, template, slates))
    for s, slate in enumerate(slates):
        states, batch = states_and_batch(tiny_decoder, template, [slate])
        alone = head(states, batch)
        assert torch.allclose(together[s, : len(slate.candidates)], alone[0], atol=1e-5)
        trunk = int(batch.trunk[0])
        states[0, trunk] += torch.linspace(-1, 1, states.shape[-1])
        assert not torch.allclose(head(states, batch), alone, atol=1e-3)


def test_a_matching_score_head_reads_no_candidate_for_the_trunk(tiny_encoder, make_slate):
    """An encoder's words before the title see the title."""
    head = built(ScoreHead, tiny_encoder, match=True)
    parts = {**PARTS, "candidate": "item {{ title }}"}
    template = PromptTemplate(tiny_encoder.tokenizer, parts=parts)
    slate = make_slate(n_candidates=4)
    turned = replace(slate, candidates=slate.candidates[::-1], labels=None)
    scores = head(*states_and_batch(tiny_encoder, template, [slate]))
    torch.testing.assert_close(
        head(*states_and_batch(tiny_encoder, template, [turned])).flip(1), scores
    )


def test_a_matching_score_head_without_a_trunk_ignores_other_slates(tiny_decoder, make_slate):
    head = built(ScoreHead, tiny_decoder, match=True)
    parts = {**PARTS, "preamble": "", "question": ""}
    template = PromptTemplate(tiny_decoder.tokenizer, parts=parts, history_length=0, chat="off")
    slates = [make_slate(n_candidates=3, seed=seed) for seed in (1, 2)]
    together = head(*states_and_batch(tiny_decoder, template, slates))
    alone = head(*states_and_batch(tiny_decoder, template, slates[:1]))
    torch.testing.assert_close(together[:1], alone)


def test_a_missing_feature_has_a_learned_value(tiny_encoder, make_slate):
    head = built(ScoreHead, tiny_encoder, feature_names=("a", "b"))
    template = PromptTemplate(tiny_encoder.tokenizer, parts=PARTS)
    slates = [make_slate(features=("a",))]
    states, batch = states_and_batch(tiny_encoder, template, slates, feature_names=("a", "b"))
    before = head(states, batch)
    before.sum().backward()
    assert head.missing.grad[1] != 0.0
    assert head.missing.grad[0] == 0.0
    with torch.no_grad():
        head.missing[1] = 2.0
    assert not torch.equal(before, head(states, batch))


def test_slates_without_features_are_refused_by_a_readout_that_has_some(tiny_encoder, make_slate):
    head = built(ScoreHead, tiny_encoder, feature_names=("a",))
    template = PromptTemplate(tiny_encoder.tokenizer, parts=PARTS)
    states, batch = states_and_batch(tiny_encoder, template, [make_slate()])
    with pytest.raises(ConfigError, match="the slates carry none"):
        head(states, batch)


def test_pooled_is_the_mean_or_maximum_of_the_candidates_own_tokens(tiny_encoder, make_slate):
    parts = {**PARTS, "candidate": "item: {{ title }} end"}
    template = PromptTemplate(tiny_encoder.tokenizer, parts=parts)
    slates = [make_slate(n_candidates=3, seed=1), make_slate(n_candidates=5, seed=2)]
    states, batch = states_and_batch(tiny_encoder, template, slates)
    for pool in ("mean", "max"):
        readout = built(Pooled, tiny_encoder, pool=pool, width=0)
        scores = readout(states, batch)
        for s, slate in enumerate(slates):
            for c in range(len(slate.candidates)):
                row, start, stop = (int(x[s, c]) for x in (batch.row, batch.start, batch.stop))
                text = states[row, start:stop]
                read = text.mean(0) if pool == "mean" else text.max(0).values
                expected = readout.head.text(readout.head.norm(read))
                assert float(scores[s, c]) == pytest.approx(float(expected), abs=1e-5)


def test_pooled_shares_the_features_of_the_score_head(tiny_encoder, make_slate):
    readout = built(Pooled, tiny_encoder, feature_names=("a",))
    readout.fit_features(torch.tensor([2.0]), torch.tensor([1.0]))
    assert readout.head.feature_mean.tolist() == [2.0]
    template = PromptTemplate(tiny_encoder.tokenizer, parts=PARTS)
    slate = make_slate(features=("a",))
    states, batch = states_and_batch(tiny_encoder, template, [slate], feature_names=("a",))
    more = replace(batch, features=batch.features + 1)
    assert not torch.allclose(readout(states, batch), readout(states, more))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"readout\.tasks is empty"),
        ({"tasks": ["click", "click"]}, r"readout\.tasks names 'click'"),
        ({"tasks": ["rank"]}, r"readout\.tasks names 'rank'"),
        ({"tasks": ["a.b"]}, r"readout\.tasks names 'a\.b'"),
        ({"tasks": ["click"], "score": "buy"}, r"readout\.score is 'buy'; expected one of rank, "),
        ({"tasks": ["click"], "score": {"rank": 0}}, "weights that are not all 0"),
    ],
)
def test_impossible_tasks_are_named(tiny_encoder, options, message):
    with pytest.raises(ConfigError, match=message):
        built(MultiTask, tiny_encoder, **options)


def test_the_score_of_many_tasks_is_the_mix_of_the_heads(tiny_encoder, make_slate):
    template = PromptTemplate(tiny_encoder.tokenizer, parts=PARTS)
    states, batch = states_and_batch(tiny_encoder, template, [make_slate()])
    mix = {"rank": 0.5, "stay": -2.0}
    readout = built(MultiTask, tiny_encoder, tasks=["click", "stay"], score=mix)
    heads = readout.by_task(states, batch)
    assert list(heads) == ["rank", "click", "stay"]
    expected = 0.5 * heads["rank"] - 2.0 * heads["stay"]
    torch.testing.assert_close(readout(states, batch), expected)


def lettered(base, **options):
    parts = {**PARTS, "candidate": "{{ title }}", "choice": "\nquestion"}
    return PromptTemplate(base.tokenizer, parts=parts, mode="joint", turn="list", **options)


@pytest.mark.parametrize(
    ("window", "letters", "lists"),
    [
        (20, "ABCDEF", [(1, 2, 3, 4, 5)]),
        (3, "ABBCBC", [(1,), (2, 3), (4, 5)]),
        (2, "ABBBBB", [(1,), (2,), (3,), (4,), (5,)]),
    ],
)
def test_identifier_is_the_log_odds_of_two_letters_in_an_ordinary_prompt(
    window, letters, lists, tiny_decoder, make_slate
):
    template = lettered(tiny_decoder, window=window)
    slate = make_slate(n_candidates=6)
    titles = [item.fields["title"] for item in slate.candidates]
    readout = built(Identifier, tiny_decoder, forms=("{}",))
    scores = readout(*states_and_batch(tiny_decoder, template, [slate]))
    tree = template.tree(slate)
    names = tiny_decoder.tokenizer.convert_tokens_to_ids(list("ABCDEF"))
    for members in lists:
        path = path_tokens(tree, tree.answers[members[0]])
        named = "".join(f"\n[{letters[i]}] {titles[i]}" for i in (0, *members))
        assert named + "\nquestion<|im_end|>" in tiny_decoder.tokenizer.decode(list(path))
        with torch.no_grad():
            logits = tiny_decoder.model(torch.tensor([path])).logits[0, -1]
        for i in members:
            expected = logits[names["ABCDEF".index(letters[i])]] - logits[names[0]]
            assert float(scores[0, i]) == pytest.approx(float(expected), abs=1e-4)
    assert float(scores[0, 0]) == 0.0
    assert float(scores.std()) > 1e-2


def test_identifier_adds_up_the_ways_to_write_a_letter(tiny_decoder, make_slate):
    slate, template = make_slate(n_candidates=4), lettered(tiny_decoder)
    given = states_and_batch(tiny_decoder, template, [slate])
    readout = Identifier(torch.stack([torch.randn(26, 32), torch.randn(26, 32)], dim=1))
    each = [given[0][0, given[1].end[0, 0]] @ readout.rows[:, form].T for form in (0, 1)]
    logits = torch.logsumexp(torch.stack(each), dim=0)[:4]
    torch.testing.assert_close(readout(*given)[0], logits - logits[0])


def test_windows_are_equal_and_hold_every_candidate_but_the_first_once():
    for count in range(1, 120):
        for most in (2, 3, 20, 26):
            found = windows(count, most)
            assert [index for members in found for index in members] == list(range(1, count))
            assert max(map(len, found)) - min(map(len, found)) <= 1
            assert max(map(len, found)) <= most - 1
            assert len(found) == max(1, math.ceil((count - 1) / (most - 1)))


def test_identifier_needs_a_list_single_tokens_and_no_features(tiny_decoder, make_slate):
    with pytest.raises(ConfigError, match="cannot use candidate features"):
        built(Identifier, tiny_decoder, feature_names=("a",))
    with pytest.raises(ConfigError, match="none of the forms"):
        built(Identifier, tiny_decoder, forms=("<{}>",))
    for mode in ("isolated", "set"):
        with pytest.raises(ConfigError, match=rf"identifier.*prompt.mode: joint; given: {mode}"):
            PromptTemplate(tiny_decoder.tokenizer, parts=PARTS, mode=mode, turn="list")
    with pytest.raises(ConfigError, match="window is 27"):
        lettered(tiny_decoder, window=27)
    plain = PromptTemplate(tiny_decoder.tokenizer, parts=PARTS, mode="joint")
    given = states_and_batch(tiny_decoder, plain, [make_slate()])
    with pytest.raises(ConfigError, match="without letters"):
        built(Identifier, tiny_decoder)(*given)


def test_a_window_that_is_too_long_names_its_bounds(tiny_decoder, make_slate):
    slate = make_slate(n_history=0, n_candidates=60)
    lettered(tiny_decoder, window=2, max_tokens=100).tree(slate)
    with pytest.raises(DataError, match=r"prompt\.max_tokens.*prompt\.window"):
        lettered(tiny_decoder, max_tokens=100).tree(slate)

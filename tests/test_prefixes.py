import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DECODERS, tiny_model

from peftrank.base import base_from_model
from peftrank.model import hidden_states
from peftrank.prefixes import Prefix, Prefixes, Reading
from peftrank.prompts import pack
from peftrank.prompts.tree import CandidateTokens, grow, last_of_trunk
from peftrank.ranker import Ranker
from peftrank.types import Item
from tests.test_prompts_pack import _trees
from tests.test_ranker import publish

PLENTY = 2**30


def tree(*trunk, candidates=((9,),), mode="isolated"):
    leaves = [CandidateTokens(tokens, 0, len(tokens)) for tokens in candidates]
    return grow("s", trunk, leaves, mode=mode)


def prefix(tokens):
    return Prefix(torch.zeros(1, 2, 1, tokens, 4))


def kept(prefixes, owner, *trunk):
    """Returns the prefixes, with what a pass over this trunk leaves."""
    found = prefixes.find(owner, tree(*trunk))
    prefixes.keep(owner, tree(*trunk), found, [prefix(len(t)) for t in trunk[len(found) : -1]])


def known(prefixes, owner, *trunk):
    return len(prefixes.find(owner, tree(*trunk)))


class TestPrefixes:
    def test_a_longer_trunk_finds_all_it_has_in_common_but_the_last_segment_of_the_first(self):
        prefixes = Prefixes(PLENTY)
        kept(prefixes, "a", (1,), (2,), (3,))
        assert known(prefixes, "a", (1,), (2,), (4,), (3,)) == 2
        assert known(prefixes, "a", (1,), (5,), (3,)) == 1
        assert known(prefixes, "a", (2,), (1,), (3,)) == 0

    def test_the_last_segment_of_a_trunk_is_never_known(self):
        prefixes = Prefixes(PLENTY)
        kept(prefixes, "a", (1,), (2,), (3,))
        assert known(prefixes, "a", (1,), (2,)) == 1
        assert known(prefixes, "a", (1,)) == 0

    def test_owners_share_nothing_and_one_is_forgotten_alone(self):
        prefixes = Prefixes(PLENTY)
        kept(prefixes, "a", (1,), (2,), (3,))
        assert known(prefixes, "b", (1,), (2,), (3,)) == 0
        kept(prefixes, "b", (1,), (2,), (3,))
        both = prefixes.nbytes
        prefixes.forget("a")
        assert prefixes.nbytes == both / 2
        assert known(prefixes, "a", (1,), (2,), (3,)) == 0
        assert known(prefixes, "b", (1,), (2,), (3,)) == 2

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.lists(st.tuples(st.integers(0, 2)), min_size=1, max_size=5), min_size=1, max_size=30
        ),
        st.integers(1, 12),
    )
    def test_the_budget_holds_and_nothing_is_kept_without_its_parent(self, trunks, segments):
        prefixes = Prefixes(segments * prefix(1).keys_values.nbytes)
        for trunk in trunks:
            kept(prefixes, "a", *trunk)
            assert prefixes.nbytes <= prefixes.budget
            assert prefixes.nbytes == sum(p.keys_values.nbytes for p, _ in prefixes._kept.values())
            there = {id(p) for p, _ in prefixes._kept.values()}
            assert all(parent == "a" or id(parent) in there for parent, _ in prefixes._kept)

    def test_what_was_used_longest_ago_goes_first(self):
        prefixes = Prefixes(3 * prefix(1).keys_values.nbytes)
        kept(prefixes, "a", (1,), (2,), (0,))
        kept(prefixes, "a", (1,), (3,), (0,))
        assert known(prefixes, "a", (1,), (2,), (0,)) == 2  # a use
        kept(prefixes, "a", (1,), (4,), (0,))
        assert known(prefixes, "a", (1,), (2,), (0,)) == 2
        assert known(prefixes, "a", (1,), (3,), (0,)) == 1


@pytest.fixture(scope="module")
def decoders(tokenizer):
    return {
        kind: base_from_model(tiny_model(kind, len(tokenizer)), tokenizer, name=kind)
        for kind in DECODERS
    }


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(DECODERS)),
    trees=_trees,
    shares=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    row_tokens=st.integers(4, 40),
)
def test_states_behind_known_segments_are_those_of_the_whole(
    decoders, kind, trees, shares, row_tokens
):
    """Of every architecture, sliding windows included, whatever part of each trunk is known."""
    base, prefixes = decoders[kind], Prefixes(PLENTY)
    arguments = {"pad_token_id": 1, "row_tokens": row_tokens}

    def states(known):
        batch = pack(trees, known=[len(found) for found in known], **arguments)
        reading = Reading(batch.past, known)
        with torch.inference_mode():
            read = hidden_states(base, batch, reading=reading)
        for tree, found, left in zip(trees, known, reading.left(), strict=True):
            assert len(found) + len(left) == last_of_trunk(tree)
            prefixes.keep("", tree, found, left)
        return read[batch.row, batch.end][batch.mask]

    plain = pack(trees, **arguments)
    with torch.inference_mode():
        expected = hidden_states(base, plain)[plain.row, plain.end][plain.mask]
    found = [()] * len(trees)
    for _ in range(2):
        assert torch.allclose(states(found), expected, atol=1e-5)
        found = [prefixes.find("", tree) for tree in trees]
        assert [len(f) for f in found] == [last_of_trunk(tree) for tree in trees]
        found = [f[: round(share * len(f))] for f, share in zip(found, shares, strict=False)]


@pytest.fixture
def folders(tiny_decoder, tmp_path):
    found = {}
    for domain, mode in (("news", "isolated"), ("video", "set"), ("social", "joint")):
        found[domain] = publish(tiny_decoder, tmp_path, domain, mode=mode, seed=len(found))[0]
    return found


def rankers(base, folders, **options):
    plain, caching = Ranker(base), Ranker(base, prefix_bytes=PLENTY, **options)
    for ranker in (plain, caching):
        for domain, folder in folders.items():
            ranker.load_adapter(folder, domain=domain)
    return plain, caching


def grown(slate, title, number=0):
    """Returns the user's next slate: one more item in the history, another id."""
    item = Item(f"new-{title}", {"title": title})
    return replace(slate, slate_id=f"{slate.slate_id}+{number}", history=(*slate.history, item))


def same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


class TestRanker:
    def test_scores_with_kept_prefixes_are_those_without_in_all_modes_and_mixed_passes(
        self, tiny_decoder, folders, make_slate
    ):
        plain, caching = rankers(tiny_decoder, folders)
        slates = [
            replace(make_slate(seed=seed, n_candidates=4 + seed), domain=domain)
            for seed, domain in enumerate(("news", "video", "social", "news"))
        ]
        for turn in range(4):
            same(caching.score(slates), plain.score(slates))
            assert (caching.prefix_tokens > 0) == (turn > 0)
            slates = [grown(slate, f"story {turn}") for slate in slates]
        assert 0 < caching.memory()["prefix_bytes"]
        assert plain.memory()["prefix_bytes"] == plain.prefix_tokens == 0

    def test_only_what_is_new_is_computed(self, tiny_decoder, folders, make_slate, monkeypatch):
        _, caching = rankers(tiny_decoder, folders)
        slate = make_slate(n_history=8, domain="news")
        computed = []
        embedding = tiny_decoder.model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _, ids, out: computed.append(ids[0].numel()))
        caching.score(slate)
        caching.score(slate)
        hook.remove()
        (one,) = caching.prepare([slate])
        # bos and all history items but the last, at whose end readouts read
        known = sum(len(segment.tokens) for segment in one.tree.segments[:8])
        assert computed == [one.tokens, one.tokens - known]
        assert caching.prefix_tokens == known

    def test_users_share_a_preamble_and_successive_lists_in_one_pass_share_their_history(
        self, tiny_decoder, folders, make_slate
    ):
        plain, caching = rankers(tiny_decoder, folders)
        first = [replace(make_slate(seed=n, user_id=f"u{n}"), domain="news") for n in range(3)]
        lists = [grown(slate, f"later {n}", n) for slate in first for n in range(3)]
        same(caching.score(first), plain.score(first))
        same(caching.score(lists), plain.score(lists))
        same(caching.score(lists[::-1]), plain.score(lists[::-1]))

    def test_a_new_adapter_of_a_domain_shares_nothing_with_the_one_before(
        self, tiny_decoder, folders, make_slate, tmp_path
    ):
        plain, caching = rankers(tiny_decoder, folders)
        slate = make_slate(domain="news")
        before = caching.score(slate)
        other = publish(tiny_decoder, tmp_path / "other", "news", seed=77)[0]
        for ranker in (plain, caching):
            ranker.load_adapter(other, domain="news")
        assert caching.memory()["prefix_bytes"] == 0
        after = caching.score(slate)
        assert after == pytest.approx(plain.score(slate), abs=1e-4)
        assert after != pytest.approx(before, abs=1e-2)

    def test_scores_are_right_when_nearly_nothing_fits_the_budget(
        self, tiny_decoder, folders, make_slate
    ):
        plain, caching = rankers(tiny_decoder, folders)
        caching.close()
        caching = Ranker(tiny_decoder, prefix_bytes=20_000)
        caching.load_adapter(folders["news"], domain="news")
        slates = [make_slate(seed=n, n_history=6, domain="news") for n in range(6)]
        for _ in range(3):
            same(caching.score(slates), plain.score(slates))
            assert caching.memory()["prefix_bytes"] <= 20_000

    def test_passes_smaller_than_a_list_of_slates_and_explanations(
        self, tiny_decoder, folders, make_slate
    ):
        plain, caching = rankers(tiny_decoder, folders, micro_tokens=120, row_tokens=60)
        slates = [make_slate(seed=n, user_id=f"u{n % 2}", domain="news") for n in range(6)]
        for _ in range(2):
            same(caching.score(slates), plain.score(slates))
        one, other = caching.explain(slates[0]), plain.explain(slates[0])
        same(one.effects, other.effects)

    def test_threads_may_read_and_fill_it_at_once(self, tiny_decoder, folders, make_slate):
        plain, caching = rankers(tiny_decoder, folders)
        slates = [make_slate(seed=n, n_history=5, domain="news") for n in range(4)]
        expected, found, threads = plain.score(slates), [], []
        for n in range(6):
            order = slates[n % 4 :] + slates[: n % 4]
            threads.append(
                threading.Thread(target=lambda o=order: found.append((o, caching.score(o))))
            )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        for order, scores in found:
            same(scores, [expected[slates.index(slate)] for slate in order])

    def test_an_encoder_keeps_nothing_and_ranks_as_before(self, tiny_encoder, make_slate, tmp_path):
        ranker = Ranker(tiny_encoder, prefix_bytes=PLENTY)
        ranker.load_adapter(publish(tiny_encoder, tmp_path, "news")[0])
        slate = make_slate(domain="news")
        assert ranker.score(slate) == ranker.score(slate)
        assert ranker.memory()["prefix_bytes"] == 0

    def test_passes_over_a_long_list_share_its_trunk(self, tiny_decoder, folders, make_slate):
        plain, caching = rankers(tiny_decoder, folders, micro_tokens=300, row_tokens=100)
        slate = make_slate(n_history=8, n_candidates=120, domain="news")
        assert caching.score(slate) == pytest.approx(plain.score(slate), abs=1e-4)
        assert caching.prefix_tokens > 0

"""Trees become batches: nothing is lost, what is shared is stored once, budgets hold."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrank.errors import DataError
from peftrank.prompts import (
    PromptTemplate,
    collate,
    in_rows,
    micro_batches,
    pack,
    token_count,
)
from peftrank.prompts.tree import CandidateTokens, branches, depths, ends, grow, path_tokens, split
from peftrank.types import Item

PAD, MARK, ANSWER = 99, 98, 97
PARTS = {
    "preamble": "Rank the items.\n",
    "history": "- {{ title }}\n",
    "question": "Liked:\n",
    "candidate": "- {{ title }}\n",
}

_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@st.composite
def _leaf(draw):
    tokens = draw(_tokens)
    start = draw(st.integers(0, len(tokens) - 1))
    return CandidateTokens(tokens, start, draw(st.integers(start + 1, len(tokens))))


_trees = st.lists(
    st.builds(
        lambda trunk, leaves, mode, window: grow(
            "s",
            trunk,
            leaves,
            mode=mode,
            marker=(MARK,),
            answer=(ANSWER,),
            window=window if mode == "joint" else None,
        ),
        st.lists(_tokens, max_size=4),
        st.lists(_leaf(), min_size=1, max_size=5),
        st.sampled_from(["isolated", "joint", "set"]),
        st.sampled_from([None, 2, 3]),
    ),
    min_size=1,
    max_size=6,
)


def one_way(ancestors):
    """Ancestors without the sight that markers have of each other."""
    return ancestors & ~(ancestors.mT & ~torch.eye(ancestors.shape[-1], dtype=torch.bool))


def seen_by(batch, row, position):
    """Positions on the path of a token, in depth order, up to and with the token itself."""
    segment = batch.segment_ids[row]
    above = one_way(batch.ancestors[row])[segment[position]]
    found = [
        (int(batch.position_ids[row, t]), t)
        for t in range(segment.numel())
        if segment[t] >= 0 and above[segment[t]]
    ]
    found = sorted(pair for pair in found if pair[0] <= int(batch.position_ids[row, position]))
    assert [depth for depth, _ in found] == list(range(len(found)))
    return [t for _, t in found]


@settings(max_examples=150, deadline=None)
@given(_trees, st.integers(4, 40))
def test_every_path_can_be_read_back_from_the_batch(trees, row_tokens):
    batch = pack(trees, pad_token_id=PAD, row_tokens=row_tokens)
    for s, tree in enumerate(trees):
        assert int(batch.mask[s].sum()) == len(tree.candidates)
        depth = depths(tree)
        for c, span in enumerate(tree.candidates):
            row, end = int(batch.row[s, c]), int(batch.end[s, c])
            path = seen_by(batch, row, end)
            expected = path_tokens(tree, ends(tree)[c])
            assert tuple(batch.input_ids[row, path].tolist()) == expected
            start, stop = int(batch.start[s, c]), int(batch.stop[s, c])
            first = depth[span.segment] + span.start
            assert path[first : first + span.stop - span.start] == list(range(start, stop))
            before = path[first - 1] if first else -1
            assert int(batch.before[s, c]) == before
        if tree.letters:
            assert batch.letters[s, : len(tree.letters)].tolist() == list(tree.letters)
        first = depth[tree.candidates[0].segment]
        path = seen_by(batch, int(batch.row[s, 0]), int(batch.end[s, 0]))
        assert int(batch.trunk[s]) == (path[first - 1] if first else -1)


@settings(max_examples=150, deadline=None)
@given(_trees, st.integers(4, 40))
def test_no_token_is_lost_or_stored_twice_in_a_row(trees, row_tokens):
    batch = pack(trees, pad_token_id=PAD, row_tokens=row_tokens)
    real = batch.segment_ids >= 0
    assert int(real.sum()) <= sum(
        token_count(tree) + branches(tree)[0] * (len(rows_of(batch, s)) - 1)
        for s, tree in enumerate(trees)
    )
    assert bool((batch.input_ids[~real] == PAD).all())
    assert bool((batch.position_ids[~real] == 0).all())
    assert batch.input_ids.shape[1] <= max(row_tokens, *(token_count(tree) for tree in trees))
    for row in range(batch.input_ids.shape[0]):
        paths = {
            (path_tokens(trees[s], i), divided, s if i in trees[s].markers else None)
            for s in range(len(trees))
            for i, divided in enumerate(_divisions(trees[s]))
            if i in _held(trees[s], batch.row[s], row)
        }
        assert int(batch.segment_ids[row].max()) + 1 == len(paths)
        assert bool(real[row, : int(real[row].sum())].all())


def rows_of(batch, s):
    """The rows in which a slate's candidates lie."""
    return set(batch.row[s][batch.mask[s]].tolist())


def _held(tree, rows, row):
    """The segments of a tree that a row must hold: those on the paths of the candidates in it."""
    held = set()
    for end, place in zip(ends(tree), rows.tolist(), strict=False):
        while place == row and end >= 0:
            held.add(end)
            end = tree.segments[end].parent
    return held


def _divisions(tree):
    """How each segment's path is divided into segments, which tells nodes of equal text apart."""
    found = []
    for segment in tree.segments:
        above = () if segment.parent < 0 else found[segment.parent]
        found.append((*above, len(segment.tokens)))
    return found


@settings(max_examples=100, deadline=None)
@given(_trees, st.integers(4, 40))
def test_parents_lie_before_their_children(trees, row_tokens):
    batch = pack(trees, pad_token_id=PAD, row_tokens=row_tokens)
    assert not bool(one_way(batch.ancestors).triu(1).any())
    for row in batch.segment_ids:
        real = row[row >= 0]
        assert bool((real.diff() >= 0).all())


@settings(max_examples=100, deadline=None)
@given(_trees, st.integers(4, 40))
def test_markers_see_all_markers_of_their_own_slate_and_no_other(trees, row_tokens):
    batch = pack(trees, pad_token_id=PAD, row_tokens=row_tokens)
    for s, tree in enumerate(trees):
        for c in range(len(tree.markers)):
            row, end = int(batch.row[s, c]), int(batch.end[s, c])
            sight = batch.ancestors[row, batch.segment_ids[row, end]]
            marks = (batch.input_ids[row] == MARK) & sight[batch.segment_ids[row].clamp(min=0)]
            own = batch.end[s, : len(tree.markers)]
            assert set(marks.nonzero()[:, 0].tolist()) == set(own.tolist())


@settings(max_examples=150, deadline=None)
@given(_trees, st.integers(4, 60), st.integers(4, 30))
def test_micro_batches_keep_to_their_size_and_to_the_order(trees, micro_tokens, row_tokens):
    groups = micro_batches(trees, micro_tokens, row_tokens=row_tokens)
    assert [index for group in groups for index in group] == list(range(len(trees)))
    for group in groups:
        batch = pack([trees[i] for i in group], pad_token_id=PAD, row_tokens=row_tokens)
        assert batch.input_ids.numel() <= micro_tokens or len(group) == 1


def test_sharing_never_makes_a_micro_batch_larger():
    # Where it shares most, the third tree makes the rows less even than if it shared nothing.
    trees = [
        _isolated((0,), (0, 0, 0, 2, 2, 0), (0, 2, 2, 0, 1, 1, 2, 0, 1)),
        _isolated((1, 0, 1, 0), (0, 0), (1, 2, 1, 2, 2), (0, 0, 0), trunk=3),
        _isolated((1, 1, 1, 1, 0, 2), (0,), trunk=0),
    ]
    for row_tokens in range(6, 40):
        for micro_tokens in range(16, 60):
            for group in micro_batches(trees, micro_tokens, row_tokens=row_tokens):
                members = [trees[i] for i in group]
                batch = pack(members, pad_token_id=PAD, row_tokens=row_tokens)
                assert batch.input_ids.numel() <= micro_tokens or len(group) == 1


def _isolated(*segments, trunk=1):
    leaves = [CandidateTokens(tokens, 0, 1) for tokens in segments[trunk:]]
    return grow("s", segments[:trunk], leaves, mode="isolated")


def test_micro_batches_are_filled():
    def trees(*lengths):
        return [_isolated((7,) * n, trunk=0) for n in lengths]

    assert micro_batches(trees(*[10] * 6), 30, row_tokens=30) == [[0, 1, 2], [3, 4, 5]]
    assert micro_batches(trees(10, 50, 10), 30) == [[0], [1], [2]]
    assert micro_batches([], 30) == []
    assert len(micro_batches(trees(*[350] * 64), 4096)) == math.ceil(64 / 11)


def _lists(*windows):
    """Long lists, in isolated mode (window None) or in windows with letters."""
    return st.builds(
        lambda trunk, leaves, window: grow(
            "s",
            trunk,
            leaves,
            mode="joint" if window else "isolated",
            answer=(ANSWER,),
            window=window,
        ),
        st.lists(_tokens, max_size=3),
        st.lists(_leaf(), min_size=1, max_size=60),
        st.sampled_from(windows),
    )


@settings(max_examples=150, deadline=None)
@given(_lists(None, 2, 4), st.integers(4, 40))
def test_a_split_tree_holds_every_candidate_with_its_path_once(tree, most):
    parts = split(tree, most)
    assert described(tree) == [each for part in parts for each in described(part)]


def described(tree):
    """Per candidate its path, that of its end, its text's place, and its letter."""
    letters = tree.letters or [None] * len(tree.candidates)
    return [
        (path_tokens(tree, span.segment), path_tokens(tree, end), span.start, span.stop, letter)
        for span, end, letter in zip(tree.candidates, ends(tree), letters, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(_lists(None), st.integers(4, 40))
def test_a_list_is_split_into_as_few_parts_as_can_be(tree, most):
    parts = split(tree, most)
    assert all(token_count(part) <= most or len(part.candidates) == 1 for part in parts)
    # As few as filling one after the other would give.
    leaves = [len(tree.segments[span.segment].tokens) for span in tree.candidates]
    trunk = token_count(tree) - sum(leaves)
    filled = [0]
    for leaf in leaves:
        if filled[-1] and trunk + filled[-1] + leaf > most:
            filled.append(0)
        filled[-1] += leaf
    assert len(parts) <= len(filled)


@settings(max_examples=200, deadline=None)
@given(_lists(None, 2, 4), st.integers(4, 80), st.integers(4, 40))
def test_the_parts_of_a_long_list_keep_to_the_size_of_a_pass(tree, most, row_tokens):
    parts = in_rows(tree, row_tokens, most=most)
    assert sum(len(part.candidates) for part in parts) == len(tree.candidates)
    for part in parts:
        batch = pack([part], pad_token_id=PAD, row_tokens=row_tokens)
        size = max(most, 2 * branches(tree)[0])
        assert batch.input_ids.numel() <= size or len(branches(part)[1]) == 1
        assert in_rows(part, row_tokens) == [part]


def test_a_list_of_500_is_laid_in_equal_rows_a_few_trunks_long():
    tree = _isolated((1,) * 100, *[(n,) * 10 for n in range(500)])
    batch = pack([tree], pad_token_id=PAD, row_tokens=200)
    assert batch.input_ids.shape == (25, 300)
    assert batch.mask.sum() == 500
    assert [len(part.candidates) for part in in_rows(tree, 200, most=210)] == [11] * 45 + [5]
    one_more = _isolated((1,) * 100, *[(n,) * 10 for n in range(21 + 20 + 20)], trunk=1)
    assert pack([one_more], pad_token_id=PAD, row_tokens=200).input_ids.shape == (4, 260)


def test_the_trunk_of_a_list_in_rows_is_that_of_its_first_candidate():
    short = _isolated((3, 4), trunk=0)
    long = _isolated((5,) * 4, *[(n,) * 12 for n in range(6)])
    batch = pack([short, long], pad_token_id=PAD, row_tokens=30)
    assert [len(rows_of(batch, s)) for s in (0, 1)] == [1, 3]
    assert batch.row[:, 0].tolist() == [0, 0]
    assert batch.trunk.tolist() == [-1, 5]


@pytest.mark.parametrize("mode", ["joint", "set"])
def test_candidates_that_see_each_other_stay_in_one_row(mode):
    leaves = [CandidateTokens((n,) * 10, 0, 1) for n in range(100)]
    tree = grow("s", [(1, 2)], leaves, mode=mode, marker=(MARK,))
    assert in_rows(tree, 100, most=100) == [tree]
    assert pack([tree], pad_token_id=PAD, row_tokens=100).input_ids.shape[0] == 1


@pytest.fixture
def template(tokenizer):
    return PromptTemplate(tokenizer, parts=PARTS)


def test_lists_of_one_user_share_the_history(template, make_slate):
    first = make_slate(n_history=5, seed=1)
    other = replace(first, slate_id="t", candidates=make_slate(seed=2).candidates)
    later = replace(first, slate_id="v", history=(*first.history, Item("x", {"title": "amber"})))
    trees = [template.tree(slate) for slate in (first, other, later)]
    batch = pack(trees, pad_token_id=PAD, row_tokens=1000)
    trunk = token_count(trees[0]) - sum(len(s.tokens) for s in trees[0].segments[-4:])
    own = [sum(len(s.tokens) for s in tree.segments[-4:]) for tree in trees]
    amber, question = trees[2].segments[6], trees[2].segments[7]
    assert batch.input_ids.shape == (
        1,
        trunk + sum(own) + len(amber.tokens) + len(question.tokens),
    )


def test_users_share_the_preamble(template, make_slate):
    trees = [template.tree(make_slate(seed=seed, user_id=str(seed))) for seed in range(3)]
    batch = pack(trees, pad_token_id=PAD, row_tokens=1000)
    saved = 2 * len(trees[0].segments[0].tokens)
    assert batch.input_ids.shape == (1, sum(map(token_count, trees)) - saved)


def test_equal_candidates_are_one_segment(template, make_slate):
    slate = make_slate(n_candidates=2)
    slate = replace(slate, candidates=(slate.candidates[0],) * 2)
    batch = pack([template.tree(slate)], pad_token_id=PAD)
    assert int(batch.end[0, 0]) == int(batch.end[0, 1])
    assert batch.mask.tolist() == [[True, True]]


def test_rows_are_of_like_length(make_slate):
    def tree(n, token):
        return grow("s", [], [CandidateTokens((token,) * n, 0, n)], mode="isolated")

    trees = [tree(130, token) for token in range(5)]
    batch = pack(trees, pad_token_id=PAD, row_tokens=512)
    assert batch.input_ids.shape == (5, 130)  # no padding, and no attention to what is not shared
    long = pack([tree(700, 9), *trees], pad_token_id=PAD, row_tokens=512)
    assert long.input_ids.shape == (2, 700)


def test_packing_is_deterministic(template, make_slate):
    trees = [template.tree(make_slate(seed=seed)) for seed in range(8)]
    one, two = (pack(trees, pad_token_id=PAD, row_tokens=200) for _ in range(2))
    assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(one.row, two.row)


def test_shorter_slates_are_padded(template, make_slate):
    slates = [make_slate(n_candidates=2, seed=1), make_slate(n_candidates=4, seed=2)]
    batch = collate(slates, template, pad_token_id=PAD)
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.labels.tolist() == [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert batch.labels.dtype == torch.float32
    assert batch.features is None
    assert batch.slate_ids == ("s1", "s2")
    for name in ("row", "end", "start", "stop"):
        assert not getattr(batch, name)[~batch.mask].any()
    assert bool((batch.before[~batch.mask] == -1).all())


def test_labels_are_none_if_any_slate_has_none(template, make_slate):
    slates = [make_slate(seed=1), make_slate(seed=2, labels=False)]
    assert collate(slates, template, pad_token_id=PAD).labels is None


def test_labels_that_do_not_fit_are_an_error(template, make_slate):
    slate = replace(make_slate(), labels=(1.0,))
    with pytest.raises(DataError, match="'s0' has 4 candidates but 1 labels"):
        collate([slate], template, pad_token_id=PAD)
    with pytest.raises(DataError, match="1 rows of labels for 2"):
        pack([template.tree(make_slate())] * 2, pad_token_id=PAD, labels=[(1.0,) * 4])


def test_nothing_to_pack_is_an_error():
    with pytest.raises(DataError, match="no slates"):
        pack([], pad_token_id=PAD)


def test_features_keep_the_order_of_names_and_nan_where_missing(template, make_slate):
    slates = [
        make_slate(n_candidates=2, seed=1, features=("price", "age")),
        make_slate(n_candidates=3, seed=2, features=("age",)),
    ]
    batch = collate(slates, template, pad_token_id=PAD, feature_names=("age", "price"))
    assert batch.features.shape == (2, 3, 2)
    first = slates[0].candidates[1].features
    assert batch.features[0, 1].tolist() == pytest.approx([first["age"], first["price"]])
    missing = torch.isnan(batch.features)
    assert missing.tolist() == [
        [[False, False], [False, False], [True, True]],
        [[False, True]] * 3,
    ]


def test_what_trees_share_is_worth_a_longer_row():
    shared = tuple(range(200))
    trees = [
        grow("s", [shared], [CandidateTokens((token,) * 30, 0, 30)], mode="isolated")
        for token in range(300, 304)
    ]
    assert pack(trees, pad_token_id=PAD, row_tokens=512).input_ids.shape == (1, 320)

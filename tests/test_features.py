import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrank import _counting, features
from peftrank._lists import Lists, Sequences, Shown
from peftrank.errors import ConfigError, DataError
from peftrank.features import GROUPS, Source, State, columns, compute

ITEMS = 12
COUNTED = ("popularity", "item_knn", "transition", "recency")


def sequences(rows, times=None):
    item = np.array([i for row in rows for i in row], np.int32)
    time = np.full(len(item), np.nan)
    if times is not None:
        time = np.array([t for row in times for t in row], float)
    start = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    return Sequences(start, item, time, np.ones(len(item), np.float32))


def lists(rows, time=None):
    """Each row is (user, history, candidates)."""
    history = [i for _, h, _ in rows for i in h]
    candidates = [i for _, _, c in rows for i in c]
    return Lists(
        slate_ids=tuple(str(i) for i in range(len(rows))),
        user=np.array([u for u, _, _ in rows], np.int64),
        part=np.zeros(len(rows), np.int64),
        time=np.full(len(rows), np.nan) if time is None else np.array(time, float),
        history_start=np.cumsum([0, *(len(h) for _, h, _ in rows)]).astype(np.int64),
        history=np.array(history, np.int64),
        feedback=np.ones(len(history)),
        candidate_start=np.cumsum([0, *(len(c) for _, _, c in rows)]).astype(np.int64),
        candidate=np.array(candidates, np.int64),
        label=np.zeros(len(candidates)),
    )


def table(slates, source, groups, **options):
    values = compute(slates, State(source), groups, **options)
    return dict(zip(columns(source, groups), values.T, strict=True))


def test_a_target_seen_by_nobody_else_looks_like_an_item_nobody_saw():
    train = sequences([[0, 1, 2], [0, 1, 4], [0, 4, 1], [1, 4], [4, 0]])
    groups = (*COUNTED, "item_embedding")
    source = Source(train, ITEMS, texts=["word"] * ITEMS)
    # Item 2 is user 0's own target; nobody ever met item 9.
    found = table(lists([(0, [0, 1], [2, 9])]), source, groups)
    for name, values in found.items():
        assert values[0] == values[1] or np.isnan(values).all(), name
    assert found["popularity"].tolist() == [0, 0]


def test_a_user_s_own_part_is_removed_exactly():
    rows = [[0, 1, 2, 3, 4, 5, 6], [0, 2, 6, 1], [3, 6, 2], [1, 0, 6], [2, 6, 0]]
    slates = lists([(0, [0, 1, 2, 3, 4, 5], [6, 7, 1])])
    without = [[], *rows[1:]]
    groups = ("popularity", "item_knn", "transition", "recency")
    with_own = table(slates, Source(sequences(rows), ITEMS), groups)
    never = table(slates, Source(sequences(without), ITEMS), groups)
    for name in set(with_own) - {"item_knn_lift", "item_knn_lift_max"}:
        np.testing.assert_array_equal(with_own[name], never[name], err_msg=name)


def test_co_occurrence_is_counted_by_hand():
    train = sequences([[0, 1], [0, 1], [0, 2], [9]])
    found = table(lists([(3, [0], [1, 2])]), Source(train, ITEMS), ("item_knn", "transition"))
    assert found["item_knn"].tolist() == pytest.approx([2 / 8, 1 / 8])
    assert found["item_knn_cosine"].tolist() == pytest.approx([2 / 6**0.5, 1 / 3**0.5])
    assert found["transition_order"].tolist() == pytest.approx([3 / 4, 2 / 3])


def test_with_times_only_earlier_events_count():
    train = sequences([[0, 1], [0, 1], [1]], [[1, 2], [3, 4], [5]])
    slates = lists([(2, [0], [1])] * 4, time=[2, 2.5, 4, 9])
    found = table(slates, Source(train, ITEMS, timed=True), ("popularity", "item_knn"))
    assert np.expm1(found["popularity"]).round(5).tolist() == [0, 1, 1, 3]
    assert found["item_knn"].tolist() == pytest.approx([0, 1 / 6, 1 / 7, 2 / 7])


events = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, ITEMS - 1), st.integers(0, 20)),
    min_size=3,
    max_size=60,
)


def timed(rows):
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    by_user = [[r for r in rows if r[0] == u] for u in range(5)]
    return sequences([[r[1] for r in u] for u in by_user], [[r[2] for r in u] for u in by_user])


@settings(max_examples=60, deadline=None)
@given(events, events, st.integers(1, 20))
def test_events_after_a_slate_never_change_its_features(rows, later, now):
    past = [row for row in rows if row[2] < now]
    future = [(u, i, now + t) for u, i, t in later]
    slates = lists([(0, [0, 1, 2], list(range(ITEMS))), (1, [], [3, 4])], time=[now, now])
    groups = (*COUNTED, "item_embedding", "click_rate")

    def measured(rows):
        shown = Shown(
            user=np.array([r[0] for r in rows], np.int64),
            item=np.array([r[1] for r in rows], np.int64),
            time=np.array([r[2] for r in rows], float),
            clicked=np.array([r[1] % 2 == 0 for r in rows], bool),
        )
        source = Source(timed(rows), ITEMS, timed=True, shown=shown)
        return compute(slates, State(source), groups)

    np.testing.assert_array_equal(measured(past), measured(past + future))


@pytest.mark.parametrize("timed", [False, True])
def test_features_do_not_depend_on_how_much_is_counted_at_once(timed, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [rng.permutation(ITEMS)[: rng.integers(1, 9)].tolist() for _ in range(30)]
    times = [np.sort(rng.integers(20, size=len(row))).tolist() for row in rows]
    source = Source(sequences(rows, times), ITEMS, timed=timed)
    slates = lists(
        [(u, rows[u][:-1], rng.permutation(ITEMS)[:5].tolist()) for u in range(30)],
        [20] * 30,
    )
    groups = (*COUNTED, "item_embedding")
    straight = compute(slates, State(source), groups)
    for name, value in (("_PAIRS", 0), ("_ASKED", 100), ("_CHUNK", 40)):
        monkeypatch.setattr(features, name, value)
    monkeypatch.setattr(_counting, "WANTED_BITS", 3)
    monkeypatch.setattr(_counting, "_BLOCK", 3)
    assert np.array_equal(straight, compute(slates, State(source), groups), equal_nan=True)
    assert not np.isnan(straight).all()


@pytest.mark.parametrize("timed", [False, True])
def test_codes_of_a_large_catalogue_give_the_same_features(timed):
    rng = np.random.default_rng(0)
    rows = [rng.permutation(ITEMS)[: rng.integers(1, 9)].tolist() for _ in range(30)]
    times = [np.sort(rng.integers(20, size=len(row))).tolist() for row in rows]
    shown = [rng.permutation(ITEMS)[:5].tolist() for _ in rows]

    def found(scale):  # a code times the number of items exceeds 32 bits
        past = [[scale * item for item in row] for row in rows]
        slates = lists(
            [(u, past[u][:-1], [scale * item for item in shown[u]]) for u in range(30)], [20] * 30
        )
        source = Source(sequences(past, times), scale * ITEMS, timed=timed)
        return compute(slates, State(source), COUNTED)

    np.testing.assert_array_equal(found(10_000_000), found(1))


@settings(max_examples=20, deadline=None)
@given(st.permutations(list(range(6))))
def test_candidate_order_does_not_matter(order):
    train = sequences([[0, 1, 2, 3], [0, 3, 4], [1, 5, 2], [2, 0, 4]])
    source = Source(train, ITEMS, texts=[f"w{i % 3} x{i}" for i in range(ITEMS)])
    groups = (*COUNTED, "item_embedding", "text_overlap")
    straight = compute(lists([(-1, [0, 1], list(range(6)))]), State(source), groups)
    shuffled = compute(lists([(-1, [0, 1], order)]), State(source), groups)
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-6, atol=1e-7)


def test_words_are_counted_by_their_idf():
    texts = ["red shoe", "red hat", "blue shoe", "green"]
    found = table(
        lists([(-1, [0], [1, 2, 3])]),
        Source(sequences([[0, 1]]), 4, texts=texts),
        ("text_overlap",),
    )
    assert found["text_overlap"].tolist() == pytest.approx([np.log1p(2), np.log1p(2), 0])


def test_an_empty_history_gives_unknown_values_not_zeros():
    train = sequences([[0, 1], [1, 2]])
    found = table(lists([(-1, [], [1, 2])]), Source(train, ITEMS), ("popularity", "item_knn"))
    assert np.isnan(found["item_knn"]).all()
    assert found["popularity"].tolist() == pytest.approx(np.log1p([2, 1]).tolist())


def test_click_rates_leave_the_slate_s_own_user_out():
    shown = Shown(
        user=np.array([0, 1, 2]),
        item=np.array([3, 3, 3]),
        time=np.full(3, np.nan),
        clicked=np.array([True, False, True]),
    )
    source = Source(sequences([[3], [], [3]]), ITEMS, shown=shown)
    found = table(lists([(0, [], [3])]), source, ("click_rate",))
    assert found["click_rate"][0] == pytest.approx(1.5 / 12)


def test_friends_of_friends_are_weighted_by_their_degree():
    # User u is item u; 0's friend 1 has friends 2 and 3.
    train = sequences([[1], [0, 2, 3], [1], [1]])
    source = Source(train, 4, person=np.arange(4))
    found = table(lists([(0, [1], [2, 3])]), source, ("friends",))
    assert found["adamic_adar"].tolist() == pytest.approx([1 / np.log(3)] * 2)


def test_categories_of_the_history_are_shared_or_unknown():
    labels = [["a", "b"], ["b"], ["c"], []]
    source = Source(sequences([[0]]), 4, labels=labels)
    found = table(lists([(-1, [0, 2], [1, 2, 3])]), source, ("category",))
    assert found["category_share"][:2].tolist() == [0.5, 0.5]
    assert np.isnan(found["category_share"][2])


def test_given_scores_are_passed_on():
    source = Source(sequences([[0, 1]]), ITEMS)
    found = table(lists([(0, [0], [1, 2])]), source, ("retriever",), retriever=np.array([2.0, 1]))
    assert found["retriever"].tolist() == [2, 1]


def test_every_group_has_columns_of_its_own():
    names = [name for columns in GROUPS.values() for name in columns]
    assert len(names) == len(set(names))


def test_an_unknown_group_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown features 'price'\. Known: popularity"):
        compute(lists([(0, [], [1])]), State(Source(sequences([[0]]), ITEMS)), ("price",))


def test_a_group_without_its_source_says_what_is_missing():
    with pytest.raises(ConfigError, match="'text_overlap' need item texts"):
        compute(lists([(0, [], [1])]), State(Source(sequences([[0]]), ITEMS)), ("text_overlap",))


def test_timed_features_need_slates_with_times():
    source = Source(sequences([[0]], [[1]]), ITEMS, timed=True)
    with pytest.raises(DataError, match="1 slates have no time"):
        compute(lists([(0, [], [1])]), State(source), ("popularity",))


def test_preparing_data_loads_no_torch():
    code = "import sys, peftrank.slates, peftrank.features, peftrank.prepare, peftrank.cli.data; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

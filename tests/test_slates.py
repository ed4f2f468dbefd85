import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftrank import slates
from peftrank._lists import Sequences
from peftrank.errors import ConfigError, DataError

ITEMS = 30


def sequences(rows, times=None):
    length = [len(row) for row in rows]
    item = np.array([i for row in rows for i in row], np.int64)
    time = np.full(len(item), np.nan)
    if times is not None:
        time = np.array([t for row in times for t in row], float)
    start = np.concatenate(([0], np.cumsum(length))).astype(np.int64)
    return Sequences(start, item, time, np.arange(len(item)) % 5 + 1.0)


users = st.lists(
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=8, unique=True), min_size=4, max_size=9
)


def make(rows, seed, how="leave-one-out", count=6, history_length=5, labels="binary"):
    table = sequences(rows)
    rng = np.random.default_rng(seed)
    targets = slates.split(table, how, targets_per_user=3, rng=rng)
    user = np.searchsorted(table.start, targets.event, side="right") - 1
    owner = np.repeat(np.arange(len(rows)), np.diff(table.start))
    known = np.unique(owner * ITEMS + table.item)
    pool = np.arange(ITEMS)
    draw = slates.draw_uniform(pool, rng)
    start, item, _ = slates.negatives(user, count, known, ITEMS, draw, pool, rng)
    names = [f"u{i}" for i in range(len(rows))]
    blocks = slates.from_targets(
        table, targets, names, (start, item), history_length=history_length, labels=labels, rng=rng
    )
    return table, targets, slates.join(list(blocks))


@settings(max_examples=60, deadline=None)
@given(users, st.integers(0, 5), st.sampled_from(["leave-one-out", "users"]))
def test_every_list_holds_its_target_once_and_nothing_else_the_user_met(rows, seed, how):
    table, targets, lists = make(rows, seed, how)
    for s in range(len(lists)):
        shown = lists.candidate[lists.candidate_start[s] : lists.candidate_start[s + 1]]
        label = lists.label[lists.candidate_start[s] : lists.candidate_start[s + 1]]
        target = table.item[targets.event[s]]
        assert len(set(shown.tolist())) == len(shown) == 7
        assert shown[label > 0].tolist() == [target]
        assert set(shown[label == 0].tolist()).isdisjoint(rows[lists.user[s]])


@settings(max_examples=30, deadline=None)
@given(users, st.integers(0, 5))
def test_the_history_is_what_came_before_the_target(rows, seed):
    table, targets, lists = make(rows, seed)
    for s in range(len(lists)):
        history = lists.history[lists.history_start[s] : lists.history_start[s + 1]].tolist()
        row = rows[lists.user[s]]
        place = row.index(table.item[targets.event[s]])
        assert history == row[max(0, place - 5) : place]


@settings(max_examples=20, deadline=None)
@given(users, st.integers(0, 5))
def test_the_same_seed_makes_the_same_lists(rows, seed):
    first, second = make(rows, seed)[2], make(rows, seed)[2]
    assert first.candidate.tolist() == second.candidate.tolist()
    assert first.label.tolist() == second.label.tolist()


@settings(max_examples=30, deadline=None)
@given(users, st.integers(0, 5), st.integers(1, 60), st.integers(1, 28))
def test_lists_do_not_depend_on_how_many_are_made_at_once(rows, seed, block, count):
    _, _, whole = make(rows, seed, count=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slates, "BLOCK", block)
        _, _, lists = make(rows, seed, count=count)
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(value, getattr(lists, name), name)


def test_leave_one_out_tests_on_the_last_and_validates_on_the_one_before():
    table = sequences([[1, 2, 3, 4], [5, 6]])
    targets = slates.split(table, "leave-one-out", rng=np.random.default_rng(0))
    by_part = {p: table.item[targets.event[targets.part == p]].tolist() for p in range(3)}
    assert by_part[2] == [4]
    assert by_part[1] == [3, 6]
    assert by_part[0] == [2]
    assert table.item[targets.training].tolist() == [1, 2, 5]


def test_users_held_out_have_no_interaction_in_the_training_part():
    rows = [[1, 2, 3]] * 10
    table = sequences(rows)
    rng = np.random.default_rng(0)
    targets = slates.split(table, "users", valid=2, test=3, targets_per_user=9, rng=rng)
    assert np.bincount(targets.part).tolist() == [10, 2, 3]
    assert targets.training.sum() == 5 * 3


def test_training_targets_of_a_user_are_adjacent_and_latest_first():
    table = sequences([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    rng = np.random.default_rng(0)
    targets = slates.split(table, "users", valid=0, test=0, targets_per_user=2, rng=rng)
    assert table.item[targets.event].tolist() == [5, 4, 10, 9]


def test_a_split_by_time_keeps_one_moment_in_one_part():
    table = sequences([[1, 2, 3], [4, 5, 6]], [[1, 2, 5], [1, 5, 6]])
    rng = np.random.default_rng(0)
    targets = slates.split(table, "time", valid=1, test=2, targets_per_user=5, rng=rng)
    assert table.time[targets.event[targets.part == 2]].tolist() == [5, 6, 5]
    assert table.time[targets.training].max() < 5


def test_a_split_by_time_without_times_says_so():
    with pytest.raises(DataError, match="have no time"):
        slates.split(sequences([[1, 2]]), "time", rng=np.random.default_rng(0))


def test_holding_out_more_users_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="cannot hold out 9 users: only 1"):
        slates.split(sequences([[1, 2, 3]]), "users", test=9, rng=np.random.default_rng(0))


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(ConfigError, match="leave-one-out, users, time"):
        slates.split(sequences([[1, 2]]), "random", rng=np.random.default_rng(0))


def test_rating_labels_are_the_target_s_own_value():
    table, targets, lists = make([[1, 2, 3, 4], [5, 6, 7]], 0, labels="rating")
    assert sorted(lists.label[lists.label > 0]) == sorted(table.value[targets.event])


def test_negatives_run_out_only_with_the_items():
    user, pool, rng = np.array([0]), np.arange(5), np.random.default_rng(0)
    known = np.array([0, 1])
    draw = slates.draw_uniform(pool, rng)
    _, item, _ = slates.negatives(user, 9, known, 5, draw, pool, rng)
    assert sorted(item) == [2, 3, 4]


def test_popular_items_are_drawn_in_proportion_to_their_count():
    draw = slates.draw_by_weight(np.array([3, 4]), np.array([1.0, 3.0]), np.random.default_rng(0))
    drawn = draw(np.zeros(20_000, np.int64))
    assert np.mean(drawn == 4) == pytest.approx(0.75, abs=0.02)


def test_same_group_negatives_share_the_target_s_group():
    group = np.array([0, 0, 0, 1, 1, -1])
    draw = slates.draw_same_group(np.arange(6), group, np.array([0, 3]), np.random.default_rng(0))
    assert set(draw(np.zeros(50, np.int64))) == {0, 1, 2}
    assert set(draw(np.ones(50, np.int64))) == {3, 4}


def test_negatives_from_a_run_are_its_best_unknown_items():
    known = np.array([7])
    found = slates.from_run({"u": [7, 3, 2, 1]}, [("u-4", "u")], np.array([0]), 2, known, 10)
    assert found[1].tolist() == [3, 2]


def test_a_run_without_the_slate_is_an_error():
    with pytest.raises(DataError, match="no candidates for slate 'u-4'"):
        slates.from_run({}, [("u-4", "u")], np.array([0]), 2, np.array([7]), 10)


def test_positives_have_no_fixed_place():
    _, _, lists = make([list(range(i, i + 8)) for i in range(20)], 0)
    place = np.flatnonzero(lists.label > 0) - lists.candidate_start[:-1]
    assert len(set(place.tolist())) > 3


def test_limit_keeps_whole_users_of_the_training_part_only():
    rows = [[1, 2, 3, 4, 5, 6]] * 6
    _, _, lists = make(rows, 0)
    kept = slates.select(lists, slates.limit(lists.part, lists.user, 6, np.random.default_rng(0)))
    assert np.bincount(kept.part).tolist() == [6, 6, 6]
    assert len(set(kept.user[kept.part == 0].tolist())) == 2

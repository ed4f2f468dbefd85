"""What a run reads, and in what order."""

from dataclasses import replace
from itertools import chain, groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrank.config import DataConfig
from peftrank.errors import ConfigError
from peftrank.formats.slates import write_items, write_slates
from peftrank.samples import sample_path
from peftrank.training.data import (
    feature_names,
    fingerprint,
    folder_data,
    part_path,
    read_part,
    step_batches,
    steps_per_epoch,
)
from peftrank.training.facts import facts
from peftrank.types import Item, Slate

users = st.lists(st.sampled_from("abc"), min_size=1, max_size=40)
sizes = st.integers(1, 12)


def slates_of(users):
    return [Slate(f"s{i}", user, (), (Item("x"),), (1.0,)) for i, user in enumerate(users)]


def batches(slates, batch_size, *, epochs=1, together=1, seed=0, first_step=0):
    total = epochs * steps_per_epoch(len(slates), batch_size)
    found = step_batches(
        slates,
        batch_size,
        together=together,
        seed=seed,
        first_step=first_step,
        total_steps=total,
    )
    return [[slate.slate_id for slate in batch] for batch in found]


@given(users=users, batch_size=sizes, together=sizes, seed=st.integers(0, 99))
def test_every_epoch_visits_every_slate_once(users, batch_size, together, seed):
    slates = slates_of(users)
    epoch = steps_per_epoch(len(slates), batch_size)
    found = batches(slates, batch_size, epochs=3, together=together, seed=seed)
    assert len(found) == 3 * epoch
    for start in (0, epoch, 2 * epoch):
        part = found[start : start + epoch]
        assert sorted(chain(*part)) == sorted(slate.slate_id for slate in slates)
        assert [len(batch) for batch in part[:-1]] == [batch_size] * (epoch - 1)
        assert 1 <= len(part[-1]) <= batch_size


@given(users=users, batch_size=sizes, together=sizes, seed=st.integers(0, 99), data=st.data())
def test_a_later_first_step_gives_the_tail_of_the_same_order(
    users, batch_size, together, seed, data
):
    slates = slates_of(users)
    options = {"epochs": 3, "together": together, "seed": seed}
    whole = batches(slates, batch_size, **options)
    assert batches(slates, batch_size, **options) == whole
    first_step = data.draw(st.integers(0, len(whole)))
    assert batches(slates, batch_size, **options, first_step=first_step) == whole[first_step:]


@given(users=users, together=sizes, seed=st.integers(0, 99))
def test_successive_slates_of_a_user_stay_neighbours_up_to_the_limit(users, together, seed):
    slates = slates_of(users)
    order = list(chain(*batches(slates, 4, together=together, seed=seed)))
    places = {slate_id: place for place, slate_id in enumerate(order)}
    for _, run in groupby(range(len(users)), key=lambda i: users[i]):
        indices = list(run)
        for start in range(0, len(indices), together):
            block = [places[f"s{i}"] for i in indices[start : start + together]]
            assert block == list(range(block[0], block[0] + len(block)))


def test_epochs_and_seeds_have_orders_of_their_own():
    slates = slates_of("abcdefgh" * 4)
    one, two, other = (
        batches(slates, 4, epochs=2)[:8],
        batches(slates, 4, epochs=2)[8:],
        batches(slates, 4, seed=1),
    )
    assert one != two
    assert one != other
    assert list(chain(*one)) != [slate.slate_id for slate in slates]


def test_a_last_step_within_an_epoch_ends_there():
    slates = slates_of("abcdef")
    found = step_batches(slates, 2, together=1, seed=0, first_step=0, total_steps=4)
    assert len(list(found)) == 4


def test_configured_parts_are_read_with_their_items(tmp_path, make_slate):
    slate = make_slate(seed=3)
    write_slates(tmp_path / "test.jsonl", [slate], by_id=True)
    items = {item.item_id: item for item in (*slate.history, *slate.candidates)}
    write_items(tmp_path / "texts.jsonl", items.values())
    data = DataConfig(test=tmp_path / "test.jsonl", items=tmp_path / "texts.jsonl")
    assert read_part(data, "any", "test") == [slate]
    with pytest.raises(ConfigError, match=r"data\.train is not set.*--set data\.train"):
        read_part(data, "any", "train")


def test_without_files_the_domains_sample_is_read():
    assert part_path(DataConfig(), "news", "valid") == sample_path("news", "valid")
    with pytest.raises(ConfigError, match=r"'cooking' has no embedded sample.*data\.valid"):
        part_path(DataConfig(), "cooking", "valid")


def test_a_folders_parts_are_found_by_name(tmp_path):
    for name in ("train.jsonl", "valid.parquet", "items.jsonl"):
        (tmp_path / name).touch()
    found = folder_data(tmp_path)
    assert (found.train, found.valid) == (tmp_path / "train.jsonl", tmp_path / "valid.parquet")
    assert found.test is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no train, valid or test file"):
        folder_data(tmp_path / "empty")


def test_the_fingerprint_tells_labels_order_items_and_their_content_apart(make_slate):
    slates = [make_slate(seed=i) for i in range(3)]
    same = fingerprint(slates)
    assert fingerprint([make_slate(seed=i) for i in range(3)]) == same
    reordered = Item("x", {"b": "1", "a": "2"}), Item("x", {"a": "2", "b": "1"})
    assert len({fingerprint([replace(slates[0], history=(item,))]) for item in reordered}) == 1
    other_labels = [replace(slates[0], labels=(0.0, 1.0, 0.0, 0.0)), *slates[1:]]
    other_history = [replace(slates[0], history=()), *slates[1:]]
    retold = Item(slates[0].candidates[0].item_id, {"title": "another title"})
    other_text = [replace(slates[0], candidates=(retold, *slates[0].candidates[1:])), *slates[1:]]
    changed = [slates[::-1], slates[:2], other_labels, other_history, other_text]
    assert same not in map(fingerprint, changed)


def test_feature_names_are_those_of_any_candidate_in_order(make_slate):
    slates = [make_slate(features=["b"]), make_slate(seed=1), make_slate(seed=2, features=["a"])]
    assert feature_names(facts(slates).features) == ("a", "b")


def test_only_the_wanted_features_are_read_and_a_wrong_name_is_explained(make_slate):
    found = facts([make_slate(features=("recency", "popularity"))]).features
    assert feature_names(found, ("recency",)) == ("recency",)
    assert feature_names(found, ()) == ()
    with pytest.raises(ConfigError, match=r"data\.features.*'recent'.*did you mean 'recency'"):
        feature_names(found, ("recent",))

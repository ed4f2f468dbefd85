# ruff: noqa: F811 - make_config is a fixture
"""Training slates that differ from epoch to epoch: the order of candidates, fields left out."""

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import WORDS
from test_training import (  # noqa: F401 - make_config is a fixture
    LIKED,
    OTHER,
    assert_same_weights,
    assert_untouched,
    logged,
    make_config,
    make_slates,
    run_folder,
    state_of,
    untimed,
)

from peftrank.config import Config, PromptConfig, load_config
from peftrank.errors import ConfigError
from peftrank.evaluation import evaluate
from peftrank.ranker import Ranker
from peftrank.training import loop, train
from peftrank.training.augment import shuffled, with_fields_dropped
from peftrank.types import Item, Slate

JOINT = {"mode": "joint", "chat": "off", "template": {"candidate": "- {{ title }}\n"}}
BRANDED = {
    "fields": ["title", "brand"],
    "template": {
        "history": "- {{ brand }} {{ title }}\n",
        "candidate": "{{ brand }} {{ title }}",
    },
}


@pytest.fixture
def make_prompted(make_config):
    """Returns a maker of configurations with keys of `prompt`."""

    def make(prompt, **given):
        config = make_config(**given)
        return config.model_copy(update={"prompt": PromptConfig.model_validate(prompt)})

    return make


def full_slate():
    """A slate with everything that belongs to candidates, told apart by numbers."""
    n = range(6)
    return Slate(
        "s",
        "u",
        (Item("h", {"title": "amber"}),),
        tuple(Item(f"c{i}", {"title": WORDS[i]}, {"price": float(i)}) for i in n),
        labels=tuple(float(i) for i in n),
        weights=tuple(float(10 * i) for i in n),
        tasks={"click": tuple(None if i == 3 else float(100 * i) for i in n)},
        history_feedback=(4.0,),
    )


# --- the order of candidates


def test_what_belongs_to_a_candidate_moves_with_it():
    slate = full_slate()
    moved = shuffled(slate, seed=0, epoch=0)
    assert moved.candidates != slate.candidates
    for item, label, weight, click in zip(
        moved.candidates, moved.labels, moved.weights, moved.tasks["click"], strict=True
    ):
        i = int(item.item_id[1:])
        assert item is slate.candidates[i]
        assert (label, weight, click) == (i, 10 * i, None if i == 3 else 100 * i)
    assert sorted(moved.labels) == sorted(slate.labels)
    rest = {"candidates": (), "labels": None, "weights": None, "tasks": {}}
    assert replace(moved, **rest) == replace(slate, **rest)


def test_orders_are_of_the_seed_the_epoch_and_the_slate_and_all_are_equally_likely():
    slate = full_slate()
    first = shuffled(slate, seed=0, epoch=0)
    assert shuffled(slate, seed=0, epoch=0) == first
    others = [(1, 0, slate), (0, 1, slate), (0, 0, replace(slate, slate_id="t"))]
    for seed, epoch, other in others:
        assert shuffled(other, seed=seed, epoch=epoch).labels != first.labels
    places = np.zeros((6, 6))
    for epoch in range(1200):
        for place, label in enumerate(shuffled(slate, seed=0, epoch=epoch).labels):
            places[place, int(label)] += 1
    assert abs(places - 200).max() < 60  # 4.6 standard deviations


def first_is_right(n, seed, place):
    """Slates whose one relevant candidate has a word of LIKED and stands at `place`."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        words = [rng.choice(LIKED if j == place else OTHER) for j in range(4)]
        candidates = tuple(Item(f"{i}-{j}", {"title": w}) for j, w in enumerate(words))
        labels = tuple(float(j == place) for j in range(4))
        made.append(Slate(f"s{i}", f"u{i}", (), candidates, labels))
    return made


@pytest.mark.parametrize("shuffle", [False, True])
def test_only_shuffled_lists_teach_the_words_and_not_the_place(
    shuffle, tiny_decoder, make_prompted, tmp_path
):
    config = make_prompted(
        JOINT, train=first_is_right(64, 0, 0), valid=first_is_right(8, 1, 0), batch_size=16,
        max_steps=50, eval_steps=50, shuffle_candidates=shuffle,
    )  # fmt: skip
    path = train(config, output=tmp_path / "out", base=tiny_decoder)
    with Ranker(tiny_decoder) as ranker:
        ranker.load_adapter(path)
        same, other = (
            evaluate(ranker, first_is_right(60, 9, place), domain="demo", metrics=["hit@1"])
            for place in (0, 3)
        )
    assert same.mean("hit@1") > 0.8
    assert (other.mean("hit@1") > 0.6) == shuffle
    assert (other.mean("hit@1") < 0.3) == (not shuffle)


# --- fields that are left out


def branded(n, seed=0, users=2, brand="acme"):
    rng = random.Random(seed)

    def item(i):
        word = rng.choice(WORDS)
        return Item(f"{word}-{i}", {"title": word, "brand": brand, "unread": "x"}, {"price": 1.0})

    return [
        Slate(
            f"s{i}", f"u{i % users}", tuple(item(i % users * 100 + j) for j in range(3)),
            tuple(item(1000 + 10 * i + j) for j in range(4)), (1.0, 0.0, 0.0, 0.0),
        )
        for i in range(n)
    ]  # fmt: skip


def dropped(slate, p=0.5, seed=0, epoch=0, kept=("title",)):
    return with_fields_dropped(slate, {"brand": p}, kept, seed=seed, epoch=epoch)


def lacking(slate):
    return [i.item_id for i in (*slate.history, *slate.candidates) if "brand" not in i.fields]


def test_a_field_is_left_out_as_often_as_was_asked_and_nothing_else_is():
    slates = branded(500)
    found = [dropped(slate, 0.3) for slate in slates]
    candidates = [item for slate in found for item in slate.candidates]
    share = np.mean(["brand" not in item.fields for item in candidates])
    assert 0.26 < share < 0.34
    for slate, now in zip(slates, found, strict=True):
        assert [*map(len, (now.history, now.candidates))] == [3, 4]
        before, after = (*slate.history, *slate.candidates), (*now.history, *now.candidates)
        for item, changed in zip(before, after, strict=True):
            assert {**changed.fields, "brand": "acme"} == item.fields
            assert (changed.item_id, changed.features) == (item.item_id, item.features)
        rest = {"history": (), "candidates": ()}
        assert replace(now, **rest) == replace(slate, **rest)


def test_what_is_left_out_is_of_the_seed_and_the_epoch_and_one_for_all_slates_of_a_user():
    slate = branded(1)[0]
    assert dropped(slate) == dropped(slate)
    long = replace(
        slate, candidates=tuple(Item(str(i), slate.candidates[0].fields) for i in range(40))
    )
    for other in ({"seed": 1}, {"epoch": 1}):
        assert lacking(dropped(long, **other)) != lacking(dropped(long))
    another = replace(long, slate_id="later")
    assert lacking(dropped(another)) == lacking(dropped(long))
    assert lacking(dropped(replace(long, user_id="other"))) != lacking(dropped(long))


def test_an_item_that_would_be_left_without_text_loses_nothing():
    bare = Item("a", {"brand": "acme"})
    slate = Slate("s", "u", (bare,), (bare, replace(bare, fields={"brand": "b", "title": ""})))
    for epoch in range(20):
        assert dropped(slate, 0.9, epoch=epoch) == slate


def bought_by_brand(n, seed, brands=True):
    """The relevant item has a word of LIKED as its title and, if there are brands, the good one."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        right = rng.randrange(4)
        candidates = []
        for j in range(4):
            fields = {"title": rng.choice(LIKED if j == right else OTHER)}
            if brands:
                fields["brand"] = "yes" if j == right else "no"
            candidates.append(Item(f"{i}-{j}", fields))
        labels = tuple(float(j == right) for j in range(4))
        made.append(Slate(f"s{i}", f"u{i}", (), tuple(candidates), labels))
    return made


def test_left_out_fields_teach_what_to_do_without_them(tiny_decoder, make_prompted, tmp_path):
    cold, found = bought_by_brand(80, 9, brands=False), {}
    for name, dropout in (("never", {}), ("half", {"brand": 0.5})):
        config = make_prompted(
            BRANDED, train=bought_by_brand(64, 0), valid=bought_by_brand(8, 1), batch_size=16,
            max_steps=40, eval_steps=40, field_dropout=dropout,
        )  # fmt: skip
        path = train(config, output=tmp_path / name, base=tiny_decoder)
        with Ranker(tiny_decoder) as ranker:
            ranker.load_adapter(path)
            for_known = evaluate(ranker, bought_by_brand(40, 8), domain="demo", metrics=["hit@1"])
            assert for_known.mean("hit@1") > 0.9
            found[name] = evaluate(ranker, cold, domain="demo", metrics=["hit@1"]).mean("hit@1")
    assert found["half"] > found["never"] + 0.15


# --- in a run

BOTH = {"shuffle_candidates": True, "field_dropout": {"brand": 0.5}}
BOTH_PROMPT = {**BRANDED, **{k: v for k, v in JOINT.items() if k != "template"}}


def test_a_run_reads_each_epochs_own_slates_and_evaluates_the_given_ones(
    tiny_decoder, make_prompted, tmp_path, monkeypatch
):
    read, backward, evaluated = [], loop._backward, []
    measure = loop.per_slate

    def noted(run, slates):
        read.append([(run.step, slate) for slate in slates])
        return backward(run, slates)

    def measured(metric, slates, scores):
        evaluated.extend(slates)
        return measure(metric, slates, scores)

    monkeypatch.setattr(loop, "_backward", noted)
    monkeypatch.setattr(loop, "per_slate", measured)
    slates, valid = branded(8), branded(4, seed=1)
    config = make_prompted(BOTH_PROMPT, train=slates, valid=valid, max_steps=6, **BOTH)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    given = {slate.slate_id: slate for slate in slates}
    rows = [pair for step in read for pair in step]
    assert len(rows) == 24
    for step, slate in rows:
        as_expected = dropped(given[slate.slate_id], epoch=step // 2)
        assert slate == shuffled(as_expected, seed=0, epoch=step // 2)
    assert len({str(slate.candidates) for _, slate in rows if slate.slate_id == "s0"}) == 3
    assert {slate.slate_id: slate for slate in evaluated} == {s.slate_id: s for s in valid}


def test_a_run_with_both_resumes_bit_identically(tiny_decoder, make_prompted, tmp_path):
    config = make_prompted(
        BOTH_PROMPT, train=branded(10), valid=branded(4, seed=1), max_steps=8, checkpoint_steps=2,
        **BOTH,
    )  # fmt: skip
    output = tmp_path / "out"
    whole = train(config, output=output, base=tiny_decoder)
    rows = untimed(logged(output))
    for step in (4, 6):  # within the second epoch of three steps, and at its end
        saved = run_folder(output) / f"checkpoint-{step}"
        assert_same_weights(train(config, output=output, base=tiny_decoder, resume=saved), whole)
        assert untimed(logged(output)) == rows
    plain = config.training.model_copy(update={"shuffle_candidates": False, "field_dropout": {}})
    other = train(
        config.model_copy(update={"training": plain}), output=tmp_path / "b", base=tiny_decoder
    )
    with pytest.raises(AssertionError):
        assert_same_weights(other, whole)


@pytest.mark.parametrize(
    ("prompt", "training", "message"),
    [
        ({}, {"shuffle_candidates": True}, r"shuffle_candidates is for prompt\.mode: joint.*isol"),
        (BRANDED, {"field_dropout": {"brnd": 0.5}}, r"'brnd' \(did you mean 'brand'\?\).*title, b"),
        (BRANDED, {"field_dropout": {"brand": 0.5, "title": 0.1}}, r"all fields.*\(brand, title\)"),
        (
            {**BRANDED, "template": {"candidate": "{{ brand }}"}},
            {"field_dropout": {"brand": 0.5}},
            r"all fields.*\(brand\)",
        ),
        (
            BRANDED,
            {"field_dropout": {"brand": 0.5}, "bottom_cache": "memory"},
            r"bottom_cache=memory keeps.*training\.field_dropout change",
        ),
        (
            JOINT,
            {"shuffle_candidates": True, "bottom_cache": "disk"},
            r"bottom_cache=disk keeps.*training\.shuffle_candidates",
        ),
    ],
)  # fmt: skip
def test_what_would_change_nothing_or_too_much_is_refused(
    prompt, training, message, tiny_decoder, make_prompted, tmp_path
):
    config = make_prompted(prompt, train=branded(4), valid=branded(4, seed=1), **training)
    before = state_of(tiny_decoder)
    with pytest.raises(ConfigError, match=message):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)


@pytest.mark.parametrize("probability", [0, 1, -0.5, "often"])
def test_a_probability_lies_between_0_and_1(probability):
    overrides = {"training.field_dropout.title": probability}
    with pytest.raises(ConfigError, match=r"training\.field_dropout\.title"):
        load_config(domain="news", overrides=overrides)


def test_the_keys_can_be_set_on_the_command_line():
    config = load_config(
        domain="news",
        overrides={"training.field_dropout.title": 0.5, "training.shuffle_candidates": True},
    )
    assert isinstance(config, Config)
    assert config.training.field_dropout == {"title": 0.5}
    assert config.training.shuffle_candidates

# ruff: noqa: F811 - make_config is a fixture
"""Training lists whose irrelevant candidates are drawn anew: evenly, by popularity, hard ones."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import WORDS
from test_training import (  # noqa: F401 - make_config is a fixture
    assert_same_weights,
    assert_untouched,
    logged,
    make_config,
    make_slates,
    run_folder,
    state_of,
    untimed,
)

from peftrank.config import Negatives, PromptConfig, load_config, override
from peftrank.errors import ConfigError, DataError
from peftrank.formats.slates import write_slates
from peftrank.training import loop, train
from peftrank.training.epochs import as_of_epoch
from peftrank.training.negatives import (
    catalogue,
    check_catalogue,
    drawn,
    hardest,
    irrelevant,
    redrawn,
    stage,
)
from peftrank.training.run import passes, start
from peftrank.types import Item, Slate


def item(name, title="amber"):
    return Item(name, {"title": title}, {"price": 1.0})


def users_slates(n=6, users=3, items=40, seed=0, n_candidates=5):
    """Slates over a common catalogue; in each, the second candidate is relevant."""
    rng = random.Random(seed)
    things = [
        Item(f"i{i:02}", {"title": f"{WORDS[i % 30]} {WORDS[i // 2 % 30]}"}) for i in range(items)
    ]
    made = []
    for i in range(n):
        chosen = rng.sample(things, n_candidates + 3)
        labels = tuple(float(j == 1) for j in range(n_candidates))
        made.append(Slate(f"s{i}", f"u{i % users}", tuple(chosen[:3]), tuple(chosen[3:]), labels))
    return made


# --- the catalogue


def test_the_catalogue_has_every_item_with_text_and_who_met_it():
    bare = Item("bare", {"brand": "x"})
    slates = [
        Slate("1", "a", (item("h"), item("h"), bare), (item("p"), item("n")), (2.0, 0.0)),
        Slate("2", "a", (item("h"), item("p")), (item("n", "other"), item("q")), (0.0, 1.0)),
        Slate("3", "b", (), (item("h"), bare), (1.0, 0.0)),
    ]
    found = catalogue(slates, ["title"])
    assert [i.item_id for i in found.items] == ["h", "n", "p", "q"]
    assert [i.fields["title"] for i in found.items] == ["amber"] * 4
    assert all(not i.features for i in found.items)
    assert found.met.tolist() == [2, 0, 1, 1]
    met = {(code // 4, found.items[code % 4].item_id) for code in found.known}
    assert met == {(0, "h"), (0, "p"), (0, "q"), (1, "h")}


# --- what is drawn


@pytest.mark.parametrize("popular", [False, True])
def test_drawn_items_are_distinct_and_new_to_the_user(popular):
    slates = users_slates(12)
    found = catalogue(slates, ["title"])
    for slate in slates:
        met = {
            i.item_id
            for s in slates
            if s.user_id == slate.user_id
            for i in (*s.history, s.candidates[1])
        }
        for count in (1, 7, 100):
            for epoch in range(5):
                chosen = drawn(slate, found, count, popular=popular, seed=0, epoch=epoch)
                names = [i.item_id for i in chosen]
                assert len(set(names)) == len(names) == min(count, len(found.items) - len(met))
                assert met.isdisjoint(names)


def test_draws_are_of_the_seed_the_epoch_and_the_slate():
    slates = users_slates(6)
    found = catalogue(slates, ["title"])

    def names(slate=slates[0], **given):
        return drawn(slate, found, 8, **{"popular": False, "seed": 0, "epoch": 0, **given})

    assert names() == names()
    others = [names(seed=1), names(epoch=1), names(slates[3]), names(popular=True)]
    assert all(other != names() for other in others)


@pytest.mark.parametrize("popular", [False, True])
def test_items_are_drawn_evenly_or_as_often_as_users_met_them(popular):
    met = {"a": 1, "b": 2, "c": 6, "d": 0}
    slates = [
        Slate(f"{name}{i}", f"{name}{i}", (), (item(name), item("d")), (1.0, 0.0))
        for name, count in met.items()
        for i in range(count)
    ]
    found = catalogue([*slates, Slate("s", "new", (), (item("d"),), (0.0,))], ["title"])
    one = Counter(
        drawn(replace(slates[0], user_id="new"), found, 1, popular=popular, seed=0, epoch=epoch)[0]
        .item_id
        for epoch in range(3000)
    )  # fmt: skip
    expected = {n: c / 9 for n, c in met.items()} if popular else dict.fromkeys(met, 1 / 4)
    for name, share in expected.items():
        assert abs(one[name] / 3000 - share) < 0.035  # 4 standard deviations
    # Where the draw has no more to offer, items that nobody met come last.
    everything = drawn(
        replace(slates[0], user_id="new"), found, 4, popular=popular, seed=0, epoch=0
    )
    assert sorted(i.item_id for i in everything) == ["a", "b", "c", "d"]


def test_irrelevant_candidates_are_replaced_in_their_places_and_nothing_else_is():
    slate = Slate(
        "s", "u", (item("h"),), tuple(item(c) for c in "abcd"), (0.0, 2.0, 0.0, 1.0),
        timestamp=1.0, domain="demo", weights=(0.5, 3.0, 0.5, 2.0),
    )  # fmt: skip
    assert irrelevant(slate) == 2
    changed = redrawn(slate, [item("x"), item("y")])
    assert [i.item_id for i in changed.candidates] == ["x", "b", "y", "d"]
    assert changed.candidates[1] is slate.candidates[1]
    assert changed.weights == (1.0, 3.0, 1.0, 2.0)
    rest = {"candidates": (), "weights": None}
    assert replace(changed, **rest) == replace(slate, **rest)
    assert redrawn(replace(slate, weights=None), [item("x"), item("y")]).weights is None


def test_the_hardest_score_highest_but_for_the_share_that_is_skipped():
    pool = [item(name) for name in "hgfedcba"]
    scores = [5.0, 1.0, 7.0, 3.0, 3.0, -2.0, 9.0, 3.0]
    assert "".join(i.item_id for i in hardest(pool, scores, 3, 0.0)) == "bfh"
    assert "".join(i.item_id for i in hardest(pool, scores, 3, 0.25)) == "had"  # ties by id
    assert "".join(i.item_id for i in hardest(pool, scores, 3, 0.24)) == "fha"


def test_each_epoch_has_its_stage_and_the_last_one_stays():
    settings = Negatives(schedule=("uniform", "hard"))
    assert [stage(settings, epoch) for epoch in range(4)] == ["uniform", "hard", "hard", "hard"]
    by_default = Negatives()
    assert [stage(by_default, e) for e in range(4)] == ["uniform", "popularity", "hard", "hard"]


# --- in a run


def of_epoch(run, epoch):
    step = epoch * -(-len(run.train) // run.config.training.batch_size)
    return as_of_epoch(run, run.train, step)


def test_hard_candidates_are_the_pools_best_by_the_model_as_it_is(
    tiny_decoder, make_config, tmp_path
):
    slates = users_slates(9)
    settings = {"schedule": ["hard"], "pool": 21, "skip": 0.1}
    config = make_config(train=slates, negatives=settings, micro_tokens=200)
    run = start(config, tmp_path, tiny_decoder)
    try:
        lists = []
        for weights_seed in (1, 2):
            torch.manual_seed(weights_seed)
            with torch.no_grad():
                for p in run.model.parameters():
                    if p.requires_grad:
                        p.add_(0.3 * torch.randn_like(p))
            state = torch.get_rng_state()
            lists.append(of_epoch(run, 2))
            assert torch.equal(torch.get_rng_state(), state)
            for slate, changed in zip(run.train, lists[-1], strict=True):
                pool = drawn(slate, run.catalogue, 21, popular=False, seed=0, epoch=2)
                alone = {}
                for each in pool:
                    single = replace(slate, candidates=(each,), labels=None)
                    ((_, batch),) = passes(run, [single])
                    with torch.no_grad():
                        alone[each.item_id] = float(run.model(batch))
                best = sorted(alone, key=alone.get, reverse=True)[2:6]
                found = [
                    i.item_id
                    for i, y in zip(changed.candidates, changed.labels, strict=True)
                    if not y
                ]
                assert found == best
                assert changed.candidates[1] == slate.candidates[1]
        assert lists[0] != lists[1]  # another model, other negatives
    finally:
        run.adapted.unload()


def test_a_run_follows_its_schedule_and_evaluates_the_given_lists(
    tiny_decoder, make_config, tmp_path, monkeypatch
):
    read, evaluated = [], []
    backward, measure = loop._backward, loop.per_slate

    def noted(run, slates):
        read.append((run.step, run.catalogue, slates))
        return backward(run, slates)

    def measured(metric, slates, scores):
        evaluated.extend(slates)
        return measure(metric, slates, scores)

    monkeypatch.setattr(loop, "_backward", noted)
    monkeypatch.setattr(loop, "per_slate", measured)
    slates, valid = users_slates(8), users_slates(4, seed=1)
    settings = {"schedule": ["popularity", "uniform"]}
    config = make_config(train=slates, valid=valid, negatives=settings, max_steps=6)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    given = {slate.slate_id: slate for slate in slates}
    assert [step for step, _, _ in read] == list(range(6))
    for step, found, lists in read:
        epoch = step // 2
        for slate in lists:
            original = given[slate.slate_id]
            popular = epoch == 0
            items = drawn(original, found, 4, popular=popular, seed=0, epoch=epoch)
            assert slate == redrawn(original, items)
    assert {slate.slate_id: slate for slate in evaluated} == {s.slate_id: s for s in valid}


def test_hard_lists_cost_more_than_even_ones(tiny_decoder, make_config, tmp_path):
    losses = {}
    for kind in ("uniform", "hard"):
        settings = {"schedule": ["uniform", kind], "skip": 0.0}
        config = make_config(
            train=users_slates(24, items=60), negatives=settings, batch_size=24, max_steps=2
        )
        train(config, output=tmp_path / kind, base=tiny_decoder)
        losses[kind] = [row["loss"] for row in logged(tmp_path / kind)]
    assert losses["hard"][0] == losses["uniform"][0]
    assert losses["hard"][1] > losses["uniform"][1] + 0.05


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_mining_run_resumes_bit_identically(method, tiny_decoder, make_config, tmp_path):
    """10 slates in batches of 4: an epoch is 3 steps, and hard ones begin with the second."""
    settings = {"schedule": ["uniform", "hard"], "pool": 12}
    config = make_config(
        method, train=users_slates(10), negatives=settings, max_steps=9, checkpoint_steps=2,
        eval_steps=3,
    )  # fmt: skip
    output = tmp_path / "out"
    whole = train(config, output=output, base=tiny_decoder)
    rows = untimed(logged(output))
    for step in (6, 8):
        saved = run_folder(output) / f"checkpoint-{step}"
        assert_same_weights(train(config, output=output, base=tiny_decoder, resume=saved), whole)
        assert untimed(logged(output)) == rows
    given = config.training.model_copy(update={"negatives": None})
    other = train(
        config.model_copy(update={"training": given}), output=tmp_path / "b", base=tiny_decoder
    )
    with pytest.raises(AssertionError):
        assert_same_weights(other, whole)


def test_slates_read_at_their_step_give_the_same_run(tiny_decoder, make_config, tmp_path):
    slates = users_slates(10)
    settings = {"schedule": ["uniform", "hard"], "pool": 12}
    config = make_config(train=slates, negatives=settings, max_steps=6)
    write_slates(tmp_path / "train.parquet", slates)
    stored = override(config, {"data.train": str(tmp_path / "train.parquet")}, source="test")
    assert_same_weights(
        train(config, output=tmp_path / "a", base=tiny_decoder),
        train(stored, output=tmp_path / "b", base=tiny_decoder),
    )


# --- what cannot be


def with_features(slates):
    return [
        replace(s, candidates=tuple(replace(i, features={"fit": 1.0}) for i in s.candidates))
        for s in slates
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"training.bottom_cache": "memory"}, r"bottom_cache=memory keeps.*training\.negatives"),
        ({"prompt.mode": "set"}, r"by their scores.*prompt\.mode: set depend.*isolated"),
        ({"loss.tasks": {"click": {"name": "bce"}}}, r"values for loss\.tasks are not known"),
        ({"training.negatives.pool": 5, "training.negatives.skip": 0.4},
         r"'s0' needs 4 hard candidates out of a pool of 5 without the first 2\..*pool \(now 5\)"),
    ],
)  # fmt: skip
def test_what_drawn_candidates_cannot_have_is_refused(
    more, message, tiny_decoder, make_config, tmp_path
):
    config = make_config(train=users_slates(6), negatives={})
    before = state_of(tiny_decoder)
    with pytest.raises(ConfigError, match=message):
        train(override(config, more, source="test"), output=tmp_path / "out", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)


def test_features_are_refused_unless_the_readout_reads_none(tiny_decoder, make_config, tmp_path):
    config = make_config(train=with_features(users_slates(6)), negatives={}, max_steps=1)
    with pytest.raises(ConfigError, match=r"not known.*features \(fit\).*data\.features: \[\]"):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    without = override(config, {"data.features": []}, source="test")
    train(without, output=tmp_path / "out", base=tiny_decoder)


def test_candidates_are_compared_in_set_mode_with_easy_negatives(
    tiny_decoder, make_config, tmp_path
):
    settings = {"schedule": ["uniform", "popularity"]}
    config = make_config(train=users_slates(6), negatives=settings)
    prompt = PromptConfig(mode="set")
    train(config.model_copy(update={"prompt": prompt}), output=tmp_path / "out", base=tiny_decoder)


def test_too_few_items_are_counted_before_anything_is_trained():
    slates = users_slates(2, users=1, items=8)  # the user met some of the few items
    found = catalogue(slates, ["title"])
    there = len(found.items) - len(found.known)
    assert there < 4
    with pytest.raises(DataError, match=rf"'s0': .* draws 4 candidates.* has {there} items.*'u0'"):
        check_catalogue(found, slates, Negatives(schedule=("uniform",)))


@pytest.mark.parametrize(
    ("key", "value"), [("schedule", []), ("schedule", ["easy"]), ("pool", 0), ("skip", 1)]
)
def test_settings_are_checked_by_key(key, value):
    with pytest.raises(ConfigError, match=rf"training\.negatives\.{key}"):
        load_config(domain="news", overrides={f"training.negatives.{key}": value})


def test_a_section_that_is_absent_by_default_takes_keys():
    config = load_config(domain="news")
    assert config.training.negatives is None
    changed = override(config, {"training.negatives.pool": 80}, source="test")
    assert changed.training.negatives == Negatives(pool=80)

"""What training gives a loss beside scores and labels: weights of clicks, a frozen reference."""

import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from peftrank.config import Config, Propensity, load_config
from peftrank.doctor import memory_plan
from peftrank.errors import ConfigError, DataError
from peftrank.formats.slates import write_slates
from peftrank.losses.softmax import softmax
from peftrank.model import hidden_states, read
from peftrank.ranker import Ranker
from peftrank.training import checkpoint, train
from peftrank.training.loop import _optimize, _reference_scores
from peftrank.training.objective import with_propensity
from peftrank.training.run import passes, start
from peftrank.types import Item, Slate

_SLATE = Slate(
    "s0", "u1", (), tuple(Item(name, {"title": name}) for name in "abc"), (1.0, 0.0, 0.0)
)
METHODS = {
    "lora": {"r": 2, "dropout": 0.1},
    "adalora": {"init_r": 4, "target_r": 2},
    "adapter": {"size": 4, "layernorm": True},
    "ia3": {},
}


@pytest.fixture
def make_config(tmp_path, make_slate):
    """Returns a maker of configurations of 4 steps over `train`, absent: 6 slates."""

    def make(method="lora", *, train=None, loss=None, readout="score_head", **training):
        parts = {
            "train": train or [make_slate(seed=i, user_id=f"u{i % 2}") for i in range(6)],
            "valid": [make_slate(seed=i) for i in (7, 8)],
        }
        files = {name: tmp_path / "data" / f"{name}.jsonl" for name in parts}
        for name, slates in parts.items():
            write_slates(files[name], slates)
        defaults = {"max_steps": 4, "batch_size": 3, "eval_steps": 4, "learning_rate": 1e-2}
        return Config.model_validate(
            {
                "domain": "demo",
                "base": {"name": "tiny", "quantization": "none"},
                "method": {"name": method, **METHODS[method]},
                "readout": {"name": readout},
                "loss": loss or {},
                "data": files,
                "training": {**defaults, **training},
            }
        )

    return make


def logged(output):
    (log,) = (output / "demo" / ".runs").glob("*/metrics.jsonl")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def tensors(path):
    names = ("adapter_model.safetensors", "readout.safetensors")
    return {(n, k): tensor for n in names for k, tensor in load_file(path / n).items()}


# --- weights


def first_gradients(config, base, folder):
    """Returns the loss and the gradients of the first step of a run, by parameter."""
    run = start(config, folder, base)
    try:
        found = {}
        run.optimizer.zero_grad = lambda: found.update(
            {i: p.grad.clone() for i, p in enumerate(run.readout.parameters())}
        )
        return _optimize(run, run.train)["loss"], found
    finally:
        run.adapted.unload()


def test_weights_of_slates_multiply_what_training_minimises(
    tiny_decoder, make_config, make_slate, tmp_path
):
    slates = [make_slate(seed=i) for i in range(3)]
    plain = first_gradients(make_config(train=slates, max_grad_norm=1e9), tiny_decoder, tmp_path)
    # One slate without weights among others counts as before.
    doubled = [replace(s, weights=(2.0,) * 4) for s in slates[:2]] + slates[2:]
    config = make_config(train=doubled, max_grad_norm=1e9)
    twice = first_gradients(config, tiny_decoder, tmp_path)
    only = first_gradients(
        make_config(
            train=[replace(s, weights=(0.0,) * 4) for s in slates[:2]] + slates[2:],
            max_grad_norm=1e9,
        ),
        tiny_decoder,
        tmp_path,
    )
    assert twice[0] == pytest.approx(2 * plain[0] - only[0], rel=1e-5)
    assert twice[0] != pytest.approx(plain[0], rel=1e-2)
    for i, gradient in plain[1].items():
        torch.testing.assert_close(twice[1][i], 2 * gradient - only[1][i], rtol=1e-4, atol=1e-6)


def test_weights_that_a_loss_cannot_use_are_refused(
    tiny_decoder, make_config, make_slate, monkeypatch, tmp_path
):
    own = types.SimpleNamespace(loss=lambda scores, labels, mask: softmax(scores, labels, mask))
    monkeypatch.setitem(sys.modules, "own_loss", own)
    slates = [make_slate(seed=0), replace(make_slate(seed=1), weights=(1.0,) * 4)]
    config = make_config(train=slates, loss={"name": "own_loss:loss"})
    with pytest.raises(ConfigError, match=r"slate 's1' has weights.*own_loss:loss"):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    config = make_config(loss={"name": "own_loss:loss", "propensity": {"power": 1}})
    with pytest.raises(ConfigError, match=r"loss\.propensity"):
        train(config, output=tmp_path / "out", base=tiny_decoder)


@given(
    labels=st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=1, max_size=30),
    power=st.floats(0, 3),
    largest=st.floats(1, 100),
)
def test_a_click_weighs_the_inverse_of_its_chance_to_be_looked_at(labels, power, largest):
    items = tuple(Item(str(i), {"title": "x"}) for i in range(len(labels)))
    given_ = Propensity(power=power, largest_weight=largest)
    slate = replace(_SLATE, candidates=items, labels=tuple(labels))
    weighted = with_propensity(slate, given_)
    for position, (label, weight) in enumerate(zip(labels, weighted.weights, strict=True), 1):
        expected = min(position**power, largest) if label > 0 else 1.0
        assert weight == pytest.approx(expected)
    assert replace(weighted, weights=None) == slate


def test_positions_may_be_a_feature_and_chances_a_list():
    places = (3, 1, 2)
    items = tuple(
        replace(item, features={"place": float(place)})
        for item, place in zip(_SLATE.candidates, places, strict=True)
    )
    slate = replace(_SLATE, candidates=items, labels=(1.0, 1.0, 0.0))
    chances = Propensity(examination=[0.8, 0.5], position="place")
    weighted = with_propensity(slate, chances)
    assert weighted.weights == (1 / 0.5, 1 / 0.8, 1.0)  # the last chance holds for place 3
    for bad in (None, 0.0, 1.5):
        features = {} if bad is None else {"place": bad}
        wrong = replace(slate, candidates=(replace(items[0], features=features), *items[1:]))
        with pytest.raises(DataError, match=r"slate 's0'.*'place'.*position"):
            with_propensity(wrong, chances)
    with pytest.raises(DataError, match="weights of its own"):
        with_propensity(weighted, chances)


def test_propensities_are_configured_and_refused_by_key(tmp_path):
    def loaded(propensity):
        return load_config(domain="news", overrides={"loss.propensity": propensity}).loss

    found = loaded({"power": 0.5, "largest_weight": 4}).propensity
    assert (found.power, found.largest_weight) == (0.5, 4)
    assert loaded({"power": 1}).options == loaded(None).options  # no option of the loss itself
    for bad, message in (
        ({}, "give one of power and examination"),
        ({"power": 1, "examination": [1.0]}, "give one of power and examination"),
        ({"power": -1}, r"loss\.propensity\.power"),
        ({"examination": [0.5, 0]}, r"loss\.propensity\.examination\.1"),
        ({"powr": 1}, r"unknown key 'loss\.propensity\.powr' \(did you mean 'power'\?\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded(bad)


def test_a_run_with_propensities_trains_and_is_published(tiny_decoder, make_config, tmp_path):
    config = make_config(loss={"name": "listnet", "normalise": False, "propensity": {"power": 1}})
    path = train(config, output=tmp_path / "out", base=tiny_decoder)
    manifest = json.loads((path / "peftrank.json").read_text(encoding="utf-8"))
    assert manifest["config"]["loss"]["propensity"]["power"] == 1


# --- reference


@pytest.mark.parametrize("readout", ["score_head", "likelihood"])
@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_base_without_the_adapter(
    method, readout, tiny_decoder, make_config, tmp_path
):
    loss = {"name": "softmax_dpo", "beta": 0.5}
    config = make_config(method, loss=loss, readout=readout, learning_rate=5e-2)
    run = start(config, tmp_path, tiny_decoder)
    try:
        ((_, batch),) = passes(run, run.train)
        with torch.no_grad():
            before = run.model(batch).clone()
        trained = {p for p in run.model.parameters() if p.requires_grad}
        for _ in range(3):
            _optimize(run, run.train)
            run.step += 1
        after = _reference_scores(run, batch, None)
        assert {p for p in run.model.parameters() if p.requires_grad} == trained
        with torch.no_grad():
            assert not torch.allclose(run.model(batch), before, atol=1e-3)
            bare = run.adapted.unload()
            assert bare is run.base.model
            expected = read(run.reference, hidden_states(run.base, batch), batch)
        torch.testing.assert_close(after, expected)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    finally:
        run.adapted.unload()


def test_softmax_dpo_starts_where_nothing_is_preferred(tiny_decoder, make_config, tmp_path):
    config = make_config(loss={"name": "softmax_dpo"}, readout="likelihood", max_steps=12)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    losses = [row["loss"] for row in logged(tmp_path / "out")]
    assert losses[0] == pytest.approx(math.log(4), abs=1e-5)  # one of four, all rewards 0
    assert min(losses) < losses[0] - 0.05


def test_a_resumed_run_keeps_its_reference(tiny_decoder, make_config, tmp_path):
    config = make_config(loss={"name": "softmax_dpo", "beta": 2.0}, checkpoint_steps=2)
    whole = train(config, output=tmp_path / "out", base=tiny_decoder)
    (folder,) = (tmp_path / "out" / "demo" / ".runs").iterdir()
    torch.manual_seed(99)
    saved = checkpoint.load(folder / "checkpoint-2")
    assert "reference" in saved.groups
    again = train(
        config, output=tmp_path / "out", base=tiny_decoder, resume=folder / "checkpoint-2"
    )
    a, b = tensors(whole), tensors(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    with Ranker(tiny_decoder) as ranker:
        assert ranker.load_adapter(again) == "demo"


def test_doctor_plans_a_loss_with_a_reference(workplace):
    settings = {
        "base": {"name": str(workplace / "base"), "quantization": "none"},
        "loss": {"name": "softmax_dpo"},
        "method.layers": "all",
        "data": {p: str(workplace / "data" / f"{p}.jsonl") for p in ("train", "valid")},
    }
    config = load_config(domain="news", method="lora", overrides=settings)
    assert memory_plan(config).activations > 0

"""Training on tiny bases. What a run does is read from its store, log and checkpoints."""

import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from peftrank import store
from peftrank.base import base_from_model
from peftrank.baselines.random import random as by_chance
from peftrank.config import Config
from peftrank.errors import AdapterError, ConfigError, DataError, PeftRankError
from peftrank.evaluation import evaluate, evaluate_scores
from peftrank.files import TEMPORARY
from peftrank.formats.slates import write_slates
from peftrank.losses.listnet import listnet
from peftrank.ranker import Ranker
from peftrank.training import Interrupted, checkpoint, train
from peftrank.training.loop import learning_rate_factor
from peftrank.training.run import prompt_arguments
from peftrank.types import Item, Slate

METHODS = {
    "lora": {"r": 4, "dropout": 0.1},
    "adalora": {"init_r": 4, "target_r": 2, "dropout": 0.1},
    "adapter": {"size": 4, "dropout": 0.1},
}
LIKED, OTHER = WORDS[:10], WORDS[10:]
every_method = pytest.mark.parametrize("method", METHODS)


def make_slates(n, *, seed=0, wanted=LIKED, other=OTHER, features=False, prefix="s"):
    """Slates of 4 users; the relevant one of 4 candidates has a word of `wanted` as its title."""
    rng = random.Random(seed)

    def item(words, relevant=None):
        word = rng.choice(words)
        numbers = {"fit": float(relevant) + rng.random() / 4} if features else {}
        return Item(f"{word}-{rng.random():.6f}", {"title": word}, numbers)

    made = []
    for i in range(n):
        relevant = rng.randrange(4)
        made.append(
            Slate(
                slate_id=f"{prefix}{i}",
                user_id=f"u{i % 4}",
                history=tuple(item(wanted, True) for _ in range(2)),
                candidates=tuple(
                    item(wanted if j == relevant else other, j == relevant) for j in range(4)
                ),
                labels=tuple(float(j == relevant) for j in range(4)),
            )
        )
    return made


@pytest.fixture
def make_config(tmp_path):
    """Returns a maker of configurations; slates go to files in the test's own folder."""

    def make(method="lora", *, train=None, valid=None, loss="listnet", options=None, **training):
        parts = {"train": train or make_slates(12), "valid": valid or make_slates(6, seed=1)}
        files = {name: tmp_path / "data" / f"{name}.jsonl" for name in parts}
        for name, slates in parts.items():
            write_slates(files[name], slates)
        defaults = {"max_steps": 4, "batch_size": 4, "eval_steps": 2, "learning_rate": 1e-2}
        return Config.model_validate(
            {
                "domain": "demo",
                "base": {"name": "tiny", "quantization": "none"},
                "method": {"name": method, **(METHODS[method] if options is None else options)},
                "data": files,
                "loss": {"name": loss},
                "training": {**defaults, **training},
            }
        )

    return make


@pytest.fixture
def make_loss(monkeypatch):
    """Returns a maker of losses: listnet, with `act(call)` before each; a value it returns wins."""

    def make(act):
        calls = []

        def loss(scores, labels, mask):
            calls.append(len(calls) + 1)
            given = act(calls[-1])
            return listnet(scores, labels, mask) if given is None else scores.sum(dim=1) * given

        monkeypatch.setitem(sys.modules, "own_loss", types.SimpleNamespace(loss=loss))
        return "own_loss:loss"

    return make


def run_folder(output):
    (folder,) = (output / "demo" / ".runs").iterdir()
    return folder


def logged(output):
    lines = (run_folder(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untimed(rows):
    return [
        {k: v for k, v in row.items() if not k.endswith(("_per_second", "_seconds"))}
        for row in rows
    ]


def weights(path):
    """The exported tensors, by file and name."""
    names = ("adapter_model.safetensors", "readout.safetensors")
    return {(n, k): tensor for n in names for k, tensor in load_file(path / n).items()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_untouched(base, before):
    names, state = before
    assert base.state_hash() == state
    assert [name for name, _ in base.model.named_modules()] == names
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def state_of(base):
    return [name for name, _ in base.model.named_modules()], base.state_hash()


# --- what a run leaves


@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("tiny_decoder", method) for method in METHODS), ("tiny_encoder", "lora")],
)
def test_a_run_leaves_an_active_version_and_the_base_as_it_was(
    kind, method, request, make_config, tmp_path
):
    base = request.getfixturevalue(kind)
    before = state_of(base)
    valid = make_slates(6, seed=1)
    path = train(make_config(method, valid=valid), output=tmp_path / "out", base=base)
    assert_untouched(base, before)
    assert path.parent == tmp_path / "out" / "demo"
    assert store.versions(tmp_path / "out", "demo") == (path.name,)
    assert store.active(tmp_path / "out", "demo") == path.name
    store.verify(path)
    with Ranker(base, store=tmp_path / "out") as ranker:
        assert ranker.load_adapter("demo") == "demo"
        found = evaluate(ranker, valid, domain="demo", metrics=["ndcg@10"])
    recorded = json.loads((path / "peftrank.json").read_text(encoding="utf-8"))["metrics"]
    assert recorded["valid_ndcg@10"] == pytest.approx(found.mean("ndcg@10"), abs=1e-9)
    assert recorded["steps"] == 4
    assert recorded["best_step"] in (2, 4)


def test_a_base_trains_any_number_of_times(tiny_decoder, make_config, tmp_path):
    before = state_of(tiny_decoder)
    first = train(make_config("lora"), output=tmp_path / "a", base=tiny_decoder)
    train(make_config("adalora"), output=tmp_path / "b", base=tiny_decoder)
    train(make_config("adapter"), output=tmp_path / "c", base=tiny_decoder)
    again = train(make_config("lora"), output=tmp_path / "d", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)
    assert_same_weights(first, again)


def test_another_precision_in_the_same_process_is_refused(tiny_decoder, make_config, tmp_path):
    train(make_config(max_steps=1), output=tmp_path / "a", base=tiny_decoder)
    before = state_of(tiny_decoder)
    with pytest.raises(ConfigError, match=r"mixed_precision=bf16.*first training"):
        train(make_config(mixed_precision="bf16"), output=tmp_path / "b", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)


def test_a_second_run_adds_a_version_beside_the_first(tiny_decoder, make_config, tmp_path):
    config = make_config(max_steps=1)
    first, second = (train(config, output=tmp_path / "out", base=tiny_decoder) for _ in range(2))
    assert store.versions(tmp_path / "out", "demo") == (first.name, second.name)
    assert store.active(tmp_path / "out", "demo") == second.name


def test_the_seed_decides_the_weights(tiny_decoder, make_config, tmp_path):
    config = make_config()
    paths = [
        train(config.model_copy(update={"seed": seed}), output=tmp_path / name, base=tiny_decoder)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert_same_weights(paths[0], paths[1])
    with pytest.raises(AssertionError):
        assert_same_weights(paths[0], paths[2])


def test_an_adapter_names_its_base_publicly_and_no_place_on_this_machine(
    tiny_decoder, make_config, tmp_path
):
    cached = str(tmp_path / "cache" / "models--maker--tiny")
    tiny_decoder.model.name_or_path = cached
    identity = replace(tiny_decoder.identity, model_id="maker/tiny")
    base = replace(tiny_decoder, identity=identity)
    for method in METHODS:
        path = train(make_config(method, max_steps=4), output=tmp_path / "out", base=base)
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "maker/tiny"
        for file in path.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.slow
def test_an_adapter_of_a_packaged_base_names_its_hub_id(minilm, make_config, tmp_path):
    path = train(make_config(max_steps=1), output=tmp_path, base=minilm)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"


# --- learning


@pytest.mark.parametrize("kind", ["tiny_decoder", "tiny_encoder"])
def test_training_learns_what_can_be_learned(kind, request, make_config, tmp_path):
    base = request.getfixturevalue(kind)
    slates = make_slates(64)
    config = make_config("lora", train=slates, batch_size=16, max_steps=30, eval_steps=30)
    train(config, output=tmp_path / "out", base=base)
    losses = [row["loss"] for row in logged(tmp_path / "out")]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    fresh = make_slates(60, seed=9)
    with Ranker(base, store=tmp_path / "out") as ranker:
        ranker.load_adapter("demo")
        trained = evaluate(ranker, fresh, domain="demo", metrics=["hit@1"])
    chance = evaluate_scores("random", fresh, by_chance(fresh, train=slates, seed=0), ["hit@1"])
    assert trained.interval("hit@1")[0] > chance.interval("hit@1")[1]


@pytest.mark.slow
@pytest.mark.parametrize("window", [20, 3])
def test_a_base_learns_to_name_the_best_by_its_letter(window, tiny_decoder, make_config, tmp_path):
    """In one list, and in windows that share the first candidate."""
    trained = {"batch_size": 32, "max_steps": 400, "eval_steps": 100, "learning_rate": 2e-3}
    plain = make_config("full", options={}, train=make_slates(2000), **trained)
    prompt = {"mode": "joint", "chat": "off", "window": window, "template": {"choice": "\n"}}
    config = Config.model_validate(
        {**plain.model_dump(), "prompt": prompt, "readout": {"name": "identifier"}}
    )
    fresh = make_slates(60, seed=9)
    with Ranker(tiny_decoder, store=tmp_path) as ranker:
        ranker.load_readout("plain", prompt=prompt_arguments(config), readout="identifier")
        before = evaluate(ranker, fresh, domain="plain", metrics=["ndcg@10"])
    train(config, output=tmp_path, base=tiny_decoder)
    with Ranker(tiny_decoder, store=tmp_path) as ranker:
        ranker.load_adapter("demo")
        after = evaluate(ranker, fresh, domain="demo", metrics=["ndcg@10"])
    assert after.interval("ndcg@10")[0] > max(0.9, before.interval("ndcg@10")[1])


def odd_ones(n, seed):
    """Slates of which one candidate has another first word than the three others."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        words, rest, odd = rng.sample(WORDS[:2], 2), rng.sample(WORDS[2:], 4), rng.randrange(4)
        titles = [f"{words[j == odd]} {rest[j]}" for j in range(4)]
        candidates = tuple(Item(f"{i}-{j}", {"title": title}) for j, title in enumerate(titles))
        labels = tuple(float(j == odd) for j in range(4))
        made.append(Slate(f"s{i}", f"u{i}", (), candidates, labels))
    return made


def test_only_candidates_that_are_compared_learn_which_is_the_odd_one(
    tokenizer, make_config, tmp_path
):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,  # wide, so that random layers attend to something
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = base_from_model(LlamaForCausalLM(shape), tokenizer, name="wide")
    config = make_config(
        train=odd_ones(512, 0), valid=odd_ones(20, 1), options={"r": 16, "alpha": 32},
        batch_size=32, max_steps=80, eval_steps=80, learning_rate=3e-3, readout_learning_rate=5e-3,
    )  # fmt: skip
    fresh, found = odd_ones(100, 9), {}
    for mode in ("isolated", "set"):
        prompt = config.prompt.model_copy(update={"mode": mode, "chat": "off"})
        readout = config.readout.model_copy(update={"width": 32})
        chosen = config.model_copy(update={"prompt": prompt, "readout": readout})
        path = train(chosen, output=tmp_path / mode, base=base)
        with Ranker(base) as ranker:
            ranker.load_adapter(path)
            found[mode] = evaluate(ranker, fresh, domain="demo", metrics=["hit@1"]).mean("hit@1")
    assert found["isolated"] < 0.5
    assert found["set"] > 0.9


def test_candidate_features_are_learned_and_needed(tiny_decoder, make_config, tmp_path):
    # Titles say nothing: liked and other words are the same.
    told = {"wanted": WORDS, "other": WORDS, "features": True}
    config = make_config(
        train=make_slates(48, **told),
        valid=make_slates(12, seed=1, **told),
        max_steps=30,
        batch_size=16,
        readout_learning_rate=1e-2,
    )
    path = train(config, output=tmp_path / "out", base=tiny_decoder)
    manifest = json.loads((path / "peftrank.json").read_text(encoding="utf-8"))
    assert manifest["readout"]["feature_names"] == ["fit"]
    fresh = make_slates(40, seed=9, **told)
    with Ranker(tiny_decoder) as ranker:
        ranker.load_adapter(path)
        assert evaluate(ranker, fresh, domain="demo", metrics=["hit@1"]).mean("hit@1") > 0.9
        with pytest.raises(DataError, match="fit"):
            ranker.score(make_slates(1), domain="demo")


@every_method
def test_cutting_a_batch_into_passes_changes_no_gradient(
    method, tiny_decoder, make_config, tmp_path
):
    # After one step AdamW's first moment is the clipped gradient times 1 - beta1.
    options = {k: v for k, v in METHODS[method].items() if k != "dropout"}  # masks depend on passes
    if method == "adalora":
        options["final_fraction"] = 0  # room to prune in 3 steps
    gradients, losses = [], []
    for micro_tokens in (16, 200, 8192):
        config = make_config(
            method,
            options=options,
            batch_size=12,
            micro_tokens=micro_tokens,
            max_steps=3,
            checkpoint_steps=1,
            max_grad_norm=1e6,
        )
        output = tmp_path / str(micro_tokens)
        train(config, output=output, base=tiny_decoder)
        losses.append(logged(output)[0]["loss"])
        saved = checkpoint.load(run_folder(output) / "checkpoint-1").groups["optimizer"]
        gradients.append({k: v for k, v in saved.items() if k.endswith("/exp_avg")})
    assert losses == pytest.approx([losses[-1]] * 3, rel=1e-5)
    largest = max(float(g.abs().max()) for g in gradients[-1].values())
    assert largest > 1e-3
    for other in gradients[:-1]:
        assert other.keys() == gradients[-1].keys()
        for key, gradient in gradients[-1].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-5, atol=1e-5 * largest)


def test_early_stopping_publishes_the_best_state(tiny_decoder, make_config, tmp_path):
    # On the validation part the taste is turned round, so every step of learning makes it worse.
    steady = {"warmup_ratio": 0, "schedule": "constant", "batch_size": 16, "eval_steps": 1}
    slates, valid = make_slates(48), make_slates(40, seed=1, wanted=OTHER, other=LIKED)
    config = make_config(
        "lora", train=slates, valid=valid, max_steps=40, patience=3, learning_rate=2e-3, **steady
    )
    path = train(config, output=tmp_path / "out", base=tiny_decoder)
    rows = logged(tmp_path / "out")
    values = [row["valid_ndcg@10"] for row in rows]
    best = int(np.argmax(values)) + 1
    assert len(rows) == best + 3 < 40
    metrics = json.loads((path / "peftrank.json").read_text(encoding="utf-8"))["metrics"]
    assert (metrics["best_step"], metrics["steps"]) == (best, best + 3)
    assert metrics["valid_ndcg@10"] == pytest.approx(max(values))
    shorter = config.training.model_copy(update={"max_steps": best})
    stopped = train(
        config.model_copy(update={"training": shorter}), output=tmp_path / "b", base=tiny_decoder
    )
    assert_same_weights(path, stopped)


def test_an_early_stopped_adalora_has_exactly_its_budget(tiny_decoder, make_config, tmp_path):
    valid = make_slates(20, seed=1, wanted=OTHER, other=LIKED)
    config = make_config(
        "adalora", valid=valid, max_steps=100, patience=3, eval_steps=1, learning_rate=2e-2
    )
    path = train(config, output=tmp_path / "out", base=tiny_decoder)
    assert len(logged(tmp_path / "out")) < 60  # the pruning phase would end at 70
    store.verify(path)
    tensors = load_file(path / "adapter_model.safetensors")
    ranks = [int((a != 0).any(dim=1).sum()) for name, a in tensors.items() if "lora_A" in name]
    assert sum(ranks) == METHODS["adalora"]["target_r"] * len(ranks)


# --- the log


def test_the_log_has_one_row_per_step_also_after_a_resume(tiny_decoder, make_config, tmp_path):
    config = make_config(max_steps=7, checkpoint_steps=3, eval_steps=2)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    rows = logged(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["step"] for row in rows if "valid_ndcg@10" in row] == [2, 4, 6, 7]
    assert [row["epoch"] for row in rows] == pytest.approx([i / 3 for i in range(1, 8)])
    for row in rows:
        assert row["tokens_per_second"] > row["slates_per_second"] > 0
        assert row["learning_rate"] == pytest.approx(
            1e-2 * learning_rate_factor(row["step"] - 1, 7, 0.05, "cosine")
        )
    run = run_folder(tmp_path / "out")
    train(config, output=tmp_path / "out", base=tiny_decoder, resume=run / "checkpoint-3")
    assert untimed(logged(tmp_path / "out")) == untimed(rows)


@given(
    total=st.integers(1, 500),
    ratio=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_learning_rate_warms_up_to_its_peak_and_falls_after(total, ratio, schedule):
    factors = [learning_rate_factor(step, total, ratio, schedule) for step in range(total)]
    warmup = round(ratio * total)
    rising, falling = factors[:warmup], factors[warmup:]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(factor < 1 for factor in rising)
    if falling:
        assert falling[0] == 1
        assert all(a >= b for a, b in itertools.pairwise(falling))
        assert schedule != "constant" or falling[-1] == 1
        assert schedule == "constant" or falling[-1] <= 1 / len(falling) + 1e-9


# --- resuming


@every_method
@pytest.mark.parametrize(("checkpoint_steps", "kept"), [(4, (4, 8)), (3, (6, 9))])
def test_a_resumed_run_ends_bit_identically(
    method, checkpoint_steps, kept, tiny_decoder, make_config, tmp_path
):
    """12 slates in batches of 4: 4 and 8 lie within an epoch, 6 and 9 at its end."""
    config = make_config(method, max_steps=10, checkpoint_steps=checkpoint_steps, eval_steps=3)
    output = tmp_path / "out"
    whole = train(config, output=output, base=tiny_decoder)
    run = run_folder(output)
    rows = untimed(logged(output))
    assert sorted(p.name for p in run.glob("checkpoint-*")) == [f"checkpoint-{s}" for s in kept]
    for step in kept:
        resumed = train(config, output=output, base=tiny_decoder, resume=run / f"checkpoint-{step}")
        assert_same_weights(resumed, whole)
        assert untimed(logged(output)) == rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_a_checkpoint_that_continues_exactly(
    number, tiny_decoder, make_config, make_loss, tmp_path
):
    def stop(call):
        if call == 3:
            os.kill(os.getpid(), number)

    config = make_config(loss=make_loss(stop), max_steps=6)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before = state_of(tiny_decoder)
    output = tmp_path / "a store"
    with pytest.raises(Interrupted, match="after step 3 of 6") as caught:
        train(config, output=output, base=tiny_decoder)
    assert caught.value.exit_code == 1
    assert_untouched(tiny_decoder, before)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert store.versions(output, "demo") == ()
    *_, option, saved = shlex.split(str(caught.value))
    assert option == "--resume"
    assert Path(saved) == run_folder(output) / "checkpoint-3"
    resumed = train(config, output=output, base=tiny_decoder, resume=Path(saved))
    whole = train(config, output=tmp_path / "whole", base=tiny_decoder)
    assert_same_weights(resumed, whole)


def test_a_second_stop_signal_is_immediate(tiny_decoder, make_config, make_loss, tmp_path):
    def stop(call):
        if call == 2:
            waiting = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is waiting:  # two at once may count as one
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

    before = state_of(tiny_decoder)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(loss=make_loss(stop)), output=tmp_path / "out", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)
    assert store.versions(tmp_path / "out", "demo") == ()


def test_a_signal_at_the_last_step_lets_the_run_finish(
    tiny_decoder, make_config, make_loss, tmp_path
):
    def stop(call):
        if call == 4:
            signal.raise_signal(signal.SIGTERM)

    path = train(make_config(loss=make_loss(stop)), output=tmp_path / "out", base=tiny_decoder)
    assert store.active(tmp_path / "out", "demo") == path.name


def test_another_configuration_is_refused_by_key(tiny_decoder, make_config, tmp_path):
    output = tmp_path / "out"
    train(make_config(checkpoint_steps=2), output=output, base=tiny_decoder)
    before = state_of(tiny_decoder)
    changed = make_config(checkpoint_steps=2, learning_rate=0.5, options={"r": 2, "dropout": 0.1})
    with pytest.raises(ConfigError) as caught:
        train(changed, output=output, base=tiny_decoder, resume=run_folder(output))
    message = str(caught.value)
    assert "method.r (was 4, now 2)" in message
    assert "training.learning_rate (was 0.01, now 0.5)" in message
    assert "dropout" not in message
    assert_untouched(tiny_decoder, before)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_other_slates_are_refused(part, tiny_decoder, make_config, tmp_path):
    output = tmp_path / "out"
    train(make_config(checkpoint_steps=2), output=output, base=tiny_decoder)
    before = state_of(tiny_decoder)
    slates = make_slates(12) if part == "train" else make_slates(6, seed=1)
    slates[0] = replace(slates[0], history=(Item("new", {"title": "indigo"}),))
    changed = make_config(checkpoint_steps=2, **{part: slates})
    with pytest.raises(ConfigError, match="validation slates are not those"):
        train(changed, output=output, base=tiny_decoder, resume=run_folder(output))
    assert_untouched(tiny_decoder, before)


# --- checkpoints


@pytest.fixture
def saved(tiny_decoder, make_config, tmp_path):
    """A finished run's folder, with the checkpoints of steps 2 and 3; its config; its base."""
    config = make_config(checkpoint_steps=1)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    return run_folder(tmp_path / "out"), config, tiny_decoder


def test_a_runs_folder_stands_for_its_newest_checkpoint(saved):
    run, config, _ = saved
    found = checkpoint.load(run)
    assert (found.run, found.values["step"], found.config) == (run, 3, config)
    assert checkpoint.load(run / "checkpoint-2").values["step"] == 2


def test_a_checkpoint_holds_nothing_of_the_base(saved):
    run, _, base = saved
    groups = checkpoint.load(run).groups
    held = sum(t.numel() for group in groups.values() for t in group.values())
    assert held < sum(p.numel() for p in base.model.parameters())
    assert not any("embed" in name for group in groups.values() for name in group)


def truncate(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["adapter", "optimizer", "state.json"])
def test_a_damaged_checkpoint_is_refused(damage, name, saved):
    run, config, base = saved
    file = run / "checkpoint-3" / (name if "." in name else f"{name}.safetensors")
    damage(file)
    before = state_of(base)
    whole_file_gone = damage is Path.unlink and name == "state.json"
    expected = "no checkpoint here" if whole_file_gone else "checkpoint-3 is damaged"
    with pytest.raises(AdapterError, match=expected):
        train(config, output=run.parents[2], base=base, resume=run / "checkpoint-3")
    assert_untouched(base, before)
    assert checkpoint.load(run / "checkpoint-2").values["step"] == 2


def test_a_checkpoint_of_another_version_is_refused(saved):
    run, _, _ = saved
    file = run / "checkpoint-3" / "state.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in values:
        less = {name: value for name, value in values.items() if name != key}
        file.write_text(json.dumps(less), encoding="utf-8")
        with pytest.raises(AdapterError, match=f"lacks '{key}'; another version"):
            checkpoint.load(run)
    del values["sha256"]["optimizer"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(AdapterError, match="lacks 'optimizer'; another version"):
        checkpoint.load(run)


DEEP = '{"sha256": {}, "config": {"domain": "a", "method": {"x": ' + "[" * 900 + "]" * 900 + "}}}"


@pytest.mark.parametrize("text", ["[]", "3", '{"sha256": [], "config": {}}', "[" * 100_000, DEEP])
def test_a_state_of_another_shape_is_a_damaged_checkpoint(text, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text(text, encoding="utf-8")
    (tmp_path / "checkpoint-²").mkdir()  # a digit to some, but no number
    with pytest.raises(AdapterError, match="checkpoint-3 is damaged"):
        checkpoint.load(tmp_path)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no checkpoint here"):
        checkpoint.load(tmp_path)


def opened_at(handle):
    return Path(os.readlink(f"/proc/self/fd/{handle}"))


def test_a_full_disk_leaves_earlier_checkpoints_and_no_half_one(
    tiny_decoder, make_config, tmp_path, monkeypatch
):
    flush, flushed = os.fsync, []

    def full(handle):
        flushed.append(opened_at(handle).name)
        if flushed.count("optimizer.safetensors") == 2:
            raise OSError(28, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    before = state_of(tiny_decoder)
    with pytest.raises(AdapterError, match=r"checkpoint-4.*No space left.*--resume"):
        train(
            make_config(max_steps=6, checkpoint_steps=2),
            output=tmp_path / "out",
            base=tiny_decoder,
        )
    assert_untouched(tiny_decoder, before)
    run = run_folder(tmp_path / "out")
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-2", "metrics.jsonl"]
    assert checkpoint.load(run).values["step"] == 2


def test_everything_in_a_checkpoint_is_flushed_before_it_gets_its_name(
    tiny_decoder, make_config, tmp_path, monkeypatch
):
    flush, flushed, renamed = os.fsync, [], []

    def record(handle):
        flushed.append(opened_at(handle))
        flush(handle)

    rename = Path.rename

    def check(source, target):
        if Path(target).name.startswith("checkpoint-"):
            assert {*source.iterdir(), source} <= set(flushed)
            renamed.append(Path(target).name)
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    train(make_config(checkpoint_steps=3), output=tmp_path / "out", base=tiny_decoder)
    assert renamed == ["checkpoint-3"]


def test_what_a_killed_process_left_half_written_is_no_checkpoint(saved):
    run, config, base = saved
    (run / "checkpoint-3").rename(run / f"{TEMPORARY}checkpoint-3")
    assert checkpoint.load(run).values["step"] == 2
    train(config, output=run.parents[2], base=base, resume=run)
    assert checkpoint.load(run).values["step"] == 3


# --- bad input


def test_a_loss_that_is_not_finite_is_explained(tiny_decoder, make_config, make_loss, tmp_path):
    def spoil(call):
        return float("nan") if call == 3 else None

    before = state_of(tiny_decoder)
    config = make_config(loss=make_loss(spoil))
    with pytest.raises(PeftRankError, match=r"loss is nan at step 3.*learning_rate"):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)
    assert store.versions(tmp_path / "out", "demo") == ()


@pytest.mark.parametrize("part", ["train", "valid"])
def test_slates_without_a_relevant_candidate_are_refused(part, tiny_decoder, make_config, tmp_path):
    empty = [replace(slate, labels=(0.0,) * 4) for slate in make_slates(5)]
    with pytest.raises(DataError, match=f"none of the 5 slates.*{part} part"):
        train(make_config(**{part: empty}), output=tmp_path / "out", base=tiny_decoder)


def test_a_slate_without_labels_is_refused_by_its_id(tiny_decoder, make_config, tmp_path):
    slates = make_slates(5)
    slates[3] = replace(slates[3], labels=None)
    with pytest.raises(DataError, match="'s3' of the train part has no labels"):
        train(make_config(train=slates), output=tmp_path / "out", base=tiny_decoder)


def test_slate_ids_need_not_be_unique(tiny_decoder, make_config, tmp_path):
    named = make_config(train=make_slates(12), valid=make_slates(8, seed=1, prefix="v"))
    apart = train(named, output=tmp_path / "a", base=tiny_decoder)
    rows = untimed(logged(tmp_path / "a"))
    # Ids of both parts collide with each other, and those of the validation part among themselves.
    valid = [replace(s, slate_id="s0") for s in make_slates(8, seed=1)]
    config = make_config(train=make_slates(12), valid=valid)
    same = train(config, output=tmp_path / "b", base=tiny_decoder)
    assert untimed(logged(tmp_path / "b")) == rows
    assert_same_weights(apart, same)


# --- other processes


@pytest.fixture
def stored_base(tiny_decoder, tmp_path, monkeypatch):
    """The tiny decoder as a folder, which another process can load."""
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    tiny_decoder.model.save_pretrained(folder)
    tiny_decoder.tokenizer.save_pretrained(folder)
    return {"name": str(folder), "quantization": "none", "compute_dtype": "float32"}


@pytest.mark.slow
@every_method
def test_another_process_gives_the_same_scores(method, stored_base, make_config, tmp_path):
    from peftrank.base import load_base

    config = Config.model_validate({**make_config(method).model_dump(), "base": stored_base})
    slates = make_slates(5, seed=3)
    write_slates(tmp_path / "fresh.jsonl", slates)
    train(config, output=tmp_path / "out")
    options = {**stored_base, "device": "cpu"}
    with Ranker(load_base(**options), store=tmp_path / "out") as ranker:
        ranker.load_adapter("demo")
        here = ranker.score(slates, domain="demo")
    program = f"""
import json
from peftrank.base import load_base
from peftrank.formats.slates import read_slates
from peftrank.ranker import Ranker
ranker = Ranker(load_base(**{options!r}), store="out")
ranker.load_adapter("demo")
print(json.dumps(ranker.score(read_slates("fresh.jsonl"), domain="demo")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    there = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_terminated_command_says_how_to_continue_and_does(stored_base, make_config, tmp_path):
    config = make_config(max_steps=400, eval_steps=400)
    values = {**config.model_dump(mode="json"), "base": stored_base}
    (tmp_path / "demo.yaml").write_text(json.dumps(values), encoding="utf-8")
    peftrank = "import sys; from peftrank.cli import main; sys.argv[0] = 'peftrank'; main()"
    command = [sys.executable, "-c", peftrank, "train", "--config", "demo.yaml", "--json"]
    process = subprocess.Popen(
        [*command, "--output", "a store"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in tmp_path.glob("a store/demo/.runs/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    said = shlex.split(errors.strip().splitlines()[-1])
    start = said.index("peftrank")
    done = subprocess.run(
        [*command[:3], *said[start + 1 :], "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["metrics"]["steps"] == 400
    assert store.active(tmp_path / "a store", "demo") == Path(result["path"]).name


def test_a_clock_that_stands_still_mixes_no_two_runs(
    tiny_decoder, make_config, tmp_path, monkeypatch
):
    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 1, tzinfo=tz)

    monkeypatch.setattr("peftrank.training.run.datetime", Stopped)
    for steps in (2, 3):
        train(make_config(max_steps=steps), output=tmp_path / "out", base=tiny_decoder)
    logs = (tmp_path / "out" / "demo" / ".runs").glob("*/metrics.jsonl")
    assert sorted(len(log.read_text().splitlines()) for log in logs) == [2, 3]
    assert store.versions(tmp_path / "out", "demo") == ("0001", "0002")

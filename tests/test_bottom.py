"""What the layers below the adapter give is kept: it changes no gradient and no resumed run."""

import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_training import make_slates

from peftrank import store
from peftrank.config import Config, load_config
from peftrank.errors import ConfigError
from peftrank.formats.slates import write_slates
from peftrank.model import hidden_states
from peftrank.prompts import PromptTemplate, pack
from peftrank.training import Interrupted, bottom, checkpoint, distributed, train
from peftrank.training.bottom import Bottom, bottoms
from peftrank.types import PromptTree, Segment

PARTS = {"preamble": "Rank:", "history": "- {{ title }}\n", "candidate": "{{ title }}"}
METHODS = {
    "lora": {"r": 4, "dropout": 0.1},
    "adalora": {"init_r": 4, "target_r": 2},
    "adapter": {"size": 4, "layernorm": True},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder, empty."""
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bottom"


@pytest.fixture
def computed(monkeypatch):
    """The batches that the lower layers were computed for."""
    calls, real = [], bottom.states_below

    def counted(base, batch, layer):
        calls.append(batch)
        return real(base, batch, layer)

    monkeypatch.setattr(bottom, "states_below", counted)
    return calls


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(bottom, "GROUP_TOKENS", 25)


@pytest.fixture
def make_config(tmp_path):
    def make(method="lora", layers="top-1", train=None, options=None, **training):
        parts = {"train": train or make_slates(12), "valid": make_slates(6, seed=1)}
        for name, slates in parts.items():
            write_slates(tmp_path / "data" / f"{name}.jsonl", slates)
        defaults = {"max_steps": 5, "batch_size": 4, "eval_steps": 2, "learning_rate": 1e-2}
        return Config.model_validate(
            {
                "domain": "demo",
                "base": {"name": "tiny", "quantization": "none"},
                "method": {"name": method, "layers": layers, **METHODS[method], **(options or {})},
                "data": {name: tmp_path / "data" / f"{name}.jsonl" for name in parts},
                "training": {**defaults, **training},
            }
        )

    return make


def weights(output):
    folder = Path(output) / "demo" / store.active(Path(output), "demo")
    names = ("adapter_model.safetensors", "readout.safetensors")
    return {(n, k): t for n in names for k, t in load_file(folder / n).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_close(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if not key[1].endswith("bias"):  # what shifts all scores has a gradient of rounding alone
            torch.testing.assert_close(a[key], b[key], atol=1e-3, rtol=1e-3)


def trees_of(base, slates, mode="isolated"):
    template = PromptTemplate(base.tokenizer, parts=PARTS, mode=mode, max_depth=base.max_depth)
    return [template.tree(slate) for slate in slates]


def packed(base, trees, row_tokens=512):
    return pack(trees, pad_token_id=base.pad_token_id, row_tokens=row_tokens)


def overlapping(slates):
    """Each slate, and one with the same history and half of the candidates, one of them twice."""
    for slate in slates:
        yield slate
        few = slate.candidates[1:3]
        yield replace(slate, slate_id=f"{slate.slate_id}-half", candidates=(*few, few[0]))
        yield replace(slate, slate_id=f"{slate.slate_id}-one", candidates=few[:1])


@pytest.mark.parametrize("mode", ["isolated", "joint", "set"])
@pytest.mark.parametrize("kind", ["tiny_decoder", "tiny_encoder"])
def test_kept_states_are_those_of_the_pass_itself(kind, mode, request, small_groups):
    base = request.getfixturevalue(kind)
    trees = trees_of(base, overlapping(make_slates(3)), mode)
    kept = Bottom(base, 1, trees)
    for batch in (packed(base, trees), packed(base, trees[4:7], row_tokens=40)):
        entering = kept.entering(batch)
        with torch.no_grad():
            whole = hidden_states(base, batch)
            found = hidden_states(base, batch, entering)
        real = batch.segment_ids >= 0
        torch.testing.assert_close(found[real], whole[real], atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_whichever_batch_asks_first_the_bits_are_the_same(shared_base, seed):
    base, trees, expected = shared_base
    rng = random.Random(seed)
    kept = Bottom(base, 1, trees)
    for _ in range(2):
        chosen = rng.sample(range(len(trees)), rng.randint(1, 5))
        batch = packed(base, [trees[i] for i in chosen], rng.choice((40, 120, 512)))
        assert torch.equal(kept.entering(batch).states, expected.entering(batch).states)


@pytest.fixture(scope="module")
def shared_base(tokenizer):
    from conftest import _random_llama

    from peftrank.base import base_from_model

    base = base_from_model(_random_llama(tokenizer), tokenizer, name="tiny")
    trees = trees_of(base, overlapping(make_slates(3)), "set")
    whole = Bottom(base, 1, trees)
    whole.entering(packed(base, trees))
    return base, trees, whole


def test_gradients_are_bit_for_bit_those_of_a_full_pass_on_the_same_states(tiny_decoder):
    base = tiny_decoder
    trees = trees_of(base, make_slates(6))
    batch = packed(base, trees, row_tokens=100)
    entering = Bottom(base, 1, trees).entering(batch)
    get_peft_model(
        base.model, LoraConfig(target_modules=r".*\.1\..*_proj", init_lora_weights=False)
    )

    def gradients(entering):
        base.model.zero_grad()
        hidden_states(base, batch, entering).square().sum().backward()
        return {n: p.grad.clone() for n, p in base.model.named_parameters() if p.requires_grad}

    kept = gradients(entering)
    # The model's own forward, whose block 1 is given the same states.
    handle = base.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: ((entering.states,), kwargs), with_kwargs=True
    )
    full = gradients(None)
    handle.remove()
    assert len(kept) == 14
    assert equal(kept, full)


def test_what_slates_share_is_kept_once(tiny_decoder, make_slate):
    first = make_slate(seed=1, n_history=5)
    again = make_slate(seed=2, n_history=5)
    trees = trees_of(tiny_decoder, [first, replace(again, history=first.history)])
    trunk = sum(len(s.tokens) for s in trees[0].segments[:6])
    total = sum(len(s.tokens) for tree in trees for s in tree.segments)
    assert Bottom(tiny_decoder, 1, trees).nbytes == (total - trunk) * 32 * 4


@pytest.mark.parametrize("method", METHODS)
def test_a_training_is_the_same_but_for_rounding(method, tiny_decoder, make_config, tmp_path):
    for where in ("off", "memory", "disk"):
        train(make_config(method, bottom_cache=where), output=tmp_path / where, base=tiny_decoder)
    off, memory, disk = (weights(tmp_path / where) for where in ("off", "memory", "disk"))
    assert equal(memory, disk)
    assert_close(off, memory)


def test_an_encoder_trains_with_it(tiny_encoder, make_config, tmp_path):
    train(make_config(bottom_cache="memory"), output=tmp_path / "a", base=tiny_encoder)
    train(make_config(bottom_cache="off"), output=tmp_path / "b", base=tiny_encoder)
    assert_close(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_trials_and_methods_on_one_base_compute_it_once(
    where, tiny_decoder, make_config, computed, small_groups, tmp_path
):
    train(make_config(bottom_cache=where), output=tmp_path / "a", base=tiny_decoder)
    first = len(computed)
    assert first > 1
    for method in METHODS:
        other = make_config(method, bottom_cache=where, batch_size=3, learning_rate=1e-3)
        train(other, output=tmp_path / "b", base=tiny_decoder)
    assert len(computed) == first


@pytest.mark.parametrize("survives", [True, False])
def test_a_resumed_run_ends_bit_identically(
    survives, tiny_decoder, make_config, cache, computed, small_groups, tmp_path, monkeypatch
):
    config = make_config(bottom_cache="disk", checkpoint_steps=2)
    train(config, output=tmp_path / "whole", base=tiny_decoder)
    whole = len(computed)
    shutil.rmtree(cache)
    real = checkpoint.save

    def stop(run):
        folder = real(run)
        raise Interrupted(str(folder))

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(Interrupted) as stopped:
        train(config, output=tmp_path / "cut", base=tiny_decoder)
    monkeypatch.setattr(checkpoint, "save", real)
    if not survives:
        shutil.rmtree(cache)
    computed.clear()
    train(config, output=tmp_path / "cut", base=tiny_decoder, resume=Path(str(stopped.value)))
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert len(computed) < whole if survives else len(computed) > 0


@pytest.fixture
def on_disk(tiny_decoder, tmp_path, small_groups):
    """A batch, a maker of what keeps its states in a folder, and the folder, which is full."""
    trees = trees_of(tiny_decoder, make_slates(6))
    batch, folder = packed(tiny_decoder, trees), tmp_path / "states"

    def make():
        made = Bottom(tiny_decoder, 1, trees)
        made.keep(folder)
        return made

    make().entering(batch)
    return batch, make, folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_place(path):
    shutil.copy(path.with_name("1.safetensors"), path)


def other_shape(path):
    save_file({"states": load_file(path)["states"][:-1]}, path)


def other_content(path):
    save_file({"other": torch.zeros(1)}, path)


def gone(path):
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    "damage", [cut, empty, flip, other_place, other_shape, other_content, gone]
)
def test_a_damaged_file_is_computed_again_and_never_used(damage, on_disk, computed):
    batch, make, folder = on_disk
    used = make()
    expected = used.entering(batch).states
    assert computed == []
    made_files = list(folder.iterdir())
    damage(folder / "0.safetensors")
    for each in (make(), used):  # also by one that had found it whole
        assert torch.equal(each.entering(batch).states, expected)
    assert len(computed) == (len(made_files) if damage is gone else 1)
    computed.clear()
    assert torch.equal(make().entering(batch).states, expected)
    assert computed == []


def test_files_hold_no_pickle_and_leave_nothing_temporary(on_disk):
    folder = on_disk[2]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}


def test_two_that_fill_one_folder_at_once_do_not_disturb_each_other(on_disk):
    batch, make, folder = on_disk
    expected = make().entering(batch).states
    shutil.rmtree(folder)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(make().entering(batch).states))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(states, expected) for states in found)


def test_the_key_tells_weights_layers_precision_threads_and_tokens_apart(tiny_decoder, cache):
    base = tiny_decoder
    trees = trees_of(base, make_slates(4))
    keys = set()

    def add(trees):
        bottoms(base, {"train": trees}, where="disk", limit=2**30)
        keys.update(path.name for path in cache.iterdir())
        return len(keys)

    assert add(trees) == add(list(trees)) == 1
    assert add(trees[::-1]) == 2
    first, *rest = trees[0].segments
    changed = Segment((*first.tokens[:-1], first.tokens[-1] + 1), first.parent)
    assert add([PromptTree("x", (changed, *rest), trees[0].candidates), *trees[1:]]) == 3
    adapted = get_peft_model(base.model, LoraConfig(target_modules=r".*\.1\..*q_proj"))
    assert add(trees) == 4
    adapted.unload()
    assert add(trees) == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert add(trees) == 5
    torch.set_num_threads(threads)
    base.model.config.rms_norm_eps *= 2
    assert add(trees) == 6
    base.model.config.rms_norm_eps /= 2
    with torch.no_grad():
        base.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    assert add(trees) == 7


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_states_of_other_slates_make_room_the_longest_unused_first(where, tiny_decoder, computed):
    parts = [trees_of(tiny_decoder, make_slates(4, seed=seed)) for seed in range(3)]
    sizes = [Bottom(tiny_decoder, 2, trees).nbytes for trees in parts]
    limit = int(2.5 * max(sizes))  # two of the three; files have a little more than the states

    def use(index):
        computed.clear()
        made = bottoms(tiny_decoder, {"train": parts[index]}, where=where, limit=limit)
        made["train"].entering(packed(tiny_decoder, parts[index]))
        return len(computed) > 0

    assert [use(0), use(1), use(0)] == [True, True, False]
    assert use(2)  # the second goes
    assert not use(0)
    assert use(1)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_more_than_the_limit_is_refused_and_says_what_it_needs(
    where, tiny_decoder, make_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(Bottom, "nbytes", 3 * 2**20)
    config = make_config(bottom_cache=where, bottom_cache_mib=5)
    with pytest.raises(ConfigError, match=r"would keep 6 MiB \(train: 3, valid: 3\).*allows 5\."):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    assert tiny_decoder.constant_layers == 2  # the base is given back as it was


@pytest.mark.parametrize("method", METHODS)
def test_without_a_constant_layer_it_is_refused(method, tiny_decoder, make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"method\.layers: top-K"):
        train(
            make_config(method, layers="all", bottom_cache="memory"),
            output=tmp_path / "out",
            base=tiny_decoder,
        )


def test_a_sharded_base_is_refused(tiny_decoder, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "sharding", lambda *_: "fsdp2")
    with pytest.raises(ConfigError, match="whole base"):
        train(make_config(bottom_cache="disk"), output=tmp_path / "out", base=tiny_decoder)


def test_the_plain_word_off_is_understood():
    assert load_config(domain="news").training.bottom_cache == "off"
    config = load_config(domain="news", overrides={"training.bottom_cache": False})
    assert config.training.bottom_cache == "off"
    with pytest.raises(ConfigError, match="bottom_cache"):
        load_config(domain="news", overrides={"training.bottom_cache": True})

"""PEFT's methods by name: each trains, is saved, and scores in a Ranker as it did in training."""

import copy
import dataclasses
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from peftrank import plugins
from peftrank.bank import Bank
from peftrank.base import base_from_model, load_base
from peftrank.config import load_config
from peftrank.errors import AdapterError, ConfigError
from peftrank.formats.slates import read_slates
from peftrank.methods._peft_types import KINDS, OWN, REFUSED
from peftrank.peft_files import AdapterFiles, peft_paths
from peftrank.ranker import Ranker
from peftrank.store import active, load_adapter
from peftrank.training import train as train_run

# What a base of width 32 needs; all else is PEFT's default.
OPTIONS = {
    "C3A": {"block_size": 4},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 4},
    "LOHA": {"r": 4, "rank_pattern": {"(q_proj|query)": 2}},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 50},
}
QUICK = ("LN_TUNING", "LOHA", "OFT", "VERA")
"""One that replaces an output, one that adds to it, one that turns the input, one that shares."""
every = pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
on_both = pytest.mark.parametrize("base", ["tiny_decoder", "tiny_encoder"], indirect=True)


@pytest.fixture
def base(request):
    return request.getfixturevalue(request.param)


def make(kind, **options):
    given = {**OPTIONS.get(kind, {}), **options}
    return plugins.load("methods", f"peft:{kind}")(total_steps=3, **given)


def hidden(base):
    """Hidden states (2, 9, H) of fixed tokens."""
    ids = torch.arange(18).view(2, 9) + 10
    mask = torch.zeros(2, 1, 9, 9, dtype=base.compute_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=base.compute_dtype == torch.bfloat16):
        return base.hidden_states(ids, mask, torch.arange(9).expand(2, 9))


def clone(base):
    return base_from_model(copy.deepcopy(base.model), base.tokenizer, name="clone")


def trained(base, kind, steps=3, **options):
    """The hidden states after some training on a copy, and the exported files."""
    base = clone(base)
    method = make(kind, **options)
    torch.manual_seed(steps)
    model = peft.get_peft_model(base.model, method.config(base.model)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        hidden(base).float().pow(2)[..., :4].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    config, tensors = method.export(model)
    values = json.loads(json.dumps(config.to_dict()))
    with torch.no_grad():
        return hidden(base), AdapterFiles(values, tensors, {}, {})


def test_every_method_of_peft_is_listed_once():
    """A new PEFT may bring new ones: they need a place in the table, or a reason."""
    known = [*KINDS, *OWN, *REFUSED]
    assert len(known) == len(set(known))
    names = {getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(known) == names - {"BOTTLENECK"}


@every
@torch.no_grad()
def test_training_starts_at_the_base_where_that_is_promised(kind, tiny_decoder):
    before = hidden(tiny_decoder)
    peft.get_peft_model(tiny_decoder.model, make(kind).config(tiny_decoder.model)).eval()
    near = torch.allclose(hidden(tiny_decoder), before, rtol=0, atol=1e-5)
    assert near == KINDS[kind].starts_at_base


@on_both
@every
@torch.no_grad()
def test_the_bank_equals_training_and_leaves_the_base_alone(kind, base):
    before, plain = base.state_hash(), hidden(base)
    with torch.enable_grad():
        expected, files = trained(base, kind)
    bank = Bank(base)
    with bank.using(bank.place("news", files)):
        torch.testing.assert_close(hidden(base), expected, rtol=0, atol=1e-5)
    assert torch.equal(hidden(base), plain)
    assert (expected - plain).abs().max() > 1e-4
    assert base.state_hash() == before


@every
@torch.no_grad()
def test_a_batch_may_mix_it_with_lora(kind, tiny_decoder):
    with torch.enable_grad():
        expected, files = trained(tiny_decoder, kind)
        lora_states, lora = trained_lora(tiny_decoder)
    bank = Bank(tiny_decoder)
    plain = hidden(tiny_decoder)
    first, second = bank.place("a", files), bank.place("b", lora)
    with bank.using([(first, 0, 9), (second, 9, 18)]):
        mixed = hidden(tiny_decoder)
    torch.testing.assert_close(mixed[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], lora_states[1], rtol=0, atol=1e-5)
    with bank.using([(None, 0, 9), (first, 9, 18)]):
        mixed = hidden(tiny_decoder)
    torch.testing.assert_close(mixed[0], plain[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1], expected[1], rtol=0, atol=1e-5)


def trained_lora(base):
    base = clone(base)
    method = plugins.load("methods", "lora")(total_steps=1, r=4)
    model = peft.get_peft_model(base.model, method.config(base.model)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    config, tensors = method.export(model)
    with torch.no_grad():
        return hidden(base), AdapterFiles(config.to_dict(), tensors, {}, {})


@every
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tiny_decoder):
    found = []
    for pause in (False, True):
        base, method = clone(tiny_decoder), make(kind)
        torch.manual_seed(0)
        model = peft.get_peft_model(base.model, method.config(base.model)).train()
        _steps(base, model, 0, 2)
        if pause:
            state = method.state_dict(model)
            base = clone(tiny_decoder)
            torch.manual_seed(0)  # as a run does when it starts again
            model = peft.get_peft_model(base.model, method.config(base.model)).train()
            method.load_state_dict(model, *state)
        _steps(base, model, 2, 4)
        found.append(method.export(model)[1])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _steps(base, model, first, last):
    for step in range(first, last):
        torch.manual_seed(step)  # what a checkpoint restores
        hidden(base).pow(2)[..., :4].mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 1e-2 * p.grad
                    p.grad = None


@every
@torch.no_grad()
def test_it_trains_and_serves_in_bfloat16(kind, tiny_decoder):
    half = base_from_model(
        tiny_decoder.model.to(torch.bfloat16), tiny_decoder.tokenizer, name="half"
    )
    with torch.enable_grad():
        expected, files = trained(half, kind)
    bank = Bank(half)
    with bank.using(bank.place("news", files)):
        got = hidden(half)
    assert (got - expected).abs().max() <= 2e-2 * expected.abs().max()


def settings(workplace, kind, **overrides):
    return load_config(
        domain="news",
        method=f"peft:{kind}",
        overrides={
            "base": {"name": str(workplace / "base"), "quantization": "none"},
            "method": {"name": f"peft:{kind}", **OPTIONS.get(kind, {})},
            "training.max_steps": 2,
            "data": {part: workplace / "data" / f"{part}.jsonl" for part in ("train", "valid")},
            **overrides,
        },
    )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@every
def test_a_training_run_publishes_it_and_a_ranker_ranks(
    kind, quantization, workplace, tmp_path, monkeypatch, make_slate
):
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path / "cache"))
    config = settings(workplace, kind, **{"base.quantization": quantization})
    if quantization != "none" and not KINDS[kind].quantized:
        with pytest.raises(ConfigError, match=f"peft:{kind} reads the base's weights themselves"):
            train_run(config, output=tmp_path / "store")
        return
    path = train_run(config, output=tmp_path / "store")
    assert active(tmp_path / "store", "news") == path.name
    base = load_base(str(workplace / "base"), quantization=quantization, device="cpu")
    before = base.state_hash()
    with Ranker(base, store=tmp_path / "store") as ranker:
        ranker.load_adapter("news")
        assert len(ranker.rank(make_slate(), domain="news").item_ids) == 4
        ranker.unload_adapter("news")
    assert base.state_hash() == before


def test_a_new_process_gives_the_same_scores(workplace, tmp_path, make_slate):
    code = """
import sys, json
from peftrank import Ranker
from peftrank.formats.slates import read_slates
base, folder, data = sys.argv[1:]
ranker = Ranker.from_base(base, quantization="none", device="cpu")
ranker.load_adapter(folder, domain="news")
print(json.dumps(ranker.score(list(read_slates(data)), domain="news")))
"""
    path = train_run(settings(workplace, "LOHA"), output=tmp_path)
    arguments = [str(workplace / "base"), str(path), str(workplace / "data" / "test.jsonl")]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    with Ranker.from_base(arguments[0], quantization="none", device="cpu") as ranker:
        ranker.load_adapter(path, domain="news")
        expected = ranker.score(list(read_slates(workplace / "data" / "test.jsonl")), domain="news")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_plain_peft_loads_the_files(workplace, tmp_path):
    from transformers import AutoModelForCausalLM

    path = train_run(settings(workplace, "VERA"), output=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(workplace / "base")
    model = peft.PeftModel.from_pretrained(base, path)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = load_file(path / "adapter_model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_is_refused_with_its_reason(kind):
    with pytest.raises(ConfigError, match="cannot be used") as refused:
        plugins.load("methods", f"peft:{kind}")
    assert REFUSED[kind] in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("method.vera_dropot", 0.1, "did you mean 'vera_dropout'"),
        ("method.r", "many", "valid integer"),
        ("method.target_modules", ["q_proj"], "unknown option 'target_modules'"),
        ("method.layers", "last", "expected all, or top-K"),
        ("method.r", 0, "r"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(workplace, key, value, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train_run(settings(workplace, "VERA", **{key: value}), output=tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'VERA'"):
        plugins.load("methods", "peft:vera")


def test_peft_s_names_of_methods_with_a_file_of_their_own_mean_these():
    for name, own in OWN.items():
        assert plugins.load("methods", f"peft:{name}") is plugins.load("methods", own)


def test_what_peft_refuses_on_the_base_leaves_the_base_as_it_was(tiny_decoder):
    names = [name for name, _ in tiny_decoder.model.named_modules()]
    with pytest.raises(ConfigError, match="does not fit this base with these options"):
        make("C3A", block_size=5).config(tiny_decoder.model)
    assert [name for name, _ in tiny_decoder.model.named_modules()] == names


@pytest.mark.parametrize("targets", ["attention", "mlp", "regex:.*up_proj"])
def test_targets_and_layers_choose_the_modules(tiny_decoder, targets):
    config = make("LOKR", targets=targets, layers="top-1").config(tiny_decoder.model)
    paths = set(config.target_modules)
    words = {"attention": "self_attn", "mlp": "mlp", "regex:.*up_proj": "up_proj"}
    assert paths
    assert all(words[targets] in path and path.startswith("model.layers.1.") for path in paths)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(.*)*x"},
        {"target_modules": []},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head"], "rank_pattern": {}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"r": 10**9},
        {"rank_pattern": {"(a*)*b": 3}},
        {"surprise": 1},
        {"r": "4"},
    ],
)
def test_a_stranger_s_configuration_is_refused(tiny_decoder, change):
    _, files = trained(tiny_decoder, "LOHA")
    changed = dataclasses.replace(files, peft_config={**files.peft_config, **change})
    with pytest.raises(AdapterError):
        Bank(tiny_decoder).place("news", changed)


def test_tensors_that_are_missing_or_belong_elsewhere_are_refused(tiny_decoder):
    _, files = trained(tiny_decoder, "LOHA")
    name = next(iter(files.tensors))
    less = {k: t for k, t in files.tensors.items() if k != name}
    for tensors in (less, {**less, "base_model.model.other": torch.zeros(2)}, {
        **files.tensors, name: torch.zeros(3, 3)
    }):  # fmt: skip
        with pytest.raises(AdapterError, match="adapter 'news'"):
            Bank(tiny_decoder).place("news", dataclasses.replace(files, tensors=tensors))
    assert peft_paths(files.peft_config, files.tensors)


def test_an_adapter_s_bytes_are_those_of_its_own_weights(tiny_decoder):
    _, files = trained(tiny_decoder, "LOHA")
    placed = Bank(tiny_decoder).place("news", files)
    assert placed.nbytes == sum(t.nbytes for t in files.tensors.values())


def test_adapted_models_load_on_an_adapter_folder_as_written(workplace, tmp_path):
    path = train_run(settings(workplace, "LN_TUNING"), output=tmp_path)
    files = load_adapter(path)
    assert files.peft_config["target_modules"] == sorted(files.peft_config["target_modules"])
    assert all(".norm" in p or "layernorm" in p for p in files.peft_config["target_modules"])

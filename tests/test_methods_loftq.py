"""LoftQ's first step: LoRA that starts from what quantization took from the weights."""

import peft
import pytest
import torch

from peftrank.bank import Bank
from peftrank.base import load_base, stored_weights
from peftrank.config import load_config
from peftrank.errors import BaseModelError, ConfigError
from peftrank.methods._dequantized import dequantized
from peftrank.methods._loftq import _named
from peftrank.methods.lora import Lora
from peftrank.peft_files import AdapterFiles
from peftrank.ranker import Ranker
from peftrank.store import active
from peftrank.training import train as train_run

QUANTIZATIONS = ["nf4", "fp4", "int8"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path / "cache"))


def loaded(workplace, quantization):
    return load_base(
        str(workplace / "base"), quantization=quantization, compute_dtype="float32", device="cpu"
    )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_start_is_the_best_approximation_of_what_was_lost(workplace, quantization):
    base = loaded(workplace, quantization)
    before, whole = base.state_hash(), stored_weights(base.identity.name)
    method = Lora(total_steps=1, init="loftq", r=4, alpha=8, rank_pattern={"up_proj": 2})
    model = peft.get_peft_model(base.model, method.config(base.model))
    method.read_weights(model, whole)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 14
    for path, layer in layers.items():
        lost = whole[f"{path}.weight"] - dequantized(layer.get_base_layer()).float()
        r = 2 if "up_proj" in path else 4
        rest = torch.linalg.svdvals(lost)[r:].norm()  # of the best, by Eckart and Young
        torch.testing.assert_close((lost - layer.get_delta_weight("default")).norm(), rest)
        assert 0 < rest < 0.98 * lost.norm()
    assert base.state_hash() == before


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_run_publishes_it_and_the_base_stays(workplace, quantization, tmp_path, make_slate):
    config = load_config(
        domain="news",
        method="lora",
        overrides={
            "base": {"name": str(workplace / "base"), "quantization": quantization},
            "method": {"name": "lora", "init": "loftq", "r": 4},
            "training.max_steps": 2,
            "data": {p: workplace / "data" / f"{p}.jsonl" for p in ("train", "valid")},
        },
    )
    base = loaded(workplace, quantization)
    before = base.state_hash()
    path = train_run(config, output=tmp_path / "store", base=base)
    assert active(tmp_path / "store", "news") == path.name
    with Ranker(base, store=tmp_path / "store") as ranker:
        ranker.load_adapter("news")
        assert len(ranker.rank(make_slate(), domain="news").item_ids) == 4
    assert base.state_hash() == before


def test_an_unquantized_base_and_what_contradicts_it_are_refused(tiny_decoder):
    with pytest.raises(ConfigError, match="this base is not quantized"):
        Lora(total_steps=1, init="loftq").config(tiny_decoder.model)
    for options in ({"dora": True}, {"b_ratio": 4.0}):
        with pytest.raises(ConfigError, match=r"init=loftq and .* contradict each other"):
            Lora(total_steps=1, init="loftq", **options)


def test_weights_are_found_where_names_begin_otherwise():
    one, two = torch.ones(1), torch.zeros(1)
    assert _named("a.b.weight", {"a.b.weight": one, "x.a.b.weight": two}) is one
    assert _named("a.b.weight", {"bert.a.b.weight": one, "c.b.weight": two}) is one
    assert _named("bert.a.b.weight", {"a.b.weight": one, "ba.b.weight": two}) is one
    for wrong in ({}, {"x.a.b.weight": one, "y.a.b.weight": two}, {"xa.b.weight": one}):
        with pytest.raises(BaseModelError, match=r"weights for 'a.b.weight', expected one"):
            _named("a.b.weight", wrong)


def test_a_weight_of_another_shape_is_refused(workplace):
    base = loaded(workplace, "nf4")
    method = Lora(total_steps=1, init="loftq", r=4)
    model = peft.get_peft_model(base.model, method.config(base.model))
    other = {name: torch.zeros(3, 3) for name in stored_weights(base.identity.name)}
    with pytest.raises(BaseModelError, match=r"has shape \(3, 3\)"):
        method.read_weights(model, other)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@torch.no_grad()
def test_reading_a_quantized_weight_leaves_its_layer_as_it_was(workplace, quantization):
    """Before the layer's first use and after it, when bitsandbytes keeps its scales elsewhere."""
    layer = loaded(workplace, quantization).layers[0].mlp.up_proj
    twin = loaded(workplace, quantization).layers[0].mlp.up_proj
    x = torch.randn(5, 32)
    expected, before = twin(x), dequantized(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(dequantized(layer), before)
    assert torch.equal(layer(x), expected)
    whole = stored_weights(str(workplace / "base"))["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (before - whole).norm() < 0.2 * whole.norm()


def test_dora_is_refused_where_peft_would_damage_the_base(workplace):
    with pytest.raises(ConfigError, match="does not train on an 8-bit base on a CPU"):
        Lora(total_steps=1, dora=True).config(loaded(workplace, "int8").model)
    assert Lora(total_steps=1, dora=True).config(loaded(workplace, "nf4").model).use_dora


@torch.no_grad()
def test_a_dora_of_another_base_is_served_on_an_8bit_one_that_was_used(workplace, make_slate):
    base, used = loaded(workplace, "none"), loaded(workplace, "int8")
    method = Lora(total_steps=1, dora=True, r=4)
    model = peft.get_peft_model(base.model, method.config(base.model))
    config, tensors = method.export(model)
    bank, files = Bank(used), AdapterFiles(config.to_dict(), tensors, {}, {})
    ids, mask, depth = torch.arange(9)[None] + 10, torch.zeros(1, 1, 9, 9), torch.arange(9)[None]
    plain = used.hidden_states(ids, mask, depth)
    with bank.using(bank.place("news", files)):
        torch.testing.assert_close(used.hidden_states(ids, mask, depth), plain, rtol=0, atol=0.05)
    assert torch.equal(used.hidden_states(ids, mask, depth), plain)

"""Fine-tuning of whole blocks, as an adapter: methods top_layers and full."""

import copy
import json

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peftrank import plugins
from peftrank.bank import Bank
from peftrank.base import base_from_model, load_base
from peftrank.config import load_config
from peftrank.doctor import memory_plan
from peftrank.errors import AdapterError, ConfigError
from peftrank.methods.full import Full
from peftrank.methods.top_layers import TopLayers
from peftrank.peft_files import AdapterFiles
from peftrank.ranker import Ranker
from peftrank.store import active, describe
from peftrank.training import train as train_run


@pytest.fixture(params=["decoder", "encoder"])
def base(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def clone(base):
    return base_from_model(copy.deepcopy(base.model), base.tokenizer, name="clone")


def hidden(base):
    """Hidden states (2, 9, H) of fixed tokens."""
    ids = torch.arange(18).view(2, 9) + 10
    mask = torch.zeros(2, 1, 9, 9, dtype=base.compute_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=base.compute_dtype == torch.bfloat16):
        return base.hidden_states(ids, mask, torch.arange(9).expand(2, 9))


def trained(base, method=None, seed=0):
    """The states of a copy whose weights were moved at random, and its files."""
    base, method = clone(base), method or TopLayers(total_steps=1, layers="top-1")
    model = peft.get_peft_model(base.model, method.config(base.model)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    config, tensors = method.export(model)
    with torch.no_grad():
        return hidden(base), AdapterFiles(json.loads(json.dumps(config.to_dict())), tensors, {}, {})


def lora(base):
    base, method = clone(base), plugins.load("methods", "lora")(total_steps=1, r=4)
    model = peft.get_peft_model(base.model, method.config(base.model)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    config, tensors = method.export(model)
    with torch.no_grad():
        return hidden(base), AdapterFiles(config.to_dict(), tensors, {}, {})


def test_all_weights_of_the_blocks_and_the_final_norm_train_and_nothing_else(base):
    for layers, expected in (("top-1", [1]), ("all", [0, 1])):
        copied = clone(base)
        blocks = [p for i in expected for p in copied.layers[i].parameters()]
        count = sum(p.numel() for p in blocks) + (32 if base.is_decoder else 0)
        method = TopLayers(total_steps=1, layers=layers)
        model = peft.get_peft_model(copied.model, method.config(copied.model))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_a_third_of_the_blocks_train_unless_layers_says_how_many(base):
    def tuned(blocks):
        stack = base.layers
        while len(stack) < blocks:
            stack.append(copy.deepcopy(stack[0]))
        base.model.config.num_hidden_layers = blocks
        paths = TopLayers(total_steps=1).config(base.model).target_modules
        return {int(part) for path in paths for part in path.split(".") if part.isdigit()}

    assert tuned(2) == {1}
    assert tuned(7) == {5, 6}


def test_full_leaves_the_layers_of_a_domain_s_file_out():
    assert load_config(domain="news", method="full").method.options == {}
    assert load_config(domain="news", method="top-layers").method.options == {"layers": "top-10"}


def test_a_hyphen_may_stand_for_an_underscore_in_a_name():
    assert plugins.load("methods", "top-layers") is TopLayers
    config = load_config(domain="news", overrides={"method": {"name": "top-layers"}})
    assert config.method.name == "top_layers"
    with pytest.raises(ConfigError, match="did you mean 'top_layers'"):
        plugins.load("methods", "top-layer")


def test_a_block_with_other_weights_is_refused(tiny_decoder):
    tiny_decoder.layers[1].gate = nn.Embedding(3, 4)
    with pytest.raises(ConfigError, match=r"how to train a Embedding.*layers.1 has at 'gate'"):
        Full(total_steps=1).config(tiny_decoder.model)


@torch.no_grad()
def test_the_base_computes_nothing_that_the_adapter_computes_in_its_stead(base, monkeypatch):
    expected, files = trained(base)
    bank = Bank(base)
    placed = bank.place("news", files)
    computed, real = [], nn.functional.linear
    weights = {id(p): name for name, p in base.model.named_parameters()}

    def counted(x, weight, bias=None):
        computed.append((weights.get(id(weight)), x.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    with bank.using(placed):
        found = hidden(base)
    assert torch.equal(found, expected)
    of_base = [name for name, _ in computed if name]
    assert of_base
    assert not any(".1." in name for name in of_base)
    computed.clear()
    with bank.using([(None, 0, 9), (placed, 9, 18)]):
        hidden(base)
    tokens = [shape[0] for name, shape in computed if name and ".1." in name]
    assert tokens
    assert set(tokens) == {9}


@torch.no_grad()
def test_one_pass_may_mix_it_with_other_methods_and_the_plain_base(base):
    first_states, first = trained(base)
    second_states, second = lora(base)
    bank, plain = Bank(base), hidden(base)
    a, b = bank.place("a", first), bank.place("b", second)
    for spans, expected in (
        ([(a, 0, 9), (b, 9, 18)], (first_states, second_states)),
        ([(None, 0, 9), (a, 9, 18)], (plain, first_states)),
    ):
        with bank.using(spans):
            mixed = hidden(base)
        torch.testing.assert_close(mixed[0], expected[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(mixed[1], expected[1][1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_closing_banks_leaves_the_base_as_it_was(base):
    _, files = trained(base)
    plain, own = hidden(base), [vars(m).get("forward") for m in base.model.modules()]
    first, second = Bank(base), Bank(base)
    a, b = first.place("a", files), second.place("b", files)
    with second.using(b):
        assert not torch.equal(hidden(base), plain)
    second.close()
    with first.using(a):
        assert not torch.equal(hidden(base), plain)
    first.close()
    assert torch.equal(hidden(base), plain)
    assert [vars(m).get("forward") for m in base.model.modules()] == own


@torch.no_grad()
def test_banks_that_close_in_the_order_they_came_leave_the_right_numbers(base):
    expected, files = trained(base)
    plain = hidden(base)
    first, second = Bank(base), Bank(base)
    first.place("a", files)
    b = second.place("b", files)
    first.close()
    with second.using(b):
        assert torch.equal(hidden(base), expected)
    second.close()
    assert torch.equal(hidden(base), plain)


@torch.no_grad()
def test_a_copy_of_the_base_computes_with_weights_of_its_own(base):
    _, files = trained(base)
    bank = Bank(base)
    placed = bank.place("news", files)
    twin, plain = clone(base), hidden(base)
    with bank.using(placed):
        hidden(base)
    for parameter in base.layers[1].parameters():
        parameter.zero_()
    assert torch.equal(hidden(twin), plain)


def test_weights_train_in_float32_and_count_as_the_base_rounds_them(tiny_decoder):
    half = base_from_model(tiny_decoder.model.bfloat16(), tiny_decoder.tokenizer, name="half")
    method = Full(total_steps=1)
    with torch.no_grad():
        plain = hidden(half)
    trained_base = clone(half)
    model = peft.get_peft_model(trained_base.model, method.config(trained_base.model))
    with torch.no_grad():
        assert torch.equal(hidden(trained_base), plain)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        hidden(trained_base).float().pow(2)[..., :4].mean().backward()
        optimizer.step()
    config, tensors = method.export(model)
    rounded = [torch.equal(t, t.bfloat16().float()) for t in tensors.values()]
    assert not all(rounded)
    bank = Bank(half)
    placed = bank.place("news", AdapterFiles(config.to_dict(), tensors, {}, {}))
    assert placed.nbytes == sum(t.nbytes for t in tensors.values()) // 2
    with torch.no_grad():
        expected = hidden(trained_base)
        with bank.using(placed):
            assert torch.equal(hidden(half), expected)
    assert not torch.equal(expected, plain)


@torch.no_grad()
def test_a_quantized_base_serves_it_beside_others(tiny_decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path / "cache"))
    tiny_decoder.model.save_pretrained(tmp_path / "base")
    tiny_decoder.tokenizer.save_pretrained(tmp_path / "base")
    expected, files = trained(tiny_decoder, Full(total_steps=1))
    base = load_base(
        str(tmp_path / "base"), quantization="nf4", compute_dtype="float32", device="cpu"
    )
    plain, bank = hidden(base), Bank(base)
    with bank.using(bank.place("news", files)):
        torch.testing.assert_close(hidden(base), expected, rtol=0, atol=1e-5)
    assert torch.equal(hidden(base), plain)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.mlp.up_proj": {"weight": torch.zeros(3, 3)}}, "weights .*3, 3.* where"),
        ({"model.layers.1.mlp.up_proj": {"bias": torch.zeros(64)}}, "weights .*bias.* where"),
        ({"model.norm": {"weight": torch.zeros(3)}}, "normalization weights"),
        ({"model.norm": {"other": torch.zeros(32)}}, "no weight of an LN_TUNING adapter"),
        ({"model.embed_tokens": {"weight": torch.zeros(3, 32)}}, "differing: 'model.embed_tokens'"),
    ],
)
def test_files_that_fit_no_base_are_refused(tiny_decoder, change, said):
    _, files = trained(tiny_decoder)
    for path, parts in change.items():
        for part, tensor in parts.items():
            files.tensors[f"base_model.model.{path}.ln_tuning_layers.{part}"] = tensor
    with pytest.raises(AdapterError, match=said):
        Bank(tiny_decoder).place("news", files)


def settings(workplace, method, **overrides):
    data = {part: workplace / "data" / f"{part}.jsonl" for part in ("train", "valid")}
    base = {"name": str(workplace / "base"), "quantization": "none", "compute_dtype": "float32"}
    given = {"base": base, "training.max_steps": 2, "data": data, **overrides}
    return load_config(domain="news", method=method, overrides=given)


def test_a_run_keeps_what_enters_the_lowest_trained_block(workplace, tmp_path, make_slate):
    """The final norm lies behind the blocks, so that it trains too does not forbid it."""
    config = settings(
        workplace, "top-layers", **{"method.layers": "top-1", "training.bottom_cache": "memory"}
    )
    path = train_run(config, output=tmp_path)
    assert active(tmp_path, "news") == path.name
    about = describe(path)
    assert about["peft_type"] == "LN_TUNING"
    assert about["method"]["name"] == "top_layers"
    assert about["parameters"] == 9312
    assert "ranks" not in about
    assert "top\\_layers" in (path / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(workplace / "base")
    loaded = peft.PeftModel.from_pretrained(model, path)
    assert any("ln_tuning_layers" in name for name, _ in loaded.named_parameters())
    base = load_base(str(workplace / "base"), quantization="none", device="cpu")
    before = base.state_hash()
    with Ranker(base, store=tmp_path) as ranker:
        ranker.load_adapter("news")
        scores = ranker.score(make_slate(), domain="news")
        ranker.load_adapter(workplace / "adapters" / "news" / "0001", domain="other")
        ranker.score(make_slate(), domain="other")
        assert ranker.score(make_slate(), domain="news") == scores
        ranker.unload_adapter("news")
    assert base.state_hash() == before


def test_doctor_counts_copies_gradients_moments_and_the_best_weights(workplace):
    plan = memory_plan(settings(workplace, "full"))
    base = load_base(str(workplace / "base"), quantization="none", compute_dtype="float32")
    blocks = sum(
        p.numel() for p in [*base.layers.parameters(), *base.model.model.norm.parameters()]
    )
    head = plan.adapter // 4 - blocks
    assert 0 < head < 100
    assert plan.adapter == plan.gradients == plan.optimizer // 2
    assert plan.copies == plan.adapter + max(0, 2 * plan.optimizer - plan.activations)
    assert memory_plan(settings(workplace, "full"), device="cuda").copies == 0
    with pytest.raises(ConfigError, match="needs an unquantized base"):
        memory_plan(settings(workplace, "full", **{"base.quantization": "nf4"}))

"""EVA: LoRA that starts from what its layers are given."""

import copy
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from peftrank.bank import Bank
from peftrank.base import base_from_model
from peftrank.config import load_config
from peftrank.doctor import memory_plan
from peftrank.errors import ConfigError
from peftrank.methods.lora import Lora
from peftrank.model import hidden_states
from peftrank.peft_files import AdapterFiles, lora_layers
from peftrank.prompts import PromptTemplate, pack
from peftrank.store import describe, load_adapter
from peftrank.training import Interrupted, checkpoint
from peftrank.training import train as train_run

PARTS = {"history": "- {{ title }}\n", "candidate": "{{ title }}"}


@pytest.fixture(params=["decoder", "encoder"])
def base(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def passes(base, make_slate, count=3):
    template = PromptTemplate(base.tokenizer, parts=PARTS, max_depth=base.max_depth)
    trees = [[template.tree(make_slate(seed=2 * i + j)) for j in range(2)] for i in range(count)]
    return [pack(pair, pad_token_id=base.pad_token_id, row_tokens=20) for pair in trees]


def started(base, batches, **options):
    """A PeftModel on a copy of the base, its base and its method, started from the passes."""
    copied = base_from_model(copy.deepcopy(base.model), base.tokenizer, name="copy")
    method = Lora(total_steps=1, init="eva", r=4, **options)
    model = peft.get_peft_model(copied.model, method.config(copied.model))
    method.read_slates(model, batches, lambda batch: hidden_states(copied, batch))
    return model, copied, method


def layers(model):
    return {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}


def test_a_module_starts_at_the_main_directions_of_its_inputs(base, make_slate):
    padding = base.model.get_input_embeddings().weight.data[base.pad_token_id]
    padding.normal_(std=5.0)  # so that it would be seen if it were taken for a token
    batches = passes(base, make_slate)
    seen, handles = {}, []
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            keep = seen.setdefault(name, []).append
            handles.append(module.register_forward_pre_hook(lambda _, x, keep=keep: keep(x[0])))
    with torch.no_grad():
        for batch in batches:
            hidden_states(base, batch)
    for handle in handles:
        handle.remove()
    model, _, _ = started(base, batches, rho=1.0)
    real = [(batch.segment_ids >= 0).flatten() for batch in batches]
    assert any(not mask.all() for mask in real)
    assert layers(model).keys() == seen.keys()
    for name, layer in layers(model).items():
        a = layer.lora_A["default"].weight
        assert a.shape[0] == 4
        assert not layer.lora_B["default"].weight.any()
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-4)
        given = torch.cat([x.flatten(0, 1)[m] for x, m in zip(seen[name], real, strict=True)])
        exact = torch.linalg.svd(given - given.mean(0)).Vh[:4]
        explained = (given - given.mean(0)).matmul(a.T).pow(2).sum()
        best = (given - given.mean(0)).matmul(exact.T).pow(2).sum()
        assert explained >= 0.95 * best  # PEFT's SVD is incremental and approximate


@torch.no_grad()
def test_ranks_follow_the_variance_within_the_budget_and_the_model_starts_at_the_base(
    base, make_slate
):
    batches = passes(base, make_slate)
    model, copied, method = started(base, batches)
    ranks = {name: layer.r["default"] for name, layer in layers(model).items()}
    count = 7 * 2 if base.is_decoder else 6 * 2
    assert sum(ranks.values()) == 4 * count
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    scales = {layer.scaling["default"] for layer in layers(model).values()}
    assert scales == {4.0}  # alpha 16 by r 4, whatever the rank became
    for batch in batches:
        assert torch.equal(hidden_states(copied, batch), hidden_states(base, batch))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    config, tensors = method.export(model)
    assert config.init_lora_weights is True
    assert config.eva_config is None
    files = AdapterFiles(config.to_dict(), tensors, {}, {})
    found = lora_layers(files.peft_config, files.tensors)
    assert {name: len(layer.a) for name, layer in found.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    bank = Bank(base)
    with bank.using(bank.place("news", files)):
        served = hidden_states(base, batches[0])
    torch.testing.assert_close(served, hidden_states(copied, batches[0]), rtol=0, atol=1e-5)


def test_its_weights_are_float32_on_a_bfloat16_base(tiny_decoder, make_slate):
    half = base_from_model(tiny_decoder.model.bfloat16(), tiny_decoder.tokenizer, name="half")
    model, _, _ = started(half, passes(half, make_slate))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) > 10
    assert {p.dtype for p in trainable} == {torch.float32}


def settings(workplace, **overrides):
    data = {part: workplace / "data" / f"{part}.jsonl" for part in ("train", "valid")}
    given = {
        "base": {"name": str(workplace / "base"), "quantization": "none"},
        "base.compute_dtype": "float32",
        "method": {"name": "lora", "init": "eva", "r": 4},
        "training.max_steps": 4,
        "training.checkpoint_steps": 2,
        "data": data,
        **overrides,
    }
    return load_config(domain="news", method="lora", overrides=given)


def test_a_run_publishes_it_and_a_resumed_one_ends_with_the_same_bits(
    workplace, tmp_path, monkeypatch
):
    whole = load_adapter(train_run(settings(workplace), output=tmp_path / "whole"))
    real = checkpoint.save

    def stop(run):
        raise Interrupted(str(real(run)))

    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(Interrupted) as stopped:
        train_run(settings(workplace), output=tmp_path / "cut")
    monkeypatch.setattr(checkpoint, "save", real)
    folder = Path(str(stopped.value))
    path = train_run(settings(workplace), output=tmp_path / "cut", resume=folder)
    again = load_adapter(path)
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in whole.tensors.items())
    ranks = {r for row in describe(path)["ranks"].values() for r in row.values()}
    assert len(ranks) > 1


def test_doctor_plans_it(workplace):
    plan = memory_plan(settings(workplace, **{"method.rho": 2.0}))
    assert plan.adapter > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "kaiming", "rho": 2.0}, "method.rho=2.0 goes with method.init=eva"),
        ({"init": "eva", "rho": 0.5}, "method.rho=0.5: expected at least 1"),
    ],
)
def test_a_wrong_option_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Lora(total_steps=1, **options)


def test_more_directions_than_there_can_be_are_refused(tiny_decoder, make_slate):
    batches = passes(tiny_decoder, make_slate, count=1)
    with pytest.raises(ConfigError, match=r"may give .* the rank 40 .* and it has 32 inputs"):
        started(tiny_decoder, batches, rho=10.0)
    few = [replace(batches[0], segment_ids=batches[0].segment_ids[:1, :6])]
    with pytest.raises(ConfigError, match=r"looks for 8 directions .* none has so many tokens"):
        started(tiny_decoder, few)

"""What doctor says of a machine and of a training's memory."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftrank.base import load_base
from peftrank.config import load_config
from peftrank.doctor import machine, memory_plan
from peftrank.errors import BaseModelError, ConfigError


@pytest.fixture
def config(workplace):
    def make(**overrides):
        base = {"base.name": str(workplace / "base"), "base.quantization": "none"}
        data = {f"data.{p}": workplace / "data" / f"{p}.jsonl" for p in ("train", "valid")}
        method = {"method.layers": "all"}
        return load_config(
            domain="news", method="lora", overrides={**base, **data, **method, **overrides}
        )

    return make


def test_weights_are_counted_as_they_are(config, workplace):
    plan = memory_plan(config(**{"base.compute_dtype": "float32"}))
    base = load_base(str(workplace / "base"), quantization="none", compute_dtype="float32")
    assert plan.base == sum(p.nbytes for p in base.model.parameters())
    assert plan.gradients == plan.adapter == plan.optimizer // 2 > 0
    parts = (plan.base, plan.adapter, plan.gradients, plan.optimizer, plan.activations)
    assert plan.total == sum(parts) + plan.copies + plan.process
    assert plan.copies == plan.adapter
    assert plan.measured


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_base_takes_what_bitsandbytes_stores(config, workplace, quantization):
    settings = {"base.quantization": quantization, "base.compute_dtype": "float32"}
    plan = memory_plan(config(**settings))
    base = load_base(
        str(workplace / "base"), quantization=quantization, compute_dtype="float32", device="cpu"
    )
    held = base.model.get_memory_footprint()
    # The footprint leaves out the quantization constants, so it is a lower bound.
    assert held <= plan.base <= 1.35 * held


def test_activations_are_those_of_the_real_pass(config, workplace):
    """Counted on real tensors by PyTorch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    from peftrank.training.loop import _backward
    from peftrank.training.run import passes, start

    settings = config(**{"base.compute_dtype": "float32", "training.batch_size": 6})
    plan = memory_plan(settings)
    run = start(settings, workplace / "unused", None)
    ((slates, _),) = passes(run, run.train[:6])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _backward(run, slates)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert plan.activations + plan.gradients == pytest.approx(peak, rel=0.25)


def test_more_layers_tokens_and_precision_take_more(config):
    small = memory_plan(config(**{"training.batch_size": 1}))
    large = memory_plan(config(**{"training.batch_size": 6}))
    assert large.activations > 1.5 * small.activations
    float32 = memory_plan(config(**{"base.compute_dtype": "float32"}))
    bfloat16 = memory_plan(config(**{"base.compute_dtype": "bfloat16"}))
    assert float32.base == 2 * bfloat16.base
    assert float32.activations > bfloat16.activations
    one = memory_plan(config(**{"method.layers": "top-1"}))
    assert one.adapter < float32.adapter


def test_kept_states_of_the_lower_layers_are_counted(config):
    top = {"method.layers": "top-1", "base.compute_dtype": "float32"}
    plain = memory_plan(config(**top))
    memory = memory_plan(config(**top, **{"training.bottom_cache": "memory"}))
    disk = memory_plan(config(**top, **{"training.bottom_cache": "disk"}))
    assert plain.kept == disk.kept == 0 < memory.kept < 2**20
    assert memory.total - memory.kept == disk.total
    held = disk.rows * disk.tokens * 32 * 4  # the states of the pass itself
    assert plain.activations <= disk.activations <= plain.activations + held
    small = {"training.bottom_cache": "memory", "training.bottom_cache_mib": 1, "data": {}}
    assert memory_plan(config(**top, **small)).kept == 2**20  # 1,200 slates of the sample
    with pytest.raises(ConfigError, match="top-K"):
        memory_plan(config(**{"training.bottom_cache": "memory"}))


def test_a_sharded_base_is_shared_and_whole_layers_are_gathered(config):
    settings = config(**{"base.compute_dtype": "bfloat16"})
    whole = memory_plan(settings, device="cuda")
    shared = memory_plan(settings, device="cuda", processes=4, sharded=True)
    with torch.device("meta"):
        values = AutoConfig.from_pretrained(settings.base.name)
        model = AutoModelForCausalLM.from_config(values, dtype=torch.bfloat16)
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    assert whole.base == sum(p.nbytes for p in model.parameters())
    assert shared.base == whole.base - blocks + blocks // 4  # embeddings are not sharded
    assert shared.gathered == 2 * blocks // len(model.model.layers)
    assert whole.gathered == 0
    assert whole.process == 0


def test_a_base_that_is_not_here_is_planned_from_its_config(config, workplace, tmp_path):
    values = json.loads((workplace / "base" / "config.json").read_text())
    values |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    values |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings = load_config(
        domain="news", method="lora", overrides={"base.name": "nobody/seven-billion"}
    )
    plan = memory_plan(settings, device="cuda", architecture=tmp_path / "config.json")
    assert not plan.measured
    assert 3.5e9 < plan.base < 4.5e9  # 7 billion weights in nf4, and the embedding
    with pytest.raises(BaseModelError, match="nobody/seven-billion"):
        memory_plan(settings)


def test_the_base_on_disk_is_never_loaded(config, workplace, monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("loaded")

    monkeypatch.setattr("peftrank.base.load_base", never)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    assert memory_plan(config()).total > 0


def test_every_quantization_is_tried_on_this_machine():
    found = machine()
    assert set(found["quantizations"]) == {"nf4", "fp4", "int8", "none"}
    assert found["quantizations"]["none"] == "works"
    assert found["packages"]["torch"] == torch.__version__
    assert isinstance(found["extras"]["serve"], bool)


def test_the_command_prints_the_machine_and_the_plan(place, given, cli):
    done = cli("doctor")
    assert done.code == 0
    assert "base.quantization=nf4" in done.out
    assert "activations" not in done.out
    arguments = [a for a in given if a not in ("--data", "data")]
    done = cli("doctor", *arguments, "--set", "method.layers=all", "--method", "lora")
    assert done.code == 0, done.err
    assert "activations" in done.out
    assert "One slate is more" not in done.out
    short = ("--set", "training.micro_tokens=20")
    done = cli("doctor", *arguments, "--set", "method.layers=all", "--method", "lora", *short)
    assert "One slate is more than training.micro_tokens=20" in done.out
    done = cli("doctor", *arguments, "--set", "method.layers=all", "--method", "lora", "--json")
    values = json.loads(done.out)
    assert values["memory"]["total"] > values["memory"]["base"]
    assert cli("doctor", "--method", "lora").code == 2
    assert cli("doctor", *arguments, "--device", "tpu").code == 2


def test_a_readout_that_looks_words_up_is_planned_where_the_tokenizer_is(config, workplace):
    settings = config(**{"readout": {"name": "yes_no"}})
    assert memory_plan(settings).measured
    with pytest.raises(ConfigError, match="readout 'yes_no' needs the base's tokenizer"):
        memory_plan(settings, architecture=workplace / "base" / "config.json")


@pytest.mark.parametrize("readout", ["pooled", "likelihood"])
def test_a_readout_whose_memory_depends_on_the_texts_is_named(config, readout):
    with pytest.raises(ConfigError, match=rf"readout '{readout}' depends on the texts"):
        memory_plan(config(**{"readout": {"name": readout}}))


def test_a_plan_can_be_replaced_but_not_changed(config):
    plan = memory_plan(config())
    assert replace(plan, base=0).total == plan.total - plan.base

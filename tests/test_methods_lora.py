import copy
import re

import pytest
import torch
from peft import get_peft_model

from peftrank.errors import AdapterError, ConfigError
from peftrank.methods._targets import linear_targets
from peftrank.methods.lora import Lora

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


def matched(base, **options):
    """Paths of the modules that PEFT adapts."""
    model = get_peft_model(base.model, Lora(total_steps=1, **options).config(base.model))
    return set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    ("targets", "names"),
    [("attention", ATTENTION), ("mlp", MLP), ("all-linear", sorted(ATTENTION + MLP))],
)
def test_a_decoder_gets_the_short_list_of_names(tiny_decoder, targets, names):
    assert linear_targets(tiny_decoder.model, targets, "all") == names


def test_an_encoder_adapts_no_pooler(tiny_encoder):
    from transformers import BertModel

    with_pooler = BertModel(tiny_encoder.model.config)
    # Made for a base without pooler, loaded on one with it.
    config = Lora(total_steps=1).config(tiny_encoder.model)
    names = get_peft_model(with_pooler, config).base_model.targeted_module_names
    assert len(names) == 12
    assert not any("pooler" in name for name in names)


@pytest.mark.parametrize(("targets", "count"), [("attention", 8), ("mlp", 4), ("all-linear", 12)])
def test_the_groups_of_an_encoder(tiny_encoder, targets, count):
    assert len(matched(tiny_encoder, targets=targets)) == count


def test_top_k_names_the_last_blocks(tiny_decoder):
    found = matched(tiny_decoder, targets="attention", layers="top-1")
    assert found == {f"model.layers.1.self_attn.{name}" for name in ATTENTION}


def test_a_pattern_is_matched_against_the_whole_path(tiny_decoder):
    found = matched(tiny_decoder, targets=r"regex:.*\.0\.mlp\.up_proj|.*\.1\.self_attn\.q_proj")
    assert found == {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}


def test_a_pattern_never_reaches_the_vocabulary_head(tiny_decoder):
    assert not any("lm_head" in name for name in matched(tiny_decoder, targets="regex:.*"))


def test_targets_without_a_match_are_refused_with_the_names_there_are(tiny_decoder):
    with pytest.raises(ConfigError, match=r"(?s)method.targets='regex:nothing'.*mlp\.down_proj"):
        Lora(total_steps=1, targets="regex:nothing").config(tiny_decoder.model)


def test_more_layers_than_there_are_is_refused(tiny_decoder):
    with pytest.raises(ConfigError, match="only 2 blocks"):
        Lora(total_steps=1, layers="top-3").config(tiny_decoder.model)


def test_a_model_without_blocks_of_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2Model

    gpt2 = GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match="GPT2Model has 0 lists of 1 transformer blocks"):
        Lora(total_steps=1).config(gpt2)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"r": 0}, "method.r"),
        ({"alpha": 0}, "method.alpha"),
        ({"dropout": 1.0}, "method.dropout"),
        ({"targets": "q_proj"}, "method.targets"),
        ({"targets": "regex:("}, "method.targets"),
        ({"layers": "10"}, "method.layers"),
        ({"layers": "top-0"}, "method.layers"),
    ],
)
def test_an_option_out_of_range_is_named(options, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        Lora(total_steps=1, **options)


def test_options_reach_peft(tiny_decoder):
    method = Lora(total_steps=1, r=4, alpha=6, dropout=0.5, rslora=True, dora=True)
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6 / 4**0.5
    assert layer.lora_dropout["default"].p == 0.5
    assert "default" in layer.lora_magnitude_vector


def test_the_export_has_no_dropout_and_is_the_same_every_time(tiny_decoder):
    method = Lora(total_steps=1, dropout=0.5)
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    config, tensors = method.export(model)
    assert config.lora_dropout == 0.0
    assert model.peft_config["default"].lora_dropout == 0.5
    assert config.target_modules == sorted(ATTENTION + MLP)
    assert len(tensors) == 2 * 7 * 2
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1)
    after = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(before, after)


def test_a_checkpoint_of_other_options_is_refused_and_nothing_is_written(tiny_decoder):
    other = copy.deepcopy(tiny_decoder.model)
    method, wider = Lora(total_steps=1, r=4), Lora(total_steps=1, r=5)
    fewer = Lora(total_steps=1, r=4, layers="top-1")
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    before = method.state_dict(model)[0]
    for method_, message in ((wider, "has shape"), (fewer, "not the model's")):
        base = copy.deepcopy(other)
        state = method_.state_dict(get_peft_model(base, method_.config(base)))
        with pytest.raises(AdapterError, match=message):
            method.load_state_dict(model, *state)
    after = method.state_dict(model)[0]
    assert all(torch.equal(before[key], after[key]) for key in before)

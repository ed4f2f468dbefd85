import copy
import re

import pytest
import torch
from peft import get_peft_model

from peftrank.errors import AdapterError, ConfigError
from peftrank.methods._targets import linear_targets
from peftrank.methods.lora import Lora
from peftrank.peft_files import lora_layers

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
        ({"b_ratio": 0}, "method.b_ratio"),
        ({"rank_pattern": {"q_proj": 0}}, "method.rank_pattern has 'q_proj': 0"),
        ({"alpha_pattern": {"q_proj": 0}}, "method.alpha_pattern has 'q_proj': 0"),
        ({"rank_pattern": {"(": 2}}, "method.rank_pattern has '(', no valid pattern"),
        (
            {"rank_pattern": {"(a+)+": 2}},
            "method.rank_pattern has '(a+)+', which may take for ever",
        ),
        ({"init": "pisa"}, "method.init='pisa' (did you mean 'pissa'?)"),
        ({"init": "pissa", "dora": True}, "method.init=pissa and method.dora"),
        ({"init": "olora", "b_ratio": 16}, "method.init=olora and method.b_ratio=16"),
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


def test_a_pattern_sets_rank_and_scale_of_the_modules_it_names_alone(tiny_decoder):
    method = Lora(
        total_steps=1,
        r=4,
        alpha=8,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 6},
        alpha_pattern={"up_proj": 3},
    )
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    seen = {
        name: (layer.r["default"], layer.scaling["default"])
        for index, block in enumerate(tiny_decoder.layers)
        for name, layer in (
            (f"q{index}", block.self_attn.q_proj),
            (f"up{index}", block.mlp.up_proj),
        )
    }
    assert seen == {"q0": (4, 2.0), "q1": (2, 4.0), "up0": (6, 0.5), "up1": (6, 0.5)}
    assert method.export(model)[0].rank_pattern == method.rank_pattern


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are(tiny_decoder, key):
    method = Lora(total_steps=1, targets="attention", **{key: {"q_prj": 2}})
    with pytest.raises(ConfigError, match=rf"method.{key} has 'q_prj' \(did you mean 'q_proj'\?\)"):
        method.config(tiny_decoder.model)


def test_the_b_ratio_is_the_ratio_of_adam_s_learning_rates(tiny_decoder):
    """LoRA+ written out with two learning rates, beside the option."""
    twin = copy.deepcopy(tiny_decoder.model)
    ids = torch.arange(18).view(2, 9) + 10
    outputs = []
    for base, ratio, rates in ((tiny_decoder.model, 8, (1, 1)), (twin, 1, (1, 8))):
        method = Lora(total_steps=5, r=4, alpha=4, alpha_pattern={"q_proj": 2}, b_ratio=ratio)
        torch.manual_seed(0)
        model = get_peft_model(base, method.config(base)).train()
        names = ("lora_A", "lora_B")
        groups = [
            {"params": [p for n, p in model.named_parameters() if name in n], "lr": 2e-3 * rate}
            for name, rate in zip(names, rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0, eps=1e-12)
        for _ in range(5):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            outputs.append(model(input_ids=ids).logits)
        with torch.no_grad(), model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert (outputs[0] - plain).abs().max() > 0.05
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_update_that_starts_from_the_base_is_its_principal_part(tiny_decoder, init):
    weight = tiny_decoder.layers[0].mlp.up_proj.weight.detach().clone()
    method = Lora(total_steps=1, r=4, alpha=8, init=init)
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight)
        expected = u[:, :4] * s[:4] @ vh[:4] / 2  # the scale is alpha / r = 2
    else:
        q, rows = torch.linalg.qr(weight)
        expected = q[:, :4] @ rows[:4]
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6)


def test_a_rank_that_the_weight_does_not_have_is_refused(tiny_decoder):
    method = Lora(total_steps=1, r=17, init="pissa")  # k_proj is 16 x 32
    with pytest.raises(ConfigError, match=r"method.r=17: .* at most 16"):
        get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_from_the_base_is_exported_as_plain_lora(tiny_decoder, rslora):
    method = Lora(total_steps=1, r=4, init="pissa", rslora=rslora, alpha_pattern={"q_proj": 3})
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    config, tensors = method.export(model)
    layers = lora_layers(config.to_dict(), tensors)
    for path, layer in layers.items():
        trained = model.base_model.model.get_submodule(path)
        assert layer.scale == pytest.approx(trained.scaling["default"])
        assert layer.a.shape[0] == 8
        assert layer.delta().abs().max() < 1e-6  # nothing learned yet
    assert config.init_lora_weights is True
    assert len(layers) == 14

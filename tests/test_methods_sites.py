import copy

import pytest
import torch
from peft import get_peft_model

from peftrank.errors import ConfigError
from peftrank.methods._sites import KINDS, block_sites, bottleneck_forward
from peftrank.methods.adapter import Adapter
from peftrank.methods.ia3 import Ia3

SITES = {
    ("tiny_decoder", "houlsby"): (("self_attn.o_proj", "mlp"), "output"),
    ("tiny_decoder", "pfeiffer"): (("mlp",), "output"),
    ("tiny_decoder", "parallel"): (("mlp",), "input"),
    ("tiny_encoder", "houlsby"): (("attention.output.dense", "output.dense"), "output"),
    ("tiny_encoder", "pfeiffer"): (("output.dense",), "output"),
    ("tiny_encoder", "parallel"): (("output",), "residual"),
}


each_architecture = pytest.mark.parametrize(
    "name",
    "Gemma Gemma3Text Llama Mistral Phi3 Qwen2 Qwen3 SmolLM3 "
    "Bert Camembert DistilBert Electra Roberta XLMRoberta".split(),
)


def tiny(name):
    """A random two-layer model of an architecture."""
    import transformers

    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options |= {"vocab_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    if name not in ("Bert", "Camembert", "DistilBert", "Electra", "Roberta", "XLMRoberta"):
        options |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    if name == "DistilBert":
        options = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize(("name", "kind"), list(SITES))
def test_the_places_of_each_kind(name, kind, request):
    base = request.getfixturevalue(name)
    assert block_sites(base.layers[0], kind) == SITES[name, kind]


@each_architecture
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_architecture_has_places(name, kind):
    model, ids = tiny(name), torch.arange(6)[None] + 3
    before = model(input_ids=ids).last_hidden_state
    adapted = get_peft_model(model, Adapter(total_steps=1, kind=kind).config(model)).eval()
    assert torch.equal(adapted(input_ids=ids).last_hidden_state, before)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.normal_(0, 0.3)
    assert (adapted(input_ids=ids).last_hidden_state - before).abs().max() > 0.1


@each_architecture
@torch.no_grad()
def test_norms_of_every_architecture_compute_with_the_adapter_s_weights(name):
    model, ids = tiny(name), torch.arange(6)[None] + 3
    by_hand = copy.deepcopy(model)
    before = model(input_ids=ids).last_hidden_state
    adapted = get_peft_model(model, Adapter(total_steps=1, layernorm=True).config(model)).eval()
    assert torch.equal(adapted(input_ids=ids).last_hidden_state, before)
    for key, parameter in adapted.base_model.model.named_parameters():
        if ".norm_" in key:
            parameter.normal_(1, 0.3)
            own = key.replace("bottleneck.norm_", "").removesuffix(".default")
            by_hand.get_parameter(own).copy_(parameter)
    expected = by_hand(input_ids=ids).last_hidden_state
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(adapted(input_ids=ids).last_hidden_state, expected)


@each_architecture
@torch.no_grad()
def test_ia3_finds_keys_and_values_where_they_are_separate(name):
    model, ids = tiny(name), torch.arange(6)[None] + 3
    if name == "Phi3":
        with pytest.raises(ConfigError, match=r"self_attn\.qkv_proj"):
            Ia3(total_steps=1).config(model)
        return
    before = model(input_ids=ids).last_hidden_state
    adapted = get_peft_model(model, Ia3(total_steps=1).config(model)).eval()
    assert torch.equal(adapted(input_ids=ids).last_hidden_state, before)
    assert len(adapted.base_model.targeted_module_names) == 2 * 3


def test_an_unknown_block_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"(?s)Sequential.*This block has: 0, 1"):
        block_sites(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), "houlsby")


def test_the_change_has_the_dtype_of_what_it_is_added_to():
    weights = (torch.ones(2, 3), torch.zeros(2), torch.ones(3, 2), torch.zeros(3))
    h = torch.ones(5, 3, dtype=torch.bfloat16)
    change = bottleneck_forward(h, *weights, "relu", 0.5)
    assert change.dtype == torch.bfloat16
    assert torch.equal(change, torch.full((5, 3), 3.0, dtype=torch.bfloat16))

import copy

import pytest
import torch
from peft import get_peft_model

from peftrank.bank import Bank
from peftrank.base import base_from_model
from peftrank.errors import AdapterError, ConfigError
from peftrank.methods.ia3 import Ia3
from peftrank.peft_files import AdapterFiles, ia3_factors

PLACES = {
    "tiny_decoder": {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"},
    "tiny_encoder": {"attention.self.key", "attention.self.value", "output.dense"},
}


@pytest.mark.parametrize("name", PLACES)
def test_keys_and_values_are_scaled_after_and_the_feed_forward_before_its_last_projection(
    name, request
):
    base = request.getfixturevalue(name)
    untouched = dict(copy.deepcopy(base.model).named_modules())
    method = Ia3(total_steps=1)
    model = get_peft_model(base.model, method.config(base.model))
    config, tensors = method.export(model)
    factors = ia3_factors(config.to_dict(), tensors)
    for path, (where, vector) in factors.items():
        linear = untouched[path]
        last = path.endswith(("down_proj", "output.dense"))
        assert where == ("input" if last else "output")
        assert len(vector) == (linear.in_features if last else linear.out_features)
        assert any(path.endswith("." + place) for place in PLACES[name])
        assert not path.endswith("attention.output.dense")
    assert len(factors) == 3 * len(base.layers)


def test_a_base_without_separate_keys_is_refused(tiny_decoder):
    for block in tiny_decoder.layers:
        block.self_attn.qkv_proj = block.self_attn.k_proj
        del block.self_attn.k_proj
    with pytest.raises(ConfigError, match=r"separate projections .* self_attn\.qkv_proj"):
        Ia3(total_steps=1).config(tiny_decoder.model)


def test_files_that_are_no_ia3_or_of_another_base_are_refused(tiny_decoder):
    bank = Bank(
        base_from_model(copy.deepcopy(tiny_decoder.model), tiny_decoder.tokenizer, name="b")
    )
    method = Ia3(total_steps=1)
    model = get_peft_model(tiny_decoder.model, method.config(tiny_decoder.model))
    config, tensors = method.export(model)
    name = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    for wrong, message in (
        ({**tensors, name: torch.ones(16)}, "is no IA3 vector"),
        ({**tensors, name + "x": torch.ones(16, 1)}, "is no IA3 vector"),
        ({**tensors, name: torch.ones(15, 1)}, "15 factors for the output of .* has 16"),
        ({**tensors, name: torch.ones(1, 16)}, "16 factors for the input of .* has 32"),
    ):
        with pytest.raises(AdapterError, match=message):
            bank.place("news", AdapterFiles(config.to_dict(), wrong, {}, {}))
    with pytest.raises(AdapterError, match="modules_to_save"):
        ia3_factors({**config.to_dict(), "modules_to_save": ["lm_head"]}, tensors)

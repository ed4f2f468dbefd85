import copy
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from peftrank.base import base_from_model
from peftrank.errors import ConfigError
from peftrank.methods.adalora import Adalora
from peftrank.peft_files import lora_layers, lora_ranks

STEPS = 20
OPTIONS = {"total_steps": STEPS, "init_r": 4, "target_r": 2, "targets": "attention"}
MODULES = 8


def hidden(base):
    ids = torch.arange(18).view(2, 9) + 10
    return base.hidden_states(ids, torch.zeros(2, 1, 9, 9), torch.arange(9).expand(2, 9))


def start(base, **options):
    method = Adalora(**{**OPTIONS, **options})
    torch.manual_seed(0)
    model = get_peft_model(base.model, method.config(base.model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return method, model, torch.optim.AdamW(parameters, lr=1e-2)


def run(method, model, optimizer, base, steps):
    for step in steps:
        loss = hidden(base).pow(2)[..., :4].mean() + method.penalty(model)
        loss.backward()
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()


def singular_values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n}


def kept(model):
    return sum(int((e != 0).sum()) for e in singular_values(model).values())


def copy_of(base):
    return base_from_model(copy.deepcopy(base.model), base.tokenizer, name="copy")


def test_the_penalty_is_the_term_that_peft_adds_to_its_own_loss(tiny_decoder):
    method, model, optimizer = start(tiny_decoder, orth_weight=0.3)
    run(method, model, optimizer, tiny_decoder, range(1, 4))
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        # AdaLoraModel.forward adds the term to the loss of the model it wraps.
        with_term = model.base_model(input_ids=ids, labels=ids).loss
        without = model.base_model.model(input_ids=ids, labels=ids).loss
    inside = with_term - without
    torch.testing.assert_close(method.penalty(model).detach(), inside, rtol=1e-5, atol=1e-6)


def test_the_penalty_is_the_mean_distance_from_orthogonality(tiny_decoder):
    method, model, _ = start(tiny_decoder, orth_weight=2.0)
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = (p @ p.T if "lora_A" in name else p.T @ p).detach()
            terms.append((gram - torch.eye(4)).pow(2).sum().sqrt())
    assert len(terms) == 2 * MODULES
    expected = 2.0 * torch.stack(terms).mean()
    torch.testing.assert_close(method.penalty(model).detach(), expected)


def test_no_penalty_without_weight(tiny_decoder):
    method, model, _ = start(tiny_decoder, orth_weight=0)
    assert method.penalty(model) is None


def test_the_budget_shrinks_to_the_target_and_stays(tiny_decoder):
    method, model, optimizer = start(tiny_decoder)
    run(method, model, optimizer, tiny_decoder, range(1, 3))
    assert kept(model) == 4 * MODULES
    run(method, model, optimizer, tiny_decoder, range(3, 10))
    assert 2 * MODULES < kept(model) < 4 * MODULES
    for step in range(10, STEPS + 1):
        run(method, model, optimizer, tiny_decoder, [step])
        if step >= STEPS - method.tfinal:
            assert kept(model) == 2 * MODULES
    ranks = method.ranks(model)
    assert sum(ranks.values()) == 2 * MODULES
    assert len(ranks) == MODULES
    assert len(set(ranks.values())) > 1


def test_the_last_pruning_keeps_what_peft_would_keep(tiny_decoder):
    other = copy_of(tiny_decoder)
    ours, theirs = start(tiny_decoder), start(other)
    last = STEPS - ours[0].tfinal
    for method, model, optimizer, base in ((*ours, tiny_decoder), (*theirs, other)):
        run(method, model, optimizer, base, range(1, last))
    run(*ours, tiny_decoder, [last])
    method, model, optimizer = theirs
    (hidden(other).pow(2)[..., :4].mean() + method.penalty(model)).backward()
    optimizer.step()
    model.base_model.update_and_allocate(last)
    assert ours[1].peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


@pytest.mark.parametrize("stop", [0, 1, 5, 9, 13, 14, 17, STEPS])
def test_the_budget_is_met_exactly_wherever_training_stops(tiny_decoder, stop):
    method, model, optimizer = start(tiny_decoder)
    run(method, model, optimizer, tiny_decoder, range(1, stop + 1))
    method.finalize(model)
    assert sum(method.ranks(model).values()) == 2 * MODULES
    assert kept(model) == (2 * MODULES if stop else 0)
    before, ranks = singular_values(model), method.ranks(model)
    method.finalize(model)
    assert method.ranks(model) == ranks
    assert all(torch.equal(before[n], e) for n, e in singular_values(model).items())


def test_equal_importance_starves_no_module(tiny_decoder):
    method, model, _ = start(tiny_decoder)
    method.finalize(model)
    assert set(method.ranks(model).values()) == {2}


@pytest.mark.parametrize("stop", [1, 3, 8, 13, 14, 16])
def test_resuming_at_any_step_gives_the_same_masks_and_weights(tiny_decoder, stop):
    again = copy_of(tiny_decoder)
    method, model, optimizer = start(tiny_decoder)
    run(method, model, optimizer, tiny_decoder, range(1, stop + 1))
    tensors, values = method.state_dict(model)
    moments = copy.deepcopy(optimizer.state_dict())
    run(method, model, optimizer, tiny_decoder, range(stop + 1, STEPS + 1))

    method_, model_, optimizer_ = start(again)
    method_.load_state_dict(model_, tensors, values)
    optimizer_.load_state_dict(moments)
    run(method_, model_, optimizer_, again, range(stop + 1, STEPS + 1))
    assert method.ranks(model) == method_.ranks(model_)
    expected, actual = method.state_dict(model), method_.state_dict(model_)
    assert expected[1] == actual[1]
    assert expected[0].keys() == actual[0].keys()
    assert all(torch.equal(expected[0][key], actual[0][key]) for key in expected[0])


def test_the_state_survives_json(tiny_decoder):
    import json

    method, model, optimizer = start(tiny_decoder)
    run(method, model, optimizer, tiny_decoder, range(1, 11))
    values = method.state_dict(model)[1]
    assert json.loads(json.dumps(values)) == values
    assert values["rank_pattern"]


@torch.no_grad()
def exported_difference(method, model, base, untouched, folder):
    config, tensors = method.export(model)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    PeftModel.from_pretrained(untouched.model, folder)
    return (hidden(base) - hidden(untouched)).abs().max().item(), config, tensors


def test_the_export_is_the_same_function_as_plain_lora(tiny_decoder, tmp_path):
    untouched = copy_of(tiny_decoder)
    method, model, optimizer = start(tiny_decoder, dropout=0.1)
    run(method, model, optimizer, tiny_decoder, range(1, STEPS + 1))
    model.eval()
    difference, config, tensors = exported_difference(
        method, model, tiny_decoder, untouched, tmp_path
    )
    assert difference <= 1e-6
    assert config.peft_type == "LORA"
    assert config.r == config.lora_alpha == max(method.ranks(model).values())
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert config.lora_dropout == 0.0
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {config.r}
    assert len(tensors) == 2 * MODULES


def test_the_file_tells_the_rank_each_module_ended_with(tiny_decoder):
    method, model, optimizer = start(tiny_decoder)
    run(method, model, optimizer, tiny_decoder, range(1, STEPS + 1))
    config, tensors = method.export(model)
    found = lora_ranks(lora_layers(config.to_dict(), tensors))
    assert found.keys() == {"0", "1"}
    by_path = {f"model.layers.{i}.{name}": r for i, row in found.items() for name, r in row.items()}
    assert by_path == method.ranks(model)
    assert len(set(by_path.values())) > 1


def test_a_module_without_any_rank_left_becomes_zeros(tiny_decoder, tmp_path):
    untouched = copy_of(tiny_decoder)
    method, model, optimizer = start(tiny_decoder)
    run(method, model, optimizer, tiny_decoder, range(1, STEPS + 1))
    path = "model.layers.0.self_attn.q_proj"
    pattern = model.peft_config["default"].rank_pattern
    pattern[f"{path}.lora_E.default"] = [False] * 4
    method.finalize(model)
    difference, _, tensors = exported_difference(method, model, tiny_decoder, untouched, tmp_path)
    assert method.ranks(model)[path] == 0
    assert difference <= 1e-6
    assert not tensors[f"base_model.model.{path}.lora_A.weight"].any()


def test_an_untrained_model_exports_zeros(tiny_decoder, tmp_path):
    untouched = copy_of(tiny_decoder)
    method, model, _ = start(tiny_decoder)
    assert exported_difference(method, model, tiny_decoder, untouched, tmp_path)[0] == 0.0


def test_missing_gradients_are_reported(tiny_decoder):
    method, model, _ = start(tiny_decoder)
    with pytest.raises(ConfigError, match="Call after_step before zero_grad"):
        method.after_step(model, 1)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"init_r": 8, "target_r": 8}, "method.init_r=8 and method.target_r=8"),
        ({"init_r": 4, "target_r": 8}, "method.init_r=4 and method.target_r=8"),
        ({"target_r": 0}, "method.target_r=0"),
        ({"total_steps": 3}, "training.max_steps or training.epochs"),
        ({"warmup_fraction": 0.5, "final_fraction": 0.5}, "method.warmup_fraction=0.5"),
        ({"final_fraction": 1.0}, "method.final_fraction=1.0"),
        ({"orth_weight": -1}, "method.orth_weight"),
        ({"beta1": 1.0}, "method.beta1"),
        ({"beta2": 0.0}, "method.beta2"),
        ({"delta_t": 0}, "method.delta_t"),
        ({"dropout": -0.1}, "method.dropout"),
        ({"alpha": 0}, "method.alpha"),
        ({"targets": "q"}, "method.targets"),
        ({"layers": "last"}, "method.layers"),
    ],
)
def test_an_option_out_of_range_is_named(options, keys):
    with pytest.raises(ConfigError, match=re.escape(keys)):
        Adalora(**{**OPTIONS, **options})


@pytest.mark.parametrize("total_steps", [4, 5, 7, 10, 50, 333, 10_000])
def test_every_schedule_has_room_to_prune(tiny_decoder, total_steps):
    method = Adalora(total_steps=total_steps)
    assert 1 <= method.tinit <= total_steps - method.tfinal - 2
    config = method.config(tiny_decoder.model)
    assert config.total_step == total_steps
    assert config.deltaT == max(1, (total_steps - method.tinit - method.tfinal) // 100)

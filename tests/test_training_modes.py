# ruff: noqa: F811 - make_config is a fixture
"""Options of a training: optimizers, gradient checkpointing."""

import json

import pytest
import torch
from test_training import (  # noqa: F401 - make_config is a fixture
    METHODS,
    assert_same_weights,
    assert_untouched,
    every_method,
    logged,
    make_config,
    make_slates,
    run_folder,
    state_of,
    untimed,
)

from peftrank import doctor
from peftrank.config import load_config
from peftrank.errors import ConfigError
from peftrank.training import checkpoint, train
from peftrank.training.loop import _backward
from peftrank.training.optimizers import slots
from peftrank.training.run import start

HERE = ("sgd", "lion", "adamw_8bit", "lion_8bit")
PAGED = ("paged_adamw", "paged_adamw_8bit", "paged_lion", "paged_lion_8bit")
BIG = {"r": 128, "targets": "attention"}
"""Its tensors have 4096 elements, from where on bitsandbytes keeps 8 bits."""


# --- optimizers


@pytest.mark.parametrize("optimizer", HERE)
def test_every_optimizer_resumes_bit_identically(optimizer, tiny_decoder, make_config, tmp_path):
    config = make_config(options=BIG, optimizer=optimizer, max_steps=7, checkpoint_steps=3)
    output = tmp_path / "out"
    whole = train(config, output=output, base=tiny_decoder)
    rows = untimed(logged(output))
    for step in (3, 6):
        saved = run_folder(output) / f"checkpoint-{step}"
        resumed = train(config, output=output, base=tiny_decoder, resume=saved)
        assert_same_weights(resumed, whole)
        assert untimed(logged(output)) == rows


@pytest.mark.parametrize("optimizer", ["adamw", *HERE])
def test_the_plan_knows_what_an_optimizer_keeps(optimizer, tiny_decoder, make_config, tmp_path):
    config = make_config(options=BIG, optimizer=optimizer, checkpoint_steps=1)
    output = tmp_path / "out"
    train(config, output=output, base=tiny_decoder)
    held = checkpoint.load(run_folder(output)).groups["optimizer"]
    tables = {key.rpartition("/")[2]: t for key, t in held.items() if "qmap" in key}
    real = [t for key, t in held.items() if t.dim() > 0 and "qmap" not in key]
    parameters = {key.rpartition("/")[0]: t for key, t in held.items() if key.endswith("state1")}
    parameters |= {k.rpartition("/")[0]: t for k, t in held.items() if k.endswith("exp_avg")}
    parameters |= {k.rpartition("/")[0]: t for k, t in held.items() if k.endswith("buffer")}
    sizes = [t.numel() for t in parameters.values()]
    planned = doctor.state_bytes(config.training, sizes)
    assert planned == sum(t.nbytes for t in (*real, *tables.values())) > 0


@pytest.mark.parametrize("optimizer", PAGED)
def test_what_needs_a_gpu_is_refused_on_a_cpu(optimizer, tiny_decoder, make_config, tmp_path):
    before = state_of(tiny_decoder)
    with pytest.raises(ConfigError, match=f"{optimizer} moves.*cpu.*Use"):
        train(make_config(optimizer=optimizer), output=tmp_path, base=tiny_decoder)
    assert_untouched(tiny_decoder, before)


@pytest.mark.parametrize("optimizer", ["sgd", "lion"])
def test_another_optimizer_than_adamw_needs_a_rate_of_its_own(
    optimizer,
    tiny_decoder,
    make_config,
    tmp_path,
):
    config = make_config(optimizer=optimizer, learning_rate=None)
    before = state_of(tiny_decoder)
    with pytest.raises(ConfigError, match=r"needs training\.learning_rate"):
        train(config, output=tmp_path, base=tiny_decoder)
    assert_untouched(tiny_decoder, before)


def test_betas_epsilon_and_momentum_reach_the_optimizer(tiny_decoder, make_config, tmp_path):
    run = start(make_config(betas=[0.5, 0.7], epsilon=1e-3), tmp_path, tiny_decoder)
    (group, *_) = run.optimizer.param_groups
    assert (group["betas"], group["eps"]) == ((0.5, 0.7), 1e-3)
    run.adapted.unload()
    run = start(make_config(optimizer="sgd", momentum=0.0), tmp_path, tiny_decoder)
    _backward(run, run.train[:4])
    run.optimizer.step()
    assert slots(run.optimizer.optimizer) == {}
    run.adapted.unload()


# --- gradient checkpointing


@every_method
@pytest.mark.parametrize("kind", ["tiny_decoder", "tiny_encoder"])
def test_checkpointed_gradients_are_those_of_a_plain_pass(
    method,
    kind,
    request,
    make_config,
    tmp_path,
):
    base = request.getfixturevalue(kind)
    before = state_of(base)
    found = []
    for on in (False, True):
        config = make_config(method, max_steps=8, gradient_checkpointing=on)
        run = start(config, tmp_path, base)
        torch.manual_seed(5)
        with torch.no_grad():  # away from the zeros of the start
            for p in run.adapted.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        _backward(run, run.train)
        kept = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.requires_grad}
        found.append(kept)
        run.adapted.unload()
        base.model.gradient_checkpointing_disable()
        base.model.eval()
    assert found[0].keys() == found[1].keys()
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-6)
    assert_untouched(base, before)


def test_a_checkpointed_run_is_the_same_and_gives_the_base_back(
    tiny_decoder,
    make_config,
    tmp_path,
):
    before = state_of(tiny_decoder)
    plain = train(make_config(), output=tmp_path / "a", base=tiny_decoder)
    config = make_config(gradient_checkpointing=True)
    same = train(config, output=tmp_path / "b", base=tiny_decoder)
    assert_same_weights(plain, same)
    assert_untouched(tiny_decoder, before)
    assert not tiny_decoder.model.is_gradient_checkpointing


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@every_method
def test_the_plan_has_fewer_activations(method, quantization, workplace, tmp_path):
    values = json.loads((workplace / "base" / "config.json").read_text())
    deeper = tmp_path / "config.json"
    deeper.write_text(json.dumps({**values, "num_hidden_layers": 8}))

    def plan(on):
        overrides = {
            "base.name": str(workplace / "base"),
            "base.quantization": quantization,
            "training.gradient_checkpointing": on,
            "training.max_steps": 10,
            "method.layers": "all",
            **{f"data.{part}": workplace / "data" / f"{part}.jsonl" for part in ("train", "valid")},
        }
        config = load_config(domain="news", method=method, overrides=overrides)
        return doctor.memory_plan(config, architecture=deeper)

    assert plan(True).activations < 0.5 * plan(False).activations


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@every_method
def test_a_quantized_base_is_recomputed_too(method, quantization, workplace, make_config, tmp_path):
    """Counted on real tensors: what the backward pass still needs after the forward pass."""
    from peftrank.base import load_base

    base = load_base(
        str(workplace / "base"), quantization=quantization, compute_dtype="float32", device="cpu"
    )
    kept, gradients = [], []
    for on in (False, True):
        options = {k: v for k, v in METHODS[method].items() if k != "dropout"}
        config = make_config(method, options=options, max_steps=8, gradient_checkpointing=on)
        run = start(config, tmp_path, base)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _backward(run, make_slates(4))
        kept.append(sum(sizes))
        gradients.append(
            {n: p.grad.clone() for n, p in run.model.named_parameters() if p.requires_grad}
        )
        run.adapted.unload()
        base.model.gradient_checkpointing_disable()
    assert kept[1] < 0.5 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)

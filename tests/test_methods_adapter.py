import copy
import json
import re
import subprocess
import sys
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from test_base import _inputs
from tiny import tiny_model

from peftrank.bank import Bank
from peftrank.base import base_from_model, state_hash
from peftrank.errors import AdapterError, ConfigError
from peftrank.methods import _registration
from peftrank.methods._bottleneck import BottleneckLayer
from peftrank.methods._sites import attach, bottleneck_forward, bottleneck_sites
from peftrank.methods.adapter import Adapter
from peftrank.methods.lora import Lora
from peftrank.peft_files import AdapterFiles

KINDS = ["houlsby", "pfeiffer", "parallel"]
on_both = pytest.mark.parametrize("base", ["tiny_decoder", "tiny_encoder"], indirect=True)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def base(request):
    return request.getfixturevalue(request.param)


def hidden(base):
    ids = torch.arange(18).view(2, 9) + 10
    return base.hidden_states(ids, torch.zeros(2, 1, 9, 9), torch.arange(9).expand(2, 9))


def start(base, kind="pfeiffer", seed=0, **options):
    """The method and its PeftModel, with weights as after some training."""
    method = Adapter(total_steps=1, kind=kind, **{"size": 4, **options})
    model = get_peft_model(base.model, method.config(base.model))
    randomize(model, seed)
    return method, model.eval()


@torch.no_grad()
def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bottleneck." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def copy_of(base):
    return base_from_model(copy.deepcopy(base.model), base.tokenizer, name="copy")


def save(method, model, folder):
    config, tensors = method.export(model)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), tensors


@on_both
@each_kind
@torch.no_grad()
def test_every_kind_starts_at_the_base_exactly(base, kind):
    before = hidden(base)
    config = Adapter(total_steps=1, kind=kind).config(base.model)
    get_peft_model(base.model, config)
    assert torch.equal(hidden(base), before)


@on_both
@each_kind
@torch.no_grad()
def test_no_module_of_the_base_changes_its_name_or_class(base, kind):
    before = {name: type(module) for name, module in base.model.named_modules()}
    _, model = start(base, kind)
    after = {name: type(module) for name, module in model.base_model.model.named_modules()}
    assert before == {name: kind for name, kind in after.items() if ".bottleneck" not in name}


@on_both
@each_kind
@torch.no_grad()
def test_the_result_is_the_formula_of_the_papers(base, kind):
    """Each block computed by hand from the untouched one, on its own inputs."""
    plain = copy_of(base)
    _, model = start(base, kind, scale=0.5, activation="relu")
    modules = dict(model.base_model.model.named_modules())

    def f(layer, h):
        down, up = layer.down["default"], layer.up["default"]
        return 0.5 * up(torch.relu(down(h)))

    def at(index, path):
        prefix = "model.layers" if base.is_decoder else "encoder.layer"
        return modules[f"{prefix}.{index}.{path}.bottleneck"]

    for index, block in enumerate(plain.layers):
        _by_hand(block, kind, lambda path, h, index=index: f(at(index, path), h), base.is_decoder)
    torch.testing.assert_close(hidden(base), hidden(plain), rtol=1e-5, atol=1e-5)


def _by_hand(block, kind, f, is_decoder):
    """Replaces forward methods of an untouched block by the written-out ones."""
    names = {
        True: ("self_attn.o_proj", "mlp", "mlp", "mlp"),
        False: ("attention.output.dense", "output.dense", "output", "intermediate"),
    }[is_decoder]
    attention, output, parallel, source = names

    def wrap(path, change):
        module = block.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args: change(forward, *args)

    if kind == "houlsby":
        wrap(attention, lambda forward, h: (y := forward(h)) + f(attention, y))
    if kind != "parallel":
        wrap(output, lambda forward, h: (y := forward(h)) + f(output, y))
        return
    seen = {}

    def remember(forward, h):
        seen["h"] = h
        return forward(h)

    wrap(source, remember)
    behind = "mlp" if is_decoder else "output.dense"
    wrap(behind, lambda forward, h: forward(h) + f(parallel, seen["h"]))


@on_both
@each_kind
@torch.no_grad()
def test_saved_files_load_in_plain_peft(base, kind, tmp_path):
    untouched = copy_of(base)
    method, model = start(base, kind, dropout=0.5)
    config, tensors = save(method, model, tmp_path)
    assert config["peft_type"] == "BOTTLENECK"
    assert config["dropout"] == 0.0
    assert all(".bottleneck." in name for name in tensors)
    PeftModel.from_pretrained(untouched.model, tmp_path)
    assert torch.equal(hidden(untouched), hidden(base))


def test_pefts_own_save_writes_the_same_tensors(tiny_decoder, tmp_path):
    from safetensors.torch import load_file

    method, model = start(tiny_decoder)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs, ours = load_file(tmp_path / "adapter_model.safetensors"), method.export(model)[1]
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_new_process_loads_the_files_through_peft_after_import_peftrank(tiny_decoder, tmp_path):
    tiny_decoder.model.save_pretrained(tmp_path / "base")
    method, model = start(tiny_decoder)
    save(method, model, tmp_path)
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(8).view(1, 8)).logits, tmp_path / "expected.pt")
    code = f"""
import sys
import peftrank
assert not {{"torch", "peft", "transformers"}} & set(sys.modules)
import importlib.util
assert importlib.util.find_spec("peft").loader.get_filename("peft").endswith("__init__.py")
import peft, torch, transformers
assert not any("peftrank" in type(finder).__module__ for finder in sys.meta_path)
base = transformers.AutoModelForCausalLM.from_pretrained(r"{tmp_path / "base"}")
model = peft.PeftModel.from_pretrained(base, r"{tmp_path}")
expected = torch.load(r"{tmp_path / "expected.pt"}")
with torch.no_grad():
    assert torch.equal(model(input_ids=torch.arange(8).view(1, 8)).logits, expected)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_peft_that_is_imported_already_gets_the_type_at_once(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, "BOTTLENECK")
    _registration.install()
    assert "BOTTLENECK" in PEFT_TYPE_TO_TUNER_MAPPING


@torch.no_grad()
def test_adapters_of_all_kinds_live_in_one_model(tiny_decoder, tmp_path):
    untouched, plain = copy_of(tiny_decoder), hidden(tiny_decoder)
    expected = {}
    for seed, kind in enumerate(KINDS):
        alone = copy_of(untouched)
        method, model = start(alone, kind, seed=seed)
        save(method, model, tmp_path / kind)
        expected[kind] = hidden(alone)
    model = PeftModel.from_pretrained(untouched.model, tmp_path / KINDS[0], adapter_name=KINDS[0])
    for kind in KINDS[1:]:
        model.load_adapter(tmp_path / kind, adapter_name=kind)
    assert torch.equal(hidden(untouched), expected["houlsby"])
    for kind in reversed(KINDS):
        model.set_adapter(kind)
        assert torch.equal(hidden(untouched), expected[kind])
    with model.disable_adapter():
        assert torch.equal(hidden(untouched), plain)
    model.delete_adapter("pfeiffer")
    model.set_adapter("parallel")
    assert torch.equal(hidden(untouched), expected["parallel"])


@on_both
@each_kind
@torch.no_grad()
def test_unloading_and_deleting_leave_the_base_as_it_was(base, kind):
    names = [name for name, _ in base.model.named_modules()]
    before = hidden(base)
    for leave in (lambda model: model.unload(), lambda model: model.delete_adapter("default")):
        _, model = start(base, kind)
        assert not torch.equal(hidden(base), before)
        leave(model)
        assert torch.equal(hidden(base), before)
        inner = base.model
        assert [name for name, _ in inner.named_modules()] == names
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())
        inner.__dict__.pop("peft_config", None)  # PEFT leaves it behind after delete_adapter


@on_both
@each_kind
@torch.no_grad()
def test_a_deep_copy_has_adapters_of_its_own(base, kind):
    _, model = start(base, kind)
    expected = hidden(base)
    copied = copy.deepcopy(model)
    twin = base_from_model(copied.base_model.model, base.tokenizer, name="twin")
    assert torch.equal(hidden(twin), expected)
    randomize(copied, seed=1)
    assert not torch.equal(hidden(twin), expected)
    assert torch.equal(hidden(base), expected)
    copied.unload()
    assert torch.equal(hidden(base), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.model.modules())


@torch.no_grad()
def test_lora_files_still_load_on_the_same_base(tiny_decoder, tmp_path):
    untouched = copy_of(tiny_decoder)
    lora = Lora(total_steps=1)
    trained = copy_of(tiny_decoder)
    lora_model = get_peft_model(trained.model, lora.config(trained.model))
    for name, parameter in lora_model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.01)
    save(lora, lora_model, tmp_path)
    _, model = start(untouched, "houlsby")
    with model.disable_adapter():
        PeftModel.from_pretrained(model.base_model.model, tmp_path)
        torch.testing.assert_close(hidden(untouched), hidden(trained), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "bert"])
@pytest.mark.parametrize("kind", [*KINDS, "scaled parallel"])
def test_every_kind_lives_through_peft_s_whole_life_on_every_type_of_base(
    kind, architecture, tokenizer, bert_tokenizer, tmp_path
):
    """Trains, saves, loads, is chosen, disabled and deleted; LoRA files go on loading."""
    tokens = bert_tokenizer if architecture == "bert" else tokenizer
    plain = base_from_model(tiny_model(architecture, len(tokens)), tokens, name=architecture)
    inputs = _inputs(plain)
    lora, lora_states = _trained(plain, Lora(total_steps=1, r=4), inputs, tmp_path / "lora")
    options = {"kind": "parallel", "scale": 4.0} if kind == "scaled parallel" else {"kind": kind}
    method = Adapter(total_steps=1, size=4, **options)
    with torch.no_grad():
        expected, states = {}, plain.hidden_states(*inputs)
    for name, seed in (("a", 0), ("b", 1)):
        _, expected[name] = _trained(plain, method, inputs, tmp_path / name, seed)
        assert (expected[name] - states).abs().max() > 1e-3
    assert (expected["a"] - expected["b"]).abs().max() > 1e-3

    base = copy_of(plain)
    names = {name: type(module) for name, module in base.model.named_modules()}
    model = PeftModel.from_pretrained(base.model, tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    found = {name: type(module) for name, module in base.model.named_modules()}
    assert names.items() <= found.items()
    with torch.no_grad():
        for name in ("a", "b", "a"):
            model.set_adapter(name)
            torch.testing.assert_close(base.hidden_states(*inputs), expected[name])
            with model.disable_adapter():
                assert torch.equal(base.hidden_states(*inputs), states)
        model.set_adapter("b")
        model.delete_adapter("a")
        torch.testing.assert_close(base.hidden_states(*inputs), expected["b"])
        model.delete_adapter("b")
        assert torch.equal(base.hidden_states(*inputs), states)
        assert {name: type(m) for name, m in base.model.named_modules()} == names
        model.unload()
        loaded = PeftModel.from_pretrained(base.model, tmp_path / "lora")
        torch.testing.assert_close(base.hidden_states(*inputs), lora_states)
    kept = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert kept.keys() == lora.keys()
    assert all(torch.equal(kept[name], lora[name]) for name in lora)


def _trained(plain, method, inputs, folder, seed=0):
    """The files' tensors, and the states of a copy after three steps that reach all of it."""
    base = copy_of(plain)
    torch.manual_seed(seed)
    model = get_peft_model(base.model, method.config(base.model)).train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-2)
    for _ in range(3):
        optimizer.zero_grad()
        base.hidden_states(*inputs).pow(2)[..., : 4 + seed].mean().backward()
        optimizer.step()
    assert not [name for name, p in parameters.items() if not p.grad.any()]
    folder.mkdir()
    _, tensors = save(method, model.eval(), folder)
    with torch.no_grad():
        return tensors, base.hidden_states(*inputs)


def test_merging_is_refused_with_the_reason(tiny_decoder):
    _, model = start(tiny_decoder)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match="non-linearity"):
            merge()
    assert isinstance(tiny_decoder.layers[0].mlp.bottleneck, BottleneckLayer)


def test_mixed_batches_are_refused_not_ignored(tiny_decoder):
    _, model = start(tiny_decoder)
    ids = torch.arange(8).view(2, 4)
    with pytest.raises(AdapterError, match="adapter_names"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


@on_both
@each_kind
def test_gradient_checkpointing_gives_the_same_gradients(base, kind):
    _, model = start(base, kind)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model.zero_grad()
        hidden(base).pow(2)[..., :4].mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@on_both
@torch.no_grad()
def test_threads_do_not_disturb_each_other(base):
    start(base, "parallel")
    inputs = [torch.arange(n).view(1, n) + 10 for n in range(3, 11)]

    def run(ids):
        n = ids.shape[1]
        return base.hidden_states(ids, torch.zeros(1, 1, n, n), torch.arange(n)[None])

    expected, actual = [run(ids) for ids in inputs], [None] * len(inputs)

    @torch.no_grad()
    def work(i):
        for _ in range(5):
            actual[i] = run(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@on_both
@each_kind
@torch.no_grad()
def test_the_file_alone_says_where_and_how_to_apply_it(base, kind, tmp_path):
    """What inference does: hooks from the file on an untouched base, without PEFT."""
    untouched = copy_of(base)
    method, model = start(base, kind, activation="silu", scale=2.0)
    config, tensors = save(method, model, tmp_path)
    sites = bottleneck_sites(config, tensors)
    assert len(sites) == len(base.layers) * (2 if kind == "houlsby" else 1)
    for site in sites:
        weights = [tensors[name] for name in site.names]

        def change(h, weights=weights, site=site):
            return bottleneck_forward(h, *weights, site.activation, site.scale)

        attach(untouched.model.get_submodule(site.path), site.reads, change)
    torch.testing.assert_close(hidden(untouched), hidden(base), rtol=0, atol=0)


@on_both
@torch.no_grad()
def test_layernorm_trains_copies_that_leave_with_the_adapter(base):
    before, plain, by_hand = state_hash(base.model), hidden(base), copy_of(base)
    method, model = start(base, "parallel", layernorm=True)
    config, tensors = method.export(model)
    norms = {name: t for name, t in tensors.items() if ".norm_" in name}
    others = {name: t for name, t in tensors.items() if name not in norms}
    assert len(norms) == (2 * 2 if base.is_decoder else 2 * 2 * 2)  # BERT's have a bias too
    for name, value in norms.items():
        path = name.removeprefix("base_model.model.").replace("bottleneck.norm_", "")
        by_hand.model.get_parameter(path).copy_(value)
    bank = Bank(by_hand)
    news = bank.place("news", AdapterFiles(config.to_dict(), others, {}, {}))
    with bank.using(news):
        assert torch.equal(hidden(base), hidden(by_hand))
    with model.disable_adapter():
        assert torch.equal(hidden(base), plain)
    model.unload()
    assert torch.equal(hidden(base), plain)
    assert state_hash(base.model) == before


def test_the_bank_refuses_normalization_weights_that_do_not_fit(tiny_decoder):
    served = Bank(copy_of(tiny_decoder))
    method, model = start(tiny_decoder, layernorm=True)
    config, tensors = method.export(model)
    name = "base_model.model.model.layers.0.input_layernorm.bottleneck.norm_weight"
    for wrong in (
        {**tensors, name: torch.ones(31)},
        {**tensors, name.replace("weight", "bias"): torch.ones(32)},
        {**tensors, name.replace("input_layernorm", "mlp.up_proj"): torch.ones(32)},
    ):
        with pytest.raises(AdapterError, match="belongs to another base"):
            served.place("news", AdapterFiles(config.to_dict(), wrong, {}, {}))
    served.place("news", AdapterFiles(config.to_dict(), tensors, {}, {}))


def test_files_of_another_method_are_refused(tiny_decoder, tmp_path):
    method, model = start(tiny_decoder)
    config, tensors = save(method, model, tmp_path)
    with pytest.raises(AdapterError, match="no part of a bottleneck adapter"):
        bottleneck_sites(config, ["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"])
    with pytest.raises(AdapterError, match=r"'model\.layers\.0\.mlp' lacks up\.bias"):
        bottleneck_sites(config, [name for name in tensors if not name.endswith("up.bias")])
    for key, value in (("reads", None), ("activation", "tanh"), ("scale", "2")):
        with pytest.raises(AdapterError, match=f"{key}="):
            bottleneck_sites({**config, key: value}, tensors)


@pytest.mark.parametrize(
    ("options", "width"), [({"size": 5}, 5), ({"reduction": 4}, 8), ({"size": None}, 2)]
)
def test_the_width_of_the_bottleneck(tiny_decoder, options, width):
    assert Adapter(total_steps=1, **options).config(tiny_decoder.model).size == width


def test_dropout_acts_in_training_only(tiny_decoder):
    _, model = start(tiny_decoder, dropout=0.5)
    with torch.no_grad():
        assert torch.equal(hidden(tiny_decoder), hidden(tiny_decoder))
        model.train()
        assert not torch.equal(hidden(tiny_decoder), hidden(tiny_decoder))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"kind": "prefix"}, "method.kind"),
        ({"activation": "tanh"}, "method.activation"),
        ({"size": 0}, "method.size"),
        ({"reduction": 0}, "method.reduction"),
        ({"size": 4, "reduction": 4}, "method.size=4 and method.reduction=4"),
        ({"dropout": 1.0}, "method.dropout"),
        ({"scale": 0}, "method.scale"),
        ({"layers": "top"}, "method.layers"),
    ],
)
def test_an_option_out_of_range_is_named(options, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        Adapter(total_steps=1, **options)

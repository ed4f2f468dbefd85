import asyncio
import copy
import gc
import threading
import time
import weakref

import peft
import pytest
import torch

from peftrank import plugins
from peftrank.bank import Bank
from peftrank.base import base_from_model, state_hash
from peftrank.errors import AdapterError, ConfigError
from peftrank.store import AdapterFiles

METHODS = {
    "lora": ("lora", {"r": 4}),
    "rslora": ("lora", {"r": 4, "rslora": True}),
    "dora": ("lora", {"r": 4, "dora": True}),
    "adalora": ("adalora", {"init_r": 6, "target_r": 3, "alpha": 16}),
    "pfeiffer": ("adapter", {"kind": "pfeiffer"}),
    "houlsby": ("adapter", {"kind": "houlsby"}),
    "parallel": ("adapter", {"kind": "parallel"}),
    "layernorm": ("adapter", {"layernorm": True}),
    "pissa": ("lora", {"r": 4, "init": "pissa"}),
    "ia3": ("ia3", {}),
}


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.2 * noise)


def clone(base):
    """An equal base that PEFT may change."""
    return base_from_model(copy.deepcopy(base.model), base.tokenizer, name="clone")


def trained(base, method, seed=1):
    """A PeftModel with random weights, and its exported files."""
    name, options = METHODS[method]
    made = plugins.load("methods", name)(total_steps=100, **options)
    model = peft.get_peft_model(base.model, made.config(base.model))
    randomize(model, seed)
    made.finalize(model)
    config, tensors = made.export(model)
    return model.eval(), AdapterFiles(plain(config), tensors, {}, {})


def plain(config):
    values = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


def hidden(model, tokens=12):
    ids = torch.arange(2 * tokens).view(2, tokens) + 5
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1].float()


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=["decoder", "encoder"])
def base(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.mark.parametrize("method", METHODS)
def test_the_bank_equals_a_trained_peft_model(base, method):
    model, files = trained(clone(base), method)
    expected = hidden(model)
    bank = Bank(base)
    news = bank.place("news", files)
    untouched = hidden(base.model)
    with bank.using(news):
        got = hidden(base.model)
    # Of PiSSA's update two parts cancel, and what is left of their rounding differs by processor.
    assert relative(got, expected) < (1e-5 if method == "pissa" else 1e-6)
    assert relative(untouched, expected) > 1e-3


DROPPED = {
    **METHODS,
    "full": ("full", {}),
    "loha": ("peft:LOHA", {"r": 4}),
    "unilora": ("peft:UNILORA", {}),
    "vera": ("peft:VERA", {"r": 4}),
}


@pytest.mark.parametrize("method", DROPPED)
@torch.no_grad()
def test_layers_that_are_skipped_are_those_of_the_base(base, method, monkeypatch):
    """AdapterDrop: the plain base below, the trained model above."""
    monkeypatch.setitem(METHODS, method, DROPPED[method])
    copied = clone(base)
    _, files = trained(copied, method)
    ids, mask, depth = torch.arange(24).view(2, 12) + 5, torch.zeros(2, 1, 12, 12), torch.arange(12)
    depth = depth.expand(2, 12)
    entering = base.states_below(1, ids, mask, depth)
    expected = copied.states_above(1, entering, mask, depth)
    bank = Bank(base)
    whole = bank.place("whole", files)
    dropped = bank.place("dropped", files, skip_layers=1)
    with bank.using(dropped):
        found = base.hidden_states(ids, mask, depth)
    # Two parts of PiSSA's update cancel, each as large as the weight's own: more is rounded.
    assert relative(found, expected) < (1e-5 if method in ("pissa", "olora") else 1e-6)
    with bank.using(whole):
        assert relative(base.hidden_states(ids, mask, depth), expected) > 1e-4
    if method != "unilora":  # which has one vector for all layers
        assert 0 < dropped.nbytes < whole.nbytes


def test_skipping_what_there_is_not_is_refused(tiny_decoder):
    bank = Bank(tiny_decoder)
    _, files = trained(clone(tiny_decoder), "lora")
    for wrong in (-1, 2):
        with pytest.raises(ConfigError, match=f"skip_layers={wrong}: expected at least 0 and belo"):
            bank.place("news", files, skip_layers=wrong)
    below = {name: t for name, t in files.tensors.items() if ".layers.0." in name}
    with pytest.raises(AdapterError, match="no weights beyond the first 1 layers"):
        bank.place("news", AdapterFiles(files.peft_config, below, {}, {}), skip_layers=1)


@pytest.mark.parametrize("method", ["lora", "dora", "pfeiffer"])
def test_the_bank_equals_a_peft_model_loaded_from_its_files(base, method, tmp_path):
    import json

    from safetensors.torch import save_file

    _, files = trained(clone(base), method)
    (tmp_path / "adapter_config.json").write_text(json.dumps(files.peft_config))
    save_file(files.tensors, tmp_path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(clone(base).model, tmp_path).eval()
    bank = Bank(base)
    news = bank.place("news", files)
    with bank.using(news):
        got = hidden(base.model)
    assert relative(got, hidden(loaded)) < 1e-6


@pytest.mark.parametrize("method", ["lora", "dora", "pfeiffer", "layernorm"])
def test_the_bank_equals_peft_in_bfloat16(tiny_decoder, method):
    base = base_from_model(
        tiny_decoder.model.to(torch.bfloat16), tiny_decoder.tokenizer, name="bf16"
    )
    model, files = trained(clone(base), method)
    bank = Bank(base)
    news = bank.place("news", files)
    with torch.autocast("cpu", torch.bfloat16):  # as a RankingModel runs both
        with bank.using(news):
            got = hidden(base.model)
        expected = hidden(model)
    # PEFT computes DoRA's norms anew in each pass, here in bfloat16; the bank once, in float32.
    assert relative(got, expected) <= (2e-2 if method == "dora" else 0.0)


def test_rank_and_alpha_patterns_and_lora_bias_are_peft_s(tiny_decoder):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj", "o_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 3},
        alpha_pattern={"o_proj": 32, r".*layers\.0\.mlp\.up_proj": 1},
        lora_bias=True,
    )
    copy = clone(tiny_decoder)
    model = peft.get_peft_model(copy.model, config)
    randomize(model, 3)
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    bank = Bank(tiny_decoder)
    news = bank.place("news", AdapterFiles(plain(model.peft_config["default"]), tensors, {}, {}))
    with bank.using(news):
        got = hidden(tiny_decoder.model)
    assert relative(got, hidden(model.eval())) < 1e-6


def test_outside_of_using_the_base_is_plain_and_its_weights_never_change(base):
    before, plain_states = state_hash(base.model), hidden(base.model)
    hooks = count_hooks(base.model)  # transformers has its own, to collect hidden states
    files = {method: trained(clone(base), method)[1] for method in METHODS}
    bank = Bank(base)
    for method in METHODS:
        with bank.using(bank.place(method, files[method])):
            hidden(base.model)
    assert torch.equal(hidden(base.model), plain_states)
    assert state_hash(base.model) == before
    bank.close()
    assert count_hooks(base.model) == hooks


def test_using_nests_and_none_is_the_plain_base(tiny_decoder):
    bank = Bank(tiny_decoder)
    plain_states = hidden(tiny_decoder.model)
    states, placed = {}, {}
    for seed, method in enumerate(["lora", "houlsby"]):
        placed[method] = bank.place(method, trained(clone(tiny_decoder), method, seed)[1])
        with bank.using(placed[method]):
            states[method] = hidden(tiny_decoder.model)
    with bank.using(placed["lora"]):
        with bank.using(placed["houlsby"]):
            assert torch.equal(hidden(tiny_decoder.model), states["houlsby"])
            with bank.using(None):
                assert torch.equal(hidden(tiny_decoder.model), plain_states)
        assert torch.equal(hidden(tiny_decoder.model), states["lora"])


def test_an_error_inside_using_puts_the_plain_base_back(tiny_decoder):
    bank = Bank(tiny_decoder)
    plain_states = hidden(tiny_decoder.model)
    adapter = bank.place("lora", trained(clone(tiny_decoder), "lora")[1])
    with pytest.raises(ValueError, match="stop"), bank.using(adapter):
        raise ValueError("stop")
    assert torch.equal(hidden(tiny_decoder.model), plain_states)


def mixed_and_alone(base, methods, lengths, tokens=12):
    """Hidden states of rows that mix adapters in one pass, and of one pass per adapter."""
    bank = Bank(base)
    placed = [
        None if method is None else bank.place(method, trained(clone(base), method, seed)[1])
        for seed, method in enumerate(methods)
    ]
    spans, start = [], 0
    for adapter, length in zip(placed, lengths, strict=True):
        spans.append((adapter, start, start + length))
        start += length
    assert start == 2 * tokens
    with bank.using(spans):
        mixed = hidden(base.model, tokens).flatten(0, 1)
    alone = torch.zeros_like(mixed)
    for adapter, start, stop in spans:
        with bank.using(adapter):
            alone[start:stop] = hidden(base.model, tokens).flatten(0, 1)[start:stop]
    return mixed, alone


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", ["lora", "dora", "houlsby", "layernorm", None])
def test_rows_of_one_pass_may_use_adapters_of_any_methods(base, first, second):
    mixed, alone = mixed_and_alone(base, [first, second], [12, 12])
    assert relative(mixed, alone) < 1e-6


def test_a_span_may_end_inside_a_row(tiny_decoder):
    # Without attention across the border, as tokens of two adapters never see each other.
    bank = Bank(tiny_decoder)
    files = [trained(clone(tiny_decoder), m, i)[1] for i, m in enumerate(["lora", "parallel"])]
    lora, parallel = (bank.place(str(i), f) for i, f in enumerate(files))
    with bank.using([(lora, 0, 5), (parallel, 5, 24)]):
        mixed = hidden(tiny_decoder.model).flatten(0, 1)
    with bank.using(lora):
        alone = hidden(tiny_decoder.model).flatten(0, 1)
    assert relative(mixed[:5], alone[:5]) < 1e-6  # causal: the first five see only one another
    with bank.using(parallel):
        alone = hidden(tiny_decoder.model).flatten(0, 1)
    assert relative(mixed[12:], alone[12:]) < 1e-6


def test_spans_that_do_not_cover_the_batch_are_an_error(tiny_decoder):
    bank = Bank(tiny_decoder)
    lora = bank.place("lora", trained(clone(tiny_decoder), "lora")[1])
    with pytest.raises(AdapterError, match="24 tokens of the batch's 20"):
        with bank.using([(lora, 0, 10), (None, 10, 20)]):
            hidden(tiny_decoder.model)


def test_threads_do_not_see_each_other_s_adapter(tiny_decoder):
    bank = Bank(tiny_decoder)
    placed = {None: None}
    expected = {None: hidden(tiny_decoder.model)}
    for seed, method in enumerate(["lora", "adalora", "parallel"]):
        placed[method] = bank.place(method, trained(clone(tiny_decoder), method, seed)[1])
        with bank.using(placed[method]):
            expected[method] = hidden(tiny_decoder.model)
    wrong, start = [], threading.Barrier(len(expected))

    def work(name):
        start.wait()
        for _ in range(60):
            with bank.using(placed[name]):
                if not torch.equal(hidden(tiny_decoder.model), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_asyncio_tasks_do_not_see_each_other_s_adapter(tiny_decoder):
    bank = Bank(tiny_decoder)
    expected, placed = {}, {}
    for seed, method in enumerate(["lora", "houlsby"]):
        placed[method] = bank.place(method, trained(clone(tiny_decoder), method, seed)[1])
        with bank.using(placed[method]):
            expected[method] = hidden(tiny_decoder.model)

    async def work(name):
        with bank.using(placed[name]):
            await asyncio.sleep(0)  # the other task enters its own `using` here
            return torch.equal(hidden(tiny_decoder.model), expected[name])

    async def both():
        return await asyncio.gather(*(work(name) for name in expected))

    assert asyncio.run(both()) == [True, True]


def test_placing_and_dropping_while_others_rank_disturbs_nobody(tiny_decoder):
    bank = Bank(tiny_decoder)
    news = bank.place("news", trained(clone(tiny_decoder), "lora")[1])
    others = [trained(clone(tiny_decoder), m, 5)[1] for m in ("houlsby", "dora", "parallel")]
    with bank.using(news):
        expected = hidden(tiny_decoder.model)
    failed, stop = [], threading.Event()

    def rank():
        while not stop.is_set():
            with bank.using(news):
                if not torch.equal(hidden(tiny_decoder.model), expected):
                    failed.append("changed")

    thread = threading.Thread(target=rank)
    thread.start()
    for i in range(60):
        bank.place("other", others[i % 3])
        time.sleep(0.001)
    stop.set()
    thread.join()
    assert failed == []


def test_the_memory_of_an_adapter_is_free_once_nobody_holds_it(tiny_decoder):
    bank = Bank(tiny_decoder)
    adapter = bank.place("news", trained(clone(tiny_decoder), "houlsby")[1])
    with bank.using(adapter):
        hidden(tiny_decoder.model)
    weights = weakref.ref(next(iter(adapter.changes.values())))
    del adapter
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("method", ["lora", "pfeiffer", "layernorm"])
def test_nbytes_are_those_of_the_weights(tiny_decoder, method):
    files = trained(clone(tiny_decoder), method)[1]
    adapter = Bank(tiny_decoder).place("news", files)
    assert adapter.nbytes == sum(t.nbytes for t in files.tensors.values())


def files_for(path, a, b, **config):
    prefix = f"base_model.model.{path}"
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    return AdapterFiles({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}, tensors, {}, {})


def test_weights_for_a_module_the_base_lacks_are_refused(tiny_decoder):
    bank = Bank(tiny_decoder)
    files = files_for("model.layers.7.mlp.up_proj", torch.ones(2, 32), torch.ones(64, 2))
    with pytest.raises(AdapterError, match=r"layers\.7.*does not have.*another base"):
        bank.place("news", files)


def test_weights_of_another_width_are_refused(tiny_decoder):
    files = files_for("model.layers.0.mlp.up_proj", torch.ones(2, 33), torch.ones(64, 2))
    with pytest.raises(AdapterError, match=r"\(64, 33\).*\(64, 32\)"):
        Bank(tiny_decoder).place("news", files)


def test_weights_for_a_module_that_is_not_linear_are_refused(tiny_decoder):
    files = files_for("model.norm", torch.ones(2, 32), torch.ones(32, 2))
    with pytest.raises(AdapterError, match="LlamaRMSNorm"):
        Bank(tiny_decoder).place("news", files)


@pytest.mark.parametrize(
    "config", [{"use_qalora": True}, {"modules_to_save": ["score"]}, {"peft_type": "ADALORA"}]
)
def test_what_the_bank_does_not_compute_is_refused(tiny_decoder, config):
    files = files_for("model.layers.0.mlp.up_proj", torch.ones(2, 32), torch.ones(64, 2), **config)
    with pytest.raises(AdapterError, match="|".join(map(str, config)) + "|ADALORA"):
        Bank(tiny_decoder).place("news", files)


@pytest.mark.parametrize(
    "pattern", ["(m+)+!", ".*.*.*.*.*.*.*.*!", "(m|m)" * 30 + "!", "m?" * 30 + "!", "()" * 50_000]
)
def test_a_pattern_that_could_take_for_ever_is_refused(tiny_decoder, pattern):
    hostile = {"rank_pattern": {pattern: 2}}
    files = files_for("model.layers.0.mlp.up_proj", torch.ones(2, 32), torch.ones(64, 2), **hostile)
    with pytest.raises(AdapterError, match="take for ever"):
        Bank(tiny_decoder).place("news", files)


def test_a_base_that_peft_has_changed_is_refused(tiny_decoder):
    _, files = trained(clone(tiny_decoder), "lora")
    peft.get_peft_model(tiny_decoder.model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="PEFT"):
        Bank(tiny_decoder).place("news", files)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "houlsby"])
def test_the_bank_equals_peft_on_the_quantized_base(smollm2_nf4, method, tmp_path):
    base = smollm2_nf4
    ids = torch.arange(64).view(2, 32) + 100

    def run(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as a RankingModel does
            return model(input_ids=ids, output_hidden_states=True).hidden_states[-1].float()

    name, options = METHODS[method]
    made = plugins.load("methods", name)(total_steps=100, **{**options, "layers": "top-3"})
    untouched = run(base.model)
    model = peft.get_peft_model(base.model, made.config(base.model))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    made.finalize(model)
    config, tensors = made.export(model)
    expected = run(model.eval())
    model.unload()
    base.model.requires_grad_(False).eval()
    assert torch.equal(run(base.model), untouched)
    bank = Bank(base)
    news = bank.place("news", AdapterFiles(plain(config), tensors, {}, {}))
    with bank.using(news):
        got = run(base.model)
    bank.close()
    assert relative(untouched, expected) > 1e-3
    # PEFT rounds between AdaLoRA's factors and in DoRA's norms, where the bank does not.
    assert relative(got, expected) < (2e-2 if method in ("adalora", "dora") else 1e-6)

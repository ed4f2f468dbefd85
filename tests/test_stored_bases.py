"""Bases that are quantized elsewhere, and token embeddings in 4 bits."""

import importlib.util
import json
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftrank import Ranker
from peftrank._packed_embedding import PackedEmbedding, pack_embeddings
from peftrank.base import load_base
from peftrank.config import load_config
from peftrank.doctor import memory_plan
from peftrank.errors import BaseModelError, ConfigError
from peftrank.formats.slates import read_slates
from peftrank.store import base_arguments, load_adapter
from peftrank.training import train

HAS_GPTQ = all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum"))


@pytest.fixture
def whole(workplace):
    """The folder of a tiny unquantized decoder."""
    return workplace / "base"


@pytest.fixture
def load(tmp_path):
    def load(folder, **options):
        return load_base(str(folder), device="cpu", cache_dir=tmp_path / "cache", **options)

    return load


@pytest.fixture
def stored(whole, tmp_path):
    """A copy of the decoder that bitsandbytes quantized, as transformers saves it."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=config, dtype=torch.float32
    )
    return _copied(whole, tmp_path / "stored", lambda folder: model.save_pretrained(folder))


def _copied(whole, folder, write):
    """A folder with the tokenizer of another, and what `write` puts there."""
    folder.mkdir()
    for path in whole.iterdir():
        if path.name != "config.json" and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    write(folder)
    return folder


def _gptq(whole, tmp_path):
    """A GPTQ checkpoint of random 4-bit codes, and a plain one with the weights that they mean.

    The layout is AutoGPTQ's first: codes of eight inputs in an int32, zero points less one.
    """
    source = load_file(whole / "model.safetensors")
    packed, plain = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in source.items():
        if not name.endswith("_proj.weight"):
            packed[name] = plain[name] = weight
            continue
        outputs, inputs = weight.shape
        group = torch.arange(inputs) // 32
        shape = (inputs // 32, outputs)
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.randint(4, 12, shape, generator=generator)
        scales = (0.02 + 0.02 * torch.rand(shape, generator=generator)).half()
        plain[name] = ((codes - zeros[group]) * scales[group].float()).T.contiguous()
        path = name.removesuffix(".weight")
        packed[f"{path}.qweight"] = _in_int32(codes)
        packed[f"{path}.qzeros"] = _in_int32((zeros - 1).T).T.contiguous()
        packed[f"{path}.scales"] = scales
        packed[f"{path}.g_idx"] = group.int()
    config = json.loads((whole / "config.json").read_text())
    about = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}

    def write(tensors, config):
        def into(folder):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config))

        return into

    quantized = config | {"quantization_config": about | {"checkpoint_format": "gptq"}}
    return (
        _copied(whole, tmp_path / "gptq", write(packed, quantized)),
        _copied(whole, tmp_path / "plain", write(plain, config)),
    )


def _in_int32(codes):
    """Packs eight 4-bit rows of (8 n, m) into one of (n, m)."""
    words = sum(codes[place::8].long() << (4 * place) for place in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def _states(base, tokens=9):
    ids = torch.arange(tokens)[None] + 20
    mask = torch.zeros(1, 1, tokens, tokens, dtype=base.compute_dtype)
    mask = mask.masked_fill(
        ~torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.finfo(mask.dtype).min
    )
    with torch.no_grad():
        return base.hidden_states(ids, mask, torch.arange(tokens)[None]).float()


def _overrides(workplace, folder, **base):
    return {
        "base": {"name": str(folder), **base},
        "method.layers": "all",
        "training.max_steps": 4,
        "data": {part: workplace / "data" / f"{part}.jsonl" for part in ("train", "valid")},
    }


def _check_learns(workplace, base, tmp_path, *, method, **options):
    """Returns the scores of an adapter trained on a base, which stays as it was."""
    before = base.state_hash()
    asked = {"quantization": base.identity.quantization}
    overrides = _overrides(workplace, base.identity.name, **asked)
    overrides |= {f"method.{name}": value for name, value in options.items()}
    config = load_config(domain="news", method=method, overrides=overrides)
    path = train(config, output=tmp_path / method, base=base)
    assert base.state_hash() == before
    rows = next((tmp_path / method).rglob("metrics.jsonl")).read_text().splitlines()
    assert all(json.loads(row)["grad_norm"] > 0 for row in rows)
    slates = list(read_slates(workplace / "data" / "valid.jsonl"))[:3]
    with Ranker(base) as ranker:
        scores = ranker.score(slates, domain=ranker.load_adapter(path))
    assert base.state_hash() == before
    return scores


def test_a_checkpoint_that_bitsandbytes_quantized_is_the_same_base(whole, stored, load):
    given = load(stored, quantization="stored", compute_dtype="float32")
    made = load(whole, quantization="nf4", double_quant=False, compute_dtype="float32")
    assert torch.equal(_states(given), _states(made))
    assert given.identity.quantization == "stored"
    assert given.identity.fingerprint != made.identity.fingerprint


@pytest.mark.parametrize("method", ["lora", "adalora", "adapter"])
def test_adapters_train_on_a_stored_quantization(method, workplace, stored, load, tmp_path):
    base = load(stored, quantization="stored")
    options = {"init_r": 3, "target_r": 2} if method == "adalora" else {}
    scores = _check_learns(workplace, base, tmp_path, method=method, **options)
    assert all(torch.tensor(row).isfinite().all() for row in scores)


def test_quantization_must_fit_how_a_checkpoint_is_stored(whole, stored, load):
    with pytest.raises(ConfigError, match=r"stored quantized \(bitsandbytes\). Use\s+quantization"):
        load(stored, quantization="nf4")
    with pytest.raises(ConfigError, match=r"weights of .* are stored unquantized"):
        load(whole, quantization="stored")


@pytest.mark.parametrize("about", [{"quant_method": "hqq"}, {"bits": 4}, "gptq", ["gptq"]])
def test_other_stored_quantizations_are_refused_by_name(about, whole, stored, load):
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    named = about.get("quant_method") if isinstance(about, dict) else None
    with pytest.raises(BaseModelError, match=f"stored quantized by {named!r}.*Supported: gptq"):
        load(stored, quantization="stored")


@pytest.mark.skipif(HAS_GPTQ, reason="gptqmodel and optimum are installed")
def test_gptq_without_its_package_says_what_to_install(whole, load, tmp_path):
    packed, _ = _gptq(whole, tmp_path)
    with pytest.raises(BaseModelError, match=r"gptqmodel|optimum"):
        load(packed, quantization="stored")
    with pytest.raises(ConfigError, match="needs gptqmodel and optimum"):
        load(packed, quantization="nf4")


@pytest.mark.skipif(not HAS_GPTQ, reason="gptqmodel and optimum are not installed")
def test_a_gptq_base_is_the_weights_that_it_means(whole, load, tmp_path):
    packed, plain = _gptq(whole, tmp_path)
    found = _states(load(packed, quantization="stored", compute_dtype="float32"))
    wanted = _states(load(plain, quantization="none", compute_dtype="float32"))
    assert (found - wanted).norm() < 0.01 * wanted.norm()  # gptqmodel computes in float16


@pytest.mark.skipif(not HAS_GPTQ, reason="gptqmodel and optimum are not installed")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"init": "eva"}),
        ("adalora", {"init_r": 3, "target_r": 2}),
        ("adapter", {"kind": "houlsby", "layernorm": True}),
        ("adapter", {"kind": "parallel"}),
    ],
)
def test_adapters_train_on_gptq(method, options, workplace, whole, load, tmp_path):
    """Publishing compares what was trained with what its files give in a `Ranker`."""
    base = load(_gptq(whole, tmp_path)[0], quantization="stored", compute_dtype="float32")
    scores = _check_learns(workplace, base, tmp_path, method=method, **options)
    assert all(torch.tensor(row).isfinite().all() for row in scores)


@pytest.mark.skipif(not HAS_GPTQ, reason="gptqmodel and optimum are not installed")
@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lora", {"init": "pissa"}, "init=pissa reads the base's weights"),
        ("lora", {"dora": True}, "method.dora reads the base's weights"),
        ("ia3", {}, "ia3 needs an unquantized float32 base"),
        ("top_layers", {}, "method top_layers needs an unquantized base"),
        ("peft:OFT", {}, "peft:OFT was never run on a GPTQ"),
    ],
)
def test_what_reads_weights_is_refused_on_gptq(
    method, options, said, workplace, whole, load, tmp_path
):
    base = load(_gptq(whole, tmp_path)[0], quantization="stored", compute_dtype="float32")
    with pytest.raises(ConfigError, match=re.escape(said)):
        _check_learns(workplace, base, tmp_path, method=method, **options)


def test_loftq_on_a_stored_quantization_is_refused(workplace, stored, load, tmp_path):
    base = load(stored, quantization="stored")
    with pytest.raises(ConfigError, match=r"weights before quantization, and .* has none"):
        _check_learns(workplace, base, tmp_path, method="lora", init="loftq")


@given(rows=st.integers(1, 40), width=st.integers(1, 200), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packed_rows_are_near_the_whole_ones_and_do_not_depend_on_each_other(
    kind, rows, width, seed
):
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    packed = PackedEmbedding(weight, kind)
    ids = torch.arange(rows).flip(0)[None]
    found = packed(ids)
    assert found.shape == (1, rows, width)
    assert torch.equal(found[0].flip(0), packed.weight)
    # Half of the widest gap between two codes, times the block's largest value.
    bound = 0.17 * weight.abs().amax(1, keepdim=True)
    assert ((packed.weight - weight).abs() <= bound).all()
    assert torch.equal(PackedEmbedding(weight[:1], kind).weight, packed.weight[:1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Gemma", "Llama"])
def test_a_packed_model_is_the_one_whose_rows_were_rounded(kind, tied, tokenizer):
    shape = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape, tie_word_embeddings=tied)
    make = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    model, rounded = make(config).eval(), make(config).eval()
    rounded.load_state_dict(model.state_dict())
    head = PackedEmbedding(model.lm_head.weight, "nf4").weight
    with torch.no_grad():
        rows = PackedEmbedding(rounded.get_input_embeddings().weight, "nf4").weight
        rounded.get_input_embeddings().weight.copy_(rows)
    pack_embeddings(model, "nf4")
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        found = model.base_model(ids).last_hidden_state
        assert torch.equal(found, rounded.base_model(ids).last_hidden_state)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert (model.get_output_embeddings() is model.get_input_embeddings()) == tied


def test_an_embedding_that_does_more_is_refused():
    class Odd(torch.nn.Embedding):
        pass

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = transformers.BertModel(config)
    model.set_input_embeddings(Odd(50, 32))
    with pytest.raises(BaseModelError, match="does not know a Odd"):
        pack_embeddings(model, "nf4")


@pytest.mark.parametrize("readout", ["score_head", "yes_no", "likelihood"])
def test_packed_embeddings_train_and_are_loaded_with_the_adapter(
    readout, workplace, whole, load, tmp_path
):
    overrides = _overrides(workplace, whole, quantization="nf4", quantize_embeddings=True)
    config = load_config(domain="news", overrides=overrides | {"readout.name": readout})
    path = train(config, output=tmp_path)  # which scores with the published files, and compares
    asked = base_arguments(load_adapter(path).manifest)
    base = load(asked.pop("name"), **asked)
    assert base.identity.quantize_embeddings
    slates = list(read_slates(workplace / "data" / "valid.jsonl"))
    with Ranker(base) as ranker:
        packed = ranker.score(slates, domain=ranker.load_adapter(path))
    with Ranker(load(whole, quantization="nf4")) as ranker:
        unpacked = ranker.score(slates, domain=ranker.load_adapter(path))
    assert packed != unpacked


def test_packed_embeddings_need_4_bits(whole, load):
    for quantization in ("none", "int8"):
        with pytest.raises(ConfigError, match="for quantization nf4 and fp4"):
            load(whole, quantization=quantization, quantize_embeddings=True)


def test_the_plan_of_memory_knows_stored_and_packed_bases(workplace, stored, whole):
    def planned(folder, **base):
        overrides = _overrides(workplace, folder, **base)
        return memory_plan(load_config(domain="news", overrides=overrides)).base

    made = planned(whole, quantization="nf4", double_quant=False)
    assert planned(stored, quantization="stored") == made
    assert planned(whole, quantization="nf4", quantize_embeddings=True) < made
    with pytest.raises(ConfigError, match="stored unquantized"):
        planned(whole, quantization="stored")


@pytest.mark.slow
def test_the_default_base_with_packed_embeddings_takes_three_tenths_of_its_bytes():
    base = load_base("smollm2-135m", quantization="nf4", quantize_embeddings=True, device="cpu")
    held = {t.data_ptr(): t.nbytes for t in _own(base.model)}
    plain = 2 * sum(
        t.numel() for t in load_base("smollm2-135m", quantization="none").model.parameters()
    )
    assert sum(held.values()) <= 0.30 * plain


def _own(model):
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (t for t in state.as_dict(packed=True).values() if hasattr(t, "nbytes"))

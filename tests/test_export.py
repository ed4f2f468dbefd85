"""Adapters for other tools: PEFT's files alone, and models with the adapter merged in."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_ranker import METHODS, PARTS, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftrank import store
from peftrank.base import base_from_model
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.export import MERGED, copy, merge
from peftrank.ranker import Ranker

LOW_RANK = [domain for domain, (method, _) in METHODS.items() if method != "adapter"]


@pytest.fixture
def slates(make_slate):
    return [make_slate(n_history=i % 4, n_candidates=3 + i, seed=i) for i in range(5)]


@pytest.mark.parametrize("domain", LOW_RANK)
def test_a_merged_model_gives_the_scores_of_base_and_adapter(
    tiny_decoder, tmp_path, slates, domain
):
    path, _, _ = publish(tiny_decoder, tmp_path / "store", domain)
    drift = merge(path, tmp_path / "out", base=tiny_decoder, slates=slates)
    assert drift.largest < 1e-4 < drift.spread
    assert (drift.slates, drift.top_changed) == (5, 0)
    assert drift.kendall_tau == 1.0
    written = json.loads((tmp_path / "out" / MERGED).read_text())
    assert written["drift"]["largest"] == drift.largest
    assert written["domain"] == domain


def test_whole_weights_take_the_place_of_the_base_s(tiny_decoder, tmp_path, slates, monkeypatch):
    monkeypatch.setitem(METHODS, "books", ("top_layers", {}))
    path, _, _ = publish(tiny_decoder, tmp_path / "store", "books")
    drift = merge(path, tmp_path / "out", base=tiny_decoder, slates=slates)
    assert drift.largest < 1e-4 < drift.spread
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in store.load_adapter(path).tensors.items():
        own = name.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")
        assert torch.equal(merged[own], tensor)


def test_rounding_to_bfloat16_drifts_and_says_so(tiny_decoder, tmp_path, slates):
    path, _, _ = publish(tiny_decoder, tmp_path / "store", "news")
    drift = merge(path, tmp_path / "out", base=tiny_decoder, slates=slates, dtype="bfloat16")
    assert 1e-4 < drift.largest < drift.spread
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_transformers_alone_gives_the_scores_of_a_yes_no_readout(
    tiny_decoder, tmp_path, make_slate
):
    from peftrank.prompts import PromptTemplate

    parts = {**PARTS, "question": "Next?\n", "answer": "\nYes or No?"}
    template = PromptTemplate(tiny_decoder.tokenizer, parts=parts, turn="after")
    path, _, _ = publish(
        tiny_decoder,
        tmp_path / "store",
        "news",
        readout={"name": "yes_no", "options": {}, "feature_names": []},
        prompt=template.describe(),
    )
    files = store.load_adapter(path)
    path = store.save_adapter(
        tmp_path / "store",
        "news",
        store.AdapterFiles(files.peft_config, files.tensors, {}, files.manifest),
        card="---\n---\n",
    )
    slate = make_slate(n_candidates=4)
    with Ranker(tiny_decoder) as ranker:
        expected = ranker.score(slate, domain=ranker.load_adapter(path))
    merge(path, tmp_path / "out", base=tiny_decoder, slates=[slate])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = {"yes": ("Yes", " Yes", "yes", " yes"), "no": ("No", " No", "no", " no")}
    ids = {
        name: sorted(
            {e[0] for w in ws if len(e := tokenizer.encode(w, add_special_tokens=False)) == 1}
            - {tokenizer.unk_token_id}
        )
        for name, ws in words.items()
    }
    tree = template.tree(slate)
    for span, wanted in zip(tree.candidates, expected, strict=True):
        prompt, segment = [], span.segment
        while segment >= 0:
            prompt = [*tree.segments[segment].tokens, *prompt]
            segment = tree.segments[segment].parent
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        score = logits[ids["yes"]].logsumexp(0) - logits[ids["no"]].logsumexp(0)
        assert float(score) == pytest.approx(wanted, abs=1e-4)


def test_a_quantized_base_is_refused(tiny_decoder, tmp_path, slates):
    from dataclasses import replace

    path, _, _ = publish(tiny_decoder, tmp_path / "store", "news")
    quantized = replace(tiny_decoder, identity=replace(tiny_decoder.identity, quantization="nf4"))
    with pytest.raises(ConfigError, match=r"nf4.*unquantized base"):
        merge(path, tmp_path / "out", base=quantized, slates=slates)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_refused_with_the_reason(tiny_decoder, tmp_path, slates):
    path, _, _ = publish(tiny_decoder, tmp_path / "store", "social")
    with pytest.raises(AdapterError, match="bottleneck adapter, which is not merged"):
        merge(path, tmp_path / "out", base=tiny_decoder, slates=slates)
    path, _, _ = publish(tiny_decoder, tmp_path / "store", "news")
    with pytest.raises(ConfigError, match="'int8'; expected one of float32"):
        merge(path, tmp_path / "out", base=tiny_decoder, slates=slates, dtype="int8")
    with pytest.raises(DataError, match="no slates"):
        merge(path, tmp_path / "out", base=tiny_decoder, slates=[])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(AdapterError, match="exists already"):
        merge(path, tmp_path / "out", base=tiny_decoder, slates=slates)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_adapter_of_another_base_is_not_merged(tiny_decoder, tmp_path, slates):
    path, _, _ = publish(tiny_decoder, tmp_path / "store", "news")
    with torch.no_grad():
        tiny_decoder.model.model.norm.weight.add_(1)
    other = base_from_model(tiny_decoder.model, tiny_decoder.tokenizer, name="other")
    with pytest.raises(AdapterError, match="trained on base"):
        merge(path, tmp_path / "out", base=other, slates=slates)


def test_a_full_disk_leaves_no_half_model(tiny_decoder, tmp_path, slates, monkeypatch):
    path, _, _ = publish(tiny_decoder, tmp_path / "store", "news")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftrank.export.shutil.copyfile", full)
    with pytest.raises(AdapterError, match="No space left on device"):
        merge(path, tmp_path / "out", base=tiny_decoder, slates=slates)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("domain", METHODS)
def test_exported_files_load_in_plain_peft(tiny_decoder, tmp_path, domain):
    path, _, _ = publish(tiny_decoder, tmp_path / "store", domain)
    copy(path, tmp_path / "out")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    peft.PeftModel.from_pretrained(tiny_decoder.model, tmp_path / "out")
    with pytest.raises(AdapterError, match="exists already"):
        copy(path, tmp_path / "out")


@pytest.mark.parametrize("domain", LOW_RANK)
def test_exported_files_are_laid_out_as_vllm_reads_lora(tiny_decoder, tmp_path, domain):
    # What its loader checks (vllm/lora/peft_helper.py, lora_model.py): it scales by one alpha / r,
    # and knows neither DoRA, biases, other trained modules nor ranks of their own.
    path, _, _ = publish(tiny_decoder, tmp_path / "store", domain)
    copy(path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list | str)
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    modules = {f"model.layers.{i}." for i in range(2)}
    for name, tensor in tensors.items():
        assert name.startswith("base_model.model.")
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert any(m in name for m in modules)
        assert tensor.shape[0 if ".lora_A." in name else 1] == config["r"]


def test_the_command_merges_and_reports_the_drift(place, given, cli):
    done = cli("adapters", "export", "news", "merged", "--merge", "--data", "data", "--limit", 2)
    assert done.code == 0, done.err
    assert "On 2 slates scores differ by at most" in done.out
    assert (place / "merged" / "config.json").is_file()
    again = cli("adapters", "export", "news", "merged")
    assert again.code == 2
    assert "exists already" in again.err
    assert cli("adapters", "export", "news", "plain").code == 0
    assert (place / "plain" / "adapter_config.json").is_file()

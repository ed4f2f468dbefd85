"""The adapters that ship in `adapters/`: their files, their accuracy, and other tools' view."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from peftrank import Ranker, plugins
from peftrank.config import load_config
from peftrank.evaluation import compare, evaluate, evaluate_scores
from peftrank.model import RankingModel
from peftrank.prompts import PromptTemplate, collate
from peftrank.samples import samples
from peftrank.store import active, verify
from peftrank.training.data import read_part

STORE = Path(__file__).parent.parent / "adapters"


def folder(domain):
    return STORE / domain / str(active(STORE, domain))


@pytest.mark.parametrize("domain", samples())
def test_a_shipped_adapter_is_whole_and_small(domain):
    path = folder(domain)
    verify(path)
    assert sum(file.stat().st_size for file in path.iterdir()) < 6_000_000
    manifest = json.loads((path / "peftrank.json").read_text())
    assert manifest["method"]["name"] == load_config(domain=domain).method.name
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.parametrize("domain", samples())
def test_plain_peft_gives_a_shipped_adapters_scores(domain, smollm2_nf4):
    """PEFT alone wraps the base; our readout on its states gives what the Ranker gives."""
    path = folder(domain)
    slates = read_part(load_config(domain=domain).data, domain, "test")[:4]
    with Ranker(smollm2_nf4) as ranker:
        name = ranker.load_adapter(path)
        # One slate a batch in both: bfloat16 products round with the shape of the batch.
        expected = [ranker.score(slate, domain=name) for slate in slates]
    manifest = json.loads((path / "peftrank.json").read_text())
    template = PromptTemplate(smollm2_nf4.tokenizer, **manifest["prompt"])
    readout = plugins.load("readouts", manifest["readout"]["name"]).build(
        smollm2_nf4.hidden_size,
        smollm2_nf4.tokenizer,
        smollm2_nf4.lm_head,
        **manifest["readout"]["options"],
    )
    readout.load_state_dict(load_file(path / "readout.safetensors"))
    pad = smollm2_nf4.pad_token_id
    batches = [collate([slate], template, pad_token_id=pad) for slate in slates]
    model = peft.PeftModel.from_pretrained(smollm2_nf4.model, path).eval()
    try:
        with torch.no_grad():
            scores = [RankingModel(smollm2_nf4, readout)(batch)[0] for batch in batches]
    finally:
        model.unload()
    for row, wanted in zip(scores, expected, strict=True):
        assert row.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("domain", samples())
def test_a_shipped_adapter_beats_popularity_on_held_out_lists(domain, smollm2_nf4):
    config = load_config(domain=domain)
    slates = read_part(config.data, domain, "test")[:150]
    train = read_part(config.data, domain, "train")
    with Ranker(smollm2_nf4, store=STORE) as ranker:
        ranker.load_adapter(domain)
        found = evaluate(ranker, slates, domain=domain, metrics=["ndcg@10"])
    scores = plugins.load("baselines", "popularity")(slates, train=train, seed=0)
    floor = evaluate_scores("popularity", slates, scores, ["ndcg@10"])
    _, low, _ = compare(found, floor, "ndcg@10")
    assert low > 0

"""The real 4-bit base: every method learns on it after an evaluation and survives its process."""

import json
import subprocess
import sys

import pytest

from peftrank import Ranker
from peftrank.config import load_config
from peftrank.formats.slates import read_slates
from peftrank.samples import sample_path
from peftrank.training import train

METHODS = {
    "lora": ("lora", {"r": 2}),
    "dora": ("lora", {"r": 2, "dora": True}),
    "adalora": ("adalora", {"init_r": 3, "target_r": 2}),
    "houlsby": ("adapter", {"kind": "houlsby", "size": 4}),
    "pfeiffer": ("adapter", {"kind": "pfeiffer", "size": 4}),
    "parallel": ("adapter", {"kind": "parallel", "size": 4}),
}
_FRESH = """
import json, sys
from pathlib import Path
from peftrank import Ranker
from peftrank.formats.slates import read_slates

ranker = Ranker.from_base("smollm2-135m", quantization="nf4", device="cpu")
slates = list(read_slates(Path(sys.argv[1])))[:2]
scores = {}
for path in sys.argv[2:]:
    scores[path] = ranker.score(slates, domain=ranker.load_adapter(path))
    ranker.unload_adapter("news")
print(json.dumps(scores))
"""


@pytest.mark.slow
def test_every_method_trains_after_evaluation_and_scores_the_same_in_a_new_process(
    smollm2_nf4, tmp_path
):
    before = smollm2_nf4.state_hash()
    slates = list(read_slates(sample_path("news", "test")))[:2]
    paths = {}
    for name, (method, options) in METHODS.items():
        # Two steps with an evaluation after each: the second learns after an evaluation.
        overrides = {
            "method": {"name": method, "layers": "top-2", **options},
            "training.max_steps": 4 if method == "adalora" else 2,
            "training.batch_size": 2,
            "training.eval_steps": 1,
            "training.eval_slates": 4,
        }
        config = load_config(domain="news", overrides=overrides)
        paths[name] = train(config, output=tmp_path / name, base=smollm2_nf4)
        log = next((tmp_path / name).rglob("metrics.jsonl")).read_text().splitlines()
        assert all(json.loads(row)["grad_norm"] > 0 for row in log)
    assert smollm2_nf4.state_hash() == before
    scores = {}
    with Ranker(smollm2_nf4) as ranker:
        for path in paths.values():
            scores[str(path)] = ranker.score(slates, domain=ranker.load_adapter(path))
            ranker.unload_adapter("news")
    assert len({tuple(found[0]) for found in scores.values()}) == len(METHODS)
    command = [sys.executable, "-c", _FRESH, str(sample_path("news", "test")), *scores]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fresh = json.loads(printed.splitlines()[-1])
    for path, expected in scores.items():
        for row, wanted in zip(fresh[path], expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-6)

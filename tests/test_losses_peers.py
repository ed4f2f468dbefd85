"""Losses equal those of allRank and sentence-transformers, which others wrote: values, gradients.

What theirs give was recorded by `record_peer_losses.py`, which says how theirs are in our units (a
mean over pairs is made a sum, an nDCG what is missing to 1). Where the packages are installed, it
is recorded once more and compared with the file.
"""

import importlib.util
import json

import pytest
import torch
from record_peer_losses import RECORDED, record

from peftrank import plugins

CASES = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]
NO_PEER = {"margin", "softmax_dpo"}
"""Neither package has them; `test_losses.py` compares them, and all others, with formulas."""


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['peer']}-{c['labels']}")
def test_a_loss_is_its_peers(case):
    scores = torch.tensor([case["scores"]], requires_grad=True)
    labels = torch.tensor([case["labels"]], dtype=torch.float32)
    mask = torch.ones(1, len(case["labels"]), dtype=torch.bool)
    value = plugins.load("losses", case["loss"])(scores, labels, mask, **case["options"])
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert float(value) == pytest.approx(case["value"], rel=1e-5, abs=1e-5)
    assert gradient[0].tolist() == pytest.approx(case["gradient"], rel=1e-5, abs=1e-5)
    assert max(map(abs, case["gradient"])) > 1e-2


def test_every_loss_that_a_peer_has_is_compared():
    assert {case["loss"] for case in CASES} == set(plugins.available("losses")) - NO_PEER


@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("allrank", "sentence_transformers")),
    reason="needs allrank and sentence-transformers",
)
def test_the_peers_still_give_what_was_recorded():
    found = record()["cases"]
    assert len(found) == len(CASES)
    for now, then in zip(found, CASES, strict=True):
        for key, value in then.items():
            expected = pytest.approx(value, abs=1e-6) if key in ("value", "gradient") else value
            assert now[key] == expected

"""A loss of your own: one function of scores, labels and mask, named `module:function`.

In a clone of PeftRank it would be one file, peftrank/losses/NAME.py, chosen as `loss.name=NAME`.
Keyword arguments after the * are its options in the configuration.

    python examples/add_loss.py
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from peftrank import load_config, train


def hardest(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    margin: float = 1.0,
) -> Tensor:
    """Returns, per slate, how far the best relevant candidate is from beating its worst rival.

    scores, labels, mask, weights: (S, N), S slates of up to N candidates; mask is False where a
    slate has fewer. A loss never sees the model or a text.
    """
    lowest = torch.finfo(scores.dtype).min
    relevant = mask & (labels > 0)
    best, which = scores.masked_fill(~relevant, lowest).max(dim=-1)
    rival = scores.masked_fill(~mask | relevant, lowest).amax(dim=-1)
    missing = (margin - best + rival).clamp_min(0)
    if weights is not None:  # a term has the weight of its relevant candidate
        missing = missing * weights.gather(-1, which[:, None])[:, 0]
    taught = relevant.any(dim=-1) & (mask & ~relevant).any(dim=-1)
    return torch.where(taught, missing, 0.0)


def main() -> None:
    settings = {
        "base": {"name": os.environ.get("BASE", "minilm-l6"), "quantization": "none"},
        "loss": {"name": "add_loss:hardest", "margin": 0.5},  # this file, as others import it
        "method.layers": "all",
        "training.max_steps": 6,
    }
    config = load_config(domain="news", method="lora", overrides=settings)
    print(train(config, output=Path(".demo/add-loss/adapters"), progress=True))


if __name__ == "__main__":
    main()

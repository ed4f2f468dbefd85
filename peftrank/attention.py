"""Batch -> attention mask: every token sees the segments on its own path to the root.

Markers of one slate see each other besides, in whichever order they lie in the row.
It knows neither prompts nor models. The mask is additive, because eager attention adds a bool
mask as 0 and 1 without an error (transformers 5.23).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.types import Batch


def attention_mask(batch: Batch, *, causal: bool, dtype: torch.dtype) -> Tensor:
    """Returns the additive mask (R, 1, T, T): 0 where row's token i may see token j, else min.

    With P tokens known from before it is (R, 1, T, P + T), and those stand first.

    Args:
        batch: Packed prompt trees.
        causal: True for decoders: inside a segment a token sees itself and earlier ones. False for
            encoders: inside a segment tokens see each other. Between segments both see ancestors
            only, so a path's states never depend on what hangs below it.
        dtype: The dtype the model computes in; the mask's smallest value is its smallest number.
    """
    segment = batch.segment_ids
    rows, tokens = segment.shape
    group = batch.ancestors.shape[-1]
    real = segment >= 0
    index = segment.clamp(min=0)
    key = segment if batch.past is None else torch.cat([batch.past.segment_ids, segment], dim=1)
    known = key.shape[1] - tokens
    seen = batch.ancestors.gather(1, index[:, :, None].expand(rows, tokens, group))
    seen = seen.gather(2, key.clamp(min=0)[:, None, :].expand(rows, tokens, known + tokens))
    seen = seen & real[:, :, None] & (key >= 0)[:, None, :]
    if causal:
        position = torch.arange(tokens, device=segment.device)
        later = position[None, :] > position[:, None]
        own = seen[:, :, known:]
        own &= ~(later & (segment[:, :, None] == segment[:, None, :]))
    # A padding token sees itself: a row of nothing but `min` would become NaN in some kernels.
    own = seen[:, :, known:]
    own |= torch.eye(tokens, dtype=torch.bool, device=segment.device) & ~real[:, :, None]
    low, zero = torch.tensor([torch.finfo(dtype).min, 0.0], dtype=dtype, device=segment.device)
    return torch.where(seen, zero, low)[:, None]

"""One prompt per candidate, the user's part computed once: keys and values are used again.

What inference engines call prefix caching, written with transformers' cache: one pass over the
prefixes of several slates, padded on the left, then one pass over all their candidates. Only for
inference: a cache that gradients flow through is not what these tools offer.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache

from benchmarks.peers.pointwise import Reader, yes_no
from benchmarks.peers.setting import Case, Setting, batches, padded
from peftrank.prompts import token_count
from peftrank.types import PromptTree


def scoring(setting: Setting, read: Reader | None = None, *, together: bool = True) -> Case:
    """Returns the scoring of all candidates; `run` returns scores, slate after slate.

    Args:
        setting: Bases are decoders.
        read: Another readout than the Yes and No rows.
        together: Several slates per pass; else one, which needs no mask for its prefix.
    """
    trees = setting.trees(mode="isolated")
    reader = read or yes_no(setting)
    room = setting.micro_tokens if together else 1
    groups = batches([token_count(tree) for tree in trees], room)

    @torch.inference_mode()
    def run() -> list[float]:
        setting.adapted.eval()
        found: list[list[float]] = [[] for _ in trees]
        for group in groups:
            scored = _scores(setting, [trees[i] for i in group], reader)
            for index, scores in zip(group, scored, strict=True):
                found[index] = scores
        return [score for scores in found for score in scores]

    return Case(run, sum(map(token_count, trees)))


def _scores(setting: Setting, trees: list[PromptTree], read: Reader) -> list[list[float]]:
    model, device = setting.base.model.base_model, setting.device
    prefixes, leaves = [], []
    for tree in trees:
        first = tree.candidates[0].segment
        prefixes.append([t for segment in tree.segments[:first] for t in segment.tokens])
        leaves.append([tree.segments[span.segment].tokens for span in tree.candidates])
    counts = torch.tensor([len(own) for own in leaves], device=device)
    ids, lengths = padded(prefixes, setting, left=True)
    width = ids.shape[1]
    real = torch.arange(width, device=device) >= width - lengths[:, None]  # (S, P)
    cache = DynamicCache(config=setting.base.model.config)
    # A single prefix has no padding, and needs no mask.
    mask = None if len(trees) == 1 else real.long()
    positions = (torch.arange(width, device=device) - (width - lengths)[:, None]).clamp(min=0)
    with setting.half():
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        owner = torch.repeat_interleave(torch.arange(len(trees), device=device), counts)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[owner], layer.values[owner]
        ids, own = padded([row for rows in leaves for row in rows], setting)
        steps = torch.arange(ids.shape[1], device=device)
        mask = torch.cat([real[owner], steps < own[:, None]], dim=1).long()
        states = model(
            input_ids=ids,
            attention_mask=None if len(trees) == 1 else mask,
            position_ids=lengths[owner, None] + steps,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    last = states[torch.arange(len(ids), device=device), own - 1]
    scores = read(last).tolist()
    ends = counts.cumsum(0).tolist()
    return [scores[end - len(own) : end] for end, own in zip(ends, leaves, strict=True)]

"""What an untrained encoder knows: cosine similarity of a candidate to the history.

Texts are encoded one by one and mean-pooled, as sentence-embedding models are meant to be used
(Reimers & Gurevych, Sentence-BERT, arXiv 1908.10084).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftrank.base import Base
from peftrank.types import Item, Slate

_BATCH = 64


def cosine_scores(
    base: Base, slates: Sequence[Slate], fields: Sequence[str]
) -> list[tuple[float, ...]]:
    """Returns cosine(candidate, mean of the history's unit vectors); 0 without a history."""
    items = {item.item_id: item for s in slates for item in (*s.history, *s.candidates)}
    places = {item_id: i for i, item_id in enumerate(items)}
    vectors = _embed(base, [_text(item, fields) for item in items.values()])  # (items, H)
    scores = []
    for slate in slates:
        history = vectors[[places[item.item_id] for item in slate.history]]
        candidates = vectors[[places[item.item_id] for item in slate.candidates]]
        if len(slate.history) == 0:
            scores.append((0.0,) * len(slate.candidates))
            continue
        taste = torch.nn.functional.normalize(history.mean(dim=0), dim=-1)
        scores.append(tuple((candidates @ taste).tolist()))
    return scores


def _text(item: Item, fields: Sequence[str]) -> str:
    return " ".join(text for name in fields if (text := item.fields.get(name)))


def _embed(base: Base, texts: Sequence[str]) -> Tensor:
    rows = []
    for start in range(0, len(texts), _BATCH):
        tokens = base.tokenizer(
            list(texts[start : start + _BATCH]),
            padding=True,
            truncation=True,
            max_length=min(128, base.max_depth),
            return_tensors="pt",
        ).to(base.device)
        real = tokens["attention_mask"].bool()  # (texts, T)
        with torch.inference_mode():
            states = base.hidden_states(
                tokens["input_ids"], _additive(real, base.compute_dtype), _positions(real)
            ).float()
        mean = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        rows.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    return torch.cat(rows)


def _additive(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) bool -> (B, 1, T, T): every token sees the real ones."""
    mask = torch.zeros(real.shape, dtype=dtype, device=real.device)
    mask = mask.masked_fill(~real, torch.finfo(dtype).min)
    return mask[:, None, None, :].expand(-1, 1, real.shape[1], -1).contiguous()


def _positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(dim=1) - 1).clamp_min(0)

"""Token embeddings in 4 bits: only the rows that a pass looks up are dequantized.

bitsandbytes has such a layer, but it cannot be saved, and `state_dict` raises on a model that holds
one. Its functions quantize here, in the same blocks and codes; row by row, so that a row's block
never reaches into the next.
"""

from __future__ import annotations

from typing import cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftrank.errors import BaseModelError

_BLOCK = 64


class PackedEmbedding(nn.Module):
    """An embedding whose rows are nf4 or fp4 (QLoRA, arXiv 2305.14314), a scale for 64 values."""

    packed: Tensor
    scales: Tensor
    code: Tensor

    def __init__(self, weight: Tensor, kind: str, factor: float = 1.0):
        """Quantizes `weight` (V, H); `factor` multiplies what is looked up, as Gemma's does."""
        super().__init__()
        self.kind, self.factor, self.dtype = kind, factor, weight.dtype
        self.num_embeddings, self.embedding_dim = weight.shape
        padded = nn.functional.pad(weight.detach(), (0, -self.embedding_dim % _BLOCK))
        packed, state = quantize_4bit(padded.contiguous(), blocksize=_BLOCK, quant_type=kind)
        self.register_buffer("packed", packed.view(self.num_embeddings, -1))
        self.register_buffer("scales", state.absmax.view(self.num_embeddings, -1))
        self.register_buffer("code", state.code)

    def rows(self, ids: Tensor) -> Tensor:
        """Returns the dequantized rows (..., H) of `ids` (...), without the factor."""
        flat = ids.reshape(-1)
        packed, scales = self.packed[flat], self.scales[flat]
        state = QuantState(
            absmax=scales.reshape(-1),
            shape=torch.Size((flat.numel(), 2 * packed.shape[1])),
            code=self.code,
            blocksize=_BLOCK,
            quant_type=self.kind,
            dtype=self.dtype,
        )
        found = dequantize_4bit(packed.reshape(-1, 1), state)[:, : self.embedding_dim]
        return cast(Tensor, found.reshape(*ids.shape, self.embedding_dim))

    @property
    def weight(self) -> Tensor:
        """All rows (V, H), dequantized anew each time."""
        return self.rows(torch.arange(self.num_embeddings, device=self.packed.device))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the embeddings (..., H) of `input_ids` (...)."""
        found = self.rows(input_ids)
        return found if self.factor == 1.0 else found * self.factor


def pack_embeddings(model: PreTrainedModel, kind: str) -> None:
    """Replaces a model's token embedding, and its vocabulary head if it has one, by packed ones.

    Args:
        model: Changed in place.
        kind: nf4 or fp4.

    Raises:
        BaseModelError: the embedding is of a class that does more than look up and scale.
    """
    own = model.get_input_embeddings()
    factor = getattr(own, "embed_scale", None)
    if type(own) is not nn.Embedding and factor is None:
        raise BaseModelError(
            f"base.quantize_embeddings does not know a {type(own).__name__}, which "
            f"{type(model).__name__} has. Leave it out."
        )
    scale = 1.0 if factor is None else float(factor.to(own.weight.dtype))
    embedding = PackedEmbedding(own.weight, kind, scale)
    head = model.get_output_embeddings()
    model.set_input_embeddings(embedding)
    if head is not None:  # readouts read its weight; nothing computes logits
        tied = head.weight is own.weight
        model.set_output_embeddings(embedding if tied else PackedEmbedding(head.weight, kind))

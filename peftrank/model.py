"""A base and a readout as one module: Batch -> scores.

It knows neither adapters (they live inside or around the base) nor losses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrank._architectures import KeysValues
from peftrank.attention import attention_mask
from peftrank.base import Base
from peftrank.types import Batch, Once


@dataclass(frozen=True)
class Entering:
    """The hidden states of a batch on their way into a block of the base."""

    layer: int
    """Index of the block."""
    states: Tensor
    """(R, T, H)."""


class RankingModel(nn.Module):
    """Scores every candidate of every slate of a batch in one forward pass."""

    def __init__(self, base: Base, readout: nn.Module):
        super().__init__()
        self.base = base
        self.backbone = base.model  # registered, so that .to(), DDP and FSDP see it
        self.readout = readout

    def forward(self, batch: Batch, entering: Entering | None = None) -> Tensor:
        """Returns scores (S, N) in float32, 0 at padding; see `hidden_states`."""
        return read(self.readout, hidden_states(self.base, batch, entering), batch)

    def by_task(self, batch: Batch, entering: Entering | None = None) -> dict[str, Tensor]:
        """Returns what each head of a readout with several gives (S, N), in float32."""
        states = hidden_states(self.base, batch, entering)
        with torch.autocast(states.device.type, enabled=False):
            heads: dict[str, Tensor] = cast(Any, self.readout).by_task(states, batch)
        return heads


def hidden_states(
    base: Base, batch: Batch, entering: Entering | None = None, reading: KeysValues | None = None
) -> Tensor:
    """Returns the base's last hidden states (R, T, H) of a batch, with the adapters in place.

    Args:
        base: The base.
        batch: Packed trees.
        entering: Computed before; the blocks below are then left out.
        reading: The keys and values of `batch.past`, which a batch that has one needs.
    """
    mask = attention_mask(batch, causal=base.is_decoder, dtype=base.compute_dtype)
    with _precision(base):
        if batch.past is not None and reading is not None:
            key_ids = torch.cat([batch.past.position_ids, batch.position_ids], dim=1)
            return base.states_reading(reading, key_ids, batch.input_ids, mask, batch.position_ids)
        if batch.once is not None and entering is None:
            return _computed_once(base, batch, batch.once, mask)
        if entering is None:
            return base.hidden_states(batch.input_ids, mask, batch.position_ids)
        return base.states_above(entering.layer, entering.states, mask, batch.position_ids)


def _computed_once(base: Base, batch: Batch, once: Once, mask: Tensor) -> Tensor:
    """Returns the states (R, T, H) of rows, of which each token is computed in one of them."""
    row, place = once.row[:, None], once.place.clamp(min=0)
    states = base.states_reading(
        _Gathered(once.found[once.row]),
        batch.position_ids[once.row],
        batch.input_ids[row, place],
        mask[row, 0, place][:, None],
        batch.position_ids[row, place],
    )
    return functional.embedding(once.found, states.flatten(0, 1))


class _Gathered:
    """The keys and values that rows see, wherever among the tokens of a pass they are computed."""

    def __init__(self, found: Tensor):
        """`found`: (C, P) long; indices into the flattened tokens of the pass."""
        self._found = found

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Returns a block's keys and values (C, K, P, D)."""
        return self._of_rows(keys), self._of_rows(values)

    def _of_rows(self, computed: Tensor) -> Tensor:
        rows, heads, tokens, width = computed.shape
        flat = computed.transpose(1, 2).reshape(rows * tokens, heads * width)
        found = functional.embedding(self._found, flat)
        return found.view(*self._found.shape, heads, width).transpose(1, 2)


def states_below(base: Base, batch: Batch, layer: int) -> Tensor:
    """Returns the hidden states (R, T, H) of a batch that enter block `layer`."""
    mask = attention_mask(batch, causal=base.is_decoder, dtype=base.compute_dtype)
    with _precision(base):
        return base.states_below(layer, batch.input_ids, mask, batch.position_ids)


def _precision(base: Base) -> AbstractContextManager[object]:
    # An adapter's weights are float32; in a bfloat16 base its products are computed as such.
    dtype = base.compute_dtype
    return torch.autocast(base.device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def read(readout: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    """Returns a readout's scores (S, N), float32 whatever the base computes in."""
    with torch.autocast(states.device.type, enabled=False):
        scores: Tensor = readout(states, batch)
    return scores


def move(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with every tensor on a device."""
    tensors: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved: dict[str, Any] = {
        k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)
    }
    if batch.past is not None:
        past = batch.past
        moved["past"] = replace(
            past,
            segment_ids=past.segment_ids.to(device),
            position_ids=past.position_ids.to(device),
        )
    if batch.once is not None:
        once = batch.once
        moved["once"] = Once(*(t.to(device) for t in (once.row, once.place, once.found)))
    return replace(batch, **moved)

"""Score = log-probability of the candidate's own text after the user's history.

Works without training, so an untrained base can rank (zero-shot). Needs a vocabulary head. Only
the candidates' tokens pass through that head, in chunks, never the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.types import Batch

_CHUNK = 512  # tokens whose vocabulary logits exist at once


class Likelihood(nn.Module):
    """Mean (or summed) log p(token | path) over a candidate's text."""

    turn: ClassVar[str] = "before"

    def __init__(self, lm_head: Tensor, normalize: Literal["mean", "sum"]):
        """`lm_head` (V, H) stays the base's own tensor: not a parameter, never saved."""
        super().__init__()
        self._lm_head = (lm_head,)
        self.normalize = normalize

    @classmethod
    def build(
        cls,
        hidden_size: int,
        tokenizer: Any,  # noqa: ANN401
        lm_head: Tensor | None,
        *,
        feature_names: Sequence[str] = (),
        normalize: Literal["mean", "sum"] = "mean",
    ) -> Likelihood:
        """Returns the readout for a base.

        Args:
            hidden_size: Unused; the head fixes it.
            tokenizer: Unused.
            lm_head: (V, H).
            feature_names: Must be empty.
            normalize: `mean` does not punish long titles; `sum` is the plain log-likelihood.

        Raises:
            ConfigError: the base has no vocabulary head, or features are given.
        """
        if lm_head is None:
            raise ConfigError("readout likelihood needs a decoder base with a vocabulary head")
        if feature_names:
            raise ConfigError("readout likelihood cannot use candidate features; use score_head")
        if normalize not in ("mean", "sum"):
            raise ConfigError(f"readout.normalize is {normalize!r}; expected mean or sum")
        return cls(lm_head, normalize)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) from states (R, T, H)."""
        candidate, row, position, predictor = _text_tokens(batch)
        tokens = batch.input_ids[row, position]
        log_p = torch.cat(
            [
                self._log_p(states[row[i], predictor[i]], tokens[i])
                for i in torch.split(torch.arange(len(tokens), device=tokens.device), _CHUNK)
            ]
            or [states.new_zeros(0, dtype=torch.float32)]
        )
        flat = torch.zeros(batch.mask.numel(), device=log_p.device).index_add(0, candidate, log_p)
        if self.normalize == "mean":
            counts = torch.bincount(candidate, minlength=batch.mask.numel()).clamp_min(1)
            flat = flat / counts
        return flat.view(batch.mask.shape)

    def _log_p(self, states: Tensor, tokens: Tensor) -> Tensor:
        logits = (states @ self._lm_head[0].to(states.dtype).T).float()
        return torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)


def _text_tokens(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns candidate (flat index), row, position and predecessor of each text token (K,)."""
    lengths = (batch.stop - batch.start).masked_fill(~batch.mask, 0)
    offsets = torch.arange(int(lengths.max()), device=lengths.device)
    position = batch.start[..., None] + offsets  # (S, N, L)
    predictor = torch.where(offsets == 0, batch.before[..., None], position - 1)
    real = (offsets < lengths[..., None]) & (predictor >= 0)
    candidate = torch.arange(batch.mask.numel(), device=lengths.device).view(batch.mask.shape)
    return (
        candidate[..., None].expand_as(real)[real],
        batch.row[..., None].expand_as(real)[real],
        position[real],
        predictor[real],
    )

"""Score = a small trained head on the mean or maximum over each candidate's own tokens.

Where the last token says too little: an encoder's states of all tokens are worth reading, and of a
decoder's text the decisive word may stand in the middle. Only the item's own text is read, not the
template's text around it, and no marker that stands behind it. Candidate features join as in
`score_head`, whose head this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.readouts.score_head import ScoreHead
from peftrank.types import Batch


class Pooled(nn.Module):
    """A `ScoreHead` on the pooled states of a candidate's text."""

    turn: ClassVar[str] = "none"

    def __init__(self, head: ScoreHead, pool: Literal["mean", "max"]):
        super().__init__()
        self.head = head
        self.pool = pool

    @classmethod
    def build(
        cls,
        hidden_size: int,
        tokenizer: Any,  # noqa: ANN401
        lm_head: Tensor | None,
        *,
        feature_names: Sequence[str] = (),
        pool: Literal["mean", "max"] = "mean",
        width: int = 64,
        match: bool = False,
        feature_width: int = 64,
        text_width: int = 16,
    ) -> Pooled:
        """Returns the readout for a base.

        Args:
            hidden_size: H of the base.
            tokenizer: Unused.
            lm_head: Unused; encoders have none.
            feature_names: Features in the order of `Batch.features`.
            pool: `mean` or, dimension by dimension, `max` over the candidate's tokens.
            width: Hidden units on the text; 0 = a linear map.
            match: As in `score_head`.
            feature_width: As in `score_head`.
            text_width: As in `score_head`.

        Raises:
            ConfigError: an unknown pool, or a width is negative.
        """
        if pool not in ("mean", "max"):
            raise ConfigError(f"readout.pool is {pool!r}; expected mean or max")
        head = ScoreHead.build(
            hidden_size,
            tokenizer,
            lm_head,
            feature_names=feature_names,
            width=width,
            match=match,
            feature_width=feature_width,
            text_width=text_width,
        )
        return cls(head, pool)

    def fit_features(self, mean: Tensor, std: Tensor) -> None:
        """Sets the standardisation: mean and deviation (F,) of the known values in training."""
        self.head.fit_features(mean, std)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) from states (R, T, H)."""
        return self.head.score(self._pooled(states, batch), states, batch)

    def _pooled(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns the pooled states (S, N, H), 0 at padding."""
        lengths = (batch.stop - batch.start).masked_fill(~batch.mask, 0)
        offsets = torch.arange(int(lengths.max()), device=lengths.device)
        inside = (offsets < lengths[..., None])[..., None]  # (S, N, L, 1)
        position = (batch.start[..., None] + offsets).clamp_max(states.shape[1] - 1)
        texts = states[batch.row[..., None], position].float()  # (S, N, L, H)
        if self.pool == "mean":
            total = texts.masked_fill(~inside, 0.0).sum(dim=-2)
            return total / lengths.clamp_min(1)[..., None]
        lowest = torch.finfo(texts.dtype).min
        best = texts.masked_fill(~inside, lowest).amax(dim=-2)
        return best.masked_fill(~batch.mask[..., None], 0.0)

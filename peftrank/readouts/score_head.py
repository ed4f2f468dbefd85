"""Score = a small trained head on the last hidden state of each candidate.

With candidate features, the head also reads them: standardised with the training part's
statistics, a missing value replaced by a learned one. A feature network and the text add up, and
the feature network sees a few projected text dimensions, so that text can change what a number
means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.types import Batch


class ScoreHead(nn.Module):
    """LayerNorm and a linear map or one hidden layer, plus an optional feature network."""

    turn: ClassVar[str] = "none"
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_features: int,
        width: int,
        match: bool,
        feature_width: int,
        text_width: int,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.match = match
        self.text = _network(hidden_size * (3 if match else 1), width)
        self.n_features = n_features
        if n_features:
            self.register_buffer("feature_mean", torch.zeros(n_features))
            self.register_buffer("feature_std", torch.ones(n_features))
            self.missing = nn.Parameter(torch.zeros(n_features))
            self.project = nn.Linear(hidden_size, text_width)
            self.features = nn.Sequential(
                nn.Linear(n_features + text_width, feature_width),
                nn.GELU(),
                nn.Linear(feature_width, feature_width),
                nn.GELU(),
                nn.Linear(feature_width, 1),
            )

    @classmethod
    def build(
        cls,
        hidden_size: int,
        tokenizer: Any,  # noqa: ANN401
        lm_head: Tensor | None,
        *,
        feature_names: Sequence[str] = (),
        width: int = 0,
        match: bool = False,
        feature_width: int = 64,
        text_width: int = 16,
    ) -> ScoreHead:
        """Returns the readout for a base.

        Args:
            hidden_size: H of the base.
            tokenizer: Unused.
            lm_head: Unused; encoders have none.
            feature_names: Features in the order of `Batch.features`.
            width: Hidden units on the text; 0 = a linear map.
            match: Read, beside the candidate's state, the state at the end of the trunk (what the
                model made of the user) and their product. Helps encoders, whose states were
                trained to be compared.
            feature_width: Hidden units of the feature network.
            text_width: Text dimensions the feature network sees.

        Raises:
            ConfigError: a width is negative.
        """
        for key, value in (("width", width), ("feature_width", feature_width - 1)):
            if value < 0:
                raise ConfigError(f"readout.{key} is too small")
        return cls(hidden_size, len(feature_names), width, match, feature_width, text_width)

    def fit_features(self, mean: Tensor, std: Tensor) -> None:
        """Sets the standardisation: mean and deviation (F,) of the known values in training."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) from states (R, T, H)."""
        return self.score(states[batch.row, batch.end], states, batch)

    def score(self, candidates: Tensor, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) of candidates that were read in another way than by their end.

        Args:
            candidates: (S, N, H), what stands for each candidate.
            states: (R, T, H), where `match` finds the trunk.
            batch: The batch; its features are read.
        """
        candidates = self.norm(candidates.float())  # (S, N, H)
        text = candidates
        if self.match:
            # Without a trunk, zeros: at -1 stands a token of another slate.
            known = (batch.trunk >= 0)[:, None, None]
            found = states[batch.row[:, :1], batch.trunk[:, None].clamp_min(0)].float()
            trunk = self.norm(found.masked_fill(~known, 0.0))  # (S, 1, H)
            text = torch.cat([candidates, trunk.expand_as(candidates), candidates * trunk], dim=-1)
        scores = self.text(text).squeeze(-1)
        if self.n_features:
            scores = scores + self._feature_scores(candidates, batch)
        masked: Tensor = scores.masked_fill(~batch.mask, 0.0)
        return masked

    def _feature_scores(self, states: Tensor, batch: Batch) -> Tensor:
        if batch.features is None:
            raise ConfigError(
                f"this readout was trained with {self.n_features} candidate features, "
                "but the slates carry none"
            )
        numbers = (batch.features - self.feature_mean) / self.feature_std
        numbers = torch.where(numbers.isnan(), self.missing, numbers)
        scores: Tensor = self.features(torch.cat([numbers, self.project(states)], dim=-1))
        return scores.squeeze(-1)


def _network(inputs: int, width: int) -> nn.Module:
    if width == 0:
        return nn.Linear(inputs, 1)
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, 1))

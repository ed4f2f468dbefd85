"""Several score heads on the same states: one ranks, the others predict tasks (click, rating, ...).

The head `rank` learns from the slates' labels, each other from the slates' values of its task. What
each is trained with is configuration of the loss; this file only reads states. With uncertainty
weighting (Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018,
arXiv 1705.07115) each head has a learned log-variance, kept here because it is trained and saved
with the heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.readouts.score_head import ScoreHead
from peftrank.types import Batch

RANK = "rank"


class MultiTask(nn.Module):
    """A `ScoreHead` for each task; the score is one of them, or a weighted sum."""

    turn: ClassVar[str] = "none"

    def __init__(self, heads: Mapping[str, ScoreHead], mix: Mapping[str, float], uncertainty: bool):
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.mix = dict(mix)
        self.log_variance = nn.Parameter(torch.zeros(len(heads))) if uncertainty else None

    @classmethod
    def build(
        cls,
        hidden_size: int,
        tokenizer: Any,  # noqa: ANN401
        lm_head: Tensor | None,
        *,
        feature_names: Sequence[str] = (),
        tasks: Sequence[str] = (),
        score: str | Mapping[str, float] = RANK,
        uncertainty: bool = False,
        width: int = 0,
        match: bool = False,
        feature_width: int = 64,
        text_width: int = 16,
    ) -> MultiTask:
        """Returns the readout for a base.

        Args:
            hidden_size: H of the base.
            tokenizer: Unused.
            lm_head: Unused; encoders have none.
            feature_names: Features in the order of `Batch.features`; every head reads them.
            tasks: Names in `Slate.tasks`; each has a head beside `rank`.
            score: The head that ranks, or heads with weights: `{rank: 1.0, click: 0.5}` adds up
                what the heads give (a click's is a logit, a rating's in units of the rating).
            uncertainty: Weigh the losses of the heads by learned variances.
            width: As in `score_head`, as are the others.
            match: As in `score_head`.
            feature_width: As in `score_head`.
            text_width: As in `score_head`.

        Raises:
            ConfigError: no task, a name twice or impossible, an unknown one in `score`, or a
                width is negative.
        """
        names = (RANK, *tasks)
        for name in tasks:
            if names.count(name) > 1 or not name.isidentifier():
                raise ConfigError(
                    f"readout.tasks names {name!r}; expected different names of letters, digits "
                    f"and _, without {RANK!r}, the head that is always there"
                )
        if not tasks:
            raise ConfigError("readout.tasks is empty; name the tasks, or use readout score_head")
        mix = {score: 1.0} if isinstance(score, str) else dict(score)
        unknown = sorted(set(mix) - set(names))
        if unknown or not any(mix.values()):
            raise ConfigError(
                f"readout.score is {score!r}; expected one of {', '.join(names)}, or some of them "
                "with weights that are not all 0"
            )
        heads = {
            name: ScoreHead.build(
                hidden_size,
                tokenizer,
                lm_head,
                feature_names=feature_names,
                width=width,
                match=match,
                feature_width=feature_width,
                text_width=text_width,
            )
            for name in names
        }
        return cls(heads, mix, uncertainty)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks beside ranking, in the order of `Batch.tasks`."""
        return tuple(name for name in self.heads if name != RANK)

    def fit_features(self, mean: Tensor, std: Tensor) -> None:
        """Sets the standardisation: mean and deviation (F,) of the known values in training."""
        for head in self.heads.values():
            head.fit_features(mean, std)  # type: ignore[operator]  # a ModuleDict of ScoreHeads

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) from states (R, T, H)."""
        scores = torch.zeros(batch.mask.shape, device=states.device)
        for name, weight in self.mix.items():
            scores = scores + weight * self.heads[name](states, batch)
        return scores

    def by_task(self, states: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns what each head gives (S, N), `rank` first."""
        return {name: head(states, batch) for name, head in self.heads.items()}

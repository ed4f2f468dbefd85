"""Score = how much more likely the model is to answer Yes than No after the candidate.

Works without training, so an untrained base can rank (zero-shot). Needs a vocabulary head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.types import Batch


class YesNo(nn.Module):
    """log sum exp of the Yes tokens' logits minus that of the No tokens'."""

    turn: ClassVar[str] = "after"
    rows: Tensor

    def __init__(self, rows: Tensor, yes: int):
        """`rows` (Y + N, H): the vocabulary head's rows of the `yes` Yes tokens, then the No."""
        super().__init__()
        self.register_buffer("rows", rows.detach().clone(), persistent=False)
        self.yes = yes

    @classmethod
    def build(
        cls,
        hidden_size: int,
        tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no importable light type
        lm_head: Tensor | None,
        *,
        feature_names: Sequence[str] = (),
        yes_words: Sequence[str] = ("Yes", " Yes", "yes", " yes"),
        no_words: Sequence[str] = ("No", " No", "no", " no"),
    ) -> YesNo:
        """Returns the readout for a base. Words that are not a single token are left out.

        Raises:
            ConfigError: the base has no vocabulary head, no word is one token, or features are
                given, which this readout cannot use.
        """
        if lm_head is None:
            raise ConfigError("readout yes_no needs a decoder base with a vocabulary head")
        if feature_names:
            raise ConfigError("readout yes_no cannot use candidate features; use score_head")
        yes, no = _single_tokens(tokenizer, yes_words), _single_tokens(tokenizer, no_words)
        if not yes or not no:
            raise ConfigError(
                f"readout yes_no: none of {list(yes_words)} or of {list(no_words)} is a single "
                "token of this base; set readout.yes_words and readout.no_words"
            )
        return cls(lm_head[torch.tensor(yes + no, device=lm_head.device)], len(yes))

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) from states (R, T, H)."""
        logits = states[batch.row, batch.end].float() @ self.rows.float().T  # (S, N, Y + N)
        scores = torch.logsumexp(logits[..., : self.yes], dim=-1) - torch.logsumexp(
            logits[..., self.yes :], dim=-1
        )
        return scores.masked_fill(~batch.mask, 0.0)


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:  # noqa: ANN401
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})

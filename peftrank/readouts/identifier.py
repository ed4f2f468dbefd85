"""Score = how likely the model is to name the candidate by its letter, beside the list's first one.

The list is read jointly, and one answer scores it: the first token that would be generated (FIRST,
arXiv 2411.06353). A list longer than a window is read in several, each behind the slate's first
candidate, which is the A of all of them. By Luce's choice axiom (1959) the odds between two options
do not depend on the others, so a candidate's log odds against the shared one may be compared across
windows; they are the score. It works without training, so an untrained base can rank (zero-shot).
Needs a vocabulary head, of which only the letters' rows are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.types import Batch


class Identifier(nn.Module):
    """log p(the candidate's letter) - log p(A), of the first token of the answer."""

    turn: ClassVar[str] = "list"
    rows: Tensor

    def __init__(self, rows: Tensor):
        """`rows` (26, V, H): the vocabulary head's rows of the V ways to write each letter."""
        super().__init__()
        self.register_buffer("rows", rows.detach().clone(), persistent=False)

    @classmethod
    def build(
        cls,
        hidden_size: int,
        tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no importable light type
        lm_head: Tensor | None,
        *,
        feature_names: Sequence[str] = (),
        forms: Sequence[str] = ("{}", " {}"),
    ) -> Identifier:
        """Returns the readout for a base.

        Args:
            hidden_size: Unused; the head fixes it.
            tokenizer: The base's.
            lm_head: (vocabulary, H).
            feature_names: Must be empty.
            forms: How a letter may be written, as a format of it. A form in which some letter is
                not a single token is left out; probabilities of the others are added up.

        Raises:
            ConfigError: the base has no vocabulary head, no form gives single tokens, or features
                are given, which this readout cannot use.
        """
        if lm_head is None:
            raise ConfigError("readout identifier needs a decoder base with a vocabulary head")
        if feature_names:
            raise ConfigError("readout identifier cannot use candidate features; use score_head")
        tokens = [ids for form in forms if (ids := _single_tokens(tokenizer, form)) is not None]
        if not tokens:
            raise ConfigError(
                f"readout identifier: in none of the forms {list(forms)} are A to Z single tokens "
                "of this base; set readout.forms"
            )
        places = torch.tensor(tokens, device=lm_head.device).T  # (26, V)
        return cls(lm_head[places])

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Returns scores (S, N) from states (R, T, H); 0 for a slate's first candidate."""
        if batch.letters is None:
            raise ConfigError("readout identifier was given prompts without letters")
        answers = states[batch.row, batch.end].float()  # (S, N, H)
        logits = torch.einsum("snh,lvh->snlv", answers, self.rows.float()).logsumexp(dim=-1)
        own = logits.gather(-1, batch.letters[..., None]).squeeze(-1)
        return (own - logits[..., 0]).masked_fill(~batch.mask, 0.0)


def _single_tokens(tokenizer: Any, form: str) -> list[int] | None:  # noqa: ANN401
    """Returns the token of each letter in a form, None unless each is one of its own."""
    encoded = [tokenizer.encode(form.format(a), add_special_tokens=False) for a in ascii_uppercase]
    found = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
    return found if len(set(found)) == len(ascii_uppercase) else None

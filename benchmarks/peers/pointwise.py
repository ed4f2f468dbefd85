"""One prompt per candidate, read as Yes or No (TALLRec, arXiv 2305.00447), with plain transformers.

A prompt holds the very tokens that a candidate sees in PeftRank's isolated mode, so it has no
sentence behind the candidate that PeftRank would not have to read. At its best: batches of prompts
of like length, no mask, and only the Yes and No rows of the vocabulary head at the last token,
where TALLRec's own code computes all logits of all tokens and pads on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers.setting import Case, Setting, batches, padded, states, step
from peftrank.prompts import separate_token_count
from peftrank.prompts.tree import path_tokens

Reader = Callable[[Tensor], Tensor]
"""States (B, H) of the last tokens -> scores (B,)."""


@dataclass(frozen=True)
class _Prompts:
    rows: list[tuple[int, ...]]
    labels: list[float]
    tokens: int


def training(setting: Setting) -> Case:
    """Returns a step over all candidates, with the cross entropy of Yes and No."""
    prompts, read = _prompts(setting), yes_no(setting)

    def losses() -> Iterator[Tensor]:
        for group in batches([len(row) for row in prompts.rows], setting.micro_tokens):
            labels = torch.tensor([prompts.labels[i] for i in group], device=setting.device)
            scores = _scores(setting, [prompts.rows[i] for i in group], read)
            total = functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
            yield total / len(prompts.rows)

    return Case(step(setting, losses), prompts.tokens)


def scoring(setting: Setting, read: Reader | None = None) -> Case:
    """Returns the scoring of all candidates; `run` returns scores, slate after slate.

    Args:
        setting: Bases are decoders.
        read: Another readout than the Yes and No rows.
    """
    prompts = _prompts(setting)
    reader = read or yes_no(setting)

    @torch.inference_mode()
    def run() -> list[float]:
        setting.adapted.eval()
        found = [0.0] * len(prompts.rows)
        for group in batches([len(row) for row in prompts.rows], setting.micro_tokens):
            scores = _scores(setting, [prompts.rows[i] for i in group], reader).tolist()
            for index, score in zip(group, scores, strict=True):
                found[index] = score
        return found

    return Case(run, prompts.tokens)


def yes_no(setting: Setting) -> Reader:
    """Returns the reader of log(Yes / No), from two rows of the vocabulary head."""
    tokenizer, head = setting.base.tokenizer, setting.base.lm_head
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No")]
    yes, no = head[ids].float()
    return lambda last: last.float() @ (yes - no)


def _prompts(setting: Setting) -> _Prompts:
    trees = setting.trees(mode="isolated")
    return _Prompts(
        rows=[path_tokens(tree, span.segment) for tree in trees for span in tree.candidates],
        labels=[float(label > 0) for slate in setting.slates for label in slate.labels or ()],
        tokens=sum(map(separate_token_count, trees)),
    )


def _scores(setting: Setting, rows: list[tuple[int, ...]], read: Reader) -> Tensor:
    ids, lengths = padded(rows, setting)
    with setting.half():
        every = states(setting, ids)
    last = every[torch.arange(len(rows), device=ids.device), lengths - 1]
    return read(last)

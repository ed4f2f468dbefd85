"""The model writes the ranking: "[3] > [1] > ..." (RankGPT, arXiv 2304.09542; RankZephyr).

As many tokens are decoded as a complete ranking takes, greedily, for all slates at once, with
transformers' `generate` and its cache. The model that is measured was not taught to rank so; what
it writes is not read, as only the time counts, and that does not depend on which token is chosen.
"""

from __future__ import annotations

import torch

from benchmarks.peers.letters import chat
from benchmarks.peers.setting import Case, Setting, batches, padded
from peftrank.types import Slate


def scoring(setting: Setting) -> Case:
    """Returns the ranking of all slates; `run` returns the tokens written for each."""
    rows = [chat(setting, prompt(slate)) for slate in setting.slates]
    decoded = max(_answer_tokens(setting, slate) for slate in setting.slates)
    lengths = [len(row) + decoded for row in rows]

    @torch.inference_mode()
    def run() -> list[list[int]]:
        setting.adapted.eval()
        written: list[list[int]] = [[] for _ in rows]
        for group in batches(lengths, setting.micro_tokens):
            ids, _ = padded([rows[i] for i in group], setting, left=True)
            width = ids.shape[1]
            real = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in group])
            with setting.half():
                found = setting.base.model.generate(
                    input_ids=ids,
                    attention_mask=real.to(ids.device),
                    min_new_tokens=decoded,
                    max_new_tokens=decoded,
                    do_sample=False,
                    pad_token_id=setting.base.pad_token_id,
                )
            for index, row in zip(group, found[:, width:].tolist(), strict=True):
                written[index] = row
        return written

    return Case(run, sum(lengths), f"{decoded} tokens decoded per slate")


def prompt(slate: Slate) -> str:
    """Returns what the model is asked, in RankGPT's words made short."""
    history = "\n".join(f"- {item.fields['title']}" for item in slate.history)
    listed = "\n".join(
        f"[{i}] {item.fields['title']}" for i, item in enumerate(slate.candidates, 1)
    )
    return (
        f"The user read, oldest first:\n{history}\nCandidates:\n{listed}\nRank the "
        f"{len(slate.candidates)} candidates, the most relevant first. Answer only with the "
        "ranking, like [2] > [1]."
    )


def _answer_tokens(setting: Setting, slate: Slate) -> int:
    whole = " > ".join(f"[{i}]" for i in range(1, len(slate.candidates) + 1))
    return len(setting.base.tokenizer.encode(whole, add_special_tokens=False))

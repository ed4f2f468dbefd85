"""All candidates in one prompt, each named by a letter (LlamaRec, arXiv 2311.02089).

The score of a candidate is the logit of its letter after the prompt; training is the cross entropy
of the right letter over the vocabulary. LlamaRec's code computes all logits of all tokens; `logits`
also gives it the last token's alone, which is the best that can be done. The letters end at Z.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_uppercase
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers.setting import Case, Setting, batches, padded, states, step
from peftrank.types import Slate

Logits = Literal["all", "last"]


def training(setting: Setting, *, logits: Logits = "last") -> Case:
    """Returns a step over all slates."""
    rows = [prompt(setting, slate) for slate in setting.slates]
    letters = _letters(setting)
    answers = [letters[_best(slate)] for slate in setting.slates]

    def losses() -> Iterator[Tensor]:
        for group in batches([len(row) for row in rows], setting.micro_tokens):
            found = _logits(setting, [rows[i] for i in group], logits)
            target = torch.tensor([answers[i] for i in group], device=setting.device)
            yield functional.cross_entropy(found, target, reduction="sum") / len(rows)

    return Case(step(setting, losses), sum(map(len, rows)))


def scoring(setting: Setting, *, logits: Logits = "last") -> Case:
    """Returns the scoring of all slates; `run` returns a row of scores per slate."""
    rows = [prompt(setting, slate) for slate in setting.slates]
    letters = torch.tensor(_letters(setting), device=setting.device)

    @torch.inference_mode()
    def run() -> list[list[float]]:
        setting.adapted.eval()
        found: list[list[float]] = [[] for _ in rows]
        for group in batches([len(row) for row in rows], setting.micro_tokens):
            scores = _logits(setting, [rows[i] for i in group], logits)[:, letters].tolist()
            for index, row in zip(group, scores, strict=True):
                found[index] = row[: len(setting.slates[index].candidates)]
        return found

    return Case(run, sum(map(len, rows)))


def prompt(setting: Setting, slate: Slate) -> list[int]:
    """Returns the tokens of a slate's prompt, up to where the model answers."""
    named = zip(ascii_uppercase, slate.candidates, strict=False)
    history = "\n".join(f"- {item.fields['title']}" for item in slate.history)
    listed = "\n".join(f"({letter}) {item.fields['title']}" for letter, item in named)
    return chat(setting, f"The user read, oldest first:\n{history}\nNext article:\n{listed}")


def chat(setting: Setting, text: str) -> list[int]:
    """Returns the tokens of a user's turn and of the assistant's opening."""
    tokenizer = setting.base.tokenizer
    message = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(whole, add_special_tokens=False)["input_ids"])


def _letters(setting: Setting) -> list[int]:
    longest = max(len(slate.candidates) for slate in setting.slates)
    if longest > len(ascii_uppercase):
        raise ValueError(f"{longest} candidates, but letters name at most 26")
    encode = setting.base.tokenizer.encode
    return [encode(letter, add_special_tokens=False)[0] for letter in ascii_uppercase[:longest]]


def _best(slate: Slate) -> int:
    labels = slate.labels or ()
    return max(range(len(labels)), key=labels.__getitem__)


def _logits(setting: Setting, rows: list[list[int]], logits: Logits) -> Tensor:
    """Returns the vocabulary's logits (B, V) after each row, in float32."""
    ids, lengths = padded(rows, setting)
    place = torch.arange(len(rows), device=ids.device), lengths - 1
    with setting.half():
        if logits == "all":
            every = setting.base.model(input_ids=ids, use_cache=False).logits
            return every[place].float()
        last = states(setting, ids)[place]
        return setting.base.model.get_output_embeddings()(last).float()

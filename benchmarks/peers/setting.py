"""What all peers share: slates, base, LoRA, batching, and the optimizer step.

Peers pad on the right and pass no mask: a causal model does not let padding change what lies before
it, and PyTorch's attention then takes its fastest path. Rows are sorted by length, so that little
is padded. What is prepared once per slate in practice (text and tokens) is not timed, for nobody.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
from torch import Tensor

from peftrank import plugins
from peftrank.base import Base
from peftrank.config import load_config
from peftrank.prompts import PromptTemplate
from peftrank.training.data import read_part
from peftrank.training.run import prompt_arguments
from peftrank.types import Item, PromptTree, Slate

DOMAIN = "news"
LORA: dict[str, Any] = {"r": 8, "layers": "all"}


@dataclass(frozen=True)
class Case:
    """A way to do the work on all slates of a setting."""

    run: Callable[[], Any]
    tokens: int
    """Real tokens that pass through the model in one run; padding does not count."""
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """What a case is given."""

    base: Base
    adapted: peft.PeftModel
    slates: tuple[Slate, ...]
    micro_tokens: int
    """Tokens per forward pass, padding included."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the prompt, over the domain's configuration."""

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def template(self, **changes: Any) -> PromptTemplate:  # noqa: ANN401
        """Returns the domain's prompt with changes."""
        given = prompt_arguments(load_config(domain=DOMAIN)) | self.options | changes
        return PromptTemplate(self.base.tokenizer, **given, max_depth=self.base.max_depth)

    def trees(self, **changes: Any) -> list[PromptTree]:  # noqa: ANN401
        """Returns the slates' prompt trees."""
        template = self.template(**changes)
        return [template.tree(slate) for slate in self.slates]

    def only(self, count: int) -> Setting:
        """Returns it with fewer slates."""
        return replace(self, slates=self.slates[:count])

    def half(self) -> AbstractContextManager[Any]:
        """Returns the autocast that adapters in float32 need on a base in bfloat16."""
        dtype = self.base.compute_dtype
        return torch.autocast(self.device.type, dtype) if dtype.itemsize == 2 else nullcontext()


def setting(
    base: Base,
    slates: Iterable[Slate],
    *,
    micro_tokens: int,
    **options: Any,  # noqa: ANN401
) -> Setting:
    """Returns a setting around a base, which is given a LoRA of rank 8 on all linear layers."""
    method = plugins.load("methods", "lora")(total_steps=1, **LORA)
    adapted = peft.get_peft_model(base.model, method.config(base.model))
    return Setting(base, adapted, tuple(slates), micro_tokens, options)


def synthetic(
    count: int, *, history: int, candidates: int, seed: int = 0, texts: Sequence[str] = ()
) -> list[Slate]:
    """Returns slates of as many users, of titles drawn from the news sample or from `texts`.

    No two share a user, so that only the preamble can be shared between slates. The first
    candidate is the relevant one.
    """
    chosen = random.Random(seed)
    titles = list(texts) or sorted(
        {
            item.fields["title"]
            for slate in read_part(load_config(domain=DOMAIN).data, DOMAIN, "train")
            for item in (*slate.history, *slate.candidates)
        }
    )

    def items(name: str, number: int) -> tuple[Item, ...]:
        drawn = chosen.choices(titles, k=number)
        return tuple(Item(f"{name}{i}", {"title": title}) for i, title in enumerate(drawn))

    return [
        Slate(
            slate_id=f"s{i}",
            user_id=f"u{i}",
            history=items("h", history),
            candidates=items("c", candidates),
            labels=(1.0, *(0.0,) * (candidates - 1)),
        )
        for i in range(count)
    ]


def batches(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Returns row indices, longest first, in groups of at most `micro_tokens` once padded."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= micro_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padded(
    rows: Sequence[Sequence[int]], setting: Setting, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns tokens (B, L) with padding on the right or left, and each row's length (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), setting.base.pad_token_id)
    for i, row in enumerate(rows):
        start = ids.shape[1] - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
    return ids.to(setting.device), lengths.to(setting.device)


def states(setting: Setting, ids: Tensor) -> Tensor:
    """Returns the last hidden states (B, L, H) of right-padded rows, without the LM head."""
    model = setting.base.model.base_model
    output: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
    return output


def step(
    setting: Setting, losses: Callable[[], Iterable[Tensor]], *more: Tensor
) -> Callable[[], None]:
    """Returns a training step: each loss's gradients in turn, then the optimizer.

    Args:
        setting: Whose LoRA trains.
        losses: Yields the loss of each forward pass.
        more: Further weights that train: a readout's.
    """
    weights = [p for p in setting.adapted.parameters() if p.requires_grad]
    weights += [p for p in more if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0)

    def run() -> None:
        setting.adapted.train()
        for loss in losses():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run

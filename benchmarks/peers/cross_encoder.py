"""sentence-transformers' CrossEncoder with its ListNetLoss, for encoders: a pair per candidate.

Their model, tokenizer and loss as they are; the LoRA is the same as PeftRank's. Needs
`pip install sentence-transformers`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import peft
import torch
from torch import nn

from benchmarks.peers.setting import Case, Setting

NAME = "CrossEncoder, ListNetLoss (sentence-transformers)"


def left_out() -> dict[str, str]:
    """Returns why it cannot be measured here, by its name; nothing if it can."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return {NAME: "sentence-transformers is not installed"}
    return {}


class CrossEncoderPeer:
    """A CrossEncoder on the setting's base, with weights and a LoRA of its own."""

    def __init__(self, setting: Setting):
        from sentence_transformers import CrossEncoder

        self.setting = setting
        self.model: Any = CrossEncoder(
            setting.base.model.name_or_path,
            num_labels=1,
            device=str(setting.device),
            activation_fn=nn.Identity(),
        )
        found = setting.adapted.peft_config["default"]
        config = peft.LoraConfig(
            r=found.r,
            lora_alpha=found.lora_alpha,
            target_modules=rf"bert\.(?:{found.target_modules})",  # a pattern, of the bare encoder
            task_type="SEQ_CLS",  # so that the new classifier trains too
        )
        peft.inject_adapter_in_model(config, self.model.model)
        self.queries = [
            "\n".join(
                ["The user read, oldest first:"] + [f"- {i.fields['title']}" for i in s.history]
            )
            for s in setting.slates
        ]
        self.documents = [[c.fields["title"] for c in slate.candidates] for slate in setting.slates]
        self.pairs = [
            (query, text)
            for query, texts in zip(self.queries, self.documents, strict=True)
            for text in texts
        ]
        tokens = self.model.tokenizer([a for a, _ in self.pairs], [b for _, b in self.pairs])
        self.tokens = sum(map(len, tokens["input_ids"]))
        self.longest = max(map(len, tokens["input_ids"]))

    def training(self) -> Case:
        """Returns a step over all slates."""
        from sentence_transformers.cross_encoder.losses import ListNetLoss

        rows = max(1, self.setting.micro_tokens // self.longest)
        loss = ListNetLoss(self.model, mini_batch_size=rows)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name or "classifier" in name)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0)
        labels = [torch.tensor(slate.labels or ()) for slate in self.setting.slates]

        def run() -> None:
            self.model.train()
            loss([self.queries, self.documents], labels).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return Case(run, self.tokens)

    def scoring(self) -> Case:
        """Returns the scoring of all candidates by `predict`, which sorts pairs by length."""
        rows = max(1, self.setting.micro_tokens // self.longest)

        def run() -> Any:  # noqa: ANN401
            return self.model.predict(self.pairs, batch_size=rows, show_progress_bar=False)

        return Case(run, self.tokens)

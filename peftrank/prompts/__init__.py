"""Slates as the model reads them: text, token trees, and packed batches."""

from peftrank.prompts.pack import (
    collate,
    computed_tokens,
    feature_tensor,
    in_rows,
    micro_batches,
    of_slates,
    pack,
    task_tensor,
)
from peftrank.prompts.template import PromptTemplate
from peftrank.prompts.tree import render, separate_token_count, token_count

__all__ = [
    "PromptTemplate",
    "collate",
    "computed_tokens",
    "feature_tensor",
    "in_rows",
    "micro_batches",
    "of_slates",
    "pack",
    "render",
    "separate_token_count",
    "task_tensor",
    "token_count",
]

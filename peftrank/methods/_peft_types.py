"""Which of PEFT's methods run here by their PEFT name (`peft:VERA`), and why others do not.

A table; it imports neither PEFT nor torch. A method is listed once it passed
tests/test_methods_peft.py: training, publishing, a new process, mixed batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PeftKind:
    """What is known about one of PEFT's methods beside its own options."""

    paper: str
    starts_at_base: bool = True
    """Whether the untrained adapter changes nothing, up to rounding."""
    quantized: bool = True
    """Whether it runs on 4-bit bases; the others read the weights themselves."""
    in_place: bool = False
    """Whether its layers add to the base's output in place, which a backward pass refuses for
    8-bit modules, and for 4-bit ones with a bias."""
    learning_rate: float = 2e-3
    """Default peak learning rate."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Other defaults than PEFT's, so that it starts at the base."""


KINDS: Mapping[str, PeftKind] = {
    "BEFT": PeftKind("arXiv 2509.15974"),
    "BOFT": PeftKind("arXiv 2311.06243", quantized=False),
    "C3A": PeftKind("arXiv 2407.19342", in_place=True, defaults={"init_weights": True}),
    "DEFT": PeftKind("NeurIPS 2025, Decompositional Efficient Fine-Tuning", quantized=False),
    "DELORA": PeftKind("arXiv 2503.18225", quantized=False),
    "FOURIERFT": PeftKind("arXiv 2405.03003", learning_rate=3e-2, defaults={"init_weights": True}),
    "GLORA": PeftKind("arXiv 2306.07967", quantized=False),
    "GRALORA": PeftKind("arXiv 2505.20355", in_place=True),
    "HIRA": PeftKind("openreview TwJrTz9cRS"),
    "HRA": PeftKind("arXiv 2405.17484", quantized=False),
    "LN_TUNING": PeftKind("arXiv 2312.11420", learning_rate=1e-2),
    "LOHA": PeftKind("arXiv 2108.06098", quantized=False),
    "LOKR": PeftKind("arXiv 2309.14859", quantized=False),
    "MISS": PeftKind("arXiv 2409.15371"),
    "OFT": PeftKind("arXiv 2306.07280"),
    "PEANUT": PeftKind("arXiv 2410.01870", quantized=False),
    "PVERA": PeftKind("arXiv 2512.07703", learning_rate=1e-2),
    "RANDLORA": PeftKind("arXiv 2502.00987"),
    "ROAD": PeftKind("arXiv 2409.00119"),
    "TINYLORA": PeftKind("arXiv 2602.04118", quantized=False),
    "UNILORA": PeftKind("arXiv 2506.00799", starts_at_base=False, quantized=False),
    "VBLORA": PeftKind("arXiv 2405.15179", starts_at_base=False, learning_rate=1e-2),
    "VERA": PeftKind("arXiv 2310.11454", learning_rate=1e-2),
    "WAVEFT": PeftKind("arXiv 2505.12532", learning_rate=3e-2),
}

OWN: Mapping[str, str] = {"ADALORA": "adalora", "IA3": "ia3", "LORA": "lora"}
"""PEFT's names of methods that have a file of their own here."""

_TOKENS = (
    "it puts tokens of its own in front of a sequence, while a prompt here is a tree, whose "
    "positions and attention mask are its own"
)
_WHOLE_NUMBERS = "its file holds indices beside weights, and adapter files hold weights alone"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING",
            "PROMPT_TUNING", "P_TUNING",
        ),
        _TOKENS,
    ),
    **dict.fromkeys(("FROD", "SHIRA", "SUPERTUNING"), _WHOLE_NUMBERS),
    "ADAMSS": "it needs a step of its own after each optimizer step",
    "LILY": "its router looks at all tokens of a pass, so scores would depend on each other",
    "OSF": "it trains a factorization of every base weight, as large as the base itself",
    "POLY": "it needs a task id with each sequence",
    "PSOFT": "its file lacks the factors of the base's weights, whose signs differ by machine",
    "SHADOW": "it trains a second model beside the base",
    "TRAINABLE_TOKENS": "it trains embeddings of new tokens, and prompts here have none",
    "XLORA": "it mixes adapters that were trained before",
}  # fmt: skip

"""(IA)^3 (arXiv 2205.05638): one learned factor for each key, value and feed-forward channel.

A few thousandths of a LoRA's parameters. It makes the configuration and reads tensors; PEFT does
the rest. It does not train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import IA3Config, PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.errors import ConfigError
from peftrank.methods import _state
from peftrank.methods._targets import check_layers, find_blocks, path_pattern, selected, task_type

# (key projection, value projection, last projection of the feed-forward), by path in the block.
_PLACES = (
    ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),  # Llama, Qwen, Mistral, Gemma
    ("self_attn.k_proj", "self_attn.v_proj", "mlp.fc2"),  # Phi
    ("attention.self.key", "attention.self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attention.k_lin", "attention.v_lin", "ffn.lin2"),  # DistilBERT
)


class Ia3:
    """(IA)^3. The model starts as the base exactly: every factor is one."""

    learning_rate: ClassVar[float] = 1e-2
    """Default peak learning rate of the adapter's weights."""

    def __init__(self, *, total_steps: int, layers: str = "all"):
        """Checks the options; looks at no model.

        Args:
            total_steps: Optimizer steps of the run; (IA)^3 does not need them.
            layers: all, or top-K for the K blocks nearest the output.

        Raises:
            ConfigError: an option is out of range.
        """
        check_layers(layers)
        self.total_steps, self.layers = total_steps, layers

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base.

        Raises:
            ConfigError: the base is quantized or not float32, its blocks have no known structure,
                or `layers` does not fit it.
        """
        if getattr(base_model, "is_quantized", False) or base_model.dtype != torch.float32:
            # PEFT's layers then mix dtypes in the attention, and refuse to leave a 4-bit base.
            raise ConfigError(
                "method ia3 needs an unquantized float32 base: set base.quantization=none and "
                "base.compute_dtype=float32, or use method lora."
            )
        prefix, blocks = find_blocks(base_model)
        chosen = selected(self.layers, len(blocks))
        names = {name for name, _ in blocks[-1].named_modules()}
        places = next((place for place in _PLACES if names.issuperset(place)), None)
        if places is None:
            raise ConfigError(
                "method ia3 needs separate projections of keys and of values, and does not know "
                f"them in a {type(blocks[-1]).__name__}, which has: "
                f"{', '.join(sorted(filter(None, names)))}. Use method lora."
            )
        return IA3Config(
            target_modules=path_pattern(prefix, [(i, name) for i in chosen for name in places]),
            feedforward_modules=path_pattern(prefix, [(i, places[2]) for i in chosen]),
            task_type=task_type(base_model),
            base_model_name_or_path=base_model.name_or_path or None,
        )

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns None: (IA)^3 adds nothing to the loss."""
        return None

    def after_step(self, model: PeftModel, step: int) -> None:
        """Does nothing."""

    def state_dict(self, model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the adapter's parameters for exact resume."""
        return _state.read(model), {}

    def load_state_dict(
        self, model: PeftModel, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state_dict` returned. Raises AdapterError if it does not fit."""
        _state.write(model, tensors)

    def finalize(self, model: PeftModel) -> None:
        """Does nothing."""

    def export(self, model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns PEFT's file format: configuration and tensors."""
        return _state.exported(model)

"""Classic fine-tuning of the top blocks: all their weights and the final norm train.

Beside the parameter-efficient methods, to see what these cost in accuracy. The weights train as
copies (`_whole`), so the base stays and the adapter can be swapped like any other; its file holds
the copies whole. It makes the configuration and reads tensors; it does not train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.methods import _state, _whole
from peftrank.methods._targets import check_layers, find_blocks


class TopLayers:
    """Fine-tuning of the blocks nearest the output. The model starts as the base exactly."""

    learning_rate: ClassVar[float] = 1e-4
    """Default peak learning rate of the adapter's weights."""

    def __init__(self, *, total_steps: int, layers: str | None = None):
        """Checks the options; looks at no model.

        Args:
            total_steps: Optimizer steps of the run; fine-tuning does not need them.
            layers: top-K for the K blocks nearest the output, or all. Absent: a third of them.

        Raises:
            ConfigError: `layers` is neither.
        """
        if layers is not None:
            check_layers(layers)
        self.total_steps, self.layers = total_steps, layers

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base; raises as `_whole.config`."""
        layers = self.layers
        if layers is None:
            layers = f"top-{max(1, len(find_blocks(base_model)[1]) // 3)}"
        return _whole.config(base_model, layers, method="top_layers")

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns None: fine-tuning adds nothing to the loss."""
        return None

    def after_step(self, model: PeftModel, step: int) -> None:
        """Does nothing."""

    def state_dict(self, model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the trained weights for exact resume."""
        return _state.read(model), {}

    def load_state_dict(
        self, model: PeftModel, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state_dict` returned. Raises AdapterError if it does not fit."""
        _state.write(model, tensors)

    def finalize(self, model: PeftModel) -> None:
        """Does nothing."""

    def export(self, model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns PEFT's file format: configuration and tensors, the weights whole."""
        return _whole.exported(model)

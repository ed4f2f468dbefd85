"""LoRA (arXiv 2106.09685): low-rank updates of linear layers.

Rank-stabilised scaling (rsLoRA, arXiv 2312.03732) and weight decomposition (DoRA, arXiv
2402.09353) are options. It makes the configuration and reads tensors; PEFT does the rest. It does
not train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.errors import ConfigError
from peftrank.methods import _state
from peftrank.methods._targets import check_layers, check_targets, linear_targets, task_type


class Lora:
    """LoRA. The model starts as the base exactly (with dora, to rounding): B starts at zero."""

    learning_rate: ClassVar[float] = 2e-3
    """Default peak learning rate of the adapter's weights."""

    def __init__(
        self,
        *,
        total_steps: int,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str = "all-linear",
        layers: str = "all",
        rslora: bool = False,
        dora: bool = False,
    ):
        """Checks the options; looks at no model.

        Args:
            total_steps: Optimizer steps of the run; LoRA does not need them.
            r: Rank of each update.
            alpha: The update is scaled by alpha / r, or alpha / sqrt(r) with rslora.
            dropout: Probability of zeroing an input element of the update while training.
            targets: attention, mlp, all-linear, or regex: and a pattern for the module path.
            layers: all, or top-K for the K blocks nearest the output.
            rslora: Scale by alpha / sqrt(r).
            dora: Learn each output's magnitude apart from its direction.

        Raises:
            ConfigError: an option is out of range.
        """
        if r < 1:
            raise ConfigError(f"method.r={r}: expected a rank of at least 1.")
        if alpha <= 0:
            raise ConfigError(f"method.alpha={alpha}: expected a number above 0.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"method.dropout={dropout}: expected at least 0 and below 1.")
        check_targets(targets)
        check_layers(layers)
        self.total_steps = total_steps
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.targets, self.layers = targets, layers
        self.rslora, self.dora = rslora, dora

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base.

        Raises:
            ConfigError: `targets` or `layers` match nothing in it.
        """
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            target_modules=linear_targets(base_model, self.targets, self.layers),
            task_type=task_type(base_model),
            base_model_name_or_path=base_model.name_or_path or None,
        )

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns None: LoRA adds nothing to the loss."""
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
        """Returns PEFT's file format: configuration and tensors (dropout 0, for hot-swapping)."""
        config, tensors = _state.exported(model)
        config.lora_dropout = 0.0
        return config, tensors

"""Bottleneck adapters: small two-layer networks beside or behind the sub-layers of a block.

kinds: houlsby (arXiv 1902.00751) behind attention and feed-forward, pfeiffer (2005.00247) behind
the feed-forward only, parallel (2110.04366) beside the feed-forward; the scaled parallel adapter of
that paper is `kind: parallel` with `scale: 4`. With `layernorm` the normalization layers of the
adapted blocks train too, as in 1902.00751, but as copies that only this adapter uses. Importing
this module makes PEFT know their `peft_type: BOTTLENECK`. It makes the configuration and reads
tensors; the tuner is in `_bottleneck`, the places in `_sites`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.errors import ConfigError
from peftrank.methods import _state
from peftrank.methods._bottleneck import BottleneckConfig, register
from peftrank.methods._norms import block_norms
from peftrank.methods._sites import ACTIVATIONS, KINDS, block_sites
from peftrank.methods._targets import check_layers, find_blocks, path_pattern, selected, task_type

register()


class Adapter:
    """Bottleneck adapters. The model starts as the base exactly: the up-projection is zero."""

    learning_rate: ClassVar[float] = 3e-3
    """Default peak learning rate of the adapter's weights."""

    def __init__(
        self,
        *,
        total_steps: int,
        kind: str = "pfeiffer",
        size: int | None = None,
        reduction: float | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        scale: float = 1.0,
        layers: str = "all",
        layernorm: bool = False,
    ):
        """Checks the options; looks at no model.

        Args:
            total_steps: Optimizer steps of the run; adapters do not need them.
            kind: houlsby, pfeiffer or parallel.
            size: Width of the bottleneck.
            reduction: Hidden size divided by the width, instead of `size`. Neither given: 16.
            activation: gelu, relu or silu.
            dropout: Probability of zeroing an element of the bottleneck while training.
            scale: Factor of the adapter's output; arXiv 2110.04366 uses 4 with parallel.
            layers: all, or top-K for the K blocks nearest the output.
            layernorm: Also train the normalization layers of these blocks.

        Raises:
            ConfigError: an option is out of range, or both `size` and `reduction` are given.
        """
        _check_choice("kind", kind, KINDS)
        _check_choice("activation", activation, tuple(ACTIVATIONS))
        if size is not None and reduction is not None:
            raise ConfigError(
                f"method.size={size} and method.reduction={reduction} contradict each other: "
                "give one of them."
            )
        if size is not None and size < 1:
            raise ConfigError(f"method.size={size}: expected a width of at least 1.")
        if reduction is not None and reduction <= 0:
            raise ConfigError(f"method.reduction={reduction}: expected a number above 0.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"method.dropout={dropout}: expected at least 0 and below 1.")
        if scale == 0:
            raise ConfigError(
                "method.scale=0 would switch the adapter off: expected another number."
            )
        check_layers(layers)
        self.total_steps = total_steps
        self.kind, self.size, self.reduction = kind, size, reduction
        self.activation, self.dropout, self.scale = activation, dropout, scale
        self.layers, self.layernorm = layers, layernorm

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base.

        Raises:
            ConfigError: the base's blocks have no known structure, or `layers` does not fit it.
        """
        prefix, blocks = find_blocks(base_model)
        places, chosen = [block_sites(block, self.kind) for block in blocks], []
        for index in selected(self.layers, len(blocks)):
            norms = block_norms(blocks[index]) if self.layernorm else ()
            chosen += [(index, path) for path in (*places[index][0], *norms)]
        hidden_size = base_model.config.get_text_config().hidden_size
        return BottleneckConfig(
            target_modules=path_pattern(prefix, chosen),
            kind=self.kind,
            reads=places[-1][1],
            hidden_size=hidden_size,
            size=self.size or max(1, round(hidden_size / (self.reduction or 16))),
            activation=self.activation,
            scale=float(self.scale),
            dropout=self.dropout,
            layernorm=self.layernorm,
            task_type=task_type(base_model),
            base_model_name_or_path=base_model.name_or_path or None,
        )

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns None: adapters add nothing to the loss."""
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
        """Returns PEFT's file format: configuration and tensors (dropout 0)."""
        config, tensors = _state.exported(model)
        config.dropout = 0.0
        return config, tensors


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"method.{key}={value!r}: expected one of {', '.join(choices)}.")

"""Whole weights of the base, trained as copies that only this adapter uses.

For the comparison modes `top_layers` and `full`. PEFT's LN_TUNING does it for normalizations: its
layer stands in a module's place and computes with a copy. Nothing in it is particular to norms, so
here it stands in the place of every module with weights, and the file is a plain LN_TUNING one.
PEFT's copies have the base's type, in which small steps of bfloat16 weights round to nothing, so
the layers here keep float32 copies and round them in each pass, as the base would hold them.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import LNTuningConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import LNTuningModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftrank._architectures import final_norm_path
from peftrank.errors import ConfigError
from peftrank.methods import _state
from peftrank.methods._norms import is_norm, with_weights
from peftrank.methods._skeleton import adapter_layers
from peftrank.methods._state import ADAPTER
from peftrank.methods._targets import find_blocks, selected, task_type

PEFT_TYPE = "WHOLE"
"""In training alone; files say LN_TUNING."""


class WholeLayer(LNTuningLayer):  # type: ignore[misc]
    """PEFT's layer, with copies in float32 that are rounded to the base's type in each pass."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PeftConfig):
        with warnings.catch_warnings():  # of norms, whose sizes PEFT does not know
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, adapter_name, config)

    def update_layer(
        self,
        layer: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        **kwargs: Any,  # noqa: ANN401 - PEFT's
    ) -> None:
        """Adds a copy of the layer's weights; called by PEFT."""
        super().update_layer(layer, adapter_name, config=config, **kwargs)
        self.ln_tuning_layers[adapter_name].float()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Returns what the base's layer would make of x with the copy's weights."""
        layer = self.base_layer
        if not self.disable_adapters and ADAPTER in self.active_adapters:
            layer = with_weights(layer, dict(self.ln_tuning_layers[ADAPTER].named_parameters()))
        result: Tensor = layer(x, *args, **kwargs)
        return result


class WholeModel(LNTuningModel):  # type: ignore[misc]
    """PEFT's tuner of that layer."""

    def _create_new_module(
        self, peft_config: PeftConfig, target: nn.Module, adapter_name: str
    ) -> nn.Module:
        return WholeLayer(target, adapter_name, config=peft_config)


def config(base_model: PreTrainedModel, layers: str, *, method: str) -> PeftConfig:
    """Returns what trains every weight of the blocks that `layers` names, and the final norm.

    Args:
        base_model: The base.
        layers: all, or top-K.
        method: Its name, for messages.

    Raises:
        ConfigError: the base is quantized, a block holds weights outside of linear and
            normalization layers, or `layers` does not fit the base.
    """
    if getattr(base_model, "is_quantized", False):
        raise ConfigError(
            f"method {method} needs an unquantized base: 4- and 8-bit weights take no gradient. "
            "Set base.quantization=none (--set base.quantization=none), or use method lora, which "
            "leaves the weights as they are."
        )
    made = LNTuningConfig(
        target_modules=_paths(base_model, layers, method),
        task_type=task_type(base_model),
        base_model_name_or_path=base_model.name_or_path or None,
    )
    made.peft_type = PEFT_TYPE
    return made


def exported(model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Returns PEFT's LN_TUNING file format: configuration and tensors."""
    trained, tensors = _state.exported(model)
    config = copy.copy(trained)
    config.peft_type = "LN_TUNING"
    config.target_modules = sorted(adapter_layers(model))
    return config, tensors


def _paths(model: PreTrainedModel, layers: str, method: str) -> list[str]:
    prefix, blocks = find_blocks(model)
    paths = []
    for index in selected(layers, len(blocks)):
        for name, module in blocks[index].named_modules():
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            if not isinstance(module, nn.Linear) and not is_norm(module):
                raise ConfigError(
                    f"method {method} does not know how to train a {type(module).__name__}, which "
                    f"{prefix}.{index} has at {name!r}: expected linear and normalization layers. "
                    "Use method lora."
                )
            paths.append(f"{prefix}.{index}.{name}")
    last = final_norm_path(model)
    return paths if last is None else [*paths, last]


def _register() -> None:
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = WholeModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = WholeModel.prefix


_register()

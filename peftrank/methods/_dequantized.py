"""The weight of a layer as numbers, whatever it is quantized to."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from peftrank._architectures import is_linear


def dequantized(layer: nn.Module) -> Tensor:
    """Returns a linear layer's weight (outputs, inputs), dequantized; the layer stays as it is.

    PEFT's own function replaces an 8-bit layer's weight on a CPU and loses its scales, if the layer
    was used before: it then computes no more.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant
    from peft.utils.integrations import dequantize_module_weight

    weight: Any = layer.weight
    if type(weight).__name__ != "Int8Params":
        return cast(Tensor, cast(Any, dequantize_module_weight)(layer))
    used = cast(Any, layer).state.SCB  # the first pass moves the scales here
    scales = weight.SCB if used is None else used
    return cast(Tensor, int8_vectorwise_dequant(weight.data, scales.to(weight.device)))


def has_unreadable(model: nn.Module) -> bool:
    """Returns whether a linear layer of a model shows no weight, as with GPTQ and AWQ."""
    return any(is_linear(module) and not hasattr(module, "weight") for module in model.modules())


def has_8bit_on_cpu(model: nn.Module) -> bool:
    """Returns whether a layer of a model is one that PEFT's own dequantization damages."""
    weights = (p for p in model.parameters() if type(p).__name__ == "Int8Params")
    return any(weight.device.type == "cpu" for weight in weights)

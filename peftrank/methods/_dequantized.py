"""The weight of a layer as numbers, whatever it is quantized to."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def dequantized(layer: nn.Module) -> Tensor:
    """Returns a linear layer's weight (outputs, inputs), dequantized; the layer stays as it is.

    PEFT's own function replaces an 8-bit layer's weight on a CPU and loses its scales, if the layer
    was used before: it then computes no more.
    """
    if not hasattr(layer, "weight"):
        return _by_products(layer)
    from bitsandbytes.functional import int8_vectorwise_dequant
    from peft.utils.integrations import dequantize_module_weight

    weight: Any = layer.weight
    if type(weight).__name__ != "Int8Params":
        return cast(Tensor, cast(Any, dequantize_module_weight)(layer))
    used = cast(Any, layer).state.SCB  # the first pass moves the scales here
    scales = weight.SCB if used is None else used
    return cast(Tensor, int8_vectorwise_dequant(weight.data, scales.to(weight.device)))


@torch.no_grad()
def _by_products(layer: nn.Module) -> Tensor:
    """Returns a GPTQ or AWQ layer's weight: what it makes of each unit vector, less its bias."""
    device = next(layer.buffers()).device
    units = torch.eye(cast(Any, layer).in_features, device=device)
    bias = getattr(layer, "bias", None)
    found: Tensor = type(layer).forward(layer, units)  # not its hooks, which may be adapters'
    return (found if bias is None else found - bias).T.contiguous()


def has_8bit_on_cpu(model: nn.Module) -> bool:
    """Returns whether a layer of a model is one that PEFT's own dequantization damages."""
    weights = (p for p in model.parameters() if type(p).__name__ == "Int8Params")
    return any(weight.device.type == "cpu" for weight in weights)

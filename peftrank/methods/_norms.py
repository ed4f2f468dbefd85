"""Normalization layers (LayerNorm, RMSNorm) that use an adapter's weights in place of their own.

Shared by training (`_bottleneck`) and inference (`bank`). The base's layer keeps its name, class
and weights: a hook on it computes its output anew with the other weights. It does not know PEFT.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftrank.errors import ConfigError

Weights = Mapping[str, Tensor]
"""A normalization layer's own parameters by name: weight (H,) and, in a LayerNorm, bias (H,)."""


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module only scales (and shifts) its features, as normalizations do."""
    own = dict(module.named_parameters(recurse=False))
    return (
        not any(True for _ in module.children())
        and {"weight"} <= own.keys() <= {"weight", "bias"}
        and all(parameter.ndim == 1 for parameter in own.values())
    )


def block_norms(block: nn.Module) -> tuple[str, ...]:
    """Returns the paths of a transformer block's normalization layers.

    Raises:
        ConfigError: it has none with weights.
    """
    paths = tuple(name for name, module in block.named_modules() if is_norm(module))
    if not paths:
        raise ConfigError(
            f"a {type(block).__name__} has no normalization layer with weights that an adapter "
            "could train. Leave method.layernorm out, or use method lora."
        )
    return paths


def attach_norm(norm: nn.Module, weights: Callable[[], Weights | None]) -> RemovableHandle:
    """Hooks a normalization layer; returns the handle that takes the hook out.

    Args:
        norm: The base's layer.
        weights: Returns what to compute with instead of its own, or None for its own.
    """
    return norm.register_forward_hook(partial(_anew, weights))


def _anew(
    weights: Callable[[], Weights | None],
    norm: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    chosen = weights()
    return output if chosen is None else with_weights(norm, chosen)(*args)


def with_weights(norm: nn.Module, weights: Weights) -> nn.Module:
    """Returns a twin of a normalization layer that computes with other weights."""
    # The layer's own class computes it, so Gemma's 1 + weight is right too. A twin rather than
    # torch.func.functional_call, which writes into the layer that other threads are using.
    twin = copy.copy(norm)
    twin._parameters = {
        name: None if own is None else cast(nn.Parameter, weights[name].to(own.dtype))
        for name, own in norm._parameters.items()
    }
    twin._modules = {}
    vars(twin).pop("forward", None)  # accelerate may set one, bound to the layer itself
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin

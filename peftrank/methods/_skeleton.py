"""PEFT's own tuner layers for an adapter, made beside a base that stays as it is.

PEFT builds the layers on a skeleton: a copy of the base's module tree that shares every weight. The
bank then applies each layer by a hook on the base's module. So any tuner whose layers treat tokens
independently can be served, in the numbers of PEFT itself. It knows no method and no bank.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftrank.errors import AdapterError
from peftrank.methods._state import ADAPTER

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DROPPED = ("auto_mapping", "peft_type", "peft_version")
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_GIVEN: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("peftrank_given", default=None)
"""A base module's input and output, where a layer is being applied to them."""


def skeleton(module: nn.Module) -> Any:  # noqa: ANN401 - of the module's own class
    """Returns a copy of a module tree that shares its weights and has none of its hooks."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {k: None if m is None else skeleton(m) for k, m in module._modules.items()}
    for hooks in _HOOKS:
        vars(twin)[hooks] = OrderedDict()
    vars(twin).pop("forward", None)  # accelerate may set one, bound to the module itself
    return twin


def tuner_layers(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Returns PEFT's layers of an adapter, filled and in eval mode, by module path in the base.

    Args:
        model: The base; it is not changed.
        config: The content of adapter_config.json.
        tensors: The content of adapter_model.safetensors.

    Raises:
        AdapterError: PEFT refuses the configuration, or a tensor fits nothing or is missing.
    """
    twin = skeleton(model)
    try:
        own = {key: value for key, value in config.items() if key not in _DROPPED}
        made = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]](**own)
        made.inference_mode = True
        adapted = get_peft_model(twin, made)
        result = set_peft_model_state_dict(adapted, dict(tensors))
    except _REFUSALS as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterError(f"PEFT cannot make its layers on this base: {reason}") from error
    if result.unexpected_keys:
        raise AdapterError(
            f"{len(result.unexpected_keys)} tensors fit no module of the base, such as "
            f"{result.unexpected_keys[0]!r}. The adapter belongs to another base."
        )
    _check_filled(adapted, set(tensors))
    layers = adapter_layers(adapted)
    for layer in layers.values():
        layer.eval()
        base_layer = cast(nn.Module, layer.base_layer)
        vars(base_layer)["forward"] = partial(_forward_or_given, base_layer)
    return layers


def adapter_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Returns the tuner layers in a PeftModel, by the path of the module they stand for."""
    modules = model.base_model.model.named_modules()
    return {path: module for path, module in modules if isinstance(module, BaseTunerLayer)}


def own_tensors(layers: Mapping[str, nn.Module]) -> list[Tensor]:
    """Returns the parameters and buffers of tuner layers, each once, without the base's."""
    found: dict[int, Tensor] = {}
    for layer in layers.values():
        for name, child in layer.named_children():
            if name != "base_layer":
                held = (*child.parameters(), *child.buffers())
                found.update((id(tensor), tensor) for tensor in held)
    return list(found.values())


def applied(layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """Returns a tuner layer's output for the base module's input and output.

    A layer that starts with what its base module makes of the input gets `output`; only one that
    changes the input, or the weight, has the base module computed again.
    """
    token = _GIVEN.set((x, output))
    try:
        result: Tensor = layer(x)
    finally:
        _GIVEN.reset(token)
    # Some of PEFT's layers return float32, which would change the other adapters of a mixed pass.
    return result.to(output.dtype)


def _forward_or_given(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    given = _GIVEN.get()
    if given is not None and given[0] is x:
        return given[1].clone()  # some layers add to it in place
    result: Tensor = type(module).forward(module, x, *args, **kwargs)
    return result


def _check_filled(adapted: PeftModel, found: set[str]) -> None:
    """Raises AdapterError if a parameter of the adapter was in no tensor of the file."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(
        adapted, adapter_name=ADAPTER, save_embedding_layers=False
    ).keys()
    if missing := sorted(wanted - found):
        raise AdapterError(
            f"{len(missing)} of the adapter's tensors are missing, such as {missing[0]!r}"
        )

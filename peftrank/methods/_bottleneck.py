"""A PEFT tuner for bottleneck adapters: `peft_type: BOTTLENECK`.

The target module stays what and where it is. The adapter becomes its child `bottleneck`, and a
hook on the target applies it, so no name in the base changes and LoRA files keep fitting. A target
that is a normalization layer gets weights of the adapter's own in the same way. PEFT finds the
child by its class, so get_peft_model, save_pretrained, from_pretrained, set_adapter,
disable_adapter, delete_adapter and unload work as for PEFT's own methods.

It does not know which modules are targets (`_sites`), nor how it is trained. It relies on PEFT's
tuner internals, which peft's own register_peft_method opens only to names in its enum; every such
use is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftrank.errors import AdapterError, ConfigError
from peftrank.methods._norms import Weights, attach_norm, is_norm
from peftrank.methods._sites import (
    ACTIVATIONS,
    CHILD,
    Reads,
    Site,
    attach,
    bottleneck_forward,
    bottleneck_sites,
)

__all__ = [
    "PEFT_TYPE",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "Site",
    "attach",
    "bottleneck_forward",
    "bottleneck_sites",
    "register",
]

PEFT_TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What adapter_config.json says about a bottleneck adapter."""

    target_modules: list[str] | str | None = field(default=None)
    """Modules that carry an adapter: names, or a pattern for the whole path."""
    kind: str = field(default="pfeiffer")
    """houlsby, pfeiffer or parallel; says where the targets were chosen, for readers."""
    reads: str = field(default="output")
    """What the adapter at a target reads and is added to: output, input or residual."""
    hidden_size: int = field(default=0)
    size: int = field(default=0)
    """Width of the bottleneck."""
    activation: str = field(default="gelu")
    scale: float = field(default=1.0)
    dropout: float = field(default=0.0)
    layernorm: bool = field(default=False)
    """Whether normalization layers are among the targets; for readers."""
    # PEFT reads these of every configuration.
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}."
            )


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The adapters at one module of the base, by adapter name."""

    adapter_layer_names = ("down", "up")
    other_param_names = ("settings",)

    def __init__(self, adapter_name: str) -> None:
        super().__init__()
        self.down = nn.ModuleDict()
        self.up = nn.ModuleDict()
        self.settings: dict[str, BottleneckConfig] = {}
        self.handles: dict[str, RemovableHandle] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: BottleneckConfig, target: nn.Module) -> None:
        """Adds an adapter that changes nothing yet, and the hook that applies it to `target`."""
        down = nn.Linear(config.hidden_size, config.size, dtype=torch.float32)
        up = nn.Linear(config.size, config.hidden_size, dtype=torch.float32)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        device = next(chain(target.parameters(), target.buffers())).device
        if not down.weight.is_meta:  # PEFT creates on meta what a file will fill
            down, up = down.to(device), up.to(device)
        self.down[adapter_name], self.up[adapter_name] = down, up
        self.settings[adapter_name] = config
        if config.reads not in self.handles:
            change = partial(self.change, config.reads)
            self.handles[config.reads] = attach(target, cast(Reads, config.reads), change)
        active = cast(list[str], self.active_adapters)
        BaseTunerLayer.set_adapter(self, active, inference_mode=config.inference_mode)

    def change(self, reads: str, h: Tensor) -> Tensor | None:
        """Returns the sum over the active adapters that read so, like `h` (..., H), or None."""
        total: Tensor | None = None
        if self.disable_adapters:
            return total
        for name in cast(list[str], self.active_adapters):
            if name not in self.down or self.settings[name].reads != reads:
                continue
            down, up = cast(nn.Linear, self.down[name]), cast(nn.Linear, self.up[name])
            config = self.settings[name]
            one = bottleneck_forward(
                h,
                down.weight,
                down.bias,
                up.weight,
                up.bias,
                config.activation,
                config.scale,
                dropout=config.dropout if self.training else 0.0,
            )
            total = one if total is None else total + one
        return total

    @property
    def empty(self) -> bool:
        """Whether no adapter is here."""
        return len(self.down) == 0

    def detach(self) -> None:
        """Takes the hooks out of the target."""
        for handle in self.handles.values():
            handle.remove()
        self.handles.clear()

    @property
    def weight(self) -> Tensor:
        # PEFT's version looks for a wrapped layer and would ask itself without end.
        raise AttributeError("a bottleneck adapter wraps no layer and has no weight of its own")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("a bottleneck adapter wraps no layer and has no bias of its own")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises AdapterError."""
        raise _not_mergeable()


class NormLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The adapters' own weights of one normalization layer, by adapter name."""

    adapter_layer_names = ("norm_weight", "norm_bias")
    other_param_names = ()

    def __init__(self, adapter_name: str) -> None:
        super().__init__()
        self.norm_weight = nn.ParameterDict()
        self.norm_bias = nn.ParameterDict()
        self.handle: RemovableHandle | None = None
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, config: BottleneckConfig, target: nn.Module) -> None:
        """Adds a copy of the target's weights, and the hook that makes `target` use it."""
        for name, held in (("weight", self.norm_weight), ("bias", self.norm_bias)):
            parameter = target._parameters.get(name)
            if parameter is not None:
                held[adapter_name] = nn.Parameter(parameter.detach().float().clone())
        if self.handle is None:
            self.handle = attach_norm(target, self.chosen)
        active = cast(list[str], self.active_adapters)
        BaseTunerLayer.set_adapter(self, active, inference_mode=config.inference_mode)

    def chosen(self) -> Weights | None:
        """Returns the weights of the last active adapter that has some here, or None."""
        if self.disable_adapters:
            return None
        names = [n for n in cast(list[str], self.active_adapters) if n in self.norm_weight]
        if not names:
            return None
        parts = {"weight": self.norm_weight, "bias": self.norm_bias}
        return {part: held[names[-1]] for part, held in parts.items() if names[-1] in held}

    @property
    def empty(self) -> bool:
        """Whether no adapter has weights here."""
        return len(self.norm_weight) == 0

    def detach(self) -> None:
        """Takes the hook out of the target."""
        if self.handle is not None:
            self.handle.remove()

    @property
    def weight(self) -> Tensor:
        # PEFT's version looks for a wrapped layer and would ask itself without end.
        raise AttributeError("an adapter's norm wraps no layer and has no weight of its own")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("an adapter's norm wraps no layer and has no bias of its own")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises AdapterError."""
        raise _not_mergeable()


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for bottleneck adapters."""

    # With the dot, PEFT's walk visits the child itself and skips what is inside it.
    prefix = CHILD + "."
    tuner_layer_cls = (BottleneckLayer, NormLayer)
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own declaration

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target._modules.get(CHILD)
        if layer is None:
            layer = (NormLayer if is_norm(target) else BottleneckLayer)(adapter_name)
            target.add_module(CHILD, layer)
        cast(BottleneckLayer | NormLayer, layer).update_layer(adapter_name, peft_config, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; a module left without any gets its hook and child removed."""
        super().delete_adapter(adapter_name)
        self._remove(lambda layer: layer.empty)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ANN401
        # PEFT drops the argument without a word for tuners that do not have this method.
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "bottleneck adapters take no adapter_names: PEFT cannot mix them in one batch. "
                "Use set_adapter, or peftrank.Ranker, which mixes adapters of every method."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise _not_mergeable()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            raise _not_mergeable()
        self._remove(lambda layer: True)
        if "peft_config" in vars(self.model):
            del self.model.peft_config
        return cast(nn.Module, self.model)

    def _remove(self, choose: Callable[[BottleneckLayer | NormLayer], bool]) -> None:
        for module in list(self.model.modules()):
            layer = module._modules.get(CHILD)
            if isinstance(layer, BottleneckLayer | NormLayer) and choose(layer):
                layer.detach()
                del module._modules[CHILD]


def register() -> None:
    """Makes PEFT know BOTTLENECK; calling it again changes nothing.

    peft's register_peft_method refuses names that are not in its enum, so the mappings that it
    fills are filled here.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BottleneckModel.prefix


def _not_mergeable() -> AdapterError:
    return AdapterError(
        "a bottleneck adapter has a non-linearity between its two matrices, so no weight of the "
        "base can absorb it. Keep it as an adapter, or train with method lora to merge."
    )


register()

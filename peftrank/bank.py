"""Many adapters of any method on one base that stays as it is.

Each adapter is a table from places in the base to what it adds there; forward hooks look the
place up in the table of the adapter in use. Which one is in use is a context variable, so threads
and asyncio tasks do not see each other's choice, and the forward pass takes no lock. PEFT itself
cannot do this: one PeftModel holds one method, and set_adapter changes all threads.

The numbers are PEFT's: casts and the order of operations follow peft's lora/layer.py and
lora/bnb.py. This file knows no prompt, no readout and no folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from peftrank.base import Base
from peftrank.errors import AdapterError
from peftrank.methods._norms import Weights, attach_norm, is_norm
from peftrank.methods._sites import (
    Reads,
    attach,
    bottleneck_forward,
    bottleneck_sites,
    norm_names,
)
from peftrank.peft_files import AdapterFiles, LoraLayer, ia3_factors, lora_layers
from peftrank.plugins import did_you_mean

_Place = tuple[str, Reads | Literal["linear", "linear input", "norm"]]
"""A module's path, and what is done there; of a bottleneck site, what it reads."""


@dataclass(frozen=True, eq=False)
class Banked:
    """One adapter in the bank: what it does at each place. Never changed once made.

    Every entry treats the rows of its input independently, so rows of one batch can go to
    different adapters by applying each to its own rows.
    """

    name: str
    outputs: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    """By module path: (input, output of the base's module) -> output."""
    inputs: Mapping[str, Callable[[Tensor], Tensor]]
    """By module path: input -> input."""
    sites: Mapping[tuple[str, Reads], Callable[[Tensor], Tensor]]
    """By module path and reads: h -> what is added."""
    norms: Mapping[str, Weights]
    """By module path: the weights that a normalization layer uses in place of its own."""
    nbytes: int


class Bank:
    """Adapters by name on one base. `with bank.using("news"): ...` applies one of them."""

    def __init__(self, base: Base):
        self.base = base
        self._modules = dict(base.model.named_modules())
        # Replaced as a whole by writers and never changed in place: readers need no lock.
        self._adapters: dict[str, Banked] = {}
        self._hooks: dict[_Place, RemovableHandle] = {}
        self._writing = threading.Lock()
        self._in_use: ContextVar[Banked | None] = ContextVar("peftrank_adapter", default=None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters held, in the order they were added."""
        return tuple(self._adapters)

    def add(self, name: str, files: AdapterFiles) -> Banked:
        """Puts an adapter's weights beside the base, in place of any other of that name.

        A forward pass that is running with the replaced adapter finishes with it.

        Raises:
            AdapterError: a tensor fits no module of the base, or the method is not supported.
        """
        method = files.peft_config.get("peft_type")
        if method == "LORA":
            adapter = self._lora(name, lora_layers(files.peft_config, files.tensors))
        elif method == "BOTTLENECK":
            adapter = self._bottleneck(name, files)
        elif method == "IA3":
            adapter = self._ia3(name, files)
        else:
            raise AdapterError(
                f"adapter {name!r} has peft_type {method!r}. The bank applies LORA, BOTTLENECK and "
                "IA3; AdaLoRA is exported as LoRA by `peftrank train`."
            )
        with self._writing:
            self._hook(adapter)
            self._adapters = {**self._adapters, name: adapter}
        return adapter

    def remove(self, name: str) -> None:
        """Lets go of an adapter; its memory is free once no forward pass uses it.

        Raises:
            AdapterError: no adapter of that name.
        """
        with self._writing:
            self._get(name)
            self._adapters = {key: a for key, a in self._adapters.items() if key != name}

    def nbytes(self, name: str) -> int:
        """Returns the bytes an adapter's weights take, beside the base."""
        return self._get(name).nbytes

    @contextmanager
    def using(self, adapter: str | Banked | None) -> Iterator[None]:
        """Applies an adapter to the base inside the `with` block, in this thread or task only.

        Args:
            adapter: A name, what `add` returned, or None for the plain base.

        Raises:
            AdapterError: no adapter of that name.
        """
        token = self._in_use.set(self._get(adapter) if isinstance(adapter, str) else adapter)
        try:
            yield
        finally:
            self._in_use.reset(token)

    def close(self) -> None:
        """Removes all adapters and hooks. No forward pass may be running."""
        with self._writing:
            self._adapters = {}
            for handle in self._hooks.values():
                handle.remove()
            self._hooks = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        # A deep copy of the base copies its hooks, and these go on asking this bank.
        return self

    def _get(self, name: str) -> Banked:
        adapters = self._adapters
        if name not in adapters:
            raise AdapterError(
                f"the bank holds no adapter {name!r}{did_you_mean(name, adapters)}. "
                f"It holds: {', '.join(adapters) or 'none'}."
            )
        return adapters[name]

    def _lora(self, name: str, layers: Mapping[str, LoraLayer]) -> Banked:
        table, nbytes = {}, 0
        for path, layer in layers.items():
            linear = self._linear(name, path)
            expected = (linear.out_features, linear.in_features)
            given = (layer.b.shape[0], layer.a.shape[1])
            if given != expected:
                raise AdapterError(
                    f"adapter {name!r} changes a {given} weight at {path!r}, where the base has "
                    f"{expected}. It belongs to another base."
                )
            table[path], size = _lora_change(linear, layer)
            nbytes += size
        return Banked(name, table, {}, {}, {}, nbytes)

    def _ia3(self, name: str, files: AdapterFiles) -> Banked:
        inputs, outputs, nbytes = {}, {}, 0
        for path, (where, factors) in ia3_factors(files.peft_config, files.tensors).items():
            linear = self._linear(name, path)
            expected = linear.in_features if where == "input" else linear.out_features
            if factors.numel() != expected:
                raise AdapterError(
                    f"adapter {name!r} has {factors.numel()} factors for the {where} of {path!r}, "
                    f"where the base has {expected}. It belongs to another base."
                )
            placed = _placed(factors, linear.weight.device)
            if where == "input":
                inputs[path] = partial(_scaled, factors=placed)
            else:
                outputs[path] = partial(_scaled_output, factors=placed)
            nbytes += placed.nbytes
        return Banked(name, outputs, inputs, {}, {}, nbytes)

    def _bottleneck(self, name: str, files: AdapterFiles) -> Banked:
        table, nbytes = {}, 0
        for site in bottleneck_sites(files.peft_config, files.tensors):
            device = next(self._module(name, site.path).parameters()).device
            down_w, down_b, up_w, up_b = (_placed(files.tensors[n], device) for n in site.names)
            if up_w.shape[0] != self.base.hidden_size:
                raise AdapterError(
                    f"adapter {name!r} has width {up_w.shape[0]} at {site.path!r}, where the base "
                    f"has {self.base.hidden_size}. It belongs to another base."
                )
            table[site.path, site.reads] = partial(
                bottleneck_forward,
                down_w=down_w,
                down_b=down_b,
                up_w=up_w,
                up_b=up_b,
                activation=site.activation,
                scale=site.scale,
            )
            nbytes += sum(t.nbytes for t in (down_w, down_b, up_w, up_b))
        norms = {
            path: self._norm(name, path, {part: files.tensors[n] for part, n in found.items()})
            for path, found in norm_names(files.tensors).items()
        }
        nbytes += sum(t.nbytes for weights in norms.values() for t in weights.values())
        return Banked(name, {}, {}, table, norms, nbytes)

    def _norm(self, name: str, path: str, weights: Weights) -> Weights:
        module = self._module(name, path)
        own = {part: tuple(p.shape) for part, p in module.named_parameters(recurse=False)}
        given = {part: tuple(t.shape) for part, t in weights.items()}
        if not is_norm(module) or given != own:
            raise AdapterError(
                f"adapter {name!r} has normalization weights {given} for {path!r}, which is a "
                f"{type(module).__name__} with {own}. It belongs to another base."
            )
        weight = module.get_parameter("weight")
        return {part: _placed(t, weight.device).to(weight.dtype) for part, t in weights.items()}

    def _module(self, name: str, path: str) -> nn.Module:
        if path not in self._modules:
            raise AdapterError(
                f"adapter {name!r} has weights for {path!r}, which base "
                f"{self.base.identity.name!r} ({type(self.base.model).__name__}) does not have"
                f"{did_you_mean(path, self._modules)}. It belongs to another base."
            )
        module: nn.Module = self._modules[path]
        return module

    def _linear(self, name: str, path: str) -> nn.Linear:
        module = self._module(name, path)
        if not isinstance(module, nn.Linear):
            raise AdapterError(
                f"adapter {name!r} has weights for a linear {path!r}, which is a "
                f"{type(module).__name__}. The bank applies LoRA and IA3 to Linear modules of a "
                "base that PEFT has not changed."
            )
        return module

    def _hook(self, adapter: Banked) -> None:
        # A hook stays until close(), although its adapter may go: removing one under a running
        # forward pass is not safe, and an idle one costs a microsecond.
        for path in adapter.outputs:
            if (path, "linear") not in self._hooks:
                hook = partial(self._on_linear, path)
                self._hooks[path, "linear"] = self._modules[path].register_forward_hook(hook)
        for path in adapter.inputs:
            if (path, "linear input") not in self._hooks:
                before = partial(self._before_linear, path)
                handle = self._modules[path].register_forward_pre_hook(before)
                self._hooks[path, "linear input"] = handle
        for path, reads in adapter.sites:
            if (path, reads) not in self._hooks:
                change = partial(self._change, (path, reads))
                self._hooks[path, reads] = attach(self._modules[path], reads, change)
        for path in adapter.norms:
            if (path, "norm") not in self._hooks:
                weights = partial(self._weights, path)
                self._hooks[path, "norm"] = attach_norm(self._modules[path], weights)

    def _on_linear(
        self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        adapter = self._in_use.get()
        change = None if adapter is None else adapter.outputs.get(path)
        return None if change is None else change(args[0], output)

    def _before_linear(
        self, path: str, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        adapter = self._in_use.get()
        change = None if adapter is None else adapter.inputs.get(path)
        return None if change is None else (change(args[0]), *args[1:])

    def _change(self, place: tuple[str, Reads], h: Tensor) -> Tensor | None:
        adapter = self._in_use.get()
        change = None if adapter is None else adapter.sites.get(place)
        return None if change is None else change(h)

    def _weights(self, path: str) -> Weights | None:
        adapter = self._in_use.get()
        return None if adapter is None else adapter.norms.get(path)


def _lora_change(
    linear: nn.Linear, layer: LoraLayer
) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Returns (input, output) -> output with the update, and the bytes it holds."""
    device = linear.weight.device
    a, b = _placed(layer.a, device), _placed(layer.b, device)
    bias = None if layer.bias is None else _placed(layer.bias, device)
    stretch = None if layer.magnitude is None else _stretch(linear, layer)
    # PEFT rounds the update before the sum on bitsandbytes layers, and the sum elsewhere.
    early = type(linear).__module__.startswith("bitsandbytes.")
    change = partial(
        _lora_forward, a=a, b=b, bias=bias, scale=layer.scale, early=early,
        stretch=stretch, base_bias=linear.bias,
    )  # fmt: skip
    return change, sum(t.nbytes for t in (a, b, bias, stretch) if t is not None)


def _lora_forward(
    x: Tensor,
    output: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    early: bool,
    stretch: Tensor | None,
    base_bias: Tensor | None,
) -> Tensor:
    update = functional.linear(functional.linear(x.to(a.dtype), a), b, bias)
    if stretch is not None:
        plain = output if base_bias is None else output - base_bias
        # As peft's DoraLinearLayer does it: the base's part is rescaled too.
        update = (stretch - 1) * plain + stretch * update * scale
    else:
        update = update * scale
    if early and stretch is None:
        update = update.to(output.dtype)
    return (output + update).to(output.dtype)


def _scaled(value: Tensor, *, factors: Tensor) -> Tensor:
    return (value.to(factors.dtype) * factors).to(value.dtype)


def _scaled_output(_: Tensor, output: Tensor, *, factors: Tensor) -> Tensor:
    return _scaled(output, factors=factors)


def _stretch(linear: nn.Linear, layer: LoraLayer) -> Tensor:
    """Returns DoRA's magnitude / norm of each row of the updated weight, (outputs,)."""
    from peft.utils.integrations import dequantize_module_weight  # needed by DoRA alone

    device = linear.weight.device
    weight = cast(Any, dequantize_module_weight)(linear).detach().to(layer.a.dtype)
    update = _placed(layer.b, device) @ _placed(layer.a, device)
    norm = torch.linalg.vector_norm(weight + layer.scale * update, dim=1)
    stretch: Tensor = _placed(cast(Tensor, layer.magnitude), device) / norm
    return stretch


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device).contiguous()

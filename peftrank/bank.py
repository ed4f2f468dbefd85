"""Many adapters of any method on one base that stays as it is.

Each adapter is a table from places in the base to what it adds there; forward hooks look the
place up in the tables of the adapters in use. Which are in use, and for which tokens, is a context
variable, so threads and asyncio tasks do not see each other's choice, and the forward pass takes no
lock. PEFT itself cannot do this: one PeftModel holds one method, and set_adapter changes all
threads.

A pass may mix adapters of any methods: tokens of one adapter lie together (`Batch.spans`), so each
change is computed on a slice of the flattened rows, and no weight is copied or gathered.

The numbers are PEFT's: casts and the order of operations follow peft's lora/layer.py and
lora/bnb.py; other types are computed by PEFT's own layers (`methods/_skeleton`). This file knows
no prompt, no readout and no folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from peftrank._architectures import is_linear
from peftrank.base import Base
from peftrank.errors import AdapterError, ConfigError
from peftrank.methods._dequantized import dequantized
from peftrank.methods._norms import Weights, is_norm, with_weights
from peftrank.methods._peft_types import KINDS
from peftrank.methods._sites import (
    Reads,
    attach,
    bottleneck_forward,
    bottleneck_sites,
    norm_names,
)
from peftrank.peft_files import (
    AdapterFiles,
    LoraLayer,
    ia3_factors,
    lora_layers,
    peft_paths,
    whole_weights,
)
from peftrank.plugins import did_you_mean

Place = tuple[str, Reads | Literal["linear", "linear input", "instead"]]
"""A module's path, and what is done there; of a bottleneck site, what it reads."""
Span = tuple["Banked | None", int, int | None]
"""(adapter, start, stop): who changes these tokens of the flattened (R * T) rows; None: nobody."""


@dataclass(frozen=True, eq=False)
class Banked:
    """One adapter's weights on the base's device and what they do. Never changed once made."""

    name: str
    changes: Mapping[Place, Callable[..., Tensor]]
    """By place: (input, output) -> output of a linear; input -> input of a linear; input -> output
    in the module's stead; h -> what is added at a bottleneck site. Each treats tokens
    independently."""
    nbytes: int
    """Of the weights, beside the base."""


class Bank:
    """Applies adapters to one base. `with bank.using(adapter): ...`."""

    def __init__(self, base: Base):
        self.base = base
        self._modules = dict(base.model.named_modules())
        self._hooks: dict[Place, RemovableHandle | _Instead] = {}
        self._writing = threading.Lock()
        self._in_use: ContextVar[tuple[Span, ...]] = ContextVar("peftrank_adapters", default=())

    def place(self, name: str, files: AdapterFiles, *, skip_layers: int = 0) -> Banked:
        """Returns an adapter with its weights on the base's device, ready for `using`.

        The bank keeps no reference to it: its memory is free once nobody holds it.

        Args:
            name: For messages.
            files: The adapter.
            skip_layers: In the first so many blocks of the base nothing is changed (AdapterDrop,
                arXiv 2010.11918).

        Raises:
            AdapterError: a tensor fits no module of the base, the method is not supported, or all
                of it is in the skipped blocks.
            ConfigError: the base has no blocks beyond `skip_layers`.
        """
        method = files.peft_config.get("peft_type")
        skipped = self._skipped(skip_layers)
        if method == "LORA":
            adapter = self._lora(name, lora_layers(files.peft_config, files.tensors), skipped)
        elif method == "BOTTLENECK":
            adapter = self._bottleneck(name, files, skipped)
        elif method == "IA3":
            adapter = self._ia3(name, files, skipped)
        elif method == "LN_TUNING":
            modules = whole_weights(files.peft_config, files.tensors)
            adapter = self._whole(name, modules, skipped)
        elif method in KINDS:
            adapter = self._peft(name, files, skipped)
        else:
            raise AdapterError(
                f"adapter {name!r} has peft_type {method!r}. The bank applies LORA, BOTTLENECK, "
                f"IA3, {', '.join(KINDS)}; AdaLoRA is exported as LoRA by `peftrank train`."
            )
        if not adapter.changes:
            raise AdapterError(
                f"adapter {name!r} has no weights beyond the first {skip_layers} layers of base "
                f"{self.base.identity.name!r}. Skip fewer of its {self.base.num_layers} layers."
            )
        with self._writing:
            self._hook(adapter)
        return adapter

    @contextmanager
    def using(self, adapter: Banked | Sequence[Span] | None) -> Iterator[None]:
        """Applies adapters to the base inside the `with` block, in this thread or task only.

        Args:
            adapter: What `place` returned; or spans that cover the tokens of the batch, in order;
                or None for the plain base.
        """
        spans: Sequence[Span]
        if adapter is None:
            spans = ()
        elif isinstance(adapter, Banked):
            spans = ((adapter, 0, None),)
        else:
            spans = adapter
        token = self._in_use.set(tuple(spans))
        try:
            yield
        finally:
            self._in_use.reset(token)

    def close(self) -> None:
        """Removes the hooks. No forward pass may be running."""
        with self._writing:
            for handle in self._hooks.values():
                handle.remove()
            self._hooks = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        # A deep copy of the base copies its hooks, and these go on asking this bank.
        return self

    def _skipped(self, skip_layers: int) -> tuple[str, ...]:
        """Returns how paths of modules in the first so many blocks begin."""
        if not 0 <= skip_layers < self.base.num_layers:
            raise ConfigError(
                f"skip_layers={skip_layers}: expected at least 0 and below "
                f"{self.base.num_layers}, the layers of base {self.base.identity.name!r}."
            )
        blocks = self.base.layers
        home = next(path for path, module in self._modules.items() if module is blocks)
        return tuple(f"{home}.{index}." for index in range(skip_layers))

    def _lora(self, name: str, layers: Mapping[str, LoraLayer], skipped: tuple[str, ...]) -> Banked:
        changes: dict[Place, Callable[..., Tensor]] = {}
        nbytes = 0
        for path, layer in _without(skipped, layers).items():
            linear = self._linear(name, path)
            expected = (linear.out_features, linear.in_features)
            given = (layer.b.shape[0], layer.a.shape[1])
            if given != expected:
                raise AdapterError(
                    f"adapter {name!r} changes a {given} weight at {path!r}, where the base has "
                    f"{expected}. It belongs to another base."
                )
            changes[path, "linear"], size = _lora_change(
                linear, layer, self._ready, self.base.device
            )
            nbytes += size
        return Banked(name, changes, nbytes)

    def _ia3(self, name: str, files: AdapterFiles, skipped: tuple[str, ...]) -> Banked:
        changes: dict[Place, Callable[..., Tensor]] = {}
        nbytes = 0
        found = ia3_factors(files.peft_config, files.tensors)
        for path, (where, factors) in _without(skipped, found).items():
            linear = self._linear(name, path)
            expected = linear.in_features if where == "input" else linear.out_features
            if factors.numel() != expected:
                raise AdapterError(
                    f"adapter {name!r} has {factors.numel()} factors for the {where} of {path!r}, "
                    f"where the base has {expected}. It belongs to another base."
                )
            placed = _placed(factors, self.base.device)  # float32: see methods/ia3.py
            if where == "input":
                changes[path, "linear input"] = partial(_scaled, factors=placed)
            else:
                changes[path, "linear"] = partial(_scaled_output, factors=placed)
            nbytes += placed.nbytes
        return Banked(name, changes, nbytes)

    def _peft(self, name: str, files: AdapterFiles, skipped: tuple[str, ...]) -> Banked:
        """Returns an adapter whose layers are PEFT's own, on a copy of the base's module tree."""
        # Only these adapters need the PEFT library at inference.
        from peftrank.methods import _skeleton

        for path in peft_paths(files.peft_config, files.tensors):
            self._linear(name, path)
        try:
            # All of them first: some share weights, or seeds that their order decides.
            layers = _skeleton.tuner_layers(self.base.model, files.peft_config, files.tensors)
        except AdapterError as error:
            raise AdapterError(f"adapter {name!r}: {error}") from error
        layers = _without(skipped, layers)
        changes: dict[Place, Callable[..., Tensor]] = {
            (path, "linear"): partial(_skeleton.applied, layer) for path, layer in layers.items()
        }
        return Banked(name, changes, sum(t.nbytes for t in _skeleton.own_tensors(layers)))

    def _whole(self, name: str, modules: Mapping[str, Weights], skipped: tuple[str, ...]) -> Banked:
        changes: dict[Place, Callable[..., Tensor]] = {}
        nbytes = 0
        for path, given in _without(skipped, modules).items():
            if is_norm(self._module(name, path)):
                weights = self._norm(name, path, given)
                changes[path, "instead"] = with_weights(self._modules[path], weights)
            else:
                weights = self._linear_weights(name, path, given)
                changes[path, "instead"] = partial(functional.linear, **weights)
            nbytes += sum(t.nbytes for t in weights.values())
        return Banked(name, changes, nbytes)

    def _linear_weights(self, name: str, path: str, weights: Weights) -> Weights:
        # Not by the base's own class, so that the base may be a quantized one.
        linear = self._linear(name, path)
        expected: dict[str, tuple[int, ...]] = {"weight": (linear.out_features, linear.in_features)}
        if linear.bias is not None:
            expected["bias"] = (linear.out_features,)
        given = {part: tuple(t.shape) for part, t in weights.items()}
        if given != expected:
            raise AdapterError(
                f"adapter {name!r} has weights {given} for {path!r}, where the base has "
                f"{expected}. It belongs to another base."
            )
        device, dtype = self.base.device, self.base.compute_dtype
        return {part: _placed(t, device).to(dtype) for part, t in weights.items()}

    def _bottleneck(self, name: str, files: AdapterFiles, skipped: tuple[str, ...]) -> Banked:
        changes: dict[Place, Callable[..., Tensor]] = {}
        nbytes = 0
        sites = {site.path: site for site in bottleneck_sites(files.peft_config, files.tensors)}
        for site in _without(skipped, sites).values():
            device = self.base.device
            down_w, down_b, up_w, up_b = (self._ready(files.tensors[n], device) for n in site.names)
            if up_w.shape[0] != self.base.hidden_size:
                raise AdapterError(
                    f"adapter {name!r} has width {up_w.shape[0]} at {site.path!r}, where the base "
                    f"has {self.base.hidden_size}. It belongs to another base."
                )
            changes[site.path, site.reads] = partial(
                bottleneck_forward,
                down_w=down_w,
                down_b=down_b,
                up_w=up_w,
                up_b=up_b,
                activation=site.activation,
                scale=site.scale,
            )
            nbytes += sum(t.nbytes for t in (down_w, down_b, up_w, up_b))
        for path, found in _without(skipped, norm_names(files.tensors)).items():
            weights = self._norm(name, path, {part: files.tensors[n] for part, n in found.items()})
            changes[path, "instead"] = with_weights(self._modules[path], weights)
            nbytes += sum(t.nbytes for t in weights.values())
        return Banked(name, changes, nbytes)

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

    def _ready(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Returns a factor of a matrix product in the type that the product is computed in.

        In a bfloat16 base that is bfloat16, by autocast: so the numbers are the same, and the
        weights take half the memory and are not cast anew in each pass.
        """
        half = self.base.compute_dtype == torch.bfloat16
        return _placed(tensor.to(torch.bfloat16) if half else tensor, device)

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
        if not is_linear(module):
            raise AdapterError(
                f"adapter {name!r} has weights for a linear {path!r}, which is a "
                f"{type(module).__name__}. The bank applies LoRA and IA3 to Linear modules of a "
                "base that PEFT has not changed."
            )
        return cast(nn.Linear, module)  # or one of the same sizes with quantized weights

    def _hook(self, adapter: Banked) -> None:
        # A hook stays until close(), although its adapter may go: removing one under a running
        # forward pass is not safe, and an idle one costs a microsecond.
        for place in adapter.changes:
            if place not in self._hooks:
                self._hooks[place] = self._attached(place)

    def _attached(self, place: Place) -> RemovableHandle | _Instead:
        path, what = place
        module: nn.Module = self._modules[path]
        if what == "instead":
            return _Instead(module, partial(self._computed, place))
        if what == "linear":
            return module.register_forward_hook(partial(self._after, place))
        if what == "linear input":
            return module.register_forward_pre_hook(partial(self._before, place))
        return attach(module, what, partial(self._added, place))

    def _after(
        self, place: Place, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        return self._changed(place, args[0], output)

    def _before(
        self, place: Place, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        changed = self._changed(place, args[0])
        return None if changed is None else (changed, *args[1:])

    def _added(self, place: Place, h: Tensor) -> Tensor | None:
        return self._changed(place, h, unchanged=torch.zeros_like)

    def _computed(self, place: Place, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        changed = self._changed(place, x, unchanged=forward)
        return forward(x) if changed is None else changed

    def _changed(
        self,
        place: Place,
        *values: Tensor,
        unchanged: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Tensor | None:
        """Returns the last of `values` (R, T, ·) as adapters in use change it, None if none does.

        Args:
            place: The place.
            values: What the changes are given.
            unchanged: What becomes of the last of `values` (tokens, ·) where nobody changes it.
        """
        spans = self._in_use.get()
        found = [None if a is None else a.changes.get(place) for a, _, _ in spans]
        if not any(found):
            return None
        if len(spans) == 1:
            return found[0](*values)  # type: ignore[misc]  # any(found) says that it is there
        flat = [value.reshape(-1, value.shape[-1]) for value in values]
        if flat[0].shape[0] != spans[-1][2]:
            raise AdapterError(
                f"{place[0]!r} of this base is given {flat[0].shape[0]} tokens of the batch's "
                f"{spans[-1][2]}, so a batch cannot mix adapters there. Rank one domain at a time."
            )
        parts = []
        for (_, start, stop), change in zip(spans, found, strict=True):
            given = [value[start:stop] for value in flat]
            parts.append(unchanged(given[-1]) if change is None else change(*given))
        return torch.cat(parts).view(*values[-1].shape[:-1], -1)


_Found = TypeVar("_Found")


def _without(skipped: tuple[str, ...], found: Mapping[str, _Found]) -> dict[str, _Found]:
    """Returns what was found at paths that begin in none of the skipped ways."""
    return {path: value for path, value in found.items() if not path.startswith(skipped)}


class _Instead:
    """A function in the stead of a module's forward, which it is given; `remove` ends that.

    Unlike a hook, it can leave the module's own product out.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Tensor]):
        self.module = module
        self.earlier = vars(module).get("forward")  # accelerate or another bank may have set one
        self.own = partial(compute, module.forward)
        vars(module)["forward"] = self.own

    def remove(self) -> None:
        """Puts the earlier forward back; of two banks, the later one has to close first."""
        if vars(self.module).get("forward") is not self.own:
            return  # another bank calls this one, which only passes on what it is given
        if self.earlier is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.earlier


def _lora_change(
    linear: nn.Linear,
    layer: LoraLayer,
    ready: Callable[[Tensor, torch.device], Tensor],
    device: torch.device,
) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Returns (input, output) -> output with the update, and the bytes it holds."""
    a, b = ready(layer.a, device), ready(layer.b, device)
    bias = None if layer.bias is None else ready(layer.bias, device)
    stretch = None if layer.magnitude is None else _stretch(linear, layer, device)
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


def _stretch(linear: nn.Linear, layer: LoraLayer, device: torch.device) -> Tensor:
    """Returns DoRA's magnitude / norm of each row of the updated weight, (outputs,)."""
    weight = dequantized(linear).detach().to(layer.a.dtype)
    update = _placed(layer.b, device) @ _placed(layer.a, device)
    norm = torch.linalg.vector_norm(weight + layer.scale * update, dim=1)
    stretch: Tensor = _placed(cast(Tensor, layer.magnitude), device) / norm
    return stretch


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device).contiguous()

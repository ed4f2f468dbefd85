"""Where a bottleneck adapter sits in a transformer block, and what it computes there.

Shared by training (`_bottleneck`) and inference (`bank`). It knows modules, tensors and names; it
does not know PEFT.

An adapter computes f(h) = scale * (up(act(down(h)))) and is applied by a hook on a module of the
base, which keeps its name and class. What h is, and where f(h) is added, is the site's `reads`:

    output    h = the module's output, added to it            (houlsby, pfeiffer)
    input     h = the module's input, added to its output     (parallel, on an mlp)
    residual  h = the module's second argument, added to it   (parallel, on a BERT output block)

BERT adds its residual inside `output(hidden, residual)` and that residual is the input of
`intermediate`, so `residual` equals reading `intermediate`'s input and adding to the output of
`output.dense` (but for the base's own dropout), with nothing to remember between two modules.

Papers: houlsby arXiv 1902.00751, pfeiffer 2005.00247, (scaled) parallel 2110.04366.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from peftrank.errors import AdapterError, ConfigError

Reads = Literal["output", "input", "residual"]
KINDS = ("houlsby", "parallel", "pfeiffer")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}
CHILD = "bottleneck"
"""Name of the child module that holds the adapter's weights in training, and in tensor names."""
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")

_NORM_KEY = re.compile(rf"base_model\.model\.(?P<path>.+)\.{CHILD}\.norm_(?P<part>weight|bias)")
_KEY = re.compile(rf"base_model\.model\.(?P<path>.+)\.{CHILD}\.(?P<part>{'|'.join(PARTS)})")


@dataclass(frozen=True)
class Site:
    """One place where an adapter is applied, with its weights' names in the file."""

    path: str
    """Path of the module in the base: `model.layers.0.mlp`."""
    reads: Reads
    activation: str
    scale: float
    names: tuple[str, str, str, str]
    """Tensor names of down.weight (size, H), down.bias (size,), up.weight (H, size), up.bias."""


def bottleneck_sites(config: Mapping[str, Any], names: Iterable[str]) -> list[Site]:
    """Returns the sites of an adapter file, in the order of `names`; not those of norms.

    Args:
        config: The content of adapter_config.json.
        names: The tensor names of adapter_model.safetensors.

    Raises:
        AdapterError: a name or a value of the configuration is not a bottleneck adapter's.
    """
    reads, activation, scale = (config.get(key) for key in ("reads", "activation", "scale"))
    if (
        reads not in ("output", "input", "residual")
        or not isinstance(activation, str)  # of a stranger's file: perhaps a list
        or activation not in ACTIVATIONS
        or not isinstance(scale, int | float)
    ):
        raise AdapterError(
            f"the bottleneck configuration has reads={reads!r}, activation={activation!r}, "
            f"scale={scale!r}. Expected reads output|input|residual, an activation of "
            f"{', '.join(ACTIVATIONS)}, and a number."
        )
    found: dict[str, set[str]] = {}
    for name in names:
        match = _KEY.fullmatch(name)
        if match is None and _NORM_KEY.fullmatch(name):
            continue
        if match is None:
            raise AdapterError(
                f"tensor {name!r} is no part of a bottleneck adapter. Expected names such as "
                f"'base_model.model.model.layers.0.mlp.{CHILD}.down.weight'."
            )
        found.setdefault(match["path"], set()).add(match["part"])
    for path, parts in found.items():
        if missing := [part for part in PARTS if part not in parts]:
            raise AdapterError(f"the bottleneck adapter at {path!r} lacks {', '.join(missing)}")
    return [Site(path, reads, activation, float(scale), _names(path)) for path in found]


def norm_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the tensor names of an adapter file that are a norm's, by path and parameter."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _NORM_KEY.fullmatch(name):
            found.setdefault(match["path"], {})[match["part"]] = name
    return found


def block_sites(block: nn.Module, kind: str) -> tuple[tuple[str, ...], Reads]:
    """Returns the module paths, relative to a transformer block, where a kind of adapter sits.

    Raises:
        ConfigError: the block has none of the known structures.
    """
    names = dict(block.named_modules())
    after_attention = next((name for name in _ATTENTION_OUTPUTS if name in names), None)
    for output, parallel, reads in _FEED_FORWARDS:
        if after_attention is None or output not in names or parallel not in names:
            continue
        if kind == "parallel":
            return (parallel,), reads
        paths = (after_attention, output) if kind == "houlsby" else (output,)
        return paths, "output"
    raise ConfigError(
        f"method adapter does not know where its {kind!r} adapters belong in a "
        f"{type(block).__name__}. Known: blocks with one of {', '.join(_ATTENTION_OUTPUTS)} and "
        "one of mlp, output.dense, ffn. This block has: "
        f"{', '.join(name for name in names if name)}."
    )


# The projection that ends self-attention, by its path in the block.
_ATTENTION_OUTPUTS = (
    "self_attn.o_proj",  # Llama, Qwen, Mistral, Gemma, Phi-3
    "self_attn.out_proj",
    "self_attn.dense",  # Phi
    "attention.output.dense",  # BERT, RoBERTa, ELECTRA
    "attention.out_lin",  # DistilBERT
)
# (path whose output is the feed-forward's, path of the parallel site, what the latter reads)
_FEED_FORWARDS: tuple[tuple[str, str, Reads], ...] = (
    ("mlp", "mlp", "input"),
    ("output.dense", "output", "residual"),
    ("ffn", "ffn", "input"),
)


def bottleneck_forward(
    h: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    activation: str,
    scale: float,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Returns scale * up(act(down(h))), shape and dtype of `h`; the caller adds it.

    Computed in the dtype of the weights (float32), or in autocast's.

    Args:
        h: (..., H).
        down_w: (size, H).
        down_b: (size,) or None.
        up_w: (H, size).
        up_b: (H,) or None.
        activation: A name in ACTIVATIONS.
        scale: Factor of the result.
        dropout: Probability of zeroing an element between act and up; 0 at inference.
    """
    hidden = ACTIVATIONS[activation](functional.linear(h.to(down_w.dtype), down_w, down_b))
    if dropout > 0.0:
        hidden = functional.dropout(hidden, dropout)
    change = functional.linear(hidden, up_w, up_b)
    return (change if scale == 1.0 else change * scale).to(h.dtype)


def attach(
    module: nn.Module, reads: Reads, change: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Hooks `change` into a module, where `reads` says; returns the handle that takes it out.

    Args:
        module: The base's module.
        reads: What `change` is given and what its result is added to.
        change: h -> f(h) of the same shape, or None to leave the base's value as it is. A bound
            method (or a partial of one) survives copy.deepcopy of the model; a closure does not.
    """
    if reads == "residual":
        return module.register_forward_pre_hook(partial(_on_residual, change))
    hook = _on_output if reads == "output" else _from_input
    return module.register_forward_hook(partial(hook, change))


def _names(path: str) -> tuple[str, str, str, str]:
    down_w, down_b, up_w, up_b = (f"base_model.model.{path}.{CHILD}.{part}" for part in PARTS)
    return down_w, down_b, up_w, up_b


def _on_output(
    change: Callable[[Tensor], Tensor | None],
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    return _added(output, change(output))


def _from_input(
    change: Callable[[Tensor], Tensor | None],
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    return _added(output, change(args[0]))


def _on_residual(
    change: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    hidden, residual = args
    return hidden, _added(residual, change(residual))


def _added(value: Tensor, change: Tensor | None) -> Tensor:
    return value if change is None else value + change.to(value.dtype)

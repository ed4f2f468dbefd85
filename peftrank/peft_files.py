"""What the files of an adapter hold: PEFT's configuration and tensors, the readout, the manifest.

Reads PEFT's LoRA key names and tells the layers apart, with shapes checked and scales worked out.
Knows no folder (`store`), no model (`bank`) and not the PEFT library.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peftrank.errors import AdapterError
from peftrank.methods._patterns import MOST_REPEATS, compiled, endless, steps

PREFIX = "base_model.model."
"""PEFT puts this before a module's path in the base model."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LONGEST_PATH = 256
_MOST_STEPS = 2 * 10**8
_MOST_PATHS = 20_000
_COMMON = 1024
"""A whole number up to which no option of PEFT's methods takes much memory or time."""
_UNAPPLIED = (
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "sample_at_inference",
    "save_only_topk_weights",
)
_Patterns = list[tuple[re.Pattern[str], Any]]
# LoRA variants that change the forward pass and that nothing here computes.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


@dataclass(frozen=True)
class AdapterFiles:
    """One adapter in memory, as it is on disk."""

    peft_config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, Tensor]
    """adapter_model.safetensors."""
    readout: dict[str, Tensor]
    """readout.safetensors; empty for a readout without parameters."""
    manifest: dict[str, Any]
    """peftrank.json."""


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank update of one linear module (LoRA, arXiv 2106.09685)."""

    a: Tensor
    """(r, inputs)."""
    b: Tensor
    """(outputs, r)."""
    scale: float
    bias: Tensor | None
    """(outputs,), from `lora_bias`."""
    magnitude: Tensor | None
    """(outputs,), DoRA's (arXiv 2402.09353)."""

    def delta(self) -> Tensor:
        """Returns the update of the weight (outputs, inputs), float32, without DoRA's rescaling."""
        return self.scale * (self.b.float() @ self.a.float())


def lora_layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LoraLayer]:
    """Returns the LoRA layers of an adapter by module path in the base model.

    Raises:
        AdapterError: the configuration asks for a LoRA variant that is not supported, a tensor
            is no part of a LoRA layer, or its shape contradicts the configuration.
    """
    for name in _VARIANTS:
        if config.get(name):
            raise AdapterError(
                f"the LoRA configuration sets {name}={config[name]!r}, which PeftRank does not "
                "compute. Supported: plain LoRA, rslora, DoRA, lora_bias, rank and alpha patterns."
            )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            re.escape(PREFIX) + r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|"
            r"lora_magnitude_vector(?:\.weight)?)",
            key,
        )
        if match is None:
            raise AdapterError(
                f"tensor {key!r} is no part of a LoRA layer. Expected names such as "
                f"'{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight'."
            )
        if len(match[1]) > _LONGEST_PATH:  # patterns are matched against it
            raise AdapterError(
                f"tensor {key[:80]!r}... names a module of {len(match[1])} characters; at most "
                f"{_LONGEST_PATH} are read"
            )
        part = match[2].removesuffix(".weight") if "magnitude" in match[2] else match[2]
        parts.setdefault(match[1], {})[part] = tensor
    ranks, alphas = (_patterns(config, name, parts) for name in ("rank_pattern", "alpha_pattern"))
    return {path: _layer(config, path, found, ranks, alphas) for path, found in parts.items()}


def ia3_factors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Literal["input", "output"], Tensor]]:
    """Returns what (IA)^3 (arXiv 2205.05638) multiplies and with what, by module path in the base.

    The factors are (inputs,) for the input of a linear module and (outputs,) for its output.

    Raises:
        AdapterError: a tensor is no (IA)^3 vector, or modules_to_save asks for more than these.
    """
    if config.get("modules_to_save"):
        raise AdapterError(
            "the IA3 configuration sets modules_to_save, which PeftRank does not apply"
        )
    found: dict[str, tuple[Literal["input", "output"], Tensor]] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(".ia3_l")
        if key != f"{PREFIX}{path}.ia3_l" or tensor.ndim != 2 or 1 not in tensor.shape:
            raise AdapterError(
                f"tensor {key!r} of shape {tuple(tensor.shape)} is no IA3 vector. Expected names "
                f"such as '{PREFIX}model.layers.0.self_attn.k_proj.ia3_l', of shape (outputs, 1) "
                "or, for a feed-forward module, (1, inputs)."
            )
        found[path] = ("input" if tensor.shape[0] == 1 else "output", tensor.flatten())
    return found


def peft_paths(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the module paths of an adapter whose layers PEFT itself computes.

    PEFT makes these layers as the configuration says, which may be a stranger's: so it may hold no
    pattern for modules, no other that takes for ever, and no number far beyond its tensors.

    Raises:
        AdapterError: it does, or it asks for what is not applied.
    """
    for name in _UNAPPLIED:
        if config.get(name) not in (None, False, [], "none"):
            raise AdapterError(
                f"the configuration sets {name}={config[name]!r}, which PeftRank does not apply"
            )
    paths = config.get("target_modules")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise AdapterError(f"target_modules is {paths!r:.80}; expected a list of module paths")
    if any(len(path) > _LONGEST_PATH for path in paths) or not 0 < len(paths) <= _MOST_PATHS:
        raise AdapterError(
            f"target_modules names {len(paths)} modules; expected up to {_MOST_PATHS}, each with a "
            f"path of at most {_LONGEST_PATH} characters"
        )
    largest = max((size for t in tensors.values() for size in t.shape), default=0)
    for name, value in config.items():
        if name.endswith("_pattern"):
            _patterns(config, name, paths)
        elif isinstance(value, int) and not name.endswith(("seed", "_key")):
            if not -1 <= value <= max(_COMMON, largest):
                raise AdapterError(
                    f"the configuration sets {name}={value}, beyond all sizes of its tensors "
                    f"(at most {largest})"
                )
    return paths


def whole_weights(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Returns the weights of an LN_TUNING adapter: by module path, `weight` and perhaps `bias`.

    PEFT made it for normalizations (arXiv 2312.11420); methods full and top_layers keep the weights
    of linear modules in it too.

    Raises:
        AdapterError: a tensor is no such weight, or they are not those of the modules named.
    """
    paths = peft_paths(config, tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            re.escape(PREFIX) + r"(.+)\.ln_tuning_layers\.(weight|bias)", key, flags=re.DOTALL
        )
        if match is None:
            raise AdapterError(
                f"tensor {key!r} is no weight of an LN_TUNING adapter. Expected names such as "
                f"'{PREFIX}model.norm.ln_tuning_layers.weight'."
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if differing := sorted(found.keys() ^ set(paths)):
        raise AdapterError(
            f"the tensors are those of {len(found)} modules and target_modules names {len(paths)}; "
            f"differing: {', '.join(map(repr, differing[:3]))}"
        )
    return found


def adapter_ranks(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, int]]:
    """Returns `lora_ranks` of an adapter's files, {} for one without; raises as `lora_layers`."""
    return lora_ranks(lora_layers(config, tensors)) if config.get("peft_type") == "LORA" else {}


def lora_ranks(layers: Mapping[str, LoraLayer]) -> dict[str, dict[str, int]]:
    """Returns the rank of each update, as {layer: {module: rank}}; "" is outside of any layer.

    The directions that do something: AdaLoRA's files pad what it pruned with zeros, and an
    untrained LoRA has rank 0.
    """
    found: dict[str, dict[str, int]] = {}
    for path, layer in layers.items():
        match = re.fullmatch(r".+?\.(\d+)\.(.+)", path)
        index, module = (match[1], match[2]) if match else ("", path)
        used = layer.a.ne(0).any(dim=1) & layer.b.ne(0).any(dim=0)
        found.setdefault(index, {})[module] = int(used.sum())
    return found


def check_tensors(tensors: Mapping[str, Tensor], file: str) -> None:
    """Raises AdapterError unless every tensor is floating point of 16 bits or more, and finite."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise AdapterError(
                f"{file}: tensor {key!r} is {tensor.dtype}, not floating point as {known}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{file}: tensor {key!r} holds NaN or infinite values")


def _layer(
    config: Mapping[str, Any],
    path: str,
    parts: Mapping[str, Tensor],
    ranks: _Patterns,
    alphas: _Patterns,
) -> LoraLayer:
    try:
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    except KeyError as error:
        raise AdapterError(f"the LoRA layer {path!r} has no {error.args[0]}") from None
    r = _by_pattern(ranks, path, config.get("r"))
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise AdapterError(f"the rank of {path!r} is {r!r}; expected a whole number of at least 1")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != r:
        raise AdapterError(
            f"the LoRA layer {path!r} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; "
            f"expected (r, inputs) and (outputs, r) with r={r}, as adapter_config.json says"
        )
    bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    for name, vector, wanted in (
        ("lora_B.bias", bias, config.get("lora_bias")),
        ("lora_magnitude_vector", magnitude, config.get("use_dora")),
    ):
        if bool(wanted) != (vector is not None):
            raise AdapterError(f"{name} of {path!r} contradicts adapter_config.json: {wanted!r}")
        if vector is not None and vector.shape != b.shape[:1]:
            raise AdapterError(
                f"{name} of {path!r} has shape {tuple(vector.shape)}, not ({len(b)},)"
            )
    alpha = _by_pattern(alphas, path, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise AdapterError(f"lora_alpha of {path!r} is {alpha!r}, not a number")
    scale = alpha / (r**0.5 if config.get("use_rslora") else r)
    return LoraLayer(a, b, scale, bias, magnitude)


def _patterns(config: Mapping[str, Any], name: str, paths: Collection[str]) -> _Patterns:
    given = config.get(name) or {}
    if not isinstance(given, dict):
        raise AdapterError(f"{name} is {given!r}; expected an object of patterns")
    found = []
    for pattern, value in given.items():
        if endless(pattern):  # a stranger's, and it is tried on every module's path
            raise AdapterError(
                f"{name} holds {pattern[:80]!r}, which may take for ever to match. Patterns "
                f"repeat at most {MOST_REPEATS} things, and no group."
            )
        try:
            found.append((compiled(pattern), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(
                f"{name} holds {pattern[:80]!r}, no valid pattern: {error}"
            ) from None
    longest = max(map(len, paths), default=0)
    if sum(steps(pattern, longest) for pattern in given) * len(paths) > _MOST_STEPS:
        raise AdapterError(
            f"{name} holds {len(given)} patterns for {len(paths)} modules, which may take for ever "
            "to match. Name modules without * and +, or fewer of them."
        )
    return found


def _by_pattern(patterns: _Patterns, path: str, default: Any) -> Any:  # noqa: ANN401
    # The first pattern that matches decides, as in PEFT.
    return next((value for pattern, value in patterns if pattern.match(path)), default)

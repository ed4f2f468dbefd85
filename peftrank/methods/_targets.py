"""Which linear layers of a base a method adapts: names in, a PEFT `target_modules` value out.

It looks at the base's structure only (the transformer blocks and the Linear layers inside them),
so lm_head, pooler and embeddings are never targets. It knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from peftrank._architectures import is_linear
from peftrank.errors import ConfigError

_ATTENTION = frozenset({"attention", "attn", "self_attention", "self_attn"})
_MLP = frozenset({"feed_forward", "ffn", "intermediate", "mlp", "output"})
_GROUPS = {"attention": _ATTENTION, "mlp": _MLP}
_EXPECTED = "attention, mlp, all-linear, or regex: and a pattern for the whole module path"


def check_targets(targets: str) -> None:
    """Raises ConfigError unless `targets` is well formed; looks at no model."""
    if targets.startswith("regex:"):
        try:
            re.compile(targets.removeprefix("regex:"))
        except re.error as error:
            raise ConfigError(f"method.targets={targets!r} is no valid pattern: {error}") from None
    elif targets not in (*_GROUPS, "all-linear"):
        raise ConfigError(f"method.targets={targets!r}: expected {_EXPECTED}.")


def check_layers(layers: str) -> None:
    """Raises ConfigError unless `layers` is well formed; looks at no model."""
    if layers != "all" and not re.fullmatch(r"top-[1-9]\d*", layers):
        raise ConfigError(f"method.layers={layers!r}: expected all, or top-K such as top-10.")


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of a model's transformer blocks.

    Raises:
        ConfigError: there is no such list, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(_linear_names(block) for block in module)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(found)} lists of {count} transformer blocks with "
            "Linear layers; expected exactly one. Use a decoder or an encoder, not both in one."
        )
    return found[0]


def selected(layers: str, count: int) -> range:
    """Returns the indices of the blocks that `all` or `top-K` names.

    Raises:
        ConfigError: K is larger than `count`.
    """
    if layers == "all":
        return range(count)
    top = int(layers.removeprefix("top-"))
    if top > count:
        raise ConfigError(f"method.layers={layers!r}, but the base has only {count} blocks.")
    return range(count - top, count)


def linear_targets(model: PreTrainedModel, targets: str, layers: str) -> list[str] | str:
    """Returns PEFT's `target_modules` for the Linear layers that `targets` and `layers` name.

    A sorted list of last names (`["k_proj", "q_proj"]`) where these match nothing else in a
    decoder, else a pattern for the whole path; PEFT and its consumers take either. Encoders get
    the pattern, because `dense` would match the pooler that another class of the same base has.

    Raises:
        ConfigError: nothing matches; the message lists the names there are.
    """
    prefix, chosen = _chosen(model, targets, layers)
    last_names = sorted({name.rpartition(".")[2] for _, name in chosen})
    ends = tuple("." + name for name in last_names)
    matched = sum(name.endswith(ends) for name, _ in model.named_modules())
    if matched == len(chosen) and task_type(model) == "CAUSAL_LM":
        return last_names
    return path_pattern(prefix, chosen)


def target_paths(model: PreTrainedModel, targets: str, layers: str) -> list[str]:
    """Returns the paths of the Linear layers that `linear_targets` would name, in their order.

    Raises:
        ConfigError: nothing matches; the message lists the names there are.
    """
    prefix, chosen = _chosen(model, targets, layers)
    return [f"{prefix}.{index}.{name}" for index, name in chosen]


def path_pattern(prefix: str, chosen: Iterable[tuple[int, str]]) -> str:
    r"""Returns a pattern that fullmatches exactly the paths `prefix.index.name`.

    >>> path_pattern("model.layers", [(1, "mlp"), (2, "mlp")])
    'model\\.layers\\.(1|2)\\.(mlp)'
    """
    by_name: dict[str, list[int]] = {}
    for index, name in chosen:
        by_name.setdefault(name, []).append(index)
    by_indices: dict[tuple[int, ...], list[str]] = {}
    for name, indices in by_name.items():
        by_indices.setdefault(tuple(indices), []).append(re.escape(name))
    return "|".join(
        rf"{re.escape(prefix)}\.({'|'.join(map(str, indices))})\.({'|'.join(names)})"
        for indices, names in by_indices.items()
    )


def task_type(model: PreTrainedModel) -> str:
    """Returns PEFT's task type: CAUSAL_LM for a model with a vocabulary head."""
    return "FEATURE_EXTRACTION" if model.get_output_embeddings() is None else "CAUSAL_LM"


def _chosen(model: PreTrainedModel, targets: str, layers: str) -> tuple[str, list[tuple[int, str]]]:
    """Returns the path of the blocks, and (index, name in the block) of each chosen Linear."""
    check_targets(targets)
    check_layers(layers)
    prefix, blocks = find_blocks(model)
    names = [
        (index, name)
        for index in selected(layers, len(blocks))
        for name in _linear_names(blocks[index])
    ]
    chosen = [(i, name) for i, name in names if _matches(targets, name, f"{prefix}.{i}.{name}")]
    if not chosen:
        raise ConfigError(
            f"method.targets={targets!r} with method.layers={layers!r} matches no Linear layer of "
            f"{type(model).__name__}. There are, in each block of {prefix!r}: "
            f"{', '.join(sorted({name for _, name in names}))}. Expected {_EXPECTED}."
        )
    return prefix, chosen


def _linear_names(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if is_linear(module)]


def _matches(targets: str, name: str, path: str) -> bool:
    if targets.startswith("regex:"):
        return re.fullmatch(targets.removeprefix("regex:"), path) is not None
    return targets == "all-linear" or name.partition(".")[0] in _GROUPS[targets]

"""PEFT's other methods by their PEFT name: `peft:VERA`, with PEFT's own options.

Which there are is in `_peft_types`. The class for a name is made from PEFT's configuration class:
every field of it is an option, but for those that say where the adapter goes (`targets` and
`layers` do) or that would put something into the file which cannot be served. It does not train.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, get_type_hints

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.errors import ConfigError
from peftrank.methods import _state, _whole
from peftrank.methods._dequantized import has_unreadable
from peftrank.methods._norms import block_norms
from peftrank.methods._peft_types import KINDS, OWN, REFUSED
from peftrank.methods._skeleton import adapter_layers, skeleton
from peftrank.methods._targets import (
    check_layers,
    check_targets,
    find_blocks,
    selected,
    target_paths,
    task_type,
)
from peftrank.plugins import did_you_mean, load

_GIVEN_HERE = frozenset(
    {
        *(f.name for f in dataclasses.fields(PeftConfig)),
        "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
        "modules_to_save", "sample_at_inference", "save_only_topk_weights", "save_projection",
        "target_modules",
    }
)  # fmt: skip
"""Fields of PEFT's configurations that are no options: set here, or left at PEFT's default."""


class PeftMethod:
    """One of PEFT's methods; a subclass for each, made by `peft_method`."""

    kind: ClassVar[str]
    """PEFT's name of it."""
    learning_rate: ClassVar[float]
    """Default peak learning rate of the adapter's weights."""

    def __init__(
        self,
        *,
        total_steps: int,
        targets: str = "all-linear",
        layers: str = "all",
        **options: Any,  # noqa: ANN401 - PEFT's, see `peft_method`
    ):
        """Checks the options; looks at no model.

        Args:
            total_steps: Optimizer steps of the run; none of these methods needs them.
            targets: attention, mlp, all-linear, or regex: and a pattern for the module path.
            layers: all, or top-K for the K blocks nearest the output.
            options: Fields of PEFT's configuration class.

        Raises:
            ConfigError: an option is out of range, as far as PEFT says without a base.
        """
        check_targets(targets)
        check_layers(layers)
        self.total_steps, self.targets, self.layers = total_steps, targets, layers
        self.options = {**KINDS[self.kind].defaults, **options}
        self._peft_config(["any"])

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base.

        Raises:
            ConfigError: `targets` or `layers` match nothing in it, it is quantized and the method
                reads weights or adds in place, or PEFT refuses the options on it.
        """
        known = KINDS[self.kind]
        if getattr(base_model, "is_quantized", False) and not known.quantized:
            raise ConfigError(
                f"method peft:{self.kind} reads the base's weights themselves, and in PEFT only "
                "where they are not quantized: set base.quantization=none, or use method lora."
            )
        if has_unreadable(base_model):
            raise ConfigError(
                f"method peft:{self.kind} was never run on a GPTQ or AWQ checkpoint, whose layers "
                "show no weights. Use method lora, adalora or adapter, or an unquantized "
                "checkpoint of the same model."
            )
        if known.in_place and self._views(base_model):
            raise ConfigError(
                f"method peft:{self.kind} does not train in PEFT on an 8-bit base, nor on a 4-bit "
                "one whose modules have biases: set base.quantization=none, or use method lora."
            )
        self._try(base_model)
        config = self._peft_config(self._paths(base_model))
        config.task_type = task_type(base_model)
        config.base_model_name_or_path = base_model.name_or_path or None
        return config

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns None: none of these methods adds to the loss."""
        return None

    def after_step(self, model: PeftModel, step: int) -> None:
        """Does nothing."""

    def state_dict(self, model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the adapter's parameters for exact resume; seeds give the rest again."""
        return _state.read(model), {}

    def load_state_dict(
        self, model: PeftModel, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state_dict` returned. Raises AdapterError if it does not fit."""
        _state.write(model, tensors)

    def finalize(self, model: PeftModel) -> None:
        """Does nothing."""

    def export(self, model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns PEFT's file format: configuration, with every module by its path, and tensors."""
        return exported(model)

    def _paths(self, base_model: PreTrainedModel) -> list[str]:
        return target_paths(base_model, self.targets, self.layers)

    def _views(self, base_model: PreTrainedModel) -> bool:
        """Returns whether a target's output is one that nothing may be added to in place."""
        if getattr(base_model, "is_loaded_in_8bit", False):
            return True
        biases = (base_model.get_submodule(path).bias for path in self._paths(base_model))
        four = bool(getattr(base_model, "is_loaded_in_4bit", False))
        return four and any(bias is not None for bias in biases)

    def _peft_config(self, paths: list[str]) -> PeftConfig:
        try:
            return PEFT_TYPE_TO_CONFIG_MAPPING[self.kind](target_modules=paths, **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method peft:{self.kind}: {error}") from error

    def _try(self, base_model: PreTrainedModel) -> None:
        """Raises ConfigError if PEFT refuses; found on a skeleton, so the base stays whole."""
        config = self._peft_config(self._paths(base_model))
        try:
            with torch.random.fork_rng(devices=[]):  # the run's own draws stay what they are
                get_peft_model(skeleton(base_model), config)
        except (
            ArithmeticError,
            AssertionError,
            ImportError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"method peft:{self.kind} does not fit this base with these options: {reason}"
            ) from error


class NormTuning(PeftMethod):
    """LN_TUNING, whose targets are norms; their copies train in float32, whatever the base's type.

    PEFT's own are of the base's type, in which small steps of a bfloat16 weight round to nothing.
    """

    def export(self, model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns PEFT's LN_TUNING file format: configuration and tensors."""
        return _whole.exported(model)

    def _paths(self, base_model: PreTrainedModel) -> list[str]:
        return norm_paths(base_model, self.layers)

    def _peft_config(self, paths: list[str]) -> PeftConfig:
        config = super()._peft_config(paths)
        config.peft_type = _whole.PEFT_TYPE
        return config


@cache
def peft_method(name: str) -> Any:  # noqa: ANN401 - a method's class
    """Returns the class of one of PEFT's methods, its options as keyword-only parameters.

    Args:
        name: As PEFT spells it: VERA, LOHA, ...

    Raises:
        ConfigError: PEFT has no such method, or it cannot run here; the message says why.
    """
    if name in OWN:
        return load("methods", OWN[name])
    if name in REFUSED:
        raise ConfigError(f"method peft:{name} cannot be used: {REFUSED[name]}. Use method lora.")
    if name not in KINDS:
        names = sorted((*KINDS, *OWN))
        raise ConfigError(
            f"unknown method peft:{name}{did_you_mean(name.upper(), names)}. "
            f"Available: {', '.join(f'peft:{known}' for known in names)}."
        )
    parent = NormTuning if name == "LN_TUNING" else PeftMethod
    return type(name, (parent,), _members(name))


def _members(name: str) -> dict[str, Any]:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    types = get_type_hints(config)
    own = {"total_steps": int, "layers": str}
    if name != "LN_TUNING":
        own["targets"] = str
    fields = {f.name: types[f.name] for f in dataclasses.fields(config)}
    options = {key: kind for key, kind in fields.items() if key not in _GIVEN_HERE}
    parameters = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
        for key, kind in {**own, **options}.items()
    ]
    return {
        "kind": name,
        "learning_rate": KINDS[name].learning_rate,
        "__signature__": inspect.Signature(parameters),
        "__doc__": f"PEFT's {name} ({KINDS[name].paper}).",
    }


def norm_paths(base_model: PreTrainedModel, layers: str) -> list[str]:
    """Returns the paths of the normalization layers of the blocks that `layers` names."""
    prefix, blocks = find_blocks(base_model)
    return [
        f"{prefix}.{index}.{norm}"
        for index in selected(layers, len(blocks))
        for norm in block_norms(blocks[index])
    ]


def exported(model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Returns copies of configuration and tensors, the modules named by their whole paths."""
    config, tensors = _state.exported(model)
    # A pattern from a stranger's file could take for ever to match; a path cannot.
    config.target_modules = sorted(adapter_layers(model))
    return config, tensors

"""LoRA (arXiv 2106.09685): low-rank updates of linear layers.

Rank-stabilised scaling (rsLoRA, arXiv 2312.03732), weight decomposition (DoRA, arXiv 2402.09353),
a faster B (LoRA+, arXiv 2402.12354) and a start from the base's weights (`_principal`), from what
quantization lost of them (`_loftq`) or from what the layers are given (`_eva`) are options.
It makes the configuration and reads tensors; PEFT does the rest. It does not train.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.errors import ConfigError
from peftrank.methods import _eva, _loftq, _principal, _state
from peftrank.methods._dequantized import has_8bit_on_cpu, has_unreadable
from peftrank.methods._patterns import MOST_REPEATS, endless, matches
from peftrank.methods._targets import (
    check_layers,
    check_targets,
    linear_targets,
    target_paths,
    task_type,
)
from peftrank.plugins import did_you_mean
from peftrank.types import Batch

_ZERO_INITS = ("kaiming", "gaussian", "eva")


class Lora:
    """LoRA. The model starts as the base exactly; with dora, pissa and olora, to rounding."""

    learning_rate: ClassVar[float] = 2e-3
    """Default peak learning rate of the adapter's weights."""

    def __init__(
        self,
        *,
        total_steps: int,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str = "all-linear",
        layers: str = "all",
        rslora: bool = False,
        dora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        b_ratio: float = 1,
        init: str = "kaiming",
        rho: float | None = None,
    ):
        """Checks the options; looks at no model.

        Args:
            total_steps: Optimizer steps of the run; LoRA does not need them.
            r: Rank of each update.
            alpha: The update is scaled by alpha / r, or alpha / sqrt(r) with rslora.
            dropout: Probability of zeroing an input element of the update while training.
            targets: attention, mlp, all-linear, or regex: and a pattern for the module path.
            layers: all, or top-K for the K blocks nearest the output.
            rslora: Scale by alpha / sqrt(r).
            dora: Learn each output's magnitude apart from its direction.
            rank_pattern: Another r by module: the end of a path in the base, or a pattern for it
                (`q_proj`, `layers.11.mlp.up_proj`); of several that match, the first counts.
            alpha_pattern: Another alpha, likewise.
            b_ratio: How many times as fast as A does B learn (LoRA+). Adam's steps do not depend
                on the size of gradients, so it is a factor on alpha, B being zero at the start.
            init: kaiming or gaussian draw A and set B to zero; eva sets A to the main directions of
                what each module is given, and divides the ranks by them; pissa and olora start from
                the base's weights, and the file then holds twice the rank; loftq starts from what
                quantization took from them.
            rho: With eva, a module's rank is at most rho * r; 1 leaves the ranks as they are.
                Absent: 2.

        Raises:
            ConfigError: an option is out of range, or two contradict each other.
        """
        if r < 1:
            raise ConfigError(f"method.r={r}: expected a rank of at least 1.")
        if alpha <= 0:
            raise ConfigError(f"method.alpha={alpha}: expected a number above 0.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"method.dropout={dropout}: expected at least 0 and below 1.")
        if b_ratio <= 0:
            raise ConfigError(f"method.b_ratio={b_ratio}: expected a number above 0.")
        check_targets(targets)
        check_layers(layers)
        _check_pattern("rank_pattern", rank_pattern or {}, 1, "a rank of at least 1")
        _check_pattern("alpha_pattern", alpha_pattern or {}, 0, "a number above 0")
        _check_init(init, dora=dora, b_ratio=b_ratio, rho=rho)
        self.total_steps = total_steps
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.targets, self.layers = targets, layers
        self.rslora, self.dora = rslora, dora
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        self.b_ratio, self.init = b_ratio, init
        self.rho = _eva.RHO if rho is None else rho
        self.reads_slates, self.reads_weights = init == "eva", init == "loftq"

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base.

        Raises:
            ConfigError: `targets`, `layers` or a key of a pattern match nothing in it.
        """
        if self.init == "loftq" and not getattr(base_model, "is_quantized", False):
            raise ConfigError(
                "method.init=loftq makes up for what quantization lost, and this base is not "
                "quantized. Set base.quantization (nf4, fp4, int8), or use init kaiming."
            )
        if (self.dora or self.init in _principal.INITS) and has_unreadable(base_model):
            raise ConfigError(
                f"method.{'dora' if self.dora else f'init={self.init}'} reads the base's weights, "
                "which layers of a GPTQ or AWQ checkpoint do not show. Leave it out, or use an "
                "unquantized checkpoint of the same model."
            )
        if self.dora and has_8bit_on_cpu(base_model):
            raise ConfigError(
                "method.dora does not train on an 8-bit base on a CPU: PEFT's DoRA reads the "
                "weights in each pass, and there that takes their scales away. Set "
                "base.quantization to nf4 or none, or leave method.dora out."
            )
        paths = target_paths(base_model, self.targets, self.layers)
        _check_matches("rank_pattern", self.rank_pattern, paths)
        _check_matches("alpha_pattern", self.alpha_pattern, paths)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha * self.b_ratio,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern={key: a * self.b_ratio for key, a in self.alpha_pattern.items()},
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            target_modules=linear_targets(base_model, self.targets, self.layers),
            task_type=task_type(base_model),
            base_model_name_or_path=base_model.name_or_path or None,
        )
        if self.init == "eva":
            return _eva.prepare(config, self.rho)
        if self.init in _principal.INITS:
            return _principal.prepare(config, self.init)
        return config

    def read_slates(
        self, model: PeftModel, batches: Sequence[Batch], forward: Callable[[Batch], object]
    ) -> None:
        """Starts A from what the modules are given; see `_eva.start`. Only with init eva."""
        _eva.start(model, batches, forward)

    def read_weights(self, model: PeftModel, weights: Mapping[str, Tensor]) -> None:
        """Starts A and B from what quantization lost; see `_loftq.start`. Only with init loftq."""
        _loftq.start(model, weights)

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns None: LoRA adds nothing to the loss."""
        return None

    def after_step(self, model: PeftModel, step: int) -> None:
        """Does nothing."""

    def state_dict(self, model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the adapter's parameters for exact resume."""
        return _state.read(model), {}

    def load_state_dict(
        self, model: PeftModel, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state_dict` returned. Raises AdapterError if it does not fit."""
        _state.write(model, tensors)

    def finalize(self, model: PeftModel) -> None:
        """Does nothing."""

    def export(self, model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns PEFT's file format: configuration and tensors (dropout 0, for hot-swapping)."""
        from_base = self.init in _principal.INITS
        config, tensors = _principal.exported(model) if from_base else _state.exported(model)
        config.lora_dropout = 0.0
        return (_eva.plain(config) if self.init == "eva" else config), tensors


def _check_init(init: str, *, dora: bool, b_ratio: float, rho: float | None) -> None:
    known = (*_ZERO_INITS, *_principal.INITS, "loftq")
    if init not in known:
        raise ConfigError(
            f"method.init={init!r}{did_you_mean(init, known)}: expected one of {', '.join(known)}."
        )
    if rho is not None and init != "eva":
        raise ConfigError(f"method.rho={rho} goes with method.init=eva, and init is {init}.")
    if rho is not None and rho < 1:
        raise ConfigError(f"method.rho={rho}: expected at least 1.")
    if init in _ZERO_INITS:
        return
    if dora:
        raise ConfigError(
            f"method.init={init} and method.dora contradict each other: DoRA's magnitudes are "
            "those of the weight without the start. Leave one of them out."
        )
    if b_ratio != 1:
        raise ConfigError(
            f"method.init={init} and method.b_ratio={b_ratio} contradict each other: LoRA+ needs a "
            "B that starts at zero. Leave one of them out."
        )


def _check_pattern(key: str, pattern: Mapping[str, float], least: int, expected: str) -> None:
    for name, value in pattern.items():
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigError(f"method.{key} has {name!r}, no valid pattern: {error}.") from None
        if endless(name):
            raise ConfigError(
                f"method.{key} has {name!r}, which may take for ever to match. Repeat at most "
                f"{MOST_REPEATS} things with *, + or braces, and no group; or name the modules."
            )
        if value < least or value <= 0:
            raise ConfigError(f"method.{key} has {name!r}: {value}; expected {expected}.")


def _check_matches(key: str, pattern: Mapping[str, float], paths: list[str]) -> None:
    for name in pattern:
        if not any(matches(name, path) for path in paths):
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise ConfigError(
                f"method.{key} has {name!r}{did_you_mean(name, names)}, which matches none of the "
                f"{len(paths)} modules that method.targets and method.layers choose. Expected the "
                f"end of a path such as {paths[0]!r}; last names: {', '.join(names)}."
            )

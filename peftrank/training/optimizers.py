"""The optimizers a run can have, and the bytes of what they keep for each weight.

`adamw` and `sgd` are PyTorch's, the others bitsandbytes': with 8-bit states (Dettmers et al. 2021,
arXiv 2110.02861), and paged, which moves states to the host when a GPU has no room.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peftrank.config import TrainingConfig
from peftrank.errors import ConfigError

_SMALL, _BLOCK, _MAP_BYTES = 4096, 256, 1024
"""bitsandbytes keeps smaller tensors' states in 32 bits; else one constant for so many values, and
a table of 256 floats for all states of a kind."""


def check_optimizer(training: TrainingConfig, device: torch.device) -> None:
    """Raises ConfigError if the configured optimizer needs a GPU and there is none."""
    name = training.optimizer
    if name.startswith("paged_") and device.type != "cuda":
        raise ConfigError(
            f"training.optimizer={name} moves states between a GPU and the host, and this training "
            f"runs on {device.type}, where there is nothing to move. Use "
            f"{name.removeprefix('paged_')}, which computes the same."
        )


def make_optimizer(training: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the configured optimizer over groups of parameters, each with its `lr`."""
    name = training.optimizer
    options: dict[str, Any] = {"weight_decay": training.weight_decay}
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, **options)
    if training.betas is not None:
        options["betas"] = training.betas
    if name == "adamw":
        return torch.optim.AdamW(groups, eps=training.epsilon, **options)
    import bitsandbytes.optim as made

    if "adamw" in name:
        options["eps"] = training.epsilon
    classes = {
        "adamw_8bit": made.AdamW8bit,
        "paged_adamw": made.PagedAdamW32bit,
        "paged_adamw_8bit": made.PagedAdamW8bit,
        "lion": made.Lion32bit,
        "lion_8bit": made.Lion8bit,
        "paged_lion": made.PagedLion32bit,
        "paged_lion_8bit": made.PagedLion8bit,
    }
    optimizer: torch.optim.Optimizer = classes[name](groups, **options)
    return optimizer


def peak_learning_rate(training: TrainingConfig, default: float) -> float:
    """Returns the configured peak learning rate, or a method's default, which is AdamW's.

    Raises:
        ConfigError: there is none, and the optimizer needs another than AdamW.
    """
    if training.learning_rate is not None:
        return training.learning_rate
    if "adamw" not in training.optimizer:
        raise ConfigError(
            f"training.optimizer={training.optimizer} needs training.learning_rate: the methods' "
            f"defaults (here {default:g}) are for AdamW. Lion takes about a tenth of it."
        )
    return default


def state_bytes(training: TrainingConfig, sizes: Iterable[int]) -> int:
    """Returns the bytes of the optimizer's states.

    Args:
        training: Names the optimizer.
        sizes: Number of elements of each parameter.
    """
    states = 2 if "adamw" in training.optimizer else 1
    if training.optimizer == "sgd" and training.momentum == 0:
        return 0
    if not training.optimizer.endswith("_8bit"):
        return states * sum(4 * n for n in sizes)
    large = [n for n in sizes if n >= _SMALL]
    packed = sum(n + 4 * -(-n // _BLOCK) for n in large)
    tables = _MAP_BYTES * bool(large)
    return states * (sum(4 * n for n in sizes if n < _SMALL) + packed + tables)


def slots(optimizer: torch.optim.Optimizer) -> dict[tuple[Tensor, str], Tensor]:
    """Returns copies of all that an optimizer keeps, by parameter and name."""
    return {
        (parameter, slot): torch.as_tensor(value).clone()
        for parameter, state in optimizer.state.items()
        for slot, value in state.items()
        if value is not None
    }


def put_slot(optimizer: torch.optim.Optimizer, parameter: Tensor, slot: str, value: Tensor) -> None:
    """Puts back one value of `slots`."""
    if value.dim() > 0:
        held: Any = value.to(parameter.device, copy=True)
    elif value.is_floating_point():
        held = value.clone()  # PyTorch's `step`, which stays on the CPU
    else:
        held = int(value)  # bitsandbytes'
    optimizer.state[parameter][slot] = held

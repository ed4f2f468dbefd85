"""LoRA that starts from its inputs: EVA (arXiv 2410.07170).

A starts as the principal directions of what each layer is given for a few passes of training
slates, found by PEFT's incremental SVD; B stays zero, so the model still starts as the base. The
rank budget, r a module on average, goes to the directions that explain most of the variance, at
most rho * r to one module; a module that gets none is left out. It relies on PEFT's own EVA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peftrank.errors import ConfigError
from peftrank.methods._state import ADAPTER
from peftrank.types import Batch

RHO = 2.0
"""Default, as in the paper's experiments on language models."""
_MOST_PASSES = 1000


def prepare(config: LoraConfig, rho: float) -> LoraConfig:
    """Returns the configuration of a LoRA that `start` will be called for."""
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho)
    return config


def start(model: PeftModel, batches: Sequence[Batch], forward: Callable[[Batch], object]) -> None:
    """Sets A from what the layers are given, and changes ranks; before an optimizer is made.

    Args:
        model: Made with what `prepare` returned. Its modules may be replaced.
        batches: Passes of training slates, read again and again until the directions are stable.
        forward: Runs the base on one.

    Raises:
        ConfigError: a layer has fewer inputs than it may get ranks, or so has every pass tokens, or
            the directions do not become stable.
    """
    most = _most_rank(model)
    large = [b for b in batches if int((b.segment_ids >= 0).sum()) >= most]
    if not large:
        raise ConfigError(
            f"method.init=eva looks for {most} directions (rank times rho) in each pass, and none "
            "has so many tokens. Raise training.micro_tokens, or lower method.r or method.rho."
        )
    passes = 0

    def run(_: nn.Module, index: Tensor) -> None:
        nonlocal passes
        passes += 1
        if passes > _MOST_PASSES:
            raise ConfigError(
                f"method.init=eva has found no stable directions in {_MOST_PASSES} passes. Lower "
                "method.r or method.rho, or use init kaiming."
            )
        forward(large[int(index)])

    initialize_lora_eva_weights(
        model,
        [torch.tensor(i) for i in range(len(large))],
        forward_fn=run,
        prepare_model_inputs_fn=lambda index, _: large[int(index)].segment_ids.flatten() >= 0,
        prepare_layer_inputs_fn=_real_tokens,
        gather_distributed_inputs=False,  # every process reads the same slates
        show_progress_bar=False,
    )
    # A module whose rank changed has new parameters, in the base's type.
    model.base_model._cast_adapter_dtype(adapter_name=ADAPTER, autocast_adapter_dtype=True)


def plain(config: LoraConfig) -> LoraConfig:
    """Returns a copied configuration as that of any LoRA, for a file."""
    config.init_lora_weights, config.eva_config = True, None
    return config


def _most_rank(model: PeftModel) -> int:
    config: Any = model.peft_config[ADAPTER]
    most = 0
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            rank = round(layer.r[ADAPTER] * config.eva_config.rho)
            if rank > layer.in_features:
                raise ConfigError(
                    f"method.init=eva may give {path!r} the rank {rank} (rank times rho), and it "
                    f"has {layer.in_features} inputs. Lower method.r or method.rho."
                )
            most = max(most, rank)
    return most


def _real_tokens(given: tuple[Tensor, ...], real: Tensor, _: str) -> Tensor:
    """Returns a layer's input (tokens, inputs) without padding."""
    x = given[0]
    return x.reshape(-1, x.shape[-1])[real]

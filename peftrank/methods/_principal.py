"""LoRA that starts from a factorization of the base's weight: PiSSA and OLoRA.

PiSSA (arXiv 2404.02948) starts A and B as the principal singular vectors of the weight W, OLoRA
(arXiv 2406.01775) as the first columns of its QR factorization. Both papers take the start away
from W, which would change the base that other adapters share. Here the layer takes it away from
its output instead: W x + s B A x - s B0 A0 x, with A0 and B0 frozen. That is the same function of
A and B, it starts at the base, and it leaves W alone, so it works on quantized weights too (they
are dequantized to be factorized, and not quantized again as in QPiSSA).

A file holds it as a plain LoRA of twice the rank: [A; A0] and [B, -B0]. It relies on PEFT's
`_register_custom_module` and on the names of its init methods.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from peftrank.errors import ConfigError
from peftrank.methods import _state
from peftrank.methods._dequantized import dequantized
from peftrank.methods._state import ADAPTER

INITS = ("pissa", "olora")


class PrincipalLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA layer, less what it would add at the start."""

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Starts A and B as the principal part of the weight; called by PEFT."""
        u, s, vh = torch.linalg.svd(self._weight(adapter_name), full_matrices=False)
        r = self.r[adapter_name]
        root = (s[:r] / self.scaling[adapter_name]).sqrt()
        self._start(adapter_name, root[:, None] * vh[:r], u[:, :r] * root)

    def olora_init(self, adapter_name: str) -> None:
        """Starts A and B as the first rows and columns of the weight's QR; called by PEFT."""
        q, rows = torch.linalg.qr(self._weight(adapter_name))
        r = self.r[adapter_name]
        self._start(adapter_name, rows[:r], q[:, :r])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Returns W x + s (B A - B0 A0) x."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        a, start_a = self.lora_A[ADAPTER].weight, self.start_A[ADAPTER]
        x = x.to(a.dtype)
        dropped = self.lora_dropout[ADAPTER](x)
        low = torch.cat([functional.linear(dropped, a), functional.linear(x, start_a)], dim=-1)
        # One product, as in the file: the large parts cancel before anything is rounded.
        joined = torch.cat([self.lora_B[ADAPTER].weight, -self.start_B[ADAPTER]], dim=1)
        change: Tensor = functional.linear(low, joined) * self.scaling[ADAPTER]
        return (result + change).to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ConfigError: PEFT would merge s B A alone."""
        raise ConfigError("this LoRA is merged from its exported file, not while it trains.")

    def _weight(self, adapter_name: str) -> Tensor:
        base_layer = self.get_base_layer()
        weight: Tensor = dequantized(base_layer).detach().float()
        if self.r[adapter_name] > min(weight.shape):
            raise ConfigError(
                f"method.r={self.r[adapter_name]}: the rank of a weight of shape "
                f"{tuple(weight.shape)} is at most {min(weight.shape)}, and method.init takes the "
                "start from it. Lower method.r (or method.rank_pattern), or use init kaiming."
            )
        return weight

    def _start(self, adapter_name: str, a: Tensor, b: Tensor) -> None:
        self.lora_A[adapter_name].weight.data = a.clone()
        self.lora_B[adapter_name].weight.data = b.clone()
        # Parameters, so that a checkpoint has them: signs of a factorization differ by machine.
        self.start_A = nn.ParameterDict({adapter_name: nn.Parameter(a.clone(), False)})
        self.start_B = nn.ParameterDict({adapter_name: nn.Parameter(b.clone(), False)})


def prepare(config: LoraConfig, init: str) -> LoraConfig:
    """Returns the configuration, with its layers starting as `init` says: one of INITS."""
    config.init_lora_weights = init
    config._register_custom_module({nn.Linear: PrincipalLinear})
    return config


def exported(model: PeftModel) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns the same function as a plain LoRA file of twice the rank."""
    config, _ = _state.exported(model)
    config._custom_modules = None
    config.init_lora_weights = True
    # The scale, alpha / r or alpha / sqrt(r), stays what it was.
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    tensors = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, PrincipalLinear):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            name = f"base_model.model.{path}"
            joined_a = torch.cat([a, layer.start_A[ADAPTER]])
            joined_b = torch.cat([b, -layer.start_B[ADAPTER]], dim=1)
            tensors[f"{name}.lora_A.weight"] = _state.copied(joined_a)
            tensors[f"{name}.lora_B.weight"] = _state.copied(joined_b)
    return config, tensors

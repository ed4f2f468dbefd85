"""LoRA that starts from what quantization lost: LoftQ (arXiv 2310.08659), its first step.

LoftQ alternates between quantizing W - s B A and factorizing what is lost, so its base belongs to
one adapter, but for the first step: there it is W itself that is quantized, once for all. That step
is here: s B A starts as the best approximation of W - Q by the rank, and the base stays. So the
model starts nearer to the unquantized base than to the one it shares.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from peftrank.errors import BaseModelError
from peftrank.methods._dequantized import dequantized
from peftrank.methods._state import ADAPTER


@torch.no_grad()
def start(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Sets A and B of every module.

    Args:
        model: On a quantized base.
        weights: The base's before they were quantized, by name; names may lack what stands before
            them in the model, or have more.

    Raises:
        BaseModelError: a weight is not there, or has another shape.
    """
    for path, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        kept = dequantized(layer.get_base_layer()).float()
        whole = _named(f"{path}.weight", weights).to(kept.device).float()
        if whole.shape != kept.shape:
            raise BaseModelError(
                f"the unquantized weight of {path!r} has shape {tuple(whole.shape)}, and the "
                f"quantized one {tuple(kept.shape)}, so method.init=loftq cannot compare them."
            )
        u, s, vh = torch.linalg.svd(whole - kept, full_matrices=False)
        r = min(layer.r[ADAPTER], len(s))  # what is beyond that starts as in any LoRA
        root = (s[:r] / layer.scaling[ADAPTER]).sqrt()
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        a[:r] = root[:, None] * vh[:r]
        b[:, :r] = u[:, :r] * root


def _named(name: str, weights: Mapping[str, Tensor]) -> Tensor:
    # A base model's checkpoint has no "bert." before its names, or has one that the model lacks.
    ends = [key for key in weights if f".{name}".endswith(f".{key}") or key.endswith(f".{name}")]
    if name not in weights and len(ends) != 1:
        raise BaseModelError(
            f"the base's files hold {len(ends)} weights for {name!r}, expected one; "
            "method.init=loftq needs the weights before quantization. Use init kaiming."
        )
    return weights[name if name in weights else ends[0]]

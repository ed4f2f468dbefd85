"""What is known about each supported architecture: layers, positions, masks, and their order.

An architecture is listed once its hidden states under a prompt tree's mask
were checked against its ordinary forward (tests/test_base.py does so for each).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from peftrank.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class KeysValues(Protocol):
    """What stands in the place of transformers' cache: attention modules use `update` alone."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and values (R, K, P, D) that a block's tokens see, from their own."""


DECODERS = ("gemma", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
ENCODERS = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
_ROBERTA = ("camembert", "roberta", "xlm-roberta")
POOLED = ("bert", *_ROBERTA)
_LAYERED_MASKS = ("gemma3_text", "qwen2", "qwen3", "smollm3")
_REFUSED = {
    "gemma2": "its soft-capped attention is not computed by scaled-dot-product attention",
    "mpnet": "its attention bias needs positions counted by place, not by depth in the tree",
    "t5": "encoder-decoder models are not supported",
    "bart": "encoder-decoder models are not supported",
    "mamba": "a state-space model has no attention mask to carry a prompt tree",
    "mamba2": "a state-space model has no attention mask to carry a prompt tree",
}


def check_architecture(name: str, config: Mapping[str, Any]) -> str:
    """Returns the model type of a config.

    Args:
        name: The base's name, for the error.
        config: The content of its config.json.

    Raises:
        BaseModelError: the type is not supported; the message says why and what is.
    """
    kind = config.get("model_type")
    supported = kind in DECODERS or kind in ENCODERS
    if supported and not config.get("use_bidirectional_attention"):
        return cast(str, kind)
    reason = _REFUSED.get(str(kind), "its attention was not checked under a prompt tree's mask")
    if supported:
        reason = "its config asks for bidirectional attention in a decoder"
    raise BaseModelError(
        f"base {name!r} has the architecture {kind!r}: {reason}. Supported: decoders "
        f"({', '.join(DECODERS)}) and encoders ({', '.join(ENCODERS)})."
    )


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is one linear layer, whatever its weights are quantized to.

    bitsandbytes' layers are subclasses of `nn.Linear`; those of GPTQ and AWQ only have its sizes.
    """
    sized = all(isinstance(getattr(module, f"{end}_features", None), int) for end in ("in", "out"))
    return isinstance(module, nn.Linear) or (sized and not any(module.children()))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the transformer blocks, first to last."""
    inner = model.base_model  # the module inside a causal-LM class, and an encoder itself
    kind = model.config.model_type
    if kind in DECODERS:
        return cast(nn.ModuleList, inner.layers)
    return cast(nn.ModuleList, (inner.transformer if kind == "distilbert" else inner.encoder).layer)


def max_depth(values: Mapping[str, Any]) -> int:
    """Returns the number of positions a model was made for, counted from 0.

    Args:
        values: The model's config, as `PretrainedConfig.to_dict` gives it, defaults included.
    """
    depth = int(values["max_position_embeddings"])
    if values["model_type"] in _ROBERTA:
        return depth - int(values["pad_token_id"]) - 1
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this the frequencies of a whole batch switch with its deepest token.
        return min(depth, int(rope["original_max_position_embeddings"]))
    return depth


def positions(config: PretrainedConfig, position_ids: Tensor) -> Tensor:
    """Returns depths from 0 as the model's own position ids."""
    if config.model_type in _ROBERTA:  # their position table starts after the padding index
        return position_ids + (int(config.pad_token_id) + 1)
    return position_ids


def layer_masks(
    config: PretrainedConfig, mask: Tensor, position_ids: Tensor, key_ids: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """Returns the mask, or masks by layer type, as the model's forward takes them.

    Args:
        config: The model's config.
        mask: (R, 1, T, P) additive.
        position_ids: (R, T) depths.
        key_ids: (R, P) depths of the tokens that may be seen; None: they are the same.
    """
    kind = config.model_type
    window = config.sliding_window if kind in (*_LAYERED_MASKS, "mistral", "phi3") else None
    if window is None:
        return mask
    # Transformers uses a 4-D mask as it is, in sliding layers too. Depth differences on a path
    # are token distances, so the window can be applied exactly here.
    keys = position_ids if key_ids is None else key_ids
    far = position_ids.unsqueeze(2) - keys.unsqueeze(1) >= window
    near = mask.masked_fill(far.unsqueeze(1), torch.finfo(mask.dtype).min)
    if kind in _LAYERED_MASKS:
        return {"full_attention": mask, "sliding_attention": near}
    return near


def embed(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Returns what enters the first block (R, T, H).

    Args:
        model: The causal-LM class of a decoder, or an encoder.
        input_ids: (R, T).
        position_ids: (R, T) depths.
    """
    inner = model.base_model
    kind = model.config.model_type
    if kind in DECODERS:
        return cast(Tensor, inner.embed_tokens(input_ids))
    depth = positions(model.config, position_ids)
    states = cast(Tensor, inner.embeddings(input_ids=input_ids, position_ids=depth))
    if kind == "electra" and model.config.embedding_size != model.config.hidden_size:
        return cast(Tensor, inner.embeddings_project(states))
    return states


def run_blocks(
    model: PreTrainedModel,
    states: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    *,
    first: int,
    last: int,
    key_ids: Tensor | None = None,
    reading: KeysValues | None = None,
) -> Tensor:
    """Returns what leaves block `last - 1` when `states` (R, T, H) enter block `first`.

    Args:
        model: The causal-LM class of a decoder, or an encoder.
        states: (R, T, H).
        mask: (R, 1, T, P) additive.
        position_ids: (R, T) depths.
        first: Index of a block.
        last: One past the index of a block; the norm behind the last block is not applied.
        key_ids: See `layer_masks`.
        reading: Gives the keys and values of the P tokens that may be seen; for decoders. None:
            they are those of the T tokens.
    """
    config, stack = model.config, blocks(model)
    masks = layer_masks(config, mask, position_ids, key_ids)
    depth = positions(config, position_ids)
    rotary: dict[str, Any] = {}
    for index in range(first, last):
        kind = config.layer_types[index] if isinstance(masks, dict) else ""
        own = masks[kind] if isinstance(masks, dict) else masks
        if config.model_type not in DECODERS:
            states = stack[index](states, own)
            continue
        if kind not in rotary:
            rotary[kind] = _rotary(model, states, depth, kind)
        states = stack[index](
            states,
            attention_mask=own,
            position_ids=depth,
            position_embeddings=rotary[kind],
            past_key_values=reading,
            use_cache=False,
        )
    return states


def final_norm(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Returns the states after the norm that decoders have behind their last block."""
    if model.config.model_type in DECODERS:
        return cast(Tensor, model.base_model.norm(states))
    return states


def final_norm_path(model: PreTrainedModel) -> str | None:
    """Returns the path of the norm that decoders have behind their last block; None: no such."""
    return f"{model.base_model_prefix}.norm" if model.config.model_type in DECODERS else None


def _rotary(model: PreTrainedModel, states: Tensor, depth: Tensor, kind: str) -> Any:  # noqa: ANN401
    embedding = model.base_model.rotary_emb
    if model.config.model_type == "gemma3_text":  # the base frequency is the layer type's own
        return embedding(states, depth, kind)
    return embedding(states, depth)

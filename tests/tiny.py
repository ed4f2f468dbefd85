"""A random model of each supported architecture, small enough to be made in every test."""

import torch
import transformers

from peftrank import _architectures

DECODERS = {
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma3_text": ("Gemma3", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "phi3": ("Phi3", {"sliding_window": 4}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "smollm3": ("SmolLM3", {}),
}
ENCODERS = {
    "bert": ("Bert", {}),
    "camembert": ("Camembert", {}),
    "distilbert": ("DistilBert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "electra": ("Electra", {"embedding_size": 16}),
    "roberta": ("Roberta", {}),
    "xlm-roberta": ("XLMRoberta", {}),
}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}


def tiny_model(kind, vocab_size, **changes):
    """A random 2-layer model of a kind, float32, from a fixed seed."""
    decoder = kind in DECODERS
    stem, own = (DECODERS if decoder else ENCODERS)[kind]
    shape = {**_SHAPE, **({"num_key_value_heads": 2} if decoder else {}), **own, **changes}
    if kind == "distilbert":
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            del shape[key]
    config_name = "Gemma3TextConfig" if kind == "gemma3_text" else f"{stem}Config"
    config = getattr(transformers, config_name)(
        vocab_size=vocab_size, attn_implementation="sdpa", **shape
    )
    model = getattr(transformers, f"{stem}ForCausalLM" if decoder else f"{stem}Model")
    extra = {"add_pooling_layer": False} if kind in _architectures.POOLED else {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model(config, **extra).eval()

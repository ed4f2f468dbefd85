"""The base: the shared pretrained model, frozen, that every adapter belongs to.

Loads a decoder or an encoder by alias, path or Hub id, quantized or not, and runs it under a mask
that the caller made. It does not know slates, prompts, adapters or training. Where checkpoints
come from and how they are cached is in `_checkpoints`; how architectures differ is in
`_architectures`. Models run with PyTorch's scaled-dot-product attention: it is exact for any
additive mask, which FlashAttention is not.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from peftrank import _checkpoints
from peftrank._architectures import (
    DECODERS,
    POOLED,
    KeysValues,
    blocks,
    check_architecture,
    embed,
    final_norm,
    final_norm_path,
    layer_masks,
    max_depth,
    positions,
    run_blocks,
)
from peftrank._checkpoints import Checkpoint
from peftrank.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
QUANTIZATIONS = ("nf4", "fp4", "int8", "none", "stored")
_PACKAGES = {"gptq": "gptqmodel and optimum", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}
"""What transformers loads a stored quantization with, of those that adapters were run on."""
_COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BaseIdentity:
    """What an adapter must match to be loaded, and how the base was loaded."""

    name: str
    """As the user gave it: alias, path or Hub id."""
    model_id: str
    """Hub id, or the path of a local base."""
    revision: str | None
    """Commit on the Hub; None if the weights came from a path or a package."""
    fingerprint: str
    """Of the stored weights before quantization: see `_checkpoints.weights_fingerprint`."""
    tokenizer_hash: str
    quantization: str
    double_quant: bool
    quantize_embeddings: bool
    compute_dtype: str
    architecture: str
    """The model type of its config: `llama`, `bert`, ..."""


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen pretrained model in eval mode, with its tokenizer.

    PEFT injects adapters into `model` in place; `hidden_states` then runs with them.
    """

    model: PreTrainedModel
    """The causal-LM class for decoders, the plain encoder for BERT types."""
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity
    is_decoder: bool
    hidden_size: int
    num_layers: int
    max_depth: int
    """Greatest number of tokens from the root to a leaf of a prompt tree."""
    pad_token_id: int
    """What packing fills rows with. Nothing attends to it, so its value does not matter."""
    compute_dtype: torch.dtype
    _own_tensors: frozenset[str] = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return cast(torch.device, self.model.device)

    @property
    def lm_head(self) -> Tensor | None:
        """(V, H) weight of the vocabulary head, tied or not; None for encoders.

        Packed embeddings are dequantized anew each time; keep only the rows that are read.

        Raises:
            BaseModelError: a stored checkpoint has it quantized.
        """
        if not self.is_decoder:
            return None
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise BaseModelError(
                f"the vocabulary head of {self.identity.name} is a quantized "
                f"{type(head).__name__}, whose rows cannot be read. Get a checkpoint whose lm_head "
                "is not quantized."
            )
        return weight

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return blocks(self.model)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """Returns the last hidden states (R, T, H), after the final norm, without the LM head.

        Args:
            input_ids: (R, T) long.
            attention_mask: (R, 1, T, T) additive, `finfo.min` where attention is not allowed.
                A sliding-window layer also hides keys whose depth is a window or more above.
            position_ids: (R, T) long depths from 0, smaller than `max_depth`.
        """
        _check_mask(attention_mask)
        extra = {"use_cache": False} if self.is_decoder else {}
        # `base_model` is the module inside a causal-LM class, and an encoder itself.
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=layer_masks(self.model.config, attention_mask, position_ids),
            position_ids=positions(self.model.config, position_ids),
            **extra,
        )
        return cast(Tensor, output.last_hidden_state)

    @property
    def constant_layers(self) -> int:
        """How many blocks stand below the first that holds or trains anything but the frozen base.

        What leaves them depends on the tokens alone. 0 if something outside the blocks was added
        or trains, for it might change what enters the first; but not the norm behind them.
        """
        block_of = {id(p): i for i, block in enumerate(self.layers) for p in block.parameters()}
        if behind := final_norm_path(self.model):
            norm = self.model.get_submodule(behind)
            block_of |= {id(p): self.num_layers for p in norm.parameters()}
        changed = (
            block_of.get(id(parameter), 0)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or name.replace(".base_layer", "") not in self._own_tensors
        )
        return min(changed, default=self.num_layers)

    def states_below(
        self, layer: int, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """Returns the hidden states (R, T, H) that enter block `layer`; see `hidden_states`."""
        _check_mask(attention_mask)
        states = embed(self.model, input_ids, position_ids)
        return run_blocks(self.model, states, attention_mask, position_ids, first=0, last=layer)

    def states_above(
        self, layer: int, states: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """Returns the last hidden states when `states` (R, T, H) enter block `layer`.

        With what `states_below` returns it is what `hidden_states` returns.
        """
        _check_mask(attention_mask)
        last = self.num_layers
        states = run_blocks(
            self.model, states, attention_mask, position_ids, first=layer, last=last
        )
        return final_norm(self.model, states)

    def states_reading(
        self,
        reading: KeysValues,
        key_ids: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
    ) -> Tensor:
        """Returns the last hidden states (R, T, H) of tokens that see keys from elsewhere.

        Args:
            reading: Is shown the keys and values of the tokens, and gives those that they see.
            key_ids: (R, P) long depths of what may be seen.
            input_ids: (R, T) long.
            attention_mask: (R, 1, T, P) additive.
            position_ids: (R, T) long depths.
        """
        _check_mask(attention_mask)
        states = run_blocks(
            self.model,
            embed(self.model, input_ids, position_ids),
            attention_mask,
            position_ids,
            first=0,
            last=self.num_layers,
            key_ids=key_ids,
            reading=reading,
        )
        return final_norm(self.model, states)

    def state_hash(self) -> str:
        """Returns a sha256 of the base's own tensors, leaving out adapters injected by PEFT."""
        return state_hash(self.model, only=self._own_tensors)


def load_base(
    name: str = "smollm2-135m",
    *,
    quantization: str = "nf4",
    double_quant: bool = True,
    quantize_embeddings: bool = False,
    compute_dtype: str = "auto",
    revision: str | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
) -> Base:
    """Returns a base, frozen and in eval mode.

    The first quantized load keeps the quantized weights in the cache; later ones read them.

    Args:
        name: An alias of bases.yaml, a local folder or .gguf file, or a Hub id.
        quantization: nf4 or fp4 (QLoRA, arXiv 2305.14314), int8 (arXiv 2208.07339), none, or
            stored: as the checkpoint itself is quantized (GPTQ, AWQ, bitsandbytes).
        double_quant: For nf4 and fp4: quantize the quantization constants too.
        quantize_embeddings: For nf4 and fp4: the token embeddings and the vocabulary head too,
            which bitsandbytes leaves whole. Of a small model they are most of what is left.
        compute_dtype: auto, float32, bfloat16 or float16. auto: bfloat16 where the device computes
            it natively, else float32.
        revision: Branch, tag or commit on the Hub.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        cache_dir: Where converted and quantized weights are kept. Default: $PEFTRANK_CACHE, else
            ~/.cache/peftrank.

    Raises:
        ConfigError: an option has an unknown value, or does not fit how the checkpoint is stored.
        BaseModelError: the base cannot be found, or is of a kind that is not supported.
    """
    _check_option("quantization", quantization, QUANTIZATIONS)
    if quantize_embeddings and quantization not in ("nf4", "fp4"):
        raise ConfigError(
            f"quantize_embeddings is for quantization nf4 and fp4, and this is {quantization}."
        )
    _check_option("compute_dtype", compute_dtype, _COMPUTE_DTYPES)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers fork after its use
    _bound_kernel_caches()
    _keep_freed_memory()
    place = _device(device)
    dtype = native_dtype(place) if compute_dtype == "auto" else getattr(torch, compute_dtype)
    with _checkpoints.quiet_loading():
        checkpoint = _checkpoints.find_checkpoint(name, revision, cache_dir)
        config = _checkpoints.read_json(checkpoint.folder / "config.json")
        kind = check_architecture(name, config)
        _check_stored(name, config.get("quantization_config"), quantization)
        double_quant = double_quant and quantization in ("nf4", "fp4")
        settings = _quantization_config(quantization, double_quant, dtype)
        if settings is None:
            model = _load_model(checkpoint.folder, kind, dtype, place, None)
            _keep_weights_unpacked(model)
        else:
            scheme = f"{quantization}{'-double' if double_quant else ''}"
            root = _checkpoints.cache_root(cache_dir)
            model = _load_quantized(checkpoint, kind, dtype, place, settings, root, scheme)
        if quantize_embeddings:
            from peftrank._packed_embedding import pack_embeddings

            pack_embeddings(model, quantization)
        tokenizer = _checkpoints.read_tokenizer(checkpoint.folder)
    identity = BaseIdentity(
        name=name,
        model_id=checkpoint.model_id,
        revision=checkpoint.revision,
        fingerprint=checkpoint.fingerprint,
        tokenizer_hash=_checkpoints.tokenizer_fingerprint(tokenizer),
        quantization=quantization,
        double_quant=double_quant,
        quantize_embeddings=quantize_embeddings,
        compute_dtype=str(dtype).removeprefix("torch."),
        architecture=kind,
    )
    return _wrap(model, tokenizer, identity, dtype)


def stored_weights(name: str, *, revision: str | None = None) -> Mapping[str, Tensor]:
    """Returns a base's weights as they were before any quantization, memory-mapped.

    Raises:
        BaseModelError: the base cannot be found.
    """
    return _checkpoints.stored_weights(_checkpoints.find_checkpoint(name, revision, None).folder)


def load_tokenizer(
    name: str = "smollm2-135m", *, revision: str | None = None, cache_dir: Path | None = None
) -> tuple[PreTrainedTokenizerBase, int]:
    """Returns a base's tokenizer and `max_depth` without loading its weights; see `load_base`.

    Raises:
        BaseModelError: the base cannot be found, or is of a kind that is not supported.
    """
    with _checkpoints.quiet_loading():
        folder = _checkpoints.find_checkpoint(name, revision, cache_dir).folder
        check_architecture(name, _checkpoints.read_json(folder / "config.json"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
        tokenizer = _checkpoints.read_tokenizer(folder)
    return tokenizer, max_depth(config)


def base_from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str
) -> Base:
    """Wraps a model that is already in memory. Freezes it and puts it in eval mode.

    Args:
        model: A causal-LM class of a supported decoder, or a plain supported encoder.
        tokenizer: The tokenizer it was trained with.
        name: What adapters will record as their base.

    Raises:
        BaseModelError: the architecture or its attention implementation is not supported.
    """
    _bound_kernel_caches()
    _keep_freed_memory()
    config = model.config
    kind = check_architecture(name, config.to_dict())
    if config._attn_implementation not in ("sdpa", "eager"):
        raise BaseModelError(
            f"{name} uses {config._attn_implementation} attention, which does not follow a 4-D "
            'mask. Make the model with attn_implementation="sdpa".'
        )
    if kind in DECODERS and model.base_model is model:
        raise BaseModelError(
            f"{name} is a {type(model).__name__} without a vocabulary head. Load decoders with "
            "their ...ForCausalLM class, so that adapters fit other PEFT tools."
        )
    dtype = model.get_input_embeddings().weight.dtype
    identity = BaseIdentity(
        name=name,
        model_id=name,
        revision=None,
        fingerprint=_checkpoints.model_fingerprint(model),
        tokenizer_hash=_checkpoints.tokenizer_fingerprint(tokenizer),
        quantization="none",
        double_quant=False,
        quantize_embeddings=False,
        compute_dtype=str(dtype).removeprefix("torch."),
        architecture=kind,
    )
    return _wrap(model, tokenizer, identity, dtype)


def state_hash(model: nn.Module, *, only: frozenset[str] | None = None) -> str:
    """Returns a sha256 over every parameter, buffer and quantization state, in name order.

    PEFT's `.base_layer` is left out of names, so that wrapping a layer changes nothing.

    Args:
        model: Any module; nothing in it is changed.
        only: Names to cover; None = all.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        if only is None or name in only:
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(data.numpy().data)
    return digest.hexdigest()


def _wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    identity: BaseIdentity,
    dtype: torch.dtype,
) -> Base:
    model.requires_grad_(False)
    model.eval()
    remove_dropout(model)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Base(
        model=model,
        tokenizer=tokenizer,
        identity=identity,
        is_decoder=identity.architecture in DECODERS,
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
        max_depth=max_depth(model.config.to_dict()),
        pad_token_id=next(i for i in ids if i is not None),
        compute_dtype=dtype,
        _own_tensors=frozenset(_tensors(model)),
    )


def _bound_kernel_caches() -> None:
    """Bounds what PyTorch keeps on a CPU for each shape that it has multiplied.

    oneDNN and the layer above it keep the last 1,024 compiled products each, up to 0.8 MB apiece,
    and packed rows seldom have the same length twice: a training grew by 32 MB a step. A pass needs
    a few dozen. Both read the variable at the first product; what the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 256 MB of what was freed, instead of giving it back at once.

    A pass on a CPU frees tensors of a few MB and asks for as many again. Fetching each page anew
    from the system took a tenth of the time. What the user has set stays.
    """
    names = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"
    if any(name in os.environ for name in names) or not sys.platform.startswith("linux"):
        return
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "gnu_get_libc_version") and hasattr(allocator, "mallopt"):
        for option, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**28)):
            allocator.mallopt(option, value)


def remove_dropout(model: nn.Module) -> None:
    """Switches the base's own dropout off for good, also in train mode; adapters have their own.

    Noise in frozen layers would make gradients depend on how slates are packed into rows, and
    attention dropout forces the unfused kernel, several times slower.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # a plain number in Llama's


def _load_model(
    folder: Path,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    settings: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    from transformers import AutoModel, AutoModelForCausalLM

    factory = AutoModelForCausalLM if kind in DECODERS else AutoModel
    # An unused pooler would be given an adapter that never gets a gradient.
    extra: dict[str, Any] = {"add_pooling_layer": False} if kind in POOLED else {}
    if settings is not None:  # None itself would hide that stored weights are quantized
        extra["quantization_config"] = settings
    try:
        model, report = factory.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **extra,
        )
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise BaseModelError(f"cannot load the model in {folder}: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise BaseModelError(
            f"the weights in {folder} lack {len(report['missing_keys'])} tensors ({missing}, ...), "
            "which would be random. Get a complete checkpoint."
        )
    return cast("PreTrainedModel", model)


def _load_quantized(
    checkpoint: Checkpoint,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    settings: BitsAndBytesConfig,
    root: Path,
    scheme: str,
) -> PreTrainedModel:
    """Loads from the cache of quantized weights, filling it the first time."""
    version = importlib.metadata.version("bitsandbytes")
    key = f"{_checkpoints.stamp(checkpoint.folder)}-{scheme}-{dtype}-{device.type}-{version}"
    folder = root / "quantized" / key.replace("torch.", "")
    if not folder.is_dir():
        model = _load_model(checkpoint.folder, kind, dtype, device, settings)
        _checkpoints.publish(folder, model.save_pretrained)
    # Read back even the first time: every load then gives the same tensors.
    model = _load_model(folder, kind, dtype, device, None)
    _keep_weights_unpacked(model)
    return model


def _keep_weights_unpacked(model: nn.Module) -> None:
    """Stops 4-bit layers from repacking their weights in place in the first no-grad forward.

    On CPUs with AVX512-BF16 that would leave a later training without gradients, and whatever
    shares the weights with wrong scores (bitsandbytes nn/modules.py, Linear4bit.forward).
    """
    if not getattr(model, "is_quantized", False):
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization_config(
    quantization: str, double_quant: bool, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    from transformers import BitsAndBytesConfig

    # Token readouts read rows of the vocabulary head, so it stays as it is.
    if quantization in ("none", "stored"):
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )


def _check_stored(name: str, stored: Any, quantization: str) -> None:  # noqa: ANN401 - of a file
    """Raises unless `quantization` fits what a checkpoint's config says of its weights."""
    if stored is None:
        if quantization == "stored":
            raise ConfigError(
                f"quantization is stored, but the weights of {name} are stored unquantized. Use "
                "nf4, fp4, int8 or none."
            )
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method not in _PACKAGES:
        raise BaseModelError(
            f"{name} is stored quantized by {method!r}, on which adapters were never run here. "
            f"Supported: {', '.join(_PACKAGES)}, or an unquantized checkpoint of the same model."
        )
    if quantization != "stored":
        raise ConfigError(
            f"quantization is {quantization}, but {name} is stored quantized ({method}). Use "
            f"quantization stored, which needs {_PACKAGES[method]}, or an unquantized checkpoint "
            "of the same model."
        )


def _check_mask(mask: Tensor) -> None:
    if mask.dim() != 4 or not mask.is_floating_point():
        raise BaseModelError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}; expected an additive "
            "floating-point mask (R, 1, T, T), as attention_mask() makes it."
        )


def _check_option(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}; expected one of {', '.join(allowed)}.")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device {name!r} was asked for, but PyTorch sees no GPU. Use cpu.")
    return device


def native_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where a device computes it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters, buffers and bitsandbytes' quantization state by their unwrapped name."""
    named = {**dict(model.named_buffers()), **model.state_dict()}
    return {
        name.replace(".base_layer", ""): value
        for name, value in named.items()
        if isinstance(value, Tensor)
    }

"""What several processes divide among them and put together again; nothing else is distributed.

Each process holds the whole adapter and readout and reads its share of a batch's slates. One
all-reduce a step adds up the gradients, so weights, optimizer and AdaLoRA's ranks stay the same in
all, and a checkpoint does not depend on how many they were. As only the adapter trains, that is all
that DistributedDataParallel or an optimizer of ZeRO would do here.

What is large is the base. It is whole in every process, or its blocks are sharded, by FSDP2 or by
DeepSpeed's ZeRO-3: each process keeps a part of every weight, and a pass gathers one block at a
time. Such a pass needs all processes, so all make equally many.

Accelerate's launcher starts the processes and says whether to shard. Accelerate itself is not told:
it would shard the adapter too, and PEFT's AdaLoRA cannot prune sharded parameters.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import Tensor, distributed, nn

from peftrank.base import Base
from peftrank.config import TrainingConfig
from peftrank.errors import ConfigError
from peftrank.types import Slate

Sharding = Literal["fsdp2", "zero3"]

_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_REFUSED_FSDP = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading: true",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: true",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: true",
}


def start_accelerator(training: TrainingConfig, folder: Path) -> Accelerator:
    """Returns accelerate's view of this process among the others.

    Raises:
        ConfigError: the launcher or the precision asks for what is not supported here.
    """
    _refuse(_REFUSED)
    wanted = training.mixed_precision
    whole = patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false")
    try:
        with whole:
            return Accelerator(
                # Otherwise several processes without a GPU would each train alone.
                cpu=not torch.accelerator.is_available(),
                mixed_precision="no" if wanted == "auto" else wanted,
                log_with=list(training.trackers) or None,
                project_dir=str(folder) if training.trackers else None,
            )
    except ValueError as error:
        raise ConfigError(
            f"training.mixed_precision={wanted} is not possible here. A process keeps the "
            f"precision of its first training, and fp16 needs a GPU. Accelerate says: {error}"
        ) from error


def sharding(quantization: str, method: str, options: Mapping[str, Any]) -> Sharding | None:
    """Returns how accelerate's launcher was told to shard the base; None: it stays whole.

    Args:
        quantization: Of the base.
        method: Its name.
        options: The method's.

    Raises:
        ConfigError: the launcher's settings are not supported, or not with this base or method.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _refuse(_REFUSED_FSDP)
        if os.environ.get("FSDP_VERSION") != "2":
            raise ConfigError(
                "accelerate was launched with FSDP version 1, which cannot leave the adapter "
                "whole. Set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does."
            )
        _check_shardable("fsdp2", quantization, method, options)
        return "fsdp2"
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise ConfigError(
                "accelerate was launched with deepspeed_config_file. Of DeepSpeed only the "
                "sharding of the base is used; say zero_stage in accelerate's own configuration, "
                "as configs/accelerate/deepspeed.yaml does."
            )
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            _check_shardable("zero3", quantization, method, options)
            return "zero3"
    return None


def shard_fsdp2(base: Base, adapter: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Leaves a part of each block's weights in this process, for good, and all else whole.

    What stands before and behind the blocks is whole because readouts use the vocabulary head.

    Args:
        base: With the adapter in it. On the CPU, no GPU ever has to hold all of it.
        adapter: Its parameters, which stay whole.
        accelerator: Its device computes.

    Raises:
        ConfigError: the base is sharded already, or computes something else when it is sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _check_whole(base)
    device = accelerator.device
    quantized = base.identity.quantization != "none"
    before = _probe(base) if quantized else None
    keep = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "").lower() == "false"
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not keep}
    for block in base.layers:
        fully_shard(block, ignored_params=set(adapter), **options)
    whole = {p for p in base.model.parameters() if not isinstance(p, distributed.tensor.DTensor)}
    for tensor in (*whole, *base.model.buffers()):
        tensor.data = tensor.data.to(device)
    # A common root, which holds nothing itself, lets a block be gathered while another computes.
    fully_shard(base.model.base_model, ignored_params=whole, **options)
    if before is not None:
        _check_unchanged(before, _probe(base))


def shard_zero3(base: Base, accelerator: Accelerator) -> None:
    """Does with DeepSpeed what `shard_fsdp2` does, before an adapter is in the base.

    Raises:
        ConfigError: DeepSpeed is not installed, or the base is sharded already.
    """
    _check_whole(base)
    try:
        deepspeed: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            "accelerate was launched with DeepSpeed, which is not installed: pip install deepspeed"
        ) from error
    engine, *_ = deepspeed.initialize(
        model=base.layers,
        config={
            "train_micro_batch_size_per_gpu": 1,  # must be said, and is not used
            "zero_optimization": {"stage": 3},
        },
        dist_init_required=False,
    )
    for tensor in _weights(base):
        if "ds_id" not in vars(tensor):
            tensor.data = tensor.data.to(accelerator.device)
    # Blocks have no forward in common that would tell DeepSpeed where a pass begins.
    coordinator = engine.optimizer.get_param_coordinator()
    base.model.base_model.register_forward_pre_hook(lambda *_: coordinator.reset_step())


def share(slates: Sequence[Slate], accelerator: Accelerator) -> Sequence[Slate]:
    """Returns this process's slates: neighbours, which may be one user's and share a history.

    Every slate is in one share, and shares differ by at most one slate; there may be none in it.
    """
    return slates[own(len(slates), accelerator)]


def own(count: int, accelerator: Accelerator) -> slice:
    """Returns which of `count` slates are this process's share."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    return slice(count * rank // processes, count * (rank + 1) // processes)


def broadcast(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Makes tensors in all processes what they are in the first, in place."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def add_up_gradients(parameters: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replaces every gradient by its sum over all processes.

    One that no process has stays None.
    """
    if accelerator.num_processes == 1:
        return
    here = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    summed = torch.cat([here, *(gradient.flatten() for gradient in flat)])
    distributed.all_reduce(summed)
    sizes = [len(parameters), *(p.numel() for p in parameters)]
    had, *gradients = torch.split(summed, sizes)
    for parameter, count, gradient in zip(parameters, had.tolist(), gradients, strict=True):
        parameter.grad = gradient.view_as(parameter) if count else None


def add_up(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Returns the sum over all processes of each value."""
    if accelerator.num_processes == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    distributed.all_reduce(summed)
    found: list[float] = summed.tolist()
    return found


def largest(value: int, accelerator: Accelerator) -> int:
    """Returns the largest value of any process."""
    if accelerator.num_processes == 1:
        return value
    found = torch.tensor(value, device=accelerator.device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def _refuse(settings: Mapping[str, str]) -> None:
    for variable, key in settings.items():
        if parse_flag_from_env(variable):
            raise ConfigError(
                f"accelerate was launched with {key}, which training does not support. Leave it "
                "out; configs/accelerate/ has configurations that work."
            )


def _check_shardable(
    kind: Sharding, quantization: str, method: str, options: Mapping[str, Any]
) -> None:
    whole = "Keep the base whole in each process with configs/accelerate/ddp.yaml"
    if options.get("init") in ("eva", "loftq"):
        raise ConfigError(
            f"method.init={options['init']} starts with the whole base in each process, and {kind} "
            f"shards it before. {whole}."
        )
    if quantization in ("int8", "stored") or (quantization != "none" and kind == "zero3"):
        raise ConfigError(
            f"{kind} cannot shard a base with quantization {quantization}: its layers keep what "
            f"belongs to a weight beside it. {whole}, or set base.quantization=none."
        )
    reads_weights, everywhere = None, bool(options.get("dora"))
    if method.startswith("peft:"):
        reads_weights, everywhere = f"method {method}", True
    elif method in ("full", "top_layers"):
        reads_weights, everywhere = f"method {method}", True
    elif options.get("dora"):
        reads_weights = "method.dora=true"
    elif kind == "zero3" and options.get("init") in ("pissa", "olora"):
        reads_weights = f"method.init={options['init']}"
    elif kind == "zero3" and method == "adapter":
        reads_weights = "method adapter"
    if reads_weights:
        raise ConfigError(
            f"{reads_weights} looks at whole weights of the base, which {kind} shards. {whole}"
            f"{', or shard it with configs/accelerate/fsdp2.yaml' * (not everywhere)}."
        )


def _check_whole(base: Base) -> None:
    if any(isinstance(p, distributed.tensor.DTensor) or "ds_id" in vars(p) for p in _weights(base)):
        raise ConfigError(
            "this base was sharded by an earlier training and stays so. Load it anew for the next."
        )


def _weights(base: Base) -> list[Tensor]:
    return [*base.model.parameters(), *base.model.buffers()]


def _probe(base: Base) -> Tensor:
    """Returns what the base makes of a few tokens, on the CPU."""
    base.model.eval()  # no dropout
    ids = torch.arange(16, device=base.device)[None]
    mask = torch.zeros(1, 1, 16, 16, dtype=base.compute_dtype, device=base.device)
    with torch.no_grad():
        return base.hidden_states(ids, mask, ids).float().cpu()


def _check_unchanged(before: Tensor, after: Tensor) -> None:
    # Sharding has made quantized weights noise without an error, in some versions of the libraries.
    worst = float((before - after).abs().max())
    if not worst <= 1e-2 * float(before.abs().max()):
        raise ConfigError(
            f"the quantized base computes something else once FSDP2 has sharded it (hidden states "
            f"differ by up to {worst:.3g}): these versions of bitsandbytes and PyTorch do not go "
            "together there. Keep the base whole in each process with configs/accelerate/ddp.yaml, "
            "or set base.quantization=none."
        )

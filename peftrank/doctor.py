"""What works on this machine, and how much memory a training will take, before anything loads.

Activations are not guessed: the very pass that training would run (base, method, readout, loss and
the largest batch of the first steps) runs on fake tensors, which have shapes and no data, while
every storage that comes and goes is counted. Weights, gradients and AdamW's moments are counted
from the same model. The base's stored size follows from its quantization.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from peftrank import plugins
from peftrank._architectures import DECODERS, max_depth
from peftrank._checkpoints import config_source
from peftrank.base import Base, BaseIdentity, load_tokenizer, native_dtype, remove_dropout
from peftrank.config import Config, override
from peftrank.errors import BaseModelError, ConfigError, PeftRankError
from peftrank.model import Entering, RankingModel
from peftrank.prompts import (
    PromptTemplate,
    feature_tensor,
    micro_batches,
    pack,
    task_tensor,
    token_count,
)
from peftrank.training.bottom import lowest_adapted
from peftrank.training.data import feature_names, open_part, step_batches
from peftrank.training.distributed import sharding
from peftrank.training.facts import facts
from peftrank.training.objective import head_scores, objective
from peftrank.training.optimizers import state_bytes
from peftrank.training.run import checkpoint_blocks, prompt_arguments
from peftrank.types import Batch, Slate

_STEPS = 20
"""Steps whose batches are looked at for the largest pass."""
_ROW_TOKENS = 512
_FEWEST_TOKENS, _MOST_TOKENS = 128, 16_384
FREE_SHARE = 0.8
"""How much of the free memory `training.micro_tokens: auto` plans with. Plans were 1% below to 18%
above what trainings took (`benchmarks.memory`), and later slates may be longer than the first."""
_HEAP_FACTOR, _HEAP_BYTES = 1.65, 220 * 2**20
"""What glibc's heap holds beyond what is in use, as `benchmarks.memory` measured."""
_LIBRARIES = 440 * 2**20
"""Python with torch, transformers and PEFT imported, on Linux, as measured."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training process at its peak."""

    base: int
    """Stored weights of the base, its share of them where they are sharded."""
    adapter: int
    """Adapter and readout weights, float32."""
    gradients: int
    optimizer: int
    """What the optimizer keeps: of AdamW two moments."""
    activations: int
    """Most that is alive in a forward and backward pass beside all of the above."""
    copies: int
    """On a CPU: the best weights so far, and what a checkpoint takes while it is written, beyond
    the gradients and activations that are gone by then. On a GPU these are in host memory."""
    kept: int
    """Of the states that enter the lowest adapted layer, what stays in memory."""
    gathered: int
    """Of sharded layers, those that are whole for the moment."""
    process: int
    """On a CPU: libraries, and what the heap keeps; on a GPU nothing is known of them here."""
    rows: int
    tokens: int
    """Rows and tokens per row of the largest pass."""
    measured: bool
    """Whether that pass was packed from the training slates; else rows are full."""

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.base, self.adapter, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.copies + self.kept + self.gathered + self.process

    def as_json(self) -> dict[str, Any]:
        """Returns the plan with its total."""
        return {**asdict(self), "total": self.total}


def memory_plan(
    config: Config,
    *,
    device: str = "cpu",
    processes: int = 1,
    sharded: bool = False,
    architecture: Path | None = None,
    slates: Sequence[Slate] | None = None,
) -> MemoryPlan:
    """Returns the memory that a training with this configuration takes, per process.

    Args:
        config: The run. Its slates are read if they are there; otherwise rows are taken as full.
        device: cpu or cuda.
        processes: How many share the base's weights, if they are sharded.
        sharded: FSDP2: each process holds its share of the base, and whole layers one at a time.
        architecture: A config.json to use in place of `config.base.name`, for a base that is not
            here.
        slates: Those that would be read; absent: they are.

    Raises:
        BaseModelError: the base's architecture is not known or not supported.
        ConfigError: the readout's memory depends on the texts themselves.
    """
    values, dtype = _architecture(config, architecture), _dtype(config, device)
    with torch.device("meta"):
        base = _hollow_base(values, dtype, config)
        outside, weights, constants = _stored_bytes(base, config)
        block = weights // len(base.layers)
        data = ("init", "rho")  # a start that needs weights or slates, with as many parameters
        options = {k: v for k, v in config.method.options.items() if k not in data}
        method = plugins.load("methods", config.method.name)(total_steps=1000, **options)
        peft.get_peft_model(base.model, method.config(base.model))
        layer = None if config.training.bottom_cache == "off" else lowest_adapted(base)
    tokenizer = _tokenizer(config, architecture)
    names, batch, slate_tokens = _largest_pass(config, base, tokenizer, slates)
    with torch.device("meta"):
        readout = plugins.load("readouts", config.readout.name).build(
            base.hidden_size,
            tokenizer or _NoTokenizer(config.readout.name),
            base.lm_head,
            feature_names=names,
            **config.readout.options,
        )
        model = RankingModel(base, readout).train()
    if config.training.gradient_checkpointing:
        checkpoint_blocks(base)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    trained = sum(sizes)
    peak = _pass_peak(model, batch, config, layer)
    peak -= 4 * trained  # the gradients are counted by themselves
    if config.base.quantization != "none":
        largest = max(m.weight.numel() for m in base.model.modules() if isinstance(m, nn.Linear))
        peak += largest * dtype.itemsize  # one weight at a time is dequantized
    optimizer = state_bytes(config.training, sizes)
    return MemoryPlan(
        base=outside + constants + (weights // processes if sharded else weights),
        adapter=4 * trained,
        gradients=4 * trained,
        optimizer=optimizer,
        activations=peak,
        # A checkpoint holds the weights anew, and the optimizer's state twice to serialize it.
        copies=4 * trained + max(0, 2 * optimizer - peak) if device == "cpu" else 0,
        kept=_kept_bytes(config, base, slate_tokens),
        gathered=2 * block if sharded else 0,
        process=0 if device != "cpu" else _LIBRARIES + _HEAP_BYTES + int((_HEAP_FACTOR - 1) * peak),
        rows=batch.input_ids.shape[0],
        tokens=batch.input_ids.shape[1],
        measured=slate_tokens is not None,
    )


def settled(config: Config, *, device: str | None = None) -> Config:
    """Returns the configuration with a number in place of `training.micro_tokens: auto`.

    It is the largest power of two, up to 16,384, with which a training whose passes are full is
    planned to take at most FREE_SHARE of the memory that is free now.

    Args:
        config: One that has a number is returned as it is.
        device: cpu or cuda; absent: what training will use.

    Raises:
        ConfigError: even a pass of one slate is planned to take more, or what is free or needed
            cannot be told.
        BaseModelError: see `memory_plan`.
    """
    if config.training.micro_tokens != "auto":
        return config
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sharded = sharding(config.base.quantization, config.method.name, config.method.options)
    room = int(FREE_SHARE * free_memory(device))
    slates = _train_slates(config)
    tokens = _MOST_TOKENS
    while True:
        fitted = override(config, {"training.micro_tokens": tokens}, source="auto")
        plan = memory_plan(
            fitted,
            device=device,
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            sharded=sharded is not None,
            slates=slates,
        )
        largest = plan.rows * plan.tokens
        # A row's length is bounded, so what a pass takes grows with the number of its rows.
        growing = plan.activations * (_HEAP_FACTOR if device == "cpu" else 1.0)
        full = plan.total + growing * max(0.0, tokens / largest - 1.0)
        if full <= room:
            return fitted
        if tokens < largest or tokens == _FEWEST_TOKENS:  # a slate is never cut
            raise ConfigError(
                f"training.micro_tokens=auto finds no number: with passes of {largest} tokens a "
                f"training is planned to take {plan.total / 2**20:,.0f} MiB, and "
                f"{room / 2**20:,.0f} MiB may be used ({FREE_SHARE:.0%} of what is free). Free "
                "some, adapt fewer layers (method.layers: top-K), set "
                "training.gradient_checkpointing: true, or set a number to try it all the same."
            )
        fits = largest * (room - plan.total + growing) / growing
        below = 2 ** int(math.log2(max(1.0, fits)))
        tokens = max(_FEWEST_TOKENS, min(tokens // 2, below))


def free_memory(device: str) -> int:
    """Returns the bytes that this process may still take on a device.

    On a CPU it is what Linux and the control group allow, divided by the processes that the
    launcher started here.

    Raises:
        ConfigError: this system does not tell.
    """
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        return int(torch.cuda.mem_get_info(index)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        free = 1024 * int(values["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            "training.micro_tokens=auto needs to know the free memory, which is read on Linux and "
            "on CUDA devices. Set a number, such as the default, 4096."
        ) from None
    return min([free, *_group_room()]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _group_room(
    root: Path = Path("/sys/fs/cgroup"), groups_file: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Returns what this process's control groups (a container's, a job's) leave, if they limit."""
    names = (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    try:
        groups = groups_file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    inside = {line.split(":", 2)[-1].strip("/") for line in groups} | {""}
    found = []
    for folder, limit, usage, reclaimable in names:
        for path in inside:
            try:
                most = int((folder / path / limit).read_text())
                used = int((folder / path / usage).read_text())
                stat = (folder / path / "memory.stat").read_text().split()
            except (OSError, ValueError):  # no such group, or no limit: "max"
                continue
            cache = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            found.append(max(0, most - used + cache.get(reclaimable, 0)))
    return found


def machine() -> dict[str, Any]:
    """Returns what this machine has and which quantizations train here, each tried on a layer."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if os.name != "nt" else None
    extras = {
        "gguf": "gguf",
        "baselines": "bm25s",
        "report": "matplotlib",
        "tune": "optuna",
        "serve": "fastapi",
        "redis": "redis",
        "ray": "ray",
    }
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "extras": {name: importlib.util.find_spec(m) is not None for name, m in extras.items()},
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "gpus": gpus,
        "device": "cuda" if gpus else "cpu",
        "compute_dtype": str(_native(gpus)).removeprefix("torch."),
        "quantizations": {name: _tried(name, gpus) for name in ("nf4", "fp4", "int8", "none")},
    }


def _native(gpus: list[str]) -> torch.dtype:
    return native_dtype(torch.device("cuda" if gpus else "cpu"))


def _tried(quantization: str, gpus: list[str]) -> str:
    """Returns `works`, or why a small layer could not be computed with and trained through."""
    import bitsandbytes as bnb

    device, dtype = "cuda" if gpus else "cpu", _native(gpus)
    try:
        if quantization == "int8":
            layer: Any = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        elif quantization == "none":
            layer = nn.Linear(64, 64, dtype=dtype)
        else:
            layer = bnb.nn.Linear4bit(64, 64, quant_type=quantization, compute_dtype=dtype)
        layer = layer.to(device).requires_grad_(False)
        x = torch.randn(4, 64, device=device, dtype=dtype, requires_grad=True)
        layer(x).float().square().sum().backward()
        found = x.grad is not None and bool(torch.isfinite(x.grad).all())
    except Exception as error:  # whatever the library raises is the answer
        return str(error).partition("\n")[0] or type(error).__name__
    return "works" if found else "gives no finite gradients"


def _architecture(config: Config, given: Path | None) -> Any:  # noqa: ANN401 - a PretrainedConfig
    source = str(given.parent) if given is not None else config_source(config.base.name)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BaseModelError(
            f"no architecture of base {config.base.name!r}: {reason}. Give a folder with its "
            "config.json."
        ) from error


def _dtype(config: Config, device: str) -> torch.dtype:
    if config.base.compute_dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.base.compute_dtype))
    return torch.bfloat16 if device == "cuda" else native_dtype(torch.device("cpu"))


def _hollow_base(values: Any, dtype: torch.dtype, config: Config) -> Base:  # noqa: ANN401
    """Returns a base without weights, unquantized; to be called under the meta device."""
    decoder = values.model_type in DECODERS
    made = AutoModelForCausalLM if decoder else AutoModel
    model = made.from_config(values, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    model.is_quantized = config.base.quantization != "none"  # for methods that refuse it
    remove_dropout(model)
    known = {f.name: "" for f in fields(BaseIdentity)}
    identity = BaseIdentity(**{**known, "name": config.base.name, "double_quant": False})  # type: ignore[arg-type]
    return Base(
        model=model,
        tokenizer=cast(Any, None),
        identity=identity,
        is_decoder=decoder,
        hidden_size=values.hidden_size,
        num_layers=values.num_hidden_layers,
        max_depth=max_depth(values.to_dict()),
        pad_token_id=0,
        compute_dtype=dtype,
        _own_tensors=frozenset((*model.state_dict(), *dict(model.named_buffers()))),
    )


def _stored_bytes(base: Base, config: Config) -> tuple[int, int, int]:
    """Returns the bytes of the base's weights as bitsandbytes keeps them.

    They are those outside the blocks, the blocks' weights (which may be sharded), and the
    constants of the blocks' quantized weights (which stay whole).
    """
    quantization = config.base.quantization
    stored = getattr(base.model.config, "quantization_config", None)
    if quantization == "stored" and stored is None:
        raise ConfigError(
            f"base.quantization is stored, but {config.base.name} is stored unquantized. Use nf4, "
            "fp4, int8 or none."
        )
    # One constant for 64 weights: 32 bits, or, quantized themselves, 8 bits and 32 for 256 of them.
    packed = {"none": None, "int8": 1.0, "nf4": 0.5, "fp4": 0.5}.get(quantization)
    per_weight = (1 + 4 / 256) / 64 if config.base.double_quant else 4 / 64
    if quantization == "stored":
        packed, per_weight = _stored_rates(stored)
    inside = {id(module) for block in base.layers for module in block.modules()}
    head = base.model.get_output_embeddings() if base.is_decoder else None
    rows = base.model.get_input_embeddings()
    seen: set[int] = set()
    outside = weights = constants = 0.0
    for module in base.model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            linear = isinstance(module, nn.Linear) and module is not head and parameter.dim() == 2
            if config.base.quantize_embeddings and module in (head, rows):
                size, extra = parameter.numel() * (0.5 + 4 / 64), 0.0
            elif packed is None or not linear:
                size, extra = float(parameter.numel() * parameter.dtype.itemsize), 0.0
            elif quantization == "int8":
                size, extra = parameter.numel() * packed, 4.0 * parameter.shape[0]
            else:
                size, extra = parameter.numel() * packed, parameter.numel() * per_weight
            if id(module) in inside:
                weights += size
                constants += extra
            else:
                outside += size + extra
    return int(outside), int(weights), int(constants)


def _stored_rates(stored: Any) -> tuple[float, float]:  # noqa: ANN401 - of a config.json
    """Returns the bytes of a weight and of its constants in a checkpoint that is quantized."""
    given = stored if isinstance(stored, dict) else stored.to_dict()
    if given.get("quant_method") == "bitsandbytes":
        if given.get("load_in_8bit"):
            return 1.0, 0.0
        double = given.get("bnb_4bit_use_double_quant")
        return 0.5, (1 + 4 / 256) / 64 if double else 4 / 64
    bits = given.get("bits", 4)
    group = given.get("group_size", 128)  # a scale in 16 bits and a zero point for so many weights
    return bits / 8, (2 + bits / 8) / group if group > 0 else 0.0


def _kept_bytes(config: Config, base: Base, slate_tokens: int | None) -> int:
    """Returns what `training.bottom_cache=memory` keeps; at most, if no slate was seen."""
    training = config.training
    if training.bottom_cache != "memory":
        return 0
    limit = training.bottom_cache_mib * 2**20
    if slate_tokens is None:
        return limit
    return min(limit, slate_tokens * base.hidden_size * base.compute_dtype.itemsize)


class _NoTokenizer:
    """Stands where a readout is given the base's tokenizer, and most look at none."""

    def __init__(self, readout: str) -> None:
        self.readout = readout

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        raise ConfigError(
            f"readout {self.readout!r} needs the base's tokenizer, which is not here. Plan with "
            "readout.name=score_head."
        )


def _tokenizer(config: Config, architecture: Path | None) -> Any:  # noqa: ANN401
    """Returns the base's tokenizer, None if it is not here."""
    if architecture is not None:
        return None
    try:
        return load_tokenizer(config.base.name, revision=config.base.revision)[0]
    except PeftRankError:
        return None


def _largest_pass(
    config: Config,
    base: Base,
    tokenizer: Any,  # noqa: ANN401
    slates: Sequence[Slate] | None,
) -> tuple[tuple[str, ...], Batch, int | None]:
    """Returns the feature names, the largest pass of the first steps, and the slates' tokens.

    The tokens are those of all slates that training reads, estimated from the first. Without
    slates the pass has full rows and the tokens are None.
    """
    slates = _train_slates(config) if slates is None else slates
    if tokenizer is None or not slates:
        return (), _full_rows(config), None
    names = feature_names(facts(slates).features, config.data.features)
    turn = str(plugins.load("readouts", config.readout.name).turn)
    template = PromptTemplate(
        tokenizer, **prompt_arguments(config), turn=turn, max_depth=base.max_depth
    )
    training, tasks = config.training, tuple(config.loss.tasks or ())
    largest: Batch | None = None
    seen = tokens = 0
    for chosen in step_batches(
        slates,
        training.batch_size,
        together=training.slates_per_user,
        seed=config.seed,
        first_step=0,
        total_steps=min(_STEPS, training.max_steps or _STEPS),
    ):
        ordered = sorted(chosen, key=lambda s: (s.user_id, len(s.history), s.slate_id))
        trees = [template.tree(slate) for slate in ordered]
        seen, tokens = seen + len(trees), tokens + sum(map(token_count, trees))
        for group in micro_batches(trees, _number(config)):
            part = [ordered[i] for i in group]
            batch = pack(
                [trees[i] for i in group],
                pad_token_id=base.pad_token_id,
                labels=[slate.labels for slate in part],
                weights=[slate.weights for slate in part],
                tasks=task_tensor(part, tasks) if tasks else None,
                features=feature_tensor(part, names) if names else None,
            )
            if largest is None or batch.input_ids.numel() > largest.input_ids.numel():
                largest = batch
    assert largest is not None
    return names, largest, tokens * (len(slates) + training.eval_slates) // seen


def _number(config: Config) -> int:
    if config.training.micro_tokens == "auto":
        raise ConfigError(
            "a plan needs training.micro_tokens as a number, not auto: give one, or call "
            "peftrank.doctor.settled(config) on the machine that trains."
        )
    return config.training.micro_tokens


def _train_slates(config: Config) -> Sequence[Slate]:
    """Returns the training part, nothing if it is not here."""
    try:
        return open_part(config.data, config.domain, "train")
    except PeftRankError:
        return ()


def _full_rows(config: Config) -> Batch:
    """Returns a pass that fills `micro_tokens`: a slate of 20 candidates in each row."""
    rows = max(1, _number(config) // _ROW_TOKENS)
    tokens, candidates = min(_ROW_TOKENS, _number(config)), 20
    place = torch.arange(candidates).expand(rows, candidates)
    return Batch(
        input_ids=torch.zeros(rows, tokens, dtype=torch.long),
        position_ids=torch.arange(tokens).expand(rows, tokens).contiguous(),
        segment_ids=torch.zeros(rows, tokens, dtype=torch.long),
        ancestors=torch.ones(rows, 1, 1, dtype=torch.bool),
        row=torch.arange(rows)[:, None].expand(rows, candidates).contiguous(),
        end=(place + 1).contiguous(),
        start=place.contiguous(),
        stop=(place + 1).contiguous(),
        before=(place - 1).contiguous(),
        trunk=torch.zeros(rows, dtype=torch.long),
        mask=torch.ones(rows, candidates, dtype=torch.bool),
        letters=torch.zeros(rows, candidates, dtype=torch.long),
        labels=torch.ones(rows, candidates),
        tasks=torch.ones(rows, candidates, len(config.loss.tasks or ())),
    )


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, until they are let go of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known[storage] = None
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def _pass_peak(model: RankingModel, batch: Batch, config: Config, layer: int | None) -> int:
    """Returns the most bytes that a forward and backward pass has alive beside its weights.

    Args:
        model: On the meta device.
        batch: The pass.
        config: The run; the loss is read.
        layer: The block that kept states enter; None: the pass begins with the tokens.
    """
    minimised = objective(config)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _fake_weights(model):
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        held: dict[str, Any] = {
            k: fake.from_tensor(v) for k, v in tensors.items() if isinstance(v, Tensor)
        }
        batch = replace(batch, **held)
        alive = _Alive()
        for tensor in (*model.parameters(), *model.buffers(), *held.values()):
            alive.known[tensor.untyped_storage()] = None
        with alive:
            entering = None
            if layer is not None:
                shape = (*batch.input_ids.shape, model.base.hidden_size)
                entering = Entering(layer, torch.zeros(shape, dtype=model.base.compute_dtype))
            try:
                scores = head_scores(model, minimised, batch, entering)
            except DataDependentOutputException:
                raise ConfigError(
                    f"the memory of readout {config.readout.name!r} depends on the texts of the "
                    "slates, so doctor cannot plan it. Plan with readout.name=score_head."
                ) from None
            needed = minimised.ranking.takes_reference
            reference = next(iter(scores.values())).detach().clone() if needed else None
            total: Any = minimised(scores, batch, reference).sum()
            total.backward()
    return alive.peak


@contextmanager
def _fake_weights(model: nn.Module) -> Iterator[None]:
    """Gives a model on the meta device fake weights on the CPU, for the operators of the CPU."""
    made: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # so that no id is used twice
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    kept.append(tensor)
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fresh
                cast(dict[str, Any], store)[name] = made[id(tensor)]
    yield

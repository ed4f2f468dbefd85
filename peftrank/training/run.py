"""A training run's parts: how they are put together, and what of them is its state."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from peftrank import plugins
from peftrank.base import Base, load_base, native_dtype, stored_weights
from peftrank.config import Config
from peftrank.errors import ConfigError, DataError, PeftRankError
from peftrank.formats.slates import read_slates
from peftrank.model import Entering, RankingModel, hidden_states, move
from peftrank.prompts import (
    PromptTemplate,
    feature_tensor,
    micro_batches,
    pack,
    task_tensor,
)
from peftrank.training import distributed
from peftrank.training.augment import check_augmentation
from peftrank.training.bottom import Bottom, bottoms
from peftrank.training.data import (
    changed,
    feature_names,
    fingerprint,
    open_part,
    part_path,
    steps_per_epoch,
)
from peftrank.training.facts import Facts, facts
from peftrank.training.negatives import Catalogue, catalogue, check_catalogue, check_negatives
from peftrank.training.objective import (
    Objective,
    check_tasks,
    check_weights,
    objective,
    with_propensity,
)
from peftrank.training.optimizers import check_optimizer, make_optimizer, peak_learning_rate
from peftrank.types import Batch, PromptTree, Slate

_READ_SLATES = 128
"""How many a method is shown that starts from what its layers are given."""


@dataclass(frozen=True)
class Snapshot:
    """What trains, at one step: enough to export it or go on from it."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    readout: dict[str, Tensor]


@dataclass
class Run:
    """A run's parts and its mutable progress."""

    config: Config
    accelerator: Accelerator
    base: Base
    template: PromptTemplate
    adapted: peft.PeftModel
    method: Any
    model: nn.Module
    """The RankingModel."""
    sharded: bool
    """Whether the base is, so that every process must take part in every pass."""
    readout: nn.Module
    optimizer: Any
    objective: Objective
    reference: nn.Module | None
    """The readout as it was at the start, where the loss compares with a frozen reference."""
    train: Sequence[Slate]
    """Those of Parquet files are read when they are used."""
    valid: list[Slate]
    features: tuple[str, ...]
    total_steps: int
    learning_rate: float
    """Peak learning rate of the adapter."""
    folder: Path
    micro_tokens: int
    """Tokens per forward pass: the configured ones, or fewer once memory ran out."""
    step: int = 0
    stale: int = 0
    """Evaluations since the best one."""
    best: float = -math.inf
    best_step: int = 0
    best_state: Snapshot | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    """What was logged, one row per step."""

    ready: dict[int, tuple[Slate, PromptTree]] = field(default_factory=dict)
    """By id, slates of the step at hand, whose trees were made ahead."""
    kept: dict[int, tuple[Slate, PromptTree]] = field(default_factory=dict)
    """By id, validation slates and their trees."""
    catalogue: Catalogue | None = None
    """Where training draws irrelevant candidates."""
    bottoms: dict[str, Bottom] = field(default_factory=dict)
    """By part, what enters the lowest adapted layer; empty if nothing is kept."""

    @cached_property
    def slates_fingerprint(self) -> str:
        """Of the training and validation slates."""
        return f"{fingerprint(self.train)} {fingerprint(self.valid)}"

    @property
    def shares(self) -> bool:
        """Whether a pass can compute once what its rows share.

        Not where blocks are computed again, which their keys and values do not outlive, and not
        where they are gathered from other processes or begin in the middle.
        """
        checkpointing = self.config.training.gradient_checkpointing
        return self.base.is_decoder and not (checkpointing or self.sharded or self.bottoms)

    @cached_property
    def _valid_ids(self) -> frozenset[int]:
        return frozenset(map(id, self.valid))

    def tree(self, slate: Slate) -> PromptTree:
        """Returns the prompt tree of a slate; one of `valid` is made once in a run."""
        key = id(slate)  # unlike slate ids, no two slates of the run share it
        held, tree = self.ready.get(key) or self.kept.get(key) or (None, None)
        if held is slate and tree is not None:
            return tree
        made = self.template.tree(slate)
        if key in self._valid_ids:
            self.kept[key] = slate, made
        return made

    def entering(self, part: str, batch: Batch) -> Entering | None:
        """Returns what is kept of the lower layers for slates of `train` or `valid`."""
        return self.bottoms[part].entering(batch) if self.bottoms else None

    def start_log(self) -> None:
        """Opens `metrics.jsonl` with the rows up to now, so that no step appears twice."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = "".join(json.dumps(row) + "\n" for row in self.history)
            (self.folder / "metrics.jsonl").write_text(rows, encoding="utf-8")
        if self.config.training.trackers:
            self.accelerator.init_trackers("peftrank")

    def log(self, values: dict[str, float]) -> None:
        """Adds a row to `metrics.jsonl` and to the configured trackers."""
        self.history.append({"step": self.step, **values})
        if self.accelerator.is_main_process:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        self.accelerator.log(values, step=self.step)


def start(config: Config, folder: Path, base: Base | None) -> Run:
    """Returns a run at step 0, with everything loaded and checked.

    Raises:
        ConfigError, DataError, BaseModelError: see their messages.
    """
    training = config.training
    if training.micro_tokens == "auto":
        raise ConfigError(
            "training.micro_tokens is auto, and only `peftrank train` makes that a number before "
            "it trains. Set one, or in Python: train(peftrank.doctor.settled(config))"
        )
    train = open_part(config.data, config.domain, "train")
    known = facts(train)
    _check_labelled(config, "train", train, known)
    read = read_slates(part_path(config.data, config.domain, "valid"), items=config.data.items)
    valid = list(itertools.islice(read, training.eval_slates))
    _check_labelled(config, "valid", valid, facts(valid))
    total_steps = training.max_steps or training.epochs * steps_per_epoch(
        len(train), training.batch_size
    )
    method = plugins.load("methods", config.method.name)(
        total_steps=total_steps, **config.method.options
    )
    minimised = objective(config)
    weighted = known.weighted
    if config.loss.propensity is not None:
        train = changed(train, partial(with_propensity, given=config.loss.propensity))
        weighted = weighted or 0  # with weights of its own, it raises when it is read
    check_weights(minimised, None if weighted is None else train[weighted])
    features = feature_names(known.features, config.data.features)
    found = None
    if training.negatives is not None:
        check_negatives(config, features)
        found = catalogue(train, config.prompt.fields)
        check_catalogue(found, train, training.negatives)
    sharding = distributed.sharding(
        config.base.quantization, config.method.name, config.method.options
    )
    if sharding is not None and training.bottom_cache != "off":
        raise ConfigError(
            f"training.bottom_cache={training.bottom_cache} needs the whole base in each process, "
            f"and accelerate was launched to shard it ({sharding}). Set it to 'off', or use "
            "configs/accelerate/ddp.yaml."
        )
    accelerator = distributed.start_accelerator(training, folder)
    learning_rate = peak_learning_rate(training, method.learning_rate)
    check_optimizer(training, accelerator.device)
    if training.gradient_checkpointing and sharding is not None:
        raise ConfigError(
            "training.gradient_checkpointing with a sharded base was never run: its blocks would "
            "have to be gathered a second time. Leave one of the two out."
        )
    torch.manual_seed(config.seed)
    base = base or configured_base(config, accelerator.device, sharded=sharding is not None)
    readout = _build_readout(config, base, features, known)
    check_tasks(minimised, readout, known.tasks)
    template = PromptTemplate(
        base.tokenizer,
        **prompt_arguments(config),
        turn=str(readout.turn),
        max_depth=base.max_depth,
    )
    check_augmentation(config, template.candidate_fields)
    if sharding == "zero3":
        distributed.shard_zero3(base, accelerator)
    own = {id(parameter) for parameter in base.model.parameters()}
    adapted = peft.get_peft_model(base.model, method.config(base.model))
    _show(method, adapted, base, template, train, config)
    adapter = [p for p in base.model.parameters() if id(p) not in own]
    if sharding == "fsdp2":
        distributed.shard_fsdp2(base, adapter, accelerator)
    ranking = RankingModel(base, readout.to(accelerator.device))
    # Not prepare(): see `distributed`. This adds what mixed precision needs.
    model = accelerator.prepare_model(ranking, evaluation_mode=True)
    optimizer = make_optimizer(
        training, _parameter_groups(ranking, learning_rate, training.readout_learning_rate)
    )
    if training.gradient_checkpointing:
        checkpoint_blocks(base)
    distributed.broadcast([*adapter, *readout.parameters(), *readout.buffers()], accelerator)
    run = Run(
        config=config,
        accelerator=accelerator,
        base=base,
        template=template,
        adapted=adapted,
        method=method,
        model=model,
        sharded=sharding is not None,
        readout=readout,
        optimizer=accelerator.prepare_optimizer(optimizer),
        objective=minimised,
        reference=_frozen(readout, base) if minimised.ranking.takes_reference else None,
        train=train,
        valid=valid,
        features=features,
        total_steps=total_steps,
        learning_rate=learning_rate,
        folder=broadcast_object_list([folder])[0],  # each process made a name
        micro_tokens=training.micro_tokens,
        catalogue=found,
    )
    if training.bottom_cache != "off":
        try:
            run.bottoms = bottoms(
                base,
                {
                    "train": list(map(template.tree, train)),
                    "valid": list(map(template.tree, valid)),
                },
                where=training.bottom_cache,
                limit=training.bottom_cache_mib * 2**20,
            )
        except PeftRankError:
            adapted.unload()
            raise
    return run


def _show(
    method: Any,  # noqa: ANN401 - a plug-in
    adapted: peft.PeftModel,
    base: Base,
    template: PromptTemplate,
    slates: Sequence[Slate],
    config: Config,
) -> None:
    """Lets a method see what it asks for before it trains: slates, or the unquantized weights."""
    try:
        if getattr(method, "reads_slates", False):
            batches = _some_passes(config, base, template, slates)
            method.read_slates(adapted, batches, lambda batch: hidden_states(base, batch))
        if getattr(method, "reads_weights", False):
            identity = base.identity
            if identity.quantization == "stored":
                raise ConfigError(
                    f"method.init={config.method.options.get('init')} needs the base's weights "
                    f"before quantization, and {identity.name} has none. Use init kaiming."
                )
            method.read_weights(adapted, stored_weights(identity.name, revision=identity.revision))
    except PeftRankError:
        adapted.unload()
        raise


def _some_passes(
    config: Config, base: Base, template: PromptTemplate, slates: Sequence[Slate]
) -> list[Batch]:
    """Returns passes of slates drawn by the seed: the same in every process and resumed run."""
    drawn = random.Random(config.seed).sample(range(len(slates)), min(_READ_SLATES, len(slates)))
    trees = [template.tree(slates[index]) for index in sorted(drawn)]
    groups = micro_batches(trees, int(config.training.micro_tokens))
    packed = (pack([trees[i] for i in g], pad_token_id=base.pad_token_id) for g in groups)
    return [move(batch, base.device) for batch in packed]


def _check_labelled(config: Config, part: str, slates: Sequence[Slate], known: Facts) -> None:
    if not slates:
        path = part_path(config.data, config.domain, part)
        raise DataError(f"no slate here; expected the {part} slates, one a line", path=path)
    if known.unlabelled is not None:
        name = slates[known.unlabelled].slate_id
        raise DataError(f"slate {name!r} of the {part} part has no labels")
    if not known.relevant:
        raise DataError(
            f"none of the {len(slates)} slates that are read of the {part} part has a relevant "
            "candidate (a label above 0), so there is nothing to learn from or to measure"
        )


def configured_base(config: Config, device: torch.device, *, sharded: bool = False) -> Base:
    """Returns the base of `config.base`, loaded for training on a device.

    Raises:
        BaseModelError: see `load_base`.
    """
    dtype: str = config.base.compute_dtype
    if dtype == "auto":  # of the device that computes, wherever the weights are first read to
        dtype = str(native_dtype(device)).removeprefix("torch.")
    return load_base(
        config.base.name,
        quantization=config.base.quantization,
        double_quant=config.base.double_quant,
        quantize_embeddings=config.base.quantize_embeddings,
        compute_dtype=dtype,
        revision=config.base.revision,
        # Sharding moves a block at a time. Quantized weights move less well, and are small.
        device="cpu" if sharded and config.base.quantization == "none" else str(device),
    )


def _build_readout(
    config: Config, base: Base, features: tuple[str, ...], known: Facts
) -> nn.Module:
    readout: nn.Module = (
        plugins.load("readouts", config.readout.name)
        .build(
            base.hidden_size,
            base.tokenizer,
            base.lm_head,
            feature_names=features,
            **config.readout.options,
        )
        .to(base.device)
    )
    if features:
        fit: Any = readout.fit_features
        moments = torch.tensor([known.features[name] for name in features], device=base.device)
        fit(*moments.float().unbind(dim=1))
    return readout


def _frozen(readout: nn.Module, base: Base) -> nn.Module:
    """Returns a copy of a readout that does not train; it shares the base's vocabulary head."""
    return copy.deepcopy(readout, {id(base.lm_head): base.lm_head}).requires_grad_(False).eval()


def prompt_arguments(config: Config) -> dict[str, Any]:
    """Returns the configured arguments of PromptTemplate, but for `turn` and `max_depth`."""
    prompt = config.prompt
    return {
        **prompt.model_dump(exclude={"template"}),
        "parts": prompt.template.model_dump(),
    }


def checkpoint_blocks(base: Base) -> None:
    """Makes a pass in train mode keep only what enters each block of the base.

    The backward pass computes the rest again (Chen et al. 2016, arXiv 1604.06174), with the same
    dropout masks. In eval mode nothing changes. `gradient_checkpointing_disable` of the model ends
    it.
    """
    # Not before get_peft_model, which would make the embeddings' output need gradients.
    base.model.gradient_checkpointing_enable({"use_reentrant": False})


def new_folder(output: Path, config: Config) -> Path:
    """Returns a folder for a new run under the domain's `.runs`, named by time and method.

    No two runs get the same, whatever the clock says.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    method = config.method.name.replace(":", "-")
    return output / config.domain / ".runs" / f"{stamp}-{method}-{secrets.token_hex(3)}"


def snapshot(run: Run) -> Snapshot:
    """Returns a copy of what trains."""
    tensors, values = run.method.state_dict(run.adapted)
    return Snapshot(
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
        json.loads(json.dumps(values)),
        {name: tensor.detach().clone() for name, tensor in run.readout.state_dict().items()},
    )


def put_back(run: Run, state: Snapshot) -> None:
    """Makes a snapshot the current state."""
    run.method.load_state_dict(run.adapted, state.tensors, state.values)
    run.readout.load_state_dict(state.readout)


def passes(run: Run, slates: Sequence[Slate]) -> Iterator[tuple[list[Slate], Batch]]:
    """Yields slates cut into forward passes of at most `micro_tokens`, and the pass's batch.

    One user's slates adjoin, so that they share their history in a row. A loss needs all scores of
    its slate, so a longer slate is one pass too.
    """
    ordered = sorted(slates, key=lambda s: (s.user_id, len(s.history), s.slate_id))
    trees = [run.tree(slate) for slate in ordered]
    for group in micro_batches(trees, run.micro_tokens):
        part = [ordered[i] for i in group]
        batch = pack(
            [trees[i] for i in group],
            pad_token_id=run.base.pad_token_id,
            once=run.shares,
            labels=[slate.labels for slate in part],
            weights=[slate.weights for slate in part],
            tasks=task_tensor(part, tuple(run.objective.tasks)) if run.objective.tasks else None,
            features=feature_tensor(part, run.features) if run.features else None,
        )
        yield part, move(batch, run.base.device)


def shared_passes(run: Run, slates: Sequence[Slate]) -> Iterator[tuple[list[Slate], Batch, bool]]:
    """Yields the passes of this process's share of the slates, and whether each counts.

    All processes make equally many; one that has fewer repeats its last, which must not count.
    """
    mine = distributed.share(slates, run.accelerator)
    made = list(passes(run, mine or slates[:1]))
    own = len(made) if mine else 0
    for i in range(distributed.largest(len(made), run.accelerator)):
        part, batch = made[min(i, len(made) - 1)]
        yield part, batch, i < own


def _parameter_groups(
    model: RankingModel, adapter_rate: float, readout_rate: float
) -> list[dict[str, Any]]:
    adapter = [p for p in model.backbone.parameters() if p.requires_grad]
    readout = [p for p in model.readout.parameters() if p.requires_grad]
    groups = ((adapter, adapter_rate), (readout, readout_rate))
    return [{"params": p, "lr": rate, "initial_lr": rate} for p, rate in groups if p]


def parameter_names(run: Run) -> dict[Tensor, str]:
    """Returns the name of every parameter that trains."""
    return {p: name for name, p in run.model.named_parameters() if p.requires_grad}

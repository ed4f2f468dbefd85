"""A training that notes what it did, in this process or, as a program, in each of several."""

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from peftrank.base import load_base
from peftrank.config import Config
from peftrank.training import Interrupted, loop, train

STOPPED = "stopped"
"""A run of this name, of several processes, gets SIGTERM in the last one, in its third step."""


def noted(name, config, output, *, resume=None):
    """Trains; returns the folder made, the slates of each evaluation, AdaLoRA's masks, the base."""
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    notes = {"evaluated": []}
    measure, publish, optimize = loop.per_slate, loop.publish, loop._optimize

    def measured(metric, slates, scores):
        notes["evaluated"] += [slate.slate_id for slate in slates]
        return measure(metric, slates, scores)

    def published(run, *arguments):
        notes["masks"] = getattr(run.adapted.peft_config["default"], "rank_pattern", None)
        path = publish(run, *arguments)
        notes.update(about_base(run.base, config.base))
        return path

    def stopped(run, slates):
        if run.step == 2 and last:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimize(run, slates)

    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "per_slate", measured))
        stack.enter_context(patch.object(loop, "publish", published))
        if name == STOPPED and resume is None and "RANK" in os.environ:
            stack.enter_context(patch.object(loop, "_optimize", stopped))
        try:
            notes["path"] = str(train(config, output=output, resume=resume))
        except Interrupted as stop:
            notes["interrupted"] = str(stop)
    return notes


def about_base(base, settings):
    """Which part of the blocks' weights this process holds, and whether all are as loaded."""
    before = dict(load_base(**settings.model_dump(), device="cpu").model.named_parameters())
    blocks = {id(p) for block in base.layers for p in block.parameters()}
    held = of = 0
    same = True
    for name, parameter in base.model.named_parameters():
        sharded = isinstance(parameter, DTensor)
        if id(parameter) in blocks:
            held += (parameter.to_local() if sharded else parameter).numel()
            of += before[name].numel()
        if "ds_id" not in vars(parameter):  # DeepSpeed's are gathered by a pass alone
            whole = parameter.full_tensor() if sharded else parameter
            same = same and torch.equal(whole, before[name])
    return {"held": held / of, "same": same}


def shard_small_weights():
    """Makes DeepSpeed shard the weights of a tiny base too, which it would keep whole."""
    import deepspeed

    initialize = deepspeed.initialize

    def initialized(config, **arguments):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(config=config, **arguments)

    deepspeed.initialize = initialized


def main(configs, output, earlier=None):
    """Trains every configuration of a folder; goes on from `earlier`'s checkpoints if given."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        shard_small_weights()
    for file in sorted(Path(configs).glob("*.json")):
        name, resume = file.stem, None
        if earlier is not None:
            (run,) = (Path(earlier) / name / "demo" / ".runs").iterdir()
            resume = run / "checkpoint-4"
        config = Config.model_validate_json(file.read_text(encoding="utf-8"))
        notes = noted(name, config, Path(output) / name, resume=resume)
        note = Path(output) / f"{name}.{os.environ.get('RANK', '0')}.json"
        note.write_text(json.dumps(notes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

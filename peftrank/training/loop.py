"""The one training loop: slates in, a new version of a domain's adapter in the store out.

Only adapter and readout weights change. Gradients are those of the whole batch, however it is cut
into forward passes or spread over processes: losses are per slate and are divided by the batch's
number of slates. A run continues exactly from its checkpoints; with dropout in several processes,
up to the masks.
"""

from __future__ import annotations

import math
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from peftrank.base import Base
from peftrank.config import Config
from peftrank.errors import PeftRankError
from peftrank.metrics import per_slate
from peftrank.model import Entering, RankingModel
from peftrank.prompts import computed_tokens
from peftrank.readouts.multi_task import RANK
from peftrank.training import checkpoint, distributed
from peftrank.training.ahead import ahead
from peftrank.training.data import step_batches, steps_per_epoch
from peftrank.training.epochs import Ready, as_of_epoch, made_ready, needs_weights
from peftrank.training.objective import head_scores
from peftrank.training.progress import Progress
from peftrank.training.publish import publish
from peftrank.training.run import (
    Run,
    new_folder,
    passes,
    put_back,
    shared_passes,
    snapshot,
    start,
)
from peftrank.types import Batch, Slate

SELECT_BY = "ndcg@10"
_AHEAD = 2
"""Steps whose slates are read and tokenized while another one is taken."""
_FEWEST_TOKENS = 16
"""Per pass; what a configuration may say."""


class Interrupted(PeftRankError):
    """The run was asked to stop. Its checkpoint is saved; the message says how to continue."""

    exit_code = 1


class Diverged(PeftRankError):
    """The loss is not finite any more."""


class OutOfMemory(PeftRankError):
    """A pass of one slate does not fit in the GPU's memory."""


def train(
    config: Config,
    *,
    output: Path = Path("adapters"),
    resume: Path | None = None,
    base: Base | None = None,
    progress: bool = False,
) -> Path:
    """Trains an adapter and returns the folder of the new, active version in the store `output`.

    Args:
        config: The run. `peftrank.config.load_config` makes one.
        output: The store.
        resume: A run's folder or one of its checkpoints; `config` must be the run's own.
        base: An already loaded base to train on; absent: loaded from `config.base`. It is given
            back without adapter layers; if accelerate's launcher asked to shard it, sharded.
        progress: Show a progress bar with the time left.

    Raises:
        ConfigError, DataError, BaseModelError, AdapterError: see their messages.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is saved.
        Diverged, OutOfMemory: checkpoints before it stay.
    """
    saved = None if resume is None else checkpoint.load(resume)
    if saved is not None:
        checkpoint.check_config(saved, config)
    run = start(config, saved.run if saved else new_folder(output, config), base)
    with _given_back(run):
        if saved is not None:
            checkpoint.restore(run, saved)
        shown = progress and run.accelerator.is_main_process
        with _stop_signals() as stopping, Progress(run.total_steps, shown=shown) as bar:
            _steps(run, bar, stopping)
            value = _finish(run)
        return publish(run, output, {f"valid_{SELECT_BY}": value})


def measure(
    config: Config, *, folder: Path, base: Base, watch: Callable[[int, float], None]
) -> float:
    """Trains as `train` does and returns the adapter's validation nDCG@10; nothing is published.

    Args:
        config: The run.
        folder: Where its `metrics.jsonl` goes. There are no checkpoints.
        base: Given back as `train` does.
        watch: Called after each evaluation with the step and the value; what it raises ends the
            run.

    Raises:
        ConfigError, DataError, BaseModelError: see their messages.
        Diverged, OutOfMemory: see their messages.
        Interrupted: Ctrl-C or SIGTERM.
    """
    run = start(config, folder, base)
    with _given_back(run), _stop_signals() as stopping:
        _steps(run, Progress(run.total_steps, shown=False), stopping, watch)
        value = _finish(run)
        if stopping.is_set():
            raise Interrupted(f"stopped after step {run.step} of {run.total_steps}.")
        return value


@contextmanager
def _given_back(run: Run) -> Iterator[None]:
    """Takes a run's adapter out of the base at the end."""
    try:
        yield
    finally:
        run.adapted.unload()
        run.base.model.gradient_checkpointing_disable()
        run.base.model.eval()
        # Not end_training(): that ends the group of processes, under a model that still uses it.
        for tracker in run.accelerator.trackers:
            tracker.finish()


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Returns what the learning rate is multiplied by at optimizer step `step` (0-based)."""
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done


def _steps(
    run: Run,
    bar: Progress,
    stopping: threading.Event,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Takes the steps that are left; with `watch`, which is given evaluations, saves nothing."""
    training = run.config.training
    run.start_log()
    batches = step_batches(
        run.train,
        training.batch_size,
        together=training.slates_per_user,
        seed=run.config.seed,
        first_step=run.step,
        total_steps=run.total_steps,
    )
    with closing(ahead(made_ready(run, batches, run.step), _AHEAD)) as steps:
        _take(run, steps, bar, stopping, watch)


def _take(
    run: Run,
    steps: Iterator[Ready],
    bar: Progress,
    stopping: threading.Event,
    watch: Callable[[int, float], None] | None,
) -> None:
    training = run.config.training
    asked = time.perf_counter()
    for given, run.ready in steps:
        started = time.perf_counter()
        slates = as_of_epoch(run, given, run.step) if needs_weights(run, run.step) else given
        values = _optimize(run, slates)
        run.step += 1
        seconds = time.perf_counter() - started
        values["waited_seconds"] = started - asked
        values["slates_per_second"] = len(slates) / seconds
        values["tokens_per_second"] = values.pop("tokens") / seconds
        last = run.step == run.total_steps
        if run.step % training.eval_steps == 0 or last:
            values[f"valid_{SELECT_BY}"] = _evaluate(run)
        run.log(values)
        bar.update(run.step, values)
        if watch is not None and f"valid_{SELECT_BY}" in values:
            watch(run.step, values[f"valid_{SELECT_BY}"])
        if run.stale >= training.patience:
            return
        if stopping.is_set():
            run.accelerator.set_trigger()  # processes get the signal at different steps
        if run.accelerator.check_trigger() and not last:
            message = f"stopped after step {run.step} of {run.total_steps}."
            if watch is None:
                saved = shlex.quote(str(checkpoint.save(run)))
                message += f" Continue with: peftrank train --resume {saved}"
            raise Interrupted(message)
        if watch is None and run.step % training.checkpoint_steps == 0 and not last:
            checkpoint.save(run)
        asked = time.perf_counter()


def _optimize(run: Run, slates: Sequence[Slate]) -> dict[str, float]:
    """Takes one optimizer step on a batch and returns what to log."""
    training = run.config.training
    factor = learning_rate_factor(
        run.step, run.total_steps, training.warmup_ratio, training.schedule
    )
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    loss, tokens = _backward(run, slates)
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} at step {run.step + 1}. Lower training.learning_rate "
            f"(now {run.learning_rate}) or training.max_grad_norm."
        )
    run.accelerator.unscale_gradients()
    norm = torch.nn.utils.clip_grad_norm_(_trainable(run), training.max_grad_norm)
    run.optimizer.step()
    run.method.after_step(run.adapted, run.step + 1)  # reads the gradients
    run.optimizer.zero_grad()
    return {
        "loss": loss,
        "tokens": tokens,
        "grad_norm": float(norm),
        "learning_rate": run.learning_rate * factor,
        "epoch": (run.step + 1) / steps_per_epoch(len(run.train), training.batch_size),
    }


def _backward(run: Run, slates: Sequence[Slate]) -> tuple[float, float]:
    """Adds the batch's gradients, pass by pass; returns its loss and tokens over all processes.

    Tokens that slates of a row share count once; padding does not count.
    """
    accelerator = run.accelerator
    loss, tokens = _passes_backward(run, slates)
    penalty = run.method.penalty(run.adapted)
    if penalty is not None and accelerator.is_main_process:  # it is the same in all
        accelerator.backward(penalty)
    distributed.add_up_gradients(_trainable(run), accelerator)
    total = distributed.add_up([loss, tokens], accelerator)
    return total[0], total[1]


def _passes_backward(run: Run, slates: Sequence[Slate]) -> tuple[float, float]:
    """Adds the gradients of this process's passes; returns their loss and tokens.

    Where a GPU's memory runs out, all processes start again with half the tokens per pass, and
    dropout masks as if they had begun so. The step is then the one of the smaller passes.

    Raises:
        OutOfMemory: a single slate is too much.
    """
    while True:
        before = _random_state(run)
        found = None
        # Of a sharded base, the other processes would wait for this one in the middle of a pass.
        with suppress(*(() if run.sharded else (torch.OutOfMemoryError,))):
            found = _try_passes(run, slates)
        if not distributed.largest(int(found is None), run.accelerator):
            assert found is not None
            return found
        _halve(run, slates)
        run.optimizer.zero_grad()
        _put_random_state(run, before)


def _halve(run: Run, slates: Sequence[Slate]) -> None:
    """Halves the tokens per pass in all processes, and says so.

    Raises:
        OutOfMemory: every pass is of one slate already.
    """
    parts = [(len(part), batch.input_ids.numel()) for part, batch in passes(run, slates)]
    several = max((tokens for count, tokens in parts if count > 1), default=0)
    several = distributed.largest(several, run.accelerator)
    advice = (
        "Shorten the slates (prompt.history_length, prompt.item_tokens, fewer candidates), adapt "
        "fewer layers (method.layers: top-K), or set training.gradient_checkpointing: true."
    )
    if several == 0 or run.micro_tokens <= _FEWEST_TOKENS:
        raise OutOfMemory(
            f"step {run.step + 1}: the GPU's memory does not even hold the smallest passes "
            f"(a slate in each, up to {max(tokens for _, tokens in parts)} tokens). {advice}"
        )
    torch.cuda.empty_cache()
    run.micro_tokens = max(_FEWEST_TOKENS, min(run.micro_tokens, several) // 2)
    if run.accelerator.is_main_process:
        warnings.warn(
            f"step {run.step + 1}: the GPU's memory does not hold a pass of {several} tokens. "
            f"Training goes on with half of them, which changes no result. To begin like that, set "
            f"training.micro_tokens: {run.micro_tokens}",
            RuntimeWarning,
            stacklevel=2,
        )


def _random_state(run: Run) -> list[Tensor]:
    """Returns what dropout masks are drawn from."""
    state = [torch.get_rng_state()]
    if run.accelerator.device.type == "cuda":
        state.append(torch.cuda.get_rng_state(run.accelerator.device))
    return state


def _put_random_state(run: Run, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], run.accelerator.device)


def _try_passes(run: Run, slates: Sequence[Slate]) -> tuple[float, float]:
    accelerator = run.accelerator
    run.model.train()
    loss, tokens = 0.0, 0
    for _, batch, counts in shared_passes(run, slates):
        entering = run.entering("train", batch)
        reference = _reference_scores(run, batch, entering)
        with accelerator.autocast():
            scores = head_scores(run.model, run.objective, batch, entering)
        losses = run.objective(scores, batch, reference, _log_variance(run))
        value = losses.sum() * (float(counts) / len(slates))
        accelerator.backward(value)
        loss += float(value.detach())
        tokens += computed_tokens(batch) if counts else 0
    return loss, tokens


def _reference_scores(run: Run, batch: Batch, entering: Entering | None) -> Tensor | None:
    """Returns the scores (S, N) of the base without the adapter, read by the readout of the start.

    None where the loss compares with no reference. Packed as the model's own pass, so that only
    what was trained makes a difference.
    """
    if run.reference is None:
        return None
    frozen = RankingModel(run.base, run.reference)
    with torch.no_grad(), run.adapted.disable_adapter(), run.accelerator.autocast():
        return head_scores(frozen, run.objective, batch, entering)[RANK]


def _log_variance(run: Run) -> Tensor | None:
    found: Tensor | None = run.readout.log_variance if run.objective.tasks else None  # type: ignore[assignment]
    return found


def _trainable(run: Run) -> list[Tensor]:
    return [p for group in run.optimizer.param_groups for p in group["params"]]


def _evaluate(run: Run) -> float:
    """Returns the mean validation nDCG@10 and keeps the state if it is the best so far."""
    value = _valid_ndcg(run)
    if value > run.best:
        run.best, run.best_step, run.stale = value, run.step, 0
        run.best_state = snapshot(run)
    else:
        run.stale += 1
    return value


def _valid_ndcg(run: Run) -> float:
    place = {id(slate): i for i, slate in enumerate(run.valid)}  # slate ids need not be unique
    values = [0.0] * len(run.valid)
    run.model.eval()
    with torch.no_grad():
        for part, batch, counts in shared_passes(run, run.valid):
            rows = run.model(batch, run.entering("valid", batch)).tolist()
            if counts:
                scores = [row[: len(s.candidates)] for row, s in zip(rows, part, strict=True)]
                for slate, value in zip(part, per_slate(SELECT_BY, part, scores), strict=True):
                    values[place[id(slate)]] = float(value)
    # In the order of the slates, so that the mean is the same however they were shared out.
    return float(np.nanmean(distributed.add_up(values, run.accelerator)))


def _finish(run: Run) -> float:
    """Leaves the best finished state in the model and returns its validation nDCG@10.

    The best state may lie before AdaLoRA reached its budget, and finishing prunes it. So the best
    and the last state are both finished, measured as they will be exported, and compared.
    """
    run.method.finalize(run.adapted)
    last_value = _valid_ndcg(run)
    if run.best_state is None or run.best_step == run.step:
        return last_value
    last = snapshot(run)
    put_back(run, run.best_state)
    run.method.finalize(run.adapted)
    best_value = _valid_ndcg(run)
    if best_value >= last_value:
        return best_value
    put_back(run, last)
    run.best_step = run.step
    return last_value


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turns Ctrl-C and SIGTERM into a request to stop after the step; a second one is immediate."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stopping.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in previous:
        signal.signal(each, request)
    try:
        yield stopping
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

"""Training slates as an epoch has them: other negatives, fields left out, another order.

Everything is decided by the seed, the epoch, the slates and, for hard negatives, the weights at the
step that reads them. Nothing of it is kept, so a resumed run makes it again, as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch

from peftrank.training import distributed
from peftrank.training.augment import shuffled, with_fields_dropped
from peftrank.training.data import changed, held, steps_per_epoch
from peftrank.training.negatives import drawn, hardest, irrelevant, redrawn, stage
from peftrank.training.run import Run, shared_passes
from peftrank.types import Item, PromptTree, Slate

Ready = tuple[Sequence[Slate], dict[int, tuple[Slate, PromptTree]]]


def made_ready(run: Run, batches: Iterable[Sequence[Slate]], first_step: int) -> Iterator[Ready]:
    """Yields the slates of each step as they are read, and the trees of this process's share.

    Of the run it reads what does not change, so that another thread may run it ahead of the steps.
    """
    for step, given in enumerate(batches, first_step):
        if needs_weights(run, step):
            yield held(given, slice(None)), {}  # every process looks at all of them
            continue
        slates = as_of_epoch(run, given, step)
        part = distributed.own(len(slates), run.accelerator)
        if part.start == part.stop:
            part = slice(1)  # see `shared_passes`
        slates = held(slates, part)
        yield slates, {id(slate): (slate, run.template.tree(slate)) for slate in slates[part]}


def needs_weights(run: Run, step: int) -> bool:
    """Returns whether a step's slates depend on the weights, so that they cannot be made ahead."""
    settings = run.config.training.negatives
    return settings is not None and stage(settings, _epoch(run, step)) == "hard"


def as_of_epoch(run: Run, slates: Sequence[Slate], step: int) -> Sequence[Slate]:
    """Returns slates of the training part as the epoch of a step has them."""
    training, seed = run.config.training, run.config.seed
    epoch = _epoch(run, step)
    if training.negatives is not None:
        slates = _with_negatives(run, list(slates), epoch)
    if dropped := training.field_dropout:
        kept = run.template.candidate_fields.difference(dropped)
        drop = partial(
            with_fields_dropped, probabilities=dropped, kept=kept, seed=seed, epoch=epoch
        )
        slates = changed(slates, drop)
    if training.shuffle_candidates:
        slates = changed(slates, partial(shuffled, seed=seed, epoch=epoch))
    return slates


def _epoch(run: Run, step: int) -> int:
    return step // steps_per_epoch(len(run.train), run.config.training.batch_size)


def _with_negatives(run: Run, slates: Sequence[Slate], epoch: int) -> list[Slate]:
    settings, found = run.config.training.negatives, run.catalogue
    assert settings is not None
    assert found is not None
    counts = [irrelevant(slate) for slate in slates]
    kind = stage(settings, epoch)
    sizes = [settings.pool if count else 0 for count in counts] if kind == "hard" else counts
    chosen = [
        drawn(
            slate, found, size, popular=kind == "popularity", seed=run.config.seed, epoch=epoch
        )
        for slate, size in zip(slates, sizes, strict=True)
    ]  # fmt: skip
    if kind == "hard":
        scores = _scores(run, slates, chosen)
        chosen = [
            hardest(pool, values, count, settings.skip)
            for pool, values, count in zip(chosen, scores, counts, strict=True)
        ]
    return [redrawn(slate, items) for slate, items in zip(slates, chosen, strict=True)]


def _scores(
    run: Run, slates: Sequence[Slate], pools: Sequence[Sequence[Item]]
) -> list[list[float]]:
    """Returns the current model's score of every item of each slate's pool.

    A pool is read in lists as long as the slate's own, so that it fits where the slate does; they
    share the slate's history in a row. The same in all processes.
    """
    lists = [
        replace(slate, candidates=tuple(pool[i : i + len(slate.candidates)]), labels=None,
                weights=None, tasks={})
        for slate, pool in zip(slates, pools, strict=True)
        for i in range(0, len(pool), len(slate.candidates))
    ]  # fmt: skip
    if not lists:
        return [[] for _ in pools]
    first = accumulate((len(part.candidates) for part in lists), initial=0)
    place = {id(part): i for part, i in zip(lists, first, strict=False)}
    flat = [0.0] * sum(map(len, pools))
    run.model.eval()
    with torch.no_grad():
        for group, batch, counts in shared_passes(run, lists):
            rows = run.model(batch).tolist()
            for part, row in zip(group, rows, strict=True) if counts else ():
                start, size = place[id(part)], len(part.candidates)
                flat[start : start + size] = row[:size]
    values = iter(distributed.add_up(flat, run.accelerator))
    return [[next(values) for _ in pool] for pool in pools]

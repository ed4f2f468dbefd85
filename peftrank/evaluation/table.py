"""The rows that stand beside an adapter's: baselines, the untrained base, and cold items alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftrank import plugins
from peftrank.base import Base
from peftrank.errors import ConfigError
from peftrank.evaluation.cosine import cosine_scores
from peftrank.evaluation.evaluate import Evaluation, evaluate_scores
from peftrank.ranker import Ranker
from peftrank.types import Slate

ZERO_SHOT = "zero_shot"
_UNTRAINED = {"yes_no": "isolated", "likelihood": "isolated"}
"""Ways to read a decoder without training, each in a mode that reads lists of any length."""


def baseline_rows(
    names: Sequence[str],
    slates: Sequence[Slate],
    *,
    train: Sequence[Slate],
    base: Base | None,
    prompt: Mapping[str, Any],
    metrics: Sequence[str],
    seed: int = 0,
) -> list[Evaluation]:
    """Returns an evaluation per baseline; `zero_shot` gives one per way to read the bare base.

    Args:
        names: Files of `peftrank/baselines/`, `package.module:function`, or `zero_shot`.
        slates: Labelled.
        train: The training part, all that a baseline may learn from.
        base: Read without any adapter for `zero_shot`; None if that is not asked for.
        prompt: PromptTemplate's arguments, for `zero_shot`.
        metrics: As in `peftrank.metrics.per_slate`.
        seed: For baselines with random choices.

    Raises:
        ConfigError: unknown baseline, its package is not installed, or `zero_shot` has no base.
    """
    rows = []
    for name in names:
        if name == ZERO_SHOT:
            if base is None:
                raise ConfigError("the baseline zero_shot needs a base")
            rows += _zero_shot_rows(slates, base=base, prompt=prompt, metrics=metrics)
        else:
            scores = plugins.load("baselines", name)(slates, train=train, seed=seed)
            rows.append(evaluate_scores(name, slates, scores, metrics))
    return rows


def cold_slates(slates: Sequence[Slate], train: Sequence[Slate]) -> list[int]:
    """Returns the indices of slates no relevant candidate of which occurs in the training part."""
    seen = {item.item_id for s in train for item in (*s.history, *s.candidates)}
    found = []
    for i, slate in enumerate(slates):
        relevant = [
            item.item_id
            for item, label in zip(slate.candidates, slate.labels or (), strict=bool(slate.labels))
            if label > 0
        ]
        if relevant and not seen.intersection(relevant):
            found.append(i)
    return found


def _zero_shot_rows(
    slates: Sequence[Slate], *, base: Base, prompt: Mapping[str, Any], metrics: Sequence[str]
) -> list[Evaluation]:
    """A decoder answers Yes or No, gives a likelihood or, in mode `joint`, names a letter.

    An encoder compares embeddings.
    """
    if not base.is_decoder:
        scores = cosine_scores(base, slates, prompt["fields"])
        return [evaluate_scores(f"{ZERO_SHOT} (cosine)", slates, scores, metrics)]
    rows = []
    with Ranker(base) as ranker:
        joint = {"identifier": "joint"} if prompt.get("mode") == "joint" else {}
        for readout, mode in (_UNTRAINED | joint).items():
            given = {**prompt, "mode": mode}
            domain = ranker.load_readout("untrained", prompt=given, readout=readout)
            scores = ranker.score(slates, domain=domain)
            rows.append(evaluate_scores(f"{ZERO_SHOT} ({readout})", slates, scores, metrics))
    return rows

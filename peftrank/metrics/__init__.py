"""Accuracy of rankings, slate by slate, by ir-measures (trec_eval); one file for each it lacks.

A slate without a relevant candidate has no accuracy: its value is NaN, and whoever averages leaves
it out and counts it. Equal scores are ordered by a hash of slate and item id, never by input order,
so a model that scores everything alike gets the accuracy of chance.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import ir_measures
import numpy as np
from numpy.typing import NDArray

from peftrank import plugins
from peftrank.errors import ConfigError
from peftrank.types import Slate

_NAME = re.compile(r"([a-z]+)(?:@([1-9][0-9]*))?")
# Our name -> ir-measures' name, and whether a cut-off must, may or must not follow.
_MEASURES = {
    "ndcg": ("nDCG", "may"),
    "mrr": ("RR", "may"),
    "map": ("AP", "may"),
    "recall": ("R", "must"),
    "hit": ("Success", "must"),
    "precision": ("P", "must"),
}


def per_slate(
    metric: str, slates: Sequence[Slate], scores: Sequence[Sequence[float]]
) -> NDArray[np.float64]:
    """Returns the metric of each slate (S,), NaN where it has no relevant candidate.

    Args:
        metric: ndcg@10, mrr, map, recall@5, hit@1, precision@3, auc, ... nDCG has linear gains.
        slates: Labelled slates; a label above 0 is relevant.
        scores: One score per candidate, in candidate order, higher is better.

    Raises:
        ConfigError: unknown metric, or slates without labels.
    """
    unlabelled = [s.slate_id for s in slates if s.labels is None]
    if unlabelled:
        raise ConfigError(f"cannot measure {metric}: slate {unlabelled[0]!r} has no labels")
    name, k = _parse(metric)
    values = np.full(len(slates), np.nan)
    counted = [i for i, s in enumerate(slates) if any(label > 0 for label in s.labels or ())]
    if name not in _MEASURES:
        function = plugins.load("metrics", name)
        for i in counted:
            values[i] = function(np.asarray(slates[i].labels), np.asarray(scores[i]))
        return values
    measure = ir_measures.parse_measure(_MEASURES[name][0] + (f"@{k}" if k else ""))
    scale = _label_scale([slates[i] for i in counted])
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for i in counted:
        keys = [_tie_key(slates[i].slate_id, item.item_id) for item in slates[i].candidates]
        labels = slates[i].labels or ()
        qrels[str(i)] = {
            key: max(round(label * scale), int(label > 0))
            for key, label in zip(keys, labels, strict=True)
        }
        run[str(i)] = dict(zip(keys, map(float, scores[i]), strict=True))
    for result in ir_measures.iter_calc([measure], qrels, run) if counted else ():
        values[int(result.query_id)] = result.value
    return values


def _parse(metric: str) -> tuple[str, int | None]:
    match = _NAME.fullmatch(metric)
    known = [*_MEASURES, *plugins.available("metrics")]
    if match is None or match[1] not in known:
        hint = plugins.did_you_mean(metric.partition("@")[0], known)
        raise ConfigError(
            f"unknown metric {metric!r}{hint}. Known: {', '.join(known)}, with @k where it applies."
        )
    name, k = match[1], int(match[2]) if match[2] else None
    cut_off = _MEASURES[name][1] if name in _MEASURES else "must not"
    if k is None and cut_off == "must":
        raise ConfigError(f"metric {metric!r} needs a cut-off, for example {metric}@10")
    if k is not None and cut_off == "must not":
        raise ConfigError(f"metric {name!r} takes no cut-off, not {metric!r}")
    return name, k


def _label_scale(slates: Sequence[Slate]) -> int:
    """trec_eval takes integer labels: 1 keeps integers, 1000 keeps three decimals of the rest."""
    whole = all(float(label).is_integer() for s in slates for label in s.labels or ())
    return 1 if whole else 1000


def _tie_key(slate_id: str, item_id: str) -> str:
    return hashlib.blake2b(f"{slate_id}\x00{item_id}".encode(), digest_size=12).hexdigest()

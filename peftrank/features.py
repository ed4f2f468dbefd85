"""Numbers about each candidate, computed from the training part alone.

With times, a slate sees what happened strictly before it. Without, it sees the whole training
part except its own user: exact removal for counts, cross-fitting over user folds for the
embedding. So a candidate that only this user ever met looks like one nobody met. What a model is
to learn from, `prepare` takes from sources without whole folds of users (`Source.without`).
This file reads no raw file and makes no list; `_counting.py` has the counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from peftrank._chunks import Chunk
from peftrank._counting import UNIT, EventCounts, Statistics
from peftrank._embedding import Embedding, fit
from peftrank._lists import Floats, Ints, Lists, Sequences, Shown
from peftrank._words import label_matrix, normalised, row_products, word_matrix
from peftrank.errors import ConfigError, DataError

GROUPS: dict[str, tuple[str, ...]] = {
    "popularity": ("popularity", "history_length"),
    "click_rate": ("click_rate", "times_shown"),
    "item_knn": (
        "item_knn", "item_knn_decayed", "item_knn_cosine", "item_knn_max", "item_knn_last",
        "item_knn_lift", "item_knn_lift_max", "item_knn_light", "item_knn_share",
    ),
    "transition": ("transition", "transition_last", "transition_count", "transition_order"),
    "item_embedding": (
        "embedding", "embedding_decayed", "embedding_cosine", "embedding_cosine_decayed",
        "embedding_max", "embedding_text", "embedding_text_decayed", "embedding_of_text",
    ),
    "text_overlap": (
        "text_overlap", "text_overlap_max", "text_overlap_last",
        "text_cosine", "text_cosine_max", "text_cosine_decayed",
    ),
    "category": ("category_share", "category_last"),
    "friends": ("common_friends", "adamic_adar"),
    "recency": (
        "days_since_first", "days_since_last", "popularity_day", "popularity_week",
        "popularity_month", "depth",
    ),
    "retriever": ("retriever",),
}  # fmt: skip
"""The columns of each group of features."""
_UNTIMED = ("depth",)
_TIMED = tuple(name for name in GROUPS["recency"] if name not in _UNTIMED)

_DAY = 86_400.0
_SMOOTH = 5.0
_FOLDS = 5
_CLICK_PRIOR, _SHOWN_PRIOR = 0.5, 10.0
_CHUNK = 400_000
"""(history item, candidate) pairs held in memory at once."""
_PAIRS = 4_000_000
"""Pairs of items in one user's sequence that are all counted at once."""
_ASKED = 2_000_000
"""Beyond that: (history item, candidate) pairs that share one pass over the log."""


@dataclass(frozen=True)
class Source:
    """What features may be computed from."""

    train: Sequences
    """The training part, indexed by the users of the lists."""
    items: int
    texts: Sequence[str] | None = None
    """One per item, for text_overlap and the text side of item_embedding."""
    labels: Sequence[Sequence[str]] | None = None
    """The categories of each item."""
    shown: Shown | None = None
    """Candidates shown in the training part, for click_rate."""
    person: Ints | None = None
    """Where items are people: (I,) the user that each item is, -1 = none. For friends."""
    timed: bool = False
    """Count what happened before the slate; else the training part without the slate's user."""

    def without(self, users: np.ndarray) -> Source:
        """Returns the source less what some users did; `users` is (U,) bool, True = left out."""
        train, shown = self.train, self.shown
        keep = ~np.repeat(users, np.diff(train.start))
        start = np.concatenate((np.zeros(1, np.int64), np.cumsum(keep)))[train.start]
        kept = Sequences(start, train.item[keep], train.time[keep], train.value[keep])
        if shown is not None:
            rows = ~users[shown.user]
            shown = Shown(shown.user[rows], shown.item[rows], shown.time[rows], shown.clicked[rows])
        return replace(self, train=kept, shown=shown)


def columns(source: Source, groups: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the groups' columns."""
    hidden = _UNTIMED if source.timed else _TIMED
    return tuple(name for group in groups for name in GROUPS[group] if name not in hidden)


def compute(
    lists: Lists,
    state: State,
    groups: Sequence[str],
    *,
    retriever: Floats | None = None,
    history_length: int = 30,
) -> np.ndarray:
    """Returns values (M, F) float32 of the `columns`, NaN = unknown, one row per candidate.

    Args:
        lists: The lists; neither their order nor which others there are matters.
        state: What is known.
        groups: Keys of GROUPS.
        retriever: (M,) given scores, for the group `retriever`.
        history_length: At most this many of the newest history items are compared.

    Raises:
        ConfigError: an unknown group, or one whose source is absent.
        DataError: `timed`, but a slate has no time.
    """
    _check(lists, state.source, groups, retriever)
    names = columns(state.source, groups)
    values = np.full((len(lists.candidate), len(names)), np.nan, np.float32)
    model = state.model_of(lists.user, lists.time) if "item_embedding" in groups else None
    chunks: Iterator[Chunk] = (
        Chunk(lists, state.statistics, chosen, history_length)
        for chosen in _chunks(lists, history_length, model)
    )
    if "item_knn" in groups or "transition" in groups:
        chunks = _with_pairs(chunks, state.statistics)
    for chunk in chunks:
        found: dict[str, np.ndarray] = {}
        for group in groups:
            if group == "retriever" and retriever is not None:
                found["retriever"] = retriever[chunk.rows]
            else:
                found |= _COMPUTE[group](chunk, state)
        for place, name in enumerate(names):
            if name in found:
                values[chunk.rows, place] = found[name]
    return values


def _with_pairs(chunks: Iterator[Chunk], statistics: Statistics) -> Iterator[Chunk]:
    """Yields the chunks with the pairs of items counted that they ask for.

    Counting all pairs of a large log would take more memory than there is, so each group of chunks
    has a pass over the log of its own.
    """
    if statistics.pair_events <= _PAIRS:
        statistics.count_pairs()
        yield from chunks
        return
    held: list[Chunk] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(each.history) for each in held) >= _ASKED:
            statistics.count_pairs(np.concatenate([each.pair_keys for each in held]))
            yield from held
            held = []
    if held:
        statistics.count_pairs(np.concatenate([each.pair_keys for each in held]))
        yield from held


def _check(lists: Lists, source: Source, groups: Sequence[str], retriever: Floats | None) -> None:
    for group in groups:
        if group not in GROUPS:
            raise ConfigError(f"unknown features {group!r}. Known: {', '.join(GROUPS)}.")
    needs = {
        "text_overlap": (source.texts, "item texts"),
        "category": (source.labels, "an item field with categories"),
        "friends": (source.person, "items that are users"),
        "click_rate": (source.shown, "lists that were really shown"),
        "retriever": (retriever, "a run file"),
    }
    for group in groups:
        if group in needs and needs[group][0] is None:
            raise ConfigError(f"features {group!r} need {needs[group][1]}, and there are none.")
    if source.timed and "friends" in groups:
        raise ConfigError("features 'friends' do not know when a friendship began: --as-of part")
    if source.timed and np.isnan(lists.time).any():
        count = int(np.isnan(lists.time).sum())
        raise DataError(
            f"{count} slates have no time, so nothing can be counted before them. "
            "Use --as-of part: the whole training part without the slate's own user."
        )


class State:
    """Statistics that all lists share, made when first asked for."""

    def __init__(self, source: Source, *, dimensions: int = 64, seed: int = 0) -> None:
        """Counts the events.

        Args:
            source: What is known.
            dimensions: Of the embedding.
            seed: Which users share a fold of the embedding.
        """
        self.source = source
        self.statistics = Statistics(source.train, source.items, timed=source.timed)
        self._dimensions = dimensions
        self._fold = np.random.default_rng(seed).integers(_FOLDS, size=self.statistics.users)
        self._model: tuple[int, Embedding | None] = (-2, None)

    @cached_property
    def words(self) -> sp.csr_matrix:
        """(I, words) of the items' texts."""
        return word_matrix(self.source.texts or ())

    @cached_property
    def unit_words(self) -> sp.csr_matrix:
        """The same with rows of length one."""
        return normalised(self.words)

    @cached_property
    def categories(self) -> sp.csr_matrix:
        """(I, labels) of the items."""
        return label_matrix(self.source.labels or ())

    @cached_property
    def refits(self) -> Ints:
        """Ranks at which the embedding of a timed log is fitted anew: every 25% more events.

        Event n fixes the n-th moment, so later events cannot move an earlier refit.
        """
        ranks = np.sort(self.statistics.rank)
        steps = np.unique((1.25 ** np.arange(20, 120)).astype(np.int64))
        return np.unique(ranks[steps[steps < len(ranks)]])

    def model_of(self, user: Ints, time: Floats) -> Ints:
        """Returns which embedding a slate may use: -1 = of all training users."""
        if self.source.timed:
            return np.searchsorted(self.refits, self.statistics.rank_of(time), side="right") - 1
        known = (user >= 0) & (np.append(self.statistics.length, 0)[user] > 0)
        return np.where(known, np.append(self._fold, 0)[user], -1)

    def embedding(self, model: int) -> Embedding | None:
        """Returns an embedding that `model_of` named; None: too little is known for one."""
        if self._model[0] != model:
            stats = self.statistics
            if self.source.timed:
                limit = self.refits[model] if model >= 0 else 0
                keep = stats.rank < limit
            else:
                keep = self._fold[stats.user] != model
            words = None if self.source.texts is None else self.unit_words
            value = fit(stats.user[keep], stats.item[keep], stats.items, words, self._dimensions)
            self._model = (model, value)
        return self._model[1]


def _chunks(lists: Lists, limit: int, model: Ints | None) -> Iterator[Ints]:
    """Yields groups of slates that share an embedding and fit in memory."""
    size = np.maximum(np.minimum(np.diff(lists.history_start), limit), 1)
    size = size * np.diff(lists.candidate_start)
    group = np.zeros(len(lists), np.int64) if model is None else model
    for value in np.unique(group):
        slates = np.flatnonzero(group == value)
        cut = np.cumsum(size[slates]) // _CHUNK
        yield from np.split(slates, np.flatnonzero(np.diff(cut)) + 1)


def _popularity(chunk: Chunk, _: State) -> dict[str, np.ndarray]:
    return {
        "popularity": np.log1p(chunk.of_item),
        "history_length": np.log1p(chunk.full_length[chunk.slate]),
    }


def _item_knn(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    stats = state.statistics
    pairs, of_history = chunk.pairs, chunk.of_history
    together = pairs.forward + pairs.backward
    of_item = chunk.pair(chunk.of_item)
    users = chunk.pair(stats.started.before(np.zeros_like(chunk.rank), chunk.rank)[0])
    share = together / (of_history + _SMOOTH)
    expected = of_history * of_item / np.maximum(users, 1)
    lift = np.log((together + 0.5) / (expected + 0.5))
    cosine = together / np.sqrt(np.maximum(of_history, 1) * np.maximum(of_item, 1))
    return {
        "item_knn": chunk.sum(share),
        "item_knn_decayed": chunk.sum(share * chunk.decay),
        "item_knn_cosine": chunk.sum(cosine),
        "item_knn_max": chunk.max(cosine),
        "item_knn_last": chunk.last(cosine),
        "item_knn_lift": chunk.mean(lift),
        "item_knn_lift_max": chunk.max(lift),
        "item_knn_light": np.log1p(chunk.sum(pairs.light / UNIT)),
        "item_knn_share": chunk.mean((together > 0) * 1.0),
    }


def _transition(chunk: Chunk, _: State) -> dict[str, np.ndarray]:
    pairs = chunk.pairs
    near = pairs.near / UNIT
    rate = near / (chunk.of_history + _SMOOTH)
    order = (pairs.forward + 1) / (pairs.forward + pairs.backward + 2)
    return {
        "transition": chunk.sum(rate * chunk.decay),
        "transition_last": chunk.last(rate),
        "transition_count": np.log1p(chunk.sum(near)),
        "transition_order": chunk.mean(order),
    }


def _item_embedding(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    model = state.embedding(int(state.model_of(chunk.user[:1], chunk.time[:1])[0]))
    if model is None:
        return {}
    # One row per slate: the pairs of its first candidate are its history.
    heads = np.flatnonzero(np.diff(chunk.slate, prepend=-1))
    head = np.isin(chunk.candidate, heads)
    shape = (int(chunk.slate[-1]) + 1, state.statistics.items)
    place = (chunk.slate[chunk.candidate[head]], chunk.history[head])
    mean = sp.csr_matrix((1 / chunk.length[chunk.candidate[head]], place), shape)
    decayed = sp.csr_matrix((chunk.decay[head], place), shape)
    vector = model.item[chunk.item]
    unit = _unit(model.item)
    user, user_decayed = mean @ model.item, _unit(decayed @ model.item)

    def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        scores = np.einsum("md,md->m", left, right[chunk.slate])
        return np.where(chunk.known, scores, np.nan)

    unit_item = unit[chunk.item]
    nearest = np.einsum("pd,pd->p", unit[chunk.history], unit_item[chunk.candidate])
    columns = {
        "embedding": product(vector, user),
        "embedding_decayed": product(vector, user_decayed),
        "embedding_cosine": product(unit_item, _unit(user)),
        "embedding_cosine_decayed": product(unit_item, user_decayed),
        "embedding_max": chunk.max(nearest),
    }
    if model.text is None:
        return columns
    text = _unit(model.text)[chunk.item]
    return columns | {
        "embedding_text": product(text, _unit(mean @ model.text)),
        "embedding_text_decayed": product(text, user_decayed),
        "embedding_of_text": product(unit_item, _unit(decayed @ model.text)),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


def _text_overlap(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    item = chunk.pair(chunk.item)
    overlap = row_products(state.words, chunk.history, item)
    length = np.sqrt(np.asarray(state.words.multiply(state.words).sum(axis=1)).ravel())
    scale = length[chunk.history] * length[item]
    cosine = overlap / np.where(scale > 0, scale, 1)
    return {
        "text_overlap": chunk.sum(overlap),
        "text_overlap_max": chunk.max(overlap),
        "text_overlap_last": chunk.last(overlap),
        "text_cosine": chunk.mean(cosine),
        "text_cosine_max": chunk.max(cosine),
        "text_cosine_decayed": chunk.sum(cosine * chunk.decay),
    }


def _category(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    item = chunk.pair(chunk.item)
    shared = (row_products(state.categories, chunk.history, item) > 0) * 1.0
    labels = np.diff(state.categories.indptr) > 0
    known = labels[chunk.item]
    return {
        "category_share": np.where(known, chunk.mean(shared), np.nan),
        "category_last": np.where(known, chunk.last(shared), np.nan),
    }


def _friends(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    """Friends of the user who name the candidate; each by 1/log(degree) for Adamic-Adar."""
    if state.source.person is None:
        return {}
    friend = state.source.person[chunk.history]
    named = state.statistics.met(friend, chunk.pair(chunk.item)) * 1.0
    degree = np.log(np.maximum(state.statistics.length_of(friend), 2))
    return {
        "common_friends": np.log1p(chunk.sum(named)),
        "adamic_adar": chunk.sum(named / degree),
    }


def _recency(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    stats = state.statistics
    if not stats.timed:
        count, depth = stats.counts(chunk.user, chunk.item, chunk.rank)
        mean = depth / UNIT / np.maximum(count, 1)
        return {"depth": np.where(count > 0, mean, np.nan)}
    events, now = stats.popularity, chunk.time
    count = events.before(chunk.item, chunk.rank)[0]
    columns = {}
    for name, rank in (
        ("days_since_first", events.first(chunk.item, chunk.rank)),
        ("days_since_last", events.last(chunk.item, chunk.rank)),
    ):
        days = (now - np.append(stats.moments, np.nan)[rank]) / _DAY
        columns[name] = np.log1p(days)
    for name, days in (("day", 1), ("week", 7), ("month", 30)):
        past = events.before(chunk.item, stats.rank_of(now - days * _DAY))[0]
        columns[f"popularity_{name}"] = np.log1p(count - past)
    return columns


def _click_rate(chunk: Chunk, state: State) -> dict[str, np.ndarray]:
    shown = state.source.shown
    if shown is None:
        return {}
    stats = state.statistics
    times, rank = np.zeros(1), np.zeros(len(shown.item), np.int64)
    now = np.ones(len(chunk.item), np.int64)
    if stats.timed:
        times = np.unique(shown.time)
        rank, now = np.searchsorted(times, shown.time), np.searchsorted(times, chunk.time)
    clicked = shown.clicked.astype(np.int64)
    seen, clicks = EventCounts(shown.item, rank, (clicked,)).before(chunk.item, now)
    if not stats.timed:
        own = EventCounts(shown.user * stats.items + shown.item, rank, (clicked,))
        key = np.where(chunk.user >= 0, chunk.user, 0) * stats.items + chunk.item
        own_seen, own_clicks = own.before(key, now)
        known = chunk.user >= 0
        seen, clicks = seen - known * own_seen, clicks - known * own_clicks
    rate = (clicks + _CLICK_PRIOR) / (seen + _SHOWN_PRIOR)
    return {"click_rate": rate, "times_shown": np.log1p(seen)}


_COMPUTE = {
    "popularity": _popularity,
    "click_rate": _click_rate,
    "item_knn": _item_knn,
    "transition": _transition,
    "item_embedding": _item_embedding,
    "text_overlap": _text_overlap,
    "category": _category,
    "friends": _friends,
    "recency": _recency,
}

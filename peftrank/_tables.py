"""A raw log as codes: the lists made of it, and its training part. Reads no file but a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from peftrank import slates as make
from peftrank._lists import PARTS, Codes, Floats, Ints, Lists, Sequences, Shown
from peftrank.errors import ConfigError, DataError
from peftrank.formats._log import Impression, Log
from peftrank.formats.slates import read_run

CATEGORY_FIELDS = ("category", "genres", "main_category")
_LIST = re.compile(r"\s*[,;|]\s*")


@dataclass(frozen=True)
class Settings:
    """How a log becomes slates."""

    split: str | None = None
    """leave-one-out, time, users or given. Absent: given where the raw files name parts, users
    for lists without parts, else leave-one-out."""
    valid: float | None = None
    test: float | None = None
    negatives: str = "uniform"
    n_negatives: int = 19
    targets_per_user: int = 1
    labels: str = "binary"
    min_rating: float | None = None
    history_length: int = 50
    max_slates: int | None = None
    features: tuple[str, ...] = ()
    as_of: str = "auto"
    """time, part, or auto: time where every interaction and slate has one and they differ."""
    category_field: str | None = None
    run: Path | None = None
    """Scores for the feature group `retriever`."""
    users_are_items: bool = False
    seed: int = 0
    on_error: str = "raise"
    domain: str | None = None
    parquet: bool = False

    @property
    def run_file(self) -> Path | None:
        """The run with retrieved candidates or scores, wherever it was named."""
        if self.run is not None:
            return self.run
        kind, _, file = self.negatives.partition(":")
        return Path(file) if kind == "run" else None


@dataclass(frozen=True)
class Made:
    """The lists of all parts, few in memory at once, and what must be known of all beforehand."""

    part: Ints
    """(S,) index into PARTS; parts follow one another."""
    user: Ints
    """(S,)"""
    time: Floats
    """(S,) NaN = unknown."""
    rated: bool
    """Whether history items differ in what the user gave them. A value that every interaction has
    (a click, a friendship) is no rating: a template that asks for low ones would call everything
    disliked."""
    blocks: Callable[[], Iterator[Lists]]
    """Makes the lists, a block after the other; the same ones each time."""

    def __len__(self) -> int:
        """Returns the number of slates."""
        return len(self.part)

    def select(self, keep: Ints) -> Made:
        """Returns the slates at the given positions, which ascend."""

        def blocks() -> Iterator[Lists]:
            first, held = 0, []
            for lists in self.blocks():
                low, high = np.searchsorted(keep, (first, first + len(lists)))
                held.append(make.select(lists, keep[low:high] - first))
                first += len(lists)
                if sum(len(each.candidate) for each in held) >= make.BLOCK:
                    yield make.join(held)
                    held = []
            if held:
                yield make.join(held)

        return replace(
            self, part=self.part[keep], user=self.user[keep], time=self.time[keep], blocks=blocks
        )


class Table:
    """A log as codes, with what was left out of it."""

    def __init__(self, log: Log, settings: Settings) -> None:
        """Codes the log; nothing is left out yet."""
        self.log, self.settings = log, settings
        self.dropped: dict[str, int] = {}
        self.notes: dict[str, int] = {}
        self.code = {item_id: code for code, item_id in enumerate(log.item_ids)}
        users = dict.fromkeys(log.user_ids)
        users.update(dict.fromkeys(row.user_id for row in log.impressions))
        self.user_ids = list(users)
        self.user_code = {user_id: code for code, user_id in enumerate(self.user_ids)}
        self.has_text = np.array([bool(log.items[i].fields) for i in log.item_ids], bool)
        self.notes["items without text"] = int((~self.has_text).sum())
        self.labels = _labels(log, settings.category_field)
        self.person: Ints | None = None
        if settings.users_are_items:
            self.person = np.array([self.user_code.get(i, -1) for i in log.item_ids], np.int64)

    def rng(self, purpose: int) -> np.random.Generator:
        """Returns a generator of its own for each purpose, so that settings do not interact."""
        return np.random.default_rng((self.settings.seed, purpose))

    def from_interactions(self) -> tuple[Made, Sequences, Shown | None]:
        """Returns lists sampled from the interactions, and the training part."""
        settings = self.settings
        keep = np.ones(len(self.log), bool)
        every = self._sequences(keep)
        if settings.min_rating is not None:
            keep = keep & (self.log.value >= settings.min_rating)
            self.dropped["interactions below --min-rating"] = int((~keep).sum())
        keep = keep & self._with_text()
        sequences = every if keep.all() else self._sequences(keep)
        how = settings.split or "leave-one-out"
        if how == "given":
            raise ConfigError("--split given needs lists that were really shown, with their parts")
        targets = make.split(
            sequences,
            how,
            valid=settings.valid,
            test=settings.test,
            targets_per_user=settings.targets_per_user,
            rng=self.rng(0),
        )
        short = int((np.diff(sequences.start) < 2).sum())
        self.dropped["users with fewer than 2 interactions"] = short
        training = self._training(sequences, targets)
        chosen = self._negatives(every, sequences, targets, training)
        user = np.searchsorted(sequences.start, targets.event, side="right") - 1
        return self._made(sequences, targets, user, chosen), training, None

    def _made(
        self,
        sequences: Sequences,
        targets: make.Targets,
        user: Ints,
        chosen: tuple[Ints, Codes],
    ) -> Made:
        settings = self.settings
        kept = np.arange(len(user))
        if settings.max_slates is not None:
            kept = make.limit(targets.part, user, settings.max_slates, self.rng(3))
            self.dropped["training slates over --max-slates"] = len(user) - len(kept)

        def blocks() -> Iterator[Lists]:
            return make.from_targets(
                sequences,
                targets,
                self.user_ids,
                chosen,
                history_length=settings.history_length,
                labels=settings.labels,
                rng=self.rng(2),
            )

        event = targets.event[kept]
        first = np.maximum(sequences.start[user[kept]], event - settings.history_length)
        # How many of the histories begin or have not ended at each event.
        edges = np.bincount(first, minlength=len(sequences.item) + 1)
        edges -= np.bincount(event, minlength=len(edges))
        given = sequences.value[np.cumsum(edges[:-1]) > 0]
        made = Made(
            part=targets.part,
            user=user,
            time=sequences.time[targets.event],
            rated=bool(len(given) and given.min() < given.max()),
            blocks=blocks,
        )
        return made if len(kept) == len(user) else made.select(kept)

    def _with_text(self) -> np.ndarray:
        bare = ~self.has_text[self.log.item]
        if bare.any() and self.settings.on_error == "raise":
            item = self.log.item_ids[self.log.item[bare][0]]
            raise DataError(
                f"{int(bare.sum())} interactions are with items without any text, {item!r} the "
                "first. Use --on-error skip to leave them out."
            )
        self.dropped["interactions with items without text"] = int(bare.sum())
        return ~bare

    def _sequences(self, keep: np.ndarray) -> Sequences:
        order = self.log.order()
        if self.person is not None and np.isnan(self.log.timestamp).all():
            # Friends stand in the order of their numbers: the last one is not the newest.
            turn = self.rng(5).random(len(order))
            order = order[np.lexsort((turn, self.log.user[order]))]
        order = order[keep[order]]
        user = self.log.user[order].astype(np.int64)
        start = np.searchsorted(user, np.arange(len(self.user_ids) + 1))
        return Sequences(
            start=start.astype(np.int64),
            item=self.log.item[order],
            time=self.log.timestamp[order],
            value=self.log.value[order],
        )

    def _training(self, sequences: Sequences, targets: make.Targets) -> Sequences:
        keep = targets.training.copy()
        if self.person is not None:
            user = np.repeat(np.arange(len(self.user_ids)), np.diff(sequences.start))
            # A friendship is listed from both sides: a held-out one must go from both.
            total = len(self.user_ids)
            mine = user * total + self.person[sequences.item]
            theirs = self.person[sequences.item] * total + user
            twin = keep & np.isin(theirs, mine[~keep]) & (self.person[sequences.item] >= 0)
            self.notes["training friendships removed with their held-out twins"] = int(twin.sum())
            keep &= ~twin
        start = np.concatenate((np.zeros(1, np.int64), np.cumsum(keep)))[sequences.start]
        return Sequences(start, sequences.item[keep], sequences.time[keep], sequences.value[keep])

    def _negatives(
        self, every: Sequences, sequences: Sequences, targets: make.Targets, train: Sequences
    ) -> tuple[Ints, Codes]:
        items, settings = len(self.log.item_ids), self.settings
        user = np.searchsorted(sequences.start, targets.event, side="right") - 1
        known = np.repeat(np.arange(len(self.user_ids)), np.diff(every.start))
        known *= items
        known += every.item
        if self.person is not None:
            selves = np.flatnonzero(self.person >= 0)
            known = np.concatenate((known, self.person[selves] * items + selves))
        known.sort()
        known = known[np.diff(known, prepend=-1) > 0]
        target = sequences.item[targets.event].astype(np.int64)
        if settings.negatives.startswith("run:"):
            position = targets.event - sequences.start[user]
            names = [
                (f"{self.user_ids[u]}-{p}", self.user_ids[u])
                for u, p in zip(user, position, strict=True)
            ]
            ranked = {name: [c for c, _ in row] for name, row in self._run.items()}
            return make.from_run(ranked, names, user, settings.n_negatives, known, items)
        pool = np.flatnonzero(self.has_text)
        draw = self._draw(pool, train, target)
        count = settings.n_negatives
        start, item, filled = make.negatives(user, count, known, items, draw, pool, self.rng(4))
        self.notes[f"negatives drawn uniformly for want of {settings.negatives} ones"] = filled
        self.notes["slates with fewer negatives"] = int((np.diff(start) < count).sum())
        return start, item

    def _draw(self, pool: Ints, train: Sequences, target: Ints) -> make.Draw:
        kind, rng = self.settings.negatives, self.rng(1)
        if kind == "popularity":
            count = np.bincount(train.item, minlength=len(self.log.item_ids))
            return make.draw_by_weight(pool, count[pool].astype(np.float64), rng)
        if kind == "category":
            if self.labels is None:
                raise ConfigError("--negatives category needs a category; see --category-field")
            codes: dict[str, int] = {}
            first = [row[0] if row else None for row in self.labels]
            group = [-1 if c is None else codes.setdefault(c, len(codes)) for c in first]
            return make.draw_same_group(pool, np.array(group, np.int64), target, rng)
        return make.draw_uniform(pool, rng)

    @cached_property
    def _run(self) -> dict[str, list[tuple[int, float]]]:
        file = self.settings.run_file
        if file is None:
            raise ConfigError("no run file was given")
        found = {}
        for ranked in read_run(file):
            unknown = [i for i in ranked.item_ids if i not in self.code]
            if unknown:
                raise DataError(f"item {unknown[0]!r} of the run is not in this log", path=file)
            codes = (self.code[i] for i in ranked.item_ids)
            found[ranked.slate_id] = list(zip(codes, ranked.scores, strict=True))
        return found

    def retriever(self, lists: Lists) -> Floats:
        """Returns the run's score of each candidate; one it lacks gets the lowest of its list.

        A gap instead would mark the target where the retriever missed it.
        """
        run = self._run
        scores = np.full(len(lists.candidate), np.nan)
        for slate, slate_id in enumerate(lists.slate_ids):
            row = dict(run.get(slate_id, run.get(self.user_ids[lists.user[slate]], [])))
            rows = slice(lists.candidate_start[slate], lists.candidate_start[slate + 1])
            given = np.array([row.get(int(c), np.nan) for c in lists.candidate[rows]])
            if not np.isnan(given).all():
                scores[rows] = np.where(np.isnan(given), np.nanmin(given), given)
        return scores

    def from_shown(self) -> tuple[Made, Sequences, Shown | None]:
        """Returns the lists really shown, and what the training part says."""
        settings = self.settings
        self._refuse_sampling()
        rows = self._usable()
        part = self._parts(rows)
        order = sorted(
            range(len(rows)),
            key=lambda i: (part[i], self.user_code[rows[i].user_id], -(rows[i].timestamp or 0)),
        )
        rows, part = [rows[i] for i in order], part[order]
        lists = self._lists(rows, part, settings.history_length)
        training = [row for row, p in zip(rows, part, strict=True) if p == 0]
        if settings.max_slates is not None:
            kept = make.limit(lists.part, lists.user, settings.max_slates, self.rng(3))
            self.dropped["training slates over --max-slates"] = len(lists) - len(kept)
            lists = make.select(lists, kept)
        made = Made(lists.part, lists.user, lists.time, rated=False, blocks=lambda: iter([lists]))
        return made, self._met(training), self._shown(training)

    def _refuse_sampling(self) -> None:
        """Raises ConfigError for settings that only sampled lists obey."""
        default, settings = Settings(), self.settings
        for name in ("negatives", "n_negatives", "targets_per_user", "labels", "min_rating"):
            if getattr(settings, name) != getattr(default, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for lists sampled from interactions; these "
                    "lists were really shown and are kept as they are"
                )

    def _usable(self) -> list[Impression]:
        kept, bare, unknown, idle = [], 0, 0, 0
        for row in self.log.impressions:
            codes = [self.code[i] for i in (*row.history, *row.candidates)]
            if not self.has_text[codes].all():
                if self.settings.on_error == "raise":
                    raise DataError(f"slate {row.slate_id!r} has an item without any text")
                bare += 1
                continue
            idle += row.labels is not None and not any(row.labels)
            unknown += row.labels is None
            kept.append(row)
        self.dropped["slates with items without text"] = bare
        self.notes["slates without labels"] = unknown
        self.notes["slates without a relevant candidate"] = idle
        return kept

    def _parts(self, rows: list[Impression]) -> Ints:
        settings = self.settings
        named = {row.part for row in rows}
        how = settings.split or ("given" if len(named - {""}) > 1 else "users")
        if how == "given":
            if settings.valid is not None or settings.test is not None:
                raise ConfigError(
                    "the raw files name the parts; drop --valid and --test, or use --split users"
                )
            if "" in named:
                raise ConfigError("--split given: the raw files do not name the parts")
            return np.array([PARTS.index(row.part) for row in rows], np.int64)
        if how == "users":
            users = [row.user_id for row in rows]
            parts = make.held_out(users, settings.valid, settings.test, self.rng(0))
            return np.array([parts[user] for user in users], np.int64)
        if how == "time":
            time = np.array([np.nan if r.timestamp is None else r.timestamp for r in rows])
            return make.part_by_time(time, settings.valid, settings.test)
        raise ConfigError(f"--split {how} is for interactions; these are lists really shown")

    def _lists(self, rows: Sequence[Impression], part: Ints, history_length: int) -> Lists:
        history = [[self.code[i] for i in row.history[-history_length:]] for row in rows]
        if history_length == 0:
            history = [[] for _ in rows]
        candidates = [[self.code[i] for i in row.candidates] for row in rows]
        labels = [row.labels or (np.nan,) * len(row.candidates) for row in rows]
        time = [np.nan if row.timestamp is None else row.timestamp for row in rows]
        flat = np.array([c for row in history for c in row], np.int64)
        return Lists(
            slate_ids=tuple(row.slate_id for row in rows),
            user=np.array([self.user_code[row.user_id] for row in rows], np.int64),
            part=part,
            time=np.array(time, np.float64),
            history_start=np.cumsum([0, *map(len, history)], dtype=np.int64),
            history=flat,
            feedback=np.ones(len(flat)),
            candidate_start=np.cumsum([0, *map(len, candidates)], dtype=np.int64),
            candidate=np.array([c for row in candidates for c in row], np.int64),
            label=np.array([x for row in labels for x in row], np.float64),
        )

    def _met(self, rows: Sequence[Impression]) -> Sequences:
        """Returns what training users met: their histories, then what they chose."""
        events: list[tuple[int, float, int, float]] = []
        for row in rows:
            user = self.user_code[row.user_id]
            time = np.nan if row.timestamp is None else row.timestamp
            events.extend((user, time, self.code[i], 1.0) for i in row.history)
            labels = zip(row.candidates, row.labels or (), strict=False)
            events.extend((user, time, self.code[i], x) for i, x in labels if x > 0)
        table = np.array(events, np.float64).reshape(-1, 4)
        order = np.lexsort((np.nan_to_num(table[:, 1], nan=-np.inf), table[:, 0]))
        table = table[order]
        start = np.searchsorted(table[:, 0], np.arange(len(self.user_ids) + 1))
        item, value = table[:, 2].astype(np.int32), table[:, 3].astype(np.float32)
        return Sequences(start.astype(np.int64), item, table[:, 1], value)

    def _shown(self, rows: Sequence[Impression]) -> Shown:
        labelled = [row for row in rows if row.labels is not None]
        lists = self._lists(labelled, np.zeros(len(labelled), np.int64), 0)
        slate = np.repeat(np.arange(len(lists)), np.diff(lists.candidate_start))
        return Shown(lists.user[slate], lists.candidate, lists.time[slate], lists.label > 0)


def _labels(log: Log, field: str | None) -> list[list[str]] | None:
    """Returns the categories of each item, None where no item has any."""
    names = CATEGORY_FIELDS if field is None else (field,)
    chosen = next((n for n in names if any(n in i.fields for i in log.items.values())), None)
    if chosen is None:
        if field is not None:
            raise ConfigError(f"no item has a field {field!r}")
        return None
    texts = (item.fields.get(chosen, "") for item in log.items.values())
    return [[label for label in _LIST.split(text.strip()) if label] for text in texts]

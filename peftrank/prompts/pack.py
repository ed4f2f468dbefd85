"""Prompt trees -> Batch: several trees in a row, with what they share stored and computed once.

All trees of a batch form one trie, whose nodes are segments: equal tokens under an equal parent are
one node. A row is a set of nodes that holds, with each tree, the tree's whole path. So slates share
their preamble in a row, and lists shown to one user share the history. Markers see the rest of
their own slate, so they are never shared between slates. A long list of candidates that do not see
each other lies in several rows, with the trunk in each. Where a base can read keys and values of
other rows, what several rows hold is computed in one of them (`Batch.once`). It knows no text but
through `collate`, and no model.

Relatives: Prefix Grouper (arXiv 2506.05433), Tree Training (arXiv 2511.00413).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from peftrank.errors import DataError
from peftrank.prompts.template import PromptTemplate
from peftrank.prompts.tree import branches, ends, last_of_trunk, split, token_count
from peftrank.types import Batch, Once, Past, PromptTree, Slate

_PLACES = ("row", "end", "start", "stop", "before", "trunk", "mask")
_TIGHTER = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75)
_ATTENTION_TOKENS = 1024
"""In a row of so many, attention costs about as much as all else (SmolLM2-135M on a CPU: 820)."""
_TRUNKS = 3
"""A long list's rows are so many trunks long, if `row_tokens` is less: longer ones repeat the trunk
less often, shorter ones attend to less."""
_KEY = 0.1
"""What a row's key costs that is brought from where it was computed, in time and memory, beside a
token (SmolLM2-135M)."""


def collate(
    slates: Sequence[Slate],
    template: PromptTemplate,
    *,
    pad_token_id: int,
    feature_names: Sequence[str] = (),
    row_tokens: int = 512,
) -> Batch:
    """Returns the batch of these slates, with labels and candidate features.

    `labels` is None if any slate has none; `features` is None if no names are given. Features are
    (S, N, F) in the order of `feature_names`, NaN where a candidate lacks one.

    Raises:
        DataError: a slate cannot become a tree, or its labels do not fit its candidates.
    """
    trees = [template.tree(slate) for slate in slates]
    known = [slate.labels for slate in slates if slate.labels is not None]
    batch = pack(
        trees,
        row_tokens=row_tokens,
        pad_token_id=pad_token_id,
        labels=known if len(known) == len(slates) else None,
    )
    if not feature_names:
        return batch
    return replace(batch, features=feature_tensor(slates, feature_names))


def pack(
    trees: Sequence[PromptTree],
    *,
    pad_token_id: int,
    row_tokens: int = 512,
    labels: Sequence[Sequence[float] | None] | None = None,
    weights: Sequence[Sequence[float] | None] | None = None,
    tasks: Tensor | None = None,
    features: Tensor | None = None,
    groups: Sequence[int] | None = None,
    known: Sequence[int] | None = None,
    once: bool = False,
) -> Batch:
    """Returns trees packed into rows; what a candidate sees is its own path, whatever lies beside.

    Trees keep their order in the batch; which row each goes to depends on the trees alone. Rows are
    as long as the longest tree where that exceeds `row_tokens`, but see `in_rows`.

    Args:
        trees: At least one.
        pad_token_id: Fills the ends of shorter rows.
        row_tokens: The most tokens in a row that holds several trees.
        labels: Per tree one value per candidate, or None; any None means a batch without labels.
        weights: Per tree one value per candidate, or None for all 1; a batch in which all are None
            has none.
        tasks: (S, N, K) float, NaN = unknown.
        features: (S, N, F) float, NaN = missing.
        groups: Per tree a number, where trees of different groups are read with different
            adapters. They then share no tokens, and `spans` says which tokens are whose.
        known: Per tree, how many of its segments from the root on need not be computed. They go
            to `past`; never the last of a trunk, where readouts read.
        once: Whether the base can compute what rows share in one of them, as decoders can. The
            batch then says how, where that costs less. Not together with `known`.

    Raises:
        DataError: no trees, or labels or weights that do not fit the candidates.
    """
    if not trees:
        raise DataError("no slates to pack; expected at least one")
    trie = _Trie()
    divided = [in_rows(tree, row_tokens) for tree in trees]
    parts = list(chain.from_iterable(divided))
    slate = [s for s, own in enumerate(divided) for _ in own]
    group = [0 if groups is None else groups[s] for s in slate]
    before = [0 if known is None else known[s] for s in slate]
    nodes = [
        trie.add(part, g, s, k) for part, g, s, k in zip(parts, group, slate, before, strict=True)
    ]
    chosen, shared = _plan(trie, parts, nodes, row_tokens, once and known is None)
    plan = [sorted(members, key=group.__getitem__) for members in chosen]
    plan.sort(key=lambda members: group[members[0]])  # few, long spans
    rows = [_row(trie, nodes, members) for members in plan]
    computed, starts = _once(rows) if shared else (None, _all_starts(rows))
    size = max(row.size for row in rows) * len(rows) if computed is None else computed.place.numel()
    return Batch(
        **_token_tensors(trie, parts, nodes, rows, pad_token_id),
        once=computed,
        spans=() if groups is None else _spans(trie, starts, size),
        **_candidate_tensors(trie, parts, slate, nodes, rows),
        letters=_letters(trees),
        labels=_labels(trees, labels),
        weights=_weights(trees, weights),
        tasks=tasks,
        features=features,
        slate_ids=tuple(tree.slate_id for tree in trees),
        past=None if known is None else _past(trie, parts, slate, nodes, rows, before),
    )


def of_slates(batch: Batch, indices: Sequence[int], features: Tensor | None = None) -> Batch:
    """Returns the batch with only these of its slates to score; the rows stay as they are.

    Args:
        batch: Packed trees.
        indices: Which slates, in the order wanted.
        features: (len(indices), N, F) of these slates.
    """
    places = {name: getattr(batch, name)[indices] for name in _PLACES}
    return replace(
        batch,
        **places,
        letters=None if batch.letters is None else batch.letters[indices],
        labels=None if batch.labels is None else batch.labels[indices],
        weights=None if batch.weights is None else batch.weights[indices],
        tasks=None if batch.tasks is None else batch.tasks[indices],
        features=features,
        slate_ids=tuple(batch.slate_ids[i] for i in indices),
    )


def in_rows(
    tree: PromptTree, row_tokens: int = 512, *, most: int | None = None
) -> list[PromptTree]:
    """Returns the tree, or trees that hold its candidates in turn, for as many rows.

    Candidates that see each other stay in one row, however long.

    Args:
        tree: What to lay in rows.
        row_tokens: The same as given to `pack`. A tree of less than two rows is laid in one.
        most: Tokens that a part may have at most, if that is less; twice the trunk where that is
            longer, lest the trunk be most of the work.
    """
    size = token_count(tree)
    if size <= min(2 * row_tokens, size if most is None else most):
        return [tree]
    trunk, _ = branches(tree)
    row = max(row_tokens, _TRUNKS * trunk)
    limit = 2 * row
    if most is not None:
        row, limit = min(row, max(most, 2 * trunk)), min(limit, most)
    return split(tree, row) if size > limit else [tree]


def micro_batches(
    trees: Sequence[PromptTree],
    micro_tokens: int,
    *,
    row_tokens: int = 512,
    known: Sequence[int] | None = None,
) -> list[list[int]]:
    """Returns successive groups of tree indices, each of which packs into `micro_tokens` or less.

    The size of a group is that of its packed batch, padding included (R * T); what trees share only
    makes it smaller. A tree larger than `micro_tokens` is a group of its own.

    Args:
        trees: In the order in which they are read.
        micro_tokens: Tokens per forward pass.
        row_tokens: The same as given to `pack`.
        known: Per tree, tokens of its trunk that need not be computed.
    """
    groups: list[list[int]] = []
    fill: list[int] = []
    for index, tree in enumerate(trees):
        less = 0 if known is None else known[index]
        lengths = [token_count(part) - less for part in in_rows(tree, row_tokens)]
        grown = _filled(fill, lengths, row_tokens)
        if groups and len(grown) * max(grown) <= micro_tokens:
            groups[-1].append(index)
            fill = grown
        else:
            groups.append([index])
            fill = _filled([], lengths, row_tokens)
    return groups


def _filled(fill: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[int]:
    """Returns the tokens in each row once trees that share nothing are added."""
    grown = list(fill)
    for length in lengths:
        row = _first_fit(grown, [length] * len(grown), length, row_tokens)
        if row == len(grown):
            grown.append(0)
        grown[row] += length
    return grown


@dataclass
class _Trie:
    """The distinct segments of several trees; a parent's index is smaller than its children's."""

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    """Tokens on the path before the node's first."""
    group: list[int] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)
    """Whether the node's tokens need not be computed."""
    _index: dict[tuple[int, int, int, tuple[int, ...]], int] = field(default_factory=dict)

    def add(self, tree: PromptTree, group: int, number: int, known: int) -> list[int]:
        """Returns the node of each of the tree's segments, new ones added.

        Args:
            tree: What to add.
            group: See `pack`.
            number: Of the tree, by which its markers are told from those of others.
            known: See `pack`.
        """
        nodes: list[int] = []
        markers = set(tree.markers)
        for index, segment in enumerate(tree.segments):
            parent = -1 if segment.parent < 0 else nodes[segment.parent]
            owner = number if index in markers else -1
            key = group, owner, parent, segment.tokens
            node = self._index.setdefault(key, len(self.tokens))
            if node == len(self.tokens):
                self.group.append(group)
                self.known.append(True)
                self.tokens.append(segment.tokens)
                self.parent.append(parent)
                above = 0 if parent < 0 else self.depth[parent] + len(self.tokens[parent])
                self.depth.append(above)
            self.known[node] &= index < known  # where any tree reads its states it is computed
            nodes.append(node)
        return nodes

    def cost(self, node: int) -> int:
        """Returns the tokens that must be computed for a node."""
        return 0 if self.known[node] else len(self.tokens[node])


@dataclass
class _Row:
    trees: list[int]
    past: list[int]
    """Nodes that are known; parents first."""
    nodes: list[int]
    """The others, in the order they lie in the row: parents first."""
    lengths: np.ndarray
    starts: np.ndarray
    """First token of each of `nodes` in the row."""
    place: dict[int, int]
    """Index by node, of `nodes` and then of `past`."""

    @property
    def size(self) -> int:
        return int(self.lengths.sum())

    def start(self, node: int) -> int:
        """Returns the first token of one of `nodes`."""
        return int(self.starts[self.place[node]])


def _row(trie: _Trie, nodes: Sequence[Sequence[int]], members: list[int]) -> _Row:
    held = list(dict.fromkeys(chain.from_iterable(nodes[tree] for tree in members)))
    past = [node for node in held if trie.known[node]]
    own = [node for node in held if not trie.known[node]]
    lengths = np.array([len(trie.tokens[node]) for node in own], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    place = {node: i for i, node in enumerate([*own, *past])}
    return _Row(members, past, own, lengths, starts, place)


def _plan(
    trie: _Trie,
    trees: Sequence[PromptTree],
    nodes: Sequence[Sequence[int]],
    row_tokens: int,
    once: bool,
) -> tuple[list[list[int]], bool]:
    """Returns which trees go to which row, and whether what rows share is computed once.

    Of a few greedy plans it is the one that costs least. One plan ignores what trees share, as
    `micro_batches` does, and none in which more tokens are computed is taken, so that its promise
    holds. The others take row budgets under `row_tokens`, because rows of equal length need no
    padding, and down to the longest tree, because trees that share nothing should not pay for
    attention to each other. Where sharing does not need a row, one has a row for every tree.
    """
    lengths = [trie.cost(node) for node in range(len(trie.tokens))]
    shared = [{node: lengths[node] for node in tree} for tree in nodes]
    alone = [{index: sum(lengths[node] for node in tree)} for index, tree in enumerate(nodes)]
    plans = [_place(shared, row_tokens)]
    even = sum(lengths) / len(plans[0])
    longest = max(sum(tree.values()) for tree in shared)
    budgets = {int(start * factor) + 1 for start in (even, longest) for factor in _TIGHTER}
    plans += [_place(shared, budget) for budget in sorted(budgets) if budget < row_tokens]
    plans.append(_place(alone, row_tokens))

    def size(plan: list[list[int]]) -> tuple[int, int]:
        held = [set(chain.from_iterable(nodes[tree] for tree in members)) for members in plan]
        return len(plan), max(sum(lengths[node] for node in row) for row in held)

    def cost(computed: int, tokens: int) -> float:
        return computed * (1 + tokens / _ATTENTION_TOKENS)

    sizes = [size(plan) for plan in plans]
    most = math.prod(sizes[-1])
    costs = [
        (cost(rows * tokens, tokens), index, False)
        for index, (rows, tokens) in enumerate(sizes)
        if rows * tokens <= most
    ]
    if once:
        plans.append([[tree] for tree in range(len(nodes))])
        sizes.append((len(nodes), longest))
        for index, plan in enumerate(plans):
            fresh = _fresh(plan, nodes, lengths)
            tokens = sizes[index][1]
            rows, length = _divided(fresh, tokens)
            if rows * length <= most:
                gathered = _KEY * rows * tokens
                costs.append((cost(rows * length, tokens) + gathered, index, True))
    _, best, gathers = min(costs)
    return plans[best], gathers


def _fresh(
    plan: Sequence[Sequence[int]], nodes: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[int]:
    """Returns the tokens of each row that no earlier row holds."""
    seen: set[int] = set()
    found = []
    for members in plan:
        new = set(chain.from_iterable(nodes[tree] for tree in members)) - seen
        found.append(sum(lengths[node] for node in new))
        seen |= new
    return found


def _divided(fresh: Sequence[int], keys: int) -> tuple[int, int]:
    """Returns how many rows of which length compute the tokens for least, padding included.

    Each of them holds tokens of one row and sees `keys` keys, so many short ones cost more.
    """
    sizes = np.array([tokens for tokens in fresh if tokens])
    lengths = {-(-int(tokens) // parts) for tokens in set(sizes.tolist()) for parts in (1, 2, 3, 4)}

    def cost(length: int) -> float:
        rows = int((-(-sizes // length)).sum())
        return rows * (length * (1 + keys / _ATTENTION_TOKENS) + _KEY * keys)

    best = min(sorted(lengths), key=cost)
    return int((-(-sizes // best)).sum()), best


def _place(trees: Sequence[Mapping[int, int]], row_tokens: int) -> list[list[int]]:
    """Returns rows of tree indices; each tree goes where it adds least, or to a new row.

    Args:
        trees: Token counts by node.
        row_tokens: Budget of a row, unless a tree alone is longer.
    """
    rows: list[list[int]] = []
    held: list[dict[int, int]] = []
    fill: list[int] = []
    for index, nodes in enumerate(trees):
        added = [sum(n for node, n in nodes.items() if node not in row) for row in held]
        size = sum(nodes.values())
        row = _first_fit(fill, added, size, row_tokens)
        if row == len(rows):
            rows.append([])
            held.append({})
            fill.append(0)
            added.append(size)
        rows[row].append(index)
        held[row].update(nodes)
        fill[row] += added[row]
    return rows


def _first_fit(fill: Sequence[int], added: Sequence[int], size: int, row_tokens: int) -> int:
    """Returns the first row to which a tree of `size` adds least and still fits, or a new one's.

    All rows are padded to the longest, so they may be filled to its length.
    """
    limit = max(row_tokens, size, *fill)
    fits = [row for row, tokens in enumerate(fill) if tokens + added[row] <= limit]
    return min(fits, key=lambda row: added[row], default=len(fill))


def _token_tensors(
    trie: _Trie,
    trees: Sequence[PromptTree],
    nodes: Sequence[Sequence[int]],
    rows: Sequence[_Row],
    pad_token_id: int,
) -> dict[str, Tensor]:
    tokens = max(row.size for row in rows)
    group = max(len(row.nodes) + len(row.past) for row in rows)
    input_ids = np.full((len(rows), tokens), pad_token_id, dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    segment_ids = np.full_like(input_ids, -1)
    ancestors = np.zeros((len(rows), group, group), dtype=np.bool_)
    for r, row in enumerate(rows):
        input_ids[r, : row.size] = list(chain.from_iterable(trie.tokens[n] for n in row.nodes))
        depth = np.array([trie.depth[node] for node in row.nodes], dtype=np.int64)
        position_ids[r, : row.size] = np.arange(row.size)
        position_ids[r, : row.size] += np.repeat(depth - row.starts, row.lengths)
        segment_ids[r, : row.size] = np.repeat(np.arange(len(row.nodes)), row.lengths)
        for node in sorted(row.place):  # parents first, known or not
            i = row.place[node]
            if trie.parent[node] >= 0:
                ancestors[r, i] = ancestors[r, row.place[trie.parent[node]]]
            ancestors[r, i, i] = True
        for s in row.trees:
            if trees[s].markers:
                markers = [row.place[nodes[s][marker]] for marker in trees[s].markers]
                ancestors[r][np.ix_(markers, markers)] = True
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "segment_ids": torch.from_numpy(segment_ids),
        "ancestors": torch.from_numpy(ancestors),
    }


Starts = list[tuple[int, int]]
"""(node, first of its tokens among all that are computed), in order."""


def _all_starts(rows: Sequence[_Row]) -> Starts:
    """Returns where nodes begin in the flattened rows."""
    tokens = max(row.size for row in rows)
    return [
        (node, r * tokens + int(start))
        for r, row in enumerate(rows)
        for node, start in zip(row.nodes, row.starts, strict=True)
    ]


def _once(rows: Sequence[_Row]) -> tuple[Once, Starts]:
    """Returns how every node is computed in the first row that holds it, and where it then is."""
    seen: set[int] = set()
    own = []
    for row in rows:
        own.append([i for i, node in enumerate(row.nodes) if node not in seen])
        seen.update(row.nodes)
    fresh = [int(row.lengths[new].sum()) for row, new in zip(rows, own, strict=True)]
    count, length = _divided(fresh, max(row.size for row in rows))
    of = np.zeros(count, dtype=np.int64)
    place = np.full((count, length), -1, dtype=np.int64)
    found = np.zeros((len(rows), max(row.size for row in rows)), dtype=np.int64)
    start: dict[int, int] = {}
    first = 0
    for r, (row, new) in enumerate(zip(rows, own, strict=True)):
        used = -(-fresh[r] // length)
        of[first : first + used] = r
        tokens = [np.arange(row.starts[i], row.starts[i] + row.lengths[i]) for i in new]
        if tokens:  # successive rows are one stretch of the flattened ones
            place.reshape(-1)[first * length :][: fresh[r]] = np.concatenate(tokens)
        at = first * length
        for i in new:
            start[row.nodes[i]] = at
            at += int(row.lengths[i])
        begin = np.array([start[node] for node in row.nodes], dtype=np.int64)
        found[r, : row.size] = np.arange(row.size)
        found[r, : row.size] += np.repeat(begin - row.starts, row.lengths)
        first += used
    once = Once(*(torch.from_numpy(array) for array in (of, place, found)))
    return once, list(start.items())


def _spans(trie: _Trie, starts: Starts, size: int) -> tuple[tuple[int, int, int], ...]:
    """Returns (group, start, stop) over all `size` computed tokens, neighbours of a group merged.

    Padding belongs to the group before it.
    """
    firsts = [(trie.group[node], first) for node, first in starts]
    changes = [each for i, each in enumerate(firsts) if i == 0 or each[0] != firsts[i - 1][0]]
    stops = [*(first for _, first in changes[1:]), size]
    return tuple((group, first, stop) for (group, first), stop in zip(changes, stops, strict=True))


def computed_tokens(batch: Batch) -> int:
    """Returns the tokens that pass through the base, padding left out."""
    if batch.once is not None:
        return int((batch.once.place >= 0).sum())
    return int((batch.segment_ids >= 0).sum())


def _candidate_tensors(
    trie: _Trie,
    parts: Sequence[PromptTree],
    slate: Sequence[int],
    nodes: Sequence[Sequence[int]],
    rows: Sequence[_Row],
) -> dict[str, Tensor]:
    """Returns where candidates lie; `slate` says whose each part holds, one slate's in order."""
    count = [0] * (slate[-1] + 1)
    before = []
    for s, part in zip(slate, parts, strict=True):
        before.append(count[s])
        count[s] += len(part.candidates)
    shape = (len(count), max(count))
    found: dict[str, np.ndarray] = {
        name: np.zeros(shape, dtype=np.int64) for name in ("row", "end", "start", "stop")
    }
    found["before"] = np.full(shape, -1, dtype=np.int64)
    found["trunk"] = np.full(len(count), -1, dtype=np.int64)
    mask = np.arange(shape[1]) < np.array(count)[:, None]
    for r, row in enumerate(rows):
        for p in row.trees:
            s, part = slate[p], parts[p]
            if before[p] == 0:
                found["trunk"][s] = _parents_last(trie, row, nodes[p][part.candidates[0].segment])
            spans = zip(part.candidates, ends(part), strict=True)
            for c, (span, end) in enumerate(spans, start=before[p]):
                node, last = nodes[p][span.segment], nodes[p][end]
                first = row.start(node)
                found["row"][s, c] = r
                found["end"][s, c] = row.start(last) + len(trie.tokens[last]) - 1
                found["start"][s, c] = first + span.start
                found["stop"][s, c] = first + span.stop
                found["before"][s, c] = _before(trie, row, node, first + span.start)
    return {name: torch.from_numpy(array) for name, array in (found | {"mask": mask}).items()}


def _before(trie: _Trie, row: _Row, node: int, start: int) -> int:
    """Returns the row's token that precedes `start` on the node's path, -1 at a root's start."""
    inside = start > row.start(node)
    return start - 1 if inside else _parents_last(trie, row, node)


def _parents_last(trie: _Trie, row: _Row, node: int) -> int:
    """Returns the row's last token of the node's parent, -1 for a root."""
    parent = trie.parent[node]
    if parent < 0:
        return -1
    return row.start(parent) + len(trie.tokens[parent]) - 1


def _past(
    trie: _Trie,
    parts: Sequence[PromptTree],
    slate: Sequence[int],
    nodes: Sequence[Sequence[int]],
    rows: Sequence[_Row],
    known: Sequence[int],
) -> Past:
    tokens = max(sum(len(trie.tokens[node]) for node in row.past) for row in rows)
    segment_ids = np.full((len(rows), tokens), -1, dtype=np.int64)
    position_ids = np.zeros_like(segment_ids)
    held: list[tuple[tuple[int, int], ...]] = []
    new: dict[int, tuple[int, int, int]] = {}
    trunks: list[tuple[int, ...]] = [()] * (slate[-1] + 1)
    for r, row in enumerate(rows):
        first = 0
        for node in row.past:
            stop = first + len(trie.tokens[node])
            segment_ids[r, first:stop] = row.place[node]
            position_ids[r, first:stop] = trie.depth[node] + np.arange(stop - first)
            first = stop
        owner = {nodes[p][j]: (slate[p], j) for p in row.trees for j in range(known[p])}
        held.append(tuple(owner[node] for node in row.past))
        for p in row.trees:
            trunk = nodes[p][known[p] : last_of_trunk(parts[p])]
            trunks[slate[p]] = tuple(trunk)  # the same for all parts of a slate
            for node in trunk:
                new.setdefault(node, (r, row.start(node), len(trie.tokens[node])))
    index = {node: i for i, node in enumerate(new)}
    return Past(
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        held=tuple(held),
        new=tuple(new.values()),
        trunks=tuple(tuple(index[node] for node in trunk) for trunk in trunks),
    )


def _letters(trees: Sequence[PromptTree]) -> Tensor | None:
    if not any(tree.letters for tree in trees):
        return None
    given = [tree.letters or (0,) * len(tree.candidates) for tree in trees]
    return _padded("letters", trees, given).long()


def _labels(
    trees: Sequence[PromptTree], labels: Sequence[Sequence[float] | None] | None
) -> Tensor | None:
    known = [row for row in labels or () if row is not None]
    if labels is None or len(known) < len(labels):
        return None
    return _padded("labels", trees, known)


def _weights(
    trees: Sequence[PromptTree], weights: Sequence[Sequence[float] | None] | None
) -> Tensor | None:
    if weights is None or all(row is None for row in weights):
        return None
    rows = [
        [1.0] * len(tree.candidates) if row is None else row
        for tree, row in zip(trees, weights, strict=True)
    ]
    return _padded("weights", trees, rows)


def _padded(what: str, trees: Sequence[PromptTree], rows: Sequence[Sequence[float]]) -> Tensor:
    if len(rows) != len(trees):
        raise DataError(f"{len(rows)} rows of {what} for {len(trees)} slates")
    padded = torch.zeros(len(trees), max(len(tree.candidates) for tree in trees))
    for s, (tree, row) in enumerate(zip(trees, rows, strict=True)):
        if len(row) != len(tree.candidates):
            raise DataError(
                f"slate {tree.slate_id!r} has {len(tree.candidates)} candidates but "
                f"{len(row)} {what}"
            )
        padded[s, : len(row)] = torch.tensor(row)
    return padded


def feature_tensor(
    slates: Sequence[Slate], names: Sequence[str], *, length: int | None = None
) -> Tensor:
    """Returns candidate features (S, N, F), NaN where unknown or padded.

    Args:
        slates: At least one.
        names: The F features.
        length: N; absent: that of the longest slate.
    """
    longest = max(len(slate.candidates) for slate in slates)
    shape = (len(slates), longest if length is None else length, len(names))
    values = np.full(shape, np.nan, dtype=np.float32)
    for s, slate in enumerate(slates):
        for c, item in enumerate(slate.candidates):
            values[s, c] = [item.features.get(name, np.nan) for name in names]
    return torch.from_numpy(values)


def task_tensor(slates: Sequence[Slate], names: Sequence[str]) -> Tensor:
    """Returns the slates' values of tasks (S, N, K), NaN where unknown or padded."""
    longest = max(len(slate.candidates) for slate in slates)
    values = np.full((len(slates), longest, len(names)), np.nan, dtype=np.float32)
    for s, slate in enumerate(slates):
        for k, name in enumerate(names):
            known = slate.tasks.get(name, ())
            values[s, : len(known), k] = [np.nan if v is None else v for v in known]
    return torch.from_numpy(values)

"""Keys and values of trunks that were read before, so that a next request pays for the rest alone.

A prefix is a segment of a trunk under its path from the root, as one adapter read it. It is found
by its tokens, so nothing is ever out of date: a history that grew by an item shares all segments
before that item, another adapter shares nothing, and a preamble is shared by all users of a domain.
Kept within a budget of bytes; those used longest ago go first, leaves before what they hang from.

Bases that are decoders only: an encoder's blocks take no keys and values from outside.
Relatives: RadixAttention (arXiv 2312.07104), for generation.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftrank.prompts.tree import last_of_trunk
from peftrank.types import Past, PromptTree


@dataclass(frozen=True, eq=False)
class Prefix:
    """What one segment of a trunk left in every block."""

    keys_values: Tensor
    """(L, 2, K, T, D): blocks, keys and values, heads, tokens of the segment, width of a head."""


class Prefixes:
    """A bounded store of prefixes; may be used by several threads."""

    def __init__(self, budget: int):
        """`budget`: bytes kept."""
        self.budget = budget
        self.nbytes = 0
        self.tokens_reused = 0
        self._kept: OrderedDict[tuple[Hashable, tuple[int, ...]], tuple[Prefix, Hashable]]
        self._kept = OrderedDict()
        self._lock = threading.Lock()

    def find(self, owner: Hashable, tree: PromptTree) -> tuple[Prefix, ...]:
        """Returns what is known of the leading segments of a tree's trunk; its last never is.

        The last is always computed, for readouts read the states at a trunk's end.

        Args:
            owner: Which adapter reads the tree.
            tree: What is to be read.
        """
        found: list[Prefix] = []
        keys: list[tuple[Hashable, tuple[int, ...]]] = []
        parent = owner
        with self._lock:
            for segment in tree.segments[: last_of_trunk(tree)]:
                key = (parent, segment.tokens)
                if key not in self._kept:
                    break
                parent = self._kept[key][0]
                found.append(parent)
                keys.append(key)
            self._use(keys)
        return tuple(found)

    def keep(
        self,
        owner: Hashable,
        tree: PromptTree,
        known: Sequence[Prefix],
        new: Sequence[Prefix],
    ) -> None:
        """Keeps what a pass left of a tree's trunk.

        Args:
            owner: Which adapter read it.
            tree: What was read.
            known: What `find` returned.
            new: Of the segments that follow, what `Reading.left` returned.
        """
        keys: list[tuple[Hashable, tuple[int, ...]]] = []
        parent: Hashable = owner
        with self._lock:
            self.tokens_reused += token_length(known)
            for segment, prefix in zip(tree.segments, [*known, *new], strict=False):
                key = (parent, segment.tokens)
                if key not in self._kept:  # also what was let go of while the pass ran
                    self._kept[key] = prefix, owner
                    self.nbytes += prefix.keys_values.nbytes
                parent = self._kept[key][0]
                keys.append(key)
            self._use(keys)
            while self.nbytes > self.budget:
                _, (gone, _) = self._kept.popitem(last=False)
                self.nbytes -= gone.keys_values.nbytes

    def forget(self, owner: Hashable) -> None:
        """Lets go of all that an adapter left."""
        with self._lock:
            for key in [key for key, (_, whose) in self._kept.items() if whose is owner]:
                self.nbytes -= self._kept.pop(key)[0].keys_values.nbytes

    def _use(self, path: Sequence[tuple[Hashable, tuple[int, ...]]]) -> None:
        # From the leaf up: so a segment is never older than what hangs from it, and goes after it.
        for key in reversed(path):
            self._kept.move_to_end(key)


class Reading:
    """The keys and values of one pass: what it is given, and what it leaves of the trunks.

    It stands in the place of transformers' cache, of which attention modules use `update` alone.
    """

    def __init__(self, past: Past, known: Sequence[Sequence[Prefix]]):
        """`known`: per tree of the batch, what `Prefixes.find` returned."""
        self._past = past
        device = past.segment_ids.device
        self._given = _given(past, known)
        places = [(row, first + i) for row, first, n in past.new for i in range(n)]
        self._rows = torch.tensor([row for row, _ in places], dtype=torch.long, device=device)
        self._columns = torch.tensor([at for _, at in places], dtype=torch.long, device=device)
        self._left: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Returns a block's keys and values (R, K, P + T, D), those that were given first."""
        if len(self._rows):
            new = torch.stack([keys, values])[:, self._rows, :, self._columns]
            self._left.append(new)  # (tokens, 2, K, D): indices that are apart go first
        if self._given is None:
            return keys, values
        given = self._given[layer].to(keys.dtype)
        return torch.cat([given[0], keys], dim=2), torch.cat([given[1], values], dim=2)

    def left(self) -> list[list[Prefix]]:
        """Returns per tree what the new segments of its trunk left, but the last; see `Past.new`.

        What trees share is one object.
        """
        found = []
        if self._left:
            whole = torch.stack(self._left).permute(0, 2, 3, 1, 4)  # (L, 2, K, all tokens, D)
            pieces = torch.split(whole, [length for _, _, length in self._past.new], dim=3)
            found = [Prefix(piece.contiguous()) for piece in pieces]
        return [[found[i] for i in trunk] for trunk in self._past.trunks]


def token_length(known: Sequence[Prefix]) -> int:
    """Returns the tokens of successive segments."""
    return sum(prefix.keys_values.shape[3] for prefix in known)


def _given(past: Past, known: Sequence[Sequence[Prefix]]) -> Tensor | None:
    """Returns the known keys and values (L, 2, R, K, P, D) as they lie in the rows."""
    rows, tokens = past.segment_ids.shape
    if tokens == 0:
        return None
    first = next(known[tree][segment] for row in past.held for tree, segment in row).keys_values
    layers, two, heads, _, width = first.shape
    given = first.new_zeros(layers, two, rows, heads, tokens, width)
    for r, row in enumerate(past.held):
        if row:
            parts = [known[tree][segment].keys_values for tree, segment in row]
            joined = torch.cat(parts, dim=3)
            given[:, :, r, :, : joined.shape[3]] = joined
    return given

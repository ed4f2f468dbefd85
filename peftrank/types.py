"""The plain values that flow through the package. No logic lives here.

    raw log -> Slate -> PromptTree -> Batch -> hidden states -> scores -> loss, or RankedList

Letters in shapes: R rows, T tokens per row, H hidden size, S slates, N candidates per slate
(padded), F candidate features, G segments per row. `mask` is always bool, True = real.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be recommended: its id, its text fields and its numbers."""

    item_id: str
    fields: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    """Text shown to the model, by field name: `{"title": "..."}`."""
    features: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    """Numbers known about this candidate in this slate, by feature name. Missing = unknown."""


@dataclass(frozen=True, slots=True)
class Slate:
    """One candidate list shown (or to be shown) to one user."""

    slate_id: str
    user_id: str
    history: tuple[Item, ...]
    """Oldest first."""
    candidates: tuple[Item, ...]
    labels: tuple[float, ...] | None = None
    """Graded relevance >= 0, one per candidate; None when unknown (at ranking time)."""
    history_feedback: tuple[float, ...] | None = None
    """What the user gave each history item (a rating, a play count), one per history item."""
    timestamp: float | None = None
    """When the slate was shown: UTC epoch seconds."""
    domain: str | None = None
    context: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    """Further text a template may use: `{"device": "phone"}`."""
    weights: tuple[float, ...] | None = None
    """How much each candidate's part of the training loss counts, >= 0; None: each as 1. Inverse
    propensities of clicks go here. Nothing else reads them."""
    tasks: Mapping[str, tuple[float | None, ...]] = field(default_factory=lambda: _EMPTY)
    """What else is known of the candidates, to be learned beside `labels`: one value >= 0 per
    candidate, None where it is unknown. `{"rating": (4.0, None, None)}`."""


@dataclass(frozen=True, slots=True)
class RankedList:
    """A slate's candidates, best first."""

    slate_id: str
    item_ids: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens in a prompt tree. It sees itself and the segments on its path to the root."""

    tokens: tuple[int, ...]
    parent: int
    """Index of the parent in `PromptTree.segments` (always smaller than its own), -1 for a root."""


@dataclass(frozen=True, slots=True)
class CandidateSpan:
    """Where one candidate's text lies: tokens[start:stop] of one segment."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PromptTree:
    """A slate as the model reads it. `candidates` are in the slate's candidate order."""

    slate_id: str
    segments: tuple[Segment, ...]
    candidates: tuple[CandidateSpan, ...]
    markers: tuple[int, ...] = ()
    """Per candidate, the segment of its marker, a child of the candidate's. Markers of a tree see
    each other too. Empty unless candidates are to be compared with each other (mode `set`)."""
    answers: tuple[int, ...] = ()
    """Per candidate, the segment behind its list, at whose end the model answers with a letter; the
    candidates of a list share it. Empty unless the prompt asks for letters."""
    letters: tuple[int, ...] = ()
    """Per candidate, the letter it has in its list, 0 = A. The first candidate is the A of all."""


@dataclass(frozen=True)
class Past:
    """What stands on the paths of a batch and was computed in an earlier pass."""

    segment_ids: Tensor
    """(R, P) long; row-local segment index, as in `Batch.segment_ids`, -1 at padding."""
    position_ids: Tensor
    """(R, P) long; depths, 0 at padding."""
    held: tuple[tuple[tuple[int, int], ...], ...]
    """Per row, (tree, segment of it) of each known segment, in the order of `segment_ids`."""
    new: tuple[tuple[int, int, int], ...]
    """(row, first token, tokens) of each segment of a trunk that is computed now, but the last."""
    trunks: tuple[tuple[int, ...], ...]
    """Per tree, which of `new` follow the known segments of its trunk, in order."""


@dataclass(frozen=True)
class Once:
    """How the tokens of a batch are computed once each, although several of its rows hold them.

    There are C computed rows of L tokens. Each holds tokens of one of the batch's rows, and sees
    the keys and values of that whole row, wherever they are computed.
    """

    row: Tensor
    """(C,) long; which of the batch's rows."""
    place: Tensor
    """(C, L) long; which of that row's tokens, -1 at padding."""
    found: Tensor
    """(R, T) long; where among the C * L computed tokens each of the batch's is; 0 at padding."""


@dataclass(frozen=True)
class Batch:
    """Several prompt trees packed into rows, with everything a readout and a loss need.

    Token positions in `end`, `start`, `stop`, `before` and `trunk` index into the row `row`.
    """

    input_ids: Tensor
    """(R, T) long; padding holds the pad token."""
    position_ids: Tensor
    """(R, T) long; a token's depth in tokens on its path to the root. 0 at padding."""
    segment_ids: Tensor
    """(R, T) long; row-local segment index, -1 at padding."""
    ancestors: Tensor
    """(R, G, G) bool; [r, i, j] = segment i sees segment j: j is on the path of i (i itself
    included), or both are markers of one slate."""
    row: Tensor
    """(S, N) long; the row each candidate lies in."""
    end: Tensor
    """(S, N) long; last token of the candidate's segment, its marker or its list's answer: where
    scalar readouts read."""
    start: Tensor
    """(S, N) long; first token of the candidate's own text."""
    stop: Tensor
    """(S, N) long; one past the last token of the candidate's own text."""
    before: Tensor
    """(S, N) long; the token that precedes `start` on its path (its parent's last), -1 if none."""
    trunk: Tensor
    """(S,) long; the last token of what the slate's first candidate hangs from, -1 if nothing."""
    mask: Tensor
    """(S, N) bool; False where a shorter slate is padded."""
    letters: Tensor | None = None
    """(S, N) long; see `PromptTree.letters`. None if no tree has any."""
    labels: Tensor | None = None
    """(S, N) float; 0 at padding."""
    weights: Tensor | None = None
    """(S, N) float, >= 0; 0 at padding. None: every candidate counts as 1."""
    tasks: Tensor | None = None
    """(S, N, K) float, one value for each of K tasks; NaN = unknown, and at padding."""
    features: Tensor | None = None
    """(S, N, F) float, NaN = missing."""
    slate_ids: tuple[str, ...] = ()
    spans: tuple[tuple[int, int, int], ...] = ()
    """(group, start, stop): which tokens of the flattened (R * T) rows belong to the trees of a
    group, in order; padding at the end of a row belongs to the group before it. Empty where trees
    were packed as one group."""
    past: Past | None = None
    """Segments that are known and so not in `input_ids`; None where none was looked for."""
    once: Once | None = None
    """Where tokens that several rows hold are computed; None: in every row. Whoever does not heed
    it computes the same, more often."""

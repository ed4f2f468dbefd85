"""Token segments -> PromptTree, and questions about a tree: its size, depth and paths.

It knows neither text nor tensors; only `render`, which shows a tree to a person, decodes tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from peftrank.types import CandidateSpan, PromptTree, Segment, Slate

if TYPE_CHECKING:
    from peftrank.prompts.template import PromptTemplate


class CandidateTokens(NamedTuple):
    """A candidate's segment; `tokens[start:stop]` is the item's own text."""

    tokens: tuple[int, ...]
    start: int
    stop: int


def grow(
    slate_id: str,
    trunk: Sequence[tuple[int, ...]],
    candidates: Sequence[CandidateTokens],
    *,
    mode: str,
    marker: tuple[int, ...] = (),
) -> PromptTree:
    """Returns the tree of a chained trunk with the candidates on it.

    Args:
        slate_id: Goes into the tree.
        trunk: Segments from the root on, each the child of the one before; empty ones are left out.
        candidates: In the slate's order. None of them is empty.
        mode: `isolated`: each hangs from the end of the trunk. `joint`: each from the one before.
            `set`: as isolated, and from each hangs a marker; markers see each other.
        marker: The tokens of a marker, for mode `set`.
    """
    segments: list[Segment] = []
    for tokens in trunk:
        if tokens:
            segments.append(Segment(tokens, len(segments) - 1))
    spans, markers = [], []
    parent = len(segments) - 1
    for candidate in candidates:
        spans.append(CandidateSpan(len(segments), candidate.start, candidate.stop))
        segments.append(Segment(candidate.tokens, parent))
        if mode == "joint":
            parent = len(segments) - 1
        if mode == "set":
            markers.append(len(segments))
            segments.append(Segment(marker, len(segments) - 1))
    return PromptTree(slate_id, tuple(segments), tuple(spans), tuple(markers))


def ends(tree: PromptTree) -> tuple[int, ...]:
    """Returns the segment in which each candidate ends: where scalar readouts read."""
    return tree.markers or tuple(span.segment for span in tree.candidates)


def token_count(tree: PromptTree) -> int:
    """Returns the tokens of all segments."""
    return sum(len(segment.tokens) for segment in tree.segments)


def depths(tree: PromptTree) -> list[int]:
    """Returns each segment's depth: the tokens on its path to the root before its first one."""
    found: list[int] = []
    for segment in tree.segments:
        above = segment.parent
        found.append(0 if above < 0 else found[above] + len(tree.segments[above].tokens))
    return found


def path_tokens(tree: PromptTree, segment: int) -> tuple[int, ...]:
    """Returns the tokens from the root to a segment's end, which its last token sees."""
    pieces = []
    while segment >= 0:
        pieces.append(tree.segments[segment].tokens)
        segment = tree.segments[segment].parent
    return tuple(token for piece in reversed(pieces) for token in piece)


def separate_token_count(tree: PromptTree) -> int:
    """Returns the tokens it would take to give every candidate a prompt of its own."""
    depth = depths(tree)
    return sum(depth[end] + len(tree.segments[end].tokens) for end in ends(tree))


def render(template: PromptTemplate, slate: Slate) -> str:
    """Returns a slate's tree as indented plain text, one line per segment, with token counts."""
    tree = template.tree(slate)
    names = {
        span.segment: f"  <- candidate {item.item_id}"
        for span, item in zip(tree.candidates, slate.candidates, strict=True)
    }
    names |= {marker: "  <- its marker, which sees the others" for marker in tree.markers}
    lines = [f"slate {slate.slate_id}: {template.mode}, {len(tree.candidates)} candidates"]
    indent: list[int] = []
    for index, segment in enumerate(tree.segments):
        indent.append(0 if segment.parent < 0 else indent[segment.parent] + 1)
        text = template.tokenizer.decode(list(segment.tokens), skip_special_tokens=False)
        name = names.get(index, "")
        lines.append(f"{len(segment.tokens):5d}  {' ' * indent[index]}{text!r}{name}")
    total, separate = token_count(tree), separate_token_count(tree)
    lines.append(f"{total} tokens in the tree, of at most {template.max_tokens}")
    lines.append(
        f"{separate} tokens if every candidate had a prompt of its own: "
        f"{separate / total:.1f} times as many"
    )
    return "\n".join(lines)

"""Token segments -> PromptTree, and questions about a tree: its size, depth and paths.

It knows neither text nor tensors; only `render`, which shows a tree to a person, decodes tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
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
    answer: tuple[int, ...] = (),
    window: int | None = None,
) -> PromptTree:
    """Returns the tree of a chained trunk with the candidates on it.

    Args:
        slate_id: Goes into the tree.
        trunk: Segments from the root on, each the child of the one before; empty ones are left out.
        candidates: In the slate's order. None of them is empty.
        mode: `isolated`: each hangs from the end of the trunk. `joint`: each from the one before.
            `set`: as isolated, and from each hangs a marker; markers see each other.
        marker: The tokens of a marker, for mode `set`.
        answer: The tokens behind a list, for mode `joint` with a window.
        window: The most candidates in a list; see `windows`. Each has the tokens of its letter.
    """
    if window is not None:
        return _lettered(slate_id, trunk, candidates, answer, window)
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


def windows(count: int, most: int) -> list[range]:
    """Returns the lists in which candidates are read, without the first, which begins all lists.

    They are of about equal length.

    Args:
        count: Candidates of the slate, the first included.
        most: In a list, the first candidate included; at least 2.
    """
    lists = max(1, -(-(count - 1) // (most - 1)))
    bounds = [1 + (count - 1) * i // lists for i in range(lists + 1)]
    return [range(*each) for each in pairwise(bounds)]


def _lettered(
    slate_id: str,
    trunk: Sequence[tuple[int, ...]],
    candidates: Sequence[CandidateTokens],
    answer: tuple[int, ...],
    window: int,
) -> PromptTree:
    """Returns a tree whose windows hang from the first candidate, each with an answer behind it."""
    segments: list[Segment] = []
    for tokens in (*trunk, candidates[0].tokens):
        if tokens:
            segments.append(Segment(tokens, len(segments) - 1))
    first = len(segments) - 1
    spans = [CandidateSpan(first, candidates[0].start, candidates[0].stop)]
    answers: list[int] = []
    letters = [0]
    for members in windows(len(candidates), window):
        parent = first
        for letter, index in enumerate(members, start=1):
            tokens, start, stop = candidates[index]
            spans.append(CandidateSpan(len(segments), start, stop))
            segments.append(Segment(tokens, parent))
            parent = len(segments) - 1
            letters.append(letter)
        if answer:
            segments.append(Segment(answer, parent))
        # The first candidate has the answer of the first list.
        answers += [len(segments) - 1] * (len(letters) - len(answers))
    return PromptTree(
        slate_id, tuple(segments), tuple(spans), answers=tuple(answers), letters=tuple(letters)
    )


def ends(tree: PromptTree) -> tuple[int, ...]:
    """Returns the segment in which each candidate ends: where scalar readouts read."""
    return tree.markers or tree.answers or tuple(span.segment for span in tree.candidates)


class Branch(NamedTuple):
    """Successive candidates that can be read without the others: candidates[start:stop]."""

    start: int
    stop: int
    tokens: int
    """Beside the trunk's."""


def branches(tree: PromptTree) -> tuple[int, list[Branch]]:
    """Returns the tokens of the trunk, which all candidates share, and the branches on it.

    No candidate sees one of another branch. A tree whose candidates all see each other is one
    branch, and all trunk.
    """
    paths = [_path(tree, end) for end in ends(tree)]
    starts = [0]
    if not tree.markers:
        alone = (i for i in range(1, len(paths)) if tree.candidates[i - 1].segment not in paths[i])
        starts.extend(alone)
    bounds = list(pairwise((*starts, len(paths))))
    held = [set[int]().union(*paths[start:stop]) for start, stop in bounds]
    trunk = set.intersection(*held)

    def size(segments: set[int]) -> int:
        return sum(len(tree.segments[index].tokens) for index in segments)

    found = [Branch(*b, size(own - trunk)) for b, own in zip(bounds, held, strict=True)]
    return size(trunk), found


def split(tree: PromptTree, most: int) -> list[PromptTree]:
    """Returns trees that hold the candidates in turn, each of at most `most` tokens.

    Each repeats the trunk, so that every candidate keeps its path. They are about equally long, for
    the same reason that rows should be. The trunk with one branch may be longer than `most`.
    """
    trunk, found = branches(tree)

    def starts(budget: int) -> list[int]:
        cuts, fill = [0], trunk
        for branch in found:
            if fill + branch.tokens > budget and branch.start > cuts[-1]:
                cuts.append(branch.start)
                fill = trunk
            fill += branch.tokens
        return cuts

    sizes = [branch.tokens for branch in found]
    # A part closed under this budget holds at least its equal share, so it takes no more parts.
    even = trunk + -(-sum(sizes) // len(starts(most))) + max(sizes)
    cuts = starts(min(most, even))
    bounds = pairwise((*cuts, len(tree.candidates)))
    return [tree] if len(cuts) == 1 else [take(tree, *each) for each in bounds]


def take(tree: PromptTree, start: int, stop: int) -> PromptTree:
    """Returns the tree with only the candidates [start:stop], whole branches, and their paths."""
    kept = sorted(set[int]().union(*(_path(tree, end) for end in ends(tree)[start:stop])))
    place = {-1: -1} | {old: new for new, old in enumerate(kept)}
    segments = (tree.segments[index] for index in kept)
    return replace(
        tree,
        segments=tuple(replace(each, parent=place[each.parent]) for each in segments),
        candidates=tuple(
            replace(span, segment=place[span.segment]) for span in tree.candidates[start:stop]
        ),
        markers=tuple(place[marker] for marker in tree.markers[start:stop]),
        answers=tuple(place[answer] for answer in tree.answers[start:stop]),
        letters=tree.letters[start:stop],
    )


def _path(tree: PromptTree, segment: int) -> set[int]:
    """Returns the segments from a segment to the root, itself included."""
    found = set()
    while segment >= 0:
        found.add(segment)
        segment = tree.segments[segment].parent
    return found


def last_of_trunk(tree: PromptTree) -> int:
    """Returns the index of the segment from which the first candidate hangs; 0 without a trunk.

    Readouts read the state at its end.
    """
    return max(0, tree.candidates[0].segment - 1)


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
    names |= {answer: "  <- answered with a letter" for answer in tree.answers}
    lines = [f"slate {slate.slate_id}: {template.mode}, {len(tree.candidates)} candidates"]
    indent: list[int] = []
    for index, segment in enumerate(tree.segments):
        indent.append(0 if segment.parent < 0 else indent[segment.parent] + 1)
        text = template.tokenizer.decode(list(segment.tokens), skip_special_tokens=False)
        name = names.get(index, "")
        lines.append(f"{len(segment.tokens):5d}  {' ' * indent[index]}{text!r}{name}")
    total, separate = token_count(tree), separate_token_count(tree)
    longest = max(depths(tree)[end] + len(tree.segments[end].tokens) for end in ends(tree))
    lines.append(
        f"{total} tokens in the tree, {longest} on its longest path. prompt.max_tokens is "
        f"{template.max_tokens} for the {'tree' if template.mode == 'set' else 'path'}"
    )
    lines.append(
        f"{separate} tokens if every candidate had a prompt of its own: "
        f"{separate / total:.1f} times as many"
    )
    return "\n".join(lines)

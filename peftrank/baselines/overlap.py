"""Shared words: inverse document frequency of the words a candidate shares with the history."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from peftrank.types import Item, Slate

_WORD = re.compile(r"\w+")


def overlap(
    slates: Sequence[Slate], *, train: Sequence[Slate], seed: int
) -> list[tuple[float, ...]]:
    """Returns the idf sum of shared words over the square root of the candidate's word count."""
    idf = _idf(item for s in (*train, *slates) for item in (*s.history, *s.candidates))
    scores = []
    for slate in slates:
        known = {word for item in slate.history for word in words(item)}
        rows = [words(item) for item in slate.candidates]
        scores.append(
            tuple(
                # fsum: sets have no fixed order, and rounding must not decide between equals.
                math.fsum(idf[w] for w in row if w in known) / math.sqrt(max(1, len(row)))
                for row in rows
            )
        )
    return scores


def words(item: Item) -> frozenset[str]:
    """Returns the lower-case words of an item's text fields."""
    return frozenset(w for text in item.fields.values() for w in _WORD.findall(text.lower()))


def _idf(items: Iterable[Item]) -> dict[str, float]:
    texts = {item.item_id: words(item) for item in items}
    counts = Counter(word for row in texts.values() for word in row)
    return {word: math.log(len(texts) / count) for word, count in counts.items()}

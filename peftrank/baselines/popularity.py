"""Most popular first: how many users of the training part took the item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peftrank.types import Slate


def popularity(
    slates: Sequence[Slate], *, train: Sequence[Slate], seed: int
) -> list[tuple[float, ...]]:
    """Returns, per candidate, the number of training users with it in history or relevant."""
    counts = count_users(train)
    return [tuple(float(counts[i.item_id]) for i in slate.candidates) for slate in slates]


def count_users(train: Sequence[Slate]) -> Counter[str]:
    """Returns the number of distinct users that took each item, by item id."""
    taken = {(s.user_id, item.item_id) for s in train for item in s.history} | {
        (s.user_id, item.item_id)
        for s in train
        for item, label in zip(s.candidates, s.labels or (), strict=bool(s.labels))
        if label > 0
    }
    return Counter(item for _, item in taken)

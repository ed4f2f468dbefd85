"""BM25 (bm25s): the history's text is the query, the candidates' texts are the documents."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from peftrank.errors import ConfigError
from peftrank.types import Item, Slate


def bm25(slates: Sequence[Slate], *, train: Sequence[Slate], seed: int) -> list[tuple[float, ...]]:
    """Returns BM25 scores; document statistics over every item of both parts.

    Raises:
        ConfigError: the bm25s package is not installed.
    """
    bm25s = _bm25s()
    items = {item.item_id: item for s in (*train, *slates) for item in (*s.history, *s.candidates)}
    places = {item_id: i for i, item_id in enumerate(items)}
    texts = _tokens(bm25s, [_text(item) for item in items.values()])
    if not any(texts):
        return [(0.0,) * len(slate.candidates) for slate in slates]
    index = bm25s.BM25()
    index.index(texts, show_progress=False)
    scores = []
    for slate in slates:
        query = _tokens(bm25s, [" ".join(map(_text, slate.history))])[0]
        known = [word for word in query if word in index.vocab_dict]
        found = index.get_scores(known) if known else [0.0] * len(items)
        scores.append(tuple(float(found[places[item.item_id]]) for item in slate.candidates))
    return scores


def _bm25s() -> Any:  # noqa: ANN401 - a module
    try:
        return importlib.import_module("bm25s")
    except ModuleNotFoundError:
        raise ConfigError(
            "baseline bm25 needs the package bm25s: pip install 'peftrank[baselines]'"
        ) from None


def _tokens(bm25s: Any, texts: list[str]) -> list[list[str]]:  # noqa: ANN401
    tokens: list[list[str]] = bm25s.tokenize(
        texts, return_ids=False, show_progress=False, stopwords="en"
    )
    return tokens


def _text(item: Item) -> str:
    return " ".join(item.fields.values())

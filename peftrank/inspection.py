"""What a folder or file of slates holds: counts, histograms, coverage. Reads it once, streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftrank._lists import PARTS
from peftrank.errors import DataError
from peftrank.formats.slates import read_items, read_slates
from peftrank.types import Item, Slate

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_BANDS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

CountTokens = Callable[[str], int]


def inspect(
    path: Path, *, examples: int = 2, count_tokens: CountTokens | None = None
) -> dict[str, Any]:
    """Returns, for each part, everything `data inspect` shows, ready for JSON.

    Args:
        path: A folder that `data prepare` wrote, or one file of slates.
        examples: Slates of each part shown in full.
        count_tokens: Text -> number of tokens, if token lengths are wanted.

    Raises:
        DataError: there is no file of slates, or one is malformed.
    """
    files = _files(path)
    items = _items(path)
    parts = {}
    trained: set[str] | None = None
    for name, file in files.items():
        summary = _Summary(trained, count_tokens, examples)
        for slate in read_slates(file, items=items):
            summary.add(slate)
        parts[name] = summary.result()
        if name == "train":
            trained = summary.chosen
    return {"path": str(path), "parts": parts}


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    named = {
        part: path / f"{part}{suffix}"
        for part in PARTS
        for suffix in ("", *_SUFFIXES)
        if (path / f"{part}{suffix}").exists()
    }
    if not named:
        raise DataError(
            "expected train, valid or test slates here (.jsonl, .jsonl.gz or .parquet); "
            "`peftrank data prepare` writes them",
            path=path,
        )
    return named


def _items(path: Path) -> dict[str, Item] | None:
    folder = path if path.is_dir() else path.parent
    found = [folder / f"items{s}" for s in _SUFFIXES if (folder / f"items{s}").is_file()]
    return dict(read_items(found[0])) if found else None


@dataclass
class _Summary:
    trained: set[str] | None
    count_tokens: CountTokens | None
    keep: int
    slates: int = 0
    users: set[str] = field(default_factory=set)
    chosen: set[str] = field(default_factory=set)
    lengths: Counter[int] = field(default_factory=Counter)
    histories: Counter[int] = field(default_factory=Counter)
    labels: Counter[float] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    seen: dict[str, int] = field(default_factory=dict)
    """Tokens of each distinct item, 0 where they are not counted."""
    bare: set[str] = field(default_factory=set)
    cold: int = 0
    unlabelled: int = 0
    idle: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, slate: Slate) -> None:
        self.slates += 1
        self.users.add(slate.user_id)
        self.lengths[len(slate.candidates)] += 1
        self.histories[len(slate.history)] += 1
        for item in (*slate.history, *slate.candidates):
            self._item(item)
        for item in slate.candidates:
            self.features.update(item.features.keys())
        self._labels(slate)
        if self.trained is not None:
            self.cold += sum(item.item_id not in self.trained for item in slate.candidates)
        self.chosen.update(item.item_id for item in slate.history)
        if len(self.examples) < self.keep:
            self.examples.append(_example(slate))

    def _item(self, item: Item) -> None:
        if item.item_id in self.seen:
            return
        text = " ".join(item.fields.values())
        self.seen[item.item_id] = self.count_tokens(text) if self.count_tokens else 0
        self.texts.update(name for name, value in item.fields.items() if value.strip())
        if not text.strip():
            self.bare.add(item.item_id)

    def _labels(self, slate: Slate) -> None:
        if slate.labels is None:
            self.unlabelled += 1
            return
        self.idle += not any(slate.labels)
        self.labels.update(slate.labels)
        for position, (item, label) in enumerate(
            zip(slate.candidates, slate.labels, strict=True), start=1
        ):
            if label > 0:
                self.positions[position] += 1
                self.chosen.add(item.item_id)

    def result(self) -> dict[str, Any]:
        candidates = sum(length * count for length, count in self.lengths.items())
        share = {
            name: round(count / candidates, 4) for name, count in sorted(self.features.items())
        }
        out: dict[str, Any] = {
            "slates": self.slates,
            "users": len(self.users),
            "candidates": candidates,
            "items": len(self.seen),
            "slates_without_labels": self.unlabelled,
            "slates_without_relevant_candidate": self.idle,
            "list_length": _banded(self.lengths),
            "history_length": _banded(self.histories),
            "labels": {f"{k:g}": self.labels[k] for k in sorted(self.labels)},
            "relevant_position": {str(k): self.positions[k] for k in sorted(self.positions)},
            "items_without_text": len(self.bare),
            "field_coverage": {
                name: round(count / len(self.seen), 4) for name, count in sorted(self.texts.items())
            },
            "feature_coverage": share,
            "examples": self.examples,
        }
        if self.trained is not None:
            out["cold_candidates"] = round(self.cold / max(candidates, 1), 4)
        if self.count_tokens is not None:
            out["item_tokens"] = _quantiles(list(self.seen.values()))
        return out


def _banded(counts: Counter[int]) -> dict[str, int]:
    bands: dict[str, int] = {}
    for value in sorted(counts):
        low = max(band for band in _BANDS if band <= value)
        above = [band for band in _BANDS if band > value]
        high = above[0] - 1 if above else None
        name = str(low) if high == low else f"{low}+" if high is None else f"{low}-{high}"
        bands[name] = bands.get(name, 0) + counts[value]
    return bands


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    at = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: ordered[round(q * (len(ordered) - 1))] for name, q in at.items()}


def _example(slate: Slate) -> dict[str, Any]:
    labels: Iterable[float | None] = slate.labels or (None,) * len(slate.candidates)
    return {
        "slate_id": slate.slate_id,
        "user_id": slate.user_id,
        "history": [_line(item) for item in slate.history[-10:]],
        "candidates": [
            {"text": _line(item), "label": label, "features": dict(item.features)}
            for item, label in zip(slate.candidates, labels, strict=True)
        ],
    }


def _line(item: Item) -> str:
    return " | ".join(item.fields.values())[:120] or f"(no text) {item.item_id}"

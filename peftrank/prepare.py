"""`data prepare`: a raw log becomes a folder of slates with features, and a record of how.

The folder holds `items.jsonl`, one file of slates for each part, and `meta.json`: every setting,
what was counted, what was left out and why, and a fingerprint of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from peftrank import slates as make
from peftrank._lists import PARTS, Floats, Ints, Lists, Sequences
from peftrank._tables import Settings, Table
from peftrank.errors import ConfigError, DataError
from peftrank.features import GROUPS, Source, compute
from peftrank.files import write_bytes
from peftrank.formats._log import Log
from peftrank.formats.slates import write_items, write_slates
from peftrank.types import Item, Slate

_FOLDS = 10


def prepare(log: Log, output: Path, settings: Settings) -> dict[str, Any]:
    """Writes the folder and returns what `meta.json` holds.

    Raises:
        ConfigError: settings that contradict each other or the log.
        DataError: the log cannot be split, or an item without text is needed.
    """
    _check(settings)
    table = Table(log, settings)
    lists, train, shown = table.from_shown() if log.impressions else table.from_interactions()
    if settings.max_slates is not None:
        kept = make.limit(lists, settings.max_slates, table.rng(3))
        table.dropped["training slates over --max-slates"] = len(lists) - len(kept)
        lists = make.select(lists, kept)
    if not len(lists):
        raise DataError("no slate could be made: no user has an interaction before a target")
    timed = _timed(settings.as_of, lists, train)
    source = Source(
        train=train,
        items=len(log.item_ids),
        texts=[" ".join(item.fields.values()) for item in log.items.values()],
        labels=table.labels,
        shown=shown,
        person=table.person,
        timed=timed,
    )
    retriever = table.retriever(lists) if "retriever" in settings.features else None
    names, values = _features(lists, source, settings, retriever, table.rng(6))
    files = _write(log, lists, table.user_ids, names, values, output, settings)
    meta = _meta(log, lists, train, settings, table, names, values, timed, files, output)
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    write_bytes(output / "meta.json", text.encode())
    return meta


def _check(settings: Settings) -> None:
    if settings.labels not in ("binary", "rating"):
        raise ConfigError(f"--labels takes binary or rating, not {settings.labels!r}")
    if settings.as_of not in ("auto", "time", "part"):
        raise ConfigError(f"--as-of takes auto, time or part, not {settings.as_of!r}")
    if settings.split is not None and settings.split not in make.SPLITS:
        raise ConfigError(f"--split takes {', '.join(make.SPLITS)}, not {settings.split!r}")
    kind = settings.negatives
    if kind not in make.NEGATIVES and not kind.startswith("run:"):
        known = ", ".join(make.NEGATIVES)
        raise ConfigError(f"--negatives takes {known} or run:FILE, not {kind!r}")
    for group in settings.features:
        if group not in GROUPS:
            raise ConfigError(f"unknown features {group!r}. Known: {', '.join(GROUPS)}.")
    if "retriever" in settings.features and settings.run_file is None:
        raise ConfigError("features 'retriever' need --run FILE or --negatives run:FILE")


def _timed(as_of: str, lists: Lists, train: Sequences) -> bool:
    known = not (np.isnan(lists.time).any() or np.isnan(train.time).any())
    if as_of == "time" and not known:
        raise ConfigError("--as-of time needs a time for every interaction and slate; use part")
    # A log of one moment has no "before".
    return as_of == "time" or (as_of == "auto" and known and len(np.unique(train.time)) > 1)


def _features(
    lists: Lists,
    source: Source,
    settings: Settings,
    retriever: Floats | None,
    rng: np.random.Generator,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns column names and values (M, F); without times, training slates are cross-fitted.

    A training slate then sees the training part less a whole fold of users, its own among them.
    Less its own user alone, an item counts one less wherever it is relevant than where it is not,
    and a model learns to read that instead of what the feature means.
    """
    group = np.full(len(lists), -1)
    if not source.timed:
        fold = rng.integers(_FOLDS, size=len(source.train.start) - 1)
        group = np.where(lists.part == 0, fold[lists.user], -1)
    of_candidate = np.repeat(group, np.diff(lists.candidate_start))
    names: tuple[str, ...] = ()
    found = {}
    for number in np.unique(group):
        rows = of_candidate == number
        names, found[number] = compute(
            make.select(lists, np.flatnonzero(group == number)),
            source if number < 0 else source.without(fold == number),
            settings.features,
            retriever=None if retriever is None else retriever[rows],
            history_length=settings.history_length,
            seed=settings.seed,
        )
    values = np.empty((len(of_candidate), len(names)), np.float32)
    for number, part in found.items():
        values[of_candidate == number] = part
    return names, values


def _write(
    log: Log,
    lists: Lists,
    user_ids: Sequence[str],
    names: Sequence[str],
    values: np.ndarray,
    output: Path,
    settings: Settings,
) -> dict[str, Path]:
    suffix = "parquet" if settings.parquet else "jsonl"
    files = {"items": output / "items.jsonl"}
    write_items(files["items"], log.items.values())
    for part, name in enumerate(PARTS):
        file = output / f"{name}.{suffix}"
        rows = np.flatnonzero(lists.part == part)
        if len(rows):
            made = _slates(log, lists, rows, user_ids, names, values, settings.domain)
            write_slates(file, made, by_id=True)
            files[name] = file
        # What an earlier run left must not be mistaken for this run's.
        for other in {f"{name}.jsonl", f"{name}.parquet"} - {file.name if len(rows) else ""}:
            (output / other).unlink(missing_ok=True)
    return files


def _slates(
    log: Log,
    lists: Lists,
    rows: Ints,
    user_ids: Sequence[str],
    names: Sequence[str],
    values: np.ndarray,
    domain: str | None,
) -> Iterator[Slate]:
    items = [log.items[item_id] for item_id in log.item_ids]
    # A value that every interaction has (a click, a friendship) is no rating: a template that asks
    # for low ones would call everything disliked.
    rated = len(np.unique(lists.feedback)) > 1
    for i in rows:
        history = slice(lists.history_start[i], lists.history_start[i + 1])
        shown = slice(lists.candidate_start[i], lists.candidate_start[i + 1])
        label = lists.label[shown]
        yield Slate(
            slate_id=lists.slate_ids[i],
            user_id=user_ids[lists.user[i]],
            history=tuple(items[c] for c in lists.history[history]),
            candidates=tuple(
                Item(items[c].item_id, items[c].fields, _known(names, row))
                for c, row in zip(lists.candidate[shown], values[shown], strict=True)
            ),
            labels=None if np.isnan(label).any() else tuple(label.tolist()),
            history_feedback=tuple(lists.feedback[history].tolist()) if rated else None,
            timestamp=None if np.isnan(lists.time[i]) else float(lists.time[i]),
            domain=domain,
        )


def _known(names: Sequence[str], row: np.ndarray) -> Mapping[str, float]:
    pairs = zip(names, row.tolist(), strict=True)
    return {name: round(value, 6) for name, value in pairs if value == value}


def _meta(
    log: Log,
    lists: Lists,
    train: Sequences,
    settings: Settings,
    table: Table,
    names: Sequence[str],
    values: np.ndarray,
    timed: bool,
    files: Mapping[str, Path],
    output: Path,
) -> dict[str, Any]:
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    whole = hashlib.sha256("".join(f"{k}:{hashes[k]};" for k in sorted(hashes)).encode())
    known = 1 - np.isnan(values).mean(axis=0) if len(names) else ()
    sizes = {name: int((lists.part == part).sum()) for part, name in enumerate(PARTS)}
    return {
        "format_version": 1,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()},
        "as_of": "time" if timed else "part",
        "lists": "shown" if log.impressions else "sampled",
        "counts": {
            "items": len(log.item_ids),
            "users": len(table.user_ids),
            "interactions": len(log),
            "impressions": len(log.impressions),
            "training_interactions": len(train.item),
            "slates": sizes,
        },
        "dropped": {"rows rejected by the reader": log.rejects.count, **table.dropped},
        "notes": table.notes,
        "features": {n: round(float(share), 4) for n, share in zip(names, known, strict=True)},
        "files": {path.name: hashes[name] for name, path in files.items()},
        "fingerprint": whole.hexdigest(),
    }

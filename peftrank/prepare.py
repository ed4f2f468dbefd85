"""`data prepare`: a raw log becomes a folder of slates with features, and a record of how.

The folder holds `items.jsonl`, the slates of each part (one file; as Parquet a folder of several
where there are many), and `meta.json`: every setting, what was counted, what was left out and why,
and a fingerprint of the data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from peftrank import slates as make
from peftrank._lists import PARTS, Floats, Ints, Lists, Sequences
from peftrank._tables import Made, Settings, Table
from peftrank.errors import ConfigError, DataError
from peftrank.features import GROUPS, Source, State, columns, compute
from peftrank.files import sync_folder, temporary_folder, write_bytes
from peftrank.formats._columns import slate_columns, write_shards
from peftrank.formats._log import Log
from peftrank.formats.slates import write_items, write_slates
from peftrank.types import Item, Slate

SHARD = 16_384
"""Slates in a Parquet file, at most."""
_FOLDS = 10
_PIECE = 4096
"""Slates that are made columns of a file at once."""
_META = "meta.json"

Progress = Callable[[int, int], None]


def prepare(
    log: Log, output: Path, settings: Settings, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Writes the folder and returns what `meta.json` holds.

    Slates are made, given features and written a block at a time. Everything is written under
    temporary names; `meta.json` appears when all else is there.

    Args:
        log: The raw log.
        output: The folder. What an earlier run wrote there is replaced.
        settings: How the log becomes slates.
        progress: Called with the slates written so far, and all.

    Raises:
        ConfigError: settings that contradict each other or the log.
        DataError: the log cannot be split, or an item without text is needed.
    """
    _check(settings)
    table = Table(log, settings)
    made, train, shown = table.from_shown() if log.impressions else table.from_interactions()
    if not len(made):
        raise DataError("no slate could be made: no user has an interaction before a target")
    timed = _timed(settings.as_of, made.time, train)
    source = Source(
        train=train,
        items=len(log.item_ids),
        texts=[" ".join(item.fields.values()) for item in log.items.values()],
        labels=table.labels,
        shown=shown,
        person=table.person,
        timed=timed,
    )
    names = columns(source, settings.features)
    # How many candidates have each feature; last, how many candidates there are.
    known = np.zeros(len(names) + 1, np.int64)
    done = 0

    def blocks(folder: Path) -> Iterator[tuple[Lists, np.ndarray]]:
        nonlocal done
        for lists, values in _with_features(made, source, table, folder):
            known[:-1] += (~np.isnan(values)).sum(axis=0)
            known[-1] += len(values)
            yield lists, values
            done += len(lists)
            progress(done, len(made))

    with temporary_folder(output) as folder:
        files = _write(table, made, names, blocks(folder), folder)
        meta = _meta(table, made, train, names, known, timed, files, folder)
        text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
        write_bytes(folder / _META, text.encode())
        _publish(folder, output, files)
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


def _timed(as_of: str, time: Floats, train: Sequences) -> bool:
    known = not (np.isnan(time).any() or np.isnan(train.time).any())
    if as_of == "time" and not known:
        raise ConfigError("--as-of time needs a time for every interaction and slate; use part")
    # A log of one moment has no "before".
    return as_of == "time" or (as_of == "auto" and known and _differ(train.time))


def _differ(values: Floats) -> bool:
    return bool(len(values) and values.min() < values.max())


def _with_features(
    made: Made, source: Source, table: Table, folder: Path
) -> Iterator[tuple[Lists, np.ndarray]]:
    """Yields lists with the values (M, F) of their features.

    Without times, training slates are cross-fitted: one sees the training part less a whole fold
    of users, its own among them. Less its own user alone, an item counts one less wherever it is
    relevant than where it is not, and a model learns to read that instead of what the feature
    means.
    """
    width = len(columns(source, table.settings.features))
    if width and not source.timed:
        yield from _cross_fitted(made, source, table, folder, width)
        return
    state = State(source, seed=table.settings.seed) if width else None
    for lists in made.blocks():
        empty = np.empty((len(lists.candidate), 0), np.float32)
        yield lists, empty if state is None else _compute(lists, state, table)


def _cross_fitted(
    made: Made, source: Source, table: Table, folder: Path, width: int
) -> Iterator[tuple[Lists, np.ndarray]]:
    """Yields as `_with_features`; one fold's counts at a time are in memory, the values on disk."""
    fold = table.rng(6).integers(_FOLDS, size=len(source.train.start) - 1)
    with (folder / "values").open("w+b") as spool:
        for number in range(-1, _FOLDS):
            known = source if number < 0 else source.without(fold == number)
            state = State(known, seed=table.settings.seed)
            spool.seek(0)
            for lists in made.blocks():
                group = np.where(lists.part == 0, fold[lists.user], -1)
                rows = np.repeat(group == number, np.diff(lists.candidate_start))
                place = spool.tell()
                values = _read(spool, len(rows), width)
                if rows.any():
                    chosen = make.select(lists, np.flatnonzero(group == number))
                    values[rows] = _compute(chosen, state, table)
                spool.seek(place)
                spool.write(values.data)
        spool.seek(0)
        for lists in made.blocks():
            yield lists, _read(spool, len(lists.candidate), width)


def _read(spool: IO[bytes], rows: int, width: int) -> np.ndarray:
    """Returns the next rows of a file of float32; zeros beyond its end."""
    values = np.zeros(rows * width, np.float32)
    found = np.frombuffer(spool.read(values.nbytes), np.float32)
    values[: len(found)] = found
    return values.reshape(rows, width)


def _compute(lists: Lists, state: State, table: Table) -> np.ndarray:
    settings = table.settings
    return compute(
        lists,
        state,
        settings.features,
        retriever=table.retriever(lists) if "retriever" in settings.features else None,
        history_length=settings.history_length,
    )


def _write(
    table: Table,
    made: Made,
    names: Sequence[str],
    blocks: Iterator[tuple[Lists, np.ndarray]],
    folder: Path,
) -> dict[str, list[Path]]:
    """Writes items and parts, and returns the files of each."""
    files = {"items": [folder / "items.jsonl"]}
    write_items(files["items"][0], table.log.items.values())
    sizes = np.bincount(made.part, minlength=len(PARTS))
    for part, pieces in itertools.groupby(_pieces(blocks), key=lambda piece: piece[0]):
        values = ((lists, values) for _, lists, values in pieces)
        name, size = PARTS[part], int(sizes[part])
        if not table.settings.parquet:
            files[name] = [folder / f"{name}.jsonl"]
            write_slates(files[name][0], _slates(table, made, names, values), by_id=True)
        elif table.log.impressions:  # which may break a rule of the format
            files[name] = [folder / f"{name}.parquet"]
            write_slates(files[name][0], _slates(table, made, names, values), by_id=True)
        else:
            shards = -(-size // SHARD)
            files[name] = [folder / name / f"part-{i:05}.parquet" for i in range(shards)]
            if shards == 1:
                files[name] = [folder / f"{name}.parquet"]
            write_shards(files[name], _tables(table, made, names, values), SHARD)
    return files


def _pieces(
    blocks: Iterator[tuple[Lists, np.ndarray]],
) -> Iterator[tuple[int, Lists, np.ndarray]]:
    """Yields part, lists and values in small pieces, each of one part."""
    for lists, values in blocks:
        bounds = np.flatnonzero(np.diff(lists.part)) + 1
        bounds = np.union1d(bounds, np.arange(0, len(lists) + _PIECE, _PIECE).clip(max=len(lists)))
        for first, last in itertools.pairwise(bounds.tolist()):
            rows = slice(lists.candidate_start[first], lists.candidate_start[last])
            piece = make.select(lists, np.arange(first, last))
            yield int(lists.part[first]), piece, values[rows]


def _tables(
    table: Table,
    made: Made,
    names: Sequence[str],
    pieces: Iterator[tuple[Lists, np.ndarray]],
) -> Iterator[pa.Table]:
    item_ids, user_ids = (
        pa.array(ids, pa.string()) for ids in (table.log.item_ids, table.user_ids)
    )
    domain = table.settings.domain
    for lists, values in pieces:
        yield slate_columns(
            lists, item_ids, user_ids, names, values, rated=made.rated, domain=domain
        )


def _slates(
    table: Table,
    made: Made,
    names: Sequence[str],
    pieces: Iterator[tuple[Lists, np.ndarray]],
) -> Iterator[Slate]:
    items = list(table.log.items.values())
    for lists, values in pieces:
        for i in range(len(lists)):
            history = slice(lists.history_start[i], lists.history_start[i + 1])
            shown = slice(lists.candidate_start[i], lists.candidate_start[i + 1])
            label = lists.label[shown]
            yield Slate(
                slate_id=lists.slate_ids[i],
                user_id=table.user_ids[lists.user[i]],
                history=tuple(items[c] for c in lists.history[history]),
                candidates=tuple(
                    Item(items[c].item_id, items[c].fields, _known(names, row))
                    for c, row in zip(lists.candidate[shown], values[shown], strict=True)
                ),
                labels=None if np.isnan(label).any() else tuple(label.tolist()),
                history_feedback=tuple(lists.feedback[history].tolist()) if made.rated else None,
                timestamp=None if np.isnan(lists.time[i]) else float(lists.time[i]),
                domain=table.settings.domain,
            )


def _known(names: Sequence[str], row: np.ndarray) -> Mapping[str, float]:
    pairs = zip(names, row.tolist(), strict=True)
    return {name: round(value, 6) for name, value in pairs if value == value}


def _publish(folder: Path, output: Path, files: Mapping[str, Sequence[Path]]) -> None:
    """Moves what was written to its place, `meta.json` last."""
    (output / _META).unlink(missing_ok=True)
    # What an earlier run left must not be mistaken for this run's.
    for part in PARTS:
        for suffix in ("jsonl", "parquet"):
            (output / f"{part}.{suffix}").unlink(missing_ok=True)
        if (output / part).is_dir():
            shutil.rmtree(output / part)
    sync_folder(output)
    for paths in files.values():
        name = paths[0].relative_to(folder).parts[0]
        (folder / name).replace(output / name)
    (folder / _META).replace(output / _META)
    sync_folder(output)


def _meta(
    table: Table,
    made: Made,
    train: Sequences,
    names: Sequence[str],
    known: Ints,
    timed: bool,
    files: Mapping[str, Sequence[Path]],
    folder: Path,
) -> dict[str, Any]:
    log, settings = table.log, table.settings
    hashes, written = {}, {}
    for name, paths in files.items():
        for place, path in enumerate(paths):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[name if len(paths) == 1 else f"{name}-{place:05}"] = digest
            written[path.relative_to(folder).as_posix()] = digest
    whole = hashlib.sha256("".join(f"{k}:{hashes[k]};" for k in sorted(hashes)).encode())
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
            "slates": {name: int((made.part == part).sum()) for part, name in enumerate(PARTS)},
        },
        "dropped": {"rows rejected by the reader": log.rejects.count, **table.dropped},
        "notes": table.notes,
        "features": {
            name: round(float(share), 4)
            for name, share in zip(names, known[:-1] / max(1, known[-1]), strict=True)
        },
        "files": written,
        "fingerprint": whole.hexdigest(),
    }

"""Which slates a run reads, and in what order.

The order is a function of the seed and the epoch alone, so a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peftrank._chunks import ranges
from peftrank._lists import Ints
from peftrank.config import DataConfig
from peftrank.errors import ConfigError
from peftrank.formats._record import slate_record
from peftrank.formats._stored import StoredSlates, stored_slates
from peftrank.formats.slates import read_slates
from peftrank.plugins import did_you_mean
from peftrank.samples import sample_path, samples
from peftrank.types import Slate


def part_path(data: DataConfig, domain: str, part: str) -> Path:
    """Returns the file of a part (`train`, `valid` or `test`): configured, or the sample's.

    Raises:
        ConfigError: the part is not configured and the domain has no embedded sample.
    """
    configured: Path | None = getattr(data, part)
    if configured is not None:
        return configured
    if any(getattr(data, name) is not None for name in ("train", "valid", "test")):
        raise ConfigError(
            f"data.{part} is not set. Give the {part} slates with --set data.{part}=FILE "
            "(or --data FOLDER with train, valid and test files in it)."
        )
    if domain not in samples():
        raise ConfigError(
            f"domain {domain!r} has no embedded sample, so data.{part} must name a file of slates. "
            "Make one with: peftrank data prepare --help"
        )
    return sample_path(domain, part)


def folder_data(folder: Path) -> DataConfig:
    """Returns the parts of a folder that `data prepare` wrote: files, or folders of shards.

    Raises:
        ConfigError: the folder holds no train, valid or test file.
    """
    found = {
        part: path
        for part in ("train", "valid", "test")
        for path in (folder / part, folder / f"{part}.jsonl", folder / f"{part}.parquet")
        if path.is_file() or (path.name == part and path.is_dir())
    }
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise ConfigError(
            f"--data {folder} is {kind}; expected a folder with train, valid and test files. "
            "For single files: --set data.test=FILE"
        )
    if not found:
        raise ConfigError(
            f"--data {folder}: no train, valid or test file (.jsonl or .parquet) in this folder. "
            "Write them with: peftrank data prepare"
        )
    return DataConfig(**found)


def read_part(data: DataConfig, domain: str, part: str) -> list[Slate]:
    """Returns a part's slates in file order."""
    return list(read_slates(part_path(data, domain, part), items=data.items))


def open_part(data: DataConfig, domain: str, part: str) -> Sequence[Slate]:
    """Returns a part's slates in file order; those of Parquet files are read when they are used.

    Raises:
        DataError: a file is missing or damaged; of another kind of file, also a malformed row.
    """
    stored = stored_slates(part_path(data, domain, part), data.items)
    return read_part(data, domain, part) if stored is None else stored


def step_batches(
    slates: Sequence[Slate],
    batch_size: int,
    *,
    together: int,
    seed: int,
    first_step: int,
    total_steps: int,
) -> Iterator[Sequence[Slate]]:
    """Yields the slates of each optimizer step from `first_step` (0-based) on.

    Every epoch is a fresh order; its last batch may be smaller. Up to `together` successive slates
    of one user stay neighbours, because in a row they share the history and cost less.
    """
    start = _block_starts(slates, together)
    size = np.diff(np.append(start, len(slates)))
    per_epoch = steps_per_epoch(len(slates), batch_size)
    for epoch in range(first_step // per_epoch, -(-total_steps // per_epoch)):
        order = np.random.default_rng([seed, epoch]).permutation(len(start))
        shuffled = ranges(start[order], size[order])
        for step in range(per_epoch):
            if first_step <= epoch * per_epoch + step < total_steps:
                yield chosen(slates, shuffled[step * batch_size : (step + 1) * batch_size])


def _block_starts(slates: Sequence[Slate], together: int) -> Ints:
    """Returns where the runs of one user's slates begin, each cut to at most `together`."""
    changes = np.flatnonzero(new_users(slates))
    length = np.diff(np.append(changes, len(slates)))
    blocks = -(-length // together)
    return np.repeat(changes, blocks) + together * ranges(np.zeros_like(blocks), blocks)


def new_users(slates: Sequence[Slate]) -> np.ndarray:
    """Returns, for each slate, whether its user is another than that of the slate before it."""
    if not isinstance(slates, StoredSlates):
        users = [None, *(slate.user_id for slate in slates)]
        return np.array([a != b for a, b in itertools.pairwise(users)], bool)
    found = [np.zeros(0, bool)]
    last = pa.array([None], pa.string())
    for batch in slates.columns(("user_id",)):
        named = pa.concat_arrays([last, batch.column(0).cast(pa.string())])
        # Unequal to nothing: the first, and what is no user and will be refused when it is read.
        found.append(np.asarray(pc.fill_null(pc.not_equal(named[1:], named[:-1]), True)))
        last = named[-1:]
    return np.concatenate(found)


def chosen(slates: Sequence[Slate], places: Ints) -> Sequence[Slate]:
    """Returns the slates at the given places; stored ones are read when they are used."""
    if isinstance(slates, StoredSlates):
        return slates.choose(places)
    return [slates[place] for place in places.tolist()]


def held(slates: Sequence[Slate], part: slice) -> Sequence[Slate]:
    """Returns the slates with those of a part in memory, where they stay the same objects."""
    return slates.hold(part) if isinstance(slates, StoredSlates) else slates


def changed(slates: Sequence[Slate], change: Callable[[Slate], Slate]) -> Sequence[Slate]:
    """Returns the slates as `change` makes them; stored ones are changed when they are read."""
    if isinstance(slates, StoredSlates):
        return slates.changed(change)
    return [change(slate) for slate in slates]


def steps_per_epoch(n_slates: int, batch_size: int) -> int:
    """Returns the optimizer steps that read every slate once."""
    return -(-n_slates // batch_size)


def fingerprint(slates: Sequence[Slate]) -> str:
    """Returns a SHA-256 over all that the slates hold: equal for equal slates in equal order.

    That of stored slates is over their files and the items file.
    """
    if isinstance(slates, StoredSlates):
        return slates.files_fingerprint()
    digest = hashlib.sha256()
    for slate in slates:
        digest.update(json.dumps(slate_record(slate), sort_keys=True).encode())
    return digest.hexdigest()


def feature_names(found: Collection[str], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the candidate features to read, sorted: the wanted ones, or all that were found.

    Raises:
        ConfigError: a wanted feature occurs in no slate.
    """
    if wanted is None:
        return tuple(sorted(found))
    for name in wanted:
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ConfigError(
                f"data.features: no training slate has {name!r}{did_you_mean(name, tuple(found))}. "
                f"There are: {known}."
            )
    return tuple(sorted(wanted))

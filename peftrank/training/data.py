"""Which slates a run reads, and in what order.

The order is a function of the seed and the epoch alone, so a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from peftrank.config import DataConfig
from peftrank.errors import ConfigError
from peftrank.formats._record import slate_record
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


def step_batches(
    slates: Sequence[Slate],
    batch_size: int,
    *,
    together: int,
    seed: int,
    first_step: int,
    total_steps: int,
) -> Iterator[list[Slate]]:
    """Yields the slates of each optimizer step from `first_step` (0-based) on.

    Every epoch is a fresh order; its last batch may be smaller. Up to `together` successive slates
    of one user stay neighbours, because in a row they share the history and cost less.
    """
    blocks = _user_blocks(slates, together)
    per_epoch = steps_per_epoch(len(slates), batch_size)
    for epoch in range(first_step // per_epoch, -(-total_steps // per_epoch)):
        order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
        shuffled = [i for block in order for i in blocks[block]]
        for step in range(per_epoch):
            if first_step <= epoch * per_epoch + step < total_steps:
                chosen = shuffled[step * batch_size : (step + 1) * batch_size]
                yield [slates[i] for i in chosen]


def _user_blocks(slates: Sequence[Slate], together: int) -> list[list[int]]:
    """Cuts 0..len-1 into runs of one user's slates, each at most `together` long."""
    blocks: list[list[int]] = []
    for i, slate in enumerate(slates):
        fits = blocks and len(blocks[-1]) < together
        if fits and slates[blocks[-1][0]].user_id == slate.user_id:
            blocks[-1].append(i)
        else:
            blocks.append([i])
    return blocks


def steps_per_epoch(n_slates: int, batch_size: int) -> int:
    """Returns the optimizer steps that read every slate once."""
    return -(-n_slates // batch_size)


def fingerprint(slates: Sequence[Slate]) -> str:
    """Returns a SHA-256 over all that the slates hold: equal for equal slates in equal order."""
    digest = hashlib.sha256()
    for slate in slates:
        digest.update(json.dumps(slate_record(slate), sort_keys=True).encode())
    return digest.hexdigest()


def feature_names(slates: Sequence[Slate], wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the candidate features to read, sorted: the wanted ones, or all that occur.

    Raises:
        ConfigError: a wanted feature occurs in no slate.
    """
    found = {name for slate in slates for item in slate.candidates for name in item.features}
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

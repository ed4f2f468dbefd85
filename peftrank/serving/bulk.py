"""Bulk ranking: a job ranks every slate of its input into a folder of Parquet files, its shards.

A shard holds the rankings of a fixed number of slates that follow one another in the input, so what
is in it depends neither on who ranks it nor on when. Workers take shards, and write each under a
temporary name that becomes its own when it is whole. A job that was stopped, however roughly, is
continued by starting it again: it keeps the shards that are there. `_job.json` in the folder says
what the job was; another input, adapter or setting is refused.

Here shards are ranked in this process, or in several on this machine. Knows no Ray; see `bulk_ray`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from peftrank import __version__, hub, store
from peftrank.base import load_base
from peftrank.errors import ConfigError, DataError, PeftRankError
from peftrank.files import TEMPORARY, write_bytes
from peftrank.formats._log import Rejects, row_errors
from peftrank.formats._parquet import write_parquet
from peftrank.formats.slates import (
    item_lookup,
    items_beside,
    read_files,
    slate_files,
    write_rankings,
)
from peftrank.ranker import Ranker
from peftrank.types import RankedList, Slate

SHARD_SLATES = 256
"""As many as `Ranker.rank_stream` ranks at once, so both pack slates in the same way."""
FILES = (".jsonl", ".jsonl.gz", ".run", ".parquet")
RANKINGS = pa.schema(
    [
        ("slate_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("domain", pa.string()),
        ("version", pa.string()),
    ]
)
"""The columns of a shard; scores are computed in float32, so nothing is rounded."""
_MANIFEST = "_job.json"  # readers of Parquet folders skip names that begin with _ or .
_FORMAT = 1


class WorkerError(PeftRankError):
    """A worker of a job has ended before its work was done."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as a job names it: the very version, whatever becomes active meanwhile."""

    source: str
    """A folder, or `user/repo@commit`."""
    version: str
    manifest: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Job:
    """What is ranked, with what, and into which folder. Plain values: workers get copies."""

    input: Path
    """A file of slates, or a folder of them; see `read_slates`."""
    output: Path
    adapter: Adapter
    base: Mapping[str, Any]
    """Arguments of `load_base`, without the device."""
    domain: str
    items: Path | None = None
    """The items file, if it is not beside the slates."""
    k: int | None = None
    """Keep the best k; None: all."""
    shard_slates: int = SHARD_SLATES


@dataclass(frozen=True)
class Part:
    """A file of the input."""

    path: Path
    sha256: str
    slates: int


@dataclass(frozen=True)
class Done:
    """What a job did."""

    slates: int
    shards: int
    kept: int
    """Shards that were there when it started."""


Engine = Callable[[Job, Sequence[Part], Sequence[int], int | None], Iterator[int]]
"""Ranks the shards with these numbers and yields each number when its file is there."""


def find_adapter(source: str, folder: Path = Path("adapters")) -> Adapter:
    """Returns the adapter that a source names now, checked.

    Args:
        source: See `Ranker.load_adapter`.
        folder: The store.

    Raises:
        AdapterError: it is missing or damaged, or cannot be had from the Hub.
    """
    if hub.is_hub_name(source) and not Path(source).is_dir():
        found = hub.fetch(source)
        return Adapter(f"{found.repo}@{found.commit}", found.commit, found.files.manifest)
    path = store.resolve(source, folder).absolute()
    return Adapter(str(path), path.name, store.load_adapter(path).manifest)


def run(
    job: Job,
    engine: Engine | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Done:
    """Ranks all that is not yet ranked, and returns when every shard of the job is there.

    Processes are started with `spawn`: a script that calls this with several workers needs
    `if __name__ == "__main__":`.

    Args:
        job: The job.
        engine: Who ranks; absent: `local`.
        workers: How many; absent: one per GPU, else one.
        progress: Called with the numbers of finished and of all slates.

    Raises:
        ConfigError: the folder holds something else, or a job with another input or settings.
        DataError: a slate cannot be read or ranked. All are read before the first is ranked.
        WorkerError: a worker has died. What is finished is kept.
        OSError: the disk refuses. What is finished is kept.
    """
    job = replace(
        job, output=job.output.absolute(), items=None if job.items is None else job.items.absolute()
    )
    parts = _begin(job)
    total = sum(part.slates for part in parts)
    shards = range(-(-total // job.shard_slates))
    sizes = [min(job.shard_slates, total - shard * job.shard_slates) for shard in shards]

    def missing() -> list[int]:
        return [s for s in shards if not _is_whole(job.output / shard_name(s), sizes[s])]

    todo = missing()
    done = total - sum(sizes[shard] for shard in todo)
    progress(done, total)
    if todo:
        for shard in (engine or local)(job, parts, todo, workers):
            done += sizes[shard]
            progress(done, total)
        if left := missing():
            raise WorkerError(stopped(f"{len(left)} of {len(shards)} shards were not ranked"))
    for leftover in job.output.glob(f"{TEMPORARY}*"):  # of workers that were killed
        leftover.unlink(missing_ok=True)
    return Done(total, len(shards), len(shards) - len(todo))


def run_into_file(
    job: Job,
    path: Path,
    engine: Engine | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Done:
    """Does a job, then writes its shards as one file and removes the job's folder; see `run`.

    Raises:
        ConfigError: rankings cannot be written under this name.
    """
    check_file(path)
    done = run(job, engine, workers=workers, progress=progress)
    write_file(path, read_rankings(job.output), job)
    shutil.rmtree(job.output)
    return done


def check_file(path: Path) -> None:
    """Raises ConfigError unless the name is one that rankings are written under."""
    if not path.name.endswith(FILES):
        raise ConfigError(
            "rankings are written as .jsonl, .jsonl.gz or .run, as .parquet, or into a folder "
            f"(a name without a dot), not {path.name}"
        )


def write_file(path: Path, ranked: Iterable[RankedList], job: Job) -> int:
    """Writes rankings as one file, streamed and atomically, and returns how many."""
    if path.suffix != ".parquet":
        return write_rankings(path, ranked)
    count = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in ranked:
            count += 1
            yield _record(row, job)

    write_parquet(path, records(), RANKINGS)
    return count


def read_rankings(folder: Path) -> Iterator[RankedList]:
    """Yields the rankings of a job that is done, in the order of its input."""
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["slate_id", "item_ids", "scores"]):
                for row in batch.to_pylist():
                    yield RankedList(row["slate_id"], tuple(row["item_ids"]), tuple(row["scores"]))


def stopped(reason: str) -> str:
    """Returns the message of a `WorkerError`."""
    return f"{reason}. The finished shards are kept: give the same command again to go on."


def shard_name(shard: int) -> str:
    """Returns the name of a shard's file; names sort as numbers do."""
    return f"part-{shard:06d}.parquet"


class Worker:
    """A ranker with the job's adapter, and the place in the input where it reads."""

    def __init__(self, job: Job, parts: Sequence[Part], *, device: str = "auto") -> None:
        """Loads the base and the adapter."""
        self._job = job
        self._source = _Source(job, parts)
        self._ranker = Ranker(load_base(**job.base, device=device))
        self._ranker.load_adapter(job.adapter.source, domain=job.domain)

    def rank(self, shard: int) -> None:
        """Ranks a shard and writes its file.

        Raises:
            DataError: a slate cannot be ranked, or the input is not what it was.
            OSError: the disk refuses.
        """
        job = self._job
        start = shard * job.shard_slates
        slates = self._source.read(start, start + job.shard_slates)
        ranked = self._ranker.rank_stream(slates, domain=job.domain, k=job.k)
        try:
            rows = (_record(row, job) for row in ranked)
            write_parquet(job.output / shard_name(shard), rows, RANKINGS)
        except DataError as error:
            if error.path is not None:
                raise
            raise DataError(error.reason, path=self._source.path) from error


class _Source:
    """Ranges of the input's slates. Reading on is cheap; reading back opens the file again."""

    def __init__(self, job: Job, parts: Sequence[Part]) -> None:
        self._open = _opener(job)
        self._parts = parts
        self._part: Part | None = None
        self._slates: Iterator[Slate] = iter(())
        self._row = 0

    @property
    def path(self) -> Path | None:
        """The file that was read last."""
        return None if self._part is None else self._part.path

    def read(self, start: int, stop: int) -> Iterator[Slate]:
        """Yields the slates from `start` up to `stop`, counted over the whole input.

        Raises:
            DataError: a file has fewer slates than it had.
        """
        first = 0
        for part in self._parts:
            begin, end = max(start - first, 0), min(stop - first, part.slates)
            first += part.slates
            if begin >= end:
                continue
            if part is not self._part or self._row > begin:
                self._part, self._slates, self._row = part, self._open(part.path), 0
            for slate in self._slates:
                self._row += 1
                if self._row > begin:
                    yield slate
                if self._row == end:
                    break
            else:
                raise DataError(
                    f"the file had {part.slates} slates when the job began and has {self._row} "
                    "now. Start anew, into another folder.",
                    path=part.path,
                )


def processes(workers: int | None) -> int:
    """Returns the number of processes that are meant; None: one per GPU, else one."""
    return workers or max(1, torch.cuda.device_count())


def local(
    job: Job, parts: Sequence[Part], todo: Sequence[int], workers: int | None
) -> Iterator[int]:
    """Ranks shards on this machine: in this process, or in several, each with a base of its own.

    Raises:
        WorkerError: a process has died.
    """
    workers = min(processes(workers), len(todo))
    if workers > 1:
        yield from _in_processes(job, parts, todo, workers)
        return
    worker = Worker(job, parts)
    for shard in todo:
        worker.rank(shard)
        yield shard


def _in_processes(
    job: Job, parts: Sequence[Part], todo: Sequence[int], workers: int
) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and CUDA's state
    pending = iter(todo)
    running: dict[Connection, tuple[Any, int]] = {}
    try:
        for number, shard in enumerate(itertools.islice(pending, workers)):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(there, job, parts, number, workers), daemon=True
            )
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            running[here] = process, shard
            here.send(shard)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, shard = running[connection]
                try:
                    failure = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    raise WorkerError(_died(process.exitcode, shard)) from None
                if failure is not None:
                    raise failure
                yield shard
                following = next(pending, None)
                if following is None:
                    del running[connection]
                    connection.close()  # the process ends
                    process.join()
                else:
                    running[connection] = process, following
                    connection.send(following)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _work(
    connection: Connection, job: Job, parts: Sequence[Part], number: int, workers: int
) -> None:
    """Ranks the shards that come through the pipe, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = None
    with contextlib.suppress(EOFError):
        while True:
            shard = connection.recv()
            try:
                if worker is None:
                    worker = Worker(job, parts, device=_share(number, workers))
                worker.rank(shard)
            except (PeftRankError, OSError) as error:
                connection.send(error)
            else:
                connection.send(None)


def _share(number: int, workers: int) -> str:
    """Returns a worker's device, and takes its share of the processor."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    gpus = torch.cuda.device_count()
    return f"cuda:{number % gpus}" if gpus else "cpu"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _died(code: int | None, shard: int) -> str:
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = signal.Signals(-code).name
        if how == "SIGKILL":
            how += "; if nobody killed it, memory ran out: use fewer --workers"
    return stopped(f"a worker process died ({how}) while it ranked {shard_name(shard)}")


def _begin(job: Job) -> tuple[Part, ...]:
    """Returns the input's files, after the folder is the job's own."""
    if job.shard_slates < 1 or (job.k is not None and job.k < 1):
        raise ConfigError(f"shard_slates={job.shard_slates}, k={job.k}: expected at least 1")
    manifest = job.output / _MANIFEST
    _check_folder(job.output)
    files = slate_files(job.input)
    hashes = [_sha256(path) for path in files]
    identity = _identity(job, hashes)
    if manifest.is_file():
        earlier, counts = _earlier(manifest)
        _check_same(job.output, earlier, identity)
    else:
        counts = _count(job, files)
        record = {"job": identity, "slates": counts, "peftrank_version": __version__}
        write_bytes(manifest, (json.dumps(record, indent=1) + "\n").encode())
    return tuple(map(Part, (path.absolute() for path in files), hashes, counts))


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder for the shards, or a new name")
    names = sorted(p.name for p in folder.glob("*") if not p.name.startswith(TEMPORARY))
    if names and _MANIFEST not in names:
        raise ConfigError(
            f"{folder} holds other files ({', '.join(names[:3])}{', ...' if names[3:] else ''}). "
            "Shards are written into a new or empty folder."
        )


def _identity(job: Job, hashes: Sequence[str]) -> dict[str, Any]:
    """Returns all that decides what the shards hold, as JSON values."""
    manifest = json.dumps(job.adapter.manifest, sort_keys=True)
    items = job.items or items_beside(job.input)
    identity = {
        "format": _FORMAT,
        "input": hashes,
        "items": None if items is None else _sha256(items),
        "domain": job.domain,
        "adapter version": job.adapter.version,
        "adapter": hashlib.sha256(manifest.encode()).hexdigest(),
        "base": dict(job.base),
        "k": job.k,
        "slates per shard": job.shard_slates,
    }
    parsed: dict[str, Any] = json.loads(json.dumps(identity))
    return parsed


def _check_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [key for key in now if earlier.get(key) != now[key]]
    if not changed:
        return
    shown = (f"{key} {_short(earlier.get(key))}, now {_short(now[key])}" for key in changed)
    raise ConfigError(
        f"{folder} holds another job, which this command cannot continue: {'; '.join(shown)}. "
        "Give the command it was started with, choose another folder, or delete that one."
    )


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _earlier(path: Path) -> tuple[dict[str, Any], list[int]]:
    """Returns what the job of a folder was, and the number of slates of each file."""
    try:
        record = json.loads(path.read_bytes())
        return record["job"], record["slates"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), so it cannot be told whose shards lie there. "
            "Choose another folder, or delete that one."
        ) from error


def _count(job: Job, files: Sequence[Path]) -> list[int]:
    """Returns the number of slates of each file, after a check of every slate."""
    opened = _opener(job)
    return [sum(1 for _ in opened(path)) for path in files]


def _opener(job: Job) -> Callable[[Path], Iterator[Slate]]:
    """Returns what reads a file of the input; all that it reads share the items."""
    reject = row_errors("raise", Rejects())
    lookup = item_lookup(job.input, job.items, reject)
    return lambda path: read_files([path], lookup, reject)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", path=path) from error


def _is_whole(path: Path, slates: int) -> bool:
    try:
        rows: int = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):  # absent, or cut by a broken disk
        return False
    return rows == slates


def _record(ranked: RankedList, job: Job) -> dict[str, Any]:
    return {
        "slate_id": ranked.slate_id,
        "item_ids": ranked.item_ids,
        "scores": ranked.scores,
        "domain": job.domain,
        "version": job.adapter.version,
    }

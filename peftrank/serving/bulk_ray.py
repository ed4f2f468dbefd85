"""Bulk ranking by Ray Data, on one machine or a cluster: one actor per device takes shards.

What a shard is, how it is written, and how a job goes on, is in `bulk`. Ray carries the numbers of
shards, never slates: actors read the input and write the output themselves, so on a cluster both
must lie where every node sees them under the same path. Needs the extra `peftrank[ray]`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftrank.errors import ConfigError, PeftRankError
from peftrank.files import TEMPORARY
from peftrank.serving.bulk import Job, Part, Worker, WorkerError, shard_name, stopped

_OBJECT_STORE_BYTES = 200_000_000
"""Of a Ray that is started here; it holds numbers only."""
_TRIES = 3


def on_ray(
    job: Job, parts: Sequence[Part], todo: Sequence[int], workers: int | None
) -> Iterator[int]:
    """Ranks shards with Ray Data; an engine for `bulk.run`.

    Joins the cluster that RAY_ADDRESS names, or the Ray that runs in this process. Else it starts
    a Ray on this machine and ends it. An actor that dies is replaced, and its shard ranked again.

    Args:
        job: The job.
        parts: The input's files.
        todo: The shards.
        workers: How many actors; None: one per GPU of the cluster, else one per node.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
        WorkerError: actors died of one shard several times, or Ray did.
    """
    ray = _ray()
    for shard in todo:
        _tries(job, shard).unlink(missing_ok=True)
    with _running(workers):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        workers = min(workers or gpus or len(ray.nodes()), len(todo))
        shards = ray.data.from_items([{"shard": s} for s in todo], override_num_blocks=len(todo))
        ranked = shards.map_batches(
            _Actor,
            fn_constructor_args=(job, parts),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            **({"num_gpus": 1} if gpus else {"num_cpus": max(1, cpus // workers)}),
        )
        try:
            for row in ranked.iter_rows():
                if row["failure"] is not None:
                    raise row["failure"]
                yield int(row["shard"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkerError(stopped(f"Ray ended the job: {reason}")) from error


class _Actor:
    """A worker in an actor."""

    def __init__(self, job: Job, parts: Sequence[Part]) -> None:
        self._job, self._parts = job, parts
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ranks one shard; an error of ours is a result, which Ray neither wraps nor repeats."""
        failure = None
        try:
            self._rank(int(batch["shard"][0]))
        except (PeftRankError, OSError) as error:
            failure = error
        return {"shard": batch["shard"], "failure": np.array([failure], dtype=object)}

    def _rank(self, shard: int) -> None:
        # Ray replaces dead actors without end; one shard that takes all memory would kill them all.
        tries = _tries(self._job, shard)
        with tries.open("ab") as file:
            if file.tell() == _TRIES:
                raise WorkerError(
                    stopped(
                        f"{_TRIES} actors died, one after another, while they ranked "
                        f"{shard_name(shard)}; if nobody killed them, memory ran out: use fewer "
                        "--workers"
                    )
                )
            file.write(b"x")
        self._worker = self._worker or Worker(self._job, self._parts)
        self._worker.rank(shard)
        tries.unlink(missing_ok=True)


def _tries(job: Job, shard: int) -> Path:
    """Returns the file that has as many bytes as attempts at the shard were begun."""
    return job.output / f"{TEMPORARY}tries-{shard}"


def _ray() -> Any:  # noqa: ANN401 - the module
    """Returns Ray, told to say nothing to its makers and nothing but errors here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed: pip install 'peftrank[ray]'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


@contextlib.contextmanager
def _running(workers: int | None) -> Iterator[None]:
    """Has a Ray for the block; one that was started for it is ended with it."""
    import ray

    if ray.is_initialized():  # the caller's
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if not address:
        options = {
            "address": "local",  # else Ray would join any that runs on this machine
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "num_cpus": max(workers or 1, os.cpu_count() or 1),
        }
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot reach or start Ray ({address or 'local'}): {error}") from error
    try:
        yield
    finally:
        ray.shutdown()

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
from typing import Any

import numpy as np

from peftrank.errors import ConfigError, PeftRankError
from peftrank.serving.bulk import Job, Part, Worker, WorkerError, stopped

_OBJECT_STORE_BYTES = 200_000_000
"""Of a Ray that is started here; it holds numbers only."""
_RETRIES = 3
"""How often a shard is tried again after its actor died."""


def on_ray(
    job: Job, parts: Sequence[Part], todo: Sequence[int], workers: int | None
) -> Iterator[int]:
    """Ranks shards with Ray Data; an engine for `bulk.run`.

    Joins the cluster that RAY_ADDRESS names, or the Ray that runs in this process. Else it starts
    a Ray on this machine and ends it. The base is loaded once per actor.

    Args:
        job: The job.
        parts: The input's files.
        todo: The shards.
        workers: How many actors; None: one per GPU of the cluster, else one per node.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
        WorkerError: a shard's actor died again and again, or Ray did.
    """
    _quiet()
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed: pip install 'peftrank[ray]'"
        ) from error
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
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
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
    """A worker in an actor. An error of ours is a result: Ray would try it again, and wrap it."""

    def __init__(self, job: Job, parts: Sequence[Part]) -> None:
        self._job, self._parts = job, parts
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        failure = None
        try:
            self._worker = self._worker or Worker(self._job, self._parts)
            for shard in batch["shard"].tolist():
                self._worker.rank(shard)
        except (PeftRankError, OSError) as error:
            failure = error
        return {"shard": batch["shard"], "failure": np.array([failure], dtype=object)}


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


def _quiet() -> None:
    """Keeps Ray from reporting to its makers and from writing to the terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray.data").setLevel(logging.ERROR)

"""How fast logs become slates, and in how much memory: `peftrank data prepare`, end to end.

    python -m benchmarks.data                        # a million interactions, half a minute
    python -m benchmarks.data --interactions 1000000 10000000

Each size runs in a process of its own: a simulated log (20 interactions a user on average, 20,000
items, popular ones more often) is read as `--format csv`, and becomes Parquet slates with 19
uniform negatives, one training, validation and test list for nearly every user.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from benchmarks.measure import RESULTS, describe, machine, write

_ITEMS = 20_000
_BLOCK = 1_000_000
_PREPARE = """
import json, resource, sys, time
from pathlib import Path
from peftrank._tables import Settings
from peftrank.formats.csv import csv
from peftrank.prepare import prepare
start = time.perf_counter()
log = csv(Path(sys.argv[1]))
read = time.perf_counter()
meta = prepare(log, Path(sys.argv[2]), Settings(parquet=True))
done = time.perf_counter()
print(json.dumps({
    "slates": sum(meta["counts"]["slates"].values()),
    "read_seconds": read - start,
    "prepare_seconds": done - read,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "fingerprint": meta["fingerprint"],
}))
"""


def write_log(folder: Path, interactions: int, *, seed: int = 0) -> None:
    """Writes `clicks.csv` and `items.csv` of a simulated log, in the order of time."""
    rng = np.random.default_rng(seed)
    words = np.array([f"word{i}" for i in range(3000)])
    with (folder / "items.csv").open("w", encoding="utf-8") as file:
        file.write("item,title\n")
        for item in range(_ITEMS):
            file.write(f"i{item},{' '.join(words[rng.integers(len(words), size=6)])}\n")
    users = max(1, interactions // 20)
    schema = pa.schema([("user", pa.string()), ("item", pa.string()), ("time", pa.int64())])
    with pyarrow.csv.CSVWriter(str(folder / "clicks.csv"), schema) as writer:
        for first in range(0, interactions, _BLOCK):
            size = min(_BLOCK, interactions - first)
            user = (users * rng.random(size) ** 1.5).astype(np.int64)
            item = (_ITEMS * rng.random(size) ** 3).astype(np.int64)
            time = 1_500_000_000 + 3 * first + np.sort(rng.integers(3 * size, size=size))
            names = (np.char.add(letter, c.astype(str)) for letter, c in (("u", user), ("i", item)))
            writer.write_table(pa.table([*map(pa.array, names), pa.array(time)], schema=schema))


def measure(interactions: int) -> dict[str, Any]:
    """Returns what one size took, in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder, interactions)
        done = subprocess.run(
            [sys.executable, "-c", _PREPARE, str(folder), str(folder / "slates")],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        sys.exit(done.stderr)
    return {"interactions": interactions, **json.loads(done.stdout)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data")
    parser.add_argument("--interactions", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--json", type=Path, default=RESULTS / "data.json")
    options = parser.parse_args(arguments)
    found = machine(("pyarrow", "numpy"))
    result = {"machine": found, "rows": [measure(size) for size in options.interactions]}
    write(options.json, result)
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    lines = [
        describe(result["machine"]),
        "",
        "| interactions | slates | reading, s | slates, s | interactions/s | peak memory, MiB |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        read, made = row["read_seconds"], row["prepare_seconds"]
        lines.append(
            f"| {row['interactions']:,} | {row['slates']:,} | {read:.1f} | {made:.1f} | "
            f"{row['interactions'] / (read + made):,.0f} | {row['peak_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

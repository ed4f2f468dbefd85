"""What it takes to start: `peftrank --help`, a ranker from warm files, and the base's bytes.

    python -m benchmarks.startup

Every start is a process of its own, several times; files are read once before, so they are in the
system's cache. The parts of a ranker's start are timed one after another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, describe, machine, write

HELP, WARM, BYTES = "peftrank --help, seconds", "ranker and adapter, seconds", "nf4 / bf16 bytes"
GOALS = {HELP: 0.3, WARM: 2.5, BYTES: 0.30}
_RANKER = """
import json, sys, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import torch; mark()
from peftrank.ranker import Ranker; mark()
ranker = Ranker.from_base(sys.argv[1]); mark()
ranker.load_adapter(sys.argv[2]); mark()
parts = [b - a for a, b in zip(marks, marks[1:])]
print(json.dumps(dict(zip(["torch", "peftrank", "base", "adapter"], parts))))
"""
_BYTES = """
import sys
from peftrank.base import load_base
settings = {"quantization": sys.argv[2], "compute_dtype": "bfloat16"}
print(load_base(sys.argv[1], **settings).model.get_memory_footprint())
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter", default="news", help="folder, or domain of the store adapters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args(arguments)
    helps, parts = [], []
    for _ in range(1 + options.rounds):
        helps.append(_run("-m", "peftrank", "--help")[0])
        seconds, shown = _run("-c", _RANKER, options.base, options.adapter)
        parts.append({"python": 0.0, **json.loads(shown)})
        parts[-1]["python"] = seconds - sum(parts[-1].values())  # and the end of the process
    middle = {name: statistics.median(row[name] for row in parts[1:]) for name in parts[0]}
    nf4, plain = (int(_run("-c", _BYTES, options.base, kind)[1]) for kind in ("nf4", "none"))
    found = {
        HELP: statistics.median(helps[1:]),
        WARM: statistics.median(sum(row.values()) - row["python"] for row in parts[1:]),
        BYTES: nf4 / plain,
    }
    result = {
        "machine": machine(),
        "base": options.base,
        "found": found,
        "goals": {
            name: {"at_most": most, "met": found[name] <= most} for name, most in GOALS.items()
        },
        "parts_of_warm_start": middle,
        "bytes": {"nf4": nf4, "bf16": plain},
    }
    write(options.json, result)
    print(markdown(result))


def _run(*arguments: str) -> tuple[float, str]:
    """Returns the seconds a Python process took and the last line it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started, done.stdout.strip().splitlines()[-1]


def markdown(result: dict[str, Any]) -> str:
    """Returns the figures as a table."""
    lines = [
        f"{result['base']}, {describe(result['machine'])}",
        "",
        "| | measured | goal, at most | |",
        "|---|--:|--:|---|",
    ]
    for name, goal in result["goals"].items():
        met = "met" if goal["met"] else "not met"
        lines.append(f"| {name} | {result['found'][name]:.2f} | {goal['at_most']:.2f} | {met} |")
    parts = ", ".join(f"{n} {s:.2f}" for n, s in result["parts_of_warm_start"].items())
    return "\n".join([*lines, "", f"Seconds of the ranker's start: {parts}."])


if __name__ == "__main__":
    main()

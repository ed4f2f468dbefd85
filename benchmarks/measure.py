"""What every benchmark needs: the machine's description, interleaved timing, memory, a file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peftrank.files import write_bytes

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Returns what the figures were measured on, and with which versions."""
    info = Path("/proc/cpuinfo")  # Linux; `platform` does not know the processor's name
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "platform": platform.system(),
        "python": platform.python_version(),
        "processor": next(named, platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: metadata.version(name) for name in packages},
    }


def describe(found: Mapping[str, Any]) -> str:
    """Returns `machine()` as a line of text."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = found["gpu"] or f"{found['processor']}, {found['threads']} of {found['cores']} cores"
    return f"{where}; {versions}"


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns each case's seconds per round; every round runs all cases, so that noise hits all.

    With `time.process_time` as the clock they are processor seconds, of all threads.
    """
    for _ in range(warm_up):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            started = clock()
            case()
            seconds[name].append(clock() - started)
    return seconds


def ratio(times: list[float], peer: list[float]) -> dict[str, float]:
    """Returns times / peer over paired rounds: median, lowest and highest."""
    paired = [a / b for a, b in zip(times, peer, strict=True)]
    return {"median": statistics.median(paired), "low": min(paired), "high": max(paired)}


def shown(value: Mapping[str, float]) -> str:
    """Returns a ratio with its range, as the tables print it."""
    return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def resident_bytes() -> int:
    """Returns the memory this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the figures as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())

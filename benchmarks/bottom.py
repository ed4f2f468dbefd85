"""Training steps with what enters the lowest adapted layer kept, beside steps without.

    python -m benchmarks.bottom              # smollm2-135m, unquantized and in nf4

Both take the same optimizer steps on the same slates of the news sample (about 10 history items and
20 candidates), in turns in one process. What the first epoch pays to compute the states is a row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, describe, interleaved, machine, ratio, shown, write
from peftrank.base import Base, load_base
from peftrank.config import Config, load_config
from peftrank.training.bottom import bottoms
from peftrank.training.loop import _optimize
from peftrank.training.run import Run, passes, start

QUANTIZATIONS = ("none", "nf4")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bottom")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--layers", default="top-10")
    parser.add_argument("--slates", type=int, default=8, help="slates per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "bottom.json")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine(), "base": options.base, "layers": options.layers}
    result["rows"] = [measured(name, options) for name in QUANTIZATIONS]
    write(options.json, result)
    print(markdown(result))


def measured(quantization: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds per step of each case and what is kept."""
    base = load_base(options.base, quantization=quantization)
    with tempfile.TemporaryDirectory() as folder:
        run = start(configured(options, quantization), Path(folder), base)
        try:
            return compared(run, base, Path(folder), options)
        finally:
            run.adapted.unload()


def configured(options: argparse.Namespace, quantization: str) -> Config:
    overrides = {
        "base.quantization": quantization,
        "base.name": options.base,
        "method.layers": options.layers,
        "training.eval_slates": 1,
        "training.bottom_cache": "memory",
    }
    return load_config(domain="news", method="lora", overrides=overrides)


def compared(run: Run, base: Base, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    slates = run.train[: options.slates]
    trees = {"train": [run.template.tree(slate) for slate in slates]}
    memory = bottoms(base, trees, where="memory", limit=2**40)
    disk = bottoms(base, trees, where="memory", limit=2**40)
    disk["train"].keep(folder / "states")

    def step(kept: dict[str, Any]) -> None:
        run.bottoms = kept
        _optimize(run, slates)

    def fill() -> None:
        memory["train"].keep({})
        with torch.no_grad():
            for _, batch in passes(run, slates):
                memory["train"].entering(batch)

    cases = {
        "fill": fill,  # what it leaves, the next case uses
        "memory": lambda: step(memory),
        "disk": lambda: step(disk),
        "off": lambda: step({}),
    }
    seconds = interleaved(cases, rounds=options.rounds)
    return {
        "quantization": base.identity.quantization,
        "compute_dtype": base.identity.compute_dtype,
        "slates": len(slates),
        "constant_layers": base.constant_layers,
        "layers": base.num_layers,
        "bytes_per_slate": memory["train"].nbytes / len(slates),
        "slates_per_second": {
            name: len(slates) / statistics.median(seconds[name]) for name in ("off", "memory")
        },
        "speedup": {name: ratio(seconds["off"], seconds[name]) for name in ("memory", "disk")},
        "fill": ratio(seconds["fill"], seconds["off"]),
    }


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    lines = [
        describe(result["machine"]),
        "",
        "| base | layers kept out | slates/s, off | memory | memory / off | disk / off "
        "| KiB per slate | fill, in steps without |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        rates = row["slates_per_second"]
        lines.append(
            f"| {result['base']}, {row['quantization']}, {row['compute_dtype']} "
            f"| {row['constant_layers']} of {row['layers']} "
            f"| {rates['off']:.2f} | {rates['memory']:.2f} "
            f"| {shown(row['speedup']['memory'])} | {shown(row['speedup']['disk'])} "
            f"| {row['bytes_per_slate'] / 1024:.0f} | {shown(row['fill'])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Adapter methods beside each other: same data, steps, number of trials and, nearly, parameters.

    python -m benchmarks.methods --data games=slates/games --data ml100k=slates/ml100k

For each folder of prepared slates (docs/real-data.md) and each method, the learning rate is chosen
among the same multiples of the method's default by validation nDCG@10, with the first of three
seeds. All three are measured on the test part. The readout sees text alone. Every adapter is in the
same top layers, so what leaves those below is computed once for all trainings
(`training.bottom_cache`). What is finished is kept in `--work`, so the command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS, describe, machine, ratio, shown, write
from peftrank import plugins, store
from peftrank.base import Base, load_base
from peftrank.config import Config, load_config
from peftrank.evaluation import Evaluation, compare, evaluate, evaluate_scores
from peftrank.ranker import Ranker
from peftrank.training import train
from peftrank.training.data import folder_data, read_part
from peftrank.training.loop import Diverged, _given_back, _optimize
from peftrank.training.run import start
from peftrank.types import Slate

# Sizes give about the parameters of LoRA's rank 8; IA3 and top-layers have no such choice.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"name": "lora", "r": 8, "alpha": 16},
    "rsLoRA": {"name": "lora", "r": 8, "alpha": 16, "rslora": True},
    "DoRA": {"name": "lora", "r": 8, "alpha": 16, "dora": True},
    "AdaLoRA": {"name": "adalora", "init_r": 12, "target_r": 8},
    "Houlsby": {"name": "adapter", "kind": "houlsby", "size": 36},
    "Pfeiffer": {"name": "adapter", "kind": "pfeiffer", "size": 72},
    "parallel": {"name": "adapter", "kind": "parallel", "size": 72},
    "IA3": {"name": "ia3"},
    "top-layers": {"name": "top-layers"},
}
REFERENCE = "LoRA"
RATES = (0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)
METRIC = "ndcg@10"
FLOORS = ("random", "popularity", "bm25")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--data", action="append", required=True, help="name=FOLDER, repeatable.")
    parser.add_argument("--methods", default=",".join(METHODS), help="Some of the methods.")
    parser.add_argument("--base", default="minilm-l6")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--layers", default="top-2", help="all, or top-K: where adapters are.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--test", type=int, default=300, help="The first lists of the test part.")
    parser.add_argument("--rounds", type=int, default=3, help="Of the speed's measurement.")
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--json", type=Path, default=RESULTS / "methods.json")
    options = parser.parse_args(arguments)
    base = load_base(options.base, quantization=options.quantization, compute_dtype="float32")
    result: dict[str, Any] = {
        "machine": machine(),
        "base": f"{options.base} ({options.quantization})",
        "layers": options.layers,
        "steps": options.steps,
        "trials": len(RATES),
        "seeds": len(SEEDS),
        "data": [],
    }
    for given in options.data:
        name, _, folder = given.partition("=")
        result["data"].append(measured(name, Path(folder), base, options))
    write(options.json, result)
    print(markdown(result))


def measured(name: str, folder: Path, base: Base, options: argparse.Namespace) -> dict[str, Any]:
    """Returns all figures of one folder of slates."""
    chosen = options.methods.split(",")
    test = read_part(folder_data(folder), name, "test")[: options.test]
    train_slates = read_part(folder_data(folder), name, "train")
    cells = {}
    for method in chosen:
        work = options.work / name / method
        config = configured(name, folder, method, base, options)
        default = plugins.load("methods", config.method.name).learning_rate
        rates = [default * factor for factor in RATES]
        trials = {rate: trained(config, rate, SEEDS[0], work, base) for rate in rates}
        best = max(rates, key=lambda rate: trials[rate].get("valid", -1.0))
        runs = [trained(config, best, seed, work, base) for seed in SEEDS]
        cells[method] = {
            "rate": best,
            "trials": {f"{rate:g}": trial.get("valid") for rate, trial in trials.items()},
            "runs": [tested(run, base, test) for run in runs],
        }
    floors = [floor(n, test, train_slates) for n in FLOORS]
    evaluations = {method: pooled(method, cell["runs"]) for method, cell in cells.items()}
    reference = evaluations.get(REFERENCE)
    rows = []
    for method, cell in cells.items():
        found = evaluations[method]
        gain = None if reference is None else compare(found, reference, METRIC)
        means = [float(np.mean(run["values"])) for run in cell["runs"]]
        rows.append(
            {
                "method": method,
                "options": METHODS[method],
                "learning_rate": cell["rate"],
                "trials": cell["trials"],
                METRIC: found.mean(METRIC),
                "interval": found.interval(METRIC),
                "by_seed": means,
                "against_reference": gain,
                "bytes": cell["runs"][0]["bytes"],
            }
        )
    speeds = speed(name, folder, chosen, base, options)
    for row in rows:
        row |= speeds[row["method"]]
    found = dict(zip(FLOORS, floors, strict=True))
    return {"name": name, "test": len(test), "floors": found, "rows": rows}


def configured(
    name: str, folder: Path, method: str, base: Base, options: argparse.Namespace
) -> Config:
    """Returns a method's training on a folder, at the method's default learning rate."""
    domain = "video" if name.startswith(("ml", "micro")) else "ecommerce"
    parts = folder_data(folder)
    return load_config(
        domain=domain,
        overrides={
            "base": {"name": base.identity.name, "quantization": base.identity.quantization},
            "base.compute_dtype": base.identity.compute_dtype,
            "data": {"train": str(parts.train), "valid": str(parts.valid), "features": []},
            "method": METHODS[method] | {"layers": options.layers},
            "readout": {"name": "score_head", "width": 128, "match": True},
            "prompt.history_length": 6,
            "prompt.item_tokens": 12,
            "training.max_steps": options.steps,
            "training.batch_size": 8,
            "training.micro_tokens": 4096,
            "training.eval_steps": options.steps,
            "training.eval_slates": 100,
            "training.bottom_cache": "off" if options.layers == "all" else "memory",
        },
    )


def trained(config: Config, rate: float, seed: int, work: Path, base: Base) -> dict[str, Any]:
    """Returns where a training's adapter is and its validation nDCG@10; nothing if it diverged."""
    output = work / f"{rate:g}-{seed}"
    done = Path(f"{output}.json")
    if not done.is_file():
        run: dict[str, Any] = {"output": str(output)}
        seeded = with_training(config, seed, learning_rate=rate)
        try:
            adapter = train(seeded, output=output, base=base)
        except Diverged:
            pass
        else:
            valid = store.describe(adapter)["metrics"][f"valid_{METRIC}"]
            run |= {"adapter": str(adapter), "valid": valid}
        write(done, run)
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def tested(run: dict[str, Any], base: Base, test: Sequence[Slate]) -> dict[str, Any]:
    """Returns an adapter's test values, one a list, and the bytes of its files of weights."""
    done = Path(run["output"] + "-tested.json")
    if not done.is_file():
        adapter = Path(run["adapter"])
        with Ranker(base) as ranker:
            domain = ranker.load_adapter(adapter)
            values = evaluate(ranker, test, domain=domain, metrics=(METRIC,)).values[METRIC]
        size = sum(f.stat().st_size for f in adapter.glob("*.safetensors"))
        write(done, {"values": values.tolist(), "bytes": size})
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def with_training(config: Config, seed: int, **training: Any) -> Config:  # noqa: ANN401
    """Returns the configuration with another seed and training options."""
    changed = config.training.model_copy(update=training)
    return config.model_copy(update={"seed": seed, "training": changed})


def pooled(name: str, runs: Sequence[Mapping[str, Any]]) -> Evaluation:
    """Returns the mean over seeds as one evaluation, so that intervals resample the lists."""
    return Evaluation(name, {METRIC: np.mean([run["values"] for run in runs], axis=0)})


def floor(name: str, test: Sequence[Slate], train_slates: Sequence[Slate]) -> float:
    """Returns the nDCG@10 of a ranking without a language model."""
    scores = plugins.load("baselines", name)(test, train=train_slates, seed=0)
    return evaluate_scores(name, test, scores, (METRIC,)).mean(METRIC)


def speed(
    name: str, folder: Path, methods: Sequence[str], base: Base, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Returns each method's seconds per optimizer step beside the reference's, and peak memory.

    Every round times all methods, so that noise hits all, and nothing is kept from one step for
    the next. Linux tells the peak.
    """
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    peaks: dict[str, int] = {}
    parameters: dict[str, int] = {}
    for _ in range(options.rounds):
        for method in methods:
            config = configured(name, folder, method, base, options)
            config = with_training(config, SEEDS[0], bottom_cache="off")
            run = start(config, options.work / "speed", base)
            with _given_back(run):
                trained = [p for p in base.model.parameters() if p.requires_grad]
                parameters[method] = sum(p.numel() for p in trained)
                slates = run.train[: config.training.batch_size]
                _optimize(run, slates)
                before = reset_peak()
                started = time.perf_counter()
                for _ in range(3):
                    _optimize(run, slates)
                seconds[method].append((time.perf_counter() - started) / 3)
                peaks[method] = max(peaks.get(method, 0), peak_bytes() - before)
    reference = seconds.get(REFERENCE, seconds[methods[0]])
    return {
        method: {
            "slates_per_second": 8 / statistics.median(seconds[method]),
            "speed": ratio(reference, seconds[method]),
            "peak_bytes_of_step": peaks[method],
            "parameters": parameters[method],
        }
        for method in methods
    }


def reset_peak() -> int:
    """Forgets the process's peak memory (Linux) and returns what it holds now, in bytes.

    Freed memory that glibc keeps is given back before, or a step would seem to need none.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Returns the process's peak memory since it was forgotten last (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def markdown(result: dict[str, Any]) -> str:
    """Returns the tables."""
    lines = [describe(result["machine"])]
    for data in result["data"]:
        floors = ", ".join(f"{name} {value:.3f}" for name, value in data["floors"].items())
        lines += [
            "",
            f"{data['name']}: {result['base']}, layers {result['layers']}, "
            f"{result['steps']} steps of 8 lists, "
            f"{data['test']} test lists, {result['seeds']} seeds; {floors}",
            "",
            "| method | learning rate | nDCG@10 | seeds | - LoRA | parameters | KB on disk "
            "| slates/s | / LoRA | MiB of a step |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in data["rows"]:
            low, high = row["interval"]
            gain = row["against_reference"]
            difference = "" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
            lines.append(
                f"| {row['method']} | {row['learning_rate']:g} "
                f"| {row[METRIC]:.3f} [{low:.3f}, {high:.3f}] "
                f"| {min(row['by_seed']):.3f} to {max(row['by_seed']):.3f} | {difference} "
                f"| {row['parameters']:,} | {row['bytes'] / 1e3:.0f} "
                f"| {row['slates_per_second']:.1f} | {shown(row['speed'])} "
                f"| {row['peak_bytes_of_step'] / 2**20:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

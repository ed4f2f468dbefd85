"""What each quantization of the base costs in accuracy and saves in bytes, on the same seeds.

    python -m benchmarks.quantization --data games=slates/games

For each folder of prepared slates (docs/real-data.md): LoRA trained on the base in each
quantization, with the same seeds, steps and learning rate, and measured on the test part on the
base that it was trained on. Adapters are in the top layers, as in `benchmarks.methods`, which this
shares; `--work` keeps what is finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.measure import RESULTS, describe, machine, write
from benchmarks.methods import METRIC, SEEDS, configured, pooled, tested, trained
from peftrank import plugins
from peftrank.base import Base, load_base
from peftrank.evaluation import compare
from peftrank.training.data import folder_data, read_part

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"quantization": "none"},
    "int8": {"quantization": "int8"},
    "nf4, double": {"quantization": "nf4"},
    "nf4": {"quantization": "nf4", "double_quant": False},
    "fp4, double": {"quantization": "fp4"},
    "fp4": {"quantization": "fp4", "double_quant": False},
    "nf4, double, embeddings": {"quantization": "nf4", "quantize_embeddings": True},
    "fp4, double, embeddings": {"quantization": "fp4", "quantize_embeddings": True},
}
REFERENCE = "none"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--data", action="append", default=[], help="name=FOLDER, repeatable.")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="Those to train on, by ';'.")
    parser.add_argument("--bytes-of", default="smollm2-135m,minilm-l6", help="Bases to count.")
    parser.add_argument("--base", default="minilm-l6")
    parser.add_argument("--dtype", default="float32", help="What the base computes in.")
    parser.add_argument("--layers", default="top-2", help="all, or top-K: where adapters are.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--test", type=int, default=300, help="The first lists of the test part.")
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--json", type=Path, default=RESULTS / "quantization.json")
    options = parser.parse_args(arguments)
    chosen = options.variants.split(";")
    result: dict[str, Any] = {
        "machine": machine(),
        "bytes": {name: sizes(name) for name in options.bytes_of.split(",")},
        "base": options.base,
        "dtype": options.dtype,
        "layers": options.layers,
        "steps": options.steps,
        "seeds": len(SEEDS),
        "data": [measured(*given.split("=", 1), chosen, options) for given in options.data],
    }
    write(options.json, result)
    print(markdown(result))


def sizes(name: str) -> dict[str, float]:
    """Returns a base's bytes in every variant, beside those of its bfloat16 weights."""
    whole = load_base(name, quantization="none", compute_dtype="bfloat16", device="cpu")
    plain = held_bytes(whole)
    found = {}
    for variant, options in VARIANTS.items():
        made = {"compute_dtype": "bfloat16", "device": "cpu", **options}
        found[variant] = held_bytes(load_base(name, **made)) / plain
    return {"bfloat16 bytes": plain, **found}


def held_bytes(base: Base) -> int:
    """Returns the bytes of a base's tensors, quantization constants included, tied ones once."""
    return sum({t.data_ptr(): t.nbytes for t in _tensors(base)}.values())


def _tensors(base: Base) -> Iterator[Tensor]:
    yield from base.model.buffers()
    for parameter in base.model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (t for t in state.as_dict(packed=False).values() if isinstance(t, Tensor))
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            yield scales


def measured(
    name: str, folder: str, variants: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the accuracy of each variant on one folder of slates, beside the unquantized one."""
    test = read_part(folder_data(Path(folder)), name, "test")[: options.test]
    found = {}
    for variant in variants:
        made = {"compute_dtype": options.dtype, **VARIANTS[variant]}
        base = load_base(options.base, **made)
        config = configured(name, Path(folder), "LoRA", base, options)
        rate = plugins.load("methods", "lora").learning_rate
        work = options.work / name / variant.replace(", ", "-")
        runs = [trained(config, rate, seed, work, base) for seed in SEEDS]
        found[variant] = [tested(run, base, test) for run in runs]
        del base
    evaluations = {variant: pooled(variant, runs) for variant, runs in found.items()}
    reference = evaluations[REFERENCE]
    rows = [
        {
            "variant": variant,
            METRIC: evaluation.mean(METRIC),
            "interval": evaluation.interval(METRIC),
            "by_seed": [float(np.mean(run["values"])) for run in found[variant]],
            "against_none": compare(evaluation, reference, METRIC),
        }
        for variant, evaluation in evaluations.items()
    ]
    return {"name": name, "test": len(test), "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """Returns the tables."""
    lines = [describe(result["machine"]), ""]
    bases = result["bytes"]
    lines += [
        "Bytes of the base beside those of its bfloat16 weights:",
        "",
        f"| quantization | {' | '.join(bases)} |",
        f"|---|{'--:|' * len(bases)}",
    ]
    whole = " | ".join(f"{size['bfloat16 bytes'] / 1e6:.1f} MB" for size in bases.values())
    lines += [f"| none, bfloat16 | {whole} |"]
    for variant in next(iter(bases.values()), {}):
        if variant not in ("bfloat16 bytes", REFERENCE):
            shares = " | ".join(f"{size[variant]:.3f}" for size in bases.values())
            lines.append(f"| {variant} | {shares} |")
    for data in result["data"]:
        lines += [
            "",
            f"{data['name']}: {result['base']} computing in {result['dtype']}, LoRA in layers "
            f"{result['layers']}, {result['steps']} steps of 8 lists, {data['test']} test lists, "
            f"{result['seeds']} seeds",
            "",
            "| quantization | nDCG@10 | seeds | - none |",
            "|---|--:|--:|--:|",
        ]
        for row in data["rows"]:
            (low, high), gain = row["interval"], row["against_none"]
            lines.append(
                f"| {row['variant']} | {row[METRIC]:.3f} [{low:.3f}, {high:.3f}] "
                f"| {min(row['by_seed']):.3f} to {max(row['by_seed']):.3f} "
                f"| {gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}] |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

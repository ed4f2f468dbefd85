"""What a training process of a 7B to 70B base takes on 1 to 8 GPUs, as `doctor` counts it.

    python -m benchmarks.plans             # two minutes; nothing is loaded

Only shapes are needed, so the bases are given by those of their published config.json. On a GPU the
plan holds what the training's own tensors take, not the CUDA context (about half a GiB), NCCL's
buffers, or what the allocator cannot use.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, describe, machine, write
from peftrank.config import load_config
from peftrank.doctor import memory_plan

GPUS = (1, 2, 4, 8)
_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
BASES: dict[str, tuple[str, tuple[int, ...]]] = {
    "Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 28, 4, 152064)),
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32, 8, 128256)),
    "Qwen2.5-14B": ("qwen2", (5120, 13824, 48, 40, 8, 152064)),
    "Qwen2.5-32B": ("qwen2", (5120, 27648, 64, 40, 8, 152064)),
    "Llama-3.1-70B": ("llama", (8192, 28672, 80, 64, 8, 128256)),
}
SETTINGS = {
    "base.compute_dtype": "bfloat16",
    "method.layers": "all",
    "method.targets": "all-linear",
    "training.micro_tokens": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans")
    parser.add_argument("--json", type=Path, default=RESULTS / "plans.json")
    options = parser.parse_args()
    rows = [row for name in BASES for row in plans(name)]
    result = {"machine": machine(), "settings": SETTINGS, "rows": rows}
    write(options.json, result)
    print(markdown(result))


def plans(name: str) -> list[dict[str, Any]]:
    """Returns a row per quantization for one of `BASES`: bytes of a process by number of GPUs."""
    kind, shapes = BASES[name]
    values = dict(zip(_SHAPES, shapes, strict=True))
    values |= {"model_type": kind, "tie_word_embeddings": False, "max_position_embeddings": 8192}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        architecture = Path(folder) / "config.json"
        architecture.write_text(json.dumps(values))
        for quantization in ("nf4", "none"):
            config = load_config(
                domain="news",
                method="lora",
                overrides={**SETTINGS, "base.name": name, "base.quantization": quantization},
            )
            whole = memory_plan(config, device="cuda", architecture=architecture)
            shared = [
                memory_plan(
                    config, device="cuda", processes=n, sharded=True, architecture=architecture
                ).total
                for n in GPUS[1:]
            ]
            rows.append(
                {
                    "base": name,
                    "quantization": quantization,
                    "weights": whole.base,
                    "trained": whole.adapter // 4,
                    "activations": whole.activations,
                    "whole": whole.total,
                    "sharded": dict(zip(map(str, GPUS[1:]), shared, strict=True)),
                }
            )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    titles = [f"sharded over {n}" for n in GPUS[1:]]
    lines = [
        describe(result["machine"]),
        "",
        "| base | quantization | trained, millions | base, GiB | activations, GiB "
        f"| whole on each GPU | {' | '.join(titles)} |",
        f"|---|---|{'--:|' * (4 + len(titles))}",
    ]
    for row in result["rows"]:
        sizes = [row["weights"], row["activations"], row["whole"], *row["sharded"].values()]
        shown = " | ".join(f"{size / 2**30:.1f}" for size in sizes)
        lines.append(
            f"| {row['base']} | {row['quantization']} | {row['trained'] / 1e6:.0f} | {shown} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

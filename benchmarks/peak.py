"""How much of the machine's matrix product a forward pass and a training step get.

    python -m benchmarks.peak            # smollm2-135m, unquantized and nf4, bfloat16 where native

The peak is the best rate of a large square product in the same precision, measured in the same
rounds. Counted are products that the result needs: of every weight of the blocks with every token,
and in attention of every token with those on its path. A training step of an adapter needs them
once forward and once for the gradient of what enters (attention: twice); frozen weights have no
gradient. Plain transformers reads the same number of tokens, as one prompt per slate without a
mask. The profile says where the rest of the time goes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import RESULTS, describe, interleaved, machine, shown, write
from benchmarks.peers import ours
from benchmarks.peers.setting import Setting, setting, states, step, synthetic
from peftrank.base import Base, load_base
from peftrank.prompts.tree import depths
from peftrank.types import PromptTree

GOALS = {"forward": 0.72, "training": 0.62}
PEAK = "matrix product"
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "bitsandbytes"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::clone", "aten::index"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantizations", default="none,nf4")
    parser.add_argument("--slates", type=int, default=8, help="of each run")
    parser.add_argument("--size", type=int, default=2048, help="of the square product")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "peak.json")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine(), "base": options.base, "goals": GOALS}
    names = options.quantizations.split(",")
    result["rows"] = [row for name in names for row in measured(name, options)]
    write(options.json, result)
    print(markdown(result))


def measured(quantization: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row per case: of the peak's rate, its share, and its profile."""
    base = load_base(options.base, quantization=quantization)
    slates = synthetic(options.slates, history=10, candidates=20)
    given = setting(base, slates, micro_tokens=4096, history_length=10, max_tokens=10**6)
    trees = given.trees()
    needed = products(base, trees)
    flat = [[t for s in tree.segments for t in s.tokens] for tree in trees]
    plain = plain_products(base, flat)
    square = torch.randn(options.size, options.size, dtype=base.compute_dtype, device=base.device)
    cases: dict[str, Callable[[], Any]] = {
        PEAK: lambda: square @ square,
        "PeftRank, forward": ours.scoring(given).run,
        "transformers, forward": lambda: plain_forward(given, flat),
        "PeftRank, training": ours.training(given).run,
        "transformers, training": plain_training(given, flat),
    }
    work = {
        PEAK: 2 * options.size**3,
        "PeftRank, forward": sum(needed),
        "transformers, forward": sum(plain),
        "PeftRank, training": 2 * needed[0] + 3 * needed[1],
        "transformers, training": 2 * plain[0] + 3 * plain[1],
    }
    seconds = interleaved(cases, rounds=options.rounds)
    best = work[PEAK] / min(seconds[PEAK])
    rows = []
    for name in cases:
        shares = [work[name] / taken / best for taken in seconds[name]]
        rows.append(
            {
                "case": name,
                "quantization": quantization,
                "dtype": base.identity.compute_dtype,
                "tokens": sum(map(len, flat)),
                "gflops_per_second": work[name] / statistics.median(seconds[name]) / 1e9,
                "of_peak": {
                    "median": statistics.median(shares),
                    "low": min(shares),
                    "high": max(shares),
                },
                "profile": {} if name == PEAK else profiled(cases[name]),
            }
        )
    return rows


def products(base: Base, trees: Sequence[PromptTree]) -> tuple[int, int]:
    """Returns the operations of all weights of the blocks with all tokens, and of attention."""
    tokens = sum(len(s.tokens) for tree in trees for s in tree.segments)
    pairs = 0
    for tree in trees:
        for depth, segment in zip(depths(tree), tree.segments, strict=True):
            pairs += sum(depth + i + 1 for i in range(len(segment.tokens)))
    return 2 * tokens * _weights(base), pairs * _per_pair(base)


def plain_products(base: Base, rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Returns the same of ordinary causal prompts."""
    pairs = sum(len(row) * (len(row) + 1) // 2 for row in rows)
    return 2 * sum(map(len, rows)) * _weights(base), pairs * _per_pair(base)


def _weights(base: Base) -> int:
    """Returns the numbers in the weights of the blocks' linears; an adapter's own do not count."""
    return sum(
        module.in_features * module.out_features
        for name, module in base.layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    )


def _per_pair(base: Base) -> int:
    config = base.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * base.num_layers * int(config.num_attention_heads) * int(width)


def _groups(given: Setting, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Returns the rows, longest first, padded on the right, in passes of `micro_tokens`."""
    order = sorted(rows, key=len, reverse=True)
    count = max(1, given.micro_tokens // len(order[0]))
    made = []
    for first in range(0, len(order), count):
        part = order[first : first + count]
        ids = torch.full((len(part), len(part[0])), given.base.pad_token_id)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
        made.append(ids.to(given.device))
    return made


@torch.inference_mode()
def plain_forward(given: Setting, rows: Sequence[Sequence[int]]) -> None:
    """Reads all rows with the adapter in place, without a vocabulary head."""
    given.adapted.eval()
    for ids in _groups(given, rows):
        with given.half():
            states(given, ids)


def plain_training(given: Setting, rows: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Returns a step whose loss is a mean of the last states."""

    def losses() -> Any:  # noqa: ANN401
        for ids in _groups(given, rows):
            with given.half():
                last = states(given, ids)
            yield last.float().square().mean()

    return step(given, losses)


def profiled(case: Callable[[], Any]) -> dict[str, float]:
    """Returns shares of a run's time by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        case()
    spent: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "other")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return {kind: time / total for kind, time in spent.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table."""
    kinds = [*KINDS, "other"]
    lines = [
        describe(result["machine"]),
        "",
        f"| {result['base']} | GFLOP/s | of the product's peak | {' | '.join(kinds)} |",
        f"|---|--:|--:|{'--:|' * len(kinds)}",
    ]
    for row in result["rows"]:
        parts = [f"{row['profile'][k]:.0%}" if row["profile"] else "" for k in kinds]
        lines.append(
            f"| {row['case']}, {row['quantization']}, {row['dtype']} "
            f"| {row['gflops_per_second']:.0f} | {shown(row['of_peak'])} | {' | '.join(parts)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

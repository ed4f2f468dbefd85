"""What a slate costs as its list or its history grows, beside cost in proportion to its tokens.

    python -m benchmarks.lengths             # smollm2-135m, bfloat16, 5 to 500 of each
    OMP_NUM_THREADS=1 python -m benchmarks.lengths --processor    # where other work runs

Scoring in isolated mode, from tokens to scores, as a `Ranker` does it: a list longer than a row in
several rows with the trunk in each, in passes of `--micro-tokens`. All lengths are run in turns,
and so is each in a single row, however long.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, describe, interleaved, machine, ratio, shown, write
from benchmarks.peers.ours import score_head
from benchmarks.peers.setting import Setting, setting, synthetic
from peftrank.base import load_base
from peftrank.model import RankingModel, move
from peftrank.prompts import computed_tokens, in_rows, micro_batches, pack, token_count
from peftrank.types import Batch, PromptTree, Slate

HISTORY, CANDIDATES = 10, 20
"""The slate that others are compared with, and what each has of what is not varied."""
LENGTHS = (5, 20, 50, 100, 200, 500)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="auto", help="to compute in")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--micro-tokens", type=int, default=4096, help="per forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor", action="store_true", help="processor seconds, on a CPU")
    parser.add_argument("--json", type=Path, default=RESULTS / "lengths.json")
    options = parser.parse_args(arguments)
    base = load_base(options.base, quantization=options.quantization, compute_dtype=options.dtype)
    given = setting(base, (), micro_tokens=options.micro_tokens, max_tokens=10**9)
    sizes = [(HISTORY, n) for n in options.lengths] + [(n, CANDIDATES) for n in options.lengths]
    sizes = list(dict.fromkeys([(HISTORY, CANDIDATES), *sizes]))
    clock = time.process_time if options.processor else time.perf_counter
    result = {
        "machine": machine(),
        **{name: getattr(options, name) for name in ("base", "quantization", "micro_tokens")},
        "compute_dtype": base.identity.compute_dtype,
        "clock": "processor" if options.processor else "wall",
        "rows": measured(given, sizes, rounds=options.rounds, clock=clock),
    }
    write(options.json, result)
    print(markdown(result))


def measured(
    given: Setting, sizes: Sequence[tuple[int, int]], *, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Returns a row for each (history, candidates), the first of which is the reference."""
    cases: dict[Any, Callable[[], list[float]]] = {}
    tokens = {}
    for size in sizes:
        tree = given.template(history_length=size[0]).tree(slate(*size))
        computed = sum(map(computed_tokens, passes(given, tree)))
        tokens[size] = token_count(tree), computed
        cases[size] = scoring(given, tree)
        cases[size, "one row"] = scoring(given, tree, one_row=True)
    seconds = interleaved(cases, rounds=rounds, clock=clock)
    first = sizes[0]
    return [
        {
            "history": size[0],
            "candidates": size[1],
            "tokens": tokens[size][0],
            "computed_tokens": tokens[size][1],
            "seconds": statistics.median(seconds[size]),
            "token_ratio": tokens[size][0] / tokens[first][0],
            "time_ratio": ratio(seconds[size], seconds[first]),
            "one_row": ratio(seconds[size, "one row"], seconds[size]),
        }
        for size in sizes
    ]


def slate(history: int, candidates: int) -> Slate:
    """Returns a slate with no title twice in its list: twins would be computed once."""
    (made,) = synthetic(1, history=history, candidates=candidates)
    numbered = (
        replace(item, fields={"title": f"{n} {item.fields['title']}"})
        for n, item in enumerate(made.candidates, start=1)
    )
    return replace(made, candidates=tuple(numbered))


def scoring(
    given: Setting, tree: PromptTree, *, one_row: bool = False
) -> Callable[[], list[float]]:
    """Returns what scores a slate; with `one_row`, in one row and one pass."""
    model = RankingModel(given.base, score_head(given)).eval()

    @torch.inference_mode()
    def run() -> list[float]:
        given.adapted.eval()
        found: list[float] = []
        for batch in [whole(given, tree)] if one_row else passes(given, tree):
            found += model(move(batch, given.device))[batch.mask.to(given.device)].tolist()
        return found

    return run


def passes(given: Setting, tree: PromptTree) -> list[Batch]:
    """Returns the passes that a `Ranker` makes; each holds successive candidates."""
    parts = in_rows(tree, most=given.micro_tokens)
    pad = given.base.pad_token_id
    return [
        pack([parts[i] for i in group], pad_token_id=pad, once=given.base.is_decoder)
        for group in micro_batches(parts, given.micro_tokens)
    ]


def whole(given: Setting, tree: PromptTree) -> Batch:
    """Returns a slate in one row."""
    return pack([tree], pad_token_id=given.base.pad_token_id, row_tokens=token_count(tree))


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    lines = [
        describe(result["machine"]),
        f"{result['base']}, {result['quantization']}, {result['compute_dtype']}; "
        f"{result['clock']} seconds",
        "",
        "| history | candidates | tokens | computed | seconds, in those of the first "
        "| per token | in one row |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        times = row["time_ratio"]
        slope = {name: value / row["token_ratio"] for name, value in times.items()}
        lines.append(
            f"| {row['history']} | {row['candidates']} | {row['tokens']:,} "
            f"| {row['computed_tokens']:,} | {times['median']:.2f} | {shown(slope)} "
            f"| {shown(row['one_row'])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

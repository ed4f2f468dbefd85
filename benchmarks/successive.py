"""Successive lists of one user in a pass, beside one list per tree.

    python -m benchmarks.successive                              # smollm2-135m, bfloat16
    OMP_NUM_THREADS=1 python -m benchmarks.successive --processor    # where other work runs

Each list stands behind one history item more than the list before it, and has candidates of its
own. `one list per tree` gives every list a row for itself; `rows` packs lists into rows of which
each computes all that it holds; `once` is what trainings and a `Ranker` do: what several rows hold
is computed in one of them. All run in turns; ratios are slates per second over the first case's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, describe, interleaved, machine, ratio, shown, write
from benchmarks.peers import ours
from benchmarks.peers.compare import goal_lines, goals
from benchmarks.peers.setting import Setting, setting, synthetic
from peftrank.base import load_base
from peftrank.prompts import computed_tokens
from peftrank.types import Slate

ALONE, ROWS, ONCE = "one list per tree", "rows", "once"
CASES: dict[str, dict[str, bool]] = {
    ALONE: {"packing": False},
    ROWS: {"once": False},
    ONCE: {},
}
WORK = {"scoring": ours.scoring, "training": ours.training}
GOAL = 3.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.successive")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="auto", help="to compute in")
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--lists", type=int, default=10, help="of each user")
    parser.add_argument("--history", type=int, nargs="+", default=[10, 50], help="at first")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--micro-tokens", type=int, default=4096, help="per forward pass")
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor", action="store_true", help="processor seconds, on a CPU")
    parser.add_argument("--json", type=Path, default=RESULTS / "successive.json")
    options = parser.parse_args(arguments)
    base = load_base(options.base, quantization=options.quantization, compute_dtype=options.dtype)
    given = setting(
        base, (), micro_tokens=options.micro_tokens, history_length=10**4, max_tokens=10**6
    )
    clock = time.process_time if options.processor else time.perf_counter
    rows = []
    for history in options.history:
        slates = successive(
            options.users, options.lists, history=history, candidates=options.candidates
        )
        rows += measured(replace(given, slates=tuple(slates)), options, clock)
    kept = ("base", "quantization", "users", "lists", "candidates", "micro_tokens", "rounds")
    wanted = {f"{row['work']}, history {row['history']}": GOAL for row in rows}
    found = {
        f"{row['work']}, history {row['history']}": row["ratio"]["median"]
        for row in rows
        if row["case"] == ONCE
    }
    result = {
        "machine": machine(),
        **{name: getattr(options, name) for name in kept},
        "compute_dtype": base.identity.compute_dtype,
        "clock": "processor" if options.processor else "wall",
        "rows": rows,
        "goals": goals(wanted, found, what=""),
    }
    write(options.json, result)
    print(markdown(result))


def successive(users: int, lists: int, *, history: int, candidates: int) -> list[Slate]:
    """Returns lists of users in turn, each list behind one history item more than the last."""
    whole = synthetic(users, history=history + lists - 1, candidates=lists * candidates)
    labels = (1.0, *(0.0,) * (candidates - 1))
    return [
        replace(
            each,
            slate_id=f"{each.slate_id}-{n}",
            history=each.history[: history + n],
            candidates=each.candidates[n * candidates : (n + 1) * candidates],
            labels=labels,
        )
        for each in whole
        for n in range(lists)
    ]


def measured(
    given: Setting, options: argparse.Namespace, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Returns a row for each kind of work and case on the setting's slates."""
    trees = given.trees()
    tokens = {
        name: sum(map(computed_tokens, ours.passes(given, trees, **how)))
        for name, how in CASES.items()
    }
    rows = []
    for work in options.work:
        make: Any = WORK[work]
        for how in CASES.values():
            make(given.only(2), **how).run()
        cases = {name: make(given, **how).run for name, how in CASES.items()}
        seconds = interleaved(cases, rounds=options.rounds, warm_up=0, clock=clock)
        rows += [
            {
                "work": work,
                "history": min(len(slate.history) for slate in given.slates),
                "case": name,
                "tokens_per_slate": tokens[name] / len(trees),
                "token_ratio": tokens[ALONE] / tokens[name],
                "slates_per_second": len(trees) / statistics.median(seconds[name]),
                "ratio": ratio(seconds[ALONE], seconds[name]),
                "seconds": seconds[name],
            }
            for name in CASES
        ]
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    lines = [
        f"{result['base']} ({result['quantization']}, {result['compute_dtype']}), "
        f"{describe(result['machine'])}",
        "",
        f"{result['lists']} successive lists of {result['users']} user(s), {result['candidates']} "
        f"candidates each, {result['rounds']} rounds; {result['clock']} seconds",
        "",
        "| work | history at first | case | tokens per slate | fewer tokens | slates/s "
        "| faster [range] |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['work']} | {row['history']} | {row['case']} | {row['tokens_per_slate']:.0f} "
            f"| {row['token_ratio']:.2f} | {row['slates_per_second']:.3g} | {shown(row['ratio'])} |"
        )
    return "\n".join([*lines, "", *goal_lines(result["goals"])])


if __name__ == "__main__":
    main()

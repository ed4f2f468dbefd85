"""Cases in turns, as ratios to one of them, and each one's peak memory in a process of its own."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    RESULTS,
    describe,
    interleaved,
    machine,
    ratio,
    resident_bytes,
    shown,
    write,
)
from benchmarks.peers import cross_encoder
from benchmarks.peers.setting import Case, Setting, setting, synthetic
from peftrank.base import load_base

Cases = Callable[[Setting], Mapping[str, Case]]


@dataclass(frozen=True)
class Comparison:
    """A benchmark of its own: `python -m benchmarks.<name>`."""

    name: str
    cases: Cases
    own: str
    """The case that others are divided by."""
    goals: Mapping[str, float]
    """How many times as long other cases are wanted to take."""
    slates: int
    rounds: int
    memory_goals: Mapping[str, float] = field(default_factory=dict)
    """How many times as much memory; cases whose memory is measured beside `own`'s."""


def run(comparison: Comparison, arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{comparison.name}")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="auto", help="to compute in")
    parser.add_argument("--slates", type=int, default=comparison.slates, help="of each run")
    parser.add_argument("--history", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--micro-tokens", type=int, default=2048, help="per forward pass")
    parser.add_argument("--rounds", type=int, default=comparison.rounds)
    parser.add_argument("--only", default="", help="cases whose name holds one of a,b,...")
    parser.add_argument("--memory-slates", type=int, default=2, help="0: no memory is measured")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    base = load_base(options.base, quantization=options.quantization, compute_dtype=options.dtype)
    sizes = {"history": options.history, "candidates": options.candidates}
    prompt = {"history_length": options.history, "max_tokens": 10**6}
    if options.peak_of:
        slates = synthetic(options.memory_slates, **sizes)
        given = setting(base, slates, micro_tokens=10**9, **prompt)
        print(peak_above_base(comparison.cases, given, options.peak_of))
        return
    given = setting(
        base, synthetic(options.slates, **sizes), micro_tokens=options.micro_tokens, **prompt
    )
    chosen = options.only.split(",")

    def cases(where: Setting) -> dict[str, Case]:
        made = comparison.cases(where)
        wanted = {n: c for n, c in made.items() if any(part in n for part in chosen)}
        return {comparison.own: made[comparison.own], **wanted}

    rows = compare(cases, given, own=comparison.own, rounds=options.rounds)
    found = {name: rows[name]["time_ratio"]["median"] for name in rows}
    judged = goals(comparison.goals, found)
    measured: dict[str, int] = {}
    if options.memory_slates and comparison.memory_goals:
        names = [comparison.own, *(n for n in comparison.memory_goals if n in rows)]
        kept = ("base", "quantization", "dtype", "history", "candidates", "memory_slates")
        again = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in kept]
        measured = peaks(f"benchmarks.{comparison.name}", again, names)
        shares = {name: measured[name] / measured[comparison.own] for name in names}
        judged += goals(comparison.memory_goals, shares, what="peak memory, ")
    result = {
        "machine": machine(),
        **{key: getattr(options, key) for key in vars(options) if key not in ("json", "peak_of")},
        "compute_dtype": base.identity.compute_dtype,
        "own": comparison.own,
        "rows": rows,
        "peak_bytes": measured,
        "goals": judged,
        "left_out": {} if base.is_decoder else cross_encoder.left_out(),
    }
    name = (
        comparison.name
        if options.base == "smollm2-135m"
        else f"{comparison.name}-{base.identity.name}"
    )
    write(options.json or RESULTS / f"{Path(name).name}.json", result)
    print(markdown(result))


def compare(cases: Cases, setting: Setting, *, own: str, rounds: int) -> dict[str, Any]:
    """Returns per case its seconds, its tokens, and both as ratios to the case `own`.

    All cases run once on a single slate before anything is timed.
    """
    for case in cases(setting.only(1)).values():
        case.run()
    made = cases(setting)
    seconds = interleaved({name: case.run for name, case in made.items()}, rounds=rounds, warm_up=0)
    slates = len(setting.slates)
    return {
        name: {
            "slates_per_second": slates / statistics.median(seconds[name]),
            "tokens_per_slate": case.tokens / slates,
            "note": case.note,
            "time_ratio": ratio(seconds[name], seconds[own]),
            "token_ratio": case.tokens / made[own].tokens,
            "seconds": seconds[name],
        }
        for name, case in made.items()
    }


def peak_above_base(cases: Cases, setting: Setting, name: str) -> int:
    """Returns the bytes that a case took at its peak beyond what the process held before (Linux).

    A run on one slate that is not counted comes first, for what is loaded once. It goes through
    the case in small pieces, so that little of its memory can be used again.
    """
    cases(setting.only(1))[name].run()
    case = cases(setting)[name]
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    case.run()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return peak * 1024 - before


def peaks(module: str, arguments: list[str], names: list[str]) -> dict[str, int]:
    """Returns each case's peak, from `python -m module ... --peak-of NAME`."""
    found = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *arguments, "--peak-of", name],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "MALLOC_TRIM_THRESHOLD_": "65536",
                "MALLOC_MMAP_THRESHOLD_": "65536",
            },
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[name] = int(done.stdout.splitlines()[-1])
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the rows as a table; times and tokens are ratios to our own case."""
    lines = [
        f"{result['base']} ({result['quantization']}, {result['compute_dtype']}), "
        f"{describe(result['machine'])}",
        "",
        f"{result['slates']} slates of {result['history']} history items and "
        f"{result['candidates']} candidates, {result['rounds']} rounds; at most "
        f"{result['micro_tokens']} tokens per pass. Peak memory: {result['memory_slates']} slates "
        "in one pass, above the base.",
        "",
        "| case | time, ratio [range] | tokens, ratio | tokens per slate | slates/s | peak, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    peaks = result["peak_bytes"]
    for name, row in result["rows"].items():
        peak = f"{peaks[name] / 2**20:,.0f}" if name in peaks else ""
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(
            f"| {name}{note} | {shown(row['time_ratio'])} | {row['token_ratio']:.2f} "
            f"| {row['tokens_per_slate']:.0f} | {row['slates_per_second']:.3g} | {peak} |"
        )
    lines += ["", *(f"{name}: left out, {why}." for name, why in result["left_out"].items())]
    return "\n".join([*lines, *goal_lines(result["goals"])])


def goals(
    wanted: Mapping[str, float], found: Mapping[str, float], what: str = "time, "
) -> list[dict[str, Any]]:
    """Returns each goal with what was measured and whether that reaches it."""
    return [
        {
            "goal": f"{what}{name}",
            "at_least": least,
            "measured": found[name],
            "met": found[name] >= least,
        }
        for name, least in wanted.items()
        if name in found
    ]


def goal_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the goals as lines of text."""
    return [
        f"- {goal['goal']}: {goal['measured']:.2f}, goal {goal['at_least']:g}: "
        f"{'met' if goal['met'] else 'not met'}"
        for goal in found
    ]

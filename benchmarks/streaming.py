"""Memory of a training whose slates stay in their Parquet files, and how long it waits for them.

    python -m benchmarks.streaming                       # 57,000 and 570,000 slates, some minutes

Slates are those of a simulated log (`benchmarks.data`), ten lists a user, history 20, 20 candidates
with features. Each case trains in a process of its own: on a base of two small random layers with
MiniLM's tokenizer, where what data costs stands out; the first size on MiniLM itself too.
`waiting` is the share of the steps' time in which the loop has nothing to compute with; `inline`
reads and tokenizes in the loop itself, in place of the thread that works ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.data import write_log
from benchmarks.measure import RESULTS, describe, machine, write

_STEPS = {"small": 60, "minilm-l6": 2}
_PREPARE = """
import json, sys
from pathlib import Path
from peftrank._tables import Settings
from peftrank.formats.csv import csv
from peftrank.prepare import prepare
settings = Settings(
    parquet=True, targets_per_user=10, history_length=20, features=("popularity", "recency")
)
print(json.dumps(prepare(csv(Path(sys.argv[1])), Path(sys.argv[2]), settings)["counts"]["slates"]))
"""
_BASE = """
import sys
from transformers import BertConfig, BertModel
from peftrank.base import load_base
tokenizer = load_base("minilm-l6", quantization="none", device="cpu").tokenizer
shape = BertConfig(
    vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=512,
)
BertModel(shape).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""
_TRAIN = """
import json, re, sys, time
from pathlib import Path
from peftrank.config import load_config
from peftrank.training import loop, train
if sys.argv[3] == "inline":
    loop.ahead = lambda values, count: (value for value in values)
begun = time.time()
train(load_config(domain="news", method="lora", overrides=json.loads(sys.argv[1])),
      output=Path(sys.argv[2]))
ended = time.time()
status = Path("/proc/self/status").read_text()
(log,) = Path(sys.argv[2]).glob("news/.runs/*/metrics.jsonl")
rows = [json.loads(line) for line in log.read_text().splitlines()]
print(json.dumps({
    "seconds": ended - begun,
    "step_seconds": sum(16 / row["slates_per_second"] for row in rows),
    "waited_seconds": sum(row["waited_seconds"] for row in rows),
    "peak_bytes": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status).group(1)),
}))
"""


def measure(interactions: int, small: Path, bases: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what trainings on the slates of a log of this size took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "log").mkdir()
        write_log(folder / "log", interactions)
        counts = _run(_PREPARE, folder / "log", folder / "slates")
        paths = {part: next((folder / "slates").glob(f"{part}*")) for part in ("train", "valid")}
        rows = []
        for base in bases:
            steps = _STEPS[base]
            for how in ("inline", "ahead"):
                overrides = {
                    **{f"data.{part}": str(path) for part, path in paths.items()},
                    "base.name": str(small) if base == "small" else base,
                    "base.quantization": "none",
                    "method.layers": "all",
                    "training.batch_size": 16,
                    "training.max_steps": steps,
                    "training.eval_slates": 8,
                    "training.patience": steps,
                }
                found = _run(_TRAIN, json.dumps(overrides), folder / base / how, how)
                rows.append({"slates": counts["train"], "base": base, "how": how, "steps": steps})
                rows[-1].update(found)
    return rows


def _run(code: str, *arguments: object) -> Any:  # noqa: ANN401 - JSON
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming")
    parser.add_argument("--interactions", type=int, nargs="+", default=[120_000, 1_200_000])
    parser.add_argument("--json", type=Path, default=RESULTS / "streaming.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        _run(_BASE, name)
        sizes = {size: ("small",) for size in options.interactions} | {
            options.interactions[0]: tuple(_STEPS)
        }
        rows = [row for size in sizes for row in measure(size, Path(name), sizes[size])]
    result = {"machine": machine(("torch", "tokenizers", "pyarrow")), "rows": rows}
    write(options.json, result)
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    lines = [
        describe(result["machine"]),
        "",
        "| training slates | base | data | around the steps, s | a step of 16, s | waiting | "
        "peak memory, MiB |",
        "|--:|---|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        stepping = row["step_seconds"] + row["waited_seconds"]
        lines.append(
            f"| {row['slates']:,} | {row['base']} | {row['how']} | "
            f"{row['seconds'] - stepping:.1f} | {stepping / row['steps']:.3f} | "
            f"{row['waited_seconds'] / stepping:.1%} | {row['peak_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

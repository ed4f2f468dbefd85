"""Peak memory of short trainings, each in a process of its own, beside what `doctor` predicts.

    python -m benchmarks.memory            # about twenty minutes on one core

Sixteen steps, because the heap grows with the first lengths of rows that come. The constants of
`peftrank/doctor.py` for CPUs were chosen on the cases marked *; the others check.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, describe, machine, write
from peftrank.config import load_config
from peftrank.doctor import memory_plan

_ALL = {"method.layers": "all"}
_PLAIN = {"base.quantization": "none"}
_SHORT = {"training.max_steps": 16, "training.eval_slates": 8, "training.eval_steps": 16}
CASES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("*", "news", "lora", {}),
    ("*", "news", "lora", _ALL),
    ("*", "news", "lora", {**_ALL, "training.micro_tokens": 1024}),
    ("*", "news", "adapter", _ALL),
    ("*", "news", "lora", {**_ALL, **_PLAIN}),
    ("*", "news", "lora", {**_ALL, **_PLAIN, "base.name": "minilm-l6"}),
    ("*", "news", "lora", {**_ALL, **_PLAIN, "base.compute_dtype": "float32"}),
    ("", "ecommerce", "lora", {**_ALL, "method.dora": True}),
    ("", "news", "adalora", _ALL),
    ("", "video", "adapter", {"training.batch_size": 32}),
    ("", "social", "lora", {"base.quantization": "int8"}),
    ("", "video", "lora", {**_ALL, "training.batch_size": 8}),
    ("", "ecommerce", "adapter", {**_ALL, **_PLAIN, "base.name": "minilm-l6"}),
)
_LOAD = """
import json, sys
from peftrank.base import load_base
load_base(**json.loads(sys.argv[1]))
"""
_TRAIN = """
import json, re, sys, tempfile
from pathlib import Path
from peftrank.config import load_config
from peftrank.training import train
domain, method, overrides = json.loads(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    train(load_config(domain=domain, method=method, overrides=overrides), output=Path(folder))
# Not ru_maxrss: that starts at what the process that started this one had.
status = Path("/proc/self/status").read_text()
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status).group(1)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    rows = []
    for fitted, domain, method, changes in CASES:
        overrides = {**_SHORT, **changes}
        config = load_config(domain=domain, method=method, overrides=overrides)
        plan = memory_plan(config)
        _run(_LOAD, config.base.model_dump())  # the first load converts, which takes more
        measured = int(_run(_TRAIN, [domain, method, overrides]).splitlines()[-1])
        shown = ", ".join(f"{key}={value}" for key, value in changes.items())
        rows.append(
            {
                "case": f"{domain}, {method}{', ' + shown if shown else ''}",
                "fitted": bool(fitted),
                "predicted": plan.total,
                "measured": measured,
                "plan": plan.as_json(),
            }
        )
        print(rows[-1]["case"], f"{plan.total / measured:.2f}", flush=True)
    result = {"machine": machine(), "rows": rows}
    write(options.json, result)
    print(markdown(result))


def _run(program: str, given: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(given)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def markdown(result: dict[str, Any]) -> str:
    """Returns the table."""
    lines = [
        describe(result["machine"]),
        "",
        "| training | predicted, MiB | measured, MiB | ratio |",
        "|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        sizes = [f"{row[name] / 2**20:,.0f}" for name in ("predicted", "measured")]
        mark = " *" if row["fitted"] else ""
        ratio = row["predicted"] / row["measured"]
        lines.append(f"| {row['case']}{mark} | {' | '.join(sizes)} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

r"""What a setting changes in accuracy: the same trainings with it and without, list by list.

    python -m benchmarks.effects --data games=slates/games --base minilm-l6 --quantization none \
        --set prompt.history_length=12 --case "step 8: {prompt.history_step: 8}"
    python -m benchmarks.effects --data news --steps 45 --set readout.name=identifier \
        --set prompt.mode=joint --case "1e-4: {training.learning_rate: 1.0e-4}"

Each case changes keys of one configuration, and the first case, `as given`, changes none. All are
trained from the same seeds and measured on the same lists of the test part; differences are those
of a list's mean over the seeds, with the interval of `peftrank evaluate`. `--data` names a domain
with an embedded sample, or name=FOLDER of prepared slates (docs/real-data.md). What is finished is
kept in `--work`, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.measure import RESULTS, describe, machine, write
from benchmarks.methods import METRIC, pooled
from peftrank.base import Base, load_base
from peftrank.config import Config, load_config, override
from peftrank.evaluation import Evaluation, compare, evaluate
from peftrank.formats.slates import write_slates
from peftrank.ranker import Ranker
from peftrank.training import train
from peftrank.training.data import folder_data, read_part
from peftrank.training.run import prompt_arguments
from peftrank.types import Slate

GIVEN = "as given"
UNTRAINED = "untrained"
COMMON: dict[str, Any] = {
    "data.features": [],
    "training.eval_steps": 10**6,  # the last state is measured, whatever lies before it
    "training.eval_slates": 50,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effects", description=__doc__)
    parser.add_argument("--data", required=True, help="DOMAIN or name=FOLDER")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--set", action="append", default=[], help="key=value, for all cases")
    parser.add_argument("--case", action="append", default=[], help="name: {key: value}")
    parser.add_argument("--untrained", action="store_true", help="the base without an adapter too")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=None, help="the first lists of the part")
    parser.add_argument("--test", type=int, default=300, help="the first lists of the part")
    parser.add_argument("--work", type=Path, default=Path("build/effects"))
    parser.add_argument("--json", type=Path, default=RESULTS / "effects.json")
    options = parser.parse_args(arguments)
    if options.train is not None and "=" not in options.data:
        parser.error("--train needs --data name=FOLDER")
    base = load_base(options.base, quantization=options.quantization)
    config, test = configured(options, base)
    cases: dict[str, dict[str, Any]] = {GIVEN: {}}
    for given in options.case:
        cases |= yaml.safe_load(given)
    rows = []
    found: dict[str, Evaluation] = {}
    for name, changes in cases.items():
        runs = [
            trained(config, changes, seed, options, base, test) for seed in range(options.seeds)
        ]
        found[name] = pooled(name, runs)
        seconds = float(np.mean([run["seconds"] for run in runs]))
        rows.append(row(name, found, runs) | {"changes": changes, "seconds": seconds})
    if options.untrained:
        runs = [untrained(config, base, test)]
        found[UNTRAINED] = pooled(UNTRAINED, runs)
        rows.append(row(UNTRAINED, found, runs) | {"changes": None, "seconds": 0.0})
    result = {
        "machine": machine(),
        **{name: getattr(options, name) for name in ("data", "base", "quantization", "steps")},
        "compute_dtype": base.identity.compute_dtype,
        "set": options.set,
        "lists": {"train": options.train, "test": len(test)},
        "seeds": options.seeds,
        "rows": rows,
    }
    write(options.json, result)
    print(markdown(result))


def configured(options: argparse.Namespace, base: Base) -> tuple[Config, list[Slate]]:
    """Returns the training that cases change, and the lists it is measured on."""
    name, _, folder = options.data.partition("=")
    domain = name
    parts: dict[str, Any] = {}
    if folder:
        domain = "video" if name.startswith(("ml", "micro")) else "ecommerce"
        given = folder_data(Path(folder))
        parts = {f"data.{part}": str(getattr(given, part)) for part in ("train", "valid", "test")}
    texts = (text.partition("=") for text in options.set)
    chosen = {key: yaml.safe_load(value) for key, _, value in texts}
    config = load_config(
        domain=domain,
        overrides={
            "base.name": options.base,
            "base.quantization": options.quantization,
            **parts,
            **COMMON,
            "training.max_steps": options.steps,
            **chosen,
        },
    )
    test = read_part(config.data, domain, "test")[: options.test]
    if options.train is not None:
        kept = options.work / name / f"train-{options.train}.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_slates(kept, read_part(config.data, domain, "train")[: options.train])
        config = override(config, {"data.train": str(kept)}, source="--train")
    return config, test


def trained(
    config: Config,
    changes: Mapping[str, Any],
    seed: int,
    options: argparse.Namespace,
    base: Base,
    test: Sequence[Slate],
) -> dict[str, Any]:
    """Returns a training's test values, one a list, and its seconds; kept ones if there are any."""
    case = override(config, {**changes, "seed": seed}, source="--case")
    name = re.sub(r"\W+", "-", f"{options.data} {json.dumps(changes)}").strip("-")
    kept = options.work / name / f"seed-{seed}.json"
    if not kept.is_file():
        started = time.perf_counter()
        adapter = train(case, output=kept.with_suffix(""), base=base)
        seconds = time.perf_counter() - started
        with Ranker(base) as ranker:
            domain = ranker.load_adapter(adapter)
            values = evaluate(ranker, test, domain=domain, metrics=(METRIC,)).values[METRIC]
        write(kept, {"values": values.tolist(), "seconds": seconds})
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def untrained(config: Config, base: Base, test: Sequence[Slate]) -> dict[str, Any]:
    """Returns the values of the base with a readout that needs no training."""
    with Ranker(base) as ranker:
        domain = ranker.load_readout(
            config.domain, readout=config.readout.name, prompt=prompt_arguments(config)
        )
        values = evaluate(ranker, test, domain=domain, metrics=(METRIC,)).values[METRIC]
    return {"values": values.tolist()}


def row(
    name: str, found: Mapping[str, Evaluation], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns a case's figures, and its paired difference from the first case."""
    own = found[name]
    return {
        "case": name,
        METRIC: own.mean(METRIC),
        "interval": own.interval(METRIC),
        "by_seed": [float(np.nanmean(run["values"])) for run in runs],
        "difference": None if name == GIVEN else compare(own, found[GIVEN], METRIC),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table."""
    lines = [
        f"{result['base']} ({result['quantization']}, {result['compute_dtype']}), "
        f"{describe(result['machine'])}",
        "",
        f"{result['data'].partition('=')[0]}: {result['steps']} steps, {result['seeds']} seeds, "
        f"{result['lists']['test']} test lists; {', '.join(result['set'])}",
        "",
        "| case | nDCG@10 | seeds | difference, paired | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        low, high = row["interval"]
        gain = row["difference"]
        difference = "" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
        lines.append(
            f"| {row['case']} | {row[METRIC]:.3f} [{low:.3f}, {high:.3f}] "
            f"| {min(row['by_seed']):.3f} to {max(row['by_seed']):.3f} | {difference} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

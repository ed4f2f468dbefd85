"""Trains every method on the embedded sample of every domain and prints the table of the README.

    python -m benchmarks.samples                       # all pairs, about 5 minutes each on 2 cores
    python -m benchmarks.samples --domains news --methods lora,adalora
    python -m benchmarks.samples --table               # only print what is measured already

Each pair is measured on the sample's whole test part and on its lists of cold items (no relevant
candidate occurs in training), beside the untrained base, popularity and the other baselines.
Results are added to the JSON file one pair at a time, so a stopped run goes on where it was.
`--ship adapters` puts the adapter of each domain's own method there: those are the shipped ones.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import describe, machine, write
from peftrank import evaluation
from peftrank.base import Base, load_base
from peftrank.config import Config, load_config
from peftrank.evaluation.report import as_json
from peftrank.ranker import Ranker
from peftrank.training import train
from peftrank.training.data import read_part
from peftrank.training.run import prompt_arguments

DOMAINS = ("news", "ecommerce", "video", "social")
METHODS = ("lora", "adalora", "adapter")
BASELINES = ("random", "popularity", "overlap", "popularity_overlap", "bm25", "zero_shot")
METRIC = "ndcg@10"
RESULTS = Path(__file__).parent / "results" / "samples.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", default=",".join(DOMAINS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--store", type=Path, default=Path("build/samples"), help="for adapters")
    parser.add_argument("--ship", type=Path, help="store for the domains' own methods")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    results = _read(arguments.json)
    if not arguments.table:
        base: Base | None = None
        for domain in arguments.domains.split(","):
            for method in arguments.methods.split(","):
                if method in results["domains"].get(domain, {}).get("methods", {}):
                    continue
                config = load_config(domain=domain, method=method)
                base = base or load_base(config.base.name, quantization=config.base.quantization)
                measured = results["domains"].setdefault(domain, {"methods": {}})
                if "baselines" not in measured:
                    measured["baselines"] = _baselines(config, base)
                own = load_config(domain=domain).method.name == method
                store = arguments.ship if own and arguments.ship else arguments.store
                measured["methods"][method] = _pair(config, base, store)
                write(arguments.json, results)
    print(table(results))


def _baselines(config: Config, base: Base) -> list[dict[str, Any]]:
    test, training = (read_part(config.data, config.domain, part) for part in ("test", "train"))
    rows = evaluation.baseline_rows(
        BASELINES,
        test,
        train=training,
        base=base,
        prompt=prompt_arguments(config),
        metrics=[METRIC],
        seed=config.seed,
    )
    return _groups(rows, evaluation.cold_slates(test, training))


def _pair(config: Config, base: Base, store: Path) -> dict[str, Any]:
    test, training = (read_part(config.data, config.domain, part) for part in ("test", "train"))
    print(f"{config.domain} / {config.method.name}", flush=True)
    started = time.perf_counter()
    path = train(config, output=store, base=base, progress=True)
    seconds = time.perf_counter() - started
    manifest = json.loads((path / "peftrank.json").read_text(encoding="utf-8"))
    with Ranker(base) as ranker:
        name = ranker.load_adapter(path)
        started = time.perf_counter()
        row = evaluation.evaluate(ranker, test, domain=name, metrics=[METRIC], name="adapter")
        ranking = time.perf_counter() - started
    weights = [path / name for name in ("adapter_model.safetensors", "readout.safetensors")]
    return {
        "groups": _groups([row], evaluation.cold_slates(test, training)),
        "steps": manifest["metrics"]["steps"],
        "training_seconds": round(seconds, 1),
        "test_slates_per_second": round(len(test) / ranking, 2),
        "bytes": sum(file.stat().st_size for file in weights),
        "config": config.model_dump(mode="json", exclude={"data", "evaluation"}),
    }


def _groups(rows: list[evaluation.Evaluation], cold: list[int]) -> list[dict[str, Any]]:
    return [as_json("all", rows), as_json("cold", [row.only(cold) for row in rows])]


def table(results: dict[str, Any]) -> str:
    """Returns the results as a Markdown table: a row per domain and kind of list."""
    names = [*_floors(results), *METHODS]
    lines = [
        f"nDCG@10, ± half the width of the 95% interval; {results['machine']}.",
        "",
        f"| domain | test lists | {' | '.join(names)} |",
        f"|---|---|{'--:|' * len(names)}",
    ]
    for domain, measured in results["domains"].items():
        for index, group in enumerate(measured["baselines"]):
            rows = {row["name"]: row for row in group["rows"]}
            for method, pair in measured["methods"].items():
                rows[method] = pair["groups"][index]["rows"][0]
            cells = [_cell(rows[name]) if name in rows else "" for name in names]
            kind = f"{group['name']} ({group['counted']})"
            lines.append(f"| {domain} | {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _verdict(results)])


def _floors(results: dict[str, Any]) -> list[str]:
    measured = next(iter(results["domains"].values()))
    return [row["name"] for row in measured["baselines"][0]["rows"]]


def _verdict(results: dict[str, Any]) -> str:
    """Says which pairs' intervals do not lie above those of the untrained base and popularity."""
    pairs, overlapping = 0, []
    for domain, measured in results["domains"].items():
        for method, pair in measured["methods"].items():
            pairs += 1
            for group, floors in zip(pair["groups"], measured["baselines"], strict=True):
                low = group["rows"][0]["metrics"][METRIC]["low"]
                overlapping += [
                    f"{domain}/{method} and {floor['name']} on {group['name']} lists"
                    for floor in floors["rows"]
                    if floor["name"].startswith(("zero_shot", "popularity"))
                    if floor["metrics"][METRIC]["high"] >= low
                ]
    if not overlapping:
        return f"The intervals of all {pairs} pairs lie above those of zero_shot and popularity."
    return f"{pairs} pairs; intervals overlap for: {'; '.join(overlapping)}."


def _cell(row: dict[str, Any]) -> str:
    value = row["metrics"][METRIC]
    return f"{value['mean']:.3f} ± {(value['high'] - value['low']) / 2:.3f}"


def _read(path: Path) -> dict[str, Any]:
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {"machine": describe(machine()), "domains": {}}


if __name__ == "__main__":
    main()

"""E-commerce Games: adapters that read text, and text + features, beside floors on the same lists.

`python -m benchmarks.games --data FOLDER --minutes 60` trains each configuration for about that
long on the folder's training part and measures it on the whole test part, beside rankings without
a language model. LambdaMART reads the same features. docs/real-data.md tells how to make FOLDER.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, write
from peftrank import plugins
from peftrank.base import Base, load_base
from peftrank.config import Config, DataConfig, load_config
from peftrank.errors import PeftRankError
from peftrank.evaluation import Evaluation, evaluate, evaluate_scores
from peftrank.evaluation.report import as_json
from peftrank.formats.slates import read_slates, write_slates
from peftrank.ranker import Ranker
from peftrank.training import train
from peftrank.training.data import folder_data, read_part
from peftrank.types import Slate

CONFIGS = Path(__file__).parent / "configs"
FLOORS = ("random", "popularity", "overlap", "popularity_overlap", "bm25", "lambdamart")
METRICS = ("ndcg@10", "mrr", "hit@1")
_TRIAL_STEPS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.games", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Folder of prepared slates.")
    parser.add_argument("--minutes", type=float, default=60, help="Training time of each.")
    parser.add_argument("--configs", default="text,features", help="benchmarks/configs/games-*")
    parser.add_argument("--json", type=Path, help="Write everything that was measured.")
    parser.add_argument("--store", type=Path, default=Path("build/games"), help="For the adapters.")
    parser.add_argument("--limit", type=int, help="Only the first slates of each part: a trial.")
    options = parser.parse_args(arguments)
    try:
        result = measure(
            options.data,
            options.configs.split(","),
            minutes=options.minutes,
            store=options.store,
            limit=options.limit,
        )
    except PeftRankError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(markdown(result))
    if options.json is not None:
        write(options.json, result)


def measure(
    data: Path, names: Sequence[str], *, minutes: float, store: Path, limit: int | None = None
) -> dict[str, Any]:
    """Returns the accuracy of the floors and of each configuration, and what training took."""
    parts = folder_data(data)
    test = read_part(parts, "games", "test")[:limit]
    rows = floors(read_part(parts, "games", "train")[:limit], test)
    training = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            chosen = parts if limit is None else shortened(parts, Path(folder), limit)
            row, training[name] = trained(name, chosen, test, minutes=minutes, store=store)
        rows.append(row)
    return {
        "data": _fingerprint(data),
        "machine": machine(),
        "accuracy": as_json("games test", rows),
        "training": training,
    }


def floors(train_slates: Sequence[Slate], test: Sequence[Slate]) -> list[Evaluation]:
    """Returns the evaluations of the rankings without a language model."""
    rows = []
    for name in FLOORS:
        scores = plugins.load("baselines", name)(test, train=train_slates, seed=0)
        rows.append(evaluate_scores(name, test, scores, METRICS))
    return rows


def shortened(data: DataConfig, folder: Path, limit: int) -> DataConfig:
    """Returns where copies of the training and validation parts lie, with their first slates."""
    paths = {}
    for part in ("train", "valid"):
        paths[part] = folder / f"{part}.jsonl"
        write_slates(paths[part], list(read_slates(getattr(data, part)))[:limit])
    return DataConfig(**paths)


def trained(
    name: str, data: DataConfig, test: Sequence[Slate], *, minutes: float, store: Path
) -> tuple[Evaluation, dict[str, Any]]:
    """Trains a configuration; returns its evaluation and what training took."""
    paths = {f"data.{part}": str(getattr(data, part)) for part in ("train", "valid")}
    config = load_config(CONFIGS / f"games-{name}.yaml", overrides=paths)
    base = load_base(**config.base.model_dump())
    config = _with(config, max_steps=steps_within(minutes, config, base))
    started = time.perf_counter()
    adapter = train(config, output=store, base=base, progress=True)
    seconds = time.perf_counter() - started
    with Ranker(base) as ranker:
        domain = ranker.load_adapter(adapter)
        row = evaluate(ranker, test, domain=domain, metrics=METRICS, name=name)
    manifest = json.loads((adapter / "peftrank.json").read_text(encoding="utf-8"))
    log = _log(store, config.domain)
    return row, {
        "base": f"{config.base.name} ({config.base.quantization})",
        "method": config.method.name,
        "features": manifest["readout"]["feature_names"],
        "minutes": seconds / 60,
        "steps": len(log),
        "slates_seen": round(log[-1]["epoch"] * manifest["data"]["counts"]["train"]),
        "slates_per_second": _median(log, "slates_per_second"),
        "tokens_per_second": _median(log, "tokens_per_second"),
        "metrics": manifest["metrics"],
        "versions": {"peftrank": manifest["peftrank_version"], **manifest["versions"]},
    }


def steps_within(minutes: float, config: Config, base: Base) -> int:
    """Returns the optimizer steps that fit, with their evaluations, judged by a short trial."""
    training = config.training
    with tempfile.TemporaryDirectory() as folder:
        trial = _with(config, max_steps=_TRIAL_STEPS, eval_steps=_TRIAL_STEPS, eval_slates=1)
        train(trial, output=Path(folder), base=base)
        rate = _median(_log(Path(folder), config.domain), "slates_per_second")
    # A slate that is only scored costs about half of one that is learned from.
    cost = training.batch_size + training.eval_slates / training.eval_steps / 2
    return max(1, int(minutes * 60 * rate / cost))


def _with(config: Config, **training: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _log(store: Path, domain: str) -> list[dict[str, float]]:
    """Returns the rows of the newest run, one a step."""
    newest = max((store / domain / ".runs").glob("*/metrics.jsonl"))
    return [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]


def _median(log: list[dict[str, float]], name: str) -> float:
    """Returns a value's median over the steps; time for evaluations is in none of them."""
    return float(statistics.median(row[name] for row in log))


def _fingerprint(folder: Path) -> dict[str, Any]:
    """Returns what `data prepare` recorded: which slates these are, and how many."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {"fingerprint": meta["fingerprint"], "slates": meta["counts"]["slates"]}


def markdown(result: dict[str, Any]) -> str:
    """Returns the table: a row for each ranking, 95% intervals in brackets."""
    lines = [
        f"{result['accuracy']['counted']} test slates, data {result['data']['fingerprint'][:16]}",
        "",
        "| ranking | features | nDCG@10 | hit@1 | minutes | slates seen | tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["accuracy"]["rows"]:
        cells = [row["name"], "", *(_cell(row["metrics"][m]) for m in ("ndcg@10", "hit@1"))]
        run = result["training"].get(row["name"])
        if run is None:
            cells += ["", "", ""]
        else:
            cells[1] = str(len(run["features"]))
            cells += [f"{run['minutes']:.0f}", f"{run['slates_seen']:,}"]
            cells.append(f"{run['tokens_per_second']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


if __name__ == "__main__":
    main()

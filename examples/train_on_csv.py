"""Your own data: two CSV files, clicks and titles, become slates, an adapter and a comparison.

The columns are user,item,time (Unix seconds) and item,title. They are first written as the two
files of RecBole, which `data prepare` reads.

    python examples/train_on_csv.py [CLICKS.csv ITEMS.csv]
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
WORK = Path(".demo/csv")
QUICK = (  # a small base and a few steps; leave these out for the shipped settings
    *("--base", os.environ.get("BASE", "minilm-l6"), "--set", "base.quantization=none"),
    *("--set", "method.layers=all", "--set", "training.max_steps=10"),
)


def rewrite(source: Path, target: Path, columns: dict[str, str]) -> None:
    """Writes the columns of a CSV under other names, separated by tabs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(newline="", encoding="utf-8-sig") as rows, target.open("w") as out:
        print(*columns.values(), sep="\t", file=out)
        for row in csv.DictReader(rows):
            print(*(" ".join(row[name].split()) for name in columns), sep="\t", file=out)


def peftrank(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "peftrank", *map(str, arguments)], check=True)


def main() -> None:
    clicks, items = map(Path, sys.argv[1:3] or (DATA / "clicks.csv", DATA / "items.csv"))
    names = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    rewrite(clicks, WORK / "raw/clicks.inter", names)
    rewrite(items, WORK / "raw/items.item", {"item": "item_id:token", "title": "title:token_seq"})

    # Each user's last click is for the test, the one before it for validation.
    prepare = ("data", "prepare", "--format", "recbole", "--path", WORK / "raw")
    features = ("--features", "popularity,text_overlap", "--targets-per-user", 3)
    peftrank(*prepare, "--output", WORK / "slates", "--n-negatives", 9, *features)
    peftrank("data", "inspect", WORK / "slates")

    where = ("--domain", "ecommerce", "--data", WORK / "slates")
    peftrank("train", *where, "--output", WORK / "adapters", *QUICK)
    peftrank("evaluate", *where, "--store", WORK / "adapters", "--baselines", "random,popularity")


if __name__ == "__main__":
    main()

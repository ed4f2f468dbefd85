"""A new domain: slates made of Python values, and one YAML file, recipes.yaml.

The data is made up: each cook keeps to one cuisine. Afterwards the commands work too, as
`peftrank evaluate --config examples/recipes.yaml --store .demo/recipes/adapters`.

    python examples/add_domain.py
"""

import os
import random
from pathlib import Path

import peftrank as pr

WORK = Path(".demo/recipes")
DISHES = {
    "Italian": "risotto lasagne gnocchi minestrone focaccia carbonara polenta caponata",
    "Japanese": "ramen sushi udon tempura okonomiyaki gyudon onigiri katsu",
    "Mexican": "tacos enchiladas pozole guacamole tamales mole quesadillas chilaquiles",
    "Indian": "dal biryani dosa korma vindaloo samosas raita saag",
}


def slate(name: str, rng: random.Random) -> pr.Slate:
    """One list: five dishes cooked, six offered, of which one is cooked next."""
    items = {
        cuisine: [pr.Item(dish, {"title": dish, "cuisine": cuisine}) for dish in dishes.split()]
        for cuisine, dishes in DISHES.items()
    }
    *history, cooked = rng.sample(items.pop(rng.choice(sorted(items))), 6)
    offered = [cooked, *rng.sample([item for dishes in items.values() for item in dishes], 5)]
    rng.shuffle(offered)
    labels = tuple(float(item is cooked) for item in offered)
    return pr.Slate(name, f"cook-{name}", tuple(history), tuple(offered), labels)


def main() -> None:
    rng = random.Random(0)
    for part, count in {"train": 160, "valid": 40, "test": 60}.items():
        made = [slate(f"{part}-{i}", rng) for i in range(count)]
        pr.write_slates(WORK / f"{part}.jsonl", made)

    name = os.environ.get("BASE", "minilm-l6")
    config = pr.load_config(Path(__file__).parent / "recipes.yaml", overrides={"base.name": name})
    path = pr.train(config, output=WORK / "adapters")

    ranker = pr.Ranker.from_base(name, quantization="none")
    ranker.load_adapter(path)
    test = list(pr.read_slates(WORK / "test.jsonl"))
    result = pr.evaluate(ranker, test, domain="recipes", metrics=["hit@1"])
    low, high = result.interval("hit@1")
    print(f"{path}: hit@1 {result.mean('hit@1'):.2f} [{low:.2f}, {high:.2f}], chance 0.17")


if __name__ == "__main__":
    main()

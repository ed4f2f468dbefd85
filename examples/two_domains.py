"""Two domains on one base: one call ranks slates of both, by the adapter of each.

The base is loaded once and is never changed; a domain adds its adapter and its readout. The two
adapters here are of different methods.

    python examples/two_domains.py
"""

import os
from pathlib import Path

from peftrank import Item, Ranker, Slate, load_base, load_config, train

WORK = Path(".demo/two-domains")
QUICK = {"method.layers": "all", "training.max_steps": 5, "training.eval_slates": 50}
METHODS = {"news": "lora", "ecommerce": "adapter"}


def slate(domain: str, read: str, *titles: str) -> Slate:
    candidates = tuple(Item(title, {"title": title}) for title in titles)
    return Slate(domain, "me", (Item(read, {"title": read}),), candidates, domain=domain)


def main() -> None:
    name = os.environ.get("BASE", "minilm-l6")
    base = load_base(name, quantization="none")
    for domain, method in METHODS.items():
        names = {"base.name": name, "base.quantization": "none"}
        config = load_config(domain=domain, method=method, overrides={**QUICK, **names})
        train(config, output=WORK / "adapters", base=base)

    ranker = Ranker(base, store=WORK / "adapters")
    for domain in METHODS:
        ranker.load_adapter(domain)
    for domain, adapter in ranker.adapters.items():
        print(f"{domain}: {adapter.method}, {adapter.nbytes / 1024:.0f} KiB")
    print(f"the base they share: {ranker.memory()['base_bytes'] / 2**20:.1f} MiB")

    slates = [
        slate("news", "Eagle chicks tagged", "Central bank holds rates", "Zoo welcomes a tapir"),
        slate("ecommerce", "French press, double wall", "Coffee grinder, hand", "Bicycle lamp"),
    ]
    for ranked in ranker.rank(slates):  # each slate names its domain
        print(f"{ranked.slate_id}:")
        for title, score in zip(ranked.item_ids, ranked.scores, strict=True):
            print(f"  {score:+.2f}  {title}")


if __name__ == "__main__":
    main()

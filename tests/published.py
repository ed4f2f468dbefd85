"""An adapter folder as `peftrank train` writes it, from a method's export and a readout."""

import torch

from peftrank import __version__, store
from peftrank.card import adapter_card


def save_published(
    folder, domain, base, template, readout, method, exported, /, *, features=(), **manifest
):
    """Adds a version of a domain to the store `folder` and returns its path.

    Args:
        folder: The store.
        domain: The domain's name.
        base: The Base it belongs to.
        template: Its PromptTemplate.
        readout: A ScoreHead.
        method: (name, options).
        exported: What the method's `export` returned.
        features: Names, in the readout's order.
        manifest: Other values than these.
    """
    config, tensors = exported
    values = {
        "peftrank_version": __version__,
        "method": {"name": method[0], "options": method[1]},
        "prompt": template.describe(),
        "readout": {
            "name": "score_head",
            "options": {},
            "feature_names": list(features),
        },
        "base": dict(vars(base.identity)),
        "config": {},
        "metrics": {"ndcg@10": 0.51},
        "data": {"counts": {"train": 2}},
        "versions": {"torch": torch.__version__},
        **manifest,
    }
    files = store.AdapterFiles(config.to_dict(), tensors, dict(readout.state_dict()), values)
    card = adapter_card({**values, "domain": domain})
    return store.save_adapter(folder, domain, files, card=card)

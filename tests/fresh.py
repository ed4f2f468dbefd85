"""Scores of adapters in a process of its own. Imported by that process too."""


def scores(base: str, adapter: str, slates: str) -> list:
    """Returns an adapter's scores, with nothing else ever loaded."""
    options = {"name": base, "quantization": "none", "compute_dtype": "float32", "device": "cpu"}
    return all_scores([(options, adapter)], slates)[0]


def all_scores(jobs: list, slates: str) -> list:
    """Returns the scores of each adapter on each base, given as arguments of `load_base`."""
    import torch

    from peftrank.base import load_base
    from peftrank.formats.slates import read_slates
    from peftrank.ranker import Ranker

    torch.set_num_threads(1)
    found = []
    for base, adapter in jobs:
        with Ranker(load_base(**base)) as ranker:
            name = ranker.load_adapter(adapter)
            found.append(ranker.score(list(read_slates(slates)), domain=name))
    return found

"""Scores of one adapter in a process of its own. Imported by that process too."""


def scores(base: str, adapter: str, slates: str) -> list:
    """Returns an adapter's scores, with nothing else ever loaded."""
    import torch

    from peftrank.base import load_base
    from peftrank.formats.slates import read_slates
    from peftrank.ranker import Ranker

    torch.set_num_threads(1)
    loaded = load_base(base, quantization="none", compute_dtype="float32", device="cpu")
    with Ranker(loaded) as ranker:
        return ranker.score(read_slates(slates), domain=ranker.load_adapter(adapter))

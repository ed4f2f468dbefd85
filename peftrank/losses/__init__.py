"""Training objectives, one file each.

Every loss is a pure function `(scores, labels, mask, weights=None, *, options) -> (S,)`: one
number per slate, so that a batch can be split over passes and processes without changing the
result. `scores`, `labels`, `mask` and `weights` are (S, N). Whatever stands at padded candidates
(mask False), NaN included, changes neither value nor gradient.

Each loss is a sum of terms that belong to candidates: pointwise to every candidate, pairwise to
the better candidate of a pair, listwise to a relevant candidate. `weights` multiply the terms of
their candidate, and nothing is divided by their sum: a weight of 2 counts a candidate's terms
twice, a weight of 0 leaves them out (the candidate still is a rival of the others). Inverse
propensities of clicks go here, with 1 for candidates without a click. They are `Slate.weights`.

A slate without a relevant candidate, or with one candidate, has loss 0 and gradient 0. Only the
pointwise losses, bce and mse, learn from it. A loss that compares with frozen scores takes them
as the keyword `reference` (S, N), which is no option: training computes it, with the base without
the adapter and the readout of the start.
"""

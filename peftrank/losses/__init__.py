"""Training objectives, one file each.

Every loss is a pure function `(scores, labels, mask, weights=None, *, options) -> (S,)`: one
number per slate, so that a batch can be split over passes and processes without changing the
result. `scores`, `labels`, `mask` and `weights` are (S, N); padded candidates (mask False) change
neither value nor gradient. A slate that says nothing about the order has loss 0. `weights`
multiply the contribution of each relevant candidate: inverse propensities, for example.
"""

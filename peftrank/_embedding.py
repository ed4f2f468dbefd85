"""A collaborative embedding of items: truncated SVD of the normalised user-item matrix.

A = D_u^-1/2 X D_i^-1/2 ~ U S V'; an item is its row of V sqrt(S) (PureSVD, Cremonesi et al.,
RecSys 2010, on the degree-normalised graph). A second vector for each item comes from its words
alone (the mean vector of the items that share them), which also serves items nobody has met.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from peftrank._lists import Codes, Ints

_DENSE = 200
"""Matrices up to this size are decomposed exactly."""
_PRIOR = 2.0
"""Items a word must occur in before its vector is trusted by half."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embedding:
    """Vectors of all items. Items never met have a zero vector in `item`."""

    item: Vectors
    """(I, D)"""
    text: Vectors | None
    """(I, D); None without texts."""


def fit(
    user: Ints | Codes, item: Ints | Codes, items: int, words: sp.csr_matrix | None, dimensions: int
) -> Embedding | None:
    """Returns the embedding of the given events, or None if they are too few to decompose.

    Args:
        user: (E,) user of each event; no (user, item) twice.
        item: (E,)
        items: I, how many items there are.
        words: (I, words) normalised weights of each item's words.
        dimensions: D at most; fewer if the matrix is small.
    """
    known_users, row = np.unique(user, return_inverse=True)
    known_items, column = np.unique(item, return_inverse=True)
    shape = (len(known_users), len(known_items))
    size = min(dimensions, min(shape) - 1)
    if size < 1:
        return None
    row_weight = np.bincount(row)[row] ** -0.5
    column_weight = np.bincount(column)[column] ** -0.5
    matrix = sp.csr_matrix((row_weight * column_weight, (row, column)), shape)
    values, vectors = _decompose(matrix, size)
    table = np.zeros((items, size), np.float32)
    table[known_items] = vectors * np.sqrt(np.maximum(values, 0))
    if words is None:
        return Embedding(table, None)
    met = np.zeros(items, np.float32)
    met[known_items] = 1
    support = np.asarray(words.T @ met).ravel()
    by_word = np.asarray(words.T @ table) / (support + _PRIOR)[:, None]
    return Embedding(table, np.asarray(words @ by_word, np.float32))


def _decompose(matrix: sp.csr_matrix, size: int) -> tuple[NDArray[np.float64], Vectors]:
    """Returns singular values (D,) and right vectors (columns of the matrix, D)."""
    if min(matrix.shape) <= _DENSE:
        _, values, vectors = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return values[:size], vectors[:size].T.astype(np.float32)
    # A fixed start vector: the same events give the same numbers.
    start = np.random.default_rng(0).random(min(matrix.shape)) + 0.5
    _, values, vectors = svds(matrix, k=size, v0=start, return_singular_vectors="vh")
    return values, vectors.T.astype(np.float32)

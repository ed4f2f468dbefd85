"""Words of items as sparse matrices: overlap and cosine without any model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse as sp

_WORD = re.compile(r"\w+")


def word_matrix(texts: Sequence[str]) -> sp.csr_matrix:
    """Returns (I, words) with sqrt(idf) where the item has the word.

    The product of two rows is their overlap, each shared word counted by its idf.
    """
    return _weighted([set(_WORD.findall(text.casefold())) for text in texts])


def label_matrix(labels: Sequence[Iterable[str]]) -> sp.csr_matrix:
    """Returns (I, labels) of zeros and ones; the product of two rows counts shared labels."""
    return _binary([set(row) for row in labels])


def normalised(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Returns the matrix with rows of length one; empty rows stay empty."""
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sp.csr_matrix(sp.diags(1 / np.where(length > 0, length, 1)) @ matrix)


def row_products(matrix: sp.csr_matrix, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the dot product of rows first[i] and second[i]."""
    return np.asarray(matrix[first].multiply(matrix[second]).sum(axis=1)).ravel()


def _weighted(rows: Sequence[set[str]]) -> sp.csr_matrix:
    matrix = _binary(rows)
    occurs = np.maximum(np.asarray(matrix.sum(axis=0)).ravel(), 1)
    idf = np.log1p(len(rows) / occurs)
    return sp.csr_matrix(matrix @ sp.diags(np.sqrt(idf)), dtype=np.float32)


def _binary(rows: Sequence[set[str]]) -> sp.csr_matrix:
    codes: dict[str, int] = {}
    start: list[int] = [0]
    columns: list[int] = []
    for row in rows:
        columns.extend(codes.setdefault(word, len(codes)) for word in sorted(row))
        start.append(len(columns))
    ones = np.ones(len(columns), np.float32)
    return sp.csr_matrix((ones, columns, start), shape=(len(rows), max(len(codes), 1)))

"""Rankings without a language model, to print beside every result. One file each.

A baseline is a function `(slates, *, train, seed) -> scores`, one tuple per slate in candidate
order. It learns from the training slates alone.
"""

"""Readers of raw logs, one file per format: a path in, a `Log` out.

`slates` reads and writes the package's own files. A file whose name starts with `_` is shared by
the others and is no format. Nothing here imports torch.
"""

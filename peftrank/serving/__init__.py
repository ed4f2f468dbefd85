"""Ranking for others: an HTTP server with its page, and bulk scoring.

Names are resolved when first used: histories and bulk scoring need no web server installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftrank.serving.app import create_app
    from peftrank.serving.server import serve
    from peftrank.serving.settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "serve"]

_HOME = {"ServeSettings": "settings", "create_app": "app", "serve": "server"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module 'peftrank.serving' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peftrank.serving.{_HOME[name]}"), name)

"""Ranking for others: an HTTP server with its page, and bulk scoring."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftrank.errors import ConfigError

if TYPE_CHECKING:
    from peftrank.serving.app import create_app
    from peftrank.serving.server import serve
    from peftrank.serving.settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "serve"]

_HOME = {"ServeSettings": "settings", "create_app": "app", "serve": "server"}
_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module 'peftrank.serving' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"peftrank.serving.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ConfigError(f"serving needs {error.name}: pip install 'peftrank[serve]'") from error

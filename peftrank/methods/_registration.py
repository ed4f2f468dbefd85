"""Lets plain PEFT load bottleneck adapters after `import peftrank`, whichever is imported first.

PEFT is heavy, so it is not imported here: if it is loaded already, BOTTLENECK is registered at
once; if not, at the end of its own import. Standard library only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """Registers BOTTLENECK with PEFT now, or as soon as PEFT is imported."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds `peft` as the other finders do, and has BOTTLENECK registered after its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Many libraries only ask whether peft is there, so the spec may never be executed.
        if name != "peft":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Runs another loader, then registers."""

    def __init__(self, inner: Loader):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Callers of importlib.util.find_spec("peft") ask the loader for files and sources.
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:  # what reads the package's files later asks the loader itself
            spec.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        _register()


def _register() -> None:
    # The import registers; a second call changes nothing.
    importlib.import_module("peftrank.methods._bottleneck").register()

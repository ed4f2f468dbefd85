"""PeftRank: parameter-efficient fine-tuning of LLMs for listwise recommendation.

Public names are resolved when first used, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftrank.methods._registration import install as _install_peft_method

if TYPE_CHECKING:
    from peftrank.base import Base, load_base
    from peftrank.config import Config, load_config
    from peftrank.errors import (
        AdapterError,
        BaseModelError,
        ConfigError,
        DataError,
        PeftRankError,
    )
    from peftrank.evaluation import Evaluation
    from peftrank.evaluation import evaluate as evaluate  # type: ignore[no-redef]
    from peftrank.formats.slates import read_slates, write_slates
    from peftrank.ranker import Ranker
    from peftrank.training import train
    from peftrank.types import Item, RankedList, Slate

__version__ = "0.1.0"

_HOME = {
    "AdapterError": "errors",
    "Base": "base",
    "BaseModelError": "errors",
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "Evaluation": "evaluation",
    "Item": "types",
    "PeftRankError": "errors",
    "RankedList": "types",
    "Ranker": "ranker",
    "Slate": "types",
    "evaluate": "evaluation",
    "load_base": "base",
    "load_config": "config",
    "read_slates": "formats.slates",
    "train": "training",
    "write_slates": "formats.slates",
}

__all__ = [
    "AdapterError",
    "Base",
    "BaseModelError",
    "Config",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Item",
    "PeftRankError",
    "RankedList",
    "Ranker",
    "Slate",
    "evaluate",
    "load_base",
    "load_config",
    "read_slates",
    "train",
    "write_slates",
]

# Plain `PeftModel.from_pretrained` then loads bottleneck adapters too. Costs nothing until PEFT is.
_install_peft_method()


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module 'peftrank' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peftrank.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

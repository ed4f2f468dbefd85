"""Finds losses, readouts, methods, formats, metrics and baselines by name.

The name in a config is the file name: `listnet` is `peftrank/losses/listnet.py`. A name of the
form `package.module:object` reaches code outside this package. There is no registry to update.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peftrank.errors import ConfigError

KINDS = ("baselines", "formats", "losses", "methods", "metrics", "readouts")
_CLASS_KINDS = ("methods", "readouts")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def available(kind: str) -> tuple[str, ...]:
    """Returns the names of the built-in plug-ins of a kind, sorted."""
    package = importlib.import_module(f"peftrank.{kind}")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(kind: str, name: str) -> Any:  # noqa: ANN401 - a function or class, by kind
    """Returns the public object of a plug-in file.

    Functions (losses, formats, metrics, baselines) have the file's name; classes (methods,
    readouts) have it in CamelCase: `score_head.py` holds `ScoreHead`.

    Raises:
        ConfigError: no such file, or `package.module:object` cannot be imported.
    """
    if ":" in name:
        return _load_outside(kind, name)
    if not _NAME.fullmatch(name) or name not in available(kind):
        raise ConfigError(
            f"unknown name {name!r} in {kind}{did_you_mean(name, available(kind))}. "
            f"Available: {', '.join(available(kind))}; or package.module:object."
        )
    module = importlib.import_module(f"peftrank.{kind}.{name}")
    attribute = name.title().replace("_", "") if kind in _CLASS_KINDS else name
    return getattr(module, attribute)


def check_options(
    kind: str, name: str, options: Mapping[str, Any], given_by: Iterable[str]
) -> None:
    """Raises ConfigError if an option is not a keyword-only parameter of the plug-in.

    Args:
        kind: One of KINDS.
        name: The plug-in's name.
        options: What the user configured beside the name.
        given_by: Parameters the caller supplies itself, which users may not set.
    """
    allowed = option_names(kind, name) - set(given_by)
    for key in options:
        if key not in allowed:
            raise ConfigError(
                f"unknown option {key!r} for {kind} {name!r}{did_you_mean(key, allowed)}. "
                f"It takes: {', '.join(sorted(allowed)) or 'no options'}."
            )


def option_names(kind: str, name: str) -> set[str]:
    """Returns the names of the keyword-only parameters of a plug-in: its options."""
    target: Any = load(kind, name)
    if inspect.isclass(target) and "build" in vars(target):
        target = vars(target)["build"].__func__
    parameters = inspect.signature(target).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _load_outside(kind: str, name: str) -> Any:  # noqa: ANN401
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {name!r} in {kind}: {error}. Expected package.module:object."
        ) from error

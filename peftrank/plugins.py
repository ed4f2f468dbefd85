"""Finds losses, readouts, methods, formats, metrics and baselines by name.

The name in a config is the file name: `listnet` is `peftrank/losses/listnet.py`; hyphens may
stand for its underscores. A name of the form `package.module:object` reaches code outside this
package. There is no registry to update.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peftrank.errors import ConfigError

KINDS = ("baselines", "formats", "losses", "methods", "metrics", "readouts")
_PEFT = "peft:"
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
    readouts) have it in CamelCase: `score_head.py` holds `ScoreHead`. A method `peft:NAME` is
    PEFT's own of that name.

    Raises:
        ConfigError: no such file, or `package.module:object` cannot be imported.
    """
    name = file_name(name)
    if kind == "methods" and name.startswith(_PEFT):
        methods: Any = importlib.import_module("peftrank.methods._peft")
        return methods.peft_method(name.removeprefix(_PEFT))
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


def file_name(name: str) -> str:
    """Returns a name with the underscores of its file: `top-layers` is `top_layers`."""
    return name if ":" in name else name.replace("-", "_")


def check_options(
    kind: str, name: str, options: Mapping[str, Any], given_by: Iterable[str]
) -> None:
    """Raises ConfigError if an option is no keyword-only parameter of the plug-in, or ill typed.

    Args:
        kind: One of KINDS.
        name: The plug-in's name.
        options: What the user configured beside the name.
        given_by: Parameters the caller supplies itself, which users may not set.
    """
    allowed = option_names(kind, name) - set(given_by)
    types = _parameter_types(kind, name)
    for key, value in options.items():
        if key not in allowed:
            raise ConfigError(
                f"unknown option {key!r} for {kind} {name!r}{did_you_mean(key, allowed)}. "
                f"It takes: {', '.join(sorted(allowed)) or 'no options'}."
            )
        if key in types:
            _check_type(f"option {key!r} for {kind} {name!r}", value, types[key])


def option_names(kind: str, name: str) -> set[str]:
    """Returns the names of the keyword-only parameters of a plug-in: its options."""
    try:
        parameters = inspect.signature(_maker(kind, name)).parameters.values()
    except (TypeError, ValueError):  # no function, or one that says nothing about its parameters
        raise ConfigError(f"{name!r} in {kind} is no function or class written in Python") from None
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _maker(kind: str, name: str) -> Any:  # noqa: ANN401
    """Returns the function, or the class or class method, that takes a plug-in's options."""
    target: Any = load(kind, name)
    if inspect.isclass(target):
        return vars(target)["build"].__func__ if "build" in vars(target) else target
    return target


def _parameter_types(kind: str, name: str) -> dict[str, Any]:
    maker = _maker(kind, name)
    try:
        parameters = inspect.signature(maker, eval_str=True).parameters.values()
    except NameError:  # of a plug-in that imports types for type checkers alone
        return {}
    return {p.name: p.annotation for p in parameters if p.annotation is not p.empty}


def _check_type(what: str, value: object, expected: Any) -> None:  # noqa: ANN401
    try:
        # As JSON, where a list is a tuple too, and a text is no number.
        TypeAdapter(expected).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{what} is {value!r}: {reason[0].lower()}{reason[1:]}.") from None


def _load_outside(kind: str, name: str) -> Any:  # noqa: ANN401
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {name!r} in {kind}: {error}. Expected package.module:object."
        ) from error

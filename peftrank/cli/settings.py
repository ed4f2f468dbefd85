"""What the commands' options mean: the configuration and the slates they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftrank.config import Config
    from peftrank.ranker import Ranker
    from peftrank.types import Slate


def settings_of(
    *,
    domain: str | None,
    method: str | None = None,
    config: Path | None = None,
    base: str | None = None,
    data: Path | None = None,
    set_: list[str] | None = None,
    store: Path | None = None,
    check_options: bool = True,
) -> Config:
    """Returns the configuration that the options describe; see `load_config`.

    A domain that has no shipped file is looked up in `store`, if that is given: its active adapter
    knows what it was trained with.

    Raises:
        ConfigError: neither a domain nor a file, or anything wrong with them.
        AdapterError: the store's adapter of the domain is damaged.
    """
    from peftrank.config import domains, load_config, parse_overrides
    from peftrank.errors import ConfigError
    from peftrank.training.data import folder_data

    if domain is None and config is None:
        raise ConfigError(
            f"give --domain ({', '.join(domains())}) or --config FILE with your own domain"
        )
    overrides: dict[str, Any] = {}
    if base is not None:
        overrides["base.name"] = base
    if data is not None:
        files = folder_data(data).model_dump(mode="json", exclude={"features"})
        overrides |= {f"data.{part}": path for part, path in files.items()}
    overrides |= parse_overrides(set_ or [])
    known: Path | dict[str, Any] | None = config
    if config is None and store is not None and domain not in domains():
        known = _recorded(str(domain), store)
    return load_config(
        known, domain=domain, method=method, overrides=overrides, check_options=check_options
    )


def _recorded(domain: str, store: Path) -> dict[str, Any] | None:
    """Returns the keys that the domain's active adapter was trained with, if there is one."""
    from peftrank.store import active, domains, load_adapter

    if domain not in domains(store) or active(store, domain) is None:
        return None
    recorded = dict(load_adapter(store / domain / str(active(store, domain))).manifest["config"])
    # Of the files only the names are kept, not where they were.
    return recorded | {"data": {"features": recorded.get("data", {}).get("features")}}


def slates_of(settings: Config, part: str) -> list[Slate]:
    """Returns a part's slates.

    Raises:
        ConfigError: the part is not configured.
        DataError: a slate is malformed, or there is none.
    """
    from peftrank.errors import DataError
    from peftrank.training.data import part_path, read_part

    slates = read_part(settings.data, settings.domain, part)
    if not slates:
        path = part_path(settings.data, settings.domain, part)
        raise DataError(f"no slate here; expected the {part} slates, one a line", path=path)
    return slates


def slate_at(settings: Config, part: str, index: int) -> Slate:
    """Returns one slate of a part.

    Raises:
        ConfigError: the part has fewer slates.
    """
    from peftrank.errors import ConfigError

    slates = slates_of(settings, part)
    if index >= len(slates):
        raise ConfigError(f"--index {index}: the {part} part has {len(slates)} slates (from 0)")
    return slates[index]


def find_adapter(source: str | None, settings: Config, store: Path) -> Path:
    """Returns the folder of the adapter, checked; absent: the domain's active one.

    Commands call it before they load the base, which takes longer.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    from peftrank.store import resolve, verify

    folder = resolve(source or settings.domain, store)
    verify(folder)
    return folder


def ranker_for(
    settings: Config,
    store: Path,
    *,
    adapter: Path | None = None,
    base: str | None = None,
    set_: list[str] | None = None,
) -> Ranker:
    """Returns a ranker with no domain loaded, on the base asked for, else on the adapter's own.

    Args:
        settings: Their base is used if there is no adapter.
        store: Where the ranker looks domains up.
        adapter: The folder of the adapter that is to be loaded.
        base: The `--base` that was given, if any.
        set_: The `--set` options that were given, if any.
    """
    from peftrank.base import load_base
    from peftrank.ranker import Ranker
    from peftrank.store import base_arguments, load_adapter

    wanted = settings.base
    asked = base is not None or any(text.strip().startswith("base.") for text in set_ or ())
    if adapter is not None and not asked:
        wanted = wanted.model_copy(update=base_arguments(load_adapter(adapter).manifest))
    return Ranker(load_base(**wanted.model_dump()), store=store)

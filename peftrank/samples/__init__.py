"""The embedded sample data of four domains. All of it is simulated, see README.md beside.

Finds files only; `peftrank.formats.slates` reads them.
"""

from __future__ import annotations

from pathlib import Path

from peftrank.errors import ConfigError
from peftrank.plugins import did_you_mean

PARTS = ("train", "valid", "test")

_DOMAINS = ("ecommerce", "news", "social", "video")
_FILES = ("items", *PARTS)


def samples() -> tuple[str, ...]:
    """Returns the domains that have a sample."""
    return _DOMAINS


def sample_path(domain: str, part: str) -> Path:
    """Returns the file of a part (`train`, `valid`, `test`) or of the `items` of a domain.

    Raises:
        ConfigError: the domain has no sample, or there is no such part.
    """
    if domain not in _DOMAINS:
        raise ConfigError(
            f"no sample of domain {domain!r}{did_you_mean(domain, _DOMAINS)}. Samples: "
            f"{', '.join(_DOMAINS)}. For other domains name your files: data.train, data.valid, "
            "data.test."
        )
    if part not in _FILES:
        raise ConfigError(
            f"no part {part!r}{did_you_mean(part, _FILES)}. Parts: {', '.join(_FILES)}."
        )
    return Path(__file__).parent / domain / f"{part}.jsonl"

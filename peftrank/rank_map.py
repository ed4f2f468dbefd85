"""The ranks of an adapter as a picture: which layer and module was given how much.

It knows ranks and matplotlib, and no folder.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from peftrank.errors import AdapterError, ConfigError
from peftrank.files import write_bytes

Ranks = Mapping[str, Mapping[str, int]]
"""{layer: {module: rank}}, as `peft_files.lora_ranks` gives it; layer "" is outside of any."""

_MOST = 500
"""Layers or modules that are drawn; a stranger's adapter may name any number."""
_MOST_NUMBERS = 1500
"""Cells of a map in which numbers can still be read."""


def draw_ranks(ranks: Ranks, path: Path, *, title: str = "") -> None:
    """Draws a heat map of layer x module; the format follows from the file's ending.

    A module that has no update in a layer stays white, one whose rank is 0 does not.

    Args:
        ranks: Of a LoRA or AdaLoRA.
        path: The file; it is replaced if it exists.
        title: Shown above.

    Raises:
        AdapterError: there are none, or too many.
        ConfigError: matplotlib is not installed, does not know the ending, or the file cannot be
            written.
    """
    if not ranks:
        raise AdapterError(
            "this adapter has no ranks to draw: its method is neither lora nor adalora"
        )
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError(
            "a picture of ranks needs matplotlib, which is not installed: "
            "pip install 'peftrank[report]'"
        ) from error
    layers = sorted(ranks, key=lambda name: (not name.isdigit(), int(name or 0), name))
    modules = sorted({name for row in ranks.values() for name in row})
    values = [[float(ranks[la].get(m, "nan")) for m in modules] for la in layers]
    if len(layers) > _MOST or len(modules) > _MOST:
        raise AdapterError(
            f"this adapter has {len(layers)} layers and {len(modules)} modules by name; a picture "
            f"shows up to {_MOST} of each"
        )
    size = (2.5 + 0.6 * len(modules), 2 + 0.22 * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    highest = max(value for row in values for value in row if value == value)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=max(1.0, highest))
    axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(layers)), [layer or "other" for layer in layers], parse_math=False)
    axes.set_ylabel("layer")
    axes.set_title(title, parse_math=False)
    figure.colorbar(image, label="rank", ticks=MaxNLocator(integer=True))
    if len(layers) * len(modules) <= _MOST_NUMBERS:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    shade = "white" if value < 0.6 * highest else "black"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=shade, size=7)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.lstrip(".") or "png", dpi=150)
        write_bytes(path, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot draw {path}: {error}") from None

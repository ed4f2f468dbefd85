"""The result as a table on the terminal, as JSON, and as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jinja2
from rich.table import Table
from rich.text import Text

from peftrank.errors import ConfigError
from peftrank.evaluation.evaluate import Evaluation, compare

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f3f3f3 }
small { color: #555 }
</style></head><body><h1>{{ title }}</h1>
{% for part in parts %}
<h2>{{ part.name }}</h2>
<table><thead><tr><th>ranking</th>{% for m in part.metrics %}<th>{{ m }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in part.rows %}<tr><td>{{ row.name }}</td>
{% for m in part.metrics %}<td>{{ row.metrics[m].mean|shown }}
<small>[{{ row.metrics[m].low|shown }}, {{ row.metrics[m].high|shown }}]</small>
</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
<p><small>{{ part.counted }} slates; {{ part.left_out }} without a relevant candidate are left out.
Brackets: 95% bootstrap interval of the mean.</small></p>
{% endfor %}
</body></html>
"""


def as_json(name: str, rows: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns a group of evaluations on the same slates as JSON values, null where there is none.

    Raises:
        ConfigError: `rows` is empty.
    """
    if not rows:
        raise ConfigError("nothing to measure: give an adapter or at least one baseline")
    metrics = list(rows[0].values)
    return {
        "name": name,
        "metrics": metrics,
        "counted": rows[0].counted,
        "left_out": rows[0].left_out,
        "rows": [
            {"name": row.name, "metrics": {m: _measured(row, rows[-1], m) for m in metrics}}
            for row in rows
        ],
    }


def as_table(part: dict[str, Any]) -> Table:
    """Returns a group as a table 80 columns wide; page and JSON have the intervals' ends."""
    table = Table(
        title=Text(
            f"{part['name']}: {part['counted']} slates, "
            f"{part['left_out']} without a relevant candidate left out"
        ),
        caption="± half the width of the 95% interval",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("ranking")
    for metric in part["metrics"]:
        table.add_column(Text(metric), justify="right")
    for row in part["rows"]:
        cells = (row["metrics"][m] for m in part["metrics"])
        table.add_row(Text(row["name"]), *(_with_width(cell) for cell in cells))
    return table


def _with_width(cell: dict[str, Any]) -> str:
    half = None if cell["mean"] is None else (cell["high"] - cell["low"]) / 2
    return f"{_shown(cell['mean'])} ± {_shown(half)}"


def as_html(title: str, parts: Sequence[dict[str, Any]]) -> str:
    """Returns a page with every group."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["shown"] = _shown
    return environment.from_string(_PAGE).render(title=title, parts=parts)


def _measured(row: Evaluation, reference: Evaluation, metric: str) -> dict[str, Any]:
    low, high = row.interval(metric)
    measured: dict[str, Any] = {"mean": _number(row.mean(metric)), "low": _number(low)}
    measured["high"] = _number(high)
    if row is not reference and row.counted:
        names = ("mean", "low", "high")
        values = map(_number, compare(reference, row, metric))
        measured["reference_minus_this"] = dict(zip(names, values, strict=True))
    return measured


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

"""The model card of an adapter: its manifest as Markdown with the Hub's YAML front matter.

Only numbers and settings of the manifest go in; it holds no user's text. A manifest may come from a
stranger, so whatever it says is shown as text: no markup, link, HTML or YAML of it takes effect.
Knows no folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from peftrank._architectures import DECODERS

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LONGEST = 200
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&:$])|(?<!\d)\.|\.(?!\d)")
_MOST_LAYERS = 200
_COUNTERS = ("best_step", "steps")


def adapter_card(
    manifest: Mapping[str, Any],
    *,
    license: str | None = None,
    source: str | None = None,
    peft_config: Mapping[str, Any] | None = None,
    ranks: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """Returns the text of README.md for an adapter.

    Args:
        manifest: What goes into peftrank.json. A metric is a number, or a mapping with `mean`,
            `low` and `high` (its interval).
        license: The Hub's identifier of the licence, if one was chosen.
        source: What `load_adapter` loads it by; absent: a folder.
        peft_config: What goes into adapter_config.json; its ranks are shown.
        ranks: {layer: {module: rank}}, shown as a table where modules differ.
    """
    base, method, readout = manifest["base"], manifest["method"], manifest["readout"]
    domain = _text(manifest["domain"])
    named = base.get("model_id")
    home = f"`{_code(named)}`" if named else f"`{_code(base['name'])}`, a model that is not public"
    sections = [
        f"---\n{_front_matter(manifest, license)}---",
        f"# {domain}: a PeftRank adapter",
        f"Orders a list of candidates for a user in the domain **{domain}**, best first, from the "
        f"user's history. It is a set of `{_code(method['name'])}` weights for the base {home}, "
        f"with the readout `{_code(readout['name'])}` that turns hidden states into scores. The "
        "base itself is not included.",
        "## Use",
        _usage(manifest, source or "path/to/this/folder"),
        "## How it was made",
        _table([*_settings(manifest), *_ranks(peft_config or {})]),
        *_rank_table(ranks or {}),
        "## Measured",
        _table(_measured(manifest["metrics"])) or "Nothing was measured.",
        "## Data",
        _table(_summary(manifest["data"])) or "Not recorded.",
        "## Limits",
        "The scores order candidates of one list; they are not probabilities and are not "
        "comparable between lists. Figures hold for data like that measured above. The adapter "
        "reproduces the preferences and biases of its training data and of its base. It fits only "
        f"the base with fingerprint `{_code(base['fingerprint'][:16])}` and is refused on any "
        "other.",
    ]
    return "\n\n".join(sections) + "\n"


def card_license(card: str) -> str | None:
    """Returns the licence that a card's front matter names, None if it names none."""
    parts = re.match(r"---\r?\n(.*?)\r?\n---", card, flags=re.DOTALL)
    try:
        front = yaml.safe_load(parts[1]) if parts else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: dates that do not exist
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _front_matter(manifest: Mapping[str, Any], license: str | None) -> str:
    domain, method = _plain(manifest["domain"]), _plain(manifest["method"]["name"])
    front: dict[str, Any] = {"library_name": "peft"}
    base = manifest["base"].get("model_id")
    if isinstance(base, str) and HUB_ID.fullmatch(base):
        front["base_model"] = base
    tags = ["peftrank", "listwise-recommendation", "recommendation", "reranking", method, domain]
    front["tags"] = tags
    if license is not None:
        front["license"] = _plain(license)
    if results := [_result(name, value) for name, value in _metrics(manifest["metrics"])]:
        task = {"type": "text-ranking", "name": "Listwise recommendation"}
        dataset = {"type": domain, "name": domain}
        front["model-index"] = [
            {
                "name": f"{domain}-{method}",
                "results": [{"task": task, "dataset": dataset, "metrics": results}],
            }
        ]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)


def _result(name: str, value: float | Mapping[str, float]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"type": _plain(name), "value": value}
    shown = f"{_plain(name)}, interval {value['low']:.4f} to {value['high']:.4f}"
    return {"type": _plain(name), "value": value["mean"], "name": shown}


def _usage(manifest: Mapping[str, Any], source: str) -> str:
    base = manifest["base"]
    head = "AutoModelForCausalLM" if base.get("architecture") in DECODERS else "AutoModel"
    return (
        "```python\n"
        "from peftrank import Ranker\n\n"
        f"ranker = Ranker.from_base({_quoted(base['name'])})\n"
        f"ranker.load_adapter({_quoted(source)})\n"
        f"ranker.rank(slate, domain={_quoted(manifest['domain'])})\n"
        "```\n\n"
        "The weights alone, with plain PEFT (hidden states only: prompt and readout are "
        "PeftRank's; a bottleneck adapter needs `import peftrank` first):\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {head}\n\n"
        f"base = {head}.from_pretrained({_quoted(base.get('model_id') or base['name'])})\n"
        f"model = PeftModel.from_pretrained(base, {_quoted(source)})\n"
        "```"
    )


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    base, readout = manifest["base"], manifest["readout"]
    rows = [("method", manifest["method"]["name"])]
    rows += [(f"method.{key}", v) for key, v in manifest["method"].get("options", {}).items()]
    rows += [("readout", readout["name"])]
    rows += [(f"readout.{key}", v) for key, v in readout["options"].items()]
    if readout["feature_names"]:
        rows.append(("candidate features", ", ".join(readout["feature_names"])))
    rows += [("prompt.mode", manifest["prompt"].get("mode"))]
    rows += [(f"base.{key}", base[key]) for key in sorted(base)]
    rows += [(f"version of {key}", v) for key, v in manifest["versions"].items()]
    return rows


def _ranks(peft_config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    shown = {"r": "rank", "lora_alpha": "alpha", "size": "bottleneck size"}
    return [(name, peft_config[key]) for key, name in shown.items() if peft_config.get(key)]


def _rank_table(ranks: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns a section with the rank of each module by layer; none where all are equal."""
    differ = len({rank for row in ranks.values() for rank in row.values()}) > 1
    if not differ or len(ranks) > _MOST_LAYERS:
        return []
    modules = sorted({name for row in ranks.values() for name in row})
    total = sum(sum(row.values()) for row in ranks.values())
    rows: list[list[object]] = [["layer", *modules]]
    rows += [[layer or "other", *(row.get(m, "") for m in modules)] for layer, row in ranks.items()]
    lines = [f"| {' | '.join(map(_text, row))} |" for row in rows]
    lines.insert(1, "|---" + "|--:" * len(modules) + "|")
    return ["## Ranks", f"What each module's update has, {total} in all.", "\n".join(lines)]


def _metrics(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns what was measured: numbers, and means with their intervals."""
    return [
        (name, value)
        for name, value in _flat(values)
        if name not in _COUNTERS and (_is_number(value) or _is_interval(value))
    ]


def _measured(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in _flat(values):
        if _is_interval(value):
            numbers = (value["mean"], value["low"], value["high"])
            rows.append((name, "{:.4f} ({:.4f} to {:.4f})".format(*numbers)))
        elif _is_number(value):
            rows.append((name, f"{value:.4f}" if isinstance(value, float) else value))
    return rows


def _summary(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the counts and hashes of the data; any other text may be a user's."""
    hashed = {
        key: value[:16]
        for key, value in data.items()
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8,64}", value)
    }
    numbers = [(key, value) for key, value in _flat(data) if _is_number(value)]
    return [*numbers, *hashed.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_number(value.get(key)) for key in ("mean", "low", "high")
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = isinstance(value, Mapping) and not _is_interval(value)
        rows += _flat(value, f"{prefix}{key}.") if inner else [(prefix + str(key), value)]
    return rows


def _table(rows: list[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [(_text(key), _text(value)) for key, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])


def _plain(value: object) -> str:
    """Returns one line of printable characters, at most a few hundred."""
    line = " ".join(str(value).split())
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _text(value: object) -> str:
    """Returns it with Markdown and HTML escaped. A dot between digits needs no escape."""
    return _MARKUP.sub(lambda match: f"\\{match[0]}", _plain(value))


def _code(value: object) -> str:
    """Returns it for a code span, where a backtick is the only character with a meaning."""
    return _plain(value).replace("`", "'")


def _quoted(value: object) -> str:
    """Returns it as a Python string for a fenced block."""
    return repr(_plain(value).replace("```", "'''"))

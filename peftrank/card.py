"""The model card of an adapter: its manifest as Markdown with the Hub's YAML front matter.

Only numbers and settings of the manifest go in; it holds no user's text. Knows no folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from peftrank._architectures import DECODERS


def adapter_card(manifest: Mapping[str, Any], *, license: str | None = None) -> str:
    """Returns the text of README.md for an adapter.

    Args:
        manifest: What goes into peftrank.json.
        license: SPDX-like identifier for the Hub, if one was chosen.
    """
    base, method, readout = manifest["base"], manifest["method"], manifest["readout"]
    domain = manifest["domain"]
    sections = [
        f"---\n{_front_matter(manifest, license)}---",
        f"# {domain}: a PeftRank adapter",
        f"Orders a list of candidates for a user in the domain **{domain}**, best first, from the "
        f"user's history. It is a set of `{method['name']}` weights for the base "
        f"`{base['model_id']}`, with the readout `{readout['name']}` that turns hidden states "
        "into scores. The base itself is not included.",
        "## Use",
        _usage(domain, base),
        "## How it was made",
        _table(_settings(manifest)),
        "## Measured",
        _table(_numbers(manifest["metrics"])) or "Nothing was measured.",
        "## Data",
        _table(_numbers(manifest["data"])) or "Not recorded.",
        "## Limits",
        "The scores order candidates of one list; they are not probabilities and are not "
        "comparable between lists. Figures hold for data like that measured above. The adapter "
        "reproduces the preferences and biases of its training data and of its base. It fits only "
        f"the base with fingerprint `{base['fingerprint'][:16]}` and is refused on any other.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Mapping[str, Any], license: str | None) -> str:
    base = manifest["base"]
    front: dict[str, Any] = {
        "library_name": "peft",
        "base_model": base["model_id"],
        "tags": [
            "peftrank",
            "recommendation",
            "reranking",
            manifest["method"]["name"],
            manifest["domain"],
        ],
    }
    if license is not None:
        front["license"] = license
    results = [
        {"type": name, "value": value}
        for name, value in _flat(manifest["metrics"])
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if results:
        task = {"type": "text-ranking", "name": "Listwise recommendation"}
        dataset = {"type": manifest["domain"], "name": manifest["domain"]}
        front["model-index"] = [
            {
                "name": f"{manifest['domain']}-{manifest['method']['name']}",
                "results": [{"task": task, "dataset": dataset, "metrics": results}],
            }
        ]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _usage(domain: str, base: Mapping[str, Any]) -> str:
    head = "AutoModelForCausalLM" if base["architecture"] in DECODERS else "AutoModel"
    return (
        "```python\n"
        "from peftrank import Ranker\n\n"
        f"ranker = Ranker.from_base({base['name']!r})\n"
        'ranker.load_adapter("path/to/this/folder")\n'
        f"ranker.rank(slate, domain={domain!r})\n"
        "```\n\n"
        "The weights alone, with plain PEFT (hidden states only: prompt and readout are "
        "PeftRank's; a bottleneck adapter needs `import peftrank` first):\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {head}\n\n"
        f"base = {head}.from_pretrained({base['model_id']!r})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
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


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, f"{v:.4f}" if isinstance(v, float) else v) for key, v in _flat(values)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        rows += _flat(value, f"{prefix}{key}.") if inner else [(prefix + str(key), value)]
    return rows


def _table(rows: list[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [(_cell(key), _cell(value)) for key, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])


def _cell(value: Any) -> str:  # noqa: ANN401
    return str(value).replace("|", "\\|").replace("\n", " ")

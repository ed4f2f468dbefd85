"""An adapter merged into its base: a model that transformers alone loads, with what merging cost.

PEFT does the merging (LoRA, also with DoRA, IA3, and whole weights). A quantized base is refused:
rounding the sum of base and adapter to 4 or 8 bits would lose most of what the adapter adds.
Bottleneck adapters are layers of their own and cannot be merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import peft
import safetensors.torch
import torch
from scipy.stats import kendalltau

from peftrank import __version__, _folder, plugins, store
from peftrank._checkpoints import quiet_loading
from peftrank.base import Base, load_base
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.files import publish_folder, temporary_folder
from peftrank.model import RankingModel, move
from peftrank.prompts import PromptTemplate, collate
from peftrank.ranker import Ranker, Scores
from peftrank.types import Slate

MERGED = "peftrank-merged.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Drift:
    """How the scores of the merged model differ from those of base and adapter."""

    slates: int
    largest: float
    """Largest difference of a score."""
    mean: float
    """Mean absolute difference."""
    spread: float
    """Standard deviation of the adapter's scores, to compare these with."""
    kendall_tau: float
    """Mean rank correlation of the two rankings of a slate; 1: all equal."""
    top_changed: int
    """Slates whose best candidate is another one."""


def copy(folder: Path, output: Path) -> None:
    """Writes an adapter's files, checked, to a new folder, where PEFT and others find their own.

    Raises:
        AdapterError: the adapter is damaged, or `output` exists or cannot be written.
    """
    written = store.load_adapter(folder)
    try:
        with temporary_folder(output.parent) as temporary:
            for name in (*_folder.HASHED, _folder.MANIFEST):
                shutil.copyfile(folder / name, temporary / name)
            _folder.check_same(store.load_adapter(temporary), written)
            _publish(temporary, output)
    except OSError as error:
        raise _unwritable(output, error) from error


def check_mergeable(folder: Path) -> None:
    """Raises AdapterError unless weights of a base can take the adapter in."""
    kind = store.load_adapter(folder).peft_config["peft_type"]
    if kind not in ("LORA", "IA3", "LN_TUNING"):
        raise AdapterError(
            f"{folder} is a {kind.lower()} adapter, which is not merged into weights of the base "
            "here. Only LoRA (AdaLoRA is exported as LoRA), IA3, top_layers and full can be merged."
        )


def merge(
    folder: Path, output: Path, *, base: Base, slates: Sequence[Slate], dtype: str = "float32"
) -> Drift:
    """Writes base and adapter as one model and returns how its scores drift.

    `output` holds what transformers loads (config, weights, tokenizer), the readout's weights, and
    `peftrank-merged.json` with the prompt, the readout and the drift, which is measured on the
    model as read back from the disk. The base is left with the adapter merged into it.

    Args:
        folder: The adapter's folder.
        output: A folder that does not exist yet.
        base: The adapter's base, unquantized.
        slates: What the drift is measured on.
        dtype: Of the written weights: float32, bfloat16 or float16.

    Raises:
        AdapterError: the adapter cannot be merged or belongs to another base; `output` exists or
            cannot be written.
        ConfigError: the base is quantized, or no such dtype.
        DataError: no slates.
    """
    check_mergeable(folder)
    files = store.load_adapter(folder)
    store.check_base(files.manifest, base.identity)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if base.identity.quantization != "none":
        raise ConfigError(
            f"the base is loaded in {base.identity.quantization}. Rounding the merged weights to "
            "that would lose most of what the adapter adds; merge into the unquantized base "
            "(base.quantization=none)."
        )
    if not slates:
        raise DataError("no slates to measure the drift on; expected at least one")
    if output.exists():
        raise _taken(output)
    with Ranker(base) as ranker:
        scores = ranker.score(slates, domain=ranker.load_adapter(folder))
    merged = peft.PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload(
        safe_merge=True
    )
    try:
        with temporary_folder(output.parent) as temporary:
            with quiet_loading():
                merged.to(getattr(torch, dtype)).save_pretrained(temporary)
            base.tokenizer.save_pretrained(temporary)
            shutil.copyfile(folder / "readout.safetensors", temporary / "readout.safetensors")
            drift = _drift(scores, _read_back(temporary, files.manifest, slates), slates)
            kept = ("domain", "method", "prompt", "readout", "base", "metrics", "data")
            written = {
                "peftrank_version": __version__,
                **{key: files.manifest[key] for key in kept},
                "dtype": dtype,
                "drift": asdict(drift),
            }
            text = json.dumps(written, indent=1) + "\n"
            (temporary / MERGED).write_text(text, encoding="utf-8")
            _publish(temporary, output)
    except OSError as error:
        raise _unwritable(output, error) from error
    return drift


def _publish(temporary: Path, output: Path) -> None:
    if not publish_folder(temporary, output):
        raise _taken(output)


def _taken(output: Path) -> AdapterError:
    return AdapterError(f"{output} exists already; name a new folder")


def _unwritable(output: Path, error: OSError) -> AdapterError:
    return AdapterError(
        f"cannot write {output}: {error.strerror or error}. Nothing is left there; free some "
        "space or choose another place."
    )


def _read_back(folder: Path, manifest: dict[str, object], slates: Sequence[Slate]) -> list[Scores]:
    """Returns the scores of a merged model on disk, one slate a pass."""
    base = load_base(str(folder), quantization="none", compute_dtype="float32", device="cpu")
    wanted = manifest["readout"]
    assert isinstance(wanted, dict)
    readout = plugins.load("readouts", wanted["name"]).build(
        base.hidden_size,
        base.tokenizer,
        base.lm_head,
        feature_names=tuple(wanted["feature_names"]),
        **wanted["options"],
    )
    weights = safetensors.torch.load_file(folder / "readout.safetensors")
    readout.load_state_dict(weights, strict=True)
    prompt = manifest["prompt"]
    assert isinstance(prompt, dict)
    template = PromptTemplate(base.tokenizer, **prompt)
    model = RankingModel(base, readout.eval())
    scores = []
    with torch.inference_mode():
        for slate in slates:
            batch = collate(
                [slate],
                template,
                pad_token_id=base.pad_token_id,
                feature_names=tuple(wanted["feature_names"]),
            )
            scores.append(tuple(model(move(batch, base.device))[0].tolist()))
    return scores


def _drift(before: Sequence[Scores], after: Sequence[Scores], slates: Sequence[Slate]) -> Drift:
    a = np.array([value for scores in before for value in scores])
    b = np.array([value for scores in after for value in scores])
    difference = np.abs(a - b)
    taus, changed = [], 0
    for x, y in zip(before, after, strict=True):
        if len(set(x)) > 1 and len(set(y)) > 1:  # a ranking of equals correlates with nothing
            taus.append(float(kendalltau(x, y).statistic))
        changed += int(np.argmax(x) != np.argmax(y))
    return Drift(
        slates=len(slates),
        largest=float(difference.max()),
        mean=float(difference.mean()),
        spread=float(a.std()),
        kendall_tau=float(np.mean(taus)) if taus else 1.0,
        top_changed=changed,
    )

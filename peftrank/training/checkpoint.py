"""Everything a run needs to continue exactly, as safetensors and JSON (never pickle).

A checkpoint is a folder `checkpoint-<step>` that appears by one rename, so it is whole or absent.
It holds only what trains (adapter, readout, optimizer, method state), never the base.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from peftrank.config import Config
from peftrank.errors import AdapterError, ConfigError
from peftrank.files import publish_folder, temporary_folder
from peftrank.training.optimizers import put_slot, slots
from peftrank.training.run import Run, Snapshot, parameter_names, put_back, snapshot

_KEEP = 2
_NAME = re.compile(r"checkpoint-[0-9]+")
_VALUES = (
    "data",
    "micro_tokens",
    "step",
    "stale",
    "best",
    "best_step",
    "method",
    "best_method",
    "history",
)
_GROUPS = ("adapter", "readout", "best_adapter", "best_readout", "optimizer", "random")


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `values["step"]` optimizer steps; tensors grouped by what they are."""

    run: Path
    config: Config
    values: dict[str, Any]
    groups: dict[str, dict[str, Tensor]]


def save(run: Run) -> Path:
    """Writes a checkpoint of the run's current step and returns its folder.

    Raises:
        AdapterError: it cannot be written; checkpoints before it are untouched.
    """
    now = snapshot(run)
    best = run.best_state or now
    values = {
        "config": run.config.model_dump(mode="json"),
        "data": run.slates_fingerprint,
        "micro_tokens": run.micro_tokens,
        "step": run.step,
        "stale": run.stale,
        "best": run.best if math.isfinite(run.best) else None,
        "best_step": run.best_step,
        "method": now.values,
        "best_method": best.values,
        "history": run.history,
    }
    groups = {
        "adapter": now.tensors,
        "readout": now.readout,
        "best_adapter": best.tensors,
        "best_readout": best.readout,
        "optimizer": _optimizer_tensors(run),
        "random": {"torch": torch.get_rng_state()},
    }
    if run.reference is not None:
        groups["reference"] = run.reference.state_dict()
    folder = run.folder / f"checkpoint-{run.step}"
    if run.accelerator.is_main_process:
        _write(folder, values, groups)
    run.accelerator.wait_for_everyone()
    return folder


def restore(run: Run, saved: Checkpoint) -> None:
    """Puts a run of the same configuration where the checkpoint was.

    Raises:
        ConfigError: the slates are not those of the saved run.
    """
    values, groups = saved.values, saved.groups
    if values["data"] != run.slates_fingerprint:
        raise ConfigError(
            "cannot resume: the training or validation slates are not those of the saved run. "
            "Put the files back as they were, or train anew."
        )
    put_back(run, Snapshot(groups["adapter"], values["method"], groups["readout"]))
    if run.reference is not None:
        run.reference.load_state_dict(groups["reference"])
    _restore_optimizer(run, groups["optimizer"])
    torch.set_rng_state(groups["random"]["torch"])
    run.micro_tokens = values["micro_tokens"]
    run.step, run.stale, run.best_step = values["step"], values["stale"], values["best_step"]
    run.history = values["history"]
    if values["best"] is not None:
        run.best = values["best"]
        run.best_state = Snapshot(
            groups["best_adapter"], values["best_method"], groups["best_readout"]
        )


def check_config(saved: Checkpoint, config: Config) -> None:
    """Raises ConfigError naming every key in which `config` differs from the saved run's."""
    then, now = (c.model_dump(mode="json") for c in (saved.config, config))
    if then != now:
        raise ConfigError(f"cannot resume with another configuration: {differences(then, now)}")


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns every dotted key in which two configurations differ, with both values."""
    then, now = _flat(then), _flat(now)
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    return ", ".join(f"{k} (was {then.get(k)!r}, now {now.get(k)!r})" for k in keys)


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`, or the newest one if `path` is a run's folder.

    Raises:
        AdapterError: no checkpoint there, or it is damaged.
    """
    folder = path
    if not (path / "state.json").is_file():
        found = _all(path)
        if not found:
            raise AdapterError(
                f"--resume {path}: no checkpoint here. Expected a checkpoint-<step> folder, or a "
                "run's folder (adapters/<domain>/.runs/<run>) that holds some."
            )
        folder = found[-1]
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values["sha256"], dict):
            raise ValueError("state.json is not what was written")
        config = Config.model_validate(values["config"])
        config.model_dump(mode="json")  # raises what comparing it would: options nested too deeply
        itemgetter(*_VALUES)(values)
        itemgetter(*_GROUPS)(values["sha256"])
        groups = {
            name: _read(folder / f"{name}.safetensors", sha256)
            for name, sha256 in values["sha256"].items()
        }
    except KeyError as error:
        raise AdapterError(
            f"checkpoint {folder}: state.json lacks {error}; another version of PeftRank wrote it. "
            "Resume with that version, or train anew."
        ) from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise AdapterError(
            f"checkpoint {folder} is damaged: {error}. Resume from another checkpoint of the run."
        ) from None
    return Checkpoint(folder.parent, config, values, groups)


def _read(path: Path, sha256: str) -> dict[str, Tensor]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path.name} is not what was written")
    tensors: dict[str, Tensor] = safetensors.torch.load(data)
    return tensors


def _write(final: Path, values: dict[str, Any], groups: dict[str, dict[str, Tensor]]) -> None:
    run = final.parent
    try:
        with temporary_folder(run) as temporary:
            hashes = {}
            for name, tensors in groups.items():
                held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                data = safetensors.torch.save(held)
                (temporary / f"{name}.safetensors").write_bytes(data)
                hashes[name] = hashlib.sha256(data).hexdigest()
            state = json.dumps({**values, "sha256": hashes})
            (temporary / "state.json").write_text(state, encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            publish_folder(temporary, final)
    except OSError as error:
        raise AdapterError(
            f"cannot save checkpoint {final}: {error}. Free space or fix permissions, then "
            "continue from the checkpoint before it with --resume."
        ) from error
    for old in _all(run)[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _optimizer_tensors(run: Run) -> dict[str, Tensor]:
    """Returns the optimizer's state as `<parameter>/<slot>` tensors."""
    names = parameter_names(run)
    held = slots(run.optimizer.optimizer)
    return {f"{names[parameter]}/{slot}": value for (parameter, slot), value in held.items()}


def _restore_optimizer(run: Run, tensors: dict[str, Tensor]) -> None:
    by_name = {name: parameter for parameter, name in parameter_names(run).items()}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        put_slot(run.optimizer.optimizer, by_name[name], slot, value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _all(run: Path) -> list[Path]:
    found = [p for p in run.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))

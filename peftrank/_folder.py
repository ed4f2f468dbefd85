"""One adapter folder: writes its five files and reads them back with every check.

Knows the names, hashes and shapes a folder must have. Knows no store, no version and no base.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from peftrank.errors import AdapterError
from peftrank.methods._peft_types import KINDS
from peftrank.methods._sites import bottleneck_sites
from peftrank.peft_files import (
    AdapterFiles,
    check_tensors,
    ia3_factors,
    lora_layers,
    peft_paths,
    whole_weights,
)

FORMAT_VERSION = 1
_WEIGHTS = ".safetensors"
MANIFEST = "peftrank.json"
HASHED = ("README.md", "adapter_config.json", "adapter_model.safetensors", "readout.safetensors")
_AGAIN = "Copy the adapter again from where it came, or activate another version."
_METHODS = ("LORA", "BOTTLENECK", "IA3", *KINDS)
_CODE = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".py", ".so")
_KEYS: Mapping[tuple[str, ...], type] = {
    ("peftrank_version",): str,
    ("domain",): str,
    ("method",): dict,
    ("method", "name"): str,
    ("method", "options"): dict,
    ("prompt",): dict,
    ("readout",): dict,
    ("readout", "name"): str,
    ("readout", "options"): dict,
    ("readout", "feature_names"): list,
    ("base",): dict,
    ("base", "name"): str,
    ("base", "fingerprint"): str,
    ("base", "tokenizer_hash"): str,
    ("config",): dict,
    ("metrics",): dict,
    ("data",): dict,
    ("versions",): dict,
    ("created",): str,
    ("files",): dict,
}
_SMALL = 2**24
"""Bytes that a file of text may have."""
_LARGEST_INT = 2**63 - 1


class _Prompt(BaseModel):
    """What a manifest's prompt holds, as far as it holds it. Other keys are left to the ranker."""

    model_config = ConfigDict(strict=True)
    parts: dict[str, str] = {}
    mode: str = ""
    fields: list[str] = []
    history_length: int = Field(0, ge=0)
    history_step: int = Field(1, ge=1)
    item_tokens: int = Field(1, ge=1)
    window: int = Field(20, ge=2, le=26)
    max_tokens: int = Field(1, ge=1)
    chat: str = ""
    turn: str = ""
    max_depth: int | None = Field(None, ge=1)


def write(path: Path, domain: str, files: AdapterFiles, card: str) -> None:
    """Fills an empty folder with an adapter's files.

    Raises:
        OSError: the disk refuses.
        AdapterError: the manifest or the configuration is incomplete or not JSON.
    """
    content = {
        "README.md": card.encode(),
        "adapter_config.json": _dump("adapter_config.json", files.peft_config),
        "adapter_model.safetensors": _serialize(files.tensors),
        "readout.safetensors": _serialize(files.readout),
    }
    manifest = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **files.manifest}
    manifest |= {
        "format_version": FORMAT_VERSION,
        "domain": domain,
        "files": {name: _entry(data) for name, data in content.items()},
    }
    _check_manifest(path, manifest)
    for name, data in {**content, MANIFEST: _dump(MANIFEST, manifest)}.items():
        (path / name).write_bytes(data)


def read(path: Path) -> AdapterFiles:
    """Returns the adapter in a folder. Each file is read once; what is hashed is what is used.

    Raises:
        AdapterError: the folder is missing, incomplete, damaged, changed or holds other files.
    """
    _check_names(path)
    manifest = _parse(path / MANIFEST, _read(path / MANIFEST, most=_SMALL))
    _check_manifest(path, manifest)
    _check_prompt(path, manifest["prompt"])
    content = {name: _verified(path / name, manifest["files"][name]) for name in HASHED}
    config = _parse(path / "adapter_config.json", content["adapter_config.json"])
    tensors = _deserialize(path / "adapter_model.safetensors", content["adapter_model.safetensors"])
    readout = _deserialize(path / "readout.safetensors", content["readout.safetensors"])
    method = config.get("peft_type")
    if method not in _METHODS:
        raise AdapterError(f"{path}: peft_type is {method!r}, not one of {', '.join(_METHODS)}")
    if not tensors:
        raise AdapterError(f"{path}: adapter_model.safetensors holds no tensor")
    try:
        if method == "LORA":
            lora_layers(config, tensors)
        elif method == "IA3":
            ia3_factors(config, tensors)
        elif method == "BOTTLENECK":
            _check_bottleneck(config, tensors)
        elif method == "LN_TUNING":
            whole_weights(config, tensors)
        else:
            peft_paths(config, tensors)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    return AdapterFiles(config, tensors, readout, manifest)


def check_same(read_back: AdapterFiles, written: AdapterFiles) -> None:
    """Raises AdapterError unless what was read back from the disk equals what was to be saved."""
    for got, expected in (
        (read_back.tensors, written.tensors),
        (read_back.readout, written.readout),
    ):
        equal = got.keys() == expected.keys() and all(
            torch.equal(got[name], tensor.detach().cpu()) and got[name].dtype == tensor.dtype
            for name, tensor in expected.items()
        )
        if not equal:
            raise AdapterError("what was written differs from the trained weights; nothing saved")


def _check_names(path: Path) -> None:
    try:
        entries = {entry.name: entry for entry in os.scandir(path)}
    except OSError as error:
        raise AdapterError(f"cannot read the adapter folder {path}: {error.strerror}") from error
    if MANIFEST not in entries:
        plain = " It is a plain PEFT adapter, without prompt and readout." * (
            "adapter_config.json" in entries
        )
        raise AdapterError(
            f"{path} holds no {MANIFEST}.{plain} Expected a folder made by `peftrank train`."
        )
    for name, entry in entries.items():
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise AdapterError(
                f"{path}: {name!r} is no regular file; links and folders are refused"
            )
        if name not in (*HASHED, MANIFEST):
            code = ", a kind of file that can run code when loaded" * name.lower().endswith(_CODE)
            raise AdapterError(f"{path}: unexpected file {name!r}{code}. Remove it.")
    missing = [name for name in HASHED if name not in entries]
    if missing:
        raise AdapterError(f"{path} is incomplete: {', '.join(missing)} missing. {_AGAIN}")


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path / MANIFEST}: format_version is {version!r}; this PeftRank reads "
            f"{FORMAT_VERSION}. A larger number needs a newer PeftRank: pip install -U peftrank"
        )
    for keys, kind in _KEYS.items():
        value: Any = manifest
        for key in keys:
            value = value.get(key)
        if not isinstance(value, kind):
            raise AdapterError(
                f"{path / MANIFEST}: key {'.'.join(keys)!r} is "
                + ("missing" if value is None else f"{value!r}")
                + f"; expected {kind.__name__}"
            )
    if not all(isinstance(name, str) for name in manifest["readout"]["feature_names"]):
        raise AdapterError(f"{path / MANIFEST}: 'readout.feature_names' must hold names")
    listed = manifest["files"]
    if set(listed) != set(HASHED):
        raise AdapterError(f"{path / MANIFEST}: 'files' must list {', '.join(HASHED)}")
    for name, entry in listed.items():
        inner = entry if isinstance(entry, dict) else {}
        if not isinstance(inner.get("sha256"), str) or not isinstance(inner.get("bytes"), int):
            raise AdapterError(f"{path / MANIFEST}: 'files.{name}' must hold sha256 and bytes")


def _check_prompt(path: Path, prompt: Mapping[str, Any]) -> None:
    try:
        _Prompt.model_validate(prompt)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("prompt", *first["loc"]))
        raise AdapterError(f"{path / MANIFEST}: key {key!r}: {first['msg']}") from None


def _check_bottleneck(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for site in bottleneck_sites(config, tensors):
        shapes = [tuple(tensors[name].shape) for name in site.names]
        size = tensors[site.names[1]].numel()
        width = tensors[site.names[3]].numel()
        if shapes != [(size, width), (size,), (width, size), (width,)]:
            raise AdapterError(
                f"the bottleneck adapter at {site.path!r} has shapes {shapes}; expected "
                "(size, width), (size,), (width, size), (width,)"
            )


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = _read(path, listed=entry["bytes"], most=None if path.suffix == _WEIGHTS else _SMALL)
    found = _entry(data)["sha256"]
    if found != entry["sha256"]:
        raise AdapterError(
            f"{path} was changed or damaged: SHA-256 {found[:12]}, {MANIFEST} says "
            f"{entry['sha256'][:12]}. {_AGAIN}"
        )
    return data


def _read(path: Path, *, listed: int | None = None, most: int | None = None) -> bytes:
    """Returns a file's bytes; its size is checked before anything is read."""
    try:
        # O_NOFOLLOW: a link put here after the names were checked is not followed.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise AdapterError(f"{path} is no regular file")
            if listed is not None and found.st_size != listed:
                raise AdapterError(
                    f"{path} has {found.st_size} bytes; {MANIFEST} says {listed}. {_AGAIN}"
                )
            if most is not None and found.st_size > most:
                raise AdapterError(f"{path} has {found.st_size} bytes; at most {most} are read")
            return file.read(found.st_size)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from error


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _dump(name: str, values: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False, default=_listed)
        return (text + "\n").encode()
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{name} cannot be written as JSON: {error}") from error


def _listed(value: object) -> list[Any]:
    if isinstance(value, set | frozenset):  # PEFT keeps target_modules as a set
        return sorted(value)
    raise TypeError(f"{value!r} has no JSON form")


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(
            data, parse_int=_int, parse_float=_float, parse_constant=_refuse_constant
        )
        json.dumps(values, ensure_ascii=False).encode()  # half characters cannot even be printed
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}. {_AGAIN}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} must hold a JSON object")
    return values


def _int(text: str) -> int:
    if abs(number := int(text)) > _LARGEST_INT:
        raise ValueError(f"{text[:20]}... is too large a number")
    return number


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    # clone: safetensors refuses tensors that share memory
    ready = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return bytes(safetensors.torch.save(ready, metadata={"format": "pt"}))


def _deserialize(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(f"{path} is not a valid safetensors file: {error}. {_AGAIN}") from error
    check_tensors(tensors, str(path))
    return tensors

"""The adapter store: folders `<store>/<domain>/<version>/`, written once and checked at each load.

A version is published by renaming a complete folder into place, so a reader never sees half of
one. `<store>/<domain>/ACTIVE` names the version in use. This file knows nothing about models.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftrank import _folder
from peftrank.config import DOMAIN_NAME
from peftrank.errors import AdapterError
from peftrank.files import publish_folder, temporary_folder, write_bytes
from peftrank.peft_files import AdapterFiles as AdapterFiles
from peftrank.peft_files import adapter_ranks, lora_layers
from peftrank.plugins import did_you_mean

if TYPE_CHECKING:
    from peftrank.base import BaseIdentity

_VERSION = re.compile(r"[0-9]{4,9}")
_ACTIVE = "ACTIVE"
_LONGEST = 100
"""Characters of ACTIVE that are read; a version has at most nine."""


def save_adapter(
    store: Path, domain: str, files: AdapterFiles, *, card: str, activate: bool = True
) -> Path:
    """Writes an adapter as the next version of a domain and returns its folder.

    The folder is complete, read back and compared before it appears. Processes that publish at
    the same time get different versions. `files.manifest` need not hold `files`, `created`,
    `domain` and `format_version`; they are set here.

    Raises:
        AdapterError: bad domain name, incomplete manifest, or the disk refuses; nothing is left.
    """
    home = Path(store) / check_domain(domain)
    try:
        with temporary_folder(home) as temporary:
            _folder.write(temporary, domain, files, card)
            _folder.check_same(_folder.read(temporary), files)
            path = _next_version(home)
            while not publish_folder(temporary, path):  # another process took this number first
                path = _next_version(home)
    except OSError as error:
        raise AdapterError(
            f"cannot write an adapter under {home}: {error.strerror}. Nothing was published; "
            "free some space or choose another store."
        ) from error
    if activate:
        _put_into_use(path)
    return path


def load_adapter(path: Path) -> AdapterFiles:
    """Returns the adapter in a folder, after every check that needs no base.

    Each file is read once; what is hashed is what is used. Nothing in the folder is executed.

    Raises:
        AdapterError: the folder is missing, incomplete, damaged, changed or holds other files.
    """
    return _folder.read(Path(path))


def verify(path: Path) -> None:
    """Raises AdapterError if anything about an adapter folder is wrong."""
    load_adapter(path)


def base_arguments(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `load_base` needs to load the base that an adapter was trained on."""
    trained = manifest["base"]
    wanted = {key: trained[key] for key in ("name", "quantization", "double_quant", "revision")}
    return wanted | {"quantize_embeddings": trained.get("quantize_embeddings", False)}


def check_base(manifest: Mapping[str, Any], identity: BaseIdentity) -> None:
    """Raises AdapterError if an adapter was trained on another base or tokenizer.

    Another quantization or compute dtype of the same base is allowed.
    """
    trained = manifest["base"]
    what = next(
        (
            key
            for key in ("fingerprint", "tokenizer_hash")
            if trained[key] != getattr(identity, key)
        ),
        None,
    )
    if what is not None:
        raise AdapterError(
            f"the adapter for {manifest['domain']!r} was trained on base {trained['name']!r} "
            f"({what} {trained[what][:12]}), not on {identity.name!r} "
            f"({what} {getattr(identity, what)[:12]}). Load the base {trained['name']!r}."
        )


def resolve(source: str | Path, store: Path = Path("adapters")) -> Path:
    """Returns the folder of an adapter named by folder, `domain` (active) or `domain@version`.

    A name that fits a domain of the store means that domain, even where a folder of the same
    name lies in the working directory; `./name` means the folder.

    Raises:
        AdapterError: there is no such adapter.
    """
    name, _, version = str(source).partition("@")
    named = isinstance(source, str) and DOMAIN_NAME.fullmatch(name) is not None
    if named and (Path(store) / name).is_dir():
        if version:
            return _existing(store, name, version)
        current = active(store, name)
        if current is None:
            raise AdapterError(f"no version of {name!r} in {store} is active. {_have(store, name)}")
        return Path(store) / name / current
    if _is_folder(Path(source)):
        return Path(source)
    known = domains(store)
    raise AdapterError(
        f"no adapter {str(source)!r}: neither a folder nor a domain of the store {store}"
        f"{did_you_mean(name, known)}. Domains there: {', '.join(known) or 'none'}. "
        "Name another store with --store, or make an adapter with peftrank train."
    )


def domains(store: Path) -> tuple[str, ...]:
    """Returns the domains that have a version in the store, sorted."""
    found = sorted(p.name for p in Path(store).glob("*") if DOMAIN_NAME.fullmatch(p.name))
    return tuple(name for name in found if versions(store, name))


def versions(store: Path, domain: str) -> tuple[str, ...]:
    """Returns the published versions of a domain, oldest first."""
    home = Path(store) / check_domain(domain)
    if not home.is_dir():
        return ()
    found = (p.name for p in home.iterdir() if p.is_dir() and not p.is_symlink())
    return tuple(sorted(filter(_VERSION.fullmatch, found), key=int))


def active(store: Path, domain: str) -> str | None:
    """Returns the version in use, None if none was ever activated.

    Raises:
        AdapterError: ACTIVE names no existing version.
    """
    path = Path(store) / check_domain(domain) / _ACTIVE
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise AdapterError(f"{path} is no regular file; expected one that names a version")
        with path.open(encoding="utf-8") as file:
            version = file.read(_LONGEST).strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    return _existing(store, domain, version).name


def activate(store: Path, domain: str, version: str) -> None:
    """Puts an existing version into use (also an older one), atomically.

    Raises:
        AdapterError: no such version, or the disk refuses.
    """
    _put_into_use(_existing(store, domain, version))


def check_domain(name: str) -> str:
    """Returns the name; raises AdapterError unless it can name a domain."""
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
        raise AdapterError(
            f"{name!r} is not a domain name; expected {DOMAIN_NAME.pattern}: lower-case letters, "
            "digits, - and _, at most 64, a letter first"
        )
    return name


def describe(path: Path) -> dict[str, Any]:
    """Returns what a person wants to know about an adapter folder, JSON-able; verifies it."""
    files = load_adapter(path)
    ranks = adapter_ranks(files.peft_config, files.tensors)
    kept = ("domain", "created", "method", "readout", "base", "metrics", "data", "versions", "hub")
    return {
        "path": str(path),
        **{key: files.manifest[key] for key in kept if key in files.manifest},
        "peft_type": files.peft_config["peft_type"],
        "parameters": sum(t.numel() for t in files.tensors.values()),
        "readout_parameters": sum(t.numel() for t in files.readout.values()),
        "bytes": sum(entry["bytes"] for entry in files.manifest["files"].values()),
        **({"ranks": ranks} if ranks else {}),
    }


def diff(path_a: Path, path_b: Path) -> dict[str, Any]:
    """Returns what differs between two adapters, JSON-able.

    `config` holds `{dotted key: [a, b]}`. `modules` holds, per module path (or tensor name, for
    adapters other than LoRA and for the readout), the Frobenius norms of a, of b and of a - b;
    for LoRA these are the norms of the weight update scale * B @ A.
    """
    a, b = load_adapter(path_a), load_adapter(path_b)
    flat_a, flat_b = ({**_flat(_settings(f))} for f in (a, b))
    config = {
        key: [flat_a.get(key), flat_b.get(key)]
        for key in sorted({*flat_a, *flat_b})
        if flat_a.get(key) != flat_b.get(key)
    }
    updates_a, updates_b = _updates(a), _updates(b)
    modules = {
        name: _norms(updates_a.get(name), updates_b.get(name))
        for name in sorted({*updates_a, *updates_b})
    }
    return {"config": config, "modules": modules}


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name longer than names may be
        return False


def _have(store: Path, domain: str) -> str:
    return f"Versions: {', '.join(versions(store, domain)) or 'none'}."


def _existing(store: Path, domain: str, version: str) -> Path:
    check_domain(domain)
    if version not in versions(store, domain):
        raise AdapterError(
            f"{domain!r} has no version {version!r} in {store}. {_have(store, domain)}"
        )
    return Path(store) / domain / version


def _next_version(home: Path) -> Path:
    numbers = [int(p.name) for p in home.iterdir() if _VERSION.fullmatch(p.name)]
    return home / f"{max(numbers, default=0) + 1:04d}"


def _put_into_use(path: Path) -> None:
    target = path.parent / _ACTIVE
    try:
        write_bytes(target, f"{path.name}\n".encode())
    except OSError as error:
        raise AdapterError(
            f"cannot write {target}: {error.strerror}. The active version is what it was."
        ) from error


def _settings(files: AdapterFiles) -> dict[str, Any]:
    kept = ("method", "prompt", "readout", "base", "config", "data")
    return {"adapter_config": files.peft_config, **{key: files.manifest[key] for key in kept}}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


_Update = tuple[Tensor, Tensor | None]
"""A weight, None; or the factors left (outputs, r) and right (r, inputs) of one, float64."""


def _updates(files: AdapterFiles) -> dict[str, _Update]:
    plain = {f"readout.{name}": tensor for name, tensor in files.readout.items()}
    factors: dict[str, _Update] = {}
    if files.peft_config["peft_type"] == "LORA":
        layers = lora_layers(files.peft_config, files.tensors)
        for path, layer in layers.items():
            factors[path] = layer.scale * layer.b.double(), layer.a.double()
    else:
        plain |= files.tensors
    return factors | {name: (tensor.double(), None) for name, tensor in plain.items()}


def _norms(a: _Update | None, b: _Update | None) -> dict[str, float | None]:
    comparable = a is not None and b is not None and _shape(a) == _shape(b)
    return {
        "a": None if a is None else _norm(a),
        "b": None if b is None else _norm(b),
        "difference": _norm(_difference(a, b)) if comparable else None,  # type: ignore[arg-type]
    }


def _shape(update: _Update) -> tuple[int, ...]:
    left, right = update
    return tuple(left.shape) if right is None else (left.shape[0], right.shape[1])


def _norm(update: _Update) -> float:
    """Returns the Frobenius norm; of factors, without their product, which may be huge."""
    left, right = update
    if right is not None:
        # |Q R S' P'| = |R S'| for orthonormal Q and P.
        left = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return float(torch.linalg.vector_norm(left))


def _difference(a: _Update, b: _Update) -> _Update:
    if a[1] is None or b[1] is None:
        return a[0] - b[0], None
    if torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]):
        return torch.zeros(1), None  # exactly, not but for rounding
    return torch.cat((a[0], -b[0]), 1), torch.cat((a[1], b[1]), 0)

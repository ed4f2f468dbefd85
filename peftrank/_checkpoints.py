"""Where a base's files come from: path, alias, installed package or Hub; and the cache of them.

Only `base` uses this. It knows files and folders, not how a model is run. A GGUF file is converted
once into `<cache>/converted/`; quantized weights are kept in `<cache>/quantized/`. Cache folders
are written beside their place and renamed into it, so a reader sees a whole folder or none, and
two processes may write the same one at once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from peftrank.errors import BaseModelError, ConfigError
from peftrank.files import publish_folder, temporary_folder
from peftrank.plugins import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TABLE = Path(__file__).with_name("bases.yaml")
_CACHE_VARIABLE = "PEFTRANK_CACHE"
_SAMPLES = 64
_PROBE = "Rank 1995's\n\n12  items:\tnaïve café, 東京 (PEFT)!"
_AGAIN = "Copy or download the base again."
_READ_BY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json`, safetensors weights and a tokenizer, and what it is."""

    folder: Path
    model_id: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class _Alias:
    name: str
    hub: str
    revision: str
    package: str
    module: str
    path: str
    install: str


def find_checkpoint(name: str, revision: str | None, cache_dir: Path | None) -> Checkpoint:
    """Returns the files of a base, converting or downloading them if they are not here yet.

    Order: a local path; for an alias the installed package (through its converted form) unless a
    revision is asked for, then the Hub; for anything else the Hub.

    Raises:
        BaseModelError: nothing found, or what was found has no safetensors weights.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        key = f"{path.stem}-{_file_hash(path)[:16]}"
        return _converted(path, key, str(path), cache_root(cache_dir))
    if (path / "config.json").is_file():
        return _from_folder(path, str(path), None)
    alias = aliases().get(name)
    if alias is not None and revision is None:
        packaged = _from_package(alias, cache_root(cache_dir))
        if packaged is not None:
            return packaged
    if alias is not None:
        return _from_hub(alias.hub, revision or alias.revision, _ways_out(alias))
    _check_hub_id(name, path)
    return _from_hub(name, revision, "Give a folder that holds it, or go online once to fetch it.")


def config_source(name: str) -> str:
    """Returns what transformers finds a base's config by: a folder here, or an id on the Hub.

    Unlike `find_checkpoint` it downloads nothing.
    """
    alias = aliases().get(name)
    packaged = alias is not None and importlib.util.find_spec(alias.module) is not None
    if packaged or Path(name).expanduser().exists():
        return str(find_checkpoint(name, None, None).folder)
    return alias.hub if alias is not None else name


@cache
def aliases() -> Mapping[str, _Alias]:
    """Returns the table of `bases.yaml` by alias."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return {name: _Alias(name=name, **row) for name, row in table.items()}


def cache_root(cache_dir: Path | None = None) -> Path:
    """Returns the cache folder: the argument, else $PEFTRANK_CACHE, else ~/.cache/peftrank."""
    if cache_dir is not None:
        return cache_dir
    return Path(os.environ.get(_CACHE_VARIABLE) or "~/.cache/peftrank").expanduser()


def publish(folder: Path, write: Callable[[Path], None]) -> Path:
    """Makes `folder` appear at once with what `write` puts in it; keeps one that is there.

    Args:
        folder: The place in the cache.
        write: Fills the empty folder it is given.

    Raises:
        BaseModelError: the cache cannot be written.
    """
    try:
        with temporary_folder(folder.parent) as temporary:
            write(temporary)
            publish_folder(temporary, folder)  # or another process did, with the same content
    except OSError as error:
        raise BaseModelError(
            f"cannot write {folder}: {error}. Free some space, or set ${_CACHE_VARIABLE} to a "
            "folder that can be written."
        ) from error
    return folder


def weights_fingerprint(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a sha256 that tells one set of weights from another without reading all of them.

    It covers the config values that decide how weights are read, and of each tensor the name,
    the shape and 64 evenly spaced values as float32. So it does not depend on quantization, on
    the compute dtype or on the way files are split; it is no guard against tampering.
    """
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _READ_BY]).encode())
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns the fingerprint of a model in memory; that of its file if it was not changed."""
    tied = model.config.tie_word_embeddings
    named = sorted(model.state_dict().items())
    stored = ((n, t) for n, t in named if not (tied and n.endswith("lm_head.weight")))
    return weights_fingerprint(model.config.to_dict(), stored)


def stamp(folder: Path) -> str:
    """Returns a hash that changes whenever a checkpoint's config or weight files do.

    It covers the config's content and the weight files' names, sizes and times.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        about = path.stat()
        digest.update(f"{path.name}:{about.st_size}:{about.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a checkpoint's JSON file.

    Raises:
        BaseModelError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read: {error}. {_AGAIN}") from error
    if not isinstance(values, dict):
        raise BaseModelError(f"{path} must hold a JSON object. {_AGAIN}")
    return values


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns a checkpoint's tokenizer.

    Raises:
        BaseModelError: there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = str(error).strip().partition("\n")[0]
        raise BaseModelError(f"cannot load the tokenizer in {folder}: {reason} {_AGAIN}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a sha256 over vocabulary, special tokens, chat template and a tokenized probe."""
    parts = (
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.encode(_PROBE),
    )
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides transformers' progress bars and reports; what matters in them is checked here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _from_folder(folder: Path, model_id: str, revision: str | None) -> Checkpoint:
    config = read_json(folder / "config.json")
    fingerprint = weights_fingerprint(config, _stored_tensors(folder))
    return Checkpoint(folder, model_id, revision, fingerprint)


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, memory-mapped: what is not used is not read.

    Raises:
        BaseModelError: it has no safetensors weights, or they are damaged.
    """
    return dict(_stored_tensors(folder))


def _stored_tensors(folder: Path) -> Iterable[tuple[str, Tensor]]:
    """Yields (name, memory-mapped tensor) sorted by name; only touched pages are read."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index)["weight_map"]
        files = sorted(set(places.values()))
    else:
        files = ["model.safetensors"]
    if not all((folder / file).is_file() for file in files):
        raise BaseModelError(
            f"{folder} has no {files[0]}: only safetensors weights are loaded, because other "
            "formats can run code. Convert it with save_pretrained(safe_serialization=True)."
        )
    try:
        handles: list[Any] = [safe_open(folder / file, framework="pt") for file in files]
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"the weights in {folder} are damaged: {error}. {_AGAIN}") from error
    where = {name: handle for handle in handles for name in handle.keys()}
    return ((name, where[name].get_tensor(name)) for name in sorted(where))


def _from_package(alias: _Alias, root: Path) -> Checkpoint | None:
    """Returns the checkpoint carried by the alias's package, None if that is not installed."""
    spec = importlib.util.find_spec(alias.module)  # finds the files without running the package
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / alias.path
    version = importlib.metadata.version(alias.package)
    if not source.exists():
        raise BaseModelError(
            f"package {alias.package} {version} has no {alias.path}, which base {alias.name!r} "
            f"needs. Reinstall it ({alias.install}) or give a folder or the Hub id {alias.hub!r}."
        )
    if source.is_dir():
        return _from_folder(source, alias.hub, None)
    return _converted(source, f"{alias.package}-{version}", alias.hub, root)


def _from_hub(repo: str, revision: str | None, ways_out: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        wanted = repo if revision is None else f"{repo} at {revision}"
        raise BaseModelError(f"cannot get {wanted} from the Hub: {reason} {ways_out}") from error
    if not (Path(folder) / "config.json").is_file():
        raise BaseModelError(f"{repo} on the Hub has no config.json, so it is not a model.")
    return _from_folder(Path(folder), repo, Path(folder).name)


def _check_hub_id(name: str, path: Path) -> None:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if looks_like_path:
        state = "has no config.json" if path.is_dir() else "is not a model folder or .gguf file"
        raise BaseModelError(f"base {name!r} {state}. Give the folder that holds config.json.")
    if "/" not in name:
        raise BaseModelError(
            f"unknown base {name!r}{did_you_mean(name, aliases())}. Give an alias "
            f"({', '.join(aliases())}), a local folder, or a Hub id (owner/name)."
        )


def _ways_out(alias: _Alias) -> str:
    return (
        f"Base {alias.name!r} is neither installed nor downloaded. Ways out: {alias.install}; or "
        f"go online once to fetch {alias.hub!r}; or give a local folder that holds the model."
    )


def _converted(source: Path, key: str, model_id: str, root: Path) -> Checkpoint:
    folder = root / "converted" / key
    if not (folder / "source.json").is_file():
        publish(folder, lambda target: _convert(source, target, model_id))
    about = read_json(folder / "source.json")
    return Checkpoint(folder, model_id, None, about["fingerprint"])


def _convert(source: Path, target: Path, model_id: str) -> None:
    """Writes a GGUF file's model and tokenizer as float32 safetensors, and checks a reload."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f'reading {source.name} needs gguf: pip install "peftrank[gguf]".')
    at = {"gguf_file": source.name, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **at)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **at)
    _restore_digits(tokenizer, source)
    # Under the tied head's name alone, a reload into the inner model has random embeddings.
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name.endswith("lm_head.weight"))
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check_reload(model, target)
    fingerprint = weights_fingerprint(model.config.to_dict(), _stored_tensors(target))
    about = {"source": model_id, "sha256": _file_hash(source), "fingerprint": fingerprint}
    (target / "source.json").write_text(json.dumps(about, indent=2), encoding="utf-8")


def _restore_digits(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Puts back the digit splitting of SmolLM tokenizers, which transformers drops from a GGUF."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(source).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def _check_reload(model: torch.nn.Module, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    tokens = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        equal = torch.equal(model(tokens).logits, again(tokens).logits)
    if not equal:
        raise BaseModelError(f"the conversion written to {folder} does not reload to equal logits.")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_message(logger: str, beginning: str) -> None:
    logging.getLogger(logger).addFilter(lambda r: not str(r.msg).startswith(beginning))


# The optional `kernels` package only speeds up a path that is not used here.
_drop_message("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
# int8 says in each layer of each forward that it computes in float16.
_drop_message("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast")

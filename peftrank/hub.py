"""Adapters on the Hugging Face Hub: publish one, fetch one and check it before it is used.

`huggingface_hub` is the client, with its settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE,
HF_HUB_OFFLINE). A download is pinned to the commit that its revision meant when it began. What is
fetched comes from a stranger: names and sizes are checked before, all else after the download, and
nothing is executed. Knows no base and no model.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The base of every error of the HTTP library beneath: httpx or httpx2, by the client's version.
from huggingface_hub.errors import HTTPError as _HTTPError  # type: ignore[attr-defined]

from peftrank import __version__, _folder, store
from peftrank.card import HUB_ID, adapter_card, card_license
from peftrank.errors import AdapterError, ConfigError
from peftrank.files import write_bytes
from peftrank.peft_files import adapter_ranks
from peftrank.store import AdapterFiles

NAMES = (*_folder.HASHED, _folder.MANIFEST)
"""The files of an adapter's repository."""
MAX_BYTES = 2**30
"""The largest adapter that is fetched unless another limit is given."""

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_TOKEN = re.compile(r"\bhf_\w+|(?<=Bearer )\S+")
_RESET = re.compile(r";\s*t=(\d+)")  # in RateLimit, which the Hub sends: "api";r=0;t=55
_HUB_FILES = (".gitattributes",)  # the Hub puts it into every new repository
_MAX_TEXT_BYTES = 10 * 2**20
_TIMEOUT_SECONDS = 30.0
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubAdapter:
    """A fetched and checked adapter."""

    repo: str
    commit: str
    """The commit it was downloaded at, 40 hexadecimal digits."""
    files: AdapterFiles
    card: str
    """The text of its README.md."""


def is_hub_name(source: str | Path) -> bool:
    """Returns whether it has the form `user/repo` or `user/repo@revision`."""
    return isinstance(source, str) and ".." not in source and _NAME.fullmatch(source) is not None


def prepare(folder: Path, repo: str, *, license: str | None = None) -> dict[str, bytes]:
    """Returns the files that publish an adapter, by name: its own, with the card made anew.

    What is only this machine's is left out: the path of a local base, and where the adapter was
    pulled from. Contacts nothing.

    Args:
        folder: The adapter; it is verified first.
        repo: `user/repo`, which the card says how to load.
        license: The Hub's identifier of a licence; absent: the one the card names.

    Raises:
        AdapterError: the adapter is damaged.
        ConfigError: `repo` is no repository's name, or there is no licence.
    """
    _check_repo(repo)
    files = _public(store.load_adapter(folder))
    license = license or card_license((folder / "README.md").read_text("utf-8", "replace"))
    if license is None or not _LICENSE.fullmatch(license):
        given = "no licence is given" if license is None else f"{license!r} names no licence"
        raise ConfigError(
            f"{given}, and nobody may use what has none. Choose one that the licences of the base "
            "and of the training data allow: --license apache-2.0, mit, cc-by-nc-4.0, other, ... "
            "(identifiers: https://huggingface.co/docs/hub/repositories-licenses)"
        )
    card = adapter_card(
        files.manifest,
        license=license,
        source=repo,
        peft_config=files.peft_config,
        ranks=adapter_ranks(files.peft_config, files.tensors),
    )
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        _folder.write(made, files.manifest["domain"], files, card)
        _folder.check_same(_folder.read(made), files)
        return {name: (made / name).read_bytes() for name in NAMES}


def push(
    files: Mapping[str, bytes],
    repo: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads what `prepare` returned as one commit and returns the commit's URL.

    The repository and the branch are made if they do not exist.

    Raises:
        ConfigError: `repo` is no repository's name.
        AdapterError: the Hub refuses or cannot be reached, the repository holds anything but an
            adapter, or it is public and `private` is asked for. Nothing is committed then.
    """
    _check_repo(repo)
    api = _api()
    with _explained(repo, branch, "write to"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        there = api.model_info(repo, revision=branch, timeout=_TIMEOUT_SECONDS)
    if private and there.private is False:
        raise AdapterError(
            f"{repo} is public, and --private is for a repository that is made now. Make it "
            f"private at {constants.ENDPOINT}/{repo}/settings, or choose another name."
        )
    if others := _unexpected(file.rfilename for file in there.siblings or ()):
        raise AdapterError(
            f"{repo} holds other files ({others}), so it is no adapter's repository. Nothing was "
            "uploaded. Choose a new repository, or delete those files on the Hub."
        )
    with _explained(repo, branch, "write to"):
        done = api.create_commit(
            repo,
            operations=[CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=message or f"PeftRank {__version__} adapter",
            revision=branch,
            parent_commit=there.sha,
        )
    return done.commit_url


def fetch(name: str, *, max_bytes: int = MAX_BYTES, allow_code: bool = False) -> HubAdapter:
    """Downloads an adapter into the Hub's cache, or finds it there, and returns it checked.

    With HF_HUB_OFFLINE set, only the cache is looked at.

    Args:
        name: `user/repo`, or `user/repo@revision` with a branch, tag or commit.
        max_bytes: Of all its files together; looked at before anything is downloaded.
        allow_code: Let the adapter name a readout or method `package.module:object`.

    Raises:
        ConfigError: `name` has another form.
        AdapterError: it cannot be had, is too large, or is no sound PeftRank adapter.
    """
    repo, revision = _split(name)
    offline = constants.HF_HUB_OFFLINE
    folder = _cached(repo, revision) if offline else _downloaded(repo, revision, max_bytes)
    where = f"{repo}@{folder.name[:12]}"
    files, card = _read(folder, where, max_bytes)
    _check_manifest(where, files.manifest, allow_code)
    return HubAdapter(repo, folder.name, files, card)


def pull(
    name: str,
    into: Path,
    *,
    domain: str | None = None,
    activate: bool = True,
    max_bytes: int = MAX_BYTES,
    allow_code: bool = False,
) -> Path:
    """Fetches an adapter into a store as a domain's next version and returns its folder.

    Its `peftrank.json` records the repository and the commit under `hub`.

    Args:
        name: See `fetch`.
        into: The store.
        domain: The domain to keep it under; absent: the one it was trained for.
        activate: Put it into use.
        max_bytes: See `fetch`.
        allow_code: See `fetch`.

    Raises:
        ConfigError: `name` has another form.
        AdapterError: see `fetch`; or it is to replace an active adapter of another base. The
            store is then as it was.
    """
    got = fetch(name, max_bytes=max_bytes, allow_code=allow_code)
    home = store.check_domain(got.files.manifest["domain"] if domain is None else domain)
    if activate:
        _check_replaces(got, into, home)
    manifest = {**got.files.manifest, "hub": {"repo": got.repo, "commit": got.commit}}
    files = replace(got.files, manifest=manifest)
    return store.save_adapter(into, home, files, card=got.card, activate=activate)


def _api() -> HfApi:
    return HfApi(library_name="peftrank", library_version=__version__)


def _split(name: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name) if is_hub_name(name) else None
    if match is None:
        raise ConfigError(
            f"{name!r} names nothing on the Hub: give USER/REPO or USER/REPO@REVISION"
        )
    return match[1], match[2]


def _check_repo(repo: str) -> None:
    if not is_hub_name(repo) or "@" in repo:
        raise ConfigError(f"{repo!r} names no repository on the Hub: give USER/REPO")


def _public(files: AdapterFiles) -> AdapterFiles:
    base = files.manifest["base"]
    manifest = {key: value for key, value in files.manifest.items() if key != "hub"}
    named = base.get("model_id")
    if isinstance(named, str) and HUB_ID.fullmatch(named) and not Path(named).exists():
        return replace(files, manifest=manifest)
    name = Path(base["name"]).name
    manifest["base"] = {**base, "name": name, "model_id": None}
    if isinstance(manifest["config"].get("base"), dict):
        manifest["config"] = {
            **manifest["config"],
            "base": {**manifest["config"]["base"], "name": name},
        }
    peft_config = {**files.peft_config, "base_model_name_or_path": None}
    return replace(files, manifest=manifest, peft_config=peft_config)


def _downloaded(repo: str, revision: str | None, max_bytes: int) -> Path:
    with _explained(repo, revision, "read"):
        info = _api().model_info(
            repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
        )
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise AdapterError(f"{constants.ENDPOINT} named no commit of {repo}; is it a Hub?")
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    _check_files(f"{repo}@{commit[:12]}", sizes, max_bytes)
    with _explained(repo, revision, "read"):
        folder = Path(
            snapshot_download(
                repo,
                revision=commit,
                allow_patterns=list(NAMES),
                library_name="peftrank",
                library_version=__version__,
            )
        )
    if revision != commit:
        # The client notes in its cache what a branch meant only when it looks the branch up itself,
        # and by now that may be another commit. Offline, the branch then means this one.
        with contextlib.suppress(OSError):
            write_bytes(folder.parents[1] / "refs" / (revision or "main"), commit.encode())
    return folder


def _cached(repo: str, revision: str | None) -> Path:
    with _explained(repo, revision, "read"):
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(NAMES), local_files_only=True
            )
        )


def _read(folder: Path, where: str, max_bytes: int) -> tuple[AdapterFiles, str]:
    """Returns the adapter and the card in a snapshot of the cache, where files are links."""
    _check_files(where, _sizes_in(folder, where), max_bytes)
    with tempfile.TemporaryDirectory() as temporary:
        for name in NAMES:
            shutil.copyfile(folder / name, Path(temporary) / name)
        try:
            files = _folder.read(Path(temporary))
        except AdapterError as error:
            reason = re.sub(re.escape(temporary) + r"[/\\:]?\s?", "", str(error))
            raise AdapterError(
                f"{where} is refused: {reason} If only the copy on this machine is damaged, delete "
                f"{folder.parents[1]} and try again."
            ) from None
        return files, (Path(temporary) / "README.md").read_text("utf-8", "replace")


def _sizes_in(folder: Path, where: str) -> dict[str, int | None]:
    cache = folder.parents[2].resolve()
    sizes: dict[str, int | None] = {}
    for entry in folder.iterdir():
        target = entry.resolve()
        if not target.is_relative_to(cache) or not target.is_file():
            raise AdapterError(
                f"{where}: {entry.name!r} in {folder} is a folder, or a link that leads out of the "
                f"Hub's cache; both are refused. Delete {folder.parents[1]} and try again."
            )
        sizes[entry.name] = target.stat().st_size
    return sizes


def _check_files(where: str, sizes: Mapping[str, int | None], max_bytes: int) -> None:
    """Raises AdapterError unless these files of these sizes (None: unknown) can be an adapter."""
    if missing := [name for name in NAMES if name not in sizes]:
        raise AdapterError(
            f"{where} is no PeftRank adapter: {', '.join(missing)} missing. Expected a repository "
            "that `peftrank adapters push` made."
        )
    if others := _unexpected(sizes):
        raise AdapterError(
            f"{where} is refused: unexpected {others}. An adapter's repository holds only "
            f"{', '.join(NAMES)}; other kinds of file can run code when loaded."
        )
    known = {name: -1 if sizes[name] is None else int(sizes[name] or 0) for name in NAMES}
    if unknown := [name for name, size in known.items() if size < 0]:
        raise AdapterError(f"{where}: the Hub does not say how large {', '.join(unknown)} are")
    for name, size in known.items():
        if not name.endswith(".safetensors") and size > _MAX_TEXT_BYTES:
            raise AdapterError(
                f"{where} is refused: {name} has {size:,} bytes; at most {_MAX_TEXT_BYTES:,} are "
                "expected of text"
            )
    if (total := sum(known.values())) > max_bytes:
        raise AdapterError(
            f"{where} has {total:,} bytes, more than the limit of {max_bytes:,}. If that is what "
            "you want, raise it: peftrank adapters pull --max-bytes"
        )


def _unexpected(names: Iterator[str] | Mapping[str, object]) -> str:
    others = sorted(repr(name) for name in names if name not in (*NAMES, *_HUB_FILES))
    return ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")


def _check_manifest(where: str, manifest: Mapping[str, Any], allow_code: bool) -> None:
    for key in ("method", "readout", "base"):
        name = manifest[key]["name"]
        if not name.isprintable():
            raise AdapterError(f"{where} is refused: {key}.name holds control characters: {name!r}")
    for key in ("method", "readout"):
        if ":" in manifest[key]["name"] and not allow_code:
            raise AdapterError(
                f"{where} is refused: its {key} is {manifest[key]['name']!r}, code outside "
                "PeftRank. If you trust it, allow it: --allow-code, or allow_code=True."
            )


def _check_replaces(got: HubAdapter, into: Path, domain: str) -> None:
    current = store.active(into, domain)
    if current is None:
        return
    now = store.describe(into / domain / current)["base"]
    new = got.files.manifest["base"]
    if (now["fingerprint"], now["tokenizer_hash"]) != (new["fingerprint"], new["tokenizer_hash"]):
        raise AdapterError(
            f"{got.repo}@{got.commit[:12]} was trained on base {new['name']!r} (fingerprint "
            f"{new['fingerprint'][:12]}), the active {domain}@{current} on {now['name']!r} "
            f"({now['fingerprint'][:12]}). Keep it beside it: --domain NAME or --no-activate."
        )


@contextlib.contextmanager
def _explained(repo: str, revision: str | None, act: str) -> Iterator[None]:
    """Turns the client's errors into an AdapterError that says what to do."""
    try:
        yield
    except (_HTTPError, OSError, ValueError, RuntimeError, KeyError) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        # The client wraps what the server said, or did not say, into errors of its own.
        first = next((e for e in chain if isinstance(e, _HTTPError | OfflineModeIsEnabled)), error)
        raise AdapterError(_TOKEN.sub("***", _reason(first, repo, revision, act))) from error


def _reason(error: BaseException, repo: str, revision: str | None, act: str) -> str:
    asked = repo if revision is None else f"{repo}@{revision}"
    if constants.HF_HUB_OFFLINE:
        if act == "write to":
            return f"cannot {act} {repo}: HF_HUB_OFFLINE is set. Unset it to use the network."
        return (
            f"{asked} is no folder here and not in the Hub's cache ({constants.HF_HUB_CACHE}), and "
            "HF_HUB_OFFLINE is set. Unset it to download it."
        )
    if isinstance(error, HfHubHTTPError):
        said = " ".join((error.server_message or "").split())
        said = "".join(c for c in said if c.isprintable())
        quoted = f" The Hub says: {said[:200]}" if said else ""
        return _answered(error, repo, revision, act) + quoted
    if isinstance(error, _HTTPError):
        way_out = ", or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        return (
            f"cannot {act} {asked}: no complete answer from {constants.ENDPOINT} "
            f"({type(error).__name__}). Try again later{way_out if act == 'read' else ''}."
        )
    what = str(error).strip().splitlines() or [type(error).__name__]
    return f"cannot {act} {asked}: {what[0]}"


def _answered(error: HfHubHTTPError, repo: str, revision: str | None, act: str) -> str:
    status, address = error.response.status_code, f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated. Ask for access at {address}, then {_LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision or 'main'!r}. See {address}/commits/main."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"there is no {address} (nor a folder {repo!r} here), or it is private and you may not "
            f"see it. Check the name; if it is private, {_LOGIN}."
        )
    if status == 401:
        return f"cannot {act} {repo}: the Hub does not know you (401). To do so, {_LOGIN}."
    if status == 403:
        return (
            f"cannot {act} {repo}: your token may not (403). Make one that may at "
            f"{constants.ENDPOINT}/settings/tokens, then {_LOGIN}."
        )
    if status == 412:
        return f"{repo} was changed meanwhile. Nothing was committed; try again."
    if status == 429:
        headers = error.response.headers
        wait = headers.get("Retry-After") or "".join(_RESET.findall(headers.get("RateLimit", "")))
        when = f"in {wait} seconds" if wait.isdigit() else "later"
        return f"cannot {act} {repo}: too many requests (429). Try again {when}."
    if status >= 500:
        return f"cannot {act} {repo}: the Hub has a fault ({status}). Try again later."
    return f"cannot {act} {repo}: the Hub answered {status}."

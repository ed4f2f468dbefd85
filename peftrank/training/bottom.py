"""The layers below the lowest adapter, computed once for each slate: what enters it is kept.

With adapters in the top layers alone (`method.layers: top-10`), what leaves the layers below
depends on the tokens alone, so epochs, evaluations, methods and trials can share it. It is kept by
segment of the prompt trees, each path once, so that a row of any packing is put together from it.
Only a marker's states depend on more than its path: on the other markers of its slate.

Which slates are computed in one pass is decided by the list of slates alone. A pass decides how its
results are rounded; so they are the same whichever batch asks first, and after a resume. Kept in
memory, they live as long as the `Base` object. On the disk they lie in the cache folder, each
pass's in a safetensors file that appears by one rename and is checked before it is used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftrank._checkpoints import cache_root
from peftrank.base import Base
from peftrank.errors import BaseModelError, ConfigError
from peftrank.files import write_bytes
from peftrank.model import Entering, move, states_below
from peftrank.prompts import pack
from peftrank.types import Batch, PromptTree

GROUP_TOKENS = 2048
"""Distinct tokens of the slates that are computed in one pass; a larger slate is a pass alone."""
_FORMAT = 1
_LIBRARIES = ("torch", "transformers", "bitsandbytes")
_MIB = 2**20

_NodeKey = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A segment's parent node and tokens; of one of several markers, the parents of all of them too."""
_Groups = dict[int, Tensor]
_memory: WeakKeyDictionary[Base, OrderedDict[str, tuple[int, _Groups]]] = WeakKeyDictionary()
"""By base and key, longest unused first: the bytes promised, and what is computed so far."""


class Bottom:
    """What enters block `layer` of a base, for the trees of one part; computed when asked for."""

    def __init__(self, base: Base, layer: int, trees: Sequence[PromptTree]):
        """Decides what is computed together; computes nothing yet.

        Args:
            base: It may have adapters from block `layer` on.
            layer: At least 1.
            trees: In the order of their file, so that one user's are neighbours.
        """
        self.base, self.layer = base, layer
        self._trees = list(trees)
        self._nodes: dict[_NodeKey, int] = {}
        self._places: list[tuple[int, int]] = []
        """By node: the group that it belongs to, the first that needs it, and its place there."""
        self._groups: list[list[int]] = []
        """Which trees are computed together."""
        self._sizes: list[int] = []
        """Tokens of the nodes that belong to each group."""
        self._divide()
        self._kept: _Groups = {}
        self._folder: Path | None = None
        self._checked: dict[int, tuple[int, int, int]] = {}
        """Files that were found whole: their inode, size and time."""

    @property
    def nbytes(self) -> int:
        """Bytes of all states, those that are not computed yet included."""
        return sum(self._sizes) * self.base.hidden_size * self.base.compute_dtype.itemsize

    def key(self, base_key: str) -> str:
        """Returns a hash of the trees, their division, and of `base_key`."""
        digest = hashlib.sha256(f"{base_key}/{_FORMAT}/{self.layer}/{GROUP_TOKENS}".encode())
        for tree in self._trees:
            digest.update(f"{len(tree.segments)} segments, markers {tree.markers}".encode())
            for segment in tree.segments:
                held = array("q", (segment.parent, len(segment.tokens), *segment.tokens))
                digest.update(held.tobytes())
        return digest.hexdigest()

    def keep(self, place: _Groups | Path) -> None:
        """Uses and fills `place`: a dictionary, or a folder of files."""
        if isinstance(place, Path):
            self._folder, self._kept = place, {}
        else:
            self._folder, self._kept = None, place

    def entering(self, batch: Batch) -> Entering:
        """Returns the states of a batch, on the base's device; 0 at padding.

        Args:
            batch: Any of the trees, packed in any way.

        Raises:
            BaseModelError: the disk refuses.
        """
        shape = (*batch.input_ids.shape, self.base.hidden_size)
        states = torch.zeros(shape, dtype=self.base.compute_dtype)
        found = list(self._segments(batch))
        needed = sorted({self._places[node][0] for _, _, _, node in found})
        groups = {group: self._group(group) for group in needed}
        for row, start, length, node in found:
            group, first = self._places[node]
            states[row, start : start + length] = groups[group][first : first + length]
        return Entering(self.layer, states.to(self.base.device, non_blocking=True))

    def _divide(self) -> None:
        held: set[int] = set()
        used = GROUP_TOKENS
        for index, tree in enumerate(self._trees):
            known = len(self._nodes)
            sizes = self._add(tree)
            grown = sum(size for node, size in sizes.items() if node not in held)
            if not self._groups or used + grown > GROUP_TOKENS:
                self._groups.append([])
                self._sizes.append(0)
                held, used, grown = set(), 0, sum(sizes.values())
            self._groups[-1].append(index)
            held.update(sizes)
            used += grown
            for node in range(known, len(self._nodes)):
                self._places.append((len(self._groups) - 1, self._sizes[-1]))
                self._sizes[-1] += sizes[node]

    def _add(self, tree: PromptTree) -> dict[int, int]:
        """Returns the tokens of each of the tree's nodes, new ones added in order."""
        nodes: list[int] = []
        markers = set(tree.markers)
        for index, segment in enumerate(tree.segments):
            parent = -1 if segment.parent < 0 else nodes[segment.parent]
            nodes.append(-1 if index in markers else self._node(parent, segment.tokens))
        parents = [nodes[tree.segments[marker].parent] for marker in tree.markers]
        for marker, parent in zip(tree.markers, parents, strict=True):
            nodes[marker] = self._node(parent, tree.segments[marker].tokens, parents)
        return {n: len(s.tokens) for n, s in zip(nodes, tree.segments, strict=True)}

    def _node(self, parent: int, tokens: tuple[int, ...], markers: Sequence[int] = ()) -> int:
        """Returns a segment's node, a new one if there is none."""
        several = tuple(sorted(set(markers)))
        key = parent, tokens, several if len(several) > 1 else ()
        return self._nodes.setdefault(key, len(self._nodes))

    def _segments(self, batch: Batch) -> Iterator[tuple[int, int, int, int]]:
        """Yields (row, first token, tokens, node) of every segment of a batch."""
        tokens = batch.input_ids.tolist()
        segment_ids, sees = batch.segment_ids.cpu(), batch.ancestors.cpu().numpy()
        for row, ids in enumerate(segment_ids):
            lengths = torch.bincount(ids[ids >= 0]).tolist()
            starts = [0, *itertools.accumulate(lengths)]
            own = [tuple(tokens[row][a:b]) for a, b in itertools.pairwise(starts)]
            mutual = sees[row] & sees[row].T
            above = sees[row] & ~mutual
            parents = [path.nonzero()[0].max(initial=-1) for path in above[: len(own)]]
            nodes: list[int] = []
            for index, parent in enumerate(parents):
                alone = mutual[index].sum() == 1
                at = -1 if parent < 0 else nodes[parent]
                nodes.append(self._node(at, own[index]) if alone else -1)
            for index, parent in enumerate(parents):
                if nodes[index] < 0:
                    all_of_them = [nodes[parents[m]] for m in mutual[index].nonzero()[0]]
                    nodes[index] = self._node(nodes[parent], own[index], all_of_them)
                yield row, starts[index], lengths[index], nodes[index]

    def _group(self, group: int) -> Tensor:
        """Returns the states (tokens, H) of a group's nodes, on the CPU."""
        if self._folder is None:
            if group not in self._kept:
                self._kept[group] = self._computed(group)
            return self._kept[group]
        path = self._folder / f"{group}.safetensors"
        found = self._read(path, group)
        if found is None:
            found = self._computed(group)
            _write(path, found, group)
        return found

    @torch.no_grad()
    def _computed(self, group: int) -> Tensor:
        trees = [self._trees[index] for index in self._groups[group]]
        batch = pack(trees, pad_token_id=self.base.pad_token_id)
        states = states_below(self.base, move(batch, self.base.device), self.layer).cpu()
        made = torch.empty(self._sizes[group], self.base.hidden_size, dtype=states.dtype)
        done: set[int] = set()
        for row, start, length, node in self._segments(batch):
            owner, first = self._places[node]
            if owner == group and node not in done:  # a path may lie in several rows
                done.add(node)
                made[first : first + length] = states[row, start : start + length]
        return made

    def _read(self, path: Path, group: int) -> Tensor | None:
        """Returns a group from its file, memory-mapped; None if that is not there or damaged."""
        try:
            about = path.stat()
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("sha256")
                states: Tensor = file.get_tensor("states")
        except (OSError, SafetensorError):
            return None
        stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
        if self._checked.get(group) != stamp:
            if said != _sha256(path, states, group):
                return None
            self._checked[group] = stamp
        return states


def lowest_adapted(base: Base) -> int:
    """Returns the index of the first block with an adapter.

    Raises:
        ConfigError: it is the first of all, or something outside the blocks changes.
    """
    layer = base.constant_layers
    if layer == 0:
        raise ConfigError(
            "training.bottom_cache is on, but the adapter changes the first of the base's "
            f"{base.num_layers} layers, or what stands outside of them, so there is nothing "
            "constant to keep. Set method.layers: top-K, or training.bottom_cache: 'off'."
        )
    return layer


def bottoms(
    base: Base,
    parts: Mapping[str, Sequence[PromptTree]],
    *,
    where: Literal["memory", "disk"],
    limit: int,
) -> dict[str, Bottom]:
    """Returns what enters the lowest adapted block, by part.

    States of other slates or layers that are kept too make room, longest unused first.

    Args:
        base: With the adapter in it.
        parts: The trees of each part.
        where: memory: kept as long as `base`. disk: in the cache folder.
        limit: Bytes that may be kept in all: by this base, or in the folder.

    Raises:
        ConfigError: no layer is constant, or the states of these trees are more than `limit`.
        BaseModelError: the cache folder cannot be written.
    """
    layer = lowest_adapted(base)
    made = {name: Bottom(base, layer, trees) for name, trees in parts.items()}
    base_key = _base_key(base)
    keys = {name: bottom.key(base_key)[:32] for name, bottom in made.items()}
    sizes = {keys[name]: bottom.nbytes for name, bottom in made.items()}
    needed = sum(sizes.values())
    if needed > limit:
        raise ConfigError(
            f"training.bottom_cache={where} would keep {needed / _MIB:,.0f} MiB "
            f"({', '.join(f'{name}: {b.nbytes / _MIB:,.0f}' for name, b in made.items())}), and "
            f"training.bottom_cache_mib allows {limit / _MIB:,.0f}. Raise it, or set "
            "training.bottom_cache: 'off'."
        )
    if where == "memory":
        kept = _make_room(base, sizes, limit)
        for name, bottom in made.items():
            bottom.keep(kept[keys[name]][1])
        return made
    root = cache_root() / "bottom"
    try:
        _make_room_on_disk(root, sizes, limit)
    except OSError as error:
        raise _refused(root, error) from error
    for name, bottom in made.items():
        bottom.keep(root / keys[name])
    return made


def _make_room(
    base: Base, sizes: Mapping[str, int], limit: int
) -> OrderedDict[str, tuple[int, _Groups]]:
    kept = _memory.setdefault(base, OrderedDict())
    for key, size in sizes.items():
        kept[key] = kept.pop(key, (size, {}))  # now the last
    while sum(size for size, _ in kept.values()) > limit:
        kept.popitem(last=False)
    return kept


def _make_room_on_disk(root: Path, sizes: Mapping[str, int], limit: int) -> None:
    for key in sizes:
        folder = root / key
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    others = [folder for folder in root.iterdir() if folder.name not in sizes]
    held = {folder: (_used(folder), _bytes(folder)) for folder in others}
    excess = sum(sizes.values()) + sum(size for _, size in held.values()) - limit
    for folder in sorted(others, key=held.__getitem__):
        if excess <= 0:
            return
        # A training that uses it at this moment computes again what it misses.
        shutil.rmtree(folder, ignore_errors=True)
        excess -= held[folder][1]


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process makes room too
        return 0.0


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # another process has just renamed or removed it
            continue
    return total


def _base_key(base: Base) -> str:
    """Returns a text that changes with whatever else decides the states, to the last bit."""
    device = base.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    config = {k: v for k, v in base.model.config.to_dict().items() if k != "_name_or_path"}
    about = {
        "weights": base.state_hash(),
        "config": config,
        "quantization": base.identity.quantization,
        "compute_dtype": str(base.compute_dtype),
        "device": f"{device.type}, {name}",
        "matmul": torch.get_float32_matmul_precision(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    return json.dumps(about, sort_keys=True, default=str)


def _write(path: Path, states: Tensor, group: int) -> None:
    about = {"sha256": _sha256(path, states, group)}
    try:
        write_bytes(path, safetensors.torch.save({"states": states}, metadata=about))
    except OSError as error:
        raise _refused(path.parent, error) from error


def _sha256(path: Path, states: Tensor, group: int) -> str:
    """Returns the hash of a group's states and of what they are."""
    digest = hashlib.sha256(f"{path.parent.name}/{group}/{states.dtype}".encode())
    digest.update(states.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refused(folder: Path, error: OSError) -> BaseModelError:
    return BaseModelError(
        f"cannot write {folder}: {error}. Free some space, set $PEFTRANK_CACHE to a folder that "
        "can be written, or set training.bottom_cache to memory or 'off'."
    )

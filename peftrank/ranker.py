"""Ranker: slates in, ranked lists out, for many domains on one base.

The domain is an argument of each call, or of each slate; no call changes what another sees, so
threads may use one Ranker for different domains at once. An adapter brings its own prompt and
readout, so it cannot be paired with the wrong ones. A forward pass may mix domains and methods.

Adapters are kept in tiers: on the base's device, in host memory, and in the files they came from.
Each of the first two may be given a budget of bytes; what was used longest ago goes first and comes
back, checked again, when it is next asked for. Knows no training and no metrics.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from peftrank import hub, plugins, store
from peftrank._tier import Tier
from peftrank.bank import Bank, Banked
from peftrank.base import Base, load_base
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.model import hidden_states, move, read
from peftrank.peft_files import AdapterFiles
from peftrank.prefixes import Prefix, Prefixes, Reading, token_length
from peftrank.prompts import (
    PromptTemplate,
    feature_tensor,
    in_rows,
    micro_batches,
    of_slates,
    pack,
    token_count,
)
from peftrank.types import Batch, PromptTree, RankedList, Slate

Scores = tuple[float, ...]
_STREAM_SLATES = 256


@dataclass(frozen=True)
class AdapterInfo:
    """What is loaded for a domain."""

    domain: str
    method: str
    """`none`: the base as it is."""
    version: str
    """In a store, its number; on the Hub, the commit; else the folder's name."""
    source: str
    nbytes: int
    """Of the adapter's and the readout's weights on the base's device."""
    tier: Literal["device", "host", "disk"]
    """Where the adapter's weights are now."""
    pinned: bool
    fields: tuple[str, ...]
    """Item fields that its prompt reads."""


@dataclass(frozen=True)
class Explanation:
    """What a slate's history did to its scores."""

    scores: Scores
    """One per candidate."""
    history: tuple[int, ...]
    """Indices of the history items that the prompt holds."""
    effects: tuple[Scores, ...]
    """For each of these, one value per candidate: how much the item raises the candidate's score
    relative to the list's mean."""


@dataclass(frozen=True, eq=False)
class _Domain:
    """All that ranking in a domain needs; replaced as a whole."""

    name: str
    method: str
    version: str
    source: str
    nbytes: int
    pinned: bool
    read: Callable[[], AdapterFiles] | None
    """Reads the adapter's files again, checked; None: the base as it is."""
    template: PromptTemplate
    readout: nn.Module
    feature_names: tuple[str, ...]
    skip_layers: int = 0
    """Of the base, from the first on: the adapter is left out there."""
    loading: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A slate that is ready to be scored, with the adapter that will score it."""

    slate: Slate
    tree: PromptTree
    tokens: int
    """Of the tree."""
    _domain: _Domain
    _adapter: Banked | None

    @property
    def domain(self) -> str:
        """The domain it is ranked in."""
        return self._domain.name

    @property
    def version(self) -> str:
        """The adapter's version; see `AdapterInfo`."""
        return self._domain.version

    @property
    def history_read(self) -> tuple[int, ...]:
        """Indices of the history items that the tree holds."""
        return self._domain.template.history_read(self.slate)


class Ranker:
    """A base with the adapters of several domains."""

    def __init__(
        self,
        base: Base,
        *,
        store: str | Path = "adapters",
        micro_tokens: int = 4096,
        row_tokens: int = 512,
        device_bytes: int | None = None,
        host_bytes: int | None = 0,
        prefix_bytes: int = 0,
    ):
        """Wraps a loaded base. Nothing in it is changed.

        Args:
            base: From `load_base` or `base_from_model`.
            store: Where `load_adapter` looks for a domain's name.
            micro_tokens: Tokens per forward pass. A longer slate is scored in several, the user's
                part in each; one whose candidates see each other is a pass of its own.
            row_tokens: Tokens in a packed row that holds several slates.
            device_bytes: Adapter weights kept on the base's device, beside those in use; None: all.
            host_bytes: Adapter files kept in host memory, for adapters that leave the device to
                come back without the disk; None: all. Nothing is gained while all stay there.
            prefix_bytes: Keys and values of prompts' beginnings kept on the base's device, so that
                a user's next slates pay for what is new; 0: none. Scores stay the same but for
                rounding. A base that is an encoder keeps none.
        """
        self.base = base
        self.store = Path(store)
        self._micro_tokens, self._row_tokens = micro_tokens, row_tokens
        self._bank = Bank(base)
        self._domains: dict[str, _Domain] = {}  # replaced as a whole, never changed in place
        self._plain: dict[str, tuple[_Domain, _Domain]] = {}
        """Domains that were ranked without their adapter, and what did it."""
        self._device: Tier[Banked] = Tier(device_bytes)
        self._host: Tier[AdapterFiles] = Tier(host_bytes)
        self._prefixes = Prefixes(prefix_bytes) if prefix_bytes and base.is_decoder else None
        self._writing = threading.Lock()

    @classmethod
    def from_base(
        cls,
        base: str = "smollm2-135m",
        *,
        quantization: str = "nf4",
        device: str = "auto",
        store: str | Path = "adapters",
    ) -> Self:
        """Loads a base by alias, path or Hub id.

        Raises:
            BaseModelError: it cannot be found or loaded.
        """
        return cls(load_base(base, quantization=quantization, device=device), store=store)

    @property
    def domains(self) -> tuple[str, ...]:
        """The loaded domains, in the order they were loaded."""
        return tuple(self._domains)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """What is loaded, by domain."""
        return {name: self._info(found) for name, found in self._domains.items()}

    def memory(self) -> dict[str, int]:
        """Returns bytes of the base, its adapters by where they are kept, and kept prefixes."""
        return {
            "base_bytes": int(self.base.model.get_memory_footprint()),
            "device_bytes": self._device.nbytes,
            "host_bytes": self._host.nbytes,
            "prefix_bytes": 0 if self._prefixes is None else self._prefixes.nbytes,
        }

    def load_adapter(
        self,
        source: str | Path,
        *,
        domain: str | None = None,
        allow_code: bool = False,
        pin: bool = False,
        skip_layers: int = 0,
    ) -> str:
        """Loads an adapter, in place of the domain's earlier one, and returns the domain's name.

        Calls that are running, and what was prepared before, finish with the earlier one.

        Args:
            source: A folder, a domain of the store (its active version), `domain@version`, or
                `user/repo` or `user/repo@revision` on the Hugging Face Hub, where no folder has
                that name. The Hub's cache is used, and alone if HF_HUB_OFFLINE is set.
            domain: The name to load it under; absent: the one it was trained for.
            allow_code: Let an adapter's readout be `package.module:object`, which imports code
                that is not PeftRank's. Set it only for adapters you made or checked.
            pin: Keep it on the device whatever the budget.
            skip_layers: Leave the adapter out of the first so many layers of the base (AdapterDrop,
                arXiv 2010.11918): faster, and less accurate unless it was trained for it.

        Raises:
            AdapterError: it is missing, damaged, cannot be had from the Hub, or belongs to another
                base; or `skip_layers` leaves nothing of it.
            ConfigError: the base has no more than `skip_layers` layers.
        """
        files, read_again, version = self._files(source, allow_code)
        manifest = files.manifest
        name = store.check_domain(manifest["domain"] if domain is None else domain)
        store.check_base(manifest, self.base.identity)
        wanted = manifest["readout"]
        if ":" in wanted["name"] and not allow_code:
            raise AdapterError(
                f"the adapter {source} asks to import its readout {wanted['name']!r}, code outside "
                "PeftRank. If you trust where it came from, pass allow_code=True."
            )
        try:
            template = PromptTemplate(self.base.tokenizer, **manifest["prompt"])
            readout = self._readout(wanted["name"], wanted["options"], wanted["feature_names"])
            readout.load_state_dict(files.readout, strict=True)
        except (TypeError, RuntimeError, ConfigError) as error:
            raise AdapterError(
                f"the adapter {source} does not fit this PeftRank (it was made with "
                f"{manifest['peftrank_version']}): {error}"
            ) from error
        if template.turn != _turn(readout):
            raise AdapterError(
                f"the adapter {source} has a prompt for turn={template.turn!r} but its readout "
                f"{wanted['name']!r} needs {_turn(readout)!r}"
            )
        adapter = self._bank.place(name, files, skip_layers=skip_layers)
        made = _Domain(
            name,
            method=manifest["method"]["name"],
            version=version,
            source=str(source),
            nbytes=adapter.nbytes + _nbytes(readout.state_dict()),
            pinned=pin,
            read=read_again,
            template=template,
            readout=readout,
            feature_names=tuple(wanted["feature_names"]),
            skip_layers=skip_layers,
        )
        self._keep(made, files, adapter)
        self._put(made)
        return name

    def load_readout(
        self,
        domain: str,
        *,
        prompt: Mapping[str, Any],
        readout: str = "likelihood",
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Makes the untrained base serve a domain, read by a readout without parameters.

        This is the zero-shot baseline. `prompt` holds PromptTemplate's arguments; `turn` and
        `max_depth` are set to what the readout and the base need. Of mode `set` it reads the
        candidates alone, as in `isolated`: an untrained base makes nothing of markers.

        Raises:
            ConfigError: the readout has weights that would have to be trained.
        """
        made = self._without_adapter(store.check_domain(domain), prompt, readout, options or {})
        self._put(made)
        return domain

    def unload_adapter(self, domain: str) -> None:
        """Lets go of a domain. Calls that are running with it finish.

        Raises:
            ConfigError: the domain is not loaded.
        """
        with self._writing:
            gone = self._find(domain)
            self._domains = {k: v for k, v in self._domains.items() if k != domain}
        self._forget(gone)

    @overload
    def rank(
        self, slates: Slate, *, domain: str | None = None, k: int | None = None
    ) -> RankedList: ...
    @overload
    def rank(
        self, slates: Iterable[Slate], *, domain: str | None = None, k: int | None = None
    ) -> list[RankedList]: ...
    def rank(
        self, slates: Slate | Iterable[Slate], *, domain: str | None = None, k: int | None = None
    ) -> RankedList | list[RankedList]:
        """Returns each slate's candidates, best first; one list for one slate.

        Equal scores are ordered by item id, so the order of the input never decides.

        Args:
            slates: One or several; they may belong to different domains.
            domain: The domain of all of them; absent: each slate's own `domain`.
            k: Keep the best k; absent: all.

        Raises:
            ConfigError: a slate's domain is not loaded or not given.
            DataError: a slate cannot be read.
        """
        if k is not None and k < 1:
            raise ConfigError(f"k={k}: expected at least 1, or None for all candidates")
        if isinstance(slates, Slate):
            return self.rank_prepared(self.prepare([slates], domain=domain), k=k)[0]
        return self.rank_prepared(self.prepare(list(slates), domain=domain), k=k)

    @overload
    def score(self, slates: Slate, *, domain: str | None = None) -> Scores: ...
    @overload
    def score(self, slates: Iterable[Slate], *, domain: str | None = None) -> list[Scores]: ...
    def score(
        self, slates: Slate | Iterable[Slate], *, domain: str | None = None
    ) -> Scores | list[Scores]:
        """Returns each slate's scores in candidate order, higher is better; see `rank`."""
        if isinstance(slates, Slate):
            return self.score_prepared(self.prepare([slates], domain=domain))[0]
        return self.score_prepared(self.prepare(list(slates), domain=domain))

    async def arank(
        self, slates: Sequence[Slate], *, domain: str | None = None, k: int | None = None
    ) -> list[RankedList]:
        """Returns what `rank` returns, computed in a worker thread."""
        return await asyncio.to_thread(self.rank, slates, domain=domain, k=k)

    def prepare(
        self, slates: Sequence[Slate], *, domain: str | None = None, untrained: bool = False
    ) -> list[Prepared]:
        """Returns slates as prompt trees, each with the adapter its domain has now.

        This is the part of `rank` that needs no forward pass; servers do it while another batch is
        being scored. What is prepared keeps its adapter, whatever is loaded or unloaded later.

        Args:
            slates: They may belong to different domains.
            domain: The domain of all of them; absent: each slate's own `domain`.
            untrained: Without the adapter: the domain's prompt, the base as it is, and the
                likelihood of each candidate's text as its score.

        Raises:
            ConfigError: a slate's domain is not loaded or not given, or `untrained` on a base
                without a vocabulary head.
            DataError: a slate cannot be read.
            AdapterError: an adapter that was let go of cannot be read again.
        """
        groups: dict[str | None, list[int]] = {}
        for index, slate in enumerate(slates):
            groups.setdefault(slate.domain if domain is None else domain, []).append(index)
        # All domains are looked up before any work is done: an unknown one costs nothing.
        found = {name: self._find(name) for name in groups}
        if untrained:
            found = {name: self._untrained(served) for name, served in found.items()}
        prepared: dict[int, Prepared] = {}
        for name, indices in groups.items():
            made = self._prepare_in(found[name], [slates[i] for i in indices])
            prepared.update(zip(indices, made, strict=True))
        return [prepared[index] for index in range(len(slates))]

    def score_prepared(self, prepared: Sequence[Prepared]) -> list[Scores]:
        """Returns the scores of each prepared slate, in candidate order.

        Raises:
            AdapterError: a domain's scores are not finite.
        """
        order = _packing_order(prepared)
        parts = [(index, part) for index in order for part in self._parts(prepared[index])]
        passes = micro_batches(
            [part.tree for _, part in parts],
            self._micro_tokens,
            row_tokens=self._row_tokens,
            known=[token_length(self._known(part)) for _, part in parts],
        )
        scores: list[Scores] = [()] * len(prepared)
        for group in passes:
            done = self._score_pass([parts[i][1] for i in group])
            for i, values in zip(group, done, strict=True):
                scores[parts[i][0]] += values  # parts of a slate come in order
        return [_twins_equal(one, values) for one, values in zip(prepared, scores, strict=True)]

    def rank_prepared(
        self, prepared: Sequence[Prepared], *, k: int | None = None
    ) -> list[RankedList]:
        """Returns what `rank` returns for slates that `prepare` returned."""
        scored = self.score_prepared(prepared)
        return [ranked(p.slate, s, k) for p, s in zip(prepared, scored, strict=True)]

    def explain(self, slate: Slate | Prepared, *, domain: str | None = None) -> Explanation:
        """Returns which history items raise or lower which candidates.

        An item's effect is the score with the whole history minus the score without the item, less
        the mean of this over the candidates: what is added to every candidate ranks nothing.
        """
        if isinstance(slate, Slate):
            slate = self.prepare([slate], domain=domain)[0]
        variants = self.variants(slate)
        return explanation(slate.history_read, self.score_prepared(variants))

    def variants(self, prepared: Prepared) -> list[Prepared]:
        """Returns what `explanation` needs scored: the slate, then it without each history item."""
        kept = prepared.history_read
        without = [[i for i in kept if i != out] for out in kept]
        slates = [_with_history(prepared.slate, indices) for indices in (kept, *without)]
        return self._prepare_in(prepared._domain, slates)

    def rank_stream(
        self, slates: Iterable[Slate], *, domain: str | None = None, k: int | None = None
    ) -> Iterator[RankedList]:
        """Yields what `rank` returns, in input order, holding a few hundred slates at a time."""
        source = iter(slates)
        while chunk := list(itertools.islice(source, _STREAM_SLATES)):
            yield from self.rank(chunk, domain=domain, k=k)

    def close(self) -> None:
        """Unloads everything and takes the hooks off the base. No call may be running."""
        with self._writing:
            gone, self._domains = self._domains, {}
            self._bank.close()
        for domain in gone.values():
            self._forget(domain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        loaded = ", ".join(f"{name}: {d.method}" for name, d in self._domains.items())
        return f"Ranker({self.base.identity.name!r}, domains={{{loaded}}})"

    def _files(
        self, source: str | Path, allow_code: bool
    ) -> tuple[AdapterFiles, Callable[[], AdapterFiles], str]:
        """Returns an adapter, how to read the very same again, and its version."""
        if isinstance(source, str) and hub.is_hub_name(source) and not Path(source).is_dir():
            found = hub.fetch(source, allow_code=allow_code)
            exact = f"{found.repo}@{found.commit}"
            return (
                found.files,
                lambda: hub.fetch(exact, allow_code=allow_code).files,
                found.commit,
            )
        folder = store.resolve(source, self.store).absolute()
        return store.load_adapter(folder), lambda: store.load_adapter(folder), folder.name

    def _readout(
        self, name: str, options: Mapping[str, Any], feature_names: Sequence[str]
    ) -> nn.Module:
        made: nn.Module = plugins.load("readouts", name).build(
            self.base.hidden_size,
            self.base.tokenizer,
            self.base.lm_head,
            feature_names=tuple(feature_names),
            **options,
        )
        return made.to(self.base.device).eval()

    def _without_adapter(
        self, name: str, prompt: Mapping[str, Any], readout: str, options: Mapping[str, Any]
    ) -> _Domain:
        made = self._readout(readout, options, ())
        if any(True for _ in made.parameters()):
            raise ConfigError(
                f"readout {readout!r} has weights and nothing trained them. Without an adapter use "
                "yes_no, likelihood or identifier."
            )
        needs: dict[str, Any] = {"turn": _turn(made), "max_depth": self.base.max_depth}
        if prompt.get("mode") == "set":
            needs["mode"] = "isolated"
        return _Domain(
            name,
            method="none",
            version="none",
            source=self.base.identity.name,
            nbytes=0,
            pinned=True,
            read=None,
            template=PromptTemplate(self.base.tokenizer, **{**prompt, **needs}),
            readout=made,
            feature_names=(),
        )

    def _untrained(self, domain: _Domain) -> _Domain:
        found = self._plain.get(domain.name)
        if found is None or found[0] is not domain:
            # Alone, so that a list of any length can be read.
            prompt = {**domain.template.describe(), "mode": "isolated"}
            found = domain, self._without_adapter(domain.name, prompt, "likelihood", {})
            self._plain[domain.name] = found
        return found[1]

    def _put(self, made: _Domain) -> None:
        with self._writing:
            earlier = self._domains.get(made.name)
            self._domains = {**self._domains, made.name: made}
        if earlier is not None:
            self._forget(earlier)

    def _keep(self, domain: _Domain, files: AdapterFiles, adapter: Banked) -> None:
        self._device.put(domain, adapter, adapter.nbytes, pinned=domain.pinned)
        if not domain.pinned:  # what is pinned never leaves the device
            self._host.put(domain, files, _nbytes(files.tensors))

    def _prepare_in(self, domain: _Domain, slates: Sequence[Slate]) -> list[Prepared]:
        _check_features(domain, slates)
        adapter = self._resident(domain)
        trees = [domain.template.tree(slate) for slate in slates]
        return [
            Prepared(slate, tree, token_count(tree), domain, adapter)
            for slate, tree in zip(slates, trees, strict=True)
        ]

    def _resident(self, domain: _Domain) -> Banked | None:
        """Returns a domain's adapter, on the device; from host memory or its files if need be."""
        if domain.read is None:
            return None
        adapter = self._device.get(domain)
        if adapter is not None:
            return adapter
        with domain.loading:
            adapter = self._device.get(domain)
            if adapter is not None:  # another thread has just brought it
                return adapter
            files = self._host.get(domain) or domain.read()
            adapter = self._bank.place(domain.name, files, skip_layers=domain.skip_layers)
            self._keep(domain, files, adapter)
        if self._domains.get(domain.name) is not domain:  # replaced or unloaded meanwhile
            self._forget(domain)
        return adapter

    def _forget(self, domain: _Domain) -> None:
        self._device.drop(domain)
        self._host.drop(domain)
        if self._prefixes is not None:
            self._prefixes.forget(domain)
        if self._plain.get(domain.name, (None,))[0] is domain:
            self._plain.pop(domain.name, None)

    def _info(self, domain: _Domain) -> AdapterInfo:
        tier: Literal["device", "host", "disk"] = "disk"
        if domain.read is None or domain in self._device:
            tier = "device"
        elif domain in self._host:
            tier = "host"
        return AdapterInfo(
            domain.name, domain.method, domain.version, domain.source, domain.nbytes, tier,
            domain.pinned, domain.template.fields,
        )  # fmt: skip

    def _find(self, domain: str | None) -> _Domain:
        domains = self._domains
        if domain is None:
            raise ConfigError(
                "no domain given: pass domain=, or set Slate.domain. "
                f"Loaded: {', '.join(domains) or 'none'}."
            )
        if domain not in domains:
            raise ConfigError(
                f"domain {domain!r} is not loaded{plugins.did_you_mean(domain, domains)}. "
                f"Loaded: {', '.join(domains) or 'none'}. Load it with load_adapter."
            )
        return domains[domain]

    def _parts(self, one: Prepared) -> Iterator[Prepared]:
        """Yields a slate, or of a long one parts that hold its candidates in turn."""
        first = 0
        for tree in in_rows(one.tree, self._row_tokens, most=self._micro_tokens):
            candidates = one.slate.candidates[first : first + len(tree.candidates)]
            slate = replace(one.slate, candidates=candidates, labels=None, weights=None, tasks={})
            yield replace(one, slate=slate, tree=tree, tokens=token_count(tree))
            first += len(candidates)

    @property
    def prefix_tokens(self) -> int:
        """Tokens that were not computed because their keys and values were kept."""
        return 0 if self._prefixes is None else self._prefixes.tokens_reused

    def _known(self, one: Prepared) -> tuple[Prefix, ...]:
        """Returns what is kept of the beginning of a slate's tree."""
        return () if self._prefixes is None else self._prefixes.find(_owner(one), one.tree)

    def _score_pass(self, prepared: Sequence[Prepared]) -> list[Scores]:
        """Returns the scores of slates, or parts of them, that fit one forward pass."""
        known = [self._known(one) for one in prepared]
        members: dict[tuple[_Domain, Banked | None], list[int]] = {}
        for index, one in enumerate(prepared):
            members.setdefault((one._domain, one._adapter), []).append(index)
        keys = {key: group for group, key in enumerate(members)}
        batch = pack(
            [one.tree for one in prepared],
            pad_token_id=self.base.pad_token_id,
            row_tokens=self._row_tokens,
            groups=[keys[one._domain, one._adapter] for one in prepared],
            known=None if self._prefixes is None else [len(found) for found in known],
            once=self.base.is_decoder,
        )
        batch = move(batch, self.base.device)
        reading = None if batch.past is None else Reading(batch.past, known)
        adapters = [adapter for _, adapter in keys]
        spans = [(adapters[group], start, stop) for group, start, stop in batch.spans]
        scores: list[Scores] = [()] * len(prepared)
        with torch.inference_mode(), self._bank.using(adapters[0] if len(keys) == 1 else spans):
            states = hidden_states(self.base, batch, reading=reading)
            for (domain, _), indices in members.items():
                done = self._read(
                    domain, states, batch, [prepared[i].slate for i in indices], indices
                )
                for index, values in zip(indices, done, strict=True):
                    scores[index] = values
        if self._prefixes is not None and reading is not None:
            left = reading.left()
            for one, found, new in zip(prepared, known, left, strict=True):
                self._prefixes.keep(_owner(one), one.tree, found, new)
        return scores

    def _read(
        self,
        domain: _Domain,
        states: Tensor,
        batch: Batch,
        slates: Sequence[Slate],
        indices: Sequence[int],
    ) -> list[Scores]:
        names, features = domain.feature_names, None
        if names:
            length = batch.mask.shape[1]
            features = feature_tensor(slates, names, length=length).to(states.device)
        own = of_slates(batch, indices, features)
        values = read(domain.readout, states, own).float().cpu()
        if not bool(torch.isfinite(values).all()):
            raise AdapterError(
                f"domain {domain.name!r} gave NaN or infinite scores in "
                f"{self.base.identity.compute_dtype}. Load the base with another compute_dtype."
            )
        return [
            tuple(row[: len(slate.candidates)])
            for slate, row in zip(slates, values.tolist(), strict=True)
        ]


def explanation(history: tuple[int, ...], scores: Sequence[Scores]) -> Explanation:
    """Returns what history items did, from the scores of `Ranker.variants`."""
    whole, *without = scores
    effects = []
    for changed in without:
        gained = [a - b for a, b in zip(whole, changed, strict=True)]
        mean = sum(gained) / len(gained)
        effects.append(tuple(value - mean for value in gained))
    return Explanation(whole, history, tuple(effects))


def ranked(slate: Slate, scores: Scores, k: int | None = None) -> RankedList:
    """Returns a slate's candidates, best first, the best k of them; ties by item id."""
    ids = (item.item_id for item in slate.candidates)
    best = sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:k]
    return RankedList(slate.slate_id, tuple(i for i, _ in best), tuple(s for _, s in best))


def _twins_equal(one: Prepared, scores: Scores) -> Scores:
    """Returns scores in which candidates of a slate with one text and features are equal.

    Such twins are computed alike or once, but a matrix product may round each of its rows
    differently; without this, that rounding and so the input's order would rank them.
    """
    names = one._domain.feature_names
    first: dict[tuple[Any, ...], int] = {}
    equal = []
    for n, (span, item) in enumerate(zip(one.tree.candidates, one.slate.candidates, strict=True)):
        segment = one.tree.segments[span.segment]
        numbers = array("f", [item.features.get(name, math.nan) for name in names]).tobytes()
        twin = segment.parent, segment.tokens, span.start, span.stop, numbers
        equal.append(scores[first.setdefault(twin, n)])
    return tuple(equal)


def _owner(prepared: Prepared) -> _Domain | None:
    """Returns whose adapter reads a slate; it may leave the device and come back."""
    return None if prepared._adapter is None else prepared._domain


def _turn(readout: nn.Module) -> str:
    turn: str = type(readout).turn  # type: ignore[attr-defined]  # every readout class has it
    return turn


def _packing_order(prepared: Sequence[Prepared]) -> list[int]:
    """Returns indices such that a domain's, a user's, and slates of a length are neighbours."""
    domains: dict[_Domain, int] = {}
    longest: dict[tuple[_Domain, str], int] = {}
    for one in prepared:
        domains.setdefault(one._domain, len(domains))
        user = one._domain, one.slate.user_id
        longest[user] = max(one.tokens, longest.get(user, 0))

    def key(index: int) -> tuple[int, int, str, int]:
        one = prepared[index]
        user = one.slate.user_id
        return domains[one._domain], -longest[one._domain, user], user, -one.tokens

    return sorted(range(len(prepared)), key=key)


def _with_history(slate: Slate, kept: Sequence[int]) -> Slate:
    feedback = slate.history_feedback
    return replace(
        slate,
        history=tuple(slate.history[i] for i in kept),
        history_feedback=None if feedback is None else tuple(feedback[i] for i in kept),
    )


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _check_features(domain: _Domain, slates: Sequence[Slate]) -> None:
    names = set(domain.feature_names)
    items = (item for slate in slates for item in slate.candidates)
    if names and slates and not any(names & item.features.keys() for item in items):
        raise DataError(
            f"the adapter of {domain.name!r} was trained with the candidate features "
            f"{', '.join(domain.feature_names)}, and no candidate of these slates has one. "
            "Set Item.features (NaN where a value is unknown)."
        )

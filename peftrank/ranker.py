"""Ranker: slates in, ranked lists out, for many domains on one base.

The domain is an argument of each call, or of each slate; no call changes what another sees, so
threads may use one Ranker for different domains at once. An adapter brings its own prompt and
readout, so it cannot be paired with the wrong ones. Knows no training and no metrics.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from peftrank import hub, plugins, store
from peftrank.bank import Bank, Banked
from peftrank.base import Base, load_base
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.model import RankingModel, move
from peftrank.prompts import PromptTemplate, feature_tensor, micro_batches, pack, token_count
from peftrank.types import Batch, RankedList, Slate

Scores = tuple[float, ...]
_STREAM_SLATES = 256


@dataclass(frozen=True, eq=False)
class _Domain:
    """All that ranking in a domain needs; replaced as a whole."""

    name: str
    method: str
    adapter: Banked | None
    """None: the base as it is."""
    template: PromptTemplate
    model: RankingModel
    feature_names: tuple[str, ...]


class Ranker:
    """A base with the adapters of several domains."""

    def __init__(
        self,
        base: Base,
        *,
        store: str | Path = "adapters",
        micro_tokens: int = 4096,
        row_tokens: int = 512,
    ):
        """Wraps a loaded base. Nothing in it is changed.

        Args:
            base: From `load_base` or `base_from_model`.
            store: Where `load_adapter` looks for a domain's name.
            micro_tokens: Tokens per forward pass; a single larger slate is a pass of its own.
            row_tokens: Tokens in a packed row that holds several slates.
        """
        self.base = base
        self.store = Path(store)
        self._micro_tokens, self._row_tokens = micro_tokens, row_tokens
        self._bank = Bank(base)
        self._domains: dict[str, _Domain] = {}  # replaced as a whole, never changed in place
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

    def load_adapter(
        self, source: str | Path, *, domain: str | None = None, allow_code: bool = False
    ) -> str:
        """Loads an adapter, in place of the domain's earlier one, and returns the domain's name.

        Args:
            source: A folder, a domain of the store (its active version), `domain@version`, or
                `user/repo` or `user/repo@revision` on the Hugging Face Hub, where no folder has
                that name. The Hub's cache is used, and alone if HF_HUB_OFFLINE is set.
            domain: The name to load it under; absent: the one it was trained for.
            allow_code: Let an adapter's readout be `package.module:object`, which imports code
                that is not PeftRank's. Set it only for adapters you made or checked.

        Raises:
            AdapterError: it is missing, damaged, cannot be had from the Hub, or belongs to another
                base.
        """
        files = self._files(source, allow_code)
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
        method = manifest["method"]["name"]
        self._put(name, method, files, template, readout, wanted["feature_names"])
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
        `max_depth` are set to what the readout and the base need.

        Raises:
            ConfigError: the readout has weights that would have to be trained.
        """
        made = self._readout(readout, options or {}, ())
        if any(True for _ in made.parameters()):
            raise ConfigError(
                f"readout {readout!r} has weights and nothing trained them. Without an adapter use "
                "yes_no or likelihood."
            )
        needs = {"turn": _turn(made), "max_depth": self.base.max_depth}
        template = PromptTemplate(self.base.tokenizer, **{**prompt, **needs})
        self._put(store.check_domain(domain), "none", None, template, made, ())
        return domain

    def unload_adapter(self, domain: str) -> None:
        """Lets go of a domain. Calls that are running with it finish.

        Raises:
            ConfigError: the domain is not loaded.
        """
        with self._writing:
            found = self._find(domain)
            self._domains = {k: v for k, v in self._domains.items() if k != domain}
            if found.adapter is not None:
                self._bank.remove(domain)

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
            return _ranked(slates, self._score([slates], domain)[0], k)
        given = list(slates)
        scored = self._score(given, domain)
        return [_ranked(slate, s, k) for slate, s in zip(given, scored, strict=True)]

    @overload
    def score(self, slates: Slate, *, domain: str | None = None) -> Scores: ...
    @overload
    def score(self, slates: Iterable[Slate], *, domain: str | None = None) -> list[Scores]: ...
    def score(
        self, slates: Slate | Iterable[Slate], *, domain: str | None = None
    ) -> Scores | list[Scores]:
        """Returns each slate's scores in candidate order, higher is better; see `rank`."""
        if isinstance(slates, Slate):
            return self._score([slates], domain)[0]
        return self._score(list(slates), domain)

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
            self._domains = {}
            self._bank.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        loaded = ", ".join(f"{name}: {d.method}" for name, d in self._domains.items())
        return f"Ranker({self.base.identity.name!r}, domains={{{loaded}}})"

    def _files(self, source: str | Path, allow_code: bool) -> store.AdapterFiles:
        if isinstance(source, str) and hub.is_hub_name(source) and not Path(source).is_dir():
            return hub.fetch(source, allow_code=allow_code).files
        return store.load_adapter(store.resolve(source, self.store))

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

    def _put(
        self,
        name: str,
        method: str,
        files: store.AdapterFiles | None,
        template: PromptTemplate,
        readout: nn.Module,
        feature_names: Sequence[str],
    ) -> None:
        model = RankingModel(self.base, readout)
        with self._writing:
            adapter = None if files is None else self._bank.add(name, files)
            if files is None and name in self._bank.names:
                self._bank.remove(name)
            made = _Domain(name, method, adapter, template, model, tuple(feature_names))
            self._domains = {**self._domains, name: made}

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

    def _score(self, slates: Sequence[Slate], domain: str | None) -> list[Scores]:
        groups: dict[str | None, list[int]] = {}
        for index, slate in enumerate(slates):
            groups.setdefault(slate.domain if domain is None else domain, []).append(index)
        # All domains are looked up before any is scored: an unknown one costs no work, and each
        # keeps one adapter for the whole call.
        found = {name: self._find(name) for name in groups}
        scores: list[Scores] = [()] * len(slates)
        for name, indices in groups.items():
            done = self._score_in(found[name], [slates[i] for i in indices])
            for index, values in zip(indices, done, strict=True):
                scores[index] = values
        return scores

    def _score_in(self, domain: _Domain, slates: Sequence[Slate]) -> list[Scores]:
        _check_features(domain, slates)
        trees = [domain.template.tree(slate) for slate in slates]
        lengths = [token_count(tree) for tree in trees]
        order = _packing_order(slates, lengths)
        groups = micro_batches(
            [lengths[i] for i in order], self._micro_tokens, row_tokens=self._row_tokens
        )
        scores: list[Scores] = [()] * len(slates)
        for group in groups:
            chosen = [order[i] for i in group]
            batch = pack(
                [trees[i] for i in chosen],
                pad_token_id=self.base.pad_token_id,
                row_tokens=self._row_tokens,
            )
            if domain.feature_names:
                numbers = feature_tensor([slates[i] for i in chosen], domain.feature_names)
                batch = replace(batch, features=numbers)
            with torch.inference_mode(), self._bank.using(domain.adapter):
                values = domain.model(move(batch, self.base.device)).float().cpu()
            if not bool(torch.isfinite(values).all()):
                raise AdapterError(
                    f"domain {domain.name!r} gave NaN or infinite scores in "
                    f"{self.base.identity.compute_dtype}. Load the base with another compute_dtype."
                )
            for index, row in zip(chosen, _twins_equal(values, batch), strict=True):
                scores[index] = tuple(row[: len(slates[index].candidates)])
        return scores


def _ranked(slate: Slate, scores: Scores, k: int | None) -> RankedList:
    ids = (item.item_id for item in slate.candidates)
    best = sorted(zip(ids, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:k]
    return RankedList(slate.slate_id, tuple(i for i, _ in best), tuple(s for _, s in best))


def _twins_equal(values: Tensor, batch: Batch) -> list[list[float]]:
    """Returns scores (S, N) in which candidates of a slate with one text and features are equal.

    Such twins share their tokens in the batch, but a matrix product may round each of its rows
    differently; without this, that rounding and so the input's order would rank them.
    """
    rows = values.tolist()
    places = torch.stack([batch.row, batch.end], dim=-1).tolist()
    for s, row in enumerate(rows):
        first: dict[tuple[Any, ...], int] = {}
        for n, place in enumerate(places[s]):
            numbers = b"" if batch.features is None else batch.features[s, n].numpy().tobytes()
            row[n] = row[first.setdefault((*place, numbers), n)]
    return rows


def _turn(readout: nn.Module) -> str:
    turn: str = type(readout).turn  # type: ignore[attr-defined]  # every readout class has it
    return turn


def _packing_order(slates: Sequence[Slate], lengths: Sequence[int]) -> list[int]:
    """Returns slate indices such that a user's slates, and slates of a length, are neighbours."""
    longest: dict[str, int] = {}
    for slate, length in zip(slates, lengths, strict=True):
        longest[slate.user_id] = max(length, longest.get(slate.user_id, 0))

    def key(index: int) -> tuple[int, str, int]:
        user = slates[index].user_id
        return -longest[user], user, -lengths[index]

    return sorted(range(len(slates)), key=key)


def _check_features(domain: _Domain, slates: Sequence[Slate]) -> None:
    names = set(domain.feature_names)
    items = (item for slate in slates for item in slate.candidates)
    if names and slates and not any(names & item.features.keys() for item in items):
        raise DataError(
            f"the adapter of {domain.name!r} was trained with the candidate features "
            f"{', '.join(domain.feature_names)}, and no candidate of these slates has one. "
            "Set Item.features (NaN where a value is unknown)."
        )

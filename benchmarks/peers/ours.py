"""PeftRank: a slate is one tree, slates are packed, and no vocabulary logit is computed.

Its parts can be left out one at a time, to see what each is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.peers.setting import Case, Setting, step
from peftrank import plugins
from peftrank.model import RankingModel, hidden_states, move, read
from peftrank.prefixes import Prefixes, Reading, token_length
from peftrank.prompts import micro_batches, pack, token_count
from peftrank.types import Batch, PromptTree

MODES = ("isolated", "joint", "set")


def training(
    setting: Setting,
    *,
    mode: str = "isolated",
    packing: bool = True,
    once: bool = True,
    logits: bool = False,
) -> Case:
    """Returns a step over all slates, with the ListNet loss.

    Args:
        setting: What all cases share.
        mode: Of the prompt.
        packing: Several slates in a row, sharing what they have in common; else a row each.
        once: With packing: what several rows hold is computed in one of them.
        logits: Score by the Yes and No logits out of those of all tokens and words, as a
            causal-LM class gives them, instead of by a small head on the candidates' states.
    """
    readout = score_head(setting)
    model, loss = RankingModel(setting.base, readout), plugins.load("losses", "listnet")
    score = _by_logits(setting) if logits else model
    trees = setting.trees(mode=mode)

    def losses() -> Iterator[Tensor]:
        for batch in passes(setting, trees, packing=packing, once=once):
            yield loss(score(batch), batch.labels, batch.mask).sum() / len(trees)

    return Case(step(setting, losses, *readout.parameters()), sum(map(token_count, trees)))


def scoring(
    setting: Setting,
    *,
    mode: str = "isolated",
    packing: bool = True,
    once: bool = True,
    logits: bool = False,
    readout: nn.Module | None = None,
) -> Case:
    """Returns the scoring of all slates; `run` returns a row of scores per slate, in order.

    Args:
        setting: What all cases share.
        mode: Of the prompt.
        packing: See `training`.
        once: See `training`.
        logits: See `training`.
        readout: Absent: a new score_head.
    """
    model = RankingModel(setting.base, readout or score_head(setting)).eval()
    score = _by_logits(setting) if logits else model
    trees = setting.trees(mode=mode)
    names = [slate.slate_id for slate in setting.slates]
    sizes = {slate.slate_id: len(slate.candidates) for slate in setting.slates}

    @torch.inference_mode()
    def run() -> list[list[float]]:
        setting.adapted.eval()
        found: dict[str, list[float]] = {}
        for batch in passes(setting, trees, packing=packing, once=once):
            rows = score(batch).tolist()
            for name, row in zip(batch.slate_ids, rows, strict=True):
                found[name] = row[: sizes[name]]
        return [found[name] for name in names]

    return Case(run, sum(map(token_count, trees)))


def again(setting: Setting) -> Case:
    """Returns the scoring of slates whose users' histories were read before and are kept.

    `tokens` are those that are still computed.
    """
    model, readout = setting.base, score_head(setting).eval()
    trees = setting.trees()
    kept = Prefixes(2**40)

    @torch.inference_mode()
    def run() -> list[list[float]]:
        setting.adapted.eval()
        scores: list[list[float]] = [[]] * len(trees)
        known = [kept.find("", tree) for tree in trees]
        less = [token_length(prefixes) for prefixes in known]
        order = sorted(range(len(trees)), key=lambda i: less[i] - token_count(trees[i]))
        groups = micro_batches(
            [trees[i] for i in order], setting.micro_tokens, known=[less[i] for i in order]
        )
        for group in groups:
            chosen = [order[i] for i in group]
            found = [known[i] for i in chosen]
            batch = pack(
                [trees[i] for i in chosen],
                pad_token_id=setting.base.pad_token_id,
                known=[len(prefixes) for prefixes in found],
            )
            batch = move(batch, setting.device)
            if batch.past is None:
                raise AssertionError("a batch with `known` has `past`")
            reading = Reading(batch.past, found)
            rows = read(readout, hidden_states(model, batch, reading=reading), batch).tolist()
            for i, row, prefixes, new in zip(chosen, rows, found, reading.left(), strict=True):
                kept.keep("", trees[i], prefixes, new)
                scores[i] = row[: len(trees[i].candidates)]
        return scores

    run()
    new = sum(token_count(tree) - token_length(kept.find("", tree)) for tree in trees)
    return Case(run, new, f"{kept.nbytes / len(trees) / 2**20:.1f} MiB kept per slate")


def score_head(setting: Setting) -> nn.Module:
    """Returns a new readout."""
    base = setting.base
    made: nn.Module = plugins.load("readouts", "score_head").build(
        base.hidden_size, base.tokenizer, base.lm_head
    )
    return made.to(base.device)


def passes(
    setting: Setting, trees: list[PromptTree], *, packing: bool = True, once: bool = True
) -> Iterator[Batch]:
    """Yields the batches of forward passes over trees; see `training`."""
    order = sorted(range(len(trees)), key=lambda i: -token_count(trees[i]))
    room = 512 if packing else 1
    for group in micro_batches([trees[i] for i in order], setting.micro_tokens, row_tokens=room):
        chosen = [order[i] for i in group]
        batch = pack(
            [trees[i] for i in chosen],
            pad_token_id=setting.base.pad_token_id,
            row_tokens=room,
            once=packing and once and setting.base.is_decoder,
            labels=[setting.slates[i].labels for i in chosen],
        )
        yield move(batch, setting.device)


def _by_logits(setting: Setting) -> Callable[[Batch], Tensor]:
    tokenizer, head = setting.base.tokenizer, setting.base.model.get_output_embeddings()
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))

    def score(batch: Batch) -> Tensor:
        every = hidden_states(setting.base, batch)
        with setting.half():
            logits = head(every)[batch.row, batch.end].float()
        scores: Tensor = (logits[..., yes] - logits[..., no]).masked_fill(~batch.mask, 0.0)
        return scores

    return score

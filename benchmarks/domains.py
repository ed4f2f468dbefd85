"""Many domains on one base: mixed batches, switching and memory, beside PEFT's own ways.

    python -m benchmarks.domains                  # smollm2-135m in nf4
    python -m benchmarks.domains --base minilm-l6 --quantization none

Adapters have random weights of the shapes that training gives; the base is real. Times are ratios
of cases that run in turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks.measure import RESULTS, describe, interleaved, machine, ratio, shown, write
from benchmarks.measure import resident_bytes as resident
from peftrank import __version__, plugins, store
from peftrank.attention import attention_mask
from peftrank.base import Base, load_base
from peftrank.card import adapter_card
from peftrank.config import load_config
from peftrank.prompts import PromptTemplate, pack
from peftrank.ranker import Ranker
from peftrank.training.data import read_part
from peftrank.training.run import prompt_arguments
from peftrank.types import Slate

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 8, "layers": "all"}),
    "adalora": ("adalora", {"init_r": 12, "target_r": 8, "layers": "all"}),
    "houlsby": ("adapter", {"kind": "houlsby", "layers": "all"}),
    "parallel": ("adapter", {"kind": "parallel", "layers": "all"}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slates", type=int, default=16)
    parser.add_argument("--resident", type=int, default=200, help="adapters kept at once")
    parser.add_argument("--json", type=Path, default=RESULTS / "domains.json")
    options = parser.parse_args(arguments)
    base = load_base(options.base, quantization=options.quantization)
    result: dict[str, Any] = {
        "machine": machine(),
        "base": options.base,
        "quantization": options.quantization,
    }
    with tempfile.TemporaryDirectory() as folder:
        names = publish(base, Path(folder), 2)
        slates = sample(options.slates)
        result["mixed"] = mixed(base, Path(folder), names, slates, options.rounds)
        result["memory"] = memory(base, Path(folder), names, options.resident)
        result["switch"] = switching(base, Path(folder), names, slates[0], options)
        result["peft_mixed"] = peft_mixed(base, slates, options.rounds)
    write(options.json, result)
    print(markdown(result))


def sample(count: int) -> list[Slate]:
    """Returns slates of the news sample: about 10 history items and 20 candidates each."""
    config = load_config(domain="news")
    return read_part(config.data, "news", "test")[:count]


def publish(base: Base, folder: Path, each: int) -> list[str]:
    """Saves `each` random adapters of every method and returns their domains."""
    names = []
    template = PromptTemplate(
        base.tokenizer, **prompt_arguments(load_config(domain="news")), max_depth=base.max_depth
    )
    for method in METHODS:
        for number in range(each):
            name = f"{method}{number}"
            config, tensors = random_adapter(base, method, seed=len(names))
            readout = plugins.load("readouts", "score_head").build(
                base.hidden_size, base.tokenizer, base.lm_head
            )
            manifest = {
                "peftrank_version": __version__,
                "method": {"name": METHODS[method][0], "options": METHODS[method][1]},
                "prompt": template.describe(),
                "readout": {"name": "score_head", "options": {}, "feature_names": []},
                "base": dict(vars(base.identity)),
                "config": {},
                "metrics": {},
                "data": {},
                "versions": {},
            }
            files = store.AdapterFiles(config, tensors, dict(readout.state_dict()), manifest)
            card = adapter_card({**manifest, "domain": name})
            store.save_adapter(folder, name, files, card=card)
            names.append(name)
    return names


def random_adapter(base: Base, method: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns an adapter as training exports it; the base is left as it was."""
    name, options = METHODS[method]
    made = plugins.load("methods", name)(total_steps=100, **options)
    model = peft.get_peft_model(base.model, made.config(base.model))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    made.finalize(model)
    config, tensors = made.export(model)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    model.unload()
    base.model.requires_grad_(False).eval()
    return config.to_dict(), tensors


def mixed(
    base: Base, folder: Path, names: list[str], slates: list[Slate], rounds: int
) -> dict[str, Any]:
    """Compares a batch over all the adapters with the same batch over one."""
    ranker = Ranker(base, store=folder, micro_tokens=10**6)
    for name in names:
        ranker.load_adapter(name)
    turns = [names[i % len(names)] for i in range(len(slates))]

    def over(domains: Sequence[str]) -> Callable[[], Any]:
        prepared = [
            ranker.prepare([slate], domain=domain)[0]
            for slate, domain in zip(slates, domains, strict=True)
        ]
        return lambda: ranker.score_prepared(prepared)

    cases = {"mixed": over(turns)}
    cases |= {f"only {m}": over([f"{m}0"] * len(slates)) for m in METHODS}
    together, alike = cases["mixed"](), cases["only lora"]()
    alone = [ranker.score([s], domain=d)[0] for s, d in zip(slates, turns, strict=True)]
    one_alone = [ranker.score([s], domain="lora0")[0] for s in slates]
    spread = max(map(max, together)) - min(map(min, together))
    seconds = interleaved(cases, rounds=rounds)
    one = [
        statistics.mean(seconds[f"only {turn.rstrip('0123456789')}"][i] for turn in turns)
        for i in range(rounds)
    ]
    tokens = sum(p.tokens for p in ranker.prepare(slates, domain=names[0]))
    ranker.close()
    return {
        "slates": len(slates),
        "adapters": len(names),
        "tokens": tokens,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "mixed_over_one": ratio(seconds["mixed"], one),
        "worst_difference": _worst(together, alone),
        "same_adapter_difference": _worst(alike, one_alone),
        "spread_of_scores": spread,
    }


def _worst(scores: list[Any], others: list[Any]) -> float:
    pairs = zip(scores, others, strict=True)
    return max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))


def memory(base: Base, folder: Path, names: list[str], count: int) -> dict[str, Any]:
    """Measures what many resident adapters cost beside their own bytes."""
    ranker = Ranker(base, store=folder)
    for name in names:  # what the first of each costs once: hooks, code, allocator
        ranker.load_adapter(name)
    gc.collect()
    before, own = resident(), 0
    for index in range(count):
        name = ranker.load_adapter(names[index % len(names)], domain=f"d{index}")
        own += ranker.adapters[name].nbytes
    gc.collect()
    grown = resident() - before
    ranker.close()
    return {"adapters": count, "own_bytes": own, "grown_bytes": grown, "ratio": grown / own}


def switching(
    base: Base, folder: Path, names: list[str], slate: Slate, options: argparse.Namespace
) -> dict[str, float]:
    """Measures milliseconds until another domain's adapter is in place, median of many."""
    found: dict[str, float] = {}
    ranker = Ranker(base, store=folder)
    for name in names:
        ranker.load_adapter(name)
    turn = iter(range(10**9))

    def switch() -> None:
        domain = ranker._find(names[next(turn) % len(names)])
        with ranker._bank.using(ranker._resident(domain)):
            pass

    found["peftrank, resident"] = _median_ms(switch, 2000)
    for method in METHODS:
        found[f"peftrank, from disk, {method}"] = _median_ms(
            lambda m=method: ranker.load_adapter(f"{m}0"), 30
        )
    ranker.close()
    paths = [folder / f"lora{i}" / "0001" for i in (0, 1)]
    model = peft.PeftModel.from_pretrained(base.model, paths[0], adapter_name="a0")
    model.load_adapter(paths[1], adapter_name="a1")
    found["peft set_adapter"] = _median_ms(lambda: model.set_adapter(f"a{next(turn) % 2}"), 30)

    def reload() -> None:
        model.load_adapter(paths[1], adapter_name="a2")
        model.delete_adapter("a2")

    found["peft load_adapter + delete"] = _median_ms(reload, 7)
    model.set_adapter("a0")

    def hotswap() -> None:
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(model, str(paths[next(turn) % 2]), adapter_name="a0")

    found["peft hotswap_adapter"] = _median_ms(hotswap, 7)
    model.unload()
    base.model.requires_grad_(False).eval()

    def whole() -> None:
        again = load_base(options.base, quantization=options.quantization)
        peft.PeftModel.from_pretrained(again.model, paths[0])

    found["reload of base and adapter"] = _median_ms(whole, 3)
    return found


def _median_ms(case: Callable[[], Any], times: int) -> float:
    case()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        case()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def peft_mixed(base: Base, slates: list[Slate], rounds: int) -> dict[str, Any]:
    """Compares PEFT's mixed batch (`adapter_names`, LoRA only) with ours: same rows, same adapters.

    One slate a row in both, as PEFT mixes by row.
    """
    files = [random_adapter(base, "lora", seed) for seed in range(8)]
    template = PromptTemplate(
        base.tokenizer, **prompt_arguments(load_config(domain="news")), max_depth=base.max_depth
    )
    batch = pack(
        [template.tree(slate) for slate in slates],
        pad_token_id=base.pad_token_id,
        row_tokens=1,
        groups=list(range(len(slates))),
    )
    mask = attention_mask(batch, causal=base.is_decoder, dtype=base.compute_dtype)
    rows = range(batch.input_ids.shape[0])
    from peftrank.bank import Bank

    bank = Bank(base)
    placed = [
        bank.place(str(i), store.AdapterFiles(config, tensors, {}, {}))
        for i, (config, tensors) in enumerate(files)
    ]
    length = batch.input_ids.shape[1]
    per = -(-len(rows) // 8)
    spans = [
        (adapter, i * per * length, min((i + 1) * per, len(rows)) * length)
        for i, adapter in enumerate(placed)
        if i * per < len(rows)
    ]

    @torch.inference_mode()
    def ours(adapters: Any) -> None:  # noqa: ANN401
        with bank.using(adapters):
            base.hidden_states(batch.input_ids, mask, batch.position_ids)

    own = interleaved({"mixed": lambda: ours(spans), "one": lambda: ours(placed[0])}, rounds=rounds)
    bank.close()
    model = peft.get_peft_model(base.model, peft.LoraConfig(**_lora(files[0][0])), "a0")
    for i in range(1, 8):
        model.add_adapter(f"a{i}", peft.LoraConfig(**_lora(files[i][0])))
    model.eval()
    inner = model.base_model

    @torch.inference_mode()
    def theirs(names: list[str]) -> None:
        with inner._enable_peft_forward_hooks(adapter_names=names):
            base.hidden_states(batch.input_ids, mask, batch.position_ids)

    each = [f"a{i // per}" for i in rows]
    peer = interleaved(
        {"mixed": lambda: theirs(each), "one": lambda: theirs(["a0"] * len(each))}, rounds=rounds
    )
    model.unload()
    base.model.requires_grad_(False).eval()
    return {
        "rows": len(rows),
        "peftrank_mixed_over_one": ratio(own["mixed"], own["one"]),
        "peft_mixed_over_one": ratio(peer["mixed"], peer["one"]),
        "peft_over_peftrank_mixed": ratio(peer["mixed"], own["mixed"]),
    }


def _lora(config: dict[str, Any]) -> dict[str, Any]:
    kept = ("r", "lora_alpha", "target_modules", "task_type")
    return copy.deepcopy({key: config[key] for key in kept})


def markdown(result: dict[str, Any]) -> str:
    """Returns the figures as tables."""
    mixed, memory, peer = result["mixed"], result["memory"], result["peft_mixed"]
    lines = [
        f"{result['base']} ({result['quantization']}), {describe(result['machine'])}",
        "",
        f"{mixed['slates']} slates, {mixed['tokens']:,} tokens, {mixed['adapters']} adapters of "
        f"{len(METHODS)} methods in one pass",
        "",
        "| batch | time, as a ratio [range] |",
        "|---|--:|",
        f"| mixed / the same slates with one adapter | {shown(mixed['mixed_over_one'])} |",
        f"| 8 LoRA, a slate a row: mixed / one | {shown(peer['peftrank_mixed_over_one'])} |",
        f"| the same in PEFT (`adapter_names`) | {shown(peer['peft_mixed_over_one'])} |",
        f"| PEFT mixed / PeftRank mixed | {shown(peer['peft_over_peftrank_mixed'])} |",
        "",
        f"Largest difference of a score from its slate's alone: {mixed['worst_difference']:.2g} "
        f"mixed, {mixed['same_adapter_difference']:.2g} in a batch of one adapter (scores span "
        f"{mixed['spread_of_scores']:.2g}).",
        f"{memory['adapters']} resident adapters: {memory['own_bytes'] / 2**20:.0f} MiB of "
        f"weights, {memory['grown_bytes'] / 2**20:.0f} MiB more memory (x{memory['ratio']:.3f}).",
        "",
        "| switch to another domain | ms, median |",
        "|---|--:|",
    ]
    lines += [f"| {name} | {value:.3g} |" for name, value in result["switch"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

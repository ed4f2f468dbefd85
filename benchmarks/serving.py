"""A real server under load while its versions change: every answer checked, and its price.

    python -m benchmarks.serving --minutes 3                       # a random model made for it
    python -m benchmarks.serving --minutes 30 --base smollm2-135m  # nf4

Four domains of four methods with two versions each, of random weights. Clients in a process of
their own call a `peftrank serve` process over loopback, first at half of what the ranker does
offline, then as fast as they are answered; meanwhile a version is activated every second from
outside. Each answer is compared with the offline ranker's scores for the domain and version that it
names. Offline is `Ranker.rank` of the same slates, in a process of its own with as many threads,
before and after; so the clients' work costs the server and not the ranker only where cores are
few. What a slate's candidates cost in JSON and HTTP is all in the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, describe, machine, write
from peftrank import __version__, plugins, store
from peftrank.base import Base, load_base
from peftrank.card import adapter_card
from peftrank.config import load_config
from peftrank.formats._record import slate_record
from peftrank.prompts import PromptTemplate
from peftrank.ranker import Ranker
from peftrank.training.data import read_part
from peftrank.training.run import prompt_arguments
from peftrank.types import Slate

METHODS = {"news": "adalora", "ecommerce": "lora", "video": "parallel", "social": "houlsby"}
VERSIONS = ("0001", "0002")
FP32_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 0.1
"""Of the spread of a slate's scores, where weights or states are rounded: a pass's other slates
then change a score a little."""
_CALL = 64
"""Slates in one offline call, and connections at saturation; fewer where there are fewer slates, as
equal ones scored together would cost once."""


@dataclass(frozen=True)
class Plan:
    """What the processes share."""

    folder: str
    base: str
    quantization: str
    slates: int

    @property
    def store(self) -> Path:
        """The store of adapters."""
        return Path(self.folder) / "adapters"

    def load(self) -> Base:
        """Returns the base."""
        return load_base(self.base, quantization=self.quantization)

    def pool(self) -> list[Slate]:
        """Returns as many slates of each domain, in a random order that is always the same."""
        made = []
        for domain in METHODS:
            found = read_part(load_config(domain=domain).data, domain, "test")
            for place, slate in enumerate(found[: self.slates]):
                name = f"{domain}-{place}"
                made.append(replace(slate, slate_id=name, domain=domain, labels=None))
        random.Random(0).shuffle(made)
        return made


@dataclass(frozen=True)
class Answer:
    """What a client saw. Times are of the monotonic clock, which processes share."""

    asked: float
    done: float
    status: int
    domain: str
    version: str | None
    error: float
    """The largest difference of a score from the offline one, as a share of what is allowed."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--minutes", type=float, default=3.0, help="of load")
    parser.add_argument("--base", default="tiny", help="tiny: a random model made for this")
    parser.add_argument("--quantization", default="nf4", help="of another base")
    parser.add_argument("--slates", type=int, default=50, help="of each domain's sample")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--json", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end the server
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        tiny = options.base == "tiny"
        plan = Plan(
            folder,
            base=make_base(Path(folder) / "base") if tiny else options.base,
            quantization="none" if tiny else options.quantization,
            slates=options.slates,
        )
        result = apart(publish, plan)
        result |= {"threads_of_model": options.threads, "minutes": options.minutes}
        result["base"] = "random Llama, 8 layers of 256" if tiny else options.base
        measured = measure(plan, 60 * options.minutes, result["tolerance"])
    result = {"machine": machine(), **result, **measured}
    write(options.json, result)
    print(markdown(result))
    if result["failed"] or result["wrong"]:
        sys.exit(1)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """Returns what a function returns in a new process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def make_base(path: Path) -> str:
    """Saves a random model with a tokenizer of the samples' text, and returns its path."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pool = Plan("", "", "", 100).pool()
    texts = (text for slate in pool for item in slate.candidates for text in item.fields.values())
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def publish(plan: Plan) -> dict[str, Any]:
    """Saves two random adapters per domain; returns the tolerance of scores on this base."""
    import torch

    from benchmarks.domains import METHODS as OPTIONS
    from benchmarks.domains import random_adapter

    base = plan.load()
    seeds = itertools.count()
    for domain, method in METHODS.items():
        template = PromptTemplate(
            base.tokenizer, **prompt_arguments(load_config(domain=domain)), max_depth=base.max_depth
        )
        for _ in VERSIONS:
            seed = next(seeds)
            config, tensors = random_adapter(base, method, seed)
            torch.manual_seed(seed)
            readout = plugins.load("readouts", "score_head").build(
                base.hidden_size, base.tokenizer, base.lm_head
            )
            for weights in readout.parameters():
                weights.data += 0.1 * torch.randn_like(weights)
            name, settings = OPTIONS[method]
            manifest = {
                "peftrank_version": __version__,
                "method": {"name": name, "options": settings},
                "prompt": template.describe(),
                "readout": {"name": "score_head", "options": {}, "feature_names": []},
                "base": dict(vars(base.identity)),
                "config": {},
                "metrics": {},
                "data": {},
                "versions": {},
            }
            files = store.AdapterFiles(config, tensors, dict(readout.state_dict()), manifest)
            card = adapter_card({**manifest, "domain": domain})
            store.save_adapter(plan.store, domain, files, card=card)
    identity = base.identity
    exact = identity.compute_dtype == "float32" and identity.quantization == "none"
    return {
        "quantization": identity.quantization,
        "compute_dtype": identity.compute_dtype,
        "tolerance": {"absolute": FP32_TOLERANCE} if exact else {"of_spread": ROUNDED_TOLERANCE},
    }


def offline(plan: Plan, seconds: float) -> dict[str, Any]:
    """Returns slates per second of `Ranker.rank`, tokens per slate, and the scores by version."""
    import torch

    ranker = Ranker(plan.load(), store=plan.store)
    pool = plan.pool()
    scores: dict[str, list[dict[str, float]]] = {}
    for version in VERSIONS:
        for domain in METHODS:
            ranker.load_adapter(f"{domain}@{version}", domain=domain)
        ranked = [ranker.rank(slate) for slate in pool]
        scores[version] = [dict(zip(r.item_ids, r.scores, strict=True)) for r in ranked]
    size = min(_CALL, len(pool))
    ranker.rank(pool[:size])
    done, turn, started = 0, 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds:
        call = [pool[(turn + i) % len(pool)] for i in range(size)]
        done, turn = done + len(ranker.rank(call)), turn + size
    tokens = statistics.mean(one.tokens for one in ranker.prepare(pool))
    return {
        "slates_per_second": done / taken,
        "tokens_per_slate": tokens,
        "threads": torch.get_num_threads(),
        "scores": scores,
    }


class Server:
    """A `peftrank serve` process."""

    def __init__(self, plan: Plan):
        self.log = Path(plan.folder) / "server.log"
        options = ("--port", "0", "--watch-seconds", "0.2", "--history", "none")
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "peftrank", "serve", "--store", plan.store, *options],
                stderr=log,
            )
        self.port = int(self._event("listening")["url"].rpartition(":")[2])
        self._event("ready")

    def _event(self, name: str, seconds: float = 300) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.popen.poll() is None:
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # half of a line
                    if (event := json.loads(line))["event"] == name:
                        return dict(event)
            time.sleep(0.1)
        raise SystemExit(f"the server said no {name!r}:\n{self.log.read_text()}")

    def resident_mib(self) -> float:
        """Returns the memory it holds (Linux)."""
        pages = Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metrics(self) -> dict[str, float]:
        """Returns what it counted, by name and labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {x.rpartition(" ")[0]: float(x.split()[-1]) for x in lines if x[0] != "#"}

    def end(self) -> int:
        """Stops it as an operator does and returns its exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(120)


@dataclass(frozen=True)
class Load:
    """What the clients do."""

    port: int
    seconds: float
    connections: int
    rate: float | None
    """Requests per second, at random moments; None: as fast as they are answered."""


def clients(
    plan: Plan, load: Load, scores: dict[str, list[dict[str, float]]], tolerance: dict[str, float]
) -> list[Answer]:
    """Returns an answer for each request, one slate each, over connections that stay open."""
    pool = plan.pool()
    bodies = [json.dumps({"slate": slate_record(slate)}).encode() for slate in pool]
    end = time.monotonic() + load.seconds
    moments = _moments(end, load.rate)
    turns = itertools.count()
    lock = threading.Lock()

    def run() -> list[Answer]:
        connection = http.client.HTTPConnection("127.0.0.1", load.port, timeout=60)
        answers = []
        while True:
            with lock:
                asked, place = next(moments, None), next(turns) % len(pool)
            if asked is None:
                connection.close()
                return answers
            time.sleep(max(0.0, asked - time.monotonic()))
            answers.append(ask(connection, asked, place))

    def ask(connection: http.client.HTTPConnection, asked: float, place: int) -> Answer:
        domain, version, error = pool[place].domain or "", None, 0.0
        try:
            connection.request("POST", "/v1/rank", bodies[place])
            response = connection.getresponse()
            status, value = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            connection.close()
            status = 0
        done = time.monotonic()
        if status == 200:
            version, error = compare(value, pool[place], place)
        return Answer(asked, done, status, domain, version, error)

    def compare(value: dict[str, Any], slate: Slate, place: int) -> tuple[str, float]:
        (found,) = value["rankings"]
        expected = scores[found["version"]][place]
        given = dict(zip(found["item_ids"], found["scores"], strict=True))
        ordered = found["scores"] == sorted(found["scores"], reverse=True)
        own = (found["slate_id"], found["domain"]) == (slate.slate_id, slate.domain)
        if not (own and ordered and given.keys() == expected.keys()):
            return found["version"], float("inf")
        worst = max(abs(given[name] - expected[name]) for name in expected)
        return found["version"], worst / allowed(expected, tolerance)

    with ThreadPoolExecutor(load.connections) as threads:
        runs = [threads.submit(run) for _ in range(load.connections)]
        return [answer for one in runs for answer in one.result()]


def _moments(end: float, rate: float | None) -> Iterator[float]:
    """Yields when to ask: waiting for an answer puts no later question off (or: at once)."""
    if rate is None:
        while (now := time.monotonic()) < end:
            yield now
        return
    chance, moment = random.Random(1), time.monotonic()
    while (moment := moment + chance.expovariate(rate)) < end:
        yield moment


def allowed(expected: dict[str, float], tolerance: dict[str, float]) -> float:
    """Returns how far a slate's scores may be from the offline ones."""
    if "absolute" in tolerance:
        return tolerance["absolute"]
    return tolerance["of_spread"] * (max(expected.values()) - min(expected.values()))


def measure(plan: Plan, seconds: float, tolerance: dict[str, float]) -> dict[str, Any]:
    """Returns all figures: offline, under moderate load, at saturation, offline again."""
    short = min(30.0, seconds / 4)
    before = apart(offline, plan, short)
    scores = before["scores"]
    rate = before["slates_per_second"]
    connections = min(_CALL, len(plan.pool()))
    server = Server(plan)
    try:
        work = {
            "moderate": Load(server.port, seconds / 3, connections, rate / 2),
            "saturation": Load(server.port, seconds * 2 / 3, connections, None),
        }
        warm = Load(server.port, min(5.0, seconds / 10), connections, None)
        apart(clients, plan, warm, scores, tolerance)
        with activating(plan) as activations, watching(server) as memory:
            phases = {k: apart(clients, plan, load, scores, tolerance) for k, load in work.items()}
        counted = server.metrics()
    finally:
        code = server.end()
    after = apart(offline, plan, short)
    answers = [answer for phase in phases.values() for answer in phase]
    wrong = [a for a in answers if a.status == 200 and not a.error <= 1]
    offline_rates = before["slates_per_second"], after["slates_per_second"]
    saturated = _rate(phases["saturation"])
    batches = counted["peftrank_batch_slates_count"]
    return {
        "slates": len(plan.pool()),
        "tokens_per_slate": before["tokens_per_slate"],
        "threads": before["threads"],
        "requests": len(answers),
        "failed": sum(answer.status != 200 for answer in answers),
        "statuses": {str(k): n for k, n in Counter(a.status for a in answers).items()},
        "wrong": len(wrong),
        "worst_error_of_allowed": max(a.error for a in answers),
        "versions_apart": _versions_apart(scores, tolerance),
        "activations": len(activations),
        "swaps": sum(v for k, v in counted.items() if k.startswith("peftrank_adapter_swaps_total")),
        "load_failures": sum(
            v for k, v in counted.items() if k.startswith("peftrank_adapter_load_failures_total")
        ),
        "seconds_of_old_version": _delays(answers, activations),
        "phases": {name: _phase(work[name], done) for name, done in phases.items()},
        "slates_per_batch": counted["peftrank_batch_slates_sum"] / batches,
        "offline_slates_per_second": offline_rates,
        "saturation_over_offline": saturated / statistics.mean(offline_rates),
        "saturation_over_offline_range": [saturated / max(offline_rates),
                                          saturated / min(offline_rates)],
        "resident_mib": memory,
        "exit_status": code,
    }  # fmt: skip


@contextlib.contextmanager
def activating(plan: Plan) -> Iterator[list[tuple[float, str, str]]]:
    """Activates a version every second, domain by domain; yields when which one was."""
    done: list[tuple[float, str, str]] = []
    stop = threading.Event()

    def run() -> None:
        for version in itertools.cycle(VERSIONS):  # the second one is active at first
            for domain in METHODS:
                if stop.wait(1):
                    return
                store.activate(plan.store, domain, version)
                done.append((time.monotonic(), domain, version))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def watching(server: Server) -> Iterator[list[tuple[float, float]]]:
    """Yields a list that gets seconds and the server's memory in MiB, sixty times a minute."""
    seen: list[tuple[float, float]] = []
    stop = threading.Event()

    def run() -> None:
        started = time.monotonic()
        while not stop.wait(1):
            seen.append((round(time.monotonic() - started), round(server.resident_mib(), 1)))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _versions_apart(
    scores: dict[str, list[dict[str, float]]], tolerance: dict[str, float]
) -> dict[str, float]:
    """Returns how far a slate's two versions differ, as a multiple of what is allowed.

    Where it is more than 2, an answer of the wrong version cannot pass.
    """
    apart_by = [
        max(abs(a[name] - b[name]) for name in a) / allowed(a, tolerance)
        for a, b in zip(*scores.values(), strict=True)
    ]
    return {
        "least": min(apart_by),
        "median": statistics.median(apart_by),
        "share_above_2": statistics.mean(value > 2 for value in apart_by),
    }


def _delays(
    answers: list[Answer], activations: list[tuple[float, str, str]]
) -> dict[str, float | int]:
    """Returns seconds from an activation until the last answer of the version before.

    Only where one of the new version came before the next activation of the domain.
    """
    found = []
    ends = {domain: float("inf") for domain in METHODS}
    for moment, domain, version in reversed(activations):
        own = [a for a in answers if a.domain == domain and moment < a.done < ends[domain]]
        ends[domain] = moment
        if any(a.version == version for a in own):
            late = [a.done for a in own if a.version not in (None, version)]
            found.append(max(late, default=moment) - moment)
    return {
        "median": statistics.median(found) if found else 0.0,
        "highest": max(found, default=0.0),
        "activations": len(found),
    }


def _rate(answers: list[Answer]) -> float:
    """Returns good answers per second, from the first question to the last answer."""
    taken = max(a.done for a in answers) - min(a.asked for a in answers)
    return sum(a.status == 200 for a in answers) / taken


def _phase(load: Load, answers: list[Answer]) -> dict[str, Any]:
    times = sorted(1000 * (a.done - a.asked) for a in answers)
    return {
        "asked_per_second": load.rate,
        "connections": load.connections,
        "requests": len(answers),
        "slates_per_second": _rate(answers),
        "p50_ms": times[len(times) // 2],
        "p99_ms": times[int(0.99 * len(times))],
        "highest_ms": times[-1],
    }


def markdown(result: dict[str, Any]) -> str:
    """Returns the figures as tables."""
    apart_by, delay, memory = (
        result[key] for key in ("versions_apart", "seconds_of_old_version", "resident_mib")
    )
    allowed_ = " ".join(f"{v:g} {k.replace('_', ' ')}" for k, v in result["tolerance"].items())
    lines = [
        f"{result['base']} ({result['quantization']}, {result['compute_dtype']}), "
        f"{result['tokens_per_slate']:.0f} tokens a slate; {describe(result['machine'])}; "
        f"{result['threads']} threads in the server and offline",
        "",
        "| | requests | slates/s | p50 ms | p99 ms | highest ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, phase in result["phases"].items():
        lines.append(
            f"| {name} | {phase['requests']:,} | {phase['slates_per_second']:.1f} | "
            f"{phase['p50_ms']:.1f} | {phase['p99_ms']:.1f} | {phase['highest_ms']:.1f} |"
        )
    rates = result["offline_slates_per_second"]
    low, high = result["saturation_over_offline_range"]
    lines += [
        f"| offline before, after | | {rates[0]:.1f}, {rates[1]:.1f} | | | |",
        "",
        f"Saturation / offline: {result['saturation_over_offline']:.2f} [{low:.2f}, {high:.2f}], "
        f"{result['slates_per_batch']:.1f} slates a batch.",
        f"Requests {result['requests']:,}, failed {result['failed']} "
        f"(by status: {result['statuses']}), wrong {result['wrong']} "
        f"(allowed: {allowed_}; worst {result['worst_error_of_allowed']:.2g} of it; the versions "
        f"of a slate are {apart_by['least']:.3g} to {apart_by['median']:.3g} of it apart, least "
        f"and median; more than 2 for {apart_by['share_above_2']:.0%}).",
        f"{result['activations']} activations, {result['swaps']:.0f} swaps, "
        f"{result['load_failures']:.0f} failures; the version before gave its "
        f"last answer {delay['median']:.2f} s after one (median; {delay['highest']:.2f} at most).",
        f"Memory of the server, MiB: {', '.join(_some(memory))}. "
        f"Exit status {result['exit_status']}.",
    ]
    return "\n".join(lines)


def _some(memory: list[tuple[float, float]], most: int = 8) -> list[str]:
    places = sorted({round(i * (len(memory) - 1) / (most - 1)) for i in range(most)})
    return [f"{memory[i][1]:.0f} at {memory[i][0]:.0f} s" for i in places]


if __name__ == "__main__":
    main()

"""Many domains on one ranker: mixed passes, tiers, versions in flight, explanations."""

import asyncio
import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import _random_llama
from fresh import scores
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_ranker import METHODS, PARTS, close, publish, slates_for

from peftrank import store
from peftrank._tier import Tier
from peftrank.base import base_from_model, load_base
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.formats.slates import write_slates
from peftrank.ranker import Ranker

VERSIONS = ("0001", "0002")


@pytest.fixture(scope="module")
def stock(tokenizer, tmp_path_factory):
    """A store with two versions of three domains of three methods, for `tiny_decoder`."""
    base = base_from_model(_random_llama(tokenizer), tokenizer, name="tiny-decoder")
    folder = tmp_path_factory.mktemp("stock")
    for domain in METHODS:
        for seed, _ in enumerate(VERSIONS):
            publish(base, folder, domain, seed=10 * len(domain) + seed)
    return folder


@pytest.fixture
def many(tiny_decoder, stock):
    """A ranker with the three domains, active versions."""
    with Ranker(tiny_decoder, store=stock) as ranker:
        for domain in METHODS:
            ranker.load_adapter(domain)
        yield ranker


def mixed_slates(make_slate, n=9, **options):
    domains = list(METHODS)
    return [
        make_slate(
            n_history=i % 4,
            n_candidates=2 + i % 5,
            seed=i,
            user_id=f"u{i % 2}",
            domain=domains[i % 3],
            **options,
        )
        for i in range(n)
    ]


def count_passes(ranker, monkeypatch):
    """Returns the list to which every forward pass adds the number of its slates."""
    passes = []
    real = ranker._score_pass
    monkeypatch.setattr(
        ranker, "_score_pass", lambda prepared: passes.append(len(prepared)) or real(prepared)
    )
    return passes


@pytest.mark.parametrize("row_tokens", [1, 60, 4000])
def test_one_pass_over_several_domains_gives_the_scores_of_one_pass_each(
    many, make_slate, monkeypatch, row_tokens
):
    slates = mixed_slates(make_slate)
    expected = [many.score(slate) for slate in slates]
    monkeypatch.setattr(many, "_row_tokens", row_tokens)
    monkeypatch.setattr(many, "_micro_tokens", 10**6)
    passes = count_passes(many, monkeypatch)
    assert close(many.score(slates), expected)
    assert passes == [len(slates)]


def test_a_pass_may_mix_an_encoder_s_domains_and_readouts_with_features(
    tiny_encoder, tmp_path, make_slate
):
    publish(tiny_encoder, tmp_path, "news", features=("popularity",))
    publish(tiny_encoder, tmp_path, "social", features=("recency", "popularity"))
    ranker = Ranker(tiny_encoder, store=tmp_path)
    slates = []
    for i, domain in enumerate(("news", "social") * 3):
        ranker.load_adapter(domain)
        names = ("popularity", "recency")
        slates.append(make_slate(n_candidates=2 + i, seed=i, domain=domain, features=names))
    assert close(ranker.score(slates), [ranker.score(slate) for slate in slates])


def test_the_untrained_base_may_share_a_pass_with_adapters(many, make_slate):
    many.load_readout("plain", prompt={"parts": {**PARTS, "question": "Next?"}})
    slates = [make_slate(seed=i, domain=d) for i, d in enumerate(("news", "plain", "social"))]
    assert close(many.score(slates), [many.score(slate) for slate in slates])


def test_what_was_prepared_is_scored_with_the_version_of_its_time(tiny_decoder, stock, make_slate):
    slates = slates_for(make_slate, 3)
    ranker = Ranker(tiny_decoder, store=stock)
    expected = {}
    for version in VERSIONS:
        ranker.load_adapter(f"news@{version}")
        expected[version] = ranker.score(slates, domain="news")
    ranker.load_adapter("news@0001")
    old = ranker.prepare(slates, domain="news")
    ranker.load_adapter("news@0002")
    new = ranker.prepare(slates, domain="news")
    ranker.unload_adapter("news")
    assert [p.version for p in (old[0], new[0])] == ["0001", "0002"]
    # Two versions of a domain in one pass.
    together = ranker.score_prepared([*old, *new])
    assert close(together, [*expected["0001"], *expected["0002"]])
    with pytest.raises(ConfigError, match="not loaded"):
        ranker.prepare(slates, domain="news")


def test_a_failed_load_leaves_the_earlier_version_in_place(many, make_slate, tmp_path):
    slate = make_slate()
    before = many.score(slate, domain="news")
    (tmp_path / "broken").mkdir()
    with pytest.raises(AdapterError):
        many.load_adapter(tmp_path / "broken", domain="news")
    assert many.score(slate, domain="news") == before
    assert many.adapters["news"].version == "0002"


def test_adapters_say_what_is_loaded(many):
    info = many.adapters["video"]
    assert (info.domain, info.method, info.version, info.source) == (
        "video", "adalora", "0002", "video",
    )  # fmt: skip
    files = store.load_adapter(many.store / "video" / "0002")
    size = sum(t.nbytes for t in (*files.tensors.values(), *files.readout.values()))
    assert (info.nbytes, info.tier, info.pinned) == (size, "device", False)
    memory = many.memory()
    assert memory["base_bytes"] > 0
    assert 0 < memory["device_bytes"] <= sum(a.nbytes for a in many.adapters.values())


def test_a_budget_keeps_the_adapters_used_last_and_brings_the_others_back(
    tiny_decoder, stock, make_slate
):
    slates = slates_for(make_slate, 2)
    with Ranker(tiny_decoder, store=stock) as whole:
        for domain in METHODS:
            whole.load_adapter(domain)
        expected = {domain: whole.score(slates, domain=domain) for domain in METHODS}
        sizes = {domain: info.nbytes for domain, info in whole.adapters.items()}
    budget = max(sizes.values())
    ranker = Ranker(tiny_decoder, store=stock, device_bytes=budget, host_bytes=None)
    for domain in METHODS:
        ranker.load_adapter(domain)
    seen = set()
    for domain in (*METHODS, *reversed(METHODS)):
        assert ranker.score(slates, domain=domain) == expected[domain]
        assert ranker.adapters[domain].tier == "device"
        assert ranker.memory()["device_bytes"] <= budget
        seen |= {info.tier for info in ranker.adapters.values()}
    assert seen == {"device", "host"}


def test_what_left_host_memory_too_is_read_and_checked_again(tiny_decoder, stock, make_slate):
    slate = make_slate()
    ranker = Ranker(tiny_decoder, store=stock, device_bytes=1, host_bytes=1)
    for domain in ("news", "video"):
        ranker.load_adapter(domain)
    assert ranker.adapters["news"].tier == "disk"
    assert ranker.score(slate, domain="news")
    folder = stock / "video" / "0002"
    damaged = folder / "adapter_model.safetensors"
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-1])
        assert ranker.adapters["video"].tier == "disk"
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
            ranker.score(slate, domain="video")
    finally:
        damaged.write_bytes(content)
    assert ranker.score(slate, domain="video")


def test_a_pinned_adapter_stays_whatever_the_budget(tiny_decoder, stock, make_slate):
    ranker = Ranker(tiny_decoder, store=stock, device_bytes=1, host_bytes=1)
    ranker.load_adapter("news", pin=True)
    for domain in ("video", "social", "video"):
        ranker.load_adapter(domain)
        ranker.score(make_slate(), domain=domain)
        assert ranker.adapters["news"].tier == "device"


def test_an_unloaded_domain_leaves_no_bytes_behind(many, make_slate):
    prepared = many.prepare([make_slate()], domain="news")
    for domain in METHODS:
        many.unload_adapter(domain)
    assert many.memory()["device_bytes"] == many.memory()["host_bytes"] == 0
    assert many.score_prepared(prepared)  # what was prepared holds its own
    assert many.memory()["device_bytes"] == 0


def test_an_adapter_unloaded_while_it_comes_back_is_not_kept(
    tiny_decoder, stock, make_slate, monkeypatch
):
    with Ranker(tiny_decoder, store=stock) as whole:
        whole.load_adapter("news")
        budget = whole.memory()["device_bytes"]
    ranker = Ranker(tiny_decoder, store=stock, device_bytes=budget)
    for domain in ("news", "video"):
        ranker.load_adapter(domain)
    assert ranker.adapters["news"].tier == "disk"
    real = store.load_adapter

    def slow(path):
        files = real(path)
        ranker.unload_adapter("news")
        return files

    monkeypatch.setattr(store, "load_adapter", slow)
    assert ranker.score_prepared(ranker.prepare([make_slate()], domain="news"))
    assert ranker.domains == ("video",)
    assert ranker.memory()["device_bytes"] == 0  # video went for it, and it left at once


def test_a_tier_s_bytes_are_those_of_what_it_keeps():
    tier = Tier(10)
    for key, size in (("a", 4), ("b", 4), ("c", 4)):
        tier.put(key, key, size)
    assert [key in tier for key in "abc"] == [False, True, True]
    assert tier.get("b") == "b"
    tier.put("d", "d", 5)
    assert [key in tier for key in "bcd"] == [True, False, True]
    tier.put("e", "e", 99)  # larger than the budget: not kept, and nobody goes for it
    assert [key in tier for key in "bde"] == [True, True, False]
    tier.put("f", "f", 99, pinned=True)
    assert [key in tier for key in "bdf"] == [False, False, True]
    tier.drop("f")
    tier.drop("f")
    assert (tier.nbytes, tier.get("f")) == (0, None)


def test_arank_ranks_without_blocking_the_event_loop(many, make_slate):
    slates = mixed_slates(make_slate)

    async def both():
        ranking = asyncio.create_task(many.arank(slates, k=2))
        turns = 0
        while not ranking.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns, await ranking

    turns, ranked = asyncio.run(both())
    assert turns > 0
    assert ranked == many.rank(slates, k=2)


def test_an_explanation_is_what_each_history_item_does_to_the_ranking(many, make_slate):
    slate = make_slate(n_history=4, n_candidates=3)
    explained = many.explain(slate, domain="news")
    assert explained.scores == pytest.approx(many.score(slate, domain="news"), abs=1e-5)
    assert explained.history == (0, 1, 2, 3)
    for out, effects in zip(explained.history, explained.effects, strict=True):
        rest = tuple(item for i, item in enumerate(slate.history) if i != out)
        without = many.score(
            type(slate)(slate.slate_id, slate.user_id, rest, slate.candidates), domain="news"
        )
        gained = torch.tensor(explained.scores) - torch.tensor(without)
        torch.testing.assert_close(torch.tensor(effects), gained - gained.mean(), atol=1e-4, rtol=0)


def test_an_explanation_leaves_out_what_the_prompt_leaves_out(many, make_slate):
    slate = make_slate(n_history=30, n_candidates=2)  # the template reads the newest 20
    explained = many.explain(slate, domain="news")
    assert explained.history == tuple(range(10, 30))
    assert explained.scores == pytest.approx(many.score(slate, domain="news"), abs=1e-5)
    none = many.explain(make_slate(n_history=0), domain="news")
    assert (none.history, none.effects) == ((), ())


def test_a_bad_slate_among_good_ones_is_named(many, make_slate):
    bad = make_slate(seed=3, slate_id="bad")
    bad = type(bad)("bad", "u", (), ())
    with pytest.raises(DataError, match="'bad'"):
        many.prepare([make_slate(), bad], domain="news")


class Domains(RuleBasedStateMachine):
    """Threads rank while adapters come, go and change; nobody may get another's scores."""

    ranker: Ranker
    slates: list
    expected: dict

    def __init__(self):
        super().__init__()
        self.loaded = set()
        self.unloads = Counter()
        self.pool = ThreadPoolExecutor(4)
        self.running = []

    @rule(domain=st.sampled_from(sorted(METHODS)), version=st.sampled_from(VERSIONS))
    def load(self, domain, version):
        self.ranker.load_adapter(f"{domain}@{version}")
        self.loaded.add(domain)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def unload(self, data):
        domain = data.draw(st.sampled_from(sorted(self.loaded)))
        self.ranker.unload_adapter(domain)
        self.loaded.discard(domain)
        self.unloads[domain] += 1

    @rule(domain=st.sampled_from(sorted(METHODS)), version=st.sampled_from(VERSIONS))
    def activate(self, domain, version):
        store.activate(self.ranker.store, domain, version)
        self.ranker.load_adapter(domain)
        assert self.ranker.adapters[domain].version == version
        self.loaded.add(domain)

    @rule(domains=st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=4))
    def rank(self, domains):
        started = set(self.loaded), Counter(self.unloads)
        self.running.append((self.pool.submit(self.work, domains), *started))

    @rule()
    def wait(self):
        while self.running:
            future, loaded, unloads = self.running.pop()
            missing = future.result()
            # Not loaded when it started, or unloaded since: only then may it be refused.
            kept = {domain for domain in loaded if self.unloads[domain] == unloads[domain]}
            assert missing not in kept

    def work(self, domains):
        slates = [self.slates[i] for i in range(len(domains))]
        prepared = []
        for slate, domain in zip(slates, domains, strict=True):
            try:
                prepared += self.ranker.prepare([slate], domain=domain)
            except ConfigError:
                return domain
        for i, found in enumerate(self.ranker.score_prepared(prepared)):
            right = self.expected[domains[i], prepared[i].version][i]
            assert found == pytest.approx(right, abs=1e-4)
        return None

    def teardown(self):
        self.wait()
        self.pool.shutdown()
        for domain in self.ranker.domains:
            self.ranker.unload_adapter(domain)
        assert self.ranker.memory()["device_bytes"] == 0


def check_machine(base, folder, slates, expected, **budgets):
    alike = [
        max(abs(x - y) for x, y in zip(a[i], b[i], strict=True))
        for i in range(len(slates))
        for key, a in expected.items()
        for other, b in expected.items()
        if key != other
    ]
    assert min(alike) > 1e-3  # a mix-up would be seen
    ranker = Ranker(base, store=folder, **budgets)
    case = type("Case", (Domains,), {"ranker": ranker, "slates": slates, "expected": expected})
    run_state_machine_as_test(
        case, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )


@pytest.mark.parametrize("budgets", [{}, {"device_bytes": 1, "host_bytes": 1}])
def test_no_sequence_of_calls_gives_scores_of_another_domain_or_version(
    tiny_decoder, stock, make_slate, budgets
):
    slates, expected = slates_for(make_slate, 4), {}
    for domain in METHODS:
        for version in VERSIONS:  # one adapter alone on the base
            with Ranker(tiny_decoder, store=stock) as fresh:
                fresh.load_adapter(f"{domain}@{version}")
                expected[domain, version] = fresh.score(slates, domain=domain)
    check_machine(tiny_decoder, stock, slates, expected, **budgets)


@pytest.mark.slow
def test_the_scores_are_those_of_processes_that_know_one_adapter_each(
    tokenizer, make_slate, tmp_path
):
    _random_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(
        str(tmp_path / "base"), quantization="none", compute_dtype="float32", device="cpu"
    )
    slates, jobs = slates_for(make_slate, 4), {}
    write_slates(tmp_path / "slates.jsonl", slates)
    for domain in METHODS:
        for seed, version in enumerate(VERSIONS):
            path, _, _ = publish(base, tmp_path / "store", domain, seed=10 * len(domain) + seed)
            jobs[domain, version] = tuple(
                map(str, (tmp_path / "base", path, tmp_path / "slates.jsonl"))
            )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fresh", "peftrank.ranker"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        expected = dict(zip(jobs, pool.starmap(scores, jobs.values(), chunksize=1), strict=True))
    check_machine(base, tmp_path / "store", slates, expected)


def test_skipped_layers_stay_skipped_when_an_adapter_comes_back(tiny_decoder, tmp_path, make_slate):
    publish(tiny_decoder, tmp_path, "news", seed=0)
    slates = slates_for(make_slate, 3)
    with Ranker(tiny_decoder, store=tmp_path, device_bytes=1, host_bytes=0) as ranker:
        ranker.load_adapter("news", domain="whole")
        ranker.load_adapter("news", domain="dropped", skip_layers=1)
        whole, dropped = (ranker.score(slates, domain=name) for name in ("whole", "dropped"))
        assert not any(close(a, b) for a, b in zip(whole, dropped, strict=True))
        assert ranker.adapters["dropped"].tier == "disk"
        assert ranker.score(slates, domain="dropped") == dropped
        assert ranker.score(slates, domain="whole") == whole

import copy
import json
import random
import threading
from dataclasses import replace

import peft
import pytest
import torch
import yaml
from published import save_published

from peftrank import plugins, store
from peftrank.base import base_from_model, state_hash
from peftrank.card import adapter_card
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.model import RankingModel
from peftrank.prompts import PromptTemplate, collate
from peftrank.ranker import Ranker
from peftrank.types import Item, RankedList, Slate

PARTS = {"history": "- {{ title }}\n", "candidate": "{{ title }}"}
METHODS = {
    "news": ("lora", {"r": 4}),
    "video": ("adalora", {"init_r": 6, "target_r": 3, "alpha": 16}),
    "social": ("adapter", {}),
}


def randomize(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def publish(base, folder, domain, *, seed=1, features=(), mode="isolated", **manifest):
    """Saves a random adapter of the domain's method; returns its path and the model it is from."""
    name, options = METHODS[domain]
    copied = copy.deepcopy(base.model)
    method = plugins.load("methods", name)(total_steps=100, **options)
    model = peft.get_peft_model(copied, method.config(copied))
    randomize(model, seed)
    method.finalize(model)
    exported = method.export(model)
    readout = plugins.load("readouts", "score_head").build(
        base.hidden_size, base.tokenizer, base.lm_head, feature_names=features
    )
    randomize(readout, seed)
    template = PromptTemplate(base.tokenizer, parts=PARTS, mode=mode)
    path = save_published(
        folder,
        domain,
        base,
        template,
        readout,
        METHODS[domain],
        exported,
        features=features,
        **manifest,
    )
    adapted = base_from_model(copied, base.tokenizer, name="adapted")
    return path, RankingModel(adapted, readout.eval()), template


@pytest.fixture
def stocked(tiny_decoder, tmp_path):
    """A ranker with three domains of three methods, and the models they were saved from."""
    models = {}
    for seed, domain in enumerate(METHODS):
        _, model, template = publish(tiny_decoder, tmp_path, domain, seed=seed)
        models[domain] = (model, template)
    ranker = Ranker(tiny_decoder, store=tmp_path, micro_tokens=200, row_tokens=100)
    for domain in METHODS:
        assert ranker.load_adapter(domain) == domain
    return ranker, models


def direct(model, template, slates, **options):
    """Scores as training computes them: PEFT's own model, one batch."""
    batch = collate(slates, template, pad_token_id=model.base.pad_token_id, **options)
    with torch.no_grad():
        scores = model(batch)
    return [tuple(r[: len(s.candidates)].tolist()) for r, s in zip(scores, slates, strict=True)]


def close(a, b):
    return all(x == pytest.approx(y, abs=2e-5) for x, y in zip(a, b, strict=True))


def slates_for(make_slate, n, **options):
    """Slates of unequal length by a few users."""
    return [
        make_slate(n_history=i % 5, n_candidates=2 + i % 4, seed=i, user_id=f"u{i % 3}", **options)
        for i in range(n)
    ]


@pytest.mark.parametrize("domain", METHODS)
def test_scores_are_those_of_the_trained_peft_model(stocked, make_slate, domain):
    ranker, models = stocked
    slates = slates_for(make_slate, 12)
    assert close(ranker.score(slates, domain=domain), direct(*models[domain], slates))


@pytest.mark.parametrize("domain", METHODS)
def test_an_encoder_ranks_too(tiny_encoder, tmp_path, make_slate, domain):
    path, model, template = publish(tiny_encoder, tmp_path, domain)
    ranker = Ranker(tiny_encoder)
    ranker.load_adapter(path)
    slates = slates_for(make_slate, 6)
    assert close(ranker.score(slates, domain=domain), direct(model, template, slates))


def test_the_base_is_unchanged_by_ranking(stocked, make_slate):
    ranker, _ = stocked
    before = state_hash(ranker.base.model)
    for domain in METHODS:
        ranker.score(make_slate(), domain=domain)
    assert state_hash(ranker.base.model) == before


def test_a_call_may_mix_domains_and_methods_and_keeps_the_order(stocked, make_slate):
    ranker, models = stocked
    slates = [
        make_slate(seed=i, domain=domain) for i, domain in enumerate([*METHODS, *METHODS] * 2)
    ]
    random.Random(0).shuffle(slates)
    expected = [direct(*models[slate.domain], [slate])[0] for slate in slates]
    assert close(ranker.score(slates), expected)
    assert [r.slate_id for r in ranker.rank(slates)] == [slate.slate_id for slate in slates]


def test_the_domain_of_the_call_is_for_all_its_slates(stocked, make_slate):
    ranker, models = stocked
    slates = [make_slate(seed=i, domain="video") for i in range(3)]
    assert close(ranker.score(slates, domain="news"), direct(*models["news"], slates))


def test_one_slate_gives_one_result_and_several_a_list(stocked, make_slate):
    ranker, _ = stocked
    slate = make_slate()
    one = ranker.rank(slate, domain="news")
    assert isinstance(one, RankedList)
    assert ranker.rank([slate], domain="news") == [one]
    assert ranker.score([slate], domain="news") == [ranker.score(slate, domain="news")]
    assert ranker.rank([], domain="news") == []
    assert ranker.score([]) == []


def test_ranked_lists_are_best_first_and_cut_at_k(stocked, make_slate):
    ranker, _ = stocked
    slate = make_slate(n_candidates=5)
    scores = dict(
        zip([c.item_id for c in slate.candidates], ranker.score(slate, domain="news"), strict=True)
    )
    ranked = ranker.rank(slate, domain="news")
    assert list(ranked.item_ids) == sorted(scores, key=scores.get, reverse=True)
    assert ranked.scores == tuple(scores[i] for i in ranked.item_ids)
    assert ranker.rank(slate, domain="news", k=2).item_ids == ranked.item_ids[:2]
    with pytest.raises(ConfigError, match="k=0"):
        ranker.rank(slate, domain="news", k=0)


def test_equal_scores_are_ordered_by_item_id_not_by_input(stocked):
    ranker, _ = stocked
    twins = [Item(name, {"title": "amber castle"}) for name in ("c", "a", "b")]
    for order in (twins, twins[::-1]):
        slate = Slate("s", "u", (), tuple(order))
        assert ranker.rank(slate, domain="news").item_ids == ("a", "b", "c")


def test_the_order_of_candidates_does_not_change_their_scores(stocked, make_slate):
    ranker, _ = stocked
    slate = make_slate(n_candidates=6)
    turned = Slate(slate.slate_id, slate.user_id, slate.history, slate.candidates[::-1])
    scores = ranker.score(slate, domain="news")
    assert close([ranker.score(turned, domain="news")], [scores[::-1]])


def test_a_set_adapter_compares_candidates_and_their_order_does_not_matter(
    tiny_decoder, tmp_path, make_slate
):
    publish(tiny_decoder, tmp_path, "news", mode="set")
    slates = slates_for(make_slate, 4)
    slate = slates[3]
    order = [2, 0, 4, 3, 1]
    shuffled = replace(slate, candidates=tuple(slate.candidates[i] for i in order), labels=None)
    with Ranker(tiny_decoder, store=tmp_path) as ranker:
        ranker.load_adapter("news")
        scores = ranker.score(slate, domain="news")
        assert close(ranker.score(shuffled, domain="news"), [scores[i] for i in order])
        assert close(ranker.score(slates, domain="news")[3], scores)
        fewer = replace(slate, candidates=slate.candidates[:2], labels=None)
        assert not close(ranker.score(fewer, domain="news"), scores[:2])
        untrained = ranker.prepare([slate], domain="news", untrained=True)
        assert len(ranker.score_prepared(untrained)[0]) == 5


def test_a_stream_gives_the_same_lists_with_bounded_memory(stocked, make_slate, monkeypatch):
    monkeypatch.setattr("peftrank.ranker._STREAM_SLATES", 4)
    ranker, _ = stocked
    slates = slates_for(make_slate, 10)
    taken = []

    def source():
        for slate in slates:
            taken.append(slate.slate_id)
            yield slate

    stream = ranker.rank_stream(source(), domain="video")
    first = next(stream)
    assert len(taken) == 4
    streamed, whole = [first, *stream], ranker.rank(slates, domain="video")
    assert [r.slate_id for r in streamed] == [r.slate_id for r in whole]
    assert close([r.scores for r in streamed], [r.scores for r in whole])


def test_threads_on_different_domains_get_the_scores_of_sequential_calls(stocked, make_slate):
    ranker, _ = stocked
    slates = slates_for(make_slate, 4)
    expected = {domain: ranker.score(slates, domain=domain) for domain in METHODS}
    wrong, start = [], threading.Barrier(len(METHODS))

    def work(domain):
        start.wait()
        for _ in range(15):
            if ranker.score(slates, domain=domain) != expected[domain]:
                wrong.append(domain)

    threads = [threading.Thread(target=work, args=(domain,)) for domain in METHODS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_domain_replaced_while_ranking_never_mixes_adapter_and_readout(
    tiny_decoder, tmp_path, make_slate
):
    slates = slates_for(make_slate, 3)
    ranker = Ranker(tiny_decoder, store=tmp_path)
    allowed = []
    for seed in (1, 2):
        publish(tiny_decoder, tmp_path, "news", seed=seed)
        ranker.load_adapter("news")
        allowed.append(ranker.score(slates, domain="news"))
    wrong, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            if ranker.score(slates, domain="news") not in allowed:
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    for i in range(12):
        ranker.load_adapter(f"news@000{1 + i % 2}")
    stop.set()
    thread.join()
    assert wrong == []


def test_an_adapter_can_be_loaded_by_version_folder_and_under_another_name(stocked, make_slate):
    ranker, _ = stocked
    path = ranker.store / "news" / "0001"
    assert ranker.load_adapter("news@0001", domain="copy") == "copy"
    assert ranker.load_adapter(path, domain="third") == "third"
    slate = make_slate()
    assert ranker.score(slate, domain="copy") == ranker.score(slate, domain="news")
    with pytest.raises(AdapterError, match="not a domain name"):
        ranker.load_adapter(path, domain="../x")


def test_an_unloaded_domain_is_gone_and_others_stay(stocked, make_slate):
    ranker, _ = stocked
    ranker.unload_adapter("news")
    assert ranker.domains == ("video", "social")
    with pytest.raises(ConfigError, match="'news' is not loaded"):
        ranker.score(make_slate(), domain="news")
    ranker.score(make_slate(), domain="video")
    with pytest.raises(ConfigError, match="not loaded"):
        ranker.unload_adapter("news")


def test_an_unknown_domain_is_an_error_with_a_hint_before_any_work(stocked, make_slate):
    ranker, _ = stocked
    with pytest.raises(ConfigError, match=r"did you mean 'video'.*Loaded: news, video, social"):
        ranker.rank(make_slate(), domain="vidoe")
    with pytest.raises(ConfigError, match=r"no domain given.*Slate\.domain"):
        ranker.rank(make_slate())


def test_leaving_the_with_block_takes_the_hooks_off_the_base(tiny_decoder, tmp_path):
    publish(tiny_decoder, tmp_path, "social")
    with Ranker(tiny_decoder, store=tmp_path) as ranker:
        ranker.load_adapter("social")
        assert repr(ranker) == "Ranker('tiny-decoder', domains={social: adapter})"
    assert ranker.domains == ()
    modules = tiny_decoder.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_an_adapter_of_another_base_is_refused(tiny_decoder, tmp_path):
    other = base_from_model(copy.deepcopy(tiny_decoder.model), tiny_decoder.tokenizer, name="other")
    with torch.no_grad():
        other.model.model.norm.weight.add_(1)
    other = base_from_model(other.model, tiny_decoder.tokenizer, name="other")
    publish(other, tmp_path, "news")
    with pytest.raises(AdapterError, match=r"trained on base 'other'.*not on 'tiny-decoder'"):
        Ranker(tiny_decoder, store=tmp_path).load_adapter("news")


def rewrite(path, name, data):
    manifest = json.loads((path / "peftrank.json").read_text())
    from peftrank import _folder

    (path / name).write_bytes(data)
    manifest["files"][name] = _folder._entry(data)
    (path / "peftrank.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_readout_that_does_not_fit_is_refused(tiny_decoder, tmp_path, change):
    from peftrank import _folder

    path, _, _ = publish(tiny_decoder, tmp_path, "news")
    readout = store.load_adapter(path).readout
    name = next(iter(readout))
    if change == "missing":
        del readout[name]
    elif change == "extra":
        readout["more"] = torch.ones(1)
    else:
        readout[name] = torch.ones(3)
    rewrite(path, "readout.safetensors", _folder._serialize(readout))
    with pytest.raises(AdapterError, match="does not fit"):
        Ranker(tiny_decoder).load_adapter(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": {"parts": PARTS, "colour": 1}}, "colour"),
        ({"prompt": {"parts": PARTS, "turn": "after"}}, "needs 'none'"),
        ({"readout": {"name": "nope", "options": {}, "feature_names": []}}, "nope"),
        ({"readout": {"name": "score_head", "options": {"x": 1}, "feature_names": []}}, "x"),
        ({"readout": {"name": "os:system", "options": {}, "feature_names": []}}, "allow_code"),
    ],
)
def test_a_manifest_that_this_version_cannot_use_is_refused(
    tiny_decoder, tmp_path, changes, message
):
    path, _, _ = publish(tiny_decoder, tmp_path, "news", **changes)
    ranker = Ranker(tiny_decoder)
    with pytest.raises(AdapterError, match=message):
        ranker.load_adapter(path)
    assert ranker.domains == ()


def test_a_readout_outside_the_package_loads_when_allowed(tiny_decoder, tmp_path, make_slate):
    outside = {
        "name": "peftrank.readouts.score_head:ScoreHead",
        "options": {},
        "feature_names": [],
    }
    path, model, template = publish(tiny_decoder, tmp_path, "news", readout=outside)
    ranker = Ranker(tiny_decoder)
    ranker.load_adapter(path, allow_code=True)
    slates = [make_slate()]
    assert close(ranker.score(slates, domain="news"), direct(model, template, slates))


def test_offline_a_hub_id_that_was_never_downloaded_is_an_error(tiny_decoder, tmp_path):
    with pytest.raises(AdapterError, match=r"no folder here and not in the Hub's cache"):
        Ranker(tiny_decoder, store=tmp_path).load_adapter("someone/news-adapter")


def test_candidate_features_reach_the_readout_in_the_order_of_training(
    tiny_decoder, tmp_path, make_slate
):
    names = ("recency", "popularity")
    path, model, template = publish(tiny_decoder, tmp_path, "news", features=names)
    ranker = Ranker(tiny_decoder)
    ranker.load_adapter(path)
    slates = slates_for(make_slate, 5, features=("popularity", "recency"))
    expected = direct(model, template, slates, feature_names=names)
    assert close(ranker.score(slates, domain="news"), expected)
    without = slates_for(make_slate, 5)
    with pytest.raises(DataError, match="recency, popularity"):
        ranker.score(without, domain="news")


def test_scores_that_are_not_finite_are_an_error(stocked, make_slate):
    ranker, _ = stocked
    readout = ranker._domains["news"].readout
    with torch.no_grad():
        next(readout.parameters()).fill_(float("inf"))
    with pytest.raises(AdapterError, match="NaN or infinite scores"):
        ranker.score(make_slate(), domain="news")


@pytest.mark.parametrize("readout", ["likelihood", "yes_no"])
def test_the_untrained_base_can_serve_a_domain(stocked, make_slate, readout):
    ranker, _ = stocked
    prompt = {"parts": {**PARTS, "question": "Next?", "answer": "\nyes or no?"}}
    ranker.load_readout("plain", prompt=prompt, readout=readout)
    slate = make_slate()
    ranked = ranker.rank(slate, domain="plain")
    assert sorted(ranked.item_ids) == sorted(item.item_id for item in slate.candidates)
    # The trained domains beside it, and a trained domain it replaces, do not leak into it.
    ranker.load_readout("news", prompt=prompt, readout=readout)
    assert ranker.score(slate, domain="news") == ranker.score(slate, domain="plain")
    ranker.unload_adapter("news")
    ranker.unload_adapter("plain")


def test_an_untrained_score_head_is_refused(tiny_decoder):
    with pytest.raises(ConfigError, match="nothing trained them"):
        Ranker(tiny_decoder).load_readout("news", prompt={"parts": PARTS}, readout="score_head")


def test_the_card_is_markdown_with_the_hub_s_front_matter(tiny_decoder, tmp_path):
    path, _, _ = publish(tiny_decoder, tmp_path, "news")
    text = (path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "peft"
    assert values["base_model"] == "tiny-decoder"
    assert {"peftrank", "lora", "news"} <= set(values["tags"])
    assert values["model-index"][0]["results"][0]["metrics"] == [{"type": "ndcg@10", "value": 0.51}]
    assert "| ndcg@10 | 0.5100 |" in body
    assert "PeftModel.from_pretrained" in body
    assert "AutoModelForCausalLM" in body
    manifest = store.load_adapter(path).manifest
    assert (
        yaml.safe_load(adapter_card(manifest, license="mit").split("---\n")[1])["license"] == "mit"
    )

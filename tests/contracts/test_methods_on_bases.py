"""Every method on every base type, however it is loaded: what an adapter promises to the others.

A case is a method, a base type and a way to load it. There two adapters are trained in turn on one
base, as a server and a tuner share it, and each test looks at one thing of what that left. The
slow cases have every method, and every base type, with every way to load; the quick ones are those
that first show a base type, a way to load, or a method on a decoder, an encoder, a quantized base.
"""

import functools
import itertools
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from fresh import all_scores
from peft import get_peft_model
from published import save_published
from test_methods_peft import OPTIONS as PEFT_OPTIONS
from tiny import tiny_model
from torch import Tensor

from peftrank import plugins
from peftrank._architectures import DECODERS, ENCODERS
from peftrank.base import QUANTIZATIONS, load_base, stored_weights
from peftrank.errors import AdapterError, ConfigError
from peftrank.export import check_mergeable, merge
from peftrank.formats.slates import write_slates
from peftrank.methods._peft_types import KINDS
from peftrank.model import RankingModel, hidden_states
from peftrank.prompts import PromptTemplate, pack
from peftrank.ranker import Ranker

METHODS = {
    **{name: (name, {}) for name in plugins.available("methods")},
    "lora-dora": ("lora", {"dora": True}),
    "lora-eva": ("lora", {"init": "eva", "r": 2}),
    "lora-loftq": ("lora", {"init": "loftq"}),
    "lora-olora": ("lora", {"init": "olora", "r": 4}),
    "lora-pissa": ("lora", {"init": "pissa", "r": 4}),
    "adapter-houlsby": ("adapter", {"kind": "houlsby", "layernorm": True}),
    "adapter-parallel": ("adapter", {"kind": "parallel"}),
}
OF_PEFT = {f"peft:{kind}": (f"peft:{kind}", PEFT_OPTIONS.get(kind, {})) for kind in KINDS}
LOADS = {
    # A checkpoint that is stored quantized has tests of its own: tests/test_stored_bases.py.
    **{name: {"quantization": name} for name in QUANTIZATIONS if name != "stored"},
    "nf4-single": {"quantization": "nf4", "double_quant": False},
    "fp4-single": {"quantization": "fp4", "double_quant": False},
    "bfloat16": {"quantization": "none", "compute_dtype": "bfloat16"},
}
BASES = (*DECODERS, *ENCODERS)
STARTS_ELSEWHERE = ("lora-loftq", *(f"peft:{k}" for k in KINDS if not KINDS[k].starts_at_base))
STEPS = 4


def refusal(name, kind, load):
    """What a ConfigError says where a method cannot train; None: it can."""
    peft = KINDS.get(name.removeprefix("peft:"))
    quantized = load not in ("none", "bfloat16")
    if name in ("full", "top_layers") and quantized:
        return "needs an unquantized base"
    if name == "ia3" and load != "none":
        return "needs an unquantized float32 base"
    if name == "ia3" and kind == "phi3":
        return "needs separate projections"
    if name == "lora-loftq" and not quantized:
        return "this base is not quantized"
    if name == "lora-dora" and load == "int8":
        return "does not train on an 8-bit base on a CPU"
    if peft and quantized and not peft.quantized:
        return "reads the base's weights themselves"
    with_biases = kind in (*ENCODERS, "qwen2")
    if peft and peft.in_place and (load == "int8" or (quantized and with_biases)):
        return "does not train in PEFT on an 8-bit base, nor on a 4-bit"
    return None


def in_turn(methods):
    """Cases that have every method with every way to load, and every base type with each."""
    kinds = itertools.cycle(BASES)
    made = [(name, next(kinds), load) for load in LOADS for name in methods]
    return [case for case in made if refusal(*case) is None]


def few(cases):
    """Those with a base type, a way to load, or a method on such a base that none before had."""
    seen, kept = set(), []
    for name, kind, load in cases:
        quantized = load not in ("none", "bfloat16")
        new = {kind, load, (name, "decoder", kind in DECODERS), (name, "quantized", quantized)}
        if not new <= seen:
            kept.append((name, kind, load))
        seen |= new
    return kept


ALL = [*in_turn(METHODS), *in_turn(OF_PEFT)]
QUICK = [*few(in_turn(METHODS)), ("peft:LN_TUNING", "llama", "bfloat16")]
SLOW = [case for case in ALL if case not in QUICK]
REFUSED = [
    case
    for case in (
        *itertools.product((*METHODS, *OF_PEFT), ["llama"], LOADS),
        ("ia3", "phi3", "none"),
        ("peft:C3A", "roberta", "fp4"),
    )
    if refusal(*case)
]


def marked(cases, *marks):
    return [pytest.param(case, id="-".join(case), marks=marks) for case in cases]


every_case = pytest.mark.parametrize("case", [*marked(QUICK), *marked(SLOW, pytest.mark.slow)])


@dataclass
class Trained:
    """What two adapters in turn, `a` and `b`, left on one base."""

    base: object
    slates: list
    plain: list[Tensor] = field(default_factory=list)
    """Hidden states without an adapter: before, and after each."""
    hashes: list[str] = field(default_factory=list)
    """Of the base, likewise."""
    starts: list[Tensor] = field(default_factory=list)
    """Hidden states with each adapter before its first step."""
    dtypes: set = field(default_factory=set)
    unreached: list[str] = field(default_factory=list)
    """Names of what should train and was given no gradient in any step."""
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    """As in training, slate by slate."""
    folders: dict[str, Path] = field(default_factory=dict)


@pytest.fixture(scope="module")
def trained(tokenizer, bert_tokenizer, make_slate, tmp_path_factory):
    """Returns a maker of `Trained`, which makes it once for a case."""
    home = tmp_path_factory.mktemp("bases")
    slates = [make_slate(n_history=2, n_candidates=3 + i, seed=i, user_id="u") for i in range(2)]
    write_slates(home / "slates.jsonl", slates)

    @functools.cache
    def saved(kind):
        tokens = tokenizer if kind in DECODERS else bert_tokenizer
        tiny_model(kind, len(tokens), max_position_embeddings=256).save_pretrained(home / kind)
        tokens.save_pretrained(home / kind)
        return str(home / kind)

    def arguments(kind, load):
        return {
            "name": saved(kind),
            "compute_dtype": "float32",
            "device": "cpu",
            "cache_dir": home / "cache",
            **LOADS[load],
        }

    @functools.cache
    def base_of(kind, load):
        return load_base(**arguments(kind, load))

    @functools.cache
    def make(case):
        name, kind, load = case
        base = base_of(kind, load)
        try:
            return train_two(base, name, slates, home / "-".join(case).replace(":", "-"))
        except BaseException:
            base_of.cache_clear()  # it may have been left with an adapter
            raise

    make.arguments, make.base_of, make.slates = arguments, base_of, home / "slates.jsonl"
    return make


def train_two(base, name, slates, store):
    method_name, options = (METHODS | OF_PEFT)[name]
    template = PromptTemplate(
        base.tokenizer,
        parts={"history": "- {{ title }}\n", "candidate": "{{ title }}"},
        max_depth=base.max_depth,
    )
    batch = pack([template.tree(slate) for slate in slates], pad_token_id=base.pad_token_id)

    def states():
        base.model.eval()
        with torch.no_grad():
            return hidden_states(base, batch)

    made = Trained(base, slates, [states()], [base.state_hash()])
    for seed, adapter in enumerate("ab"):
        torch.manual_seed(seed)
        method = plugins.load("methods", method_name)(total_steps=STEPS, **options)
        readout = plugins.load("readouts", "score_head").build(base.hidden_size, None, None)
        model = get_peft_model(base.model, method.config(base.model))
        if getattr(method, "reads_slates", False):
            method.read_slates(model, [batch], lambda given: hidden_states(base, given))
        if getattr(method, "reads_weights", False):
            method.read_weights(model, stored_weights(base.identity.name))
        made.starts.append(states())
        ranking = RankingModel(base, readout)
        made.unreached += steps(method, model, ranking, batch, made.dtypes)
        with torch.no_grad():
            scores = ranking.eval()(batch)
        made.scores[adapter] = [
            row[: len(slate.candidates)] for row, slate in zip(scores, slates, strict=True)
        ]
        exported = method.export(model)
        model.unload()
        made.folders[adapter] = save_published(
            store, "news", base, template, readout, (method_name, options), exported
        )
        made.plain.append(states())
        made.hashes.append(base.state_hash())
    return made


def steps(method, model, ranking, batch, dtypes):
    """Trains; returns the names of what no gradient reached."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert own
    dtypes |= {p.dtype for p in own.values()}
    readout = list(ranking.readout.parameters())
    optimizer = torch.optim.AdamW([*own.values(), *readout], lr=1e-2)
    reached = set()
    for step in range(1, STEPS + 1):
        ranking.eval()
        with torch.no_grad():
            ranking(batch)
        ranking.train()
        loss = (ranking(batch) - torch.arange(4.0)).square().mean()
        penalty = method.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        reached |= {n for n, p in own.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    method.finalize(model)
    return sorted(own.keys() - reached)


@pytest.fixture
def left(case, trained):
    """What the case left."""
    return trained(case)


@pytest.mark.parametrize("case", marked(REFUSED))
def test_what_cannot_train_is_refused_before_it_starts(case, trained):
    name, options = (METHODS | OF_PEFT)[case[0]]
    base = trained.base_of(*case[1:])
    with pytest.raises(ConfigError, match=refusal(*case)):
        plugins.load("methods", name)(total_steps=STEPS, **options).config(base.model)


@every_case
def test_the_base_stays_bit_for_bit(case, left):
    assert len(set(left.hashes)) == 1
    assert all(torch.equal(plain, left.plain[0]) for plain in left.plain)


@every_case
def test_it_starts_at_the_base_where_that_is_promised(case, left):
    scale = left.plain[0].float().abs().max()
    for start in left.starts:
        apart = (start.float() - left.plain[0].float()).abs().max() / scale
        if case[0] in STARTS_ELSEWHERE:
            assert apart > 0
        else:
            assert apart <= (2e-2 if case[2] == "bfloat16" else 1e-5)


@every_case
def test_gradients_reach_all_that_trains_after_an_evaluation(case, left):
    if case[0] != "peft:GLORA":  # one of its factors reaches nothing on these random encoders
        assert left.unreached == []
    assert left.dtypes == {torch.float32}


@every_case
def test_loaded_in_turn_the_adapters_score_as_in_training(case, left):
    with Ranker(left.base) as ranker:
        found = []
        for adapter in "aba":
            name = ranker.load_adapter(left.folders[adapter], domain="news")
            found.append(ranker.score(left.slates, domain=name))
            check_equal(case, found[-1], left.scores[adapter])
        assert found[2] == found[0]
        assert (torch.tensor(found[0][0]) - torch.tensor(found[1][0])).abs().max() > 1e-3
    assert left.base.state_hash() == left.hashes[0]


@every_case
def test_merged_into_the_base_it_scores_the_same(case, left, trained, tmp_path):
    name, kind, load = case
    if name.startswith(("adapter", "peft:")) and name != "peft:LN_TUNING":
        with pytest.raises(AdapterError, match="not merged into weights"):
            check_mergeable(left.folders["a"])
        return
    base = load_base(**trained.arguments(kind, load))
    if base.identity.quantization != "none":
        with pytest.raises(ConfigError, match="merge into the unquantized base"):
            merge(left.folders["a"], tmp_path / "out", base=base, slates=left.slates)
        return
    drift = merge(left.folders["a"], tmp_path / "out", base=base, slates=left.slates)
    assert drift.largest < (5e-2 if load == "bfloat16" else 1e-4)
    assert drift.slates == 2


@pytest.mark.parametrize("cases", [QUICK[::2], pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_new_process_gives_the_same_scores(cases, trained):
    jobs = [(trained.arguments(*case[1:]), str(trained(case).folders["b"])) for case in cases]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(all_scores, (jobs, trained.slates))
    for case, scores in zip(cases, found, strict=True):
        check_equal(case, scores, trained(case).scores["b"])


def check_equal(case, found, expected):
    atol = 5e-2 if case[2] == "bfloat16" else 1e-4
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=0, atol=atol, msg=str(case))

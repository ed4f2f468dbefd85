"""Shared fixtures: tokenizers and tiny random models built in memory, and a maker of slates.

Tiny bases are made anew for every test, because PEFT changes a model in place.
"""

import os
import random
import shutil
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from peftrank.types import Item, Slate

WORDS = (
    "amber badger castle daisy ember falcon garden harbor island jungle kettle lantern meadow "
    "nectar orchid pepper quartz river saddle timber umbrella velvet willow yellow zephyr copper "
    "forest guitar hollow indigo"
).split()
_PHRASES = "Rank the items for this user. Liked: yes no title question answer user assistant - :"
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE that encodes any text, with ChatML turns like SmolLM2 and Qwen."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([f"{w} {w}" for w in WORDS] + [_PHRASES] * 2, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<|endoftext|>",
    )
    made.chat_template = _CHATML
    return made


@pytest.fixture(scope="session")
def bert_tokenizer():
    """A lower-casing WordPiece with [CLS], [SEP], [PAD], [UNK], [MASK]; no chat template."""
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [*special, *letters, *("##" + c for c in letters), *WORDS, *"rank items user".split()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def _random_llama(tokenizer, seed=0):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@pytest.fixture
def tiny_decoder(tokenizer):
    """A Base around a random 2-layer Llama (hidden 32, 4 heads, 2 key-value heads, float32)."""
    from peftrank.base import base_from_model

    return base_from_model(_random_llama(tokenizer), tokenizer, name="tiny-decoder")


@pytest.fixture
def tiny_encoder(bert_tokenizer):
    """A Base around a random 2-layer BertModel (hidden 32, 4 heads, float32)."""
    import torch
    from transformers import BertConfig, BertModel

    from peftrank.base import base_from_model

    config = BertConfig(
        vocab_size=len(bert_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=bert_tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    return base_from_model(model, bert_tokenizer, name="tiny-encoder")


@pytest.fixture(scope="session")
def make_slate():
    """Returns a maker of slates whose items have titles of two or three common words."""

    def make(
        n_history=3,
        n_candidates=4,
        seed=0,
        labels=True,
        user_id="u1",
        *,
        slate_id=None,
        timestamp=None,
        domain=None,
        features=None,
    ):
        """One slate. `labels`: True = first candidate relevant, False = None, or the values.

        `features`: names; each candidate then gets a number for each.
        """
        rng = random.Random(seed)

        def item(name, with_features):
            title = " ".join(rng.sample(WORDS, rng.choice((2, 3))))
            numbers = {f: rng.uniform(-1, 1) for f in features or ()} if with_features else {}
            return Item(name, {"title": title}, numbers)

        history = tuple(item(f"h{seed}-{i}", False) for i in range(n_history))
        candidates = tuple(item(f"c{seed}-{i}", True) for i in range(n_candidates))
        if labels is True:
            labels = tuple(1.0 if i == 0 else 0.0 for i in range(n_candidates))
        return Slate(
            slate_id=slate_id or f"s{seed}",
            user_id=user_id,
            history=history,
            candidates=candidates,
            labels=tuple(labels) if labels else None,
            timestamp=timestamp,
            domain=domain,
        )

    return make


@pytest.fixture(scope="session")
def smollm2_nf4():
    """The real default base, for slow tests. Shared: leave it as it was."""
    from peftrank.base import load_base

    return load_base("smollm2-135m", quantization="nf4", device="cpu")


@pytest.fixture(scope="session")
def minilm():
    """The real small encoder, unquantized, for slow tests. Shared: leave it as it was."""
    from peftrank.base import load_base

    return load_base("minilm-l6", quantization="none", device="cpu")


@pytest.fixture
def cli(capsys):
    """Returns a function that runs `peftrank ARGUMENTS` in this process."""
    from peftrank.cli import main

    def run(*arguments):
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def workplace(tokenizer, make_slate, tmp_path_factory):
    """A folder with two saved bases, `data/` with slates and `adapters/` with news@0001 and 0002.

    Shared: tests that change any of it copy it first.
    """
    from peftrank.config import load_config
    from peftrank.formats.slates import write_slates
    from peftrank.training import train

    folder = tmp_path_factory.mktemp("workplace")
    for name, seed in (("base", 0), ("other-base", 1)):
        _random_llama(tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for part, count in (("train", 6), ("valid", 3), ("test", 3)):
        made = [
            make_slate(seed=100 * count + i, user_id=f"u{i % 2}", slate_id=f"{part}-{i}")
            for i in range(count)
        ]
        write_slates(folder / "data" / f"{part}.jsonl", made)
    settings = {
        "base": {"name": str(folder / "base"), "quantization": "none"},
        "method.layers": "all",
        "training.max_steps": 1,
        "data": {part: folder / "data" / f"{part}.jsonl" for part in ("train", "valid", "test")},
    }
    for seed in (0, 1):
        config = load_config(domain="news", method="lora", overrides={**settings, "seed": seed})
        train(config, output=folder / "adapters", progress=False)
    return folder


@pytest.fixture
def place(workplace, tmp_path, monkeypatch):
    """A copy of the workplace that may be changed, as the working directory."""
    for name in ("data", "adapters"):
        shutil.copytree(workplace / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def given(workplace):
    """The options that name the tiny base and the data."""
    base = ("--base", workplace / "base", "--set", "base.quantization=none")
    return ("--domain", "news", *base, "--data", "data")

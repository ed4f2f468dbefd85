"""What `fuzz.py` feeds: every reader of files and bodies that come from outside.

A target makes an input from a random generator and reads it. An input is the content of files by
name, or whatever else its reader takes. A reader may refuse an input only by a PeftRankError.
"""

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import fuzz_mutations as mutations
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftrank import _folder, card, store
from peftrank.config import Config, load_config, parse_overrides
from peftrank.errors import AdapterError, PeftRankError
from peftrank.evaluation import report
from peftrank.evaluation.evaluate import Evaluation
from peftrank.formats._log import Log, Rejects
from peftrank.formats._parquet import ITEMS, SLATES
from peftrank.formats._rankings import read_run, write_rankings
from peftrank.formats.amazon import amazon
from peftrank.formats.csv import csv
from peftrank.formats.lastfm import lastfm
from peftrank.formats.lists import lists
from peftrank.formats.microlens import microlens
from peftrank.formats.mind import mind
from peftrank.formats.movielens import movielens
from peftrank.formats.recbole import recbole
from peftrank.formats.slates import read_items, read_slates, slates, write_items, write_slates
from peftrank.methods._sites import bottleneck_sites, norm_names
from peftrank.peft_files import ia3_factors, lora_layers, lora_ranks
from peftrank.prompts import token_count
from peftrank.prompts.template import MODES, TURNS, PromptTemplate
from peftrank.prompts.tree import ends, path_tokens
from peftrank.serving import _schemas, history
from peftrank.serving.settings import ServeSettings
from peftrank.training import checkpoint
from peftrank.types import Item, RankedList, Slate

Files = dict[str, Any]
"""Name -> bytes; a Path for a link to it, None for a folder, a number for an empty file's size."""


class Target(NamedTuple):
    """Something to feed. `share`: how often, beside the others."""

    share: int
    make: Callable[[Random], Any]
    read: Callable[[Any, Path], None]
    blob: Callable[[bytes], Any] | None = None
    """The input that bytes are, for a driver that makes bytes only."""


def put(folder: Path, files: Files) -> None:
    """Writes files into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, Path):
            path.symlink_to(content)
        elif isinstance(content, int):
            path.touch()
            os.truncate(path, content)
        else:
            path.write_bytes(content)


# Slates, items and rankings

_ITEM = {"item_id": "i1", "fields": {"title": "Fog"}, "features": {"price": 1.5, "age": 2}}
_SLATES = [
    {
        "slate_id": "s1",
        "user_id": "u1",
        "history": [{"item_id": "h1", "fields": {"title": "Café"}}, "i2"],
        "candidates": [_ITEM, {"item_id": "i2", "features": {"price": 0.5}}, "i3"],
        "labels": [1, 0, 0.5],
        "history_feedback": [4.5, 1],
        "timestamp": 1500000000,
        "domain": "news",
        "context": {"device": "phone"},
        "weights": [2.5, 1, 1],
        "tasks": {"rating": [4.5, None, 1]},
    },
    {"slate_id": "s2", "user_id": "u2", "history": [], "candidates": [_ITEM], "labels": None},
]
_ITEMS = [{"item_id": f"i{n}", "fields": {"title": f"Item {n}", "x": "é"}} for n in (1, 2, 3)]
_ITEMS_FILE = "".join(json.dumps(item) + "\n" for item in _ITEMS).encode()


def _make_slates(rng: Random) -> tuple:
    data = mutations.json_lines(rng, _SLATES)
    files = {"x.jsonl": data}
    if rng.random() < 0.15:
        files = {"x.jsonl.gz": mutations.packed(rng, data)}
    if rng.random() < 0.8:
        files["items.jsonl"] = _ITEMS_FILE
    return files, rng.choice(("raise", "skip")), rng.random() < 0.3


def _read_slates(given: tuple, folder: Path) -> None:
    files, on_error, as_log = given
    put(folder, files)
    path = folder / next(iter(files))
    if as_log:
        _use_log(slates(path, on_error=on_error))
        return
    rejects = Rejects(folder / "rejects.jsonl")
    found = list(read_slates(path, on_error=on_error, quarantine=rejects))
    if found:
        # What was read can be written, and is read again as it was.
        suffix = ".parquet" if len(files[path.name]) % 16 == 0 else ".jsonl"
        write_slates(folder / f"again{suffix}", found)
        if list(read_slates(folder / f"again{suffix}")) != found:
            raise AssertionError("slates change when they are written and read again")


def _make_items(rng: Random) -> tuple:
    return {"items.jsonl": mutations.json_lines(rng, _ITEMS)}, rng.choice(("raise", "skip"))


def _read_items(given: tuple, folder: Path) -> None:
    files, on_error = given
    put(folder, files)
    found = read_items(folder / next(iter(files)), on_error=on_error, quarantine=Rejects())
    write_items(folder / "again.jsonl", found.values())
    if read_items(folder / "again.jsonl") != found:
        raise AssertionError("items change when they are written and read again")


_ARROW = (
    pa.array([None, None]), pa.array([1, 2]), pa.array(["a", "b"]), pa.array([[1], []]),
    pa.array([["ab"], ["cd", "ef"]]), pa.array([b"\xff", b"a"]), pa.array([True, False]),
    pa.array([{"a": "x"}, {"a": None}]), pa.array([[{"a": 1}], None]), pa.array([1.5, math.nan]),
    pa.array([2**62, -(2**62)], pa.timestamp("us")), pa.array([2**31 - 1, 0], pa.date32()),
    pa.array([[("a", "b")], [(None, "c")][:0]], pa.map_(pa.string(), pa.string())),
    pa.array([[([1], "b")], []], pa.map_(pa.list_(pa.int8()), pa.string())),
    pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())),
    pa.array(["a", "b"]).dictionary_encode(), pa.array([2**62, 1], pa.duration("s")),
    pa.array([{"item_id": "a", "fields": [["x"]]}, None]), pa.array([[["a"]], [[None]]]),
    pa.array([b"a", b"\xff"]).cast(pa.binary()).view(pa.string()),
    pa.array([[{"item_id": "a", "fields": {"t": "x"}}], [{"item_id": "b", "fields": None}]]),
)  # fmt: skip


@cache
def _parquet(what: str) -> bytes:
    sink = io.BytesIO()
    if what == "slates":
        # In full, as `_SLATES` names some items by id alone.
        records = [{**_SLATES[1], "slate_id": f"s{n}", "context": {"a": "b"}} for n in range(3)]
        pq.write_table(pa.Table.from_pylist(records, schema=SLATES), sink)
    else:
        pq.write_table(pa.Table.from_pylist(_ITEMS, schema=ITEMS), sink)
    return sink.getvalue()


def _make_parquet(rng: Random) -> tuple:
    what = rng.choice(("slates", "items"))
    data = _parquet(what)
    if rng.random() < 0.5:
        data = mutations.mutate_bytes(rng, data)
    else:
        columns = {
            name: pa.array([_SLATES[1].get(name) or None] * 2)
            for name in ("slate_id", "user_id", "history", "candidates", "labels")
        }
        if what == "items":
            columns = {"item_id": pa.array(["a", "b"]), "fields": _ARROW[7]}
        more = ("domain", "context", "timestamp", "features", "x", "history_feedback")
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice((*columns, *columns, *more))
            columns[name] = rng.choice(_ARROW)
        sink = io.BytesIO()
        names = [rng.choice(list(columns)) if rng.random() < 0.02 else name for name in columns]
        pq.write_table(pa.table(list(columns.values()), names=names), sink)
        data = sink.getvalue()
    name = "items.parquet" if what == "items" else "x.parquet"
    return {name: data}, rng.choice(("raise", "skip")), False


def _read_parquet(given: tuple, folder: Path) -> None:
    if "items.parquet" in given[0]:
        _read_items(given[:2], folder)
    else:
        _read_slates(given, folder)


_RUN = "s1 Q0 i1 1 0.5 tag\ns1 Q0 i2 2 -1e3 tag\ns2 Q0 i1 1 0.25 tag\n"


def _make_run(rng: Random) -> tuple:
    return {"x.run": mutations.table(rng, _RUN, " ")}, rng.choice(("raise", "skip"))


def _read_run(given: tuple, folder: Path) -> None:
    files, on_error = given
    put(folder, files)
    found: list[RankedList] = read_run(folder / "x.run", on_error=on_error)
    write_rankings(folder / "again.run", found)
    if read_run(folder / "again.run") != found:
        raise AssertionError("rankings change when they are written and read again")


# Raw logs: their files, what separates the cells of each, and their reader

_FLAGS = "|".join(["0"] * 18)
_META = {"asin": "B1", "title": "Lamp &amp; x", "category": ["Home", "Light"], "brand": "Q"}
_META23 = {"parent_asin": "B1", "title": "Lamp", "main_category": "Home", "store": "Q"}
_LISTS = [
    {"historyList": "A::B", "itemList": ["C", "D"], "trueSelection": "D"},
    {"historyList": "A::B::D", "itemList": ["E", "F"], "trueSelection": "E"},
]
_Layout = tuple[Callable[..., Log], dict[str, tuple[Any, str]]]
_LAYOUTS: list[_Layout] = [
    (
        mind,
        {
            "news.tsv": ("N1\ts\tr\tRiver\tTwo\tu\t[]\t[]\nN2\t\t\tBaker\t\t\t[]\t[]\n", "\t"),
            "behaviors.tsv": (
                "1\tU1\t11/15/2019 8:05:09 PM\tN2 N2\tN1-1 N2-0\n"
                "2\tU2\t1/2/2020 12:00:00 AM\t\tN2-1\n",
                "\t",
            ),
        },
    ),
    (
        movielens,
        {
            "u.item": (f"7|Port (1991)|x||u|1|{_FLAGS}\n8|Way (1990)||||0|{_FLAGS}\n", "|"),
            "u.data": ("1\t7\t4\t881250949\n1\t8\t2\t881250950\n", "\t"),
        },
    ),
    (
        movielens,
        {
            "movies.dat": ("1::Été (2001)::Drama|War\n2::Up (2002)::Western\n", "::"),
            "ratings.dat": ("5::1::3.5::100\n5::2::4::90\n", "::"),
        },
    ),
    (
        movielens,
        {
            "movies.csv": ('movieId,title,genres\n1,"Lamp, The",Comedy|War\n2,"""Y""",x\n', ","),
            "ratings.csv": ("userId,movieId,rating,timestamp\n1,1,4.5,10\n1,2,0.5,11\n", ","),
        },
    ),
    (
        recbole,
        {
            "x.item": (
                "item_id:token\tx_title:token_seq\tz:float\ni\tA &amp; B\t1\nj\tC\t2\n",
                "\t",
            ),
            "x.inter": (
                "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4\t7\n",
                "\t",
            ),
        },
    ),
    (
        recbole,
        {
            "x.item": ("item_id:token\ttitle:token_seq\na\tA\nb\tB\nc\tC\n", "\t"),
            "x.train.inter": (
                "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta b\tc\nu\tb c\ta\n",
                "\t",
            ),
        },
    ),
    (
        amazon,
        {
            "meta_x.json": ([_META, {**_META, "asin": "B2", "category": []}], "json"),
            "x.json": (
                [{"reviewerID": "R", "asin": "B1", "overall": 5.0, "unixReviewTime": 1500000000}],
                "json",
            ),
        },
    ),
    (
        amazon,
        {
            "meta_x.jsonl": ([_META23, {**_META23, "parent_asin": "B2"}], "json"),
            "x.jsonl": (
                [{"user_id": "R", "parent_asin": "B1", "rating": 5.0, "timestamp": 1500000000000}],
                "json",
            ),
        },
    ),
    (
        amazon,
        {
            "Toys_info.txt": ("<a_1>\tThing 1\t1\n<a_2>\tThing &lt; 2\t2\n<a_3>\tThing\t3\n", "\t"),
            "Toys_train.csv": (
                'user_id,history_item_id,item_id\nA,"[1, 2]",3\nB,[1],2\nA,"[2, 3]",1\n',
                ",",
            ),
        },
    ),
    (
        microlens,
        {
            "x_titles.csv": ('item,title\n10,"A, b # c"\n11,Fog\n', ","),
            "x_pairs.tsv": ("1\t10 11 10\n2\t11\n", "\t"),
        },
    ),
    (
        lastfm,
        {
            "artists.dat": ("id\tname\turl\n1\tThe Kettles\tu\n2\tÉclair\tu\n", "\t"),
            "tags.dat": ("tagID\ttagValue\n1\trock\n2\tfolk\n", "\t"),
            "user_artists.dat": ("userID\tartistID\tweight\n1\t1\t5\n1\t2\t9\n2\t1\t1\n", "\t"),
            "user_taggedartists.dat": ("userID\tartistID\ttagID\n1\t1\t2\n1\t2\t1\n", "\t"),
            "user_friends.dat": ("userID\tfriendID\n1\t2\n2\t1\n", "\t"),
        },
    ),
    (lists, {"x.json": (_LISTS, "array")}),
    (
        csv,
        {
            "items.csv": ('item,title,x\n1,"Lamp, red",a\n2,"""Y""",\n', ","),
            "clicks.csv": (
                "user,item,time,value\nu,1,2025-03-01T12:00:00+01:00,4\nu,2,1500000000,1\n",
                ",",
            ),
        },
    ),
]


def _make_log(places: range, rng: Random) -> tuple:
    place = rng.choice(places)
    files: Files = {}
    chosen = rng.choice(list(_LAYOUTS[place][1]))
    for name, (content, kind) in _LAYOUTS[place][1].items():
        changed = name == chosen or rng.random() < 0.05
        if kind == "array":
            files[name] = mutations.json_bytes(rng, content)
        elif kind == "json":
            plain = "".join(json.dumps(row) + "\n" for row in content).encode()
            files[name] = mutations.json_lines(rng, content) if changed else plain
        else:
            files[name] = mutations.table(rng, content, kind) if changed else content.encode()
    if rng.random() < 0.02:
        files[chosen] = None
    elif rng.random() < 0.02:
        del files[chosen]
    elif rng.random() < 0.02:
        files[f"{chosen}.gz"] = mutations.packed(rng, files.pop(chosen))
    return place, files, rng.choice(("raise", "skip"))


def _read_log(given: tuple, folder: Path) -> None:
    place, files, on_error = given
    put(folder, files)
    rejects = Rejects(folder / "rejects.txt")
    _use_log(_LAYOUTS[place][0](folder, on_error=on_error, rejects=rejects))


def _use_log(log: Log) -> None:
    """What preparing data does with a log: its texts are written, its numbers compared."""
    texts = (t for item in log.items.values() for t in (item.item_id, *item.fields.values()))
    "".join([*texts, *log.user_ids, *(row.slate_id for row in log.impressions)]).encode()
    if not np.isfinite(log.value).all() or np.isinf(log.timestamp).any():
        raise AssertionError("the log holds a value that is not finite")
    log.order()
    list(log.interactions())


def _logs(reader: Callable[..., Log], share: int) -> Target:
    first = next(i for i, (read, _) in enumerate(_LAYOUTS) if read is reader)
    places = range(first, first + sum(read is reader for read, _ in _LAYOUTS))
    return Target(share, lambda rng: _make_log(places, rng), _read_log)


# Adapters

_STEM = "base_model.model.model.layers.0"
_MANIFEST = {
    "format_version": 1,
    "peftrank_version": "0.1.0",
    "domain": "news",
    "method": {"name": "lora", "options": {"r": 2}},
    "prompt": {
        "parts": {"history": "- {{ title }}\n", "candidate": "{{ title }}"},
        "mode": "isolated",
        "fields": ["title"],
        "history_length": 20,
        "item_tokens": 32,
        "max_tokens": 2048,
        "chat": "auto",
        "turn": "none",
        "max_depth": 2048,
    },
    "readout": {"name": "score_head", "options": {}, "feature_names": ["price"]},
    "base": {
        "name": "tiny", "fingerprint": "f" * 64, "tokenizer_hash": "t" * 64, "model_id": None,
        "quantization": "nf4", "double_quant": True, "revision": None,
    },
    "config": {"seed": 0, "training": {"epochs": 1}},
    "metrics": {"ndcg@10": {"mean": 0.5, "low": 0.4, "high": 0.6}, "steps": 3},
    "data": {"fingerprint": "d" * 64, "counts": {"train": 3}},
    "versions": {"torch": "2"},
    "created": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_ADAPTERS: list[tuple[dict, dict[str, tuple[int, ...]]]] = [
    (
        {**_LORA, "rank_pattern": {"q_proj": 2, r"^model\.x": 4}, "alpha_pattern": {}},
        {f"{_STEM}.q_proj.lora_A.weight": (2, 4), f"{_STEM}.q_proj.lora_B.weight": (3, 2)},
    ),
    (
        {**_LORA, "use_rslora": True, "use_dora": True, "lora_bias": True},
        {
            f"{_STEM}.q_proj.lora_A.weight": (2, 4),
            f"{_STEM}.q_proj.lora_B.weight": (3, 2),
            f"{_STEM}.q_proj.lora_B.bias": (3,),
            f"{_STEM}.q_proj.lora_magnitude_vector": (3,),
        },
    ),
    (
        {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
        {f"{_STEM}.k_proj.ia3_l": (4, 1), f"{_STEM}.down_proj.ia3_l": (1, 6)},
    ),
    (
        {"peft_type": "BOTTLENECK", "reads": "output", "activation": "relu", "scale": 1.0},
        {
            f"{_STEM}.mlp.bottleneck.down.weight": (2, 4),
            f"{_STEM}.mlp.bottleneck.down.bias": (2,),
            f"{_STEM}.mlp.bottleneck.up.weight": (4, 2),
            f"{_STEM}.mlp.bottleneck.up.bias": (4,),
            f"{_STEM}.norm.bottleneck.norm_weight": (4,),
        },
    ),
]


def _tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    made = ((name, math.prod(shape), shape) for name, shape in shapes.items())
    return {name: torch.linspace(-1, 1, n).reshape(shape) for name, n, shape in made}


@cache
def _adapter(place: int) -> dict[str, bytes]:
    adapter_config, shapes = _ADAPTERS[place]
    readout = _tensors({"text.weight": (1, 4)})
    return {
        "README.md": b"# News\n",
        "adapter_config.json": json.dumps(adapter_config).encode(),
        "adapter_model.safetensors": safetensors.torch.save(_tensors(shapes)),
        "readout.safetensors": safetensors.torch.save(readout),
    }


def _listed(content: Mapping[str, bytes]) -> dict[str, Any]:
    return {name: _folder._entry(data) for name, data in content.items()}


def _make_adapter(rng: Random) -> Files:
    place = rng.randrange(len(_ADAPTERS))
    content = dict(_adapter(place))
    manifest: Any = _MANIFEST
    kind = rng.random()
    before = _listed(content) if rng.random() < 0.05 else None
    if kind < 0.35:
        content["adapter_config.json"] = mutations.json_bytes(rng, _ADAPTERS[place][0])
    if 0.3 < kind < 0.65:
        name = rng.choice(("adapter_model.safetensors",) * 3 + ("readout.safetensors",))
        content[name] = mutations.safetensors(rng, content[name])
    if 0.6 < kind < 0.95:
        manifest = mutations.mutate_value(rng, manifest)
    if isinstance(manifest, dict):
        manifest = {**manifest, "files": before or _listed(content)}
        if rng.random() < 0.1:
            manifest["files"] = mutations.mutate_value(rng, manifest["files"])
    data = mutations.dump(manifest)
    files: Files = {**content, "peftrank.json": data}
    if rng.random() < 0.1:
        files["peftrank.json"] = mutations.mutate_bytes(rng, data)
    if rng.random() < 0.1:
        _misplace(rng, files)
    return files


def _misplace(rng: Random, files: Files, kinds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> None:
    name = rng.choice(list(files))
    kind = rng.choice(kinds)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = None
    elif kind == 2:
        files[name] = rng.choice((Path("/dev/zero"), Path("/etc/passwd"), Path(name), Path("..")))
    elif kind == 3:
        files[name] = rng.choice((0, 2**33, 2**42))
    elif kind == 4:
        files[rng.choice(("x.bin", "sub/x", ".hidden", "é", "a\nb", "PEFTRANK.JSON"))] = b"x"
    else:
        other = rng.choice(list(files))
        files[name], files[other] = files[other], files[name]


def _read_adapter(files: Files, folder: Path) -> None:
    put(folder / "good", {**_adapter(0), "peftrank.json": _good_manifest()})
    put(folder / "news", files)
    found = store.load_adapter(folder / "news")
    json.dumps(store.describe(folder / "news"))
    json.dumps(store.diff(folder / "news", folder / "good"))
    card.card_license(card.adapter_card(found.manifest, peft_config=found.peft_config))
    # What the ranker does with it, and what of that it takes for a bad adapter.
    try:
        template = PromptTemplate(_tokenizer(), **found.manifest["prompt"])
    except TypeError as error:
        raise AdapterError(str(error)) from error
    template.tree(_SLATE)
    json.dumps(template.describe())


@cache
def _good_manifest() -> bytes:
    return mutations.dump({**_MANIFEST, "files": _listed(_adapter(0))})


def _manifest_files(data: bytes) -> Files:
    return {**_adapter(0), "peftrank.json": data}


def _adapter_config_files(data: bytes) -> Files:
    content = {**_adapter(0), "adapter_config.json": data}
    return {**content, "peftrank.json": mutations.dump({**_MANIFEST, "files": _listed(content)})}


_PATTERNS = (
    "q_proj", ".*", "(a|a)*", "(", "a{99999999999}", "a{,65536}", "a?" * 30 + "a" * 30,
    "(a|a)" * 30, ".*.*.*x", "[", "\\", "(?P<a>a)(?P=a)", "(?i)a", "^$", "(?<=a)b", "(?#",
    "\\d+\\d+", "", "(x+x+)+y", "(.*)(.*)(.*)", "x*" * 20, "[\ud800]", "(?:a|b|ab)" * 20,
    "(a)?" * 101, "(?s:.)*", "(" * 200 + ")" * 200, "q_proj|" * 50, "(?(1)a|b)", "(?>a*)", "a*+",
    "\\Z", "(?=a*)b",
)  # fmt: skip


def _make_weights(rng: Random) -> tuple:
    adapter_config, shapes = rng.choice(_ADAPTERS)
    changed = mutations.mutate_value(rng, adapter_config)
    if rng.random() < 0.4 and isinstance(changed, dict):
        name = rng.choice(("rank_pattern", "alpha_pattern"))
        values = (2, 2, 0, None, "2", 1e308, -1, [2], True)
        count = rng.randint(1, 3)
        changed[name] = {rng.choice(_PATTERNS): rng.choice(values) for _ in range(count)}
    tensors = dict(shapes)
    for _ in range(rng.choice((0, 1, 2))):
        name = rng.choice(list(tensors))
        sizes = (0, 1, 2, 3, 4, 100_000)
        shape = tuple(rng.choice(sizes) for _ in range(rng.choice((0, 1, 2, 2, 2, 3))))
        if math.prod(shape) > 1_000_000:
            continue
        kind = rng.randrange(4)
        if kind == 0:
            tensors[name] = shape
        elif kind == 1:
            tensors[rng.choice((mutations.text(rng), name + ".x", name.replace("q", "a" * 40)))] = (
                tensors.pop(name)
            )
        elif kind == 2:
            path = rng.choice(("a" * 30 + "b", "a." * 500, "x" * 5000, "\0", ".", "q_proj"))
            tensors[f"base_model.model.{path}.lora_A.weight"] = (2, 4)
            tensors[f"base_model.model.{path}.lora_B.weight"] = (3, 2)
        else:
            tensors[name] = (*tensors[name][:-1], rng.choice(sizes[:5]))
    dtype = rng.choice((*[torch.float32] * 8, torch.float16, torch.bfloat16, torch.float8_e4m3fn))
    return mutations.dump(changed), tensors, dtype


def _read_weights(given: tuple, folder: Path) -> None:
    """The files of an adapter in memory: what `load_adapter` does behind the hashes."""
    data, shapes, dtype = given
    values = _folder._parse(folder, data)
    tensors = {name: tensor.to(dtype) for name, tensor in _tensors(shapes).items()}
    for read in (ia3_factors, bottleneck_sites, _folder._check_bottleneck):
        _refusable(read, values, tensors)
    norm_names(tensors)
    if not any("lora" in name for name in tensors):
        return
    layers = lora_layers(values, tensors)
    json.dumps(lora_ranks(layers))
    for layer in layers.values():
        if not isinstance(layer.scale, float) or not math.isfinite(layer.scale):
            raise AssertionError(f"scale is {layer.scale!r}")


def _refusable(read: Callable[..., object], *arguments: object) -> None:
    try:
        read(*arguments)
    except PeftRankError:
        pass


_NAMES = (
    "news", "news@0001", "news@0002", "news@", "news@../0001", "news@\0", "a" * 300, "a/" * 3000,
    "\0", "\ud800", "~", "..", ".", "/", "", "@", "news@0001@x", "NEWS", "good", "x" * 64, "@0001",
    "hub/repo", "news/0001", "file:///etc", "news@" + "9" * 5000, "é",
)  # fmt: skip
_ACTIVE = (
    b"0001\n", b"0001", b"", b"\n", b"0002", b"\xff", b"../0001", b"0001\n0002", b"\0",
    b"0" * 10**5, Path("/dev/zero"), Path("../good/peftrank.json"), Path("ACTIVE"), None, 2**40,
    2**33, "\ufeff0001".encode(), "٠٠٠١".encode(), b" 0001 ", b"1", b"00001",
)  # fmt: skip


def _make_store(rng: Random) -> tuple:
    active = rng.choice(_ACTIVE)
    if isinstance(active, bytes) and rng.random() < 0.3:
        active = mutations.mutate_bytes(rng, active)
    files: Files = {"news/ACTIVE": active}
    for name in ("0001", "0002", "٠٠٠١", "0003.tmp", ".tmp-x", "9" * 9):
        if rng.random() < 0.4:
            files[f"news/{name}"] = rng.choice((None, b"x", Path("."), Path("missing")))
    if rng.random() < 0.1:
        files = {"news": rng.choice((b"", Path("."), Path("missing")))}
    name = rng.choice(_NAMES)
    if rng.random() < 0.3:
        name = mutations.mutate_bytes(rng, b"news@0001").decode("utf-8", "surrogateescape")
    return files, name


def _read_store(given: tuple, folder: Path) -> None:
    files, name = given
    put(folder, files)
    for domain in store.domains(folder):
        store.versions(folder, domain)
    domain, _, version = name.partition("@")
    for call in (
        lambda: store.active(folder, "news"),
        lambda: store.resolve(name, folder),
        lambda: store.load_adapter(store.resolve(name, folder)),
        lambda: store.versions(folder, domain),
        lambda: store.activate(folder, domain, version),
    ):
        _refusable(call)


# Checkpoints


@cache
def _checkpoint() -> tuple[dict[str, Any], dict[str, bytes]]:
    groups = ("adapter", "readout", "best_adapter", "best_readout", "optimizer", "random")
    tensors = {
        f"{name}.safetensors": safetensors.torch.save(_tensors({"a/exp_avg": (2, 2), "b": (3,)}))
        for name in groups
    }
    values = {
        "config": Config(domain="news").model_dump(mode="json"),
        "data": "f" * 64,
        "micro_tokens": 4096,
        "step": 3,
        "stale": 0,
        "best": 0.5,
        "best_step": 2,
        "method": {},
        "best_method": {},
        "history": [{"step": 1, "ndcg@10": 0.5}],
    }
    return values, tensors


def _make_checkpoint(rng: Random) -> Files:
    values, files = _checkpoint()
    files = dict(files)
    if rng.random() < 0.4:
        name = rng.choice(list(files))
        files[name] = mutations.safetensors(rng, files[name])
    hashes = {name.split(".")[0]: _folder._entry(data)["sha256"] for name, data in files.items()}
    values = {**values, "sha256": hashes}
    if rng.random() < 0.7:
        values = mutations.mutate_value(rng, values)
    found: Files = {**files, "state.json": mutations.dump(values)}
    if rng.random() < 0.2:
        found["state.json"] = mutations.mutate_bytes(rng, found["state.json"])
    if rng.random() < 0.1:
        _misplace(rng, found, (0, 1, 4, 5))  # one's own file, so neither linked nor endless
    folder = rng.choice(("checkpoint-3",) * 9 + ("checkpoint-²", "checkpoint-", "checkpoint-x-4"))
    return {f"{folder}/{name}": data for name, data in found.items()}


def _read_checkpoint(files: Files, folder: Path) -> None:
    put(folder, files)
    found = checkpoint.load(folder)
    _refusable(checkpoint.check_config, found, Config(domain="news"))


# Configuration

_YAML = """domain: news
seed: 1
base: {name: smollm2-135m, quantization: nf4}
method: {name: lora, r: 8, alpha: 16, layers: all}
prompt:
  mode: isolated
  fields: [title]
  template:
    history: "- {{ title }}\\n"
    candidate: " {{ title }}"
readout: {name: score_head}
loss: {name: listnet}
data: {train: a.jsonl}
training:
  epochs: 1
  learning_rate: 1.0e-4
evaluation:
  metrics: [ndcg@10, mrr]
"""
_SETTINGS = (
    "training.epochs=1", "seed=7", "method.r=4", "prompt.fields=[title]", "base.name=x",
    "method={name: adalora}", "evaluation.metrics=[mrr]", "prompt.template.preamble=a=b",
    "data.train=x.jsonl", "readout.name=yes_no", "loss.name=listmle", "method.targets=[a, b]",
)  # fmt: skip
_KEYS = (
    "", ".", "a", "training", "training.", ".epochs", "training..epochs", "method.options",
    "method.model_extra", "method.__class__", "method.name", "prompt.template.x.y", "domain",
    "data.train.x", "training.epochs.x", "method.r.x", "seed.a.b", "\ud800", "é", "a" * 300,
)  # fmt: skip


def _make_config(rng: Random) -> tuple:
    data = mutations.yaml_text(rng, _YAML)
    method = rng.choice((*[None] * 9, "adalora", "adapter", "nonsense", ""))
    return {"x.yaml": data}, rng.choice((*[None] * 9, "news", "Bad Name", "")), method


def _read_config(given: tuple, folder: Path) -> None:
    files, domain, method = given
    put(folder, files)
    found = load_config(folder / "x.yaml", domain=domain, method=method)
    if Config.model_validate(found.model_dump(mode="json")) != found and "nan" not in repr(found):
        raise AssertionError("the configuration changes when it is written and read again")


def _make_overrides(rng: Random) -> list[str]:
    made = []
    for _ in range(rng.choice((1, 1, 2))):
        key, _, value = rng.choice(_SETTINGS).partition("=")
        kind = rng.randrange(6)
        if kind < 2:
            value = rng.choice(mutations.YAML_VALUES)
        elif kind == 2:
            value = json.dumps(mutations.text(rng))
        elif kind == 3:
            key = rng.choice(_KEYS)
        text = f"{key}={value}"
        if kind > 3:
            changed = mutations.mutate_bytes(rng, text.encode("utf-8", "surrogatepass"))
            text = changed.decode("utf-8", "surrogateescape")
        made.append(text)
    return made


def _read_overrides(texts: list[str], folder: Path) -> None:
    overrides = parse_overrides(texts)
    # As `load_config` does with a shipped file, which takes most of the time to parse.
    load_config(_shortest(), domain="news", overrides=overrides)


@cache
def _shortest() -> Path:
    # The file with the fewest keys, as it is parsed anew each time.
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"peftrank-fuzz-{os.getpid()}.yaml"
    path.write_text("seed: 1\n")
    return path


# Bodies of requests

_LIMITS = ServeSettings()
_EVENT = {
    "user_id": "u", "domain": "news", "item": _ITEM, "feedback": 1, "timestamp": 1500000000.5,
    "event_id": "e1",
}  # fmt: skip
_FULL = {**_SLATES[0], "history": [_ITEM], "candidates": [_ITEM], "labels": [1]}
_BODIES: tuple[tuple[str, Any], ...] = (
    ("rank", {"slates": [{**_FULL, "history_feedback": [1]}], "domain": "news", "k": 3}),
    ("rank", {"slate": {"candidates": [_ITEM], "user_id": "u"}, "explain": True}),
    ("rank", {"slates": [{"candidates": [_ITEM], "history": []}], "adapter": "none"}),
    ("events", {"events": [_EVENT, {**_EVENT, "event_id": None}]}),
    ("version", {"version": "0001"}),
)


def _make_body(rng: Random) -> tuple:
    name, value = rng.choice(_BODIES)
    return name, mutations.json_bytes(rng, value)


def _read_body(given: tuple, folder: Path) -> None:
    name, body = given
    if name == "rank":
        for slate in _schemas.rank_call(body, _LIMITS).slates:
            _encodable(slate)
    elif name == "events":
        history.encode(_schemas.events(body, _LIMITS, 0.0))
    else:
        _schemas.version_named(body, needed=len(body) % 2 == 0)


def _encodable(slate: Slate) -> None:
    for item in (*slate.history, *slate.candidates):
        "".join((slate.slate_id, item.item_id, *item.fields, *item.fields.values())).encode()


# Prompts

_PARTS = {
    "preamble": "User of {{ context.device }}:\n",
    "history": "{{ position }}. {{ title }}{% if feedback and feedback < 3 %} (no){% endif %}\n",
    "question": "Next:",
    "candidate": "{% if brand %}{{ brand | upper }}: {% endif %}{{ title }}",
    "answer": "\nLiked?",
    "choice": "\nWhich of {{ context.device }}?",
}
_JINJA = (
    "{{ title }}", "{{ brand }}", "{{ context.device }}", "{{ context['device'] }}",
    "{{ feedback }}", "{{ title | upper }}", "{{ title.__class__ }}", "{{ ''.__class__.__mro__ }}",
    "{{ title.upper() }}", "{{ context.update({'a': 1}) }}", "{{ 'a' * 10000000000 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}", "{{ title * 100000000000 }}", "{{ 'a' | center(10000000000) }}",
    "{{ '%1000000000d' % 1 }}", "{% for a in title %}x{% endfor %}", "{% set x = 'a' %}",
    "{{ title | attr('__class__') }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for a in 'aaaaaaaaaa' %}" * 10 + "x" + "{% endfor %}" * 10, "{{ loop }}",
    "{% for x in [1] %}" * 40 + "{% endfor %}" * 40, "{% if title %}" * 110 + "{% endif %}" * 110,
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{{ " + "not " * 2000 + "1 }}",
    "{{ " + "-" * 500 + "1 }}", "{{ " + "[" * 90 + "]" * 90 + " }}", "{{ " + "9" * 5000 + " }}",
    "{{ 1e999 }}", "{{ '\\ud800' }}", "\ud800", "{{ '\\x02' }}", "\x02", "{{ \"\\x03\" }}",
    "{# x #}", "{% raw %}{{ x }}{% endraw %}", "{% include 'a' %}", "{% block a %}", "{{", "{%",
    "{% import 'a' as b %}", "{{ self }}", "{{ self.__init__ }}", "{{ title | nonsense }}",
    "{{ title | replace('', title) }}" , "{{ title | replace('a', 'b') }}", "{{ x", "}}",
    "{{ () }}", "{{ title | round(999999999) }}", "{{ position | round(-999999999) }}",
    "{{ title is divisibleby 0 }}", "{{ 5 | round(999999999, 'ceil') }}", "{{ title[0:2] }}",
    "{{ feedback | round(1) }}", "{{ title | batch(10000000000) | list }}", "{{ title | list }}",
    "{{ [title] * 9999999999 }}", "{{ title | wordwrap(1) }}", "{{ title | indent(9999999999) }}",
    "{% set x = title %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}", "{{ title | default('x') }}",
    "{% filter upper %}a{% endfilter %}", "{% call title() %}{% endcall %}", "{{ cycler }}",
    "{{ title | tojson }}", "{{ namespace() }}", "{{ lipsum(9999999) }}", "{{ title | int }}",
    "{{ range(10**9) | list }}", "{{ title | format(1) }}", "{{ title | xmlattr }}",
    "{{ title | map('x') }}", "{{ title | slice(99999999999) | list }}", "{{ '' | wordcount }}",
    "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{{ title if position else brand }}", "{{ 'a' in title }}",
    "{{ title ~ brand ~ 1 }}", "{{ 1 < 2 }}", "{{ {} }}", "{{ {'a': title}['a'] }}", "{{ 2 / 3 }}",
    "{% autoescape true %}{{ title }}{% endautoescape %}", "{% do x %}", "{{ title | sum }}",
    "{% with a = title %}{{ a }}{% endwith %}", "{{ debug() }}", "{{ context }}", "{{ -position }}",
    "{{ context | dictsort }}", "{{ context.keys() | list }}", "{{ context.keys }}",
    "{{ title | truncate(3) }}", "{{ title | truncate(0, true, '', -5) }}", "{{ title|first }}",
    "{% if title is defined and title != '' %}x{% elif 1 %}y{% else %}z{% endif %}",
    "{{ title }}" * 90, "{{ title }}" * 2000, "a" * 30_000, "{{ (title, brand) | join(', ') }}",
    "{{ true and none }}", "{{ title | replace('a', 'a' * 3) }}", "{{ position - feedback }}",
)  # fmt: skip
_SLATE = Slate(
    "s",
    "u",
    (Item("h", {"title": "Fog"}),),
    (Item("a", {"title": "Sun"}), Item("b", {"title": "Sea"})),
)


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<|endoftext|>",
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def _make_prompt(rng: Random) -> tuple:
    parts = dict(_PARTS)
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(parts))
        kind = rng.randrange(4)
        if kind == 0:
            parts[name] = rng.choice(_JINJA)
        elif kind == 1:
            parts[name] = "".join(rng.choice(_JINJA) for _ in range(rng.randint(2, 4)))
        elif kind == 2:
            changed = mutations.mutate_bytes(rng, parts[name].encode("utf-8", "surrogatepass"))
            parts[name] = changed.decode("utf-8", "replace")
        else:
            parts[name] += rng.choice(_JINJA)
    options: dict[str, Any] = {"parts": parts, "fields": ["title", "brand"]}
    options |= {"mode": rng.choice(MODES), "turn": rng.choice(TURNS[::2])}
    if rng.random() < 0.3:
        options |= {"mode": "isolated", "turn": "after"}
    elif rng.random() < 0.3:
        options |= {"mode": "joint", "turn": "list", "window": rng.choice((2, 3, 26))}
    options["max_tokens"] = rng.choice((16, 500, 2048, 10**6))
    if rng.random() < 0.15:
        options = mutations.mutate_value(rng, options)
    return mutations.dump(options), _hostile_slate(rng)


def _hostile_slate(rng: Random) -> Slate:
    def item(name: str) -> Item:
        fields = (name for name in ("title", "brand") if rng.random() < 0.8)
        return Item(name, {field: mutations.text(rng) for field in fields})

    history = tuple(item(f"h{i}") for i in range(rng.randint(0, 3)))
    return Slate(
        mutations.text(rng),
        "u",
        history,
        tuple(item(f"c{i}") for i in range(rng.choice((0, 1, 1, 2, 3)))),
        history_feedback=tuple(rng.choice((1.0, 5.0, 1e308)) for _ in history),
        context={rng.choice((*["device"] * 9, "update", "é")): mutations.text(rng)},
    )


def _read_prompt(given: tuple, folder: Path) -> None:
    data, slate = given
    prompt = _folder._parse(folder, data)
    _folder._check_prompt(folder, prompt)  # as those of manifests are
    try:
        template = PromptTemplate(_tokenizer(), **prompt)
    except TypeError as error:
        raise AdapterError(str(error)) from error
    tree = template.tree(slate)
    size = token_count(tree)
    if template.mode != "set":
        size = max(len(path_tokens(tree, end)) for end in ends(tree))
    if size > template.max_tokens:
        raise AssertionError(f"{size} tokens of {template.max_tokens}")


# Reports


def _make_report(rng: Random) -> list[Evaluation]:
    count = rng.choice((1, 2, 5))
    numbers = (0.0, 0.5, 1.0, math.nan)
    names = ("random", "<script>", "[bold]", "[/b]", *mutations.TEXTS)
    metrics = {rng.choice(("mrr", "ndcg@10", *names)): None for _ in range(rng.choice((1, 2)))}
    return [
        Evaluation(
            rng.choice(names),
            {m: np.array([rng.choice(numbers) for _ in range(count)]) for m in metrics},
        )
        for _ in range(rng.choice((0, 1, 2)))
    ]


def _read_report(rows: list[Evaluation], folder: Path) -> None:
    from rich.console import Console

    with np.errstate(all="ignore"):
        part = report.as_json(rows[0].name if rows else "", rows)
    json.dumps(part)
    page = report.as_html("t", [part])
    if "<script>" in page:
        raise AssertionError("markup of a name takes effect")
    Console(file=io.StringIO(), width=80).print(report.as_table(part))


def warm_up() -> None:
    """Imports and caches what the first inputs would otherwise wait for."""
    for name in ("lora", "adalora", "adapter"):
        load_config(domain="news", method=name)
    PromptTemplate(_tokenizer(), **_MANIFEST["prompt"]).tree(_SLATE)
    for rng in map(Random, range(50)):
        _make_parquet(rng)
    with np.errstate(all="ignore"):
        report.as_table(report.as_json("x", [Evaluation("x", {"mrr": np.ones(3)})]))


TARGETS: dict[str, Target] = {
    "slates": Target(
        200, _make_slates, _read_slates, lambda data: ({"x.jsonl": data}, "raise", False)
    ),
    "items": Target(60, _make_items, _read_items, lambda data: ({"items.jsonl": data}, "raise")),
    "parquet": Target(40, _make_parquet, _read_parquet),
    "run": Target(30, _make_run, _read_run, lambda data: ({"x.run": data}, "raise")),
    "mind": _logs(mind, 40),
    "movielens": _logs(movielens, 45),
    "recbole": _logs(recbole, 40),
    "amazon": _logs(amazon, 45),
    "microlens": _logs(microlens, 30),
    "lastfm": _logs(lastfm, 30),
    "lists": _logs(lists, 40),
    "csv": _logs(csv, 30),
    "adapter": Target(70, _make_adapter, _read_adapter, _manifest_files),
    "adapter_config": Target(
        20,
        lambda rng: _adapter_config_files(mutations.json_bytes(rng, _ADAPTERS[0][0])),
        _read_adapter,
        _adapter_config_files,
    ),
    "weights": Target(60, _make_weights, _read_weights),
    "store": Target(20, _make_store, _read_store),
    "checkpoint": Target(30, _make_checkpoint, _read_checkpoint),
    "config": Target(50, _make_config, _read_config, lambda data: ({"x.yaml": data}, None, None)),
    "overrides": Target(
        60,
        _make_overrides,
        _read_overrides,
        lambda data: [data.decode("utf-8", "surrogateescape")],
    ),
    "body": Target(100, _make_body, _read_body, lambda data: ("rank", data)),
    "events": Target(0, _make_body, _read_body, lambda data: ("events", data)),
    "prompt": Target(30, _make_prompt, _read_prompt),
    "report": Target(1, _make_report, _read_report),
}

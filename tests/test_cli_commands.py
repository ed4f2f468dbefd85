"""The commands as a user meets them, on a tiny base: what they print and what they leave."""

import json
import shutil
import subprocess
import sys

import pytest

from peftrank import store
from peftrank.formats.slates import read_run, read_slates

METRICS = "ndcg@10,hit@1"


def train(cli, given, *more):
    quick = ("--method", "lora", "--set", "method.layers=all", "--set", "training.max_steps=1")
    return cli("train", *given, *quick, *more)


def test_train_adds_a_version_activates_it_and_says_where_it_is(cli, place, given):
    result = train(cli, given)
    assert result.code == 0
    assert "saved and activated adapters/news/0003" in result.out
    assert "valid_ndcg@10" in result.out
    assert store.active(place / "adapters", "news") == "0003"


def test_train_prints_json_alone_where_it_is_asked_to(cli, place, given):
    result = train(cli, given, "--json")
    printed = json.loads(result.out)
    assert printed["path"] == "adapters/news/0003"
    assert printed["metrics"]["steps"] == 1
    assert result.err == ""


def test_the_trained_adapter_ranks_a_file_of_slates(cli, place, given):
    result = cli("rank", *given, "--input", "data/test.jsonl", "--output", "ranked.jsonl")
    assert result.code == 0
    assert json.loads(result.out) == {"slates": 3, "output": "ranked.jsonl"}
    lines = [json.loads(line) for line in (place / "ranked.jsonl").read_text().splitlines()]
    for slate, ranked in zip(read_slates("data/test.jsonl"), lines, strict=True):
        assert ranked["slate_id"] == slate.slate_id
        assert sorted(ranked["item_ids"]) == sorted(item.item_id for item in slate.candidates)
        assert ranked["scores"] == sorted(ranked["scores"], reverse=True)


def test_an_adapter_brings_its_own_base_unless_another_is_asked_for(cli, place, workplace):
    """The domain's configuration names another base, which is never loaded here."""
    options = ("--domain", "news", "--data", "data")
    ranked = cli("rank", *options, "--input", "data/test.jsonl", "--output", "ranked.jsonl")
    assert ranked.code == 0
    baselines = ("--metrics", METRICS, "--baselines", "random")
    assert cli("evaluate", *options, *baselines).code == 0
    other = ("--base", workplace / "other-base", "--set", "base.quantization=none")
    refused = cli("evaluate", *options, *baselines, *other)
    assert refused.code == 2
    assert "base" in refused.err


def test_baselines_alone_need_no_base(cli, place):
    options = ("--domain", "news", "--data", "data", "--base", "nowhere")
    result = cli("evaluate", *options, "--adapter", "none", "--baselines", "random,bm25")
    assert result.code == 0
    assert "bm25" in result.out


def test_a_run_file_holds_the_best_k(cli, place, given):
    cli("rank", *given, "--input", "data/test.jsonl", "--output", "all.run")
    cli("rank", *given, "--input", "data/test.jsonl", "--output", "best.run", "-k", 2)
    whole, best = read_run(place / "all.run"), read_run(place / "best.run")
    assert [row.item_ids for row in best] == [row.item_ids[:2] for row in whole]


def test_an_older_version_ranks_when_it_is_named(cli, place, given):
    scores = {}
    for version in ("0001", "0002"):
        output = f"{version}.jsonl"
        options = ("--adapter", f"news@{version}", "--input", "data/test.jsonl")
        assert cli("rank", *given, *options, "--output", output).code == 0
        scores[version] = (place / output).read_text()
    assert scores["0001"] != scores["0002"]


def test_one_slate_is_shown_with_its_history_and_every_candidate(cli, place, given):
    slate = list(read_slates("data/test.jsonl"))[1]
    result = cli("rank", *given, "--index", 1)
    assert result.code == 0
    for item in (*slate.history, *slate.candidates):
        assert item.fields["title"] in result.out


@pytest.mark.parametrize("options", [(), ("--input", "data/test.jsonl"), ("--output", "x.jsonl")])
def test_rank_without_a_file_or_an_index_says_what_to_give(cli, place, given, options):
    result = cli("rank", *given, *options)
    assert result.code == 2
    assert "--input FILE and --output FILE, or --index N" in result.err


def test_evaluate_prints_a_table_and_writes_a_page_and_json(cli, place, given):
    options = ("--metrics", METRICS, "--baselines", "random,popularity")
    result = cli("evaluate", *given, *options, "--report", "out/r.html", "--json", "out/r.json")
    assert result.code == 0
    parts = json.loads((place / "out" / "r.json").read_text())
    names = [row["name"] for row in parts[0]["rows"]]
    assert names == ["random", "popularity", "adapter"]
    for name in names:
        assert name in result.out
        assert name in (place / "out" / "r.html").read_text()


def test_a_domain_of_ones_own_is_known_by_its_adapter(cli, place, workplace, tmp_path):
    own = tmp_path / "books.yaml"
    own.write_text(f"domain: books\nbase: {{name: {workplace / 'base'}, quantization: none}}\n")
    data = ["--data", str(workplace / "data")]
    cli("train", "--config", own, *data, "--output", "books", "--set", "training.max_steps=1")
    chosen = ["--domain", "books", "--store", "books", *data]
    assert "popularity" in cli("evaluate", *chosen, "--baselines", "popularity").out
    assert "Ranking" in cli("rank", *chosen, "--index", "0").out
    exported = cli("adapters", "export", "books", "merged", "--merge", "--store", "books", *data)
    assert "scores differ by at most" in exported.out


def test_evaluate_without_an_adapter_measures_the_baselines(cli, place, given):
    shutil.rmtree("adapters")
    options = ("--adapter", "none", "--baselines", "random", "--limit", 2, "--json", "r.json")
    assert cli("evaluate", *given, *options).code == 0
    part = json.loads((place / "r.json").read_text())[0]
    assert [row["name"] for row in part["rows"]] == ["random"]
    assert part["counted"] == 2


def test_prompt_show_prints_the_tree_without_loading_the_weights(cli, place, given, monkeypatch):
    monkeypatch.setattr("peftrank.base._load_model", None)
    slate = next(read_slates("data/test.jsonl"))
    result = cli("prompt", "show", *given)
    assert result.code == 0
    for item in (*slate.history, *slate.candidates):
        assert item.fields["title"] in result.out
    assert "tokens in the tree" in result.out


def test_prompt_show_names_the_markers_of_set_mode(cli, place, given):
    slate = next(read_slates("data/test.jsonl"))
    result = cli("prompt", "show", *given, "--set", "prompt.mode=set")
    assert result.code == 0
    assert result.out.count("<- its marker") == len(slate.candidates)
    refused = ("--set", "prompt.mode=set", "--set", "readout.name=yes_no")
    assert "score_head" in cli("prompt", "show", *given, *refused).err


def test_list_marks_the_active_version(cli, place):
    lines = cli("adapters", "list").out.splitlines()
    assert [line.split()[:2] for line in lines[:1]] == [["news@0001", "lora"]]
    assert [line.split()[:3] for line in lines[1:]] == [["*", "news@0002", "lora"]]


def test_list_as_json_holds_what_show_prints(cli, place):
    rows = json.loads(cli("adapters", "list", "--json").out)
    assert [(row.pop("version"), row.pop("active")) for row in rows] == [
        ("0001", False),
        ("0002", True),
    ]
    assert rows[0] == json.loads(cli("adapters", "show", "news@0001").out)


def test_show_prints_the_rank_of_every_module(cli, place):
    ranks = json.loads(cli("adapters", "show", "news").out)["ranks"]
    assert ranks.keys() == {"0", "1"}
    assert set(ranks["1"].values()) == {8}
    assert ranks["1"].keys() >= {"self_attn.q_proj", "mlp.down_proj"}


def test_a_store_that_is_not_there_is_an_empty_list(cli, place):
    assert "no adapters in nowhere" in cli("adapters", "list", "--store", "nowhere").out
    assert cli("adapters", "list", "--store", "nowhere", "--json").out == "[]\n"


def test_verify_passes_what_training_wrote(cli, place):
    result = cli("adapters", "verify", "news")
    assert result.code == 0
    assert result.out.startswith("adapters/news/0002: ")


def test_activate_rolls_back(cli, place):
    assert cli("adapters", "activate", "news@0001").code == 0
    assert store.active(place / "adapters", "news") == "0001"


def test_activate_without_a_version_names_those_there_are(cli, place):
    result = cli("adapters", "activate", "news")
    assert result.code == 2
    assert "news@0001, news@0002" in result.err
    assert store.active(place / "adapters", "news") == "0002"


def test_diff_shows_the_seed_and_the_weights(cli, place):
    result = cli("adapters", "diff", "news@0001", "news@0002")
    found = json.loads(result.out)
    assert found["config"]["config.seed"] == [0, 1]
    assert all(row["difference"] > 0 for row in found["modules"].values())


COMMANDS = [
    *(("train",), ("evaluate",), ("rank",), ("prompt", "show"), ("data", "prepare")),
    *(("data", "inspect"), *(("adapters", name) for name in ("list", "show", "verify", "diff"))),
]


@pytest.mark.parametrize("command", [(), *COMMANDS])
def test_every_command_explains_itself(cli, command):
    result = cli(*command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out


def test_a_mistyped_command_or_option_is_answered_with_the_likely_one(cli):
    assert "train" in cli("trian").err
    assert "--domain" in cli("train", "--domian", "news").err


def test_help_loads_no_torch():
    code = (
        "import sys; from peftrank.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'peft', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"

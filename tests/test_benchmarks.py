import json
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    data,
    effects,
    games,
    inference,
    lengths,
    methods,
    peak,
    quantization,
    startup,
    streaming,
    successive,
    training,
)
from benchmarks.peers import compare, generated, letters, ours, pointwise, pointwise_kv
from benchmarks.peers.setting import batches, setting, synthetic
from peftrank.config import load_config
from peftrank.formats.slates import write_slates
from peftrank.training.data import folder_data

WORDS = ("amber", "badger", "castle", "daisy", "ember", "falcon", "garden", "harbor")
NAMES = ("popularity", "item_knn")


@pytest.fixture
def prepared(tmp_path, make_slate):
    """A folder like the one `data prepare` writes: 24, 6 and 8 slates with two features."""
    folder, seed = tmp_path / "slates", 0
    folder.mkdir()
    counts = {"train": 24, "valid": 6, "test": 8}
    for part, count in counts.items():
        made = [
            make_slate(seed=seed + i, user_id=f"u{seed + i}", n_candidates=12, features=NAMES)
            for i in range(count)
        ]
        write_slates(folder / f"{part}.jsonl", made)
        seed += count
    meta = {"fingerprint": "f" * 64, "counts": {"slates": counts}}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", sorted(games.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_names_its_own_domain(path):
    assert load_config(path).domain == path.stem


def test_one_command_measures_both_configurations_beside_the_floors(
    prepared, tmp_path, tiny_encoder, monkeypatch, capsys
):
    pytest.importorskip("bm25s")
    pytest.importorskip("lightgbm")
    monkeypatch.setattr(games, "load_base", lambda name, **_: tiny_encoder)
    found = tmp_path / "games.json"
    options = {"data": prepared, "minutes": 0.001, "json": found, "store": tmp_path / "store"}
    games.main([f"--{name}={value}" for name, value in options.items()])
    result = json.loads(found.read_text(encoding="utf-8"))
    rows = {row["name"]: row["metrics"]["ndcg@10"] for row in result["accuracy"]["rows"]}
    assert list(rows) == [*games.FLOORS, "text", "features"]
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows.values())
    assert result["accuracy"]["counted"] == 8
    runs = result["training"]
    assert runs["text"]["features"] == []
    assert runs["features"]["features"] == sorted(NAMES)
    for run in runs.values():
        assert run["slates_seen"] == 24 * run["steps"] > 0  # a batch holds all there are
        assert run["tokens_per_second"] > run["slates_per_second"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)


def test_more_minutes_are_more_steps(prepared, tmp_path, tiny_encoder):
    parts = folder_data(prepared)
    paths = {f"data.{part}": str(getattr(parts, part)) for part in ("train", "valid")}
    config = load_config(games.CONFIGS / "games-text.yaml", overrides=paths)
    assert games.steps_within(0, config, tiny_encoder) == 1
    assert games.steps_within(10, config, tiny_encoder) > 10


def test_a_folder_without_slates_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        games.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.fixture
def peers_setting(tiny_decoder):
    """Five slates on a random Llama whose LoRA does something."""
    texts = [" ".join([word, *WORDS[:more]]) for word in WORDS for more in (0, 1, 5)]
    slates = synthetic(5, history=3, candidates=4, texts=texts)  # prefixes differ in length
    made = setting(tiny_decoder, slates, micro_tokens=2048, item_tokens=8)
    generator = torch.Generator().manual_seed(0)
    for weights in made.adapted.parameters():
        if weights.requires_grad:
            weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
    return made


def flat(rows):
    return torch.tensor([score for row in rows for score in row])


def test_pointwise_peers_give_the_scores_of_isolated_mode(peers_setting):
    readout = ours.score_head(peers_setting)
    own = flat(ours.scoring(peers_setting, readout=readout).run())
    assert own.std() > 0.05
    for packing in (True, False):
        again = ours.scoring(peers_setting, readout=readout, packing=packing)
        torch.testing.assert_close(flat(again.run()), own, atol=1e-4, rtol=0)

    def read(last):
        return readout.text(readout.norm(last.float())).squeeze(-1)

    prompts = pointwise.scoring(peers_setting, read)
    torch.testing.assert_close(torch.tensor(prompts.run()), own, atol=1e-3, rtol=0)
    for together in (True, False):
        cached = pointwise_kv.scoring(peers_setting, read, together=together)
        torch.testing.assert_close(torch.tensor(cached.run()), own, atol=1e-3, rtol=0)
        assert cached.tokens < prompts.tokens


def test_logits_of_all_tokens_give_the_yes_and_no_scores_of_two_rows(peers_setting):
    own = flat(ours.scoring(peers_setting, logits=True).run())
    peer = torch.tensor(pointwise.scoring(peers_setting).run())
    torch.testing.assert_close(peer, own, atol=1e-3, rtol=0)


def test_letters_read_from_the_last_token_are_those_of_all_logits(peers_setting):
    last = letters.scoring(peers_setting).run()
    every = letters.scoring(peers_setting, logits="all").run()
    torch.testing.assert_close(flat(last), flat(every), atol=1e-4, rtol=0)
    assert [len(row) for row in last] == [4] * 5


def test_a_generated_ranking_has_room_for_every_candidate(peers_setting):
    case = generated.scoring(peers_setting)
    whole = peers_setting.base.tokenizer.encode("[1] > [2] > [3] > [4]", add_special_tokens=False)
    assert [len(row) for row in case.run()] == [len(whole)] * 5


def test_a_peers_step_trains_what_it_says(peers_setting):
    before = {n: p.clone() for n, p in peers_setting.adapted.named_parameters()}
    for case in training.cases(peers_setting).values():
        case.run()
        changed = {n for n, p in peers_setting.adapted.named_parameters() if (p != before[n]).any()}
        assert changed == {n for n in before if "lora_" in n}
        before = {n: p.clone() for n, p in peers_setting.adapted.named_parameters()}


def test_pointwise_losses_do_not_depend_on_how_prompts_are_batched(peers_setting, monkeypatch):
    def gradient(micro_tokens):
        given = replace(peers_setting, micro_tokens=micro_tokens)
        pointwise.training(given).run()
        return steps[-1]

    steps = []
    weights = [p for p in peers_setting.adapted.parameters() if p.requires_grad]
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda _: steps.append([p.grad.clone() for p in weights])
    )
    for small, large in zip(gradient(64), gradient(10**6), strict=True):
        torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-3)


def test_rows_are_batched_by_length_within_the_budget():
    assert batches([3, 9, 5, 9, 1], 18) == [[1, 3], [2, 0, 4]]
    assert batches([30, 2], 18) == [[0], [1]]


@pytest.mark.parametrize("module", [training, inference], ids=lambda m: m.__name__)
def test_one_command_compares_peers(module, tiny_decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "load_base", lambda name, **_: tiny_decoder)
    found = tmp_path / "found.json"
    options = {"slates": 2, "rounds": 2, "history": 2, "candidates": 3, "memory-slates": 0}
    module.main([f"--{name}={value}" for name, value in {**options, "json": found}.items()])
    result = json.loads(found.read_text(encoding="utf-8"))
    own = result["rows"][module.OWN]
    assert own["time_ratio"] == {"median": 1, "low": 1, "high": 1}
    assert result["rows"][module.POINTWISE]["token_ratio"] > 1
    assert {goal["goal"].partition(", ")[2] for goal in result["goals"]} <= result["rows"].keys()
    shown = capsys.readouterr().out
    assert all(f"| {name}" in shown for name in result["rows"])


def test_a_start_is_judged_by_its_goals(tmp_path, monkeypatch, capsys):
    parts = {"torch": 1.0, "peftrank": 0.5, "base": 1.5, "adapter": 0.25}

    def run(*arguments):
        if "--help" in arguments:
            return 0.2, "help"
        return 4.0, str({"nf4": 30, "none": 120}.get(arguments[-1], json.dumps(parts)))

    monkeypatch.setattr(startup, "_run", run)
    startup.main(["--rounds=1", f"--json={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {name: goal["met"] for name, goal in found["goals"].items()} == {
        startup.HELP: True,
        startup.WARM: False,
        startup.BYTES: True,
    }
    assert "3.25 | 2.50 | not met" in capsys.readouterr().out


def test_preparing_a_simulated_log_is_timed(tmp_path, capsys):
    found = tmp_path / "data.json"
    data.main(["--interactions", "2000", "--json", str(found)])
    (row,) = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert row["slates"] > 250
    assert row["peak_bytes"] > 0
    assert "| 2,000 |" in capsys.readouterr().out


def test_lengths_are_scored_in_rows_as_in_one(tiny_decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lengths, "load_base", lambda name, **_: tiny_decoder)
    found = tmp_path / "lengths.json"
    options = ["--lengths", "2", "90", "--micro-tokens", "900", "--rounds", "1", "--processor"]
    lengths.main([*options, f"--json={found}"])
    rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    sizes = [(row["history"], row["candidates"]) for row in rows]
    assert sizes == [(10, 20), (10, 2), (10, 90), (2, 20), (90, 20)]
    assert len([line for line in capsys.readouterr().out.splitlines() if line[:3] == "| 1"]) == 3
    assert all(row["computed_tokens"] >= row["tokens"] > 0 for row in rows)
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[2]["computed_tokens"] > rows[2]["tokens"]  # in rows


def test_a_length_in_rows_is_scored_as_in_one_row(tiny_decoder):
    given = setting(tiny_decoder, (), micro_tokens=900)
    tree = given.template(max_tokens=10**6).tree(lengths.slate(10, 90))
    torch.manual_seed(0)
    split = lengths.scoring(given, tree)()
    torch.manual_seed(0)
    assert lengths.scoring(given, tree, one_row=True)() == pytest.approx(split, abs=1e-4)
    assert len(split) == 90


def test_methods_are_compared_and_what_is_finished_is_kept(
    prepared, tmp_path, tiny_encoder, monkeypatch, capsys
):
    pytest.importorskip("bm25s")
    monkeypatch.setattr(methods, "load_base", lambda name, **_: tiny_encoder)
    monkeypatch.setattr(methods, "RATES", (1.0, 3.0))
    work, found = tmp_path / "work", tmp_path / "methods.json"
    arguments = [f"--data=games={prepared}", "--methods=LoRA,IA3,top-layers", "--steps=2"]
    arguments += ["--layers=top-1"]
    arguments += [f"--work={work}", f"--json={found}", "--rounds=1", "--test=5"]
    methods.main(arguments)
    (measured,) = json.loads(found.read_text(encoding="utf-8"))["data"]
    rows = {row["method"]: row for row in measured["rows"]}
    assert list(rows) == ["LoRA", "IA3", "top-layers"]
    for row in rows.values():
        low, high = row["interval"]
        assert low <= row["ndcg@10"] <= high
        assert row["ndcg@10"] == pytest.approx(sum(row["by_seed"]) / 3)
        assert len(row["trials"]) == 2
        assert float(f"{row['learning_rate']:g}") in map(float, row["trials"])
    assert rows["LoRA"]["against_reference"] == [0.0, 0.0, 0.0]
    assert rows["IA3"]["parameters"] < rows["LoRA"]["parameters"] < rows["top-layers"]["parameters"]
    assert rows["IA3"]["bytes"] < rows["top-layers"]["bytes"]
    assert "| top-layers |" in capsys.readouterr().out

    def fail(*_, **__):
        raise AssertionError("this was finished before")

    monkeypatch.setattr(methods, "train", fail)
    methods.main(arguments)


def test_quantizations_are_compared_on_the_same_seeds(
    prepared, workplace, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PEFTRANK_CACHE", str(tmp_path / "cache"))
    name, work = str(workplace / "base"), tmp_path / "work"
    arguments = [f"--data=games={prepared}", f"--base={name}", f"--bytes-of={name}", "--steps=2"]
    arguments += ["--layers=top-1", "--test=5", "--variants=none;nf4;nf4, double, embeddings"]
    quantization.main([*arguments, f"--work={work}", f"--json={tmp_path / 'q.json'}"])
    found = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    sizes = found["bytes"][name]
    assert sizes["none"] == 1
    assert sizes["nf4, double, embeddings"] < sizes["nf4"] < 1
    rows = {row["variant"]: row for row in found["data"][0]["rows"]}
    assert rows["none"]["against_none"] == [0.0, 0.0, 0.0]
    assert rows["nf4, double, embeddings"]["by_seed"] != rows["none"]["by_seed"]
    assert "| nf4, double, embeddings |" in capsys.readouterr().out


def test_successive_lists_are_measured_beside_one_list_per_tree(
    tiny_decoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(successive, "load_base", lambda name, **_: tiny_decoder)
    found = tmp_path / "successive.json"
    options = ["--lists=4", "--history", "12", "--candidates=2", "--rounds=1", "--processor"]
    successive.main([*options, f"--json={found}"])
    result = json.loads(found.read_text(encoding="utf-8"))
    rows = {(row["work"], row["case"]): row for row in result["rows"]}
    assert list(rows) == [(w, c) for w in successive.WORK for c in successive.CASES]
    assert rows["scoring", successive.ALONE]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert rows["training", successive.ONCE]["token_ratio"] > 2
    assert [goal["at_least"] for goal in result["goals"]] == [3.0, 3.0]
    assert capsys.readouterr().out.count("| once |") == 2


def test_what_a_setting_changes_is_measured_list_by_list(
    prepared, tmp_path, tiny_decoder, monkeypatch, capsys
):
    monkeypatch.setattr(effects, "load_base", lambda name, **_: tiny_decoder)
    found = tmp_path / "effects.json"
    arguments = [f"--data=games={prepared}", "--steps=2", "--seeds=2", "--train=16", "--test=5"]
    arguments += ["--set", "method={name: lora}", "--set", "training.batch_size=4"]
    arguments += ["--set", "readout={name: identifier}", "--set", "prompt.mode=joint"]
    arguments += ["--case", "high: {training.learning_rate: 0.5}", "--untrained"]
    arguments += [f"--work={tmp_path / 'work'}", f"--json={found}"]
    effects.main(arguments)
    result = json.loads(found.read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == [effects.GIVEN, "high", effects.UNTRAINED]
    assert result["lists"] == {"train": 16, "test": 5}
    first, high = rows[effects.GIVEN], rows["high"]
    assert first["difference"] is None
    assert high["difference"][0] == pytest.approx(high["ndcg@10"] - first["ndcg@10"])
    assert [len(row["by_seed"]) for row in rows.values()] == [2, 2, 1]
    assert "| high |" in capsys.readouterr().out

    def fail(*_, **__):
        raise AssertionError("this was finished before")

    monkeypatch.setattr(effects, "train", fail)
    effects.main(arguments)


def test_counted_products_are_those_that_torch_counts(tiny_decoder):
    from torch.utils.flop_counter import FlopCounterMode

    slates = synthetic(2, history=2, candidates=3)
    given = setting(tiny_decoder, slates, micro_tokens=4096, history_length=2, max_tokens=10**6)
    rows = [[5] * 7]
    linear, attention = peak.plain_products(tiny_decoder, rows)
    with FlopCounterMode(display=False) as counted, given.adapted.disable_adapter():
        peak.plain_forward(given, rows)
    assert counted.get_flop_counts()["Global"][torch.ops.aten.mm] == linear
    heads, width = 4, tiny_decoder.hidden_size // 4
    assert tiny_decoder.model.config.num_attention_heads == heads
    assert attention == tiny_decoder.num_layers * 4 * heads * width * (7 * 8 // 2)
    joint = given.trees(mode="joint")
    whole = [[t for s in tree.segments for t in s.tokens] for tree in joint]
    assert peak.products(tiny_decoder, joint) == peak.plain_products(tiny_decoder, whole)
    isolated = peak.products(tiny_decoder, given.trees())
    assert isolated[1] < peak.products(tiny_decoder, joint)[1]


def test_shares_of_the_peak_are_measured(tiny_decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peak, "load_base", lambda name, **_: tiny_decoder)
    found = tmp_path / "peak.json"
    arguments = ["--quantizations=none", "--slates=1", "--rounds=1", "--size=64"]
    peak.main([*arguments, f"--json={found}"])
    first, *rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert first["of_peak"]["high"] == 1.0
    for row in rows:
        assert sum(row["profile"].values()) == pytest.approx(1.0)
        assert row["of_peak"]["median"] > 0
    assert capsys.readouterr().out.count("transformers, ") == 2


@pytest.mark.slow
def test_trainings_over_stored_slates_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "_STEPS", {"small": 2})
    found = tmp_path / "streaming.json"
    streaming.main(["--interactions", "2000", "--json", str(found)])
    rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert [row["how"] for row in rows] == ["inline", "ahead"]
    assert all(row["waited_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert "| small | ahead |" in capsys.readouterr().out

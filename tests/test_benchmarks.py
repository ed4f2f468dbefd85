import json

import pytest

from benchmarks import games
from peftrank.config import load_config
from peftrank.formats.slates import write_slates
from peftrank.training.data import folder_data

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

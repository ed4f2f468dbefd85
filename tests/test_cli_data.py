import json

import pytest
from typer.testing import CliRunner

from peftrank import prepare as _prepare
from peftrank import slates as _slates
from peftrank._tables import Settings
from peftrank.cli.data import app
from peftrank.errors import ConfigError, DataError
from peftrank.formats.movielens import movielens
from peftrank.formats.slates import read_items, read_slates
from peftrank.training.data import folder_data

FEATURES = "popularity,item_knn,transition,item_embedding,text_overlap,recency"


@pytest.fixture
def films(tmp_path):
    """Writes a MovieLens folder of authored films: 12 users, 16 films, 8 ratings each."""
    folder = tmp_path / "raw"
    folder.mkdir()
    films = (f"{i}::Story {i} of the {('red', 'blue')[i % 2]} house::Drama" for i in range(16))
    (folder / "movies.dat").write_text("\n".join(films) + "\n", encoding="utf-8")
    rows = [
        f"{user}::{(user + 3 * step) % 16}::{1 + (user + step) % 5}::{1000 * step + user}"
        for user in range(12)
        for step in range(8)
    ]
    (folder / "ratings.dat").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def prepare(films, output, *more):
    given = ("--format", "movielens", "--path", films, "--output", output, "--n-negatives", 4)
    return run("prepare", *given, *more)


def test_prepare_writes_parts_items_and_a_record(films, tmp_path):
    out = tmp_path / "slates"
    result = prepare(films, out, "--targets-per-user", 3, "--features", FEATURES, "--json")
    assert result.exit_code == 0
    meta = json.loads(result.stdout)
    assert meta == json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta["counts"]["slates"] == {"train": 36, "valid": 12, "test": 12}
    assert meta["as_of"] == "time"
    assert len(dict(read_items(out / "items.jsonl"))) == 16
    slates = list(read_slates(out / "test.jsonl"))
    assert all(len(slate.candidates) == 5 and sum(slate.labels) == 1 for slate in slates)
    assert set(slates[0].candidates[0].features) <= set(meta["features"])
    assert all(slate.candidates[0].fields["title"] for slate in slates)


def test_the_same_seed_gives_the_same_files(films, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(films, tmp_path / name, "--features", FEATURES, "--seed", seed)
    prints = [
        json.loads((tmp_path / name / "meta.json").read_text(encoding="utf-8"))["fingerprint"]
        for name in "abc"
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("split", ["users", "time", "leave-one-out"])
@pytest.mark.parametrize("negatives", ["uniform", "popularity", "category"])
def test_every_split_goes_with_every_way_to_draw(films, tmp_path, split, negatives):
    out = tmp_path / "slates"
    result = prepare(films, out, "--split", split, "--negatives", negatives)
    assert result.exit_code == 0
    assert list(read_slates(out / "train.jsonl"))


def test_parquet_holds_the_same_slates(films, tmp_path):
    prepare(films, tmp_path / "a", "--features", "popularity")
    prepare(films, tmp_path / "b", "--features", "popularity", "--parquet")
    first = list(read_slates(tmp_path / "a" / "train.jsonl"))
    assert first == list(read_slates(tmp_path / "b" / "train.parquet"))


@pytest.mark.parametrize("features", ["", FEATURES])
@pytest.mark.parametrize("as_of", ["time", "part"])
def test_many_slates_are_written_as_shards_with_the_same_rows(
    films, tmp_path, monkeypatch, features, as_of
):
    options = ("--features", features, "--as-of", as_of, "--targets-per-user", 3)
    prepare(films, tmp_path / "a", *options)
    for module, name, value in (
        (_slates, "BLOCK", 25),
        (_prepare, "SHARD", 7),
        (_prepare, "_PIECE", 3),
    ):
        monkeypatch.setattr(module, name, value)
    prepare(films, tmp_path / "b", *options, "--parquet")
    shards = sorted((tmp_path / "b" / "train").iterdir())
    assert [shard.name for shard in shards] == [f"part-{i:05}.parquet" for i in range(6)]
    for part in ("train", "valid", "test"):
        first = list(read_slates(tmp_path / "a" / f"{part}.jsonl"))
        assert first == list(read_slates(tmp_path / "b" / part))
    meta = json.loads((tmp_path / "b" / "meta.json").read_text(encoding="utf-8"))
    assert "train/part-00005.parquet" in meta["files"]
    assert folder_data(tmp_path / "b").train == tmp_path / "b" / "train"
    counted = json.loads(run("inspect", tmp_path / "b", "--json").stdout)["parts"]
    assert counted["train"]["slates"] == 36


@pytest.mark.parametrize("when", [1, 3])
def test_an_interrupted_run_leaves_nothing_that_looks_complete(films, tmp_path, monkeypatch, when):
    monkeypatch.setattr(_slates, "BLOCK", 25)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == when:
            raise KeyboardInterrupt

    log = movielens(films)
    with pytest.raises(KeyboardInterrupt):
        _prepare.prepare(log, tmp_path / "out", Settings(), interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_run_leaves_what_an_earlier_one_wrote(films, tmp_path):
    out = tmp_path / "out"
    prepare(films, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prepare.prepare(movielens(films), out, Settings(), interrupt)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_second_run_leaves_no_file_of_the_first(films, tmp_path):
    prepare(films, tmp_path / "a", "--parquet")
    prepare(films, tmp_path / "a")
    assert not (tmp_path / "a" / "train.parquet").exists()


def test_low_ratings_are_left_out_and_counted(films, tmp_path):
    prepare(films, tmp_path / "a", "--min-rating", 3, "--labels", "rating")
    meta = json.loads((tmp_path / "a" / "meta.json").read_text(encoding="utf-8"))
    assert meta["dropped"]["interactions below --min-rating"] > 0
    for slate in read_slates(tmp_path / "a" / "test.jsonl"):
        assert max(slate.labels) >= 3


def test_ratings_are_kept_as_feedback_and_mere_events_are_not(films, tmp_path):
    prepare(films, tmp_path / "rated")
    ratings = films / "ratings.dat"
    rows = [line.split("::") for line in ratings.read_text(encoding="utf-8").splitlines()]
    ratings.write_text("".join(f"{u}::{i}::1::{t}\n" for u, i, _, t in rows), encoding="utf-8")
    prepare(films, tmp_path / "seen")
    for rated, seen in zip(
        read_slates(tmp_path / "rated" / "test.jsonl"),
        read_slates(tmp_path / "seen" / "test.jsonl"),
        strict=True,
    ):
        assert rated.history == seen.history
        assert set(rated.history_feedback) <= {1, 2, 3, 4, 5}
        assert seen.history_feedback is None


def test_a_count_does_not_tell_where_an_item_is_the_target(films, tmp_path):
    rows = [f"{u}::{(u * u + 3 * step) % 16}::5::{step}" for u in range(150) for step in range(8)]
    (films / "ratings.dat").write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = ("--as-of", "part", "--split", "users", "--valid", 0, "--test", 0)
    prepare(films, tmp_path / "a", *options, "--features", "popularity")
    counts = {0.0: {}, 1.0: {}}
    for slate in read_slates(tmp_path / "a" / "train.jsonl"):
        for item, label in zip(slate.candidates, slate.labels, strict=True):
            counts[label].setdefault(item.item_id, set()).add(item.features["popularity"])
    both = counts[0.0].keys() & counts[1.0].keys()
    assert len(both) > 2
    # Less the slate's own user alone, every count of a target would lie below the others.
    assert all(counts[0.0][i] & counts[1.0][i] for i in both)


def test_negatives_and_scores_come_from_a_run(films, tmp_path):
    run_file = tmp_path / "bm25.run"
    rows = (f"{u} Q0 {i} {i + 1} {16 - i} bm25" for u in range(12) for i in range(16))
    run_file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "a"
    prepare(films, out, "--negatives", f"run:{run_file}", "--features", "retriever")
    for slate in read_slates(out / "test.jsonl"):
        scores = [item.features["retriever"] for item in slate.candidates]
        assert scores == [16 - int(item.item_id) for item in slate.candidates]


def test_lists_really_shown_are_kept_as_they_are(films, tmp_path):
    prepare(films, tmp_path / "a", "--split", "users", "--valid", 0, "--test", 0)
    given = ("--format", "slates", "--path", tmp_path / "a" / "train.jsonl")
    run("prepare", *given, "--output", tmp_path / "b", "--features", "click_rate,popularity")
    before = {s.slate_id: s for s in read_slates(tmp_path / "a" / "train.jsonl")}
    kept = [
        s
        for part in ("train", "valid", "test")
        for s in read_slates(tmp_path / "b" / f"{part}.jsonl")
    ]
    assert len(kept) == len(before) == 12
    for slate in kept:
        old = before[slate.slate_id]
        assert [i.item_id for i in slate.candidates] == [i.item_id for i in old.candidates]
        assert slate.labels == old.labels


def test_lists_really_shown_take_no_settings_for_sampling(films, tmp_path):
    prepare(films, tmp_path / "a")
    given = ("--format", "slates", "--path", tmp_path / "a" / "train.jsonl")
    with pytest.raises(ConfigError, match="--n-negatives is for lists sampled"):
        run("prepare", *given, "--output", tmp_path / "b", "--n-negatives", 3)


def test_parts_named_by_the_files_are_kept(tmp_path):
    raw = tmp_path / "mind"
    raw.mkdir()
    news = "\n".join(f"N{i}\tsport\tball\tMatch {i}\t\t\t[]\t[]" for i in range(4)) + "\n"
    for part in ("train", "valid"):
        (raw / f"news.{part}.tsv").write_text(news, encoding="utf-8")
        row = f"{part}0\tU{part}\t11/15/2019 8:00:00 AM\tN0\tN1-1 N2-0 N3-0\n"
        (raw / f"behaviors.{part}.tsv").write_text(row, encoding="utf-8")
    given = ("--format", "mind", "--path", raw, "--output", tmp_path / "a")
    result = run("prepare", *given, "--features", "click_rate,category", "--json")
    meta = json.loads(result.stdout)
    assert meta["counts"]["slates"] == {"train": 1, "valid": 1, "test": 0}
    assert meta["as_of"] == "part"
    with pytest.raises(ConfigError, match="drop --valid and --test"):
        run("prepare", *given, "--test", 0.5)


def test_inspect_prints_every_part(films, tmp_path):
    prepare(films, tmp_path / "a", "--features", "popularity")
    result = run("inspect", tmp_path / "a")
    assert result.exit_code == 0
    for word in ("train", "valid", "test", "list length", "labels", "feature coverage", "Story"):
        assert word in result.stdout


def test_inspect_counts_for_machines(films, tmp_path):
    prepare(films, tmp_path / "a", "--features", "popularity")
    report = json.loads(run("inspect", tmp_path / "a", "--json").stdout)["parts"]["test"]
    assert report["slates"] == 12
    assert report["labels"] == {"0": 48, "1": 12}
    assert report["list_length"] == {"5-9": 12}
    assert sum(report["relevant_position"].values()) == 12
    assert report["feature_coverage"] == {"history_length": 1.0, "popularity": 1.0}
    assert report["field_coverage"] == {"genres": 1.0, "title": 1.0}
    assert report["cold_candidates"] == 0


def test_inspect_of_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="expected train, valid or test slates here"):
        run("inspect", tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--split", "random", "--split takes leave-one-out"),
        ("--negatives", "hard", "--negatives takes uniform"),
        ("--labels", "stars", "--labels takes binary or rating"),
        ("--features", "price", "unknown features 'price'"),
        ("--features", "retriever", "need --run FILE"),
        ("--features", "click_rate", "need lists that were really shown"),
        ("--split", "given", "needs lists that were really shown"),
        ("--as-of", "now", "--as-of takes auto"),
        ("--category-field", "colour", "no item has a field 'colour'"),
    ],
)
def test_a_setting_that_cannot_work_says_why(films, tmp_path, option, value, message):
    with pytest.raises(ConfigError, match=message):
        prepare(films, tmp_path / "a", option, value)

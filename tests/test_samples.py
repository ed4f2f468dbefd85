import json
import math
from collections import Counter
from itertools import pairwise

import pytest

from peftrank.errors import ConfigError
from peftrank.formats.slates import read_items, read_slates
from peftrank.samples import PARTS, sample_path, samples
from peftrank.samples.generate import main, render, simulate


def _rows(domain, part):
    with sample_path(domain, part).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _shown(rows):
    return {item for row in rows for item in (*row["history"], *row["candidates"])}


def _ndcg(scores, labels, k=10):
    def dcg(gains):
        return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:k]))

    by_score = [label for _, label in sorted(zip(scores, labels, strict=True), key=lambda p: -p[0])]
    return dcg(by_score) / dcg(sorted(labels, reverse=True))


def _mean_ndcg(slates, score):
    values = [_ndcg([score(slate, i) for i in slate.candidates], slate.labels) for slate in slates]
    return sum(values) / len(values)


def test_the_files_are_byte_for_byte_what_the_seed_generates():
    assert main(["--check"]) == 0


def test_another_seed_generates_other_slates():
    assert render("news", seed=1)["train"] != render("news")["train"]


def test_check_names_a_file_that_differs(monkeypatch, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.setattr("peftrank.samples.generate.samples", lambda: ("news",))
    monkeypatch.setattr(
        "peftrank.samples.generate.sample_path", lambda _, part: tmp_path / f"{part}.jsonl"
    )
    assert main(["--check"]) == 1
    assert "train.jsonl differs" in capsys.readouterr().err


def test_all_samples_together_stay_small():
    files = [sample_path(domain, part) for domain in samples() for part in ("items", *PARTS)]
    assert sum(file.stat().st_size for file in files) < 2.5e6


@pytest.mark.parametrize("domain", samples())
def test_every_part_is_read_as_slates_with_text(domain):
    field = "about" if domain == "social" else "title"
    counts = {}
    for part in PARTS:
        slates = list(read_slates(sample_path(domain, part)))
        counts[part] = len(slates)
        assert all(item.fields[field] for slate in slates for item in slate.candidates)
        assert all(any(slate.labels) and slate.history for slate in slates)
        assert len({slate.slate_id for slate in slates}) == len(slates)
        assert all((slate.history_feedback is None) != (domain == "video") for slate in slates)
    assert counts == {"train": 1200, "valid": 200, "test": 400}


@pytest.mark.parametrize("domain", samples())
def test_a_list_never_repeats_an_item_nor_shows_one_of_its_history(domain):
    for part in PARTS:
        for row in _rows(domain, part):
            assert len(set(row["candidates"])) == len(row["candidates"])
            assert not set(row["candidates"]) & set(row["history"])


@pytest.mark.parametrize("domain", samples())
def test_times_grow_over_the_rows_and_over_the_parts(domain):
    times = [row["timestamp"] for part in PARTS for row in _rows(domain, part)]
    assert all(earlier < later for earlier, later in pairwise(times))


@pytest.mark.parametrize("domain", samples())
def test_a_fifth_of_the_items_appears_in_the_test_part_only(domain):
    early = _shown(_rows(domain, "train")) | _shown(_rows(domain, "valid"))
    late = _shown(_rows(domain, "test"))
    every = read_items(sample_path(domain, "items"))
    assert 0.18 < len(late - early) / len(every) < 0.22


@pytest.mark.parametrize("domain", samples())
def test_the_test_part_has_returning_and_new_users(domain):
    known = {row["user_id"] for row in _rows(domain, "train")}
    users = [row["user_id"] for row in _rows(domain, "test")]
    assert sum(user in known for user in users) == 240
    assert len(set(users) - known) == 80


@pytest.mark.parametrize("domain", samples())
def test_texts_are_different_and_half_lack_a_category(domain):
    items = read_items(sample_path(domain, "items")).values()
    field = "about" if domain == "social" else "title"
    assert len(items) == 350
    assert len({item.fields[field] for item in items}) == 350
    if domain != "social":
        named = sum("category" in item.fields or "genres" in item.fields for item in items)
        assert 0.4 < named / 350 < 0.6


@pytest.mark.parametrize("domain", samples())
def test_taste_tells_more_than_popularity_and_popularity_more_than_chance(domain):
    _, parts = simulate(domain)
    clicks = Counter(
        item.item_id
        for slate in parts["train"]
        for item, label in zip(slate.candidates, slate.labels, strict=True)
        if label
    )
    test = parts["test"]
    affinity = _mean_ndcg(test, lambda s, i: s.affinities[s.candidates.index(i)])
    popularity = _mean_ndcg(test, lambda _, i: clicks[i.item_id])
    assert affinity > 0.8
    assert 0.42 < popularity < 0.55


@pytest.mark.parametrize("domain", samples())
def test_clicks_favour_the_first_positions(domain):
    clicked = [
        position
        for row in _rows(domain, "train")
        for position, label in enumerate(row["labels"])
        if label
    ]
    assert sum(position < 3 for position in clicked) > 1.3 * sum(5 < p < 9 for p in clicked)


def test_an_unknown_sample_or_part_names_the_closest():
    with pytest.raises(ConfigError, match="did you mean 'video'"):
        sample_path("videos", "train")
    with pytest.raises(ConfigError, match="did you mean 'valid'"):
        sample_path("news", "validation"[:6])

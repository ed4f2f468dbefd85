"""Counts of the public data sets, where they are at hand (they are not part of the project)."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from peftrank.errors import DataError
from peftrank.formats._log import Rejects
from peftrank.formats.amazon import amazon
from peftrank.formats.lastfm import lastfm
from peftrank.formats.lists import lists
from peftrank.formats.microlens import microlens
from peftrank.formats.mind import mind
from peftrank.formats.movielens import movielens
from peftrank.formats.recbole import recbole

DATA = Path(os.environ.get("PEFTRANK_DATA", Path(__file__).parents[2] / "shared" / "data"))


def folder(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} in {DATA}; set PEFTRANK_DATA to the folder of the public data")
    return DATA / name


def rows(path: Path) -> list[str]:
    return path.read_bytes().decode().removesuffix("\n").split("\n")


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def test_mind_has_every_impression_and_its_contradicting_news_rows_are_rejected():
    path = folder("news-mind")
    with pytest.raises(DataError, match=r"news\.train\.tsv:\d+: item id .* already has title"):
        mind(path)
    rejects = Rejects()
    log = mind(path, on_error="skip", rejects=rejects)
    shown = [line.split("\t")[4].split() for p in ("train", "valid") for line in
             rows(path / f"behaviors.{p}.tsv")]  # fmt: skip
    assert [len(i.candidates) for i in log.impressions] == [len(row) for row in shown]
    assert len(log) == sum(token.endswith("-1") for row in shown for token in row)
    assert sum(i.part == "valid" for i in log.impressions) == 100
    assert len(log.impressions) == 2597
    news = [row.split("\t") for p in ("train", "valid") for row in rows(path / f"news.{p}.tsv")]
    titles = {}
    contradicting = sum(titles.setdefault(row[0], row[3]) != row[3] for row in news)
    assert rejects.count == contradicting == 20
    assert len(log.items) == len(titles)


def test_movielens_100k_has_every_rating():
    path = folder("video-ml100k")
    log = movielens(path)
    assert len(log) == count(path / "u.data") == 99_057
    assert len(log.items) == count(path / "u.item") == 1682
    assert len(log.user_ids) == 943
    assert log.value.mean() == pytest.approx(
        np.mean([int(row.split("\t")[2]) for row in rows(path / "u.data")])
    )
    accented = [i for i in log.items.values() if re.search("[à-ü]", i.fields["title"])]
    assert accented
    assert log.rejects.count == 0


def test_games_has_every_event_of_every_user():
    path = folder("ecommerce-games")
    log = recbole(path)
    lines = rows(path / "games.train.inter")[1:]
    assert len(log.user_ids) == len(lines) == 50_546
    assert len(log) == sum(len(line.split("\t")[1].split()) + 1 for line in lines)
    assert len(log.items) == count(path / "games.item") - 1 == 16_859
    targets = [line.split("\t")[2] for line in lines]
    last = np.flatnonzero(np.diff(log.user, append=-1))
    assert [log.item_ids[i] for i in log.item[last]] == targets


@pytest.mark.parametrize("name", ["Industrial_and_Scientific", "Office_Products"])
def test_amazon_has_one_event_more_per_row_of_a_user(name):
    path = folder("ecommerce-amazon")
    log = amazon(path / f"{name}_train.csv")
    first, row_count = {}, 0
    with (path / f"{name}_train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            first.setdefault(row["user_id"], len(json.loads(row["history_item_id"])))
            row_count += 1
    assert len(log) == sum(first.values()) + row_count
    assert len(log.user_ids) == len(first)
    assert len(log.items) == count(path / f"{name}_info.txt")
    assert log.rejects.count == 0


def test_microlens_has_every_video_of_every_user():
    path = folder("video-microlens")
    log = microlens(path)
    lines = rows(path / "pairs.tsv")
    assert len(log) == sum(len(line.split()) - 1 for line in lines) == 309_708
    assert len(log.user_ids) == 50_000
    assert len(log.items) == count(path / "titles.csv") - 1 == 19_220


def test_lastfm_has_every_friendship_and_describes_every_person():
    path = folder("social-lastfm2k")
    log = lastfm(path)
    assert len(log) == count(path / "user_friends.dat") - 1 == 22_942
    people = {line.split()[0] for line in rows(path / "user_artists.dat")[1:]}
    assert set(log.items) == people
    assert all(item.fields["artists"] for item in log.items.values())
    assert log.rejects.count == 0


def test_music_has_every_list():
    path = folder("music-lastfm20") / "train.json"
    log = lists(path)
    ready = json.loads(path.read_text("utf-8"))
    assert [i.candidates for i in log.impressions] == [tuple(row["itemList"]) for row in ready]
    assert all(sum(i.labels) == 1 for i in log.impressions)
    assert len(log) == sum(len(row["historyList"].split("::")) + 1 for row in ready)
    assert log.rejects.count == 0

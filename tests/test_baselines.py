"""Rankings without a language model, on cases whose order is obvious."""

import random
import subprocess
import sys

import numpy as np
import pytest

from peftrank import plugins
from peftrank.errors import ConfigError
from peftrank.types import Item, Slate

TITLES = {
    "blue": "deep blue sea",
    "ship": "old ship",
    "shark": "white shark in the deep sea",
    "tea": "green tea",
    "rum": "dark rum",
}
EVERY = [name for name in plugins.available("baselines") if name != "lambdamart"]
every_baseline = pytest.mark.parametrize("name", EVERY)


def scores(name, slates, *, train=(), seed=0):
    return plugins.load("baselines", name)(slates, train=train, seed=seed)


def item(name):
    return Item(name, {"title": TITLES[name]})


def slate(history, candidates, labels=None, user_id="u"):
    return Slate("s", user_id, tuple(map(item, history)), tuple(map(item, candidates)), labels)


def numbered(i, *, missing=(), labels=True):
    """A slate of 5 candidates without text; the one with the greatest `fit` is relevant."""
    rng = random.Random(i)
    numbers = [
        {k: v for k, v in (("fit", rng.random()), ("noise", rng.random())) if k not in missing}
        for _ in range(5)
    ]
    best = max(range(5), key=lambda j: numbers[j].get("fit", 0))
    candidates = tuple(Item(f"{i}-{j}", {}, values) for j, values in enumerate(numbers))
    relevant = tuple(float(j == best) for j in range(5)) if labels else None
    return Slate(f"s{i}", "u", (), candidates, relevant)


@every_baseline
def test_there_is_a_finite_score_for_every_candidate_of_every_slate(name):
    slates = [
        slate(["blue"], ["shark", "tea"]),
        slate([], ["rum"]),
        slate(["tea", "rum"], ["blue", "ship", "shark"]),
    ]
    found = scores(name, slates, train=[slate(["ship"], ["rum", "tea"], (1.0, 0.0))])
    assert [len(row) for row in found] == [2, 1, 3]
    assert all(isinstance(value, float) and np.isfinite(value) for row in found for value in row)
    assert scores(name, slates, train=[]) is not None


@every_baseline
def test_labels_of_the_ranked_slates_are_not_read(name):
    train = [slate(["ship"], ["rum", "tea"], (1.0, 0.0))]
    told, untold = (slate(["blue"], ["tea", "shark"], labels) for labels in ((1.0, 0.0), None))
    assert scores(name, [told], train=train) == scores(name, [untold], train=train)


def test_random_is_decided_by_the_seed_alone():
    slates = [slate([], list(TITLES)) for _ in range(50)]
    first = scores("random", slates)
    assert scores("random", slates) == first
    assert scores("random", slates, seed=1) != first
    best = [int(np.argmax(row)) for row in first]
    assert set(best) == set(range(5))


def test_popularity_counts_users_of_the_training_part_only():
    train = [
        slate(["ship"], ["rum", "tea"], (1.0, 0.0), "a"),
        slate(["ship"], ["rum", "tea"], (1.0, 0.0), "a"),  # the same user again
        slate(["ship"], ["tea", "blue"], (2.0, 0.0), "b"),
        slate(["rum"], ["blue"], None, "c"),  # shown, not known to be taken
    ]
    ranked = slate(["blue", "shark"], ["ship", "rum", "tea", "blue", "shark"])
    assert scores("popularity", [ranked, ranked], train=train)[0] == (2, 2, 1, 0, 0)


def test_overlap_prefers_shared_words_and_rare_ones():
    ((sea, nothing),) = scores("overlap", [slate(["blue"], ["shark", "tea"])])
    assert sea > nothing == 0
    # Among all items `sea` is in most, `zinc` in one other.
    titles = ["sea zinc", "sea", "zinc", "sea salt", "sea wind", "sea bird"]
    taste, *others = (Item(title, {"title": title}) for title in titles)
    ((common, rare, *_),) = scores("overlap", [Slate("s", "u", (taste,), tuple(others))])
    assert rare > common


def test_overlap_reads_words_in_any_case_and_field():
    history = (Item("h", {"title": "Deep Sea!"}),)
    candidates = (Item("a", {"title": "x", "genre": "SEA"}), Item("b", {"title": "seal"}))
    ((same, other),) = scores("overlap", [Slate("s", "u", history, candidates)])
    assert same > other == 0


def test_overlap_is_the_same_in_every_process():
    program = """
from peftrank.baselines.overlap import overlap
from peftrank.types import Item, Slate
words = [f"w{i}" for i in range(60)]
items = [Item(str(i), {"title": " ".join(words[: 60 - i])}) for i in range(40)]
print(overlap([Slate("s", "u", (items[0],), tuple(items[1:]))], train=[], seed=0))
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_bm25_prefers_shared_words():
    ((sea, nothing),) = scores("bm25", [slate(["blue"], ["shark", "tea"])])
    assert sea > nothing == 0


def test_bm25_gives_zero_where_there_is_nothing_to_search_with():
    assert scores("bm25", [slate([], ["tea", "rum"])]) == [(0, 0)]
    wordless = Slate("s", "u", (Item("h", {"title": "the"}),), (Item("a", {}), Item("b", {})))
    assert scores("bm25", [wordless]) == [(0, 0)]
    assert scores("bm25", [wordless, slate(["blue"], ["tea", "blue"])])[0] == (0, 0)


def test_popularity_overlap_orders_equally_popular_items_by_their_words():
    train = [slate([name], ["ship"], (0.0,), user) for name in ("tea", "shark") for user in "ab"]
    ((tea, shark, unknown),) = scores(
        "popularity_overlap", [slate(["blue"], ["tea", "shark", "rum"])], train=train
    )
    assert shark > tea > unknown == 0


def test_bm25_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"bm25s.*pip install 'peftrank\[baselines\]'"):
        scores("bm25", [slate(["blue"], ["tea"])])


def test_lambdamart_learns_which_feature_matters():
    pytest.importorskip("lightgbm")
    train = [numbered(i) for i in range(300)]
    fresh = [numbered(i) for i in range(1000, 1060)]
    found = scores("lambdamart", fresh, train=train)
    hits = [np.argmax(row) == np.argmax(s.labels) for row, s in zip(found, fresh, strict=True)]
    assert np.mean(hits) > 0.85
    assert scores("lambdamart", fresh, train=train) == found


def test_lambdamart_takes_grades_missing_values_and_slates_of_any_length():
    pytest.importorskip("lightgbm")
    train = [numbered(i, missing=("noise",) if i % 2 else ()) for i in range(200)]
    halves = [
        Slate(s.slate_id, s.user_id, (), s.candidates[:3], (0.5, 4.5, 3.0)) for s in train[:50]
    ]
    unlabelled = [numbered(i, labels=False) for i in range(200, 260)]
    ranked = [numbered(1), Slate("x", "u", (), (Item("a", {}, {"fit": 0.9}), Item("b")))]
    found = scores("lambdamart", ranked, train=[*train, *halves, *unlabelled])
    assert [len(row) for row in found] == [5, 2]
    assert np.isfinite([*found[0], *found[1]]).all()


def test_lambdamart_without_features_or_labels_says_so():
    pytest.importorskip("lightgbm")
    plain = [slate(["blue"], ["shark", "tea"], (1.0, 0.0))]
    with pytest.raises(ConfigError, match=r"needs candidate features.*data prepare --features"):
        scores("lambdamart", plain, train=plain)
    with pytest.raises(ConfigError, match="no training slate has any"):
        scores("lambdamart", plain, train=[numbered(1, labels=False)])


def test_lambdamart_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r"lightgbm.*pip install 'peftrank\[baselines\]'"):
        scores("lambdamart", [numbered(1)], train=[numbered(2)])

"""What is known of all slates before training, read from slates or from columns of their files."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrank.errors import DataError
from peftrank.formats import _stored
from peftrank.formats._stored import stored_slates
from peftrank.formats.slates import read_slates, write_items, write_slates
from peftrank.training import facts as module
from peftrank.training.data import new_users
from peftrank.training.facts import facts
from peftrank.types import Item, Slate

_value = st.floats(-1e6, 1e6)
_grade = st.sampled_from([0.0, 0.0, 1.0, 2.5])


@st.composite
def slates(draw):
    """Slates with any of labels, weights, tasks and features, or without."""
    made = []
    for number in range(draw(st.integers(0, 7))):
        size = draw(st.integers(1, 3))
        grades = st.lists(_grade, min_size=size, max_size=size).map(tuple)
        known = st.lists(st.none() | _grade, min_size=size, max_size=size).map(tuple)
        features = st.dictionaries(st.sampled_from("ab"), _value)
        made.append(
            Slate(
                f"s{number}",
                draw(st.sampled_from("uv")),
                (),
                tuple(Item(str(i), {"title": "x"}, draw(features)) for i in range(size)),
                labels=draw(st.none() | grades),
                weights=draw(st.none() | grades),
                tasks=draw(st.dictionaries(st.sampled_from("tr"), known)),
            )
        )
    return made


@given(values=slates(), piece=st.integers(1, 5))
def test_facts_of_stored_slates_are_those_of_slates_in_memory_to_the_bit(values, piece):
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stored, "_SCANNED", piece)
        write_slates(Path(name) / "a.parquet", values)
        stored = stored_slates(Path(name))
        patch.setattr(type(stored), "__getitem__", None)  # the columns must do
        assert facts(stored) == facts(values)
        assert new_users(stored).tolist() == new_users(values).tolist()


def test_places_and_moments_are_right(make_slate):
    values = [make_slate(seed=i, features=("a",)) for i in range(5)]
    values[2] = replace(values[2], labels=None)
    values[4] = replace(values[4], labels=None, weights=(1.0,) * 4)
    found = facts(values)
    assert (found.unlabelled, found.weighted, found.relevant) == (2, 4, True)
    numbers = [item.features["a"] for slate in values for item in slate.candidates]
    mean, deviation = found.features["a"]
    assert mean == pytest.approx(np.mean(numbers))
    assert deviation == pytest.approx(np.std(numbers))
    assert not facts([make_slate(labels=(0.0,) * 4)]).relevant


def test_moments_of_large_numbers_lose_no_digits():
    times = 1.7e9 + np.arange(1000.0)
    values = [Slate(str(t), "u", (), (Item("i", {}, {"time": t}),), (1.0,)) for t in times]
    mean, deviation = facts(values).features["time"]
    assert mean == pytest.approx(times.mean(), rel=1e-14)
    assert deviation == pytest.approx(times.std(), rel=1e-12)


def test_features_in_the_items_file_count_too(make_slate, tmp_path):
    values = [make_slate(seed=i, features=("a",)) for i in range(3)]
    items = {item.item_id: item for slate in values for item in slate.candidates}
    history = {item.item_id: item for slate in values for item in slate.history}
    given_ = [replace(item, features={"price": float(i)}) for i, item in enumerate(items.values())]
    write_items(tmp_path / "items.jsonl", [*given_, *history.values()])
    write_slates(tmp_path / "train.parquet", values, by_id=True)
    expected = facts(list(read_slates(tmp_path / "train.parquet")))
    assert {*expected.features} == {"a", "price"}
    assert facts(stored_slates(tmp_path / "train.parquet")) == expected


def test_files_of_other_tools_are_read_slate_by_slate(make_slate, tmp_path, monkeypatch):
    def fails(seen, batch, features):
        raise AssertionError("structs are no maps")

    values = [make_slate(seed=i, features=("a",)) for i in range(3)]
    write_slates(tmp_path / "own.parquet", values)
    columns = ["slate_id", "user_id", "history", "candidates", "labels"]
    rows = pq.read_table(tmp_path / "own.parquet", columns=columns).to_pylist()
    for row in rows:
        for item in row["history"]:
            item["fields"] = dict(item["fields"])
            del item["features"]
        for item in row["candidates"]:
            item["fields"], item["features"] = dict(item["fields"]), dict(item["features"])
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "other.parquet")
    monkeypatch.setattr(module._Seen, "add_columns", fails)
    assert facts(stored_slates(tmp_path / "other.parquet")) == facts(values)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("labels", lambda row: [-1.0, 0, 0, 0], r"labels\[0\] is -1"),
        ("labels", lambda row: [math.nan, 0, 0, 0], r"labels\[0\] is nan"),
        ("labels", lambda row: [None, 0, 0, 0], r"labels\[0\] must be a number, not null"),
        (
            "candidates",
            lambda row: [{**row["candidates"][0], "features": [("a", math.inf)]}],
            "feature 'a' of item 'c1-0' is inf",
        ),
        ("candidates", lambda row: ["nobody"], "item 'nobody' is named by id alone"),
    ],
)
def test_numbers_that_no_slate_may_have_are_an_error_with_their_row(
    column, change, message, make_slate, tmp_path
):
    write_slates(tmp_path / "a.parquet", [make_slate(seed=i, features=("a",)) for i in range(3)])
    table = pq.read_table(tmp_path / "a.parquet")
    rows = table.to_pylist()
    changed = change(rows[1])
    if changed == ["nobody"]:
        changed = [{"item_id": "nobody", "fields": None, "features": None}]
    rows[1][column] = changed
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet:2: slate 's1': {message}"):
        facts(stored_slates(tmp_path / "a.parquet"))

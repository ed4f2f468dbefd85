"""Slates, items and rankings on disk."""

import gzip
import json
import math
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftrank.errors import ConfigError, DataError
from peftrank.formats import _lines
from peftrank.formats._log import Rejects
from peftrank.formats.slates import (
    read_items,
    read_run,
    read_slates,
    slates,
    write_items,
    write_qrels,
    write_rankings,
    write_slates,
)
from peftrank.types import Item, RankedList, Slate

SUFFIXES = ("jsonl", "jsonl.gz", "parquet")

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_id = _text.filter(bool)
_number = st.floats(allow_nan=False, allow_infinity=False)
_item = st.builds(
    Item,
    _id,
    st.dictionaries(_text, _text, max_size=3),
    st.dictionaries(_text, _number, max_size=3),
)


@st.composite
def _slate(draw):
    history = tuple(draw(st.lists(_item, max_size=3)))
    candidates = tuple(
        draw(st.lists(_item, min_size=1, max_size=4, unique_by=lambda item: item.item_id))
    )
    grade = st.floats(min_value=0, allow_nan=False, allow_infinity=False)

    def numbers(value, n):
        return draw(st.none() | st.lists(value, min_size=n, max_size=n).map(tuple))

    return Slate(
        slate_id=draw(_id),
        user_id=draw(_id),
        history=history,
        candidates=candidates,
        labels=numbers(grade, len(candidates)),
        history_feedback=numbers(_number, len(history)),
        timestamp=draw(st.none() | _number),
        domain=draw(st.none() | _id),
        context=draw(st.dictionaries(_text, _text, max_size=2)),
        weights=numbers(grade, len(candidates)),
        tasks=draw(
            st.dictionaries(
                _id,
                st.lists(st.none() | grade, min_size=len(candidates), max_size=len(candidates)).map(
                    tuple
                ),
                max_size=2,
            )
        ),
    )


def record(**changes):
    """Returns a slate as it stands in a file, with some keys replaced; None removes one."""
    values = {
        "slate_id": "s1",
        "user_id": "u1",
        "history": [{"item_id": "h1", "fields": {"title": "Quiet Harbour"}}],
        "candidates": [
            {"item_id": "a", "fields": {"title": "Copper Kettle"}, "features": {"price": 3.5}},
            {"item_id": "b", "fields": {"title": "Paper Lantern"}},
        ],
        "labels": [1, 0],
    }
    values.update(changes)
    return {key: value for key, value in values.items() if value != "REMOVED"}


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(_slate(), max_size=4))
def test_slates_are_read_back_exactly_as_they_were_written(suffix, values):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"slates.{suffix}"
        assert write_slates(path, values) == len(values)
        assert list(read_slates(path)) == values


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_items_are_read_back_exactly_as_they_were_written(tmp_path, suffix):
    items = {
        "é1": Item("é1", {"title": "Łódź\u2028at night", "empty": ""}, {"price": 0.1}),
        "2": Item("2"),
    }
    path = tmp_path / f"items.{suffix}"
    assert write_items(path, items.values()) == 2
    assert read_items(path) == items


@pytest.mark.parametrize("items_suffix", SUFFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_items_named_by_id_take_their_text_from_the_items_file_beside(
    tmp_path, suffix, items_suffix
):
    items = [Item("a", {"title": "Copper Kettle"}), Item("b", {"title": "Paper Lantern"})]
    candidate = Item("b", {"title": "Paper Lantern"}, {"retriever": 0.25})
    slate = Slate("s", "u", (items[0],), (items[0], candidate), (0.0, 1.0))
    write_items(tmp_path / f"items.{items_suffix}", items)
    write_slates(tmp_path / f"train.{suffix}", [slate], by_id=True)
    assert list(read_slates(tmp_path / f"train.{suffix}")) == [slate]


def test_plain_ids_are_looked_up_in_a_given_file_or_mapping(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", record(history=[], candidates=["a", "b"]))
    items = {name: Item(name, {"title": name * 3}) for name in "ab"}
    write_items(tmp_path / "texts.parquet", items.values())
    from_file = next(read_slates(path, items=tmp_path / "texts.parquet"))
    assert from_file.candidates == (items["a"], items["b"])
    assert next(read_slates(path, items=items)) == from_file


def test_the_items_file_is_not_opened_when_every_item_has_its_text(tmp_path):
    write_lines(tmp_path / "items.jsonl", "{broken\n")
    path = write_lines(tmp_path / "s.jsonl", record())
    assert len(list(read_slates(path))) == 1


def test_an_id_in_no_items_file_is_an_error_that_says_where_was_looked(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", record(candidates=["a", "b"]))
    with pytest.raises(DataError, match=r"no items file was given and no items\.jsonl"):
        list(read_slates(path))
    write_items(tmp_path / "items.jsonl", [Item("a", {"title": "Copper Kettle"})])
    with pytest.raises(DataError, match=r"s\.jsonl:1: slate 's1': item id 'b' is not in .*items"):
        list(read_slates(path))


def test_an_items_file_must_name_each_item_once_and_give_its_text(tmp_path):
    one = {"item_id": "a", "fields": {"title": "x"}}
    path = write_lines(tmp_path / "items.jsonl", one, one)
    with pytest.raises(DataError, match=r"items\.jsonl:2: item id 'a' occurs twice"):
        read_items(path)
    path = write_lines(tmp_path / "items.jsonl", {"item_id": "a"})
    with pytest.raises(DataError, match="has no key 'fields'"):
        read_items(path)


BAD = {
    "a missing key": (record(user_id="REMOVED"), r"key 'user_id' is missing; a slate needs"),
    "an unknown key": (record(lables=[1, 0]), r"unknown key 'lables' \(did you mean 'labels'\?\)"),
    "no candidates": (record(candidates=[], labels=[]), "candidates is empty"),
    "a candidate twice": (
        record(candidates=[{"item_id": "a", "fields": {}}] * 2),
        "candidate 'a' occurs twice",
    ),
    "labels of another length": (record(labels=[1]), "labels has 1 numbers for 2 candidates"),
    "a NaN label": (record(labels=[math.nan, 0]), r"labels\[0\] is nan; it must be a finite"),
    "an infinite label": (record(labels=[math.inf, 0]), r"labels\[0\] is inf"),
    "a huge label": (record(labels=[10**400, 0]), r"labels\[0\] is inf"),
    "a negative label": (record(labels=[0, -1]), r"labels\[1\] is -1.0; it must be at least 0"),
    "a true label": (record(labels=[True, 0]), r"labels\[0\] must be a number, not True"),
    "labels as text": (record(labels="1,0"), "labels must be an array of numbers or null"),
    "a number as id": (record(slate_id=7), "slate_id must be a text, not 7"),
    "an empty id": (record(user_id=""), "user_id is empty"),
    "a history that is no array": (record(history={}), "history must be an array of items"),
    "an item that is a number": (record(history=[3]), "an item is an object or an item id, not 3"),
    "an item without id": (record(history=[{"fields": {}}]), "key 'item_id' is missing"),
    "an item with unknown key": (
        record(history=[{"item_id": "h", "feilds": {}}]),
        r"unknown key 'feilds' \(did you mean 'fields'\?\); an item has",
    ),
    "a field that is no text": (
        record(history=[{"item_id": "h", "fields": {"title": 3}}]),
        "fields of item 'h': 'title' must be a text, not 3",
    ),
    "a null feature": (
        record(history=[{"item_id": "h", "fields": {}, "features": {"p": None}}]),
        "feature 'p' of item 'h' is null; leave an unknown feature out",
    ),
    "a NaN feature": (
        record(history=[{"item_id": "h", "fields": {}, "features": {"p": math.nan}}]),
        "feature 'p' of item 'h' is nan",
    ),
    "feedback of another length": (
        record(history_feedback=[1, 2]),
        "history_feedback has 2 numbers for 1 history items",
    ),
    "a negative weight": (
        record(weights=[0.5, -2]),
        r"weights\[1\] is -2.0; it must be at least 0",
    ),
    "weights of another length": (record(weights=[1]), "weights has 1 numbers for 2 candidates"),
    "tasks that are an array": (record(tasks=[1, 2]), "tasks must be an object of arrays"),
    "a task that is a number": (record(tasks={"click": 1}), r"tasks\['click'\] must be an array"),
    "a task of another length": (
        record(tasks={"click": [1]}),
        r"tasks\['click'\] has 1 values for 2 candidates; give one each, null where",
    ),
    "a negative value of a task": (
        record(tasks={"click": [None, -1]}),
        r"tasks\['click'\]\[1\] is -1.0; it must be at least 0",
    ),
    "a task without a name": (record(tasks={"": [1, 0]}), "a task's name is empty"),
    "a weight that is no number": (record(weights=[1, "2"]), r"weights\[1\] must be a number"),
    "an infinite weight": (record(weights=[1, math.inf]), r"weights\[1\] is inf"),
    "a time as text": (record(timestamp="2020-01-01"), "timestamp must be a number"),
    "a context that is an array": (record(context=[]), "context must be an object of texts"),
    "half a character": (record(user_id="\ud800"), "user_id holds a lone surrogate"),
    "an array for a slate": ([1], "a slate is an object with keys"),
    "broken JSON": ('{"slate_id": \n', "not valid JSON: .* at column"),
    "a key twice": ('{"slate_id": "a", "slate_id": "b"}\n', "key 'slate_id' occurs twice"),
    "deep nesting": ("[" * 200_000 + "\n", "not valid JSON: nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_an_error_with_file_line_and_reason(tmp_path, case):
    row, message = BAD[case]
    path = write_lines(tmp_path / "s.jsonl", record(), "\n", row)
    with pytest.raises(DataError, match=message) as caught:
        list(read_slates(path))
    assert (caught.value.path, caught.value.line) == (path, 3)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_skipped_into_the_quarantine_with_its_reason(tmp_path, case):
    row, _ = BAD[case]
    path = write_lines(tmp_path / "s.jsonl", record(), row, record(slate_id="s2"))
    rejects = Rejects(tmp_path / "out" / "quarantine.jsonl")
    read = list(read_slates(path, on_error="skip", quarantine=rejects))
    assert [slate.slate_id for slate in read] == ["s1", "s2"]
    assert rejects.count == 1
    (kept,) = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert (kept["file"], kept["line"]) == (str(path), 2)
    assert kept["reason"]
    assert kept["row"] == (row if isinstance(row, str) else json.dumps(row)).rstrip("\n")[:65_536]


def test_errors_name_the_slate(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", record(slate_id="breakfast", labels=[1]))
    with pytest.raises(DataError, match=r"s\.jsonl:1: slate 'breakfast': labels has"):
        list(read_slates(path))


def test_skipping_without_a_quarantine_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs quarantine"):
        read_slates(tmp_path, on_error="skip")
    with pytest.raises(ConfigError, match="'raise' or 'skip', not 'ignore'"):
        read_slates(tmp_path, on_error="ignore")


def test_a_quarantine_path_is_written_too_and_emptied_by_the_next_run(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", record(labels=[1]))
    where = tmp_path / "q.jsonl"
    assert list(read_slates(path, on_error="skip", quarantine=where)) == []
    assert len(where.read_text().splitlines()) == 1
    write_lines(path, record())
    assert len(list(read_slates(path, on_error="skip", quarantine=where))) == 1
    assert where.read_text() == ""


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    one, two = json.dumps(record()), json.dumps(record(slate_id="s2"))
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{one}\r\n\r\n  \r\n{two}".encode())
    assert [slate.slate_id for slate in read_slates(path)] == ["s1", "s2"]


def test_invalid_utf8_is_an_error_with_its_line_and_costs_one_row_when_skipped(tmp_path):
    path = tmp_path / "s.jsonl"
    good = json.dumps(record()).encode()
    path.write_bytes(good + b"\n" + b'{"slate_id": "\xff\xfe"}\n' + good + b"\n")
    with pytest.raises(DataError, match=r"s\.jsonl:2: the line is not valid UTF-8"):
        list(read_slates(path))
    rejects = Rejects()
    assert len(list(read_slates(path, on_error="skip", quarantine=rejects))) == 2
    assert rejects.by_file == {str(path): 1}


def test_an_endless_line_is_an_error_and_costs_one_row_when_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(_lines, "LINE_BYTES", 2000)
    path = write_lines(tmp_path / "s.jsonl", record(), "x" * 10_000 + "\n", record())
    with pytest.raises(DataError, match=r"s\.jsonl:2: the line is longer than"):
        list(read_slates(path))
    rejects = Rejects()
    assert len(list(read_slates(path, on_error="skip", quarantine=rejects))) == 2
    assert rejects.count == 1


def test_a_file_larger_than_the_memory_used_is_streamed(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = (Slate(f"s{i}", "u", (), (Item("a", {"title": "word " * 400}),)) for i in range(4000))
    write_slates(path, rows)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_slates(path)) == 4000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 8_000_000 > 4 * peak


def test_a_folder_of_shards_is_read_in_the_order_of_the_names(tmp_path):
    for name, slate_id in (("part-1.parquet", "s1"), ("part-0.jsonl.gz", "s0")):
        write_slates(tmp_path / name, [Slate(slate_id, "u", (), (Item("a"),))])
    for name in ("items.jsonl", "quarantine.jsonl", "_SUCCESS.jsonl", ".part-2.jsonl", "README"):
        (tmp_path / name).write_text("no slates")
    assert [slate.slate_id for slate in read_slates(tmp_path)] == ["s0", "s1"]


def test_missing_and_unknown_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="no slates here"):
        read_slates(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_slates(tmp_path / "none.jsonl")
    (tmp_path / "s.txt").write_text("")
    with pytest.raises(DataError, match="read from"):
        read_slates(tmp_path / "s.txt")
    with pytest.raises(ConfigError, match="ends in"):
        write_slates(tmp_path / "s.csv", [])


def test_damaged_files_are_data_errors(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot read the Parquet file"):
        list(read_slates(tmp_path / "a.parquet"))
    whole = gzip.compress(json.dumps(record()).encode() * 100)
    for name, data in (("cut", whole[:-20]), ("not", b"plain")):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot read the file"):
            list(read_slates(path))


def test_a_bad_parquet_row_is_an_error_with_its_row_number(tmp_path):
    path = tmp_path / "s.parquet"
    rows = [record(), record(labels=[1.0])]
    for row in rows:
        row["history"] = []
        row["candidates"] = ["a", "b"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    items = {name: Item(name, {"title": name}) for name in "ab"}
    with pytest.raises(DataError, match=r"s\.parquet:2: slate 's1': labels has 1"):
        list(read_slates(path, items=items))
    rejects = Rejects(tmp_path / "q.jsonl")
    assert len(list(read_slates(path, items=items, on_error="skip", quarantine=rejects))) == 1
    assert '"line": 2' in rejects.path.read_text()


def test_parquet_of_other_tools_with_structs_for_maps_is_read(tmp_path):
    path = tmp_path / "s.parquet"
    pq.write_table(pa.Table.from_pylist([record(context={"device": "phone"})]), path)
    (slate,) = read_slates(path)
    assert slate.candidates[0].features == {"price": 3.5}
    assert slate.candidates[1].features == {}
    assert slate.context == {"device": "phone"}


def test_wrong_parquet_columns_are_named(tmp_path):
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"slate_id": ["s"], "user": ["u"]}), path)
    with pytest.raises(DataError, match="unknown columns: user; missing: user_id, history"):
        list(read_slates(path))


def test_invalid_utf8_in_parquet_costs_one_row(tmp_path):
    path = tmp_path / "s.parquet"
    write_slates(path, [Slate(f"s-{i}", "user", (), (Item("a"),)) for i in range(3)])
    path.write_bytes(path.read_bytes().replace(b"s-1", b"s\xff1"))
    rejects = Rejects()
    read = list(read_slates(path, on_error="skip", quarantine=rejects))
    assert [slate.slate_id for slate in read] == ["s-0", "s-2"]
    assert "s.parquet:2: a text of the row is not valid UTF-8" in rejects.examples[0]


def test_a_column_name_of_invalid_utf8_is_a_damaged_file(tmp_path):
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["i"], "fields": ["x"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"fields", b"\xff" * 6))
    with pytest.raises(DataError, match=r"cannot read the Parquet file: .*utf-8"):
        read_items(path)


def test_maps_of_other_tools_that_are_no_texts_cost_one_row(tmp_path):
    texts = pa.map_(pa.string(), pa.string())
    numbers = pa.map_(pa.int64(), pa.string())
    cases = [
        (pa.array([[("a", "x"), ("a", "y")]], texts), "key 'a' occurs twice"),
        (pa.array([[(1, "x")]], numbers), "the key 1 must be a text"),
        (pa.array([[1, 2]]), "fields of item 'i' must be an object of texts, not"),
        (pa.array([["ab"]]), "fields of item 'i' must be an object of texts, not"),
        (pa.array([2**62], pa.timestamp("us")), "a value of the row cannot be read"),
        (pa.array([[([1], "x")]], pa.map_(pa.list_(pa.int8()), pa.string())), "map of the row"),
    ]
    for fields, message in cases:
        path = tmp_path / "items.parquet"
        pq.write_table(pa.table([pa.array(["i"]), fields], names=["item_id", "fields"]), path)
        with pytest.raises(DataError, match=rf"parquet:1: .*{message}"):
            read_items(path)
        assert read_items(path, on_error="skip", quarantine=tmp_path / "q.jsonl") == {}


def test_a_feature_without_a_proper_name_is_an_error(tmp_path):
    item = {"item_id": "i", "fields": {}, "features": {"\ud800": 1}}
    with pytest.raises(DataError, match="features of item 'i' holds a lone surrogate"):
        read_items(write_lines(tmp_path / "items.jsonl", item))


@pytest.mark.parametrize("depth", [300, 900, 960, 980, 990, 1000, 3000])
def test_json_nested_deeper_than_python_prints_is_an_error(tmp_path, depth):
    nested = "[" * depth + "]" * depth
    line = json.dumps(record(labels="NESTED")).replace('"NESTED"', nested)
    with pytest.raises(DataError, match=r"labels has 1 numbers|nested too deeply"):
        list(read_slates(write_lines(tmp_path / "s.jsonl", line + "\n")))
    line = json.dumps(record(history=["NESTED"])).replace('"NESTED"', nested)
    with pytest.raises(DataError, match=r"an item is an object|nested too deeply"):
        list(read_slates(write_lines(tmp_path / "s.jsonl", line + "\n")))


def test_a_key_that_occurs_twice_is_found_in_linear_time(tmp_path):
    keys = ", ".join(f'"k{i}": 0' for i in range(200_000))
    path = write_lines(tmp_path / "s.jsonl", f'{{{keys}, "k199999": 0}}\n')
    start = time.process_time()
    with pytest.raises(DataError, match="key 'k199999' occurs twice"):
        list(read_slates(path))
    assert time.process_time() - start < 5


def test_a_label_beyond_float32_is_no_value_of_a_log(tmp_path):
    path = write_lines(tmp_path / "s.jsonl", record(labels=[1e308, 0]))
    assert len(list(read_slates(path))) == 1
    with pytest.raises(DataError, match=r"slate 's1': value is 1e\+308"):
        slates(path)
    assert len(slates(path, on_error="skip").impressions) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, suffix):
    path = tmp_path / f"s.{suffix}"
    good = Slate("s", "u", (), (Item("a"),))
    write_slates(path, [good])
    before = path.read_bytes()
    bad = Slate("t", "u", (), (Item("a"),), labels=(math.nan,))
    with pytest.raises(DataError, match=r"number 2 cannot be written: slate 't': labels\[0\]"):
        write_slates(path, [good, bad])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    item = Item("a", {}, {"price": np.float32(0.5)})
    slate = Slate("s", "u", (), (item,), labels=(np.float32(1),), timestamp=np.int64(5))
    write_slates(tmp_path / "s.jsonl", [slate])
    (read,) = read_slates(tmp_path / "s.jsonl")
    assert read == Slate("s", "u", (), (Item("a", {}, {"price": 0.5}),), (1.0,), None, 5.0)


def test_equal_slates_make_equal_gzip_bytes(tmp_path):
    for name in ("one", "two"):
        write_slates(tmp_path / f"{name}.jsonl.gz", [Slate("s", "u", (), (Item("a"),))])
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_a_slates_file_is_a_log_too(tmp_path):
    path = write_lines(
        tmp_path / "s.jsonl",
        record(timestamp=5, labels=[2, 0]),
        record(slate_id="s2", labels=None),
        record(slate_id="s3", history=[{"item_id": "a", "fields": {"title": "Another thing"}}]),
    )
    with pytest.raises(DataError, match="slate 's3': item id 'a' already has title"):
        slates(path)
    log = slates(path, on_error="skip")
    assert log.rejects.count == 1
    assert list(log.items) == ["h1", "a", "b"]
    assert [i.labels for i in log.impressions] == [(2.0, 0.0), None]
    (row,) = log.interactions()
    assert (row.user_id, row.item_id, row.timestamp, row.value) == ("u1", "a", 5.0, 2.0)


RANKED = [RankedList("s1", ("b", "a"), (0.5, -1.25)), RankedList("s2", ("ü",), (1e-9,))]


def test_rankings_are_written_as_json_lines(tmp_path):
    assert write_rankings(tmp_path / "r.jsonl", RANKED) == 2
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()]
    assert rows[0] == {"slate_id": "s1", "item_ids": ["b", "a"], "scores": [0.5, -1.25]}


def test_a_trec_run_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "r.run"
    assert write_rankings(path, RANKED, tag="mine") == 2
    assert path.read_text("utf-8").splitlines()[0] == "s1 Q0 b 1 0.5 mine"
    assert read_run(path) == RANKED


def test_a_run_is_ordered_by_score_then_rank(tmp_path):
    path = tmp_path / "r.run"
    path.write_text("q Q0 a 3 1.0 t\nq Q0 b 2 1.0 t\nq Q0 c 1 2.0 t\n")
    assert read_run(path) == [RankedList("q", ("c", "b", "a"), (2.0, 1.0, 1.0))]


def test_bad_lines_of_a_run_are_errors_with_their_line(tmp_path):
    path = tmp_path / "r.run"
    path.write_text("q Q0 a 1 1.0 t\nq Q0 a 2 1.0 t\nq Q0 b 2 high t\nq b\n")
    with pytest.raises(DataError, match=r"r\.run:2: item 'a' occurs twice"):
        read_run(path)
    rejects = Rejects()
    assert read_run(path, on_error="skip", rejects=rejects) == [RankedList("q", ("a",), (1.0,))]
    assert rejects.count == 3


def test_qrels_hold_whole_labels_only(tmp_path):
    slate = Slate("s", "u", (), (Item("a"), Item("b")), (3.0, 0.0))
    assert write_qrels(tmp_path / "q.qrels", [slate]) == 1
    assert (tmp_path / "q.qrels").read_text() == "s 0 a 3\ns 0 b 0\n"
    half = Slate("s", "u", (), (Item("a"),), (0.5,))
    with pytest.raises(DataError, match=r"label 0\.5 is no whole number"):
        write_qrels(tmp_path / "q.qrels", [half])
    with pytest.raises(DataError, match="has no labels"):
        write_qrels(tmp_path / "q.qrels", [Slate("s", "u", (), (Item("a"),))])


def test_ids_with_spaces_cannot_be_written_as_trec(tmp_path):
    with pytest.raises(DataError, match="holds white space"):
        write_rankings(tmp_path / "r.run", [RankedList("s", ("a b",), (1.0,))])
    with pytest.raises(DataError, match="holds white space"):
        write_rankings(tmp_path / "r.run", [RankedList("\ufeffs", ("a",), (1.0,))])
    with pytest.raises(DataError, match="is nan"):
        write_rankings(tmp_path / "r.jsonl", [RankedList("s", ("a",), (math.nan,))])
    with pytest.raises(ConfigError, match=r"\.jsonl, \.jsonl\.gz or \.run"):
        write_rankings(tmp_path / "r.csv", [])
    assert list(tmp_path.iterdir()) == []

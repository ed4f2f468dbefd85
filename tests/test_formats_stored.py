"""Slates that stay in their Parquet files are those that `read_slates` reads."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftrank.errors import DataError
from peftrank.formats import _stored
from peftrank.formats._parquet import SLATES
from peftrank.formats._stored import stored_slates
from peftrank.formats.slates import read_slates, write_items, write_slates


@pytest.fixture
def folder(make_slate, tmp_path):
    """17 slates in three files with row groups of two rows."""
    slates = [make_slate(seed=i, features=("a",), timestamp=float(i)) for i in range(17)]
    for name, rows in (("0", slates[:5]), ("1", slates[5:6]), ("2", slates[6:])):
        write_slates(tmp_path / f"{name}.parquet", rows)
        table = pq.read_table(tmp_path / f"{name}.parquet")
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    return tmp_path


def test_stored_slates_are_those_of_the_files_however_they_are_asked_for(folder):
    expected = list(read_slates(folder))
    slates = stored_slates(folder)
    assert len(slates) == len(expected) == 17
    assert list(slates) == expected
    assert [slates[i] for i in (16, 0, 5, -1, 6)] == [expected[i] for i in (16, 0, 5, -1, 6)]
    assert list(slates[3:12:2][1:]) == expected[3:12:2][1:]
    places = [13, 2, 13, 5, 4, 0]
    chosen = slates.choose(np.array(places))
    assert list(chosen) == [expected[i] for i in places]
    assert chosen[3] == expected[5]
    assert list(chosen[:0]) == []
    later = slates.changed(lambda slate: replace(slate, domain="x"))
    assert list(later.choose(np.array([3]))) == [replace(expected[3], domain="x")]
    named = later.changed(lambda slate: replace(slate, slate_id=f"{slate.domain}!"))
    assert named[3] == replace(expected[3], domain="x", slate_id="x!")
    with pytest.raises(IndexError):
        slates[17]


def test_few_row_groups_are_held_and_each_is_read_once_for_its_slates(folder, monkeypatch):
    expected, slates = list(read_slates(folder)), stored_slates(folder)
    read = []
    group = pq.ParquetFile.read_row_group

    def counted(file, i, **options):
        read.append(i)
        return group(file, i, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(_stored, "CACHE", 1)
    monkeypatch.setattr(_stored, "_OPEN", 1)
    places = np.array([16, 0, 15, 1, 14])
    assert list(slates.choose(places)) == [expected[i] for i in places]
    assert len(read) == 3
    assert len(slates._files._read_last) == len(slates._files._open) == 1
    monkeypatch.setattr(_stored, "CACHE", 2**30)
    assert list(slates) == list(slates) == expected
    assert len(read) <= 3 + 10


def test_items_by_id_are_found_in_the_items_file(make_slate, tmp_path):
    slates = [make_slate(seed=i) for i in range(3)]
    (tmp_path / "train").mkdir()
    write_slates(tmp_path / "train" / "0.parquet", slates, by_id=True)
    items = [item for slate in slates for item in (*slate.history, *slate.candidates)]
    write_items(tmp_path / "items.jsonl", items)
    assert list(stored_slates(tmp_path / "train")) == slates
    (tmp_path / "items.jsonl").rename(tmp_path / "texts.jsonl")
    assert list(stored_slates(tmp_path / "train", tmp_path / "texts.jsonl")) == slates
    with pytest.raises(DataError, match=r"0\.parquet:1: slate 's0'.*no items file"):
        stored_slates(tmp_path / "train")[0]


def test_other_files_are_not_stored_slates(folder, make_slate):
    write_slates(folder / "3.jsonl", [make_slate()])
    assert stored_slates(folder) is None
    assert stored_slates(folder / "3.jsonl") is None


def test_a_bad_row_is_named_when_it_is_read(folder):
    rows = pq.read_table(folder / "2.parquet").to_pylist()
    rows[4]["labels"] = [1.0]
    table = pa.Table.from_pylist(rows, schema=SLATES)
    pq.write_table(table, folder / "2.parquet", row_group_size=2)
    slates = stored_slates(folder)
    assert slates[9].slate_id == "s9"
    with pytest.raises(DataError, match=r"2\.parquet:5: slate 's10': labels has 1"):
        slates[10]


def test_damaged_files_and_columns_are_named_at_once(folder):
    (folder / "3.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"3\.parquet: cannot read the Parquet file"):
        stored_slates(folder)
    pq.write_table(pa.table({"slate_id": ["a"]}), folder / "3.parquet")
    with pytest.raises(DataError, match=r"missing: user_id, history, candidates"):
        stored_slates(folder)


def test_a_file_that_changes_while_it_is_in_use_is_noticed(folder, make_slate, monkeypatch):
    monkeypatch.setattr(_stored, "_OPEN", 1)
    monkeypatch.setattr(_stored, "CACHE", 1)
    slates = stored_slates(folder)
    assert slates[0].slate_id == "s0"
    write_slates(folder / "1.parquet", [make_slate(seed=99)])
    with pytest.raises(DataError, match=r"1\.parquet: the file changed"):
        slates[5]
    with pytest.raises(DataError, match=r"1\.parquet: the file changed"):
        list(slates.columns(("labels",)))


def test_a_row_group_too_large_to_be_read_for_one_slate_is_refused(folder, monkeypatch):
    monkeypatch.setattr(_stored, "LARGEST_GROUP", 10)
    with pytest.raises(DataError, match=r"0\.parquet: a row group of 2 slates.*row_group_size"):
        stored_slates(folder)


def test_columns_come_in_the_order_of_the_rows_and_absent_ones_as_nulls(folder):
    table = pq.read_table(folder / "1.parquet").drop_columns(["weights", "timestamp"])
    pq.write_table(table, folder / "1.parquet")
    batches = list(stored_slates(folder).columns(("timestamp", "weights")))
    times = [time for batch in batches for time in batch.column("timestamp").to_pylist()]
    assert times == [None if i == 5 else float(i) for i in range(17)]
    kinds = [batch.column("weights").type for batch in batches]
    assert kinds == [SLATES.field("weights").type] * len(batches)


def test_the_fingerprint_is_of_the_files_and_the_items(folder, make_slate):
    same = stored_slates(folder).files_fingerprint()
    assert stored_slates(folder)[3:].files_fingerprint() == same
    write_items(folder / "items.jsonl", [])
    items = stored_slates(folder).files_fingerprint()
    write_slates(folder / "1.parquet", [make_slate(seed=99)])
    assert len({same, items, stored_slates(folder).files_fingerprint()}) == 3

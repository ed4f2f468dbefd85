"""Clicks and items as two CSV files."""

import gzip

import pytest

from peftrank.errors import DataError
from peftrank.formats._log import Rejects
from peftrank.formats.csv import csv

ITEMS = 'item,title,brand\na,Red lamp,Lux\nb,"Pan, 24 cm",\n'


@pytest.fixture
def put(tmp_path):
    """Writes the two files and returns their folder."""

    def write(clicks, items=ITEMS):
        (tmp_path / "clicks.csv").write_text(clicks, encoding="utf-8")
        (tmp_path / "items.csv").write_text(items, encoding="utf-8")
        return tmp_path

    return write


def test_times_are_seconds_or_dates_and_columns_are_fields(put):
    dated = "10,u,a,3\n2025-03-01T12:00:00,u,b,1\n2025-03-01T12:00:00+02:00,v,b,2\n"
    log = csv(put("time,user,item,value\n" + dated))
    assert [(r.user_id, r.item_id, r.timestamp, r.value) for r in log.interactions()] == [
        ("u", "a", 10.0, 3.0),
        ("u", "b", 1740830400.0, 1.0),
        ("v", "b", 1740823200.0, 2.0),
    ]
    assert log.items["a"].fields == {"title": "Red lamp", "brand": "Lux"}
    assert log.items["b"].fields == {"title": "Pan, 24 cm"}


def test_without_times_the_order_is_that_of_the_file(put):
    log = csv(put("user,item\nu,b\nu,a\n"))
    assert [(r.item_id, r.timestamp) for r in log.interactions()] == [("b", None), ("a", None)]


@pytest.mark.parametrize(
    ("clicks", "reason"),
    [
        ("user,item,time\nu,a,soon\n", r"clicks\.csv:2: time is 'soon'"),
        ("user,item\nu,zzz\n", "no usable row"),
        ("u,i\n1,2\n", "user"),
        ("user,item\nu\n", "1 cells"),
        ("user,item\n,a\n", "user id is empty"),
    ],
)
def test_a_malformed_row_is_an_error_that_says_where(put, clicks, reason):
    with pytest.raises(DataError, match=reason):
        csv(put(clicks))


def test_malformed_rows_can_be_skipped_and_are_counted(put):
    rejects = Rejects()
    folder = put("user,item,time\nu,a,1\nu,a,x\nu,q,2\n")
    log = csv(folder, on_error="skip", rejects=rejects)
    assert (len(log), rejects.count) == (1, 2)


def test_a_gzipped_file_is_read(put):
    folder = put("user,item\nu,a\n")
    (folder / "clicks.csv").unlink()
    (folder / "clicks.csv.gz").write_bytes(gzip.compress(b"user,item\nu,b\n"))
    assert [r.item_id for r in csv(folder).interactions()] == ["b"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"items\.csv"):
        csv(tmp_path)

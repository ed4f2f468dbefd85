"""Raw log formats, on small invented files."""

import gzip
import json
import math
import subprocess
import sys
from array import array
from datetime import UTC, datetime
from time import process_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrank import plugins
from peftrank.errors import ConfigError, DataError
from peftrank.formats import _lines
from peftrank.formats._log import Log, Rejects, known_start
from peftrank.formats.amazon import amazon
from peftrank.formats.lastfm import lastfm
from peftrank.formats.lists import lists
from peftrank.formats.microlens import microlens
from peftrank.formats.mind import mind
from peftrank.formats.movielens import movielens
from peftrank.formats.recbole import recbole


def put(folder, **files):
    """Writes files; `__` in a name stands for a dot. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def triples(log: Log):
    return [(row.user_id, row.item_id, row.value) for row in log.interactions()]


def skipped(read, path, tmp_path):
    """Reads with skip; returns the log and (file name, line, reason) of each quarantined row."""
    rejects = Rejects(tmp_path / "quarantine.jsonl")
    log = read(path, on_error="skip", rejects=rejects)
    rows = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert log.rejects is rejects
    assert rejects.count == len(rows) == sum(rejects.by_file.values())
    return log, [(row["file"].rsplit("/", 1)[-1], row["line"], row["reason"]) for row in rows]


# MIND

NEWS = (
    "N1\tsports\trowing\tRiver race ends in a tie\tTwo boats, one time.\turl\t[]\t[]\n"
    "N2\t\t\tBaker opens third shop\t\t\t[]\t[]\n"
    "N3\tweather\tstorm\tFog all week\t\t\t[]\t[]\n"
)


def behaviors(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


def test_mind_keeps_impressions_histories_and_clicks(tmp_path):
    log = mind(
        put(
            tmp_path,
            news__tsv=NEWS,
            behaviors__tsv=behaviors(
                ("1", "U1", "11/15/2019 8:05:09 PM", "N3 N3", "N1-1 N2-0"),
                ("2", "U2", "1/2/2020 12:00:00 AM", "", "N3-0 N2-1"),
            ),
        )
    )
    assert log.items["N1"].fields == {
        "title": "River race ends in a tie",
        "category": "sports",
        "subcategory": "rowing",
        "abstract": "Two boats, one time.",
    }
    assert log.items["N2"].fields == {"title": "Baker opens third shop"}
    first, second = log.impressions
    assert (first.slate_id, first.history, first.candidates) == ("1", ("N3", "N3"), ("N1", "N2"))
    assert (first.labels, first.part) == ((1.0, 0.0), "")
    assert first.timestamp == datetime(2019, 11, 15, 20, 5, 9, tzinfo=UTC).timestamp()
    assert second.history == ()
    assert second.timestamp == datetime(2020, 1, 2, tzinfo=UTC).timestamp()
    assert triples(log) == [("U1", "N1", 1.0), ("U2", "N2", 1.0)]
    assert list(log.timestamp) == [first.timestamp, second.timestamp]


def test_mind_reads_official_folders_and_leaves_test_labels_unknown(tmp_path):
    time = "11/15/2019 8:00:00 AM"
    for folder, shown in (("MINDx_train", "N1-0 N2-1"), ("MINDx_dev", "N3-1"), ("test", "N3 N1")):
        put(
            tmp_path / folder,
            news__tsv=NEWS,
            behaviors__tsv=behaviors(("1", "U1", time, "N1", shown)),
        )
    log = mind(tmp_path)
    assert [(i.slate_id, i.part) for i in log.impressions] == [
        ("train-1", "train"),
        ("valid-1", "valid"),
        ("test-1", "test"),
    ]
    assert log.impressions[2].labels is None
    assert log.impressions[2].candidates == ("N3", "N1")
    assert triples(log) == [("U1", "N2", 1.0), ("U1", "N3", 1.0)]


def test_mind_reads_one_part_of_a_folder_with_the_news_of_that_part(tmp_path):
    row = ("train0", "U1", "11/15/2019 8:00:00 AM", "", "N1-0 N2-1")
    put(
        tmp_path,
        **{
            "news.train.tsv": NEWS,
            "behaviors.train.tsv": behaviors(row),
            "news.valid.tsv": "broken",
            "behaviors.valid.tsv": "broken",
        },
    )
    log = mind(tmp_path / "behaviors.train.tsv")
    assert [(i.slate_id, i.part) for i in log.impressions] == [("train0", "train")]


def test_mind_rejects_bad_rows_with_reasons(tmp_path):
    time = "11/15/2019 8:00:00 AM"
    put(
        tmp_path,
        news__tsv=NEWS
        + "N4\ta\tb\t \t\t\t[]\t[]\n"
        + "N5\tshort\n"
        + "N1\tsports\trowing\tAnother title\t\t\t[]\t[]\n",
        behaviors__tsv=behaviors(
            ("1", "U1", time, "", "N1-1"),
            ("2", "U1", time, "", "N1-1 N9-0"),
            ("3", "U1", time, "", "N1-1 N2"),
            ("4", "U1", time, "", "N1-1 N1-0"),
            ("5", "U1", time, "", ""),
            ("6", "U1", "yesterday", "", "N1-1"),
            ("1", "U1", time, "", "N1-1"),
            ("8", "U1", time, "N1-1"),
            ("9", "U1", "13/40/2019 8:00:00 AM", "", "N1-1"),
            ("10", "U1", "11/15/2019 0:00:00 AM", "", "N1-1"),
        ),
    )
    with pytest.raises(DataError, match=r"news\.tsv:4: news id 'N4' has no title"):
        mind(tmp_path)
    log, rows = skipped(mind, tmp_path, tmp_path)
    assert [i.slate_id for i in log.impressions] == ["1"]
    assert log.items["N1"].fields["title"] == "River race ends in a tie"
    expected = [
        ("news.tsv", 4, "has no title"),
        ("news.tsv", 5, "2 tab-separated columns, expected 8"),
        ("news.tsv", 6, "already has title 'River race ends in a tie', here it is 'Another title'"),
        ("behaviors.tsv", 2, "'N9' has no usable row"),
        ("behaviors.tsv", 3, "'N2' has no -0 or -1"),
        ("behaviors.tsv", 4, "shows 'N1' twice"),
        ("behaviors.tsv", 5, "shows no articles"),
        ("behaviors.tsv", 6, "time is 'yesterday'"),
        ("behaviors.tsv", 7, "'1' occurs twice"),
        ("behaviors.tsv", 8, "4 tab-separated columns, expected 5"),
        ("behaviors.tsv", 9, "month must be in 1..12"),
        ("behaviors.tsv", 10, "the hour must be 1 to 12"),
    ]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    assert all(reason in row[2] for row, (_, _, reason) in zip(rows, expected, strict=True))


# MovieLens


def test_movielens_100k_reads_latin1_titles_and_genre_columns(tmp_path):
    flags = ["0"] * 19
    flags[5] = flags[14] = "1"
    film = "|".join(["7", "Café du port (1991)", "01-Jan-1991", "", "url", *flags])
    odd = "|".join(["8", "Nowhere (1990)", "", "", "", "1", *["0"] * 18])
    put(
        tmp_path,
        u__item=f"{film}\n{odd}\n".encode("latin-1"),
        u__data="1\t7\t4\t881250949\n1\t8\t2\t881250950\n2\t7\t5\t3\n",
    )
    log = movielens(tmp_path)
    assert log.items["7"].fields == {"title": "Café du port (1991)", "genres": "Comedy, Romance"}
    assert log.items["8"].fields == {"title": "Nowhere (1990)"}
    assert triples(log) == [("1", "7", 4.0), ("1", "8", 2.0), ("2", "7", 5.0)]
    assert list(log.timestamp) == [881250949, 881250950, 3]
    assert (log.user.dtype, log.item.dtype) == (np.int32, np.int32)
    assert (log.timestamp.dtype, log.value.dtype) == (np.float64, np.float32)


def test_movielens_1m_and_10m_dat_files_are_read_in_either_encoding(tmp_path):
    put(
        tmp_path,
        movies__dat="1::Été (2001)::Drama|War\n".encode("latin-1")
        + "2::Łuk (2002)::Western\n".encode(),
        ratings__dat="5::1::3.5::100\n5::2::4::90\n",
    )
    log = movielens(tmp_path)
    assert log.items["1"].fields == {"title": "Été (2001)", "genres": "Drama, War"}
    assert log.items["2"].fields["title"] == "Łuk (2002)"
    assert triples(log) == [("5", "1", 3.5), ("5", "2", 4.0)]
    assert list(log.order()) == [1, 0]


def test_movielens_latest_reads_quoted_titles(tmp_path):
    put(
        tmp_path,
        movies__csv='movieId,title,genres\r\n1,"Lamp, The (1990)",Comedy|Drama\r\n'
        '2,"Say ""Yes"" (1991)",(no genres listed)\r\n',
        ratings__csv="userId,movieId,rating,timestamp\r\n1,1,4.5,10\r\n1,2,0.5,11\r\n",
    )
    log = movielens(tmp_path)
    assert log.items["1"].fields == {"title": "Lamp, The (1990)", "genres": "Comedy, Drama"}
    assert log.items["2"].fields == {"title": 'Say "Yes" (1991)'}
    assert triples(log) == [("1", "1", 4.5), ("1", "2", 0.5)]


def test_movielens_rejects_bad_rows_with_reasons(tmp_path):
    put(
        tmp_path,
        movies__dat="1::Lamp (1990)::Drama\n2::Lamp\n3::::Drama\n",
        ratings__dat="1::1::4::10\n1::9::4::10\n1::1::good::10\n1::1::nan::10\n1::1::4\n"
        "1::1::-1::10\n::1::4::10\n1::1::4::\n",
    )
    with pytest.raises(DataError, match=r"movies\.dat:2: the row has 2 columns"):
        movielens(tmp_path)
    log, rows = skipped(movielens, tmp_path, tmp_path)
    assert triples(log) == [("1", "1", 4.0)]
    assert [(name, line) for name, line, _ in rows] == [
        ("movies.dat", 2),
        ("movies.dat", 3),
        *(("ratings.dat", line) for line in range(2, 9)),
    ]
    assert [reason.split(",")[0] for _, _, reason in rows[3:]] == [
        "rating is 'good'",
        "rating is 'nan'",
        "the row has 3 columns",
        "value is -1.0",
        "the user id is empty",
        "timestamp is ''",
    ]


def test_movielens_csv_rejects_bad_rows_and_keeps_its_place(tmp_path):
    put(
        tmp_path,
        movies__csv=b'movieId,title,genres\n1,"Two\nlines (1990)",Drama\n2,Bad \xff,Drama\n'
        b'3,"quote"x,Drama\n4,Lamp\n\n5,Kettle (1990),Drama\n',
        ratings__csv="userId,movieId,rating,timestamp\n1,1,4,10\n1,5,3,11\n",
    )
    log, rows = skipped(movielens, tmp_path, tmp_path)
    assert [item.fields["title"] for item in log.items.values()] == [
        "Two\nlines (1990)",
        "Kettle (1990)",
    ]
    assert [(line, reason.split(":")[0]) for _, line, reason in rows] == [
        (4, "the row is not valid UTF-8; convert the file to UTF-8"),
        (5, "not valid CSV"),
        (6, "the row has 2 cells, the header has 3"),
    ]
    assert len(log) == 2


def test_csv_line_numbers_count_endless_lines_and_an_open_quote_is_one_reject(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(_lines, "LINE_BYTES", 100)
    put(
        tmp_path,
        movies__csv="movieId,title,genres\n" + "x" * 500 + '\n1,Lamp,\n2,"open,Drama\n3,Rug,\n',
        ratings__csv="userId,movieId,rating,timestamp\n",
    )
    log, rows = skipped(movielens, tmp_path, tmp_path)
    assert list(log.items) == ["1"]
    assert [line for _, line, _ in rows] == [2, 4]
    assert rows[1][2] == "not valid CSV: unexpected end of data (the row spans 2 lines)"


def test_a_csv_header_of_invalid_utf8_is_an_error_that_can_be_printed(tmp_path):
    put(tmp_path, movies__csv=b"movieId,title,genres,\xff\n", ratings__csv="")
    with pytest.raises(DataError, match=r"movies\.csv:1: the header is not valid UTF-8"):
        movielens(tmp_path, on_error="skip")


def test_a_value_beyond_float32_costs_its_row(tmp_path):
    put(tmp_path, movies__dat="1::Lamp::Drama\n", ratings__dat="1::1::4::10\n1::1::1e39::10\n")
    log, rows = skipped(movielens, tmp_path, tmp_path)
    assert triples(log) == [("1", "1", 4.0)]
    assert "value is 1e+39, expected at least 0 and at most 3.40282e+38" in rows[0][2]


def test_csv_headers_are_checked(tmp_path):
    put(tmp_path, movies__csv="id,title,genres\n", ratings__csv="")
    with pytest.raises(DataError, match=r"movies\.csv:1: the header lacks movieId; it has id"):
        movielens(tmp_path)
    put(tmp_path, movies__csv="")
    with pytest.raises(DataError, match="the file is empty; expected a header with movieId"):
        movielens(tmp_path)


# RecBole


def test_recbole_reads_rated_rows(tmp_path):
    put(
        tmp_path,
        x__inter="user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4\t77\n",
        x__item="item_id:token\tmovie_title:token_seq\tclass:token_seq\tyear:float\n"
        "i\tLamp &amp; Kettle\tDrama War\t1990\n",
    )
    log = recbole(tmp_path)
    assert log.items["i"].fields == {"title": "Lamp & Kettle", "class": "Drama War"}
    assert triples(log) == [("u", "i", 4.0)]
    assert list(log.timestamp) == [77]


def test_recbole_expands_histories_with_the_rows_own_item_last(tmp_path):
    put(
        tmp_path,
        **{
            "g.valid.inter": "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta b c\td\n",
            "g.train.inter": "user_id:token\titem_id_list:token_seq\titem_id:token\n"
            "u\ta b\tc\nv\tc\ta\n",
            "g.item": "item_id:token\ttitle:token_seq\n"
            + "".join(f"{name}\tThing {name}\n" for name in "abcde"),
        },
    )
    log = recbole(tmp_path)
    assert [(u, i) for u, i, _ in triples(log)] == [
        ("u", "a"),
        ("u", "b"),
        ("u", "c"),
        ("v", "c"),
        ("v", "a"),
        ("u", "d"),
    ]
    assert np.isnan(log.timestamp).all()
    assert [log.item_ids[i] for i in log.item[log.order()]] == ["a", "b", "c", "d", "c", "a"]
    assert log.item_ids == list("abcde")


def test_recbole_rejects_bad_rows_and_bad_headers(tmp_path):
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    put(
        tmp_path,
        x__inter=head + "u\ta\tb\nu\ta\nu\ta z\tb\n",
        x__item="item_id:token\ttitle:token_seq\na\tLamp\nb\tKettle\nc\t \n",
    )
    log, rows = skipped(recbole, tmp_path, tmp_path)
    assert len(log) == 2
    assert [(name, line) for name, line, _ in rows] == [
        ("x.item", 4),
        ("x.inter", 3),
        ("x.inter", 4),
    ]
    put(tmp_path, x__inter="user_id\titem_id\n")
    with pytest.raises(DataError, match="header cell 'user_id' is not name:type"):
        recbole(tmp_path, on_error="skip")
    put(tmp_path, x__inter="u:token\titem_id:token\n")
    with pytest.raises(DataError, match="no column user_id; the header has u, item_id"):
        recbole(tmp_path, on_error="skip")
    assert recbole(tmp_path, on_error="skip", user="u").user_ids == []


# Amazon


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_amazon_2018_reviews_and_metadata(tmp_path):
    meta = {"asin": "B1", "title": "Lamp &amp; shade", "category": ["Home", "Light"], "brand": "Q"}
    review = {"reviewerID": "R", "asin": "B1", "overall": 5.0, "unixReviewTime": 1500000000}
    put(tmp_path, **{"Home_5.json.gz": gzip.compress(json_lines(review).encode())})
    put(tmp_path, **{"meta_Home.json": json_lines(meta, {"asin": "B2", "title": "Rug"})})
    log = amazon(tmp_path)
    assert log.items["B1"].fields == {
        "title": "Lamp & shade",
        "category": "Home > Light",
        "brand": "Q",
    }
    assert log.items["B2"].fields == {"title": "Rug"}
    assert triples(log) == [("R", "B1", 5.0)]
    assert list(log.timestamp) == [1500000000]


def test_amazon_2023_reviews_have_milliseconds_and_parent_ids(tmp_path):
    meta = {"parent_asin": "P1", "title": "Rug", "main_category": "Home", "store": None}
    review = {
        "user_id": "A",
        "asin": "V9",
        "parent_asin": "P1",
        "rating": 3,
        "timestamp": 1588687728923,
    }
    put(tmp_path, **{"Home.jsonl": json_lines(review), "meta_Home.jsonl": json_lines(meta)})
    put(tmp_path, **{"Toys.jsonl": "broken", "meta_Toys.jsonl": "broken"})
    log = amazon(tmp_path / "Home.jsonl")
    assert log.items["P1"].fields == {"title": "Rug", "category": "Home"}
    assert triples(log) == [("A", "P1", 3.0)]
    assert list(log.timestamp) == [1588687728.923]


def test_amazon_json_rejects_bad_rows_with_reasons(tmp_path):
    good = {"reviewerID": "R", "asin": "B1", "overall": 5, "unixReviewTime": 15}
    put(
        tmp_path,
        **{
            "meta_x.json": json_lines({"asin": "B1", "title": "Rug"}, {"asin": "B2"}, [1]),
            "x.json": json_lines(
                good,
                good | {"asin": "B2"},
                good | {"overall": None},
                good | {"unixReviewTime": True},
                good | {"reviewerID": 7},
                {"stars": 5},
            )
            + "{'asin': 'B1'}\n",
        },
    )
    with pytest.raises(DataError, match=r"meta_x\.json:2: product 'B2' has no title"):
        amazon(tmp_path)
    log, rows = skipped(amazon, tmp_path / "x.json", tmp_path)
    assert len(log) == 1
    assert [line for name, line, _ in rows if name == "x.json"] == [2, 3, 4, 5, 6, 7]
    assert [reason.split(",")[0] for name, _, reason in rows if name == "x.json"][1:3] == [
        "overall is 'None'",
        "unixReviewTime is 'True'",
    ]


def test_amazon_json_that_no_file_could_hold_costs_its_row(tmp_path):
    good = {"reviewerID": "R", "asin": "B1", "overall": 5, "unixReviewTime": 15}
    deep = '{"asin": "B4", "title": "x", "category": ' + "[" * 900 + "]" * 900 + "}\n"
    put(
        tmp_path,
        **{
            "meta_x.json": json_lines(
                {"asin": "B1", "title": "Rug"},
                {"asin": "B2", "title": "Half a character: \ud800"},
                {"asin": "B3", "title": "x", "price": "DIGITS"},
            ).replace('"DIGITS"', "9" * 5000)
            + deep,
            "x.json": json_lines(good, good | {"\udfff": 1}),
        },
    )
    log, rows = skipped(amazon, tmp_path, tmp_path)
    assert (list(log.items), len(log)) == (["B1"], 1)
    assert [reason.split(":")[0].split(",")[0] for _, _, reason in rows] == [
        "a text holds a lone surrogate",
        "not valid JSON",
        "maximum recursion depth exceeded",
        "a text holds a lone surrogate",
    ]


def test_amazon_does_not_read_the_quarantine_it_writes(tmp_path):
    good = {"reviewerID": "R", "asin": "B1", "overall": 5, "unixReviewTime": 15}
    files = {"meta_x.json": json_lines({"asin": "B1", "title": "x"}), "x.json": json_lines(good, 1)}
    log, rows = skipped(amazon, put(tmp_path, **files), tmp_path)
    assert (len(log), len(rows)) == (1, 1)


CSV = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"


def csv_row(user, history, target):
    titles = str([f"Thing {i}" for i in history])
    return f'{user},"{titles}",Thing {target},"{history}",{target},x,y\n'


def test_amazon_csv_joins_the_rows_of_a_user_into_one_sequence(tmp_path):
    rows = [
        csv_row("A", [0, 1], 1),
        csv_row("B", [2], 0),
        csv_row("A", [0, 1, 1], 2),  # the next row
        csv_row("A", [1, 1, 2], 3),  # its history is a window
        csv_row("A", [0, 1], 1),  # an older row, late
        csv_row("A", [2, 3, 0], 4),  # a row between is not in the file
    ]
    put(
        tmp_path,
        **{
            "Toys_train.csv": CSV + "".join(rows),
            "Toys_info.txt": "".join(f"<a_{i}>\tThing &amp; {i}\t{i}\n" for i in range(5)),
        },
    )
    log = amazon(tmp_path)
    assert log.items["3"].fields == {"title": "Thing & 3"}
    assert [i for u, i, _ in triples(log) if u == "A"] == list("0112304")
    assert [i for u, i, _ in triples(log) if u == "B"] == list("20")
    assert np.isnan(log.timestamp).all()


def test_amazon_csv_counts_a_repeated_item_each_time_it_is_bought(tmp_path):
    window = 3
    bought = [0] * 6
    rows = [csv_row("A", bought[max(0, n - window) : n], 0) for n in range(1, 6)]
    put(tmp_path, **{"T_train.csv": CSV + "".join(rows), "T_info.txt": "<a>\tThing\t0\n"})
    assert len(amazon(tmp_path)) == 6


def known_start_by_definition(known, row):
    if row[:-1] and known[-len(row[:-1]) :] == row[:-1]:
        return len(row) - 1
    if any(known[start:][: len(row)] == row for start in range(len(known))):
        return len(row)
    sizes = range(min(len(known), len(row)), 0, -1)
    return next((size for size in sizes if known[-size:] == row[:size]), 0)


_codes = st.lists(st.sampled_from([0, 1, 256, 65536]), max_size=12)


@given(known=_codes, row=_codes.filter(bool))
def test_a_row_continues_what_is_known_from_its_longest_overlap(known, row):
    found = known_start(array("i", known), array("i", row))
    assert found == known_start_by_definition(known, row)


def test_long_rows_and_many_rows_of_a_user_are_joined_in_linear_time(tmp_path):
    rows = [f'A,"{[1] * 20_000}",{i}' for i in range(5)]
    rows += [f'B,"{[(7 * i + j * j) % 31 for j in range(9)]}",{i % 31}' for i in range(4000)]
    csv = "\n".join(["user_id,history_item_id,item_id", *rows])
    info = "".join(f"<a_{i}>\tThing {i}\t{i}\n" for i in range(31))
    start = process_time()
    amazon(put(tmp_path, **{"T_train.csv": csv, "T_info.txt": info}))
    assert process_time() - start < 5


def test_amazon_csv_rejects_bad_rows_and_asks_which_of_several_sets(tmp_path):
    put(
        tmp_path,
        **{
            "T_train.csv": CSV
            + csv_row("A", [0], 0)
            + csv_row("A", [0, 9], 0)
            + "A,[],t,what,0,x,y\n"
            + "A,[],t,{[]: 1},0,x,y\n"
            + csv_row("A", [0], 8),
            "T_info.txt": "<a>\tThing\t0\nno tabs\n",
        },
    )
    log, rows = skipped(amazon, tmp_path, tmp_path)
    assert len(log) == 2
    assert [(name, line) for name, line, _ in rows] == [
        ("T_info.txt", 2),
        ("T_train.csv", 3),
        ("T_train.csv", 4),
        ("T_train.csv", 5),
        ("T_train.csv", 6),
    ]
    put(tmp_path, **{"U_info.txt": "<a>\tThing\t0\n"})
    with pytest.raises(DataError, match=r"found 2 \(T, U\); give the path of one CSV file"):
        amazon(tmp_path)
    assert len(amazon(tmp_path / "T_train.csv", on_error="skip")) == 2


# MicroLens


def test_microlens_expands_rows_in_order(tmp_path):
    put(
        tmp_path,
        **{
            "MicroLens_pairs.tsv": "1\t10 11 10\n2\t11\n",
            "MicroLens_titles.csv": 'item,title\n10,"A, b # c"\n11,Fog\n12,Rain\n',
        },
    )
    log = microlens(tmp_path)
    assert triples(log) == [("1", "10", 1.0), ("1", "11", 1.0), ("1", "10", 1.0), ("2", "11", 1.0)]
    assert log.items["10"].fields == {"title": "A, b # c"}
    assert log.item_ids == ["10", "11", "12"]


def test_microlens_rejects_whole_rows(tmp_path):
    put(
        tmp_path,
        pairs__tsv="1\t10\n2\t10 99\n3\n1\t10\n\t10\n",
        titles__csv="item,title\n10,Fog\n11,\n",
    )
    log, rows = skipped(microlens, tmp_path, tmp_path)
    assert triples(log) == [("1", "10", 1.0)]
    assert [(name, line) for name, line, _ in rows] == [
        ("titles.csv", 3),
        *(("pairs.tsv", line) for line in (2, 3, 4, 5)),
    ]


# Last.fm


def lastfm_files(folder, friends="userID\tfriendID\n1\t2\n2\t1\n"):
    return put(
        folder,
        artists__dat="id\tname\turl\tpictureURL\n1\tThe Kettles\tu\tp\n2\tÉclair\tu\tp\n",
        tags__dat="tagID\ttagValue\r\n1\trock fran\xe7ais\r\n2\tfolk\r\n".encode("latin-1"),
        user_artists__dat="userID\tartistID\tweight\r\n1\t1\t5\r\n1\t2\t9\r\n2\t1\t1\r\n",
        user_taggedartists__dat="userID\tartistID\ttagID\tday\tmonth\tyear\n"
        "1\t1\t2\t1\t1\t1956\n1\t2\t1\t1\t1\t2009\n1\t1\t1\t1\t1\t2009\n3\t1\t2\t1\t1\t2009\n",
        user_friends__dat=friends,
    )


def test_lastfm_describes_people_by_artists_and_tags_in_mixed_encodings(tmp_path):
    log = lastfm(lastfm_files(tmp_path))
    assert log.items["1"].fields == {
        "about": "Listens to Éclair, The Kettles. Tags: rock français, folk.",
        "artists": "Éclair, The Kettles",
        "tags": "rock français, folk",
    }
    assert log.items["2"].fields == {"about": "Listens to The Kettles.", "artists": "The Kettles"}
    assert log.items["3"].fields == {"about": "Tags: folk.", "tags": "folk"}
    assert triples(log) == [("1", "2", 1.0), ("2", "1", 1.0)]
    assert np.isnan(log.timestamp).all()
    assert lastfm(tmp_path, artists=1, tags=0).items["1"].fields == {
        "about": "Listens to Éclair.",
        "artists": "Éclair",
    }


def test_lastfm_descriptions_do_not_depend_on_friendships(tmp_path):
    one = lastfm(lastfm_files(tmp_path)).items
    two = lastfm(lastfm_files(tmp_path, friends="userID\tfriendID\n3\t1\n")).items
    assert one == two


def test_lastfm_rejects_bad_rows(tmp_path):
    put(
        lastfm_files(tmp_path, friends="userID\tfriendID\n1\t2\n1\t1\n1\t9\n1\n"),
        user_artists__dat="userID\tartistID\tweight\n1\t1\t5\n2\t1\t5\n1\t7\t5\n1\t1\t0\n1\t1\tx\n",
    )
    log, rows = skipped(lastfm, tmp_path, tmp_path)
    assert len(log) == 1
    assert [(name, line) for name, line, _ in rows] == [
        *(("user_artists.dat", line) for line in (4, 5, 6)),
        *(("user_friends.dat", line) for line in (3, 4, 5)),
    ]
    put(tmp_path, tags__dat="id\tname\n")
    with pytest.raises(DataError, match=r"tags\.dat:1: the header must have tagID, tagValue"):
        lastfm(tmp_path, on_error="skip")


# Ready lists


def ready(history="A::B", items=("C", "D"), selection="D", **more):
    return {"historyList": history, "itemList": list(items), "trueSelection": selection, **more}


def test_lists_become_impressions_with_one_user_each(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([ready(), ready("", ("A", "ü"), "A")], indent=4))
    log = lists(path)
    assert [(i.slate_id, i.user_id) for i in log.impressions] == [
        ("train-0",) * 2,
        ("train-1",) * 2,
    ]
    first = log.impressions[0]
    assert (first.history, first.candidates, first.labels) == (("A", "B"), ("C", "D"), (0.0, 1.0))
    assert log.impressions[1].history == ()
    assert log.items["ü"].fields == {"title": "ü"}
    assert [(u, i) for u, i, _ in triples(log)] == [
        ("train-0", "A"),
        ("train-0", "B"),
        ("train-0", "D"),
        ("train-1", "A"),
    ]


def test_lists_that_go_on_with_the_preceding_one_are_of_its_user(tmp_path):
    path = tmp_path / "train.json"
    rows = [
        ready("A::B", ("C", "D"), "D"),
        ready("A::B::D", ("E", "F"), "E"),
        ready("D::E", ("A", "G"), "G"),
        ready("A::B", ("C", "D"), "C"),
        ready("", ("C", "D"), "C"),
        ready("X::C", ("E", "F"), "E"),
    ]
    path.write_text(json.dumps(rows))
    users = [row.user_id for row in lists(path).impressions]
    assert users == ["train-0", "train-0", "train-0", "train-3", "train-4", "train-5"]


def test_lists_reject_bad_lists_with_line_and_reason(tmp_path):
    bad = [
        ready(items=("C", "D", "C")),
        ready(selection="Z"),
        ready(extra=1),
        ready(items=()),
        ready(history=["A"]),
        ready(history="A::"),
        ready(items=("D", 3)),
        "text",
        ready(selection="\ud800"),
        {"\ud800": 1},
    ]
    path = tmp_path / "x.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*bad, ready()]) + "\n]\n")
    with pytest.raises(DataError, match=r"x\.json:2: 'C' occurs twice in itemList"):
        lists(path)
    log, rows = skipped(lists, path, tmp_path)
    assert [i.slate_id for i in log.impressions] == ["x-10"]
    assert [line for _, line, _ in rows] == list(range(2, 12))
    assert "trueSelection 'Z' is not in itemList" in rows[1][2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a JSON array"),
        ("{}", "expected a JSON array"),
        ("[\n{]", ":2: not valid JSON"),
        ("[1 2]", "expected , or ]"),
        ("[1,]", "a comma before ]"),
        ("[]\nmore", ":2: not valid JSON: text after the array"),
        ("[", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_json_array_is_an_error_even_when_skipping(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        lists(path, on_error="skip")


def test_a_candidate_that_occurs_twice_is_found_in_linear_time(tmp_path):
    names = [f"N{i}" for i in range(100_000)]
    time = "11/15/2019 8:00:00 AM"
    shown = " ".join(f"{name}-0" for name in [*names, "N99999"])
    files = {"news.tsv": NEWS, "behaviors.tsv": behaviors(("1", "U", time, "", shown))}
    (tmp_path / "x.json").write_text(json.dumps([ready(items=(*names, "N99999"))]))
    start = process_time()
    with pytest.raises(DataError, match="'N99999' occurs twice"):
        lists(tmp_path)
    with pytest.raises(DataError, match="the impression shows 'N99999' twice"):
        mind(put(tmp_path, **files))
    assert process_time() - start < 5


# All formats

FORMATS = plugins.available("formats")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_what_it_expects_of_an_empty_folder(tmp_path, name):
    with pytest.raises(DataError, match=r"expected .*") as caught:
        plugins.load("formats", name)(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_an_unknown_way_with_errors(tmp_path, name):
    with pytest.raises(ConfigError, match="'raise' or 'skip', not 'drop'"):
        plugins.load("formats", name)(tmp_path, on_error="drop")


def test_reading_a_log_needs_no_torch():
    code = (
        "import sys; from peftrank import plugins\n"
        "for name in plugins.available('formats'): plugins.load('formats', name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_of_unknown_time_come_before_those_of_known_time():
    log = Log(
        items={},
        user_ids=["a", "b"],
        item_ids=[],
        user=np.array([0, 1, 0, 0, 1], np.int32),
        item=np.zeros(5, np.int32),
        timestamp=np.array([5, math.nan, 3, math.nan, math.nan]),
        value=np.ones(5, np.float32),
    )
    assert list(log.order()) == [3, 2, 0, 1, 4]

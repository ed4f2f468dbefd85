import errno
import gzip
import os
import threading
import time

import pytest

from peftrank import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_the_folders_above_it(tmp_path):
    files.write_bytes(tmp_path / "a" / "b" / "c.txt", b"whole")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"whole"
    assert names(tmp_path / "a" / "b") == ["c.txt"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"old")
    with files.writing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad row")])
def test_whatever_stops_the_writing_the_old_file_stays(tmp_path, error):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"old")

    def write():
        with files.writing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["r.jsonl"]


def test_equal_content_is_compressed_to_equal_bytes(tmp_path):
    for name in ("a.gz", "b.gz"):
        files.write_bytes(tmp_path / name, b"rows" * 100)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.gz", "b.gz"))
    assert first == second
    assert gzip.decompress(first) == b"rows" * 100


def test_an_error_of_the_disk_names_the_file_that_was_meant(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_bytes(tmp_path / "r.html", b"x")
    assert caught.value.filename == str(tmp_path / "r.html")
    assert names(tmp_path) == []


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.writing(tmp_path / "r.html"):
        (tmp_path / "absent").read_bytes()
    assert caught.value.filename == str(tmp_path / "absent")


def test_a_folder_is_published_once_and_a_second_one_is_told_so(tmp_path):
    for content, first in (("a", True), ("b", False)):
        with files.temporary_folder(tmp_path) as temporary:
            (temporary / "file").write_text(content)
            assert files.publish_folder(temporary, tmp_path / "0001") is first
    assert (tmp_path / "0001" / "file").read_text() == "a"
    assert names(tmp_path) == ["0001"]


def test_of_many_that_publish_at_once_one_succeeds(tmp_path):
    start = threading.Barrier(8)
    done = []

    def publish():
        with files.temporary_folder(tmp_path) as temporary:
            (temporary / "file").write_text("x")
            start.wait(10)
            done.append(files.publish_folder(temporary, tmp_path / "0001"))

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 7 + [True]
    assert names(tmp_path) == ["0001"]


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    for name in ("new", "old"):
        (tmp_path / f"{files.TEMPORARY}{name}").mkdir()
        (tmp_path / f"{files.TEMPORARY}{name}" / "half").write_text("x")
    two_days_ago = time.time() - 2 * 86_400
    os.utime(tmp_path / f"{files.TEMPORARY}old", (two_days_ago, two_days_ago))
    with files.temporary_folder(tmp_path):
        pass
    assert names(tmp_path) == [f"{files.TEMPORARY}new"]

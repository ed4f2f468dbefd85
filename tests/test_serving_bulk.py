"""Bulk ranking: any number of workers and any number of starts, one result."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest

from peftrank import hub
from peftrank.base import load_base
from peftrank.errors import AdapterError, ConfigError, DataError
from peftrank.formats.slates import write_items, write_slates
from peftrank.ranker import Ranker
from peftrank.serving import bulk
from peftrank.types import Item


@pytest.fixture(scope="module")
def slates(make_slate):
    """26 slates of several users, lengths and sizes."""
    return [
        make_slate(
            n_history=i % 4,
            n_candidates=2 + i % 5,
            seed=i,
            user_id=f"u{i % 7}",
            slate_id=f"s{i:02}",
        )
        for i in range(26)
    ]


@pytest.fixture(scope="module")
def inputs(slates, tmp_path_factory):
    """The same slates as JSON lines, as one Parquet file, and as a folder whose shards differ."""
    folder = tmp_path_factory.mktemp("inputs")
    write_slates(folder / "slates.jsonl", slates)
    write_slates(folder / "slates.parquet", slates)
    for number, (start, stop) in enumerate([(0, 1), (1, 14), (14, 26)]):
        write_slates(folder / "shards" / f"{number}.parquet", slates[start:stop])
    return folder


@pytest.fixture(scope="module")
def job(workplace, inputs):
    """Seven shards of four slates, into a folder that does not exist; tests name another."""
    return bulk.Job(
        input=inputs / "slates.jsonl",
        output=inputs / "nowhere",
        adapter=bulk.find_adapter("news@0002", workplace / "adapters"),
        base={"name": str(workplace / "base"), "quantization": "none"},
        domain="news",
        shard_slates=4,
    )


@pytest.fixture(scope="module")
def expected(job, slates):
    """What a ranker says of the same slates, four at a time."""
    ranker = Ranker(load_base(**job.base))
    ranker.load_adapter(job.adapter.source)
    return [
        row
        for at in range(0, len(slates), 4)
        for row in ranker.rank(slates[at : at + 4], domain="news")
    ]


def into(job, folder, **changes):
    return dataclasses.replace(job, output=folder, **changes)


def ranked(folder):
    return list(bulk.read_rankings(folder))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_after(count):
    """An engine that is stopped when it has finished some shards."""

    def engine(job, parts, todo, workers):
        for done, shard in enumerate(bulk.local(job, parts, todo, 1), start=1):
            yield shard
            if done == count:
                raise KeyboardInterrupt

    return engine


@pytest.mark.parametrize("name", ["slates.jsonl", "slates.parquet", "shards"])
def test_a_job_ranks_every_slate_once_in_order_whatever_holds_them(
    job, inputs, expected, tmp_path, name
):
    done = bulk.run(into(job, tmp_path / "ranked", input=inputs / name), workers=1)
    assert done == bulk.Done(slates=26, shards=7, kept=0)
    assert ranked(tmp_path / "ranked") == expected


def test_two_processes_give_what_one_gives(job, expected, tmp_path):
    told = []
    done = bulk.run(
        into(job, tmp_path / "ranked"), workers=2, progress=lambda *now: told.append(now)
    )
    assert (done.slates, done.kept) == (26, 0)
    assert ranked(tmp_path / "ranked") == expected
    assert told[0] == (0, 26)
    assert told[-1] == (26, 26)
    assert len(told) == 8
    assert not multiprocessing.active_children()


def test_a_shard_is_a_parquet_file_that_says_who_ranked(job, tmp_path):
    bulk.run(into(job, tmp_path / "ranked"), workers=1)
    assert names(tmp_path / "ranked") == [
        "_job.json",
        *(f"part-00000{i}.parquet" for i in range(7)),
    ]
    table = pq.read_table(tmp_path / "ranked")  # the folder as a whole, as other tools read it
    assert table.schema.names == ["slate_id", "item_ids", "scores", "domain", "version"]
    assert table.num_rows == 26
    assert set(table["domain"].to_pylist()) == {"news"}
    assert set(table["version"].to_pylist()) == {"0002"}


def test_a_stopped_job_goes_on_and_keeps_what_it_had(job, expected, tmp_path):
    folder = tmp_path / "ranked"
    with pytest.raises(KeyboardInterrupt):
        bulk.run(into(job, folder), stop_after(3))
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    (folder / ".tmp-of-a-killed-process").write_text("half a shard")
    done = bulk.run(into(job, folder), workers=1)
    assert done == bulk.Done(slates=26, shards=7, kept=3)
    assert ranked(folder) == expected
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert ".tmp-of-a-killed-process" not in names(folder)
    assert bulk.run(into(job, folder), stop_after(0)).kept == 7  # no engine is asked


def test_an_engine_that_forgets_a_shard_is_caught(job, tmp_path):
    def forgetful(job, parts, todo, workers):
        yield from bulk.local(job, parts, todo[:-1], 1)

    with pytest.raises(bulk.WorkerError, match="1 of 7 shards were not ranked"):
        bulk.run(into(job, tmp_path / "ranked"), forgetful)


def test_a_lost_or_cut_shard_is_ranked_again(job, expected, tmp_path):
    folder = tmp_path / "ranked"
    bulk.run(into(job, folder), workers=1)
    (folder / "part-000001.parquet").unlink()
    os.truncate(folder / "part-000004.parquet", 100)
    assert bulk.run(into(job, folder), workers=1).kept == 5
    assert ranked(folder) == expected


@pytest.mark.slow
def test_a_job_killed_with_its_workers_goes_on(cli, job, slates, place, workplace):
    """The real command, killed with SIGKILL while both of its processes rank."""
    many = [dataclasses.replace(s, slate_id=f"{n}-{s.slate_id}") for n in range(20) for s in slates]
    write_slates(place / "slates.jsonl", many)
    options = ("rank", "--domain", "news", "--input", "slates.jsonl", "--shard-slates", "4")
    command = [*options, "--output", "ranked", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "peftrank", *command])
    while len(list(place.glob("ranked/part-*"))) < 20:
        assert process.poll() is None
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert 20 <= len(list(place.glob("ranked/part-*"))) < 130
    result = cli(*options, "--output", "ranked", "--workers", 1)
    assert json.loads(result.out) == {"slates": 520, "output": "ranked"}
    assert [row.slate_id for row in ranked(place / "ranked")] == [s.slate_id for s in many]
    assert cli(*options, "--output", "alone").code == 0
    assert ranked(place / "ranked") == ranked(place / "alone")


def test_a_worker_that_is_killed_ends_the_job_with_what_to_do(job, expected, tmp_path):
    folder = tmp_path / "ranked"

    def kill_one(done, total):
        if done:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(bulk.WorkerError, match=r"(?s)SIGKILL.*part-0.*give the same command again"):
        bulk.run(into(job, folder), workers=2, progress=kill_one)
    assert not multiprocessing.active_children()
    done = bulk.run(into(job, folder), workers=1)
    assert 1 <= done.kept < 7
    assert ranked(folder) == expected


@pytest.mark.slow
def test_an_error_of_a_worker_process_is_the_job_s(job, tmp_path):
    def put_in_the_way(done, total):
        (tmp_path / "ranked/part-000005.parquet").mkdir(exist_ok=True)

    with pytest.raises(OSError, match="Is a directory") as caught:
        bulk.run(into(job, tmp_path / "ranked"), workers=2, progress=put_in_the_way)
    assert caught.value.filename.endswith("part-000005.parquet")
    assert not multiprocessing.active_children()


CHANGES = {
    "k": ({"k": 2}, "k null, now 2"),
    "base": ({"base": {"name": "smollm2-135m", "quantization": "nf4"}}, "base .*, now .*smollm2"),
    "size": ({"shard_slates": 5}, "slates per shard 4, now 5"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_refused(job, tmp_path, name):
    changes, message = CHANGES[name]
    bulk.run(into(job, tmp_path / "ranked"), workers=1)
    before = names(tmp_path / "ranked")
    with pytest.raises(ConfigError, match=message):
        bulk.run(into(job, tmp_path / "ranked", **changes), workers=1)
    assert names(tmp_path / "ranked") == before


def test_another_version_of_the_adapter_is_refused(job, workplace, tmp_path):
    bulk.run(into(job, tmp_path / "ranked"), workers=1)
    other = bulk.find_adapter("news@0001", workplace / "adapters")
    with pytest.raises(ConfigError, match='adapter version "0002", now "0001"'):
        bulk.run(into(job, tmp_path / "ranked", adapter=other), workers=1)


def test_another_input_is_refused_and_the_same_elsewhere_is_not(job, inputs, tmp_path):
    folder = tmp_path / "ranked"
    with pytest.raises(KeyboardInterrupt):
        bulk.run(into(job, folder), stop_after(2))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(inputs / "slates.jsonl", moved)
    assert bulk.run(into(job, folder, input=moved), workers=1).kept == 2
    moved.write_text(moved.read_text().replace("u3", "u4"))
    with pytest.raises(ConfigError, match=r"another job.*input \["):
        bulk.run(into(job, folder, input=moved), workers=1)


def test_a_folder_with_other_files_or_a_file_is_refused(job, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files \(mine\.txt\)"):
        bulk.run(into(job, tmp_path), workers=1)
    with pytest.raises(ConfigError, match=r"mine\.txt is a file"):
        bulk.run(into(job, tmp_path / "mine.txt"), workers=1)
    assert names(tmp_path) == ["mine.txt"]


def test_a_broken_job_file_is_named(job, tmp_path):
    (tmp_path / "_job.json").write_text('{"job"')
    with pytest.raises(ConfigError, match=r"_job\.json cannot be read"):
        bulk.run(into(job, tmp_path), workers=1)


def test_a_missing_input_is_named(job, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        bulk.run(into(job, tmp_path / "ranked", input=tmp_path / "nowhere"), workers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no slates here"):
        bulk.run(into(job, tmp_path / "ranked", input=tmp_path / "empty"), workers=1)


def test_a_malformed_slate_is_named_before_anything_is_ranked(job, inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs / "shards", tmp_path / "shards")
    lines = (inputs / "slates.jsonl").read_text().splitlines()
    bad = json.loads(lines[20]) | {"labels": [-1.0]}
    (tmp_path / "shards/2.parquet").unlink()
    (tmp_path / "shards/2.jsonl").write_text("\n".join([*lines[14:20], json.dumps(bad)]))
    monkeypatch.setattr(bulk, "load_base", None)
    with pytest.raises(DataError, match=r"shards/2\.jsonl:7: slate 's20': labels has 1 numbers"):
        bulk.run(into(job, tmp_path / "ranked", input=tmp_path / "shards"), workers=1)


def test_a_slate_that_cannot_be_ranked_is_named_with_its_file(job, slates, tmp_path):
    bare = dataclasses.replace(slates[13], candidates=(Item("x", {"colour": "red"}),), labels=None)
    write_slates(tmp_path / "shards/0.jsonl", slates[:13])
    write_slates(tmp_path / "shards/1.jsonl", [bare, *slates[14:]])
    with pytest.raises(DataError, match=r"shards/1\.jsonl: slate 's13': candidate 'x' has no text"):
        bulk.run(into(job, tmp_path / "ranked", input=tmp_path / "shards"), workers=1)
    assert names(tmp_path / "ranked") == [
        "_job.json",
        *(f"part-00000{i}.parquet" for i in range(3)),
    ]


def test_an_input_that_is_cut_meanwhile_is_noticed(job, inputs, tmp_path):
    moved = tmp_path / "moved.jsonl"
    shutil.copy(inputs / "slates.jsonl", moved)

    def cut(job, parts, todo, workers):
        moved.write_text("".join(moved.read_text().splitlines(keepends=True)[:9]))
        yield from bulk.local(job, parts, todo, 1)

    with pytest.raises(DataError, match="had 26 slates when the job began and has 9 now"):
        bulk.run(into(job, tmp_path / "ranked", input=moved), cut)
    assert len(list(tmp_path.glob("ranked/part-*"))) == 2


def test_items_by_id_are_found_beside_the_slates_and_belong_to_the_input(
    job, slates, expected, tmp_path
):
    items = {i.item_id: i for slate in slates for i in (*slate.history, *slate.candidates)}
    write_items(tmp_path / "data/items.jsonl", items.values())
    write_slates(tmp_path / "data/slates.jsonl", slates, by_id=True)
    by_id = into(job, tmp_path / "ranked", input=tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        bulk.run(by_id, stop_after(2))
    bulk.run(by_id, workers=1)
    assert ranked(tmp_path / "ranked") == expected
    write_items(tmp_path / "data/items.jsonl", list(items.values())[::-1])
    with pytest.raises(ConfigError, match=r"items \".*\", now \""):
        bulk.run(by_id, workers=1)


def test_a_full_disk_keeps_what_is_finished(job, expected, tmp_path, monkeypatch):
    folder = tmp_path / "ranked"
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        bulk.run(into(job, folder), workers=1)
    assert caught.value.filename.endswith("part-000003.parquet")
    assert names(folder) == ["_job.json", *(f"part-00000{i}.parquet" for i in range(3))]
    monkeypatch.undo()
    assert bulk.run(into(job, folder), workers=1).kept == 3
    assert ranked(folder) == expected


def test_no_slates_make_no_shards(job, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    done = bulk.run(into(job, tmp_path / "ranked", input=tmp_path / "none.jsonl"))
    assert done == bulk.Done(slates=0, shards=0, kept=0)


@pytest.mark.parametrize("suffix", [".jsonl", ".run", ".parquet"])
def test_one_file_holds_the_same_by_two_workers_as_by_one(cli, place, given, inputs, suffix):
    options = ("rank", *given, "--input", inputs / "slates.parquet", "-k", 3)
    assert cli(*options, "--output", f"one{suffix}").code == 0
    result = cli(*options, "--output", f"two{suffix}", "--workers", 2)
    assert json.loads(result.out) == {"slates": 26, "output": f"two{suffix}"}
    assert (place / f"one{suffix}").read_bytes() == (place / f"two{suffix}").read_bytes()
    assert not (place / f"two{suffix}.shards").exists()


def test_a_folder_is_made_by_a_name_without_a_dot(cli, place, given, inputs):
    options = ("rank", *given, "--input", inputs / "shards", "--output", "ranked")
    assert cli(*options).code == 0
    assert cli("rank", *given, "--input", inputs / "shards", "--output", "one.parquet").code == 0
    assert [r.slate_id for r in ranked(place / "ranked")] == [f"s{i:02}" for i in range(26)]
    assert pq.read_table(place / "ranked").equals(pq.read_table(place / "one.parquet"))
    said = cli(*options, "-k", 1)
    assert said.code == 2
    assert "another job" in said.err


def test_an_activation_does_not_change_a_job_that_runs(job, place, expected):
    named = bulk.find_adapter("news", place / "adapters")

    def activate(job, parts, todo, workers):
        (place / "adapters/news/ACTIVE").write_text("0001\n")
        yield from bulk.local(job, parts, todo, 1)

    bulk.run(into(job, place / "ranked", adapter=named), activate)
    assert ranked(place / "ranked") == expected


def test_an_adapter_on_the_hub_is_ranked_with_at_its_commit(
    cli, place, given, inputs, monkeypatch, workplace
):
    found = bulk.find_adapter("news@0002", workplace / "adapters")
    asked = []

    def fetch(name, **options):
        asked.append(name)
        files = bulk.store.load_adapter(workplace / "adapters/news/0002")
        return hub.HubAdapter("someone/news", "f" * 40, files, "")

    monkeypatch.setattr(hub, "fetch", fetch)
    options = ("rank", *given, "--input", inputs / "slates.jsonl")
    assert cli(*options, "--adapter", "someone/news@v1", "--output", "hub").code == 0
    assert cli(*options, "--adapter", found.source, "--output", "local").code == 0
    assert asked == ["someone/news@v1", f"someone/news@{'f' * 40}"]
    assert ranked(place / "hub") == ranked(place / "local")
    assert pq.read_table(place / "hub")["version"][0].as_py() == "f" * 40


def test_an_adapter_that_does_not_exist_is_named_first(cli, place, given):
    result = cli("rank", *given, "--adapter", "newz", "--input", "nowhere", "--output", "ranked")
    assert result.code == 2
    assert "did you mean 'news'?" in result.err
    with pytest.raises(AdapterError, match="newz"):
        bulk.find_adapter("newz", place / "adapters")

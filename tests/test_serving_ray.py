"""Bulk ranking by a Ray on this machine: the same jobs, the same result."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from peftrank import store
from peftrank.base import load_base
from peftrank.errors import ConfigError, DataError
from peftrank.formats._record import slate_record
from peftrank.formats.slates import read_slates, write_slates
from peftrank.ranker import Ranker
from peftrank.serving import bulk, bulk_ray
from peftrank.types import Item

pytest.importorskip("ray", reason="needs the extra peftrank[ray]")


@pytest.fixture(scope="module")
def job(workplace, make_slate, tmp_path_factory):
    """Ten shards of four slates each in two files."""
    folder = tmp_path_factory.mktemp("ray")
    slates = [make_slate(n_candidates=2 + i % 4, seed=i, slate_id=f"s{i:02}") for i in range(40)]
    write_slates(folder / "slates/0.parquet", slates[:15])
    write_slates(folder / "slates/1.parquet", slates[15:])
    return bulk.Job(
        input=folder / "slates",
        output=folder / "nowhere",
        adapter=bulk.find_adapter("news@0002", workplace / "adapters"),
        base={"name": str(workplace / "base"), "quantization": "none"},
        domain="news",
        shard_slates=4,
    )


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    """The rankings of one process without Ray."""
    alone = dataclasses.replace(job, output=tmp_path_factory.mktemp("alone") / "ranked")
    bulk.run(alone, workers=1)
    return list(bulk.read_rankings(alone.output))


@pytest.fixture
def here(job, tmp_path):
    return dataclasses.replace(job, output=tmp_path / "ranked")


@pytest.fixture
def two_cores(monkeypatch):
    """A Ray of this test's own, with two logical cores and nothing left of it afterwards."""
    import ray

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = set(psutil.Process().children(recursive=True))  # of other tests: a browser, ...
    yield
    left = [p for p in _alive(psutil.Process().children(recursive=True)) if p not in before]
    ray.shutdown()
    assert not left


def _alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _actors(of=None):
    """The actors' processes, which Ray names after what they do."""
    processes = _alive(psutil.Process(of).children(recursive=True))
    return [p for p in processes if "_Actor" in p.cmdline()[0]]


def test_without_ray_the_message_says_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'peftrank\[ray\]'"):
        bulk.run(here, bulk_ray.on_ray)


def test_a_shard_that_kills_its_actors_is_given_up(here):
    """Ray itself would go on for ever."""
    import numpy as np

    here.output.mkdir()
    (here.output / ".tmp-tries-3").write_bytes(b"xxx")
    answer = bulk_ray._Actor(here, ())({"shard": np.array([3])})
    assert isinstance(answer["failure"][0], bulk.WorkerError)
    assert "3 actors died" in str(answer["failure"][0])
    assert "part-000003.parquet" in str(answer["failure"][0])


@pytest.mark.slow
def test_two_actors_go_on_with_what_one_process_began(here, expected, two_cores, capfd):
    with pytest.raises(bulk.WorkerError, match="7 of 10 shards were not ranked"):
        bulk.run(here, lambda job, parts, todo, workers: bulk.local(job, parts, todo[:3], 1))
    done = bulk.run(here, bulk_ray.on_ray, workers=2)
    assert done == bulk.Done(slates=40, shards=10, kept=3)
    assert list(bulk.read_rankings(here.output)) == expected
    assert sorted(p.name for p in here.output.iterdir()) == [
        "_job.json",
        *(f"part-{i:06d}.parquet" for i in range(10)),
    ]
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "Set ray log level" not in line] == []


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced(here, expected, two_cores):
    killed = []

    def kill_one(done, total):
        if done and not killed:
            killed.extend(_actors()[:1])
            killed[0].kill()

    bulk.run(here, bulk_ray.on_ray, workers=2, progress=kill_one)
    assert killed
    assert list(bulk.read_rankings(here.output)) == expected


@pytest.mark.slow
def test_a_slate_that_cannot_be_ranked_is_named_as_without_ray(
    here, make_slate, tmp_path, two_cores
):
    slates = [make_slate(seed=i, slate_id=f"s{i:02}") for i in range(10)]
    bare = dataclasses.replace(slates[9], candidates=(Item("x", {"colour": "red"}),), labels=None)
    write_slates(tmp_path / "slates.parquet", [*slates[:9], bare])
    bad = dataclasses.replace(here, input=tmp_path / "slates.parquet")
    with pytest.raises(DataError, match=r"slates\.parquet: slate 's09': candidate 'x' has no text"):
        bulk.run(bad, bulk_ray.on_ray, workers=2)


@pytest.mark.slow
def test_a_job_that_is_killed_ends_its_actors_and_goes_on(cli, here, place, two_cores):
    many = place / "slates"
    for number in range(10):
        write_slates(many / f"{number}.parquet", _copies(here, number))
    options = ("rank", "--domain", "news", "--input", "slates", "--shard-slates", "4")
    command = [*options, "--output", "ranked", "--engine", "ray", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "peftrank", *command])
    while len(list(place.glob("ranked/part-*"))) < 15:
        assert process.poll() is None
        time.sleep(0.001)
    actors = _actors(process.pid)
    assert len(actors) == 2
    actors[0].kill()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while _alive(actors):  # what else Ray started looks for its parent once a minute or so
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 15 <= len(list(place.glob("ranked/part-*"))) < 100
    result = cli(*options, "--output", "ranked", "--engine", "ray", "--workers", 2)
    assert json.loads(result.out) == {"slates": 400, "output": "ranked"}
    ranked = list(bulk.read_rankings(place / "ranked"))
    assert len({row.slate_id for row in ranked}) == 400
    assert cli(*options, "--output", "alone").code == 0
    assert ranked == list(bulk.read_rankings(place / "alone"))


def _copies(job, number):
    for slate in read_slates(job.input):
        yield dataclasses.replace(slate, slate_id=f"{number}-{slate.slate_id}")


@pytest.fixture
def deployed(place, monkeypatch, two_cores):
    """The address of two replicas on this machine that ask for a token."""
    import ray
    from ray import serve

    from peftrank.serving.ray_serve import Arguments, build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("PEFTRANK_TOKEN", "secret")
    ray.init(
        "local", num_cpus=2, object_store_memory=10**8, include_dashboard=False, log_to_driver=False
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(Arguments(store=place / "adapters", replicas=2, cpus=0.5)))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_replicas_answer_like_the_server_and_follow_the_store(
    deployed, place, make_slate, workplace
):
    httpx = pytest.importorskip("httpx", reason="needs the extra peftrank[dev]")
    slate = make_slate(seed=7, slate_id="x")
    body = {"slates": [slate_record(slate)], "domain": "news"}
    ranker = Ranker(load_base(str(workplace / "base"), quantization="none"))
    with httpx.Client(base_url=deployed, headers={"Authorization": "Bearer secret"}) as client:

        def ask():
            answer = client.post("/v1/rank", json=body)
            assert answer.status_code == 200
            return answer.json()["rankings"][0]

        for version in ("0002", "0001"):
            store.activate(place / "adapters", "news", version)
            deadline = time.monotonic() + 20
            while {ask()["version"] for _ in range(10)} != {version}:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            ranker.load_adapter(str(place / "adapters/news" / version))
            best = ranker.rank(slate, domain="news")
            assert ask()["item_ids"] == list(best.item_ids)
            assert ask()["scores"] == pytest.approx(best.scores, abs=1e-6)
        assert client.get("/").text.startswith("<!doctype html>")
        assert httpx.post(f"{deployed}/v1/rank", json=body).status_code == 401
        bad = client.post("/v1/rank", json={"slates": [{}]})
        assert bad.status_code == 400
        assert bad.json()["error"]["type"] == "data"

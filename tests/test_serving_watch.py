"""The server's link to its store: what becomes active serves, and what is damaged does not."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra peftrank[serve]")

from conftest import _random_llama
from test_ranker import close, publish

from peftrank import store
from peftrank.base import base_from_model
from peftrank.errors import AdapterError, ConfigError
from peftrank.ranker import Ranker
from peftrank.serving import watch
from peftrank.serving.metrics import Metrics
from peftrank.serving.watch import Watcher

ACTIVATE = """
import itertools, sys
from pathlib import Path
from peftrank import store
print("go", flush=True)
for version in itertools.cycle(("0001", "0002")):
    store.activate(Path(sys.argv[1]), "news", version)
"""


@pytest.fixture(scope="module")
def stocked(tokenizer, tmp_path_factory):
    """A base, and a store with two versions of news and one of video; neither is changed."""
    base = base_from_model(_random_llama(tokenizer), tokenizer, name="tiny-decoder")
    folder = tmp_path_factory.mktemp("stocked")
    for domain, seed in (("news", 1), ("news", 2), ("video", 3)):
        publish(base, folder, domain, seed=seed)
    store.activate(folder, "news", "0001")
    return base, folder


class Place:
    """A store that may be changed, a ranker on it, and its watcher."""

    def __init__(self, base, folder, **options):
        self.base, self.folder = base, folder
        self.ranker, self.metrics = Ranker(base, store=folder), Metrics()
        self.watcher = Watcher(self.ranker, self.metrics, **options)

    @property
    def serving(self):
        return {name: info.version for name, info in self.ranker.adapters.items()}

    def activate(self, domain, version):
        store.activate(self.folder, domain, version)

    def metric(self, name, domain="news"):
        return self.metrics.registry.get_sample_value(f"peftrank_{name}", {"domain": domain})

    def damage(self, version, name="adapter_model.safetensors"):
        path = self.folder / "news" / version / name
        path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def make(stocked, tmp_path):
    base, folder = stocked
    shutil.copytree(folder, tmp_path / "adapters")
    made = []

    def place(**options):
        made.append(Place(base, tmp_path / "adapters", **options))
        return made[-1]

    yield place
    for one in made:
        one.watcher.close()
        one.ranker.close()


@pytest.fixture
def place(make):
    found = make()
    found.watcher.load_all()
    return found


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def loads(place, monkeypatch):
    """Returns the list to which every load of the ranker adds its source."""
    seen, load = [], place.ranker.load_adapter

    def note(source, **options):
        seen.append(source)
        return load(source, **options)

    monkeypatch.setattr(place.ranker, "load_adapter", note)
    return seen


def test_everything_active_is_loaded(place):
    assert place.serving == {"news": "0001", "video": "0001"}
    assert place.metric("adapter_swaps_total") == 1
    assert place.metric("adapter_stale") == 0


def test_only_the_domains_asked_for_are_loaded(make):
    place = make(domains=["video"])
    place.watcher.load_all()
    assert place.serving == {"video": "0001"}


def test_a_domain_that_was_asked_for_must_load(make):
    with pytest.raises(AdapterError, match="no version of 'music'"):
        make(domains=["video", "music"]).watcher.load_all()
    place = make(domains=["news"])
    place.damage("0001")
    with pytest.raises(AdapterError, match="adapter_model"):
        place.watcher.load_all()


def test_a_newly_active_version_is_picked_up(place, make_slate):
    slate = make_slate(domain="news")
    before = place.ranker.score(slate)
    place.activate("news", "0002")
    place.watcher.poll()
    assert place.serving["news"] == "0002"
    assert not close(place.ranker.score(slate), before)
    place.activate("news", "0001")
    place.watcher.poll()
    assert close(place.ranker.score(slate), before)
    assert place.metric("adapter_swaps_total") == 3


def test_a_new_domain_is_picked_up(place):
    publish(place.base, place.folder, "social", seed=9)
    place.watcher.poll()
    assert place.serving["social"] == "0001"


def test_what_did_not_change_is_not_read_again(place, monkeypatch):
    def never(*_):
        raise AssertionError("the pointer was read")

    monkeypatch.setattr(store, "active", never)
    for _ in range(3):
        place.watcher.poll()


def test_the_active_version_again_loads_nothing(place, monkeypatch):
    seen = loads(place, monkeypatch)
    place.activate("news", "0001")
    place.watcher.poll()
    assert seen == []


def test_a_damaged_version_leaves_the_old_one_and_raises_an_alarm(place, make_slate, caplog):
    slate = make_slate(domain="news")
    before = place.ranker.score(slate)
    place.damage("0002")
    place.activate("news", "0002")
    with caplog.at_level(logging.INFO, logger="peftrank.serving"):
        place.watcher.poll()
    assert place.serving["news"] == "0001"
    assert place.ranker.score(slate) == before
    assert place.metric("adapter_stale") == 1
    assert place.metric("adapter_stale", "video") == 0
    assert place.metric("adapter_load_failures_total") == 1
    assert place.watcher.stale("news")
    (line,) = [record.fields for record in caplog.records]
    assert (line["domain"], line["version"], line["serving"]) == ("news", "0002", "0001")
    assert "adapter_model" in line["reason"]


def test_a_damaged_version_is_tried_again_after_longer_and_longer(place, clock, monkeypatch):
    place.damage("0002")
    place.activate("news", "0002")
    seen = loads(place, monkeypatch)
    tries = []
    for _ in range(400):
        place.watcher.poll()
        tries.append(len(seen))
        clock[0] += 1
    first = [tries.index(n) for n in range(1, 7)]
    assert first == [0, 5, 15, 35, 75, 155]
    assert place.metric("adapter_load_failures_total") == len(seen)


def test_a_damaged_version_is_tried_again_at_once_when_it_is_activated_again(
    place, clock, monkeypatch
):
    sound = (place.folder / "news/0002/adapter_model.safetensors").read_bytes()
    place.damage("0002")
    place.activate("news", "0002")
    place.watcher.poll()
    (place.folder / "news/0002/adapter_model.safetensors").write_bytes(sound)
    place.watcher.poll()
    assert place.serving["news"] == "0001"
    place.activate("news", "0002")
    place.watcher.poll()
    assert place.serving["news"] == "0002"
    assert place.metric("adapter_stale") == 0


def test_going_back_ends_the_alarm(place):
    place.damage("0002")
    place.activate("news", "0002")
    place.watcher.poll()
    place.activate("news", "0001")
    place.watcher.poll()
    assert place.serving["news"] == "0001"
    assert place.metric("adapter_stale") == 0


@pytest.mark.parametrize("text", ["0009", "../../etc", "", "\xff\xfe", "0001\n0002"])
def test_a_pointer_to_nothing_raises_the_alarm(place, text):
    (place.folder / "news" / "ACTIVE").write_bytes(text.encode("latin-1"))
    place.watcher.poll()
    assert place.serving["news"] == "0001"
    assert place.metric("adapter_stale") == 1


def test_a_device_without_memory_leaves_the_old_one_too(place, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(place.ranker, "load_adapter", full)
    place.activate("news", "0002")
    publish(place.base, place.folder, "social", seed=9)
    place.watcher.poll()
    assert place.serving == {"news": "0001", "video": "0001"}
    assert place.metric("adapter_stale") == 1
    assert place.metric("adapter_stale", "social") == 1


def test_an_adapter_of_another_base_is_left_out_without_an_alarm(place, tokenizer, caplog):
    other = base_from_model(_random_llama(tokenizer, seed=5), tokenizer, name="other")
    publish(other, place.folder, "social", seed=1)
    place.watcher.poll()
    place.watcher.poll()
    assert "social" not in place.serving
    assert place.metric("adapter_stale", "social") is None
    assert [r.getMessage() for r in caplog.records] == ["adapter_left_out"]
    publish(other, place.folder, "news", seed=1)  # but of a served domain it is one
    place.watcher.poll()
    assert place.serving["news"] == "0001"
    assert place.metric("adapter_stale") == 1


def test_a_store_that_is_gone_changes_nothing(place):
    shutil.move(place.folder, place.folder.with_name("away"))
    place.watcher.poll()
    assert place.serving == {"news": "0001", "video": "0001"}
    shutil.move(place.folder.with_name("away"), place.folder)
    place.activate("news", "0002")
    place.watcher.poll()
    assert place.serving["news"] == "0002"


def test_a_disk_that_fails_for_one_domain_stops_no_other(place, monkeypatch):
    mark = place.watcher._mark

    def fails(domain):
        if domain == "news":
            raise PermissionError(13, "no")
        return mark(domain)

    monkeypatch.setattr(place.watcher, "_mark", fails)
    publish(place.base, place.folder, "video", seed=4)
    place.watcher.poll()
    assert place.serving["video"] == "0002"
    assert place.metrics.registry.get_sample_value("peftrank_watch_failures_total") == 1


def test_what_an_admin_unloads_stays_away_until_it_is_activated(place):
    place.watcher.unload("news")
    place.watcher.poll()
    assert "news" not in place.serving
    with pytest.raises(ConfigError, match="not loaded"):
        place.watcher.unload("news")
    place.activate("news", "0001")
    place.watcher.poll()
    assert place.serving["news"] == "0001"


def test_what_an_admin_loads_serves_until_another_is_activated(place):
    place.watcher.load("news", "0002")
    place.watcher.poll()
    assert place.serving["news"] == "0002"
    place.activate("news", "0001")
    place.watcher.poll()
    assert place.serving["news"] == "0001"
    place.activate("news", "0002")
    place.watcher.load("news", None)
    assert place.serving["news"] == "0002"


def test_activating_loads_first_and_points_then(place):
    place.watcher.activate("news", "0002")
    assert place.serving["news"] == store.active(place.folder, "news") == "0002"
    place.damage("0001")
    with pytest.raises(AdapterError, match="adapter_model"):
        place.watcher.activate("news", "0001")
    assert place.serving["news"] == store.active(place.folder, "news") == "0002"


def test_a_full_disk_at_an_activation_leaves_all_as_it_was(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_bytes", full)
    with pytest.raises(AdapterError, match="No space left"):
        place.watcher.activate("news", "0002")
    assert place.serving["news"] == store.active(place.folder, "news") == "0001"
    place.watcher.unload("news")
    with pytest.raises(AdapterError, match="No space left"):
        place.watcher.activate("news", "0002")
    assert "news" not in place.serving


@pytest.mark.parametrize("version", ["0009", "", "..", "../video/0001"])
def test_a_version_that_is_not_there_is_refused(place, version):
    for change in (place.watcher.load, place.watcher.activate):
        with pytest.raises(AdapterError, match="Versions: 0001, 0002"):
            change("news", version)
    assert place.serving["news"] == "0001"


def test_while_versions_change_every_ranking_is_of_the_version_it_names(make, make_slate):
    place = make(seconds=0.001)
    place.watcher.load_all()
    place.watcher.start()
    slate = make_slate(domain="news")
    expected = {}
    for version in ("0001", "0002"):
        with Ranker(place.base, store=place.folder) as alone:
            alone.load_adapter(f"news@{version}")
            expected[version] = alone.score(slate)
    assert not close(*expected.values())
    stop, wrong, seen = threading.Event(), [], set()

    def rank():
        while not stop.is_set():
            (prepared,) = place.ranker.prepare([slate])
            (scores,) = place.ranker.score_prepared([prepared])
            seen.add(prepared.version)
            if not close(scores, expected[prepared.version]):
                wrong.append(prepared.version)

    threads = [threading.Thread(target=rank) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(20):
        place.activate("news", ("0002", "0001")[n % 2])
        time.sleep(0.03)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert seen == {"0001", "0002"}


def test_killing_a_process_that_activates_never_leaves_the_server_without_a_sound_version(make):
    place = make(seconds=0.005)
    place.watcher.load_all()
    place.watcher.start()
    for pause in (0.0, 0.011, 0.023):
        child = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, place.folder], stdout=subprocess.PIPE
        )
        assert child.stdout.readline() == b"go\n"
        time.sleep(0.1 + pause)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        active = store.active(place.folder, "news")
        end = time.monotonic() + 5
        while place.serving["news"] != active and time.monotonic() < end:
            time.sleep(0.005)
        assert place.serving["news"] == active
        assert place.metric("adapter_stale") == 0
    assert place.metric("adapter_load_failures_total") is None

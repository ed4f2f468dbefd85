"""Training over slates that stay in Parquet files: as over the same slates in memory."""

import gc
import threading
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from test_training import assert_same_weights, logged, make_slates, untimed

from peftrank.config import Config
from peftrank.errors import ConfigError, DataError
from peftrank.formats import _stored
from peftrank.formats._stored import StoredSlates, stored_slates
from peftrank.formats.slates import write_slates
from peftrank.prompts import PromptTemplate
from peftrank.training import Interrupted, checkpoint, loop, train
from peftrank.training.data import step_batches
from peftrank.training.run import shared_passes, start
from peftrank.types import Slate


@pytest.fixture
def make_config(tmp_path):
    """Returns a maker of configurations whose slates lie in JSON lines or in shards."""

    def make(kind, *, train=None, valid=None, loss=None, **training):
        parts = {
            "train": make_slates(13) if train is None else train,
            "valid": make_slates(6, seed=1) if valid is None else valid,
        }
        files = {}
        for part, slates in parts.items():
            files[part] = tmp_path / kind / part
            files[part].mkdir(parents=True, exist_ok=True)
            if kind == "lines":
                write_slates(files[part] / "0.jsonl", slates)
            else:
                shards(files[part], slates)
        defaults = {"max_steps": 7, "batch_size": 4, "eval_steps": 3, "learning_rate": 1e-2}
        return Config.model_validate(
            {
                "domain": "demo",
                "base": {"name": "tiny", "quantization": "none"},
                "method": {"name": "lora", "r": 4, "dropout": 0.1},
                "data": files,
                "loss": loss or {"name": "listnet"},
                "training": {**defaults, **training},
            }
        )

    return make


def shards(folder, slates):
    """Writes slates to three files in row groups of two."""
    for number in range(3):
        path = folder / f"{number}.parquet"
        write_slates(path, slates[len(slates) * number // 3 : len(slates) * (number + 1) // 3])
        pq.write_table(pq.read_table(path), path, row_group_size=2)


def clicked(slates):
    """The slates with the place that each candidate was shown at."""
    return [
        replace(
            slate,
            candidates=tuple(
                replace(item, features={**item.features, "place": place})
                for place, item in enumerate(slate.candidates, 1)
            ),
        )
        for slate in slates
    ]


@pytest.mark.parametrize(
    ("slates", "loss", "training"),
    [
        (make_slates(13), None, {}),
        (make_slates(13, features=True), None, {"slates_per_user": 1}),
        ([replace(s, weights=(1.0, 2.0, 3.0, 0.5)) for s in make_slates(13)], None, {}),
        (
            clicked(make_slates(13)),
            {"name": "listnet", "propensity": {"power": 1.0, "position": "place"}},
            {},
        ),
        (make_slates(13), None, {"negatives": {"schedule": ["uniform", "hard"], "pool": 8}}),
    ],
    ids=["text", "features", "weights", "propensity", "negatives"],
)
def test_weights_and_log_are_those_of_slates_in_memory_to_the_bit(
    slates, loss, training, tiny_decoder, make_config, monkeypatch, tmp_path
):
    paths, rows = [], []
    monkeypatch.setattr(_stored, "CACHE", 1)
    for kind in ("lines", "shards"):
        config = make_config(kind, train=slates, valid=slates[:6], loss=loss, **training)
        paths.append(train(config, output=tmp_path / f"{kind}-out", base=tiny_decoder))
        rows.append(untimed(logged(tmp_path / f"{kind}-out")))
    assert rows[0] == rows[1]
    assert_same_weights(*paths)


def test_the_order_of_an_epoch_is_that_of_slates_in_memory(tmp_path):
    slates = make_slates(13)
    shards(tmp_path, slates)
    options = {"together": 2, "seed": 3, "first_step": 1, "total_steps": 8}
    expected = [list(batch) for batch in step_batches(slates, 4, **options)]
    assert [
        list(batch) for batch in step_batches(stored_slates(tmp_path), 4, **options)
    ] == expected


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_to_the_bit(
    tiny_decoder, make_config, monkeypatch, tmp_path
):
    config = make_config("shards", checkpoint_steps=2)
    whole = train(config, output=tmp_path / "whole", base=tiny_decoder)
    optimize = loop._optimize

    def stopped(run, slates):
        if run.step == 5:
            raise Interrupted("power cut")
        return optimize(run, slates)

    monkeypatch.setattr(loop, "_optimize", stopped)
    with pytest.raises(Interrupted):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    monkeypatch.setattr(loop, "_optimize", optimize)
    (run,) = (tmp_path / "out" / "demo" / ".runs").iterdir()
    assert checkpoint.load(run).values["step"] == 4  # the first epoch has four steps
    resumed = train(config, output=tmp_path / "out", base=tiny_decoder, resume=run)
    assert_same_weights(whole, resumed)
    shards(config.data.train, make_slates(13, seed=7))
    with pytest.raises(ConfigError, match="slates are not those of the saved run"):
        train(config, output=tmp_path / "out", base=tiny_decoder, resume=run)


def test_few_slates_are_in_memory_however_many_there_are(
    tiny_decoder, make_config, monkeypatch, tmp_path
):
    alive = []
    optimize = loop._optimize

    def counted(run, slates):
        gc.collect()
        alive.append(sum(isinstance(found, Slate) for found in gc.get_objects()))
        return optimize(run, slates)

    monkeypatch.setattr(loop, "_optimize", counted)
    slates = make_slates(300)
    gc.collect()
    before = sum(isinstance(found, Slate) for found in gc.get_objects())
    config = make_config("shards", train=slates, eval_slates=3, max_steps=4)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    # Of validation, of the step, and of the steps that are made ready ahead of it.
    assert max(alive) - before <= 3 + 4 * 4


def test_a_process_reads_its_own_share_alone(tiny_decoder, make_config, monkeypatch, tmp_path):
    config = make_config("shards", train=make_slates(12), batch_size=6)
    run = start(config, tmp_path / "run", tiny_decoder)
    try:
        read = []
        one = StoredSlates._read
        monkeypatch.setattr(
            StoredSlates, "_read", lambda s, rows: read.append(len(rows)) or one(s, rows)
        )
        monkeypatch.setattr(type(run.accelerator), "num_processes", 3)
        monkeypatch.setattr(type(run.accelerator), "process_index", 1)
        monkeypatch.setattr("peftrank.training.distributed.largest", lambda value, _: value)
        passes = [part for part, _, _ in shared_passes(run, run.train[:6])]
        assert sum(read) == sum(map(len, passes)) == 2
    finally:
        run.adapted.unload()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, DataError, "slate 's4' of the train part has no labels"),
        ({"weights": (1.0,) * 4}, DataError, "slate 's4' has weights of its own"),
    ],
)
def test_what_one_of_many_slates_lacks_is_said_before_training(
    change, error, message, tiny_decoder, make_config, tmp_path
):
    slates = make_slates(13)
    slates[4] = replace(slates[4], **change)
    loss = {"name": "listnet", "propensity": {"power": 1.0}}
    for kind in ("lines", "shards"):
        with pytest.raises(error, match=message):
            start(make_config(kind, train=slates, loss=loss), tmp_path / "run", tiny_decoder)


def test_a_part_without_a_slate_or_a_relevant_candidate_is_refused(
    tiny_decoder, make_config, tmp_path
):
    for slates, message in (
        ([], "no slate here; expected the train slates"),
        ([replace(s, labels=(0.0,) * 4) for s in make_slates(5)], "none of the 5 slates"),
    ):
        for kind in ("lines", "shards"):
            with pytest.raises(DataError, match=message):
                start(make_config(kind, train=slates), tmp_path / "run", tiny_decoder)


def test_only_the_validation_slates_that_count_are_read(tiny_decoder, make_config, tmp_path):
    slates = make_slates(6, seed=1)
    config = make_config("shards", eval_slates=2, valid=slates)
    run = start(config, tmp_path / "run", tiny_decoder)
    run.adapted.unload()
    assert run.valid == slates[:2]


def test_slates_are_made_ready_in_another_thread_and_that_thread_ends(
    tiny_decoder, make_config, monkeypatch, tmp_path
):
    where, tree = set(), PromptTemplate.tree

    def noted(template, slate):
        if slate.slate_id.startswith("s"):
            where.add(threading.current_thread().name)
        return tree(template, slate)

    monkeypatch.setattr(PromptTemplate, "tree", noted)
    valid = make_slates(6, seed=1, prefix="v")
    config = make_config("shards", valid=valid, max_steps=3, eval_steps=1)
    train(config, output=tmp_path / "out", base=tiny_decoder)
    assert where == {"peftrank-ahead"}
    assert not [t for t in threading.enumerate() if t.name == "peftrank-ahead"]
    assert all(row["waited_seconds"] >= 0 for row in logged(tmp_path / "out"))


def test_a_slate_that_cannot_be_read_stops_the_training_at_its_step(
    tiny_decoder, make_config, tmp_path
):
    slates = make_slates(13)
    config = make_config("shards", train=slates, slates_per_user=1)
    order = [s.slate_id for batch in step_batches(
        slates, 4, together=1, seed=0, first_step=0, total_steps=4) for s in batch]  # fmt: skip
    late = next(i for i, s in enumerate(slates) if s.slate_id == order[9])
    slates[late] = replace(slates[late], candidates=(replace(slates[late].candidates[0], fields={}),
                                                     *slates[late].candidates[1:]))  # fmt: skip
    shards(config.data.train, slates)
    with pytest.raises(DataError, match=f"slate {order[9]!r}.*has no text"):
        train(config, output=tmp_path / "out", base=tiny_decoder)
    assert [row["step"] for row in logged(tmp_path / "out")] == [1, 2]

"""kill -9 at random moments of a training: while it loads, trains, evaluates, saves and publishes.

PEFTRANK_KILLS says how many kills each method gets (2): 23 of them over twelve settings make 276.
"""

import multiprocessing
import os
import random
import shutil
import time

import pytest
from killed import run
from safetensors.torch import load_file
from test_training import make_slates
from test_training_stored import shards

from peftrank import store
from peftrank.config import Config
from peftrank.errors import AdapterError
from peftrank.formats.slates import write_slates
from peftrank.training import checkpoint

KILLS = int(os.environ.get("PEFTRANK_KILLS", "2"))
METHODS = {
    "lora": ("lora", {"r": 4, "dropout": 0.1}),
    "qlora": ("lora", {"r": 4, "dropout": 0.1}),
    "dora": ("lora", {"r": 4, "dora": True}),
    "pissa": ("lora", {"r": 4, "init": "pissa"}),
    "adalora": ("adalora", {"init_r": 4, "target_r": 2, "dropout": 0.1}),
    "pfeiffer": ("adapter", {"kind": "pfeiffer", "size": 4, "dropout": 0.1}),
    "houlsby": ("adapter", {"kind": "houlsby", "size": 4}),
    "parallel": ("adapter", {"kind": "parallel", "size": 4, "layernorm": True}),
    "ia3": ("ia3", {}),
    "bottom": ("lora", {"r": 4, "dropout": 0.1, "layers": "top-1"}),
    "stored": ("lora", {"r": 4, "dropout": 0.1}),
    "mined": ("lora", {"r": 4, "dropout": 0.1}),
}
TRAININGS = {
    "bottom": {"bottom_cache": "disk"},
    "mined": {"negatives": {"schedule": ["uniform", "hard"], "pool": 12}},
}
BASES = {"qlora": {"quantization": "nf4"}, "ia3": {"compute_dtype": "float32"}}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The cache folder of the processes that train."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTRANK_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def spawn(cache):
    """Starts processes that have the libraries loaded already; returns their context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed", "peftrank.training", "peft.tuners.lora.bnb"])
    first = context.Process(target=str)  # waits for the imports, which no measured time should
    first.start()
    first.join()
    return context


@pytest.fixture(scope="module")
def settings(tokenizer, tmp_path_factory):
    """Configurations by name, over one stored base and one set of slates."""
    from conftest import _random_llama

    folder = tmp_path_factory.mktemp("killed")
    _random_llama(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    files = {}
    for part, slates in (("train", make_slates(13)), ("valid", make_slates(6, seed=1))):
        files[part] = folder / f"{part}.jsonl"
        write_slates(files[part], slates)
        (folder / part).mkdir()
        shards(folder / part, slates)
    stored = {part: folder / part for part in files}
    return {
        name: Config.model_validate(
            {
                "domain": "demo",
                "base": {
                    "name": str(folder / "base"),
                    "quantization": "none",
                    **BASES.get(name, {}),
                },
                "method": {"name": method, **options},
                "data": stored if name == "stored" else files,
                "training": {
                    "max_steps": 9,  # 13 slates in batches of 4: three epochs, kills in between
                    "batch_size": 4,
                    "eval_steps": 3,
                    "checkpoint_steps": 2,
                    "learning_rate": 1e-2,
                    **TRAININGS.get(name, {}),
                },
            }
        )
        for name, (method, options) in METHODS.items()
    }


def train(spawn, config, output, log, *, resume=None, kill_after=None):
    """Trains in a process; returns the seconds it took, or None if it was killed."""
    arguments = (config.model_dump_json(), str(output), resume and str(resume), str(log))
    process = spawn.Process(target=run, args=arguments)
    started = time.monotonic()
    process.start()
    process.join(300 if kill_after is None else kill_after)
    if process.is_alive():
        assert kill_after is not None, "a training hangs"
        process.kill()
        process.join()
        return None
    seconds = time.monotonic() - started
    assert process.exitcode == 0, log.read_text()
    return seconds


def newest_run(output):
    """The newest run that has a checkpoint to go on from, None if there is none."""
    for folder in sorted((output / "demo" / ".runs").glob("*"), reverse=True):
        try:
            checkpoint.load(folder)
            return folder
        except AdapterError as error:
            if "no checkpoint here" not in str(error):  # never a damaged one
                raise
    return None


def final_weights(output):
    folder = output / "demo" / store.active(output, "demo")
    names = ("adapter_model.safetensors", "readout.safetensors")
    return {(n, k): t for n in names for k, t in load_file(folder / n).items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_and_ends_bit_identically(spawn, settings, cache, tmp_path, name):
    config, log = settings[name], tmp_path / "log"
    seconds = train(spawn, config, tmp_path / "whole", log)
    expected = final_weights(tmp_path / "whole")
    rng = random.Random(name)
    kills = 0
    while kills < KILLS:
        output = tmp_path / "killed"
        shutil.copytree(tmp_path / "whole" / "demo" / "0001", output / "demo" / "0001")
        store.activate(output, "demo", "0001")
        resume, wanted = None, kills + rng.choice((1, 1, 2, 3))
        while True:
            delay = rng.uniform(0, seconds) if kills < wanted else None
            done = train(spawn, config, output, log, resume=resume, kill_after=delay)
            # Whatever the moment: the store serves, and nothing in it is half a thing.
            assert store.active(output, "demo") is not None
            for version in store.versions(output, "demo"):
                store.verify(output / "demo" / version)
            if done is not None:
                break
            kills += 1
            if rng.random() < 0.5:  # what is kept of the lower layers may be lost too
                shutil.rmtree(cache / "bottom", ignore_errors=True)
            resume = newest_run(output)
        assert store.active(output, "demo") != "0001"
        found = final_weights(output)
        assert found.keys() == expected.keys()
        assert [key for key in found if not found[key].equal(expected[key])] == []
        shutil.rmtree(output)

# ruff: noqa: F811 - make_config is a fixture
"""Tokens per pass from the memory that is free, and fewer of them once a GPU's memory runs out."""

import json
import os

import pytest
import torch
from test_training import (  # noqa: F401 - make_config is a fixture
    METHODS,
    assert_same_weights,
    assert_untouched,
    logged,
    make_config,
    run_folder,
    state_of,
    untimed,
)

from peftrank import doctor
from peftrank.config import load_config, override
from peftrank.errors import ConfigError
from peftrank.training import checkpoint, loop, train
from peftrank.training.run import start

MIB = 2**20


# --- auto


@pytest.fixture
def config(workplace):
    """Returns a maker of configurations over the workplace's tiny base and data."""

    def make(micro_tokens="auto", **overrides):
        given = {
            "base.name": str(workplace / "base"),
            "base.quantization": "none",
            "base.compute_dtype": "float32",
            "method.layers": "all",
            "training.micro_tokens": micro_tokens,
            **{f"data.{part}": workplace / "data" / f"{part}.jsonl" for part in ("train", "valid")},
        }
        return load_config(domain="news", method="lora", overrides={**given, **overrides})

    return make


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory, in bytes."""

    def free(size):
        monkeypatch.setattr(doctor, "free_memory", lambda device: size)

    return free


def full_pass(plan, tokens):
    """What a training takes whose passes are full, on a GPU."""
    return plan.total + plan.activations * max(0, tokens / (plan.rows * plan.tokens) - 1)


def test_auto_takes_the_most_tokens_that_are_planned_to_fit(config, free):
    found = []
    for mib in (8, 16, 40, 100, 10_000):
        free(mib * MIB)
        chosen = doctor.settled(config(), device="cuda").training.micro_tokens
        found.append(chosen)
        plan, larger = (
            doctor.memory_plan(config(tokens), device="cuda") for tokens in (chosen, 2 * chosen)
        )
        assert full_pass(plan, chosen) <= 0.8 * mib * MIB
        assert chosen == 16_384 or full_pass(larger, 2 * chosen) > 0.8 * mib * MIB
    assert found == sorted(found)
    assert len(set(found)) == 5
    assert found[-1] == 16_384


def test_nothing_but_the_number_is_changed_and_a_given_one_stays(config, free):
    free(100 * MIB)
    chosen = doctor.settled(config(), device="cuda")
    assert override(chosen, {"training.micro_tokens": "auto"}, source="test") == config()
    given = config(64)
    assert doctor.settled(given, device="cuda") is given


def test_too_little_memory_is_said_with_what_takes_it(config, free):
    free(MIB // 8)
    with pytest.raises(ConfigError, match=r"finds no number.*0 MiB may be used \(80%.*or set a nu"):
        doctor.settled(config(), device="cuda")


def test_on_a_cpu_what_the_heap_keeps_is_planned_too(config, free):
    free(1_000 * MIB)
    on_cpu = doctor.settled(config(), device="cpu").training.micro_tokens
    assert on_cpu < doctor.settled(config(), device="cuda").training.micro_tokens


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    alone = doctor.free_memory("cpu")
    assert 0 < alone < total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert doctor.free_memory("cpu") == pytest.approx(alone / 4, rel=0.2)


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage", "reclaimable"),
    [
        ("0::/job", "job", "memory.max", "memory.current", "inactive_file"),
        ("0::/hidden", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "total_inactive_file"),
    ],
)  # fmt: skip
def test_a_containers_limit_is_kept_to(line, folder, limit, usage, reclaimable, tmp_path):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup").write_text(f"{line}\n3:cpu:/other\n")
    (tmp_path / folder / usage).write_text("700\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{reclaimable} 200\n")
    (tmp_path / folder / limit).write_text("max\n")
    assert doctor._group_room(tmp_path, tmp_path / "cgroup") == []
    (tmp_path / folder / limit).write_text("1000\n")
    assert doctor._group_room(tmp_path, tmp_path / "cgroup") == [500]
    (tmp_path / folder / limit).write_text("400\n")
    assert doctor._group_room(tmp_path, tmp_path / "cgroup") == [0]


def test_where_free_memory_cannot_be_told_a_number_is_asked_for(monkeypatch):
    monkeypatch.setattr(doctor.Path, "read_text", lambda *_, **__: "nothing")
    with pytest.raises(ConfigError, match=r"needs to know the free memory.*Set a number"):
        doctor.free_memory("cpu")


def test_the_command_settles_it_before_it_trains(place, given, cli):
    settings = ("--method", "lora", "--set", "method.layers=all",
                "--set", "training.micro_tokens=auto")  # fmt: skip
    shown = cli("doctor", *[a for a in given if a not in ("--data", "data")], *settings)
    assert shown.code == 0, shown.err
    assert "training.micro_tokens: " in shown.err
    done = cli("train", *given, *settings, "--set", "training.max_steps=1", "--json")
    assert done.code == 0, done.err
    chosen = int(done.err.partition("training.micro_tokens: ")[2].split()[0])
    folder = place / json.loads(done.out.splitlines()[-1])["path"]
    manifest = json.loads((folder / "peftrank.json").read_text())
    assert manifest["config"]["training"]["micro_tokens"] == chosen >= 128


def test_in_python_auto_is_refused_with_what_to_call(tiny_decoder, make_config, tmp_path):
    before = state_of(tiny_decoder)
    with pytest.raises(ConfigError, match=r"peftrank\.doctor\.settled\(config\)"):
        train(make_config(micro_tokens="auto"), output=tmp_path, base=tiny_decoder)
    assert_untouched(tiny_decoder, before)
    with pytest.raises(ConfigError, match=r"settled"):
        doctor.memory_plan(load_config(domain="news", overrides={"training.micro_tokens": "auto"}))


@pytest.mark.parametrize("value", [15, 0, "many", True, None, 4096.5])
def test_micro_tokens_are_a_number_of_at_least_16_or_auto(value):
    with pytest.raises(ConfigError, match=r"training\.micro_tokens'.*at least 16, or auto"):
        load_config(domain="news", overrides={"training.micro_tokens": value})


# --- a GPU's memory runs out


@pytest.fixture
def gpu_of(monkeypatch):
    """Makes a training pass of more than so many tokens fail as on a GPU, half-way through it.

    The first `spared` passes do not. Returns the sizes of all.
    """
    sizes = []

    def gpu_of(most, spared=0):
        scores = loop.head_scores

        def limited(model, made, batch, entering=None):
            found = scores(model, made, batch, entering)  # draws dropout masks
            sizes.append(batch.input_ids.numel())
            if sizes[-1] > most and len(sizes) > spared:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return found

        monkeypatch.setattr(loop, "head_scores", limited)
        return sizes

    return gpu_of


def said(warnings):
    """The number that the last warning names."""
    *_, last = (w for w in warnings if w.category is RuntimeWarning)
    return int(str(last.message).rpartition(" ")[2])


@pytest.mark.parametrize("spared", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_ran_out_is_the_run_of_smaller_passes(
    method, spared, tiny_decoder, make_config, gpu_of, tmp_path
):
    """Dropout masks are drawn again, gradients of passes before the one that failed are gone."""
    sizes = gpu_of(40, spared)
    config = make_config(method, micro_tokens=60, max_steps=4, batch_size=12)
    with pytest.warns(RuntimeWarning, match=r"step 1: .*set training\.micro_tokens: \d+$") as seen:
        path = train(config, output=tmp_path / "a", base=tiny_decoder)
    assert min(sizes[: spared + 1]) > 40
    chosen = said(seen)
    smaller = override(config, {"training.micro_tokens": chosen}, source="test")
    same = train(smaller, output=tmp_path / "b", base=tiny_decoder)
    assert_same_weights(path, same)
    assert untimed(logged(tmp_path / "a")) == untimed(logged(tmp_path / "b"))


def test_it_goes_on_from_a_checkpoint_with_the_smaller_passes(
    tiny_decoder, make_config, gpu_of, tmp_path
):
    gpu_of(40)
    config = make_config(micro_tokens=2048, max_steps=4, batch_size=8, checkpoint_steps=2)
    with pytest.warns(RuntimeWarning) as seen:
        whole = train(config, output=tmp_path / "out", base=tiny_decoder)
    chosen = said(seen)
    saved = run_folder(tmp_path / "out") / "checkpoint-2"
    assert checkpoint.load(saved).values["micro_tokens"] == chosen < 2048
    # No warning is an error, and none comes: nothing has to be found out again.
    again = train(config, output=tmp_path / "out", base=tiny_decoder, resume=saved)
    assert_same_weights(again, whole)


def test_a_slate_that_does_not_fit_alone_ends_the_run_with_what_to_do(
    tiny_decoder, make_config, gpu_of, tmp_path
):
    gpu_of(10)
    before = state_of(tiny_decoder)
    message = r"step 1: .*does not even hold .*\(a slate in each, up to \d+ tokens\).*gradient_ch"
    with pytest.raises(loop.OutOfMemory, match=message), pytest.warns(RuntimeWarning):
        train(make_config(), output=tmp_path / "out", base=tiny_decoder)
    assert_untouched(tiny_decoder, before)


def test_a_process_whose_memory_suffices_starts_again_with_the_others(
    tiny_decoder, make_config, tmp_path, monkeypatch
):
    config = make_config(options={"r": 4}, micro_tokens=2048)
    run = start(config, tmp_path, tiny_decoder)
    try:
        expected = loop._backward(run, run.train)
        wanted = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.requires_grad}
        run.optimizer.zero_grad()
        asked = []

        def of_all(value, accelerator):
            asked.append(value)
            # The first time of asking whether any failed, another process has.
            return 1 if len(asked) == 2 else value

        monkeypatch.setattr(loop.distributed, "largest", of_all)
        with pytest.warns(RuntimeWarning):
            found = loop._backward(run, run.train)
        assert run.micro_tokens < 1024
        assert found[0] == pytest.approx(expected[0])
        for name, parameter in run.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-6)
    finally:
        run.adapted.unload()

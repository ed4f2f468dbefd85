"""Two processes on a CPU train what one does: the base whole (DDP), or sharded (FSDP2, ZeRO-3)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trained_together
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import make_slates
from test_training_stored import shards
from torch import distributed as torch_distributed

from peftrank.config import Config
from peftrank.errors import ConfigError
from peftrank.formats.slates import write_slates
from peftrank.training import checkpoint, distributed

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"
METHODS = {
    "lora": ("lora", {"r": 4}),
    "adalora": ("adalora", {"init_r": 4, "target_r": 2}),
    "houlsby": ("adapter", {"kind": "houlsby", "size": 4}),
    "pfeiffer": ("adapter", {"kind": "pfeiffer", "size": 4, "layernorm": True}),
    "parallel": ("adapter", {"kind": "parallel", "size": 4}),
    "ia3": ("ia3", {}),
    "pissa": ("lora", {"r": 4, "init": "pissa"}),
    "qlora": ("lora", {"r": 4}),
    "mined": ("lora", {"r": 4}),
    "stored": ("lora", {"r": 4}),
    trained_together.STOPPED: ("lora", {"r": 4}),
}
TRAININGS = {"mined": {"negatives": {"schedule": ["uniform", "hard"], "pool": 12}}}
TRAINED = [name for name in METHODS if name != trained_together.STOPPED]
ZERO3_METHODS = ("lora", "adalora", "ia3")
STEPS, VALID = 9, 7
both = pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
every_method = pytest.mark.parametrize("name", TRAINED)


# --- settings


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_accelerate_reads_every_shipped_configuration(name):
    file = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    assert config.distributed_type == DistributedType(kinds[name])
    # The launcher takes any key without a word, so each must be one of its options.
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert options.keys() >= {*config.fsdp_config, *config.deepspeed_config}


def test_there_is_a_shipped_configuration_for_each_way_to_launch():
    assert {path.stem for path in CONFIGS.iterdir()} == {"ddp", "fsdp2", "deepspeed"}


@pytest.fixture
def launched(monkeypatch):
    """Sets what accelerate's launcher would."""

    def launched(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false"}, None),
        (FSDP2, "fsdp2"),
        (ZERO3, "zero3"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, None),
    ],
)
def test_the_launcher_says_whether_to_shard(launched, variables, expected):
    launched(**variables)
    assert distributed.sharding("none", "lora", {}) == expected


@pytest.mark.parametrize(
    ("variables", "quantization", "method", "options", "message"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, "none", "lora", {}, "fsdp_version: 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "none", "lora", {}, "fsdp_offload_params"),
        (
            FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "none",
            "lora",
            {},
            "fsdp_cpu_ram_efficient_loading",
        ),
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "none",
            "lora",
            {},
            "fsdp_activation_checkpointing",
        ),
        (FSDP2, "int8", "lora", {}, "fsdp2 cannot shard.*int8.*ddp.yaml"),
        (FSDP2, "none", "lora", {"dora": True}, "method.dora=true.*fsdp2 shards.*ddp.yaml"),
        (FSDP2, "none", "full", {}, "method full .*fsdp2 shards.*ddp.yaml"),
        (FSDP2, "none", "lora", {"init": "eva"}, "method.init=eva.*fsdp2 shards.*ddp.yaml"),
        (ZERO3, "nf4", "lora", {}, "zero3 cannot shard.*nf4.*ddp.yaml"),
        (ZERO3, "none", "lora", {"init": "olora"}, "method.init=olora.*zero3.*fsdp2.yaml"),
        (ZERO3, "none", "adapter", {}, "method adapter.*zero3.*fsdp2.yaml"),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "a.json"}, "none", "lora", {}, "zero_stage"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(
    launched, variables, quantization, method, options, message
):
    launched(**variables)
    with pytest.raises(ConfigError, match=message):
        distributed.sharding(quantization, method, options)


def test_a_quantized_base_that_computes_otherwise_when_it_is_sharded_is_refused():
    states = torch.randn(1, 16, 8)
    distributed._check_unchanged(states, states + 1e-4)
    for noise in (torch.randn(1, 16, 8), states * float("nan")):
        with pytest.raises(ConfigError, match=r"differ by up to.*ddp\.yaml"):
            distributed._check_unchanged(states, noise)


def test_a_base_is_sharded_only_once(tiny_decoder):
    here = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    tiny_decoder.layers[0].self_attn.q_proj.weight.ds_id = 0  # as DeepSpeed marks it
    for shard in (partial(distributed.shard_fsdp2, adapter=[]), distributed.shard_zero3):
        with pytest.raises(ConfigError, match="Load it anew"):
            shard(tiny_decoder, accelerator=here)


# --- shares and sums


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_slate_is_in_one_share_and_shares_are_even(count, processes):
    shares = [
        distributed.share(range(count), SimpleNamespace(process_index=i, num_processes=processes))
        for i in range(processes)
    ]
    assert [slate for share in shares for slate in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_gradient_that_only_another_process_has_is_used_and_one_of_none_stays_none(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.ones(2, 3)

    def with_another(summed):  # whose gradients are: none, 5, none
        summed += torch.tensor([0.0, 1, 0] + [0.0] * 6 + [5.0] * 6 + [0.0] * 6)

    monkeypatch.setattr(torch_distributed, "all_reduce", with_another)
    here = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    distributed.add_up_gradients(parameters, here)
    assert torch.equal(parameters[0].grad, torch.ones(2, 3))
    assert torch.equal(parameters[1].grad, torch.full((2, 3), 5.0))
    assert parameters[2].grad is None


# --- two processes


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with a stored base and, in configs/, a configuration of every method."""
    from conftest import _random_llama

    folder = tmp_path_factory.mktemp("together")
    _random_llama(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    # 13 slates in batches of 4: the last of an epoch has none for one of two processes.
    parts = {"train": make_slates(13), "valid": make_slates(VALID, seed=1)}
    for part, slates in parts.items():
        write_slates(folder / f"{part}.jsonl", slates)
        (folder / part).mkdir()
        shards(folder / part, slates)
    (folder / "configs").mkdir()
    for name, (method, options) in METHODS.items():
        quantization = "nf4" if name == "qlora" else "none"
        config = Config.model_validate(
            {
                "domain": "demo",
                "base": {
                    "name": str(folder / "base"),
                    "quantization": quantization,
                    "compute_dtype": "float32",
                },
                "method": {"name": method, **options},
                "data": {
                    part: folder / (part if name == "stored" else f"{part}.jsonl") for part in parts
                },
                "training": {
                    "max_steps": STEPS,
                    "batch_size": 4,
                    "micro_tokens": 200,  # several passes, and not equally many in each process
                    "eval_steps": STEPS,  # so that the state compared is the last one
                    "checkpoint_steps": 4,
                    "learning_rate": 2e-3,
                    **TRAININGS.get(name, {}),
                },
            }
        )
        (folder / "configs" / f"{name}.json").write_text(config.model_dump_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTRANK_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def one(place):
    """What one process makes of every configuration."""
    trained_together.main(place / "configs", place / "one")
    return place / "one"


@pytest.fixture(scope="module")
def together(place, one):
    """Returns a function that trains in two processes, started as the documentation says.

    They train every configuration, and go on from the checkpoints of one process.
    """

    def start(launch, *arguments):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(CONFIGS / f"{launch}.yaml"), "--num_processes", "2"]
        done = subprocess.run(
            [*command, trained_together.__file__, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 0, done.stderr

    def made(launch, names=tuple(METHODS)):
        if not (place / launch).exists():
            configs, earlier = place / f"for {launch}", place / f"checkpoints for {launch}"
            configs.mkdir()
            for name in names:
                shutil.copy(place / "configs" / f"{name}.json", configs)
                shutil.copytree(one / name, earlier / name)
            start(launch, configs, place / launch)
            start(launch, configs, place / f"on {launch}", earlier)
        return place / launch

    return made


def notes(output, name, rank):
    return json.loads((output / f"{name}.{rank}.json").read_text())


def losses(output, name):
    (run,) = (output / name / "demo" / ".runs").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def weights(output, name):
    """The exported tensors, but for the readout's two biases.

    They add one number to all scores of a slate. The loss does not depend on it, so their gradient
    is rounding noise, which AdamW turns into steps.
    """
    folder = output / name / "demo" / "0001"
    adapter = load_file(folder / "adapter_model.safetensors")
    readout = load_file(folder / "readout.safetensors")
    return adapter | {k: v for k, v in readout.items() if not k.endswith("bias")}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)


@pytest.mark.slow
def test_slates_that_stay_in_their_files_train_what_slates_in_memory_do(one):
    assert losses(one, "stored") == losses(one, "lora")


@pytest.mark.slow
@both
@every_method
def test_two_processes_train_what_one_does(launch, name, one, together):
    two = together(launch)
    assert losses(two, name) == pytest.approx(losses(one, name), rel=0, abs=1e-5)
    assert_same_weights(weights(two, name), weights(one, name))
    assert [notes(two, name, rank)["path"] for rank in (0, 1)] == [
        str(two / name / "demo" / "0001")
    ] * 2


@pytest.mark.slow
@both
def test_every_process_keeps_the_ranks_that_one_keeps(launch, one, together):
    two = together(launch)
    expected = notes(one, "adalora", 0)["masks"]
    assert 0 < sum(map(sum, expected.values())) == 2 * len(expected)
    assert any(len(set(kept)) == 2 for kept in expected.values())
    assert [notes(two, "adalora", rank)["masks"] for rank in (0, 1)] == [expected] * 2


@pytest.mark.slow
@both
@every_method
def test_every_validation_slate_is_measured_once_in_one_of_the_processes(
    launch, name, one, together
):
    two = together(launch)
    evaluations, left = divmod(len(notes(one, name, 0)["evaluated"]), VALID)
    assert evaluations == 2  # after the last step, and when finished
    assert left == 0
    measured = [notes(two, name, rank)["evaluated"] for rank in (0, 1)]
    wanted = [slate.slate_id for slate in make_slates(VALID, seed=1)] * evaluations
    assert sorted(measured[0] + measured[1]) == sorted(wanted)
    assert abs(len(measured[0]) - len(measured[1])) == evaluations


@pytest.mark.slow
@both
@every_method
def test_a_checkpoint_of_one_process_is_continued_by_two(launch, name, place, one, together):
    together(launch)
    assert_same_weights(weights(place / f"on {launch}", name), weights(one, name))


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_two_processes_is_continued_by_one(
    launch, name, place, one, together, tmp_path
):
    shutil.copytree(together(launch) / name, tmp_path / name)
    (run,) = (tmp_path / name / "demo" / ".runs").iterdir()
    saved = run / ("checkpoint-3" if name == trained_together.STOPPED else "checkpoint-4")
    config = checkpoint.load(saved).config
    trained_together.noted(name, config, tmp_path / "on" / name, resume=saved)
    assert_same_weights(weights(tmp_path / "on", name), weights(one, name))


@pytest.mark.slow
@both
def test_a_signal_to_one_process_stops_all_after_the_same_step(launch, together):
    two = together(launch)
    said = [notes(two, trained_together.STOPPED, rank)["interrupted"] for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith(f"stopped after step 3 of {STEPS}.")
    (run,) = (two / trained_together.STOPPED / "demo" / ".runs").iterdir()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.slow
@both
@every_method
def test_the_base_is_whole_or_shared_out_and_no_weight_changes(launch, name, together):
    two = together(launch)
    for rank in (0, 1):
        noted = notes(two, name, rank)
        assert noted["held"] == (1 if launch == "ddp" else 0.5)
        assert noted["same"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("name", ZERO3_METHODS)
def test_zero3_trains_what_one_process_does(name, place, one, together):
    two = together("deepspeed", ZERO3_METHODS)
    assert losses(two, name) == pytest.approx(losses(one, name), rel=0, abs=1e-5)
    assert_same_weights(weights(two, name), weights(one, name))
    assert_same_weights(weights(place / "on deepspeed", name), weights(one, name))
    for rank in (0, 1):
        noted = notes(two, name, rank)
        assert noted["masks"] == notes(one, name, 0)["masks"]
        assert noted["held"] < 1

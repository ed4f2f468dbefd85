"""A search for settings: what it tries, what it leaves, and going on after any end."""

import json
import multiprocessing
import signal

import pytest
import torch
from test_training import make_slates

from peftrank import tune as tuning
from peftrank.config import Config, load_config
from peftrank.errors import ConfigError
from peftrank.formats.slates import write_slates
from peftrank.training import Interrupted, loop
from peftrank.tune import Choices, Range, default_space, read_space, tune

pytest.importorskip("optuna")
SPACE = {
    "training.learning_rate": Range(low=1e-3, high=1e-1, log=True),
    "method.r": Choices(choices=(2, 4)),
}
METHODS = ("lora", "adalora", "adapter", "ia3")


@pytest.fixture
def config(tokenizer, tmp_path):
    """A training of four steps on a base in a folder."""
    from conftest import _random_llama

    _random_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    files = {part: tmp_path / f"{part}.jsonl" for part in ("train", "valid")}
    write_slates(files["train"], make_slates(12))
    write_slates(files["valid"], make_slates(6, seed=1))
    base = {"name": str(tmp_path / "base"), "quantization": "none", "compute_dtype": "float32"}
    training = {"max_steps": 4, "batch_size": 4, "eval_steps": 2}
    values = {"domain": "demo", "base": base, "data": files, "training": training}
    return Config.model_validate({**values, "method": {"name": "lora", "r": 4}})


@pytest.fixture
def counted(monkeypatch):
    """How often a base is loaded and an optimizer step taken."""
    counts = {"loads": 0, "steps": 0}

    def count(name, module, attribute):
        original = getattr(module, attribute)

        def wrapped(*args, **options):
            counts[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, attribute, wrapped)

    count("loads", tuning, "configured_base")
    count("steps", loop, "_optimize")
    return counts


def tried(found):
    return [trial.values for trial in found.trials if trial.state != "unfinished"]


def test_trials_cost_their_steps_and_one_load_of_the_base(config, counted, tmp_path):
    found = tune(config, output=tmp_path / "out", space=SPACE, trials=8)
    assert len(found.trials) == 8
    assert counted["loads"] == 1
    rows = [p.read_text().splitlines() for p in tmp_path.glob("out/trials/*/metrics.jsonl")]
    assert counted["steps"] == sum(map(len, rows)) <= 8 * 4
    again = tune(config, output=tmp_path / "out", space=SPACE, trials=8)
    assert again.trials == found.trials
    assert counted["loads"] == 1


def test_the_base_is_given_back_and_nothing_is_published(config, tiny_decoder, tmp_path):
    names, state = [n for n, _ in tiny_decoder.model.named_modules()], tiny_decoder.state_hash()
    tune(config, output=tmp_path / "out", space=SPACE, trials=3, base=tiny_decoder)
    assert [n for n, _ in tiny_decoder.model.named_modules()] == names
    assert tiny_decoder.state_hash() == state
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("ACTIVE"))


def test_the_best_configuration_trains_to_the_value_it_had(config, tiny_decoder, tmp_path):
    found = tune(config, output=tmp_path / "out", space=SPACE, trials=3, base=tiny_decoder)
    best = load_config(found.best_path)
    assert best == found.best
    assert best.method.options["r"] in (2, 4)
    assert found.value == max(t.value for t in found.trials if t.state == "finished")
    path = loop.train(best, output=tmp_path / "store", base=tiny_decoder)
    metrics = json.loads((path / "peftrank.json").read_text())["metrics"]
    assert metrics["valid_ndcg@10"] == found.value


def test_a_study_is_a_function_of_its_seed_however_often_it_stops(config, tiny_decoder, tmp_path):
    def run(name, seed, *stops):
        seeded = config.model_copy(update={"seed": seed})
        for trials in stops:
            found = tune(
                seeded, output=tmp_path / name, space=SPACE, trials=trials, base=tiny_decoder
            )
        return found

    whole = run("whole", 0, 6)
    stopped = run("stopped", 0, 1, 4, 6)
    assert tried(stopped) == tried(whole)
    assert [t.value for t in stopped.trials] == [t.value for t in whole.trials]
    assert len({json.dumps(values) for values in tried(whole)}) == 6
    assert tried(run("other", 1, 2)) != tried(whole)[:2]


def test_a_signal_marks_the_trial_and_the_same_call_runs_it_again(
    config, tiny_decoder, tmp_path, monkeypatch
):
    whole = tune(config, output=tmp_path / "whole", space=SPACE, trials=3, base=tiny_decoder)
    optimize, calls = loop._optimize, []

    def stop(run, slates):
        calls.append(run.step)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return optimize(run, slates)

    monkeypatch.setattr(loop, "_optimize", stop)
    given = {"output": tmp_path / "out", "space": SPACE, "trials": 3, "base": tiny_decoder}
    with pytest.raises(Interrupted, match=r"trial 1 stopped after step 2 of 4.*same command"):
        tune(config, **given)
    found = tune(config, **given)
    assert [t.state == "unfinished" for t in found.trials] == [False, True, False, False]
    assert tried(found) == tried(whole)
    assert found.trials[1].values == found.trials[2].values


def test_a_trial_that_diverges_counts_as_a_bad_one(config, tiny_decoder, tmp_path, monkeypatch):
    optimize = loop._optimize

    def spoil(run, slates):
        if run.learning_rate > 1e-2:
            raise loop.Diverged("the loss is nan")
        return optimize(run, slates)

    monkeypatch.setattr(loop, "_optimize", spoil)
    found = tune(config, output=tmp_path / "out", space=SPACE, trials=5, base=tiny_decoder)
    diverged = [t for t in found.trials if t.values["training.learning_rate"] > 1e-2]
    assert 0 < len(diverged) < 5
    assert all((t.state, t.value) == ("pruned", None) for t in diverged)


def test_a_hopeless_trial_is_pruned_at_an_evaluation(config, tiny_decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_valid_ndcg", lambda run: 1 / len(list(tmp_path.glob("o/t*/*"))))
    found = tune(config, output=tmp_path / "o", space=SPACE, trials=7, base=tiny_decoder)
    assert [t.state for t in found.trials] == ["finished"] * 5 + ["pruned"] * 2
    rows = (tmp_path / "o/trials/0006/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2  # the first evaluation


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"config\.seed \(was 0, now 1\)"),
        ({"space": {"method.r": Choices(choices=(2,))}}, r"space\.method\.r"),
        ({"train": make_slates(5)}, r"data\.fingerprint"),
    ],
)
def test_a_study_goes_on_only_with_what_it_began_with(
    changed, message, config, tiny_decoder, tmp_path
):
    given = {"output": tmp_path / "out", "space": SPACE, "trials": 1, "base": tiny_decoder}
    tune(config, **given)
    if "train" in changed:
        write_slates(config.data.train, changed["train"])
    other = config.model_copy(update={"seed": changed.get("seed", 0)})
    with pytest.raises(ConfigError, match=message):
        tune(other, **{**given, "space": changed.get("space", SPACE)})


def test_two_processes_cannot_use_one_study(config, tiny_decoder, tmp_path):
    with (
        tuning._alone(tmp_path / "study.db"),
        pytest.raises(ConfigError, match="another peftrank tune"),
    ):
        tune(config, output=tmp_path, space=SPACE, trials=1, base=tiny_decoder)


@pytest.mark.parametrize("method", METHODS)
def test_each_methods_default_space_is_possible(method, config):
    settings = config.model_copy(update={"method": Config.model_fields["method"].default})
    settings = load_config(domain="news", method=method)
    space = default_space(settings)
    assert "training.learning_rate" in space
    tuning._check(settings, space)


SPACES = {
    "a: {low: 1, high: 0}": "low must be smaller",
    "a: {low: 0, high: 1, log: true}": "above 0",
    "a: {low: 1, high: 9, log: true, step: 2}": "no step",
    "a: {low: x, high: 1}": "low",
    "a: {choices: []}": "must hold a value",
    "a: {choices: [[1]]}": "choices",
    "a: {high: 1}": "low",
    "a: 3": "given: 3",
    "[]": "expected keys",
}


@pytest.mark.parametrize("text", SPACES)
def test_a_space_that_is_none_is_refused_by_its_key(text, tmp_path):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=SPACES[text]):
        read_space(tmp_path / "space.yaml")


@pytest.mark.parametrize("key", ["seed", "base.name", "data.train", "training.eval_slates"])
def test_what_trials_share_cannot_be_searched(key, config, tmp_path):
    with pytest.raises(ConfigError, match="same in all trials"):
        tune(config, output=tmp_path, space={key: Choices(choices=(1, 2))})


def test_a_key_or_value_that_does_not_exist_is_refused_before_the_base_is_loaded(config, tmp_path):
    for space, message in (
        ({"training.learning": Range(low=1, high=2)}, "training.learning"),
        ({"training.epochs": Range(low=0, high=2)}, "training.epochs"),
        ({"method.rank": Range(low=1, high=2)}, "rank"),
    ):
        with pytest.raises(ConfigError, match=message):
            tune(config, output=tmp_path, space=space)


def test_the_command_prints_the_trials_and_what_to_do_next(config, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(config.model_dump_json())
    (tmp_path / "space.yaml").write_text(
        "training.learning_rate: {low: 1.0e-3, high: 1.0e-1, log: true}\n"
        "training.batch_size: {low: 2, high: 6, step: 2}\n"
    )
    command = ("tune", "--config", "demo.yaml", "--space", "space.yaml", "--trials", 4)
    done = cli(*command, "--plot", "importance.svg")
    assert done.code == 0, done.err
    assert done.err.count("trial ") == 4
    assert "peftrank train --config tuning/demo-lora/best.yaml" in done.out
    assert "training.batch_size" in done.out
    assert (tmp_path / "importance.svg").read_text().startswith("<?xml")
    values = json.loads(cli(*command, "--json").out)
    assert sum(values["importance"].values()) == pytest.approx(1)
    assert {t["values"]["training.batch_size"] for t in values["trials"]} <= {2, 4, 6}


def _study(config, output):
    torch.set_num_threads(1)
    tune(Config.model_validate_json(config), output=output, space=SPACE, trials=4)


@pytest.mark.slow
def test_a_killed_study_goes_on_and_repeats_only_the_trial_it_was_in(config, tmp_path):
    whole = tune(config, output=tmp_path / "whole", space=SPACE, trials=4)
    process = multiprocessing.get_context("spawn").Process(
        target=_study, args=(config.model_dump_json(), tmp_path / "out")
    )
    process.start()
    log = tmp_path / "out/trials/0002/metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") >= 1):
        assert process.is_alive()
    process.kill()
    process.join()
    before = {p: p.read_bytes() for p in tmp_path.glob("out/trials/000[01]/*")}
    found = tune(config, output=tmp_path / "out", space=SPACE, trials=4)
    assert [t.state for t in found.trials].index("unfinished") == 2
    assert tried(found) == tried(whole)
    assert {p: p.read_bytes() for p in before} == before
    assert found.value == pytest.approx(whole.value)

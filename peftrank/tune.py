"""Hyperparameters by search: short trainings on one loaded base, in a study that survives its end.

Optuna proposes values (TPE, arXiv 2304.11127) and stops a trial whose validation nDCG@10 is below
the median of the earlier ones at the same step. What it proposes is a function of the seed and of
the finished trials alone, so a study that was killed goes on as if it had not been. Trials publish
nothing; their result is a configuration.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from peftrank import plugins
from peftrank.base import Base
from peftrank.config import Config, override, read_yaml
from peftrank.errors import ConfigError
from peftrank.files import write_bytes
from peftrank.training.checkpoint import differences
from peftrank.training.data import fingerprint, open_part
from peftrank.training.distributed import start_accelerator
from peftrank.training.loop import Diverged, Interrupted, measure
from peftrank.training.run import configured_base

if TYPE_CHECKING:
    import optuna

_Number = StrictInt | StrictFloat
_FIXED = ("base", "data", "domain", "evaluation", "seed", "training.eval_slates")
"""What all trials of a study have in common, or they could not be compared."""
_FEW = 4
"""Finished trials below which importances would say nothing."""
_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "unfinished"}


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; whole ones if `low` and `high` are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    low: _Number
    high: _Number
    log: StrictBool = False
    """Equal factors are equally likely, not equal differences."""
    step: _Number | None = None

    @model_validator(mode="after")
    def _possible(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low must be smaller than high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step")
        if self.step is not None and self.step <= 0:
            raise ValueError("step must be above 0")
        return self

    def suggest(self, trial: optuna.Trial, key: str) -> int | float:
        """Returns a value that the study proposes."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = 1 if self.step is None else int(self.step)
            return int(trial.suggest_int(key, self.low, self.high, step=step, log=self.log))
        return float(trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log))


class Choices(BaseModel):
    """One of several values, in no order."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    choices: tuple[StrictBool | StrictInt | StrictFloat | StrictStr | None, ...]

    @model_validator(mode="after")
    def _several(self) -> Choices:
        if not self.choices:
            raise ValueError("choices must hold a value")
        return self

    def suggest(self, trial: optuna.Trial, key: str) -> Any:  # noqa: ANN401 - one of `choices`
        """Returns a value that the study proposes."""
        return trial.suggest_categorical(key, self.choices)


Space = Mapping[str, Range | Choices]


@dataclass(frozen=True)
class Trial:
    """One short training."""

    number: int
    state: str
    """finished, pruned (stopped as hopeless, or it diverged), or unfinished (it was killed)."""
    value: float | None
    """Validation nDCG@10; of a pruned trial, its last one."""
    values: Mapping[str, Any]
    """What was tried, by dotted key."""
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """What a study found."""

    best: Config
    best_path: Path
    """The same as YAML, for `peftrank train --config`."""
    value: float
    """Validation nDCG@10 of the best trial."""
    trials: tuple[Trial, ...]
    importance: Mapping[str, float]
    """Share of each key in what made the best trials good (PED-ANOVA, arXiv 2304.10255), largest
    first; empty below four finished trials."""


def tune(
    config: Config,
    *,
    output: Path,
    space: Space | None = None,
    trials: int = 20,
    storage: Path | None = None,
    timeout: float | None = None,
    base: Base | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Returns the best of `trials` short trainings; the same call goes on with a killed study.

    Args:
        config: The training; the keys of the space are set anew for each trial.
        output: A folder for the study, the trials' logs and `best.yaml`.
        space: What to try; absent: `default_space`.
        trials: Finished or pruned ones in the study at the end, earlier calls included.
        storage: The study's SQLite file; absent: `study.db` in `output`.
        timeout: Seconds after which no new trial starts.
        base: An already loaded base; absent: loaded once from `config.base`.
        on_trial: Called after each trial.

    Raises:
        ConfigError: Optuna is not installed, a key of the space does not exist or is the same in
            all trials, the study was begun with another configuration, or another process uses it.
        Interrupted: Ctrl-C or SIGTERM; the trial is marked and will be run again.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("tuning runs in one process. Start it without accelerate's launcher.")
    optuna = _optuna()
    space = default_space(config) if space is None else space
    _check(config, space)
    storage = storage or output / "study.db"
    storage.parent.mkdir(parents=True, exist_ok=True)
    with _alone(storage):
        study = _study(optuna, config, space, storage)
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(_done(study)) < trials and (deadline is None or time.monotonic() < deadline):
            if base is None:
                base = configured_base(config, start_accelerator(config.training, output).device)
            found = _run_trial(optuna, study, config, space, output, base)
            if on_trial is not None:
                on_trial(found)
        return _result(optuna, study, config, output)


def default_space(config: Config) -> dict[str, Range | Choices]:
    """Returns what is tried for a configuration's method: rates, and the size of the adapter.

    Methods from outside have the rates alone.
    """
    method = config.method
    rate = plugins.load("methods", method.name).learning_rate
    space: dict[str, Range | Choices] = {
        "training.learning_rate": Range(low=rate / 8, high=rate * 8, log=True),
        "training.readout_learning_rate": Range(low=1e-4, high=1e-2, log=True),
    }
    if method.name == "lora":
        space["method.r"] = Choices(choices=(4, 8, 16, 32))
        space["method.alpha"] = Range(low=4.0, high=64.0, log=True)
    elif method.name == "adalora":
        init_r = method.options.get("init_r", 12)
        space["method.target_r"] = Choices(
            choices=tuple(sorted({max(1, init_r // 6), max(1, init_r // 3), init_r * 2 // 3}))
        )
        space["method.alpha"] = Range(low=64.0, high=512.0, log=True)
    elif method.name == "adapter":
        if method.options.get("reduction") is None:
            space["method.size"] = Choices(choices=(8, 16, 32, 64))
        else:
            space["method.reduction"] = Choices(choices=(4, 8, 16, 32))
        space["method.scale"] = Range(low=0.5, high=4.0, log=True)
    return space


def read_space(path: Path) -> dict[str, Range | Choices]:
    """Returns the search space of a YAML file: dotted keys with `{low, high}` or `{choices}`.

    Raises:
        ConfigError: it is not of that form.
    """
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f"{path} holds {values!r}; expected keys such as "
            "training.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}"
        )
    space = {}
    for key, given in values.items():
        form = Choices if isinstance(given, dict) and "choices" in given else Range
        try:
            space[key] = form.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            where = "".join(f" {part}:" for part in problem["loc"][:1])
            reason = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"{path}: {key}:{where} {reason} (given: {given!r}). Expected "
                "{low: 4, high: 64}, with log: true or step: 4, or {choices: [a, b]}."
            ) from None
    return space


def plot_importance(tuning: Tuning, path: Path) -> None:
    """Draws the importance of each key as a bar; the format follows from the file's ending.

    Raises:
        ConfigError: matplotlib is not installed or does not know the ending, or there are too few
            trials.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed: pip install 'peftrank[report]'"
        ) from error
    if not tuning.importance:
        raise ConfigError(f"there is no importance to draw below {_FEW} finished trials")
    figure = Figure(figsize=(7, 1 + 0.4 * len(tuning.importance)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(tuning.importance)[::-1], list(tuning.importance.values())[::-1])
    axes.set_xlabel("importance for the best trials (PED-ANOVA)")
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.lstrip(".") or "png", dpi=150)
    except ValueError as error:
        raise ConfigError(f"cannot draw {path}: {error}") from None
    write_bytes(path, drawn.getvalue())


def _optuna() -> Any:  # noqa: ANN401 - a module without types
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "tuning needs Optuna, which is not installed: pip install 'peftrank[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _check(config: Config, space: Space) -> None:
    """Raises ConfigError unless the ends of every key's range make a configuration."""
    for key, values in space.items():
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(
                f"the search space has {key!r}, which must be the same in all trials, as they "
                "share one base and are compared with each other. Leave it out."
            )
        tried = values.choices if isinstance(values, Choices) else (values.low, values.high)
        for value in tried:
            override(config, {key: value}, source="the search space")


@contextmanager
def _alone(storage: Path) -> Iterator[None]:
    """Keeps other processes off a study until the end of this one, however it ends."""
    path = storage.with_name(storage.name + ".lock")
    lock = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise ConfigError(
            f"the study {storage} cannot be used now ({error}): probably another peftrank tune "
            "runs with it. Wait for it, or choose another --storage."
        ) from None
    try:
        yield
    finally:
        lock.close()


def _study(optuna: Any, config: Config, space: Space, storage: Path) -> optuna.Study:  # noqa: ANN401
    """Returns the study, new or as it was left; a trial that was being run is marked."""
    study = optuna.create_study(
        storage=f"sqlite:///{storage}",
        study_name=f"{config.domain}-{config.method.name}",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    parts = (open_part(config.data, config.domain, part) for part in ("train", "valid"))
    now = {
        "config": config.model_dump(mode="json"),
        "space": {key: values.model_dump(mode="json") for key, values in space.items()},
        "data": {"fingerprint": " ".join(map(fingerprint, parts))},
    }
    now = json.loads(json.dumps(now))
    then = study.user_attrs.get("of")
    if then is None:
        study.set_user_attr("of", now)
    elif then != now:
        raise ConfigError(
            f"the study in {storage} was begun with something else: {differences(then, now)}. "
            "Begin another one with --output or --storage."
        )
    for trial in study.get_trials(deepcopy=False):
        if trial.state == optuna.trial.TrialState.RUNNING:  # of a process that was killed
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in ("COMPLETE", "PRUNED")]


def _run_trial(
    optuna: Any,  # noqa: ANN401
    study: optuna.Study,
    config: Config,
    space: Space,
    output: Path,
    base: Base,
) -> Trial:
    state = optuna.trial.TrialState
    # A sampler goes on from where its own random numbers are; this one from what is in the study.
    seed = int(np.random.SeedSequence([config.seed, len(_done(study))]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = study.ask()

    def watch(step: int, value: float) -> None:
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        tried = {key: values.suggest(trial, key) for key, values in space.items()}
        chosen = override(config, tried, source=f"trial {trial.number}")
        folder = output / "trials" / f"{trial.number:04d}"
        study.tell(trial, measure(chosen, folder=folder, base=base, watch=watch))
    except (optuna.TrialPruned, Diverged):
        study.tell(trial, state=state.PRUNED)
    except BaseException as error:
        study.tell(trial, state=state.FAIL)
        if isinstance(error, Interrupted):
            raise Interrupted(
                f"trial {trial.number} {error} The same command goes on with the study, and runs "
                "this trial again."
            ) from None
        raise
    return _trial(study.get_trials(deepcopy=False)[trial.number])


def _trial(trial: optuna.trial.FrozenTrial) -> Trial:
    seconds = 0.0 if trial.duration is None else trial.duration.total_seconds()
    return Trial(trial.number, _STATES[trial.state.name], trial.value, trial.params, seconds)


def _result(optuna: Any, study: optuna.Study, config: Config, output: Path) -> Tuning:  # noqa: ANN401
    found = tuple(_trial(trial) for trial in study.get_trials(deepcopy=False))
    finished = [trial for trial in found if trial.state == "finished"]
    if not finished:
        raise ConfigError(
            f"none of {len(found)} trials finished. Give more --trials or --timeout; if losses "
            "were not finite, a space with lower learning rates."
        )
    best = max(finished, key=lambda trial: (trial.value, -trial.number))
    chosen = override(config, best.values, source=f"trial {best.number}")
    path = output / "best.yaml"
    text = yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_bytes(path, text.encode())
    importance: dict[str, float] = {}
    if len(finished) >= _FEW:
        importance = optuna.importance.get_param_importances(study)
    return Tuning(
        best=chosen,
        best_path=path,
        value=best.value or 0.0,
        trials=found,
        importance=dict(sorted(importance.items(), key=lambda pair: -pair[1])),
    )

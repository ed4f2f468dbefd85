"""Configuration: one YAML file per domain, the same dotted keys for `--set`.

Only `training.train` and the CLI see a `Config`; everything else takes plain arguments.
Every field's description is its documentation, in `--help` and in errors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from peftrank import plugins
from peftrank.errors import ConfigError

# A wheel carries the domain files inside the package; in a checkout they lie beside it.
_PACKAGE = Path(__file__).parent
_CONFIGS = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())
DOMAIN_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
"""A domain names a folder of the store, so it holds no dot and no separator."""
PARTS = ("preamble", "history", "question", "candidate", "answer", "choice")
_Beta = Annotated[float, Field(ge=0, lt=1)]
_Probability = Annotated[float, Field(gt=0, lt=1)]
_LARGEST_INT = 2**63 - 1
_TEXT = "tag:yaml.org,2002:str"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Named(BaseModel):
    """A plug-in's name and, beside it, the plug-in's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        return plugins.file_name(value)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class BaseConfig(_Section):
    """The shared pretrained model."""

    name: str = "smollm2-135m"
    """An alias of bases.yaml, a local folder, or a Hub id."""
    quantization: Literal["nf4", "fp4", "int8", "none", "stored"] = "nf4"
    """stored: as the checkpoint itself is quantized (GPTQ, AWQ, bitsandbytes)."""
    double_quant: bool = True
    """Quantize the quantization constants too (QLoRA, arXiv 2305.14314)."""
    quantize_embeddings: bool = False
    """With nf4 and fp4: the token embeddings and the vocabulary head too."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the machine computes it natively, else float32."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


class MethodConfig(_Named):
    """The adapter method; further keys are its options (r, alpha, targets, layers, ...)."""

    name: str = "lora"


class ReadoutConfig(_Named):
    """How hidden states become scores; further keys are the readout's options."""

    name: str = "score_head"


class Propensity(_Section):
    """How likely each position was looked at, when the labels are clicks on shown lists.

    A click at a position is given the weight 1 / (its chance to be looked at), everything else 1
    (Joachims et al., Unbiased Learning-to-Rank with Biased Feedback, WSDM 2017).
    """

    power: float | None = Field(None, ge=0)
    """The chance at position p (1 = the top) is 1 / p^power."""
    examination: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(None, min_length=1)
    """The chance at each position, from the top; the last one holds for all that follow."""
    largest_weight: float = Field(10.0, ge=1)
    """Weights are cut here: a little bias for much less variance."""
    position: str | None = None
    """The candidate feature that holds the position; absent: the order of the candidates."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.power is None) == (self.examination is None):
            raise ValueError("give one of power and examination")
        return self


class TaskLoss(_Named):
    """The loss of a task; further keys are the loss's options."""

    weight: float = Field(1.0, ge=0)


class LossConfig(_Named):
    """The training objective; further keys are the loss's options."""

    name: str = "listnet"
    propensity: Propensity | None = None
    """Corrects clicks for the position they were made at. Absent: labels are taken as they are."""
    weight: float = Field(1.0, ge=0)
    """How much the ranking counts beside the tasks."""
    tasks: dict[str, TaskLoss] | None = None
    """The losses of the tasks that readout multi_task learns beside the ranking, by task."""


class Template(_Section):
    """Jinja2 source of each part of the prompt. Parts see the item's fields by name.

    They have conditions, comparisons, + - / ~ and simple filters, but no loops, calls or sets.
    """

    preamble: str = ""
    history: str = "- {{ title }}\n"
    question: str = ""
    candidate: str = "{{ title }}"
    answer: str = ""
    """Behind each candidate, for readout yes_no."""
    choice: str = "\nWhich one comes next? Answer with its letter."
    """Behind a list, for readout identifier; it sees no item."""


class PromptConfig(_Section):
    """How a slate becomes text and tokens."""

    mode: Literal["isolated", "joint", "set"] = "isolated"
    """isolated: candidates do not see each other. joint: an ordinary listwise prompt, in which
    their order matters. set: markers behind them compare them, and order does not matter."""
    template: Template = Template()
    fields: tuple[str, ...] = ("title",)
    """Item fields the template uses; a candidate without any of them is an error."""
    history_length: int = Field(20, ge=0)
    """At most this many of the newest history items are read."""
    history_step: int = Field(1, ge=1)
    """Where older items are left out, the window's start moves by about so many at once, so that a
    user's successive prompts begin alike (docs/prompts.md)."""
    item_tokens: int = Field(32, ge=1)
    """Text of one item is cut at this many tokens."""
    window: int = Field(20, ge=2, le=26)
    """For readout identifier: the most candidates that are read as one list, named A to Z."""
    max_tokens: int = Field(2048, ge=16)
    """Budget of what is read together: in isolated mode the user's part and one candidate, however
    many there are; with readout identifier the user's part and one window; else the whole slate.
    Oldest history is left out first, a candidate never."""
    chat: Literal["auto", "off"] = "auto"
    """auto: wrap in the base's chat template where it has one."""


class DataConfig(_Section):
    """Where the slates are. Absent: the embedded sample of the domain."""

    train: Path | None = None
    valid: Path | None = None
    test: Path | None = None
    items: Path | None = None
    """Item texts, when the slates name items by id only and no items file lies beside them."""
    features: tuple[str, ...] | None = None
    """Candidate features the readout reads. Absent: all that the training slates have; []: none."""


class Negatives(_Section):
    """Which irrelevant candidates a training list has, by epoch (docs/training.md)."""

    schedule: tuple[Literal["uniform", "popularity", "hard"], ...] = Field(
        ("uniform", "popularity", "hard"), min_length=1
    )
    """One for each epoch; the last holds for all that follow."""
    pool: int = Field(50, ge=1)
    """Items that the current model scores to find a list's hard ones."""
    skip: float = Field(0.05, ge=0, lt=1)
    """The share of a pool, from the top, that may be relevant and is not taken."""


class TrainingConfig(_Section):
    """The optimizer, its schedule, and when to evaluate, save and stop."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides epochs."""
    epochs: int = Field(3, ge=1)
    batch_size: int = Field(16, ge=1)
    """Slates per optimizer step, over all processes."""
    slates_per_user: int = Field(4, ge=1)
    """Up to so many successive slates of a user stay in one batch and share their history."""
    negatives: Negatives | None = None
    """Draw the irrelevant candidates of the training lists anew in each epoch. Absent: as given."""
    shuffle_candidates: bool = False
    """Give every list another order of its candidates in each epoch, for `prompt.mode: joint`."""
    field_dropout: dict[str, _Probability] = Field(default_factory=dict)
    """By item field, how likely it is left out of an item in training: `{brand: 0.3}`."""
    micro_tokens: int | Literal["auto"] = 4096
    """Tokens per forward pass, at least 16; fewer use less memory and give the same gradients. A
    slate is never cut, since its loss needs all its scores. auto: as many as fit in the free memory
    (docs/training.md)."""
    learning_rate: float | None = Field(None, gt=0)
    """Of the adapter; absent: the method's own default."""
    readout_learning_rate: float = Field(1e-3, gt=0)
    optimizer: Literal[
        "adamw",
        "sgd",
        "lion",
        "adamw_8bit",
        "lion_8bit",
        "paged_adamw",
        "paged_adamw_8bit",
        "paged_lion",
        "paged_lion_8bit",
    ] = "adamw"
    """8bit: states of 8 bits. paged: on a GPU that is short of room, they move to the host."""
    betas: tuple[_Beta, _Beta] | None = None
    """Of AdamW and Lion; absent: 0.9, 0.999 and 0.9, 0.99."""
    epsilon: float = Field(1e-8, gt=0)
    """Of AdamW."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    gradient_checkpointing: bool = False
    """Compute a block again in the backward pass in place of keeping what is inside it."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    eval_steps: int = Field(50, ge=1)
    eval_slates: int = Field(200, ge=1)
    """Slates of the validation part that are read at each evaluation (the first ones)."""
    checkpoint_steps: int = Field(200, ge=1)
    patience: int = Field(5, ge=1)
    """Stop after this many evaluations without a better nDCG@10."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Accelerate's. auto: nothing beside what the base's own compute_dtype asks for."""
    bottom_cache: Literal["off", "memory", "disk"] = "off"
    """Keep what enters the lowest adapted layer, for `method.layers: top-K` (docs/speed.md)."""
    bottom_cache_mib: int = Field(4096, ge=1)
    """The most that it may keep: in each process, or in the cache folder."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    @field_validator("micro_tokens", mode="before")
    @classmethod
    def _enough(cls, value: object) -> object:
        if value == "auto" or (type(value) is int and value >= 16):
            return value
        raise ValueError("expected a number of at least 16, or auto")

    @field_validator("bottom_cache", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads the plain word so


class EvaluationConfig(_Section):
    """What is measured, and beside what."""

    metrics: tuple[str, ...] = ("ndcg@10", "mrr", "hit@1")
    baselines: tuple[str, ...] = ("random", "popularity", "bm25", "zero_shot")


class Config(_Section):
    """Everything about one run."""

    domain: str
    seed: int = 0
    base: BaseConfig = BaseConfig()
    method: MethodConfig = MethodConfig()
    prompt: PromptConfig = PromptConfig()
    readout: ReadoutConfig = ReadoutConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("domain")
    @classmethod
    def _domain_name(cls, value: str) -> str:
        if not DOMAIN_NAME.fullmatch(value):
            raise ValueError("a domain is lower-case letters, digits, - and _, at most 64")
        return value


def load_config(
    path: Path | str | Mapping[str, Any] | None = None,
    *,
    domain: str | None = None,
    method: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    check_options: bool = True,
) -> Config:
    """Returns the configuration of a file or of a shipped domain, with overrides applied.

    Args:
        path: A YAML file, or the keys themselves. Absent: the shipped file of `domain`.
        domain: A shipped domain, or the value of the `domain` key when `path` is given.
        method: Another method than the file's. It keeps those of the file's options that it has
            too (targets, layers, ...) and the defaults of the others.
        overrides: `{"training.epochs": 1}`; `parse_overrides` makes it from the command line's.
        check_options: Whether the method's, readout's and loss's own options are checked too,
            which imports them, and so PEFT.

    Raises:
        ConfigError: unknown domain or key, a value out of range, or unreadable YAML.
    """
    source, values = _read(path, domain)
    if domain is not None:
        values["domain"] = domain
    if method is not None:
        known = plugins.option_names("methods", method)
        given = values.get("method") or {}
        if isinstance(given, dict):  # anything else is refused below
            kept = {k: v for k, v in given.items() if k in known}
            values["method"] = {"name": method, **kept}
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        config = Config.model_validate(values)
        config.model_dump(mode="json")  # an adapter comes with its configuration
    except ValidationError as error:
        raise ConfigError(_explain(error, source, overrides or {})) from None
    except ValueError as error:
        raise ConfigError(f"{source}: a value cannot be written as JSON: {error}") from None
    if check_options:
        _check_options(config)
    return config


def override(config: Config, values: Mapping[str, Any], *, source: str) -> Config:
    """Returns the configuration with dotted keys set, checked as `load_config` checks it.

    Args:
        config: Stays as it is.
        values: `{"training.epochs": 1}`.
        source: Where they come from, for errors.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    dumped = config.model_dump(mode="json")
    for key, value in values.items():
        _set(dumped, key, value)
    try:
        changed = Config.model_validate(dumped)
    except ValidationError as error:
        raise ConfigError(_explain(error, source, {})) from None
    _check_options(changed)
    return changed


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - any YAML value
    """Returns what a YAML file holds; the same rules as for a configuration.

    Raises:
        ConfigError: it cannot be read, or is no valid YAML.
    """
    try:
        return _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        line, reason = _yaml_reason(error)
        raise ConfigError(f"{path}:{line}: not valid YAML: {reason}") from error


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Returns `{"training.epochs": 1}` for `["training.epochs=1"]`; values are YAML.

    Raises:
        ConfigError: a text is not key=value.
    """
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip() or not key.isprintable():
            raise ConfigError(f"--set takes key=value, not {text!r}. Example: training.epochs=1")
        try:
            pairs[key.strip()] = _yaml(value)
        except yaml.YAMLError as error:
            _, reason = _yaml_reason(error)
            raise ConfigError(
                f"--set {text!r}: the value is not valid YAML: {reason}. Put a text with signs in "
                f"quotes: --set '{key.strip()}=\"...\"'"
            ) from error
    return pairs


def domains() -> tuple[str, ...]:
    """Returns the domains that have a shipped configuration file."""
    return tuple(sorted(path.stem for path in _CONFIGS.glob("*.yaml")))


def _read(
    path: Path | str | Mapping[str, Any] | None, domain: str | None
) -> tuple[str, dict[str, Any]]:
    if isinstance(path, Mapping):
        return "the configuration", copy.deepcopy(dict(path))
    if path is None:
        if domain not in domains():
            hint = plugins.did_you_mean(domain or "", domains())
            raise ConfigError(
                f"unknown domain {domain!r}{hint}. Shipped domains: {', '.join(domains())}. "
                "A domain of your own is a YAML file, passed with --config; the line "
                f"`domain: {domain}` is enough, what it leaves out has a default."
            )
        path = _CONFIGS / f"{domain}.yaml"
    source = Path(path)
    values = read_yaml(source)
    if not isinstance(values, dict):
        shown = "nothing" if values is None else repr(values)
        raise ConfigError(
            f"{source} holds {shown}; expected configuration keys, at least `domain: <name>`"
        )
    return str(source), values


class _Loader(yaml.SafeLoader):
    """YAML without aliases, whose keys are texts that occur once, and whose errors have a line."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            # A few lines of them may stand for more text than fits in any memory.
            raise ComposerError(
                None,
                None,
                "aliases (*name) are not read; write the value out, or put a text in quotes",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != _TEXT:
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "of many values"
                reason = f"the key {shown} is no text; quote it"
                raise ConstructorError(None, None, reason, key.start_mark)
            if key.value in seen:
                reason = f"the key {key.value!r} occurs twice in one section"
                raise ConstructorError(None, None, reason, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            what = repr(node.value)[:60] if isinstance(node, yaml.ScalarNode) else "the value"
            reason = f"{what} cannot be read as {node.tag.rpartition(':')[2]}; quote a text"
            raise ConstructorError(None, None, reason, node.start_mark) from None
        if isinstance(value, int) and abs(value) > _LARGEST_INT:
            raise ConstructorError(None, None, "the number is too large", node.start_mark)
        return value


def _yaml(text: str) -> Any:  # noqa: ANN401 - any YAML value
    """Returns what a YAML text holds; raises yaml.YAMLError for anything that is wrong with it."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _yaml_reason(error: yaml.YAMLError) -> tuple[int, str]:
    """Returns the 1-based line and what is wrong there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return 1, str(error).partition("\n")[0]  # a character that no YAML may hold
    tab = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
    return error.problem_mark.line + 1, f"{error.problem}{tab}"


def _check_options(config: Config) -> None:
    given = {"methods": ("total_steps",), "readouts": ("feature_names",), "losses": ("reference",)}
    sections = {"methods": config.method, "readouts": config.readout, "losses": config.loss}
    for kind, section in sections.items():
        plugins.check_options(kind, section.name, section.options, given[kind])
    for task in (config.loss.tasks or {}).values():
        plugins.check_options("losses", task.name, task.options, given["losses"])


def _set(values: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401
    *sections, last = key.split(".")
    for section in sections:
        child = values.setdefault(section, {})
        if child is None:  # a section that is absent by default
            child = values[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {section!r} holds {child!r}, not a section")
        values = child
    values[last] = value


def _explain(error: ValidationError, source: str, overrides: Mapping[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        overridden = any(f"{name}.".startswith(f"{key}.") for name in overrides)
        lines.append("--set:" if overridden else f"{source}:")
        if problem["type"] == "extra_forbidden":
            names = _fields_of(problem["loc"][:-1])
            hint = plugins.did_you_mean(str(problem["loc"][-1]), names)
            lines.append(f"unknown key {key!r}{hint}. Known here: {', '.join(names)}.")
        elif problem["type"] == "missing":
            lines.append(f"key {key!r} is missing.")
        elif problem["type"] == "model_type":
            lines.append(f"key {key!r} is a section of keys, not {problem['input']!r}.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"key {key!r}: {message} (given: {problem['input']!r}).")
    return " ".join(lines)


def _fields_of(location: tuple[str | int, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        annotation: Any = model.model_fields[str(part)].annotation
        model = next((a for a in get_args(annotation) if a is not type(None)), annotation)
    return sorted(model.model_fields)

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from peftrank import plugins
from peftrank.config import PARTS, Config, Template, domains, load_config, parse_overrides
from peftrank.errors import ConfigError
from peftrank.samples import samples

CONFIGS = Path(__file__).parent.parent / "configs"


def _file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_names_its_own_domain(path):
    config = load_config(path)
    assert config.domain == path.stem
    assert config == load_config(domain=path.stem)


def test_each_sample_has_a_file_and_one_domain_more_shows_that_a_file_is_enough():
    assert domains() == tuple(sorted({*samples(), "music"}))


@pytest.mark.parametrize("domain", samples())
def test_shipped_files_of_samples_need_no_data(domain):
    data = load_config(domain=domain).data
    assert data.train is data.valid is data.test is None


def test_the_music_file_names_its_data():
    assert load_config(domain="music").data.train == Path("slates/train.jsonl")


@pytest.mark.parametrize("domain", domains())
def test_shipped_templates_compile_for_every_turn(domain, tokenizer):
    from peftrank.prompts.template import TURNS, PromptTemplate

    prompt = load_config(domain=domain).prompt
    for turn in TURNS:
        PromptTemplate(
            tokenizer,
            parts=prompt.template.model_dump(),
            fields=prompt.fields,
            turn=turn,
            mode="joint" if turn == "list" else "isolated",
        )


def test_a_minimal_file_gets_the_defaults(tmp_path):
    assert load_config(_file(tmp_path, "domain: mine\n")) == Config(domain="mine")


def test_template_parts_are_the_parts_of_a_prompt():
    assert tuple(Template.model_fields) == PARTS


def test_an_unknown_domain_names_the_closest():
    with pytest.raises(ConfigError, match=r"unknown domain 'newz' \(did you mean 'news'\?\)"):
        load_config(domain="newz")


@pytest.mark.parametrize("name", ["News", "../news", "a/b", ""])
def test_a_domain_that_could_not_be_a_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="key 'domain'"):
        load_config(_file(tmp_path, yaml.safe_dump({"domain": name})))


def test_an_unknown_key_names_the_closest_of_its_section():
    with pytest.raises(ConfigError, match=r"'training.epoch' \(did you mean 'epochs'\?\)"):
        load_config(domain="news", overrides=parse_overrides(["training.epoch=1"]))


def test_an_unknown_key_at_the_top_names_the_sections(tmp_path):
    with pytest.raises(ConfigError, match=r"'trainings' \(did you mean 'training'\?\).*readout"):
        load_config(_file(tmp_path, "domain: mine\ntrainings: {epochs: 1}\n"))


def test_a_value_out_of_range_names_key_and_value():
    with pytest.raises(ConfigError, match=r"'training.epochs'.*given: 0"):
        load_config(domain="news", overrides={"training.epochs": 0})


def test_an_error_names_the_file(tmp_path):
    path = _file(tmp_path, "seed: 1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: key 'domain' is missing"):
        load_config(path)


def test_overrides_are_typed_as_yaml_and_reach_into_sections():
    config = load_config(
        domain="news",
        overrides=parse_overrides(
            [
                "training.learning_rate=1.0e-4",
                "training.max_steps=null",
                "base.double_quant=false",
                "prompt.template.preamble=a=b",
                "evaluation.metrics=[mrr]",
            ]
        ),
    )
    assert config.training.learning_rate == 1e-4
    assert config.training.max_steps is None
    assert config.base.double_quant is False
    assert config.prompt.template.preamble == "a=b"
    assert config.evaluation.metrics == ("mrr",)


def test_an_override_changes_only_its_key():
    before, after = (
        load_config(domain="news"),
        load_config(domain="news", overrides=parse_overrides(["seed=7"])),
    )
    assert after.seed == 7
    assert after.model_copy(update={"seed": before.seed}) == before


@pytest.mark.parametrize("text", ["training.epochs", "=1", "training.epochs=[1"])
def test_a_malformed_override_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides([text])


def test_an_override_below_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match="'seed' holds 0, not a section"):
        load_config(domain="news", overrides=parse_overrides(["seed.x=1"]))


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "a: [\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(_file(tmp_path, text))


UNREADABLE = {
    "2020-13-45": "'2020-13-45' cannot be read as timestamp",
    "!!int ''": "'' cannot be read as int",
    "!!bool x": "'x' cannot be read as bool",
    "!!timestamp x": "'x' cannot be read as timestamp",
    "0x" + "f" * 5000: "too large",
    "9" * 5000: "cannot be read as int",
    "[" * 2000: "nested too deeply",
    "&a [*a]": "aliases .* are not read",
    "{2020-01-01: 1}": "the key '2020-01-01' is no text; quote it",
    "{on: 1}": "the key 'on' is no text",
    "{<<: {a: 1}}": "the key '<<' is no text",
    "{[a]: 1}": "is no text",
    "{a: 1, a: 2}": "the key 'a' occurs twice in one section",
}


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: value[:20])
def test_a_value_that_yaml_cannot_make_is_an_error_with_its_line(tmp_path, value):
    with pytest.raises(ConfigError, match=UNREADABLE[value]):
        parse_overrides([f"seed={value}"])
    with pytest.raises(ConfigError, match=rf"mine\.yaml:[12]: .*{UNREADABLE[value]}"):
        load_config(_file(tmp_path, f"domain: mine\nseed: {value}\n"))


def test_aliases_that_stand_for_more_than_fits_in_memory_are_refused_at_once(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghijkl")]
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: .*aliases"):
        load_config(_file(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize("value", ["!!binary /w==", "[" * 280 + "]" * 280])
def test_an_option_that_no_adapter_could_come_with_is_refused(tmp_path, value):
    path = _file(tmp_path, f"domain: mine\nmethod: {{name: lora, layers: {value}}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: a value cannot be written as JSON"):
        load_config(path)


def test_a_method_that_is_no_section_is_refused_with_another_method_too(tmp_path):
    path = _file(tmp_path, "domain: mine\nmethod: lora\n")
    for method in (None, "adapter"):
        with pytest.raises(ConfigError, match="key 'method' is a section of keys, not 'lora'"):
            load_config(path, method=method)


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match=r"'training\.learning_rate'.*finite"):
        load_config(domain="news", overrides=parse_overrides(["training.learning_rate=.inf"]))


def test_a_key_that_cannot_be_printed_is_refused():
    with pytest.raises(ConfigError, match=r"--set takes key=value, not 'se\\udcffd=1'"):
        parse_overrides(["se\udcffd=1"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("section", "kind"), [("method", "methods"), ("readout", "readouts"), ("loss", "losses")]
)
def test_an_unknown_plugin_lists_those_there_are(section, kind):
    with pytest.raises(ConfigError, match=plugins.available(kind)[0]):
        load_config(
            domain="social", overrides=parse_overrides([f"{section}={{name: nothing_like_it}}"])
        )


@pytest.mark.parametrize("section", ["method", "readout", "loss"])
def test_an_option_the_plugin_does_not_take_is_refused(section):
    with pytest.raises(ConfigError, match="unknown option 'surely_not'"):
        load_config(domain="social", overrides=parse_overrides([f"{section}.surely_not=1"]))


def test_an_option_names_the_closest_one():
    with pytest.raises(ConfigError, match=r"'alpa' for methods 'lora' \(did you mean 'alpha'\?\)"):
        load_config(domain="social", overrides=parse_overrides(["method.alpa=1"]))


def test_what_training_supplies_is_no_option():
    with pytest.raises(ConfigError, match="'total_steps'"):
        load_config(domain="social", overrides=parse_overrides(["method.total_steps=5"]))
    with pytest.raises(ConfigError, match="unknown option 'reference' for losses 'softmax_dpo'"):
        load_config(
            domain="social",
            overrides=parse_overrides(["loss.name=softmax_dpo", "loss.reference=1"]),
        )


@pytest.mark.parametrize("name", [".x:y", "builtins:dict", "math:pi", "nowhere:x", ":", "os:"])
def test_a_plugin_outside_the_package_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=r"cannot import|no function or class"):
        load_config(domain="news", overrides={"loss.name": name})


def test_a_plugin_outside_the_package_is_named_by_module_and_object():
    config = load_config(
        domain="news", overrides=parse_overrides(["loss.name=peftrank.losses.listnet:listnet"])
    )
    assert config.loss.name == "peftrank.losses.listnet:listnet"


def test_another_method_keeps_the_options_it_has_too():
    before, after = load_config(domain="video"), load_config(domain="video", method="lora")
    assert before.method.options == {"kind": "pfeiffer", "size": 48, "layers": "top-10"}
    assert after.method.name == "lora"
    assert after.method.options == {"layers": "top-10"}


@pytest.mark.parametrize("domain", samples())
@pytest.mark.parametrize("method", ["adalora", "adapter", "full", "lora", "top-layers"])
def test_every_domain_takes_every_method(domain, method):
    assert load_config(domain=domain, method=method).method.name == method.replace("-", "_")

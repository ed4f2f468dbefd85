"""Input that cannot be used: exit code 2, where it is and what to do, and nothing half-written."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import safetensors.torch

from peftrank import files, store
from peftrank.cli import main
from peftrank.errors import AdapterError

QUICK = ("--method", "lora", "--set", "method.layers=all", "--set", "training.max_steps=1")


@pytest.fixture
def refused(cli, place):
    """Returns a function that runs a command which must fail cleanly, and gives its message."""

    def run(*arguments):
        before = contents(place)
        result = cli(*arguments)
        assert result.code == 2, result
        assert "Traceback" not in result.err
        assert contents(place) == before
        return " ".join(result.err.replace("│", " ").split())

    return run


def contents(folder):
    """Every file with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_line(part, line, **changes):
    """Changes keys of one slate of a data file."""
    path = Path("data") / f"{part}.jsonl"
    rows = path.read_text().splitlines()
    rows[line - 1] = json.dumps({**json.loads(rows[line - 1]), **changes})
    path.write_text("\n".join(rows) + "\n")


def items(*names):
    return [{"item_id": name, "fields": {"title": name}} for name in names]


SLATES = [
    ({"candidates": [], "labels": []}, "candidates is empty; a slate needs at least one"),
    ({"labels": [1.0, 0.0]}, "labels has 2 numbers for 4 candidates; give one each"),
    ({"candidates": items("a", "b", "a", "c")}, "candidate 'a' occurs twice; name each item once"),
    ({"labels": [float("nan"), 0, 0, 0]}, "labels[0] is nan; it must be a finite number"),
    ({"labels": [0, -1, 0, 0]}, "labels[1] is -1.0; it must be at least 0"),
    ({"label": [1, 0, 0, 0]}, "unknown key 'label' (did you mean 'labels'?)"),
    ({"candidates": ["a", "b", "c", "d"]}, "no items.jsonl or items.parquet lies beside"),
    ({"history": "h1"}, "history must be an array of items"),
]


@pytest.mark.parametrize("command", ["train", "evaluate", "rank"])
@pytest.mark.parametrize(("changes", "message"), SLATES)
def test_a_malformed_slate_is_named_by_file_and_line(refused, given, command, changes, message):
    part = "train" if command == "train" else "test"
    change_line(part, 2, **changes)
    options = {"train": QUICK, "evaluate": (), "rank": ("--index", 0)}[command]
    said = refused(command, *given, *options)
    assert f"data/{part}.jsonl:2: slate '{part}-1': " in said
    assert message in said


def test_a_malformed_slate_leaves_no_ranking_behind(refused, given):
    change_line("test", 3, labels=[1.0])
    said = refused("rank", *given, "--input", "data/test.jsonl", "--output", "ranked.jsonl")
    assert "data/test.jsonl:3: " in said


def test_a_ranking_that_fails_keeps_the_file_that_was_there(cli, place, given):
    ranked = place / "ranked.jsonl"
    ranked.write_text("earlier\n")
    change_line("test", 3, labels=[1.0])
    assert cli("rank", *given, "--input", "data/test.jsonl", "--output", ranked).code == 2
    assert ranked.read_text() == "earlier\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"slate_id": "x", "user_id"', "not valid JSON: "),
        (b'{"slate_id": "\xff\xfe"}', "not valid UTF-8; convert the file to UTF-8"),
        (b"[1, 2]", "a slate is an object with keys, not [1, 2]"),
    ],
)
def test_a_line_that_is_no_slate_is_named(refused, given, line, message):
    path = Path("data/test.jsonl")
    first, *_ = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + line + b"\n")
    said = refused("evaluate", *given)
    assert "data/test.jsonl:2: " in said
    assert message in said


def test_a_part_without_slates_is_named(refused, given):
    for part in ("train", "test"):
        Path(f"data/{part}.jsonl").write_text("\n")
    assert "data/train.jsonl: no slate here" in refused("train", *given, *QUICK)
    assert "data/test.jsonl: no slate here" in refused("evaluate", *given)
    assert "data/test.jsonl: no slate here" in refused("prompt", "show", *given)


def test_data_without_files_says_which_are_expected(refused, given, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("empty", "no train, valid or test file (.jsonl or .parquet) in this folder"),
        ("nowhere", "--data nowhere is not there"),
        ("data/test.jsonl", "is a file; expected a folder"),
    ):
        assert message in refused("evaluate", *given[:-1], path)


SETTINGS = [
    ("training.epoch=1", "--set: unknown key 'training.epoch' (did you mean 'epochs'?)"),
    ("trainin.epochs=1", "--set: unknown key 'trainin' (did you mean 'training'?)"),
    ("training.epochs=0", "--set: key 'training.epochs': Input should be greater than or equal"),
    ("training=3", "--set: key 'training' is a section of keys, not 3"),
    ("training.epochs", "--set takes key=value, not 'training.epochs'"),
    ("method.name=loraa", "unknown name 'loraa' in methods (did you mean 'lora'?)"),
    ("method.alpa=1", "unknown option 'alpa' for methods 'lora' (did you mean 'alpha'?)"),
    ("method.r=eight", "option 'r' for methods 'lora' is 'eight': input should be a valid integer"),
    ("readout.name=scorehead", "'scorehead' in readouts (did you mean 'score_head'?)"),
    ("loss.name=lisnet", "unknown name 'lisnet' in losses (did you mean 'listnet'?)"),
    ("base.quantization=nf5", "key 'base.quantization': Input should be 'nf4', 'fp4', 'int8'"),
    ("prompt.template.candidate={{ title }}", "--set 'prompt.template.candidate=\"...\"'"),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS)
def test_a_wrong_setting_is_named_with_the_likely_one(refused, given, setting, message):
    assert message in refused("train", *given, *QUICK, "--set", setting)


def test_an_unknown_domain_gets_the_likely_one_and_the_way_to_ones_own(refused):
    said = refused("train", "--domain", "newss")
    assert "unknown domain 'newss' (did you mean 'news'?)" in said
    assert "--config" in said


YAML = [
    (b"domain: news\n\ttraining: {}\n", "mine.yaml:2: not valid YAML: ", "not tabs"),
    (b"domain: news\nseed: [\n", "mine.yaml:3: not valid YAML: ", ""),
    (b"domain: \xff\xfe\n", "mine.yaml: byte 8 is not UTF-8", "save it as UTF-8"),
    (b"- news\n", "mine.yaml holds ['news']; expected configuration keys", "domain: <name>"),
    (b"", "mine.yaml holds nothing; expected configuration keys", "domain: <name>"),
    (b"seed: 1\n", "mine.yaml: key 'domain' is missing", ""),
    (b"domain: a\ntrainng: {}\n", "mine.yaml: unknown key 'trainng'", "did you mean 'training'?"),
    (b"domain: Big News\n", "mine.yaml: key 'domain': a domain is lower-case letters", "Big News"),
]


@pytest.mark.parametrize(("content", "where", "what"), YAML)
def test_a_configuration_that_cannot_be_read_is_named(refused, tmp_path, content, where, what):
    (tmp_path / "mine.yaml").write_bytes(content)
    said = refused("train", "--config", "mine.yaml")
    assert where in said
    assert what in said


def test_a_configuration_that_is_not_there_or_a_folder_is_named(refused):
    assert "the configuration none.yaml: No such file" in refused("train", "--config", "none.yaml")
    assert "the configuration data: Is a directory" in refused("train", "--config", "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("evaluate", "--limit", 0), "Invalid value for '--limit'"),
        (("evaluate", "--part", "tset"), "'tset' is not one of 'train', 'valid', 'test'"),
        (("evaluate", "--metrics", "ndgc@10"), "unknown metric 'ndgc@10' (did you mean"),
        (("evaluate", "--baselines", "randm"), "'randm' in baselines (did you mean 'random'?)"),
        (("rank", "--index", 99), "--index 99: the test part has 3 slates"),
        (("rank", "--index", 0, "-k", 0), "Invalid value for '-k'"),
        (("rank", "--input", "no.jsonl", "--output", "r.jsonl"), "no.jsonl: no such file"),
        (("rank", "--input", "data", "--output", "r.csv"), "written as .jsonl, .jsonl.gz or .run"),
        (("rank", "--index", 0, "--adapter", "news@0009"), "Versions: 0001, 0002"),
        (("rank", "--index", 0, "--adapter", "newz"), "did you mean 'news'?"),
        (("rank", "--index", 0, "--store", "nowhere"), "make an adapter with peftrank train"),
    ],
)
def test_an_option_out_of_range_says_what_is_expected(refused, given, options, message):
    command, *more = options
    assert message in refused(command, *given, *more)


def test_an_adapter_of_another_base_is_refused_with_both_names(refused, given, workplace):
    other = [workplace / "other-base" if value == workplace / "base" else value for value in given]
    for command in (("rank", "--index", 0), ("evaluate", "--baselines", "none")):
        said = refused(command[0], *other, *command[1:])
        assert f"trained on base '{workplace / 'base'}'" in said
        assert f"not on '{workplace / 'other-base'}'" in said


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = [
    (flip, "was changed or damaged"),
    (truncate, "bytes; peftrank.json says"),
    (Path.unlink, "is incomplete"),
]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "readout.safetensors"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_adapter_is_refused_before_it_is_used(refused, given, name, damage, message):
    damage(Path("adapters/news/0002") / name)
    for command in (
        ("adapters", "verify", "news"),
        ("adapters", "show", "news"),
        ("rank", *given, "--index", 0),
        ("evaluate", *given, "--baselines", "none"),
    ):
        said = refused(*command)
        assert "adapters/news/0002" in said
        assert name in said
        assert message in said
        assert "activate another version" in said


BASE = [
    ("config.json", b"{", "config.json cannot be read: "),
    ("model.safetensors", b"\x10\0\0\0\0\0\0\0{", "base are damaged: "),
    ("tokenizer.json", b"{", "cannot load the tokenizer in "),
    ("tokenizer.json", b"{}", "cannot load the tokenizer in "),
]


@pytest.mark.parametrize(("name", "content", "message"), BASE)
def test_a_damaged_base_is_refused(refused, given, workplace, place, name, content, message):
    shutil.copytree(workplace / "base", place / "base")
    (place / "base" / name).write_bytes(content)
    damaged = ["base" if value == workplace / "base" else value for value in given]
    for command in (("rank", *damaged, "--index", 0), ("prompt", "show", *damaged)):
        said = refused(*command)
        assert message in said
        assert "Copy or download the base again." in said


def versions(place):
    return store.versions(place / "adapters", "news"), store.active(place / "adapters", "news")


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("where", "name"),
    [(os, "fsync"), (Path, "write_bytes"), (safetensors.torch, "save"), (Path, "rename")],
)
def test_a_full_disk_while_saving_keeps_the_store_as_it_was(
    cli, place, given, monkeypatch, where, name
):
    before = contents(place / "adapters")
    monkeypatch.setattr(where, name, full_disk)
    result = cli("train", *given, *QUICK)
    assert result.code == 2
    assert "adapters/news: No space left on device" in result.err
    assert "free some space" in result.err
    after = contents(place / "adapters")
    # The new run's log stays: it is no version, and shows how far the run came.
    assert {path for path in after if ".runs" not in path.parts} == {
        path for path in before if ".runs" not in path.parts
    }
    assert versions(place) == (("0001", "0002"), "0002")


def test_a_full_disk_while_writing_a_ranking_names_the_file(refused, given, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    said = refused("rank", *given, "--input", "data/test.jsonl", "--output", "ranked.jsonl")
    assert "cannot write ranked.jsonl: No space left on device" in said
    assert "free some space or choose another place" in said


def test_a_file_in_place_of_a_folder_is_named(refused, given):
    Path("taken").write_text("")
    said = refused("rank", *given, "--input", "data/test.jsonl", "--output", "taken/r.jsonl")
    assert "cannot write taken: is a file, not a folder" in said
    said = refused("train", *given, *QUICK, "--output", "taken")
    assert "taken/news" in said
    assert "Not a directory" in said


def save_with_small_files_only(answers):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    adapter = store.load_adapter(Path("adapters/news/0002"))
    try:
        answers.put(str(store.save_adapter(Path("adapters"), "news", adapter, card="")))
    except AdapterError as error:
        answers.put(str(error))


def test_a_file_that_the_system_lets_grow_no_further_is_no_version(place):
    # The kernel's own refusal in the middle of a file, not a simulated one.
    before = contents(place)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=save_with_small_files_only, args=(answers,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "adapters/news: File too large" in answers.get()
    assert contents(place) == before


@pytest.fixture
def unprivileged():
    """A folder open to all; root gives up its right to read and write anywhere meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def test_a_folder_that_may_not_be_written_is_named(unprivileged):
    locked = unprivileged / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(PermissionError) as caught:
        files.write_bytes(locked / "r.html", b"x")
    assert caught.value.filename == str(locked / "r.html")
    with pytest.raises(AdapterError, match=r"locked/news: Permission denied"):
        store.save_adapter(locked, "news", None, card="")


def test_slates_that_may_not_be_read_are_named(unprivileged, capsys):
    path = unprivileged / "test.jsonl"
    path.write_text("{}\n")
    path.chmod(0)
    with pytest.raises(SystemExit) as stop:
        main(["data", "inspect", str(path)])
    assert stop.value.code == 2
    assert f"{path}: " in capsys.readouterr().err

"""Every file of examples/ runs: here on a tiny base in this process, in slow tests as it stands."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import typer
from hub_server import running
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

from peftrank import store
from peftrank.cli import app

EXAMPLES = Path(__file__).parent.parent / "examples"
BASH = shutil.which("bash")
RECORD = """#!{python} -SE
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def here(tmp_path, monkeypatch, workplace):
    """An empty working directory, and the tiny base as the one the examples take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE", str(workplace / "base"))
    monkeypatch.delenv("REPO", raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)  # as `python examples/FILE` does
    return tmp_path


@pytest.fixture
def run_python(here, capsys):
    """Runs a Python example as a program, and returns what it printed."""

    def run(name):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def commands_of(here, tmp_path_factory):
    """Runs a shell example in which the programs only note what they are asked to do."""
    if BASH is None:
        pytest.skip("needs bash")
    programs = tmp_path_factory.mktemp("programs")
    log = programs / "log"
    log.touch()
    for name in ("peftrank", "torchrun"):
        text = RECORD.format(python=sys.executable, log=str(log), name=name)
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    (programs / "python").write_text("#!/bin/sh\necho 0\n", encoding="utf-8")  # asked for GPUs
    (programs / "python").chmod(0o755)

    def run(name, **variables):
        environment = {**os.environ, **variables, "PATH": f"{programs}:{os.environ['PATH']}"}
        subprocess.run([BASH, EXAMPLES / name], check=True, env=environment, capture_output=True)
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]

    return run


@pytest.fixture
def run_commands(cli):
    """Runs such commands of `peftrank` in this process, and returns what they printed."""

    def run(commands):
        said = ""
        for name, *arguments in commands:
            assert name == "peftrank"
            result = cli(*arguments)
            assert result.code == 0, (arguments, result.err)
            said += result.out
        return said

    return run


def test_each_example_is_short_and_has_a_line_in_the_readme():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(\S+)`\]\(\1\) \|", readme, flags=re.MULTILINE)) == files
    for name in files:
        lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) < 60, name


def test_train_on_csv(commands_of, run_commands):
    said = run_commands(commands_of("train_on_csv.sh"))
    assert "100 slates" in said
    assert store.active(Path(".demo/csv/adapters"), "ecommerce") == "0001"


def test_two_domains(run_python):
    said = run_python("two_domains.py")
    assert re.search(r"^news: lora, \d+ KiB\necommerce: adapter, \d+ KiB\n", said)
    assert len(re.findall(r"^  [+-]\d+\.\d\d  \w", said, flags=re.MULTILINE)) == 4


def test_add_domain(run_python):
    said = run_python("add_domain.py")
    assert re.search(r"adapters/recipes/0001: hit@1 \d\.\d\d \[", said)


def test_add_loss(run_python):
    assert run_python("add_loss.py").strip() == ".demo/add-loss/adapters/news/0001"
    manifest = json.loads(Path(".demo/add-loss/adapters/news/0001/peftrank.json").read_text())
    assert manifest["config"]["loss"].items() >= {"name": "add_loss:hardest", "margin": 0.5}.items()


def test_the_loss_of_the_example_is_what_it_says():
    import torch

    hardest = runpy.run_path(str(EXAMPLES / "add_loss.py"))["hardest"]
    scores = torch.tensor([[2.0, 0.5, 1.8, 9.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    losses = hardest(scores, labels, mask)
    assert losses.tolist() == pytest.approx([0.8, 0.0])
    weighted = hardest(scores, labels, mask, torch.full_like(scores, 2.0), margin=0.5)
    assert weighted.tolist() == pytest.approx([0.6, 0.0])
    losses.sum().backward()
    assert scores.grad.tolist() == [[-1.0, 0.0, 1.0, 0.0], [0.0] * 4]


def check_options(arguments):
    """Raises unless these arguments of `peftrank` name a command and options that exist."""
    context = typer.main.get_command(app).make_context("peftrank", list(arguments))
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, arguments = context.command.resolve_command(context, rest)
        context = command.make_context(name, arguments, parent=context)


def test_evaluate_against_baselines(commands_of):
    train, evaluate = commands_of("evaluate_against_baselines.sh")
    assert (train[:2], evaluate[:2]) == (["peftrank", "train"], ["peftrank", "evaluate"])
    check_options(train[1:])
    check_options(evaluate[1:])


def test_multi_gpu(commands_of):
    (launched,) = commands_of("multi_gpu.sh")
    assert launched[:4] == ["torchrun", "--standalone", "--nproc-per-node", "2"]
    assert launched[4:7] == ["-m", "peftrank", "train"]
    check_options(launched[6:])


def test_push_and_pull_shows_what_it_would_upload_where_no_repository_is_named(commands_of):
    commands = commands_of("push_and_pull.sh")
    assert [command[1] for command in commands] == ["train", "adapters"]
    assert commands[-1][-1] == "--dry-run"


@contextmanager
def hub_of(tmp_path, monkeypatch):
    """The stand-in for the Hub, as this process's Hub, with an empty cache and a logged-in user."""
    with running() as made:
        for name, value in {
            "ENDPOINT": made.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", made.url)
        monkeypatch.setenv("HF_TOKEN", made.token)
        yield made
        close_session()


def test_push_and_pull(commands_of, run_commands, tmp_path, monkeypatch):
    commands = commands_of("push_and_pull.sh", REPO="someone/news-ranker")
    with hub_of(tmp_path, monkeypatch) as hub:
        said = run_commands(commands)
        assert f"{hub.url}/someone/news-ranker/commit/" in said
        assert "nothing was uploaded" in said
    assert store.active(Path(".demo/share/pulled"), "news") == "0001"


def free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


SAYS = {
    "add_domain.py": r"hit@1 (0\.[5-9]|1)",
    "add_loss.py": r"adapters/news/0001",
    "evaluate_against_baselines.sh": r"zero_shot \(cosine\)",
    "multi_gpu.sh": r"^2 processes\n(.*\n)*saved and activated \S+/0001 ",
    "push_and_pull.sh": r"nothing was uploaded",
    "serve_and_call.py": r"^ada .*\n  Central bank.*\n(.*\n)*bob .*\n  Cup final",
    "train_on_csv.sh": r"adapter +│ 0\.",
    "two_domains.py": r"ecommerce: adapter",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_each_example_runs_as_it_stands(name, tmp_path):
    beside_python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{beside_python}:{os.environ['PATH']}"}
    environment["PORT"] = free_port()
    for variable in ("BASE", "REPO"):
        environment.pop(variable, None)
    program = sys.executable if name.endswith(".py") else BASH
    ran = subprocess.run(
        [program, EXAMPLES / name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # about 30 s on a quiet machine
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(SAYS[name], ran.stdout, flags=re.MULTILINE), ran.stdout

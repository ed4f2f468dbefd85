"""What README and docs tell the reader to type works."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from peftrank.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page):
    text = "\n".join(body for _, body in blocks(page)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("peftrank ")]


@pytest.mark.parametrize(
    "line", [line for page in PAGES for line in commands(page)], ids=lambda line: line[:60]
)
def test_every_command_names_options_that_exist(line):
    name, *arguments = shlex.split(line, comments=True)
    command, context = typer.main.get_command(app), None
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, arguments, parent=context)
        rest = [*context._protected_args, *context.args]
        name, command, arguments = command.resolve_command(context, rest)
    command.make_context(name, arguments, parent=context)


def test_make_targets_of_the_readme_exist():
    wanted = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert wanted[:2] == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in wanted:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (snippet,) = [body for language, body in blocks(ROOT / "README.md") if language == "python"]
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("RankedList(slate_id='1', item_ids=('c', 'b')")

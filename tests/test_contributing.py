import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_contributors_page_shows_the_import_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = "\n".join(layers).replace("(", "").replace(")", "")
    assert f"```\n{shown}\n```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

"""The ranks of an adapter as a picture and as a table of its card."""

import sys

import pytest
from test_hub import manifest

from peftrank.card import adapter_card
from peftrank.errors import AdapterError, ConfigError
from peftrank.rank_map import draw_ranks

RANKS = {"10": {"mlp.up_proj": 0, "self_attn.q_proj": 4}, "9": {"mlp.up_proj": 12}, "": {"head": 3}}


@pytest.fixture
def drawn(monkeypatch):
    """What is given to matplotlib."""
    from matplotlib.axes import Axes

    seen = {"texts": []}

    def keep(name, real):
        def kept(self, *args, **options):
            seen[name] = args
            return real(self, *args, **options)

        return kept

    for name in ("imshow", "set_xticks", "set_yticks"):
        monkeypatch.setattr(Axes, name, keep(name, getattr(Axes, name)))
    real = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **o: (seen["texts"].append(s), real(self, x, y, s, **o))
    )
    return seen


def test_layers_are_rows_in_order_and_modules_are_columns(drawn, tmp_path):
    draw_ranks(RANKS, tmp_path / "ranks.png", title="news_1")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert drawn["set_yticks"][1] == ["9", "10", "other"]
    assert drawn["set_xticks"][1] == ["head", "mlp.up_proj", "self_attn.q_proj"]
    values = [[None if v != v else v for v in row] for row in drawn["imshow"][0]]
    assert values == [[None, 12, None], [None, 0, 4], [3, None, None]]
    assert drawn["texts"] == ["12", "0", "4", "3"]


def test_names_with_signs_are_drawn(tmp_path):
    draw_ranks({"": {"$a_{x": 1}}, tmp_path / "a.svg", title="$\\b")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_what_cannot_be_drawn_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot draw .*ranks\.txt"):
        draw_ranks(RANKS, tmp_path / "ranks.txt")
    with pytest.raises(AdapterError, match="3000 layers and 1 modules"):
        draw_ranks({str(i): {"q": i} for i in range(3000)}, tmp_path / "ranks.png")
    with pytest.raises(AdapterError, match="neither lora nor adalora"):
        draw_ranks({}, tmp_path / "ranks.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'peftrank\[report\]'"):
        draw_ranks(RANKS, tmp_path / "ranks.png")
    assert not list(tmp_path.iterdir())


def test_the_command_draws_and_prints(cli, place):
    ran = cli("adapters", "show", "news", "--ranks", "out/ranks.png")
    assert ran.code == 0
    assert '"ranks"' in ran.out
    assert (place / "out" / "ranks.png").stat().st_size > 1000


def test_a_card_has_a_table_where_ranks_differ():
    card = adapter_card(manifest(), peft_config={"r": 12}, ranks=RANKS)
    assert "## Ranks\n\nWhat each module's update has, 19 in all.\n\n" in card
    table = (
        "| layer | head | mlp.up\\_proj | self\\_attn.q\\_proj |\n"
        "|---|--:|--:|--:|\n| 10 |  | 0 | 4 |\n| 9 |  | 12 |  |\n| other | 3 |  |  |\n"
    )
    assert table.replace("mlp.", "mlp\\.").replace("attn.", "attn\\.") in card
    same = {"0": {"q": 4}, "1": {"q": 4}}
    assert "## Ranks" not in adapter_card(manifest(), ranks=same)
    many = {str(i): {"q": i} for i in range(3000)}
    assert "## Ranks" not in adapter_card(manifest(), ranks=many)

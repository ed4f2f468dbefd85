"""Heads for several tasks on one adapter: trained together, resumed, published and ranked with."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from peftrank.config import Config, load_config
from peftrank.doctor import memory_plan
from peftrank.errors import ConfigError
from peftrank.formats.slates import write_slates
from peftrank.losses.bce import bce
from peftrank.losses.listnet import listnet
from peftrank.ranker import Ranker
from peftrank.training import train
from peftrank.training.objective import objective
from peftrank.types import Batch

LOSSES = {"click": {"name": "bce", "weight": 0.5}, "rating": {"name": "mse"}}
READOUT = {"name": "multi_task", "tasks": ["click", "rating"]}


@pytest.fixture
def make_config(tmp_path, make_slate):
    """Returns a maker of configurations; half of the slates have ratings, all have clicks."""

    def make(readout=READOUT, loss=None, **training):
        def slate(i):
            tasks = {"click": (1.0, 0.0, None, 1.0)}
            if i % 2:
                tasks["rating"] = (4.0, None, 1.0, 2.0)
            return replace(make_slate(seed=i, user_id=f"u{i % 2}"), tasks=tasks)

        files = {}
        for part, seeds in (("train", range(6)), ("valid", (7, 8))):
            files[part] = tmp_path / "data" / f"{part}.jsonl"
            write_slates(files[part], [slate(i) for i in seeds])
        defaults = {"max_steps": 4, "batch_size": 3, "eval_steps": 4, "learning_rate": 1e-2}
        return Config.model_validate(
            {
                "domain": "demo",
                "base": {"name": "tiny", "quantization": "none"},
                "method": {"name": "lora", "r": 2},
                "readout": readout,
                "loss": {"tasks": LOSSES} if loss is None else loss,
                "data": files,
                "training": {**defaults, **training},
            }
        )

    return make


def made_batch(tasks, mask, **more):
    unused = torch.zeros(2, 3, dtype=torch.long)
    return Batch(
        **{name: unused for name in Batch.__dataclass_fields__ if name in _PLACES},
        mask=mask,
        tasks=tasks,
        **more,
    )


_PLACES = "input_ids position_ids segment_ids ancestors row end start stop before trunk".split()


@pytest.mark.parametrize("uncertainty", [False, True])
def test_tasks_add_up_over_what_is_known(make_config, uncertainty):
    nan = math.nan
    mask = torch.tensor([[True, True, True], [True, True, False]])
    clicks = torch.tensor([[1.0, nan, 0.0], [nan, nan, nan]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    weights = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 0.0]])
    batch = made_batch(clicks[..., None], mask, labels=labels, weights=weights)
    scores = {
        "rank": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "click": torch.tensor([[0.3, 9.0, -0.2], [5.0, 5.0, 5.0]]),
    }
    config = make_config(
        readout={"name": "multi_task", "tasks": ["click"]},
        loss={"weight": 2.0, "tasks": {"click": {"name": "bce", "weight": 0.5}}},
    )
    variance = torch.tensor([0.7, -0.4]) if uncertainty else None
    found = objective(config)(scores, batch, None, variance)
    ranking = listnet(scores["rank"], labels, mask, weights)
    known = torch.tensor([[True, False, True]])
    click = bce(scores["click"][:1], torch.tensor([[1.0, 0.0, 0.0]]), known)
    if uncertainty:
        ranking = ranking * math.exp(-0.7) + 0.35
        click = click * math.exp(0.4) - 0.2
    expected = 2.0 * ranking + 0.5 * torch.cat([click, torch.zeros(1)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("uncertainty", [False, True])
def test_tasks_train_resume_publish_and_rank(tiny_decoder, make_config, tmp_path, uncertainty):
    score = {"rank": 1.0, "rating": 0.5}
    config = make_config(
        {**READOUT, "score": score, "uncertainty": uncertainty}, checkpoint_steps=2
    )
    path = train(config, output=tmp_path / "out", base=tiny_decoder)
    (run,) = (tmp_path / "out" / "demo" / ".runs").iterdir()
    again = train(config, output=tmp_path / "out", base=tiny_decoder, resume=run / "checkpoint-2")
    a, b = (load_file(p / "readout.safetensors") for p in (path, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert ("log_variance" in a) == uncertainty
    if uncertainty:
        assert bool((a["log_variance"] != 0).all())
    with Ranker(tiny_decoder) as ranker:
        ranker.load_adapter(path)
        slate = json.loads((tmp_path / "data" / "valid.jsonl").read_text().splitlines()[0])
        assert slate["tasks"]["click"] == [1.0, 0.0, None, 1.0]
        (best,) = ranker.rank(
            [s for s in _read(tmp_path / "data" / "valid.jsonl")][:1], domain="demo"
        )
        assert len(best.item_ids) == 4


def _read(path):
    from peftrank.formats.slates import read_slates

    return read_slates(path)


def test_every_head_learns_its_own_task(tiny_decoder, make_config, tmp_path):
    from peftrank.training.loop import _optimize
    from peftrank.training.run import passes, start

    config = make_config(max_steps=60, batch_size=6, readout_learning_rate=0.05)
    run = start(config, tmp_path / "run", tiny_decoder)
    try:
        for _ in range(60):
            _optimize(run, run.train)
            run.step += 1
        ((slates, batch),) = passes(run, run.train)
        with torch.no_grad():
            heads = run.model.by_task(batch)
    finally:
        run.adapted.unload()
    for s, slate in enumerate(slates):
        click, rating = slate.tasks["click"], slate.tasks.get("rating", ())
        assert [bool(x > 0) for x in heads["click"][s]][:2] == [True, False]
        assert click[2] is None
        for value, known in zip(heads["rating"][s].tolist(), rating, strict=False):
            assert known is None or abs(value - known) < 1.0


@pytest.mark.parametrize(
    ("readout", "loss", "message"),
    [
        (READOUT, {}, r"readout\.tasks has click, rating and loss\.tasks none"),
        ({"name": "score_head"}, {"tasks": LOSSES}, r"readout\.tasks has none and loss\.tasks cl"),
        (
            {"name": "multi_task", "tasks": ["clik"]},
            {"tasks": {"clik": {"name": "bce"}}},
            r"no training slate has a value of the task 'clik' \(did you mean 'click'\?\)",
        ),
        (
            {"name": "multi_task", "tasks": ["click"]},
            {"tasks": {"click": {"name": "softmax_dpo"}}},
            r"loss\.tasks\.click is 'softmax_dpo', which compares with a frozen reference",
        ),
    ],
)
def test_heads_and_losses_that_do_not_fit_are_refused(
    tiny_decoder, make_config, tmp_path, readout, loss, message
):
    with pytest.raises(ConfigError, match=message):
        train(make_config(readout, loss), output=tmp_path / "out", base=tiny_decoder)


def test_options_of_a_tasks_loss_are_checked_and_doctor_plans_the_heads(workplace):
    settings = {
        "base": {"name": str(workplace / "base"), "quantization": "none"},
        "method.layers": "all",
        "readout": {"name": "multi_task", "tasks": ["click"]},
        "loss.tasks": {"click": {"name": "bce", "positive_above": 3}},
        "data": {p: str(workplace / "data" / f"{p}.jsonl") for p in ("train", "valid")},
    }
    config = load_config(domain="news", method="lora", overrides=settings)
    assert memory_plan(config).activations > 0
    with pytest.raises(ConfigError, match=r"'positive_abov'.*did you mean 'positive_above'"):
        load_config(
            domain="news",
            overrides={**settings, "loss.tasks": {"click": {"name": "bce", "positive_abov": 3}}},
        )

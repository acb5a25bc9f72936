"""The adapting command, small: budgets are kept, every method runs, and the model before is kept."""

import io
from functools import partial

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import decoder
from experiments.adapt import __main__ as adapt
from experiments.adapt import language, method
from experiments.adapt.config import METHODS, Config
from experiments.adapt.task import Task
from experiments.paper import start
from experiments.paper.problem import Sizes
from experiments.paper.sizes import SIZES
from flora_jax.chain.plan import tree_bytes
from tests.helpers import often

SMALL = dict(
    model=decoder.Shape(width=64, layers=1, heads=2),
    batch=2,
    length=16,
    steps=2,
    base_steps=2,
    rounds=1,
    rates=(0.002,),
    budget=0.4,
)


def run(folder, **changes):
    config = Config(**{**SMALL, "base": folder / "base.safetensors", **changes})
    console = Console(file=io.StringIO(), width=140)
    before, rows = adapt.compare(config, console)
    adapt.show(config, before, rows, console)
    return before, rows, console.file.getvalue()


@pytest.mark.long
def test_the_table(tmp_path):
    methods = ("full", "flora", "lora", "xgb-lora")
    before, rows, shown = run(tmp_path, methods=methods)
    assert tuple(row["method"] for row in rows) == methods
    for row in rows:
        assert row["loss"] != before and row["seconds"] > 0 and row["method"] in shown
        if row["method"] != "full":
            assert row["rank"] > 0 and row["extra"] <= 0.4 * 2**20
        assert row["trained"] > 0
    by_name = {row["method"]: row for row in rows}
    assert by_name["lora"]["trained"] < by_name["full"]["trained"]
    # Adam: the factors, and two numbers for each
    assert by_name["lora"]["extra"] == 3 * 4 * by_name["lora"]["trained"] + 8


def small_task(config):
    model = decoder.model(config.model)
    windows = jax.random.randint(jax.random.key(1), (2, 17), 0, 256)
    params = model.init(jax.random.key(0), windows)["params"]
    loss = partial(decoder.loss, model)
    return Task(
        params, loss, lambda step: windows, partial(loss, batch=windows), lambda params: {}, 64, 2, 2, None, ""
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    often(sorted(set(METHODS) - {"full", "flora", "lora", "xgb-lora"}), "lora-pro"),
)
def test_a_step_of_each_other_method(name):
    """It lowers the loss of the batch that it saw."""
    config = Config(**SMALL)
    task = small_task(config)
    run = method.build(config, task, name, 4, 0.002)
    step = jax.jit(run.step)
    state = run.state
    losses = []
    for i in (1, 1, 1):
        state, loss = step(task.params, state, jax.numpy.int32(i), task.batch(i))
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_the_largest_rank_of_a_budget():
    """One rank more does not fit."""
    config = Config(**{**SMALL, "budget": 0.15})
    task = small_task(config)
    rank = method.largest_rank(config, task, "lora")

    def extra(rank):
        return method.build(config, task, "lora", rank, 0.1).extra

    assert extra(rank) <= 0.15 * 2**20 < extra(rank + 1)
    assert tree_bytes(task.params) > 0.15 * 2**20
    with pytest.raises(ValueError, match=r"budget must be at least .* MiB for lora, found 0.001"):
        method.largest_rank(Config(**{**SMALL, "budget": 0.001}), task, "lora")


@pytest.mark.long
def test_methods_summarise(tmp_path, monkeypatch):
    small = Sizes("T5-test", (16, 8), 2, 2, 2, held_out=4, warm=2)
    monkeypatch.setitem(SIZES["cpu"], "summarisation", small)
    monkeypatch.setattr(start, "STARTS", tmp_path / "starts")
    methods = ("full", "flora", "deep-lora", "lorta", "xgb-lora")  # that look at names and shapes
    before, rows, shown = run(tmp_path, task="summarisation", methods=methods, budget=3.0)
    assert tuple(row["method"] for row in rows) == methods
    for row in rows:
        assert np.isfinite(row["loss"]) and row["loss"] != before
        assert set(row["figures"]) == {"rouge1", "rouge2", "rougeL"}
        assert row["method"] == "full" or 0 < row["extra"] <= 3 * 2**20
    assert "rougeL" in shown and "docstrings" in shown


def test_a_model_of_another_shape(tmp_path):
    config = Config(**SMALL, base=tmp_path / "base.safetensors")
    console = Console(file=io.StringIO())
    language.base(config, console)
    other = Config(
        **{**SMALL, "model": decoder.Shape(width=32, layers=1, heads=2)}, base=config.base
    )
    with pytest.raises(ValueError, match=r"must be of shape \(\d+, 32\), found \(\d+, 64\)"):
        language.base(other, console)


def test_a_number_that_is_too_small():
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        Config(steps=0)

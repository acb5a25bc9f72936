"""The adapting command, small: budgets are kept, every method runs, and the model before is kept."""

import io

import jax
import pytest
from rich.console import Console

from experiments import adapt
from experiments.models import decoder
from flora_jax.plan import tree_bytes

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
    config = adapt.Config(**{**SMALL, "base": folder / "base.safetensors", **changes})
    console = Console(file=io.StringIO(), width=140)
    before, rows = adapt.compare(config, console)
    adapt.show(config, before, rows, console)
    return before, rows, console.file.getvalue()


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "method", sorted(set(adapt.METHODS) - {"full", "flora", "lora", "xgb-lora"})
)
def test_a_step_of_each_other_method(method):
    """It lowers the loss of the batch that it saw."""
    config = adapt.Config(**SMALL)
    model = decoder.Decoder(config.model)
    windows = jax.random.randint(jax.random.key(1), (2, 17), 0, 256)
    params = model.init(jax.random.key(0), windows)["params"]
    run = adapt.build(config, method, 4, 0.002, params, windows)
    step = jax.jit(run.step)
    state = run.state
    losses = []
    for i in (1, 1, 1):
        state, loss = step(params, state, jax.numpy.int32(i), windows)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_the_largest_rank_of_a_budget(tmp_path):
    """One rank more does not fit."""
    config = adapt.Config(**{**SMALL, "budget": 0.15})
    model = decoder.Decoder(config.model)
    tokens = jax.numpy.zeros((2, 17), jax.numpy.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    rank = adapt.largest_rank(config, "lora", params, tokens)

    def extra(rank):
        return adapt.build(config, "lora", rank, 0.1, params, tokens).extra

    assert extra(rank) <= 0.15 * 2**20 < extra(rank + 1)
    assert tree_bytes(params) > 0.15 * 2**20
    with pytest.raises(ValueError, match=r"budget must be at least .* MiB for lora, found 0.001"):
        adapt.largest_rank(adapt.Config(**{**SMALL, "budget": 0.001}), "lora", params, tokens)


def test_a_model_of_another_shape(tmp_path):
    config = adapt.Config(**SMALL, base=tmp_path / "base.safetensors")
    console = Console(file=io.StringIO())
    adapt.base(config, console)
    other = adapt.Config(
        **{**SMALL, "model": decoder.Shape(width=32, layers=1, heads=2)}, base=config.base
    )
    with pytest.raises(ValueError, match=r"must be of shape \(\d+, 32\), found \(\d+, 64\)"):
        adapt.base(other, console)


def test_a_number_that_is_too_small():
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        adapt.Config(steps=0)

"""The comparison with baselines has its grid, ratios and sentences; the docs are made from its record.

Nothing is timed, no baseline of torch and no libtpu is needed.
"""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import text
from experiments.bench import exponents, growth, setting
from experiments.bench.baselines import in_jax, in_torch, methods, page, worker
from experiments.bench.baselines.__main__ import Config, Log, figures, next_rate
from flora_jax.chain.plan import tree_bytes
from flora_jax.models import decoder

SIZE = methods.Size(width=128, layers=1, batch=2, length=16, rank=8, accumulation=2)


def record():
    """MultiSteps, Flora, a baseline that is worse in all, one that is better in state and loss, one absent."""

    def timed(micro, optimizer_step, state, peak):
        return {
            "micro_ratio": micro,
            "optimizer_step_ratio": optimizer_step,
            "micro_range": [micro, micro],
            "optimizer_step_range": [optimizer_step, optimizer_step],
            **{"micro": micro, "optimizer_step": optimizer_step, "first_optimizer_step": 1.0},
            **{"state": state, "peak": peak},
        }

    return {
        "machine": {"cores": 2, "note": "", "versions": {"galore-torch": "1.0"}},
        "absent": {"torch-apollo": "apollo-torch is not installed (extra `baselines`)"},
        "time": {
            "setting": {**dataclasses.asdict(methods.Size()), "rounds": 5, "cores": 1},
            "methods": {
                "multisteps": timed(1.0, 1.0, 1000, 2000),
                "flora": {**timed(0.5, 0.8, 100, 1000), "sample": 0.1, "sample_share": 0.2},
                "galore": timed(1.2, 1.5, 1500, 2500),
                "torch-galore": timed(2.0, 3.0, 50, 1500),
            },
        },
        "loss": {
            "setting": {},
            "methods": {
                "multisteps": {"0": {"0.03": 2.0, "0.06": 2.5}, "1": {"0.03": 4.0}},
                "flora": {"0": {"0.03": 2.0, "0.06": 1.9}, "1": {"0.06": 3.92}},
                "galore": {"0": {"0.01": 2.5, "0.02": None}, "1": {"0.01": None}},
                "torch-galore": {"0": {"0.01": 1.5}},
            },
        },
        "tpu": {
            "setting": {},
            "methods": {"multisteps": {"gib": 4.0}, "flora": {"gib": 1.0}, "galore": {"gib": None}},
        },
    }


def test_the_table():
    lines = page.table(record()).splitlines()[2:]
    assert lines == [
        "| MultiSteps + Adafactor (optax) | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.000 (1.000 to 1.000) |",
        "| **Flora, fused, advised** | 0.500 | 0.800 | 0.100 | 0.500 | 0.250 | 0.965 (0.950 to 0.980) |",
        "| MultiSteps + GaLore (optax.contrib) | 1.20 | 1.50 | 1.50 | 1.25 | – | 1.250 (1.250 to 1.250) |",
        "| torch: galore-torch 1.0 | 2.00 | 3.00 | 0.050 | 0.750 | – | 0.750 (0.750 to 0.750) |",
        "| torch: apollo-torch | apollo-torch is not installed (extra `baselines`) |  |  |  |  |  |",
    ]


def test_a_baseline_that_is_better_is_named():
    ours = "*Flora, fused, advised*"
    assert page.verdict(record()).splitlines() == [
        f"- {ours}: 1 of 3 baselines have at most its loss (to 2%). Of these faster or smaller in "
        "something: torch: galore-torch 1.0 (state).",
        f"- No baseline has less time in a micro-step than {ours}.",
        f"- No baseline has less time in an optimizer step than {ours}.",
        f"- Less state than {ours}, as a share of its own: torch: galore-torch 1.0 0.50.",
        f"- No baseline has less peak memory on the CPU than {ours}.",
        f"- No baseline has less HBM of a TPU than {ours}.",
        f"- Less loss than {ours}, as a share of its own: torch: galore-torch 1.0 0.78.",
    ]


def test_a_baseline_of_equal_loss_that_is_worse_is_not():
    changed = record()
    changed["time"]["methods"]["torch-galore"]["state"] = 101
    assert page.verdict(changed).splitlines()[0].endswith("smaller in something: none.")


def test_the_page_has_every_rate_and_the_share_of_sampling():
    found = page.full(record())
    assert (
        "| MultiSteps + GaLore (optax.contrib) | 0.01: 2.500, 0.02: not finite | not finite |"
        in found
    )
    assert "| Flora, fused, advised | 0.03: 2.000, 0.06: 1.900 | 3.920 |" in found
    # four micro-steps, the last an optimizer step, sample five times in 3 * 0.5 + 0.8 seconds
    assert "| Flora, fused, advised | 100.00 | 0.200 | 0.217 |" in found
    assert "medians of 5 interleaved rounds" in found and "2 cores, 1 for each process" in found


def test_the_docs_are_made_from_the_record():
    kept = json.loads(page.RECORD.read_text())
    assert page.full(kept, page.growth_text()) == page.PAGE.read_text()
    assert {"multisteps", "flora"} <= set(kept["time"]["methods"]) & set(kept["loss"]["methods"])


def test_pictures(tmp_path):
    page.picture(record(), tmp_path / "baselines")
    assert "<svg" in (tmp_path / "baselines.svg").read_text()
    assert (tmp_path / "baselines.png").stat().st_size > 1000


def test_ratios_are_of_the_same_round():
    """The machine is three times slower in the last round; the first one compiles."""

    def rounds(micro, optimizer_step, sample=None):
        factors = (50, 1, 1, 3)
        return [
            {
                "micro": [micro * f, micro * f],
                "optimizer_step": optimizer_step * f,
                "sample": sample and sample * f,
            }
            for f in factors
        ]

    found = figures(rounds(2.0, 6.0, 0.5), rounds(4.0, 4.0))
    assert found["micro_ratio"] == 0.5 and found["micro_range"] == [0.5, 0.5]
    assert found["optimizer_step_ratio"] == 1.5 and found["micro"] == 2.0
    assert found["sample_share"] == 0.25 and found["first_optimizer_step"] == 300.0
    assert "sample" not in figures(rounds(1.0, 1.0), rounds(1.0, 1.0))


def tried(losses, wider=2):
    """The rates that the grid asks for until it ends; `losses` gives the loss of a rate."""
    found = {}
    while (rate := next_rate(0.01, (0.5, 1.0, 2.0), found, wider)) is not None:
        found[rate] = losses(rate)
    return list(found)


def test_the_grid_grows_while_the_best_is_at_its_edge():
    assert tried(lambda rate: abs(math.log(rate / 0.01))) == [0.005, 0.01, 0.02]
    assert tried(lambda rate: abs(math.log(rate / 0.04)), 5) == [0.005, 0.01, 0.02, 0.04, 0.08]
    assert tried(lambda rate: rate) == [0.005, 0.01, 0.02, 0.0025, 0.00125]
    assert tried(lambda rate: math.inf if rate > 0.004 else 1.0, 1) == [0.005, 0.01, 0.02, 0.0025]


def test_results_of_another_setting_are_not_taken(tmp_path):
    log = Log(tmp_path / "results.jsonl")
    log.add("loss", {"width": 128}, method="flora", rate=0.1, loss=2.0)
    log.add("loss", {"width": 256}, method="flora", rate=0.1, loss=1.0)
    again = Log(tmp_path / "results.jsonl")
    assert [x["loss"] for x in again.find("loss", {"width": 256})] == [1.0]
    assert again.find("time", {"width": 256}) == []


def test_a_package_that_is_not_there(monkeypatch, tmp_path):
    absent = methods.Method("nobody", "torch", 0.1, ("no-such-package",))
    monkeypatch.setitem(methods.METHODS, "nobody", absent)
    with pytest.raises(worker.Failed, match=r"^no-such-package is not installed"):
        worker.Worker("nobody", SIZE, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(only=("adam",)), "only must name some of multisteps, .*, found 'adam'"),
        (dict(rounds=0), "rounds must be at least 1, found 0"),
        (dict(rates=(0.0,)), "rates must be some positive numbers"),
        (dict(cores=10**6), "cores must be from 0 to .*, found 1000000"),
    ],
)
def test_wrong_arguments(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(width=64), "width must be at least 128, found 64"),
        (dict(width=200), "width must be a multiple of 16, found 200"),
        (dict(accumulation=1), "accumulation must be at least 2, found 1"),
        (dict(rank=500), "rank must be at most the width 256, found 500"),
    ],
)
def test_wrong_sizes(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        methods.Size(**wrong)


def test_bytes_of_a_trace_at_its_worst_moment():
    sizes = [100, 50, -100, 70, 10, -130]
    events = [
        {"name": "[memory]", "ts": i, "args": {"Bytes": size}} for i, size in enumerate(sizes)
    ]
    events.insert(2, {"name": "aten::mm", "ts": 1.5, "args": {}})
    assert in_torch.largest_sum(events[::-1]) == 150
    assert in_torch.largest_sum(events[1:2]) == 50


def test_both_worlds_begin_from_the_same_weights(tmp_path):
    """The checkpoint's weights, each layer on its own, give the loss of the stacked model that they were made from."""
    in_jax.save(tmp_path / "weights", SIZE)
    params = in_jax.load(tmp_path / "weights")
    windows = SIZE.windows(text.load(), 0)
    stacked = setting.small(SIZE.width, SIZE.layers, dtype=jnp.float32)
    first = jax.jit(stacked.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    model, shapes = in_jax.outline(SIZE)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    of_stacked, of_each = (jax.jit(partial(decoder.loss, one)) for one in (stacked, model))
    np.testing.assert_allclose(of_each(params, windows), of_stacked(first, windows), rtol=1e-5)


def test_state_bytes():
    """Counted by hand: width 128, one layer, rank 8; Adafactor factors what has 128 rows and columns."""
    wide, square, ends, norms = 3 * 128 * 512, 4 * 128 * 128, 2 * 256 * 128, 3 * 128
    factors = 3 * (128 + 512) + 4 * (128 + 128) + 2 * (256 + 128)
    numbers = wide + square + ends + norms
    # of a factored weight a scalar stands where its uncompressed moment would be, and of others two for its factors
    scalars = 9 + 2 * 3
    counts = {"multisteps": 0, "flora": 0, "flora-larger": 0}
    for key in counts:
        tx, _ = in_jax.build(key, SIZE, 0.0, 10)
        counts[key] = tree_bytes(jax.eval_shape(tx.init, in_jax.outline(SIZE)[1]))
    expected = 4 * (numbers + factors + norms + scalars)
    assert 0 <= counts["multisteps"] - expected <= 32  # and counts of steps
    # embedding, head and norms, and Adafactor's moments of them
    uncompressed = ends + norms + 2 * (256 + 128) + norms + 2 + 3 * 2
    for key, wide in (("flora-larger", 3 * 128), ("flora", 2 * 512 + 128)):  # sides that are kept
        expected = 4 * (8 * (wide + 4 * 128) + uncompressed)
        assert 0 <= counts[key] - expected <= 80


def test_int4_at_eight_times_the_rank_has_no_more_bytes():
    sizes = {}
    for key in ("flora", "flora-int4"):
        tx, _ = in_jax.build(key, SIZE, 0.0, 10)
        sizes[key] = tree_bytes(jax.eval_shape(tx.init, in_jax.outline(SIZE)[1]))
    assert 0.3 * sizes["flora"] < sizes["flora-int4"] < sizes["flora"]


def test_weights_in_int8(tmp_path):
    """The matrices inside the layers are in int8, the run learns, and its loss is that of the weights they stand for."""
    in_jax.save(tmp_path / "weights", SIZE)
    run = in_jax.Run("exact-int8", SIZE, tmp_path / "weights", optimizer_steps=10)
    corpus = text.load()
    run.reset(0.03, tmp_path / "weights")
    numbers = [x for x in jax.tree.leaves(run.params) if x.dtype == jnp.int8]
    assert sum(x.size for x in numbers) == 3 * 128 * 512 + 4 * 128 * 128
    first = run.evaluate(SIZE.windows(corpus, 0))
    losses = [run.step(SIZE.windows(corpus, 0)) for _ in range(10)]
    assert losses[0] == pytest.approx(first, rel=1e-3)
    assert run.evaluate(SIZE.windows(corpus, 0)) < losses[0] - 0.1


def test_flops_of_a_gradient():
    """A fused gradient has for each weight and token two of the three products, and thin ones."""
    tokens = SIZE.batch * SIZE.length
    inner = 3 * 128 * 512 + 4 * 128 * 128 + 256 * 128
    assert 4 * inner * tokens < growth.gradient_flops(SIZE) < 0.9 * 6 * inner * tokens


def test_exponents():
    xs = [1, 2, 4, 8]
    assert exponents.exponent(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    middle = {"middle": dataclasses.asdict(SIZE)}
    lines = [
        {
            **{"axis": "width", "x": x, "method": key, "setting": middle},
            **{"state": x**power, "flops": 5.0 - 1e-9 * x, "sent": 0},
        }
        for x in xs
        for key, power in (("multisteps", 2), ("flora", 1))
    ]
    found = exponents.text(lines)
    assert "| width | state, bytes | 2.00 | 1.00 | – | – |" in found
    assert "| width | FLOPs of a cycle | 0.00 | 0.00 | – | – |" in found
    assert "sent" not in found and "around width 128, 1 layers, rank 8" in found

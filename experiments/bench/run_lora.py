"""This command times LoRA's step in each order of its products, and in the one that RunLoRA chooses.

    python -m experiments.bench.run_lora

It measures one product with its backward pass, by its own formula of FLOPs and by the clock, and then a LLaMA of few
layers. Figures are ratios to plain LoRA; times are medians of runs in turn, in one process.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments import report
from experiments.bench import setting
from flora_jax import Projection
from flora_jax.adapters import lora, run_lora
from flora_jax.adapters.run_lora import ORDERS, Order, cheapest, flops, multiply
from flora_jax.models import decoder


@dataclass(frozen=True)
class Config:
    """Shapes of the product, and sizes of the model."""

    tokens: tuple[int, ...] = (64, 1024)
    """Numbers of tokens of the one product."""
    width: int = 512
    """Width of the product's weight and of the model."""
    ranks: tuple[int, ...] = (8, 256)
    """Ranks of LoRA."""
    layers: int = 4
    """Number of layers of the model."""
    batch: int = 8
    """Number of windows of the model."""
    length: int = 128
    """Number of tokens in a window."""
    rounds: int = 9
    """Number of timed rounds, after one that compiles."""
    out: Path | None = None
    """A file to write the tables to."""


def seconds(functions: dict[Any, Any], rounds: int) -> dict[Any, float]:
    """Gives the median seconds of compiled functions without arguments, run in turn."""
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, run in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def products(config: Config) -> list[tuple[str, ...]]:
    """Gives the rows of the table of one product."""
    rows = []
    for tokens in config.tokens:
        for rank in config.ranks:
            shape = (tokens, config.width, config.width, rank)
            random = np.random.default_rng(0)

            def normal(*lengths, random=random):
                return jnp.asarray(random.standard_normal(lengths), jnp.float32)

            x, w = normal(tokens, config.width), normal(config.width, config.width)
            down, up = normal(config.width, rank), normal(rank, config.width)

            def step(product, x=x, w=w, down=down, up=up):
                def both(x, down, up):
                    y, pull = jax.vjp(lambda x, down, up: product(x, w, down, up), x, down, up)
                    return pull(y)

                return partial(jax.jit(both), x, down, up)

            runs: dict[Any, Any] = {order: step(partial(multiply, order)) for order in ORDERS}
            runs["plain"] = step(lambda x, w, down, up: x @ w + (x @ down) @ up)
            times = seconds(runs, config.rounds)
            choice = cheapest(*shape)
            best = min(ORDERS, key=times.__getitem__)

            def ratio(order: Order, shape=shape) -> float:
                return sum(flops(order, *shape)) / sum(flops(Order(), *shape))

            rows.append(
                (
                    " x ".join(map(str, shape)),
                    _name(choice),
                    f"{ratio(choice):.3f}",
                    f"{times[choice] / times['plain']:.3f}",
                    _name(best),
                    f"{times[best] / times['plain']:.3f}",
                )
            )
    return rows


def models(config: Config) -> list[tuple[str, ...]]:
    """Gives the rows of the table of a model's gradient.

    Plain LoRA is computed as it is written, with the axes of the batch in its products, and the same order on matrices.
    What RunLoRA gains over the second comes from its choice of orders alone.
    """
    model = setting.small(config.width, config.layers, dtype=jnp.float32, remat=False)
    windows = jnp.asarray(
        np.random.default_rng(0).integers(0, 256, (config.batch, config.length + 1)), jnp.int32
    )
    params = jax.jit(model.init)(jax.random.key(0), windows[:, :8])["params"]
    loss = partial(decoder.loss, model)
    rows = []
    for rank in config.ranks:
        adapter = lora(Projection(rank, side="input", embedding="whole"))
        own = adapter.init(jax.random.key(1), params)
        runs, held = {}, {}
        methods = {"plain": adapter, "split": run_lora(adapter, Order()), "run": run_lora(adapter)}
        for name, method in methods.items():
            gradient = jax.jit(jax.grad(method.apply(loss), argnums=1))
            compiled = gradient.lower(params, own, windows).compile()
            memory = compiled.memory_analysis()
            assert memory is not None, "XLA gives no memory analysis on this backend"
            held[name] = memory.temp_size_in_bytes
            runs[name] = partial(compiled, params, own, windows)
        times = seconds(runs, config.rounds)
        rows.append(
            (
                str(rank),
                f"{times['plain']:.3f}",
                f"{times['split'] / times['plain']:.3f}",
                f"{times['run'] / times['plain']:.3f}",
                f"{held['run'] / held['plain']:.3f}",
            )
        )
    return rows


def _name(order: Order) -> str:
    """Gives the initials of the order's four ways."""
    return "".join(way[0] for way in order)


def main(config: Config) -> None:
    heads = ["tokens x in x out x rank", "chosen", "FLOPs", "time", "fastest", "time of that"]
    title = "One product, forward and backward; ratios to plain LoRA; s(plit), m(erged)"
    first = report.table(title, heads, products(config))
    heads = ["rank", "LoRA, s", "on matrices, split", "RunLoRA", "its temporaries"]
    tokens = f"{config.batch} x {config.length} tokens"
    title = f"Gradient of a LLaMA, width {config.width}, {config.layers} layers, {tokens}"
    tables = (first, report.table(title, heads, models(config)))
    Console(width=100).print(*tables)
    if config.out:
        with config.out.open("w") as file:
            Console(file=file, width=100).print(*tables)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

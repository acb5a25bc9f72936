"""Bytes of HBM that one training step takes, by method, compiled for TPU chips.

    python -m experiments.bench.memory                  # LLaMA-7B, some ten minutes on two cores
    python -m experiments.bench.memory --model LLaMA-13B --chips 2
    python -m experiments.bench.memory --model T5-3B --length 512
    python -m experiments.bench.memory --model GPT-2-XL --length 1024

One program does the micro-step and, every 16th time, the boundary. bfloat16 parameters, layers
under `scan` with remat. What does not fit a v5e chip is compiled for a v5p one (95 GiB), to say how
much it needs. Exact: the figures are the compiler's. LoRA trains adapters of the same rank on every
weight of the layers with Adam. GaLore is `optax.contrib.galore` on each layer of a stack, over 16
accumulated micro-steps, its SVD left out, which libtpu had not compiled after twelve minutes: what it takes at least.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import galore
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import topology
from flora_jax import Projection
from flora_jax.adapters import Adapter, lora
from flora_jax.models import families, gpt2, llama, t5
from flora_jax.models.config import NAMED
from flora_jax.update.ordinary_step import ordinary_step

STEPS = 16
LANGUAGE = (*llama.SHAPES, *gpt2.SHAPES, *t5.SHAPES)


@dataclass(frozen=True)
class Config:
    """What to compile."""

    model: Literal[LANGUAGE] = "LLaMA-7B"  # type: ignore[valid-type]
    length: int = 2048
    batch: int = 1
    chips: int = 1
    """Chips over which every weight is cut along its largest axis that they divide."""
    only: str = ""
    """Only the methods whose name has this in it."""
    out: Path | None = None
    """A file for the table."""


def flora(rank: int, fused: bool = True):
    """The step of Flora on the fused route, or on the ordinary one."""

    def build(loss: Callable):
        projection = flora_jax.Projection(rank, distribution="srht", resample_every=STEPS)
        tx = flora_jax.flora(1e-3, projection=projection, accumulation_steps=STEPS)
        if fused:
            step: Any = flora_jax.make_train_step(loss, tx, projection)
            return tx, step.lower
        return tx, ordinary_step(loss, tx).lower

    return build


def multisteps(inner: optax.GradientTransformation):
    def build(loss: Callable):
        tx = optax.MultiSteps(inner, STEPS).gradient_transformation()
        return tx, ordinary_step(loss, tx).lower

    return build


def layered(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on each layer of a stack as on a weight of its own; for those that know no batch axes."""
    each = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))

    def label(params: Any) -> Any:
        return jax.tree.map(lambda x: "each" if x.ndim == 3 else "all", params)

    return optax.multi_transform({"each": each, "all": tx}, label)


def without_svd(build: Callable):
    """Compiled with zeros in the place of singular vectors."""

    def singular(matrix: jax.Array, full_matrices: bool = False):
        rank = min(matrix.shape)
        shapes = (matrix.shape[0], rank), (rank,), (rank, matrix.shape[1])
        return tuple(jnp.zeros(shape, matrix.dtype) for shape in shapes)

    def patched(loss: Callable):
        tx, lower = build(loss)

        def lowered(*args: Any):
            with mock.patch.object(jnp.linalg, "svd", singular):
                return lower(*args)

        return tx, lowered

    return patched


def adapted(adapter: Adapter):
    """An adapter's parameters, trained by Adam; the weights are frozen."""

    def build(loss: Callable):
        tx, run = optax.adam(1e-3), adapter.apply(loss)
        step = ordinary_step(lambda own, frozen, windows: run(frozen, own, windows), tx)

        def init(params: Any):
            return tx.init(params[1])

        def lower(params: Any, state: Any, windows: Any):
            frozen, own = params
            return step.lower(own, state, frozen, windows)

        return optax.GradientTransformation(init, tx.update), lower

    return build


LORA = lora(Projection(128, side="input", select=lambda path, shape: "layers" in path))
WITH_LORA = adapted(LORA)
METHODS = {
    "Flora, born compressed, rank 128": flora(128),
    "Flora, born compressed, rank 256": flora(256),
    "Flora, ordinary gradients, rank 128": flora(128, fused=False),
    "MultiSteps + Adafactor": multisteps(optax.adafactor(1e-3)),
    "MultiSteps + GaLore, rank 128, at least": without_svd(
        multisteps(layered(galore(1e-3, rank=128)))
    ),
    "LoRA + Adam, rank 128": WITH_LORA,
}


def largest_axis(shape: tuple[int, ...], chips: int) -> PartitionSpec:
    axes = [axis for axis, length in enumerate(shape) if length % chips == 0 and axis > 0]
    if chips == 1 or not axes:
        return PartitionSpec()
    best = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*("data" if axis == best else None for axis in range(len(shape))))


def measure(config: Config, build, chip: str) -> topology.Program | None:
    model = families.module(NAMED[config.model])
    mesh = topology.mesh(chip, (config.chips,))

    def cut(tree):
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, largest_axis(x.shape, config.chips)), tree
        )
        return topology.placed(tree, shardings)

    tx, lower = build(families.loss(model))
    params = families.outline(model)
    if build is WITH_LORA:
        params = (params, jax.eval_shape(partial(LORA.init, jax.random.key(0)), params))
    state = jax.eval_shape(tx.init, params)
    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
    everywhere = NamedSharding(mesh, PartitionSpec())
    lowered = lower(cut(params), cut(state), topology.placed(windows, everywhere))
    return topology.compile_(lowered)


def main(config: Config) -> None:
    rows = []
    for name, build in METHODS.items():
        if config.only not in name:
            continue
        program = measure(config, build, "v5e")
        fits = "yes" if program else "no"
        program = program or measure(config, build, "v5p")
        gib = f"{program.gib:.2f}" if program else "over 95"
        seconds = f"{program.seconds:.0f}" if program else "-"
        rows.append((name, gib, fits, seconds))
        Console().print(*rows[-1])
    heads = ["method", "GiB a chip", f"fits {topology.HBM} GiB", "seconds to compile"]
    title = (
        f"{config.model}, {config.batch} x {config.length} tokens, all parameters but LoRA's, "
        f"{config.chips} TPU v5e"
    )
    table = report.table(title, heads, rows)
    Console(width=110).print(table)
    if config.out:
        with config.out.open("w") as file:
            Console(file=file, width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))

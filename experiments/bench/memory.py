"""This command compiles one training step of each method for TPU chips, and says how many bytes of HBM it takes.

    python -m experiments.bench.memory                  # LLaMA-7B, some ten minutes on two cores
    python -m experiments.bench.memory --model LLaMA-13B --chips 2
    python -m experiments.bench.memory --model T5-3B --length 512
    python -m experiments.bench.memory --model GPT-2-XL --length 1024

One program does the micro-step and, every 16th time, the optimizer step. Parameters are bfloat16, and the layers are
under `scan` with remat. What does not fit a v5e chip is compiled for a v5p one (95 GiB), to say how
much it needs. The figures are the compiler's, so they are exact. LoRA trains adapters on every
weight of the layers with Adam. GaLore is `optax.contrib.galore` on each layer of a stack, over 16
accumulated micro-steps, without its SVD, which libtpu had not compiled after twelve minutes; so its figure is a lower
bound.
"""

import dataclasses
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
from experiments.bench.baselines import in_jax
from flora_jax import Projection
from flora_jax.adapters import Adapter, lora
from flora_jax.models import decoder, families, gpt2, t5
from flora_jax.models.config import NAMED
from flora_jax.update.ordinary_step import ordinary_step

STEPS = 16
LANGUAGE = (*decoder.SHAPES, *gpt2.SHAPES, *t5.SHAPES)


@dataclass(frozen=True)
class Config:
    """The step to compile."""

    model: Literal[LANGUAGE] = "LLaMA-7B"  # type: ignore[valid-type]
    """The name of the model's shape."""
    length: int = 2048
    """Number of tokens in a window."""
    batch: int = 1
    """Number of windows in a micro-step; sharded over the chips where they divide it."""
    chips: int = 1
    """Number of chips over which every weight is sharded, along its largest axis that they divide."""
    only: str = ""
    """A part of a name; only methods whose name has it are compiled."""
    out: Path | None = None
    """A file to write the table to."""
    text: Path | None = None
    """A folder for the programs' HLO."""


def of_params(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Gives the function that makes a state from params, whatever the batch."""
    return lambda params, windows: tx.init(params)


def flora(rank: int, fused: bool = True):
    """Builds the step of Flora with fused gradients, or with ordinary ones."""

    def build(loss: Callable):
        projection = flora_jax.Projection(rank, distribution="srht", resample_every=STEPS)
        tx = flora_jax.flora(1e-3, projection=projection, accumulation_steps=STEPS)
        if fused:
            step: Any = flora_jax.make_train_step(loss, tx, projection)
            return of_params(tx), step.lower
        return of_params(tx), ordinary_step(loss, tx).lower

    return build


def backward(tx: optax.GradientTransformation, int8: bool = False):
    """Builds the step that updates each parameter by its exact gradient inside the backward pass."""

    def build(loss: Callable):
        rounding = "stochastic" if int8 else "nearest"
        step = flora_jax.make_train_step(loss, tx, update="backward", rounding=rounding)
        return step.init, step.lower

    return build


def advised(rank: int, embeddings: bool) -> Projection:
    """Returns the projection of the advised preset; `embeddings` says whether embedding and head are compressed too."""
    return Projection(
        rank,
        distribution="srtt",
        side="input",
        embedding="output" if embeddings else "whole",
        head="input" if embeddings else "whole",
        resample_every=64 * STEPS,
    )


def accumulated(rank: int, dtype: Any, embeddings: bool = True):
    """Builds the transformation that accumulates orthogonalized sketches of every matrix in this dtype.

    Args:
      rank: The rank.
      dtype: The dtype of all accumulators.
      embeddings: Whether embedding and head are compressed too.
    """
    return flora_jax.flora(
        1e-3,
        projection=advised(rank, embeddings),
        accumulation_steps=STEPS,
        preset="advised",
        state_dtype=dtype,
    )


def fused(rank: int, dtype: Any, int8: bool = False):
    """Builds the step of `accumulated` in which all sketches of a micro-batch are there before they are added."""

    def build(loss: Callable):
        tx = accumulated(rank, dtype, embeddings=False)
        rounding = "stochastic" if int8 else "nearest"
        step = flora_jax.make_train_step(
            loss, tx, advised(rank, embeddings=False), rounding=rounding
        )
        return of_params(tx), step.lower

    return build


def ordinary(tx: optax.GradientTransformation):
    """Builds the step that has all gradients before the first update, without accumulation."""
    return lambda loss: (of_params(tx), ordinary_step(loss, tx).lower)


def multisteps(inner: optax.GradientTransformation):
    """Builds the step of `optax.MultiSteps` over `inner`."""

    def build(loss: Callable):
        tx = optax.MultiSteps(inner, STEPS).gradient_transformation()
        return of_params(tx), ordinary_step(loss, tx).lower

    return build


def layered(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `tx`, which knows no batch axes, on each layer of a stack as on a weight of its own."""
    each = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))

    def label(params: Any) -> Any:
        return jax.tree.map(lambda x: "each" if x.ndim == 3 else "all", params)

    return optax.multi_transform({"each": each, "all": tx}, label)


def without_svd(build: Callable):
    """Builds a step that is compiled with zeros in the place of singular vectors."""

    def singular(matrix: jax.Array, full_matrices: bool = False):
        rank = min(matrix.shape)
        shapes = (matrix.shape[0], rank), (rank,), (rank, matrix.shape[1])
        return tuple(jnp.zeros(shape, matrix.dtype) for shape in shapes)

    def patched(loss: Callable):
        init, lower = build(loss)

        def lowered(*args: Any):
            with mock.patch.object(jnp.linalg, "svd", singular):
                return lower(*args)

        return init, lowered

    return patched


def adapted(adapter: Adapter):
    """Builds the step that trains an adapter's parameters by Adam; the weights are frozen."""

    def build(loss: Callable):
        tx, run = optax.adam(1e-3), adapter.apply(loss)
        step = ordinary_step(lambda own, frozen, windows: run(frozen, own, windows), tx)

        def init(params: Any, windows: Any):
            return tx.init(params[1])

        def lower(params: Any, state: Any, windows: Any):
            frozen, own = params
            return step.lower(own, state, frozen, windows)

        return init, lower

    return build


LORA = {
    rank: lora(Projection(rank, side="input", select=lambda path, shape: "layers" in path))
    for rank in (8, 16, 64, 128)
}
WITH_LORA = {adapted(adapter): adapter for adapter in LORA.values()}
ADAFACTOR = optax.adafactor(optax.constant_schedule(1e-3))
METHODS = {
    "Exact gradients, Adafactor": backward(ADAFACTOR),
    "Exact gradients, no state": backward(flora_jax.sketched_muon(1e-3)),
    "Exact gradients, momentum of rank 256": backward(flora_jax.sketched_muon(1e-3, rank=256)),
    "Exact gradients, Adafactor, int8 weights": backward(ADAFACTOR, int8=True),
    "Accumulated, rank 512, int8 weights": backward(accumulated(512, "float32"), int8=True),
    "Accumulated, rank 128 in bfloat16, int8 weights": backward(
        accumulated(128, "bfloat16"), int8=True
    ),
    "Accumulated, rank 512 in int8": backward(accumulated(512, "int8")),
    "Accumulated, rank 512 in int8, embeddings whole": backward(accumulated(512, "int8", False)),
    "Accumulated, rank 512 in int8, embeddings whole, int8 weights": backward(
        accumulated(512, "int8", False), int8=True
    ),
    **{
        f"Accumulated, rank {rank} in int4, embeddings whole": backward(
            accumulated(rank, "int4", False)
        )
        for rank in (2048, 1024, 512)
    },
    **{
        f"Accumulated, rank {rank} in int8, embeddings whole": backward(
            accumulated(rank, "int8", False)
        )
        for rank in (256, 128)
    },
    **{
        f"Fused, rank {rank} in {dtype}, embeddings whole{weights}": fused(
            rank, dtype, bool(weights)
        )
        for rank, dtype in ((1024, "int4"), (512, "int8"), (256, "int8"))
        for weights in ("", ", int8 weights")
    },
    "Accumulated, rank 256 in int8": backward(accumulated(256, "int8")),
    "Accumulated, rank 128 in int8": backward(accumulated(128, "int8")),
    "Adafactor, no accumulation": ordinary(ADAFACTOR),
    "Flora, fused, rank 128": flora(128),
    "Flora, fused, rank 256": flora(256),
    "Flora, ordinary gradients, rank 128": flora(128, fused=False),
    "MultiSteps + Adafactor": multisteps(optax.adafactor(1e-3)),
    "MultiSteps + Muon": multisteps(in_jax.muon(1e-3)),
    "MultiSteps + GaLore, rank 128, at least": without_svd(
        multisteps(layered(galore(1e-3, rank=128)))
    ),
    **{
        f"LoRA + Adam, rank {adapter_rank}": build
        for adapter_rank, build in zip(LORA, WITH_LORA, strict=True)
    },
}


def largest_axis(shape: tuple[int, ...], chips: int) -> PartitionSpec:
    """Shards the largest axis that the chips divide, but never the first, which may be that of stacked layers."""
    axes = [axis for axis, length in enumerate(shape) if length % chips == 0 and axis > 0]
    if chips == 1 or not axes:
        return PartitionSpec()
    best = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*("data" if axis == best else None for axis in range(len(shape))))


def measure(config: Config, build, chip: str, int8: bool = False) -> topology.Program | None:
    """Compiles a step for a kind of chip; gives None where it does not fit."""
    model = families.module(NAMED[config.model])
    mesh = topology.mesh(chip, (config.chips,))
    batched = config.chips > 1 and config.batch % config.chips == 0
    if batched:
        model = families.module(dataclasses.replace(model.shape, sharded=("data",)))

    def sharded(tree):
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, largest_axis(x.shape, config.chips)), tree
        )
        return topology.placed(tree, shardings)

    init, lower = build(families.loss(model))
    params = families.outline(model)
    if adapter := WITH_LORA.get(build):
        params = (params, jax.eval_shape(partial(adapter.init, jax.random.key(0)), params))
    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
    over = NamedSharding(mesh, PartitionSpec("data") if batched else PartitionSpec())
    with jax.set_mesh(mesh):  # for the model's own constraints, which `init` traces too
        state = jax.eval_shape(init, params, windows)
        if int8:
            params = jax.eval_shape(flora_jax.to_int8, params)
        lowered = lower(sharded(params), sharded(state), topology.placed(windows, over))
    return topology.compile_(lowered, config.text is not None)


def main(config: Config) -> None:
    rows = []
    for name, build in METHODS.items():
        if config.only not in name:
            continue
        int8 = "int8 weights" in name
        program = measure(config, build, "v5e", int8)
        fits = "yes" if program else "no"
        program = program or measure(config, build, "v5p", int8)
        gib = f"{program.gib:.2f}" if program else "over 95"
        seconds = f"{program.seconds:.0f}" if program else "-"
        rows.append((name, gib, fits, seconds))
        if program and config.text:
            config.text.mkdir(parents=True, exist_ok=True)
            (config.text / f"{name}.txt".replace(" ", "_")).write_text(program.text)
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
    main(tyro.cli(Config, description=__doc__))

"""Bytes of HBM that one training step takes, by method, compiled for TPU chips.

    python -m experiments.bench.memory                  # LLaMA-7B, some ten minutes on two cores
    python -m experiments.bench.memory --model LLaMA-13B --chips 2

One program does the micro-step and, every 16th time, the boundary. bfloat16 parameters, layers
under `scan` with remat. What does not fit a v5e chip is compiled for a v5p one (95 GiB), to say how
much it needs. Exact: the figures are the compiler's. LoRA trains adapters of the same rank on every
weight of the layers with Adam; GaLore is `optax.contrib.galore` over 16 accumulated micro-steps.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from experiments.models import llama

STEPS = 16


@dataclass(frozen=True)
class Config:
    """What to compile."""

    model: str = "LLaMA-7B"
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

    def build(model: llama.Llama):
        projection = flora_jax.Projection(rank, distribution="srht", resample_every=STEPS)
        tx = flora_jax.flora(1e-3, projection=projection, accumulation_steps=STEPS)
        loss = partial(llama.loss, model)
        if fused:
            step: Any = flora_jax.make_train_step(loss, tx, projection)
            return tx, step.lower
        return tx, ordinary(loss, tx)

    return build


def multisteps(inner: optax.GradientTransformation):
    def build(model: llama.Llama):
        tx = optax.MultiSteps(inner, STEPS).gradient_transformation()
        return tx, ordinary(partial(llama.loss, model), tx)

    return build


def ordinary(loss, tx):
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows):
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step.lower


def lora(rank: int):
    """Adapters `(layers, m, r)` and `(layers, r, n)`, added to the frozen weights inside the step."""

    def build(model: llama.Llama):
        tx = optax.adam(1e-3)

        def merged(params, adapters):
            layers = {}
            for name, weight in params["layers"].items():
                layers[name] = weight
                if name in adapters:
                    a, b = adapters[name]["a"], adapters[name]["b"]
                    layers[name] = {"kernel": weight["kernel"] + jnp.matmul(a, b)}
            return {**params, "layers": layers}

        def step(params, state, windows):
            params, adapters = params["base"], params["adapters"]
            loss = lambda own: llama.loss(model, merged(params, own), windows)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(adapters)
            updates, state = tx.update(grads, state, adapters)
            own = optax.apply_updates(adapters, updates)
            return {"base": params, "adapters": own}, state, value

        def extend(params):
            def factors(kernel):
                layers, m, n = kernel.shape
                return {
                    "a": jax.ShapeDtypeStruct((layers, m, rank), kernel.dtype),
                    "b": jax.ShapeDtypeStruct((layers, rank, n), kernel.dtype),
                }

            adapters = {
                name: factors(weight["kernel"])
                for name, weight in params["layers"].items()
                if "kernel" in weight
            }
            return {"base": params, "adapters": adapters}

        def init(params: Any):
            return tx.init(params["adapters"])

        on_adapters = optax.GradientTransformation(init, tx.update)
        return on_adapters, jax.jit(step, donate_argnums=(0, 1)).lower, extend

    return build


METHODS = {
    "Flora, born compressed, rank 128": flora(128),
    "Flora, born compressed, rank 256": flora(256),
    "Flora, ordinary gradients, rank 128": flora(128, fused=False),
    "MultiSteps + Adafactor": multisteps(optax.adafactor(1e-3)),
    "MultiSteps + GaLore, rank 128": multisteps(galore(1e-3, rank=128)),
    "LoRA + Adam, rank 128": lora(128),
}


def largest_axis(shape: tuple[int, ...], chips: int) -> PartitionSpec:
    axes = [axis for axis, length in enumerate(shape) if length % chips == 0 and axis > 0]
    if chips == 1 or not axes:
        return PartitionSpec()
    best = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*("data" if axis == best else None for axis in range(len(shape))))


def measure(config: Config, build, chip: str) -> topology.Program | None:
    model = llama.Llama(llama.SHAPES[config.model])
    mesh = topology.mesh(chip, (config.chips,))

    def cut(tree):
        shardings = jax.tree.map(
            lambda x: NamedSharding(mesh, largest_axis(x.shape, config.chips)), tree
        )
        return topology.placed(tree, shardings)

    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
    tx, lower, *rest = build(model)
    if rest:
        params = rest[0](params)
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

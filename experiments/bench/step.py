"""This command compares time and FLOPs of one micro-step: fused gradients against MultiSteps over Adafactor.

    python -m experiments.bench.step

The model is a LLaMA in float32. The two steps run in turn in one process, and times are medians. No optimizer step is
among them, so that what is timed is the gradient and its accumulation. FLOPs are XLA's own count for the compiled
gradient of the unrolled model (XLA counts the body of a loop once), at rank width / 16 for several widths: a
weight `n × m` alone has the ratio 2/3 + (r/3)(1/m + 1/n), 0.708 where it is square, and what has no
weight (attention scores, norms, the loss) costs what it did.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import interleaved, setting
from flora_jax.models import decoder
from flora_jax.models.families import outline
from flora_jax.update.ordinary_step import ordinary_step


@dataclass(frozen=True)
class Config(setting.Sizes):
    """Sizes of the model and of a micro-step."""

    rank: int = 32
    """Rank of the projections of the model that is timed; width / 16 by default."""
    rounds: int = 9
    """Number of timed micro-steps, after one that compiles."""
    widths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Widths in the table of FLOPs, whose models are compiled and do not run."""
    out: Path | None = None
    """A file to write the tables to."""


def steps(config: Config, model: decoder.Decoder, params):
    """Gives the micro-steps under `jit`, by name, each with its state."""
    loss = partial(decoder.loss, model)
    multi = optax.MultiSteps(optax.adafactor(1e-3), 1000).gradient_transformation()
    projection = project(config.rank)
    tx = flora_jax.flora(1e-3, projection=projection, accumulation_steps=1000)
    step: Any = flora_jax.make_train_step(loss, tx, projection)
    return {
        "MultiSteps": (ordinary_step(loss, multi), multi.init(params)),
        "Flora, fused": (step, tx.init(params)),
    }


def project(rank: int) -> flora_jax.Projection:
    return flora_jax.Projection(rank, distribution="srht", side="input", resample_every=1000)


def flops(config: Config, width: int) -> tuple[float, float]:
    """Gives XLA's count of FLOPs for the ordinary gradient and for the fused one, at rank width / 16."""
    model = setting.small(width, config.layers, dtype=jnp.float32, **setting.VARIANTS["unrolled"])
    loss = partial(decoder.loss, model)
    params = outline(model)
    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)

    def count(gradient: Any) -> float:
        costs = jax.jit(gradient).lower(params, windows).compile().cost_analysis()
        assert costs is not None, "XLA gives no costs on this backend"
        return costs["flops"]

    fused = flora_jax.value_and_grad(loss, project(width // 16))
    return count(jax.value_and_grad(loss)), count(partial(fused, cycle=0))


def measure(config: Config, variant: dict) -> dict[str, tuple[float, float]]:
    """Measures median seconds and bytes of temporaries, by name."""
    model, params, windows = config.started(jnp.float32, **variant)
    held, figures = {}, {}
    for name, (step, state) in steps(config, model, params).items():
        compiled = step.lower(params, state, windows).compile()
        figures[name] = compiled.memory_analysis().temp_size_in_bytes
        held[name] = (step, params, state)
    found = interleaved.seconds(held, (windows,), config.rounds)
    return {name: (one, figures[name]) for name, (one,) in found.items()}


def main(config: Config) -> None:
    rows = []
    for variant, settings in setting.VARIANTS.items():
        figures = measure(config, settings)
        base, ours = figures["MultiSteps"], figures["Flora, fused"]
        rows.append(
            (
                variant,
                f"{base[0]:.3f}",
                f"{ours[0]:.3f}",
                f"{ours[0] / base[0]:.3f}",
                f"{ours[1] / base[1]:.3f}",
            )
        )
    heads = ["model", "MultiSteps, s", "Flora, s", "ratio of time", "of temporaries"]
    title = f"One micro-step: {config}, rank {config.rank}"
    tables = [report.table(title, heads, rows)]
    Console(width=100).print(tables[0])
    rows = []
    for width in config.widths:
        base, ours = flops(config, width)
        rows.append((str(width), str(width // 16), f"{base:.3e}", f"{ours / base:.4f}"))
    heads = ["width", "rank", "ordinary gradient, FLOPs", "ratio"]
    tables.append(report.table("XLA's FLOPs of one gradient, unrolled", heads, rows))
    Console(width=100).print(tables[1])
    if config.out:
        with config.out.open("w") as file:
            Console(file=file, width=100).print(*tables)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

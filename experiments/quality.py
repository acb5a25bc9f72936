"""This command compares the loss at a given rank with uncompressed accumulation, on the same batches.

    python -m experiments.quality --out runs/quality

All settings have the same grid of learning rates. Each run appends one line to `results.jsonl`; the same command goes
on where it stopped. The table is written to `quality.md`: it has for each setting the best learning rate of the grid,
the validation loss there, and its ratio to the best uncompressed run.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import flora_jax
from experiments import decoder, optimizers, text
from flora_jax.chain.distributions import DISTRIBUTIONS, Distribution
from flora_jax.chain.projection import Side


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
      method: The method.
      rank: Rank of Flora's projections.
      distribution: Distribution of Flora's projections.
      shrink: Whether Flora's updates are scaled as advised.
      embedding: What Flora does to embeddings.
      factor: A factor of the updates of the matrices inside the layers.
      side: The side of a matrix that Flora projects.
      balanced: Whether ranks are in proportion to the root of (projected side / kept side), for the same memory.
      resample: Number of optimizer steps between two projections.
      momentum: Decay of Flora's momentum; None for none.
      clipping: Adafactor's largest root mean square of an update.
      decay: Exponent of the decay of Adafactor's second moments.
    """

    method: optimizers.Method = "flora"
    rank: int = 64
    distribution: Distribution = "gaussian"
    shrink: bool = False
    embedding: str = "whole"
    factor: float = 1.0
    side: Side = "larger"
    balanced: bool = False
    resample: int = 1
    momentum: float | None = None
    clipping: float | None = 1.0
    decay: float = 0.8

    def __str__(self) -> str:
        default = Setting()
        fields = ("side", "balanced", "resample", "momentum", "clipping", "decay")
        changed = [name for name in fields if getattr(self, name) != getattr(default, name)]
        tail = "".join(f", {name} {getattr(self, name)}" for name in changed)
        if self.method == "multisteps":
            return f"uncompressed x{self.factor:g}{tail}"
        scale = " shrink" if self.shrink else f" x{self.factor:g}"
        return f"{self.distribution} r={self.rank}{scale}, embedding {self.embedding}{tail}"


@dataclass(frozen=True)
class Config:
    """The settings that all runs share."""

    out: Path = Path("runs/quality")
    """The folder of the results."""
    optimizer_steps: int = 300
    """Number of optimizer steps in a run."""
    accumulation: int = 4
    """Number of micro-steps in an optimizer step."""
    batch: int = 4
    """Number of windows in a micro-step."""
    length: int = 64
    """Number of bytes in a window."""
    width: int = 256
    """Width d of the model."""
    layers: int = 3
    """Number of layers."""
    rates: tuple[float, ...] = (0.03, 0.06, 0.12)
    """Learning rates to try."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the weights, of the batches and of the projections."""
    study: Literal["ranks", "distributions", "settings"] = "ranks"
    """What is varied: `ranks` with the paper's and the advised settings, `distributions` at each rank, or
    all other `settings` at rank d/4."""


def settings(width: int) -> list[Setting]:
    """Gives the rows of the study of ranks, the most telling first."""
    base = Setting(rank=width // 4)
    advised = replace(base, distribution="srht", shrink=True)
    uncompressed = Setting(method="multisteps")
    return [
        uncompressed,
        base,
        advised,
        replace(base, distribution="srht"),
        replace(advised, rank=width // 2),
        replace(uncompressed, factor=0.5),
        replace(advised, rank=width // 8),
        replace(base, shrink=True),
        replace(advised, embedding="output"),
        replace(base, rank=width // 2),
        replace(base, rank=width // 8),
        replace(uncompressed, factor=0.25),
        replace(advised, distribution="rademacher"),
        replace(advised, distribution="orthonormal"),
    ]


def each_distribution(width: int) -> list[Setting]:
    """Gives rows of every distribution at every rank, as advised: shrunk, with a projection for 64 optimizer steps.

    The orthonormal one, whose every sample is a QR decomposition, takes most of the time and comes last.
    """
    order = sorted(DISTRIBUTIONS, key="orthonormal".__eq__)
    advised = Setting(shrink=True, resample=optimizers.ADVISED)
    return [
        Setting(method="multisteps"),
        *(
            replace(advised, rank=width // part, distribution=distribution)
            for distribution in order
            for part in (4, 8, 2)
        ),
    ]


def other_settings(width: int) -> list[Setting]:
    """Gives rows that vary all that costs no memory, one by one, from the advised setting at rank d/4."""
    advised = Setting(rank=width // 4, distribution="srht", shrink=True)
    uncompressed = Setting(method="multisteps")
    return [
        uncompressed,
        advised,
        replace(advised, balanced=True),
        replace(advised, side="input"),
        replace(advised, side="output"),
        replace(advised, resample=4),
        replace(advised, resample=16),
        replace(advised, resample=64),
        replace(advised, resample=1024),
        replace(advised, resample=16, side="input"),
        replace(advised, resample=64, side="input"),
        replace(advised, resample=16, distribution="orthonormal"),
        replace(advised, resample=16, distribution="gaussian"),
        replace(advised, clipping=None),
        replace(advised, clipping=0.5),
        replace(advised, decay=0.9),
        replace(advised, decay=0.95),
        replace(uncompressed, decay=0.95),
        replace(advised, momentum=0.9),
    ]


def balanced_ranks(shapes: Any, rank: int) -> Callable[[str, tuple[int, ...]], int]:
    """Gives the ranks of matrices with the least noise for their memory; the larger side of each is projected.

    A sketch of an `n × m` gradient takes `r n` numbers, and its estimate has a relative variance near
    `m / r`. The sum of the variances is least, where the sum of the numbers is that of one
    `rank` for all, at `r` in proportion to the root of `m / n`.
    """
    sides = [sorted(shape) for shape in shapes if min(shape) >= 128]
    total = sum(small for small, _ in sides)
    root = sum(small * (large / small) ** 0.5 for small, large in sides)

    def of(path: str, shape: tuple[int, ...]) -> int:
        del path
        small, large = sorted(shape)
        return min(small, round(rank * total / root * (large / small) ** 0.5))

    return of


def train(config: Config, setting: Setting, seed: int):
    """Gives a function of the peak learning rate that trains and gives the validation loss."""
    corpus = text.load()
    shape = decoder.Shape(width=config.width, layers=config.layers)
    model = decoder.model(shape)
    steps = config.optimizer_steps * config.accumulation
    windows = partial(text.batch, size=config.batch, length=config.length)
    rank: Any = setting.rank
    if setting.balanced:
        tokens = jnp.zeros((1, 8), jnp.int32)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
        layers = {k: v for k, v in shapes.items() if k.startswith("layer")}
        matrices = [leaf.shape for leaf in jax.tree.leaves(layers) if leaf.ndim == 2]
        rank = balanced_ranks(matrices, setting.rank)

    def transformation(peak):
        tx, projection = optimizers.build(
            setting.method,
            optimizers.cosine(peak, config.optimizer_steps),
            accumulation=config.accumulation,
            rank=rank,
            distribution=setting.distribution,
            shrink=setting.shrink,
            embedding=setting.embedding,  # type: ignore[arg-type]
            side=setting.side,
            resample=setting.resample if setting.momentum is None else None,
            momentum=setting.momentum,
            clipping=setting.clipping,
            decay=setting.decay,
            seed=seed,
        )
        return optax.chain(tx, _scale_layers(setting.factor)), projection

    @partial(jax.jit, donate_argnums=(0, 1))
    def optimizer_step(params, opt_state, batches, peak):
        tx, projection = transformation(peak)
        loss = partial(decoder.loss, model)

        def micro_step(carry, batch):
            params, opt_state = carry
            if projection is None:
                grads = jax.grad(loss)(params, batch)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None
            cycle = flora_jax.cycle(opt_state)
            _, grads = flora_jax.value_and_grad(loss, projection)(params, batch, cycle=cycle)
            return flora_jax.apply_gradients(tx, grads, opt_state, params), None

        return jax.lax.scan(micro_step, (params, opt_state), batches)[0]

    evaluate = jax.jit(lambda params, batch: decoder.loss(model, params, batch))

    def run(peak: float) -> float:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
        opt_state = transformation(peak)[0].init(params)
        for first in range(0, steps, config.accumulation):
            batches = np.stack(
                [windows(corpus.train, seed, first + i) for i in range(config.accumulation)]
            )
            params, opt_state = optimizer_step(params, opt_state, batches, peak)
        held_out = [
            text.batch(corpus.validation, 1, i, 64, config.length) for i in range(8)
        ]  # the same for every run
        return float(np.mean([evaluate(params, batch) for batch in held_out]))

    return run


def table(results: list[dict]) -> str:
    """Gives a Markdown table of each row's best learning rate, its loss, and its ratio to the best uncompressed one."""
    means: dict[str, dict[float, list[float]]] = {}
    for result in results:
        rates = means.setdefault(result["name"], {})
        rates.setdefault(result["rate"], []).append(result["loss"])
    best = {
        name: min((float(np.mean(losses)), rate, len(losses)) for rate, losses in rates.items())
        for name, rates in means.items()
    }
    goal = min(loss for name, (loss, _, _) in best.items() if name.startswith("uncompressed"))
    lines = [
        "| setting | best learning rate | seeds | validation loss | ratio to uncompressed |",
        "|---|---|---|---|---|",
    ]
    for name, (loss, rate, seeds) in best.items():
        lines.append(f"| {name} | {rate:g} | {seeds} | {loss:.3f} | {loss / goal:.3f} |")
    return "\n".join(lines) + "\n"


def _scale_layers(factor: float) -> optax.GradientTransformation:
    def is_inner(path, leaf) -> bool:
        return leaf.ndim == 2 and "layer" in jax.tree_util.keystr(path)

    def mask(tree):
        return jax.tree_util.tree_map_with_path(is_inner, tree)

    return optax.masked(optax.scale(factor), mask) if factor != 1 else optax.identity()


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    budget = {
        k: v for k, v in asdict(config).items() if k not in ("out", "rates", "seeds", "study")
    }
    results = [result for result in results if result["budget"] == budget]
    done = {(result["name"], result["rate"], result["seed"]) for result in results}
    studies = {
        "ranks": settings,
        "distributions": each_distribution,
        "settings": other_settings,
    }
    for seed in config.seeds:
        for setting in studies[config.study](config.width):
            run = None
            for rate in config.rates:
                if (str(setting), rate, seed) in done:
                    continue
                run = run or train(config, setting, seed)
                start = time.perf_counter()
                loss = run(rate)
                seconds = time.perf_counter() - start
                result = {"name": str(setting), "rate": rate, "seed": seed, "loss": loss}
                results.append({**result, "seconds": seconds, "budget": budget})
                with log.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(
                    f"{setting}  lr {rate:g}  seed {seed}: {loss:.4f}  ({seconds:.0f} s)",
                    flush=True,
                )
                if any(r["name"].startswith("uncompressed") for r in results):
                    (config.out / "quality.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

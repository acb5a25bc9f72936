"""This command completes a matrix of low rank from some of its entries, which is Deep LoRA's example.

    python -m experiments.completion

It compares three factors of full width, what Deep LoRA makes of them, and two factors (LoRA) of the same rank; all
are trained by gradient descent at one rate. It takes some ten seconds on two cores.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

from experiments import report
from flora_jax import Projection
from flora_jax.adapters import Adapter, deep_lora, discrepant, lora, singular_vectors


@dataclass(frozen=True)
class Config:
    """Settings of the matrix, and of the runs."""

    size: int = 200
    """Number of rows and of columns of the matrix."""
    true_rank: int = 5
    """Rank of the matrix."""
    seen: float = 0.2
    """Part of the entries that are seen."""
    rank: int = 20
    """Rank of Deep LoRA and of LoRA, an upper bound on twice the true one."""
    epsilon: float = 0.1
    """Scale of the factors at the start."""
    gamma: float = 0.1
    """Factor of the learning rate of Deep LoRA's outer factors."""
    learning_rate: float = 0.3
    """Learning rate of gradient descent."""
    steps: int = 2000
    """Number of steps."""
    seed: int = 0
    """Seed of the matrix and of the factors."""
    out: Path | None = None
    """A file to write the table to."""


def problem(config: Config) -> tuple[jax.Array, jax.Array]:
    """Gives the matrix, with singular values of 1, and a matrix that has 1 where an entry is seen."""
    random = np.random.default_rng(config.seed)
    shape = (config.size, config.true_rank)
    sides = [np.linalg.qr(random.standard_normal(shape))[0] for _ in range(2)]
    seen = random.random((config.size, config.size)) < config.seen
    return jnp.asarray(sides[0] @ sides[1].T, jnp.float32), jnp.asarray(seen, jnp.float32)


def loss_of(goal: jax.Array, seen: jax.Array):
    """Gives the loss: half the squared error of the seen entries, over the part of them that are seen."""

    def loss(params: Any) -> jax.Array:
        return 0.5 * jnp.sum(seen * (params["w"] - goal) ** 2) / jnp.mean(seen)

    return loss


def full(config: Config) -> Adapter:
    """Gives an adapter that has three factors of full width."""

    def init(key: jax.Array, params: Any) -> Any:
        del params
        shape = (config.size, config.size)
        keys = jax.random.split(key, 3)
        return [config.epsilon * jnp.linalg.qr(jax.random.normal(k, shape))[0] for k in keys]

    return Adapter(init, lambda params, own: {}, Projection(1, mask=False))


def train(config: Config, loss: Any, own: Any, tx: optax.GradientTransformation):
    """Gives the trained params, and the seconds that the compiled run took."""

    @jax.jit
    def run(own):
        def step(carry, _):
            own, state = carry
            updates, state = tx.update(jax.grad(loss)(own), state, own)
            return (optax.apply_updates(own, updates), state), None

        return jax.lax.scan(step, (own, tx.init(own)), length=config.steps)[0][0]

    compiled = run.lower(own).compile()
    start = time.perf_counter()
    own = jax.block_until_ready(compiled(own))
    return own, time.perf_counter() - start


def compare(config: Config) -> dict[str, tuple[float, int, float]]:
    """Gives relative error over all entries, trained numbers, and seconds, by name."""
    goal, seen = problem(config)
    loss, params = loss_of(goal, seen), {"w": jnp.zeros_like(goal)}
    projection = Projection(config.rank, side="input", min_dim=1)
    key = jax.random.key(config.seed)
    vectors = singular_vectors(loss, projection)(params)
    deep = deep_lora(projection, vectors, epsilon=config.epsilon)
    shallow = lora(projection)
    plain = optax.sgd(config.learning_rate)
    runs = {
        "three factors of full width": (
            full(config).init(key, params),
            lambda own: {"w": own[0] @ own[1] @ own[2]},
            plain,
        ),
        "Deep LoRA": (
            deep.init(key, params),
            lambda own: deep.merge(params, own),
            optax.chain(plain, discrepant(config.gamma)),
        ),
        "LoRA": (shallow.init(key, params), lambda own: shallow.merge(params, own), plain),
    }
    figures = {}
    for name, (own, weight, tx) in runs.items():
        own, seconds = train(config, lambda own, weight=weight: loss(weight(own)), own, tx)
        error = jnp.linalg.norm(weight(own)["w"] - goal) / jnp.linalg.norm(goal)
        figures[name] = (float(error), sum(x.size for x in jax.tree.leaves(own)), seconds)
    return figures


def main(config: Config) -> None:
    figures = compare(config)
    base = next(iter(figures.values()))
    rows = [
        (name, f"{error:.4f}", f"{count:,}", f"{seconds:.2f}", f"{seconds / base[2]:.3f}")
        for name, (error, count, seconds) in figures.items()
    ]
    heads = ["", "error over all entries", "trained numbers", "seconds", "ratio"]
    title = (
        f"{config.size} x {config.size} of rank {config.true_rank}, {config.seen:.0%} seen, "
        f"{config.steps} steps"
    )
    table = report.table(title, heads, rows)
    Console(width=100).print(table)
    if config.out:
        with config.out.open("w") as file:
            Console(file=file, width=100).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

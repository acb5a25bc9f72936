"""This command compares what weights are kept in, float32, bfloat16 or int8, under exact gradients or accumulated sketches.

    python -m experiments.weights --out runs/weights
    python -m experiments.weights --start trained --rates 0.0005 0.002 0.008 0.03 --out runs/weights
    python -m experiments.weights --method sketches --steps 300 --rates 0.03 0.06 0.12 --out runs/weights

With exact gradients each step is one of Adafactor (`flora_jax.make_train_step(..., update="backward")`); with sketches it is an
orthogonalized one of several micro-batches, accumulated in int8, with gradients fused. Sums, products and
the state are in float32 in all rows; only what is written back to the weights differs. From random weights the text is the
standard library's; from trained ones a model that has learned it goes on with the source of JAX (Apache-2.0). Each run
appends a line to `results.jsonl`; the same command goes on where it stopped.
"""

import time
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
from experiments.paper import files
from flora_jax.rounding import Rounding

KINDS: dict[str, tuple[Any, bool, Rounding]] = {
    "float32": (jnp.float32, False, "nearest"),
    "bfloat16": (jnp.bfloat16, False, "nearest"),
    "bfloat16, stochastic": (jnp.bfloat16, False, "stochastic"),
    "int8": (jnp.bfloat16, True, "nearest"),
    "int8, stochastic": (jnp.bfloat16, True, "stochastic"),
}
"""The dtype of the weights, whether those of the layers are in int8 (in blocks of `Config.block`), and the rounding."""


@dataclass(frozen=True)
class Config:
    """The settings that all runs share."""

    out: Path = Path("runs/weights")
    """The folder of the results."""
    start: Literal["random", "trained"] = "random"
    """What the weights are at the beginning."""
    method: Literal["exact", "sketches"] = "exact"
    """What the optimizer is given."""
    part: int = 8
    """The width of the model divided by the rank of sketches."""
    micro_batches: int = 4
    """Number of micro-batches in an optimizer step, of sketches."""
    steps: int = 1200
    """Number of optimizer steps."""
    warm: int = 1500
    """Number of steps that trained weights have behind them."""
    batch: int = 4
    """Number of windows in a micro-batch."""
    length: int = 64
    """Number of bytes in a window."""
    width: int = 256
    """Width of the model."""
    layers: int = 3
    """Number of layers."""
    block: int = 64
    """Number of weights in int8 that share a scale."""
    rates: tuple[float, ...] = (0.0005, 0.002, 0.008, 0.015, 0.03)
    """Learning rates, all of which every row has on the first seed; the others have the best one and the smallest."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and batches."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """The rows."""


def train(config: Config, params: Any, corpus: text.Corpus, kind: str, rate: float, seed: int):
    """Gives the params after training, and the seconds that it took."""
    dtype, quantized, rounding = KINDS[kind]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    if quantized:
        params = flora_jax.to_int8(params, block=config.block)
    model = decoder.model(decoder.Shape(width=config.width, layers=config.layers))

    def loss(params, windows):  # only storage differs
        return decoder.loss(model, jax.tree.map(lambda x: x.astype(jnp.float32), params), windows)

    schedule, count = optimizers.cosine(rate, config.steps), 1
    if config.method == "exact":
        tx = optax.adafactor(schedule)
        step = flora_jax.make_train_step(loss, tx, update="backward", rounding=rounding)
    else:
        count = config.micro_batches
        tx, projection = optimizers.build(
            "flora",
            schedule,
            accumulation=count,
            rank=config.width // config.part,
            embedding="whole",
            head="whole",
            state_dtype="int8",
        )
        step = flora_jax.make_train_step(loss, tx, projection, rounding=rounding)
    draw = partial(text.batch, corpus.train, seed, size=config.batch, length=config.length)
    state = step.init(params, draw(0))
    begin = time.perf_counter()
    for i in range(config.steps * count):
        params, state, _ = step(params, state, draw(i))
    params = jax.block_until_ready(flora_jax.from_int8(params))
    return params, time.perf_counter() - begin


def validated(config: Config, params: Any, corpus: text.Corpus) -> float:
    """Gives the validation loss, nats per byte, of the weights as they are kept."""
    model = decoder.model(decoder.Shape(width=config.width, layers=config.layers))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    evaluate = jax.jit(partial(decoder.loss, model))
    held_out = text.held_out(corpus, config.length)
    return float(np.mean([evaluate(params, windows) for windows in held_out]))


def started(config: Config, seed: int) -> tuple[Any, text.Corpus]:
    """Gives the weights to begin with, and the text."""
    model = decoder.model(decoder.Shape(width=config.width, layers=config.layers))
    params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
    corpus = text.load()
    if config.start == "random":
        return params, corpus
    path = config.out / f"start-{config.width}-{config.layers}-{config.warm}-{seed}.npy"
    leaves, structure = jax.tree.flatten(params)
    if path.exists():
        flat = np.load(path)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = np.split(flat, ends)
        leaves = [jnp.asarray(x.reshape(y.shape)) for x, y in zip(parts, leaves, strict=True)]
        params = jax.tree.unflatten(structure, leaves)
    else:
        before = replace(config, steps=config.warm, method="exact")
        params, _ = train(before, params, corpus, "float32", 0.015, seed + 100)
        with files.atomic_file(path) as part, part.open("wb") as file:
            np.save(file, np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    return params, text.load(Path(jax.__file__).parent)


def table(results: list[dict]) -> str:
    """Gives a Markdown table of the mean losses, one column for each learning rate."""
    rates = sorted({one["rate"] for one in results})
    lines = ["| weights | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---|" + "---|" * len(rates))
    for kind in dict.fromkeys(one["kind"] for one in results):
        cells = []
        for rate in rates:
            own = [r["loss"] for r in results if (r["kind"], r["rate"]) == (kind, rate)]
            cells.append(f"{np.mean(own):.4f} ({len(own)})" if own else "")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "results.jsonl"
    shared = ("out", "rates", "seeds", "kinds")
    budget = {k: v for k, v in asdict(config).items() if k not in shared}
    results = [one for one in files.read(log) if one["budget"] == budget]

    def run(kind: str, rate: float, seed: int) -> None:
        if any((r["kind"], r["rate"], r["seed"]) == (kind, rate, seed) for r in results):
            return
        params, corpus = started(config, seed)
        params, seconds = train(config, params, corpus, kind, rate, seed)
        loss = validated(config, params, corpus)
        one = {"kind": kind, "rate": rate, "seed": seed, "loss": loss}
        results.append({**one, "seconds": round(seconds, 1), "budget": budget})
        files.append(log, results[-1])
        print(f"{kind}  lr {rate:g}  seed {seed}: {loss:.4f}  ({seconds:.0f} s)", flush=True)
        files.replace_text(config.out / "weights.md", table(results))

    first, *others = config.seeds
    for rate in config.rates:
        for kind in config.kinds:
            run(kind, rate, first)
    own = [r for r in results if r["kind"] == config.kinds[0] and r["seed"] == first]
    best = min(own, key=lambda r: r["loss"])["rate"]
    for rate in dict.fromkeys((best, min(config.rates))):
        for seed in others:
            for kind in config.kinds:
                run(kind, rate, seed)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

"""Table 8 shows LoRA's dynamics: how near a few steps of LoRA are to the random projection.

    python -m experiments.paper.lora_dynamics
    python -m experiments.paper.lora_dynamics --model LLaMA-60M --rank 128

The library's LoRA has factors `down` and `up`, which are `a` and `b` here. With `y = x W + x a b` and `b = 0` at
first, `∂L/∂b = aᵀ G` and `∂L/∂a = G bᵀ`, where `G = ∂L/∂W`. So the
first step of SGD leaves `a` alone, and `a b = -η a aᵀ G`: the gradient, projected at random and back.
Section 2 of the paper bounds what later steps add while `a` has hardly moved. Here LoRA trains by SGD,
and after `t` steps its change of the weights, `a b`, is compared with `-η a₀ a₀ᵀ Σ G`.
"""

import csv
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.progress import track

from experiments.paper import lora, problem
from experiments.paper.files import append, atomic_file, read, replace_text
from experiments.paper.problem import Sizes
from experiments.tasks import batches

TITLE = "8. LoRA's dynamics"


@dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: str = "LLaMA-test"
    """The name of the model's shape."""
    rank: int = 32
    """Rank of LoRA."""
    batch: int = 4
    """Number of windows in a step."""
    length: int = 64
    """Number of tokens in a window."""
    rates: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Learning rates of SGD."""
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """Numbers of steps after which LoRA and the random projection are compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights, of the factors and of the order of the windows."""
    data: problem.Data = "offline"
    """The data: `offline` ones come with packages, the `paper`'s need a network."""
    out: Path = Path("runs/paper/lora_dynamics")
    """The folder of the results."""


def factored(tree: Any) -> dict[str, tuple[Any, Any, Any]]:
    """Gives each weight that has factors, with its `a` and `b`, by its path."""
    found: dict[Any, Any] = flatten_dict(tree, sep="/")
    pairs = tree[lora.FACTORS].items()
    return {path: (found[path], pair["down"], pair["up"]) for path, pair in pairs}


def step(loss: Any, params: Any, sums: Any, batch: Any, rate: Any) -> tuple[Any, Any, Any]:
    """Does one step of SGD on the factors alone, and adds the gradients of their weights to the sums."""
    value, gradients = jax.value_and_grad(loss)(params, batch)
    sums = {path: sums[path] + weight for path, (weight, _, _) in factored(gradients).items()}
    own = (tree[lora.FACTORS] for tree in (params, gradients))
    own = jax.tree.map(lambda x, gradient: x - rate * gradient, *own)
    return {**params, lora.FACTORS: own}, sums, value


def compare(first: Any, params: Any, sums: Any, rate: Any) -> dict[str, jax.Array]:
    """Gives relative distance, cosine, and how far `a` has moved, over all weights together.

    `distance` is `‖a b + η a₀ a₀ᵀ Σ G‖ / ‖a b‖`.
    """
    dot = lambda x, y: jnp.vdot(x, y)  # noqa: E731
    total = dict.fromkeys(("found", "expected", "both", "apart", "moved", "a"), jnp.float32(0))
    old = factored(first)
    for path, (_, a, b) in factored(params).items():
        a0 = old[path][1]
        found = a @ b
        expected = -rate * a0 @ (jnp.swapaxes(a0, -1, -2) @ sums[path])
        parts = {
            "found": dot(found, found),
            "expected": dot(expected, expected),
            "both": dot(found, expected),
            "apart": dot(found - expected, found - expected),
            "moved": dot(a - a0, a - a0),
            "a": dot(a0, a0),
        }
        total = {name: total[name] + parts[name] for name in total}
    return {
        "distance": jnp.sqrt(total["apart"] / total["found"]),
        "cosine": total["both"] / jnp.sqrt(total["found"] * total["expected"]),
        "moved": jnp.sqrt(total["moved"] / total["a"]),
    }


def run(given: problem.Problem, options: Options, rate: float, seed: int) -> list[dict[str, float]]:
    """Trains LoRA, and compares after each of the steps that are asked for."""
    adapter = lora.adapter(options.rank)
    params = first = lora.start(adapter, given.init(given.model, seed), seed)
    sums = {path: jnp.zeros_like(kernel) for path, (kernel, _, _) in factored(params).items()}
    loss = lora.apply(adapter, partial(given.loss, given.model))
    advance = jax.jit(partial(step, loss))
    order = batches.source(given.train, options.batch, seed)
    lines = []
    for t in range(max(options.steps)):
        params, sums, value = advance(params, sums, order[t], rate)
        if t + 1 in options.steps:
            figures = jax.jit(compare)(first, params, sums, rate)
            lines.append({"step": t + 1, "loss": float(value)} | jax.tree.map(float, figures))
    return lines


def aggregate(results: list[dict[str, Any]], rate: float, step: int) -> dict[str, np.ndarray]:
    """Gives the values of each figure, by seed."""
    lines = [
        line
        for result in results
        if result["rate"] == rate
        for line in result["lines"]
        if line["step"] == step
    ]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def write(options: Options, results: list[dict[str, Any]], about: str) -> str:
    """Writes `table.md`, `table.csv` and the plot, and gives the text of the table."""
    names = ("distance", "cosine", "moved")
    heads = ["learning rate", "step", *names]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    table = []
    for rate in options.rates:
        for t in options.steps:
            found = aggregate(results, rate, t)
            pairs = [(found[n].mean(), found[n].std(ddof=min(1, len(found[n]) - 1))) for n in names]
            table.append((rate, t, *(x for pair in pairs for x in pair)))
            cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in pairs]
            lines.append(f"| {rate:g} | {t} | " + " | ".join(cells) + " |")
    text = (
        f"## {TITLE}\n\n{options.model}, rank {options.rank}, SGD on LoRA's factors. *distance*: "
        "‖a b + η a₀ a₀ᵀ ΣG‖ / ‖a b‖, zero where LoRA is the random projection; *cosine* of the two; "
        f"*moved*: ‖a − a₀‖ / ‖a₀‖. Mean ± standard deviation over {len(options.seeds)} seeds: "
        f"`python -m experiments.paper.lora_dynamics`.\n\n{about}\n\n" + "\n".join(lines) + "\n"
    )
    replace_text(options.out / "table.md", text)
    with atomic_file(options.out / "table.csv") as file, file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["rate", "step", *(f"{n}{s}" for n in names for s in ("", " sd"))])
        writer.writerows(table)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for rate in options.rates:
        rows = [row for row in table if row[0] == rate]
        x, y, error = ([row[i] for row in rows] for i in (1, 2, 3))
        axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=f"η = {rate:g}")
    axes.set(xscale="log", xlabel="step", ylabel="distance from the projection", title=TITLE)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    for suffix in ("png", "svg"):
        with atomic_file(options.out / f"plot.{suffix}") as file:
            figure.savefig(file, dpi=150, format=suffix)
    plt.close(figure)
    return text


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(options.model, (0, options.length), options.batch, 1, max(options.steps))
    given = problem.make("language", sizes, options.data)
    kept = {k: v for k, v in asdict(options).items() if k not in ("out", "rates", "seeds")}
    budget = json.loads(json.dumps({**kept, "digest": given.digest}))
    file = options.out / "results.jsonl"
    results = [line for line in read(file) if line["budget"] == budget]
    done = {(line["rate"], line["seed"]) for line in results}
    todo = [(rate, seed) for rate in options.rates for seed in options.seeds]
    for rate, seed in track([pair for pair in todo if pair not in done]):
        line = {"rate": rate, "seed": seed, "budget": budget}
        line["lines"] = run(given, options, rate, seed)
        append(file, line)
        results.append(line)
    Console().print(write(options, results, given.about), markup=False)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

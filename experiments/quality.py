"""This command compares the loss of Flora's settings with that of uncompressed accumulation, on the same batches.

    python -m experiments.quality --study orthogonal --out runs/quality
    python -m experiments.quality --study long --together 36 --optimizer-steps 5000     # on a GPU or TPU

Every setting has a grid of learning rates, which grows while its best rate is at an edge, on the first seed; the other
seeds have the best one. Of Flora it is the rate of Adafactor, which embeddings, head and vectors have; that of the
matrices is one number for all rows, `optimizers.MATRICES`, but in the study `long`, which has rows of several. Each run appends one line to
`results.jsonl`; the same command goes on where it stopped. With `--together` that many runs are trained at once, by `jax.vmap`: models as small as
these leave an accelerator idle. All seeds have the whole grid then. The seed of a run is that of its weights and batches; projections
are those of the first seed. The table is written to `quality.md`: it has for each setting the best learning rate, the mean of the
validation loss there, and its ratio to that of uncompressed MultiSteps over Adafactor.
"""

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
from experiments import decoder, optimizers, rates, report, text
from experiments.paper import files
from flora_jax.chain import storage
from flora_jax.chain.distributions import Distribution
from flora_jax.chain.momentum import AtNewProjection
from flora_jax.chain.projection import Side

FIRST_RATES = {
    "flora": (0.03, 0.06),
    "multisteps": (0.015, 0.03, 0.06),
    "muon": (0.02, 0.03, 0.042),
    "adam": (0.001, 0.002, 0.004),
    "flora_adafactor": (0.03, 0.06, 0.12),
    "galore": (0.002, 0.004, 0.008),
}
"""The learning rates with which each method begins."""
OF_MATRICES = (0.014, 0.02, 0.028)
"""The learning rates of matrices with which the study `backward` begins."""
OF_LONG = (0.0088, 0.0125, 0.0175, 0.025)
"""The learning rates of matrices in the study `long`."""
IN_LONG = {"multisteps": (0.0075, 0.015, 0.03), "flora": (0.015,), "muon": (0.015,)}
"""The learning rates of all else there."""
ADAFACTOR = {"rates": 0.05, "backward": 0.015}
"""The learning rate of leaves that are not orthogonalized in the studies whose grid is of the others' rate."""
Study = Literal[
    "orthogonal", "choices", "distributions", "rates", "accumulation", "backward", "state", "long"
]


@dataclass(frozen=True)
class Setting:
    """One row of the table. Fields as in `optimizers.build`.

    Attributes:
      part: The rank is the width divided by this; None for no rank.
      blocks: Of exact gradients the width is orthogonalized in so many blocks.
      matrices: Peak of the learning rate of the matrices, where the grid is of all else; None for `optimizers.MATRICES`.
    """

    method: optimizers.Method = "flora"
    part: int | None = 4
    side: Side = "input"
    distribution: Distribution = "srtt"
    embedding: Literal["output", "whole", "matrix"] = "whole"
    head: Literal["input", "whole", "matrix"] = "whole"
    resample: int = optimizers.ADVISED
    momentum: float | None = None
    nesterov: bool | None = None
    at_new_projection: AtNewProjection = "reset"
    iterations: int = 5
    accumulation: int | None = None
    blocks: int | None = None
    matrices: float | None = None
    weight_decay: float | None = None
    state_dtype: storage.StateDtype = "float32"

    def __str__(self) -> str:
        default = Setting(method=self.method, part=self.part)
        changed = {
            name: value
            for name, value in asdict(self).items()
            if value != getattr(default, name) and name not in ("method", "part")
        }
        ranked = self.method in ("flora", "flora_adafactor", "galore", "exact") and self.part
        names = [NAMES[self.method] + (f" d/{self.part}" if ranked else "")]
        if self.method == "exact" and not ranked:
            names[0] += ", no momentum"
        return ", ".join(names + [f"{name} {value}" for name, value in changed.items()])


NAMES = {
    "flora": "orthogonalized",
    "flora_adafactor": "Adafactor after decompress",
    "exact": "exact gradients, orthogonalized",
    "multisteps": "uncompressed Adafactor",
    "muon": "uncompressed Muon",
    "adam": "uncompressed Adam",
    "galore": "GaLore",
}
GOAL = NAMES["multisteps"]


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
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights, of the batches and of the projections."""
    widths: tuple[int, ...] = (128, 256, 512)
    """Widths of the study of `rates`, which has a picture for each."""
    parts: tuple[int, ...] = (4, 8, 16, 32)
    """The ranks are the width divided by these."""
    together: int = 1
    """How many runs are trained at once."""
    wider: int = 6
    """The number of rates that a grid may grow by."""
    rows: int | None = None
    """How many of the study's settings, from the first; None for all."""
    only: tuple[int, ...] = ()
    """Places of the study's groups of settings, counted from 0, which differ in the rate of the matrices alone; none for all."""
    study: Study = "orthogonal"
    """What is varied: the methods at each rank; the `choices` of the advised preset, one by one; the `distributions`;
    `rates`, a loss for each of a fixed grid; the dtype of the `state`; whether there is `accumulation`; without it, what is done with exact
    gradients, which a step in the `backward` pass has; or what might make a `long` run better, with a grid of both learning rates."""


def settings(config: Config) -> list[Setting]:
    """Gives the rows of a study, the most telling first."""
    uncompressed = Setting(method="multisteps")
    ours = [Setting(part=part) for part in config.parts]
    if config.study == "orthogonal":
        return [
            uncompressed,
            *ours,
            *(replace(one, side="larger") for one in ours),
            *(Setting("flora_adafactor", one.part, "larger", "srht") for one in ours),
            replace(ours[0], nesterov=True),
            Setting(method="adam"),
            Setting(method="galore"),
            Setting(method="muon"),
        ]
    first = ours[0]
    if config.study == "choices":
        return [
            uncompressed,
            first,
            *(replace(first, resample=count) for count in (16, 256, 2**20)),
            replace(first, resample=16, at_new_projection="shorten"),
            replace(first, resample=16, at_new_projection="transfer"),
            replace(first, at_new_projection="shorten"),
            replace(first, at_new_projection="transfer"),
            replace(first, momentum=0.9),
            replace(first, momentum=0.7),
            replace(first, momentum=0.5),
            replace(first, iterations=3),
            replace(first, iterations=7),
            replace(first, embedding="output"),
            replace(first, head="input"),
        ]
    if config.study == "distributions":
        return [
            uncompressed,
            *(
                replace(one, distribution=distribution)
                for one in ours
                for distribution in ("srtt", "srht", "orthonormal", "gaussian", "rademacher")
            ),
        ]
    if config.study == "rates":
        return ours
    if config.study == "long":
        decay = 0.1
        whole, half = (Setting(part=part, state_dtype="int4") for part in (1, 2))
        kinds = [
            Setting("muon"),
            whole,
            replace(whole, state_dtype="int8"),
            half,
            first,
            *ours[1:2],
            replace(whole, weight_decay=decay),
            replace(whole, weight_decay=decay, momentum=0.9, resample=2**20),
            replace(half, weight_decay=decay),
            replace(first, state_dtype="int4"),
            replace(first, weight_decay=decay),
            Setting("muon", weight_decay=decay),
        ]
        return [
            uncompressed,
            replace(uncompressed, weight_decay=decay / 2),
            *(replace(kind, matrices=rate) for kind in kinds for rate in OF_LONG),
        ]
    if config.study == "state":
        narrow = ("float32", "bfloat16", "int8", "int4")
        return [
            uncompressed,
            *(replace(one, state_dtype=dtype) for one in ours for dtype in narrow),
        ]
    if config.study == "backward":
        exact = Setting("exact", None)
        rows = [
            uncompressed,
            exact,
            *(replace(exact, part=part) for part in config.parts),
            Setting("muon", momentum=0.9),
            replace(exact, blocks=2),
            replace(exact, blocks=4),
            replace(exact, iterations=3),
            first,
        ]
        return [uncompressed, *(replace(one, accumulation=1) for one in rows)]
    return [
        replace(one, accumulation=accumulation)
        for accumulation in (config.accumulation, 1)
        for one in (uncompressed, Setting(method="muon"), *ours)
    ]


@dataclass(frozen=True)
class Run:
    """One run of a setting.

    Attributes:
      seed: The seed of the weights and of the batches.
      rate: The peak of the learning rate that the study's grid is of.
      matrices: The peak of that of the matrices, where the grid is of all else.
    """

    seed: int
    rate: float
    matrices: float = optimizers.MATRICES


def train(config: Config, setting: Setting) -> Callable[[list[Run]], list[float]]:
    """Gives a function that trains such runs at once and gives their validation losses."""
    corpus = text.load()
    model = decoder.model(decoder.Shape(width=config.width, layers=config.layers))
    # without accumulation each micro-step is an optimizer step
    accumulation = setting.accumulation or config.accumulation
    steps = config.optimizer_steps * config.accumulation
    loss = partial(decoder.loss, model)

    def transformation(rate: Any, matrices: Any):
        fields = asdict(setting)
        part, blocks, _ = (fields.pop(name) for name in ("part", "blocks", "matrices"))
        of_matrices, others = matrices, rate
        if _of_matrices(config, setting):
            of_matrices, others = rate, ADAFACTOR[config.study]
        return optimizers.build(
            learning_rate=optimizers.cosine(others, steps // accumulation),
            matrices=optimizers.cosine(of_matrices, steps // accumulation),
            rank=part and config.width // part,
            block=blocks and config.width // blocks,
            seed=config.seeds[0],
            **{**fields, "accumulation": accumulation},
        )

    def initial(seed: Any):
        params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
        return params, transformation(0.1, 0.1)[0].init(params)

    def optimizer_step(params, opt_state, windows, rate, matrices):
        tx, projection = transformation(rate, matrices)

        def micro_step(carry, batch):
            params, opt_state = carry
            if projection is None:
                grads = jax.grad(loss)(params, batch)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None
            cycle = flora_jax.cycle(opt_state)
            _, grads = flora_jax.value_and_grad(loss, projection)(params, batch, cycle=cycle)
            return flora_jax.apply_gradients(tx, grads, opt_state, params), None

        return jax.lax.scan(micro_step, (params, opt_state), windows)[0]

    # counts are one for all runs, so that what happens at some steps only is a branch, not a choice of two results
    axes = (0, jax.tree.map(_axis, jax.eval_shape(initial, 0)[1]))
    start = jax.jit(jax.vmap(initial, out_axes=axes))
    step = jax.jit(
        jax.vmap(optimizer_step, in_axes=(*axes, 0, 0, 0), out_axes=axes), donate_argnums=(0, 1)
    )
    evaluate = jax.jit(jax.vmap(loss, in_axes=(0, None)))

    def run(runs: list[Run]) -> list[float]:
        seeds = sorted({one.seed for one in runs})
        which = np.asarray([seeds.index(one.seed) for one in runs])
        rates, matrices = (
            jnp.asarray([getattr(one, name) for one in runs]) for name in ("rate", "matrices")
        )
        params, opt_state = start(jnp.asarray([one.seed for one in runs]))
        for first in range(0, steps, config.accumulation):
            windows = [
                [
                    text.batch(corpus.train, seed, first + i, config.batch, config.length)
                    for i in range(config.accumulation)
                ]
                for seed in seeds
            ]
            params, opt_state = step(params, opt_state, np.asarray(windows)[which], rates, matrices)
        losses = [evaluate(params, batch) for batch in text.held_out(corpus, config.length)]
        means = np.mean(losses, axis=0)
        return [float(mean) if np.isfinite(mean) else float("inf") for mean in means]

    return run


def _axis(leaf: Any) -> int | None:
    count = leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
    return None if count else 0


def _of_matrices(config: Config, setting: Setting) -> bool:
    """Says whether the grid is of the learning rate of the matrices, rather than of that of all else."""
    return config.study in ADAFACTOR and setting.method != "multisteps"


def table(results: list[dict]) -> str:
    """Gives a Markdown table of each row's best learning rate, its loss, and its ratio to uncompressed Adafactor."""
    best = _best(results)
    goals = best.get(GOAL, {})
    lines = [
        "| setting | learning rate | seeds | validation loss | ratio to uncompressed Adafactor |",
        "|---|---|---|---|---|",
    ]
    for name, by_seed in best.items():
        losses = [loss for _, loss in by_seed.values()]
        (rate, _), *_ = by_seed.values()
        ratios = [loss / goals[seed][1] for seed, (_, loss) in by_seed.items() if seed in goals]
        ratio = f"{np.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else ""
        lines.append(f"| {name} | {rate:g} | {len(losses)} | {np.mean(losses):.3f} | {ratio} |")
    return "\n".join(lines) + "\n"


def _best(results: list[dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """Gives for each setting and seed the rate that is best on the first seed, and the loss there."""
    losses: dict[str, dict[int, dict[float, float]]] = {}
    for one in results:
        losses.setdefault(one["name"], {}).setdefault(one["seed"], {})[one["rate"]] = one["loss"]
    best: dict[str, dict[int, tuple[float, float]]] = {}
    for name, by_seed in losses.items():
        first = min(by_seed)
        rate = min(by_seed[first], key=by_seed[first].__getitem__)
        best[name] = {
            seed: (rate, found[rate]) for seed, found in sorted(by_seed.items()) if rate in found
        }
    return best


def picture(config: Config, results: list[dict]) -> None:
    """Draws the losses over the learning rates, a panel for each width and a curve for each rank."""
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for one in sorted(results, key=lambda one: one["budget"]["width"]):
        panel = f"width {one['budget']['width']}"
        losses.setdefault((panel, one["name"]), {})[one["rate"]] = one["loss"]
    title = (
        f"Loss over learning rate, {config.optimizer_steps} optimizer steps, {config.layers} layers"
    )
    report.losses_over_rates(config.out, losses, title)


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    if config.study != "rates":
        study(config)
        return
    results = [one for width in config.widths for one in study(replace(config, width=width))]
    picture(config, results)


def study(config: Config) -> list[dict]:
    """Runs what is missing of a study at one width, and gives all results."""
    log = config.out / "results.jsonl"
    shared = ("out", "seeds", "study", "parts", "rows", "only", "widths", "together", "wider")
    budget = {k: v for k, v in asdict(config).items() if k not in shared}
    results = [result for result in files.read(log) if result["budget"] == budget]

    def known(setting: Setting, seed: int) -> dict[float, float]:
        found = [r for r in results if (r["name"], r["seed"]) == (str(setting), seed)]
        return {r["rate"]: r["loss"] for r in found}

    def run(trained: Any, pairs: list[tuple[Setting, Run]], count: int) -> None:
        """Trains them at once and records the first so many; the rest is there to keep the compiled step."""
        start = time.perf_counter()
        losses = trained([one for _, one in pairs])
        seconds = round((time.perf_counter() - start) / count, 1)
        for (setting, one), loss in list(zip(pairs, losses, strict=True))[:count]:
            found = {"name": str(setting), "rate": one.rate, "seed": one.seed, "loss": loss}
            results.append({**found, "seconds": seconds, "budget": budget})
            files.append(log, results[-1])
            named = f"{setting}  lr {one.rate:g}  seed {one.seed}"
            print(f"{named}: {loss:.4f}  ({seconds:.0f} s)", flush=True)
        files.replace_text(config.out / "quality.md", table(results))

    rows = settings(config)[: config.rows]
    groups: dict[Setting, list[Setting]] = {}
    for setting in rows:
        groups.setdefault(replace(setting, matrices=None), []).append(setting)
    for place, (group, alike) in enumerate(groups.items()):
        if config.only and place not in config.only:
            continue
        trained, size = None, config.together
        while missing := [pair for setting in alike for pair in wanted(config, setting, known)]:
            missing, size = missing[:size], min(size, len(missing))
            trained = trained or train(config, group)
            run(trained, missing + missing[-1:] * (size - len(missing)), len(missing))
    print(table(results))
    return results


def wanted(
    config: Config, setting: Setting, known: Callable[[Setting, int], dict[float, float]]
) -> list[tuple[Setting, Run]]:
    """Gives the runs of a setting to be made next: of its grid, then beyond it, then at the best rate with all seeds."""
    first, *others = config.seeds
    backward = config.study == "backward" and _of_matrices(config, setting)
    grid, wider = OF_MATRICES if backward else FIRST_RATES[setting.method], config.wider
    if config.study == "long":
        grid = IN_LONG.get(setting.method, grid)
    if config.study == "rates":
        grid, wider = tuple(float(f"{0.015 * 2 ** (i / 2):.2g}") for i in range(7)), 0
    tried = known(setting, first)
    new = [rate for rate in grid if rate not in tried]
    beyond = None if new else rates.next_rate(grid, tried, wider, _beyond)
    new += [] if beyond is None else [beyond]
    if config.together > 1:
        pairs = [(seed, rate) for rate in new or tried for seed in config.seeds]
    elif new or config.study == "rates":
        pairs = [(first, rate) for rate in new]
    else:
        pairs = [(seed, min(tried, key=tried.__getitem__)) for seed in others]
    matrices = optimizers.MATRICES if setting.matrices is None else setting.matrices
    return [
        (setting, Run(seed, rate, matrices))
        for seed, rate in pairs
        if rate not in known(setting, seed)
    ]


def _beyond(edge: float, beside: float) -> float:
    factor = edge / beside if edge != beside else 2**0.5
    return float(f"{edge * factor:.2g}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

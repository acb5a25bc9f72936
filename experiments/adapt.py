"""Adapts a model by LoRA, its relatives, Flora, or in full; one table.

    python -m experiments.adapt                          # all methods; some ten minutes on two cores
    python -m experiments.adapt --task summarisation
    python -m experiments.adapt --methods full lora flora --budget 0.5
    python -m experiments.adapt --methods lora-pro --rates 0.003 0.01

Language: a decoder is trained on Python's standard library first (or taken from `--base`, where a run left it),
then adapted to the source of JAX, which it has not seen (Apache-2.0, comes with the package; split by
file like the first). Summarisation: a T5 that has learnt to go on with docstrings is adapted to give their
first lines, as in the paper's tables, and scored by ROUGE. Every method but full training has the largest rank whose trained numbers and
optimizer state, beyond the model itself, fit the same budget of bytes. Each has its best rate of the
few that are tried. Times are medians, all methods in turn in one process; temporaries are the
compiled gradient's, the saved activations for the most part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from safetensors.flax import load_file, save_file

import flora_jax
from experiments import decoder, optimizers, report, text
from flora_jax import Projection
from flora_jax.adapters import (
    Adapter,
    boosting,
    deep_lora,
    discrepant,
    flat_lora,
    growing,
    lora,
    lora_pro,
    lorta,
    proximal,
    run_lora,
    singular_vectors,
    sora,
    xgb_lora,
)
from flora_jax.chain.plan import tree_bytes
from flora_jax.paths import path_name

Method = Literal[
    "full",
    "full-adafactor",
    "flora",
    "lora",
    "rslora",
    "lora-pro",
    "flat-lora",
    "sora",
    "deep-lora",
    "lorta",
    "run-lora",
    "xgb-lora",
]
METHODS: tuple[Method, ...] = get_args(Method)
WHOLE = ("full", "full-adafactor")
HELD_OUT = 64


@dataclass(frozen=True)
class Config:
    """What to adapt, and how."""

    task: Literal["language", "summarisation"] = "language"
    methods: tuple[Method, ...] = METHODS
    budget: float = 1.0
    """MiB for what is trained beyond the model, and for the optimizer's state."""
    rates: tuple[float, ...] = (0.001, 0.004, 0.016)
    """Peaks of a cosine schedule; each method has the best of them."""
    steps: int = 200
    batch: int = 8
    """Examples in a step."""
    length: int = 128
    """Of language: bytes in a window."""
    base_steps: int = 400
    """Of language: steps of full training on the standard library, by Adam."""
    model: decoder.Shape = field(default_factory=lambda: decoder.Shape(width=128))
    """Of language."""
    rounds: int = 9
    """Of the timing."""
    seed: int = 0
    base: Path = Path("runs/adapt/base.safetensors")
    """Of language: the model before; made where it is not there."""
    out: Path | None = None
    """A file for the table."""

    def __post_init__(self):
        for name in ("steps", "batch", "length", "base_steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


class Task(NamedTuple):
    """What is learnt.

    Attributes:
      params: before.
      loss: `(params, batch) -> scalar`.
      batch: `step -> batch` of the training side.
      validation: `params -> loss` of what no step has seen.
      score: `params -> figures` of the test side.
      width: of the model.
      heads: of its attention.
      layers: that XGBLoRA counts.
      layer_of: LoRTA's name of a layer, from a leaf's path.
      about: the data.
    """

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[int], Any]
    validation: Callable[[Any], float]
    score: Callable[[Any], dict[str, float]]
    width: int
    heads: int
    layers: int
    layer_of: Callable[[str], str] | None
    about: str


def language(config: Config, console: Console) -> Task:
    """From the standard library's source to that of JAX."""
    corpus = text.load(Path(str(jax.__file__)).parent)
    loss = partial(decoder.loss, decoder.model(config.model))
    compiled = jax.jit(loss)

    def validation(params: Any) -> float:
        many = [text.batch(corpus.validation, 1, i, HELD_OUT, config.length) for i in range(4)]
        return float(np.mean([float(compiled(params, jnp.asarray(windows))) for windows in many]))

    return Task(
        base(config, console),
        loss,
        partial(_batch, config, corpus.train),
        validation,
        lambda params: {},
        config.model.width,
        config.model.heads,
        config.model.layers + 1,  # and the head
        None,
        f"JAX's source: {len(corpus.train):,} bytes of {corpus.files[0]} files to adapt to, "
        f"{len(corpus.validation):,} of {corpus.files[1]} others to validate",
    )


def summarisation(config: Config, console: Console) -> Task:
    """From going on with docstrings to their first lines; the model and the data of the paper's tables."""
    # of the extra `paper`, which language does without
    from experiments.paper import loop, problem, table
    from experiments.paper.sizes import SIZES
    from experiments.tasks import batches

    sizes = SIZES["cpu"]["summarisation"]
    start = table.warm_start("summarisation", sizes, "offline", {}, console)
    given = problem.make("summarisation", sizes, checkpoint=start)
    order = batches.source(given.train, config.batch, config.seed)
    loss = partial(given.loss, given.model)
    shape = given.model.shape
    return Task(
        jax.tree.map(jnp.asarray, given.params),
        loss,
        lambda step: order[step],
        loop.evaluation(loss, given.validation),
        partial(given.score, given.model),
        shape.width,
        shape.heads,
        2 * shape.layers,
        lambda path: path.rsplit("_", 1)[0],  # attention to itself and to the source are two
        given.about,
    )


TASKS = {"language": language, "summarisation": summarisation}


class Run(NamedTuple):
    """A method at work.

    Attributes:
      state: what it trains, with the optimizer's state.
      step: `(params, state, i, batch) -> (state, loss)`.
      final: `(params, state) -> params`, with nothing beside them.
      gradient: `(params, batch)`, the gradient that a step computes, for its memory.
      trained: numbers that are trained.
      extra: bytes of them, where they are not the model's own, and of the optimizer's state.
    """

    state: Any
    step: Callable[..., tuple[Any, jax.Array]]
    final: Callable[[Any, Any], Any]
    gradient: Callable[[Any, jax.Array], Any]
    trained: int
    extra: int


def build(config: Config, task: Task, method: Method, rank: int, rate: float) -> Run:
    """A method at this rank and rate."""
    params, loss = task.params, task.loss
    schedule = optimizers.cosine(rate, config.steps)
    key = jax.random.key(config.seed + 1)
    if method in (*WHOLE, "flora"):
        return _of_params(method, rank, schedule, params, loss)
    rule = Projection(rank, side="input", embedding="whole", min_dim=64)
    tx = optax.adam(schedule)
    if method == "xgb-lora":
        return _boosted(config, task, rank, schedule, key)
    adapter = lora(rule, alpha=rank)
    perturb: Callable[[Adapter, Any], Adapter] = lambda adapter, i: adapter  # noqa: E731
    if method == "rslora":
        adapter = lora(rule, alpha=1.0, rank_stabilized=True)
    elif method == "lora-pro":
        tx = optax.chain(lora_pro(adapter, params), optax.adam(schedule))
    elif method == "flat-lora":
        strength = growing(0.05, config.steps)
        perturb = lambda adapter, i: flat_lora(adapter, jax.random.fold_in(key, i), strength(i))  # noqa: E731
    elif method == "sora":
        adapter = sora(rule)
        tx = optax.chain(optax.adam(schedule), proximal(1e-2, schedule))
    elif method == "deep-lora":
        vectors = jax.jit(singular_vectors(loss, rule))(params, task.batch(0))
        adapter = deep_lora(rule, vectors, epsilon=0.1)
        tx = optax.chain(optax.adam(schedule), discrepant(0.1))
    elif method == "lorta":
        adapter = lorta(rule, task.heads, layer_of=task.layer_of)
    elif method == "run-lora":
        adapter = run_lora(adapter)
    own = adapter.init(key, params)
    state = (own, tx.init(own))

    def gradient(params, own, i, batch):
        run = perturb(adapter, i).apply(loss)
        return jax.value_and_grad(run, argnums=1)(params, own, batch)

    def step(params, state, i, batch):
        own, opt_state = state
        value, grads = gradient(params, own, i, batch)
        updates, opt_state = tx.update(grads, opt_state, own)
        return (optax.apply_updates(own, updates), opt_state), value

    return Run(
        state,
        step,
        lambda params, state: adapter.merge(params, state[0]),
        lambda params, batch: gradient(params, own, 1, batch),
        _count(own),
        tree_bytes(state),
    )


def _of_params(method, rank, schedule, params, loss) -> Run:
    if method == "flora":
        projection = Projection(
            rank, distribution="srht", embedding="whole", min_dim=64, resample_every=1000
        )
        tx = flora_jax.flora(schedule, projection=projection, momentum=0.9, preset="advised")
        born = flora_jax.value_and_grad(loss, projection)

    else:
        born, tx = None, optax.adam(schedule) if method == "full" else optax.adafactor(schedule)

    def gradient(params: Any, opt_state: Any, batch: Any) -> Any:
        if born is not None:
            return born(params, batch, cycle=flora_jax.cycle(opt_state))
        return jax.value_and_grad(loss)(params, batch)

    first = tx.init(params)

    def step(_, state, i, batch):
        del i
        own, opt_state = state
        value, grads = gradient(own, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, own)
        return (optax.apply_updates(own, updates), opt_state), value

    return Run(
        (params, first),
        step,
        lambda _, state: state[0],
        lambda params, batch: gradient(params, first, batch),
        _count(params),
        tree_bytes(first),
    )


def _boosted(config: Config, task: Task, rank: int, schedule: Any, key: jax.Array) -> Run:
    """Rounds of a tenth of the steps, on two thirds of the layers; the schedule goes on through them."""
    rule = Projection(rank, side="input", embedding="whole", min_dim=64)
    adapter, each = xgb_lora(max(1, 2 * task.layers // 3), rule), max(1, config.steps // 10)
    params, loss = task.params, task.loss
    run = boosting(loss, adapter, optax.scale_by_adam(), each)
    state = run.init(key, params)

    def step(_, state, i, batch):
        scaled = optax.chain(optax.scale_by_adam(), optax.scale(-schedule(i)))
        inner = boosting(loss, adapter, scaled, each)
        opened = state._replace(opt_state=(state.opt_state, optax.ScaleState()))
        opened, value = inner.step(opened, batch)
        return opened._replace(opt_state=opened.opt_state[0]), value

    def gradient(params, batch):
        return jax.value_and_grad(adapter.apply(loss), argnums=1)(
            params, state.adapter_params, batch
        )

    own = (state.adapter_params, state.opt_state)
    return Run(
        state,
        step,
        lambda _, state: run.finish(state),
        gradient,
        _count(own[0]),
        tree_bytes(own),
    )


def largest_rank(config: Config, task: Task, method: Method) -> int:
    """Whose trained numbers and state fit the budget; 0 for a method that has no rank.

    Raises:
      ValueError: not even the smallest fits.
    """
    if method in WHOLE:
        return 0
    if method == "xgb-lora":
        return 1
    step = 2 if method == "deep-lora" else 1

    def extra(rank: int) -> int:
        size = jax.eval_shape(lambda: _extra(config, task, method, rank))
        return size.shape[0]

    most = task.width - 1 if method == "lorta" else task.width // 2
    best = 0
    low, high = 1, most // step
    while low <= high:
        middle = (low + high) // 2
        if extra(middle * step) <= config.budget * 2**20:
            best, low = middle * step, middle + 1
        else:
            high = middle - 1
    if not best:
        needed = extra(step) / 2**20
        raise ValueError(
            f"budget must be at least {needed:.2f} MiB for {method}, found {config.budget}"
        )
    return best


def _extra(config: Config, task: Task, method: Method, rank: int) -> jax.Array:
    """An array of as many bytes; only its shape is asked for."""
    return jnp.zeros(build(config, task, method, rank, 1.0).extra, jnp.int8)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def base(config: Config, console: Console) -> Any:
    """The model before, trained on the standard library or read from the file."""
    model = decoder.model(config.model)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    )
    names, structure = jax.tree_util.tree_flatten_with_path(shapes)
    if config.base.is_file():
        tensors = load_file(config.base)
        leaves = [tensors.get(path_name(path)) for path, _ in names]
        for (path, shape), leaf in zip(names, leaves, strict=True):
            if leaf is None or leaf.shape != shape.shape:
                found = "nothing" if leaf is None else leaf.shape
                raise ValueError(
                    f"{config.base}: {path_name(path)!r} must be of shape {shape.shape}, found {found}"
                )
        return jax.tree.unflatten(structure, leaves)
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    corpus = text.load()
    loss = partial(decoder.loss, model)
    run = _of_params("full", 0, optimizers.cosine(0.004, config.base_steps), params, loss)
    each = partial(_batch, config, corpus.train)
    params, losses = _train(run, params, each, config.base_steps)
    console.print(f"Trained the model before: loss {np.mean(losses[-20:]):.3f} at its end.")
    config.base.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    save_file(tensors, config.base.with_suffix(".new"))
    config.base.with_suffix(".new").replace(config.base)
    return params


def _batch(config: Config, side: Any, step: int) -> jax.Array:
    return jnp.asarray(text.batch(side, config.seed, step, config.batch, config.length))


def _train(
    run: Run, params: Any, batch: Callable[[int], Any], steps: int
) -> tuple[Any, list[float]]:
    step = jax.jit(run.step)
    state, losses = run.state, []
    for i in range(steps):
        state, value = step(params, state, jnp.int32(i), batch(i))
        losses.append(value)
    return jax.jit(run.final)(params, state), [float(value) for value in losses]


def seconds(config: Config, runs: dict[str, Run], params: Any, batch: Any) -> dict[str, float]:
    """Median seconds of a step, all in turn."""
    steps = {name: jax.jit(run.step) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(config.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, runs[name].state, jnp.int32(1), batch))
            if round_:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def compare(config: Config, console: Console) -> tuple[float, list[dict[str, Any]]]:
    """The loss before, and the figures of each method."""
    task = TASKS[config.task](config, console)
    params, first = task.params, task.batch(0)
    before = task.validation(params)
    console.print(f"{task.about}; loss {before:.3f} before.", highlight=False, markup=False)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    for method in config.methods:
        rank = largest_rank(config, task, method)
        tried = {}
        for rate in config.rates:
            runs[method] = build(config, task, method, rank, rate)
            after, _ = _train(runs[method], params, task.batch, config.steps)
            tried[rate] = task.validation(after), after
        rate = min(tried, key=lambda rate: np.nan_to_num(tried[rate][0], nan=np.inf))
        loss, after = tried[rate]
        memory = jax.jit(runs[method].gradient).lower(params, first).compile().memory_analysis()
        assert memory is not None, "XLA gives no memory analysis on this backend"
        rows.append(
            {
                "method": method,
                "rank": rank,
                "trained": runs[method].trained,
                "extra": runs[method].extra,
                "temporaries": memory.temp_size_in_bytes,
                "rate": rate,
                "loss": loss,
                "figures": task.score(after),
            }
        )
        console.print(f"{method}: rank {rank}, loss {loss:.3f} at {rate}")
    times = seconds(config, runs, params, first)
    for row in rows:
        row["seconds"] = times[row["method"]]
    return before, rows


def show(config: Config, before: float, rows: Sequence[dict[str, Any]], console: Console) -> None:
    first = rows[0]
    cells = [
        (
            row["method"],
            str(row["rank"] or "-"),
            f"{row['trained']:,}",
            report.mebibytes(row["extra"]),
            f"{row['temporaries'] / first['temporaries']:.3f}",
            f"{row['seconds'] / first['seconds']:.3f}",
            f"{row['rate']:g}",
            f"{row['loss']:.3f}",
            *(f"{figure:.2f}" for figure in row["figures"].values()),
        )
        for row in rows
    ]
    heads = [
        "method",
        "rank",
        "trained",
        "and state",
        "temporaries",
        "step time",
        "rate",
        "validation loss",
        *first["figures"],
    ]
    size = f" x {config.length} bytes" if config.task == "language" else " docstrings"
    title = (
        f"Adapted in {config.steps} steps of {config.batch}{size}, from "
        f"{before:.3f}; {config.budget:g} MiB; temporaries and time over {first['method']}'s"
    )
    shown = report.table(title, heads, cells)
    console.print(shown)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with config.out.open("w") as file:
            Console(file=file, width=120).print(shown)


def main(config: Config) -> None:
    console = Console(width=120)
    try:
        before, rows = compare(config, console)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    show(config, before, rows, console)


if __name__ == "__main__":
    main(tyro.cli(Config))

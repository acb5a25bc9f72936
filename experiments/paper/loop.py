"""All tables share this training loop: a method on a problem, at a learning rate, from a seed."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax
from experiments.paper import lora, methods
from experiments.paper.problem import Problem, Sizes
from experiments.tasks import batches
from flora_jax.chain.plan import tree_bytes
from flora_jax.finetune.checkpoints import Checkpoints
from flora_jax.fused.leaves import combine
from flora_jax.memory.compiled import compiled_bytes
from flora_jax.update.ordinary_step import ordinary_step

CYCLES = 100_003
"""Number of cycles from one seed's first projection to the next seed's."""


class Bytes(NamedTuple):
    """Bytes that one method takes.

    Attributes:
      params: Bytes of the model's params.
      state: Bytes of the optimizer's state, and of LoRA's factors.
      peak: Bytes of the compiled cycle of micro-steps at its worst moment.
    """

    params: int
    state: int
    peak: int


class Trial(NamedTuple):
    """A compiled method, which `run` trains.

    Attributes:
      start: `seed -> (params, state)`; the params have factors where the method is LoRA.
      cycle: `(params, state, batches, rate) -> (params, state, losses)`: the micro-steps of one optimizer step.
      merge: `params -> params` without factors, for the model.
      evaluate: `params -> validation loss`.
      nbytes: The bytes that the method takes.
    """

    start: Callable[[int], tuple[Any, Any]]
    cycle: Callable[..., Any]
    merge: Callable[[Any], Any]
    evaluate: Callable[[Any], float]
    nbytes: Bytes


class Program(NamedTuple):
    """The functions to be compiled for a method, and the shapes they are compiled for.

    Attributes:
      loss: `(params, batch) -> scalar`, through the factors where the method is LoRA.
      merge: `params -> params` without factors, for the model.
      start: `seed -> (params, state)`.
      cycle: `(params, state, batches, rate) -> (params, state, losses)`, under `jit`.
      shapes: Shapes of the cycle's four arguments.
      extra: Bytes of LoRA's factors.
    """

    loss: Callable[[Any, Any], jax.Array]
    merge: Callable[[Any], Any]
    start: Callable[[int], tuple[Any, Any]]
    cycle: Any
    shapes: tuple[Any, Any, Any, Any]
    extra: int

    def nbytes(self, peak: int = 0) -> Bytes:
        """Counts the bytes of params and state; `peak` is passed on."""
        params = tree_bytes(self.shapes[0]) - self.extra
        return Bytes(params, tree_bytes(self.shapes[1]) + self.extra, peak)


def program(problem: Problem, method: methods.Method, sizes: Sizes) -> Program:
    """Gives the program of a method on a problem; nothing is computed or compiled yet."""
    adapted = method.kind == "lora"
    loss = partial(problem.loss, problem.model)
    adapter = lora.adapter(method.rank) if adapted else None
    merge = lambda params: params  # noqa: E731
    if adapter is not None:
        loss, merge = lora.apply(adapter, loss), jax.jit(partial(lora.merge, adapter))
    build = partial(
        methods.build,
        method,
        accumulation=sizes.accumulation,
        optimizer_steps=sizes.optimizer_steps,
        trained=problem.params is not None,
    )

    def start(seed: int) -> tuple[Any, Any]:
        if problem.params is None:
            params = problem.init(problem.model, seed)
        else:
            params = jax.tree.map(jnp.asarray, problem.params)
        if adapter is not None:
            params = lora.start(adapter, params, seed)
        trained = lora.apart(params)[1] if adapted else params
        state = jax.jit(build(1.0)[0].init)(trained)
        return params, methods.from_cycle(state, CYCLES * seed)

    cycle = jax.jit(partial(_cycle, loss, build, adapted), donate_argnums=(0, 1))
    params, state = jax.eval_shape(partial(start, 0))
    batch = {
        name: jax.ShapeDtypeStruct((sizes.accumulation, sizes.batch, *x.shape[1:]), x.dtype)
        for name, x in problem.train.items()
    }
    shapes = (params, state, batch, jax.ShapeDtypeStruct((), jnp.float32))
    plain = jax.eval_shape(partial(problem.init, problem.model, 0))
    extra = tree_bytes(params) - tree_bytes(plain)
    return Program(loss, merge, start, cycle, shapes, extra)


def prepare(problem: Problem, method: methods.Method, sizes: Sizes) -> Trial:
    """Compiles the method for the problem."""
    parts = program(problem, method, sizes)
    compiled = parts.cycle.lower(*parts.shapes).compile()
    nbytes = parts.nbytes(compiled_bytes(compiled))
    return Trial(
        parts.start, compiled, parts.merge, evaluation(parts.loss, problem.validation), nbytes
    )


def evaluation(
    loss: Callable[[Any, Any], jax.Array], examples: dict[str, np.ndarray]
) -> Callable[[Any], float]:
    """Gives the function `params -> mean loss` over all the examples, under `jit`."""
    of_batch = jax.jit(loss)

    def evaluate(params: Any) -> float:
        many = list(batches.in_order(examples, 64))
        counts = [len(next(iter(batch.values()))) for batch in many]
        losses = [float(of_batch(params, batch)) for batch in many]
        return float(np.average(losses, weights=counts))

    return evaluate


def _cycle(loss: Any, build: Any, adapted: bool, params, state, many, rate):
    """Runs all micro-steps of an optimizer step; Flora's make no uncompressed gradient and no tree of updates."""
    tx, projection = build(rate)
    held, inner = None, loss
    if adapted:
        held, params = lora.apart(params)
        inner = lambda own, batch: loss(combine(own, held), batch)  # noqa: E731
    if projection is None:
        step = ordinary_step(inner, tx)
    else:
        step = flora_jax.make_train_step(inner, tx, projection)

    def micro_step(carry, batch):
        params, state, value = step(*carry, batch)
        return (params, state), value

    (params, state), losses = jax.lax.scan(micro_step, (params, state), many)
    return combine(params, held) if adapted else params, state, losses


def run(
    problem: Problem,
    trial: Trial,
    sizes: Sizes,
    rate: float,
    seed: int,
    *,
    log: Callable[[int, dict[str, float]], None] = lambda *_: None,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains, and gives the validation loss, the scores on the test side, and the losses on the way.

    Args:
      problem: The problem.
      trial: The compiled method.
      sizes: The sizes of the run.
      rate: Peak of the learning rate.
      seed: Seed of the random params, of the order of the examples, and of the projections.
      log: A function that is given the count of optimizer steps and their figures.
      folder: The folder for the states of a run that may be interrupted, where `sizes` ask for some.
      settings: Settings that must be the same when the run goes on.
    """
    params, state = trial.start(seed)
    order = batches.source(problem.train, sizes.batch, seed)
    losses: list[float] = []
    checkpoints, first = None, 0
    if sizes.checkpoint_every and folder is not None:
        checkpoints = Checkpoints(folder, settings or {}, keep=2)  # one stays while one is written
        history: dict[str, Any] = {"losses": losses}
        first, kept, history = checkpoints.restore({"params": params, "state": state}, history)
        params, state, losses = kept["params"], kept["state"], history["losses"]
    with contextlib.closing(checkpoints) if checkpoints else contextlib.nullcontext():
        for step in range(first, sizes.optimizer_steps):
            begin = step * sizes.accumulation
            parts: list[Any] = [order[begin + i] for i in range(sizes.accumulation)]
            many = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            params, state, values = trial.cycle(params, state, many, jnp.float32(rate))
            losses.append(float(values.mean()))
            log(step, {"train loss": losses[-1]})
            if checkpoints and (step + 1) % sizes.checkpoint_every == 0:
                kept = {"params": params, "state": state}
                checkpoints.save(step + 1, kept, {"losses": losses})
    figures = {
        "validation": trial.evaluate(params),
        **problem.score(problem.model, trial.merge(params)),
    }
    log(sizes.optimizer_steps, figures)
    return {**figures, "losses": [round(loss, 5) for loss in losses]}

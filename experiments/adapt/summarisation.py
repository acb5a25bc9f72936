"""Summarisation: a T5 that has learnt to continue docstrings is adapted to give their first lines."""

from functools import partial

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.adapt.config import Config
from experiments.adapt.task import Task


def summarisation(config: Config, console: Console) -> Task:
    """Gives the task that has the model and the data of the paper's tables."""
    # of the extra `paper`, which language does without
    from experiments.paper import loop, problem
    from experiments.paper import start as starts
    from experiments.paper.sizes import SIZES
    from experiments.tasks import batches

    sizes = SIZES["cpu"]["summarisation"]
    start = starts.warm_start("summarisation", sizes, "offline", {}, console)
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

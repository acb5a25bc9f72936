"""Language: a decoder that was trained on the standard library's source is adapted to that of JAX."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.flax import load_file, save_file

from experiments import decoder, optimizers, text
from experiments.adapt import method
from experiments.adapt.config import Config
from experiments.adapt.task import Task
from flora_jax.paths import path_name

HELD_OUT = 64


def language(config: Config, console: Console) -> Task:
    """Gives the task whose model was trained on the standard library's source, and whose data is JAX's."""
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


def base(config: Config, console: Console) -> Any:
    """Gives the params before the adaptation, trained on the standard library or read from the file.

    Raises:
      ValueError: The file has the params of another shape.
    """
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
    run = method.of_params("full", 0, optimizers.cosine(0.004, config.base_steps), params, loss)
    each = partial(_batch, config, corpus.train)
    params, losses = method.train(run, params, each, config.base_steps)
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

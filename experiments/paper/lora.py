"""LoRA as a baseline: the models' own factors `x W + (x a) b`; `W` is frozen, all else is trained.

The one place that knows how. Source: Hu et al., arXiv 2106.09685.
"""

import dataclasses
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def adapted(model: Any, rank: int) -> Any:
    """The model with factors of this rank beside each weight of its layers."""
    return type(model)(dataclasses.replace(model.shape, lora=rank))


def with_factors(params: Any, fresh: Any) -> Any:
    """Params, and the factors out of `fresh`, which are those of the adapted model."""
    found = flatten_dict(params)
    return unflatten_dict({path: found.get(path, x) for path, x in flatten_dict(fresh).items()})


def apart(params: Any) -> tuple[Any, Any]:
    """What is frozen and what is trained, each with None in the places of the other."""
    paths = set(flatten_dict(params))

    def frozen(path) -> bool:
        names = tuple(key.key for key in path)
        return names[-1] == "kernel" and (*names[:-1], "a") in paths

    visit = jax.tree_util.tree_map_with_path
    return (
        visit(lambda path, x: x if frozen(path) else None, params),
        visit(lambda path, x: None if frozen(path) else x, params),
    )

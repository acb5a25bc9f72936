"""LoRA as a baseline: the library's adapter acts on the weights of the layers, which are frozen; all else is trained.

Params with factors are those of the model and one more entry, `lora`, with what the adapter trains.
"""

from collections.abc import Callable
from typing import Any

import jax

from flora_jax import Projection
from flora_jax.adapters import Adapter
from flora_jax.adapters import lora as library
from flora_jax.paths import path_name

FACTORS = "lora"
"""The entry of the params that has the factors, by the path of their weight."""


def adapter(rank: int) -> Adapter:
    """Gives the adapter that has factors of this rank on the input side of each weight of the layers."""

    def select(path: str, _: Any) -> bool:
        return "layer" in path and path.endswith(
            "/kernel"
        )  # stacked, a norm's vectors are matrices

    return library(Projection(rank, side="input", min_dim=1, select=select))


def start(adapter: Adapter, params: Any, seed: int) -> Any:
    """Gives params with fresh factors; the random factor has the variance of the weights at their start, 1/m."""
    own = adapter.init(jax.random.key(seed), params)
    own = {path: {**pair, "down": pair["down"] * 3**0.5} for path, pair in own.items()}  # from 1/3m
    return {**params, FACTORS: own}


def apply(adapter: Adapter, fun: Callable) -> Callable:
    """Gives `fun(params, *args)` for params with factors."""

    def adapted(params: Any, *args: Any) -> Any:
        return adapter.apply(fun)(*_split(params), *args)

    return adapted


def merge(adapter: Adapter, params: Any) -> Any:
    """Gives the model's own params, with the factors added to them."""
    return adapter.merge(*_split(params))


def apart(params: Any) -> tuple[Any, Any]:
    """Gives what is frozen and what is trained, each with None in the places of the other."""
    visit = jax.tree_util.tree_map_with_path
    return (
        visit(lambda path, x: x if path_name(path) in params[FACTORS] else None, params),
        visit(lambda path, x: None if path_name(path) in params[FACTORS] else x, params),
    )


def _split(params: Any) -> tuple[Any, Any]:
    return {name: x for name, x in params.items() if name != FACTORS}, params[FACTORS]

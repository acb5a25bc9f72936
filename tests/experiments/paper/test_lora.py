"""LoRA has factors on the weights of the layers, and they start as they should."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import lora, problem
from tests.helpers import assert_tree_equal, normal

ENDS = {"T5-test": 16, "GPT-2-test": 4, "LLaMA-test": 7, "ViT-test": 6}
"""Matrices of a layer: T5's encoder has six and its decoder ten."""


def outline(name, **changes):
    task = {"T5-test": "summarisation", "ViT-test": "images"}.get(name, "language")
    given = problem.outline(task, problem.Sizes(name, (4, 4), 1, 1, 1), changes)
    return jax.eval_shape(partial(given.init, given.model, 0))


@pytest.mark.parametrize("name", ENDS)
def test_each_weight_of_the_layers_has_factors_and_no_other(name):
    params = outline(name)
    found = jax.eval_shape(lambda x: lora.start(lora.adapter(1), x, 0), params)["lora"]
    assert len(found) == ENDS[name]
    assert all("layers/" in path and path.endswith("/kernel") for path in found)
    for pair in found.values():
        layers, _, rank = pair["down"].shape
        assert layers == 2 > rank == 1 and pair["up"].shape[:2] == (2, 1)


def test_layers_that_are_not_stacked_have_them_too():
    params = outline("LLaMA-test", scan=False)
    found = jax.eval_shape(lambda x: lora.start(lora.adapter(1), x, 0), params)["lora"]
    assert len(found) == 2 * 7


def test_factors_start_at_random_with_the_variance_of_a_weight_and_at_zero():
    params = {"layers": {"up": {"kernel": jnp.asarray(normal(0, (2, 64, 96)))}}}
    adapter = lora.adapter(32)
    tree, other = (lora.start(adapter, params, seed) for seed in (0, 1))
    pair = tree["lora"]["layers/up/kernel"]
    down = np.asarray(pair["down"], np.float64)
    # the mean of 4096 squares of a uniform variable: standard deviation 0.9 / 64 of the mean
    assert abs(64 * (down**2).mean() - 1) < 5 * 0.9 / 64
    assert not pair["up"].any()
    assert (pair["down"] != other["lora"]["layers/up/kernel"]["down"]).mean() > 0.99
    assert_tree_equal(lora.merge(adapter, tree), params)

"""decompress: estimates gradients from sketches, `Ĝ = C A`, for the base optimizer (arXiv 2402.03293)."""

import jax
import jax.numpy as jnp
import optax

from flora_jax.chain import products, recorder
from flora_jax.chain.leaf_operations import LeafOperation
from flora_jax.chain.sketch import Sketch, is_sketch
from flora_jax.chain.transformation import transformation

_decompress = LeafOperation("flora_decompress", products.decompress_with, expands=True)


def decompress() -> optax.GradientTransformation:
    """Turns each sketch `C` into the unbiased estimate `C A` of its gradient.

    Uncompressed leaves pass through unchanged. Any optax optimizer can follow, since what it receives
    has the shapes and dtypes of the gradients.

    Returns:
      A transformation without state.

    Raises:
      ValueError: On `update`, a sketch has no cycle, because no `project` has set it.

    References:
      arXiv 2402.03293, Algorithm 1, line 10; Algorithm 2, line 14.
    """

    def update_fn(updates, state, params=None):
        del params

        def expand(leaf):
            if not is_sketch(leaf):
                return leaf
            leaf = with_cycle("decompress", leaf)
            recorder.note(leaf.spec.path)
            if recorder.outlines():
                return jnp.zeros(leaf.spec.part_shape, leaf.spec.dtype)
            return _decompress(leaf.spec, leaf.cycle, leaf.data)

        return jax.tree.map(expand, updates, is_leaf=is_sketch), state

    return transformation(optax.GradientTransformation(optax.init_empty_state, update_fn))


def with_cycle(name: str, leaf: Sketch) -> Sketch:
    """Returns the sketch; raises a ValueError if no `project` has set its cycle."""
    leaf = leaf.resolved()
    if leaf.cycle is None:
        raise ValueError(
            f"{leaf.spec.path!r}: {name} found a sketch without a cycle, expected one that "
            "flora_jax.project has passed on"
        )
    return leaf

"""decompress: estimates gradients from sketches, `Ĝ = C A`, for the base optimizer (arXiv 2402.03293)."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from flora_jax.chain import products, recorder
from flora_jax.chain.sketch import Spec, is_sketch
from flora_jax.chain.transformation import transformation

_tracing = contextvars.ContextVar("tracing", default=False)
decompress_p = core.Primitive("flora_decompress")
"""`products.decompress` of one leaf as a single operation of a jaxpr; it is traced and never run."""


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
            leaf = leaf.resolved()
            if leaf.cycle is None:
                raise ValueError(
                    f"{leaf.spec.path!r}: decompress found a sketch without a cycle, expected one "
                    "that flora_jax.project has passed on"
                )
            return _decompressed(leaf.spec, leaf.cycle, leaf.data)

        return jax.tree.map(expand, updates, is_leaf=is_sketch), state

    return transformation(optax.GradientTransformation(optax.init_empty_state, update_fn))


@contextlib.contextmanager
def as_one_operation() -> Iterator[None]:
    """Makes `decompress` write one `decompress_p` for each leaf into the jaxprs traced inside this context."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def _decompressed(spec: Spec, cycle: Any, data: jax.Array) -> jax.Array:
    recorder.note(spec.path)
    if recorder.outlines():
        return jnp.zeros(spec.part_shape, spec.dtype)
    if _tracing.get():
        return decompress_p.bind(jnp.asarray(cycle), data, spec=spec)
    return products.decompress(spec, cycle, data)


@decompress_p.def_abstract_eval
def _(cycle, data, *, spec):
    return jax.make_jaxpr(functools.partial(products.decompress, spec))(cycle, data).out_avals[0]

"""Tag: the number of a cycle as floats that arithmetic on gradients leaves readable.

Between `value_and_grad`, `project` and `decompress` a tree of sketches may be summed, averaged over devices,
scaled, clipped by its norm, or cast. All of this acts on every leaf. So a sketch does not carry its cycle as an
integer, but as multiples of a tiny unit beside that unit: whatever scales the one scales the other, and in a
norm they vanish. What destroys the ratio (noise, signs, the sum of two cycles) is seen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flora_jax import dtypes
from flora_jax.tracing import once

DIGITS = 8
BASE = 16
UNIT = 2.0**-80
"""Its square is zero in float32, so that no norm changes."""
LARGEST = 2.0**-30
"""A unit above this was not scaled but replaced, as by the sign of each number."""


@dtypes.promoting()
@once
def encode(cycle: Any) -> jax.Array:
    """Returns the tag of a cycle: its eight hexadecimal digits and a one, times `UNIT`; float32 `(9,)`."""
    cycle = jnp.asarray(cycle, jnp.int32)
    digits = [(cycle >> (4 * place)) & (BASE - 1) for place in range(DIGITS)]
    return jnp.stack([*digits, jnp.ones_like(cycle)], -1).astype(jnp.float32) * jnp.float32(UNIT)


@dtypes.promoting()
@once
def decode(tag: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cycle of a tag, int32, and whether the tag is one still.

    Args:
      tag: What `encode` returned, or a multiple of it, of shape `(…, 9)` and any floating type.
    """
    tag = tag.astype(jnp.float32)
    unit = tag[..., -1]
    ratios = tag[..., :-1] / jnp.where(unit == 0, 1, unit)[..., None]
    digits = jnp.round(ratios)
    fits = (jnp.abs(ratios - digits) < 0.25) & (digits >= 0) & (digits < BASE)
    valid = jnp.all(fits, -1) & (unit != 0) & (jnp.abs(unit) < LARGEST)
    places = jnp.left_shift(1, 4 * jnp.arange(DIGITS, dtype=jnp.int32))
    numbers = jnp.where(fits, digits, 0).astype(jnp.int32)
    return jnp.sum(numbers * places, -1, dtype=jnp.int32), valid

"""What each operation does with a `Weight`: one rule for each, by the name of the primitive.

- `movers`, `stacks`, `lookups`: transpose, reshape, slice, rows by index and their like act on the value
  and on the tap alike, so long as they leave the projected axes together or say which of their indices
  are left.
- `arithmetic`: scaling, sums, casts, and what leaves a weight as it is.
- `products`, `convolutions`: end the way of a weight in a plain array.
- `control_flow`: is entered.

A rule gives None where it does not fit; the weight is then exposed.
"""

from flora_jax.fused.rules import (
    arithmetic,
    control_flow,
    convolutions,
    lookups,
    movers,
    products,
    stacks,
)

RULES = {
    **movers.RULES,
    **stacks.RULES,
    **lookups.RULES,
    **arithmetic.RULES,
    **products.RULES,
    **convolutions.RULES,
    **control_flow.RULES,
}

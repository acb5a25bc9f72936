"""Rules: what each operation does with a `Weight`, by the name of the JAX primitive.

- `movers`, `stacks` and `lookups` are transpose, reshape, slice, concatenate, rows by index, and the
  like. They act on the value and on the up factor in the same way, provided that they keep the
  projected axes together, or tell which of their indices are left. Their result is a `Weight` again.
- `arithmetic` has scaling, sums, casts, and operations that leave a weight as it is. Their result is a
  `Weight` too.
- `products` and `convolutions` multiply by a weight. Their result is a plain array.
- `control_flow` evaluates the bodies of `jit`, `scan`, `cond`, `remat` and `shard_map`.

A rule returns None where it does not apply. The weight is then used as a plain array, and its full
gradient is materialized.
"""

from flora_jax.fused.rules import (
    arithmetic,
    control_flow,
    convolutions,
    custom,
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
    **custom.RULES,
    **control_flow.RULES,
}
